"""What a run found out about a model and later runs need not: small JSON files in the user's cache."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from analysis import saving, scoring, store
from analysis.models import LoadedModel


def place(
    kind: str, loaded: LoadedModel, about: dict[str, Any], made_by: Iterable[ModuleType] = ()
) -> Path | None:
    """Return the file for something about a model, named by all that a score depends on, and by `about`.

    What a score depends on (weights, configuration, device, code, libraries) is added here, for every kind:
    nothing that was kept is found again by a version that would score otherwise.

    Args:
        kind: what is kept, one of `store.KINDS`.
        loaded: the model.
        about: what else it depends on. Where one of the values is None, it is not known what that is, and
            nothing is kept.
        made_by: modules beside the scoring code by which it was found out.
    """
    if None in about.values():
        return None
    sources = [inspect.getsource(module) for module in made_by]
    whole = {"scored": scoring.about(loaded), "sources": sources, "about": about}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()
    return store.folder(kind) / f"{digest[:32]}.json"


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
