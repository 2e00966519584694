"""The output folder: every file is written beside its place and then renamed; none is ever half there."""

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


def check_output_folder(folder: Path) -> Path:
    """Return the folder if results can be written there; asked before the work, not after it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a folder, new or old")
    above = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {folder} cannot be written: {above} does not let you; choose another folder")
    return folder


def write_text_file(path: Path, text: str) -> None:
    """Write one file: whole, or, if that fails, not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid4().hex[:8]}")  # as readable as any file that its user makes
    try:
        with new.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


@contextmanager
def stage_folder(folder: Path) -> Iterator[Path]:
    """Lend a new folder; once all was written into it without an error, the files move to their place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield new
        folder.mkdir(exist_ok=True)
        for file in new.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def data_folder() -> Path:
    """Return the folder of shipped data: inside this package once installed, beside it in a checkout."""
    inside = Path(__file__).parent / "data"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "data"


Notifier = Callable[[str], None]


def get_cache_folder() -> Path:
    """Return the folder for what can be made again: converted models, fetched files."""
    return platformdirs.user_cache_path("refusalscope")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combine_digests(digests: Sequence[str]) -> str:
    """Return one SHA-256 for several files: that of the only one, or one of their digests.

    >>> combine_digests(["ab"]), combine_digests(["ab", "cd"])[:8]
    ('ab', '88d4266f')
    """
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
