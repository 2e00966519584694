"""A margin as an exact sum over parts, and layer by layer (direct logit attribution, logit lens).

Every part's share is what it writes into the residual stream, read along the direction in which the final
norm and the unembedding read it; the scales of norms are frozen at what they are for this prompt. Parts add
up to the margin for every single prompt, or there is an error.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.mechanism.components import OTHER_COMMANDS_HINT
from analysis.mechanism.hooks import HookPoint, RecordedActivations, record_activations
from analysis.models.session import list_blend_members
from analysis.stats.tables import MARGIN_TOLERANCE, Decomposition, ModelPart
from defenses.contract import Defense
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.datasets.queries import Query
    from analysis.mechanism.components import ModelComponents
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout

_EXACT_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class MarginAttribution:
    """What one condition comes to, query by query.

    Attributes:
        margins: of each query, nats.
        margins_by_layer: margin read off the stream that enters each block, and at last the final norm.
        parts: what each part adds to the margin; None in half precision, where nothing adds up.
    """

    margins: Float[np.ndarray, " queries"]
    margins_by_layer: Float[np.ndarray, "queries layers"]
    parts: Decomposition | None


@dataclass(frozen=True)
class DirectLogitAttribution:
    """How the margins of one model are split.

    Args:
        components: where its parts lie.
        readout: how logits become a margin; a linear one.
    """

    components: ModelComponents
    readout: Readout

    @property
    def is_exact(self) -> bool:
        """Whether sums come out: half precision rounds what each block hands on."""
        return self.components.model.dtype in _EXACT_DTYPES

    @cached_property
    def parts(self) -> tuple[ModelPart, ...]:
        """Embedding, heads, MLPs, biases, and what a defense adds between blocks."""
        found = [ModelPart("embedding")]
        for number in range(len(self.components.layers)):
            found.append(ModelPart("added", number))
            found += [ModelPart("head", number, head) for head in range(self.components.n_heads)]
            found += [ModelPart("bias", number), ModelPart("mlp", number)]
        return (*found, ModelPart("added", len(self.components.layers)), ModelPart("bias"))

    def attribute_margins(
        self, session: ModelSession, defense: Defense, queries: Sequence[Query]
    ) -> MarginAttribution:
        """Return the margins of all queries under one defense, split.

        Args:
            session: the model, and how queries are sent.
            defense: prepared for it.
            queries: what is asked.
        """
        session = session.with_questions(self.readout.questions)
        prompts = session.render_queries(defense, queries)
        owner = torch.tensor([row for row, readings in enumerate(prompts) for _ in readings])
        flat = [
            prompt.append_prefix(self.readout.response_prefix) for readings in prompts for prompt in readings
        ]
        found: Tensor = sum(
            weight * self._attribute_prompts(session, one, flat)
            for weight, one in list_blend_members(defense)
        )  # type: ignore[assignment]
        pooled = []
        for row in range(len(queries)):
            # What is asked about a reading has one mean.
            mine = found[owner == row].unflatten(0, (-1, max(1, len(self.readout.questions)))).mean(1)
            pooled.append(mine[mine[:, 0].argmax()] if defense.pool == "max" else mine.mean(0))
        table = torch.stack(pooled).numpy()
        margins, layers, parts = np.split(table, [1, len(self.components.layers) + 2], axis=1)
        total = Decomposition(self.parts, parts, margins[:, 0]) if self.is_exact else None
        return MarginAttribution(margins[:, 0], layers, total)

    def _attribute_prompts(
        self, session: ModelSession, defense: Defense, prompt_ids: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Of every prompt: margin, margins by layer, parts."""
        engine = session.engine
        values: dict[int, Tensor] = {}
        first: HookPoint = (self.components.layers[0].block, "enters")
        # Hooks see what those before them have done: the first is open before the defense has any.
        with (
            record_activations(engine, {"embedding": first}) as early,
            defense.apply_to(session.loaded_model.model),
            record_activations(engine, self._hook_points) as held,
        ):
            for rows, read in engine.iterate_first_token(
                prompt_ids, lambda logits: self._attribute_batch(held | early, logits)
            ):
                values.update(zip(rows, read, strict=True))
        found = torch.stack([values[row] for row in range(len(prompt_ids))])
        if self.is_exact and defense.weights_fingerprint() == "":
            # Between the blocks of an untouched model nothing is added: else it has parts that nobody knows.
            added = [
                place
                for place, part in enumerate(self.parts, found.shape[1] - len(self.parts))
                if part.kind == "added"
            ]
            _check_reconstruction(
                found[:, added].abs(), type(self.components.model).__name__, "what its blocks hand on"
            )
        return found

    @cached_property
    def _hook_points(self) -> dict[Hashable, HookPoint]:
        taps: dict[Hashable, HookPoint] = {}
        for number, layer in enumerate(self.components.layers):
            taps["stream", number] = layer.block, "enters"
            taps["joined", number] = layer.output_projection, "enters"
            taps["attention", number] = layer.attention, "leaves"
            taps["mlp", number] = layer.mlp, "leaves"
            if layer.post_attention_norm is not None:
                taps["before", number] = layer.post_attention_norm.module, "enters"
        taps["stream", len(self.components.layers)] = self.components.final_norm.module, "enters"
        taps["normed"] = self.components.final_norm.module, "leaves"
        return taps

    def _attribute_batch(
        self, activations: RecordedActivations, logits: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows values"]:
        margin = self.readout.compute_margins(logits)[:, 0]
        layers, final = len(self.components.layers), self.components.final_norm
        streams = [activations["stream", number] for number in range(layers + 1)]
        by_layer = [
            self.components.compute_margins(final.apply_without_hooks(stream), self.readout).double().cpu()
            for stream in streams
        ]
        found = [margin[:, None], torch.stack(by_layer, 1)]
        name = type(self.components.model).__name__
        if self.is_exact:
            _check_reconstruction(
                (by_layer[-1] - margin).abs(), name, "the margin read behind its last block"
            )
            shares = self._part_contributions(activations, streams).double().cpu()
            _check_reconstruction((shares.sum(1) - margin).abs(), name, "the sum of its parts")
            found.append(shares)
        return torch.cat(found, 1)

    def _part_contributions(
        self, activations: RecordedActivations, streams: Sequence[Tensor]
    ) -> Float[Tensor, "rows parts"]:
        """What each part adds to the margin, in the order of `parts`."""
        final = self.components.final_norm
        # Where the layers of a model are spread over devices, what they held is brought to one.
        home = self.components.unembedding.weight.device
        activations = {name: states.to(home) for name, states in activations.items()}
        streams = [states.to(home) for states in streams]
        read, constant = self.components.linearize_margin(activations["normed"], self.readout)
        along = final.pull_back_direction(read, final.measure_scale(streams[-1], activations["normed"]))

        def share(states: Tensor) -> Tensor:
            return (states.float() * along).sum(1)

        handed_on = activations["embedding"]
        found = [share(handed_on)]
        for number, layer in enumerate(self.components.layers):
            found.append(share(streams[number] - handed_on))
            handed_on = streams[number] + activations["attention", number] + activations["mlp", number]
            inner, bias = along, torch.zeros_like(constant)
            if (norm := layer.post_attention_norm) is not None:
                bias = bias + share(norm.measure_bias(along).expand_as(along))
                scale = norm.measure_scale(activations["before", number], activations["attention", number])
                inner = norm.pull_back_direction(inner, scale)
            if layer.output_projection_bias is not None:
                bias = bias + inner @ layer.output_projection_bias.to(inner.device)
            each = layer.pull_back_to_heads(inner) * activations["joined", number].float()
            heads = each.unflatten(1, (self.components.n_heads, -1)).sum(2)
            found += [*heads.unbind(1), bias, share(activations["mlp", number])]
        found += [share(streams[-1] - handed_on), constant + read @ final.measure_bias(read)]
        return torch.stack(found, 1)


def _check_reconstruction(errors: Tensor, model_name: str, quantity: str) -> None:
    """Raise where what was computed is not the margin."""
    if not (worst := float(errors.max())) <= MARGIN_TOLERANCE:
        raise UserError(
            f"{model_name}: {quantity} misses the margin by {worst:.2g} nats, where {MARGIN_TOLERANCE} is allowed, so this "
            f"model is not built as it seems, and nothing is said about its parts; {OTHER_COMMANDS_HINT}"
        )
