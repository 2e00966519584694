"""How sure an estimate is: bootstrap draws that keep pairs whole, and sign flips under "no effect"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.special import ndtr, stdtrit
from scipy.stats import binomtest, rankdata

BOOTSTRAP_DRAWS = 2000
SIGN_FLIPS = 9999
CONFIDENCE_LEVEL = 0.95

DrawVector = Float[np.ndarray, " draws"]


@dataclass(frozen=True)
class ResamplingUnits:
    """Which queries belong together: a pair is one unit, and so is a query without a twin.

    Attributes:
        unit_of_query: number of the unit that each query belongs to, 0 …
        composition: what each unit is made of, 0 …; like number, like counts of harmful and benign queries.
        is_harmful: class of each query.
    """

    unit_of_query: Int[np.ndarray, " n"]
    composition: Int[np.ndarray, " units"]
    is_harmful: Bool[np.ndarray, " n"]

    @classmethod
    def from_pairs(cls, pairs: pd.Series, is_harmful: Bool[np.ndarray, " n"]) -> ResamplingUnits:
        """Return the units of queries, by the name of each one's pair (missing where it has none)."""
        alone = pd.Series([f"query {place}" for place in range(len(pairs))], index=pairs.index)
        of = pd.factorize(("pair " + pairs.astype(str)).where(pairs.notna(), alone))[0]
        counts = np.stack([np.bincount(of, is_harmful), np.bincount(of, ~is_harmful)], axis=1)
        return cls(of, np.unique(counts, axis=0, return_inverse=True)[1].ravel(), is_harmful)


@dataclass(frozen=True)
class ResamplingWeights:
    """How often each query counts in each draw; the same for all defenses: differences are paired.

    Attributes:
        harmful_weights: draws × harmful queries.
        benign_weights: draws × benign queries.
        unseen_weights: weights of the queries that the log-linear correction adds to each rate: condition
            (undefended, defended) × class (harmful, benign) × answer (refused, not) × draws.
        is_observed: whether this is the data as they are, not draws.
    """

    harmful_weights: Float[np.ndarray, "draws n_harmful"]
    benign_weights: Float[np.ndarray, "draws n_benign"]
    unseen_weights: Float[np.ndarray, "2 2 2 draws"]
    is_observed: bool = False

    @classmethod
    def from_observed(cls, units: ResamplingUnits) -> ResamplingWeights:
        """Return the data as they are: one draw in which each query counts once, and the unseen half."""
        sizes = units.is_harmful.sum(), (~units.is_harmful).sum()
        return cls(np.ones((1, sizes[0])), np.ones((1, sizes[1])), np.full((2, 2, 2, 1), 0.5), True)

    @classmethod
    def from_bootstrap(
        cls, units: ResamplingUnits, n_draws: int = BOOTSTRAP_DRAWS, seed: int = 0
    ) -> ResamplingWeights:
        """Return bootstrap draws that resample units among units of like make-up: class sizes stay.

        The halves that the log-linear correction adds are drawn as well, as Gamma(½) variables. Without
        that, a defense that refused nothing would get a rate and a d′ without any uncertainty; with it the
        interval of one rate is close to Jeffreys'.
        """
        rng = np.random.default_rng(seed)
        counts = np.zeros((n_draws, len(units.composition)))
        for kind in np.unique(units.composition):
            alike = np.flatnonzero(units.composition == kind)
            counts[:, alike] = rng.multinomial(len(alike), np.full(len(alike), 1 / len(alike)), size=n_draws)
        of_query = counts[:, units.unit_of_query]
        unseen = rng.gamma(0.5, size=(2, 2, 2, n_draws))
        return cls(of_query[:, units.is_harmful], of_query[:, ~units.is_harmful], unseen)


def bootstrap_interval(
    draws: DrawVector, min_class_size: int, from_counts: bool = False
) -> tuple[float, float]:
    """Return the bootstrap interval: percentiles, set a little wider for small samples.

    A percentile interval of means is too short by about √((n−1)/n) times normal over t quantile; the
    percentiles are moved outward by that much (Hesterberg 2015, section 5.3,
    https://doi.org/10.1080/00031305.2015.1089789). Counts have been made wider by the log-linear correction.

    Args:
        draws: the estimate in each draw; draws without a value are left out.
        min_class_size: size of the smaller class; under 2 there is no telling, and both ends are NaN.
        from_counts: whether the estimate comes from corrected counts.
    """
    known = draws[np.isfinite(draws)]
    if min_class_size < 2 or not len(known):
        return np.nan, np.nan
    tail = (1 - CONFIDENCE_LEVEL) / 2
    if not from_counts:
        tail = ndtr(np.sqrt(min_class_size / (min_class_size - 1)) * stdtrit(min_class_size - 1, tail))
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)


