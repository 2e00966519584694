"""Conditions are timed on each query, with their calls and tokens."""

from __future__ import annotations

from conftest import make_toy_session, render_query

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.studies.cost import TIMING_COLUMNS, time_conditions
from defenses.catalog import get_defense


def test_each_query_is_timed_under_each_condition_and_leaves_the_model_as_it_was() -> None:
    session, progress = make_toy_session(), []
    queries = sample_queries(load_queries("twins").queries, 4)
    weights = {name: tensor.clone() for name, tensor in session.loaded_model.model.state_dict().items()}
    conditions = {name: get_defense(name) for name in ("none", "policy", "paraphrase", "smooth_llm")}
    timings = time_conditions(
        session, conditions, DIRECT_ATTACK.build_query_chats(queries), lambda: progress.append(1)
    )
    assert list(timings.columns) == list(TIMING_COLUMNS) and len(timings) == len(progress) == 16
    assert (timings[["prefill_seconds", "token_seconds"]] > 0).all(axis=None)
    calls = timings.groupby("defense")["calls"].unique().map(list).to_dict()
    assert calls == {"none": [1], "policy": [1], "paraphrase": [2], "smooth_llm": [10]}
    with_draft = timings[timings["draft_tokens"] > 0]
    assert set(with_draft["defense"]) == {"paraphrase"} and len(with_draft) == 4
    tokens = timings.set_index(["query", "defense"])["prompt_tokens"]
    for query in queries:
        assert tokens[query.id, "none"] == len(render_query(session, conditions["none"], query)[0].ids)
        assert tokens[query.id, "policy"] > tokens[query.id, "none"]
    assert all(
        (weights[name] == tensor).all() for name, tensor in session.loaded_model.model.state_dict().items()
    )
