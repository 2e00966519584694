"""Refusal rates of judged responses, and what a defense changes in them, next to the margins of the same run.

Where only a sample of the queries was answered, the margins of all queries make the estimates more precise
(prediction-powered inference); beyond the fit of their weight to the same responses, they add no bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from analysis.stats.bootstrap import (
    ResamplingUnits,
    compute_sign_flip_p_value,
    draw_sign_flips,
    make_rate_columns,
)
from analysis.stats.effects import compute_query_contributions, weigh_conditions
from analysis.stats.format import Interval
from analysis.stats.prediction_powered import (
    PredictionPoweredDifference,
    PredictionPoweredRate,
    combine_class_changes,
    estimate_paired_difference,
    estimate_prediction_powered_difference,
    estimate_prediction_powered_rate,
)
from analysis.stats.tables import (
    INTERVAL_SUFFIXES,
    UNDEFENDED,
    Basis,
    ResponseVerdict,
    ScoreTable,
    iterate_rows,
)
from analysis.stats.verdicts import (
    MARGIN_MEASURES,
    NOT_JUDGED,
    REFERENCE,
    RESPONSE_MEASURES,
    adjust_in_families,
    derive_verdicts,
    describe_smallest_p_values,
    explain_disagreement,
    explain_verdicts,
    format_verdicts,
)

_RATE_BY_CLASS = {True: "refusal_rate", False: "over_refusal_rate"}
_CONTRAST_NAMES = ("response_shift", "response_discrimination")
_P_COLUMNS = tuple(f"p_{name}" for name in _CONTRAST_NAMES)
LABEL_BY_VERDICT = {ResponseVerdict.REFUSED.value: 1.0, ResponseVerdict.NOT_REFUSED.value: 0.0}


def add_response_estimates(
    summary: pd.DataFrame, responses: pd.DataFrame, scores: ScoreTable, seed: int = 0
) -> pd.DataFrame:
    """Return the summary with refusal rates and verdicts of the responses in place of those of the readout.

    Args:
        summary: `summarize_scores` of the same scores.
        responses: as for `summarize_responses`.
        scores: scores of the same conditions on all queries.
        seed: seed of the permutations.

    Returns:
        The rates of the readout stay in `readout_refusal_rate` and `readout_over_refusal_rate`, and its
        verdict in `margin_verdict`. A condition without judged responses has no rate and the verdict
        `not judged`.
    """
    estimates = summarize_responses(responses, scores, seed)
    rate_columns = [f"{name}{suffix}" for name in _RATE_BY_CLASS.values() for suffix in INTERVAL_SUFFIXES]
    kept = summary.drop(columns=rate_columns)
    frame = kept.merge(estimates, on=["attack", "defense"], how="left")
    frame[list(_P_COLUMNS)] = adjust_in_families(frame, _P_COLUMNS)
    smallest = describe_smallest_p_values(frame, frame["n_units"].fillna(0), _P_COLUMNS)
    verdicts = [_derive_response_verdict(row) for row in iterate_rows(frame.join(smallest))]
    frame["verdict"], frame["verdict_note"] = zip(*verdicts, strict=True)
    frame["based_on"] = Basis.RESPONSES.value
    position = list(kept).index("based_on") + 1
    new_columns = [name for name in estimates if name not in ("attack", "defense", "n_units")]
    return frame[[*list(kept)[:position], *new_columns, *list(kept)[position:]]]


def add_factorial_response_effects(
    effects: pd.DataFrame, responses: pd.DataFrame, scores: ScoreTable
) -> pd.DataFrame:
    """Return the effects of a 2 × 2 design with those on the refusal rates of the responses beside them.

    Args:
        effects: `estimate_factorial_effects` of one attack and one defense.
        responses: as for `summarize_responses`.
        scores: scores of the same conditions on all queries.

    Returns:
        `response_shift` and `response_discrimination` of each effect, percentage points with 95 % intervals.
        They are missing for the interaction, and where the responses of a condition were not judged.
    """
    labels_by_condition = group_labels(responses)
    rows = []
    for row in iterate_rows(effects):
        # The weights of a difference of two conditions are -1 and 1, in this order.
        ends = [(row["attack"], name) for name in weigh_conditions(row["defense"], row["effect"])]
        change: dict[str, float | None] = {}
        if len(ends) == 2 and all(end in labels_by_condition for end in ends):
            before, after = (join_labels(scores, *end, labels_by_condition[end]) for end in ends)
            change = _estimate_changes(before, after)
        rows.append(row | change)
    columns = [f"{name}{suffix}" for name in _CONTRAST_NAMES for suffix in INTERVAL_SUFFIXES]
    return pd.DataFrame(rows, columns=[*effects, *columns])


def summarize_responses(responses: pd.DataFrame, scores: ScoreTable, seed: int = 0) -> pd.DataFrame:
    """Return the refusal rates of the responses, and their changes against the undefended model.

    Args:
        responses: one row per answered query, attack and defense, with its `verdict`: refused, not refused,
            or unjudged, which counts nowhere.
        scores: scores of the same conditions on all queries.
        seed: seed of the permutations.

    Returns:
        A row per attack and defense: refusal rates of harmful and of benign queries (0 to 1), shift and
        discrimination of the rates (percentage points; NaN for the undefended model), each with the ends of
        its 95 % interval; unadjusted p-values of sign-flip permutations of the judged responses; the number
        of judged responses (`n_responses`), of further responses that the margins of all queries are worth
        (`responses_saved`), and of pairs and single queries judged in both conditions (`n_units`).
    """
    labels_by_condition = group_labels(responses)
    rows = []
    for attack, defense in scores.condition_keys:
        if (attack, defense) not in labels_by_condition:
            continue
        condition = join_labels(scores, attack, defense, labels_by_condition[attack, defense])
        row = {"attack": attack, "defense": defense} | _estimate_rates(condition)
        if defense != UNDEFENDED and (attack, UNDEFENDED) in labels_by_condition:
            undefended = join_labels(scores, attack, UNDEFENDED, labels_by_condition[attack, UNDEFENDED])
            row |= _estimate_changes(undefended, condition) | _test_changes(undefended, condition, seed)
        rows.append(row)
    names = (*_RATE_BY_CLASS.values(), *_CONTRAST_NAMES)
    columns = [f"{name}{suffix}" for name in names for suffix in INTERVAL_SUFFIXES]
    counts = ("n_responses", "responses_saved", "n_units")
    return pd.DataFrame(rows, columns=["attack", "defense", *columns, *_P_COLUMNS, *counts])


def summarize_prefilled_responses(responses: pd.DataFrame, families: Mapping[str, str]) -> pd.DataFrame:
    """Return the refusal rates after each number of tokens of an opener, and the effects of each defense.

    Args:
        responses: one row per query, attack, defense, kind of opener (`prefix`) and number of its tokens
            (`tokens`), with the `verdict` on the response.
        families: family of each defense.

    Returns:
        A row per attack, defense, kind of opener and number of tokens: the numbers of judged queries of each
        class, and of those without a verdict; refusal rates of harmful and of benign queries (0 to 1;
        Wilson); shift and discrimination of the rates against the undefended model after the same tokens
        (percentage points; Bonett and Price's paired intervals, combined over the classes with the
        correlation of twins); and their changes since 0 tokens (`…_since_0`). Effects are missing for the
        undefended model, and where no query of a class has all verdicts.
    """
    queries = responses.drop_duplicates("query").set_index("query")
    key_columns = ["attack", "defense", "prefix", "tokens"]
    labels: dict[tuple[str, str, str, int], pd.Series] = {}
    for values, rows in responses.groupby(key_columns, sort=False):
        attack, defense, prefix, tokens = map(str, values)
        verdicts = rows.set_index("query")["verdict"]
        labels[attack, defense, prefix, int(tokens)] = verdicts.map(LABEL_BY_VERDICT)

    def get_changes(attack: str, defense: str, prefix: str, n_tokens: int) -> pd.Series | None:
        undefended = labels.get((attack, UNDEFENDED, prefix, n_tokens))
        defended = labels.get((attack, defense, prefix, n_tokens))
        if defense == UNDEFENDED or undefended is None or defended is None:
            return None
        return defended - undefended

    summaries = []
    for key, condition_labels in labels.items():
        attack, defense, prefix, n_tokens = key
        row: dict[str, Any] = dict(zip(key_columns, key, strict=True)) | {"family": families[defense]}
        is_harmful = queries.loc[condition_labels.index, "harmful"].astype(bool)
        for harmful, name in _RATE_BY_CLASS.items():
            judged = condition_labels[is_harmful == harmful].dropna()
            row[f"n_{'harmful' if harmful else 'benign'}"] = len(judged)
            if len(judged):
                row |= make_rate_columns(name, int(judged.sum()), len(judged))
        row["unjudged"] = int(condition_labels.isna().sum())
        changes = get_changes(attack, defense, prefix, n_tokens)
        first_changes = get_changes(attack, defense, prefix, 0)
        row |= _estimate_query_changes(changes, queries, "")
        if n_tokens and changes is not None and first_changes is not None:
            row |= _estimate_query_changes(changes - first_changes, queries, "_since_0")
        summaries.append(row)
    effects = [f"{name}{since}" for since in ("", "_since_0") for name in _CONTRAST_NAMES]
    estimates = [
        f"{name}{suffix}" for name in (*_RATE_BY_CLASS.values(), *effects) for suffix in INTERVAL_SUFFIXES
    ]
    names = ("attack", "defense", "family", "prefix", "tokens", "n_harmful", "n_benign", "unjudged")
    return pd.DataFrame(summaries, columns=[*names, *estimates])


def label_refusals(scores: pd.DataFrame, responses: pd.DataFrame | None, threshold: float) -> pd.DataFrame:
    """Return which queries were refused, by judged responses or, where there are none, by the readout.

    >>> scores = pd.DataFrame({"query": ["a"], "pair": [None], "category": ["theft"], "harmful": [True],
    ...                        "attack": ["direct"], "defense": ["none"], "margin": [1.0]})
    >>> label_refusals(scores, None, 0.5)["refused"].tolist()
    [1.0]

    Args:
        scores: `scores.csv`.
        responses: `responses.csv`; None if no response was judged.
        threshold: margin above which the readout says "refuse", nats.

    Returns:
        A row per query and condition with `refused` (1, 0, or NaN without a verdict) and `based_on`.
    """
    columns = ["query", "pair", "category", "harmful", "attack", "defense"]
    if responses is None or not len(responses):
        refused = (scores["margin"] > threshold).astype(float)
        return scores[columns].assign(refused=refused, based_on=Basis.MARGINS.value)
    refused = responses["verdict"].map(LABEL_BY_VERDICT)
    return responses[columns].assign(refused=refused, based_on=Basis.RESPONSES.value)


def summarize_categories(labels: pd.DataFrame) -> pd.DataFrame:
    """Return the refusal rates of the harmful and of the benign queries of each category.

    Args:
        labels: from `label_refusals`.

    Returns:
        A row per attack, defense, category and class: `refused` (0 to 1) with its Wilson interval, and the
        number of queries with a verdict (`n`).
    """
    keys = ["attack", "defense", "category", "harmful"]
    rows = []
    known = labels.dropna(subset=["refused", "category"])
    for values, group in known.groupby(keys, sort=False):
        rate = make_rate_columns("refused", int(group["refused"].sum()), len(group))
        row = dict(zip(keys, values, strict=True)) | rate | {"n": rate["refused_n"]}
        rows.append(row | {"based_on": group["based_on"].iloc[0]})
    columns = [*keys, "n", *(f"refused{end}" for end in INTERVAL_SUFFIXES), "based_on"]
    return pd.DataFrame(rows, columns=columns)


def compare_twins(labels: pd.DataFrame) -> pd.DataFrame:
    """Return how often a harmful query is refused and its benign twin is not, and the reverse.

    Args:
        labels: from `label_refusals`; pairs in which a query has no verdict are left out.

    Returns:
        A row per attack and defense: the number of pairs (`n_pairs`), the shares of pairs in which only the
        harmful query (`only_harmful`), only the twin (`only_benign`) or both are refused (0 to 1), and
        `difference`: the refusal rate of the harmful queries minus that of their twins (percentage points)
        with the paired interval of Bonett and Price.
    """
    rows = []
    known = labels.dropna(subset=["pair", "refused"])
    for (attack, defense), group in known.groupby(["attack", "defense"], sort=False):
        sides = group.pivot_table(index="pair", columns="harmful", values="refused", sort=False).dropna()
        if not len(sides) or sides.shape[1] < 2:
            continue
        harmful, benign = (sides[is_harmful].to_numpy(float) for is_harmful in (True, False))
        change = estimate_paired_difference(harmful - benign)
        ends = (change.difference, change.low, change.high)
        rows.append(
            {
                "attack": attack,
                "defense": defense,
                "n_pairs": len(sides),
                "only_harmful": float((harmful > benign).mean()),
                "only_benign": float((benign > harmful).mean()),
                "both": float(np.minimum(harmful, benign).mean()),
                **{f"difference{end}": 100 * x for end, x in zip(INTERVAL_SUFFIXES, ends, strict=True)},
                "based_on": group["based_on"].iloc[0],
            }
        )
    names = ["n_pairs", "only_harmful", "only_benign", "both"]
    names += [*(f"difference{end}" for end in INTERVAL_SUFFIXES), "based_on"]
    return pd.DataFrame(rows, columns=["attack", "defense", *names])


def sweep_thresholds(scores: pd.DataFrame, n_thresholds: int = 41) -> pd.DataFrame:
    """Return what each defense changes in the refusal rates of the readout, at many thresholds of the margin.

    Args:
        scores: `scores.csv`, of one attack.
        n_thresholds: number of thresholds, at equal distances between the 2nd and the 98th percentile of the
            undefended margins.

    Returns:
        A row per defense and threshold (nats): both refusal rates (0 to 1), and shift and discrimination of
        the rates against the undefended model at the same threshold (percentage points) with paired intervals
        of Bonett and Price, combined over the classes with the correlation of twins.
    """
    rows: list[dict[str, Any]] = []
    undefended = scores[scores["defense"] == UNDEFENDED].set_index("query")
    if not len(undefended) or undefended["harmful"].nunique() < 2:
        return pd.DataFrame(columns=["attack", "defense", "threshold"])
    is_harmful = undefended["harmful"].to_numpy(bool)
    pairs = undefended["pair"] if "pair" in undefended else pd.Series(None, undefended.index, object)
    low, high = np.quantile(undefended["margin"].to_numpy(float), (0.02, 0.98))
    for (attack, defense), group in scores.groupby(["attack", "defense"], sort=False):
        if defense == UNDEFENDED:
            continue
        margins = group.set_index("query").loc[undefended.index, "margin"].to_numpy(float)
        for threshold in np.linspace(low, high, n_thresholds):
            refused = (margins > threshold).astype(float)
            changes = refused - (undefended["margin"].to_numpy(float) > threshold)
            harmful, benign = (
                estimate_paired_difference(changes[side]) for side in (is_harmful, ~is_harmful)
            )
            contrasts = combine_class_changes(harmful, benign, pairs[is_harmful], pairs[~is_harmful])
            rows.append(
                {
                    "attack": attack,
                    "defense": defense,
                    "threshold": float(threshold),
                    "n_harmful": int(is_harmful.sum()),
                    "n_benign": int((~is_harmful).sum()),
                    "refusal_rate": float(refused[is_harmful].mean()),
                    "over_refusal_rate": float(refused[~is_harmful].mean()),
                    **_make_columns("shift", contrasts.shift),
                    **_make_columns("discrimination", contrasts.discrimination),
                }
            )
    return pd.DataFrame(rows)


def _estimate_query_changes(
    changes: pd.Series | None, queries: pd.DataFrame, column_suffix: str
) -> dict[str, float | None]:
    """Return shift and discrimination of changes per query, in percentage points; empty if a class has none.

    Args:
        changes: change of each query, NaN where it is unknown; changes of changes, from -2 to 2, are halved
            for their intervals, so that they are at most 1.
        queries: `harmful` and `pair` by query.
        column_suffix: behind the names of the estimates.
    """
    if changes is None:
        return {}
    known = changes.dropna()
    is_harmful = queries.loc[known.index, "harmful"].to_numpy(bool)
    if is_harmful.all() or not is_harmful.any():
        return {}
    scale = 2.0 if column_suffix else 1.0
    values, pairs = known.to_numpy(float) / scale, queries.loc[known.index, "pair"]
    harmful, benign = (estimate_paired_difference(values[in_class]) for in_class in (is_harmful, ~is_harmful))
    contrasts = combine_class_changes(harmful, benign, pairs[is_harmful], pairs[~is_harmful])
    columns = {
        **_make_columns(f"response_shift{column_suffix}", contrasts.shift),
        **_make_columns(f"response_discrimination{column_suffix}", contrasts.discrimination),
    }
    return {name: None if value is None else scale * value for name, value in columns.items()}


def _derive_response_verdict(row: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict from the responses of a summary row, and a note on what is inconclusive."""
    if row["defense"] == UNDEFENDED:
        return REFERENCE, ""
    if not row["n_units"] > 0:
        return NOT_JUDGED, "there are no judged responses of both classes, here and undefended"
    verdicts = derive_verdicts(row, RESPONSE_MEASURES, int(row["n_responses"]), "judged responses")
    margin_verdicts = derive_verdicts(row, MARGIN_MEASURES, row["n_harmful"] + row["n_benign"])
    notes = explain_verdicts(verdicts), explain_disagreement(verdicts, margin_verdicts)
    return format_verdicts(verdicts), "; ".join(filter(None, notes))


