"""Attribution of shift and discrimination to layers, parts and sites: many contrasts at once, with intervals.

Both contrasts are linear in the margins, so contributions that add up to the margins add up to the contrasts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
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
_MIN_SQUARED_LENGTH = 1e-12  # nats²; profiles below it are float noise
_MIN_MANTEL_PAIRS = 4


@dataclass(frozen=True)
class ContrastEstimator:
    """Estimates contrasts over one set of queries.

    Attributes:
        pairs: name of each query's pair, missing for a query without a pair.
        is_harmful: class of each query.
        seed: seed of the bootstrap.
        n_draws: number of bootstrap draws.
    """

    pairs: pd.Series
    is_harmful: Bool[np.ndarray, " queries"]
    seed: int = 0
    n_draws: int = BOOTSTRAP_DRAWS

    @cached_property
    def resamplings(self) -> tuple[ResamplingWeights, ResamplingWeights]:
        """Weights of the observed data, and of the bootstrap draws."""
        units = ResamplingUnits.from_pairs(self.pairs, self.is_harmful)
        return ResamplingWeights.from_observed(units), ResamplingWeights.from_bootstrap(
            units, self.n_draws, self.seed
        )

    @property
    def class_sizes(self) -> tuple[int, int]:
        """Numbers of harmful and of benign queries."""
        return int(self.is_harmful.sum()), int((~self.is_harmful).sum())

    def draw_contrasts(self, changes: ChangeMatrix) -> list[dict[str, DrawMatrix]]:
        """Return shift and discrimination of every column, from the observed data and from each draw.

        Args:
            changes: changes by query and column, nats.

        Returns:
            Two dictionaries keyed by contrast: the observed values (one row), and the draws.
        """
        contrasts = []
        for weights in self.resamplings:
            harmful = weights.harmful_weights @ changes[self.is_harmful] / self.class_sizes[0]
            benign = weights.benign_weights @ changes[~self.is_harmful] / self.class_sizes[1]
            contrasts.append({"shift": (harmful + benign) / 2, "discrimination": harmful - benign})
        return contrasts

    def estimate_contrasts(self, changes: ChangeMatrix) -> pd.DataFrame:
        """Return shift and discrimination with their intervals, one row per column of `changes`.

        Args:
            changes: changes by query and column, nats.
        """
        points, clouds = self.draw_contrasts(changes)
        table: dict[str, Any] = {}
        for name in CONTRASTS:
            values = points[name][0]
            ends = np.array(
                [bootstrap_interval(draws, min(self.class_sizes)) for draws in clouds[name].T]
            ).reshape(-1, 2)
            table[name] = values
            table[f"{name}_low"] = np.minimum(ends[:, 0], values)
            table[f"{name}_high"] = np.maximum(ends[:, 1], values)
        return pd.DataFrame(table)

    def compute_unit_contributions(
        self, changes: ChangeMatrix, units: ResamplingUnits
    ) -> dict[str, UnitMatrix]:
        """Return the contribution of each resampling unit to the contrasts of every column.

        Args:
            changes: changes by query and column, nats.
            units: resampling units of the queries.
        """
        share = np.where(self.is_harmful, 1 / self.class_sizes[0], 1 / self.class_sizes[1])
        sign = np.where(self.is_harmful, 1.0, -1.0)
        contributions = {}
        for name, weights in (("shift", share / 2), ("discrimination", share * sign)):
            contributions[name] = np.zeros((len(units.composition), changes.shape[1]))
            np.add.at(contributions[name], units.unit_of_query, weights[:, None] * changes)
        return contributions

    def estimate_separation(
        self, scores_before: Float[np.ndarray, " queries"], scores_after: Float[np.ndarray, " queries"]
    ) -> dict[str, float]:
        """Return the AUROC of a score before and after a defense, and the difference, with intervals.

        Args:
            scores_before: score of each query, undefended.
            scores_after: score of each query, defended.
        """
        estimates: dict[str, list[Any]] = {"auroc": [], "auroc_after": [], "delta_auroc": []}
        for weights in self.resamplings:
            before, after = (
                compute_auroc(scores[self.is_harmful], scores[~self.is_harmful], weights, condition_index)
                for condition_index, scores in enumerate((scores_before, scores_after))
            )
            for name, values in zip(estimates, (before, after, after - before), strict=True):
                estimates[name].append(values)
        columns: dict[str, float] = {}
        for name, (point, draws) in estimates.items():
            columns |= make_estimate_columns(name, point, draws, min(self.class_sizes), from_counts=True)
        return columns


def estimate_layer_contrasts(
    estimator: ContrastEstimator, margins_before: ChangeMatrix, margins_after: ChangeMatrix
) -> pd.DataFrame:
    """Return shift and discrimination of each layer's margin, with the class means behind them.

    Args:
        estimator: estimator of the queries.
        margins_before: margins by query and layer, undefended, nats.
        margins_after: margins by query and layer, defended, nats.
    """
    table = estimator.estimate_contrasts(margins_after - margins_before)
    table.insert(0, "layer", range(len(table)))
    for condition, margins in (("undefended", margins_before), ("defended", margins_after)):
        for class_name, in_class in (("harmful", estimator.is_harmful), ("benign", ~estimator.is_harmful)):
            table[f"{class_name}_{condition}"] = margins[in_class].mean(0)
    return table


def find_half_way_layers(
    estimator: ContrastEstimator, margins_before: ChangeMatrix, margins_after: ChangeMatrix
) -> pd.DataFrame:
    """Return the first layer from which each contrast stays at half of its final value or more.

    The layer is missing if the interval of the final value includes 0. Its own interval uses only the draws
    whose final value has the sign of the estimate.

    Args:
        estimator: estimator of the queries.
        margins_before: margins by query and layer, undefended, nats.
        margins_after: margins by query and layer, defended, nats.
    """
    points, clouds = estimator.draw_contrasts(margins_after - margins_before)
    rows = []
    n = min(estimator.class_sizes)
    for name in CONTRASTS:
        point, draws = points[name], clouds[name]
        final = make_estimate_columns("final", point[:, -1], draws[:, -1], n)
        half = {"half": np.nan, "half_low": np.nan, "half_high": np.nan}
        if final["final_low"] > 0 or final["final_high"] < 0:
            same_sign_draws = draws[np.sign(draws[:, -1]) == np.sign(final["final"])]
            half = make_estimate_columns(
                "half", _find_lasting_layers(point), _find_lasting_layers(same_sign_draws), n
            )
        rows.append({"contrast": name, **final, **half})
    return pd.DataFrame(rows)


def _find_lasting_layers(layer_contrasts: DrawMatrix) -> Float[np.ndarray, " draws"]:
    """Return, for each row, the first column from which all values are at least half of the last one."""
    reaches_half = layer_contrasts / layer_contrasts[:, -1:] >= 0.5
    return (layer_contrasts.shape[1] - np.cumprod(reaches_half[:, ::-1], axis=1).sum(1)).astype(float)


def estimate_part_contrasts(
    estimator: ContrastEstimator, decomposition_before: Decomposition, decomposition_after: Decomposition
) -> pd.DataFrame:
    """Return the contribution of every part to shift and discrimination; the rows add up to both.

    Biases and parts that a defense adds between blocks are left out if their contribution does not change.

    Args:
        estimator: estimator of the queries.
        decomposition_before: decomposition of the queries' margins, undefended.
        decomposition_after: decomposition of the queries' margins, defended.
    """
    changes = decomposition_after.contributions - decomposition_before.contributions
    table = pd.concat(
        [make_part_columns(decomposition_before.parts), estimator.estimate_contrasts(changes)], axis=1
    )
    is_unchanged = table["kind"].isin(["added", "bias"]) & (np.abs(changes).max(0) < 1e-5)
    return table[~is_unchanged].reset_index(drop=True)


def make_part_columns(parts: Sequence[ModelPart]) -> pd.DataFrame:
    """Return the columns that identify parts: layer, kind and head."""
    return pd.DataFrame(
        {
            "layer": pd.array([part.layer for part in parts], dtype="Int64"),
            "kind": [part.kind for part in parts],
            "head": pd.array([part.head for part in parts], dtype="Int64"),
        }
    )


def estimate_profile_similarity(
    estimator: ContrastEstimator, changes_by_defense: Mapping[str, ChangeMatrix]
) -> pd.DataFrame:
    """Return the cosine similarity of every two defenses' attribution profiles, by contrast.

    A profile is the vector of contrasts over parts. Both profiles are differences from the undefended model
    on the same queries, so they share its sampling noise, which would make any two defenses look similar.
    Dot products and squared lengths are therefore corrected for the expected contribution of noise, estimated
    from the scatter over resampling units; intervals are jackknife intervals. The cosine is missing if a
    corrected squared length is not positive, because that profile is indistinguishable from noise.

    Args:
        estimator: estimator of the queries.
        changes_by_defense: defense → change of each part's contribution to each query's margin, nats.
    """
    units = ResamplingUnits.from_pairs(estimator.pairs, estimator.is_harmful)
    contributions = {
        defense: estimator.compute_unit_contributions(changes, units)
        for defense, changes in changes_by_defense.items()
    }
    squared_lengths = {
        (defense, contrast): _compute_debiased_dot_products(
            by_contrast[contrast], by_contrast[contrast], units.composition
        )
        for defense, by_contrast in contributions.items()
        for contrast in CONTRASTS
    }
    rows = []
    for defense, other in combinations(changes_by_defense, 2):
        for contrast in CONTRASTS:
            dot_products = _compute_debiased_dot_products(
                contributions[defense][contrast], contributions[other][contrast], units.composition
            )
            cosine_columns = _jackknife_cosine(
                dot_products,
                squared_lengths[defense, contrast],
                squared_lengths[other, contrast],
                units.composition,
            )
            rows.append({"defense": defense, "other": other, "contrast": contrast, **cosine_columns})
    columns = ["defense", "other", "contrast", "cosine", "cosine_low", "cosine_high"]
    return pd.DataFrame(rows, columns=columns)


def _compute_debiased_dot_products(
    contributions: UnitMatrix, other_contributions: UnitMatrix, composition: Int[np.ndarray, " units"]
) -> Float[np.ndarray, " draws"]:
    """Return the noise-corrected dot product of two profiles, and its value without each unit in turn.

    Let x_i and y_i be the contributions of unit i to the two profiles, X = Σ x_i and Y = Σ y_i. Units are
    independent, so E[X·Y] = E[X]·E[Y] + Σ_i E[(x_i − E x_i)·(y_i − E y_i)]. The last term is the noise that
    the profiles share. For the n units of one composition k, with means x̄ and ȳ, it is estimated without
    bias by n/(n−1) · S_k, where S_k = Σ_i s_i and s_i = (x_i − x̄)·(y_i − ȳ). The estimate is

        D = X·Y − Σ_k n_k/(n_k−1) · S_k.

    Without unit j, the other n−1 units of its composition stand for all n: each is scaled by r = n/(n−1). The
    sum of x over the composition, n x̄, becomes r (n x̄ − x_j), so X becomes X + (r−1) n x̄ − r x_j, and
    likewise Y. Removing a value from a scatter gives S_k − r s_j, the scaling multiplies it by r², and the
    correction factor n/(n−1) becomes (n−1)/(n−2):

        D_j = X_j·Y_j − Σ_{l≠k} n_l/(n_l−1) · S_l − r² (n−1)/(n−2) · (S_k − r s_j).

    Returns:
        D, then D_j for every unit j; all NaN if a composition has fewer than three units.
    """
    sums = contributions.sum(0), other_contributions.sum(0)
    noise = np.zeros(len(composition) + 1)
    dot_products_without = np.empty(len(composition))
    for kind in np.unique(composition):
        members = np.flatnonzero(composition == kind)
        n = len(members)
        if n < 3:
            return np.full(len(composition) + 1, np.nan)
        means = contributions[members].mean(0), other_contributions[members].mean(0)
        scatter = ((contributions[members] - means[0]) * (other_contributions[members] - means[1])).sum(1)
        scale = n / (n - 1)
        member_noise = scale * scatter.sum()
        noise += member_noise
        noise[1 + members] += scale**2 * (n - 1) / (n - 2) * (scatter.sum() - scale * scatter) - member_noise
        sums_without = [
            total + (scale - 1) * n * mean - scale * values[members]
            for total, mean, values in zip(sums, means, (contributions, other_contributions), strict=True)
        ]
        dot_products_without[members] = (sums_without[0] * sums_without[1]).sum(1)
    return np.concatenate([[sums[0] @ sums[1]], dot_products_without]) - noise


def _jackknife_cosine(
    dot_products: DrawVector,
    squared_lengths: DrawVector,
    other_squared_lengths: DrawVector,
    composition: Int[np.ndarray, " units"],
) -> dict[str, float]:
    """Return a cosine with its jackknife interval, from values of `_compute_debiased_dot_products`."""
    is_known = (squared_lengths > _MIN_SQUARED_LENGTH) & (other_squared_lengths > _MIN_SQUARED_LENGTH)
    lengths = np.sqrt(np.where(is_known, squared_lengths * other_squared_lengths, np.nan))
    cosines = dot_products / lengths
    variance = 0.0
    for kind in np.unique(composition):
        values = cosines[1:][composition == kind]
        variance += (len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum()
    half_width = float(stdtrit(len(composition) - 1, 0.5 + CONFIDENCE_LEVEL / 2) * np.sqrt(variance))
    cosine, low, high = (float(np.clip(cosines[0] + sign * half_width, -1, 1)) for sign in (0, -1, 1))
    return {"cosine": cosine, "cosine_low": low, "cosine_high": high}


def join_stack_interactions(similarities: pd.DataFrame, ensembles: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of defenses whose stack was run, with the stack's interaction.

    If a pair was stacked in both orders, the interaction is the mean of the two.

    Args:
        similarities: table of `estimate_profile_similarity`, with the column `attack`.
        ensembles: table of `analyze ensembles`, stacks only.
    """
    team = ensembles["members"].map(lambda members: "+".join(sorted(members.split("+"))))
    tables = []
    for contrast in CONTRASTS:
        interactions = (
            ensembles.assign(team=team).groupby(["attack", "team"])[f"interaction_{contrast}"].mean()
        )
        rows = similarities[similarities["contrast"] == contrast]
        teams = rows[["defense", "other"]].apply(lambda row: "+".join(sorted(row)), axis=1)
        keys = pd.MultiIndex.from_arrays((rows["attack"], teams)) if len(rows) else interactions.index[:0]
        tables.append(rows.assign(interaction=interactions.reindex(keys).to_numpy()))
    joined = pd.concat(tables, ignore_index=True)
    return joined.dropna(subset="interaction").reset_index(drop=True)


