"""Terminal tables are readable at 80 and at 140 columns and in a file."""

import io
import re
import sys

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis.cli.catalog import collect_catalog, print_catalog
from analysis.cli.console import print_checks, print_failed_checks, print_summary
from analysis.progress import make_progress_bar
from analysis.stats.tables import ESTIMATE_NAMES, Summary
from analysis.studies.preflight import PreflightCheck

RECORD = {
    "model": {"name": "smollm2", "id": "x/y"},
    "dtype": "float32",
    "data": {"name": "contrast", "split": "test", "n_harmful": 96, "n_benign": 144},
    "readout": {"threshold": 0.0, "refuse": ["I"], "comply": ["Sure"]},
}
LONG = "a_defense_of_the_users_own_with_quite_a_long_name"
NAMES = ["none", "backdoor", "backdoor/no_secret", "neutral_prompt", LONG]


def make_summary() -> pd.DataFrame:
    """Return a summary of a few defenses."""
    rows = []
    for name in NAMES:
        row = {"attack": "direct", "defense": name, "n_harmful": 96, "n_benign": 144, "p_shift": 0.01}
        row |= {"family": "control" if name == "neutral_prompt" else "own", "p_discrimination": 0.5}
        for estimate in ESTIMATE_NAMES:
            row |= {estimate: 0.25, f"{estimate}_low": -0.125, f"{estimate}_high": 1.5}
        row["verdict"] = "reference" if name == "none" else "shift + discrimination +"
        row["trusted"] = "not validated"
        rows.append(row)
    return Summary(pd.DataFrame(rows)).frame


class Terminal(io.StringIO):
    """A text stream that calls itself a terminal."""

    def isatty(self):
        return True


def capture_summary(monkeypatch, columns, summary=None):
    """Return the summary as printed on a terminal of this many columns, or into a file if None."""
    out = Terminal() if columns else io.StringIO()
    monkeypatch.setenv("COLUMNS", str(columns or 80))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out)
    print_summary(make_summary() if summary is None else summary, RECORD)
    return re.sub("\x1b[^m]*m", "", out.getvalue())


@pytest.mark.parametrize("columns", [80, 100, 140, None])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(monkeypatch, columns):
    text = capture_summary(monkeypatch, columns)
    assert max(map(len, text.splitlines())) <= (columns or 120)
    assert "…" not in text
    assert text.count("[-12, 150]") == 2 * len(NAMES) and text.count("[-0.12, 1.50]") == len(NAMES)
    assert text.count("+0.25") == 3 * (len(NAMES) - 1)


@pytest.mark.parametrize("columns", [80, 140, None])
def test_names_and_verdicts_are_complete(monkeypatch, columns):
    lines = capture_summary(monkeypatch, columns).splitlines()
    first = "".join(line.split("│")[0].replace(" ", "") for line in lines if "│" in line)
    verdicts = ["reference", *["shift+discrimination+"] * (len(NAMES) - 1)]
    expected = "".join(name + verdict for name, verdict in zip(NAMES, verdicts, strict=True))
    assert first == expected.replace("neutral_prompt", "neutral_prompt(control)")


def test_a_value_without_an_interval_is_printed_alone_and_a_missing_value_is_a_dash(monkeypatch):
    frame = make_summary()
    frame[["shift_low", "shift_high", "auroc", "auroc_low", "auroc_high"]] = np.nan
    text = capture_summary(monkeypatch, None, Summary(frame).frame)
    row = next(line for line in text.splitlines() if line.startswith("backdoor "))
    cells = [cell.strip() for cell in row.split("│")]
    assert cells[2:] == ["–", "+0.25"]


def test_progress_is_a_bar_on_a_terminal_and_nothing_in_a_file():
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        console = Console(file=stream, force_terminal=shown, width=80)
        with make_progress_bar(console) as bar:
            task = bar.add_task("scoring policy", total=4)
            bar.advance(task, 2)
            bar.refresh()
        assert ("scoring policy" in stream.getvalue() and "2/4" in stream.getvalue()) == shown
        assert shown or stream.getvalue() == ""


def test_checks_and_texts_are_printed_verbatim(capsys):
    checks = [
        PreflightCheck("d", "text [bold]arrives", True, "yes [x]"),
        PreflightCheck("d", "whole", False, "cut"),
    ]
    print_checks(Console(width=80), "d", checks, [("q1", "<s>[INST] [red]Hi[/red] [/INST]")])
    text = capsys.readouterr().out
    assert "<s>[INST] [red]Hi[/red] [/INST]" in text
    assert "ok     text [bold]arrives: yes [x]" in text and "FAILED whole: cut" in text


def test_failed_checks_are_one_line_each_and_name_the_next_step(capsys):
    print_failed_checks(
        [PreflightCheck("d", "one", False, "x" * 200), PreflightCheck("d", "two", False, "y")]
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0] == f"analyze: d: one: FAILED: {'x' * 200}"
    assert "`analyze check` with the same -d and --attack" in lines[2]


@pytest.fixture(scope="module")
def rows_by_kind():
    """What `analyze list` shows."""
    return collect_catalog()


@pytest.mark.parametrize("columns", [80, 140])
def test_lists_truncate_no_name_and_show_settings(monkeypatch, capsys, columns, rows_by_kind):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_catalog(rows_by_kind)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    for rows in rows_by_kind.values():
        for row in rows:
            assert row["name"] in text
    assert "gated" in text and "tone=remind" in text and "(Xie et al." in text
