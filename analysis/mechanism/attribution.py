"""Direct logit attribution and logit lens: a margin as an exact sum over components, and layer by layer.

Each component's contribution is its output to the residual stream, projected on the direction that the final
norm and the unembedding read. The scales of norms are held at their values for the prompt, and so are the
weights of the logits where the readout is not linear (`logit_weights`); what is left of the margin then is a
part of its own, `readout`. For every prompt, the contributions must add up to the margin; otherwise an error
is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.mechanism.components import OTHER_COMMANDS_HINT
from analysis.mechanism.logit_weights import average_logit_gradients, compute_logit_gradients
from analysis.models.hooks import HookPoint, RecordedActivations, record_activations
from analysis.models.session import list_blend_members
from analysis.stats.tables import MARGIN_TOLERANCE, READOUT_PART, Decomposition, ModelPart
from defenses.contract import Defense, QueryChat
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.mechanism.components import LayerModules, ModelComponents
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout

_EXACT_DTYPES = (torch.float32, torch.float64)
# Prompts whose logits, and as many weights, are held in memory while two runs get the same weights.
_MAX_PAIRED_PROMPTS = 128
_Contribution = Float[Tensor, " rows"]
PromptIds = tuple[int, ...]
WeightChoice = Callable[[list[int], Tensor], Tensor]  # numbers of prompts, and their logits → weights


@dataclass(frozen=True)
class MarginAttribution:
    """Margins of one condition, by layer and by component.

    Attributes:
        margins: margin of each query, nats.
        margins_by_layer: logit-lens margin of each query, nats: of the residual stream that enters each block
            and, last, the final norm.
        weight_sizes: sum of the absolute weights of all logits in the margin of each query; 2 for a margin
            that is a difference of two mean logits, and near 0 where the readout is saturated.
        parts: contribution of each component to the margins; None in half precision, where contributions do
            not add up.
    """

    margins: Float[np.ndarray, " queries"]
    margins_by_layer: Float[np.ndarray, "queries layers"]
    weight_sizes: Float[np.ndarray, " queries"]
    parts: Decomposition | None


@dataclass(frozen=True)
class DirectLogitAttribution:
    """Attributes the margins of one model to its components.

    Args:
        components: components of the model.
        readout: readout that defines the margin.
    """

    components: ModelComponents
    readout: Readout

    @property
    def is_exact(self) -> bool:
        """Whether contributions add up; half precision rounds the output of each block."""
        return self.components.model.dtype in _EXACT_DTYPES

    @cached_property
    def parts(self) -> tuple[ModelPart, ...]:
        """Embedding, heads, biases, MLPs, and what a defense adds between blocks, in order.

        Last comes the remainder of a readout that is not linear.
        """
        parts = [ModelPart("embedding")]
        n_layers = len(self.components.layers)
        for layer in range(n_layers):
            parts.append(ModelPart("added", layer))
            parts += [ModelPart("head", layer, head) for head in range(self.components.n_heads)]
            parts += [ModelPart("bias", layer), ModelPart("mlp", layer)]
        parts += [ModelPart("added", n_layers), ModelPart("bias")]
        return tuple(parts) if self.readout.is_linear else (*parts, ModelPart(READOUT_PART))

    def attribute_margins(
        self, session: ModelSession, defense: Defense, query_chats: Sequence[QueryChat]
    ) -> MarginAttribution:
        """Attribute the margins of queries under one defense.

        If the readout is not linear, the weights of the logits are its gradient at each prompt's own logits.

        Args:
            session: the model.
            defense: defense, prepared for the model.
            query_chats: queries to score, an attack applied.

        Raises:
            UserError: If the contributions of a prompt do not add up to its margin, or if the readout is not
                linear and a defense mixes the logits of several models.
        """
        self._check_single_model(defense)
        prompts_by_query = self._encode_prompts(session, defense, query_chats)
        prompt_ids = [ids for prompts in prompts_by_query for ids in prompts]
        table: Tensor = sum(
            weight * self._attribute_prompts(session, member, prompt_ids, self._compute_gradients)
            for weight, member in list_blend_members(defense)
        )  # type: ignore[assignment]
        copies_by_query = self._split_copies(table, prompts_by_query)
        pooled = [torch.tensordot(_weigh_copies(defense, copies), copies, 1) for copies in copies_by_query]
        return self._make_attribution(torch.stack(pooled))

    def attribute_change(
        self, session: ModelSession, undefended: Defense, defense: Defense, query_chats: Sequence[QueryChat]
    ) -> tuple[MarginAttribution, MarginAttribution]:
        """Attribute the margins of queries without and with a defense, with the same weights of the logits.

        If the readout is not linear, the weights are its gradient averaged over the straight path between the
        logits of the two runs. Both runs then have the same remainder, so that the components explain the
        whole change of the margin, up to the precision of the average.

        Args:
            session: the model.
            undefended: the undefended model as a defense, which reads one copy of each query.
            defense: defense, prepared for the model.
            query_chats: queries to score, an attack applied.

        Returns:
            The attribution of the undefended and of the defended run.

        Raises:
            UserError: As in `attribute_margins`.
        """
        self._check_single_model(defense)
        if self.readout.is_linear:
            before, after = (
                self.attribute_margins(session, condition, query_chats) for condition in (undefended, defense)
            )
            return before, after
        prompts_before, prompts_after = (
            self._encode_prompts(session, condition, query_chats) for condition in (undefended, defense)
        )
        tables = [
            self._attribute_pairs(session, undefended, defense, prompts_before[chunk], prompts_after[chunk])
            for chunk in _chunk_queries(prompts_after)
        ]
        before, after = (self._make_attribution(torch.cat(chunks)) for chunks in zip(*tables, strict=True))
        return before, after

    def _attribute_pairs(
        self,
        session: ModelSession,
        undefended: Defense,
        defense: Defense,
        prompts_before: list[list[PromptIds]],
        prompts_after: list[list[PromptIds]],
    ) -> tuple[Tensor, Tensor]:
        """One row per query of the undefended and of the defended run, both with the averaged weights."""
        ids_before, ids_after = (
            [ids for prompts in prompts_by_query for ids in prompts]
            for prompts_by_query in (prompts_before, prompts_after)
        )
        with undefended.apply_to(session.loaded_model.model):
            logits_before = session.engine.read_first_token(ids_before, lambda logits: logits.cpu())
        # A prompt of the defended run belongs to the undefended prompt with the same question.
        n_questions = self._n_questions
        partners = torch.tensor(
            [
                query * n_questions + number % n_questions
                for query, prompts in enumerate(prompts_after)
                for number in range(len(prompts))
            ]
        )
        weights_after = torch.empty(len(ids_after), logits_before.shape[1])

        def average_gradients(rows: list[int], logits: Tensor) -> Tensor:
            before = logits_before[partners[rows]].to(logits.device)
            averages = average_logit_gradients(self.readout, before, logits)
            weights_after[rows] = averages.cpu()
            return averages

        table_after = self._attribute_prompts(session, defense, ids_after, average_gradients)
        pooled, pooled_weights = [], []
        for copies, weights in zip(
            self._split_copies(table_after, prompts_after),
            self._split_copies(weights_after, prompts_after, average_questions=False),
            strict=True,
        ):
            shares = _weigh_copies(defense, copies)
            pooled.append(torch.tensordot(shares, copies, 1))
            pooled_weights.append(torch.tensordot(shares.float(), weights, 1))
        # Contributions are linear in the weights: those of the mean weight are the mean over the copies.
        weights_before = torch.cat(pooled_weights)
        table_before = self._attribute_prompts(
            session, undefended, ids_before, lambda rows, logits: weights_before[rows].to(logits.device)
        )
        return table_before.unflatten(0, (-1, n_questions)).mean(1), torch.stack(pooled)

    def _check_single_model(self, defense: Defense) -> None:
        """Raise if a defense mixes the logits of several models, and the margin is no sum over them."""
        if reason := explain_no_place(defense):
            raise UserError(reason)
        if not self.readout.is_linear and (n_models := len(list_blend_members(defense))) > 1:
            raise UserError(
                f"{defense.name} mixes the logits of {n_models} models, and the margins of --readout "
                f"{self.readout.name} do not add up over models: use a readout that is linear in the logits, "
                "such as words"
            )

    @property
    def _n_questions(self) -> int:
        """Number of prompts for each copy of a query."""
        return max(1, len(self.readout.questions))

    def _encode_prompts(
        self, session: ModelSession, defense: Defense, query_chats: Sequence[QueryChat]
    ) -> list[list[PromptIds]]:
        """Token ids of each query's prompts: for each copy, one prompt per question."""
        prompts_by_query = session.with_questions(self.readout.questions).render_prompts(defense, query_chats)
        return [
            [prompt.append_prefix(self.readout.response_prefix) for prompt in prompts]
            for prompts in prompts_by_query
        ]

    def _split_copies(
        self, table: Tensor, prompts_by_query: Sequence[Sequence[PromptIds]], average_questions: bool = True
    ) -> list[Tensor]:
        """Split rows of prompts by query and copy: copies × columns, or copies × questions × columns."""
        by_query = table.split([len(prompts) for prompts in prompts_by_query])
        copies = [rows.unflatten(0, (-1, self._n_questions)) for rows in by_query]
        return [rows.mean(1) for rows in copies] if average_questions else copies

    def _make_attribution(self, table: Float[Tensor, "queries columns"]) -> MarginAttribution:
        """The attribution from one row per query, with the columns of `_attribute_batch`."""
        n_layers = len(self.components.layers)
        margins, weight_sizes, margins_by_layer, contributions = np.split(
            table.numpy(), [1, 2, n_layers + 3], axis=1
        )
        parts = Decomposition(self.parts, contributions, margins[:, 0]) if self.is_exact else None
        return MarginAttribution(margins[:, 0], margins_by_layer, weight_sizes[:, 0], parts)

    def _attribute_prompts(
        self,
        session: ModelSession,
        defense: Defense,
        prompt_ids: Sequence[PromptIds],
        choose_weights: WeightChoice,
    ) -> Float[Tensor, "prompts columns"]:
        """One row per prompt, with the columns of `_attribute_batch`."""
        engine = session.engine
        values: dict[int, Tensor] = {}
        embedding: HookPoint = (self.components.layers[0].block, "enters")
        # A hook sees the changes of hooks registered earlier: the embedding is recorded before the defense's.
        with (
            record_activations(engine, {"embedding": embedding}) as undefended,
            defense.apply_to(session.loaded_model.model),
            record_activations(engine, self._hook_points) as activations,
            torch.inference_mode(),
        ):
            for rows, logits in engine.iterate_logits(prompt_ids, [1] * len(prompt_ids)):
                logit_weights = None if self.readout.is_linear else choose_weights(rows, logits)
                batch_values = self._attribute_batch(activations | undefended, logits, logit_weights)
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

    def _compute_gradients(self, rows: list[int], logits: Tensor) -> Tensor:
        """The gradient of the margin at each prompt's own logits."""
        return compute_logit_gradients(self.readout, logits)

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
        self,
        activations: RecordedActivations,
        logits: Float[Tensor, "rows vocab"],
        logit_weights: Float[Tensor, "rows vocab"] | None,
    ) -> Float[Tensor, "rows columns"]:
        """Margin, weight size, logit-lens margins and contributions of one batch.

        Args:
            activations: hidden states at the hook points.
            logits: first-token logits, nats.
            logit_weights: weights of all logits in the margin; None for a readout that is linear, which has
                weights of its own.
        """
        margins = self.readout.compute_margins(logits)[:, 0].cpu()
        if logit_weights is None:
            weight_sizes = torch.full_like(margins, float(np.abs(self.readout.weights).sum()))
        else:
            weight_sizes = logit_weights.abs().sum(1).double().cpu()
        final_norm = self.components.final_norm
        streams = [activations["stream", number] for number in range(len(self.components.layers) + 1)]
        margins_by_layer = [
            self.components.compute_margins(final_norm.apply_without_hooks(stream), self.readout)
            .double()
            .cpu()
            for stream in streams
        ]
        columns = [margins[:, None], weight_sizes[:, None], torch.stack(margins_by_layer, 1)]
        if self.is_exact:
            model_name = type(self.components.model).__name__
            _check_reconstruction(
                (margins_by_layer[-1] - margins).abs(),
                model_name,
                "the logit-lens margin after its last block misses the margin by",
            )
            contributions = self._component_contributions(activations, logit_weights).double().cpu()
            if logit_weights is not None:
                # The remainder follows from the logits alone, so that the sum still checks the components.
                remainders = margins - (logit_weights * logits).sum(1).double().cpu()
                contributions = torch.cat([contributions, remainders[:, None]], 1)
            _check_reconstruction(
                (contributions.sum(1) - margins).abs(),
                model_name,
                "the sum of its components misses the margin by",
            )
            columns.append(contributions)
        return torch.cat(columns, 1)

    def _component_contributions(
        self, activations: RecordedActivations, logit_weights: Float[Tensor, "rows vocab"] | None
    ) -> Float[Tensor, "rows components"]:
        """Contribution of each component to the margin, in the order of `parts`, without the remainder.

        With x_l the stream that enters block l (x_L enters the final norm), a_l and m_l the outputs of its
        attention and MLP, and d the direction and b the constant for which the weighted sum of the logits
        = d · x_L + b, the sum telescopes:

            Σ_t weight_t · logit_t = d · embedding + Σ_l [d · added_l + d · a_l + d · m_l] + d · added_L + b,
            where added_0 = x_0 - embedding and added_{l+1} = x_{l+1} - (x_l + a_l + m_l).

        An unmodified model adds nothing between blocks. d · a_l splits further, over heads and a bias.
        """
        final_norm, layers = self.components.final_norm, self.components.layers
        # If the layers are spread over devices, all activations move to the device of the unembedding.
        device = self.components.unembedding.weight.device
        activations = {name: states.to(device) for name, states in activations.items()}
        final_stream = activations["stream", len(layers)]
        if logit_weights is None:
            token_ids, token_weights = self.components.make_readout_tensors(self.readout)
            normed_direction, constant = self.components.linearize_weighted_logits(
                activations["normed"], token_weights[None], token_ids
            )
        else:
            normed_direction, constant = self.components.linearize_weighted_logits(
                activations["normed"], logit_weights.to(device)
            )
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


