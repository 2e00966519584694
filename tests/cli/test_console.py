"""Terminal tables are readable at 80 and at 140 columns and in a file."""

import io
import re
import sys

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis.cli.catalog import collect_catalog, print_catalog
from analysis.cli.console import print_checks, print_failed_checks, print_kinds, print_summary
from analysis.progress import make_progress_bar
from analysis.stats.tables import ESTIMATE_NAMES, Summary
from analysis.studies.preflight import PreflightCheck

RECORD = {
    "model": {"name": "smollm2", "id": "x/y"},
    "dtype": "float32",
    "data": {"name": "contrast", "split": "test", "n_harmful": 96, "n_benign": 144},
    "readout": {"threshold": 0.0, "refuse": ["I"], "comply": ["Sure"]},
    "responses": {"new_tokens": 24, "judge": {"name": "learned"}, "queries": 240, "unjudged": 3},
}
LONG = "a_defense_of_the_users_own_with_quite_a_long_name"
NOTE = "discrimination: the adjusted p-value is 0.07"
NAMES = ["none", "backdoor", "backdoor/no_secret", "neutral_prompt", LONG]


def make_summary() -> pd.DataFrame:
    """Return a summary of a few defenses."""
    rows = []
    for name in NAMES:
        row = {"attack": "direct", "defense": name, "n_harmful": 96, "n_benign": 144, "p_shift": 0.01}
        row |= {"family": "control" if name == "neutral_prompt" else "own", "p_discrimination": 0.5}
        for estimate in ESTIMATE_NAMES:
            row |= {estimate: 0.25, f"{estimate}_low": -0.125, f"{estimate}_high": 1.5}
        row["verdict"] = "reference" if name == "none" else "shift +, discrimination inconclusive"
        row |= {"margin_verdict": row["verdict"], "verdict_note": "" if name == "none" else NOTE}
        row |= {"trusted": "not validated", "based_on": "margins"}
        rows.append(row)
    return Summary(pd.DataFrame(rows)).frame


def add_responses(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary of a run whose responses were judged."""
    effects = {
        f"response_{name}{end}": np.where(summary["defense"] == "none", np.nan, value)
        for name in ("shift", "discrimination")
        for end, value in (("", 12.0), ("_low", -3.0), ("_high", 27.0))
    }
    return summary.assign(**effects, based_on="responses", n_responses=240, responses_saved=0.0)


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
    assert max(map(len, text.partition("[x, y]")[0].splitlines())) <= (columns or 120)
    assert "…" not in text
    assert text.count("[-12, 150]") == 2 * len(NAMES) and text.count("[-0.12, 1.50]") == len(NAMES)
    assert text.count("+0.25") == 3 * (len(NAMES) - 1)
    assert "no response was judged" in " ".join(text.split()) and text.count(NOTE) == len(NAMES) - 1


@pytest.mark.parametrize("columns", [80, None])
def test_the_changes_of_the_rates_stand_in_the_summary_of_judged_responses(monkeypatch, columns):
    text = capture_summary(monkeypatch, columns, add_responses(make_summary()))
    assert max(map(len, text.partition("[x, y]")[0].splitlines())) <= (columns or 120) and "…" not in text
    assert text.count("+12 [-3, +27]") == 2 * (len(NAMES) - 1)
    assert "first 24 tokens of the responses, judged by learned" in " ".join(text.split())
    assert "3 responses have no verdict" in " ".join(text.split()) and "were answered" not in text


def test_a_sample_of_responses_says_what_the_margins_are_worth(monkeypatch):
    monkeypatch.setitem(RECORD, "responses", RECORD["responses"] | {"queries": 60})
    summary = add_responses(make_summary()).assign(responses_saved=[0.0, 3.0, 12.4, 5.0, 2.0])
    text = " ".join(capture_summary(monkeypatch, None, summary).split())
    assert "60 queries were answered" in text and "are worth 0 to 12 further responses" in text


def test_many_notes_are_counted_and_only_contradictions_are_named(monkeypatch):
    summary = pd.concat([make_summary()] * 4, ignore_index=True)
    summary.loc[2, "verdict_note"] = "the margins say otherwise: shift -"
    text = capture_summary(monkeypatch, None, Summary(summary).frame)
    assert "column verdict_note of summary.csv (16 conditions)" in text and NOTE not in text
    assert f"The margins contradict the responses in 1: {NAMES[2]}." in text


@pytest.mark.parametrize("columns", [80, 140, None])
def test_names_and_verdicts_are_complete(monkeypatch, columns):
    lines = capture_summary(monkeypatch, columns).splitlines()
    first = "".join(line.split("│")[0].replace(" ", "") for line in lines if "│" in line)
    verdicts = ["reference", *["shift+,discriminationinconclusive"] * (len(NAMES) - 1)]
    expected = "".join(name + verdict for name, verdict in zip(NAMES, verdicts, strict=True))
    assert first == expected.replace("neutral_prompt", "neutral_prompt(control)")


def test_a_value_without_an_interval_is_printed_alone_and_a_missing_value_is_a_dash(monkeypatch):
    frame = make_summary()
    frame[["shift_low", "shift_high", "auroc", "auroc_low", "auroc_high"]] = np.nan
    text = capture_summary(monkeypatch, None, Summary(frame).frame)
    row = next(line for line in text.splitlines() if line.startswith("backdoor "))
    cells = [cell.strip() for cell in row.split("│")]
    assert cells[2:] == ["–", "+0.25"]


def capture_kinds(monkeypatch, columns, kinds):
    """Return the table of these kinds as printed on a terminal; every rate is 100 %."""
    rows = [
        {"attack": "direct", "defense": name, "kind": kind, "n": 60}
        | {"over_refusal_rate": 1.0, "over_refusal_rate_low": 0.98, "over_refusal_rate_high": 1.0}
        for name in NAMES
        for kind in kinds
    ]
    out = Terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out)
    print_kinds(pd.DataFrame(rows))
    return re.sub("\x1b[^m]*m", "", out.getvalue())


@pytest.mark.parametrize("columns", [80, 140])
def test_over_refusal_by_kind_fits_the_terminal(monkeypatch, columns):
    four = ("twin", "sounds_unsafe", "same_topic", "plain")
    text = capture_kinds(monkeypatch, columns, four)
    assert max(map(len, text.splitlines())) <= columns and "…" not in text
    assert text.count("100 [98, 100]") == 4 * len(NAMES)
    assert all(kind in text for kind in four) and text.count("n = 60") == 4
    text = capture_kinds(monkeypatch, columns, [f"kind {number}" for number in range(6)])
    assert max(map(len, text.splitlines())) <= columns and "…" not in text
    assert text.count(" 100") == 6 * len(NAMES) and "[98, 100]" not in text
    assert capture_kinds(monkeypatch, columns, ["plain"]) == "", "a single kind is the whole class"


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
