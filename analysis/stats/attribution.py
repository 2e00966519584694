"""What layers, parts and sites do to shift and discrimination: many contrasts at once, with intervals.

Shift and discrimination are means of margins, so what holds for a margin holds for them: shares that add up
to a margin add up to its contrasts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit
from scipy.stats import spearmanr

from analysis.stats.bootstrap import (
    BOOTSTRAP_DRAWS,
    CONFIDENCE_LEVEL,
    DrawVector,
    ResamplingUnits,
    ResamplingWeights,
    bootstrap_interval,
    make_estimate_columns,
)
from analysis.stats.effects import compute_auroc
from analysis.stats.tables import Decomposition, ModelPart

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
        return ResamplingWeights.from_observed(units), ResamplingWeights.from_bootstrap(
            units, self.n_draws, self.seed
        )

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
            ends = np.array(
                [bootstrap_interval(one, min(self.class_sizes)) for one in cloud[name].T]
            ).reshape(-1, 2)
            found[name] = values
            found[f"{name}_low"] = np.minimum(ends[:, 0], values)
            found[f"{name}_high"] = np.maximum(ends[:, 1], values)
        return pd.DataFrame(found)

    def compute_unit_contributions(
        self, changes: ChangeMatrix, units: ResamplingUnits
    ) -> dict[str, UnitMatrix]:
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


def estimate_layer_contrasts(
    estimator: ContrastEstimator, margins_before: ChangeMatrix, margins_after: ChangeMatrix
) -> pd.DataFrame:
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


def find_half_way_layers(
    estimator: ContrastEstimator, margins_before: ChangeMatrix, margins_after: ChangeMatrix
) -> pd.DataFrame:
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


def estimate_part_contrasts(
    estimator: ContrastEstimator, decomposition_before: Decomposition, decomposition_after: Decomposition
) -> pd.DataFrame:
    """Return what every part adds to shift and discrimination; the rows add up to both.

    What is added between blocks, and biases, are left out where they are nothing.

    Args:
        estimator: the queries.
        decomposition_before: their margins, undefended.
        decomposition_after: the same, defended.
    """
    change = decomposition_after.contributions - decomposition_before.contributions
    found = pd.concat(
        [make_part_columns(decomposition_before.parts), estimator.estimate_contrasts(change)], axis=1
    )
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


_MIN_SQUARED_LENGTH = 1e-12  # square nats, of a profile that is nothing but float noise


def estimate_profile_similarity(
    estimator: ContrastEstimator, changes_by_defense: Mapping[str, ChangeMatrix]
) -> pd.DataFrame:
    """Return how alike the parts are that two defenses work by: cosines of their contrasts by part.

    Both are compared with the undefended model on the same queries, so what is chance in one is chance in the
    other, and would make any two seem alike. Dot products are therefore taken less what chance adds to them,
    as the scatter over pairs has it; intervals are the jackknife's. Where a defense does no more than chance
    would, there is nothing to compare.

    Args:
        estimator: the queries.
        changes_by_defense: by defense, what it does to the share of each part in each query's margin.
    """
    units = ResamplingUnits.from_pairs(estimator.pairs, estimator.is_harmful)
    adds = {
        name: estimator.compute_unit_contributions(change, units)
        for name, change in changes_by_defense.items()
    }
    lengths = {
        (name, contrast): _compute_debiased_dot_products(one[contrast], one[contrast], units.composition)
        for name, one in adds.items()
        for contrast in CONTRASTS
    }
    names, rows = list(changes_by_defense), []
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            for contrast in CONTRASTS:
                product = _compute_debiased_dot_products(
                    adds[one][contrast], adds[other][contrast], units.composition
                )
                ends = _jackknife_cosine(
                    product, lengths[one, contrast], lengths[other, contrast], units.composition
                )
                rows.append({"defense": one, "other": other, "contrast": contrast, **ends})
    columns = ["defense", "other", "contrast", "cosine", "cosine_low", "cosine_high"]
    return pd.DataFrame(rows, columns=columns)


def _compute_debiased_dot_products(
    contributions: UnitMatrix, other_contributions: UnitMatrix, composition: Int[np.ndarray, " units"]
) -> Float[np.ndarray, " draws"]:
    """The dot product of two sums over units, less what chance adds; then without each unit in turn."""
    sums = contributions.sum(0), other_contributions.sum(0)
    whole, less = sums[0] @ sums[1], np.empty(len(composition))
    chance = np.zeros(len(composition) + 1)
    for kind in np.unique(composition):
        of = np.flatnonzero(composition == kind)
        n = len(of)
        means = contributions[of].mean(0), other_contributions[of].mean(0)
        scatter = ((contributions[of] - means[0]) * (other_contributions[of] - means[1])).sum(1)
        if n < 3:
            return np.full(len(composition) + 1, np.nan)
        here = n / (n - 1) * scatter.sum()
        chance[0] += here
        chance[1:] += here
        scale = n / (n - 1)  # those that are left stand for all
        chance[1 + of] += scale**2 * (n - 1) / (n - 2) * (scatter.sum() - scale * scatter) - here
        left = [
            total + (scale - 1) * n * mean - scale * adds[of]
            for total, mean, adds in zip(sums, means, (contributions, other_contributions), strict=True)
        ]
        less[of] = (left[0] * left[1]).sum(1)
    return np.concatenate([[whole], less]) - chance


def _jackknife_cosine(
    dot_products: DrawVector,
    squared_lengths: DrawVector,
    other_squared_lengths: DrawVector,
    composition: Int[np.ndarray, " units"],
) -> dict[str, float]:
    """A cosine with its jackknife interval, from `_dots`; none where a length is no more than chance."""
    lengths = np.sqrt(
        np.where(
            (squared_lengths > _MIN_SQUARED_LENGTH) & (other_squared_lengths > _MIN_SQUARED_LENGTH),
            squared_lengths * other_squared_lengths,
            np.nan,
        )
    )
    values = dot_products / lengths
    error = 0.0
    for kind in np.unique(composition):
        of = values[1:][composition == kind]
        error += (len(of) - 1) / len(of) * ((of - of.mean()) ** 2).sum()
    wide = float(stdtrit(len(composition) - 1, 0.5 + CONFIDENCE_LEVEL / 2) * np.sqrt(error))
    cosine, low, high = (float(np.clip(values[0] + side * wide, -1, 1)) for side in (0, -1, 1))
    return {"cosine": cosine, "cosine_low": low, "cosine_high": high}


def join_stack_interactions(similarities: pd.DataFrame, ensembles: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of defenses whose stack was run, with what their effects come to beyond the sum.

    Where a pair was stacked in both orders, the mean of the two.

    Args:
        similarities: of `profiles`, with `attack`.
        ensembles: of `analyze ensembles`, its stacks.
    """
    team = ensembles["members"].map(lambda members: "+".join(sorted(members.split("+"))))
    found = []
    for contrast in CONTRASTS:
        stacks = ensembles.assign(team=team).groupby(["attack", "team"])[f"interaction_{contrast}"].mean()
        here = similarities[similarities["contrast"] == contrast]
        names = here["attack"], here[["defense", "other"]].apply(lambda row: "+".join(sorted(row)), axis=1)
        places = pd.MultiIndex.from_arrays(names) if len(here) else stacks.index[:0]
        found.append(here.assign(interaction=stacks.reindex(places).to_numpy()))
    return pd.concat(found, ignore_index=True).dropna(subset="interaction").reset_index(drop=True)


