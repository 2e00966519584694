"""Whether a readout says of an answer what its text says: agreement per condition, and a verdict on it."""

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

# A readout is trusted where both are reached, by the lower ends of their intervals.
MIN_AUROC, MIN_KAPPA = 0.80, 0.60
TRUST_RULE = (
    f"trusted: AUROC of the margin against the text at least {MIN_AUROC:.2f} and Cohen's kappa at least "
    f"{MIN_KAPPA:.2f}, both by the lower ends of their 95 % intervals; not trusted: an upper end falls "
    "short; else cannot tell, mostly for want of one class"
)
_CALIBRATION_BINS = 10
_INTERVAL_SUFFIXES = ("", "_low", "_high")


def measure_agreement(
    margins: Float[np.ndarray, " n"],
    is_refusal: Bool[np.ndarray, " n"],
    pairs: pd.Series,
    threshold: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Return how well margins agree with what the answers' texts say, with 95 % intervals, and `trusted`.

    The bootstrap keeps pairs whole and the number of refusals in the text as it is.

    >>> margin, refused = np.array([-1.0, -2.0, 1.0, 2.0] * 30), np.array([False, False, True, True] * 30)
    >>> found = measure_agreement(margin, refused, pd.Series([None] * 120), 0.0)
    >>> found["kappa"], found["trusted"], measure_agreement(-margin, refused, pd.Series([None] * 120), 0.0)["trusted"]
    (1.0, 'trusted', 'not trusted')

    Args:
        margins: nats; positive refuses.
        is_refusal: by the text of the answer.
        pairs: the pair of each query, missing where it has none.
        threshold: margin above which the readout says "refuse".
        seed: of the bootstrap.
    """
    units = ResamplingUnits.from_pairs(pairs.reset_index(drop=True), is_refusal)
    says, chance = margins > threshold, expit(margins - threshold)
    found: dict[str, Any] = {
        "n": len(margins),
        "refused": int(is_refusal.sum()),
        "readout_refused": int(says.sum()),
    }
    if not len(margins):
        of = ("agrees", "auroc", "kappa", "calibration_error")
        return (
            found
            | {f"{name}{end}": np.nan for name in of for end in _INTERVAL_SUFFIXES}
            | {"trusted": "cannot tell"}
        )
    found |= {
        k: v
        for k, v in make_rate_columns("agrees", int((says == is_refusal).sum()), len(is_refusal)).items()
        if k != "agrees_n"
    }
    least = int(min(is_refusal.sum(), (~is_refusal).sum()))
    once, drawn = (
        ResamplingWeights.from_observed(units),
        ResamplingWeights.from_bootstrap(units, BOOTSTRAP_DRAWS, seed),
    )
    for name, measure in (
        ("auroc", lambda sample: compute_auroc(margins[is_refusal], margins[~is_refusal], sample)),
        ("kappa", lambda sample: _compute_kappa(says, is_refusal, sample)),
        ("calibration_error", lambda sample: _compute_calibration_error(chance, is_refusal, sample)),
    ):
        value = float(measure(once)[0]) if least or name == "calibration_error" else np.nan
        enough = len(margins) if name == "calibration_error" else least
        low, high = bootstrap_interval(measure(drawn), enough, True) if value == value else (np.nan, np.nan)
        found |= {name: value, f"{name}_low": min(low, value), f"{name}_high": max(high, value)}
    return found | {"trusted": derive_trust(found)}


def fit_matching_threshold(
    margins: Float[np.ndarray, " n"], is_refusal: Bool[np.ndarray, " n"], pairs: Sequence[Any], seed: int = 0
) -> tuple[float, float, float]:
    """Return the margin that as many queries exceed as answers refuse, and its 95 % bootstrap interval, nats.

    So the readout's refusal rate is the text's, whatever the readout is worth. There must be both kinds.

    >>> margin, refused = np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, False, False, False])
    >>> fit_matching_threshold(margin, refused, "aabb")[0]
    2.5

    Args:
        margins: nats; positive refuses.
        is_refusal: by the text of the answer.
        pairs: what belongs together in the bootstrap.
        seed: of the bootstrap.
    """
    units = [np.flatnonzero(np.array(list(pairs)) == one) for one in dict.fromkeys(pairs)]
    drawn = np.random.default_rng(seed).integers(0, len(units), size=(BOOTSTRAP_DRAWS, len(units)))
    samples = [np.arange(len(margins)), *(np.concatenate([units[one] for one in draw]) for draw in drawn)]
    values = [
        _find_threshold_between(np.sort(margins[rows]), int(is_refusal[rows].sum())) for rows in samples
    ]
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return values[0], float(low), float(high)


def _find_threshold_between(sorted_margins: Float[np.ndarray, " n"], n_above: int) -> float:
    """The middle between the lowest of the `above` highest margins and the one below it."""
    cut = min(max(len(sorted_margins) - n_above, 1), len(sorted_margins) - 1)
    return float(sorted_margins[cut - 1] + sorted_margins[cut]) / 2


def derive_trust(row: dict[str, Any]) -> str:
    """Return what `RULE` says of a row."""
    ends = [
        (row["auroc_low"], row["auroc_high"], MIN_AUROC),
        (row["kappa_low"], row["kappa_high"], MIN_KAPPA),
    ]
    if any(high < least for _, high, least in ends):
        return "not trusted"
    return "trusted" if all(low >= least for low, _, least in ends) else "cannot tell"


def correlate_refusal_rates(
    readout_refuses: Bool[np.ndarray, "conditions n"],
    response_refuses: Bool[np.ndarray, "conditions n"],
    pairs: pd.Series,
    is_harmful: Bool[np.ndarray, " n"],
    seed: int = 0,
) -> dict[str, float]:
    """Return Spearman's correlation of the conditions' refusal rates by readout and by text.

    Args:
        readout_refuses: the readout's answer for each condition and query.
        response_refuses: the text's.
        pairs: the pair of each query, missing where it has none.
        is_harmful: class of each query.
        seed: of the bootstrap.
    """
    units = ResamplingUnits.from_pairs(pairs.reset_index(drop=True), is_harmful)
    values = [
        _compute_rank_correlation(readout_refuses, response_refuses, is_harmful, sample)
        for sample in (
            ResamplingWeights.from_observed(units),
            ResamplingWeights.from_bootstrap(units, BOOTSTRAP_DRAWS, seed),
        )
    ]
    value = float(values[0][0])
    low, high = bootstrap_interval(values[1], len(pairs), True)
    return {"rank_correlation": value, "rank_correlation_low": low, "rank_correlation_high": high}


def compute_calibration_curve(
    probabilities: Float[np.ndarray, " n"], is_refusal: Bool[np.ndarray, " n"]
) -> pd.DataFrame:
    """Return the calibration curve: in bins of the readout's probability, how often the text refuses.

    >>> compute_calibration_curve(np.array([0.05, 0.95, 0.96]), np.array([False, True, True]))[["chance", "refused"]].values
    array([[0.05 , 0.   ],
           [0.955, 1.   ]])
    """
    rows = []
    bins = _assign_calibration_bins(probabilities)
    for number in np.unique(bins):
        here = bins == number
        rows.append(
            {"chance": probabilities[here].mean()}
            | make_rate_columns("refused", int(is_refusal[here].sum()), int(here.sum()))
        )
    return pd.DataFrame(rows)


def _assign_calibration_bins(probabilities: Float[np.ndarray, " n"]) -> np.ndarray:
    return np.minimum((probabilities * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)


def _order_weights_by_query(
    in_first_class: Bool[np.ndarray, " n"], resampling: ResamplingWeights
) -> Float[np.ndarray, "draws n"]:
    """How often each query counts, in the order of the queries."""
    weights = np.empty((len(resampling.harmful_weights), len(in_first_class)))
    weights[:, in_first_class], weights[:, ~in_first_class] = (
        resampling.harmful_weights,
        resampling.benign_weights,
    )
    return weights


def _compute_kappa(
    readout_refuses: Bool[np.ndarray, " n"],
    response_refuses: Bool[np.ndarray, " n"],
    resampling: ResamplingWeights,
) -> DrawVector:
    """Cohen's kappa; in draws, the rates of both classes are corrected as all counted rates are."""
    share = response_refuses.mean()
    rates = []
    for side, weights, (yes, no) in (
        (response_refuses, resampling.harmful_weights, resampling.unseen_weights[0, 0]),
        (~response_refuses, resampling.benign_weights, resampling.unseen_weights[0, 1]),
    ):
        count, n = weights @ readout_refuses[side], side.sum()
        rates.append(count / n if resampling.is_observed else (count + yes) / (n + yes + no))
    hit, false = rates
    positive = share * hit + (1 - share) * false
    by_chance = share * positive + (1 - share) * (1 - positive)
    agree = share * hit + (1 - share) * (1 - false)
    return np.divide(agree - by_chance, 1 - by_chance, out=np.full_like(agree, np.nan), where=by_chance < 1)


