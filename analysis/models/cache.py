"""Cache of results that depend on a model, and the keys of its entries.

Scores, drafts (responses to a defense's own calls) and verdicts on responses are rows of one SQLite file.
Other results are small JSON files next to it, in one folder for each of `CACHE_KINDS`.

A key is a digest of everything that the result depends on: weights, configuration, dtype, device, source
code, library versions, and for a row the defense's weight changes, the readout and the token ids. No prompt
can be recovered from the row of a score. Rows are committed batch by batch, so that a killed run loses at
most one batch.
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
CREATE TABLE IF NOT EXISTS responses (name BLOB PRIMARY KEY, verdict TEXT) WITHOUT ROWID;
"""
_TABLE_NAMES = ("scores", "drafts", "responses")
# Kinds of cached results other than scores and drafts; each is the name of a folder.
CACHE_KINDS = ("readouts", "verdicts", "validity", "residuals", "cost")
_MAX_KEYS_PER_STATEMENT = 500  # SQLite allows 999 parameters
# Source code that determines what a model reads and how its logits become a margin. Results computed by other
# code are not found again.
SCORING_SOURCES = (
    "analysis/models/**/*.py",
    "analysis/readouts/**/*.py",
    "analysis/attacks.py",
    "analysis/run.py",
    "analysis/mechanism/directions.py",
    "defenses/**/*.py",
)
# Source code that turns margins and responses into thresholds, verdicts and costs.
STUDY_SOURCES = ("analysis/judges/**/*.py", "analysis/stats/**/*.py", "analysis/studies/**/*.py")
_SOURCE_ROOT = Path(__file__).resolve().parents[2]


def get_score_cache_path() -> Path:
    """Return the path of the user's SQLite file."""
    return platformdirs.user_cache_path("refusalscope") / "scores.sqlite"


def get_cache_kind_folder(kind: str) -> Path:
    """Return the folder of one of `CACHE_KINDS`.

    Raises:
        ValueError: if the kind is not in `CACHE_KINDS`, because it would be neither listed nor cleared.
    """
    if kind not in CACHE_KINDS:
        raise ValueError(
            f"unknown cache kind {kind!r}; add it to CACHE_KINDS, so that it is listed and cleared"
        )
    return get_score_cache_path().with_name(kind)


def count_json_files(cache_path: Path) -> dict[str, dict[str, int]]:
    """Return the number of JSON files and their total bytes, by kind.

    Args:
        cache_path: the SQLite file next to which they are stored.
    """
    sizes_by_kind = {
        kind: [path.stat().st_size for path in cache_path.with_name(kind).glob("*.json")]
        for kind in CACHE_KINDS
    }
    return {kind: {"count": len(sizes), "bytes": sum(sizes)} for kind, sizes in sizes_by_kind.items()}


class CacheKey:
    """Makes row keys from settings that many rows share and the token ids of each row.

    >>> len(CacheKey({"model": "x"}).make_key([1, 2]))
    16
    >>> CacheKey({"a": 1}).make_key([1]) == CacheKey({"a": 2}).make_key([1])
    False

    Args:
        shared_settings: everything but the token ids that the rows depend on, as plain values.
    """

    def __init__(self, shared_settings: Mapping[str, Any]) -> None:
        self._shared_digest = _digest_settings(shared_settings)

    def make_key(self, token_ids: Sequence[int]) -> bytes:
        """Return the key of the row for these token ids."""
        digest = self._shared_digest.copy()
        digest.update(",".join(map(str, token_ids)).encode())
        return digest.digest()[:16]


