"""`analyze label`: one key is an answer, a file does as well, and mistakes are one line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import assert_user_error, run_cli
from rich.console import Console

from analysis.cli.label import ask_labels
from analysis.judges.judge import RuleJudge, Verdict
from analysis.judges.rules import RULE_JUDGES
from analysis.studies import responses as responses_module

TEXTS = [(f"request {number}", f"response {number}") for number in range(4)]


@pytest.fixture(scope="module")
def judged_home(cli_home: Path) -> Iterator[Path]:
    """A folder with a judged run of the tiny model in `judged`."""

    def judge_length(response: str, query: str) -> Verdict:
        return Verdict("none" if len(response) % 2 else "full")

    judge = RuleJudge("length", judge_length, lambda partial_response: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.plots.data.build_analysis_points", lambda *_: {})
        patch.setattr(responses_module, "RESPONSE_JUDGE", judge)
        patch.setitem(RULE_JUDGES, "length", judge)
        options = "-d policy -m tiny --limit 16 --readout words --responses all -o judged"
        result = run_cli(*options.split())
        assert result.code == 0, result.err
        yield cli_home


def press_keys(keys: str) -> tuple[dict[int, str], str]:
    """Return the stored labels and the output after these keys; the input ends after the last one."""
    stored: dict[int, str] = {}
    pending = iter(keys)

    def read_key() -> str:
        key = next(pending, None)
        if key is None:
            raise EOFError
        return key

    out = io.StringIO()
    ask_labels(TEXTS, 8, 24, read_key, stored.__setitem__, Console(file=out, width=80))
    return stored, out.getvalue()


def test_one_key_is_an_answer() -> None:
    stored, out = press_keys("rasR")
    assert stored == {0: "refuses", 1: "answers", 3: "refuses"}
    assert "9 of 12" in out and "12 of 12" in out and "response 3" in out


def test_back_and_quit_and_other_keys() -> None:
    stored, out = press_keys("rxbaq")
    assert stored == {0: "answers"} and "'x' is none of the keys" in out and "(now: refuses)" in out
    assert press_keys("bra")[0] == {0: "refuses", 1: "answers"}  # there is nothing before the first
    assert press_keys("rbs")[0] == {0: ""}  # a skip takes the label back
    assert press_keys("q")[0] == {}


def test_a_response_cannot_control_the_terminal() -> None:
    out = io.StringIO()
    ask_labels([("a\x1b[2Jb", "c\x07")], 0, 24, lambda: "q", lambda *_: None, Console(file=out, width=80))
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()


def test_a_file_is_written_then_read(judged_home: Path) -> None:
    written = run_cli("label", "judged", "--n", "12", "--csv", "sheet.csv")
    assert written.code == 0 and "Wrote 12 responses to sheet.csv" in written.err
    sheet = pd.read_csv(judged_home / "sheet.csv", keep_default_na=False)
    assert list(sheet.columns) == ["query", "attack", "defense", "request", "response", "label"]
    empty = run_cli("label", "judged", "--n", "12", "--csv", "sheet.csv")
    assert_user_error(empty, "sheet.csv exists, and its column label is empty")
    sheet.assign(label=["answers"] * 11 + ["perhaps"]).to_csv(judged_home / "sheet.csv", index=False)
    wrong = run_cli("label", "judged", "--n", "12", "--csv", "sheet.csv")
    assert_user_error(wrong, "sheet.csv, row 12", "'perhaps'", "refuses, answers, skip")
    assert not (judged_home / "judged" / "labels.csv").exists()
    sheet.assign(label=["answers"] * 6 + ["refuses"] * 6).to_csv(judged_home / "sheet.csv", index=False)
    result = run_cli("label", "judged", "--n", "12", "--csv", "sheet.csv")
    assert result.code == 0 and "Refusal rates, corrected for the errors of the judge" in result.out
    assert len(pd.read_csv(judged_home / "judged" / "corrected_rates.csv")) == 4
    assert_user_error(run_cli("label", "judged", "--csv", "no/where.csv"), "there is no folder no")


def test_keys_need_a_terminal_and_labels_are_kept(judged_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (judged_home / "judged" / "labels.csv").unlink(missing_ok=True)
    assert_user_error(run_cli("label", "judged"), "the input is not a terminal: use --csv FILE")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    keys = iter("raq")
    monkeypatch.setattr("typer.getchar", lambda: next(keys))
    result = run_cli("label", "judged", "--n", "12")
    assert result.code == 0 and "1 of 12" in result.out and "3 of 12" in result.out
    assert len(pd.read_csv(judged_home / "judged" / "labels.csv")) == 2

    def interrupt() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.getchar", interrupt)
    interrupted = run_cli("label", "judged", "--n", "12")
    assert interrupted.code == 130 and "3 of 12" in interrupted.out  # two are not asked again
    assert len(pd.read_csv(judged_home / "judged" / "labels.csv")) == 2


def test_a_folder_without_a_run_is_a_one_line_error(judged_home: Path) -> None:
    assert_user_error(run_cli("label", "nowhere"), "nowhere does not exist")
