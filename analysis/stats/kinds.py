"""Results by kind of benign query: over-refusal, change of the margin, and AUROC against harmful queries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from analysis.stats.bootstrap import (
    BOOTSTRAP_DRAWS,
    DrawVector,
    ResamplingUnits,
    ResamplingWeights,
    make_estimate_columns,
)
from analysis.stats.effects import compute_estimates
from analysis.stats.response_rates import estimate_change, estimate_rate, group_labels, join_labels
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, Basis, ScoreTable

_KEYS = ("attack", "defense", "kind")
_RATE_NAMES = ("over_refusal_rate", "over_refusal_change")
_READOUT_NAMES = tuple(f"readout_{name}" for name in _RATE_NAMES)
_MARGIN_NAMES = ("margin_change", "auroc", "delta_auroc")
_PERCENTAGE_POINTS = 100.0


def summarize_kinds(
    scores: ScoreTable,
    query_kinds: Mapping[str, str],
    responses: pd.DataFrame | None = None,
    seed: int = 0,
    n_draws: int = BOOTSTRAP_DRAWS,
) -> pd.DataFrame:
    """Return what each defense does to each kind of benign query, with 95 % intervals.

    Args:
        scores: scores of a run, those of the undefended model included.
        query_kinds: kind of each query.
        responses: verdicts as for `summarize_responses`; None if no response was judged.
        seed: seed of the bootstrap.
        n_draws: number of bootstrap draws.

    Returns:
        A row per attack, defense and kind: number of its queries (`n`), of harmful queries and of judged
        responses of the kind; the share of the kind that is refused (0 to 1) and its change (percentage
        points), both by the responses, or by the readout if none was judged (`based_on`), and in the columns
        `readout_...` always by the readout; the mean change of the margin (nats); the AUROC of the margin,
        harmful queries against this kind, and its change. Changes are against the undefended model on the
        same queries, and missing for that model. Rates of responses are missing in a condition without
        judged responses.
    """
    queries = scores.frame.drop_duplicates("query").set_index("query")["harmful"]
    kinds = queries.index.to_series().map(query_kinds).mask(queries)
    rows = [
        row
        for attack in scores.frame["attack"].unique()
        for kind in kinds.dropna().unique()
        for row in _compare_margins(scores, attack, kind, kinds, seed, n_draws)
    ]
    places = {key: place for place, key in enumerate(scores.condition_keys)}
    rows.sort(key=lambda row: places[row["attack"], row["defense"]])
    frame = pd.DataFrame(rows)
    if responses is None:
        frame = frame.assign(based_on=Basis.MARGINS.value, n_responses=0)
        by_readout = frame.filter(like="readout_")
        frame = frame.join(by_readout.rename(columns=lambda name: name.removeprefix("readout_")))
    else:
        rates = pd.DataFrame(
            _count_responses(scores, kinds, responses),
            columns=[*_KEYS, "n_responses", *_list_columns(_RATE_NAMES)],
        )
        frame = frame.assign(based_on=Basis.RESPONSES.value).merge(rates, "left", [*_KEYS])
        frame["n_responses"] = frame["n_responses"].fillna(0).astype(int)
    counts = ("family", "n", "n_harmful", "n_responses", "based_on")
    names = (*_RATE_NAMES, *_READOUT_NAMES, *_MARGIN_NAMES)
    return frame.reindex(columns=[*_KEYS, *counts, *_list_columns(names)])


def list_kinds(columns: Iterable[str], pattern: str) -> list[str]:
    """Return the kinds of benign queries that the columns of a table name, in their order.

    >>> list_kinds(["refused_harmful_low", "refused_twin", "refused_twin_low"], "refused_{}_low")
    ['twin']

    Args:
        columns: names of the columns.
        pattern: name of one column of each kind, with `{}` in place of the kind.
    """
    prefix, _, suffix = pattern.partition("{}")
    kinds = [
        name.removeprefix(prefix).removesuffix(suffix)
        for name in columns
        if name.startswith(prefix) and name.endswith(suffix)
    ]
    return [kind for kind in kinds if kind != "harmful"]


def _list_columns(names: tuple[str, ...]) -> list[str]:
    """Return the columns of estimates and of their intervals."""
    return [f"{name}{suffix}" for name in names for suffix in INTERVAL_SUFFIXES]


def _compare_margins(
    scores: ScoreTable, attack: str, kind: str, kinds: pd.Series, seed: int, n_draws: int
) -> Iterator[dict[str, Any]]:
    """Yield the estimates of each condition from the margins of harmful queries and of one benign kind."""
    undefended = scores.select_condition(attack, UNDEFENDED)
    is_member = undefended["harmful"] | (kinds.loc[undefended.index] == kind)
    undefended = undefended[is_member]
    margins_before, is_harmful = undefended["margin"].to_numpy(float), undefended["harmful"].to_numpy(bool)
    units = ResamplingUnits.from_pairs(undefended["pair"], is_harmful)
    observed, draws = (
        ResamplingWeights.from_observed(units),
        ResamplingWeights.from_bootstrap(units, n_draws, seed),
    )
    samples = (scores.threshold, observed), (scores.draw_thresholds(n_draws, seed), draws)
    references = [
        compute_estimates(margins_before, margins_before, is_harmful, threshold, weights, is_undefended=True)
        for threshold, weights in samples
    ]
    n_harmful, n = int(is_harmful.sum()), int((~is_harmful).sum())
    for defense in [name for attack_name, name in scores.condition_keys if attack_name == attack]:
        row: dict[str, Any] = {"attack": attack, "defense": defense, "family": scores.get_family(defense)}
        row |= {"kind": kind, "n": n, "n_harmful": n_harmful}
        margins = scores.select_condition(attack, defense).loc[undefended.index, "margin"].to_numpy(float)
        estimates = (
            references
            if defense == UNDEFENDED
            else [
                compute_estimates(margins_before, margins, is_harmful, threshold, weights)
                for threshold, weights in samples
            ]
        )
        points, clouds = map(_select_estimates, estimates, references)
        names = ("readout_over_refusal_rate", "auroc") if defense == UNDEFENDED else points
        for name in names:
            size = min(n, n_harmful) if name.endswith("auroc") else n
            row |= make_estimate_columns(name, points[name], clouds[name], size, name != "margin_change")
        yield row


def _select_estimates(
    estimates: Mapping[str, DrawVector], reference: Mapping[str, DrawVector]
) -> dict[str, DrawVector]:
    """Return the estimates of a kind from those of a classifier whose benign class is this kind."""
    rate = estimates["over_refusal_rate"]
    return {
        "readout_over_refusal_rate": rate,
        "readout_over_refusal_change": _PERCENTAGE_POINTS * (rate - reference["over_refusal_rate"]),
        # Shift is the mean of the changes of the classes, discrimination harmful minus benign.
        "margin_change": estimates["shift"] - estimates["discrimination"] / 2,
        "auroc": estimates["auroc"],
        "delta_auroc": estimates["delta_auroc"],
    }


def _count_responses(
    scores: ScoreTable, kinds: pd.Series, responses: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    """Yield refusal rate and change of the judged responses of each condition and benign kind."""
    conditions = {key: join_labels(scores, *key, labels) for key, labels in group_labels(responses).items()}
    for (attack, defense), condition in conditions.items():
        undefended = conditions.get((attack, UNDEFENDED), condition.iloc[:0])
        for kind, rows in condition.groupby(kinds, sort=False):
            row: dict[str, Any] = {"attack": attack, "defense": defense, "kind": kind}
            row["n_responses"] = int(rows["label"].notna().sum())
            if rate := estimate_rate(rows):
                row |= dict(
                    zip(_list_columns(_RATE_NAMES[:1]), (rate.rate, rate.low, rate.high), strict=True)
                )
            change = estimate_change(undefended, rows) if defense != UNDEFENDED else None
            if change:
                ends = (change.difference, change.low, change.high)
                values = [_PERCENTAGE_POINTS * value for value in ends]
                row |= dict(zip(_list_columns(_RATE_NAMES[1:]), values, strict=True))
            yield row
