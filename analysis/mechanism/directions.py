"""What a model knows and how it acts: projections on a harmfulness and a refusal direction, layer by layer.

Models hold how harmful a request is at the last token of the user's words, and whether they will refuse where
the answer begins (https://arxiv.org/abs/2507.11878). Both directions are differences of the classes' means
over training queries (https://arxiv.org/abs/2406.11717); they are learned undefended, and held-out queries
are projected on them undefended and defended.
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
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from analysis.datasets.queries import Query
from analysis.mechanism.hooks import HookPoint, record_activations
from analysis.mechanism.knockout import mask_user_tokens
from analysis.models.cache import (
    describe_computation,
    make_json_cache_path,
    read_cached_json,
    write_cached_json,
)
from defenses.adapters import fingerprint_queries
from defenses.contract import Defense, MeanActivations, Message

if TYPE_CHECKING:
    from analysis.mechanism.components import ModelComponents
    from analysis.models.session import ModelSession

DIRECTION_NAMES = ("refusal", "harmfulness")  # at the answer's position, at the end of the user's words
_N_FOLDS = 5
ResidualStates = Float[Tensor, "queries 2 layers width"]


@dataclass(frozen=True)
class ConceptDirections:
    """A refusal and a harmfulness direction for each layer.

    Attributes:
        axes: difference of the classes' means, harmful less benign, over its squared length.
        midpoints: between the means.
        best_layers: of each direction, the layer at which it tells training queries apart best that it was not
            learned from.
    """

    axes: Float[Tensor, "2 layers width"]
    midpoints: Float[Tensor, "2 layers width"]
    best_layers: tuple[int, int]

    @classmethod
    def from_states(
        cls, states: ResidualStates, is_harmful: Bool[Tensor, " queries"], pairs: Sequence[str | None]
    ) -> ConceptDirections:
        """Return the directions of training queries.

        Args:
            states: residual streams, see `held`.
            is_harmful: class of each query.
            pairs: the name of each one's pair, which is never parted.
        """
        way, middle = _difference_of_means(states, is_harmful)
        names = [one or f"query {place}" for place, one in enumerate(pairs)]
        order = {name: place for place, name in enumerate(dict.fromkeys(names))}
        fold = torch.tensor([order[name] % _N_FOLDS for name in names])
        values = torch.zeros(states.shape[:3])
        for number in range(_N_FOLDS):
            out = fold == number
            if out.any():
                learned = _difference_of_means(states[~out], is_harmful[~out])
                values[out] = _project_on_axes(states[out], *learned)
        # Of equals the earliest; where both classes hold the same, it is one half.
        scores = np.array(
            [
                [
                    roc_auc_score(is_harmful.numpy(), values[:, which, layer].numpy())
                    for layer in range(states.shape[2])
                ]
                for which in range(2)
            ]
        )
        return cls(way, middle, (int(scores[0].argmax()), int(scores[1].argmax())))

    def project_states(self, states: ResidualStates) -> Float[Tensor, "queries 2 layers"]:
        """Return how far along each direction: half at the mean of the harmful, minus half at the benign."""
        return _project_on_axes(states, self.axes, self.midpoints)


def _difference_of_means(states: ResidualStates, is_harmful: Tensor) -> tuple[Tensor, Tensor]:
    harmful, benign = states[is_harmful].mean(0), states[~is_harmful].mean(0)
    gap = harmful - benign
    return gap / (gap * gap).sum(-1, keepdim=True).clamp_min(1e-12), (harmful + benign) / 2


def _project_on_axes(states: Tensor, axes: Tensor, midpoints: Tensor) -> Tensor:
    """How far along, of one layer or of all."""
    return ((states - midpoints) * axes).sum(-1)


def record_residual_states(
    session: ModelSession, components: ModelComponents, defense: Defense, queries: Sequence[Query]
) -> ResidualStates:
    """Return the residual stream that enters each block, and the final norm, at both positions.

    Where a defense reads several prompts, what they hold is averaged.

    Args:
        session: the model, and how queries are sent.
        components: where its blocks are.
        defense: prepared for it.
        queries: what is asked.
    """
    return _reduce_residual_states(
        session, components, defense, queries, lambda layer, both: both, (components.width,)
    )


def compute_projections(
    session: ModelSession,
    components: ModelComponents,
    defense: Defense,
    queries: Sequence[Query],
    directions: ConceptDirections,
) -> Float[Tensor, "queries 2 layers"]:
    """Return what `directions.project` makes of what is held; the streams themselves are not kept.

    Args:
        session: as for `held`.
        components: as for `held`.
        defense: as for `held`.
        queries: as for `held`.
        directions: of the model.
    """

    def project(layer: int, both: Tensor) -> Tensor:
        return _project_on_axes(both, directions.axes[:, layer], directions.midpoints[:, layer])

    return _reduce_residual_states(session, components, defense, queries, project, ())


def _reduce_residual_states(
    session: ModelSession,
    components: ModelComponents,
    defense: Defense,
    queries: Sequence[Query],
    reduce_states: Callable[[int, Float[Tensor, "rows 2 width"]], Tensor],
    output_shape: tuple[int, ...],
) -> Tensor:
    """What is kept of the streams at both positions, by query and layer."""
    taps: dict[int, HookPoint] = {
        number: (layer.block, "enters") for number, layer in enumerate(components.layers)
    }
    taps[len(taps)] = (components.final_norm.module, "enters")
    flat, ends, owner = [], [], []
    for row, (query, readings) in enumerate(
        zip(queries, session.render_queries(defense, queries), strict=True)
    ):
        for prompt in readings:
            users = mask_user_tokens(session.chat_template, prompt, session.attack.build_chat(query))
            last = max((place for place, one in enumerate(users) if one), default=len(users) - 1)
            flat.append(prompt.ids)
            ends.append(len(prompt.ids) - last)
            owner.append(row)
    found = torch.zeros(len(queries), 2, len(taps), *output_shape)
    owners = torch.tensor(owner)
    with (
        torch.inference_mode(),
        defense.apply_to(session.loaded_model.model),
        record_activations(session.engine, taps) as streams,
    ):
        for rows, _ in session.engine.iterate_logits(flat, ends):
            lengths = torch.tensor([ends[row] for row in rows])
            stops = lengths.cumsum(0)
            for layer in range(len(taps)):
                stream = streams[layer]
                both = torch.stack([stream[stops - 1], stream[stops - lengths]], 1).float().cpu()
                found[:, :, layer].index_add_(0, owners[rows], reduce_states(layer, both))
    return found / torch.bincount(owners, minlength=len(queries)).view(-1, *[1] * (found.ndim - 1))


_PROMPTS_PER_PASS = 16  # prompts in one pass


def load_mean_activations(session: ModelSession, queries: Sequence[Query]) -> MeanActivations:
    """Return the mean residual stream of either class at each layer, computed now or before.

    Args:
        session: the model, which is asked undefended.
        queries: of the train split, both classes.
    """
    prompts = [
        session.chat_template.render_prompt([Message(role="user", content=one.text)]).ids for one in queries
    ]
    harmful = [query.harmful for query in queries]
    about = {"prompts": prompts, "harmful": harmful}
    whole = {**describe_computation(session.loaded_model), **about}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    place = make_json_cache_path("residuals", session.loaded_model, about)
    if (found := read_cached_json(place)) is None:
        held = _last_token_states(session, prompts)
        is_harmful = torch.tensor(harmful)
        found = {"harmful": held[is_harmful].mean(0).tolist(), "benign": held[~is_harmful].mean(0).tolist()}
        write_cached_json(place, found)
    seen = frozenset(fingerprint_queries(query.text for query in queries))
    return MeanActivations(torch.tensor(found["harmful"]), torch.tensor(found["benign"]), seen, digest)


def _last_token_states(session: ModelSession, prompt_ids: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """The residual stream that enters each block, at the last position of each prompt."""
    model, found = session.loaded_model.model, []
    for start in range(0, len(prompt_ids), _PROMPTS_PER_PASS):
        rows = [torch.tensor(ids) for ids in prompt_ids[start : start + _PROMPTS_PER_PASS]]
        # Padding on the right comes too late for a causal model to see it.
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        places = torch.arange(ids.shape[1], device=model.device).expand_as(ids)
        with torch.inference_mode():
            out = model(
                input_ids=ids,
                attention_mask=mask.to(model.device),
                position_ids=places,
                output_hidden_states=True,
                use_cache=False,
                logits_to_keep=1,
            )
        last = [len(row) - 1 for row in rows]
        # The last entry is what leaves the last block, behind the final norm: no block's input.
        layers = [layer[range(len(rows)), last].float().cpu() for layer in out.hidden_states[:-1]]
        found.append(torch.stack(layers, dim=1))
    return torch.cat(found)
