"""Refusal rates of judged responses, and what a defense changes in them, next to the margins of the same run.

Where only a sample of the queries was answered, the margins of all queries make the estimates more precise
(prediction-powered inference); beyond the fit of their weight to the same responses, they add no bias.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from analysis.stats.format import Interval
from analysis.stats.prediction_powered import (
    PredictionPoweredDifference,
    combine_class_changes,
    estimate_prediction_powered_difference,
    estimate_prediction_powered_rate,
)
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, ResponseVerdict, ScoreTable

RESPONSE_ESTIMATES = (
    "response_refusal_rate",
    "response_over_refusal_rate",
    "response_shift",
    "response_discrimination",
)
_LABEL_BY_VERDICT = {ResponseVerdict.REFUSED.value: 1.0, ResponseVerdict.NOT_REFUSED.value: 0.0}
_RATE_BY_CLASS = {True: "response_refusal_rate", False: "response_over_refusal_rate"}


def summarize_responses(responses: pd.DataFrame, scores: ScoreTable) -> pd.DataFrame:
    """Return the refusal rates of the responses, and their changes against the undefended model.

    Args:
        responses: one row per answered query, attack and defense, with its `verdict`: refused, not refused,
            or unjudged, which counts nowhere.
        scores: scores of the same conditions on all queries.

    Returns:
        A row per attack and defense: the number of judged responses (`n_responses`), refusal rates of
        harmful and of benign queries (0 to 1), shift and discrimination of the rates (percentage points; NaN
        for the undefended model), each with the ends of its 95 % interval, and the number of further
        responses that the margins of all queries are worth (`responses_saved`).
    """
    labels_by_condition = {
        (str(attack), str(defense)): rows.set_index("query")["verdict"].map(_LABEL_BY_VERDICT)
        for (attack, defense), rows in responses.groupby(["attack", "defense"], sort=False)
    }
    rows = []
    for attack, defense in scores.condition_keys:
        if (attack, defense) not in labels_by_condition:
            continue
        condition = _join_labels(scores, attack, defense, labels_by_condition[attack, defense])
        row = {"attack": attack, "defense": defense} | _estimate_rates(condition)
        if defense != UNDEFENDED and (attack, UNDEFENDED) in labels_by_condition:
            undefended = _join_labels(scores, attack, UNDEFENDED, labels_by_condition[attack, UNDEFENDED])
            row |= _estimate_changes(undefended, condition)
        rows.append(row)
    columns = [f"{name}{suffix}" for name in RESPONSE_ESTIMATES for suffix in INTERVAL_SUFFIXES]
    return pd.DataFrame(rows, columns=["attack", "defense", "n_responses", *columns, "responses_saved"])


def _join_labels(scores: ScoreTable, attack: str, defense: str, labels: pd.Series) -> pd.DataFrame:
    """Return the scores of a condition with the labels of its responses, NaN where there is none."""
    return scores.select_condition(attack, defense).join(labels.rename("label"))


def _select_class(
    condition: pd.DataFrame, is_harmful: bool
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"], Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Return labels, whether they exist, predictions, and strata (with or without a twin) of one class."""
    rows = condition[condition["harmful"] == is_harmful]
    labels = rows["label"].to_numpy(float)
    return labels, ~np.isnan(labels), rows["p_refuse"].to_numpy(float), rows["pair"].notna().to_numpy()


def _estimate_rates(condition: pd.DataFrame) -> dict[str, Any]:
    """Return the refusal rate of each class, and the number of responses behind both."""
    row: dict[str, Any] = {"n_responses": int(condition["label"].notna().sum()), "responses_saved": 0.0}
    for is_harmful, name in _RATE_BY_CLASS.items():
        labels, is_labeled, predictions, strata = _select_class(condition, is_harmful)
        if is_labeled.any():
            rate = estimate_prediction_powered_rate(labels, is_labeled, predictions, strata)
            row |= {name: rate.rate, f"{name}_low": rate.low, f"{name}_high": rate.high}
            row["responses_saved"] += rate.responses_saved
    return row


def _estimate_changes(undefended: pd.DataFrame, defended: pd.DataFrame) -> dict[str, float | None]:
    """Return shift and discrimination of the refusal rates, in percentage points."""
    changes: list[PredictionPoweredDifference] = []
    pairs: list[pd.Series] = []
    for is_harmful in (True, False):
        labels_before, is_labeled_before, predictions_before, strata = _select_class(undefended, is_harmful)
        labels_after, is_labeled_after, predictions_after, _ = _select_class(defended, is_harmful)
        is_labeled = is_labeled_before & is_labeled_after
        if not is_labeled.any():
            return {}
        changes.append(
            estimate_prediction_powered_difference(
                labels_before, labels_after, is_labeled, predictions_before, predictions_after, strata
            )
        )
        pairs.append(undefended.loc[undefended["harmful"] == is_harmful, "pair"])
    contrasts = combine_class_changes(changes[0], changes[1], pairs[0], pairs[1])
    return _make_columns("response_shift", contrasts.shift) | _make_columns(
        "response_discrimination", contrasts.discrimination
    )


def _make_columns(name: str, interval: Interval) -> dict[str, float | None]:
    """Return an interval in the columns of a table."""
    values = (interval.value, interval.low, interval.high)
    return {f"{name}{suffix}": value for suffix, value in zip(INTERVAL_SUFFIXES, values, strict=True)}
