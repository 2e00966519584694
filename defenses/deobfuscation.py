"""Extraction of key words from a text, and decoding of base64, rot13, leetspeak and invisible characters."""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata

# The most common English words. They carry little meaning, and they distinguish plain text from encoded text.
_COMMON_WORDS = frozenset(
    """
    a about after all also an and any are as at be because been but by can could did do does for from get go
    had has have he her him his how i if in into is it its just know like make me more my no not of on one
    only or other our out people please she should so some take than that the their them then there these
    they this time to up us use want was way we what when which who why will with without would you your
    """.split()  # noqa: SIM905
)


def extract_key_words(text: str) -> str:
    """Return the words of a text without the most common ones, or the text itself if no word remains.

    >>> extract_key_words("Please tell me how to bake a loaf of rye bread.")
    'tell bake loaf rye bread'
    """
    key_words = [
        word
        for word in re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text)
        if word.lower() not in _COMMON_WORDS
    ]
    return " ".join(key_words) or text


# Zero-width spaces and soft hyphens; zero-width joiners only within English words (other scripts need them).
_INVISIBLE_PATTERN = "[\u200b\u2060\ufeff\u00ad]|(?<=[A-Za-z])[\u200c\u200d](?=[A-Za-z])"
_LEET_TABLE = str.maketrans("4310578@$!", "aeiostbasi")


def deobfuscate_text(text: str) -> str:
    """Return a text with its obfuscations reversed.

    >>> deobfuscate_text("Answer this: SG93IGRvIEkgc2luZyBhIHNvbmc/")
    'Answer this: How do I sing a song?'
    >>> deobfuscate_text("Ubj qb V fvat n fbat?"), deobfuscate_text("h0w d0 1 s1ng 4 50ng?")
    ('How do I sing a song?', 'how do i sing a song?')
    >>> deobfuscate_text("How do I sing an MP3?")
    'How do I sing an MP3?'
    """
    text = re.sub(_INVISIBLE_PATTERN, "", "".join(map(_normalize_letter, text)))
    text = re.sub(r"[A-Za-z0-9+/]{16,}={0,2}", lambda match: _decode_base64(match[0]), text)
    return "".join(map(_decode_line, text.splitlines(keepends=True)))


def _normalize_letter(character: str) -> str:
    """Return the ASCII form of a full-width or mathematical letter; return other characters unchanged."""
    plain = unicodedata.normalize("NFKC", character)
    return plain if len(plain) == 1 and plain.isascii() and plain.isalpha() else character


def _decode_base64(encoded: str) -> str:
    """Return the decoded text if it is printable and has a space; otherwise return the input."""
    try:
        plain = base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return encoded
    return plain if plain.isprintable() and " " in plain else encoded


def _decode_line(line: str) -> str:
    """Return the form of a line with the most common words: unchanged, rot13, or leetspeak decoded.

    A decoded form replaces a part of the line only if it has at least two more common words.
    """

    def count_common_words(text: str) -> int:
        return sum(word in _COMMON_WORDS for word in re.findall(r"[a-z']+", text.lower()))

    # Parts of a line may be plain text, so each part between colons is decoded separately.
    parts = re.split(r"(:\s+)", line)
    for index, part in enumerate(parts):
        words = part.split()
        n_mixed_words = sum(
            bool(re.search("[A-Za-z]", word) and word != word.translate(_LEET_TABLE)) for word in words
        )
        forms = [part, codecs.encode(part, "rot13")]
        forms += [part.translate(_LEET_TABLE)] if n_mixed_words > len(words) / 4 else []  # not dates and sums
        best = max(forms, key=count_common_words)
        parts[index] = best if count_common_words(best) >= count_common_words(part) + 2 else part
    return "".join(parts)
