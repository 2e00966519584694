"""A run's tables as the page shows them: heads, and rows of words, an estimate with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.cells import Column, Shown, named, number, shade, told, verdict, word
from analysis.folder import ESTIMATES, Run
from analysis.headline import first_attack


def summaries(run: Run) -> list[Shown]:
    """Return the summary of a run, a table for each attack."""
    found = []
    for attack, rows in run.tables["summary"].groupby("attack", sort=False):
        heads = ("defense", "family", "what the intervals say", *(head for _, head, *_ in ESTIMATES))
        lines = [
            (named(row), str(row["family"]), verdict(row), *(told(row, one) for one in ESTIMATES))
            for row in rows.to_dict("records")
        ]
        sent = "queries sent as they are" if attack == "direct" else f"attack: {attack}"
        marks = tuple(map(str, rows["defense"]))
        found.append(Shown(f"Every defense, {sent}", heads, tuple(lines), marks, str(attack)))
    return found


def against_attacks(run: Run) -> list[Shown]:
    """Return defenses × attacks, a table for each rate; nothing where there is one attack."""
    summary = run.tables.get("summary", pd.DataFrame({"attack": []}))
    attacks = list(dict.fromkeys(map(str, summary["attack"])))
    found = []
    for column, head, form, factor, _ in ESTIMATES[:2] if len(attacks) > 1 else ():
        lines, shades = [], []
        for _, rows in summary.groupby("defense", sort=False):
            by = {str(row["attack"]): row for row in rows.to_dict("records")}
            values = [by.get(one, {}).get(column) for one in attacks]
            doubt = [by.get(one, {}).get("trusted") == "not trusted" for one in attacks]
            words = [number(one, form, factor) + "?" * odd for one, odd in zip(values, doubt, strict=True)]
            lines.append((named(next(iter(by.values()))), *words))
            shades.append(
                tuple(
                    "transparent" if odd else shade(one, column)
                    for one, odd in zip(values, doubt, strict=True)
                )
            )
        heads = ("defense", *("no attack" if one == "direct" else one for one in attacks))
        title = f"{head[0].upper()}{head[1:]}"
        title += "; ?: generated text contradicts the readout" * any(
            "?" in one for row in lines for one in row
        )
        found.append(Shown(title, heads, tuple(lines), shades=tuple(shades)))
    return found


def costs(run: Run) -> list[Shown]:
    """Return what each defense costs, where that was measured."""
    columns: tuple[Column, ...] = (
        ("tokens_added", "tokens added", "+.0f", 1, False),
        ("calls", "calls", "g", 1, False),
        ("prefill_ratio", "time to first token (× undefended)", ".2f", 1, True),
        ("token_ratio", "time of a further token (× undefended)", ".2f", 1, True),
    )
    return _plain(run, "cost", "Cost, each query alone", ("defense",), columns)


def validity(run: Run) -> list[Shown]:
    """Return where generated text agrees with the readout, where that was measured."""
    columns: tuple[Column, ...] = (
        ("n", "answers", ".0f", 1, False),
        ("refused", "refused by their text", ".0f", 1, False),
        ("readout_refused", "by the readout", ".0f", 1, False),
        ("auroc", "AUROC against the text", ".2f", 1, True),
        ("kappa", "Cohen's κ", ".2f", 1, True),
    )
    names = ("defense", "attack", "readout", "trusted")
    return _plain(run, "validity", "Does generated text agree with the readout?", names, columns)


def ensembles(run: Run) -> list[Shown]:
    """Return the front of defenses and ensembles, and what was recommended, where they were compared."""
    columns: tuple[Column, ...] = (
        ("harmful_test", "harmful refused (%)", ".0f", 100, False),
        ("benign_test", "benign answered (%)", ".0f", 100, False),
        ("cost", "time to first token (× undefended)", ".2f", 1, False),
    )
    names = ("members", "how", "kind")
    found = _plain(run, "candidates", "On the front: no other is better in all three", names, columns)
    limited: tuple[Column, ...] = (
        ("harmful", "harmful refused (%)", ".0f", 100, True),
        ("over_refusal", "benign refused (%)", ".0f", 100, True),
        ("p_meets", "how sure to meet the limit (%)", ".0f", 100, False),
    )
    for stem in run.tables:
        if stem.startswith("recommendation"):
            most = stem.removeprefix("recommendation").strip("-")
            title = "Recommended" + f" where at most {most} % of benign queries may be refused" * bool(most)
            found += _plain(run, stem, title, ("role", "members", "how"), limited)
    return found


def across(runs: Sequence[Run]) -> tuple[Shown | None, list[dict[str, Any]]]:
    """Return what several runs say of the same defenses: a table, and the points of a chart.

    Only what is free of a model's scale is compared: rates, ΔAUROC and verdicts, not nats.
    """
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    with_summary = [run for run in runs if "summary" in run.tables]
    for run in with_summary:
        summary = run.tables["summary"]
        for row in summary[summary["attack"] == first_attack(summary)].to_dict("records"):
            rows.setdefault(str(row["defense"]), {})[run.name] = {str(key): one for key, one in row.items()}
    shared = {name: by for name, by in rows.items() if len(by) > 1}
    columns = [ESTIMATES[0], ESTIMATES[1], ESTIMATES[3]]
    lines = tuple(
        (named(row), of, verdict(row), *(told(row, one) for one in columns))
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
    return (Shown("Defenses that several runs read", heads, lines) if lines else None), points


def _plain(run: Run, stem: str, title: str, names: Sequence[str], columns: Sequence[Column]) -> list[Shown]:
    """A table with some of its columns; nothing where the run has no such table."""
    table = run.tables.get(stem, pd.DataFrame())
    if "on_front" in table and stem == "candidates":
        table = table[table["on_front"].astype(bool)]
    names = [name for name in names if name in table]
    there = [one for one in columns if one[0] in table]
    if not len(table) or not there:
        return []
    heads = (*names, *(head for _, head, *_ in there))
    lines = [
        (*(word(row[name], name) for name in names), *(told(row, one) for one in there))
        for row in table.to_dict("records")
    ]
    return [Shown(title, heads, tuple(lines))]
