"""Paired bootstrap intervals, sign-flip permutation tests, Wilson intervals and Holm's adjustment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.special import ndtr, ndtri, stdtrit

BOOTSTRAP_DRAWS = 2000
SIGN_FLIPS = 9999
CONFIDENCE_LEVEL = 0.95
NORMAL_QUANTILE = float(ndtri((1 + CONFIDENCE_LEVEL) / 2))  # 1.96

DrawVector = Float[np.ndarray, " draws"]


@dataclass(frozen=True)
class ResamplingUnits:
    """Units of resampling: a pair of queries is one unit, and so is a query without a pair.

    Attributes:
        unit_of_query: index of each query's unit, from 0.
        composition: composition of each unit, from 0; units with the same number have the same counts of
            harmful and of benign queries.
        is_harmful: class of each query.
    """

    unit_of_query: Int[np.ndarray, " n"]
    composition: Int[np.ndarray, " units"]
    is_harmful: Bool[np.ndarray, " n"]

    @classmethod
    def from_pairs(cls, pairs: pd.Series, is_harmful: Bool[np.ndarray, " n"]) -> ResamplingUnits:
        """Return the units of queries.

        Args:
            pairs: name of each query's pair, missing for a query without a pair.
            is_harmful: class of each query.
        """
        single_names = pd.Series([f"query {index}" for index in range(len(pairs))], index=pairs.index)
        unit_names = ("pair " + pairs.astype(str)).where(pairs.notna(), single_names)
        unit_of_query = pd.factorize(unit_names)[0]
        class_counts = np.stack(
            [np.bincount(unit_of_query, is_harmful), np.bincount(unit_of_query, ~is_harmful)], axis=1
        )
        composition = np.unique(class_counts, axis=0, return_inverse=True)[1].ravel()
        return cls(unit_of_query, composition, is_harmful)

    def select_queries(self, is_selected: Bool[np.ndarray, " n"]) -> ResamplingUnits:
        """Return the units of some of the queries; a unit of which only a part is kept becomes smaller."""
        units = pd.Series(self.unit_of_query[is_selected])
        return ResamplingUnits.from_pairs(units, self.is_harmful[is_selected])


@dataclass(frozen=True)
class ResamplingWeights:
    """Weight of each query in each bootstrap draw; all defenses share the draws, so differences are paired.

    Attributes:
        harmful_weights: weights of the harmful queries, draws × queries.
        benign_weights: weights of the benign queries, draws × queries.
        unseen_weights: weights of the pseudo-observations that the log-linear correction adds to each rate:
            condition (undefended, defended) × class (harmful, benign) × response (refused, not) × draws.
        is_observed: whether these are the observed data instead of draws.
    """

    harmful_weights: Float[np.ndarray, "draws n_harmful"]
    benign_weights: Float[np.ndarray, "draws n_benign"]
    unseen_weights: Float[np.ndarray, "2 2 2 draws"]
    is_observed: bool = False

    @classmethod
    def from_observed(cls, units: ResamplingUnits) -> ResamplingWeights:
        """Return the weights of the observed data: 1 for each query, ½ for each pseudo-observation."""
        n_harmful, n_benign = units.is_harmful.sum(), (~units.is_harmful).sum()
        return cls(np.ones((1, n_harmful)), np.ones((1, n_benign)), np.full((2, 2, 2, 1), 0.5), True)

    @classmethod
    def from_bootstrap(
        cls, units: ResamplingUnits, n_draws: int = BOOTSTRAP_DRAWS, seed: int = 0
    ) -> ResamplingWeights:
        """Return bootstrap draws that resample units within each composition, so that class sizes stay.

        The pseudo-observations of the log-linear correction, ½ each, are drawn as Gamma(½) variables.
        Without that, a defense that refused nothing would get a rate and a d′ without any uncertainty; with
        it, the interval of a rate is close to Jeffreys'.

        Args:
            units: units of the queries.
            n_draws: number of bootstrap draws.
            seed: random seed.
        """
        rng = np.random.default_rng(seed)
        counts = np.zeros((n_draws, len(units.composition)))
        for kind in np.unique(units.composition):
            members = np.flatnonzero(units.composition == kind)
            n = len(members)
            counts[:, members] = rng.multinomial(n, np.full(n, 1 / n), size=n_draws)
        query_weights = counts[:, units.unit_of_query]
        unseen_weights = rng.gamma(0.5, size=(2, 2, 2, n_draws))
        return cls(query_weights[:, units.is_harmful], query_weights[:, ~units.is_harmful], unseen_weights)


def bootstrap_interval(
    draws: DrawVector, min_class_size: int, from_counts: bool = False
) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap draws, expanded for small samples.

    The percentile interval of a mean is too narrow by the factor √((n−1)/n) times the ratio of the normal to
    the t quantile; the percentiles are moved outward accordingly (Hesterberg 2015, section 5.3,
    https://doi.org/10.1080/00031305.2015.1089789). Estimates from counts are not expanded: the log-linear
    correction has already widened them.

    Args:
        draws: the estimate in each draw; non-finite draws are ignored.
        min_class_size: size of the smaller class; below 2, both ends are NaN.
        from_counts: whether the estimate comes from corrected counts.

    Returns:
        The lower and the upper end.
    """
    finite_draws = draws[np.isfinite(draws)]
    if min_class_size < 2 or not len(finite_draws):
        return np.nan, np.nan
    tail = (1 - CONFIDENCE_LEVEL) / 2
    if not from_counts:
        tail = ndtr(np.sqrt(min_class_size / (min_class_size - 1)) * stdtrit(min_class_size - 1, tail))
    low, high = np.quantile(finite_draws, [tail, 1 - tail])
    return float(low), float(high)


