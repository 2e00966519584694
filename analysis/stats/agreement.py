"""Agreement of a readout with the judge's verdicts on the generated responses, per condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.special import expit

from analysis.stats.bootstrap import (
    BOOTSTRAP_DRAWS,
    DrawVector,
    ResamplingUnits,
    ResamplingWeights,
    bootstrap_interval,
    make_rate_columns,
)
from analysis.stats.effects import compute_auroc
from analysis.stats.prediction_powered import compute_paired_intervals
from analysis.stats.tables import INTERVAL_SUFFIXES, Trust

# A readout is trusted for single queries if the lower ends of both intervals reach these values.
MIN_AUROC, MIN_KAPPA = 0.80, 0.60
MAX_RATE_ERROR = 0.05  # a readout is trusted for rates if both rate errors are within ± this share
TRUST_RULE = (
    f"single queries: trusted if the AUROC of the margin against the judge is at least {MIN_AUROC:.2f} and "
    f"Cohen's kappa at least {MIN_KAPPA:.2f}, both by the lower ends of their 95 % intervals; not trusted if "
    "an upper end falls short; otherwise cannot tell, mostly because nearly all responses are of one class. "
    "Rates: trusted if the 95 % intervals of both rate errors (refusal rate by readout minus by text, of "
    f"harmful and of benign queries) lie within ±{100 * MAX_RATE_ERROR:.0f} percentage points; not trusted "
    "if one lies entirely outside; otherwise cannot tell"
)
# Name, in the column `readout`, of the verdicts on the first tokens of responses: what `analyze` reports.
RESPONSES_READOUT = "responses"
_RATE_ERROR_NAMES = ("rate_error_harmful", "rate_error_benign")
_MAX_NEEDED_QUERIES = 10_000  # per class; if more are needed, the error is too close to its limit to decide
_CALIBRATION_BINS = 10
_N_THRESHOLD_QUANTILES = 99


class FittedThreshold(NamedTuple):
    """A fitted threshold, nats.

    Attributes:
        value: the threshold.
        low: lower end of its 95 % bootstrap interval.
        high: upper end.
        quantiles: equally spaced quantiles of the thresholds of all draws.
    """

    value: float
    low: float
    high: float
    quantiles: tuple[float, ...]


def measure_agreement(
    margins: Float[np.ndarray, " n"],
    is_refusal: Bool[np.ndarray, " n"],
    pairs: pd.Series,
    threshold: float,
    seed: int = 0,
    is_harmful: Bool[np.ndarray, " n"] | None = None,
) -> dict[str, Any]:
    """Return how well margins agree with the judge, with 95 % intervals, and whether they can be trusted.

    The bootstrap keeps pairs whole and the number of refusals constant. For verdicts of another judge, give
    1 and 0 as margins and a threshold between them: the AUROC is then the balanced accuracy.

    >>> margins, is_refusal = np.array([-1.0, -2.0, 1.0, 2.0] * 30), np.array([False, False, True, True] * 30)
    >>> agreement = measure_agreement(margins, is_refusal, pd.Series([None] * 120), 0.0)
    >>> agreement["kappa"], agreement["trusted"]
    (1.0, 'trusted')
    >>> measure_agreement(-margins, is_refusal, pd.Series([None] * 120), 0.0)["trusted"]
    'not trusted'

    Args:
        margins: margin of each query, nats; positive means refusing.
        is_refusal: whether each response refuses, by the judge.
        pairs: name of each query's pair, missing for a query without a pair.
        threshold: margin above which the readout predicts a refusal.
        seed: seed of the bootstrap.
        is_harmful: class of each query; if missing, there are no rate errors.

    Returns:
        Counts; the share of queries where readout and judge agree (`agrees`, with its Wilson interval); the
        `auroc` of the margin; Cohen's `kappa`; the `calibration_error` of σ(margin − threshold); `trusted`
        for single queries; and the columns of `measure_rate_errors`.
    """
    units = ResamplingUnits.from_pairs(pairs.reset_index(drop=True), is_refusal)
    is_predicted, probabilities = margins > threshold, expit(margins - threshold)
    agreement: dict[str, Any] = {
        "n": len(margins),
        "refused": int(is_refusal.sum()),
        "readout_refused": int(is_predicted.sum()),
    }
    rate_errors = {} if is_harmful is None else measure_rate_errors(is_predicted, is_refusal, is_harmful)
    if not len(margins):
        measures = ("agrees", "auroc", "kappa", "calibration_error")
        missing = {f"{name}{suffix}": np.nan for name in measures for suffix in INTERVAL_SUFFIXES}
        return agreement | missing | {"trusted": Trust.CANNOT_TELL.value} | rate_errors
    agreement |= make_rate_columns("agrees", int((is_predicted == is_refusal).sum()), len(is_refusal))
    del agreement["agrees_n"]  # it is `n`
    min_class_size = int(min(is_refusal.sum(), (~is_refusal).sum()))
    observed = ResamplingWeights.from_observed(units)
    draws = ResamplingWeights.from_bootstrap(units, BOOTSTRAP_DRAWS, seed)
    for name, measure in (
        ("auroc", lambda weights: compute_auroc(margins[is_refusal], margins[~is_refusal], weights)),
        ("kappa", lambda weights: _compute_kappa(is_predicted, is_refusal, weights)),
        ("calibration_error", lambda weights: _compute_calibration_error(probabilities, is_refusal, weights)),
    ):
        needs_classes = name != "calibration_error"
        value = float(measure(observed)[0]) if min_class_size or not needs_classes else np.nan
        size = min_class_size if needs_classes else len(margins)
        low, high = bootstrap_interval(measure(draws), size, True) if value == value else (np.nan, np.nan)
        agreement |= {name: value, f"{name}_low": min(low, value), f"{name}_high": max(high, value)}
    return agreement | {"trusted": derive_trust(agreement).value} | rate_errors


def derive_trust(row: dict[str, Any]) -> Trust:
    """Return the verdict of `TRUST_RULE` on single queries, from the intervals of `auroc` and `kappa`."""
    limits = [
        (row["auroc_low"], row["auroc_high"], MIN_AUROC),
        (row["kappa_low"], row["kappa_high"], MIN_KAPPA),
    ]
    if any(high < minimum for _, high, minimum in limits):
        return Trust.NOT_TRUSTED
    return Trust.TRUSTED if all(low >= minimum for low, _, minimum in limits) else Trust.CANNOT_TELL


def measure_rate_errors(
    is_predicted: Bool[np.ndarray, " n"],
    is_refusal: Bool[np.ndarray, " n"],
    is_harmful: Bool[np.ndarray, " n"],
) -> dict[str, Any]:
    """Return how far refusal rates by readout are from those by the judge, and whether they can be trusted.

    A pair has one query of each class, so the queries of a class are independent. The intervals are those of
    Bonett and Price for paired rates: in simulations, they cover 93 % to 100 %, also where readout and judge
    differ on none of the queries. The bootstrap then has no width, and covers as little as 31 %.

    >>> is_predicted, is_refusal = np.arange(200) < 100, np.arange(200) < 60
    >>> rates = measure_rate_errors(is_predicted, is_refusal, np.arange(200) < 100)
    >>> rates["rate_error_harmful"], rates["rate_error_benign"], rates["rate_trusted"]
    (0.4, 0.0, 'not trusted')

    Args:
        is_predicted: whether the readout predicts a refusal.
        is_refusal: whether each response refuses, by the judge.
        is_harmful: class of each query.

    Returns:
        `rate_error_harmful` and `rate_error_benign`: refusal rate by readout minus by judge, −1 to 1,
        positive means that the readout refuses more, each with the ends of its 95 % interval; `rate_trusted`;
        and `n_needed`: the queries per class that would decide, if only their number is missing and readout
        and judge kept differing as they do; else NaN.

    Source: Bonett and Price 2012, https://doi.org/10.3102/1076998611411915.
    """
    row: dict[str, Any] = {}
    needed_sizes = []
    for name, in_class in zip(_RATE_ERROR_NAMES, (is_harmful, ~is_harmful), strict=True):
        differences = is_predicted[in_class].astype(float) - is_refusal[in_class]
        if not len(differences):
            row |= {f"{name}{suffix}": np.nan for suffix in INTERVAL_SUFFIXES}
            needed_sizes.append(np.nan)
            continue
        error, changed_share = float(differences.mean()), float(np.abs(differences).mean())
        lows, highs = _compute_rate_error_ends(error, changed_share, np.array([float(len(differences))]))
        row |= {name: error, f"{name}_low": float(lows[0]), f"{name}_high": float(highs[0])}
        needed_sizes.append(_count_needed_queries(error, changed_share))
    trust = derive_rate_trust(row)
    n_needed = float(np.max(needed_sizes)) if trust == Trust.CANNOT_TELL else np.nan
    return row | {"rate_trusted": trust.value, "n_needed": n_needed}


def derive_rate_trust(row: dict[str, Any]) -> Trust:
    """Return the verdict of `TRUST_RULE` on rates, from the intervals of both rate errors."""
    ends = [(row[f"{name}_low"], row[f"{name}_high"]) for name in _RATE_ERROR_NAMES]
    if any(low > MAX_RATE_ERROR or high < -MAX_RATE_ERROR for low, high in ends):
        return Trust.NOT_TRUSTED
    is_within = all(low >= -MAX_RATE_ERROR and high <= MAX_RATE_ERROR for low, high in ends)
    return Trust.TRUSTED if is_within else Trust.CANNOT_TELL


def compute_needed_threshold(
    margins: Float[np.ndarray, " n"], is_refusal: Bool[np.ndarray, " n"], pairs: Sequence[Any], seed: int = 0
) -> dict[str, float]:
    """Return the threshold that a condition would have needed, nats: `needed_threshold` with its interval.

    It is the `fit_matching_threshold` of the condition's own responses, NaN if all or none of them refuse.

    >>> compute_needed_threshold(np.array([1.0, 2.0]), np.array([True, True]), "ab")["needed_threshold"]
    nan

    Args:
        margins: margin of each query, nats; positive means refusing.
        is_refusal: whether each response refuses, by the judge.
        pairs: label of each query's resampling unit.
        seed: seed of the bootstrap.
    """
    has_both_classes = 0 < is_refusal.sum() < len(is_refusal)
    values = (
        fit_matching_threshold(margins, is_refusal, pairs, seed)[:3] if has_both_classes else [np.nan] * 3
    )
    return {
        f"needed_threshold{suffix}": value for suffix, value in zip(INTERVAL_SUFFIXES, values, strict=True)
    }


def fit_matching_threshold(
    margins: Float[np.ndarray, " n"], is_refusal: Bool[np.ndarray, " n"], pairs: Sequence[Any], seed: int = 0
) -> FittedThreshold:
    """Return the threshold that as many margins exceed as responses refuse, with its uncertainty.

    At this threshold the refusal rate of the readout equals that of the judge, however well they agree on
    single queries. Both classes must occur.

    >>> margins, is_refusal = np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, False, False, False])
    >>> fit_matching_threshold(margins, is_refusal, "aabb").value
    2.5

    Args:
        margins: margin of each query, nats; positive means refusing.
        is_refusal: whether each response refuses, by the judge.
        pairs: label of each query's resampling unit.
        seed: seed of the bootstrap.
    """
    units = [np.flatnonzero(np.array(list(pairs)) == pair) for pair in dict.fromkeys(pairs)]
    draws = np.random.default_rng(seed).integers(0, len(units), size=(BOOTSTRAP_DRAWS, len(units)))
    samples = [np.arange(len(margins)), *(np.concatenate([units[unit] for unit in draw]) for draw in draws)]
    thresholds = [
        _find_threshold_between(np.sort(margins[sample]), int(is_refusal[sample].sum())) for sample in samples
    ]
    low, high = np.percentile(thresholds[1:], [2.5, 97.5])
    shares = (np.arange(_N_THRESHOLD_QUANTILES) + 0.5) / _N_THRESHOLD_QUANTILES
    quantiles = tuple(np.quantile(thresholds[1:], shares).tolist())
    return FittedThreshold(thresholds[0], float(low), float(high), quantiles)


def correlate_refusal_rates(
    readout_refuses: Bool[np.ndarray, "conditions n"],
    response_refuses: Bool[np.ndarray, "conditions n"],
    pairs: pd.Series,
    is_harmful: Bool[np.ndarray, " n"],
    seed: int = 0,
) -> dict[str, float]:
    """Return Spearman's correlation, over conditions, of the refusal rates by readout and by judge.

    Args:
        readout_refuses: whether the readout predicts a refusal, by condition and query.
        response_refuses: whether the response refuses, by condition and query.
        pairs: name of each query's pair, missing for a query without a pair.
        is_harmful: class of each query.
        seed: seed of the bootstrap.
    """
    units = ResamplingUnits.from_pairs(pairs.reset_index(drop=True), is_harmful)
    point, draws = (
        _compute_rank_correlation(readout_refuses, response_refuses, is_harmful, weights)
        for weights in (
            ResamplingWeights.from_observed(units),
            ResamplingWeights.from_bootstrap(units, BOOTSTRAP_DRAWS, seed),
        )
    )
    low, high = bootstrap_interval(draws, len(pairs), True)
    return {
        "rank_correlation": float(point[0]),
        "rank_correlation_low": low,
        "rank_correlation_high": high,
    }


def measure_grade_agreement(
    grades: Sequence[float], labels: Sequence[float], seed: int = 0
) -> dict[str, float]:
    """Return how well a judge's grades agree with people's, with 95 % intervals.

    >>> agreement = measure_grade_agreement([1, 1, 5, 4, 2, 5], [1, 1, 5, 5, 1, float("nan")])
    >>> int(agreement["n_labeled"]), round(agreement["grade_kappa"], 2), agreement["grades_equal"]
    (5, 0.94, 0.6)

    Args:
        grades: of the judge; NaN without a grade.
        labels: of people; NaN without a label.
        seed: of the bootstrap.

    Returns:
        `n_labeled`: responses with both. `grades_equal`: share of equal grades, Wilson's interval.
        `grade_kappa`: Cohen's kappa with quadratic weights, interval by bootstrap of responses; NaN if all
        grades are equal.
    """
    both = np.array([grades, labels], float).T
    both = both[np.isfinite(both).all(1)]
    if not len(both):
        return {"n_labeled": 0}
    equal = make_rate_columns("grades_equal", int((both[:, 0] == both[:, 1]).sum()), len(both))
    del equal["grades_equal_n"]
    draws = np.random.default_rng(seed).integers(0, len(both), size=(BOOTSTRAP_DRAWS, len(both)))
    kappas = _compute_weighted_kappa(both[draws])
    estimates = (float(_compute_weighted_kappa(both[None])[0]), *bootstrap_interval(kappas, len(both)))
    names = (f"grade_kappa{suffix}" for suffix in INTERVAL_SUFFIXES)
    return {"n_labeled": len(both), **equal, **dict(zip(names, estimates, strict=True))}


def _compute_weighted_kappa(pairs: Float[np.ndarray, "draws n 2"]) -> Float[np.ndarray, " draws"]:
    """Return Cohen's kappa with quadratic weights of the two columns of each draw."""
    first, second = pairs[..., 0], pairs[..., 1]
    observed = ((first - second) ** 2).mean(1)
    expected = first.var(1) + second.var(1) + (first.mean(1) - second.mean(1)) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1 - observed / expected)


