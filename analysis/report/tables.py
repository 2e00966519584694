"""Tables of the report: headers and rows of text, with each estimate next to its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.families import format_family
from analysis.plots.style import BLUE, VERMILION
from analysis.report.headline import choose_headline_attack
from analysis.report.results import DELTA_AUROC_COLUMN, RATE_COLUMNS, Run, choose_estimate_columns
from analysis.stats.format import (
    ColumnFormat,
    format_cell,
    format_defense_name,
    format_estimate,
    format_number,
    format_verdict,
)
from analysis.stats.tables import DIRECT, UNDEFENDED, Basis, Trust

_RATE_COLORS = {"refusal_rate": BLUE, "over_refusal_rate": VERMILION}


@dataclass(frozen=True)
class HtmlTable:
    """A table of the report.

    Attributes:
        title: caption above the table.
        headers: of its columns.
        rows: text of each cell; the first cell of a row is its name.
        linked_defenses: for each row, the defense that its name links to; empty without links.
        attack: the attack of all rows; empty for a table without a single attack.
        cell_colors: for each row, CSS background colors of the cells after its name; None without colors.
        notes: for each row, an explanation of its verdict that is folded below it; empty without notes.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    linked_defenses: tuple[str, ...] = ()
    attack: str = ""
    cell_colors: tuple[tuple[str, ...], ...] | None = None
    notes: tuple[str, ...] = ()


def build_summary_tables(run: Run) -> list[HtmlTable]:
    """Return the summary of a run, one table per attack."""
    columns = choose_estimate_columns(run.tables["summary"])
    headers = ("defense", "family", "verdict", *(header for _, header, *_ in columns))
    tables = []
    for attack, group in run.tables["summary"].groupby("attack", sort=False):
        rows = tuple(
            (
                format_defense_name(row),
                format_family(str(row["family"])),
                format_verdict(row),
                *(format_estimate(row, column) for column in columns),
            )
            for row in group.to_dict("records")
        )
        condition = "no attack" if attack == DIRECT else f"attack: {attack}"
        links = tuple(map(str, group["defense"]))
        notes = tuple(group["verdict_note"].astype(object).fillna("")) if "verdict_note" in group else ()
        title = f"All defenses, {condition}"
        tables.append(HtmlTable(title, headers, rows, links, str(attack), notes=notes))
    return tables


def build_attack_tables(run: Run) -> list[HtmlTable]:
    """Return defenses × attacks, one table per rate; no table for a run with a single attack."""
    summary = run.tables.get("summary", pd.DataFrame({"attack": []}))
    attacks = list(dict.fromkeys(map(str, summary["attack"])))
    if len(attacks) < 2:
        return []
    return [_build_attack_table(summary, attacks, column) for column in RATE_COLUMNS]


def _build_attack_table(summary: pd.DataFrame, attacks: Sequence[str], column: ColumnFormat) -> HtmlTable:
    """Return one rate of each defense under each attack; untrusted values get a question mark, no color.

    Rates of judged responses need no trust in the readout.
    """
    name, header, format_spec, scale, _ = column
    rows, colors = [], []
    for _, group in summary.groupby("defense", sort=False):
        rows_by_attack = {str(row["attack"]): row for row in group.to_dict("records")}
        values = [rows_by_attack.get(attack, {}).get(name) for attack in attacks]
        conditions = [rows_by_attack.get(attack, {}) for attack in attacks]
        is_untrusted = [
            condition.get("trusted") == Trust.NOT_TRUSTED and condition.get("based_on") != Basis.RESPONSES
            for condition in conditions
        ]
        cells = [
            format_number(value, format_spec, scale) + "?" * untrusted
            for value, untrusted in zip(values, is_untrusted, strict=True)
        ]
        rows.append((format_defense_name(next(iter(rows_by_attack.values()))), *cells))
        colors.append(
            tuple(
                "transparent" if untrusted else choose_cell_color(value, name)
                for value, untrusted in zip(values, is_untrusted, strict=True)
            )
        )
    title = f"{header[0].upper()}{header[1:]}"
    if any("?" in cell for row in rows for cell in row):
        title += "; ?: generated text contradicts the readout"
    headers = ("defense", *("no attack" if attack == DIRECT else attack for attack in attacks))
    return HtmlTable(title, headers, tuple(rows), cell_colors=tuple(colors))


