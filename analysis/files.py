"""Files and folders: paths, digests, and writes that never leave a half-written file."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import platformdirs

from defenses.errors import UserError

Notifier = Callable[[str], None]  # prints one line for the user


def check_output_folder(folder: Path) -> Path:
    """Return the folder if results can be written to it; called before the work starts."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a new or an existing folder")
    parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {folder} cannot be written: {parent} is not writable; choose another folder")
    return folder


def write_text_file(path: Path, text: str) -> None:
    """Write a whole file, or leave none if the write fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not from `tempfile`, whose files only their owner can read.
    temporary_path = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        with temporary_path.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
        temporary_path.replace(path)
    except BaseException:
        temporary_path.unlink(missing_ok=True)
        raise


@contextmanager
def stage_folder(folder: Path) -> Iterator[Path]:
    """Context manager: yield a new folder whose files move into `folder` if no error occurs."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        folder.mkdir(exist_ok=True)
        for file in staging.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def data_folder() -> Path:
    """Return the folder of shipped data: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "data"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "data"


def get_cache_folder() -> Path:
    """Return the folder for files that can be made again: converted models, downloads, cached results."""
    return platformdirs.user_cache_path("refusalscope")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combine_digests(digests: Sequence[str]) -> str:
    """Return one SHA-256 for several files: the digest of a single file, or of the joined digests.

    >>> combine_digests(["ab"]), combine_digests(["ab", "cd"])[:8]
    ('ab', '88d4266f')
    """
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
