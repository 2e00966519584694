"""Texts with an exact number of tokens."""

import random

from conftest import toy_tokenizer

from defenses.tokens import cut_text, draw_random_text, encode_plain_text


def test_random_text_depends_on_its_generator_only():
    tokenizer = toy_tokenizer()
    first, again, other = (draw_random_text(tokenizer, 30, random.Random(seed)) for seed in "aab")
    assert first == again != other


def test_a_text_that_is_too_short_is_repeated():
    tokenizer = toy_tokenizer()
    assert len(encode_plain_text(tokenizer, cut_text(tokenizer, "As an assistant", 60))) in (59, 60)