def choose_cell_color(value: float | None, column: str) -> str:
    """Return the CSS background color of a rate; its opacity grows with the rate."""
    if value is None or value != value:
        return "transparent"
    return f"{_RATE_COLORS[column]}{round(150 * value):02x}"


def build_kind_tables(run: Run) -> list[HtmlTable]:
    """Return defenses × kinds of benign queries: refusal rate and change of AUROC, two tables per attack.

    No table for a run with a single kind.
    """
    table = run.tables.get("kinds", pd.DataFrame({"kind": []}))
    if table["kind"].nunique() < 2:
        return []
    columns = (RATE_COLUMNS[1], DELTA_AUROC_COLUMN)
    return [
        _build_kind_table(rows, str(attack), column)
        for attack, rows in table.groupby("attack", sort=False)
        for column in columns
    ]


def _build_kind_table(rows: pd.DataFrame, attack: str, column: ColumnFormat) -> HtmlTable:
    """Return one estimate of each defense on each kind under one attack; rates are colored."""
    name, header, *_ = column
    sizes = {str(kind): int(n) for kind, n in rows.groupby("kind", sort=False)["n"].max().items()}
    cells, colors = [], []
    for _, group in rows.groupby("defense", sort=False):
        row_by_kind = {str(row["kind"]): row for row in group.to_dict("records")}
        known = [row_by_kind.get(kind, {name: None}) for kind in sizes]
        condition = format_defense_name(next(iter(row_by_kind.values())))
        cells.append((condition, *(format_estimate(row, column) for row in known)))
        if name in _RATE_COLORS:
            colors.append(tuple(choose_cell_color(row[name], name) for row in known))
    title = f"{header[0].upper()}{header[1:]}, by kind of benign query"
    if attack != DIRECT:
        title += f"; attack: {attack}"
    headers = ("defense", *(f"{kind} (n = {n})" for kind, n in sizes.items()))
    return HtmlTable(title, headers, tuple(cells), cell_colors=tuple(colors) or None)


def build_control_tables(run: Run) -> list[HtmlTable]:
    """Return what each defense does beyond its matched control, a table per attack; none without controls."""
    summary = run.tables.get("summary", pd.DataFrame({"attack": []}))
    if "control" not in summary:
        return []
    rows = summary[summary["control"].notna()]
    responses: tuple[ColumnFormat, ...] = (
        ("response_shift_over_control", "shift over control, points", "+.0f", 1, True),
        ("response_discrimination_over_control", "discrimination over control, points", "+.0f", 1, True),
    )
    margins: tuple[ColumnFormat, ...] = (
        ("shift_over_control", "shift over control, nats", "+.2f", 1, True),
        ("discrimination_over_control", "discrimination over control, nats", "+.2f", 1, True),
    )
    columns = (*(responses if rows["response_shift_over_control"].notna().any() else ()), *margins)
    headers = ("defense", "control", "verdict over control", "comparison", *(name for _, name, *_ in columns))
    tables = []
    for attack, group in rows.groupby("attack", sort=False):
        cells = tuple(
            (
                format_defense_name(row),
                *(str(row[name]) for name in ("control", "verdict_over_control", "control_note")),
                *(format_estimate(row, column) for column in columns),
            )
            for row in group.to_dict("records")
        )
        title = "Each defense minus other content of the same size"
        if attack != DIRECT:
            title += f"; attack: {attack}"
        tables.append(HtmlTable(title, headers, cells))
    return tables


