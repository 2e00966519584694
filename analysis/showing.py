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

from analysis.resampling import BOOTSTRAP_DRAWS
from analysis.tables import UNVALIDATED, format_condition

if TYPE_CHECKING:
    import pandas as pd

    from analysis.preflight import PreflightCheck


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


def print_summary(summary: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print one row per defense: rates, AUROC, the two contrasts, and the verdict."""
    data, model = record["data"], record["model"]
    title = (
        f"{model['name']} ({record['dtype']}) on {data['name']}, {data['split']} split: "
        f"{data['n_harmful']} harmful, {data['n_benign']} benign"
    )
    console = make_table_console()  # two lines a row: so it fits 80 columns
    heads = ("refuses (%)\nharmful\nbenign", "\nAUROC\nΔAUROC", "nats\nshift\ndiscrimination")
    shown = make_console_table("\ndefense\nverdict", heads, title, with_row_lines=True)
    for values in iterate_rows(summary):
        control, reference = values["family"] == "control", values["verdict"] == "reference"
        rates = [format_interval(values, name, ".0f", 100.0) for name in ("refusal_rate", "over_refusal_rate")]
        change, shift, discrimination = (
            "–" if reference else format_interval(values, name, "+.2f")
            for name in ("delta_auroc", "shift", "discrimination")
        )
        cells = [
            f"{format_condition(values)} (control)" if control else format_condition(values),
            "\n".join(rates),
            f"{format_interval(values, 'auroc', '.2f')}\n{change}",
            f"{shift}\n{discrimination}",
        ]
        cells[0] += f"\n{values['verdict']}"
        shown.add_row(*map(Text, cells), style="dim" if control else "")
    console.print(shown)
    note = (
        f"[x, y]: 95 % intervals, paired bootstrap over pairs, {BOOTSTRAP_DRAWS:,} draws. Rates in %, at threshold "
        f"{record['readout']['threshold']:.3g}. Shift: refuses more of everything. Discrimination: tells "
        "harmful from benign better; ΔAUROC is free of scale."
    )
    console.print(Text(note, style="dim"))


def print_costs(costs: pd.DataFrame) -> None:
    """Print what each condition costs."""
    heads = (
        "tokens\nadded",
        "calls",
        "first token\n(× undefended)",
        "further token\n(× undefended)",
        "training\nexamples",
    )
    shown = make_console_table("defense", heads, "Cost, each query alone")
    for values in iterate_rows(costs):
        examples = values["training_examples"]
        cells = (
            values["defense"],
            f"{values['tokens_added']:+.0f}",
            f"{values['calls']:g}",
            format_interval(values, "prefill_ratio", ".2f"),
            format_interval(values, "token_ratio", ".2f"),
            "" if examples is None or examples != examples else f"{examples:.0f}",
        )
        shown.add_row(*map(Text, cells))
    make_table_console().print(shown)


def make_console_table(name_header: str, number_headers: Iterable[str], title: str | None = None, with_row_lines: bool = False) -> Table:
    """Return an empty table: names that may break on the left, numbers that may not on the right.

    Args:
        name_header: head of the names.
        number_headers: of the numbers.
        title: above it.
        with_row_lines: whether rows are parted by lines.
    """
    made = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, show_lines=with_row_lines)
    made.add_column(name_header, overflow="fold")
    for head in number_headers:
        made.add_column(head, justify="right", no_wrap=True)
    return made


def print_json_table(table: pd.DataFrame) -> None:
    """Print a table for machines."""
    print(json.dumps(json.loads(table.to_json(orient="records")), indent=2))


def print_checks(console: Console, condition: str, checks: Sequence[PreflightCheck], prompt_texts: Sequence[tuple[str, str]]) -> None:
    """Print what the model reads for a few queries, and the checks of one defense."""
    console.rule(Text(condition), align="left")
    for query, text in prompt_texts:
        console.print(Text(f"{query}:", style="bold"))
        console.print(Text(text, style="cyan"))
    for check in checks:
        mark = Text("ok    ", style="green") if check.passed else Text("FAILED", style="bold red")
        console.print(mark, Text(f"{check.name}: {check.observed}"))


def print_failed_checks(checks: Sequence[PreflightCheck]) -> None:
    """Print the checks that stopped a run, one line each on stderr."""
    console = Console(stderr=True)
    for check in checks:
        console.print(Text(f"analyze: {check.condition}: {check.name}: FAILED: {check.observed}"), soft_wrap=True)
    text = "Nothing was scored. `analyze check` with the same -d and --attack shows what the model reads."
    console.print(Text(text), soft_wrap=True)


def iterate_rows(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table by the names of its columns."""
    for row in frame.to_dict("records"):
        yield {str(name): value for name, value in row.items()}


def make_table_console() -> Console:
    """Return the console for tables: a file or a pipe has no width of its own."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def format_interval(row: Mapping[str, Any], column: str, format_spec: str, scale: float = 1.0) -> str:
    """Return an estimate with its interval as text, a dash where there is none."""
    value, low, high = (scale * row[f"{column}{end}"] for end in ("", "_low", "_high"))
    if value != value:  # there is none: a class is missing, or nothing varies
        return "–"
    return f"{value:{format_spec}} [{low:{format_spec}}, {high:{format_spec}}]" if low <= high else f"{value:{format_spec}}"


def print_trust_warnings(summary: pd.DataFrame, console: Console) -> None:
    """Say where generated text contradicts the readout, and where nobody has looked."""
    doubtful = summary[summary["trusted"] == "not trusted"]
    if len(doubtful):
        names = join_first_texts([format_condition(row) for _, row in doubtful.iterrows()])
        print_line(
            console,
            f"Not trusted, by generated text: {names}. There the first token does not tell whether the "
            "answer refuses.",
        )
    if (count := int((summary["trusted"] == UNVALIDATED).sum())) > 0:
        print_line(
            console,
            f"{count} of {len(summary)} conditions were never compared with generated text: "
            "`analyze validate` with the same options does it.",
        )


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
