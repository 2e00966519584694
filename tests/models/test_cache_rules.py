"""What the cache must not store, and what its keys depend on."""

from __future__ import annotations

from pathlib import Path

from conftest import make_toy_session

from analysis.models.cache import (
    SCORING_SOURCES,
    ScoreCache,
    count_cached_rows,
    describe_computation,
    hash_code,
)
from analysis.models.session import ModelSession
from defenses.contract import ModelCall


def test_scores_that_are_not_finite_are_not_cached(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "s")
    cache.write_scores([(b"a", float("nan"), 1.0), (b"b", float("inf"), 1.0), (b"c", 1.0, 1.0)])
    assert cache.read_scores([b"a", b"b", b"c"]) == {b"c": (1.0, 1.0)}
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_responses_to_requests_are_never_cached(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "s")
    session = ModelSession.from_model(make_toy_session().loaded_model, score_cache=cache)
    chat = [{"role": "user", "content": "How do I sing?"}]
    for stops_at_newline, n_drafts in ((False, 0), (True, 1)):
        session.defense_calls.complete_calls([ModelCall(chat, 6, stops_at_newline=stops_at_newline)])
        assert count_cached_rows(tmp_path / "s")["drafts"] == n_drafts


def test_keys_depend_on_the_configuration_and_the_code() -> None:
    description = describe_computation(make_toy_session().loaded_model)
    assert description["code"] == hash_code(*SCORING_SOURCES)
    assert description["config"]["hidden_size"] == 64
    assert description["config"]["_name_or_path"] == ""
