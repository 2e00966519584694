"""Noise: every copy is a function of seed, query and settings; how much changes is what was set."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conftest import toy_bench, toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from analysis.datasets.queries import Query
from defenses.catalog import get_defense
from defenses.contract import ModelInfo
from defenses.perturbations import PERTURBATIONS

CHAT = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello, what can I do?"},
    {"role": "user", "content": "How do I bake a loaf of bread for my neighbor?"},
]
WORDS = CHAT[-1]["content"]
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=80)
CHARACTERS, OF_WORDS = ("swap", "insert", "patch", "delete"), ("mask", "drop", "shuffle")


def changed(kind: str, rate: float, seed: int = 0, text: str = WORDS) -> str:
    """Return a text perturbed."""
    return PERTURBATIONS[kind](text, rate, random.Random(seed))


@given(text=TEXTS.filter(lambda text: text.split() != []), rate=st.floats(0.01, 1), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_any_text_at_any_rate_gives_a_text_that_is_not_empty(
    kind: str, text: str, rate: float, seed: int
) -> None:
    assert changed(kind, rate, seed, text)
    assert changed(kind, rate, seed, text) == changed(kind, rate, seed, text)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_the_rate_is_the_share_that_changes(rate: float) -> None:
    n, words = round(rate * len(WORDS)), WORDS.split()
    swapped = changed("swap", rate)
    # A character may be replaced by itself: one in about a hundred.
    assert (
        len(swapped) == len(WORDS) and n - 2 <= sum(a != b for a, b in zip(WORDS, swapped, strict=True)) <= n
    )
    assert len(changed("insert", rate)) == len(WORDS) + n
    assert len(changed("delete", rate)) == len(WORDS) - n
    patched = changed("patch", rate)
    different = [at for at, pair in enumerate(zip(WORDS, patched, strict=True)) if len(set(pair)) == 2]
    assert different[-1] - different[0] < n
    assert changed("mask", rate).split().count("[MASK]") == max(1, round(rate * len(words)))
    assert len(changed("drop", rate).split()) == len(words) - max(1, round(rate * len(words)))
    shuffled = changed("shuffle", rate).split()
    moved = sum(a != b for a, b in zip(words, shuffled, strict=True))
    # Two words that are alike may change places ("a" and "a"), so not all that move are seen to.
    assert sorted(shuffled) == sorted(words) and 2 <= moved <= max(2, round(rate * len(words)))


@pytest.mark.parametrize("kind", CHARACTERS + OF_WORDS)
def test_what_is_left_of_the_request_stands_in_its_order(kind: str) -> None:
    if kind == "shuffle":
        pytest.skip("which is what it does away with")
    left = iter(changed(kind, 0.2).split() if kind in OF_WORDS else changed(kind, 0.2))
    whole = WORDS.split() if kind in OF_WORDS else WORDS
    kept = sum(any(one == other for other in left) for one in whole[:3])
    assert kept >= 1


@pytest.mark.parametrize(
    "name",
    [
        *("character_swap", "character_insertion", "character_patch", "character_deletion"),
        *("word_mask", "word_drop", "word_shuffle", "smooth_llm"),
    ],
)
def test_only_the_last_user_turn_is_perturbed(name: str) -> None:
    for reading in get_defense(name).rewrite_copies(CHAT, random.Random(0)):
        assert reading[:-1] == CHAT[:-1] and reading[-1]["content"] != WORDS


def test_a_query_is_perturbed_alike_in_every_run_and_unlike_under_another_seed_or_id() -> None:
    def read(seed: int, ident: str) -> list[str]:
        bench = toy_bench()
        bench = type(bench).from_model(bench.loaded_model, seed=seed)
        return [p.text for p in bench.render_query(get_defense("smooth_llm"), Query(ident, WORDS, False))]

    assert read(0, "a") == read(0, "a")
    assert len({*read(0, "a"), *read(1, "a"), *read(0, "b")}) == 30


def test_every_copy_of_smooth_llm_has_noise_of_its_own_and_of_the_kind_that_was_set() -> None:
    for kind in PERTURBATIONS:
        made = get_defense("smooth_llm", {"copies": "4", "noise": kind, "rate": "0.3"})
        texts = [reading[-1]["content"] for reading in made.rewrite_copies(CHAT, random.Random(3))]
        rng = random.Random(3)
        assert texts == [PERTURBATIONS[kind](WORDS, 0.3, rng) for _ in range(4)]


def erased(text: str, **settings: str) -> list[str]:
    """Return the readings of erase-and-check."""
    host = ModelInfo("toy", toy_tokenizer(), ())
    made: Any = get_defense("erase_and_check", settings).prepare(host)
    found = made.rewrite_copies([{"role": "user", "content": text}], random.Random(0))
    return [reading[-1]["content"] for reading in found]


def test_erase_and_check_reads_the_request_and_all_that_is_left_as_tokens_go_from_its_end() -> None:
    tokenizer = toy_tokenizer()
    ids = tokenizer.encode(WORDS, add_special_tokens=False)
    want = [WORDS, *(tokenizer.decode(ids[:end]).strip() for end in range(len(ids) - 1, 0, -1))]
    assert erased(WORDS, tokens="1000") == list(dict.fromkeys(want))
    assert erased(WORDS, tokens="3") == list(dict.fromkeys(want[:4]))
    assert all(WORDS.startswith(one) for one in erased(WORDS, tokens="1000"))
    assert erased("a") == ["a"]


def test_half_a_character_is_never_read() -> None:
    assert not any("\N{REPLACEMENT CHARACTER}" in one for one in erased("Wie geht's, schöne 愛 Grüße? 😀"))


def test_semantic_smoothing_asks_for_each_copy_in_another_way_and_reads_what_it_is_told() -> None:
    talk = get_defense("semantic_smoothing", {"copies": "3"}).consult_model(CHAT, random.Random(0))
    asked = next(talk)
    assert len({ask.chat[0]["content"] for ask in asked}) == 3
    assert all(WORDS in ask.chat[0]["content"] and ask.chat[-1]["role"] == "assistant" for ask in asked)
    with pytest.raises(StopIteration) as over:
        talk.send(["How is bread made?", "", "Bake bread?"])
    assert [one[-1]["content"] for one in over.value.value] == ["How is bread made?", WORDS, "Bake bread?"]