def explain_no_place(defense: Defense) -> str:
    """Return why the effect of a defense has no place in the layers of the model; empty if it has one.

    Several prompts, for instance, whose logits are mixed pass through the same layers.
    """
    if defense.detects:
        return (
            f"{defense.name} has a detector, whose effect is not in the layers of the model: `analyze` "
            "measures how large it is"
        )
    if defense.blends_prompts:
        return (
            f"{defense.name} mixes the logits of several prompts, so its effect has no place in the layers: "
            "`analyze` measures how large it is"
        )
    return ""


def _weigh_copies(defense: Defense, copies: Float[Tensor, "copies columns"]) -> Float[Tensor, " copies"]:
    """The share of each copy of a query in its margin, as the defense pools them; column 0 is the margin."""
    if defense.pool == "max":
        return torch.nn.functional.one_hot(copies[:, 0].argmax(), len(copies)).double()
    return torch.full((len(copies),), 1 / len(copies), dtype=torch.float64)


def _chunk_queries(prompts_by_query: Sequence[Sequence[PromptIds]]) -> list[slice]:
    """Chunks of consecutive queries with at most `_MAX_PAIRED_PROMPTS` prompts, or with a single query."""
    starts, n_prompts = [0], 0
    for query, prompts in enumerate(prompts_by_query):
        if n_prompts and n_prompts + len(prompts) > _MAX_PAIRED_PROMPTS:
            starts.append(query)
            n_prompts = 0
        n_prompts += len(prompts)
    return [slice(start, stop) for start, stop in pairwise([*starts, len(prompts_by_query)])]


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
