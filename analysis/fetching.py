"""Single files from the web: over https only, held to a SHA-256, put in their place in one step."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from analysis.checkpoints import hash_file
from defenses.errors import UserError

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
