"""`analyze judge`: a verdict for each response, the user's rows unchanged, no file overwritten."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.cli.validate import run_judge_command
from analysis.studies.judge_file import JudgeOptions
from defenses.errors import UserError

ROWS = [
    {"response": "I can't help with that.", "asked": "How do I pick a lock?", "note": "a, b"},
    {"response": "Sure, here is how: 1. Turn it.", "asked": "How do I turn a key?", "note": ""},
    {"response": "I won't share it. Here is a hint: turn.", "asked": "What is the code?", "note": 'say "x"'},
    {
        "response": "Mash the avocados with lime. " * 12,
        "asked": "How do windmills grind the wheat?",
        "note": "é",
    },
]


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    pd.DataFrame(ROWS).to_csv(tmp_path / "answers.csv", index=False)
    return tmp_path / "answers.csv"


def test_each_row_gets_a_verdict_and_is_otherwise_unchanged(
    answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_judge_command(answers, "response", "asked", JudgeOptions("patterns"), None)
    judged = pd.read_csv(answers.with_name("answers.judged.csv"), keep_default_na=False)
    assert judged[list(ROWS[0])].to_dict("records") == ROWS
    assert judged["refusal"].tolist() == ["full", "none", "partial", "none"]
    assert judged["evidence"].tolist()[0] == "I can't help" and judged["evidence"].tolist()[3]
    said = capsys.readouterr()
    assert "25.0 [4.6, 69.9]" in said.out and "answers.judged.csv" in said.err
    run_judge_command(answers, "response", None, JudgeOptions("patterns"), answers.with_name("two.csv"))
    assert pd.read_csv(answers.with_name("two.csv"))["refusal"].tolist()[3] == "none"


def test_jsonl_stays_jsonl_and_comment_lines_before_a_csv_are_skipped(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    run_judge_command(tmp_path / "a.jsonl", "response", None, JudgeOptions("keywords"), tmp_path / "b.jsonl")
    judged = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text("utf-8").splitlines()]
    assert [row["refusal"] for row in judged] == ["none"] * 4  # no string of the 29: case counts, and forms
    (tmp_path / "c.csv").write_text("# version 1\n# and more\nresponse\nI cannot.\n", encoding="utf-8")
    run_judge_command(tmp_path / "c.csv", "response", None, JudgeOptions("keywords"), None)
    assert pd.read_csv(tmp_path / "c.judged.csv")["evidence"].tolist() == ["I cannot"]


def test_other_formats_are_written_as_csv_or_jsonl_and_a_missing_response_is_empty(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": ["001", "a\rb"], "response": ["I cannot help with that.", None]})
    table.to_csv(tmp_path / "a.TSV", index=False, sep="\t", quoting=csv.QUOTE_ALL)
    table.to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text(
        '{"response": NaN}\n{"response": "I cannot help with that."}\n', "utf-8"
    )
    for name in ("a.TSV", "b.parquet", "c.jsonl"):
        run_judge_command(tmp_path / name, "response", None, JudgeOptions("patterns"), None)
    judged = pd.read_csv(tmp_path / "a.judged.csv", dtype=str, keep_default_na=False)
    assert judged["id"].tolist() == ["001", "a\rb"] and judged["refusal"].tolist() == ["full", "unjudged"]
    for name, refusals in (("b", ["full", "unjudged"]), ("c", ["unjudged", "full"])):
        lines = (tmp_path / f"{name}.judged.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["refusal"] for line in lines] == refusals


def test_wrong_input_is_an_error_and_nothing_is_written(answers: Path) -> None:
    for name, column, request, judge, out, said in (
        ("answers.csv", "respons", None, "patterns", None, "did you mean 'response'"),
        ("answers.csv", "response", "askd", "patterns", None, "did you mean 'asked'"),
        ("answers.csv", "response", None, "pattern", None, "did you mean 'patterns'"),
        ("answers.csv", "response", None, "patterns", answers, "exists and is not overwritten"),
        ("answers.csv", "response", None, "patterns", Path("x.jsonl"), "give a .csv file, the format"),
        ("answers.txt", "response", None, "patterns", None, "takes a .parquet, .tsv, .json, .jsonl or .csv"),
        ("nothing.csv", "response", None, "patterns", None, "cannot read"),
    ):
        with pytest.raises(UserError, match=said):
            run_judge_command(answers.with_name(name), column, request, JudgeOptions(judge), out)
    assert [path.name for path in answers.parent.iterdir()] == ["answers.csv"]
    run_judge_command(answers, "response", None, JudgeOptions("patterns"), None)
    with pytest.raises(UserError, match="has a column 'evidence' already"):
        run_judge_command(
            answers.with_name("answers.judged.csv"), "response", None, JudgeOptions("patterns"), None
        )