def build_model_tables(run: Run) -> list[HtmlTable]:
    """Return whether findings hold on all models, their means, and the order; none for a single model."""
    means: tuple[ColumnFormat, ...] = (
        ("n_models", "models", ".0f", 1, False),
        ("mean", "mean over models", "+.2f", 1, True),
        ("between_sd", "SD between models", ".2f", 1, False),
        ("i_squared", "I² (%)", ".0f", 100, False),
        ("prediction_low", "another model, from", "+.2f", 1, False),
        ("prediction_high", "to", "+.2f", 1, False),
    )
    order: tuple[ColumnFormat, ...] = (
        ("n_defenses", "defenses", ".0f", 1, False),
        ("tau", "Kendall's τ", "+.2f", 1, True),
    )
    findings = run.tables.get("findings", pd.DataFrame())
    headers = ("defense", "attack", "models", "shift", "discrimination", "finding")
    rows = tuple(
        tuple(str(row[name]) for name in ("defense", "attack", "n_models", *headers[3:]))
        for row in findings.to_dict("records")
    )
    tables = [HtmlTable("Does each finding hold on all models?", headers, rows)] if rows else []
    names = ("defense", "attack", "effect", "unit")
    title = "Means over models (random effects); points: judged responses, SD: margins"
    tables += _build_plain_tables(run, "pooled", title, names, means)
    names = ("first", "second", "attack", "measure")
    return tables + _build_plain_tables(run, "order", "Agreement on the order of the defenses", names, order)


def build_cost_tables(run: Run) -> list[HtmlTable]:
    """Return the cost of each defense; no table if it was not measured."""
    columns: tuple[ColumnFormat, ...] = (
        ("tokens_added", "tokens added", "+.0f", 1, False),
        ("calls", "calls", "g", 1, False),
        ("prefill_ratio", "time to first token (× undefended)", ".2f", 1, True),
        ("token_ratio", "time per further token (× undefended)", ".2f", 1, True),
    )
    return _build_plain_tables(run, "cost", "Cost, one query at a time", ("defense",), columns)


def build_depth_tables(run: Run) -> list[HtmlTable]:
    """Return the rates and effects after the first tokens of an opener; no table if none were measured."""
    columns: tuple[ColumnFormat, ...] = (
        *RATE_COLUMNS,
        ("response_shift", "shift (points)", "+.0f", 1, True),
        ("response_discrimination", "discrimination (points)", "+.0f", 1, True),
        ("response_shift_since_0", "shift, change since 0 tokens", "+.0f", 1, True),
        ("response_discrimination_since_0", "discrimination, change since 0 tokens", "+.0f", 1, True),
    )
    names = ("defense", "attack", "prefix", "tokens")
    title = "Responses after the first tokens of a complying or a refusing opener"
    return _build_plain_tables(run, "depth", title, names, columns)


def build_validity_tables(run: Run) -> list[HtmlTable]:
    """Return the agreement of readouts with generated text; no table if it was not measured."""
    columns: tuple[ColumnFormat, ...] = (
        ("n", "responses", ".0f", 1, False),
        ("refused", "refused by text", ".0f", 1, False),
        ("readout_refused", "refused by readout", ".0f", 1, False),
        ("auroc", "AUROC against text", ".2f", 1, True),
        ("kappa", "Cohen's κ", ".2f", 1, True),
        ("rate_error_harmful", "rate error, harmful (points)", "+.0f", 100, True),
        ("rate_error_benign", "rate error, benign (points)", "+.0f", 100, True),
        ("n_needed", "queries per class needed for rates", ",.0f", 1, False),
        ("threshold", "threshold (nats)", "+.2f", 1, False),
        ("needed_threshold", "threshold needed (nats)", "+.2f", 1, True),
    )
    headers = {"trusted": "single queries", "rate_trusted": "rates"}
    tables = {"validity": run.tables.get("validity", pd.DataFrame()).rename(columns=headers)}
    names = ("defense", "attack", "readout", *headers.values())
    title = "Agreement of readout and generated text, and what it can be trusted for"
    return _build_plain_tables(replace(run, tables=tables), "validity", title, names, columns)


