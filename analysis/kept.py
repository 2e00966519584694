"""What a run found out about a model and later runs need not: small JSON files in the user's cache."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs

from analysis import saving


def place(kind: str, about: dict[str, Any]) -> Path | None:
    """Return the file for something that depends on `about` and on nothing else.

    Where one of its values is None, it is not known what that is, and nothing is kept.

    >>> place("validity", {"a": 1}) == place("validity", {"a": 1}) != place("validity", {"a": 2})
    True
    """
    if None in about.values():
        return None
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    return platformdirs.user_cache_path("refusalscope") / kind / f"{digest[:32]}.json"


def write(path: Path | None, found: dict[str, Any]) -> None:
    """Keep it; where the cache cannot be written, it is found out again next time."""
    if path is None:
        return
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in found.items()}
    with suppress(OSError):
        saving.write(path, json.dumps(plain))


def read(path: Path | None) -> dict[str, Any] | None:
    """Return what was kept, or nothing."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
