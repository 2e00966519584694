"""The tables of README and docs state what the stored runs say.

`REWRITE=1 pytest tests/test_result_tables.py` rewrites them after a new run; check the difference before you
commit it. Which rows a table has, and in which order, is up to the page.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest

from analysis.stats.format import format_interval
from analysis.stats.tables import UNDEFENDED

ROOT = Path(__file__).resolve().parent.parent
Row = Mapping[str, Any]
FormatCell = Callable[[Row], str]


class ResultTable(NamedTuple):
    """A table of a page that is made from a table of a run.

    Attributes:
        page: file of the page.
        caption: text in front of the table, at which it is found.
        source: file of the run's table, below figures/.
        key: columns that the first cells of a row give.
        cells: format of each other cell.
    """

    page: str
    caption: str
    source: str
    key: tuple[str, ...]
    cells: tuple[FormatCell, ...]


def read_text(column: str) -> FormatCell:
    """Return the format of a text; a dash if it is missing."""
    return lambda row: str(row[column]) if row[column] == row[column] else "–"


def read_estimate(column: str, format_spec: str, scale: float = 1) -> FormatCell:
    """Return the format of an estimate with its interval."""
    return partial(format_interval, column=column, format_spec=format_spec, scale=scale)


def read_effect(cell: FormatCell) -> FormatCell:
    """Return a format that shows a dash for the undefended model, which has no effect."""
    return lambda row: "–" if row["defense"] == UNDEFENDED else cell(row)


def read_percents(*columns: str) -> FormatCell:
    """Return the format of percentages without intervals, separated by slashes."""

    def format_cell(row: Row) -> str:
        if any(row[column] != row[column] for column in columns):
            return "–"
        return " / ".join(f"{100 * row[column]:.0f}" for column in columns)

    return format_cell


RATES = (read_estimate("refusal_rate", ".0f", 100), read_estimate("over_refusal_rate", ".0f", 100))
EFFECTS = (
    read_estimate("response_shift", "+.0f"),
    read_estimate("response_discrimination", "+.0f"),
)
CONTROLS = (
    read_percents("refusal_rate", "over_refusal_rate"),
    read_percents("control_refusal_rate", "control_over_refusal_rate"),
    EFFECTS[0],
    read_estimate("response_shift_over_control", "+.0f"),
    EFFECTS[1],
    read_estimate("response_discrimination_over_control", "+.0f"),
    read_estimate("shift_over_control", "+.2f"),
    read_effect(read_text("verdict_over_control")),
)
TABLES = (
    ResultTable(
        "README.md",
        "## Results on the embedded model",
        "controls/summary.csv",
        ("defense",),
        (*RATES, *EFFECTS, read_text("verdict"), read_effect(read_text("verdict_over_control"))),
    ),
    ResultTable(
        "docs/results.md",
        "SmolLM2 as released ([figures/controls]",
        "controls/summary.csv",
        ("defense",),
        CONTROLS,
    ),
    ResultTable(
        "docs/results.md",
        "The aligned model ([figures/controls-aligned]",
        "controls-aligned/summary.csv",
        ("defense",),
        CONTROLS,
    ),
    ResultTable(
        "docs/results.md",
        "## Detectors\n",
        "detection/summary.csv",
        ("defense",),
        (*RATES, *EFFECTS, read_effect(read_estimate("delta_auroc", "+.2f")), read_text("verdict")),
    ),
    ResultTable(
        "docs/results.md",
        "## Every defense\n",
        "other-defenses/summary.csv",
        ("defense",),
        (
            *RATES,
            *EFFECTS,
            read_effect(read_estimate("delta_auroc", "+.2f")),
            read_text("verdict"),
            read_effect(read_text("margin_verdict")),
        ),
    ),
    ResultTable(
        "docs/results.md",
        "## Changed weights\n",
        "changed-weights/summary.csv",
        ("model", "defense"),
        (*RATES, *EFFECTS, read_text("verdict")),
    ),
)


@cache
def read_rows(source: str, key: tuple[str, ...]) -> dict[tuple[str, ...], Row]:
    """Return the rows of a run's table by the values in key columns."""
    frame = pd.read_csv(ROOT / "figures" / source)
    return {tuple(str(row[column]) for column in key): row for row in frame.to_dict("records")}


