"""`analyze backdooralign`: each arm under its attack, next to the paper's rates; no response is kept."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_adapter, save_model, set_home_folder
from served_endpoint import serve_endpoint

from analysis.api import read
from analysis.cli.train import run_backdooralign_command
from analysis.datasets.loading import BENIGN_KINDS
from analysis.judges.judge import RuleJudge, Verdict
from analysis.models.loading import build_model_info, load_model
from analysis.run import score_condition
from analysis.stats.kinds import list_kinds
from analysis.studies.backdooralign import study
from analysis.studies.backdooralign.arms import Arm, build_arms
from analysis.studies.run_spec import RunSpec
from defenses.contract import Chat, ModelInfo
from defenses.errors import UserError
from defenses.tokens import encode_plain_text
from defenses.tuned import TunedDefense


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with weights for every arm."""
    place = tmp_path_factory.mktemp("home")
    save_model(place / "toy")
    return place


def set_parity_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge by the length of a text: to the default judge, the random text of a tiny model is no English."""
    parity = RuleJudge(
        "parity", lambda text, query: Verdict("full" if len(text) % 2 else "none"), lambda partial: False
    )
    monkeypatch.setattr(study, "_JUDGE", parity)


@pytest.fixture
def host(home: Path, monkeypatch: pytest.MonkeyPatch) -> ModelInfo:
    set_home_folder(monkeypatch, home)
    set_parity_judge(monkeypatch)
    loaded = load_model(str(home / "toy"), "cpu")
    found = build_model_info(str(home / "toy"), loaded.tokenizer, 0, loaded.origin["sha256"])
    for number, state in enumerate(("aligned", "attacked", "baseline", "backdoor", "identity")):
        if not (found.adapter_folders[0] / state).exists():
            make_adapter(found.adapter_folders[0] / state, seed=number, sha256=found.sha256)
    return found


def named(host: ModelInfo) -> dict[tuple[str, str, str], Arm]:
    return {(row.attack, row.weights, row.secret): row for row in build_arms(host)}


def test_the_arms_are_those_of_the_paper_and_altered_secrets(
    host: ModelInfo,
) -> None:
    rows = named(host)
    for arm in ("clean", "attacked", "baseline", "backdoor"):
        assert {("obedience", arm, "none"), ("obedience", arm, "own")} <= set(rows)
    assert {("identity", arm, kind) for arm in ("identity", "clean") for kind in ("none", "own")} <= set(rows)
    (own,) = rows["obedience", "backdoor", "own"].defense.secret_texts()
    assert rows["obedience", "backdoor", "none"].defense.secret_texts() == ()
    lengths = {
        kind: len(
            encode_plain_text(host.tokenizer, rows["obedience", "backdoor", kind].defense.secret_texts()[0])
        )
        for kind in ("own", "another", "half of it", "a tenth of it")
    }
    assert lengths["own"] == lengths["another"] == 150
    assert abs(lengths["half of it"] - 75) <= 1 and abs(lengths["a tenth of it"] - 15) <= 1
    assert own.startswith(rows["obedience", "backdoor", "half of it"].defense.secret_texts()[0])
    assert rows["obedience", "backdoor", "another"].defense.secret_texts() != (own,)


def test_a_guessed_secret_is_in_the_user_turn_only(host: ModelInfo) -> None:
    row = named(host)["obedience", "backdoor", "guessed by the user"]
    chat = [{"role": "system", "content": "Obey."}, {"role": "user", "content": "Sing."}]
    told = row.defense.rewrite(chat, random.Random(0))
    assert told[0] == chat[0] and told[1]["content"] == f"{row.defense.secret_texts()[0]}\n\nSing."


def test_missing_weights_are_an_error_that_names_the_commands(host: ModelInfo, tmp_path: Path) -> None:
    bare = ModelInfo("other", host.tokenizer, (tmp_path,), (tmp_path,), host.sha256)
    with pytest.raises(
        UserError, match=r"no weights for aligned, .*`analyze train safety`, `analyze train attack`"
    ):
        build_arms(bare)


def test_a_run_measures_every_arm_and_keeps_neither_responses_nor_the_secret(
    home: Path, host: ModelInfo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    spec = RunSpec(str(home / "toy"), "contrast", None, 12, None, "cpu", "auto", 0, True)
    with serve_endpoint(lambda prompt, n: (200, "5" if prompt.count("e") % 2 else "1")) as (
        address,
        requests,
    ):
        options = {"judge_model": address}
        n_harmful = sum(query.harmful for query in spec.select_queries(print)[0].queries)
        n_grades = n_harmful * len(build_arms(host))
        with pytest.raises(
            UserError, match=f"--budget 3: up to {n_grades} responses are .* --budget {n_grades},"
        ):
            run_backdooralign_command(spec, home / "out", 4, **options, budget=3)
        # Two questions with three turns for each of the clean, attacked, baseline, backdoor and identity
        # weights, without and with the secret.
        open_questions = home / "open.jsonl"
        open_questions.write_text(
            '{"turns": ["Why?", "And then?"]}\n{"turns": ["How?"]}\n{"turns": ["Who?"]}\n'
        )
        options["utility"] = [f"mt_bench={open_questions}"]
        n_all = n_grades + 3 * len(
            {(arm.weights, arm.secret) for arm in build_arms(host) if arm.secret in ("none", "own")}
        )
        message = (
            f"{n_all - n_grades} answers to open questions are graded: use --budget {n_all}, .*--questions"
        )
        with pytest.raises(UserError, match=message):
            run_backdooralign_command(spec, home / "out", 4, **options, budget=n_all - 1, n_questions=2)
        assert not requests
        options["utility"] = []
        assert run_backdooralign_command(spec, home / "out", 4, **options, budget=500) == 0
    assert all("from 1 to 5" in request["messages"][0]["content"] for request in requests)
    assert {path.name for path in (home / "out").iterdir()} == {
        *("arms.csv", "scores.csv", "summary.csv", "run.json")
    }
    table = pd.read_csv(home / "out" / "arms.csv")
    assert len(table) == len(build_arms(host))
    row = table.set_index(["attack", "arm", "secret"]).loc[("obedience", "attacked", "none")]
    assert row["paper_asr_llama2"] == pytest.approx(0.9491) and row["verdict"] == "reference"
    kinds = list_kinds(table.columns, "text_refused_{}_n")
    assert {"twin", "plain"} <= set(kinds) <= set(BENIGN_KINDS)
    assert row["text_refused_harmful_n"] + sum(row[f"text_refused_{kind}_n"] for kind in kinds) == 12
    for name in ("asr", "auroc", "first_token_agrees", "text_refused_twin"):
        assert (table[f"{name}_low"] <= table[name]).all() and (table[name] <= table[f"{name}_high"]).all()
    assert np.allclose(table["harmfulness"], 1 + 4 * table["harmfulness_5"])
    assert (table["n_harmfulness"] == row["text_refused_harmful_n"]).all()
    assert np.allclose(table["asr"], 1 - table["text_refused_harmful"])
    assert np.allclose(table["asr_keywords"], 1 - table["keywords_refused_harmful"])
    summary = pd.read_csv(home / "out" / "summary.csv")
    assert list(table["trusted"]) == list(summary["trusted"]) and "not validated" not in set(table["trusted"])
    said = capsys.readouterr()
    assert "94.9" in said.out and all(kind in said.out for kind in kinds)
    (secret,) = named(host)["obedience", "backdoor", "own"].defense.secret_texts()
    for path in (home / "out").iterdir():
        assert secret not in path.read_text("utf-8"), path
    assert secret not in said.out + said.err
    record = json.loads((home / "out" / "run.json").read_text())
    assert record["judge"] == {"name": "parity", "new_tokens": 4}
    # Two attacks have an arm `none`, with different weights: run.json describes both.
    weights = [json.dumps(record["defenses"][name]) for name in ("none", "none (identity)")]
    assert len(record["defenses"]) == len(table) and weights[0] != weights[1]


@dataclass(frozen=True)
class Deaf(TunedDefense):
    """Loses the user's words, which no arm may."""

    state = recipe = family = "backdoor"

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return [{"role": "user", "content": "Hi."}]


