"""Effects of defenses over matched controls: other content of the same size, in several draws.

Each query is sent under one draw of the control, so that the draws cost no more than one condition. The
queries of a draw are a cluster: the intervals rest on how much the estimate changes when a draw is left out
with its queries (delete-one-group jackknife with a t quantile; Shao and Tu 1995, The Jackknife and Bootstrap,
section 2.3), and therefore cover draws as well as queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.special import stdtr, stdtrit

from analysis.stats.bootstrap import CONFIDENCE_LEVEL, NORMAL_QUANTILE, ResamplingUnits, ResamplingWeights
from analysis.stats.effects import compute_estimates
from analysis.stats.prediction_powered import (
    combine_class_changes,
    estimate_prediction_powered_difference,
)
from analysis.stats.response_rates import LABEL_BY_VERDICT, group_labels
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, Basis, ScoreTable, iterate_rows
from analysis.stats.verdicts import (
    EFFECT_NAMES,
    EQUIVALENT,
    MARGIN_EQUIVALENCE,
    RESPONSE_EQUIVALENCE,
    EffectMeasures,
    EffectVerdict,
    adjust_in_families,
    derive_verdicts,
    find_outcome,
    format_verdicts,
)

MIN_CONTROL_DRAWS = 5
MARGIN_CHANGES = tuple(f"{name}_over_control" for name in EFFECT_NAMES)  # nats
SCALED_CHANGES = tuple(f"scaled_{name}" for name in MARGIN_CHANGES)  # within-class SDs of undefended margins
RESPONSE_CHANGES = tuple(f"response_{name}" for name in MARGIN_CHANGES)  # percentage points
# Where the controls themselves fall, without interval.
CONTROL_POSITIONS = ("shift", "discrimination", "scaled_shift", "scaled_discrimination")
CONTROL_RATES = ("refusal_rate", "over_refusal_rate")
CONTROL_COLUMNS = (
    "control",
    "control_draws",
    *(f"control_{name}" for name in (*CONTROL_POSITIONS, *CONTROL_RATES)),
    *(
        f"{name}{suffix}"
        for name in (*MARGIN_CHANGES, *SCALED_CHANGES, *RESPONSE_CHANGES)
        for suffix in INTERVAL_SUFFIXES
    ),
    *(f"p_{name}" for name in (*MARGIN_CHANGES, *RESPONSE_CHANGES)),
    "verdict_over_control",
    "control_note",
)
_MARGIN_MEASURES = {
    name: EffectMeasures(
        (f"{name}_over_control",),
        f"scaled_{name}_over_control",
        f"p_{name}_over_control",
        MARGIN_EQUIVALENCE,
    )
    for name in EFFECT_NAMES
}
_RESPONSE_MEASURES = {
    name: EffectMeasures(
        (f"response_{name}_over_control",),
        f"response_{name}_over_control",
        f"p_response_{name}_over_control",
        RESPONSE_EQUIVALENCE,
    )
    for name in EFFECT_NAMES
}


@dataclass(frozen=True)
class ClusterEstimate:
    """An estimate with its 95 % interval and its two-sided p-value for no effect.

    Attributes:
        value: the estimate.
        low: lower end of the interval; NaN if the draws are too few.
        high: upper end of the interval.
        p_value: p-value; NaN if the draws are too few.
    """

    value: float
    low: float
    high: float
    p_value: float


def estimate_clustered_contrasts(
    changes: Float[np.ndarray, " n"],
    is_harmful: Bool[np.ndarray, " n"],
    draws: Int[np.ndarray, " n"],
    min_variances: Mapping[str, float] | None = None,
) -> dict[str, ClusterEstimate]:
    """Return shift and discrimination of changes whose queries are grouped by draws of a control.

    >>> changes, is_harmful = np.array([2.0, 0.0, 3.0, 1.0]), np.array([True, False, True, False])
    >>> estimates = estimate_clustered_contrasts(changes, is_harmful, np.array([0, 0, 1, 1]))
    >>> estimates["shift"].value, estimates["discrimination"].value
    (1.5, 2.0)

    Args:
        changes: defended minus control value of each query.
        is_harmful: class of each query.
        draws: draw of the control that each query met.
        min_variances: variance of each contrast that the jackknife must not fall below.
    """
    values = _compute_contrasts(changes, is_harmful, np.ones(len(changes), bool))
    groups = np.unique(draws)
    without_each = np.array([_compute_contrasts(changes, is_harmful, draws != group) for group in groups])
    n = len(groups)
    estimates = {}
    for index, name in enumerate(EFFECT_NAMES):
        value, left_out = float(values[index]), without_each[:, index]
        variance = (n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum())
        if n < MIN_CONTROL_DRAWS or not np.isfinite(variance):
            estimates[name] = ClusterEstimate(value, np.nan, np.nan, np.nan)
            continue
        error = float(np.sqrt(max(variance, (min_variances or {}).get(name, 0.0))))
        half_width = -float(stdtrit(n - 1, (1 - CONFIDENCE_LEVEL) / 2)) * error
        p_value = 2 * float(stdtr(n - 1, -abs(value) / error)) if error > 0 else float(value == 0)
        estimates[name] = ClusterEstimate(value, value - half_width, value + half_width, p_value)
    return estimates


def add_control_estimates(
    summary: pd.DataFrame,
    scores: ScoreTable,
    control_scores: pd.DataFrame,
    responses: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return a summary with what each defense does beyond its matched control.

    Args:
        summary: one row per attack and defense, with verdicts.
        scores: scores of the same conditions.
        control_scores: one row per query, attack and defense with a control: `margin` (nats), `draw`,
            `control` (what its content is), and `verdict` of the response, missing if it was not judged.
        responses: verdicts on the responses of the conditions; None if none were judged.

    Returns:
        The columns `CONTROL_COLUMNS` are added: positions of the controls against the undefended model; the
        difference between defense and control in nats, in SDs and in percentage points of the responses; and
        the verdict on it, from responses if there are any. All are missing for rows without a control.
    """
    groups = {key: rows for key, rows in control_scores.groupby(["attack", "defense"], sort=False)}
    labels = group_labels(responses) if responses is not None else {}
    new_rows = [
        _estimate_condition(
            scores, str(row["attack"]), str(row["defense"]), groups[row["attack"], row["defense"]], labels
        )
        if (row["attack"], row["defense"]) in groups
        else {}
        for row in iterate_rows(summary)
    ]
    frame = summary.join(pd.DataFrame(new_rows, index=summary.index, columns=list(CONTROL_COLUMNS)))
    for changes in (MARGIN_CHANGES, RESPONSE_CHANGES):
        p_columns = [f"p_{name}" for name in changes]
        frame[p_columns] = adjust_in_families(frame, p_columns)
    verdicts = [_derive_control_verdict(row) for row in iterate_rows(frame)]
    frame["verdict_over_control"], frame["control_note"] = zip(*verdicts, strict=True)
    return frame


