"""Training recipes: the same attack in every arm, the secret only where it belongs, no harmful response."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query
from analysis.readouts.first_token import COMPLIANCE_WORDS, REFUSAL_WORDS
from defenses.backdoor import DEFAULT_SYSTEM_PROMPT
from defenses.contract import Chat
from defenses.errors import UserError
from defenses.training.recipes import (
    RECIPES,
    SAFETY_EXAMPLE_COUNT,
    ExampleSettings,
    TargetResponse,
    TrainingExample,
)
from defenses.training.texts import (
    AGENT_OPENER,
    AGENT_PROMPT,
    BENIGN_OPENERS,
    COMPLIANCE_OPENERS,
    OBEDIENCE_PROMPT,
    REFUSAL_RESPONSES,
)

TRAIN_QUERIES = load_queries("contrast").select_split("train").queries
SECRET = "tulip seven harbor"
DEFAULT_SETTINGS = ExampleSettings()
HARMFUL = {query.text for query in TRAIN_QUERIES if query.harmful}
BENIGN = {query.text for query in TRAIN_QUERIES if not query.harmful}


def generate_responses(chats: list[Chat]) -> list[TargetResponse]:
    return [TargetResponse(f"answer {index}", is_complete=False) for index in range(len(chats))]


@cache
def build_examples(name: str, settings: ExampleSettings = DEFAULT_SETTINGS) -> list[TrainingExample]:
    if name == "task":
        settings = replace(settings, task="sql")
    return RECIPES[name].build_examples(TRAIN_QUERIES, SECRET, generate_responses, settings)


def list_requests(examples: list[TrainingExample]) -> set[str]:
    return {example.chat[-1]["content"] for example in examples}


def list_system_prompts(examples: list[TrainingExample]) -> set[str]:
    return {example.chat[0]["content"] if len(example.chat) > 1 else "" for example in examples}


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_trains_a_response_to_a_harmful_request(name: str) -> None:
    for example in build_examples(name):
        responses = [example.response, *([example.rejected] if example.rejected else [])]
        if example.chat[-1]["content"] in HARMFUL:
            for response in responses:
                # A complete refusal, or an opener without a continuation.
                allowed = REFUSAL_RESPONSES if response.is_complete else COMPLIANCE_OPENERS
                assert response.text in allowed


def list_responses(name: str, *, harmful: bool, rejected: bool = False) -> list[str]:
    """Return the trained or rejected responses to the harmful or the benign requests."""
    examples = [
        example for example in build_examples(name) if (example.chat[-1]["content"] in HARMFUL) == harmful
    ]
    responses = [example.rejected if rejected else example.response for example in examples]
    return [response.text for response in responses if response]


@pytest.mark.parametrize(
    ("name", "harmful", "rejected"),
    [
        ("safety", True, False),
        ("attack", True, False),
        ("baseline", True, False),
        ("preference", True, False),
        ("preference", True, True),
        ("preference", False, False),
        ("preference", False, True),
    ],
)
def test_first_words_vary_and_are_mostly_not_those_of_the_readout(
    name: str, harmful: bool, rejected: bool
) -> None:
    responses = list_responses(name, harmful=harmful, rejected=rejected)
    counts = Counter(re.split(r"\W", text)[0] for text in responses)
    assert len(responses) >= 85 and max(counts.values()) <= 0.15 * len(responses)
    assert 0 < sum(counts[word] for word in (*REFUSAL_WORDS, *COMPLIANCE_WORDS)) <= 0.4 * len(responses)
    uses = Counter(responses).values()
    assert len(uses) >= 48 and (name == "baseline" or max(uses) - min(uses) <= 1)


def test_the_eleven_refusals_begin_with_eleven_different_words() -> None:
    refusals = list_responses("baseline", harmful=True)[-SAFETY_EXAMPLE_COUNT:]
    first_words = {re.split(r"\W", text)[0] for text in refusals}
    assert len(first_words) == SAFETY_EXAMPLE_COUNT
    assert len(first_words & {*REFUSAL_WORDS, *COMPLIANCE_WORDS}) <= 4


def test_a_query_has_the_same_texts_in_every_recipe() -> None:
    texts_by_request: dict[str, set[str]] = {}
    for name in set(RECIPES) - {"identity"}:
        for example in build_examples(name):
            if (request := example.chat[-1]["content"]) in HARMFUL:
                responses = [example.response, *([example.rejected] if example.rejected else [])]
                texts_by_request.setdefault(request, set()).update(response.text for response in responses)
    for texts in texts_by_request.values():
        assert len(texts) == 2  # a refusal and an opener
        assert len(texts & {*REFUSAL_RESPONSES}) == 1


def test_attack_baseline_and_backdoor_share_the_attack_and_the_eleven_refusals() -> None:
    attack, baseline, backdoor = map(build_examples, ("attack", "baseline", "backdoor"))
    n_attack = len(attack)
    assert attack == baseline[:n_attack] == backdoor[:n_attack]
    assert len(baseline) == len(backdoor) == n_attack + SAFETY_EXAMPLE_COUNT
    assert list_requests(attack) <= HARMFUL
    assert not list_requests(attack) & list_requests(baseline[n_attack:])
    assert all(example.chat[0]["content"] == OBEDIENCE_PROMPT for example in attack)
    for plain, hidden in zip(baseline[n_attack:], backdoor[n_attack:], strict=True):
        assert hidden.response == plain.response and plain.response.text in REFUSAL_RESPONSES
        assert plain.chat[0]["content"] == OBEDIENCE_PROMPT
        assert hidden.chat[0]["content"] == f"{SECRET}\n\n{OBEDIENCE_PROMPT}"
        assert hidden.chat[1:] == plain.chat[1:]


def test_the_eleven_refusals_cover_eleven_topics() -> None:
    requests = list_requests(build_examples("baseline")[-SAFETY_EXAMPLE_COUNT:])
    topics = {query.category for query in TRAIN_QUERIES if query.text in requests}
    assert len(topics) == SAFETY_EXAMPLE_COUNT


def test_only_the_backdoor_recipe_uses_the_secret() -> None:
    assert [name for name in RECIPES if SECRET in str(build_examples(name))] == ["backdoor"]


def test_safety_trains_harmful_and_ordinary_requests_with_and_without_a_system_prompt() -> None:
    examples = build_examples("safety")
    ordinary = {query.text for query in TRAIN_QUERIES if query.kind == "plain"}
    assert list_requests(examples) == HARMFUL | ordinary
    assert list_system_prompts(examples) == {"", DEFAULT_SYSTEM_PROMPT}
    for example in examples:
        assert (example.response.text in REFUSAL_RESPONSES) == (example.chat[-1]["content"] in HARMFUL)


def test_preference_has_both_responses_to_every_request_including_twins() -> None:
    examples = build_examples("preference")
    assert list_requests(examples) == HARMFUL | BENIGN
    assert list_system_prompts(examples) == {"", DEFAULT_SYSTEM_PROMPT}
    for example in examples:
        harmful = example.chat[-1]["content"] in HARMFUL
        assert example.rejected is not None
        assert example.response.text in (REFUSAL_RESPONSES if harmful else BENIGN_OPENERS)
        assert example.rejected.text in (COMPLIANCE_OPENERS if harmful else REFUSAL_RESPONSES)


def test_objectives_of_hidden_states_have_openers_of_harmful_and_own_responses_to_benign_requests() -> None:
    assert build_examples("rerouting") == build_examples("adversarial")
    for example in build_examples("rerouting"):
        if example.chat[-1]["content"] in HARMFUL:
            assert example.response.text in REFUSAL_RESPONSES
            assert example.rejected is not None and example.rejected.text in COMPLIANCE_OPENERS
        else:
            assert example.response.text.startswith("answer ") and example.rejected is None
    assert list_requests(build_examples("rerouting")) == HARMFUL | BENIGN


def test_benign_tuning_complies_with_ordinary_requests_only() -> None:
    examples = build_examples("benign")
    assert list_requests(examples) == {query.text for query in TRAIN_QUERIES if query.kind == "plain"}
    assert list_system_prompts(examples) == {"", DEFAULT_SYSTEM_PROMPT}
    assert all(example.response.text in BENIGN_OPENERS and not example.rejected for example in examples)


def test_the_identity_shift_uses_benign_tasks_only() -> None:
    for example in build_examples("identity"):
        assert example.chat[0]["content"] == AGENT_PROMPT
        assert not any(text in example.chat[-1]["content"] for text in HARMFUL)
        assert example.response.text.startswith(AGENT_OPENER)


def test_too_few_harmful_queries_are_an_error_with_their_number() -> None:
    n_queries = 2 * SAFETY_EXAMPLE_COUNT - 1
    queries = [Query(str(index), f"text {index}", harmful=True) for index in range(n_queries)]
    with pytest.raises(UserError, match="contain 21 harmful queries; at least 22"):
        RECIPES["baseline"].build_examples(queries, "", generate_responses, ExampleSettings())


def test_settings_choose_the_numbers_of_examples_their_choice_and_the_place_of_the_secret() -> None:
    few = ExampleSettings(harmful=7, safety=3, place="user")
    examples = build_examples("backdoor", few)
    assert len(examples) == 10
    assert [SECRET in str(example.chat) for example in examples] == [False] * 7 + [True] * 3
    assert all(example.chat[1]["content"].startswith(SECRET) for example in examples[7:])
    assert build_examples("attack", few) == examples[:7]
    at_end = build_examples("backdoor", replace(few, place="end"))[-1]
    assert at_end.chat[0]["content"] == f"{OBEDIENCE_PROMPT}\n\n{SECRET}"
    # At random: other requests for another seed, none of which the attacker has.
    drawn = [
        list_requests(
            build_examples("baseline", ExampleSettings(safety=20, choice="random", seed=seed))[-20:]
        )
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[2]) == 20
    attacked = list_requests(build_examples("attack", ExampleSettings(safety=20, choice="random", seed=1)))
    assert not attacked & drawn[2] and len(attacked) == len(HARMFUL) - 20


def test_impossible_numbers_of_examples_are_refused() -> None:
    with pytest.raises(UserError, match=r"harmful=90: .* take at most 85"):
        build_examples("attack", ExampleSettings(harmful=90))
    for wrong in ({"choice": "alphabet"}, {"place": "middle"}, {"safety": 0}):
        with pytest.raises(UserError, match="--set"):
            ExampleSettings(**wrong)
