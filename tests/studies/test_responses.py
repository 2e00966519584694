"""Responses of a run: the same queries in every condition, judged once, no text kept."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from conftest import assert_user_error, make_toy_session, run_cli

from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.judges.judge import RuleJudge, Verdict
from analysis.models.cache import ScoreCache, count_cached_rows
from analysis.models.session import ModelSession, generate_responses
from analysis.readouts.readout import Readout
from analysis.studies import responses as responses_module
from analysis.studies.responses import N_RESPONSE_TOKENS, judge_condition, sample_answered_queries
from defenses.catalog import get_defense

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


def test_verdicts_are_those_of_the_first_tokens_of_each_response() -> None:
    session, queries, attack = make_toy_session(), QUERIES[:6], get_attack("persona")
    judge, seen = make_echo_judge()
    kinds = judge_condition(session, attack, POLICY, queries, judge, READOUT)
    chats = attack.build_query_chats(queries)
    expected = generate_responses(session, POLICY, chats, max_new_tokens=N_RESPONSE_TOKENS)
    assert seen == [(response.text, query.text) for (response,), query in zip(expected, queries, strict=True)]
    assert kinds == ["none" if len(response.text) % 2 else "full" for (response,) in expected]


def test_verdicts_are_cached_and_depend_on_what_they_are_made_of(tmp_path: Path) -> None:
    session = ModelSession.from_model(make_toy_session().loaded_model, score_cache=ScoreCache(tmp_path / "s"))
    judge, seen = make_echo_judge()
    first = judge_condition(session, DIRECT_ATTACK, NONE, QUERIES[:4], judge, READOUT)
    assert len(seen) == 4 and count_cached_rows(tmp_path / "s")["responses"] == 4
    progress: list[int] = []
    again = judge_condition(session, DIRECT_ATTACK, NONE, QUERIES[:6], judge, READOUT, progress.append)
    assert again[:4] == first and len(seen) == 6 and sum(progress) == 6
    other_judge = RuleJudge("other", judge.judge_response, judge.is_certain_refusal)
    for changed in (
        (DIRECT_ATTACK, POLICY, judge),
        (get_attack("persona"), NONE, judge),
        (DIRECT_ATTACK, NONE, other_judge),
    ):
        n_seen = len(seen)
        judge_condition(session, *changed[:2], QUERIES[:4], changed[2], READOUT)
        assert len(seen) == n_seen + 4
    # Neither a query nor a response can be read from the cache.
    cached = session.score_cache._connection.execute("SELECT refusal FROM responses").fetchall()
    assert {kind for (kind,) in cached} <= {"full", "none"}


def test_a_sample_keeps_pairs_whole_and_kinds_in_proportion() -> None:
    sample = sample_answered_queries(QUERIES, 60, seed=0)
    counts, all_counts = (Counter(query.kind for query in queries) for queries in (sample, QUERIES))
    for kind, count in all_counts.items():
        assert counts[kind] == pytest.approx(60 * count / len(QUERIES), abs=1.5)
    pair_sizes = Counter(query.pair for query in sample if query.pair)
    assert set(pair_sizes.values()) == {2}
    assert [query.id for query in sample] == [query.id for query in QUERIES if query in sample]
    assert sample == sample_answered_queries(QUERIES, 60, 0) != sample_answered_queries(QUERIES, 60, 1)
    for max_responses in (None, 10_000):
        assert sample_answered_queries(QUERIES, max_responses, 0) == list(QUERIES)


@pytest.mark.usefixtures("no_figures")
def test_a_run_with_responses_has_their_rates_and_keeps_no_text(cli_home: Path) -> None:
    options = ("-d", "policy", "-m", "tiny", "--limit", "16")
    result = run_cli(*options, "--responses", "8", "-o", "answered")
    assert result.code == 0 and "Responses, first 12 tokens, judged" in result.out
    responses = pd.read_csv(cli_home / "answered" / "responses.csv")
    summary = pd.read_csv(cli_home / "answered" / "summary.csv").set_index("defense")
    answered = responses.groupby("defense")["query"].apply(set)
    assert answered["none"] == answered["policy"] and len(answered["none"]) <= 8
    assert list(responses.columns) == list(responses_module.RESPONSE_COLUMNS)
    assert (summary["n_responses"] == len(answered["none"])).all()
    assert summary["response_refusal_rate"].between(0, 1).all()
    record = json.loads((cli_home / "answered" / "run.json").read_text("utf-8"))
    assert record["responses"]["new_tokens"] == N_RESPONSE_TOKENS
    assert record["responses"]["judge"] == {"name": "patterns"}
    without = run_cli(*options, "-o", "unanswered")
    assert without.code == 0 and "Responses" not in without.out
    assert not (cli_home / "unanswered" / "responses.csv").exists()
    margins, again = (
        pd.read_csv(cli_home / name / "scores.csv")["margin"] for name in ("answered", "unanswered")
    )
    pd.testing.assert_series_equal(margins, again)
    assert_user_error(run_cli(*options, "--responses", "some"), "it takes all, none or a whole number")


@pytest.mark.usefixtures("no_figures")
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
    assert [row["defense"] for row in record["failed"]] == ["policy"]
