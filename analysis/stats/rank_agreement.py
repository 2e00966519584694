"""Agreement on the order of the same defenses: of two data sets, and of models on the same queries.

Data sets are compared by rank correlations, each with its ceiling; models by Kendall's τ.

The estimated effects contain the sampling error of the queries, so two sets agree less than the effects in
the populations of their queries would. How much less is known from each set itself: from the agreement of
random halves of its queries, as in the correction for attenuation (Spearman 1904,
https://doi.org/10.2307/1412159).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from analysis.stats.bootstrap import (
    BOOTSTRAP_DRAWS,
    DrawVector,
    ResamplingUnits,
    ResamplingWeights,
    bootstrap_interval,
)
from analysis.stats.effects import compute_auroc
from analysis.stats.response_rates import LABEL_BY_VERDICT
from analysis.stats.tables import UNDEFENDED, ScoreTable, find_defense_rows

# Measure → label. The first three are computed from the margins, the others from the judged responses.
RANKED_MEASURES = {
    "shift": "shift (nats)",
    "discrimination": "discrimination (nats)",
    "delta_auroc": "ΔAUROC",
    "refusal_change": "refusal rate, change",
    "over_refusal_change": "over-refusal rate, change",
    "response_discrimination": "discrimination (points)",
}
MIN_RANKED_DEFENSES = 4
N_HALVINGS = 400  # random divisions of a set into halves

EffectMatrix = Float[np.ndarray, "draws defenses"]


@dataclass(frozen=True)
class EffectSamples:
    """One measure of the effect of each defense on one data set; all defenses share queries and draws.

    Attributes:
        defenses: names of the defenses.
        observed: effect of each defense on all queries.
        draws: its effect in each bootstrap draw.
        first_halves: its effect on one half of the queries, for each random division into halves.
        second_halves: its effect on the other half.
    """

    defenses: tuple[str, ...]
    observed: Float[np.ndarray, " defenses"]
    draws: EffectMatrix
    first_halves: Float[np.ndarray, "halvings defenses"]
    second_halves: Float[np.ndarray, "halvings defenses"]

    def select_defenses(self, defenses: list[str]) -> EffectSamples:
        """Return the effects of some of the defenses, in the given order."""
        columns = [self.defenses.index(name) for name in defenses]
        return EffectSamples(
            tuple(defenses),
            self.observed[columns],
            *(values[:, columns] for values in (self.draws, self.first_halves, self.second_halves)),
        )

    @property
    def known_defenses(self) -> set[str]:
        """Defenses whose effect could be computed; without judged responses, it could not."""
        return {name for name, value in zip(self.defenses, self.observed, strict=True) if np.isfinite(value)}

    def compute_half_agreement(self) -> float:
        """Return the mean rank correlation of two random halves of the set; NaN if all effects are equal."""
        correlations = compute_rank_correlations(self.first_halves, self.second_halves)
        known = correlations[np.isfinite(correlations)]
        return float(known.mean()) if len(known) else np.nan


def sample_effects(
    scores: ScoreTable,
    responses: pd.DataFrame | None,
    attack: str,
    seed: int = 0,
    n_draws: int = BOOTSTRAP_DRAWS,
) -> dict[str, EffectSamples]:
    """Return the effects of the defenses of a run under one attack, by measure of `RANKED_MEASURES`.

    Controls and ablations of defenses are left out. The measures of responses use the queries whose responses
    were judged both with and without the defense; margins do not stand in for the others.

    Args:
        scores: scores of the run, those of the undefended model included.
        responses: `responses.csv`; None leaves out the measures of responses.
        attack: name of the attack.
        seed: seed of the bootstrap and of the halves; runs that are compared need different ones.
        n_draws: number of bootstrap draws.
    """
    defenses = _list_defenses(scores, attack)
    if not defenses:
        return {}
    undefended = scores.select_condition(attack, UNDEFENDED)
    is_harmful = undefended["harmful"].to_numpy(bool)
    margins = np.stack(
        [scores.select_condition(attack, name)["margin"].to_numpy(float) for name in defenses], axis=1
    )
    label_changes = (
        None if responses is None else _compute_label_changes(responses, undefended.index, attack, defenses)
    )
    units = ResamplingUnits.from_pairs(undefended["pair"], is_harmful)
    observed, draws, *halves = (
        _measure_effects(undefended["margin"].to_numpy(float), margins, label_changes, is_harmful, weights)
        for weights in (
            ResamplingWeights.from_observed(units),
            ResamplingWeights.from_bootstrap(units, n_draws, seed),
            *split_into_halves(units, N_HALVINGS, seed),
        )
    )
    return {
        measure: EffectSamples(
            tuple(defenses), observed[measure][0], draws[measure], halves[0][measure], halves[1][measure]
        )
        for measure in observed
    }


def compare_effect_ranks(first: EffectSamples, second: EffectSamples) -> dict[str, Any]:
    """Return the agreement of two data sets on the order of the same defenses, in one measure.

    With r₁ and r₂, the agreement of random halves of each set, the agreement of two samples of the whole size
    from the same source is w = 2r / (1 + r) (Spearman and Brown), and the ceiling of the agreement of the two
    sets is √(w₁w₂). The bootstrap adds the sampling error of the queries a second time, so that its draws
    agree as little as halves do:

    - The interval of the observed correlation ρ is the percentile interval of the draws, moved by the
      difference of ρ and their median.
    - The corrected correlation, of the effects in the populations of queries, is ρ / √(w₁w₂), and its
      interval the percentile interval of the draws divided by √(r₁r₂); all are clipped to −1 to 1.

    In simulations of 6 to 30 defenses with normal effects and errors, the interval of ρ contains its expected
    value in 91 % to 99 % of samples (150 per case); that of the corrected correlation contains the
    correlation of the true effects in 80 % to 100 %, below 91 % only with 6 defenses whose effects are ten
    times their errors. The percentile interval of the draws contains it in as few as 0 %.

    Args:
        first: effects on one data set.
        second: effects of the same defenses on the other, from other draws.

    Returns:
        `n_defenses`; `rank_correlation` and `corrected`, each with the ends of its 95 % interval;
        `within_first`, `within_second` and `ceiling`, as above; the range of the correlation when one
        defense is left out (`without_one_low`, `without_one_high`), and the defense whose omission changes
        it most (`most_influential`). Correlations are NaN if all effects of a set are equal; if the halves
        of a set agree no better than by chance, its `within` is 0, and `ceiling` and `corrected` are NaN.

    Raises:
        ValueError: if the defenses differ or are fewer than `MIN_RANKED_DEFENSES`.
    """
    if first.defenses != second.defenses or len(first.defenses) < MIN_RANKED_DEFENSES:
        raise ValueError(f"two sets are compared on the same defenses, at least {MIN_RANKED_DEFENSES}")
    n = len(first.defenses)
    value = float(compute_rank_correlations(first.observed[None], second.observed[None])[0])
    draws = compute_rank_correlations(first.draws, second.draws)
    low, high = bootstrap_interval(draws, n, from_counts=True)
    offset = value - float(np.nanmedian(draws)) if np.isfinite(draws).any() else np.nan
    halves = np.array([samples.compute_half_agreement() for samples in (first, second)]).clip(0)
    within = 2 * halves / (1 + halves)
    is_reliable = bool((halves > 0).all())
    ceiling = float(np.sqrt(within.prod())) if is_reliable else np.nan
    half_ceiling = float(np.sqrt(halves.prod())) if is_reliable else np.nan
    corrected = value / ceiling
    left_out = _leave_each_out(first.observed, second.observed, compute_rank_correlations)
    influences = np.nan_to_num(np.abs(left_out - value))
    ends = {
        "rank_correlation": (value, low + offset, high + offset),
        "corrected": (corrected, min(low / half_ceiling, corrected), max(high / half_ceiling, corrected)),
    }
    return {
        "n_defenses": n,
        **{
            f"{name}{suffix}": float(np.clip(end, -1, 1))
            for name, values in ends.items()
            for suffix, end in zip(("", "_low", "_high"), values, strict=True)
        },
        "within_first": float(within[0]),
        "within_second": float(within[1]),
        "ceiling": ceiling,
        "without_one_low": float(left_out.min()),
        "without_one_high": float(left_out.max()),
        "most_influential": first.defenses[int(influences.argmax())],
    }


def compare_effect_orders(samples: Mapping[str, EffectSamples]) -> list[dict[str, Any]]:
    """Return how alike models order the same defenses in one measure, by Kendall's τ (τ-b).

    The models are measured on the same queries, and all share the bootstrap draws: an error that the queries
    give every model alike is in the interval once, not twice. The interval is the percentile interval of the
    draws, moved by the difference of τ and their median, as for `compare_effect_ranks`.

    Args:
        samples: effects by model, two or more, on the same queries, from the same draws.

    Returns:
        A row per pair of models (`first`, `second`), and, of three or more models, one for the mean of all
        pairs (`second` is empty): `n_defenses`, `tau` with the ends of its 95 % interval, its range when one
        defense is left out (`without_one_low`, `without_one_high`), and the defense whose omission changes it
        most (`most_influential`). τ is NaN if all effects on a model are equal.

    Raises:
        ValueError: if the defenses differ or are fewer than `MIN_RANKED_DEFENSES`.
    """
    defenses = next(iter(samples.values())).defenses
    if (
        any(effects.defenses != defenses for effects in samples.values())
        or len(defenses) < MIN_RANKED_DEFENSES
    ):
        raise ValueError(f"models are compared on the same defenses, at least {MIN_RANKED_DEFENSES}")
    pairs = {
        names: [
            compute_kendall_taus(first.observed[None], second.observed[None]),
            compute_kendall_taus(first.draws, second.draws),
            _leave_each_out(first.observed, second.observed, compute_kendall_taus),
        ]
        for names in combinations(samples, 2)
        for first, second in [(samples[names[0]], samples[names[1]])]
    }
    if len(samples) > 2:
        pairs["all pairs", ""] = [np.mean(parts, axis=0) for parts in zip(*pairs.values(), strict=True)]
    return [
        {"first": first, "second": second} | _describe_order(defenses, float(value[0]), draws, left_out)
        for (first, second), (value, draws, left_out) in pairs.items()
    ]


def _describe_order(
    defenses: tuple[str, ...], value: float, draws: DrawVector, left_out: Float[np.ndarray, " defenses"]
) -> dict[str, Any]:
    """Return one row of `compare_effect_orders`, without the names of the models."""
    low, high = bootstrap_interval(draws, len(defenses), from_counts=True)
    offset = value - float(np.nanmedian(draws)) if np.isfinite(draws).any() else np.nan
    influences = np.nan_to_num(np.abs(left_out - value))
    return {
        "n_defenses": len(defenses),
        "tau": value,
        "tau_low": float(np.clip(low + offset, -1, 1)),
        "tau_high": float(np.clip(high + offset, -1, 1)),
        "without_one_low": float(left_out.min()),
        "without_one_high": float(left_out.max()),
        "most_influential": defenses[int(influences.argmax())],
    }


def average_effects(first: EffectSamples, second: EffectSamples) -> EffectSamples:
    """Return the mean of two measures of the same defenses from the same draws."""
    assert first.defenses == second.defenses
    return EffectSamples(
        first.defenses,
        (first.observed + second.observed) / 2,
        (first.draws + second.draws) / 2,
        (first.first_halves + second.first_halves) / 2,
        (first.second_halves + second.second_halves) / 2,
    )


def compute_kendall_taus(first: EffectMatrix, second: EffectMatrix) -> DrawVector:
    """Return Kendall's τ-b of the effects of all defenses in each draw.

    >>> compute_kendall_taus(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[1.0, 3.0, 2.0, 4.0]])).round(3)
    array([0.667])

    Args:
        first: effects on one model, a row per draw.
        second: effects on the other.

    Returns:
        A τ per draw; NaN where all effects on a model are equal or one is missing.
    """
    upper = np.triu_indices(first.shape[1], 1)
    signs = [np.sign(effects[:, upper[0]] - effects[:, upper[1]]) for effects in (first, second)]
    scale = np.sqrt((signs[0] ** 2).sum(1) * (signs[1] ** 2).sum(1))
    total = (signs[0] * signs[1]).sum(1)
    return np.divide(total, scale, out=np.full_like(scale, np.nan), where=np.nan_to_num(scale) > 0)


def compute_rank_correlations(first: EffectMatrix, second: EffectMatrix) -> DrawVector:
    """Return Spearman's correlation of the effects of all defenses in each draw; ties have mean ranks.

    >>> compute_rank_correlations(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 4.0, 9.0]]))
    array([1.])

    Args:
        first: effects on one data set, a row per draw.
        second: effects on the other.

    Returns:
        A correlation per draw; NaN where all effects of a set are equal or one is missing.
    """
    from scipy.stats import rankdata  # scipy.stats takes half a second to import

    ranks = []
    for effects in (first, second):
        is_known = np.isfinite(effects).all(1, keepdims=True)
        ranked = rankdata(np.nan_to_num(effects), axis=1)
        ranks.append(np.where(is_known, ranked - ranked.mean(1, keepdims=True), 0.0))
    scale = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    return np.divide((ranks[0] * ranks[1]).sum(1), scale, out=np.full_like(scale, np.nan), where=scale > 0)


def split_into_halves(
    units: ResamplingUnits, n_halvings: int, seed: int = 0
) -> tuple[ResamplingWeights, ResamplingWeights]:
    """Return the weights of both halves of the queries for each random division.

    Units are kept whole and divided within each composition. The weights of a class add up to its number of
    queries in each half, so that weighted sums stay comparable with those of all queries.

    Args:
        units: units of the queries.
        n_halvings: number of divisions.
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    in_first = np.zeros((n_halvings, len(units.composition)), dtype=bool)
    for kind in np.unique(units.composition):
        members = np.flatnonzero(units.composition == kind)
        order = rng.random((n_halvings, len(members))).argsort(1).argsort(1)
        # Of an odd number, one more goes to the first or to the second half.
        sizes: Int[np.ndarray, " halvings"] = (len(members) + rng.integers(0, 2, n_halvings)) // 2
        in_first[:, members] = order < sizes[:, None]
    first, second = (
        _make_half_weights(chosen[:, units.unit_of_query], units.is_harmful)
        for chosen in (in_first, ~in_first)
    )
    return first, second


