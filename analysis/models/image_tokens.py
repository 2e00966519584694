"""Token ids that stand for images: one for each position of each image, equal for equal images only.

A model's vocabulary has one placeholder for all images. Prompts are compared by their ids, in batches that
share a prefix and in keys of caches, so that the placeholder is replaced by ids above every vocabulary, which
follow from the digest of the image. `ImageReader` puts the placeholder back when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

from defenses.soft_prompts import FIRST_LEARNED_ID

TokenKind = Literal["text", "learned", "image"]
_KINDS: tuple[TokenKind, ...] = ("text", "learned", "image")  # in the order of their ids

# Layout of an id: a bit that marks images, 44 bits of the image's digest, 16 bits of the position.
_POSITION_BITS = 16
_DIGEST_DIGITS = 11  # hexadecimal: 44 bits
FIRST_IMAGE_ID = 1 << 61
MAX_IMAGE_TOKENS = 1 << _POSITION_BITS


def make_image_ids(digest: str, n_tokens: int) -> range:
    """Return the token ids of an image.

    >>> ids = make_image_ids("0f" * 32, 3)
    >>> len(ids), is_image_id(ids[0]), is_image_id(49151), ids[1] - ids[0]
    (3, True, False, 1)

    Args:
        digest: SHA-256 of the image, hexadecimal.
        n_tokens: number of its tokens in a prompt.
    """
    if n_tokens > MAX_IMAGE_TOKENS:
        raise ValueError(f"an image has {n_tokens} tokens; {MAX_IMAGE_TOKENS} are the most")
    first = FIRST_IMAGE_ID + (int(digest[:_DIGEST_DIGITS], 16) << _POSITION_BITS)
    return range(first, first + n_tokens)


def is_image_id(token_id: int) -> bool:
    """Return whether a token id stands for a part of an image."""
    return token_id >= FIRST_IMAGE_ID


def contains_image(token_ids: Sequence[int]) -> bool:
    """Return whether any of the token ids stands for a part of an image."""
    return max(token_ids, default=0) >= FIRST_IMAGE_ID


def find_whole_prefix(token_ids: Sequence[int], n_prefix: int) -> int:
    """Return the largest number of first tokens, up to a limit, that splits no image.

    >>> ids = [5, *make_image_ids("0f" * 32, 3), 6]
    >>> find_whole_prefix(ids, 3), find_whole_prefix(ids, 4)
    (1, 4)
    """
    next_id = next((token_id for token_id in token_ids[n_prefix:] if token_id >= FIRST_IMAGE_ID), 0)
    position = next_id % MAX_IMAGE_TOKENS
    return token_ids.index(next_id - position) if position else n_prefix


def split_text_and_images(token_ids: Sequence[int]) -> Iterator[tuple[TokenKind, list[int]]]:
    """Yield the prompt's tokens in runs of text, of images, and of learned embeddings.

    >>> ids = [5, *make_image_ids("0f" * 32, 2), 6]
    >>> [(kind, len(run)) for kind, run in split_text_and_images(ids)]
    [('text', 1), ('image', 2), ('text', 1)]
    """
    for number, run in groupby(
        token_ids, lambda token: (token >= FIRST_LEARNED_ID) + (token >= FIRST_IMAGE_ID)
    ):
        yield _KINDS[number], list(run)