def make_estimate_columns(
    column: str,
    point: Float[np.ndarray, " 1"],
    draws: DrawVector,
    min_class_size: int,
    from_counts: bool = False,
) -> dict[str, float]:
    """Return an estimate and its interval as columns of a table.

    An interval always contains its estimate, also at the end of the scale: a rate of 0, for example.

    >>> make_estimate_columns("rate", np.array([0.0]), np.full(100, 0.25), 9, from_counts=True)
    {'rate': 0.0, 'rate_low': 0.0, 'rate_high': 0.25}

    Args:
        column: name of the estimate's column.
        point: the estimate from the observed data, a single value.
        draws: as for `bootstrap_interval`.
        min_class_size: as for `bootstrap_interval`.
        from_counts: as for `bootstrap_interval`.
    """
    value, (low, high) = float(point[0]), bootstrap_interval(draws, min_class_size, from_counts)
    return {column: value, f"{column}_low": min(low, value), f"{column}_high": max(high, value)}


def make_rate_columns(column: str, count: int, total: int) -> dict[str, float]:
    """Return a rate and its Wilson interval as columns of a table.

    >>> {key: round(value, 2) for key, value in make_rate_columns("asr", 10, 10).items()}
    {'asr': 1.0, 'asr_low': 0.72, 'asr_high': 1.0, 'asr_n': 10}
    """
    lows, highs = compute_wilson_intervals(np.array([count / total]), np.array([float(total)]))
    return {
        column: count / total,
        f"{column}_low": min(float(lows[0]), count / total),
        f"{column}_high": max(float(highs[0]), count / total),
        f"{column}_n": total,
    }


def estimate_crossed_rate(outcomes: Float[np.ndarray, "repeats queries"]) -> tuple[float, float, float]:
    """Return the rate of outcomes, and its 95 % interval over the draw of both the queries and the repeats.

    The variance has a part of the queries and one of the repeats, such as trainings with other seeds, by a
    two-way analysis of variance; the interval is Wilson's for as many queries as have this variance, with the
    quantile of Student's t (Satterthwaite's degrees of freedom). In simulations with 2 to 5 repeats it
    covered the rate in 94 to 97 % where repeats differed little, in 80 to 95 % where they differed a lot.
    With one repeat, or equal outcomes, it is Wilson's for the number of queries.

    >>> rate, low, high = estimate_crossed_rate(np.array([[1.0, 0, 1, 1], [1, 0, 1, 0]]))
    >>> rate, low < 0.3 < 0.9 < high
    (0.625, True)

    Args:
        outcomes: 1, 0, or NaN if unknown; a query has the same column in every repeat.

    Returns:
        The rate, and the lower and the upper end.
    """
    outcomes = outcomes[np.isfinite(outcomes).any(1)][:, np.isfinite(outcomes).any(0)]
    if not outcomes.size:
        return np.nan, np.nan, np.nan
    n_repeats, n_queries = outcomes.shape
    rate = float(np.nanmean(outcomes))
    effective_size, quantile = float(n_queries), NORMAL_QUANTILE
    if n_repeats > 1 and n_queries > 1 and 0 < rate < 1:
        by_repeat, by_query = np.nanmean(outcomes, 1), np.nanmean(outcomes, 0)
        residuals = outcomes - by_repeat[:, None] - by_query + rate
        noise = np.nansum(residuals**2) / ((n_repeats - 1) * (n_queries - 1))
        query_part = by_query.var(ddof=1) / n_queries
        repeat_part = max(0.0, by_repeat.var(ddof=1) / n_repeats - noise / (n_repeats * n_queries))
        if (variance := query_part + repeat_part) > 0:
            parts = repeat_part**2 / (n_repeats - 1) + query_part**2 / (n_queries - 1)
            effective_size = rate * (1 - rate) / variance
            quantile = float(stdtrit(max(1.0, variance**2 / parts), (1 + CONFIDENCE_LEVEL) / 2))
    low, high = (
        float(invert_score_test(np.array([rate]), np.array([effective_size]), z)[0])
        for z in (-quantile, quantile)
    )
    return rate, min(low, rate), max(high, rate)


