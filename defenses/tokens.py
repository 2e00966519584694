"""Texts with an exact number of tokens: random texts, and truncated texts."""

from __future__ import annotations

import random
from typing import Any

from defenses.errors import UserError

_MAX_TRIES = 200


def encode_plain_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text without the special tokens that a tokenizer may add."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def draw_random_text(tokenizer: Any, length: int, rng: random.Random) -> str:
    """Return a text of exactly `length` random tokens that encodes to the same tokens.

    Tokens are drawn one by one from the alphanumeric part of the vocabulary. A token that would merge with
    its neighbor is drawn again, because the model would read another token.

    Args:
        tokenizer: transformers tokenizer.
        length: number of tokens, at least 1.
        rng: random number generator; `random.SystemRandom()` for a secret.

    Raises:
        UserError: if the vocabulary has no suitable tokens.
    """
    special = set(tokenizer.all_special_ids)
    candidates = [
        token_id
        for token_id in range(len(tokenizer))
        if token_id not in special
        and _is_plain_token(tokenizer.decode([token_id], skip_special_tokens=False))
    ]
    if not candidates:
        raise UserError(
            "this tokenizer has no alphanumeric tokens to draw from; provide the text itself "
            "(--set trigger=FILE)"
        )
    ids: list[int] = []
    while len(ids) < length:
        for _ in range(_MAX_TRIES):
            longer = [*ids, rng.choice(candidates)]
            text = tokenizer.decode(longer)
            if text == text.strip() and encode_plain_text(tokenizer, text) == longer:
                ids = longer
                break
        else:
            # No token can follow the last one (for example, half a character): remove it and try another.
            if not ids:
                raise UserError("no token of this tokenizer survives a decode-encode round trip")
            ids.pop()
    return str(tokenizer.decode(ids))


def cut_text(tokenizer: Any, text: str, length: int) -> str:
    """Return the first `length` tokens of a text, which is repeated if it is too short."""
    while len(encode_plain_text(tokenizer, text)) < length:
        text = f"{text} {text}"
    return str(tokenizer.decode(encode_plain_text(tokenizer, text)[:length])).strip()


def _is_plain_token(text: str) -> bool:
    """Return whether a token is ASCII letters and digits, optionally after a space."""
    return text.isascii() and text.removeprefix(" ").isalnum()
