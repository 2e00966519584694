"""What layers, parts and sites do to shift and discrimination: many contrasts at once, with intervals.

Shift and discrimination are means of margins, so what holds for a margin holds for them: shares that add up
to a margin add up to its contrasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from analysis.decompose import auroc
from analysis.resampling import DRAWS, Resampling, Units, estimate, interval
from analysis.tables import Decomposition, Part

CONTRASTS = ("shift", "discrimination")
Change = Float[np.ndarray, "queries columns"]
Clouds = Float[np.ndarray, "draws columns"]
Adds = Float[np.ndarray, "units columns"]


@dataclass(frozen=True)
class Asked:
    """The queries that effects are averaged over.

    Attributes:
        pairs: the name of each one's pair, missing where it has none.
        is_harmful: class of each.
        seed: of the bootstrap.
        draws: of the bootstrap.
    """

    pairs: pd.Series
    is_harmful: Bool[np.ndarray, " queries"]
    seed: int = 0
    draws: int = DRAWS

    @cached_property
    def samples(self) -> tuple[Resampling, Resampling]:
        """The data as they are, and bootstrap draws."""
        units = Units.by_pair(self.pairs, self.is_harmful)
        return Resampling.once(units), Resampling.draw(units, self.draws, self.seed)

    @property
    def counts(self) -> tuple[int, int]:
        """Harmful and benign queries."""
        return int(self.is_harmful.sum()), int((~self.is_harmful).sum())

    def clouds(self, change: Change) -> list[dict[str, Clouds]]:
        """Return shift and discrimination of every column: of the data (one row), and of each draw."""
        found = []
        for sample in self.samples:
            harmful = sample.harmful @ change[self.is_harmful] / self.counts[0]
            benign = sample.benign @ change[~self.is_harmful] / self.counts[1]
            found.append({"shift": (harmful + benign) / 2, "discrimination": harmful - benign})
        return found

    def contrasts(self, change: Change) -> pd.DataFrame:
        """Return a row per column: shift and discrimination with their intervals.

        Args:
            change: of something, by query and column.
        """
        point, cloud = self.clouds(change)
        found: dict[str, Any] = {}
        for name in CONTRASTS:
            values = point[name][0]
            ends = np.array([interval(one, min(self.counts)) for one in cloud[name].T]).reshape(-1, 2)
            found[name] = values
            found[f"{name}_low"] = np.minimum(ends[:, 0], values)
            found[f"{name}_high"] = np.maximum(ends[:, 1], values)
        return pd.DataFrame(found)

    def added(self, change: Change, units: Units) -> dict[str, Adds]:
        """Return what each unit adds to shift and to discrimination of every column.

        Args:
            change: of something, by query and column.
            units: of the queries.
        """
        share = np.where(self.is_harmful, 1 / self.counts[0], 1 / self.counts[1])
        side = np.where(self.is_harmful, 1.0, -1.0)
        found = {}
        for name, weights in (("shift", share / 2), ("discrimination", share * side)):
            found[name] = np.zeros((len(units.makeup), change.shape[1]))
            np.add.at(found[name], units.of, weights[:, None] * change)
        return found

    def separation(
        self, before: Float[np.ndarray, " queries"], after: Float[np.ndarray, " queries"]
    ) -> dict[str, float]:
        """Return how well a number by query tells the classes apart before and after, and the difference."""
        clouds: dict[str, list[Any]] = {"auroc": [], "auroc_after": [], "delta_auroc": []}
        for sample in self.samples:
            old, new = (
                auroc(values[self.is_harmful], values[~self.is_harmful], sample, which)
                for which, values in enumerate((before, after))
            )
            for name, values in zip(clouds, (old, new, new - old), strict=True):
                clouds[name].append(values)
        found: dict[str, float] = {}
        for name, (point, cloud) in clouds.items():
            found |= estimate(name, point, cloud, min(self.counts), counted=True)
        return found


def by_layer(asked: Asked, before: Change, after: Change) -> pd.DataFrame:
    """Return shift and discrimination as each layer's margin shows them.

    Args:
        asked: the queries.
        before: margins by layer, undefended.
        after: the same, defended.
    """
    found = asked.contrasts(after - before)
    found.insert(0, "layer", range(len(found)))
    for name, values in (("undefended", before), ("defended", after)):
        for side, of in (("harmful", asked.is_harmful), ("benign", ~asked.is_harmful)):
            found[f"{side}_{name}"] = values[of].mean(0)
    return found


def half_way(asked: Asked, before: Change, after: Change) -> pd.DataFrame:
    """Return the layer from which on each contrast stays beyond half of its final value.

    Where the final value's interval holds 0 there is nothing to be half of, and the layer is missing. The
    interval of a layer is that of draws whose final value has the estimate's sign.

    Args:
        asked: the queries.
        before: margins by layer, undefended.
        after: the same, defended.
    """
    point, cloud = asked.clouds(after - before)
    rows = []
    n = min(asked.counts)
    for name in CONTRASTS:
        here, many = point[name], cloud[name]
        final = estimate("final", here[:, -1], many[:, -1], n)
        half = {"half": np.nan, "half_low": np.nan, "half_high": np.nan}
        if final["final_low"] > 0 or final["final_high"] < 0:
            same = many[np.sign(many[:, -1]) == np.sign(final["final"])]
            half = estimate("half", _stays(here), _stays(same), n)
        rows.append({"contrast": name, **final, **half})
    return pd.DataFrame(rows)


def _stays(by_layer: Clouds) -> Float[np.ndarray, " draws"]:
    """The first column from which on each row is at least half of its last value."""
    there = by_layer / by_layer[:, -1:] >= 0.5
    return (by_layer.shape[1] - np.cumprod(there[:, ::-1], axis=1).sum(1)).astype(float)


def by_part(asked: Asked, before: Decomposition, after: Decomposition) -> pd.DataFrame:
    """Return what every part adds to shift and discrimination; the rows add up to both.

    What is added between blocks, and biases, are left out where they are nothing.

    Args:
        asked: the queries.
        before: their margins, undefended.
        after: the same, defended.
    """
    change = after.shares - before.shares
    found = pd.concat([named(before.parts), asked.contrasts(change)], axis=1)
    nothing = found["kind"].isin(["added", "bias"]) & (np.abs(change).max(0) < 1e-5)
    return found[~nothing].reset_index(drop=True)


def named(parts: Sequence[Part]) -> pd.DataFrame:
    """Return the columns that name parts."""
    return pd.DataFrame(
        {
            "layer": pd.array([part.layer for part in parts], dtype="Int64"),
            "kind": [part.kind for part in parts],
            "head": pd.array([part.head for part in parts], dtype="Int64"),
        }
    )