def make_estimate_columns(
    column: str,
    point: Float[np.ndarray, " 1"],
    draws: DrawVector,
    min_class_size: int,
    from_counts: bool = False,
) -> dict[str, float]:
    """Return an estimate with its interval, as columns of a table.

    An interval holds its own estimate, also at the end of its scale: no refusal, a rate of 0.

    >>> make_estimate_columns("rate", np.array([0.0]), np.full(100, 0.25), 9, from_counts=True)
    {'rate': 0.0, 'rate_low': 0.0, 'rate_high': 0.25}

    Args:
        column: of the column.
        point: of the data as they are, the only value.
        draws: as for `interval`.
        min_class_size: as for `interval`.
        from_counts: as for `interval`.
    """
    value, (low, high) = float(point[0]), bootstrap_interval(draws, min_class_size, from_counts)
    return {column: value, f"{column}_low": min(low, value), f"{column}_high": max(high, value)}


def make_rate_columns(column: str, count: int, total: int) -> dict[str, float]:
    """Return a share with its Wilson interval, as columns of a table.

    >>> {key: round(value, 2) for key, value in make_rate_columns("asr", 10, 10).items()}
    {'asr': 1.0, 'asr_low': 0.72, 'asr_high': 1.0, 'asr_n': 10}
    """
    low, high = binomtest(count, total).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    return {
        column: count / total,
        f"{column}_low": float(low),
        f"{column}_high": float(high),
        f"{column}_n": total,
    }


def draw_sign_flips(units: ResamplingUnits, seed: int = 0) -> Float[np.ndarray, "flips units"]:
    """Return random signs, a row for each permutation; pairs are flipped whole."""
    return np.random.default_rng(seed).integers(0, 2, size=(SIGN_FLIPS, len(units.composition))) * 2.0 - 1.0


def compute_sign_flip_p_value(
    contributions: Float[np.ndarray, " n"],
    units: ResamplingUnits,
    sign_flips: Float[np.ndarray, "flips units"],
) -> float:
    """Return the two-sided sign-flip p-value of a sum whose expected value is 0 under the null.

    Only the sum has to be 0 then, not its expected part from every make-up: plain queries may move unlike
    twins. So the parts are first centered as the null lets them be: at the make-ups' means, moved (by
    variance) until they add up to 0. With one make-up that moves nothing: the ordinary sign-flip test.

    Args:
        contributions: what each query adds to the sum.
        units: of the queries.
        sign_flips: from `signs`.
    """
    by_unit, size = np.bincount(units.unit_of_query, contributions), np.bincount(units.composition)
    mean = np.bincount(units.composition, by_unit) / size
    variance = np.bincount(units.composition, (by_unit - mean[units.composition]) ** 2) / size
    variance += 1e-9 * (by_unit**2).mean() + 1e-30  # the limit where nothing varies
    null = mean - variance * by_unit.sum() / (size @ variance)
    # The tolerance keeps float noise from telling equal sums apart.
    as_far = np.abs(sign_flips @ (by_unit - null[units.composition])) >= abs(by_unit.sum()) - 1e-12
    return float(1 + as_far.sum()) / (1 + len(sign_flips))


def adjust_p_values(p_values: pd.Series) -> pd.Series:
    """Return p-values adjusted by Holm's method; missing ones stay missing.

    >>> adjust_p_values(pd.Series([0.01, 0.04, 0.03])).round(6).tolist()
    [0.03, 0.06, 0.06]
    """
    known = p_values.dropna().astype(float)
    ranks = rankdata(known, method="ordinal")
    adjusted = pd.Series((known * (len(known) - ranks + 1)).to_numpy(), index=known.index)
    steps = adjusted.iloc[np.argsort(ranks)].cummax().clip(upper=1.0)
    return steps.reindex(p_values.index)
