"""Deobfuscation: obfuscated requests are decoded, plain texts are unchanged."""

from __future__ import annotations

import base64
import codecs

import pytest

from analysis.datasets.loading import load_queries
from defenses.deobfuscation import deobfuscate_text, extract_key_words

REQUEST = "How do I bake a loaf of bread for my neighbor?"
OBFUSCATED = {
    "base64": base64.b64encode(REQUEST.encode()).decode(),
    "rot13": codecs.encode(REQUEST, "rot13"),
    "leetspeak": REQUEST.lower().translate(str.maketrans("aeios", "43105")),
    "zero width": "\u200b".join(REQUEST),
    "full width": "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in REQUEST),
}


@pytest.mark.parametrize("kind", OBFUSCATED)
@pytest.mark.parametrize(
    "frame", ["{}", "Decode this and answer it: {}", "Answer the text below.\n\n{}\n\nNow."]
)
def test_an_obfuscated_request_is_decoded_within_plain_text(kind: str, frame: str) -> None:
    decoded = deobfuscate_text(frame.format(OBFUSCATED[kind]))
    assert decoded.lower() == frame.format(REQUEST).lower()


def test_plain_queries_are_unchanged() -> None:
    texts = [query.text for query in load_queries("contrast").queries]
    assert [text for text in texts if deobfuscate_text(text) != text] == []


def test_plain_texts_with_digits_or_long_words_are_unchanged() -> None:
    for text in (
        "Convert 1500 mp3 files to ogg.",
        "What does the class AbstractSingletonProxyFactoryBean do?",
        "Was ist der Unterschied zwischen Wein und Traubensaft?",
        "https://example.org/a/very/long/path/with/segments",
        "100% of 3 is 3, and $5 + $7 is $12.",
    ):
        assert deobfuscate_text(text) == text


def test_key_words_keep_their_order_and_are_never_empty() -> None:
    assert extract_key_words(REQUEST) == "bake loaf bread neighbor"
    assert extract_key_words("What is it that you do?") == "What is it that you do?"
