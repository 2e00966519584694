"""What is known of a readout's validity, kept per model, defense and readout for later runs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import platformdirs

from analysis import manifest
from analysis.readout import Readout
from analysis.run import Bench
from defenses import Defense

UNKNOWN = "not validated"


def keep(
    bench: Bench, defense: Defense, readout: Readout, judge: str, tokens: int, row: dict[str, Any]
) -> None:
    """Keep a condition's row of `validity.csv` in the user's cache."""
    path = _path(bench, defense, readout)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    handle, new = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(plain | {"judge": judge, "new_tokens": tokens}, file)
    Path(new).replace(path)


def known(bench: Bench, defense: Defense, readout: Readout) -> str:
    """Return `trusted`, `not trusted` or `cannot tell` as it was measured, or that it was not."""
    try:
        return str(json.loads(_path(bench, defense, readout).read_text("utf-8"))["trusted"])
    except (OSError, ValueError, KeyError):
        return UNKNOWN


def _path(bench: Bench, defense: Defense, readout: Readout) -> Path:
    """A file named by all that the margins depend on, the queries aside; secrets enter as fingerprints."""
    origin = bench.loaded.origin
    about = {
        "model": [origin.get("sha256"), origin.get("state_sha256"), str(bench.loaded.model.dtype)],
        "defense": [type(defense).__qualname__, manifest.of_defense(defense), bench.seed],
        "attack": bench.attack,
        "readout": [readout.ids, readout.weights, readout.threshold, readout.prefix],
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    return platformdirs.user_cache_path("refusalscope") / "validity" / f"{digest[:32]}.json"
