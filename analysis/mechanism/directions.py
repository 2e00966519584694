"""What a model knows and how it acts: projections on a harmfulness and a refusal direction, layer by layer.

Models hold how harmful a request is at the last token of the user's words, and whether they will refuse where
the answer begins (https://arxiv.org/abs/2507.11878). Both directions are differences of the classes' means
over training queries (https://arxiv.org/abs/2406.11717); they are learned undefended, and held-out queries
are projected on them undefended and defended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score
from torch import Tensor

from analysis.mechanism.cutting import of_user
from analysis.mechanism.watching import Tap, watched
from defenses import Defense

if TYPE_CHECKING:
    from analysis.bench import Bench
    from analysis.mechanism.lens import Anatomy
    from analysis.queries import Query

NAMES = ("refusal", "harmfulness")  # at the answer's position, at the end of the user's words
_FOLDS = 5
Held = Float[Tensor, "queries 2 layers width"]


@dataclass(frozen=True)
class Directions:
    """A refusal and a harmfulness direction for each layer.

    Attributes:
        way: difference of the classes' means, harmful less benign, over its squared length.
        middle: between the means.
        chosen: of each direction, the layer at which it tells training queries apart best that it was not
            learned from.
    """

    way: Float[Tensor, "2 layers width"]
    middle: Float[Tensor, "2 layers width"]
    chosen: tuple[int, int]

    @classmethod
    def learned(
        cls, held: Held, is_harmful: Bool[Tensor, " queries"], pairs: Sequence[str | None]
    ) -> Directions:
        """Return the directions of training queries.

        Args:
            held: residual streams, see `held`.
            is_harmful: class of each query.
            pairs: the name of each one's pair, which is never parted.
        """
        way, middle = _direction(held, is_harmful)
        names = [one or f"query {place}" for place, one in enumerate(pairs)]
        order = {name: place for place, name in enumerate(dict.fromkeys(names))}
        fold = torch.tensor([order[name] % _FOLDS for name in names])
        values = torch.zeros(held.shape[:3])
        for number in range(_FOLDS):
            out = fold == number
            if out.any():
                learned = _direction(held[~out], is_harmful[~out])
                values[out] = _project(held[out], *learned)
        # Of equals the earliest; where both classes hold the same, it is one half.
        scores = np.array(
            [
                [
                    roc_auc_score(is_harmful.numpy(), values[:, which, layer].numpy())
                    for layer in range(held.shape[2])
                ]
                for which in range(2)
            ]
        )
        return cls(way, middle, (int(scores[0].argmax()), int(scores[1].argmax())))

    def project(self, held: Held) -> Float[Tensor, "queries 2 layers"]:
        """Return how far along each direction: half at the mean of the harmful, minus half at the benign."""
        return _project(held, self.way, self.middle)


def _direction(held: Held, is_harmful: Tensor) -> tuple[Tensor, Tensor]:
    harmful, benign = held[is_harmful].mean(0), held[~is_harmful].mean(0)
    gap = harmful - benign
    return gap / (gap * gap).sum(-1, keepdim=True).clamp_min(1e-12), (harmful + benign) / 2


def _project(held: Tensor, way: Tensor, middle: Tensor) -> Tensor:
    """How far along, of one layer or of all."""
    return ((held - middle) * way).sum(-1)


def held(bench: Bench, anatomy: Anatomy, defense: Defense, queries: Sequence[Query]) -> Held:
    """Return the residual stream that enters each block, and the final norm, at both positions.

    Where a defense reads several prompts, what they hold is averaged.

    Args:
        bench: the model, and how queries are sent.
        anatomy: where its blocks are.
        defense: prepared for it.
        queries: what is asked.
    """
    return _kept(bench, anatomy, defense, queries, lambda layer, both: both, (anatomy.width,))


def projections(
    bench: Bench, anatomy: Anatomy, defense: Defense, queries: Sequence[Query], directions: Directions
) -> Float[Tensor, "queries 2 layers"]:
    """Return what `directions.project` makes of what is held; the streams themselves are not kept.

    Args:
        bench: as for `held`.
        anatomy: as for `held`.
        defense: as for `held`.
        queries: as for `held`.
        directions: of the model.
    """

    def project(layer: int, both: Tensor) -> Tensor:
        return _project(both, directions.way[:, layer], directions.middle[:, layer])

    return _kept(bench, anatomy, defense, queries, project, ())


def _kept(
    bench: Bench,
    anatomy: Anatomy,
    defense: Defense,
    queries: Sequence[Query],
    keep: Callable[[int, Float[Tensor, "rows 2 width"]], Tensor],
    size: tuple[int, ...],
) -> Tensor:
    """What is kept of the streams at both positions, by query and layer."""
    taps: dict[int, Tap] = {number: (layer.block, "enters") for number, layer in enumerate(anatomy.layers)}
    taps[len(taps)] = (anatomy.final.module, "enters")
    flat, ends, owner = [], [], []
    for row, (query, readings) in enumerate(zip(queries, bench.every_prompt(defense, queries), strict=True)):
        for prompt in readings:
            users = of_user(bench.renderer, prompt, bench.attack.chat(query))
            last = max((place for place, one in enumerate(users) if one), default=len(users) - 1)
            flat.append(prompt.ids)
            ends.append(len(prompt.ids) - last)
            owner.append(row)
    found = torch.zeros(len(queries), 2, len(taps), *size)
    owners = torch.tensor(owner)
    with torch.inference_mode(), defense.armed(bench.loaded.model), watched(bench.engine, taps) as streams:
        for rows, _ in bench.engine.sweep(flat, ends):
            lengths = torch.tensor([ends[row] for row in rows])
            stops = lengths.cumsum(0)
            for layer in range(len(taps)):
                stream = streams[layer]
                both = torch.stack([stream[stops - 1], stream[stops - lengths]], 1).float().cpu()
                found[:, :, layer].index_add_(0, owners[rows], keep(layer, both))
    return found / torch.bincount(owners, minlength=len(queries)).view(-1, *[1] * (found.ndim - 1))
