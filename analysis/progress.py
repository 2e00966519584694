"""Progress bars and notes in the terminal while a study runs."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_RELAY_SECONDS = 0.2  # between two messages on the progress of a step

# Receives what happens in another process: a kind of message and its value. `line` is a line for the user,
# `step` what is being done, and `progress` a triple of that, the number finished and the number in all.
MessageSender = Callable[[str, Any], None]


class RelayConsole(Console):
    """Console of a worker process: passes lines and progress on to the process that has the terminal.

    >>> messages = []
    >>> print_note(RelayConsole(lambda *message: messages.append(message)), "a remark")
    >>> messages
    [('line', 'note: a remark')]

    Args:
        send: passes a message on.
        is_quiet: whether notes are omitted.
    """

    def __init__(self, send: MessageSender, is_quiet: bool = False) -> None:
        super().__init__(
            file=_LineFile(send), force_terminal=False, color_system=None, width=500, quiet=is_quiet
        )
        self.send = send

    @contextmanager
    def status(self, status: Any, **_: Any) -> Iterator[None]:  # type: ignore[override]
        """Context manager: pass on what is being done."""
        self.send("step", str(status))
        yield


class _LineFile(io.StringIO):
    """File that sends every line written to it."""

    def __init__(self, send: MessageSender) -> None:
        super().__init__()
        self._send, self._rest = send, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._send("line", line)
        return len(text)


class _RelayProgress(Progress):
    """Progress bar that is shown by another process."""

    def __init__(self, console: RelayConsole) -> None:
        super().__init__(console=console, disable=True)
        self._send, self._sent = console.send, 0.0

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self._relay(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._relay(task_id)

    def _relay(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if now - self._sent >= _RELAY_SECONDS:
            self._sent, task = now, self._tasks[task_id]
            self._send("progress", (str(task.description), task.completed, task.total))


def make_notifier(console: Console) -> Any:
    """Return a callback that prints a line without wrapping."""
    return partial(print_line, console)


def make_progress_bar(console: Console) -> Progress:
    """Return a progress bar with the remaining time; it disappears when it is finished."""
    if isinstance(console, RelayConsole):
        return _RelayProgress(console)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def show_preliminary_work(progress_bar: Progress, task_id: TaskID, session: Any) -> None:
    """Show in a bar how many calls of a defense, and prompts of an attack that adapts to it, are finished.

    Args:
        progress_bar: the bar.
        task_id: its task whose description is changed.
        session: the model session that does this work before a condition is scored.
    """

    def make_callback(label: str) -> Callable[[int, int], None]:
        return lambda n_finished, n_requested: progress_bar.update(
            task_id, description=f"{label} ({n_finished}/{n_requested})"
        )

    session.defense_calls.on_progress = make_callback("defense calls")
    session.adaptation.on_progress = make_callback("attack adapts")


def format_duration(seconds: float) -> str:
    """Return a time in the unit that suits it.

    >>> [format_duration(seconds) for seconds in (0.2, 48, 130, 9000)]
    ['1 s', '48 s', '2 min', '2.5 h']
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