def _make_half_weights(
    is_chosen: Bool[np.ndarray, "halvings n"], is_harmful: Bool[np.ndarray, " n"]
) -> ResamplingWeights:
    """Return equal weights of the chosen queries of each class; NaN if none is chosen."""
    weights = []
    for in_class in (is_harmful, ~is_harmful):
        chosen = is_chosen[:, in_class].astype(float)
        counts = chosen.sum(1, keepdims=True)
        weights.append(chosen * (in_class.sum() / np.where(counts > 0, counts, np.nan)))
    unseen_weights = np.full((2, 2, 2, len(is_chosen)), 0.5)
    return ResamplingWeights(weights[0], weights[1], unseen_weights, is_observed=True)


def _list_defenses(scores: ScoreTable, attack: str) -> list[str]:
    """Return the defenses under an attack, without controls and ablations."""
    names = pd.Series([name for key, name in scores.condition_keys if key == attack], dtype=object)
    return list(names[find_defense_rows(names, names.map(scores.get_family))])


def _compute_label_changes(
    responses: pd.DataFrame, queries: pd.Index, attack: str, defenses: list[str]
) -> Float[np.ndarray, "n defenses"]:
    """Return the change of each response: 1 now refuses, −1 no longer; NaN if one of both is not judged."""
    rows = responses[responses["attack"] == attack]
    rows = rows.assign(label=rows["verdict"].map(LABEL_BY_VERDICT).astype(float))
    labels = rows.pivot(index="query", columns="defense", values="label")
    labels = labels.reindex(index=queries, columns=[UNDEFENDED, *defenses])
    values: np.ndarray = labels[defenses].to_numpy(float) - labels[[UNDEFENDED]].to_numpy(float)
    return values


