"""Responses of a run: the same queries in every condition, judged once, no text kept."""

from __future__ import annotations

import json
import random
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import assert_user_error, make_adapter, make_toy_session, run_cli

from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query
from analysis.judges.judge import RuleJudge, Verdict
from analysis.judges.rules import RULE_JUDGES
from analysis.models.cache import ScoreCache, count_cached_rows
from analysis.models.session import ModelSession, Response, generate_responses
from analysis.readouts.readout import Readout
from analysis.run import score_condition
from analysis.studies import responses as responses_module
from analysis.studies.responses import (
    N_RESPONSE_TOKENS,
    _make_keys,
    judge_condition,
    sample_answered_queries,
)
from defenses.adapters import load_adapter
from defenses.catalog import get_defense
from defenses.contract import Chat, Defense, ModelInfo
from defenses.decoding import SafeDecoding
from defenses.tuning import SafetyTuning

NONE, POLICY = get_defense("none"), get_defense("policy")
QUERIES = load_queries("contrast").select_split("test").queries
READOUT = Readout("words", ("a", "b"), (300, 301), (1.0, -1.0))


def make_echo_judge() -> tuple[RuleJudge, list[tuple[str, str]]]:
    """Return a judge that finds a refusal in responses of even length, and the list of what it has read."""
    seen: list[tuple[str, str]] = []

    def judge_response(response: str, query: str) -> Verdict:
        seen.append((response, query))
        return Verdict("none" if len(response) % 2 else "full")

    return RuleJudge("echo", judge_response, lambda partial_response: False), seen


def expect_verdicts(responses: list[list[Response]]) -> list[str]:
    """Return the verdicts of the echo judge on responses, one per query."""
    return ["not refused" if len(response.text) % 2 else "refused" for (response,) in responses]


@pytest.mark.parametrize("prefill", [(), (40, 41)])
def test_verdicts_are_those_of_the_first_tokens_of_each_response(prefill: tuple[int, ...]) -> None:
    session, queries, attack = make_toy_session(), QUERIES[:6], get_attack("persona")
    judge, seen = make_echo_judge()
    verdicts = judge_condition(session, attack, POLICY, queries, judge, replace(READOUT, prefill=prefill))
    chats = attack.build_query_chats(queries)
    expected = generate_responses(session, POLICY, chats, prefill, N_RESPONSE_TOKENS)
    assert seen == [(response.text, query.text) for (response,), query in zip(expected, queries, strict=True)]
    assert verdicts == expect_verdicts(expected)


def test_a_response_without_text_or_verdict_is_unjudged() -> None:
    session = make_toy_session()
    for refusal, expected in (("unjudged", "unjudged"), ("partial", "refused"), ("none", "not refused")):
        judge = RuleJudge("fixed", lambda *texts, kind=refusal: Verdict(kind), lambda partial: False)
        assert judge_condition(session, DIRECT_ATTACK, NONE, QUERIES[:1], judge, READOUT) == [expected]


def test_several_copies_of_a_query_are_pooled_by_the_rule_of_the_defense() -> None:
    session = make_toy_session()
    judge = RuleJudge(
        "b", lambda response, query: Verdict("full" if "b" in response else "none"), lambda partial: False
    )
    for name in ("smooth_llm", "erase_and_check"):
        defense = get_defense(name).prepare(ModelInfo("toy", session.loaded_model.tokenizer, ()))
        verdicts = judge_condition(session, DIRECT_ATTACK, defense, QUERIES[:4], judge, READOUT)
        responses = generate_responses(
            session, defense, DIRECT_ATTACK.build_query_chats(QUERIES[:4]), (), N_RESPONSE_TOKENS
        )
        for verdict, copies in zip(verdicts, responses, strict=True):
            n_refused = sum("b" in response.text for response in copies)
            is_refused = n_refused > (0 if defense.pool == "max" else len(copies) / 2)
            assert verdict == ("refused" if is_refused else "not refused") and len(copies) > 1


def test_verdicts_are_cached_without_any_text(tmp_path: Path) -> None:
    session = ModelSession.from_model(make_toy_session().loaded_model, score_cache=ScoreCache(tmp_path / "s"))
    judge, seen = make_echo_judge()
    first = judge_condition(session, DIRECT_ATTACK, NONE, QUERIES[:4], judge, READOUT)
    assert len(seen) == 4 and count_cached_rows(tmp_path / "s")["responses"] == 4
    progress: list[int] = []
    again = judge_condition(session, DIRECT_ATTACK, NONE, QUERIES[:6], judge, READOUT, progress.append)
    assert again[:4] == first and len(seen) == 6 and sum(progress) == 6
    rows = session.score_cache._connection.execute("SELECT * FROM responses").fetchall()
    assert {len(key) for key, _ in rows} == {16}
    assert {verdict for _, verdict in rows} <= {"refused", "not refused"}


