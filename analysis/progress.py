"""Progress bars and notes in the terminal while a study runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def make_notifier(console: Console) -> Any:
    """Return a callback that prints a line without wrapping."""
    return partial(print_line, console)


def make_progress_bar(console: Console) -> Progress:
    """Return a progress bar with the remaining time; it disappears when it is finished."""
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
    """Return a callback that shows how many of a defense's calls to the model are finished."""
    return lambda n_finished, n_calls: progress_bar.update(
        task_id, description=f"defense calls ({n_finished}/{n_calls})"
    )


def join_first_texts(texts: Sequence[str], max_texts: int = 12) -> str:
    """Join texts in one line; name only the first ones of many, and count the others."""
    more = f" and {len(texts) - max_texts} more" if len(texts) > max_texts else ""
    return ", ".join(texts[:max_texts]) + more


def print_line(console: Console, text: str) -> None:
    """Print a line without wrapping, even on a quiet console, because downloads must be announced."""
    quiet, console.quiet = console.quiet, False
    try:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    finally:
        console.quiet = quiet


def print_note(console: Console, text: str) -> None:
    """Print a note that run.json keeps as well; a quiet console omits it."""
    if not console.quiet:
        print_line(console, f"note: {text}")
