"""Random perturbations of a text by characters or words, as functions of the text, a rate and a generator."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

# Characters to draw from. The paper also draws line breaks and tabs, which chat templates trim.
_RANDOM_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "
_MASK_WORD = "[MASK]"


def check_rate(rate: float) -> None:
    """Raise ValueError unless the rate is in (0, 1]."""
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate}: it must be a share above 0 and at most 1")


def _draw_positions(length: int, rate: float, rng: random.Random) -> list[int]:
    """Return a sorted random sample of `rate * length` positions, at least one."""
    return sorted(rng.sample(range(length), min(length, max(1, round(rate * length)))))


def swap_characters(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with a share of its characters replaced by random characters.

    >>> swap_characters("abcdefghij", 0.2, random.Random(0))
    'abcdeffhiH'
    """
    characters = list(text)
    for position in _draw_positions(len(text), rate, rng):
        characters[position] = rng.choice(_RANDOM_CHARACTERS)
    return "".join(characters)


def insert_characters(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with a random character before each of a share of its characters.

    >>> insert_characters("abcdefghij", 0.2, random.Random(0))
    'abcdeffghiHj'
    """
    insertions = {
        position: rng.choice(_RANDOM_CHARACTERS) for position in _draw_positions(len(text), rate, rng)
    }
    return "".join(insertions.get(position, "") + character for position, character in enumerate(text))


def patch_characters(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with one contiguous part, a share of its length, replaced by random characters.

    >>> patch_characters("abcdefghij", 0.2, random.Random(0))
    'abcdef+Nij'
    """
    size = min(len(text), max(1, round(rate * len(text))))
    start = rng.randrange(len(text) - size + 1)
    return text[:start] + "".join(rng.choices(_RANDOM_CHARACTERS, k=size)) + text[start + size :]


def delete_characters(text: str, rate: float, rng: random.Random) -> str:
    """Return the text without a share of its characters; at least one remains.

    >>> delete_characters("abcdefghij", 0.2, random.Random(0))
    'abcdefhi'
    """
    deleted = _draw_positions(len(text), rate, rng)[: len(text) - 1]
    return "".join(character for position, character in enumerate(text) if position not in deleted)


def mask_words(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with a share of its words replaced by a mask.

    >>> mask_words("How do I bake bread?", 0.4, random.Random(0))
    'How do I [MASK] [MASK]'
    """
    words = text.split()
    for position in _draw_positions(len(words), rate, rng):
        words[position] = _MASK_WORD
    return " ".join(words)


def drop_words(text: str, rate: float, rng: random.Random) -> str:
    """Return the text without a share of its words; at least one remains.

    >>> drop_words("How do I bake bread?", 0.4, random.Random(0))
    'How do I'
    """
    words = text.split()
    dropped = _draw_positions(len(words), rate, rng)[: len(words) - 1]
    return " ".join(word for position, word in enumerate(words) if position not in dropped)


def shuffle_words(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with a share of its words, at least two, rotated among their positions.

    >>> shuffle_words("How do I bake bread?", 0.4, random.Random(1))
    'do How I bake bread?'
    """
    words = text.split()
    positions = _draw_positions(len(words), max(rate, 2 / len(words)), rng)
    offset = rng.randrange(1, len(positions)) if len(positions) > 1 else 0
    rotated_words = [words[position] for position in [*positions[offset:], *positions[:offset]]]
    for position, word in zip(positions, rotated_words, strict=True):
        words[position] = word
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
