"""What a model knows and how it acts: projections on a harmfulness and a refusal direction, layer by layer.

Models hold how harmful a request is at the last token of the user's words, and whether they will refuse where
the answer begins (https://arxiv.org/abs/2507.11878). Both directions are differences of the classes' means
over training queries (https://arxiv.org/abs/2406.11717); they are learned undefended, and held-out queries
are projected on them undefended and defended.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        # From the last layer on, so that of equals the earliest wins; layers without a direction never do.
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


def _project(held: Held, way: Tensor, middle: Tensor) -> Tensor:
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
    taps: dict[int, Tap] = {number: (layer.block, "enters") for number, layer in enumerate(anatomy.layers)}
    taps[len(taps)] = (anatomy.final.module, "enters")
    prompts = bench.every_prompt(defense, queries)
    flat, ends, owner = [], [], []
    for row, (query, readings) in enumerate(zip(queries, prompts, strict=True)):
        for prompt in readings:
            users = of_user(bench.renderer, prompt, bench.attack.chat(query))
            last = max((place for place, one in enumerate(users) if one), default=len(users) - 1)
            flat.append(prompt.ids)
            ends.append(len(prompt.ids) - last)
            owner.append(row)
    found = torch.zeros(len(queries), 2, len(taps), next(iter(anatomy.final.module.parameters())).numel())
    count = torch.zeros(len(queries))
    with torch.inference_mode(), defense.armed(bench.loaded.model), watched(bench.engine, taps) as streams:
        for rows, _ in bench.engine.sweep(flat, ends):
            stops = torch.tensor([ends[row] for row in rows]).cumsum(0)
            for row, stop in zip(rows, stops.tolist(), strict=True):
                for layer in range(len(taps)):
                    stream = streams[layer].float().cpu()
                    found[owner[row], 0, layer] += stream[stop - 1]
                    found[owner[row], 1, layer] += stream[stop - ends[row]]
                count[owner[row]] += 1
    return found / count[:, None, None, None]