def _compute_calibration_error(
    probabilities: Float[np.ndarray, " n"], is_refusal: Bool[np.ndarray, " n"], resampling: ResamplingWeights
) -> DrawVector:
    """Mean distance of probability and rate over ten equal bins, weighted by what lies in them."""
    weights = _order_weights_by_query(is_refusal, resampling)
    inside = _assign_calibration_bins(probabilities)[:, None] == np.arange(_CALIBRATION_BINS)
    return np.abs(weights @ (inside * (probabilities - is_refusal)[:, None])).sum(1) / len(is_refusal)


def _compute_rank_correlation(
    readout_refuses: Bool[np.ndarray, "conditions n"],
    response_refuses: Bool[np.ndarray, "conditions n"],
    is_harmful: Bool[np.ndarray, " n"],
    resampling: ResamplingWeights,
) -> DrawVector:
    weights = _order_weights_by_query(is_harmful, resampling)
    one, two = (rankdata(weights @ each.T, axis=1) for each in (readout_refuses, response_refuses))
    one, two = one - one.mean(1, keepdims=True), two - two.mean(1, keepdims=True)
    scale = np.sqrt((one**2).sum(1) * (two**2).sum(1))
    return np.divide((one * two).sum(1), scale, out=np.full_like(scale, np.nan), where=scale > 0)