def test_prompts_are_scored_while_their_responses_are_generated(tmp_path: Path) -> None:
    """The scores are those of a scoring run, and no prompt runs through the model a second time."""
    loaded_model, judge = make_toy_session().loaded_model, make_echo_judge()[0]
    copies = get_defense("smooth_llm").prepare(ModelInfo("toy", loaded_model.tokenizer, ()))
    for number, (defense, readout, is_reused) in enumerate(
        (
            (POLICY, READOUT, True),
            (copies, READOUT, True),
            (POLICY, replace(READOUT, response_prefix=(40,), prefill=(40,)), True),
            (POLICY, replace(READOUT, response_prefix=(40,)), False),
        )
    ):
        cache = ScoreCache(tmp_path / f"{number}.sqlite")
        session = ModelSession.from_model(loaded_model, score_cache=cache)
        judge_condition(session, DIRECT_ATTACK, defense, QUERIES[:6], judge, readout)
        counter = session.engine.work_counter
        counter.reset_counts()
        scores = score_condition(session, "x", defense, QUERIES[:6], readout)
        assert (counter.computed_tokens == 0) == is_reused
        fresh_session = ModelSession.from_model(loaded_model)
        expected = score_condition(fresh_session, "x", defense, QUERIES[:6], readout)
        pd.testing.assert_frame_equal(scores, expected, check_exact=False, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Constant(Defense):
    """Asks the same question whatever the query is, so that only the judge sees the query."""

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return [{"role": "user", "content": "Hi."}]


@dataclass(frozen=True)
class ConstantMax(Constant):
    """The same, with another rule for copies."""

    pool = "max"


@dataclass(frozen=True)
class BlendWithHook(Constant):
    """Blends unchanged models and changes the model that continues the response, in an unknown way."""

    def logit_blend(self) -> tuple[tuple[float, Defense], ...]:
        return ((0.5, NONE), (0.5, NONE))

    def apply_to(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext()


def test_keys_depend_on_everything_that_a_verdict_depends_on(tmp_path: Path) -> None:
    session, query = make_toy_session(), QUERIES[0]
    judge, _ = make_echo_judge()
    adapters = [load_adapter(make_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    cases: dict[str, tuple[Any, ...]] = {
        "baseline": (session, DIRECT_ATTACK, NONE, query, judge, READOUT),
        "attack": (session, get_attack("persona"), NONE, query, judge, READOUT),
        "defense": (session, DIRECT_ATTACK, POLICY, query, judge, READOUT),
        "weights": (session, DIRECT_ATTACK, SafetyTuning(adapter=adapters[0]), query, judge, READOUT),
        "other weights": (session, DIRECT_ATTACK, SafetyTuning(adapter=adapters[1]), query, judge, READOUT),
        "blend": (session, DIRECT_ATTACK, SafeDecoding(adapter=adapters[0]), query, judge, READOUT),
        "judge": (session, DIRECT_ATTACK, NONE, query, replace(judge, name="other"), READOUT),
        "prefill": (session, DIRECT_ATTACK, NONE, query, judge, replace(READOUT, prefill=(7,))),
        "constant": (session, DIRECT_ATTACK, Constant(), query, judge, READOUT),
        "query text": (session, DIRECT_ATTACK, Constant(), QUERIES[1], judge, READOUT),
        "pool": (session, DIRECT_ATTACK, ConstantMax(), query, judge, READOUT),
    }
    keys = {
        name: _make_keys(session, attack.build_query_chats([query]), defense, [query], judge, readout)
        for name, (session, attack, defense, query, judge, readout) in cases.items()
    }
    assert len({key for (key,) in keys.values()}) == len(cases)
    # A threshold changes no verdict; an unknown change of the model is not cached.
    chats = DIRECT_ATTACK.build_query_chats([query])
    shifted = replace(READOUT, threshold=1.0)
    assert _make_keys(session, chats, NONE, [query], judge, shifted) == keys["baseline"]
    assert _make_keys(session, chats, BlendWithHook(), [query], judge, READOUT) == []


def test_a_sample_keeps_pairs_whole_and_strata_in_proportion() -> None:
    def name_stratum(query: Query) -> str:
        return "pair" if query.pair else "harmful" if query.harmful else "benign"

    for size in (60, 61, 40, 22):
        sample = sample_answered_queries(QUERIES, size, seed=0)
        counts, all_counts = (Counter(map(name_stratum, queries)) for queries in (sample, QUERIES))
        for stratum, count in all_counts.items():
            assert abs(counts[stratum] - size * count / len(QUERIES)) < 2, (size, stratum)
        assert size - 1 <= len(sample) <= size
        assert set(Counter(query.pair for query in sample if query.pair).values()) == {2}
        assert [query.id for query in sample] == [query.id for query in QUERIES if query in sample]
    assert sample == sample_answered_queries(QUERIES, 22, 0) != sample_answered_queries(QUERIES, 22, 1)
    for max_responses in (None, 10_000):
        assert sample_answered_queries(QUERIES, max_responses, 0) == list(QUERIES)


def test_a_sample_has_both_classes_however_small_it_is() -> None:
    kinds = [Query(f"q{number}", "x", number < 6, kind=f"k{number % 50}") for number in range(200)]
    for queries, size in ((QUERIES, 1), (kinds, 2), (kinds, 30)):
        sample = sample_answered_queries(queries, size, 0)
        assert {query.harmful for query in sample} == {True, False}
    assert len(sample) == 30


@pytest.fixture
def keyword_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge by keywords: to the default judge, the random text of a tiny model is no English."""
    monkeypatch.setattr(responses_module, "RESPONSE_JUDGE", RULE_JUDGES["keywords"])


@pytest.mark.usefixtures("no_figures", "keyword_judge")
def test_a_run_with_responses_has_their_rates_and_keeps_no_text(cli_home: Path) -> None:
    options = ("-d", "policy", "-m", "tiny", "--limit", "16")
    result = run_cli(*options, "--responses", "8", "-o", "answered")
    text = f"first {N_RESPONSE_TOKENS} tokens of the responses, judged by keywords"
    assert result.code == 0 and text in " ".join(result.out.split())
    responses = pd.read_csv(cli_home / "answered" / "responses.csv")
    summary = pd.read_csv(cli_home / "answered" / "summary.csv").set_index("defense")
    answered = responses.groupby("defense")["query"].apply(set)
    assert answered["none"] == answered["policy"] and len(answered["none"]) <= 8
    assert list(responses.columns) == list(responses_module.RESPONSE_COLUMNS)
    assert (summary["n_responses"] == len(answered["none"])).all()
    assert summary["refusal_rate"].between(0, 1).all() and (summary["based_on"] == "responses").all()
    record = json.loads((cli_home / "answered" / "run.json").read_text("utf-8"))
    assert record["responses"]["new_tokens"] == N_RESPONSE_TOKENS
    assert record["responses"]["judge"] == {"name": "keywords"}
    without = run_cli(*options, "--responses", "none", "-o", "unanswered")
    assert without.code == 0 and "no response was judged" in " ".join(without.out.split())
    assert not (cli_home / "unanswered" / "responses.csv").exists()
    margins, again = (
        pd.read_csv(cli_home / name / "scores.csv")["margin"] for name in ("answered", "unanswered")
    )
    pd.testing.assert_series_equal(margins, again)
    for text in ("some", "²", "-1"):
        assert_user_error(run_cli(*options, "--responses", text), "it takes auto, all, none or a whole")
    forced = run_cli(*options, "--responses", "8", "--readout", "prefilled-2")
    assert_user_error(forced, "forces how responses begin")
    assert run_cli(*options, "--readout", "prefilled-2", "-o", "forced").code == 0
    forced_summary = pd.read_csv(cli_home / "forced" / "summary.csv")
    assert (forced_summary["based_on"] == "margins").all()


@pytest.mark.usefixtures("no_figures", "keyword_judge")
def test_a_condition_whose_responses_fail_keeps_its_margins(
    cli_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_for_policy(session, attack, defense, *rest):
        if defense.name == "policy":
            raise RuntimeError("out of memory")
        return judge_condition(session, attack, defense, *rest)

    monkeypatch.setattr(responses_module, "judge_condition", fail_for_policy)
    result = run_cli(
        "-d", "policy", "-m", "tiny", "--limit", "8", "--responses", "all", "-o", "half-answered"
    )
    assert result.code == 1 and "responses: RuntimeError: out of memory" in result.err
    summary = pd.read_csv(cli_home / "half-answered" / "summary.csv").set_index("defense")
    assert summary["shift"].notna()["policy"] and summary["n_responses"].isna()["policy"]
    record = json.loads((cli_home / "half-answered" / "run.json").read_text("utf-8"))
    assert [row["defense"] for row in record["responses"]["failed"]] == ["policy"] and not record["failed"]


@pytest.mark.usefixtures("no_figures", "keyword_judge")
def test_an_interruption_keeps_finished_conditions_and_failures_keep_the_margins(
    cli_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_second(session, attack, defense, *rest):
        if defense.name == "self_reminder":
            raise KeyboardInterrupt
        return judge_condition(session, attack, defense, *rest)

    def fail(*args):
        raise RuntimeError("out of memory")

    options = ("-d", "policy", "-d", "self_reminder", "-m", "tiny", "--limit", "8", "--responses", "all")
    for stand_in, code in ((interrupt_second, 130), (fail, 1)):
        monkeypatch.setattr(responses_module, "judge_condition", stand_in)
        result = run_cli(*options, "-o", stand_in.__name__)
        assert result.code == code
        summary = pd.read_csv(cli_home / stand_in.__name__ / "summary.csv").set_index("defense")
        assert summary["shift"].notna()["policy"]
        record = json.loads((cli_home / stand_in.__name__ / "run.json").read_text("utf-8"))
        assert record["responses"]["interrupted"] == (code == 130)
        if code == 130:
            assert list(summary.index) == ["none", "policy"] and (summary["n_responses"] == 8).all()
            assert "Interrupted: 2 of 3 conditions were finished" in " ".join(result.err.split())
        else:  # without any response, the rates are those of the readout
            assert (summary["based_on"] == "margins").all() and summary["refusal_rate"].notna().all()