def _measure_effects(
    margins_before: Float[np.ndarray, " n"],
    margins_after: Float[np.ndarray, "n defenses"],
    label_changes: Float[np.ndarray, "n defenses"] | None,
    is_harmful: Bool[np.ndarray, " n"],
    weights: ResamplingWeights,
) -> dict[str, EffectMatrix]:
    """Return each measure of each defense, a row per draw."""
    classes = (is_harmful, weights.harmful_weights), (~is_harmful, weights.benign_weights)
    changes = margins_after - margins_before[:, None]
    harmful, benign = (
        class_weights @ changes[in_class] / in_class.sum() for in_class, class_weights in classes
    )
    aurocs = [
        compute_auroc(margins[is_harmful], margins[~is_harmful], weights)
        for margins in (margins_before, *margins_after.T)
    ]
    effects = {
        "shift": (harmful + benign) / 2,
        "discrimination": harmful - benign,
        "delta_auroc": np.stack(aurocs[1:], axis=1) - aurocs[0][:, None],
    }
    if label_changes is not None:
        harmful, benign = (
            _average_known(label_changes[in_class], class_weights) for in_class, class_weights in classes
        )
        effects |= {
            "refusal_change": harmful,
            "over_refusal_change": benign,
            "response_discrimination": harmful - benign,
        }
    return effects


def _average_known(
    values: Float[np.ndarray, "n defenses"], weights: Float[np.ndarray, "draws n"]
) -> EffectMatrix:
    """Return the weighted mean of the values that are not missing, NaN if all are."""
    is_known = np.isfinite(values)
    totals = weights @ is_known.astype(float)
    return np.divide(
        weights @ np.where(is_known, values, 0.0), totals, out=np.full_like(totals, np.nan), where=totals > 0
    )


def _leave_each_out(
    first: Float[np.ndarray, " defenses"],
    second: Float[np.ndarray, " defenses"],
    correlate: Callable[[EffectMatrix, EffectMatrix], DrawVector],
) -> Float[np.ndarray, " defenses"]:
    """Return the correlation without each of the defenses."""
    kept = [np.delete(np.arange(len(first)), index) for index in range(len(first))]
    return correlate(first[kept], second[kept])
