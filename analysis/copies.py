"""A copy of a public set: one that the user has, or fetched once, its licence said first."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from analysis import fetching, rows
from analysis.checkpoints import Notifier, get_cache_folder
from analysis.datasets import PublicDataset
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
    files = _fetch_missing_files(dataset, offline, notify) if copy_path is None else _find_copied_files(dataset, copy_path, needs)
    found, digests = [], []
    for file in files:
        here, raw = rows.read_records(file, dataset.columns, needs)
        found += [(dataset.parse_row(row, file.stem), file) for row in here]
        digests.append(hashlib.sha256(raw).hexdigest())
    revision = dataset.revision if copy_path is None else "a local copy"
    origin = {"name": dataset.name, "source": dataset.page, "revision": revision, "licence": dataset.license}
    return found, {**origin, "sha256": rows.combine_digests(digests)}


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
            fetching.fetch_file(address, path, dataset.files[paths[path]])
        except UserError as error:
            raise UserError(f"{error}; {own}") from error
    if any(dataset.files[paths[path]] is None for path in missing):
        notify(
            f"note: no sha256 of {dataset.name} was known beforehand: what came is trusted, and has to stay as "
            f"it is from now on ({folder})"
        )
    for path, name in paths.items():
        fetching.verify_download(path, dataset.files[name])
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
