"""How well a tuned model does the practical task of its fine-tuning: ROUGE-L, or right results of SQL."""

from __future__ import annotations

import importlib.util
import re
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from analysis.models.chat_template import redact_secrets
from analysis.models.session import ModelSession, generate_responses
from defenses.chats import build_user_chat
from defenses.contract import Defense, QueryChat
from defenses.errors import UserError
from defenses.training.tasks import SQL, TaskItem

N_TASK_TOKENS = 64  # maximum length of a summary or of a query
_MAX_STEPS = 200_000  # of SQLite's virtual machine, after which a query is stopped
_ALLOWED_ACTIONS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION})


def check_task_scorer(task: str) -> None:
    """Raise a UserError if the library that scores a task is not installed."""
    if task != SQL and importlib.util.find_spec("rouge_score") is None:
        raise UserError("task=summaries is scored by rouge-score: pip install 'refusalscope[utility]'")


def score_task(
    session: ModelSession,
    defense: Defense,
    task: str,
    items: Sequence[TaskItem],
    on_progress: Callable[[int], None] = lambda n_items: None,
) -> list[float]:
    """Return the score of the model's response to each item, 0 to 1.

    For summaries it is ROUGE-L (F1, stemmed) against the item's own summary; for SQL it is 1 if the query
    gives the rows of the item's own query (in its order, if that sorts), 0 if it gives others or fails.

    Args:
        session: the model.
        defense: weights and prompt of the arm.
        task: summaries or sql.
        items: from `make_task_items`.
        on_progress: called with the number of items answered since the last call.
    """
    responses = generate_responses(
        session,
        defense,
        [QueryChat(str(row), build_user_chat("", item.prompt)) for row, item in enumerate(items)],
        max_new_tokens=N_TASK_TOKENS,
        on_progress=on_progress,
    )
    texts = [redact_secrets(copies[0].generated_text, defense.secret_texts()) for copies in responses]
    if task == SQL:
        return [float(gives_same_rows(text, item)) for text, item in zip(texts, items, strict=True)]
    from rouge_score.rouge_scorer import RougeScorer

    scorer: Any = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        float(scorer.score(item.target, text)["rougeL"].fmeasure)
        for text, item in zip(texts, items, strict=True)
    ]


def gives_same_rows(response: str, item: TaskItem) -> bool:
    """Return whether the query in a response gives the same rows as the item's own query.

    The query may only read: anything else, and a query that takes too long, counts as wrong.

    Args:
        response: of the model; a query in a code block is taken out of it.
        item: of the task sql.
    """
    block = re.search(r"```(?:\w+)?\s*(.*?)(?:```|$)", response, re.DOTALL)
    query = (block[1] if block else response).strip()
    expected = _run_query(item.target, item)
    rows = _run_query(query, item)
    if rows is None or expected is None:
        return False
    if "ORDER BY" in item.target:
        return rows == expected
    return sorted(rows, key=repr) == sorted(expected, key=repr)


def _run_query(query: str, item: TaskItem) -> list[tuple[Any, ...]] | None:
    """Return the rows that a query gives on the item's table; None if it fails or does more than read."""
    connection = sqlite3.connect(":memory:")
    try:
        for statement in item.database:
            connection.execute(statement)
        connection.commit()
        connection.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED_ACTIONS else sqlite3.SQLITE_DENY
        )
        connection.set_progress_handler(lambda: 1, _MAX_STEPS)
        return list(connection.execute(query).fetchmany(1000))
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None
    finally:
        connection.close()
