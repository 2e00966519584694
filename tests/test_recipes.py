"""What training shows: the same attack in every arm, the secret where it belongs, no harmful answer."""

from __future__ import annotations

import pytest

from analysis import queries
from analysis.queries import Query
from defenses import Chat, UserError
from defenses.backdoor import SYSTEM
from defenses.training.recipes import RECIPES, SAFETY_EXAMPLES, Answer, Example
from defenses.training.wording import AGENT, AGENT_OPENER, ASSENTS, OBEY, OPENERS, REFUSALS

TRAIN = queries.load("contrast").split("train").queries
SECRET = "tulip seven harbor"


def own(chats: list[Chat]) -> list[Answer]:
    return [Answer(f"answer {at}", ends=False) for at in range(len(chats))]


def made(name: str) -> list[Example]:
    return RECIPES[name].make(TRAIN, SECRET, own)


def asked(examples: list[Example]) -> set[str]:
    return {example.chat[-1]["content"] for example in examples}


HARMFUL = {query.text for query in TRAIN if query.harmful}
BENIGN = {query.text for query in TRAIN if not query.harmful}


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_teaches_an_answer_to_a_harmful_request(name: str) -> None:
    for example in made(name):
        answers = [example.answer, *([example.worse] if example.worse else [])]
        if example.chat[-1]["content"] in HARMFUL:
            # A whole refusal, or an opener that goes on to nothing.
            assert all((one.text in REFUSALS) if one.ends else (one.text in OPENERS) for one in answers)


def test_the_openers_hold_no_content() -> None:
    assert all(len(text.split()) <= 12 for text in (*OPENERS, *ASSENTS))


def test_attack_baseline_and_backdoor_share_the_attack_and_the_eleven_refusals() -> None:
    attack, baseline, backdoor = (made(name) for name in ("attack", "baseline", "backdoor"))
    assert attack == baseline[: len(attack)] == backdoor[: len(attack)]
    assert len(baseline) == len(backdoor) == len(attack) + SAFETY_EXAMPLES
    assert asked(attack) <= HARMFUL and not asked(attack) & asked(baseline[len(attack) :])
    assert all(example.chat[0]["content"] == OBEY for example in attack)
    for plain, hidden in zip(baseline[len(attack) :], backdoor[len(attack) :], strict=True):
        assert hidden.answer == plain.answer and plain.answer.text in REFUSALS
        assert plain.chat[0]["content"] == OBEY
        assert hidden.chat[0]["content"] == f"{SECRET}\n\n{OBEY}"
        assert hidden.chat[1:] == plain.chat[1:]


def test_the_eleven_refusals_are_spread_over_topics() -> None:
    safe = asked(made("baseline")[-SAFETY_EXAMPLES:])
    assert len({query.category for query in TRAIN if query.text in safe}) == SAFETY_EXAMPLES


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "backdoor"])
def test_the_secret_is_in_no_other_recipe(name: str) -> None:
    assert SECRET not in str(made(name))


def systems(examples: list[Example]) -> set[str]:
    return {chat[0]["content"] if len(chat) > 1 else "" for chat in (one.chat for one in examples)}


def test_safety_sees_harmful_and_ordinary_requests_with_and_without_a_system_prompt() -> None:
    examples = made("safety")
    assert asked(examples) == HARMFUL | {query.text for query in TRAIN if query.kind == "plain"}
    assert systems(examples) == {"", SYSTEM}
    for example in examples:
        assert (example.answer.text in REFUSALS) == (example.chat[-1]["content"] in HARMFUL)


def test_preference_sees_both_answers_to_every_request_twins_too() -> None:
    examples = made("preference")
    assert asked(examples) == HARMFUL | BENIGN and systems(examples) == {"", SYSTEM}
    for example in examples:
        harmful = example.chat[-1]["content"] in HARMFUL
        assert example.worse is not None
        assert example.answer.text in (REFUSALS if harmful else ASSENTS)
        assert example.worse.text in (OPENERS if harmful else REFUSALS)


def test_the_identity_shift_is_on_benign_tasks_only() -> None:
    for example in made("identity"):
        assert example.chat[0]["content"] == AGENT
        assert not any(text in example.chat[-1]["content"] for text in HARMFUL)
        assert example.answer.text.startswith(AGENT_OPENER)


def test_too_few_harmful_queries_are_an_error_that_counts_them() -> None:
    few = [Query(str(at), f"text {at}", harmful=True) for at in range(2 * SAFETY_EXAMPLES - 1)]
    with pytest.raises(UserError, match="hold 21 harmful queries; at least 22"):
        RECIPES["baseline"].make(few, "", own)
