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

from analysis.decompose import compute_auroc
from analysis.resampling import BOOTSTRAP_DRAWS, ResamplingWeights, ResamplingUnits, make_estimate_columns, bootstrap_interval
from analysis.tables import Decomposition, ModelPart

CONTRASTS = ("shift", "discrimination")
ChangeMatrix = Float[np.ndarray, "queries columns"]
DrawMatrix = Float[np.ndarray, "draws columns"]
UnitMatrix = Float[np.ndarray, "units columns"]


@dataclass(frozen=True)
class ContrastEstimator:
    """The queries that effects are averaged over.

    Attributes:
        pairs: the name of each one's pair, missing where it has none.
        is_harmful: class of each.
        seed: of the bootstrap.
        n_draws: of the bootstrap.
    """

    pairs: pd.Series
    is_harmful: Bool[np.ndarray, " queries"]
    seed: int = 0
    n_draws: int = BOOTSTRAP_DRAWS

    @cached_property
    def resamplings(self) -> tuple[ResamplingWeights, ResamplingWeights]:
        """The data as they are, and bootstrap draws."""
        units = ResamplingUnits.from_pairs(self.pairs, self.is_harmful)
        return ResamplingWeights.from_observed(units), ResamplingWeights.from_bootstrap(units, self.n_draws, self.seed)

    @property
    def class_sizes(self) -> tuple[int, int]:
        """Harmful and benign queries."""
        return int(self.is_harmful.sum()), int((~self.is_harmful).sum())

    def draw_contrasts(self, changes: ChangeMatrix) -> list[dict[str, DrawMatrix]]:
        """Return shift and discrimination of every column: of the data (one row), and of each draw."""
        found = []
        for sample in self.resamplings:
            harmful = sample.harmful_weights @ changes[self.is_harmful] / self.class_sizes[0]
            benign = sample.benign_weights @ changes[~self.is_harmful] / self.class_sizes[1]
            found.append({"shift": (harmful + benign) / 2, "discrimination": harmful - benign})
        return found

    def estimate_contrasts(self, changes: ChangeMatrix) -> pd.DataFrame:
        """Return a row per column: shift and discrimination with their intervals.

        Args:
            changes: of something, by query and column.
        """
        point, cloud = self.draw_contrasts(changes)
        found: dict[str, Any] = {}
        for name in CONTRASTS:
            values = point[name][0]
            ends = np.array([bootstrap_interval(one, min(self.class_sizes)) for one in cloud[name].T]).reshape(-1, 2)
            found[name] = values
            found[f"{name}_low"] = np.minimum(ends[:, 0], values)
            found[f"{name}_high"] = np.maximum(ends[:, 1], values)
        return pd.DataFrame(found)

    def compute_unit_contributions(self, changes: ChangeMatrix, units: ResamplingUnits) -> dict[str, UnitMatrix]:
        """Return what each unit adds to shift and to discrimination of every column.

        Args:
            changes: of something, by query and column.
            units: of the queries.
        """
        share = np.where(self.is_harmful, 1 / self.class_sizes[0], 1 / self.class_sizes[1])
        side = np.where(self.is_harmful, 1.0, -1.0)
        found = {}
        for name, weights in (("shift", share / 2), ("discrimination", share * side)):
            found[name] = np.zeros((len(units.composition), changes.shape[1]))
            np.add.at(found[name], units.unit_of_query, weights[:, None] * changes)
        return found

    def estimate_separation(
        self, scores_before: Float[np.ndarray, " queries"], scores_after: Float[np.ndarray, " queries"]
    ) -> dict[str, float]:
        """Return how well a number by query tells the classes apart before and after, and the difference."""
        clouds: dict[str, list[Any]] = {"auroc": [], "auroc_after": [], "delta_auroc": []}
        for sample in self.resamplings:
            old, new = (
                compute_auroc(values[self.is_harmful], values[~self.is_harmful], sample, which)
                for which, values in enumerate((scores_before, scores_after))
            )
            for name, values in zip(clouds, (old, new, new - old), strict=True):
                clouds[name].append(values)
        found: dict[str, float] = {}
        for name, (point, cloud) in clouds.items():
            found |= make_estimate_columns(name, point, cloud, min(self.class_sizes), from_counts=True)
        return found


def estimate_layer_contrasts(estimator: ContrastEstimator, margins_before: ChangeMatrix, margins_after: ChangeMatrix) -> pd.DataFrame:
    """Return shift and discrimination as each layer's margin shows them.

    Args:
        estimator: the queries.
        margins_before: margins by layer, undefended.
        margins_after: the same, defended.
    """
    found = estimator.estimate_contrasts(margins_after - margins_before)
    found.insert(0, "layer", range(len(found)))
    for name, values in (("undefended", margins_before), ("defended", margins_after)):
        for side, of in (("harmful", estimator.is_harmful), ("benign", ~estimator.is_harmful)):
            found[f"{side}_{name}"] = values[of].mean(0)
    return found


def find_half_way_layers(estimator: ContrastEstimator, margins_before: ChangeMatrix, margins_after: ChangeMatrix) -> pd.DataFrame:
    """Return the layer from which on each contrast stays beyond half of its final value.

    Where the final value's interval holds 0 there is nothing to be half of, and the layer is missing. The
    interval of a layer is that of draws whose final value has the estimate's sign.

    Args:
        estimator: the queries.
        margins_before: margins by layer, undefended.
        margins_after: the same, defended.
    """
    point, cloud = estimator.draw_contrasts(margins_after - margins_before)
    rows = []
    n = min(estimator.class_sizes)
    for name in CONTRASTS:
        here, many = point[name], cloud[name]
        final = make_estimate_columns("final", here[:, -1], many[:, -1], n)
        half = {"half": np.nan, "half_low": np.nan, "half_high": np.nan}
        if final["final_low"] > 0 or final["final_high"] < 0:
            same = many[np.sign(many[:, -1]) == np.sign(final["final"])]
            half = make_estimate_columns("half", _find_lasting_layers(here), _find_lasting_layers(same), n)
        rows.append({"contrast": name, **final, **half})
    return pd.DataFrame(rows)


def _find_lasting_layers(layer_contrasts: DrawMatrix) -> Float[np.ndarray, " draws"]:
    """The first column from which on each row is at least half of its last value."""
    there = layer_contrasts / layer_contrasts[:, -1:] >= 0.5
    return (layer_contrasts.shape[1] - np.cumprod(there[:, ::-1], axis=1).sum(1)).astype(float)


def estimate_part_contrasts(estimator: ContrastEstimator, decomposition_before: Decomposition, decomposition_after: Decomposition) -> pd.DataFrame:
    """Return what every part adds to shift and discrimination; the rows add up to both.

    What is added between blocks, and biases, are left out where they are nothing.

    Args:
        estimator: the queries.
        decomposition_before: their margins, undefended.
        decomposition_after: the same, defended.
    """
    change = decomposition_after.contributions - decomposition_before.contributions
    found = pd.concat([make_part_columns(decomposition_before.parts), estimator.estimate_contrasts(change)], axis=1)
    nothing = found["kind"].isin(["added", "bias"]) & (np.abs(change).max(0) < 1e-5)
    return found[~nothing].reset_index(drop=True)


def make_part_columns(parts: Sequence[ModelPart]) -> pd.DataFrame:
    """Return the columns that name parts."""
    return pd.DataFrame(
        {
            "layer": pd.array([part.layer for part in parts], dtype="Int64"),
            "kind": [part.kind for part in parts],
            "head": pd.array([part.head for part in parts], dtype="Int64"),
        }
    )