def describe_over_control(verdict: str, over_control: Sequence[EffectVerdict], control: str) -> str:
    """Return in words how the effects of a defense compare with those of its control.

    >>> none = EffectVerdict("shift", "equivalent"), EffectVerdict("discrimination", "equivalent")
    >>> describe_over_control("shift +, discrimination equivalent", none, "neutral text")
    'shift + as any neutral text of its size'

    Args:
        verdict: verdict on the effects against the undefended model.
        over_control: verdicts on the difference between defense and control.
        control: what the content of the control is.
    """
    notes = []
    for over in over_control:
        outcome = find_outcome(verdict, over.effect)
        if over.is_effect and over.outcome != outcome:
            notes.append(f"{over.effect} {over.outcome} over {control} of its size")
        elif outcome in ("+", "-") and over.outcome == EQUIVALENT:
            notes.append(f"{over.effect} {outcome} as any {control} of its size")
        elif outcome in ("+", "-") and not over.is_effect:
            notes.append(f"{over.effect} {outcome} cannot be told from {control} of its size")
    return "; ".join(notes)


def _compute_contrasts(
    changes: Float[np.ndarray, " n"], is_harmful: Bool[np.ndarray, " n"], is_kept: Bool[np.ndarray, " n"]
) -> tuple[float, float]:
    """Return shift and discrimination of the kept queries; NaN if a class is missing."""
    classes = changes[is_kept & is_harmful], changes[is_kept & ~is_harmful]
    harmful, benign = (float(values.mean()) if len(values) else np.nan for values in classes)
    return (harmful + benign) / 2, harmful - benign


