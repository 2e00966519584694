"""Reminders: each text is at the position that its paper gives."""

import random

import pytest

from analysis.datasets.loading import load_queries
from defenses.catalog import get_defense
from defenses.reminders import _REFUSAL_DEMONSTRATIONS

RNG = random.Random(0)
REQUEST = "How do I bake bread?"
CHAT = [{"role": "user", "content": REQUEST}]
CHAT_WITH_SYSTEM = [{"role": "system", "content": "You are a baker."}, *CHAT]


@pytest.mark.parametrize(
    "name", ["self_reminder", "tone_reminder", "safety_prompt", "policy", "goal_priority"]
)
def test_a_reminder_precedes_the_content_of_the_system_turn(name):
    defense = get_defense(name)
    reminder = defense.get_reminder()
    alone, joined = defense.rewrite(CHAT, RNG), defense.rewrite(CHAT_WITH_SYSTEM, RNG)
    assert alone[0] == {"role": "system", "content": reminder}
    assert joined[0]["content"] == f"{reminder}\n\nYou are a baker."
    assert alone[1:] == joined[1:]
    assert len(reminder) > 50
    # Only the sandwich also changes the user turn.
    assert (alone[1:] == CHAT) == (name != "self_reminder")


def test_the_sandwich_has_a_reminder_before_and_after_the_request():
    defense = get_defense("self_reminder")
    system, user = defense.rewrite(CHAT, RNG)
    assert system["content"] == defense.text
    assert user["content"] == f"{REQUEST}\n\n{defense.after}"


def test_three_tones_have_three_texts_which_a_setting_replaces():
    tones = ("remind", "warn", "praise")
    texts = {get_defense("tone_reminder", {"tone": tone}).get_reminder() for tone in tones}
    assert len(texts) == 3
    assert get_defense("tone_reminder", {"tone": "warn", "text": "Mind."}).get_reminder() == "Mind."


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_demonstrations_are_earlier_turns_after_the_system_turn(shots):
    defense = get_defense("in_context_refusal", {"shots": str(shots)})
    chat = defense.rewrite(CHAT_WITH_SYSTEM, RNG)
    assert [message["role"] for message in chat] == ["system", *["user", "assistant"] * shots, "user"]
    assert chat[0] == CHAT_WITH_SYSTEM[0] and chat[-1] == CHAT_WITH_SYSTEM[-1]
    assert [message["content"] for message in chat[1:3]] == list(_REFUSAL_DEMONSTRATIONS[0])
    assert defense.rewrite(CHAT, RNG) == chat[1:]


def test_demonstrations_are_not_among_the_queries():
    """Otherwise the model would see the response to a test query."""
    texts = {query.text for query in load_queries("contrast").queries}
    assert not texts & {request for request, _ in _REFUSAL_DEMONSTRATIONS}


def test_the_intention_analysis_precedes_the_last_request_only():
    defense = get_defense("intention_analysis")
    earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    final = {"role": "user", "content": f"{defense.text} {REQUEST}"}
    assert defense.rewrite([*earlier, *CHAT], RNG) == [*earlier, final]
