"""The output folder: every file is written beside its place and then renamed; none is ever half there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from defenses.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from analysis.folder import Run


def check_output_folder(folder: Path) -> Path:
    """Return the folder if results can be written there; asked before the work, not after it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a folder, new or old")
    above = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {folder} cannot be written: {above} does not let you; choose another folder")
    return folder


def save_run(folder: Path, run: Run, console: Console) -> None:
    """Write a run, tables, figures and run.json: all of its files, or, if one cannot be written, none.

    Args:
        folder: made where there is none; files of the same names are replaced.
        run: just made.
        console: for progress.
    """
    with console.status("figures and tables"), stage_folder(folder) as new:
        for stem, table in run.tables.items():
            # The scores are exact, so that the summary can be made from them again.
            form = None if stem == "scores" else "%.7g"
            table.to_csv(new / f"{stem}.csv", index=False, float_format=form)
        for stem in run.figures:
            run.draw_figure(stem).savefig(new / f"{stem}.png")
        text = json.dumps(run.record, indent=2, ensure_ascii=False)
        (new / "run.json").write_text(text + "\n", encoding="utf-8")


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
