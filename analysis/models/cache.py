"""What was computed for a model and need not be computed again, and what of it there is.

Scores and drafts lie in one SQLite file; what else was found out about a model lies beside it, in a folder
of small JSON files for each of `KINDS` (`kept` writes them).

A row is named by a digest of all that it depends on: weights, what arms them, number format, token ids,
readout, versions of the libraries. No prompt can be read from a score's row. Rows are committed batch by
batch, so that a run that is killed loses one batch at most.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import shutil
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from analysis.files import write_text_file
from analysis.models.loading import LoadedModel
from defenses.errors import UserError

_CREATE_TABLES = """
CREATE TABLE IF NOT EXISTS scores (name BLOB PRIMARY KEY, margin REAL, coverage REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS drafts (name BLOB PRIMARY KEY, text TEXT) WITHOUT ROWID;
"""
# Kinds of what is kept beside scores and drafts, each the name of a folder.
CACHE_KINDS = ("readouts", "verdicts", "validity", "residuals", "cost")
_MAX_KEYS_PER_STATEMENT = 500  # names in one question; SQLite allows 999


def get_score_cache_path() -> Path:
    """Return the file of this user."""
    return platformdirs.user_cache_path("refusalscope") / "scores.sqlite"


def get_cache_kind_folder(kind: str) -> Path:
    """Return the folder of one of `KINDS`.

    Raises:
        ValueError: if it is another: what is not among them would be neither listed nor cleared.
    """
    if kind not in CACHE_KINDS:
        raise ValueError(f"{kind!r} is no kind of what is kept; add it to KINDS, so that it is cleared, too")
    return get_score_cache_path().with_name(kind)


def count_json_files(cache_path: Path) -> dict[str, dict[str, int]]:
    """Return for each kind how many files are kept beside a file of scores, and their bytes."""
    sizes = {
        kind: [one.stat().st_size for one in cache_path.with_name(kind).glob("*.json")]
        for kind in CACHE_KINDS
    }
    return {kind: {"count": len(found), "bytes": sum(found)} for kind, found in sizes.items()}


class CacheKey:
    """Names rows by what they depend on: something that many share, and the token ids of each.

    >>> len(CacheKey({"model": "x"}).make_key([1, 2])), CacheKey({"a": 1}).make_key([1]) == CacheKey({"a": 2}).make_key([1])
    (16, False)

    Args:
        about: what many rows share, as plain values.
    """

    def __init__(self, shared_settings: Mapping[str, Any]) -> None:
        self._shared_digest = hashlib.sha256(
            json.dumps(shared_settings, sort_keys=True, default=str).encode()
        )

    def make_key(self, token_ids: Sequence[int]) -> bytes:
        """Return the name of the row for these token ids."""
        digest = self._shared_digest.copy()
        digest.update(",".join(map(str, token_ids)).encode())
        return digest.digest()[:16]


class ScoreCache:
    """The kept rows; where the file cannot be used, nothing is found in it and nothing is kept.

    Args:
        place: of the file.
    """

    def __init__(self, cache_path: Path) -> None:
        self.n_hits = 0  # scores that need not be computed, of earlier runs or of this one
        try:
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            cache_path.touch(mode=0o600)  # drafts reword requests
            self._connection = sqlite3.connect(cache_path, timeout=30)
            # Readers and a writer at the same time; what was committed survives a killed process.
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.executescript(_CREATE_TABLES)
        except (OSError, sqlite3.Error):
            self._connection = sqlite3.connect(":memory:")
            self._connection.executescript(_CREATE_TABLES)

    def read_scores(self, keys: Sequence[bytes]) -> dict[bytes, tuple[float, float]]:
        """Return margin and coverage of the rows that are there."""
        rows = self._select_rows("SELECT name, margin, coverage FROM scores", keys)
        return {name: (margin, coverage) for name, margin, coverage in rows}

    def read_drafts(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """Return the texts of the rows that are there."""
        return dict(self._select_rows("SELECT name, text FROM drafts", keys))

    def write_scores(self, rows: Iterable[tuple[bytes, float, float]]) -> None:
        """Keep names, margins and coverages; what is no finite number is not kept."""
        finite = [row for row in rows if math.isfinite(row[1]) and math.isfinite(row[2])]
        self._write_rows("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", finite)

    def write_drafts(self, rows: Iterable[tuple[bytes, str]]) -> None:
        """Keep names and texts."""
        self._write_rows("INSERT OR REPLACE INTO drafts VALUES (?, ?)", rows)

    def _select_rows(self, statement: str, keys: Sequence[bytes]) -> list[Any]:
        rows: list[Any] = []
        for start in range(0, len(keys), _MAX_KEYS_PER_STATEMENT):
            some = keys[start : start + _MAX_KEYS_PER_STATEMENT]
            marks = ",".join("?" * len(some))
            try:
                rows += self._connection.execute(f"{statement} WHERE name IN ({marks})", some).fetchall()
            except sqlite3.Error:
                return rows
        return rows

    def _write_rows(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        try:
            with self._connection:  # one commit
                self._connection.executemany(statement, rows)
        except sqlite3.Error:  # a full disk, a locked or broken file: it is computed again next time
            return


def count_cached_rows(cache_path: Path) -> dict[str, int]:
    """Return how many rows of each kind a file holds, and its bytes."""
    if not cache_path.is_file():
        return {"scores": 0, "drafts": 0, "bytes": 0}
    size = sum(file.stat().st_size for file in _list_database_files(cache_path) if file.is_file())
    try:
        with closing(sqlite3.connect(cache_path, timeout=30)) as file:
            held = {
                table: int(file.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
                for table in ("scores", "drafts")
            }
    except sqlite3.Error as error:
        raise UserError(
            f"{cache_path} cannot be read ({error}): `analyze cache --clear` removes it"
        ) from error
    return {**held, "bytes": size}


def clear_cache(cache_path: Path) -> None:
    """Remove the file of scores and drafts, and the folder of every kind beside it."""
    for file in _list_database_files(cache_path):
        file.unlink(missing_ok=True)
    for kind in CACHE_KINDS:
        if cache_path.with_name(kind).is_dir():
            shutil.rmtree(cache_path.with_name(kind))


def _list_database_files(cache_path: Path) -> list[Path]:
    """The file, and those that SQLite keeps beside it."""
    return [cache_path, *(cache_path.with_name(cache_path.name + end) for end in ("-wal", "-shm"))]


def make_json_cache_path(kind: str, loaded_model: LoadedModel, key_settings: dict[str, Any]) -> Path | None:
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
    whole = {
        "scored": describe_computation(loaded_model),
        "study_code": hash_code(*STUDY_SOURCES),
        "about": key_settings,
    }
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()
    return get_cache_kind_folder(kind) / f"{digest[:32]}.json"


def write_cached_json(path: Path | None, content: dict[str, Any]) -> None:
    """Keep it; where the cache cannot be written, it is found out again next time."""
    if path is None:
        return
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in content.items()}
    with suppress(OSError):
        write_text_file(path, json.dumps(plain))


def read_cached_json(path: Path | None) -> dict[str, Any] | None:
    """Return what was kept, or nothing."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# The code that decides what a model reads and how its logits become a margin.
SCORING_SOURCES = (
    "analysis/models/*.py",
    "analysis/readouts/*.py",
    "analysis/attacks.py",
    "analysis/run.py",
    "analysis/mechanism/directions.py",
    "defenses/*.py",
)
# The code that turns margins and responses into thresholds, verdicts and costs.
STUDY_SOURCES = ("analysis/judges/*.py", "analysis/stats/*.py", "analysis/studies/*.py")


@cache
def hash_code(*patterns: str) -> str:
    """Return the SHA-256 of the source files that match the patterns, so that other code finds no cached result.

    >>> len(hash_code(*SCORING_SOURCES))
    64

    Args:
        patterns: glob patterns, relative to the folder that holds both packages.
    """
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def describe_computation(loaded_model: LoadedModel) -> dict[str, Any]:
    """Return what all that a model computes depends on: weights, configuration, device, code, libraries."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "weights": [loaded_model.origin.get("sha256"), loaded_model.origin.get("state_sha256")],
        "config": {**loaded_model.model.config.to_dict(), "_name_or_path": ""},
        "code": hash_code(*SCORING_SOURCES),
        "dtype": str(loaded_model.model.dtype),
        "device": loaded_model.model.device.type,
        "versions": versions,
    }
