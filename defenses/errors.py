"""What the user got wrong, said in one line: the value, the rule and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's, not of the program: printed as one line, without a traceback, exit code 2."""


def describe_error(error: Exception) -> str:
    """Return what is said of an error that ends a part of a run: a user's mistake in its own words.

    >>> describe_error(UserError("no such file")), describe_error(ValueError("odd"))
    ('no such file', 'ValueError: odd')
    """
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch means that memory ran out.

    On a CPU and on Apple's GPUs a failed allocation is a plain RuntimeError.

    >>> [is_out_of_memory(RuntimeError(text)) for text in ("MPS backend out of memory", "shape mismatch")]
    [True, False]
    """
    known = "allocate memory", "out of memory"
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in known)


def unknown_name_error(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """Return the error for a name that is not known, nearest names first.

    >>> print(unknown_name_error("defense", "backdor", ["none", "backdoor", "policy"]))
    unknown defense 'backdor': did you mean 'backdoor'? There are: backdoor, none, policy
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {meant}There are: {', '.join(names)}{hint}")
