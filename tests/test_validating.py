"""`analyze validate`: readout against text per condition, no answer kept, and later runs know of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import save_model, toy_bench

import defenses
from analysis import answering, commands, validating
from analysis.judge import Verdict
from analysis.queries import Query
from analysis.request import Request
from analysis.tables import UNVALIDATED
from defenses import UserError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")
    save_model(tmp_path / "toy")
    return tmp_path


def asked(home: Path, attack: str = "direct") -> Request:
    return Request(str(home / "toy"), "contrast", None, 24, None, "cpu", "auto", 0, True, attack)


def test_each_condition_is_compared_with_its_answers_and_later_runs_know(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, list[Verdict]] = {}
    right = answering.verdicts

    def noted(bench, defense, *rest):
        # A random model refuses nothing: what its text says is put in its place, by the query.
        found = right(bench, defense, *rest)
        assert len(found) == 24
        made = [Verdict("full" if query.harmful else "none", "x") for query in rest[0]]
        said[defense.name] = made
        return made

    monkeypatch.setattr(validating, "verdicts", noted)
    names = ["safety_prompt", "policy"]
    assert validating.validate(asked(home), names, [], home / "out", "patterns", 3) == 0
    files = {"validity.csv", "answers.csv", "calibration.csv", "calibration.png", "rates.csv", "rates.png"}
    assert {path.name for path in (home / "out").iterdir()} == files | {"run.json"}
    found = pd.read_csv(home / "out" / "validity.csv").set_index("condition")
    assert list(found.index) == ["none", *names] and (found["n"] == 24).all()
    assert (found["refused"] == sum(v.refused for v in said["none"])).all()
    answers = pd.read_csv(home / "out" / "answers.csv")
    for name, rows in answers.groupby("defense"):
        text = (rows["refusal"] != "none").to_numpy()
        assert np.mean(text == rows["says"].to_numpy()) == pytest.approx(found.loc[name, "agrees"])
    record = json.loads((home / "out" / "run.json").read_text())
    assert record["judge"] == {"name": "patterns", "new_tokens": 3}
    assert -1 <= record["rank_correlation"] <= 1 or record["rank_correlation"] != record["rank_correlation"]
    assert "Trusted: AUROC" in capsys.readouterr().out
    # A later run of the same readout says what was found; of another defense or attack nothing is known.
    assert commands.analyze(asked(home), ["policy", "goal_priority"], [], home / "later", False) == 0
    summary = pd.read_csv(home / "later" / "summary.csv").set_index("defense")
    assert summary.loc["policy", "trusted"] == found.loc["policy", "trusted"]
    assert summary.loc["goal_priority", "trusted"] == UNVALIDATED
    assert "1 of 3 conditions were never compared" in capsys.readouterr().err
    assert commands.analyze(asked(home, "obedience"), ["policy"], [], home / "under", False) == 0
    assert (pd.read_csv(home / "under" / "summary.csv")["trusted"] == UNVALIDATED).all()


def test_what_cannot_be_is_said_before_anything_is_loaded(home: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'patterns'"):
        validating.validate(asked(home), ["none"], [], home / "out", "pattern", 3)
    with pytest.raises(UserError, match="at least 1"):
        validating.validate(asked(home), ["none"], [], home / "out", "patterns", 0)
    assert not (home / "out").exists()


def test_verdicts_are_in_the_order_of_the_queries_and_see_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = toy_bench()
    queries = [Query(f"q{n}", "word " * (9 - n), harmful=n % 2 == 0) for n in range(6)]
    seen: list[str] = []

    def judge(answer: str, request: str = "") -> Verdict:
        seen.append(request)
        return Verdict("none", request)

    monkeypatch.setitem(answering.JUDGES, "patterns", judge)
    found = answering.verdicts(bench, defenses.get("none"), queries, "patterns", 2)
    assert [verdict.evidence for verdict in found] == [query.text for query in queries]


def test_of_several_readings_most_decide_and_a_tie_is_no_refusal() -> None:
    full, none = Verdict("full", "a"), Verdict("none", "b")
    assert answering._most([full, none, full]) == full
    assert answering._most([full, none]) == none
