"""The streams of the terminal: any text can be printed in any encoding, and nobody has to read to the end."""

from __future__ import annotations

import codecs
import os
import sys
from pathlib import Path

# What stands for a character that the terminal's encoding lacks; a sign must not be lost.
_PLAIN_CHARACTERS = str.maketrans(
    {
        **{"−": "-", "–": "-", "‑": "-", "×": "x", "·": ".", "′": "'", "→": ">", "…": "...", "±": "+-"},
        **{"≥": ">=", "≤": "<=", "≠": "!=", "½": "1/2", "²": "2", "Δ": "D", "κ": "k", "λ": "l", "ρ": "r"},
        **dict.fromkeys("\u2018\u2019", "'"),
        **dict.fromkeys("\u201c\u201d", '"'),
    }
)


def prepare_output_streams() -> None:
    """Let stdout and stderr print any text, whatever their encoding (LANG=C, latin-1, cp1252)."""
    codecs.register_error("plain", _replace_characters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")


def flush_output_streams() -> None:
    """Print what is still buffered, or drop it if nobody reads it any more (`analyze list | head -1`)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # Python would try again at its end, and complain
            with Path(os.devnull).open("wb") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())


def _replace_characters(error: UnicodeError) -> tuple[str, int]:
    """Return a plain text for the characters that an encoding lacks, and where they end."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN_CHARACTERS)
    return text.encode("ascii", "replace").decode(), error.end
