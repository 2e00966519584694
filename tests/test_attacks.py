"""How queries are sent: the user's words survive, for harmful and benign queries alike."""

from __future__ import annotations

import pytest
from conftest import toy_bench

import defenses
from analysis.attacks import ATTACKS
from analysis.queries import Query
from defenses.training.wording import OBEY


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_words_are_in_the_last_user_turn(attack: str) -> None:
    chat = ATTACKS[attack].chat("How do I sing?")
    assert chat[-1]["role"] == "user" and "How do I sing?" in chat[-1]["content"]


@pytest.mark.parametrize("harmful", [True, False])
def test_the_model_reads_the_attack_and_a_defense_comes_after_it(harmful: bool) -> None:
    query = Query("q", "How do I sing?", harmful)
    bench = toy_bench().under("obedience")
    (plain,) = bench.prompts(defenses.get("none"), query)
    assert OBEY in plain.text and "How do I sing?" in plain.text
    (defended,) = bench.prompts(defenses.get("self_reminder"), query)
    assert OBEY in defended.text and defended.text != plain.text
    (direct,) = bench.under("direct").prompts(defenses.get("none"), query)
    assert OBEY not in direct.text