def compute_calibration_curve(
    probabilities: Float[np.ndarray, " n"], is_refusal: Bool[np.ndarray, " n"]
) -> pd.DataFrame:
    """Return the calibration curve: the refusal rate by the judge in bins of the readout's probability.

    >>> curve = compute_calibration_curve(np.array([0.05, 0.95, 0.96]), np.array([False, True, True]))
    >>> curve[["chance", "refused"]].values
    array([[0.05 , 0.   ],
           [0.955, 1.   ]])
    """
    rows = []
    bins = _assign_calibration_bins(probabilities)
    for number in np.unique(bins):
        in_bin = bins == number
        rows.append(
            {"chance": probabilities[in_bin].mean()}
            | make_rate_columns("refused", int(is_refusal[in_bin].sum()), int(in_bin.sum()))
        )
    return pd.DataFrame(rows)


def _compute_rate_error_ends(
    error: float, changed_share: float, sizes: Float[np.ndarray, " sizes"]
) -> tuple[DrawVector, DrawVector]:
    """Return the ends of the interval that a rate error has, or would have, at each number of queries."""
    return compute_paired_intervals(np.full_like(sizes, error), np.full_like(sizes, changed_share), sizes)


def _count_needed_queries(error: float, changed_share: float) -> float:
    """Return the smallest number of queries whose interval would lie within the limits; NaN if none does."""
    sizes = np.arange(1.0, _MAX_NEEDED_QUERIES + 1)
    lows, highs = _compute_rate_error_ends(error, changed_share, sizes)
    is_within = (lows >= -MAX_RATE_ERROR) & (highs <= MAX_RATE_ERROR)
    return float(sizes[is_within.argmax()]) if is_within.any() else np.nan


