"""Random changes of a text, by characters or by words: a function of the text, a share and a generator."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

# What characters are drawn from; the paper's also has line breaks and tabs, which templates trim.
_RANDOM_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "
_MASK_WORD = "[MASK]"


def check_rate(rate: float) -> None:
    """Raise unless it is a share of something."""
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate}: it is a share, above 0 and at most 1")


def _draw_positions(length: int, rate: float, rng: random.Random) -> list[int]:
    """Distinct places in order: so large a share of all, one at least."""
    return sorted(rng.sample(range(length), min(length, max(1, round(rate * length)))))


def swap_characters(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with a share of its characters replaced by random ones.

    >>> swap_characters("abcdefghij", 0.2, random.Random(0))
    'abcdeffhiH'
    """
    characters = list(text)
    for place in _draw_positions(len(text), rate, rng):
        characters[place] = rng.choice(_RANDOM_CHARACTERS)
    return "".join(characters)


def insert_characters(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with random characters put in front of a share of its own.

    >>> insert_characters("abcdefghij", 0.2, random.Random(0))
    'abcdeffghiHj'
    """
    drawn = {place: rng.choice(_RANDOM_CHARACTERS) for place in _draw_positions(len(text), rate, rng)}
    return "".join(drawn.get(place, "") + character for place, character in enumerate(text))


def patch_characters(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with one stretch of it, a share of its length, replaced by random characters.

    >>> patch_characters("abcdefghij", 0.2, random.Random(0))
    'abcdef+Nij'
    """
    size = min(len(text), max(1, round(rate * len(text))))
    start = rng.randrange(len(text) - size + 1)
    return text[:start] + "".join(rng.choices(_RANDOM_CHARACTERS, k=size)) + text[start + size :]


def delete_characters(text: str, rate: float, rng: random.Random) -> str:
    """Return the text without a share of its characters; one is left.

    >>> delete_characters("abcdefghij", 0.2, random.Random(0))
    'abcdefhi'
    """
    gone = _draw_positions(len(text), rate, rng)[: len(text) - 1]
    return "".join(character for place, character in enumerate(text) if place not in gone)


def mask_words(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with a share of its words masked.

    >>> mask_words("How do I bake bread?", 0.4, random.Random(0))
    'How do I [MASK] [MASK]'
    """
    words = text.split()
    for place in _draw_positions(len(words), rate, rng):
        words[place] = _MASK_WORD
    return " ".join(words)


def drop_words(text: str, rate: float, rng: random.Random) -> str:
    """Return the text without a share of its words; one is left.

    >>> drop_words("How do I bake bread?", 0.4, random.Random(0))
    'How do I'
    """
    words = text.split()
    gone = _draw_positions(len(words), rate, rng)[: len(words) - 1]
    return " ".join(word for place, word in enumerate(words) if place not in gone)


def shuffle_words(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with a share of its words, two at least, in each other's places.

    >>> shuffle_words("How do I bake bread?", 0.4, random.Random(1))
    'do How I bake bread?'
    """
    words = text.split()
    places = _draw_positions(len(words), max(rate, 2 / len(words)), rng)
    turn = rng.randrange(1, len(places)) if len(places) > 1 else 0
    for place, other in zip(places, [words[at] for at in [*places[turn:], *places[:turn]]], strict=True):
        words[place] = other
    return " ".join(words)


PERTURBATIONS: dict[str, Callable[[str, float, random.Random], str]] = {
    "swap": swap_characters,
    "insert": insert_characters,
    "patch": patch_characters,
    "delete": delete_characters,
    "mask": mask_words,
    "drop": drop_words,
    "shuffle": shuffle_words,
}
