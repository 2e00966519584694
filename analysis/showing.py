"""What is printed: progress, the summary table, the checks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from analysis.resampling import DRAWS
from analysis.tables import UNVALIDATED, condition

if TYPE_CHECKING:
    import pandas as pd

    from analysis.preflight import Check


def progress(console: Console) -> Progress:
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


def drafting(bar: Progress, task: TaskID) -> Callable[[int, int], None]:
    """Return what shows in a progress bar how many drafts of how many are made."""
    return lambda made, wanted: bar.update(task, description=f"asking first ({made}/{wanted})")


def summary(summary: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print one row per defense: rates, AUROC, the two contrasts, and the verdict."""
    data, model = record["data"], record["model"]
    title = (
        f"{model['name']} ({record['dtype']}) on {data['name']}, {data['split']} split: "
        f"{data['n_harmful']} harmful, {data['n_benign']} benign"
    )
    console = stdout()  # two lines a row: so it fits 80 columns
    heads = ("refuses (%)\nharmful\nbenign", "\nAUROC\nΔAUROC", "nats\nshift\ndiscrimination")
    shown = table("\ndefense\nverdict", heads, title, lines=True)
    for values in rows(summary):
        control, reference = values["family"] == "control", values["verdict"] == "reference"
        rates = [interval(values, name, ".0f", 100.0) for name in ("refusal_rate", "over_refusal_rate")]
        change, shift, discrimination = (
            "–" if reference else interval(values, name, "+.2f")
            for name in ("delta_auroc", "shift", "discrimination")
        )
        cells = [
            f"{condition(values)} (control)" if control else condition(values),
            "\n".join(rates),
            f"{interval(values, 'auroc', '.2f')}\n{change}",
            f"{shift}\n{discrimination}",
        ]
        cells[0] += f"\n{values['verdict']}"
        shown.add_row(*map(Text, cells), style="dim" if control else "")
    console.print(shown)
    note = (
        f"[x, y]: 95 % intervals, paired bootstrap over pairs, {DRAWS:,} draws. Rates in %, at threshold "
        f"{record['readout']['threshold']:.3g}. Shift: refuses more of everything. Discrimination: tells "
        "harmful from benign better; ΔAUROC is free of scale."
    )
    console.print(Text(note, style="dim"))


def costs(found: pd.DataFrame) -> None:
    """Print what each condition costs."""
    heads = (
        "tokens\nadded",
        "calls",
        "first token\n(× undefended)",
        "further token\n(× undefended)",
        "training\nexamples",
    )
    shown = table("defense", heads, "Cost, each query alone")
    for values in rows(found):
        examples = values["training_examples"]
        cells = (
            values["defense"],
            f"{values['tokens_added']:+.0f}",
            f"{values['calls']:g}",
            interval(values, "prefill_ratio", ".2f"),
            interval(values, "token_ratio", ".2f"),
            "" if examples is None or examples != examples else f"{examples:.0f}",
        )
        shown.add_row(*map(Text, cells))
    stdout().print(shown)


def table(first: str, heads: Iterable[str], title: str | None = None, lines: bool = False) -> Table:
    """Return an empty table: names that may break on the left, numbers that may not on the right.

    Args:
        first: head of the names.
        heads: of the numbers.
        title: above it.
        lines: whether rows are parted by lines.
    """
    made = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, show_lines=lines)
    made.add_column(first, overflow="fold")
    for head in heads:
        made.add_column(head, justify="right", no_wrap=True)
    return made


def as_json(found: pd.DataFrame) -> None:
    """Print a table for machines."""
    print(json.dumps(json.loads(found.to_json(orient="records")), indent=2))


def checks(console: Console, name: str, checks: Sequence[Check], texts: Sequence[tuple[str, str]]) -> None:
    """Print what the model reads for a few queries, and the checks of one defense."""
    console.rule(Text(name), align="left")
    for query, text in texts:
        console.print(Text(f"{query}:", style="bold"))
        console.print(Text(text, style="cyan"))
    for check in checks:
        mark = Text("ok    ", style="green") if check.passed else Text("FAILED", style="bold red")
        console.print(mark, Text(f"{check.name}: {check.seen}"))


def failures(checks: Sequence[Check]) -> None:
    """Print the checks that stopped a run, one line each on stderr."""
    console = Console(stderr=True)
    for check in checks:
        console.print(Text(f"analyze: {check.condition}: {check.name}: FAILED: {check.seen}"), soft_wrap=True)
    text = "Nothing was scored. `analyze check` with the same -d and --attack shows what the model reads."
    console.print(Text(text), soft_wrap=True)


def rows(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table by the names of its columns."""
    for row in frame.to_dict("records"):
        yield {str(name): value for name, value in row.items()}


def stdout() -> Console:
    """Return the console for tables: a file or a pipe has no width of its own."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def interval(row: Mapping[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    """Return an estimate with its interval as text, a dash where there is none."""
    value, low, high = (scale * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if value != value:  # there is none: a class is missing, or nothing varies
        return "–"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]" if low <= high else f"{value:{form}}"


def trust(summary: pd.DataFrame, console: Console) -> None:
    """Say where generated text contradicts the readout, and where nobody has looked."""
    doubtful = summary[summary["trusted"] == "not trusted"]
    if len(doubtful):
        names = few([condition(row) for _, row in doubtful.iterrows()])
        say(
            console,
            f"Not trusted, by generated text: {names}. There the first token does not tell whether the "
            "answer refuses.",
        )
    if (count := int((summary["trusted"] == UNVALIDATED).sum())) > 0:
        say(
            console,
            f"{count} of {len(summary)} conditions were never compared with generated text: "
            "`analyze validate` with the same options does it.",
        )


def few(texts: Sequence[str], most: int = 12) -> str:
    """Return the texts in one line; of more than that many, the first and how many are left."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def say(console: Console, text: str) -> None:
    """Print a line as it is, uncut, on a quiet console, too: it may be that something is fetched."""
    quiet, console.quiet = console.quiet, False
    try:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    finally:
        console.quiet = quiet


def note(console: Console, text: str) -> None:
    """Print what the run keeps among its notices; a quiet console leaves it at that."""
    if not console.quiet:
        say(console, f"note: {text}")