def build_ensemble_tables(run: Run) -> list[HtmlTable]:
    """Return the Pareto front of defenses and ensembles, and the recommendations, if the run has them."""
    front_columns: tuple[ColumnFormat, ...] = (
        # `benign_test` is the share of benign queries that are answered.
        ("harmful_test", "harmful refused (%)", ".0f", 100, False),
        ("benign_test", "benign answered (%)", ".0f", 100, False),
        ("cost", "time to first token (× undefended)", ".2f", 1, False),
    )
    front_title = "Pareto front: no other candidate is better in all three"
    tables = _build_plain_tables(run, "candidates", front_title, ("members", "how", "kind"), front_columns)
    pick_columns: tuple[ColumnFormat, ...] = (
        ("harmful", "harmful refused (%)", ".0f", 100, True),
        ("over_refusal", "benign refused (%)", ".0f", 100, True),
        ("p_meets", "probability of meeting the limit (%)", ".0f", 100, False),
    )
    for stem in run.tables:
        if stem.startswith("recommendation"):
            limit = stem.removeprefix("recommendation").strip("-")
            title = "Recommendation" + f", at most {limit} % of benign queries refused" * bool(limit)
            if "guarantee" in run.record:
                based_on = f"refusals by {run.record['guarantee_based_on']}"
                title += f". {run.record['guarantee'].removesuffix('.')} ({based_on})"
            tables += _build_plain_tables(run, stem, title, ("role", "members", "how"), pick_columns)
    return tables


def compare_runs(runs: Sequence[Run]) -> tuple[HtmlTable | None, list[dict[str, Any]]]:
    """Compare the defenses that several runs share: a table, and the points of a chart.

    Only quantities that do not depend on a model's scale are compared: rates, ΔAUROC and verdicts, not nats.
    """
    rows_by_defense: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if "summary" not in run.tables:
            continue
        summary = run.tables["summary"]
        for row in summary[summary["attack"] == choose_headline_attack(summary)].to_dict("records"):
            row_by_name = {str(name): value for name, value in row.items()}
            rows_by_defense.setdefault(str(row["defense"]), {})[run.name] = row_by_name
    shared = {
        defense: rows_by_run for defense, rows_by_run in rows_by_defense.items() if len(rows_by_run) > 1
    }
    columns = [*RATE_COLUMNS, DELTA_AUROC_COLUMN]
    rows = tuple(
        (
            format_defense_name(row),
            run_name,
            format_verdict(row),
            "responses" if row.get("based_on") == Basis.RESPONSES else "readout",
            *(format_estimate(row, column) for column in columns),
        )
        for rows_by_run in shared.values()
        for run_name, row in rows_by_run.items()
    )
    points = [
        {
            "name": defense,
            "run": run_name,
            "value": row["delta_auroc"],
            "low": row["delta_auroc_low"],
            "high": row["delta_auroc_high"],
        }
        for defense, rows_by_run in shared.items()
        for run_name, row in rows_by_run.items()
        if defense != UNDEFENDED
    ]
    headers = ("defense", "run", "verdict", "rates by", *(header for _, header, *_ in columns))
    return (HtmlTable("Defenses shared by several runs", headers, rows) if rows else None), points


def _build_plain_tables(
    run: Run, stem: str, title: str, name_columns: Sequence[str], number_columns: Sequence[ColumnFormat]
) -> list[HtmlTable]:
    """Return selected columns of a run's table; no table if the run lacks it."""
    table = run.tables.get(stem, pd.DataFrame())
    if "on_front" in table and stem == "candidates":
        table = table[table["on_front"].astype(bool)]
    names = [name for name in name_columns if name in table]
    numbers = [column for column in number_columns if column[0] in table]
    if not len(table) or not numbers:
        return []
    headers = (*names, *(header for _, header, *_ in numbers))
    rows = tuple(
        (
            *(format_cell(row[name], name) for name in names),
            *(format_estimate(row, column) for column in numbers),
        )
        for row in table.to_dict("records")
    )
    return [HtmlTable(title, headers, rows)]
