"""What is printed: progress, the summary table, the checks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.stats.bootstrap import BOOTSTRAP_DRAWS
from analysis.stats.format import format_interval
from analysis.stats.tables import UNVALIDATED, format_condition, iterate_rows
from analysis.studies.progress import join_first_texts, make_notifier, print_line

if TYPE_CHECKING:
    import pandas as pd

    from analysis.studies.preflight import PreflightCheck
    from analysis.studies.sweep import ConditionKey


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
        rates = [
            format_interval(values, name, ".0f", 100.0) for name in ("refusal_rate", "over_refusal_rate")
        ]
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


def make_console_table(
    name_header: str, number_headers: Iterable[str], title: str | None = None, with_row_lines: bool = False
) -> Table:
    """Return an empty table: names that may break on the left, numbers that may not on the right.

    Args:
        name_header: head of the names.
        number_headers: of the numbers.
        title: above it.
        with_row_lines: whether rows are parted by lines.
    """
    made = Table(
        title=title, title_justify="left", show_edge=False, pad_edge=False, show_lines=with_row_lines
    )
    made.add_column(name_header, overflow="fold")
    for head in number_headers:
        made.add_column(head, justify="right", no_wrap=True)
    return made


def print_json_table(table: pd.DataFrame) -> None:
    """Print a table for machines."""
    print(json.dumps(json.loads(table.to_json(orient="records")), indent=2))


def print_checks(
    console: Console,
    condition: str,
    checks: Sequence[PreflightCheck],
    prompt_texts: Sequence[tuple[str, str]],
) -> None:
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
        console.print(
            Text(f"analyze: {check.condition}: {check.name}: FAILED: {check.observed}"), soft_wrap=True
        )
    text = "Nothing was scored. `analyze check` with the same -d and --attack shows what the model reads."
    console.print(Text(text), soft_wrap=True)


def make_table_console() -> Console:
    """Return the console for tables: a file or a pipe has no width of its own."""
    return Console() if sys.stdout.isatty() else Console(width=120)


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


def print_run_location(out: Path, failures: Mapping[ConditionKey, str], console: Console) -> None:
    """Say where a run is, and what failed in it."""
    make_notifier(console)(f"Tables, figures and run.json are in {out}")
    print_failures(failures, console)


def print_failures(failures: Mapping[ConditionKey, str], console: Console) -> None:
    """Say what failed in a run, and why."""
    for (sent, name), why in failures.items():
        make_notifier(console)(f"Failed: {format_condition({'attack': sent, 'defense': name})}: {why}")
