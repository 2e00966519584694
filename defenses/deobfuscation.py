"""What hides in a text: its key words among common ones, plain words under a code or a disguise."""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata

# The commonest words of English, which say little by themselves; by them, too, plain text is told from code.
_COMMON_WORDS = frozenset(
    """
    a about after all also an and any are as at be because been but by can could did do does for from get go
    had has have he her him his how i if in into is it its just know like make me more my no not of on one
    only or other our out people please she should so some take than that the their them then there these
    they this time to up us use want was way we what when which who why will with without would you your
    """.split()  # noqa: SIM905
)


def extract_key_words(text: str) -> str:
    """Return the words of a text that are not among the commonest; all of it where none is left.

    >>> extract_key_words("Please tell me how to bake a loaf of rye bread.")
    'tell bake loaf rye bread'
    """
    kept = [
        word
        for word in re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text)
        if word.lower() not in _COMMON_WORDS
    ]
    return " ".join(kept) or text


# Spaces of no width and soft hyphens; joiners only within English words, since other scripts need them.
_INVISIBLE_PATTERN = "[\u200b\u2060\ufeff\u00ad]|(?<=[A-Za-z])[\u200c\u200d](?=[A-Za-z])"
_LEET_TABLE = str.maketrans("4310578@$!", "aeiostbasi")


def deobfuscate_text(text: str) -> str:
    """Return a text with its disguises undone.

    >>> deobfuscate_text("Answer this: SG93IGRvIEkgc2luZyBhIHNvbmc/")
    'Answer this: How do I sing a song?'
    >>> deobfuscate_text("Ubj qb V fvat n fbat?"), deobfuscate_text("h0w d0 1 s1ng 4 50ng?"), deobfuscate_text("How do I sing an MP3?")
    ('How do I sing a song?', 'how do i sing a song?', 'How do I sing an MP3?')
    """
    text = re.sub(_INVISIBLE_PATTERN, "", "".join(map(_normalize_letter, text)))
    text = re.sub(r"[A-Za-z0-9+/]{16,}={0,2}", lambda found: _decode_base64(found[0]), text)
    return "".join(map(_decode_line, text.splitlines(keepends=True)))


def _normalize_letter(character: str) -> str:
    """A letter in its plain form (full width, mathematical); other characters as they are."""
    plain = unicodedata.normalize("NFKC", character)
    return plain if len(plain) == 1 and plain.isascii() and plain.isalpha() else character


def _decode_base64(encoded: str) -> str:
    try:
        plain = base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return encoded
    return plain if plain.isprintable() and " " in plain else encoded


def _decode_line(line: str) -> str:
    """The line as it is, rotated, or with letters for digits: in whichever form it has most common words."""

    def common(text: str) -> int:
        return sum(word in _COMMON_WORDS for word in re.findall(r"[a-z']+", text.lower()))

    # Parts of a line may be in plain words, so each stretch between colons is looked at by itself.
    parts = re.split(r"(:\s+)", line)
    for place, part in enumerate(parts):
        words = part.split()
        mixed = sum(
            bool(re.search("[A-Za-z]", word) and word != word.translate(_LEET_TABLE)) for word in words
        )
        forms = [part, codecs.encode(part, "rot13")]
        forms += [part.translate(_LEET_TABLE)] if mixed > len(words) / 4 else []  # not dates and sums
        best = max(forms, key=common)
        parts[place] = best if common(best) >= common(part) + 2 else part
    return "".join(parts)