def compute_mantel_correlation(
    pairs: pd.DataFrame, seed: int = 0, n_permutations: int = 1999
) -> dict[str, float]:
    """Return the rank correlation of overlap and interaction over pairs of defenses, and its p-value.

    Pairs share members, so defenses are permuted, not pairs (Mantel's test).

    Args:
        pairs: of `overlap`, of one attack and contrast.
        seed: of the permutations.
        n_permutations: how many.
    """
    pairs = pairs.dropna(subset=["cosine", "interaction"])
    names = sorted({*pairs["defense"], *pairs["other"]})
    places = [[names.index(name) for name in pairs[column]] for column in ("defense", "other")]
    alike = np.full((len(names), len(names)), np.nan)
    alike[places[0], places[1]] = alike[places[1], places[0]] = pairs["cosine"]
    beyond = pairs["interaction"].to_numpy(float)
    if len(pairs) < 4:
        return {"pairs": len(pairs), "rank_correlation": np.nan, "p": np.nan}
    rng, found = np.random.default_rng(seed), []
    for flip in range(n_permutations + 1):
        order = rng.permutation(len(names)) if flip else np.arange(len(names))
        moved = alike[order][:, order][places[0], places[1]]
        known = ~np.isnan(moved)  # not every pair was stacked
        few = known.sum() < 4 or np.ptp(moved[known]) == 0 or np.ptp(beyond[known]) == 0
        found.append(np.nan if few else spearmanr(moved[known], beyond[known]).statistic)
    ranks = np.array(found)
    as_far = np.nansum(np.abs(ranks[1:]) >= abs(ranks[0]) - 1e-12)
    p = (1 + as_far) / (1 + np.isfinite(ranks[1:]).sum()) if np.isfinite(ranks[0]) else np.nan
    return {"pairs": len(pairs), "rank_correlation": float(ranks[0]), "p": float(p)}
