"""Matched controls of a run: each query meets one draw, and the rest of the run is as without controls."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import derive_readout, make_toy_session
from rich.console import Console

from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query
from analysis.run import score_condition
from analysis.studies.matched_controls import CONTROL_SCORE_COLUMNS, deal_queries, score_controls
from analysis.studies.responses import RESPONSE_JUDGE, judge_condition
from analysis.studies.run_spec import RunSpec
from analysis.studies.setup import RunSetup
from defenses.catalog import get_defense
from defenses.contract import ModelInfo
from defenses.matched_controls import build_matched_control

QUERY_SET = load_queries("contrast").select_split("test").limit_queries(30)
SPEC = RunSpec("toy", "contrast", max_responses=20)
CONSOLE = Console(quiet=True)


def make_setup(names: tuple[str, ...], attacks: Any = (DIRECT_ATTACK,)) -> RunSetup:
    """Return the set-up of a toy model with these defenses."""
    session = make_toy_session()
    info = ModelInfo("toy", session.loaded_model.tokenizer, ())
    defenses = [get_defense(name).prepare(info) for name in ("none", *names)]
    readout = derive_readout(session, QUERY_SET.queries, defenses[0])
    return RunSetup(session, info, defenses, QUERY_SET, "test", [readout], attacks, [])


def test_queries_are_dealt_evenly_and_pairs_stay_together() -> None:
    queries = load_queries("contrast").select_split("test").queries
    dealt = deal_queries(queries, 20, seed=0)
    assert sorted(query.id for members in dealt for query in members) == sorted(query.id for query in queries)
    counts = pd.DataFrame([Counter(query.kind for query in members) for members in dealt]).fillna(0)
    assert (counts.max() - counts.min() <= 1).all()
    for members in dealt:
        pairs = Counter(query.pair for query in members if query.pair)
        assert set(pairs.values()) == {2}
    assert dealt != deal_queries(queries, 20, seed=1)
    # As many groups as there are benign queries: each has one.
    few = [
        Query(f"{kind}{number}", kind, kind in ("harmful", "h"), kind=kind, pair=pair)
        for kind, count in (("harmful", 12), ("plain", 3))
        for number in range(count)
        for pair in (None,)
    ]
    few += [
        Query(f"{kind}-{pair}", kind, kind == "h", kind=kind, pair=pair)
        for pair in ("one", "two")
        for kind in ("h", "b")
    ]
    for members in deal_queries(few, 5, seed=0):
        assert {query.harmful for query in members} == {True, False}


def test_each_draw_is_scored_and_judged_as_its_control_would_be_alone() -> None:
    attack = get_attack("persona")
    setup = make_setup(("policy", "retokenization"), (DIRECT_ATTACK, attack))
    keys = [(one.name, name) for one in setup.attacks for name in ("none", "policy", "retokenization")]
    controls = score_controls(setup, keys, 6, SPEC, CONSOLE)
    assert list(controls.frames) == [("direct", "policy"), ("persona", "policy")] and not controls.failures
    table = controls.table
    assert list(table) == list(CONTROL_SCORE_COLUMNS) and set(table["control"]) == {"neutral text"}
    assert controls.describe()["draws"] == 6
    for (attack_name, draw), rows in table.groupby(["attack", "draw"]):
        control = build_matched_control(setup.conditions["policy"], setup.model_info, draw)
        by_id = {query.id: query for query in QUERY_SET.queries}
        members = [by_id[query] for query in rows["query"]]
        chosen = {DIRECT_ATTACK.name: DIRECT_ATTACK, attack.name: attack}[attack_name]
        expected = score_condition(setup.session, "policy", control.defense, members, setup.readout, chosen)
        np.testing.assert_allclose(rows["margin"], expected["margin"], atol=1e-5)
        judged = rows["verdict"].notna().to_numpy()
        answered = [query for query, is_judged in zip(members, judged, strict=True) if is_judged]
        verdicts = judge_condition(
            setup.session, chosen, control.defense, answered, RESPONSE_JUDGE, setup.readout
        )
        assert rows.loc[judged, "verdict"].tolist() == verdicts
    assert sorted(table.loc[table["attack"] == "direct", "query"]) == sorted(q.id for q in QUERY_SET.queries)
    assert table.loc[table["attack"] == "direct", "verdict"].notna().sum() == 20


def test_few_queries_reduce_the_draws_or_leave_the_controls_out() -> None:
    setup = make_setup(("policy",))
    keys = [("direct", "none"), ("direct", "policy")]
    smaller = min(sum(query.harmful == side for query in QUERY_SET.queries) for side in (True, False))
    assert score_controls(setup, keys, 20, SPEC, CONSOLE).table["draw"].nunique() == smaller < 20
    few = replace(setup, query_set=QUERY_SET.limit_queries(8))
    assert score_controls(few, keys, 20, SPEC, CONSOLE).frames == {}


def test_a_control_that_fails_is_named_and_an_interruption_keeps_the_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = make_setup(("policy", "goal_priority", "safety_prompt"))
    keys = [("direct", name) for name in setup.conditions]
    errors: dict[str, BaseException] = {
        "policy": ValueError("too long"),
        "safety_prompt": KeyboardInterrupt(),
    }

    def score_or_fail(session: Any, name: str, *args: Any) -> pd.DataFrame:
        if name in errors:
            raise errors[name]
        return score_condition(session, name, *args)

    monkeypatch.setattr("analysis.studies.matched_controls.score_condition", score_or_fail)
    controls = score_controls(setup, keys, 5, replace(SPEC, max_responses=0), CONSOLE)
    assert list(controls.frames) == [("direct", "goal_priority")] and controls.interrupted
    assert "too long" in controls.failures["direct", "policy"]
    assert controls.table["verdict"].isna().all()


def test_a_control_that_cannot_be_built_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make_setup(("policy", "goal_priority"))

    def build_or_fail(defense: Any, *args: Any) -> Any:
        if defense.name == "policy":
            raise KeyError("no such text")
        return build_matched_control(defense, *args)

    monkeypatch.setattr("analysis.studies.matched_controls.build_matched_control", build_or_fail)
    keys = [("direct", name) for name in setup.conditions]
    controls = score_controls(setup, keys, 5, replace(SPEC, max_responses=0), CONSOLE)
    assert list(controls.frames) == [("direct", "goal_priority")]
    assert "no such text" in controls.failures["direct", "policy"]
