"""Cache of results that depend on a model, and the keys of its entries.

Scores, drafts (responses to a defense's own calls) and verdicts on responses are rows of one SQLite file.
Other results are small JSON files next to it, in one folder for each of `CACHE_KINDS`. Each has the SHA-256
of its content, so that a damaged file is computed again.

A key is a digest of everything that the result depends on: weights, configuration, dtype, device, source
code, library versions, and for a row the defense's weight changes, the readout and the token ids. No prompt
can be recovered from the row of a score. Rows are committed batch by batch, so that a killed run loses at
most one batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import platformdirs

from analysis.files import write_text_file
from analysis.models.loading import LoadedModel
from defenses.errors import UserError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

_CREATE_TABLES = """
CREATE TABLE IF NOT EXISTS scores (name BLOB PRIMARY KEY, margin REAL, coverage REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS drafts (name BLOB PRIMARY KEY, text TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS responses (name BLOB PRIMARY KEY, verdict TEXT) WITHOUT ROWID;
"""
_TABLE_NAMES = ("scores", "drafts", "responses")
# Kinds of cached results other than scores and drafts; each is the name of a folder.
CACHE_KINDS = (
    "models",
    "preflight",
    "readouts",
    "verdicts",
    "validity",
    "residuals",
    "detectors",
    "cost",
    "image_texts",
)
_MAX_KEYS_PER_STATEMENT = 500  # SQLite allows 999 parameters
_LOCK_TIMEOUT_SECONDS = 30
# Source code that determines what a model reads and how its logits become a margin. Results computed by other
# code are not found again.
SCORING_SOURCES = (
    "analysis/checkpoints/**/*.py",
    "analysis/models/**/*.py",
    "analysis/readouts/**/*.py",
    "analysis/served/**/*.py",
    "analysis/attacks.py",
    "analysis/run.py",
    "analysis/mechanism/directions.py",
    "analysis/mechanism/abliteration.py",
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

    def make_key(self, token_ids: Sequence[int], *member_ids: Sequence[int]) -> bytes:
        """Return the key of the row for these token ids, and for those of the members of a blend."""
        digest = self._shared_digest.copy()
        digest.update("|".join(",".join(map(str, ids)) for ids in (token_ids, *member_ids)).encode())
        return digest.digest()[:16]


class ScoreCache:
    """Cached scores, drafts and verdicts; an unusable file acts as an empty cache that ends with the run.

    Args:
        cache_path: of the SQLite file.

    Attributes:
        n_hits: number of scores found instead of computed, including those of this run.
    """

    def __init__(self, cache_path: Path) -> None:
        self.n_hits = 0
        self._cache_path = cache_path
        self._read_error = self._write_error = ""
        # Rows that could not be stored yet, keys of rows that this run made, and of rows that it found.
        self._unsaved_rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in _TABLE_NAMES}
        self._own_keys: set[bytes] = set()
        self._reused_keys: dict[str, set[bytes]] = {name: set() for name in _TABLE_NAMES}
        try:
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            cache_path.touch(mode=0o600)  # drafts may reword the user's queries
            self._connection = _open_database(cache_path)
        except (OSError, sqlite3.Error) as error:
            self._read_error = str(error)
            self._connection = sqlite3.connect(":memory:")
            self._connection.executescript(_CREATE_TABLES)

    def read_scores(self, keys: Sequence[bytes]) -> dict[bytes, tuple[float, float]]:
        """Return margin and coverage by key, for the keys that are cached."""
        rows = self._select_rows("scores", "margin, coverage", keys)
        return {key: (margin, coverage) for key, margin, coverage in rows}

    def read_drafts(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """Return the draft texts by key, for the keys that are cached."""
        return dict(self._select_rows("drafts", "text", keys))

    def write_scores(self, rows: Iterable[tuple[bytes, float, float]]) -> None:
        """Store rows of key, margin and coverage; rows that are not finite are skipped."""
        self._write_rows("scores", [row for row in rows if math.isfinite(row[1]) and math.isfinite(row[2])])

    def write_drafts(self, rows: Iterable[tuple[bytes, str]]) -> None:
        """Store rows of key and text."""
        self._write_rows("drafts", list(rows))

    def read_verdicts(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """Return the verdicts on responses by key, for the keys that are cached."""
        return dict(self._select_rows("responses", "verdict", keys))

    def write_verdicts(self, rows: Iterable[tuple[bytes, str]]) -> None:
        """Store rows of key and verdict; no response is stored."""
        self._write_rows("responses", list(rows))

    def describe_reuse(self) -> str:
        """Return how many rows of earlier runs were found since the last call, such as "40 margins"."""
        counts = {name: len(keys) for name, keys in self._reused_keys.items()}
        self._own_keys |= set().union(*self._reused_keys.values())
        self._reused_keys = {name: set() for name in _TABLE_NAMES}
        nouns = {"scores": "margins", "drafts": "drafts of defenses", "responses": "verdicts on responses"}
        return ", ".join(f"{count:,} {nouns[name]}" for name, count in counts.items() if count)

    def describe_problem(self) -> str:
        """Return why later runs will not find all results of this run; empty if they will.

        Rows that could not be stored are tried again first.
        """
        for table, rows in self._unsaved_rows.items():
            if rows:
                self._write_rows(table, [])
        error = self._read_error or self._write_error
        return f"{self._cache_path} cannot be used ({error})" if error else ""

    def _select_rows(self, table: str, columns: str, keys: Sequence[bytes]) -> list[Any]:
        rows: list[Any] = []
        try:
            for start in range(0, len(keys), _MAX_KEYS_PER_STATEMENT):
                chunk = keys[start : start + _MAX_KEYS_PER_STATEMENT]
                placeholders = ",".join("?" * len(chunk))
                statement = f"SELECT name, {columns} FROM {table} WHERE name IN ({placeholders})"
                rows += self._connection.execute(statement, chunk).fetchall()
        except sqlite3.Error as error:
            self._read_error = str(error)
        self._reused_keys[table].update(row[0] for row in rows if row[0] not in self._own_keys)
        return rows

    def _write_rows(self, table: str, new_rows: list[tuple[Any, ...]]) -> None:
        self._own_keys.update(row[0] for row in new_rows)
        rows = self._unsaved_rows[table] + new_rows
        if not rows:
            return
        placeholders = ",".join("?" * len(rows[0]))
        try:
            with self._connection:  # one commit
                self._connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({placeholders})", rows)
        except sqlite3.Error as error:  # full disk, locked or damaged file: tried again with the next rows
            self._unsaved_rows[table], self._write_error = rows, str(error)
        else:
            self._unsaved_rows[table], self._write_error = [], ""


def _open_database(path: Path) -> sqlite3.Connection:
    """Return a connection to the SQLite file, which is made if it does not exist."""
    connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT_SECONDS)
    # Allows readers beside a writer; committed rows survive a killed process.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.executescript(_CREATE_TABLES)
    return connection


def count_cached_rows(cache_path: Path) -> dict[str, int]:
    """Return the numbers of scores, drafts and judged responses in the SQLite file, and its bytes.

    Raises:
        UserError: if the file is damaged.
    """
    if not cache_path.is_file():
        return {**dict.fromkeys(_TABLE_NAMES, 0), "bytes": 0}
    size = sum(file.stat().st_size for file in _list_database_files(cache_path) if file.is_file())
    try:
        with closing(sqlite3.connect(cache_path, timeout=_LOCK_TIMEOUT_SECONDS)) as connection:
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
    text = json.dumps(plain_content)
    with suppress(OSError):
        write_text_file(path, f'{{"sha256": "{_digest_text(text)}", "content": {text}}}')


def read_cached_json(path: Path | None, parse: Callable[[dict[str, Any]], Result]) -> Result | None:
    """Return a cached result; None if it has to be computed, because the file is missing or damaged.

    Args:
        path: from `make_json_cache_path`.
        parse: makes the result of what was written; it may fail on what another version wrote.
    """
    if path is None:
        return None
    try:
        stored = json.loads(path.read_text("utf-8"))
        if stored["sha256"] != _digest_text(json.dumps(stored["content"])):
            return None
        return parse(stored["content"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
    # Of a model whose weights are not loaded yet, or are elsewhere.
    if (recorded := getattr(loaded_model, "computation", None)) is not None:
        return dict(recorded)
    computation = {
        "weights": [
            loaded_model.origin.get(key)
            for key in ("sha256", "state_sha256", "state_config", "weight_change")
        ],
        "config": {**loaded_model.model.config.to_dict(), "_name_or_path": ""},
        "quantization": loaded_model.quantization,
        "code": hash_code(*SCORING_SOURCES),
        "dtype": str(loaded_model.dtype),
        "device": loaded_model.device.type,
        "share_prefix": loaded_model.share_prefix,
        "images": (loaded_model.image_reader.identity or None) if loaded_model.image_reader else None,
        "versions": _collect_versions(),
    }
    # As it is read from a file again, so that keys are the same for a model whose weights are not loaded.
    plain: dict[str, Any] = json.loads(json.dumps(computation, default=str))
    return plain


@cache
def _collect_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}


class DeferredModel(LoadedModel):
    """A model that an earlier run has loaded and checked; its weights are loaded when something needs them.

    Args:
        outline: the model without weights.
        record: what the earlier run found, from `describe_loaded_model`.
        share_prefix: as for `LoadedModel`.
        load_weights: returns the transformers model with its weights; called once, or never.

    Attributes:
        computation: see `describe_computation`.
        engine_notices: lines for the user on the form of batches.
    """

    computation: dict[str, Any]
    engine_notices: list[str]

    def __init__(
        self,
        outline: LoadedModel,
        record: Mapping[str, Any],
        share_prefix: bool,
        load_weights: Callable[[], Any],
    ) -> None:
        settings = {field.name: getattr(outline, field.name) for field in dataclasses.fields(LoadedModel)}
        settings |= {"share_prefix": share_prefix, "notices": tuple(record["notices"])}
        super().__init__(**settings)
        attributes = vars(self)  # the class is frozen
        attributes["_outline"] = attributes.pop("model")
        attributes["_record"], attributes["_load_weights"] = record, load_weights
        attributes["computation"] = record["computation"]
        attributes["engine_notices"] = list(record["engine_notices"])

    @cached_property
    def model(self) -> Any:
        """The transformers model with its weights."""
        return vars(self)["_load_weights"]()

    @property
    def outline(self) -> Any:
        """The model without weights."""
        return vars(self)["_outline"]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        import torch

        return torch.device(vars(self)["_record"]["device"])

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        import torch

        dtype: torch.dtype = getattr(torch, vars(self)["_record"]["dtype"])
        return dtype

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a response."""
        return frozenset(vars(self)["_record"]["end_token_ids"])


def describe_loaded_model(loaded_model: LoadedModel, engine_notices: Sequence[str]) -> dict[str, Any]:
    """Return what loading the weights told about a model, for a `DeferredModel` of a later run.

    Args:
        loaded_model: with its weights.
        engine_notices: lines for the user on the form of batches.
    """
    return {
        "notices": list(loaded_model.notices),
        "engine_notices": list(engine_notices),
        "device": str(loaded_model.device),
        "dtype": str(loaded_model.dtype).removeprefix("torch."),
        "end_token_ids": sorted(loaded_model.end_token_ids),
        "computation": describe_computation(loaded_model),
    }


def _digest_settings(settings: Mapping[str, Any]) -> Any:
    """Return the SHA-256 object of settings, independent of their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())


def _list_database_files(cache_path: Path) -> list[Path]:
    """Return the SQLite file and the files that SQLite keeps next to it."""
    return [cache_path, *(cache_path.with_name(cache_path.name + suffix) for suffix in ("-wal", "-shm"))]