class ScoreCache:
    """Cached scores and drafts; an unusable file acts as an empty cache that lasts for this run only.

    Args:
        cache_path: of the SQLite file.

    Attributes:
        n_hits: number of scores found instead of computed, including those of this run.
    """

    def __init__(self, cache_path: Path) -> None:
        self.n_hits = 0
        try:
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            cache_path.touch(mode=0o600)  # drafts may reword the user's queries
            self._connection = sqlite3.connect(cache_path, timeout=30)
            # Allows readers beside a writer; committed rows survive a killed process.
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.executescript(_CREATE_TABLES)
        except (OSError, sqlite3.Error):
            self._connection = sqlite3.connect(":memory:")
            self._connection.executescript(_CREATE_TABLES)

    def read_scores(self, keys: Sequence[bytes]) -> dict[bytes, tuple[float, float]]:
        """Return margin and coverage by key, for the keys that are cached."""
        rows = self._select_rows("SELECT name, margin, coverage FROM scores", keys)
        return {key: (margin, coverage) for key, margin, coverage in rows}

    def read_drafts(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """Return the draft texts by key, for the keys that are cached."""
        return dict(self._select_rows("SELECT name, text FROM drafts", keys))

    def write_scores(self, rows: Iterable[tuple[bytes, float, float]]) -> None:
        """Store rows of key, margin and coverage; rows that are not finite are skipped."""
        finite = [row for row in rows if math.isfinite(row[1]) and math.isfinite(row[2])]
        self._write_rows("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", finite)

    def write_drafts(self, rows: Iterable[tuple[bytes, str]]) -> None:
        """Store rows of key and text."""
        self._write_rows("INSERT OR REPLACE INTO drafts VALUES (?, ?)", rows)

    def read_verdicts(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """Return the verdicts on responses by key, for the keys that are cached."""
        return dict(self._select_rows("SELECT name, verdict FROM responses", keys))

    def write_verdicts(self, rows: Iterable[tuple[bytes, str]]) -> None:
        """Store rows of key and verdict; no response is stored."""
        self._write_rows("INSERT OR REPLACE INTO responses VALUES (?, ?)", rows)

    def _select_rows(self, statement: str, keys: Sequence[bytes]) -> list[Any]:
        rows: list[Any] = []
        for start in range(0, len(keys), _MAX_KEYS_PER_STATEMENT):
            chunk = keys[start : start + _MAX_KEYS_PER_STATEMENT]
            placeholders = ",".join("?" * len(chunk))
            try:
                rows += self._connection.execute(
                    f"{statement} WHERE name IN ({placeholders})", chunk
                ).fetchall()
            except sqlite3.Error:
                return rows
        return rows

    def _write_rows(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        try:
            with self._connection:  # one commit
                self._connection.executemany(statement, rows)
        except sqlite3.Error:  # full disk, locked or damaged file: the rows are recomputed next time
            return


def count_cached_rows(cache_path: Path) -> dict[str, int]:
    """Return the numbers of scores, drafts and judged responses in the SQLite file, and its bytes.

    Raises:
        UserError: if the file is damaged.
    """
    if not cache_path.is_file():
        return {**dict.fromkeys(_TABLE_NAMES, 0), "bytes": 0}
    size = sum(file.stat().st_size for file in _list_database_files(cache_path) if file.is_file())
    try:
        with closing(sqlite3.connect(cache_path, timeout=30)) as connection:
            connection.executescript(_CREATE_TABLES)  # an earlier version wrote fewer tables
            counts = {
                table: int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
                for table in _TABLE_NAMES
            }
    except sqlite3.Error as error:
        raise UserError(
            f"{cache_path} cannot be read ({error}): `analyze cache --clear` removes it"
        ) from error
    return {**counts, "bytes": size}


def clear_cache(cache_path: Path) -> None:
    """Remove the SQLite file of scores and drafts, and the folders of all other kinds next to it."""
    for file in _list_database_files(cache_path):
        file.unlink(missing_ok=True)
    for kind in CACHE_KINDS:
        if cache_path.with_name(kind).is_dir():
            shutil.rmtree(cache_path.with_name(kind))


def make_json_cache_path(kind: str, loaded_model: LoadedModel, key_settings: dict[str, Any]) -> Path | None:
    """Return the path of a cached JSON file; None if its key is unknown and the result must not be cached.

    Everything on which computations with the model depend (weights, configuration, device, code, libraries)
    is part of every key, so that code that would compute something else never finds the file.

    Args:
        kind: one of `CACHE_KINDS`.
        loaded_model: the model.
        key_settings: everything else that the result depends on; None stands for an unknown setting.
    """
    if None in key_settings.values():
        return None
    settings = {
        "scored": describe_computation(loaded_model),
        "study_code": hash_code(*STUDY_SOURCES),
        "about": key_settings,
    }
    return get_cache_kind_folder(kind) / f"{_digest_settings(settings).hexdigest()[:32]}.json"


def write_cached_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write a result to the cache; does nothing without a path or if the cache is not writable."""
    if path is None:
        return
    plain_content = {key: value.item() if hasattr(value, "item") else value for key, value in content.items()}
    with suppress(OSError):
        write_text_file(path, json.dumps(plain_content))


def read_cached_json(path: Path | None) -> dict[str, Any] | None:
    """Return a cached result; None without a path, or if the file is missing or damaged."""
    if path is None:
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@cache
def hash_code(*patterns: str) -> str:
    """Return one SHA-256 for all source files that match the patterns.

    >>> len(hash_code(*SCORING_SOURCES))
    64

    Args:
        patterns: glob patterns, relative to the folder that holds both packages.
    """
    digest = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(_SOURCE_ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def describe_computation(loaded_model: LoadedModel) -> dict[str, Any]:
    """Return everything on which computations with a model depend, as a part of cache keys."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {
        "weights": [loaded_model.origin.get(key) for key in ("sha256", "state_sha256", "state_config")],
        "config": {**loaded_model.model.config.to_dict(), "_name_or_path": ""},
        "code": hash_code(*SCORING_SOURCES),
        "dtype": str(loaded_model.model.dtype),
        "device": loaded_model.model.device.type,
        "versions": versions,
    }


def _digest_settings(settings: Mapping[str, Any]) -> Any:
    """Return the SHA-256 object of settings, independent of their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())


def _list_database_files(cache_path: Path) -> list[Path]:
    """Return the SQLite file and the files that SQLite keeps next to it."""
    return [cache_path, *(cache_path.with_name(cache_path.name + suffix) for suffix in ("-wal", "-shm"))]
