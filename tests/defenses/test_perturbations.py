"""Perturbations of texts: functions of text, rate and generator that change the given share."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defenses.perturbations import PERTURBATIONS

TEXT = "How do I bake a loaf of bread for my neighbor?"
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=80)
WORD_KINDS = ("mask", "drop", "shuffle")


def perturb(kind: str, rate: float, seed: int = 0, text: str = TEXT) -> str:
    return PERTURBATIONS[kind](text, rate, random.Random(seed))


@given(text=TEXTS.filter(lambda text: text.split() != []), rate=st.floats(0.01, 1), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_the_result_is_reproducible_and_never_empty(kind: str, text: str, rate: float, seed: int) -> None:
    perturbed = perturb(kind, rate, seed, text)
    assert perturbed
    assert perturbed == perturb(kind, rate, seed, text)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_the_rate_is_the_share_that_changes(rate: float) -> None:
    n_characters, words = round(rate * len(TEXT)), TEXT.split()
    n_words = max(1, round(rate * len(words)))
    swapped = perturb("swap", rate)
    # A character may be replaced by itself: one in about a hundred.
    n_swapped = sum(old != new for old, new in zip(TEXT, swapped, strict=True))
    assert len(swapped) == len(TEXT) and n_characters - 2 <= n_swapped <= n_characters
    assert len(perturb("insert", rate)) == len(TEXT) + n_characters
    assert len(perturb("delete", rate)) == len(TEXT) - n_characters
    patched = perturb("patch", rate)
    changed = [index for index, (old, new) in enumerate(zip(TEXT, patched, strict=True)) if old != new]
    assert changed[-1] - changed[0] < n_characters
    assert perturb("mask", rate).split().count("[MASK]") == n_words
    assert len(perturb("drop", rate).split()) == len(words) - n_words
    shuffled = perturb("shuffle", rate).split()
    n_moved = sum(old != new for old, new in zip(words, shuffled, strict=True))
    # Equal words may change places ("a" and "a"), so a move is not always visible.
    assert sorted(shuffled) == sorted(words) and 2 <= n_moved <= max(2, round(rate * len(words)))


@pytest.mark.parametrize("kind", [kind for kind in PERTURBATIONS if kind != "shuffle"])
def test_the_remaining_parts_keep_their_order(kind: str) -> None:
    remaining = iter(perturb(kind, 0.2).split() if kind in WORD_KINDS else perturb(kind, 0.2))
    original = TEXT.split() if kind in WORD_KINDS else TEXT
    assert sum(any(part == other for other in remaining) for part in original[:3]) >= 1