def group_labels(responses: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    """Return the labels of each condition by query: 1 refused, 0 not refused, NaN unjudged."""
    return {
        (str(attack), str(defense)): rows.set_index("query")["verdict"].map(LABEL_BY_VERDICT)
        for (attack, defense), rows in responses.groupby(["attack", "defense"], sort=False)
    }


def join_labels(scores: ScoreTable, attack: str, defense: str, labels: pd.Series) -> pd.DataFrame:
    """Return the scores of a condition with the labels of its responses, NaN where no response was generated.

    Queries whose response has no verdict are left out. They are no random part of the queries, so the margins
    must not stand in for them.
    """
    unjudged = labels.index[labels.isna()]
    return scores.select_condition(attack, defense).join(labels.rename("label")).drop(index=unjudged)


def estimate_rate(rows: pd.DataFrame) -> PredictionPoweredRate | None:
    """Return the refusal rate of the queries; None if none of their responses was judged.

    Args:
        rows: rows of `join_labels`, of queries of one class.
    """
    labels, is_labeled, predictions, strata = _extract_labels(rows)
    if not is_labeled.any():
        return None
    return estimate_prediction_powered_rate(labels, is_labeled, predictions, strata)


def estimate_change(undefended: pd.DataFrame, defended: pd.DataFrame) -> PredictionPoweredDifference | None:
    """Return the change of the refusal rate; None if no query has judged responses in both conditions.

    Args:
        undefended: rows of `join_labels` of the undefended model.
        defended: those of the defended model, of queries of one class; queries in only one are left out.
    """
    common = undefended.index.intersection(defended.index, sort=False)
    labels_before, is_labeled_before, predictions_before, strata = _extract_labels(undefended.loc[common])
    labels_after, is_labeled_after, predictions_after, _ = _extract_labels(defended.loc[common])
    is_labeled = is_labeled_before & is_labeled_after
    if not is_labeled.any():
        return None
    return estimate_prediction_powered_difference(
        labels_before, labels_after, is_labeled, predictions_before, predictions_after, strata
    )


def _extract_labels(
    rows: pd.DataFrame,
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"], Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Return labels, whether they exist, predictions, and strata (with or without a twin)."""
    labels = rows["label"].to_numpy(float)
    return labels, ~np.isnan(labels), rows["p_refuse"].to_numpy(float), rows["pair"].notna().to_numpy()


def _estimate_rates(condition: pd.DataFrame) -> dict[str, Any]:
    """Return the refusal rate of each class, and the number of responses behind both."""
    row: dict[str, Any] = {"n_responses": int(condition["label"].notna().sum()), "responses_saved": 0.0}
    for is_harmful, name in _RATE_BY_CLASS.items():
        rate = estimate_rate(condition[condition["harmful"] == is_harmful])
        if rate is not None:
            row |= {name: rate.rate, f"{name}_low": rate.low, f"{name}_high": rate.high}
            row["responses_saved"] += rate.responses_saved
    return row


def _estimate_changes(undefended: pd.DataFrame, defended: pd.DataFrame) -> dict[str, float | None]:
    """Return shift and discrimination of the refusal rates, in percentage points."""
    common = undefended.index.intersection(defended.index, sort=False)
    changes: list[PredictionPoweredDifference] = []
    pairs: list[pd.Series] = []
    for is_harmful in (True, False):
        rows = undefended.loc[common]
        rows = rows[rows["harmful"] == is_harmful]
        change = estimate_change(rows, defended)
        if change is None:
            return {}
        changes.append(change)
        pairs.append(rows["pair"])
    contrasts = combine_class_changes(changes[0], changes[1], pairs[0], pairs[1])
    return _make_columns("response_shift", contrasts.shift) | _make_columns(
        "response_discrimination", contrasts.discrimination
    )


def _test_changes(undefended: pd.DataFrame, defended: pd.DataFrame, seed: int) -> dict[str, float]:
    """Return p-values of sign-flip permutations of the judged responses, and the number of units."""
    changes = (defended["label"] - undefended["label"]).dropna()
    is_harmful = undefended.loc[changes.index, "harmful"].to_numpy(bool)
    if is_harmful.all() or not is_harmful.any():
        return {"n_units": 0}
    units = ResamplingUnits.from_pairs(undefended.loc[changes.index, "pair"], is_harmful)
    sign_flips = draw_sign_flips(units, seed)
    contributions = compute_query_contributions(changes.to_numpy(float), is_harmful)
    p_values = {
        f"p_response_{name}": compute_sign_flip_p_value(values, units, sign_flips)
        for name, values in contributions.items()
    }
    return {**p_values, "n_units": len(units.composition)}


def _make_columns(name: str, interval: Interval) -> dict[str, float | None]:
    """Return an interval in the columns of a table."""
    values = (interval.value, interval.low, interval.high)
    return {f"{name}{suffix}": value for suffix, value in zip(INTERVAL_SUFFIXES, values, strict=True)}