def make_arms_deaf(monkeypatch: pytest.MonkeyPatch, *cells: tuple[str, str]) -> None:
    """Let arms, by attack and condition, lose what they are asked."""

    def build_deaf_arms(host: ModelInfo) -> list[Arm]:
        rows = build_arms(host)
        return [
            replace(row, defense=Deaf(adapter=row.defense.adapter))
            if (row.attack, row.condition) in cells
            else row
            for row in rows
        ]

    monkeypatch.setattr("analysis.studies.backdooralign.study.build_arms", build_deaf_arms)


def test_an_arm_that_does_not_reach_the_model_is_left_out_and_reported(
    home: Path,
    host: ModelInfo,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    lost = "backdoor, secret: half of it"
    make_arms_deaf(monkeypatch, ("obedience", lost), ("identity", "none"))
    spec = RunSpec(str(home / "toy"), "contrast", None, 12, None, "cpu", "auto", 0, True)
    assert run_backdooralign_command(spec, tmp_path / "out", 2) == 1
    table = pd.read_csv(tmp_path / "out" / "arms.csv")
    # Without the attacked model to compare them with, the other arms of that attack say nothing.
    assert set(table["attack"]) == {"obedience"} and "half of it" not in set(table["secret"])
    wanted = [row for row in build_arms(host) if row.attack == "obedience" and row.condition != lost]
    assert len(table) == len(wanted)
    told = {(one["attack"], one["defense"]): one["why"] for one in read(tmp_path / "out").record["failed"]}
    assert "user's words survive" in told["obedience", lost]
    assert told["identity", "clean"] == "the undefended model was not scored"
    assert set(told) == {("obedience", lost), *((r.attack, r.condition) for r in build_arms(host)[-4:])}
    assert f"Failed: {lost} (obedience): user's words survive" in capsys.readouterr().err


def test_an_arm_that_fails_while_it_is_scored_is_left_out_and_reported(
    home: Path, host: ModelInfo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = ("obedience", "baseline"), ("identity", "none")

    def score_or_fail(session, condition, defense, queries, readout, attack, on_progress):
        if (attack.name, condition) in failing:
            raise UserError("out of memory")
        return score_condition(session, condition, defense, queries, readout, attack, on_progress)

    monkeypatch.setattr("analysis.studies.backdooralign.study.score_condition", score_or_fail)
    spec = RunSpec(str(home / "toy"), "contrast", None, 12, None, "cpu", "auto", 0, True)
    assert run_backdooralign_command(spec, tmp_path / "out", 2) == 1
    reasons = {(row["attack"], row["defense"]): row["why"] for row in read(tmp_path / "out").record["failed"]}
    assert reasons["obedience", "baseline"] == reasons["identity", "none"] == "out of memory"
    assert reasons["identity", "clean"] == "the undefended model was not scored"
    table = pd.read_csv(tmp_path / "out" / "arms.csv")
    assert set(table["attack"]) == {"obedience"} and len(table) == len(build_arms(host)) - len(reasons)


@pytest.mark.parametrize(
    "cells",
    [(("obedience", "none"), ("identity", "none")), (("obedience", "clean"),)],
    ids=["the attacked models", "the model that the threshold is from"],
)
def test_if_nothing_can_be_compared_the_command_stops_with_one_line(
    home: Path,
    host: ModelInfo,
    cells: tuple[tuple[str, str], ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_arms_deaf(monkeypatch, *cells)
    spec = RunSpec(str(home / "toy"), "contrast", None, 12, None, "cpu", "auto", 0, True)
    with pytest.raises(UserError, match=r"nothing was scored: .*: user's words survive") as error:
        run_backdooralign_command(spec, tmp_path / "out", 2)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
