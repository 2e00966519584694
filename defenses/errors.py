"""Error messages for users: one line with the value, the rule and the next step."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

_MAX_LIBRARY_TEXT = 240  # characters of a library's message that are shown
# No space, no quota left, and a file larger than the system allows.
_FULL_DISK_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As safetensors words them, and torch.save.
_FULL_DISK_PHRASES = (
    *("os error 28", "os error 122", "os error 27", "No space left on device"),
    *("PytorchStreamWriter failed writing", "unexpected pos"),
)


class UserError(Exception):
    """An error that the user can correct; printed as one line without a traceback, with exit code 2."""


def check_unicode(text: str, name: str) -> None:
    r"""Raise if a text holds half of a character, which JSON can escape (\ud83d) but no file can hold.

    Args:
        text: of the user, or of their defense.
        name: of the text, for the error message.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ascii(text[error.start])
        raise UserError(
            f"{name} holds {code}, half of a character (a lone surrogate); remove it, or write the whole "
            "character"
        ) from error


def describe_error(error: Exception) -> str:
    """Format an error for the user: a `UserError` verbatim, any other with its type.

    >>> describe_error(UserError("no such file")), describe_error(ValueError("odd"))
    ('no such file', 'ValueError: odd')
    """
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def describe_library_error(error: Exception) -> str:
    r"""Format an error of a library in one short line, with its type.

    >>> describe_library_error(ValueError("no such\n  field"))
    'ValueError: no such field'
    """
    text = " ".join(str(error).split())
    shortened = text if len(text) <= _MAX_LIBRARY_TEXT else f"{text[:_MAX_LIBRARY_TEXT]} …"
    return f"{type(error).__name__}: {shortened}" if text else type(error).__name__


def describe_download_error(error: Exception) -> str:
    """Say why a download failed and what to do about it."""
    if isinstance(error, (ImportError, ValueError)) and "proxy" in str(error).lower():
        return (
            "the proxy in ALL_PROXY, HTTPS_PROXY or HTTP_PROXY cannot be used "
            f"({describe_library_error(error)}): unset the variable, or, for a SOCKS proxy, run "
            "`pip install httpx[socks]`"
        )
    if isinstance(error, PermissionError):
        return f"the cache cannot be written ({describe_library_error(error)}); set HF_HOME to another folder"
    return f"{describe_library_error(error)}. Check the network connection and the free disk space"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch means that memory ran out.

    On CPUs and on Apple GPUs, a failed allocation raises a plain RuntimeError.

    >>> [is_out_of_memory(RuntimeError(text)) for text in ("MPS backend out of memory", "shape mismatch")]
    [True, False]
    """
    phrases = "allocate memory", "out of memory"
    return type(error).__name__ == "OutOfMemoryError" or any(phrase in str(error) for phrase in phrases)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, means that a file was not written for lack of space.

    Libraries that are not written in Python raise errors of their own, whose text is all they say.

    >>> is_disk_full(OSError(errno.ENOSPC, "")), is_disk_full(RuntimeError("I/O error: ... (os error 28)"))
    (True, True)
    """
    cause: BaseException | None = error
    while cause is not None:
        has_code = isinstance(cause, OSError) and cause.errno in _FULL_DISK_CODES
        if has_code or any(phrase in str(cause) for phrase in _FULL_DISK_PHRASES):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def unknown_name_error(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """Return the error for an unknown name, with the nearest known names first.

    >>> print(unknown_name_error("defense", "backdor", ["none", "backdoor", "policy"]))
    unknown defense 'backdor': did you mean 'backdoor'? Available: backdoor, none, policy

    Args:
        kind: kind of thing that is named, such as `defense`.
        name: the unknown name.
        known: the valid names.
        hint: text after the list of valid names.
    """
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    suggestion = f"did you mean {' or '.join(map(repr, matches))}? " if matches else ""
    return UserError(f"unknown {kind} {name!r}: {suggestion}Available: {', '.join(names) or 'none'}{hint}")