def compute_wilson_intervals(rates: DrawVector, sizes: DrawVector) -> tuple[DrawVector, DrawVector]:
    """Return the lower and upper ends of 95 % Wilson intervals; sizes may be fractions.

    >>> low, high = compute_wilson_intervals(np.array([0.5]), np.array([40.0]))
    >>> round(float(low[0]), 2), round(float(high[0]), 2)
    (0.35, 0.65)

    Args:
        rates: estimated rates; values out of the range from 0 to 1 are clipped.
        sizes: number of responses behind each rate.
    """
    rates = np.clip(rates, 0, 1)
    return invert_score_test(rates, sizes, -NORMAL_QUANTILE), invert_score_test(rates, sizes, NORMAL_QUANTILE)


def invert_score_test(
    rates: Float[np.ndarray, " shares"],
    sizes: Int[np.ndarray, " shares"] | Float[np.ndarray, " shares"],
    z: float | Float[np.ndarray, "draws shares"],
) -> np.ndarray:
    """Return the rates p with (rate − p) / √(p (1 − p) / size) = −z: at ±1.96, the ends of Wilson's interval.

    Args:
        rates: estimated rates, from 0 to 1.
        sizes: number of responses behind each rate.
        z: a normal quantile, or draws of one for each rate.

    Returns:
        One share for each rate; one row per draw if `z` has draws.
    """
    centers = rates + z**2 / (2 * sizes)
    offsets = z * np.sqrt(rates * (1 - rates) / sizes + z**2 / (4 * sizes**2))
    return np.clip((centers + offsets) / (1 + z**2 / sizes), 0, 1)


def draw_sign_flips(units: ResamplingUnits, seed: int = 0) -> Float[np.ndarray, "flips units"]:
    """Return random signs, one row per permutation and one column per unit, so that pairs flip together."""
    return np.random.default_rng(seed).integers(0, 2, size=(SIGN_FLIPS, len(units.composition))) * 2.0 - 1.0


def compute_sign_flip_p_value(
    contributions: Float[np.ndarray, " n"],
    units: ResamplingUnits,
    sign_flips: Float[np.ndarray, "flips units"],
) -> float:
    """Return the two-sided sign-flip p-value of a sum whose expected value is 0 under the null hypothesis.

    The null constrains only the sum, not the mean of each composition k of units: queries without a pair may
    change differently from pairs. Before the signs are flipped, the units are therefore centered at null
    means μ_k instead of 0. With n_k units of mean m_k and variance v_k, these are the means nearest to the
    observed ones that the null allows, the solution of

        minimize Σ_k n_k (μ_k − m_k)² / v_k   subject to   Σ_k n_k μ_k = 0,

    which is μ_k = m_k − v_k · (Σ_j n_j m_j) / (Σ_j n_j v_j) by Lagrange's method. With a single composition,
    μ = 0: the ordinary sign-flip test.

    Args:
        contributions: contribution of each query to the sum.
        units: units of the queries.
        sign_flips: random signs from `draw_sign_flips`.
    """
    unit_sums, n_units = np.bincount(units.unit_of_query, contributions), np.bincount(units.composition)
    mean = np.bincount(units.composition, unit_sums) / n_units
    variance = np.bincount(units.composition, (unit_sums - mean[units.composition]) ** 2) / n_units
    variance += 1e-9 * (unit_sums**2).mean() + 1e-30  # keeps the quotient defined if nothing varies
    null_mean = mean - variance * unit_sums.sum() / (n_units @ variance)
    # The tolerance keeps float noise from separating equal sums.
    is_as_extreme = (
        np.abs(sign_flips @ (unit_sums - null_mean[units.composition])) >= abs(unit_sums.sum()) - 1e-12
    )
    return float(1 + is_as_extreme.sum()) / (1 + len(sign_flips))


def adjust_p_values(p_values: pd.Series) -> pd.Series:
    """Return p-values adjusted by Holm's method; missing values stay missing.

    >>> adjust_p_values(pd.Series([0.01, 0.04, 0.03])).round(6).tolist()
    [0.03, 0.06, 0.06]
    """
    known = p_values.dropna().astype(float)
    ranks = np.argsort(np.argsort(known, kind="stable"), kind="stable") + 1
    adjusted = pd.Series((known * (len(known) - ranks + 1)).to_numpy(), index=known.index)
    steps = adjusted.iloc[np.argsort(ranks)].cummax().clip(upper=1.0)
    return steps.reindex(p_values.index)
