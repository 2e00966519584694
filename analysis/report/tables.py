"""A run's tables as the page shows them: heads, and rows of words, an estimate with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.plots.style import BLUE, VERMILION
from analysis.report.headline import choose_headline_attack
from analysis.report.results import ESTIMATE_COLUMNS, Run
from analysis.stats.format import (
    ColumnFormat,
    format_cell,
    format_defense_name,
    format_estimate,
    format_number,
    format_verdict,
)


def build_summary_tables(run: Run) -> list[HtmlTable]:
    """Return the summary of a run, a table for each attack."""
    found = []
    for attack, rows in run.tables["summary"].groupby("attack", sort=False):
        heads = ("defense", "family", "what the intervals say", *(head for _, head, *_ in ESTIMATE_COLUMNS))
        lines = [
            (
                format_defense_name(row),
                str(row["family"]),
                format_verdict(row),
                *(format_estimate(row, one) for one in ESTIMATE_COLUMNS),
            )
            for row in rows.to_dict("records")
        ]
        sent = "queries sent as they are" if attack == "direct" else f"attack: {attack}"
        marks = tuple(map(str, rows["defense"]))
        found.append(HtmlTable(f"Every defense, {sent}", heads, tuple(lines), marks, str(attack)))
    return found


def build_attack_tables(run: Run) -> list[HtmlTable]:
    """Return defenses × attacks, a table for each rate; nothing where there is one attack."""
    summary = run.tables.get("summary", pd.DataFrame({"attack": []}))
    attacks = list(dict.fromkeys(map(str, summary["attack"])))
    found = []
    for column, head, form, factor, _ in ESTIMATE_COLUMNS[:2] if len(attacks) > 1 else ():
        lines, shades = [], []
        for _, rows in summary.groupby("defense", sort=False):
            by = {str(row["attack"]): row for row in rows.to_dict("records")}
            values = [by.get(one, {}).get(column) for one in attacks]
            doubt = [by.get(one, {}).get("trusted") == "not trusted" for one in attacks]
            words = [
                format_number(one, form, factor) + "?" * odd for one, odd in zip(values, doubt, strict=True)
            ]
            lines.append((format_defense_name(next(iter(by.values()))), *words))
            shades.append(
                tuple(
                    "transparent" if odd else choose_cell_color(one, column)
                    for one, odd in zip(values, doubt, strict=True)
                )
            )
        heads = ("defense", *("no attack" if one == "direct" else one for one in attacks))
        title = f"{head[0].upper()}{head[1:]}"
        title += "; ?: generated text contradicts the readout" * any(
            "?" in one for row in lines for one in row
        )
        found.append(HtmlTable(title, heads, tuple(lines), cell_colors=tuple(shades)))
    return found


def build_cost_tables(run: Run) -> list[HtmlTable]:
    """Return what each defense costs, where that was measured."""
    columns: tuple[ColumnFormat, ...] = (
        ("tokens_added", "tokens added", "+.0f", 1, False),
        ("calls", "calls", "g", 1, False),
        ("prefill_ratio", "time to first token (× undefended)", ".2f", 1, True),
        ("token_ratio", "time of a further token (× undefended)", ".2f", 1, True),
    )
    return _build_plain_tables(run, "cost", "Cost, each query alone", ("defense",), columns)


def build_validity_tables(run: Run) -> list[HtmlTable]:
    """Return where generated text agrees with the readout, where that was measured."""
    columns: tuple[ColumnFormat, ...] = (
        ("n", "answers", ".0f", 1, False),
        ("refused", "refused by their text", ".0f", 1, False),
        ("readout_refused", "by the readout", ".0f", 1, False),
        ("auroc", "AUROC against the text", ".2f", 1, True),
        ("kappa", "Cohen's κ", ".2f", 1, True),
    )
    names = ("defense", "attack", "readout", "trusted")
    return _build_plain_tables(run, "validity", "Does generated text agree with the readout?", names, columns)


def build_ensemble_tables(run: Run) -> list[HtmlTable]:
    """Return the front of defenses and ensembles, and what was recommended, where they were compared."""
    columns: tuple[ColumnFormat, ...] = (
        ("harmful_test", "harmful refused (%)", ".0f", 100, False),
        ("benign_test", "benign answered (%)", ".0f", 100, False),
        ("cost", "time to first token (× undefended)", ".2f", 1, False),
    )
    names = ("members", "how", "kind")
    found = _build_plain_tables(
        run, "candidates", "On the front: no other is better in all three", names, columns
    )
    limited: tuple[ColumnFormat, ...] = (
        ("harmful", "harmful refused (%)", ".0f", 100, True),
        ("over_refusal", "benign refused (%)", ".0f", 100, True),
        ("p_meets", "how sure to meet the limit (%)", ".0f", 100, False),
    )
    for stem in run.tables:
        if stem.startswith("recommendation"):
            most = stem.removeprefix("recommendation").strip("-")
            title = "Recommended" + f" where at most {most} % of benign queries may be refused" * bool(most)
            found += _build_plain_tables(run, stem, title, ("role", "members", "how"), limited)
    return found


def compare_runs(runs: Sequence[Run]) -> tuple[HtmlTable | None, list[dict[str, Any]]]:
    """Return what several runs say of the same defenses: a table, and the points of a chart.

    Only what is free of a model's scale is compared: rates, ΔAUROC and verdicts, not nats.
    """
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    with_summary = [run for run in runs if "summary" in run.tables]
    for run in with_summary:
        summary = run.tables["summary"]
        for row in summary[summary["attack"] == choose_headline_attack(summary)].to_dict("records"):
            rows.setdefault(str(row["defense"]), {})[run.name] = {str(key): one for key, one in row.items()}
    shared = {name: by for name, by in rows.items() if len(by) > 1}
    columns = [ESTIMATE_COLUMNS[0], ESTIMATE_COLUMNS[1], ESTIMATE_COLUMNS[3]]
    lines = tuple(
        (format_defense_name(row), of, format_verdict(row), *(format_estimate(row, one) for one in columns))
        for by in shared.values()
        for of, row in by.items()
    )
    points = [
        {
            "name": name,
            "run": of,
            **{k: row[f"delta_auroc{end}"] for k, end in (("v", ""), ("l", "_low"), ("h", "_high"))},
        }
        for name, by in shared.items()
        for of, row in by.items()
        if name != "none"
    ]
    heads = ("defense", "run", "what the intervals say", *(head for _, head, *_ in columns))
    return (HtmlTable("Defenses that several runs read", heads, lines) if lines else None), points


def _build_plain_tables(
    run: Run, stem: str, title: str, name_columns: Sequence[str], number_columns: Sequence[ColumnFormat]
) -> list[HtmlTable]:
    """A table with some of its columns; nothing where the run has no such table."""
    table = run.tables.get(stem, pd.DataFrame())
    if "on_front" in table and stem == "candidates":
        table = table[table["on_front"].astype(bool)]
    name_columns = [name for name in name_columns if name in table]
    there = [one for one in number_columns if one[0] in table]
    if not len(table) or not there:
        return []
    heads = (*name_columns, *(head for _, head, *_ in there))
    lines = [
        (
            *(format_cell(row[name], name) for name in name_columns),
            *(format_estimate(row, one) for one in there),
        )
        for row in table.to_dict("records")
    ]
    return [HtmlTable(title, heads, tuple(lines))]


_RATE_COLORS = {"refusal_rate": BLUE, "over_refusal_rate": VERMILION}


@dataclass(frozen=True)
class HtmlTable:
    """A table of the page.

    Attributes:
        title: above it.
        headers: of its columns.
        rows: words, the first ones a name.
        linked_defenses: of each row, what its name leads to: a defense; empty where it leads nowhere.
        attack: under which; empty where it is not of one.
        cell_colors: of each row's numbers, a color and how much of it; None where cells are plain.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    linked_defenses: tuple[str, ...] = ()
    attack: str = ""
    cell_colors: tuple[tuple[str, ...], ...] | None = None


def choose_cell_color(value: float | None, column: str) -> str:
    """Return a color and how much of it, for the background of a cell."""
    if value is None or value != value:
        return "transparent"
    return f"{_RATE_COLORS[column]}{round(150 * value):02x}"
