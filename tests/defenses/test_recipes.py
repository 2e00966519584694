"""What training shows: the same attack in every arm, the secret where it belongs, no harmful answer."""

from __future__ import annotations

import pytest

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query
from defenses.backdoor import DEFAULT_SYSTEM_PROMPT
from defenses.contract import Chat
from defenses.errors import UserError
from defenses.training.recipes import RECIPES, SAFETY_EXAMPLE_COUNT, TargetResponse, TrainingExample
from defenses.training.texts import (
    AGENT_OPENER,
    AGENT_PROMPT,
    BENIGN_OPENERS,
    COMPLIANCE_OPENERS,
    OBEDIENCE_PROMPT,
    REFUSAL_RESPONSES,
)

TRAIN = load_queries("contrast").select_split("train").queries
SECRET = "tulip seven harbor"


def own(chats: list[Chat]) -> list[TargetResponse]:
    return [TargetResponse(f"answer {at}", is_complete=False) for at in range(len(chats))]


def made(name: str) -> list[TrainingExample]:
    return RECIPES[name].build_examples(TRAIN, SECRET, own)


def asked(examples: list[TrainingExample]) -> set[str]:
    return {example.chat[-1]["content"] for example in examples}


HARMFUL = {query.text for query in TRAIN if query.harmful}
BENIGN = {query.text for query in TRAIN if not query.harmful}


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_teaches_an_answer_to_a_harmful_request(name: str) -> None:
    for example in made(name):
        answers = [example.response, *([example.rejected] if example.rejected else [])]
        if example.chat[-1]["content"] in HARMFUL:
            # A whole refusal, or an opener that goes on to nothing.
            assert all(
                (one.text in REFUSAL_RESPONSES) if one.is_complete else (one.text in COMPLIANCE_OPENERS)
                for one in answers
            )


def test_the_openers_hold_no_content() -> None:
    assert all(len(text.split()) <= 12 for text in (*COMPLIANCE_OPENERS, *BENIGN_OPENERS))


def test_attack_baseline_and_backdoor_share_the_attack_and_the_eleven_refusals() -> None:
    attack, baseline, backdoor = (made(name) for name in ("attack", "baseline", "backdoor"))
    assert attack == baseline[: len(attack)] == backdoor[: len(attack)]
    assert len(baseline) == len(backdoor) == len(attack) + SAFETY_EXAMPLE_COUNT
    assert asked(attack) <= HARMFUL and not asked(attack) & asked(baseline[len(attack) :])
    assert all(example.chat[0]["content"] == OBEDIENCE_PROMPT for example in attack)
    for plain, hidden in zip(baseline[len(attack) :], backdoor[len(attack) :], strict=True):
        assert hidden.response == plain.response and plain.response.text in REFUSAL_RESPONSES
        assert plain.chat[0]["content"] == OBEDIENCE_PROMPT
        assert hidden.chat[0]["content"] == f"{SECRET}\n\n{OBEDIENCE_PROMPT}"
        assert hidden.chat[1:] == plain.chat[1:]


def test_the_eleven_refusals_are_spread_over_topics() -> None:
    safe = asked(made("baseline")[-SAFETY_EXAMPLE_COUNT:])
    assert len({query.category for query in TRAIN if query.text in safe}) == SAFETY_EXAMPLE_COUNT


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "backdoor"])
def test_the_secret_is_in_no_other_recipe(name: str) -> None:
    assert SECRET not in str(made(name))


def systems(examples: list[TrainingExample]) -> set[str]:
    return {chat[0]["content"] if len(chat) > 1 else "" for chat in (one.chat for one in examples)}


def test_safety_sees_harmful_and_ordinary_requests_with_and_without_a_system_prompt() -> None:
    examples = made("safety")
    assert asked(examples) == HARMFUL | {query.text for query in TRAIN if query.kind == "plain"}
    assert systems(examples) == {"", DEFAULT_SYSTEM_PROMPT}
    for example in examples:
        assert (example.response.text in REFUSAL_RESPONSES) == (example.chat[-1]["content"] in HARMFUL)


def test_preference_sees_both_answers_to_every_request_twins_too() -> None:
    examples = made("preference")
    assert asked(examples) == HARMFUL | BENIGN and systems(examples) == {"", DEFAULT_SYSTEM_PROMPT}
    for example in examples:
        harmful = example.chat[-1]["content"] in HARMFUL
        assert example.rejected is not None
        assert example.response.text in (REFUSAL_RESPONSES if harmful else BENIGN_OPENERS)
        assert example.rejected.text in (COMPLIANCE_OPENERS if harmful else REFUSAL_RESPONSES)


def test_the_identity_shift_is_on_benign_tasks_only() -> None:
    for example in made("identity"):
        assert example.chat[0]["content"] == AGENT_PROMPT
        assert not any(text in example.chat[-1]["content"] for text in HARMFUL)
        assert example.response.text.startswith(AGENT_OPENER)


def test_too_few_harmful_queries_are_an_error_that_counts_them() -> None:
    few = [Query(str(at), f"text {at}", harmful=True) for at in range(2 * SAFETY_EXAMPLE_COUNT - 1)]
    with pytest.raises(UserError, match="hold 21 harmful queries; at least 22"):
        RECIPES["baseline"].build_examples(few, "", own)
