"""Obtain the files of a public set: a local copy, or a pinned download kept in the user's cache."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from analysis.datasets.public_dataset import PublicDataset
from analysis.datasets.records import expand_path, get_record_suffix, read_records
from analysis.files import Notifier, combine_digests, get_cache_folder, hash_file
from defenses.errors import UserError

_DOWNLOAD_TIMEOUT_SECONDS = 60
_MAX_LEVELS_TO_IMAGES = 3  # from a file in data/processed_questions to the root of its clone
_MAX_DOWNLOAD_BYTES = 64 * 2**20  # bytes; every set in the table is far smaller


def load_public_records(
    dataset: PublicDataset, copy_path: str | None, offline: bool, notify: Notifier
) -> tuple[list[tuple[dict[str, Any], Path]], dict[str, str]]:
    """Return the rows of a public set, each with its file, and the set's entry for run.json.

    Args:
        dataset: a row of the table of public sets.
        copy_path: file or folder of a local copy; None reads the cache, and downloads missing files into it.
        offline: whether downloads are forbidden.
        notify: prints a line before a download, if a copy has another number of queries, and if it lacks
            some images.

    Raises:
        UserError: if the files or all images are missing, or the files differ from the pinned ones or have
            another format.
    """
    format_hint = f"{dataset.name} as published has the columns {', '.join(dataset.columns)} ({dataset.page})"
    paths = (
        _fetch_missing_files(dataset, offline, notify)
        if copy_path is None
        else _find_copied_files(dataset, copy_path, format_hint)
    )
    records, digests = [], []
    for path in paths:
        rows, content = read_records(path, dataset.columns, format_hint)
        records += [(record, path) for row in rows for record in dataset.parse_row(row, path)]
        digests.append(hashlib.sha256(content).hexdigest())
    if dataset.image_folders:
        records = _locate_images(dataset, records, notify)
    n_harmful = sum(record["harmful"] is True for record, _ in records)
    n_benign = len(records) - n_harmful
    if copy_path is not None and (n_harmful, n_benign) != (dataset.n_harmful, dataset.n_benign):
        notify(
            f"note: this copy of {dataset.name} holds {n_harmful} harmful and {n_benign} benign queries; the "
            f"published set has {dataset.n_harmful} and {dataset.n_benign}"
        )
    source = {
        "name": dataset.name,
        "source": dataset.page,
        "revision": dataset.revision if copy_path is None else "a local copy",
        "licence": dataset.license,
        "sha256": combine_digests(digests),
    }
    return records, source


def fetch_file(url: str, path: Path, expected_sha256: str | None) -> None:
    """Download a file and keep it if its digest is the expected one.

    Args:
        url: an https address.
        path: destination.
        expected_sha256: of the file; if None, the digest of the downloaded file is stored beside it.

    Raises:
        UserError: if the download fails or the file is another one.
    """
    content = _download_bytes(url)
    sha256 = hashlib.sha256(content).hexdigest()
    if expected_sha256 not in (None, sha256):
        raise UserError(
            f"the file at {url} is not the pinned one (its sha256 is {sha256}, not {expected_sha256}); "
            "nothing was kept"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if expected_sha256 is None:
        get_digest_path(path).write_text(f"{sha256}\n", "utf-8")
    partial_path = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        partial_path.write_bytes(content)
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


def verify_download(path: Path, expected_sha256: str | None) -> None:
    """Raise unless a downloaded file still has the pinned digest, or the one stored at its download."""
    try:
        known_sha256 = expected_sha256 or get_digest_path(path).read_text("utf-8").strip()
    except OSError:
        known_sha256 = ""
    if hash_file(path) != known_sha256:
        raise UserError(
            f"{path} is not the file that was downloaded (its sha256 differs); remove it and run again"
        )


def get_digest_path(path: Path) -> Path:
    """Return the path of the stored SHA-256 of a file whose digest was not known before its download."""
    return path.with_name(f"{path.name}.sha256")


def _fetch_missing_files(dataset: PublicDataset, offline: bool, notify: Notifier) -> list[Path]:
    """Return the files in the user's cache, after downloading those that are missing."""
    copy_hint = f"--data {dataset.name}=PATH reads a copy that you have"
    if dataset.image_folders:
        raise UserError(
            f"{dataset.name} has images, which are never downloaded for you: get the files from "
            f"{dataset.page}, then use --data {dataset.name}=PATH"
        )
    if not dataset.revision:
        raise UserError(
            f"{dataset.name} cannot be downloaded for you, because its license has to be accepted first: do "
            f"so on {dataset.page}, download {' and '.join(dataset.files)}, then use "
            f"--data {dataset.name}=PATH"
        )
    folder = get_cache_folder() / "datasets" / f"{dataset.name}-{dataset.revision[:12]}"
    names_by_path = {folder / Path(name).name: name for name in dataset.files}
    missing = [path for path in names_by_path if not path.is_file()]
    if missing and offline:
        raise UserError(
            f"{dataset.name} is not in the local cache, and --offline forbids the download; {copy_hint}"
        )
    if missing:
        notify(
            f"Fetching {dataset.name}, license {dataset.license}: about {dataset.kilobytes} kB from "
            f"{dataset.page} at revision {dataset.revision[:12]}; this happens once."
        )
    for path in missing:
        name = names_by_path[path]
        url = dataset.addresses[1].format(repo=dataset.repo, revision=dataset.revision, file=name)
        try:
            fetch_file(url, path, dataset.files[name])
        except UserError as error:
            raise UserError(f"{error}; {copy_hint}") from error
    if any(dataset.files[names_by_path[path]] is None for path in missing):
        notify(
            f"note: no sha256 of {dataset.name} is known in advance: the downloaded files are trusted, and "
            f"from now on they have to stay unchanged ({folder})"
        )
    for path, name in names_by_path.items():
        verify_download(path, dataset.files[name])
    return list(names_by_path)


