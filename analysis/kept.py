"""What a run found out about a model and later runs need not: small JSON files in the user's cache."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from analysis import saving, scoring, store
from analysis.models import LoadedModel


def make_json_cache_path(
    kind: str, loaded_model: LoadedModel, key_settings: dict[str, Any]
) -> Path | None:
    """Return the file for something about a model, named by all that a score depends on, and by `about`.

    What a score depends on (weights, configuration, device, code, libraries) is added here, for every kind:
    nothing that was kept is found again by a version that would score otherwise.

    Args:
        kind: what is kept, one of `store.KINDS`.
        loaded_model: the model.
        key_settings: what else it depends on. Where one of the values is None, it is not known what that is, and
            nothing is kept.
    """
    if None in key_settings.values():
        return None
    whole = {"scored": scoring.describe_computation(loaded_model), "study_code": scoring.hash_code(*scoring.STUDY_SOURCES), "about": key_settings}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()
    return store.get_cache_kind_folder(kind) / f"{digest[:32]}.json"


def write_cached_json(path: Path | None, content: dict[str, Any]) -> None:
    """Keep it; where the cache cannot be written, it is found out again next time."""
    if path is None:
        return
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in content.items()}
    with suppress(OSError):
        saving.write_text_file(path, json.dumps(plain))


def read_cached_json(path: Path | None) -> dict[str, Any] | None:
    """Return what was kept, or nothing."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
