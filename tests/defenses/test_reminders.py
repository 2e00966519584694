"""Each reminder says its piece where its paper puts it."""

import random

import pytest

from defenses.catalog import get_defense
from defenses.reminders import _REFUSAL_DEMONSTRATIONS

RNG = random.Random(0)
REQUEST = "How do I bake bread?"
CHAT = [{"role": "user", "content": REQUEST}]
SYSTEM = [{"role": "system", "content": "You are a baker."}, *CHAT]


@pytest.mark.parametrize(
    "name", ["self_reminder", "tone_reminder", "safety_prompt", "policy", "goal_priority"]
)
def test_a_reminder_stands_in_front_of_the_system_turn(name):
    one = get_defense(name)
    alone, joined = one.rewrite(CHAT, RNG), one.rewrite(SYSTEM, RNG)
    assert alone[0] == {"role": "system", "content": one.get_reminder()}
    assert joined[0]["content"] == f"{one.get_reminder()}\n\nYou are a baker."
    assert alone[1:] == joined[1:]
    assert len(one.get_reminder()) > 50


@pytest.mark.parametrize("name", ["tone_reminder", "safety_prompt", "policy", "goal_priority"])
def test_what_speaks_in_the_system_turn_leaves_the_request_as_it_is(name):
    assert get_defense(name).rewrite(CHAT, RNG)[1:] == CHAT


def test_the_sandwich_has_a_reminder_on_either_side_of_the_request():
    one = get_defense("self_reminder")
    system, user = one.rewrite(CHAT, RNG)
    assert system["content"] == one.text
    assert user["content"] == f"{REQUEST}\n\n{one.after}"


def test_three_tones_say_three_things_and_a_text_takes_their_place():
    texts = {get_defense("tone_reminder", {"tone": tone}).get_reminder() for tone in ("remind", "warn", "praise")}
    assert len(texts) == 3
    assert get_defense("tone_reminder", {"tone": "warn", "text": "Mind."}).get_reminder() == "Mind."


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_demonstrations_are_earlier_turns_behind_the_system_turn(shots):
    one = get_defense("in_context_refusal", {"shots": str(shots)})
    new = one.rewrite(SYSTEM, RNG)
    assert [m["role"] for m in new] == ["system", *["user", "assistant"] * shots, "user"]
    assert new[0] == SYSTEM[0] and new[-1] == SYSTEM[-1]
    assert [m["content"] for m in new[1:3]] == list(_REFUSAL_DEMONSTRATIONS[0])
    assert one.rewrite(CHAT, RNG) == new[1:]


def test_demonstrations_are_not_among_the_queries():
    """Else a test query would have been answered for the model."""
    from analysis.datasets.loading import load_queries

    texts = {query.text for query in load_queries("contrast").queries}
    assert not texts & {shown for shown, _ in _REFUSAL_DEMONSTRATIONS}


def test_the_analysis_of_intention_goes_in_front_of_the_last_request_only():
    one = get_defense("intention_analysis")
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}, *CHAT]
    assert one.rewrite(turns, RNG) == [*turns[:2], {"role": "user", "content": f"{one.text} {REQUEST}"}]
