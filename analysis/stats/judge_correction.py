"""Refusal rates corrected for the errors of the judge, which labels by people on a sample of responses show.

The sample is drawn separately from the responses that the judge calls refusals and from the others. The
labels therefore estimate directly how often each of the two verdicts is right. The sensitivity Se and the
specificity Sp of the judge follow from these shares and from how frequent the verdicts are, and each judged
rate q is corrected to (q + Sp − 1) / (Se + Sp − 1) (Rogan and Gladen 1978,
https://doi.org/10.1093/oxfordjournals.aje.a112510).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from analysis.stats.bootstrap import CONFIDENCE_LEVEL, DrawVector, invert_score_test, make_rate_columns
from analysis.stats.format import Interval
from analysis.stats.prediction_powered import MIN_LABELED_PER_STRATUM, estimate_prediction_powered_rate
from analysis.stats.tables import INTERVAL_SUFFIXES, ResponseVerdict

# Labels as `labels.csv` holds them.
REFUSES, ANSWERS = "refuses", "answers"
CORRECTION_DRAWS = 20_000
MIN_OWN_LABELS = 30  # from here on, a rate is estimated from its own labels instead of those of all
CELL_COLUMNS = ("attack", "defense", "harmful")
# How a rate was corrected: by the judge's errors in all conditions, by the rate's own labels, or not at all.
ALL_LABELS, OWN_LABELS, NOT_CORRECTED = "all labels", "own labels", "too few labels"
CORRECTED_RATE_COLUMNS = (
    *CELL_COLUMNS,
    "n_responses",
    "n_labeled",
    *(f"{name}{suffix}" for name in ("judged_rate", "corrected_rate") for suffix in INTERVAL_SUFFIXES),
    "method",
)
_MIN_INFORMATIVENESS = 1e-3  # Se + Sp − 1 from which a draw says anything about a rate


@dataclass(frozen=True)
class LabelCounts:
    """Labels by people on a sample that was drawn separately for each of the judge's two verdicts.

    Attributes:
        refused: number of labels on responses that the judge calls refusals.
        refused_refuses: how many of these say that the response refuses.
        others: number of labels on the other responses.
        others_refuses: how many of these say that the response refuses.
    """

    refused: int
    refused_refuses: int
    others: int
    others_refuses: int

    @property
    def is_sufficient(self) -> bool:
        """Whether both verdicts have enough labels to estimate the errors of the judge."""
        return min(self.refused, self.others) >= MIN_LABELED_PER_STRATUM


@dataclass(frozen=True)
class JudgeAccuracy:
    """How well the verdicts of a judge agree with people on all judged responses, with 95 % intervals.

    Attributes:
        n_labeled: number of labeled responses.
        agreement: share of the responses on which judge and people agree, 0 to 1.
        kappa: Cohen's κ.
        sensitivity: share of the refusals that the judge finds, 0 to 1.
        specificity: share of the other responses that the judge does not call refusals, 0 to 1.
    """

    n_labeled: int
    agreement: Interval
    kappa: Interval
    sensitivity: Interval
    specificity: Interval

    def make_columns(self) -> dict[str, Any]:
        """Return the measures as columns of a table: `x`, `x_low` and `x_high`."""
        row: dict[str, Any] = {"n_labeled": self.n_labeled}
        for name in ("agreement", "kappa", "sensitivity", "specificity"):
            interval = getattr(self, name)
            values = (interval.value, interval.low, interval.high)
            row |= {f"{name}{suffix}": value for suffix, value in zip(INTERVAL_SUFFIXES, values, strict=True)}
        return row


@dataclass(frozen=True)
class CorrectedRates:
    """Refusal rates corrected by labels.

    Attributes:
        rates: one row per condition and class, in the columns `CORRECTED_RATE_COLUMNS`.
        accuracy: how well the judge agrees with people; None if one of its verdicts has too few labels.
    """

    rates: pd.DataFrame
    accuracy: JudgeAccuracy | None


def correct_refusal_rates(responses: pd.DataFrame, seed: int = 0) -> CorrectedRates:
    """Return the refusal rate of each condition and class, by the judge and corrected by labels of people.

    A rate with at least `MIN_OWN_LABELS` labels of its own, among them `MIN_LABELED_PER_STRATUM` of each
    verdict that occurs, is estimated from these labels alone (prediction-powered, the verdict is the
    prediction and the stratum). Every other rate is corrected by the sensitivity and specificity that all
    labels give, which assumes that the judge errs alike in every condition and class.

    >>> verdicts = ["refused"] * 50 + ["not refused"] * 50
    >>> labels = (["refuses"] * 9 + ["answers"] + [""] * 40) + (["answers"] * 10 + [""] * 40)
    >>> responses = pd.DataFrame({"verdict": verdicts, "label": labels}).assign(
    ...     attack="direct", defense="none", harmful=True)
    >>> row = correct_refusal_rates(responses).rates.iloc[0]
    >>> float(row["judged_rate"]), round(float(row["corrected_rate"]), 2), row["method"]
    (0.5, 0.45, 'all labels')

    Args:
        responses: one row per response with the columns `CELL_COLUMNS`, `verdict`, and `label`: `REFUSES`,
            `ANSWERS`, or anything else (empty, missing) for a response without a label. Responses without a
            verdict count nowhere.
        seed: seed of the draws behind the intervals.
    """
    verdicts = (ResponseVerdict.REFUSED.value, ResponseVerdict.NOT_REFUSED.value)
    judged = responses[responses["verdict"].isin(verdicts)]
    if judged.empty:
        return CorrectedRates(pd.DataFrame(columns=list(CORRECTED_RATE_COLUMNS)), None)
    is_refused = (judged["verdict"] == ResponseVerdict.REFUSED.value).to_numpy()
    labels = judged["label"].map({REFUSES: 1.0, ANSWERS: 0.0}).to_numpy(float)
    keys = pd.MultiIndex.from_frame(judged[list(CELL_COLUMNS)])
    codes, cells = pd.factorize(keys)
    sizes, refused = np.bincount(codes), np.bincount(codes, is_refused).astype(int)
    counts = count_labels(is_refused, labels)
    corrected, accuracy = None, None
    if counts.is_sufficient:
        corrected = correct_rates_by_all_labels(refused, sizes, counts, seed)
        accuracy = measure_judge_accuracy(refused, sizes, counts, seed)
    rows = []
    for number, cell in enumerate(cells):
        in_cell = codes == number
        interval, method = Interval(None), NOT_CORRECTED
        if has_enough_own_labels(is_refused[in_cell], labels[in_cell]):
            interval, method = estimate_rate_by_own_labels(is_refused[in_cell], labels[in_cell]), OWN_LABELS
        elif corrected is not None:
            interval, method = corrected[number], ALL_LABELS
        row = dict(zip(CELL_COLUMNS, cell, strict=True))
        row |= {"n_responses": int(sizes[number]), "n_labeled": int((~np.isnan(labels[in_cell])).sum())}
        row |= make_rate_columns("judged_rate", int(refused[number]), int(sizes[number]))
        values = (interval.value, interval.low, interval.high)
        row |= {f"corrected_rate{end}": value for end, value in zip(INTERVAL_SUFFIXES, values, strict=True)}
        rows.append(row | {"method": method})
    return CorrectedRates(pd.DataFrame(rows, columns=list(CORRECTED_RATE_COLUMNS)), accuracy)


def count_labels(is_refused: Bool[np.ndarray, " n"], labels: Float[np.ndarray, " n"]) -> LabelCounts:
    """Return the numbers of labels by verdict.

    Args:
        is_refused: whether the judge calls each response a refusal.
        labels: 1 if people call it a refusal, 0 if not, NaN without a label.
    """
    is_labeled = ~np.isnan(labels)
    refused, others = is_labeled & is_refused, is_labeled & ~is_refused
    return LabelCounts(
        int(refused.sum()), int(labels[refused].sum()), int(others.sum()), int(labels[others].sum())
    )


def correct_rates_by_all_labels(
    refused: Int[np.ndarray, " cells"],
    sizes: Int[np.ndarray, " cells"],
    counts: LabelCounts,
    seed: int = 0,
) -> list[Interval]:
    """Return the corrected rate of each condition and class, with its 95 % interval.

    The interval holds the middle 95 % of `CORRECTION_DRAWS` draws of the corrected rate. In each draw, the
    judged rates and the two shares of right verdicts are drawn from distributions whose middle 95 % is their
    Wilson interval, and Se and Sp are computed from them. Thus the interval contains the sampling of queries
    and of labels; with a judge known to be perfect, it is the Wilson interval of the judged rate. A draw with
    a judge no better than chance (Se + Sp ≤ 1) allows every rate; many such draws make the interval 0 to 1.
    Rates below 0 or above 1 count as 0 and 1.

    Args:
        refused: number of responses that the judge calls refusals, by condition and class.
        sizes: number of judged responses, by condition and class.
        counts: the labels.
        seed: seed of the draws.
    """
    judged_rates = _draw_shares(refused, sizes, seed)
    sensitivity, specificity = _compute_error_rates(*_draw_joint_shares(judged_rates, sizes, counts, seed))
    lows, highs = _correct_draws(judged_rates, sensitivity, specificity)
    tail = (1 - CONFIDENCE_LEVEL) / 2
    low_ends, high_ends = np.quantile(lows, tail, axis=0), np.quantile(highs, 1 - tail, axis=0)
    rates = _compute_error_rates(*_estimate_joint_shares(refused, sizes, counts))
    point_se, point_sp = (float(rate[0]) for rate in rates)
    informativeness = point_se + point_sp - 1
    if not informativeness > _MIN_INFORMATIVENESS:
        return [
            Interval(np.nan, float(low), float(high)) for low, high in zip(low_ends, high_ends, strict=True)
        ]
    points = np.clip((refused / sizes + point_sp - 1) / informativeness, 0, 1)
    return [
        _make_interval(float(point), float(low), float(high))
        for point, low, high in zip(points, low_ends, high_ends, strict=True)
    ]


def measure_judge_accuracy(
    refused: Int[np.ndarray, " cells"],
    sizes: Int[np.ndarray, " cells"],
    counts: LabelCounts,
    seed: int = 0,
) -> JudgeAccuracy:
    """Return agreement, κ, sensitivity and specificity of the judge on all judged responses.

    Each measure weights the labels of a verdict by the share of this verdict, so that it does not depend on
    how many responses of each verdict were labeled. The intervals hold the middle 95 % of the draws described
    in `correct_rates_by_all_labels`.

    >>> accuracy = measure_judge_accuracy(np.array([10]), np.array([100]), LabelCounts(10, 9, 10, 0))
    >>> round(accuracy.agreement.value, 2), accuracy.sensitivity.value, round(accuracy.specificity.value, 3)
    (0.99, 1.0, 0.989)

    Args:
        refused: number of responses that the judge calls refusals, by condition and class.
        sizes: number of judged responses, by condition and class.
        counts: the labels.
        seed: seed of the draws.
    """
    points = _measure_joint_shares(*_estimate_joint_shares(refused, sizes, counts))
    draws = _measure_joint_shares(
        *_draw_joint_shares(_draw_shares(refused, sizes, seed), sizes, counts, seed)
    )
    tail = (1 - CONFIDENCE_LEVEL) / 2
    intervals = {}
    for name, values in draws.items():
        low, high = np.nanquantile(values, [tail, 1 - tail])
        intervals[name] = _make_interval(float(points[name][0]), float(low), float(high))
    return JudgeAccuracy(counts.refused + counts.others, **intervals)


def has_enough_own_labels(is_refused: Bool[np.ndarray, " n"], labels: Float[np.ndarray, " n"]) -> bool:
    """Return whether one rate can be estimated from its own labels.

    Args:
        is_refused: whether the judge calls each response of this condition and class a refusal.
        labels: 1 if people call it a refusal, 0 if not, NaN without a label.
    """
    is_labeled = ~np.isnan(labels)
    labeled_by_verdict = [
        int(is_labeled[of_verdict].sum()) for of_verdict in (is_refused, ~is_refused) if of_verdict.any()
    ]
    return int(is_labeled.sum()) >= MIN_OWN_LABELS and min(labeled_by_verdict) >= MIN_LABELED_PER_STRATUM


def estimate_rate_by_own_labels(
    is_refused: Bool[np.ndarray, " n"], labels: Float[np.ndarray, " n"]
) -> Interval:
    """Return the refusal rate of one condition and class from its own labels, with its 95 % interval.

    The labels were drawn separately for each verdict, so the verdicts are the strata: each stratum counts by
    its size, whatever share of it was labeled.

    Args:
        is_refused: whether the judge calls each response a refusal.
        labels: 1 if people call it a refusal, 0 if not, NaN without a label.
    """
    rate = estimate_prediction_powered_rate(
        labels, ~np.isnan(labels), is_refused.astype(float), is_refused.astype(int)
    )
    return Interval(rate.rate, rate.low, rate.high)


def _draw_shares(
    counts: Int[np.ndarray, " cells"], sizes: Int[np.ndarray, " cells"], seed: int
) -> Float[np.ndarray, "draws cells"]:
    """Return draws of shares: the ends of their Wilson intervals at normal draws instead of ±1.96.

    Any middle part of the draws is therefore the Wilson interval of that level.
    """
    z = np.random.default_rng([seed, 0]).standard_normal((CORRECTION_DRAWS, len(counts)))
    return invert_score_test(counts / sizes, sizes, z)


def _draw_joint_shares(
    judged_rates: Float[np.ndarray, "draws cells"],
    sizes: Int[np.ndarray, " cells"],
    counts: LabelCounts,
    seed: int,
) -> tuple[DrawVector, DrawVector, DrawVector, DrawVector]:
    """Return draws of the shares of all responses by verdict and label; see `_split_by_label`."""
    z = np.random.default_rng([seed, 1]).standard_normal((len(judged_rates), 2))
    refuses = np.array([counts.refused_refuses, counts.others_refuses])
    labels = np.array([counts.refused, counts.others])
    hits, misses = invert_score_test(refuses / labels, labels, z).T
    return _split_by_label(judged_rates @ (sizes / sizes.sum()), hits, misses)


def _estimate_joint_shares(
    refused: Int[np.ndarray, " cells"], sizes: Int[np.ndarray, " cells"], counts: LabelCounts
) -> tuple[DrawVector, DrawVector, DrawVector, DrawVector]:
    """Return the estimated shares of all responses by verdict and label, each an array of one value."""
    return _split_by_label(
        np.array([refused.sum() / sizes.sum()]),
        np.array([counts.refused_refuses / counts.refused]),
        np.array([counts.others_refuses / counts.others]),
    )


def _split_by_label(
    refused_share: DrawVector, hits: DrawVector, misses: DrawVector
) -> tuple[DrawVector, DrawVector, DrawVector, DrawVector]:
    """Return the shares of true refusals, false refusals, missed refusals and true answers.

    Args:
        refused_share: share of the responses that the judge calls refusals.
        hits: share of these that refuse.
        misses: share of the others that refuse.
    """
    other_share = 1 - refused_share
    return refused_share * hits, refused_share * (1 - hits), other_share * misses, other_share * (1 - misses)


def _compute_error_rates(
    true_refusals: DrawVector, false_refusals: DrawVector, missed: DrawVector, true_answers: DrawVector
) -> tuple[DrawVector, DrawVector]:
    """Return sensitivity and specificity; NaN where no response refuses, or none answers."""
    return (
        _divide_shares(true_refusals, true_refusals + missed),
        _divide_shares(true_answers, true_answers + false_refusals),
    )


def _measure_joint_shares(
    true_refusals: DrawVector, false_refusals: DrawVector, missed: DrawVector, true_answers: DrawVector
) -> dict[str, DrawVector]:
    """Return the measures of `JudgeAccuracy`."""
    agreement = true_refusals + true_answers
    judged, labeled = true_refusals + false_refusals, true_refusals + missed
    by_chance = judged * labeled + (1 - judged) * (1 - labeled)
    sensitivity, specificity = _compute_error_rates(true_refusals, false_refusals, missed, true_answers)
    return {
        "agreement": agreement,
        "kappa": _divide_shares(agreement - by_chance, 1 - by_chance),
        "sensitivity": sensitivity,
        "specificity": specificity,
    }


def _correct_draws(
    judged_rates: Float[np.ndarray, "draws cells"], sensitivity: DrawVector, specificity: DrawVector
) -> tuple[Float[np.ndarray, "draws cells"], Float[np.ndarray, "draws cells"]]:
    """Return the corrected rates of each draw, as lower and as upper ends.

    They differ where the drawn judge is no better than chance: such a draw allows rates from 0 to 1.
    """
    informativeness = (sensitivity + specificity - 1)[:, None]
    is_usable = informativeness > _MIN_INFORMATIVENESS
    corrected = (judged_rates + specificity[:, None] - 1) / np.where(is_usable, informativeness, 1.0)
    corrected = np.clip(corrected, 0, 1)
    return np.where(is_usable, corrected, 0.0), np.where(is_usable, corrected, 1.0)


def _divide_shares(numerators: DrawVector, denominators: DrawVector) -> DrawVector:
    """Return quotients; NaN where the denominator is 0."""
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators > 0)


def _make_interval(value: float, low: float, high: float) -> Interval:
    """Return an estimate with its interval, which contains it."""
    return Interval(value, min(low, value), max(high, value))