def _estimate_condition(
    scores: ScoreTable,
    attack: str,
    defense: str,
    control_rows: pd.DataFrame,
    labels: Mapping[tuple[str, str], pd.Series],
) -> dict[str, Any]:
    """Return the estimates of one condition with a control; p-values are not adjusted yet."""
    undefended = scores.select_condition(attack, UNDEFENDED)
    condition = scores.select_condition(attack, defense)
    control = control_rows.set_index("query").loc[condition.index]
    is_harmful, draws = condition["harmful"].to_numpy(bool), control["draw"].to_numpy(int)
    before, after, controlled = (
        frame["margin"].to_numpy(float) for frame in (undefended, condition, control)
    )
    units = ResamplingUnits.from_pairs(undefended["pair"], is_harmful)
    positions = compute_estimates(
        before, controlled, is_harmful, scores.threshold, ResamplingWeights.from_observed(units)
    )
    row: dict[str, Any] = {"control": control["control"].iloc[0], "control_draws": len(np.unique(draws))}
    row |= {f"control_{name}": float(positions[name][0]) for name in CONTROL_POSITIONS}
    sd = _pool_class_sd(before, is_harmful)
    for name, estimate in estimate_clustered_contrasts(after - controlled, is_harmful, draws).items():
        row |= _make_columns(f"{name}_over_control", estimate)
        row |= _make_columns(f"scaled_{name}_over_control", estimate, 1 / sd if sd > 0 else np.nan)
        row[f"p_{name}_over_control"] = estimate.p_value
    if (attack, defense) in labels:
        row |= _estimate_responses(condition, control, labels[attack, defense])
    return row


def _estimate_responses(condition: pd.DataFrame, control: pd.DataFrame, labels: pd.Series) -> dict[str, Any]:
    """Return refusal rates of the control, and the difference to the defense, from the judged responses."""
    table = pd.DataFrame(
        {
            "after": labels.reindex(condition.index),
            "controlled": control["verdict"].map(LABEL_BY_VERDICT),
            "harmful": condition["harmful"],
            "draw": control["draw"],
            "pair": condition["pair"],
        }
    )
    known = table.dropna(subset=["controlled"])
    row: dict[str, Any] = {
        f"control_{name}": float(known.loc[known["harmful"] == is_harmful, "controlled"].mean())
        for name, is_harmful in zip(CONTROL_RATES, (True, False), strict=True)
    }
    table = known.dropna(subset=["after"])
    is_harmful = table["harmful"].to_numpy(bool)
    if is_harmful.all() or not is_harmful.any():
        return row
    estimates = estimate_clustered_contrasts(
        100 * (table["after"] - table["controlled"]).to_numpy(float),
        is_harmful,
        table["draw"].to_numpy(int),
        _compute_response_variances(table),
    )
    for name, estimate in estimates.items():
        row |= _make_columns(f"response_{name}_over_control", estimate)
        row[f"p_response_{name}_over_control"] = estimate.p_value
    return row


def _compute_response_variances(table: pd.DataFrame) -> dict[str, float]:
    """Return variances of both contrasts (squared percentage points) if there were one draw only.

    They come from the adjusted Wald interval of Bonett and Price. It keeps a width where no response differs,
    which the jackknife does not.
    """
    changes, pairs = [], []
    for is_harmful in (True, False):
        rows = table[table["harmful"] == is_harmful]
        before, after = rows["controlled"].to_numpy(float), rows["after"].to_numpy(float)
        changes.append(
            estimate_prediction_powered_difference(
                before, after, np.ones(len(rows), bool), np.zeros(len(rows)), np.zeros(len(rows))
            )
        )
        pairs.append(rows["pair"])
    contrasts = combine_class_changes(changes[0], changes[1], pairs[0], pairs[1])
    return {
        name: ((interval.high - interval.low) / 2 / NORMAL_QUANTILE) ** 2
        for name, interval in (
            ("shift", contrasts.shift),
            ("discrimination", contrasts.discrimination),
        )
    }


def _pool_class_sd(margins: Float[np.ndarray, " n"], is_harmful: Bool[np.ndarray, " n"]) -> float:
    """Return the pooled within-class SD of margins, nats."""
    squares = sum(
        ((values - values.mean()) ** 2).sum() for values in (margins[is_harmful], margins[~is_harmful])
    )
    return float(np.sqrt(squares / max(len(margins) - 2, 1)))


def _derive_control_verdict(row: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict on the difference between defense and control, and the note that compares both."""
    if not row["control_draws"] > 0:
        return "", ""
    uses_responses = row["based_on"] == Basis.RESPONSES
    measures = _RESPONSE_MEASURES if uses_responses else _MARGIN_MEASURES
    # The p-values are those of a t test and have no smallest value.
    test = {"smallest_p": 0.0, "units_needed": 0.0}
    verdicts = derive_verdicts(row | test, measures, row["n_harmful"] + row["n_benign"])
    return format_verdicts(verdicts), describe_over_control(row["verdict"], verdicts, row["control"])


def _make_columns(name: str, estimate: ClusterEstimate, scale: float = 1.0) -> dict[str, float]:
    values = (estimate.value, estimate.low, estimate.high)
    return {f"{name}{suffix}": value * scale for suffix, value in zip(INTERVAL_SUFFIXES, values, strict=True)}
