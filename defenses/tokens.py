"""Texts of an exact number of tokens: random ones that encode to what they are, plain ones cut to size."""

from __future__ import annotations

import random
from typing import Any

from defenses.errors import UserError

_MAX_TRIES = 200


def encode_plain_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text by itself, without the special tokens a tokenizer may add."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def draw_random_text(tokenizer: Any, length: int, rng: random.Random) -> str:
    """Return a text of exactly `length` random tokens that encodes to those same tokens.

    Tokens are drawn one by one from the letters-and-digits part of the vocabulary; one that would merge with
    its neighbor, so that the model never saw it, is drawn again.

    Args:
        tokenizer: of transformers.
        length: in tokens, at least 1.
        rng: `random.SystemRandom()` where the text is to be a secret.
    """
    special = set(tokenizer.all_special_ids)
    drawable = [
        i
        for i in range(len(tokenizer))
        if i not in special and _is_plain_token(tokenizer.decode([i], skip_special_tokens=False))
    ]
    if not drawable:
        raise UserError(
            "this tokenizer has no plain tokens to draw from: give the text itself (--set trigger=FILE)"
        )
    ids: list[int] = []
    while len(ids) < length:
        for _ in range(_MAX_TRIES):
            longer = [*ids, rng.choice(drawable)]
            text = tokenizer.decode(longer)
            if text == text.strip() and encode_plain_text(tokenizer, text) == longer:
                ids = longer
                break
        else:
            # A token that nothing may follow (half a character, say): go back one and try another.
            if not ids:
                raise UserError("no token of this tokenizer survives a decode-encode round trip")
            ids.pop()
    return str(tokenizer.decode(ids))


def cut_text(tokenizer: Any, text: str, length: int) -> str:
    """Return the first `length` tokens of a text, which is repeated where it is too short."""
    while len(encode_plain_text(tokenizer, text)) < length:
        text = f"{text} {text}"
    return str(tokenizer.decode(encode_plain_text(tokenizer, text)[:length])).strip()


def _is_plain_token(text: str) -> bool:
    """Whether a token is ASCII letters and digits, a space in front or not: such survive templates."""
    return text.isascii() and text.removeprefix(" ").isalnum()