def _find_threshold_between(sorted_margins: Float[np.ndarray, " n"], n_above: int) -> float:
    """Return the midpoint between the lowest of the `n_above` highest margins and the margin below it."""
    index = min(max(len(sorted_margins) - n_above, 1), len(sorted_margins) - 1)
    return float(sorted_margins[index - 1] + sorted_margins[index]) / 2


def _assign_calibration_bins(probabilities: Float[np.ndarray, " n"]) -> np.ndarray:
    """Return the index of each probability's bin, from 0."""
    return np.minimum((probabilities * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)


def _order_weights_by_query(
    in_first_class: Bool[np.ndarray, " n"], resampling: ResamplingWeights
) -> Float[np.ndarray, "draws n"]:
    """Return the weights of both classes in the order of the queries."""
    weights = np.empty((len(resampling.harmful_weights), len(in_first_class)))
    weights[:, in_first_class] = resampling.harmful_weights
    weights[:, ~in_first_class] = resampling.benign_weights
    return weights


def _compute_kappa(
    readout_refuses: Bool[np.ndarray, " n"],
    response_refuses: Bool[np.ndarray, " n"],
    resampling: ResamplingWeights,
) -> DrawVector:
    """Return Cohen's kappa; in draws, the rates of both classes have the log-linear correction."""
    base_rate = response_refuses.mean()
    rates = []
    for in_class, weights, (unseen_refused, unseen_not) in (
        (response_refuses, resampling.harmful_weights, resampling.unseen_weights[0, 0]),
        (~response_refuses, resampling.benign_weights, resampling.unseen_weights[0, 1]),
    ):
        count, n = weights @ readout_refuses[in_class], in_class.sum()
        rates.append(
            count / n
            if resampling.is_observed
            else (count + unseen_refused) / (n + unseen_refused + unseen_not)
        )
    hit_rate, false_alarm_rate = rates
    predicted_rate = base_rate * hit_rate + (1 - base_rate) * false_alarm_rate
    by_chance = base_rate * predicted_rate + (1 - base_rate) * (1 - predicted_rate)
    agreement = base_rate * hit_rate + (1 - base_rate) * (1 - false_alarm_rate)
    return np.divide(
        agreement - by_chance, 1 - by_chance, out=np.full_like(agreement, np.nan), where=by_chance < 1
    )


def _compute_calibration_error(
    probabilities: Float[np.ndarray, " n"], is_refusal: Bool[np.ndarray, " n"], resampling: ResamplingWeights
) -> DrawVector:
    """Return the mean distance of probability and refusal rate over ten equal bins, weighted by size."""
    weights = _order_weights_by_query(is_refusal, resampling)
    in_bin = _assign_calibration_bins(probabilities)[:, None] == np.arange(_CALIBRATION_BINS)
    return np.abs(weights @ (in_bin * (probabilities - is_refusal)[:, None])).sum(1) / len(is_refusal)


def _compute_rank_correlation(
    readout_refuses: Bool[np.ndarray, "conditions n"],
    response_refuses: Bool[np.ndarray, "conditions n"],
    is_harmful: Bool[np.ndarray, " n"],
    resampling: ResamplingWeights,
) -> DrawVector:
    """Return Spearman's correlation of the conditions' weighted counts of refusals."""
    from scipy.stats import rankdata  # scipy.stats takes half a second to import

    weights = _order_weights_by_query(is_harmful, resampling)
    ranks, other_ranks = (
        rankdata(weights @ refuses.T, axis=1) for refuses in (readout_refuses, response_refuses)
    )
    ranks, other_ranks = (
        ranks - ranks.mean(1, keepdims=True),
        other_ranks - other_ranks.mean(1, keepdims=True),
    )
    scale = np.sqrt((ranks**2).sum(1) * (other_ranks**2).sum(1))
    return np.divide((ranks * other_ranks).sum(1), scale, out=np.full_like(scale, np.nan), where=scale > 0)
