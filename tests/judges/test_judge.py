"""Verdicts on queries with several responses."""

from __future__ import annotations

from typing import Any

from analysis.datasets.loading import load_queries
from analysis.judges.judge import judge_queries
from analysis.judges.rules import RULE_JUDGES
from analysis.models.session import Response
from defenses.catalog import get_defense

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Sure. Mix flour and water, and wait."


def judge_responses(pool: str, *texts: str) -> Any:
    """Return the verdict on one query with several responses, under a defense with that pooling."""
    defense = get_defense("erase_and_check" if pool == "max" else "smooth_llm")
    assert defense.pool == pool
    query_text = load_queries("twins").queries[0].text
    responses = [[Response((1,), text, text) for text in texts]]
    return judge_queries(RULE_JUDGES["patterns"], [query_text], responses, defense)[0]


def test_several_responses_are_pooled_by_majority_or_by_any_refusal() -> None:
    assert not judge_responses("mean", ANSWER, REFUSAL, ANSWER).is_refusal
    assert judge_responses("mean", ANSWER, REFUSAL, REFUSAL).is_refusal
    assert not judge_responses("mean", REFUSAL, ANSWER).is_refusal  # a tie
    assert judge_responses("max", ANSWER, REFUSAL, ANSWER).is_refusal
    assert not judge_responses("max", ANSWER, ANSWER).is_refusal


def test_a_pooled_verdict_gives_the_index_of_its_response() -> None:
    assert judge_responses("mean", REFUSAL, ANSWER, ANSWER).copy_index == 1
    assert judge_responses("max", ANSWER, REFUSAL).copy_index == 1
