"""A copy of a public set: one that the user has, or fetched once, its licence said first."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path
from typing import Any

from analysis.datasets.public import PublicDataset
from analysis.datasets.records import read_records
from analysis.files import Notifier, combine_digests, get_cache_folder, hash_file
from defenses.errors import UserError


def load_public_records(
    dataset: PublicDataset, copy_path: str | None, offline: bool, notify: Notifier
) -> tuple[list[tuple[dict[str, Any], Path]], dict[str, str]]:
    """Return the rows of a public set, each with its file, and what run.json says of it.

    Args:
        dataset: of the set.
        copy_path: path of the file or the folder of a copy; without one the set is fetched, once.
        offline: forbid the network.
        notify: told in words before anything is fetched.
    """
    needs = f"{dataset.name} as published has the columns {', '.join(dataset.columns)} ({dataset.page})"
    files = (
        _fetch_missing_files(dataset, offline, notify)
        if copy_path is None
        else _find_copied_files(dataset, copy_path, needs)
    )
    found, digests = [], []
    for file in files:
        here, raw = read_records(file, dataset.columns, needs)
        found += [(dataset.parse_row(row, file.stem), file) for row in here]
        digests.append(hashlib.sha256(raw).hexdigest())
    revision = dataset.revision if copy_path is None else "a local copy"
    origin = {"name": dataset.name, "source": dataset.page, "revision": revision, "licence": dataset.license}
    return found, {**origin, "sha256": combine_digests(digests)}


def _fetch_missing_files(dataset: PublicDataset, offline: bool, notify: Notifier) -> list[Path]:
    """The files in the user's cache, fetched if need be."""
    own = f"--data {dataset.name}=PATH reads a copy that you have"
    if not dataset.revision:
        raise UserError(
            f"{dataset.name} cannot be fetched for you, since its licence has to be accepted first: do so on "
            f"{dataset.page}, download {' and '.join(dataset.files)} there, then --data {dataset.name}=PATH"
        )
    folder = get_cache_folder() / "datasets" / f"{dataset.name}-{dataset.revision[:12]}"
    paths = {folder / Path(name).name: name for name in dataset.files}
    missing = [path for path in paths if not path.is_file()]
    if missing and offline:
        raise UserError(f"{dataset.name} is not in the local cache, and --offline forbids fetching it; {own}")
    if missing:
        notify(
            f"Fetching {dataset.name}, licence {dataset.license}: about {dataset.kilobytes} kB from {dataset.page} at "
            f"revision {dataset.revision[:12]}; this happens once."
        )
    for path in missing:
        address = dataset.addresses[1].format(repo=dataset.repo, revision=dataset.revision, file=paths[path])
        try:
            fetch_file(address, path, dataset.files[paths[path]])
        except UserError as error:
            raise UserError(f"{error}; {own}") from error
    if any(dataset.files[paths[path]] is None for path in missing):
        notify(
            f"note: no sha256 of {dataset.name} was known beforehand: what came is trusted, and has to stay as "
            f"it is from now on ({folder})"
        )
    for path, name in paths.items():
        verify_download(path, dataset.files[name])
    return list(paths)


def _find_copied_files(dataset: PublicDataset, copy_path: str, format_hint: str) -> list[Path]:
    """The files of a copy: the one that is named, those of a clone, or what lies in a folder of its kind."""
    path, kind = Path(copy_path).expanduser(), Path(min(dataset.files)).suffix
    if not copy_path or not path.exists():
        raise UserError(f"--data {dataset.name}={copy_path}: there is no such file or folder; {format_hint}")
    if path.is_file():
        if path.suffix != kind:
            raise UserError(f"{path} is no {kind} file; {format_hint}")
        return [path]
    there = [where for name in dataset.files if (where := _find_in_clone(path, name))]
    if len(there) == len(dataset.files):
        return there
    # Some of the files, or files by other names: then all of the kind that lie beside each other.
    folder = there[0].parent if there else path
    if not (there := sorted(folder.glob(f"*{kind}"))):
        raise UserError(f"{path} holds no {kind} file; {format_hint}")
    return there


def _find_in_clone(folder: Path, repository_path: str) -> Path | None:
    """A file of a repository in a clone of it, or in a folder of that clone."""
    parts = Path(repository_path).parts
    places = (folder.joinpath(*parts[start:]) for start in range(len(parts)))
    return next((place for place in places if place.is_file()), None)


_DOWNLOAD_TIMEOUT_SECONDS = 60
_MAX_DOWNLOAD_BYTES = 64 * 2**20  # bytes; the sets that are fetched are far smaller


def get_digest_path(path: Path) -> Path:
    """Return where the SHA-256 of a file is kept that was known to nobody before it came."""
    return path.with_name(f"{path.name}.sha256")


def fetch_file(url: str, path: Path, expected_sha256: str | None) -> None:
    """Download a file, if it is the one that was meant.

    Args:
        url: https.
        path: where it goes.
        expected_sha256: that it must have; where none is known, that of what came is kept beside it.

    Raises:
        UserError: if it cannot be fetched, or is another file.
    """
    raw = _download_bytes(url)
    found = hashlib.sha256(raw).hexdigest()
    if expected_sha256 not in (None, found):
        raise UserError(
            f"what came from {url} is not the file that was pinned (its sha256 is {found}, not {expected_sha256}); "
            "nothing was kept"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if expected_sha256 is None:
        get_digest_path(path).write_text(f"{found}\n", "utf-8")
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        part.write_bytes(raw)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def verify_download(path: Path, expected_sha256: str | None) -> None:
    """Raise unless a file that was fetched is still what it was."""
    try:
        known = expected_sha256 or get_digest_path(path).read_text("utf-8").strip()
    except OSError:
        known = ""
    if hash_file(path) != known:
        raise UserError(f"{path} is not the file that was fetched (its sha256 differs); remove it, run again")


def _download_bytes(url: str) -> bytes:
    if not url.startswith("https://"):
        raise ValueError(f"{url}: only https is fetched")
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as answer:
            raw: bytes = answer.read(_MAX_DOWNLOAD_BYTES + 1)
            came_from = answer.url
    except urllib.error.HTTPError as error:
        raise UserError(f"cannot fetch {url} (the answer was {error.code} {error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "reason", "") or error or type(error).__name__
        raise UserError(f"cannot fetch {url} ({why}); is there a network?") from error
    if not came_from.startswith("https://") or len(raw) > _MAX_DOWNLOAD_BYTES:
        raise UserError(
            f"{url} led to {came_from}, not by https or over {_MAX_DOWNLOAD_BYTES >> 20} MiB; it was dropped"
        )
    return raw
