"""Direct logit attribution and logit lens: a margin as an exact sum over components, and layer by layer.

Each component's contribution is its output to the residual stream, projected on the direction that the final
norm and the unembedding read. The scales of norms are held at their values for the prompt. For every prompt,
the contributions must add up to the margin; otherwise an error is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
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
from defenses.contract import Defense, QueryChat
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.mechanism.components import LayerModules, ModelComponents
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout

_EXACT_DTYPES = (torch.float32, torch.float64)
_Contribution = Float[Tensor, " rows"]


@dataclass(frozen=True)
class MarginAttribution:
    """Margins of one condition, by layer and by component.

    Attributes:
        margins: margin of each query, nats.
        margins_by_layer: logit-lens margin of each query, nats: of the residual stream that enters each block
            and, last, the final norm.
        parts: contribution of each component to the margins; None in half precision, where contributions do
            not add up.
    """

    margins: Float[np.ndarray, " queries"]
    margins_by_layer: Float[np.ndarray, "queries layers"]
    parts: Decomposition | None


@dataclass(frozen=True)
class DirectLogitAttribution:
    """Attributes the margins of one model to its components.

    Args:
        components: components of the model.
        readout: linear readout that defines the margin.
    """

    components: ModelComponents
    readout: Readout

    @property
    def is_exact(self) -> bool:
        """Whether contributions add up; half precision rounds the output of each block."""
        return self.components.model.dtype in _EXACT_DTYPES

    @cached_property
    def parts(self) -> tuple[ModelPart, ...]:
        """Embedding, heads, biases, MLPs and what a defense adds between blocks, in order."""
        parts = [ModelPart("embedding")]
        n_layers = len(self.components.layers)
        for layer in range(n_layers):
            parts.append(ModelPart("added", layer))
            parts += [ModelPart("head", layer, head) for head in range(self.components.n_heads)]
            parts += [ModelPart("bias", layer), ModelPart("mlp", layer)]
        return (*parts, ModelPart("added", n_layers), ModelPart("bias"))

    def attribute_margins(
        self, session: ModelSession, defense: Defense, query_chats: Sequence[QueryChat]
    ) -> MarginAttribution:
        """Attribute the margins of queries under one defense.

        Args:
            session: the model.
            defense: defense, prepared for the model.
            query_chats: queries to score, an attack applied.

        Raises:
            UserError: If the contributions of a prompt do not add up to its margin.
        """
        session = session.with_questions(self.readout.questions)
        prompts_by_query = session.render_prompts(defense, query_chats)
        query_of_prompt = torch.tensor([row for row, prompts in enumerate(prompts_by_query) for _ in prompts])
        prompt_ids = [
            prompt.append_prefix(self.readout.response_prefix)
            for prompts in prompts_by_query
            for prompt in prompts
        ]
        values: Tensor = sum(
            weight * self._attribute_prompts(session, member, prompt_ids)
            for weight, member in list_blend_members(defense)
        )  # type: ignore[assignment]
        n_questions = max(1, len(self.readout.questions))
        pooled = []
        for row in range(len(query_chats)):
            # The questions about one copy of a query are averaged; then the defense pools its copies.
            copies = values[query_of_prompt == row].unflatten(0, (-1, n_questions)).mean(1)
            pooled.append(copies[copies[:, 0].argmax()] if defense.pool == "max" else copies.mean(0))
        table = torch.stack(pooled).numpy()
        margins, margins_by_layer, contributions = np.split(
            table, [1, len(self.components.layers) + 2], axis=1
        )
        parts = Decomposition(self.parts, contributions, margins[:, 0]) if self.is_exact else None
        return MarginAttribution(margins[:, 0], margins_by_layer, parts)

    def _attribute_prompts(
        self, session: ModelSession, defense: Defense, prompt_ids: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Margin, logit-lens margins and contributions of every prompt, as one row each."""
        engine = session.engine
        values: dict[int, Tensor] = {}
        embedding: HookPoint = (self.components.layers[0].block, "enters")
        # A hook sees the changes of hooks registered earlier: the embedding is recorded before the defense's.
        with (
            record_activations(engine, {"embedding": embedding}) as undefended,
            defense.apply_to(session.loaded_model.model),
            record_activations(engine, self._hook_points) as activations,
        ):
            for rows, batch_values in engine.iterate_first_token(
                prompt_ids, lambda logits: self._attribute_batch(activations | undefended, logits)
            ):
                values.update(zip(rows, batch_values, strict=True))
        table = torch.stack([values[row] for row in range(len(prompt_ids))])
        if self.is_exact and defense.weights_fingerprint() == "":
            # An unmodified model adds nothing between its blocks; otherwise it has components that are not
            # known.
            first_part = table.shape[1] - len(self.parts)
            added = [column for column, part in enumerate(self.parts, first_part) if part.kind == "added"]
            _check_reconstruction(
                table[:, added].abs(),
                type(self.components.model).__name__,
                "the stream between its blocks changes the margin by",
            )
        return table

    @cached_property
    def _hook_points(self) -> dict[Hashable, HookPoint]:
        """Hook points by name and layer.

        `stream`: the input of a block or, last, of the final norm; `heads`: the concatenated head outputs;
        `attention` and `mlp`: their outputs to the stream; `before_norm`: the input of the norm after the
        attention; `normed`: the output of the final norm.
        """
        hook_points: dict[Hashable, HookPoint] = {}
        for number, layer in enumerate(self.components.layers):
            hook_points["stream", number] = layer.block, "enters"
            hook_points["heads", number] = layer.output_projection, "enters"
            hook_points["attention", number] = layer.attention, "leaves"
            hook_points["mlp", number] = layer.mlp, "leaves"
            if layer.post_attention_norm is not None:
                hook_points["before_norm", number] = layer.post_attention_norm.module, "enters"
        hook_points["stream", len(self.components.layers)] = self.components.final_norm.module, "enters"
        hook_points["normed"] = self.components.final_norm.module, "leaves"
        return hook_points

    def _attribute_batch(
        self, activations: RecordedActivations, logits: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows values"]:
        """Margin, logit-lens margins and contributions of one batch."""
        margins = self.readout.compute_margins(logits)[:, 0]
        final_norm = self.components.final_norm
        streams = [activations["stream", number] for number in range(len(self.components.layers) + 1)]
        margins_by_layer = [
            self.components.compute_margins(final_norm.apply_without_hooks(stream), self.readout)
            .double()
            .cpu()
            for stream in streams
        ]
        columns = [margins[:, None], torch.stack(margins_by_layer, 1)]
        if self.is_exact:
            model_name = type(self.components.model).__name__
            _check_reconstruction(
                (margins_by_layer[-1] - margins).abs(),
                model_name,
                "the logit-lens margin after its last block misses the margin by",
            )
            contributions = self._part_contributions(activations).double().cpu()
            _check_reconstruction(
                (contributions.sum(1) - margins).abs(),
                model_name,
                "the sum of its components misses the margin by",
            )
            columns.append(contributions)
        return torch.cat(columns, 1)

    def _part_contributions(self, activations: RecordedActivations) -> Float[Tensor, "rows parts"]:
        """Contribution of each component to the margin, in the order of `parts`.

        With x_l the stream that enters block l (x_L enters the final norm), a_l and m_l the outputs of its
        attention and MLP, and d the direction and b the constant for which margin = d · x_L + b, the sum
        telescopes:

            margin = d · embedding + Σ_l [d · added_l + d · a_l + d · m_l] + d · added_L + b,
            where added_0 = x_0 - embedding and added_{l+1} = x_{l+1} - (x_l + a_l + m_l).

        An unmodified model adds nothing between blocks. d · a_l splits further, over heads and a bias.
        """
        final_norm, layers = self.components.final_norm, self.components.layers
        # If the layers are spread over devices, all activations move to the device of the unembedding.
        device = self.components.unembedding.weight.device
        activations = {name: states.to(device) for name, states in activations.items()}
        final_stream = activations["stream", len(layers)]
        normed_direction, constant = self.components.linearize_margin(activations["normed"], self.readout)
        direction = final_norm.pull_back_direction(
            normed_direction, final_norm.measure_scale(final_stream, activations["normed"])
        )

        def project(states: Tensor) -> _Contribution:
            return (states.float() * direction).sum(1)

        expected_stream = activations["embedding"]
        contributions = [project(expected_stream)]
        for number, layer in enumerate(layers):
            stream = activations["stream", number]
            contributions.append(project(stream - expected_stream))
            contributions += self._attention_contributions(activations, number, layer, direction, project)
            contributions.append(project(activations["mlp", number]))
            expected_stream = stream + activations["attention", number] + activations["mlp", number]
        contributions.append(project(final_stream - expected_stream))
        contributions.append(constant + normed_direction @ final_norm.measure_bias(normed_direction))
        return torch.stack(contributions, 1)

    def _attention_contributions(
        self,
        activations: RecordedActivations,
        number: int,
        layer: LayerModules,
        direction: Float[Tensor, "rows width"],
        project: Callable[[Tensor], _Contribution],
    ) -> list[_Contribution]:
        """Contributions of each head of a layer and of its bias, which add up to d · a_l.

        With z the concatenated head outputs, W and c the output projection and its bias, and N and n the
        linear map at a fixed scale and the bias of the norm after it (most models have none): a_l = N(W z +
        c) + n. So d · a_l = Σ_head (Wᵀ Nᵀ d)_head · z_head + Nᵀ d · c + d · n.
        """
        before_projection, bias = direction, torch.zeros_like(direction[:, 0])
        if (norm := layer.post_attention_norm) is not None:
            bias = bias + project(norm.measure_bias(direction).expand_as(direction))
            scale = norm.measure_scale(activations["before_norm", number], activations["attention", number])
            before_projection = norm.pull_back_direction(before_projection, scale)
        if layer.output_projection_bias is not None:
            bias = bias + before_projection @ layer.output_projection_bias.to(before_projection.device)
        products = layer.pull_back_to_heads(before_projection) * activations["heads", number].float()
        heads = products.unflatten(1, (self.components.n_heads, -1)).sum(2)
        return [*heads.unbind(1), bias]


def _check_reconstruction(errors: Tensor, model_name: str, violation: str) -> None:
    """Raise if the reconstruction of a margin has an error above the tolerance.

    Args:
        errors: absolute errors, nats.
        model_name: class of the model, for the message.
        violation: what the largest error means, as a sentence that ends before the number.
    """
    if not (largest_error := float(errors.max())) <= MARGIN_TOLERANCE:
        raise UserError(
            f"{model_name}: {violation} {largest_error:.2g} nats (tolerance {MARGIN_TOLERANCE}), so this "
            "model has components that are not known, and its margins are not attributed; "
            f"{OTHER_COMMANDS_HINT}"
        )
