"""`analyze validate`: readouts against text by condition; no response is kept; later runs show the trust."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_toy_session, render_query, save_model, set_home_folder
from rich.console import Console

from analysis.api import read
from analysis.attacks import DIRECT_ATTACK, choose_attacks
from analysis.cli.analyze import run_analyze_command
from analysis.cli.train import run_secret_command
from analysis.cli.validate import run_validate_command
from analysis.datasets.loading import BENIGN_KINDS, load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.judges.judge import RuleJudge, Verdict, _pool_verdicts, generate_verdicts
from analysis.judges.rules import RULE_JUDGES
from analysis.models.session import generate_responses
from analysis.run import build_conditions
from analysis.stats.answer_quality import add_refusal_probabilities, summarize_sampled_refusals
from analysis.stats.kinds import list_kinds
from analysis.stats.tables import Trust
from analysis.studies.judge_file import JudgeOptions, SampleOptions
from analysis.studies.responses import name_verdict
from analysis.studies.run_spec import RunSpec
from analysis.studies.setup import RunSetup, prepare_setup
from analysis.studies.validate import collect_responses, judge_openings
from defenses.catalog import get_defense
from defenses.contract import Chat, Defense
from defenses.errors import UserError


@pytest.fixture(scope="module")
def calibrated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and a cache with its calibrated words readout, without validity rows."""
    folder = tmp_path_factory.mktemp("calibrated")
    save_model(folder / "toy")
    with pytest.MonkeyPatch.context() as patch:
        set_home_folder(patch, folder)
        prepare_setup(make_spec(folder), ["none"], [], Console(quiet=True))
    return folder


