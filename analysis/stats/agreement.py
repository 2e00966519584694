"""Agreement of a readout with the judge's verdicts on the generated responses, per condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.special import expit
from scipy.stats import rankdata

from analysis.stats.bootstrap import (
    BOOTSTRAP_DRAWS,
    DrawVector,
    ResamplingUnits,
    ResamplingWeights,
    bootstrap_interval,
    make_rate_columns,
)
from analysis.stats.effects import compute_auroc
from analysis.stats.tables import INTERVAL_SUFFIXES, Trust

# A readout is trusted if the lower ends of both intervals reach these values.
MIN_AUROC, MIN_KAPPA = 0.80, 0.60
TRUST_RULE = (
    f"trusted: the AUROC of the margin against the judge is at least {MIN_AUROC:.2f} and Cohen's kappa at "
    f"least {MIN_KAPPA:.2f}, both by the lower ends of their 95 % intervals; not trusted: an upper end falls "
    "short; cannot tell: otherwise, mostly because nearly all responses are of one class"
)
_CALIBRATION_BINS = 10


def measure_agreement(
    margins: Float[np.ndarray, " n"],
    is_refusal: Bool[np.ndarray, " n"],
    pairs: pd.Series,
    threshold: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Return how well margins agree with the judge, with 95 % intervals, and the verdict `trusted`.

    The bootstrap keeps pairs whole and the number of refusals constant.

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

    Returns:
        Counts; the share of queries where readout and judge agree (`agrees`, with its Wilson interval); the
        `auroc` of the margin; Cohen's `kappa`; the `calibration_error` of σ(margin − threshold); `trusted`.
    """
    units = ResamplingUnits.from_pairs(pairs.reset_index(drop=True), is_refusal)
    is_predicted, probabilities = margins > threshold, expit(margins - threshold)
    agreement: dict[str, Any] = {
        "n": len(margins),
        "refused": int(is_refusal.sum()),
        "readout_refused": int(is_predicted.sum()),
    }
    if not len(margins):
        measures = ("agrees", "auroc", "kappa", "calibration_error")
        missing = {f"{name}{suffix}": np.nan for name in measures for suffix in INTERVAL_SUFFIXES}
        return agreement | missing | {"trusted": Trust.CANNOT_TELL.value}
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
    return agreement | {"trusted": derive_trust(agreement).value}


def derive_trust(row: dict[str, Any]) -> Trust:
    """Return the verdict of `TRUST_RULE` on a row with the intervals of `auroc` and `kappa`."""
    limits = [
        (row["auroc_low"], row["auroc_high"], MIN_AUROC),
        (row["kappa_low"], row["kappa_high"], MIN_KAPPA),
    ]
    if any(high < minimum for _, high, minimum in limits):
        return Trust.NOT_TRUSTED
    return Trust.TRUSTED if all(low >= minimum for low, _, minimum in limits) else Trust.CANNOT_TELL


def fit_matching_threshold(
    margins: Float[np.ndarray, " n"], is_refusal: Bool[np.ndarray, " n"], pairs: Sequence[Any], seed: int = 0
) -> tuple[float, float, float]:
    """Return the threshold that as many margins exceed as responses refuse, with its 95 % interval, nats.

    At this threshold the refusal rate of the readout equals that of the judge, however well they agree on
    single queries. Both classes must occur.

    >>> margins, is_refusal = np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, False, False, False])
    >>> fit_matching_threshold(margins, is_refusal, "aabb")[0]
    2.5

    Args:
        margins: margin of each query, nats; positive means refusing.
        is_refusal: whether each response refuses, by the judge.
        pairs: label of each query's resampling unit.
        seed: seed of the bootstrap.

    Returns:
        The threshold, and the lower and the upper end of its bootstrap interval.
    """
    units = [np.flatnonzero(np.array(list(pairs)) == pair) for pair in dict.fromkeys(pairs)]
    draws = np.random.default_rng(seed).integers(0, len(units), size=(BOOTSTRAP_DRAWS, len(units)))
    samples = [np.arange(len(margins)), *(np.concatenate([units[unit] for unit in draw]) for draw in draws)]
    thresholds = [
        _find_threshold_between(np.sort(margins[sample]), int(is_refusal[sample].sum())) for sample in samples
    ]
    low, high = np.percentile(thresholds[1:], [2.5, 97.5])
    return thresholds[0], float(low), float(high)


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