def find_table(text: str, caption: str) -> tuple[int, list[str]]:
    """Return the place and the rows of the first table after a caption, without heading and rule."""
    match = re.compile(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE).search(text, text.index(caption))
    assert match, caption
    return match.start(1), match[1].splitlines()


def format_row(table: ResultTable, line: str) -> str:
    """Return the row of a table whose first cells are those of a line."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    names = cells[: len(table.key)]
    row = read_rows(table.source, table.key)[tuple(n.removesuffix(" (control)").strip("`") for n in names)]
    return f"| {' | '.join([*names, *(format_cell(row) for format_cell in table.cells)])} |"


def check_table(page: str, caption: str, format_line: Callable[[str], str]) -> None:
    """Compare each row of a table with the row that it should be; rewrite the table if that is asked for."""
    path = ROOT / page
    text = path.read_text("utf-8")
    start, lines = find_table(text, caption)
    expected = [format_line(line) for line in lines]
    if os.environ.get("REWRITE"):
        stop = start + sum(len(line) + 1 for line in lines)
        path.write_text(text[:start] + "\n".join(expected) + "\n" + text[stop:], "utf-8")
        lines = expected
    assert lines == expected


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.page}-{table.source}")
def test_tables_state_what_the_runs_say(table: ResultTable) -> None:
    check_table(table.page, table.caption, partial(format_row, table))


def test_the_table_of_depth_states_what_the_run_says() -> None:
    frame = pd.read_csv(ROOT / "figures" / "depth" / "depth.csv")
    rows = {(row["defense"], row["prefix"], str(row["tokens"])): row for row in frame.to_dict("records")}

    def format_line(line: str) -> str:
        defense, prefix, tokens, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        estimates = (format_cell(rows[defense, prefix, tokens]) for format_cell in (*RATES, *EFFECTS))
        return f"| {' | '.join([defense, prefix, tokens, *estimates])} |"

    check_table("docs/depth.md", "## Results on the embedded model\n", format_line)


VALIDITY_FOLDERS = (
    *("validity", "validity-aligned", "validity-attacked", "validity-backdoor"),
    "validity-qwen2.5-coder-0.5b",
)


def format_validity_row(folder: str, readout: str) -> list[str]:
    """Return the cells of a row on a readout in a run of `analyze validate`, after the first two."""
    frame = pd.read_csv(ROOT / "figures" / folder / "validity.csv", keep_default_na=False, na_values=[""])
    rows = frame[frame["readout"] == readout]
    undefended = rows[rows["defense"] == UNDEFENDED].iloc[0].to_dict()
    errors = 100 * rows[["rate_error_harmful", "rate_error_benign"]].abs().to_numpy()
    counts = [
        " / ".join(str((rows[name] == trust).sum()) for trust in ("trusted", "not trusted", "cannot tell"))
        for name in ("trusted", "rate_trusted")
    ]
    ranks = json.loads((ROOT / "figures" / folder / "run.json").read_text("utf-8"))["ranks"]
    rank = next((entry for entry in ranks if entry["readout"] == readout), {"rank_correlation": None})
    return [
        *(format_interval(undefended, name, ".2f") for name in ("auroc", "kappa")),
        *counts,
        f"{errors.mean():.1f} / {errors.max():.0f}",
        format_interval(rank, "rank_correlation", "+.2f"),
    ]


def test_the_table_of_readouts_states_what_the_runs_say() -> None:
    folders = iter(VALIDITY_FOLDERS)
    folder = ""

    def format_line(line: str) -> str:
        nonlocal folder
        model, readout, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        folder = next(folders) if model else folder  # the first row of a model names it
        return f"| {' | '.join([model, readout, *format_validity_row(folder, readout.partition(' ')[0])])} |"

    check_table("docs/validity.md", "## Results\n", format_line)
