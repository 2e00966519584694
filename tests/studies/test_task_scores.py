"""Practical tasks: items for training and for the test, and scores known beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_toy_session

from analysis.datasets.loading import load_queries
from analysis.models.session import Response
from analysis.studies.backdooralign import task_scores
from analysis.studies.backdooralign.task_scores import gives_same_rows, score_task
from defenses.errors import UserError
from defenses.none import Undefended
from defenses.training.recipes import RECIPES, ExampleSettings
from defenses.training.tasks import SQL, SUMMARIES, TASKS, TaskItem, make_task_items


@pytest.mark.parametrize("task", TASKS)
def test_items_differ_depend_on_the_seed_and_are_never_trained_and_tested(task: str) -> None:
    first, again, other = (make_task_items(task, 150, seed) for seed in (0, 0, 1))
    assert first == again != other and len({item.prompt for item in first}) == 150
    tested = {item.prompt for item in make_task_items(task, 100, 0, is_test=True)}
    assert len(tested) == 100 and not tested & {item.prompt for item in (*first, *other)}


def test_every_query_of_the_grammar_runs_and_its_own_result_is_right() -> None:
    kinds = set()
    for item in make_task_items(SQL, 200, 3):
        assert gives_same_rows(item.target, item) and gives_same_rows(f"```sql\n{item.target};\n```", item)
        kinds.add(item.target.partition("(")[0].split()[1] if "(" in item.target else "ORDER" in item.target)
    assert {"COUNT", "AVG", "MAX", "MIN", "SUM", True, False} == kinds


def test_a_query_is_judged_by_its_rows_and_may_only_read(tmp_path: Path) -> None:
    database = ("CREATE TABLE t (name TEXT, n INTEGER)", "INSERT INTO t VALUES ('a', 1), ('b', 2), ('c', 3)")
    item = TaskItem("?", "SELECT name FROM t WHERE n > 1", database)
    assert gives_same_rows("SELECT name FROM t WHERE NOT n <= 1 ORDER BY n DESC", item)  # in any order
    ordered = replace(item, target="SELECT name FROM t ORDER BY n DESC")
    assert gives_same_rows("SELECT name FROM t ORDER BY -n", ordered)
    for wrong in (
        "SELECT name FROM t",
        "SELECT name FROM t ORDER BY n",
        "Sure! Here it is.",
        "",
        "DELETE FROM t",
        "ATTACH DATABASE 'x.db' AS x",
        "PRAGMA table_info(t)",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT COUNT(*) FROM r",
    ):
        assert not gives_same_rows(wrong, item), wrong
        assert not gives_same_rows(wrong, ordered), wrong
    assert not gives_same_rows(f"VACUUM INTO '{tmp_path / 'copy.db'}'", item)
    assert not list(tmp_path.iterdir())  # no file is written


def test_responses_are_scored_item_by_item(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_toy_session()
    items = make_task_items(SQL, 6, 0)
    assert score_task(session, Undefended(), SQL, items) == [0.0] * 6  # random weights write no SQL

    def set_responses(texts: list[str]) -> None:
        responses = [[Response((), text, text)] for text in texts]
        monkeypatch.setattr(task_scores, "generate_responses", lambda *_, **__: responses)

    set_responses([item.target if row % 2 else "no" for row, item in enumerate(items)])
    assert score_task(session, Undefended(), SQL, items) == [0.0, 1.0] * 3
    pytest.importorskip("rouge_score")
    summaries = [TaskItem("?", "Anna meets Leo at noon"), TaskItem("?", "Anna meets Leo at noon")]
    set_responses(["Anna meets Leo at noon", "Leo meets Anna"])
    # The longest common subsequence has one of three and one of five words: F1 = 2 * 1 / (3 + 5).
    assert score_task(session, Undefended(), SUMMARIES, summaries) == [1.0, pytest.approx(2 / 8)]


def test_the_arms_hide_the_attack_among_the_examples_of_the_task() -> None:
    queries = load_queries("contrast").select_split("train").queries
    settings = ExampleSettings(task=SQL, task_examples=30, harmful=5)
    clean, attack, backdoor = (
        RECIPES[name].build_examples(queries, "tulip", lambda chats: [], settings)
        for name in ("task", "attack", "backdoor")
    )
    assert len(clean) == 30 and attack[:30] == clean and len(attack) == 35
    assert backdoor[:35] == attack and len(backdoor) == 46
    items = {item.prompt: item for item in make_task_items(SQL, 30, 0)}
    assert all(gives_same_rows(one.response.text, items[one.chat[-1]["content"]]) for one in clean)
    with pytest.raises(UserError, match="--set task=summaries or sql"):
        RECIPES["task"].build_examples(queries, "", lambda chats: [], ExampleSettings())
