"""Harmfulness and refusal directions of a model, and projections of queries on them, layer by layer.

Models represent how harmful a request is at the last token of the user's text, and whether they will refuse
at the position where the response begins (https://arxiv.org/abs/2507.11878). Both directions are differences
of class means over training queries (https://arxiv.org/abs/2406.11717). They are learned without a defense;
held-out queries are projected on them with and without the defense.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from analysis.models.cache import (
    describe_computation,
    make_json_cache_path,
    read_cached_json,
    write_cached_json,
)
from analysis.models.hooks import HookPoint, record_activations
from analysis.models.token_spans import mask_user_tokens
from defenses.adapters import fingerprint_queries
from defenses.contract import Defense, MeanActivations, Message, QueryChat

if TYPE_CHECKING:
    from analysis.mechanism.components import ModelComponents
    from analysis.models.session import ModelSession

DIRECTION_NAMES = ("refusal", "harmfulness")  # at the response position, at the last token of the user's text
_N_FOLDS = 5
_PROMPTS_PER_PASS = 16
ResidualStates = Float[Tensor, "queries 2 layers width"]


@dataclass(frozen=True)
class ConceptDirections:
    """A refusal and a harmfulness direction for each layer.

    Attributes:
        axes: difference of the class means, harmful minus benign, divided by its squared length.
        midpoints: midpoint of the class means.
        best_layers: for each direction, the layer with the highest cross-validated AUROC on the training
            queries.
    """

    axes: Float[Tensor, "2 layers width"]
    midpoints: Float[Tensor, "2 layers width"]
    best_layers: tuple[int, int]

    @classmethod
    def from_states(
        cls, states: ResidualStates, is_harmful: Bool[Tensor, " queries"], pairs: Sequence[str | None]
    ) -> ConceptDirections:
        """Learn the directions from training queries.

        Args:
            states: residual streams from `record_residual_states`.
            is_harmful: class of each query.
            pairs: pair of each query, or None; cross-validation never splits a pair.
        """
        from sklearn.metrics import roc_auc_score  # sklearn takes half a second to import

        axes, midpoints = _difference_of_means(states, is_harmful)
        groups = [pair or f"query {row}" for row, pair in enumerate(pairs)]
        group_numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        fold_of_query = torch.tensor([group_numbers[group] % _N_FOLDS for group in groups])
        projections = torch.zeros(states.shape[:3])
        for fold in range(_N_FOLDS):
            held_out = fold_of_query == fold
            if held_out.any():
                fold_axes, fold_midpoints = _difference_of_means(states[~held_out], is_harmful[~held_out])
                projections[held_out] = _project_on_axes(states[held_out], fold_axes, fold_midpoints)
        aurocs = np.array(
            [
                [
                    roc_auc_score(is_harmful.numpy(), projections[:, direction, layer].numpy())
                    for layer in range(states.shape[2])
                ]
                for direction in range(2)
            ]
        )
        # argmax takes the earliest of equal layers; identical states of both classes give an AUROC of one
        # half.
        return cls(axes, midpoints, (int(aurocs[0].argmax()), int(aurocs[1].argmax())))

    def project_states(self, states: ResidualStates) -> Float[Tensor, "queries 2 layers"]:
        """Project states on the directions: +½ is the mean of harmful queries, −½ that of benign ones."""
        return _project_on_axes(states, self.axes, self.midpoints)


def record_residual_states(
    session: ModelSession, components: ModelComponents, defense: Defense, query_chats: Sequence[QueryChat]
) -> ResidualStates:
    """Record the residual stream that enters each block and the final norm, at both positions.

    The two positions are those of `DIRECTION_NAMES`. If a defense renders several prompts for a query, their
    states are averaged.

    Args:
        session: the model.
        components: components of the model.
        defense: defense, prepared for the model.
        query_chats: queries to read, an attack applied.
    """
    return _reduce_residual_states(
        session, components, defense, query_chats, lambda layer, states: states, (components.width,)
    )


def compute_projections(
    session: ModelSession,
    components: ModelComponents,
    defense: Defense,
    query_chats: Sequence[QueryChat],
    directions: ConceptDirections,
) -> Float[Tensor, "queries 2 layers"]:
    """Project queries on the directions without keeping their residual streams.

    Args:
        session: as in `record_residual_states`.
        components: as in `record_residual_states`.
        defense: as in `record_residual_states`.
        query_chats: as in `record_residual_states`.
        directions: directions of the model.
    """

    def project(layer: int, states: Tensor) -> Tensor:
        return _project_on_axes(states, directions.axes[:, layer], directions.midpoints[:, layer])

    return _reduce_residual_states(session, components, defense, query_chats, project, ())


def load_mean_activations(
    session: ModelSession, texts: Sequence[str], is_harmful: Sequence[bool]
) -> MeanActivations:
    """Return the mean residual stream of each class at each layer, from the cache or newly computed.

    Args:
        session: the model; it is read undefended.
        texts: training queries of both classes.
        is_harmful: class of each query.
    """
    prompts = [
        session.chat_template.render_prompt([Message(role="user", content=text)]).ids for text in texts
    ]
    inputs = {"prompts": prompts, "harmful": list(is_harmful)}
    computation = {**describe_computation(session.loaded_model), **inputs}
    digest = hashlib.sha256(json.dumps(computation, sort_keys=True).encode()).hexdigest()
    path = make_json_cache_path("residuals", session.loaded_model, inputs)
    if (means := read_cached_json(path, dict)) is None:
        states = record_last_token_states(session, prompts)
        harmful_mask = torch.tensor(is_harmful)
        means = {
            "harmful": states[harmful_mask].mean(0).tolist(),
            "benign": states[~harmful_mask].mean(0).tolist(),
        }
        write_cached_json(path, means)
    training_queries = frozenset(fingerprint_queries(texts))
    return MeanActivations(
        torch.tensor(means["harmful"]), torch.tensor(means["benign"]), training_queries, digest
    )


def _difference_of_means(states: ResidualStates, is_harmful: Tensor) -> tuple[Tensor, Tensor]:
    """Axes and midpoints of the class means."""
    harmful, benign = states[is_harmful].mean(0), states[~is_harmful].mean(0)
    difference = harmful - benign
    squared_length = (difference * difference).sum(-1, keepdim=True).clamp_min(1e-12)
    return difference / squared_length, (harmful + benign) / 2


def _project_on_axes(states: Tensor, axes: Tensor, midpoints: Tensor) -> Tensor:
    """Projections of states on the axes of one layer or of all layers."""
    return ((states - midpoints) * axes).sum(-1)


def _reduce_residual_states(
    session: ModelSession,
    components: ModelComponents,
    defense: Defense,
    query_chats: Sequence[QueryChat],
    reduce_states: Callable[[int, Float[Tensor, "rows 2 width"]], Tensor],
    output_shape: tuple[int, ...],
) -> Tensor:
    """Apply `reduce_states` to each layer's stream at both positions; average over the prompts of a query."""
    hook_points: dict[int, HookPoint] = {
        number: (layer.block, "enters") for number, layer in enumerate(components.layers)
    }
    hook_points[len(hook_points)] = (components.final_norm.module, "enters")
    prompt_ids, n_positions, query_of_prompt = [], [], []
    prompts_by_query = session.render_prompts(defense, query_chats)
    for row, ((_, chat), prompts) in enumerate(zip(query_chats, prompts_by_query, strict=True)):
        for prompt in prompts:
            user_mask = mask_user_tokens(session.chat_template, prompt, chat)
            last_user_token = max(
                (position for position, is_user in enumerate(user_mask) if is_user),
                default=len(user_mask) - 1,
            )
            prompt_ids.append(prompt.ids)
            n_positions.append(len(prompt.ids) - last_user_token)
            query_of_prompt.append(row)
    sums = torch.zeros(len(query_chats), 2, len(hook_points), *output_shape)
    owners = torch.tensor(query_of_prompt)
    with (
        torch.inference_mode(),
        defense.apply_to(session.loaded_model.model),
        record_activations(session.engine, hook_points) as streams,
    ):
        for rows, _ in session.engine.iterate_logits(prompt_ids, n_positions):
            lengths = torch.tensor([n_positions[row] for row in rows])
            stops = lengths.cumsum(0)
            for layer in range(len(hook_points)):
                stream = streams[layer]
                states = torch.stack([stream[stops - 1], stream[stops - lengths]], 1).float().cpu()
                sums[:, :, layer].index_add_(0, owners[rows], reduce_states(layer, states))
    return sums / torch.bincount(owners, minlength=len(query_chats)).view(-1, *[1] * (sums.ndim - 1))


def record_last_token_states(session: ModelSession, prompt_ids: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Return the residual stream that enters each block, at the last position of each prompt.

    Args:
        session: the model, in its present state.
        prompt_ids: token ids of the prompts.

    Returns:
        prompts × blocks × width, float32.
    """
    model, batches = session.loaded_model.model, []
    for start in range(0, len(prompt_ids), _PROMPTS_PER_PASS):
        rows = [torch.tensor(ids) for ids in prompt_ids[start : start + _PROMPTS_PER_PASS]]
        # Padding goes on the right, where a causal model cannot attend to it from the prompt.
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        positions = torch.arange(ids.shape[1], device=model.device).expand_as(ids)
        with torch.inference_mode():
            output = model(
                input_ids=ids,
                attention_mask=mask.to(model.device),
                position_ids=positions,
                output_hidden_states=True,
                use_cache=False,
                logits_to_keep=1,
            )
        last = [len(row) - 1 for row in rows]
        # The last hidden state is the output of the final norm, which no block reads.
        layers = [layer[range(len(rows)), last].float().cpu() for layer in output.hidden_states[:-1]]
        batches.append(torch.stack(layers, dim=1))
    return torch.cat(batches)
