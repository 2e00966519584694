"""progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def make_notifier(console: Console) -> Any:
    """Return what prints a line as it is, uncut."""
    return partial(print_line, console)


def make_progress_bar(console: Console) -> Progress:
    """Return a progress bar with time left; it is gone when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def make_defense_call_callback(progress_bar: Progress, task_id: TaskID) -> Callable[[int, int], None]:
    """Return what shows in a progress bar how many drafts of how many are made."""
    return lambda made, wanted: progress_bar.update(task_id, description=f"asking first ({made}/{wanted})")


def join_first_texts(texts: Sequence[str], max_texts: int = 12) -> str:
    """Return the texts in one line; of more than that many, the first and how many are left."""
    more = f" and {len(texts) - max_texts} more" if len(texts) > max_texts else ""
    return ", ".join(texts[:max_texts]) + more


def print_line(console: Console, text: str) -> None:
    """Print a line as it is, uncut, on a quiet console, too: it may be that something is fetched."""
    quiet, console.quiet = console.quiet, False
    try:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    finally:
        console.quiet = quiet


def print_note(console: Console, text: str) -> None:
    """Print what the run keeps among its notices; a quiet console leaves it at that."""
    if not console.quiet:
        print_line(console, f"note: {text}")