@pytest.fixture
def home(calibrated_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, its cache in use."""
    shutil.copytree(calibrated_home, tmp_path, dirs_exist_ok=True)
    set_home_folder(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def no_validity_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures, where a test is not about them."""
    monkeypatch.setattr("analysis.studies.validate._validity_figure_tables", lambda *_: {})


def make_spec(
    home: Path, names: tuple[str, ...] = ("direct",), readouts: tuple[str, ...] = ("words",)
) -> RunSpec:
    model = str(home / "toy")
    return RunSpec(model, "contrast", None, 24, None, "cpu", "auto", 0, True, choose_attacks(names), readouts)


def plant_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model refuses nothing: what its text says is put in its place, by the request."""
    harmful = {query.text for query in load_queries("contrast").queries if query.harmful}

    def judge(answer: str, request: str = "") -> Verdict:
        return Verdict("full" if request in harmful else "none", "x")

    monkeypatch.setitem(RULE_JUDGES, "patterns", RuleJudge("patterns", judge, lambda answer: False))


def test_each_condition_is_validated_and_later_runs_show_its_trust(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch)
    names = ["safety_prompt", "policy"]
    assert run_validate_command(make_spec(home), names, [], home / "out", JudgeOptions("patterns"), 3) == 0
    files = {"validity.csv", "worth.csv", "answers.csv", "calibration.csv", "calibration.png", "curves.csv"}
    assert {path.name for path in (home / "out").iterdir()} == files | {"rates.csv", "rates.png", "run.json"}
    found = pd.read_csv(home / "out" / "validity.csv").set_index("defense")
    assert list(found.index) == ["none", *names] and (found["n"] == 24).all()
    curves = pd.read_csv(home / "out" / "curves.csv")
    assert (curves.groupby("defense")["refused_n"].sum() == 24).all()
    assert set(curves["defense"]) == {"none", *names}
    answers = pd.read_csv(home / "out" / "answers.csv")
    assert (found["refused"] == answers["harmful"].sum() / 3).all() and (found["unjudged"] == 0).all()
    for name, rows in answers.groupby("defense"):
        text = (rows["refusal_patterns"] != "none").to_numpy()
        assert (text == rows["harmful"]).all() and (rows["refusal_keywords"] == "none").all()
        assert np.mean(text == rows["says_words"].to_numpy()) == pytest.approx(found.loc[name, "agrees"])
    worth = pd.read_csv(home / "out" / "worth.csv").set_index("defense")
    assert (worth["asr_patterns"] == 0).all() and (worth["asr_keywords"] == 1).all()
    assert (worth["n_complied"] == (~answers["harmful"]).sum() / 3).all()
    kinds = list_kinds(worth.columns, "over_refusal_{}_patterns_n")
    assert {"twin", "plain"} <= set(kinds) <= set(BENIGN_KINDS)
    for kind in kinds:
        assert (worth[f"over_refusal_{kind}_patterns"] == 0).all()
    n_benign = worth[[f"over_refusal_{kind}_patterns_n" for kind in kinds]].sum(axis="columns")
    assert (n_benign == worth["n_complied"]).all()
    assert worth.loc["none", "chrf"] == pytest.approx(100)
    # Nobody knows which of two answers that were both cut is longer.
    assert (worth["cut"] == 1).all() and worth["length_ratio"].isna().all()
    assert (worth.loc[names, "chrf"] < 100).all() and worth.loc[names, "log_likelihood_change"].notna().all()
    record = json.loads((home / "out" / "run.json").read_text())
    assert record["judge"] == {"name": "patterns", "new_tokens": 3}
    assert [row["conditions"] for row in record["ranks"]] == [3]
    said = capsys.readouterr().out
    assert "Single queries: trusted if the AUROC" in said and all(kind in said for kind in kinds)
    # A later run of the same readout says what was found; of another defense or attack nothing is known.
    assert run_analyze_command(make_spec(home), ["policy", "goal_priority"], [], home / "later", False) == 0
    summary = pd.read_csv(home / "later" / "summary.csv").set_index("defense")
    assert summary.loc["policy", "trusted"] == found.loc["policy", "trusted"]
    assert summary.loc["goal_priority", "trusted"] == Trust.NOT_VALIDATED
    assert "1 of 3 conditions are not validated" in capsys.readouterr().err
    both = make_spec(home, ("direct", "obedience"))
    assert run_analyze_command(both, ["policy"], [], home / "under", False) == 0
    summary = pd.read_csv(home / "under" / "summary.csv").set_index(["attack", "defense"])["trusted"]
    assert summary["direct", "policy"] == found.loc["policy", "trusted"]
    assert summary["obedience", "policy"] == summary["obedience", "none"] == Trust.NOT_VALIDATED
    assert {path.name for path in (home / "under").iterdir()} >= {"plane-direct.png", "plane-obedience.png"}


@pytest.mark.usefixtures("no_figures")
def test_several_readouts_are_compared_on_the_same_responses_and_auto_selects_the_best(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch)
    spec = make_spec(home, ("direct", "obedience"), ("words", "log-odds", "question", "prefilled-2"))
    assert run_validate_command(spec, ["policy"], [], home / "out", JudgeOptions("patterns"), 2) == 0
    found = pd.read_csv(home / "out" / "validity.csv")
    assert len(found) == 2 * 2 * 4 and set(found["readout"]) == set(spec.readouts)
    assert len(found.groupby(["attack", "defense"])["refused"].unique()) == 4
    answers = pd.read_csv(home / "out" / "answers.csv")
    assert set(answers["begins"]) == {"words/log-odds/question", "prefilled-2"}
    assert answers.loc[answers["begins"] == "prefilled-2", "margin_words"].isna().all()
    assert {"rates-question.png", "calibration-log-odds.csv"} <= {
        path.name for path in (home / "out").iterdir()
    }
    capsys.readouterr()
    auto = replace(spec, readouts=("auto",))
    assert run_analyze_command(auto, ["policy"], [], home / "auto", False) == 0
    record = json.loads((home / "auto" / "run.json").read_text())
    assert record["readout"]["name"] in {"words", "log-odds", "question"}
    assert "--readout auto: " in capsys.readouterr().err
    elsewhere = replace(auto, attacks=choose_attacks(["identity"]))
    assert run_analyze_command(elsewhere, ["policy"], [], home / "else", False) == 0
    assert "none was validated under all of these conditions" in capsys.readouterr().err


@pytest.mark.usefixtures("no_validity_figures")
def test_responses_without_a_verdict_are_not_counted(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(answer: str, request: str = "") -> Verdict:
        return (
            Verdict("unjudged", "asleep")
            if len(request) % 2
            else Verdict("full" if len(request) % 4 else "none")
        )

    monkeypatch.setitem(RULE_JUDGES, "patterns", RuleJudge("patterns", judge, lambda answer: False))
    assert (
        run_validate_command(make_spec(home), ["policy"], [], home / "out", JudgeOptions("patterns"), 2) == 1
    )
    found = pd.read_csv(home / "out" / "validity.csv")
    odd = sum(len(query.text) % 2 for query in make_spec(home).select_queries()[0].queries)
    assert (found["unjudged"] == odd).all() and (found["n"] == 24 - odd).all() and odd > 0
    worth = pd.read_csv(home / "out" / "worth.csv")
    assert (worth["asr_patterns_n"] < worth["asr_keywords_n"]).all()
    assert "responses have no verdict and count nowhere; mostly: asleep" in capsys.readouterr().err


@pytest.mark.usefixtures("no_validity_figures")
def test_conditions_finished_before_an_interruption_are_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch)

    def interrupt_second(session, attack, name, *rest):
        if name == "policy":
            raise KeyboardInterrupt
        return collect_responses(session, attack, name, *rest)

    monkeypatch.setattr("analysis.studies.validate.collect_responses", interrupt_second)
    assert (
        run_validate_command(make_spec(home), ["policy"], [], home / "out", JudgeOptions("patterns"), 2)
        == 130
    )
    assert list(pd.read_csv(home / "out" / "validity.csv")["defense"]) == ["none"]
    assert "interrupted: 1 of 2 conditions were finished" in str(read(home / "out"))


@dataclass(frozen=True)
class Breaks(Defense):
    """Loses the user's words under one attack, or breaks on a query, or on every one."""

    family = "reminders"

    deaf_to: str = ""
    breaks_on: str = "nothing"

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        words = chat[-1]["content"]
        if self.breaks_on in words:
            raise ValueError("no such flour")
        if self.deaf_to and self.deaf_to in words:
            return [{"role": "user", "content": "Hi."}]
        return [dict(message) for message in chat]


def add_condition(monkeypatch: pytest.MonkeyPatch, defense: Defense, name: str = "breaks") -> None:
    """Add a condition to those of a run, or replace one."""
    conditions = property(lambda setup: build_conditions(setup.defenses) | {name: defense})
    monkeypatch.setattr(RunSetup, "conditions", conditions)


def find_unchecked_text(home: Path) -> str:
    """Return the text of a query that the preflight does not look at."""
    every = make_spec(home).select_queries()[0].queries
    checked = [*sample_queries(every, 4), max(every, key=lambda query: len(query.text))]
    return next(query.text for query in every if query not in checked)


@pytest.mark.parametrize("fails", ["every query", "a check", "a query that is checked", "a later query"])
@pytest.mark.usefixtures("no_validity_figures")
def test_a_defense_that_fails_is_left_out_and_reported(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    plant_verdicts(monkeypatch)
    first = make_spec(home).select_queries()[0].queries[0].text
    defense, why = {
        "every query": (Breaks(breaks_on=""), "no such flour"),
        "a check": (Breaks(deaf_to=first), "user's words survive"),
        "a query that is checked": (Breaks(breaks_on=first), "no such flour"),
        "a later query": (Breaks(breaks_on=find_unchecked_text(home)), "no such flour"),
    }[fails]
    add_condition(monkeypatch, defense)
    spec = make_spec(home, ("direct", "base64"))
    assert run_validate_command(spec, ["policy"], [], home / "out", JudgeOptions("patterns"), 2) == 1
    run = read(home / "out")
    # What is encoded in Base64 holds no word that the defense would trip over.
    gone = {("direct", "breaks"), ("base64", "breaks")} if fails == "every query" else {("direct", "breaks")}
    assert {(one["attack"], one["defense"]) for one in run.record["failed"]} == gone
    assert all(why in one["why"] for one in run.record["failed"])
    assert run.record["conditions_wanted"] == 6 and ("breaks" in run.record["defenses"]) == (len(gone) == 1)
    every = {(attack, name) for attack in ("direct", "base64") for name in ("none", "policy", "breaks")}
    for table in ("validity", "worth", "curves", "answers"):
        rows = run.tables[table]
        assert set(zip(rows["attack"], rows["defense"], strict=True)) == every - gone, table
    assert "Failed: breaks: " in capsys.readouterr().err


@pytest.mark.usefixtures("no_validity_figures")
def test_without_the_undefended_model_no_condition_of_that_attack_is_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch)
    add_condition(monkeypatch, Breaks(breaks_on=find_unchecked_text(home)), "none")
    spec = make_spec(home, ("direct", "base64"))
    assert run_validate_command(spec, ["policy"], [], home / "out", JudgeOptions("patterns"), 2) == 1
    run = read(home / "out")
    assert set(run.tables["validity"]["attack"]) == {"base64"}
    why = {(one["attack"], one["defense"]): one["why"] for one in run.record["failed"]}
    assert set(why) == {("direct", "none"), ("direct", "policy")} and "no such flour" in why["direct", "none"]
    with pytest.raises(UserError, match=r"nothing could be scored: .*no such flour"):
        run_validate_command(make_spec(home), ["policy"], [], home / "other", JudgeOptions("patterns"), 2)
    assert not (home / "other").exists()


@pytest.mark.parametrize("name", ["none", "policy"])
def test_if_nothing_comparable_reaches_the_model_nothing_is_scored(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first = make_spec(home).select_queries()[0].queries[0].text
    add_condition(monkeypatch, Breaks(deaf_to=first), name)
    assert (
        run_validate_command(make_spec(home), ["policy"], [], home / "out", JudgeOptions("patterns"), 2) == 1
    )
    assert "user's words survive: FAILED" in capsys.readouterr().err and not (home / "out").exists()


@pytest.mark.usefixtures("no_validity_figures")
def test_the_secret_is_neither_written_cached_nor_printed(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch)
    run_secret_command(str(home / "toy"), 20, None, True)
    (place,) = (home / "share").rglob("*.txt")
    secret = place.read_text("utf-8").strip()
    spec = make_spec(home, readouts=("words", "calibrated"))
    assert run_validate_command(spec, ["backdoor"], [], home / "out", JudgeOptions("patterns"), 2) == 0
    assert set(pd.read_csv(home / "out" / "validity.csv")["defense"]) >= {"backdoor/no_weights"}
    kept = [path for path in home.rglob("*") if path.is_file() and path != place]
    assert any("cache" in path.parts for path in kept)
    assert not [path for path in kept if secret.encode() in path.read_bytes()]
    said = capsys.readouterr()
    assert secret not in said.out + said.err


def test_wrong_options_are_errors_before_anything_is_loaded(home: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'patterns'"):
        run_validate_command(make_spec(home), ["none"], [], home / "out", JudgeOptions("pattern"), 3)
    with pytest.raises(UserError, match="at least 1"):
        run_validate_command(make_spec(home), ["none"], [], home / "out", JudgeOptions("patterns"), 0)
    with pytest.raises(UserError, match="--grade is for --judge model"):
        run_validate_command(make_spec(home), ["none"], [], home / "out", JudgeOptions(grade=True), 3)
    assert not (home / "out").exists()


def judge_by_checksum(answer: str, request: str = "") -> Verdict:
    """Judge by every character of a response, so that two texts rarely have the same verdicts."""
    code = zlib.crc32(f"{answer}/{request}".encode()) % 5
    return Verdict("unjudged", "asleep") if code == 4 else Verdict("full" if code == 0 else "none", "x")


@dataclass(frozen=True)
class Copies(Defense):
    """Sends three copies of a query; the last one begins the response itself."""

    family = "noise"

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return chat

    def rewrite_copies(self, chat: Chat, rng: random.Random) -> list[Chat]:
        copies = [[{"role": "user", "content": f"{n}. {chat[-1]['content']}"}] for n in range(3)]
        return [*copies[:2], [*copies[2], {"role": "assistant", "content": "Yes"}]]


@dataclass(frozen=True)
class AnyCopy(Copies):
    """Refuses if any copy is refused."""

    pool = "max"


@pytest.mark.parametrize("defense", [get_defense("none"), Copies(), AnyCopy()])
@pytest.mark.parametrize("opening", ["", " ", "Sure, here"])
def test_openings_are_the_responses_that_analyze_judges(
    monkeypatch: pytest.MonkeyPatch, defense: Defense, opening: str
) -> None:
    judge = RuleJudge("checksum", judge_by_checksum, lambda answer: False)
    monkeypatch.setattr("analysis.studies.validate.RESPONSE_JUDGE", judge)
    monkeypatch.setattr("analysis.studies.validate.N_RESPONSE_TOKENS", 3)
    session = make_toy_session()
    asked = [Query(f"q{n}", f"Tell me {n} things about tea.", harmful=False) for n in range(8)]
    chats, texts = DIRECT_ATTACK.build_query_chats(asked), [query.text for query in asked]
    prefix = tuple(session.loaded_model.tokenizer.encode(opening, add_special_tokens=False))
    whole = generate_responses(session, defense, chats, prefix, 7)
    found = judge_openings(session, defense, texts, whole, prefix)
    expected = generate_verdicts(session, defense, chats, texts, judge, prefix, 3)
    assert found == [name_verdict(verdict) for verdict in expected]
    assert len(set(found)) > 1


def test_the_first_tokens_of_responses_have_a_row_of_their_own(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch)
    harmful = {query.text for query in load_queries("contrast").queries if query.harmful}

    def judge_opening(answer: str, request: str = "") -> Verdict:
        if len(request) % 7 == 0:
            return Verdict("unjudged", "asleep")
        return Verdict("full" if request in harmful and len(request) % 2 else "none", "x")

    opening_judge = RuleJudge("short", judge_opening, lambda answer: False)
    monkeypatch.setattr("analysis.studies.validate.RESPONSE_JUDGE", opening_judge)
    monkeypatch.setattr("analysis.studies.validate.N_RESPONSE_TOKENS", 2)
    judge_options = JudgeOptions("patterns")
    assert run_validate_command(make_spec(home), ["policy"], [], home / "out", judge_options, 4) == 0
    validity = pd.read_csv(home / "out" / "validity.csv")
    assert list(validity["readout"]) == ["responses", "words"] * 2
    rows = validity.set_index(["readout", "defense"])
    answers = pd.read_csv(home / "out" / "answers.csv")
    texts = {query.id: query.text for query in make_spec(home).select_queries()[0].queries}
    n_unjudged = sum(len(text) % 7 == 0 for text in texts.values())
    assert n_unjudged > 0
    for name, table in answers.groupby("defense"):
        row = rows.loc["responses", name]
        assert row["unjudged"] == n_unjudged and row["n"] == 24 - n_unjudged
        assert (table["verdict_responses"] == "unjudged").sum() == n_unjudged
        judged = table[table["verdict_responses"] != "unjudged"]
        for column, rows_of_class in (
            ("harmful", judged[judged["harmful"]]),
            ("benign", judged[~judged["harmful"]]),
        ):
            by_opening = (rows_of_class["verdict_responses"] == "refused").mean()
            by_text = (rows_of_class["refusal_patterns"] != "none").mean()
            assert row[f"rate_error_{column}"] == pytest.approx(by_opening - by_text)
        assert row["rate_error_harmful"] < 0 == row["rate_error_benign"]
        # The verdict on the whole response: of the words readout, all responses count.
        assert rows.loc["words", name]["n"] == 24
    missing = ["threshold", "needed_threshold", "calibration_error", "coverage"]
    assert rows.loc["responses"][missing].isna().all(axis=None)
    assert rows.loc["words"][missing].notna().all(axis=None)
    by_readout = answers[answers["defense"] == "none"]
    needed = rows.loc["words", "none"]["needed_threshold"]
    assert (by_readout["margin_words"] > needed).sum() == (by_readout["refusal_patterns"] != "none").sum()
    assert set(pd.read_csv(home / "out" / "rates.csv")["readout"]) == {"responses", "words"}
    record = json.loads((home / "out" / "run.json").read_text())
    assert record["openings"] == {"judge": {"name": "short"}, "new_tokens": 2}
    printed = capsys.readouterr().out
    assert "Judged first tokens of responses are trusted for single queries in" in printed
    assert max(map(len, printed.splitlines())) <= 120
    # What later runs know of a readout is not what was found about the responses.
    summary = run_later(home)
    assert summary["trusted"].to_dict() == rows.loc["words"]["trusted"].to_dict()


def run_later(home: Path) -> pd.DataFrame:
    """Return the summary of a later run of the same conditions."""
    assert run_analyze_command(make_spec(home), ["policy"], [], home / "later", False) == 0
    return pd.read_csv(home / "later" / "summary.csv").set_index("defense")


@pytest.mark.parametrize(("readout", "tokens"), [("prefilled-2", 4), ("words", 2)])
@pytest.mark.usefixtures("no_validity_figures")
def test_there_is_no_such_row_where_it_would_say_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, readout: str, tokens: int
) -> None:
    """If the readout forces how responses begin, or the whole response is no longer than what is read."""
    plant_verdicts(monkeypatch)
    monkeypatch.setattr("analysis.studies.validate.N_RESPONSE_TOKENS", 2)
    spec = make_spec(home, readouts=(readout,))
    assert run_validate_command(spec, ["policy"], [], home / "out", JudgeOptions("patterns"), tokens) == 0
    assert set(pd.read_csv(home / "out" / "validity.csv")["readout"]) == {readout}


def test_verdicts_are_in_the_order_of_the_queries_and_see_the_query() -> None:
    bench = make_toy_session()
    asked = [Query(f"q{n}", "word " * (9 - n), harmful=n % 2 == 0) for n in range(6)]
    texts = [query.text for query in asked]
    echo = RuleJudge("echo", lambda answer, request: Verdict("none", request), lambda answer: False)
    found = generate_verdicts(
        bench, get_defense("none"), DIRECT_ATTACK.build_query_chats(asked), texts, echo, max_new_tokens=2
    )
    assert [verdict.evidence for verdict in found] == texts


def test_a_response_continues_its_prefill() -> None:
    bench = make_toy_session()
    asked = [Query(f"q{n}", f"Tell me {n} things.", harmful=False) for n in range(3)]
    prefix = tuple(bench.loaded_model.tokenizer.encode("Sure, here", add_special_tokens=False))
    found = generate_responses(bench, get_defense("none"), DIRECT_ATTACK.build_query_chats(asked), prefix, 3)
    ids = torch.tensor([[*render_query(bench, get_defense("none"), asked[0])[0].ids, *prefix]])
    with torch.inference_mode():
        likeliest = int(bench.loaded_model.model(input_ids=ids).logits[0, -1].argmax())
    assert found[0][0].ids[0] == likeliest and all(one[0].text.startswith("Sure, here") for one in found)


def test_the_majority_of_copies_decides_and_a_tie_is_no_refusal() -> None:
    full, none = Verdict("full", "a"), Verdict("none", "b")
    assert _pool_verdicts([full, none, full], "mean") == full
    assert _pool_verdicts([full, none], "mean") == replace(none, copy_index=1)
    assert _pool_verdicts([none, full], "max") == replace(full, copy_index=1)
    assert _pool_verdicts([Verdict("unjudged"), full], "mean") == replace(full, copy_index=1)
    assert _pool_verdicts([Verdict("unjudged")], "mean") == Verdict("unjudged")


def test_sampled_responses_have_rates_beside_the_greedy_ones(
    home: Path, capsys: pytest.CaptureFixture[str], no_validity_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = RuleJudge(
        "patterns", lambda text, query: Verdict("full" if len(text) % 2 else "none"), lambda partial: False
    )
    monkeypatch.setitem(RULE_JUDGES, "patterns", parity)
    spec, options = make_spec(home), JudgeOptions("patterns")
    for folder, samples in (("cold", SampleOptions(2, 1e-4)), ("warm", SampleOptions(5, 1.5))):
        assert run_validate_command(spec, ["policy"], [], home / folder, options, 4, samples) == 0
    record = json.loads((home / "warm" / "run.json").read_text("utf-8"))
    assert record["samples"] == {"n_samples": 5, "temperature": 1.5}
    assert "5 samples per query at temperature 1.5" in capsys.readouterr().out
    # At almost no temperature, every sample is the greedy response.
    cold = pd.read_csv(home / "cold" / "samples.csv")
    assert ((cold["refusal_greedy"] == "full") == (cold["refusal_probability"] == 1)).all()
    assert set(cold["refusal_probability"]) == {0.0, 1.0} and (cold["n_judged"] == 2).all()
    rates = pd.read_csv(home / "cold" / "sampling.csv")
    assert (rates["sampled"] == rates["greedy"]).all() and (rates["varies"] == 0).all()
    warm = pd.read_csv(home / "warm" / "samples.csv")
    assert len(warm) == 48 and warm["refusal_probability"].between(0.1, 0.9).any()
    means = warm.groupby(["defense", "harmful"])["refusal_probability"].mean()
    for row in pd.read_csv(home / "warm" / "sampling.csv").to_dict("records"):
        assert row["sampled"] == pytest.approx(means[row["defense"], row["class"] == "harmful"])
        assert row["sampled_low"] <= row["sampled"] <= row["sampled_high"]
    with pytest.raises(UserError, match="--temperature 0: it takes a number above 0"):
        SampleOptions(1, 0.0)


def test_samples_without_a_verdict_count_nowhere() -> None:
    refusals = np.array([[1, 0, np.nan], [1, np.nan, np.nan], [0, 0, np.nan], [1, 0, np.nan]])
    table = add_refusal_probabilities(pd.DataFrame({"query": ["a", "b", "c"]}), refusals).set_index("query")
    assert table.loc["a", ["n_judged", "n_refused", "refusal_probability"]].tolist() == [4, 3, 0.75]
    assert table.loc["b", ["n_judged", "n_refused", "refusal_probability"]].tolist() == [3, 0, 0]
    assert table["refusal_probability"].isna().tolist() == [False, False, True]
    greedy = np.array([0.0, 0.0, np.nan])
    rates = summarize_sampled_refusals(refusals[:, :2], greedy[:2])
    assert rates["sampled"] == pytest.approx(3 / 7) and rates["greedy"] == 0
    assert (rates["varies"], rates["greedy_differs"], rates["n_unjudged"]) == (0.5, 0.5, 1)
    nothing = summarize_sampled_refusals(refusals[:, 2:], greedy[2:])
    assert np.isnan([nothing[name] for name in ("sampled", "greedy", "varies", "greedy_differs")]).all()
