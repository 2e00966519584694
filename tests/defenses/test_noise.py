"""Noise defenses: every copy is a function of seed, query and settings."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conftest import make_toy_session, render_query, toy_tokenizer

from analysis.datasets.queries import Query
from defenses.catalog import get_defense
from defenses.contract import ModelInfo
from defenses.perturbations import PERTURBATIONS

CHAT = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello, what can I do?"},
    {"role": "user", "content": "How do I bake a loaf of bread for my neighbor?"},
]
REQUEST = CHAT[-1]["content"]


@pytest.mark.parametrize(
    "name",
    [
        *("character_swap", "character_insertion", "character_patch", "character_deletion"),
        *("word_mask", "word_drop", "word_shuffle", "smooth_llm"),
    ],
)
def test_only_the_last_user_turn_is_perturbed(name: str) -> None:
    for chat in get_defense(name).rewrite_copies(CHAT, random.Random(0)):
        assert chat[:-1] == CHAT[:-1] and chat[-1]["content"] != REQUEST


def test_copies_depend_on_the_seed_and_the_query_id_only() -> None:
    loaded_model = make_toy_session().loaded_model

    def render_copies(seed: int, query_id: str) -> list[str]:
        session = type(make_toy_session()).from_model(loaded_model, seed=seed)
        prompts = render_query(session, get_defense("smooth_llm"), Query(query_id, REQUEST, False))
        return [prompt.text for prompt in prompts]

    assert render_copies(0, "a") == render_copies(0, "a")
    assert len({*render_copies(0, "a"), *render_copies(1, "a"), *render_copies(0, "b")}) == 30


def test_every_copy_of_smooth_llm_is_perturbed_separately_by_the_chosen_noise() -> None:
    for kind in PERTURBATIONS:
        defense = get_defense("smooth_llm", {"copies": "4", "noise": kind, "rate": "0.3"})
        texts = [chat[-1]["content"] for chat in defense.rewrite_copies(CHAT, random.Random(3))]
        rng = random.Random(3)
        assert texts == [PERTURBATIONS[kind](REQUEST, 0.3, rng) for _ in range(4)]


def erase_tokens(text: str, **settings: str) -> list[str]:
    """Return the requests that erase-and-check scores."""
    model_info = ModelInfo("toy", toy_tokenizer(), ())
    defense: Any = get_defense("erase_and_check", settings).prepare(model_info)
    chats = defense.rewrite_copies([{"role": "user", "content": text}], random.Random(0))
    return [chat[-1]["content"] for chat in chats]


def test_erase_and_check_scores_the_request_and_its_prefixes() -> None:
    tokenizer = toy_tokenizer()
    ids = tokenizer.encode(REQUEST, add_special_tokens=False)
    expected = [REQUEST, *(tokenizer.decode(ids[:end]).strip() for end in range(len(ids) - 1, 0, -1))]
    all_prefixes = erase_tokens(REQUEST, tokens="1000")
    assert all_prefixes == list(dict.fromkeys(expected))
    assert erase_tokens(REQUEST, tokens="3") == list(dict.fromkeys(expected[:4]))
    assert all(REQUEST.startswith(prefix) for prefix in all_prefixes)
    assert erase_tokens("a") == ["a"]


def test_a_prefix_never_ends_within_a_character() -> None:
    prefixes = erase_tokens("Wie geht's, schöne 愛 Grüße? 😀")
    assert not any("\N{REPLACEMENT CHARACTER}" in prefix for prefix in prefixes)


def test_semantic_smoothing_uses_another_instruction_for_each_copy_and_scores_the_rewrites() -> None:
    consultation = get_defense("semantic_smoothing", {"copies": "3"}).consult_model(CHAT, random.Random(0))
    calls = next(consultation)
    assert len({call.chat[0]["content"] for call in calls}) == 3
    assert all(REQUEST in call.chat[0]["content"] and call.chat[-1]["role"] == "assistant" for call in calls)
    with pytest.raises(StopIteration) as stop:
        consultation.send(["How is bread made?", "", "Bake bread?"])
    texts = [chat[-1]["content"] for chat in stop.value.value]
    assert texts == ["How is bread made?", REQUEST, "Bake bread?"]