def _find_copied_files(dataset: PublicDataset, copy_path: str, format_hint: str) -> list[Path]:
    """Return the files of a local copy: the named file, the files of a clone, or those of a folder."""
    path, suffix = expand_path(copy_path), Path(min(dataset.files)).suffix
    if not copy_path or not path.exists():
        raise UserError(f"--data {dataset.name}={copy_path}: no such file or folder; {format_hint}")
    if path.is_file():
        if get_record_suffix(path) != suffix:
            raise UserError(f"{path} is not a {suffix} file; {format_hint}")
        return [path]
    cloned = [match for name in dataset.files if (match := _find_in_clone(path, name))]
    if len(cloned) == len(dataset.files):
        contrast = path / dataset.contrast_file if dataset.contrast_file else None
        return [*cloned, contrast] if contrast and contrast.is_file() else cloned
    # A part of the files, or renamed files: use every file of this format in one folder.
    folder = cloned[0].parent if cloned else path
    if not (files := sorted(folder.glob(f"*{suffix}"))):
        raise UserError(f"{path} holds no {suffix} file; {format_hint}")
    return files


def _locate_images(
    dataset: PublicDataset, records: list[tuple[dict[str, Any], Path]], notify: Notifier
) -> list[tuple[dict[str, Any], Path]]:
    """Return the rows whose image is in the copy, each with the path of its image."""
    located = [
        ({**record, "image": image}, path)
        for record, path in records
        if (image := _find_image(dataset, str(record["image"]), path))
    ]
    n_missing = len(records) - len(located)
    if not located:
        record, path = records[0]
        raise UserError(
            f"{path.parent}: this copy of {dataset.name} holds none of its {n_missing} images, such as "
            f"{dataset.image_folders[0]}/{record['image']}; get them from {dataset.page}"
        )
    if n_missing:
        notify(
            f"note: {n_missing} of {len(records)} queries of {dataset.name} are left out, because this copy "
            f"does not hold their images; the others are on {dataset.page}"
        )
    return located


def _find_image(dataset: PublicDataset, name: str, data_file: Path) -> Path | None:
    """Find an image of a copy: in an image folder, or a part of its path, near the file of its row.

    Args:
        dataset: for its image folders.
        name: path of the image in one of them.
        data_file: file of the row; the nearest folder above it comes first.
    """
    candidates = (
        folder.joinpath(*parts[start:], name)
        for folder in list(data_file.parents)[:_MAX_LEVELS_TO_IMAGES]
        for parts in (Path(image_folder).parts for image_folder in dataset.image_folders)
        for start in range(len(parts) + 1)
    )
    return next((path for path in candidates if path.is_file()), None)


def _find_in_clone(folder: Path, repository_path: str) -> Path | None:
    """Find a file of a repository in a clone of it, or in a folder of that clone."""
    parts = Path(repository_path).parts
    candidates = (folder.joinpath(*parts[start:]) for start in range(len(parts)))
    return next((path for path in candidates if path.is_file()), None)


def _download_bytes(url: str) -> bytes:
    if not url.startswith("https://"):
        raise ValueError(f"{url}: only https addresses are allowed")
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as response:
            content: bytes = response.read(_MAX_DOWNLOAD_BYTES + 1)
            final_url = response.url
    except urllib.error.HTTPError as error:
        raise UserError(f"cannot download {url} (HTTP status {error.code} {error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", "") or error or type(error).__name__
        raise UserError(f"cannot download {url} ({reason}); is there a network?") from error
    if not final_url.startswith("https://"):
        raise UserError(f"{url} was redirected to {final_url}, which is not https; nothing was kept")
    if len(content) > _MAX_DOWNLOAD_BYTES:
        raise UserError(
            f"the file at {final_url} is larger than {_MAX_DOWNLOAD_BYTES >> 20} MiB; nothing was kept"
        )
    return content
