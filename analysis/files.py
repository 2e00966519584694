"""Files and folders: paths, digests, and writes that never leave a half-written file."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import platformdirs

from defenses.errors import UserError

# How the small file begins that Git LFS leaves in place of a large one.
LFS_POINTER = b"version https://git-lfs"
Notifier = Callable[[str], None]  # prints one line for the user
_STAGING_MARK = ".partial-"
_STAGING_PATTERN = f".*{_STAGING_MARK[1:]}{'[0-9a-f]' * 8}"


def check_not_lfs_pointer(path: Path, content: bytes, alternative: str) -> None:
    """Raise UserError if a file is only the pointer to it that Git LFS leaves.

    Args:
        path: the file, for the error.
        content: of the file, or its beginning.
        alternative: what else than `git lfs pull` gives the file itself.
    """
    if content.startswith(LFS_POINTER):
        raise UserError(
            f"{path} is a placeholder of Git LFS, not the file itself: run `git lfs pull` in its folder, or "
            f"{alternative}"
        )


def check_output_folder(folder: Path) -> Path:
    """Return the folder if results can be written to it; called before the work starts.

    A folder is made and removed where `stage_folder` will make one: permissions alone do not tell of names
    that are too long, of file systems that are full of files, or of those that take none.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file; give a new or an existing folder")
        parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        for name in folder.resolve().relative_to(parent.resolve()).parts or ("",):
            probe = parent / f".{name}{_STAGING_MARK}{uuid4().hex[:8]}"
            probe.mkdir()
            probe.rmdir()
    except (OSError, ValueError) as error:  # a path cannot hold a null character
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--out {folder!s:.200} cannot be written ({reason}); choose another folder"
        ) from error
    return folder


def lock_folder(folder: Path) -> bool:
    """Keep a folder for this process until it ends; return False if another process has it.

    The lock is one byte of a file in the cache, so that a killed process leaves nothing behind. Where files
    cannot be locked, every process gets the lock.
    """
    return _change_lock(folder, is_locked=True)


def unlock_folder(folder: Path) -> None:
    """Let other processes lock a folder, before this one ends."""
    _change_lock(folder, is_locked=False)


def _change_lock(folder: Path, is_locked: bool) -> bool:
    """Lock or unlock a folder; return False if another process has locked it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    position = int.from_bytes(hashlib.sha256(os.fsencode(folder.resolve())).digest()[:7])
    try:
        handle = _open_lock_file(get_cache_folder() / "folders.lock")
        operation = fcntl.LOCK_EX | fcntl.LOCK_NB if is_locked else fcntl.LOCK_UN
        fcntl.lockf(handle, operation, 1, position)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


@cache
def _open_lock_file(path: Path) -> int:
    """Return a handle that stays open: to close it, or another one of the file, would end all locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def write_text_file(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8), or leave none if the write fails."""
    write_file(path, text.encode("utf-8"))


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file, or leave none if the write fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not from `tempfile`, whose files only their owner can read.
    temporary_path = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    with delay_interrupts():
        try:
            with temporary_path.open("xb") as file:
                file.write(content)
            temporary_path.replace(path)
        except BaseException:
            temporary_path.unlink(missing_ok=True)
            raise


@contextmanager
def stage_folder(folder: Path, manifest_name: str = "run.json") -> Iterator[Path]:
    """Context manager: yield a new folder whose files move into `folder` if no error occurs.

    A new folder appears with all its files at once. In an existing one, the manifest, which has the digests
    of the others, is replaced last: files of two runs never look like one, even if the process is killed.

    Args:
        folder: created if it does not exist.
        manifest_name: the file that describes the others.
    """
    # Beside a new folder; inside an existing one, which may be a mounted volume or a link to another disk.
    parent, prefix = (folder, "") if folder.is_dir() else (folder.parent, f".{folder.name}")
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_folders(parent)
    with _make_locked_folder(parent, prefix) as staging:
        yield staging
        with delay_interrupts():
            _move_files(staging, folder, manifest_name)


def _move_files(staging: Path, folder: Path, manifest_name: str) -> None:
    if staging.parent != folder:
        try:
            staging.rename(folder)
            return
        except OSError:  # the folder was made in the meantime
            folder.mkdir(exist_ok=True)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == manifest_name):
        file.replace(folder / file.name)


@contextmanager
def _make_locked_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Context manager: yield a new folder, which is locked while it is in use, and remove it afterwards."""
    number = uuid4().hex[:8]
    staging, new = parent / f"{prefix}{_STAGING_MARK}{number}", parent / f"{prefix}.new-{number}"
    with delay_interrupts():
        new.mkdir()
        lock = _lock_staging_folder(new)
        new.rename(staging)  # under its final name it is never without the lock
    try:
        yield staging
    finally:
        with delay_interrupts():
            shutil.rmtree(staging, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _remove_abandoned_folders(parent: Path) -> None:
    """Remove what killed processes left: staging folders that nobody has locked."""
    for path in parent.glob(_STAGING_PATTERN):
        if path.is_dir() and (lock := _lock_staging_folder(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock_staging_folder(folder: Path) -> int | None:
    """Return a handle that holds the lock of a folder; None if it is locked already, or cannot be."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextmanager
def delay_interrupts() -> Iterator[None]:
    """Context manager: Ctrl-C and SIGTERM wait until a short step is finished."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other thread receives signals
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not None:  # None: set by other code than Python
                previous[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for received_number in received[:1]:
            signal.raise_signal(received_number)


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
