"""Effects of defenses over matched controls: other content of the same size, in several draws.

The queries are divided into groups, and each group is sent under one draw of the control, so that all draws
cost as much as one condition. The intervals rest on how much an estimate changes when a group is left out
(delete-one-group jackknife with a t quantile; Shao and Tu 1995, The Jackknife and Bootstrap, section 2.3).
They therefore cover draws as well as queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from scipy.special import stdtr, stdtrit

from analysis.stats.bootstrap import CONFIDENCE_LEVEL, NORMAL_QUANTILE, DrawVector, ResamplingWeights
from analysis.stats.effects import compute_contrasts, compute_estimates
from analysis.stats.prediction_powered import (
    combine_class_changes,
    estimate_prediction_powered_difference,
)
from analysis.stats.response_rates import LABEL_BY_VERDICT, group_labels
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, Basis, ScoreTable, iterate_rows
from analysis.stats.verdicts import (
    EFFECT_NAMES,
    EQUIVALENT,
    MARGIN_MEASURES,
    RESPONSE_MEASURES,
    EffectMeasures,
    EffectVerdict,
    adjust_in_families,
    derive_verdicts,
    find_outcome,
    format_verdicts,
)

MIN_CONTROL_DRAWS = 5
# Differences between defense and control: nats, within-class SDs, AUROC; and percentage points.
_MARGIN_NAMES = ("shift", "discrimination", "scaled_shift", "scaled_discrimination", "delta_auroc")
_TESTED_CHANGES = tuple(f"{name}_over_control" for name in EFFECT_NAMES)
_TESTED_RESPONSE_CHANGES = tuple(f"response_{name}" for name in _TESTED_CHANGES)
# Where the controls themselves fall, without interval.
_POSITIONS = ("shift", "discrimination", "scaled_shift", "scaled_discrimination")
_RATES = ("refusal_rate", "over_refusal_rate")
CONTROL_COLUMNS = (
    "control",
    "control_draws",
    *(f"control_{name}" for name in (*_POSITIONS, *_RATES)),
    *(
        f"{name}{suffix}"
        for name in (*(f"{name}_over_control" for name in _MARGIN_NAMES), *_TESTED_RESPONSE_CHANGES)
        for suffix in INTERVAL_SUFFIXES
    ),
    *(f"p_{name}" for name in (*_TESTED_CHANGES, *_TESTED_RESPONSE_CHANGES)),
    "verdict_over_control",
    "control_note",
)
# The measures of verdicts against the undefended model, of the difference between defense and control.
_OVER_CONTROL_MEASURES = {
    basis: {
        name: EffectMeasures(
            tuple(f"{column}_over_control" for column in measure.columns),
            f"{measure.scale_column}_over_control",
            f"{measure.p_column}_over_control",
            measure.equivalence,
        )
        for name, measure in measures.items()
    }
    for basis, measures in ((Basis.MARGINS, MARGIN_MEASURES), (Basis.RESPONSES, RESPONSE_MEASURES))
}


@dataclass(frozen=True)
class JackknifeEstimate:
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


def leave_groups_out(groups: Int[np.ndarray, " n"], is_harmful: Bool[np.ndarray, " n"]) -> ResamplingWeights:
    """Return the weights of all queries, and then of those without each group in turn.

    >>> weights = leave_groups_out(np.array([0, 1, 0, 1]), np.array([True, True, False, False]))
    >>> weights.harmful_weights.tolist()
    [[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]]

    Args:
        groups: group of each query.
        is_harmful: class of each query.
    """
    is_kept = np.stack([np.ones(len(groups), bool), *(groups != group for group in np.unique(groups))])
    with np.errstate(divide="ignore", invalid="ignore"):  # a class may be missing without a group
        harmful, benign = (
            kept * (kept.shape[1] / kept.sum(1, keepdims=True))
            for kept in (is_kept[:, is_harmful].astype(float), is_kept[:, ~is_harmful].astype(float))
        )
    return ResamplingWeights(harmful, benign, np.full((2, 2, 2, len(is_kept)), 0.5), is_observed=True)


def estimate_by_jackknife(values: DrawVector, min_variance: float = 0.0) -> JackknifeEstimate:
    """Return an estimate with the interval and the p-value of a delete-one-group jackknife.

    >>> estimate = estimate_by_jackknife(np.array([0.0, 1.0, -1.0, 0.5, -0.5, 0.0]))
    >>> estimate.value, round(estimate.high, 2), estimate.p_value
    (0.0, 3.93, 1.0)

    Args:
        values: the estimate from all queries, and then without each group.
        min_variance: variance that the jackknife must not fall below.
    """
    value, left_out = float(values[0]), values[1:]
    n = len(left_out)
    variance = (n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum())
    if n < MIN_CONTROL_DRAWS or not np.isfinite(variance):
        return JackknifeEstimate(value, np.nan, np.nan, np.nan)
    error = float(np.sqrt(max(variance, min_variance)))
    half_width = -float(stdtrit(n - 1, (1 - CONFIDENCE_LEVEL) / 2)) * error
    p_value = 2 * float(stdtr(n - 1, -abs(value) / error)) if error > 0 else float(value == 0)
    return JackknifeEstimate(value, value - half_width, value + half_width, p_value)


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
        control_scores: one row per query, attack and defense with a control: `margin` (nats), `group` of the
            query, `draw` (number of the control's content), `control` (what the content is), and `verdict` of
            the response, missing if it was not judged.
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
    for changes in (_TESTED_CHANGES, _TESTED_RESPONSE_CHANGES):
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
    is_harmful = condition["harmful"].to_numpy(bool)
    weights = leave_groups_out(control["group"].to_numpy(int), is_harmful)
    before, after, controlled = (
        frame["margin"].to_numpy(float) for frame in (undefended, condition, control)
    )
    of_defense, of_control = (
        compute_estimates(before, margins, is_harmful, scores.threshold, weights)
        for margins in (after, controlled)
    )
    row: dict[str, Any] = {"control": control["control"].iloc[0], "control_draws": control["draw"].nunique()}
    row |= {f"control_{name}": float(of_control[name][0]) for name in _POSITIONS}
    for name in _MARGIN_NAMES:
        estimate = estimate_by_jackknife(of_defense[name] - of_control[name])
        row |= _make_columns(f"{name}_over_control", estimate)
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
            "group": control["group"],
            "pair": condition["pair"],
        }
    )
    known = table.dropna(subset=["controlled"])
    row: dict[str, Any] = {
        f"control_{name}": float(known.loc[known["harmful"] == is_harmful, "controlled"].mean())
        for name, is_harmful in zip(_RATES, (True, False), strict=True)
    }
    table = known.dropna(subset=["after"])
    is_harmful = table["harmful"].to_numpy(bool)
    if is_harmful.all() or not is_harmful.any():
        return row
    changes = 100 * (table["after"] - table["controlled"]).to_numpy(float)
    weights = leave_groups_out(table["group"].to_numpy(int), is_harmful)
    variances = _compute_response_variances(table)
    for name, values in compute_contrasts(changes, is_harmful, weights).items():
        estimate = estimate_by_jackknife(values, variances[name])
        bound = 100 if name == "shift" else 200  # percentage points; the rates are shares
        ends = {"low": max(estimate.low, -bound), "high": min(estimate.high, bound)}
        row |= _make_columns(f"response_{name}_over_control", replace(estimate, **ends))
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
    variances = {}
    for name, interval in (("shift", contrasts.shift), ("discrimination", contrasts.discrimination)):
        assert interval.low is not None and interval.high is not None, "MOVER has both ends"
        variances[name] = ((interval.high - interval.low) / 2 / NORMAL_QUANTILE) ** 2
    return variances


def _derive_control_verdict(row: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict on the difference between defense and control, and the note that compares both."""
    if not row["control_draws"] > 0:
        return "", ""
    measures = _OVER_CONTROL_MEASURES[Basis(row["based_on"])]
    # The p-values are those of a t test and have no smallest value.
    test = {"smallest_p": 0.0, "units_needed": 0.0}
    verdicts = derive_verdicts(row | test, measures, row["n_harmful"] + row["n_benign"])
    return format_verdicts(verdicts), describe_over_control(row["verdict"], verdicts, row["control"])


def _make_columns(name: str, estimate: JackknifeEstimate) -> dict[str, float]:
    """Return an estimate in the columns of a table."""
    return {
        name: estimate.value,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
        f"p_{name}": estimate.p_value,
    }