def compute_mantel_correlation(
    pairs: pd.DataFrame, seed: int = 0, n_permutations: int = 1999
) -> dict[str, float]:
    """Return the rank correlation of similarity and interaction over pairs of defenses, with its p-value.

    Pairs share members, so the permutations exchange defenses, not pairs (Mantel's test).

    Args:
        pairs: table of `join_stack_interactions`, restricted to one attack and one contrast.
        seed: seed of the permutations.
        n_permutations: number of permutations.
    """
    pairs = pairs.dropna(subset=["cosine", "interaction"])
    if len(pairs) < _MIN_MANTEL_PAIRS:
        return {"pairs": len(pairs), "rank_correlation": np.nan, "p": np.nan}
    names = sorted({*pairs["defense"], *pairs["other"]})
    rows, columns = ([names.index(name) for name in pairs[column]] for column in ("defense", "other"))
    similarity = np.full((len(names), len(names)), np.nan)
    similarity[rows, columns] = similarity[columns, rows] = pairs["cosine"]
    interaction = pairs["interaction"].to_numpy(float)
    rng = np.random.default_rng(seed)
    correlations = np.full(n_permutations + 1, np.nan)
    for index in range(n_permutations + 1):
        order = rng.permutation(len(names)) if index else np.arange(len(names))
        permuted = similarity[order][:, order][rows, columns]
        is_known = ~np.isnan(permuted)  # not every pair was stacked
        if (
            is_known.sum() >= _MIN_MANTEL_PAIRS
            and np.ptp(permuted[is_known]) > 0
            and np.ptp(interaction[is_known]) > 0
        ):
            correlations[index] = spearmanr(permuted[is_known], interaction[is_known]).statistic
    observed, permuted_correlations = correlations[0], correlations[1:]
    n_as_extreme = np.nansum(np.abs(permuted_correlations) >= abs(observed) - 1e-12)
    n_known = np.isfinite(permuted_correlations).sum()
    p_value = (1 + n_as_extreme) / (1 + n_known) if np.isfinite(observed) else np.nan
    return {"pairs": len(pairs), "rank_correlation": float(observed), "p": float(p_value)}
