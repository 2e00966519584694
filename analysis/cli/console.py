"""Terminal output shared by the commands: the summary table, costs, preflight checks and warnings."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.progress import join_first_texts, make_notifier, print_line
from analysis.stats.bootstrap import BOOTSTRAP_DRAWS
from analysis.stats.format import Interval, format_interval
from analysis.stats.tables import Trust, format_condition, has_judged_rates, iterate_rows
from analysis.stats.verdicts import (
    DISAGREEMENT,
    EFFECT_NAMES,
    MARGIN_EQUIVALENCE,
    REFERENCE,
    RESPONSE_EQUIVALENCE,
)

if TYPE_CHECKING:
    import pandas as pd

    from analysis.studies.preflight import PreflightCheck
    from analysis.studies.sweep import ConditionKey

_MAX_VERDICT_NOTES = 12  # notes that are printed below the summary
_MAX_KINDS_WITH_INTERVALS = 4  # kinds of benign queries whose rates fit 80 columns with their intervals


def print_summary(summary: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print a table with one row per condition: refusal rates, shift, discrimination and the verdict.

    Args:
        summary: the run's summary table.
        record: the run's record (`run.json`).
    """
    data, model = record["data"], record["model"]
    title = (
        f"{model['name']} ({record['dtype']}) on {data['name']}, {data['split']} split: "
        f"{data['n_harmful']} harmful, {data['n_benign']} benign"
    )
    console = make_table_console()
    is_judged = has_judged_rates(summary)
    # Two or three lines per row, so that the table fits 80 columns.
    headers = ["refuses (%)\nharmful\nbenign", "nats\nshift\ndiscrimination"]
    headers.insert(1, "points\nshift\ndiscrimination" if is_judged else "\nAUROC\nΔAUROC")
    table = make_console_table("\ndefense\nverdict", headers, title, with_row_lines=True)
    for values in iterate_rows(summary):
        control, reference = values["family"] == "control", values["verdict"] == "reference"
        rates = [
            format_interval(values, name, ".0f", 100.0) for name in ("refusal_rate", "over_refusal_rate")
        ]
        margin_effects = [
            "–" if reference else format_interval(values, name, "+.2f")
            for name in ("shift", "discrimination")
        ]
        if is_judged:
            changes = [
                format_interval(values, name, "+.0f")
                for name in ("response_shift", "response_discrimination")
            ]
        else:
            change = "–" if reference else format_interval(values, "delta_auroc", "+.2f")
            changes = [format_interval(values, "auroc", ".2f"), change]
        name = f"{format_condition(values)} (control)" if control else format_condition(values)
        cells = [f"{name}\n{values['verdict']}", *map("\n".join, (rates, changes, margin_effects))]
        table.add_row(*map(Text, cells), style="dim" if control else "")
    console.print(table)
    console.print(Text(_explain_summary(summary, record), style="dim"))
    _print_verdict_notes(summary, console)


def _explain_summary(summary: pd.DataFrame, record: Mapping[str, Any]) -> str:
    """Return the note below the summary table."""
    if has_judged_rates(summary):
        responses = record["responses"]
        rates = (
            f"Rates and verdicts: first {responses['new_tokens']} tokens of the responses, judged by "
            f"{responses['judge']['name']}. Points: changes of the two rates against the undefended model."
        )
        if responses["unjudged"]:
            rates += f" {responses['unjudged']} responses have no verdict and count nowhere."
        if responses["queries"] < record["data"]["n_harmful"] + record["data"]["n_benign"]:
            saved = summary["responses_saved"]
            rates += (
                f" {responses['queries']} queries were answered; the margins of all queries are worth "
                f"{saved.min():.0f} to {saved.max():.0f} further responses."
            )
    else:
        rates = (
            f"Rates and verdicts: by the first-token margin, threshold {record['readout']['threshold']:.3g} "
            f"nats; no response was judged. Intervals: paired bootstrap, {BOOTSTRAP_DRAWS:,} draws."
        )
    return (
        f"[x, y]: 95 % intervals. {rates} Nats: changes of the first-token margin. Shift: mean change over "
        "both classes; + refuses more. Discrimination: change on harmful minus change on benign queries; "
        "+ separates better. Verdict: +, - or equivalent (within "
        f"±{RESPONSE_EQUIVALENCE:.0f} points, or ±{MARGIN_EQUIVALENCE:g} SD of the margin) if intervals and "
        "adjusted p-values support it, else inconclusive; the reference is the undefended model."
    )


def _print_verdict_notes(summary: pd.DataFrame, console: Console) -> None:
    """Print why verdicts are inconclusive, and where the margins say otherwise."""
    noted = summary[summary["verdict_note"].astype(str) != ""]
    if len(noted) > _MAX_VERDICT_NOTES:
        disagreeing = noted["verdict_note"].str.contains(DISAGREEMENT, regex=False)
        text = f"Why verdicts are inconclusive: column verdict_note of summary.csv ({len(noted)} conditions)."
        if disagreeing.any():
            names = join_first_texts([format_condition(row) for _, row in noted[disagreeing].iterrows()])
            text += f" The margins contradict the responses in {disagreeing.sum()}: {names}."
        print_line(console, text)
        return
    for _, row in noted.iterrows():
        print_line(console, f"{format_condition(row)}: {row['verdict_note']}")


def print_control_comparison(summary: pd.DataFrame) -> None:
    """Print what each defense does beyond content of the same size; nothing if no control was scored."""
    if "control" not in summary or not summary["control"].notna().any():
        return
    is_judged = has_judged_rates(summary)
    headers = ["points\nshift\ndiscrimination"] * is_judged + ["nats\nshift\ndiscrimination"]
    title = "Over content of the same size"
    table = make_console_table("defense\ncontrol\ncomparison", headers, title, with_row_lines=True)
    rows = summary[summary["control"].notna()]
    for values in iterate_rows(rows):
        columns = [("response_", "+.0f")] * is_judged + [("", "+.2f")]
        cells = [
            "\n".join(
                format_interval(values, f"{prefix}{effect}_over_control", format_spec)
                for effect in EFFECT_NAMES
            )
            for prefix, format_spec in columns
        ]
        note = values["control_note"] or values["verdict_over_control"]
        name = f"{format_condition(values)}\n{values['control']}\n{note}"
        table.add_row(*map(Text, (name, *cells)))
    console = make_table_console()
    console.print(table)
    explanation = (
        "Each defense minus a control with other content of the same size in the same place. The queries are "
        f"divided among {rows['control_draws'].max():.0f} draws of it (weights: a single training). [x, y]: "
        "95 % intervals over draws and queries."
    )
    console.print(Text(explanation, style="dim"))


def print_kinds(kinds: pd.DataFrame) -> None:
    """Print the refusal rate of each kind of benign query, a line per condition; nothing of a single kind.

    Args:
        kinds: `kinds.csv`.
    """
    sizes = kinds.groupby("kind", sort=False)["n"].max()
    if len(sizes) < 2:
        return
    headers = [f"{kind}\nn = {n}" for kind, n in sizes.items()]
    table = make_console_table("defense", headers, "Benign queries refused (%), by kind")
    for _, rows in kinds.groupby(["attack", "defense"], sort=False):
        row_by_kind = {row["kind"]: row for row in iterate_rows(rows)}
        cells = [
            Interval.from_row(row_by_kind[kind], "over_refusal_rate")
            if kind in row_by_kind
            else Interval(None)
            for kind in sizes.index
        ]
        if len(sizes) > _MAX_KINDS_WITH_INTERVALS:
            cells = [Interval(cell.value) for cell in cells]
        name = format_condition(next(iter(row_by_kind.values())))
        table.add_row(Text(name), *(Text(cell.format_text(".0f", 100)) for cell in cells))
    console = make_table_console()
    console.print(table)
    console.print(Text("Intervals, changes and AUROC by kind: kinds.csv.", style="dim"))


def print_costs(costs: pd.DataFrame) -> None:
    """Print a table of the cost of each condition."""
    headers = (
        "tokens\nadded",
        "calls",
        "first token\n(× undefended)",
        "further token\n(× undefended)",
        "training\nexamples",
    )
    table = make_console_table("defense", headers, "Cost, one query at a time")
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
        table.add_row(*map(Text, cells))
    make_table_console().print(table)


def print_side_effects(summary: pd.DataFrame) -> None:
    """Print how far the first tokens move on benign queries; nothing if it was not measured."""
    if "kl_benign" not in summary:
        return
    headers = ["KL of the first token (nats)", "of 12 tokens (nats per token)"]
    table = make_console_table("defense", headers, "Side effects on benign queries")
    for values in iterate_rows(summary[summary["verdict"] != REFERENCE]):
        cells = (format_interval(values, name, ".2f") for name in ("kl_benign", "kl_12_benign"))
        table.add_row(*map(Text, (format_condition(values), *cells)))
    console = make_table_console()
    console.print(table)
    note = (
        "Mean divergence of the defended from the undefended distribution over all tokens, KL(undefended ‖ "
        "defended), at the first token and over the first 12 of the undefended response. –: there is no "
        "first token to compare, because a detector may answer or the defense writes the first tokens."
    )
    console.print(Text(note, style="dim"))


def make_console_table(
    name_header: str, number_headers: Iterable[str], title: str | None = None, with_row_lines: bool = False
) -> Table:
    """Return an empty table: a column of names, which may wrap, and columns of numbers, which may not.

    Args:
        name_header: header of the name column.
        number_headers: headers of the number columns.
        title: title above the table.
        with_row_lines: whether lines separate the rows.
    """
    table = Table(
        title=title, title_justify="left", show_edge=False, pad_edge=False, show_lines=with_row_lines
    )
    table.add_column(name_header, overflow="fold")
    for header in number_headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def print_json_table(table: pd.DataFrame) -> None:
    """Print a table as a JSON list of records."""
    print(json.dumps(json.loads(table.to_json(orient="records")), indent=2))


def print_checks(
    console: Console,
    condition: str,
    checks: Sequence[PreflightCheck],
    prompt_texts: Sequence[tuple[str, str]],
) -> None:
    """Print the prompts of a few queries under one condition, then the result of each check.

    Args:
        console: where to print.
        condition: name of the condition.
        checks: results of the preflight checks.
        prompt_texts: pairs of query id and prompt text.
    """
    console.rule(Text(condition), align="left")
    for query_id, text in prompt_texts:
        console.print(Text(f"{query_id}:", style="bold"))
        console.print(Text(text, style="cyan"))
    for check in checks:
        mark = Text("ok    ", style="green") if check.passed else Text("FAILED", style="bold red")
        console.print(mark, Text(f"{check.name}: {check.observed}"))


def print_failed_checks(checks: Sequence[PreflightCheck]) -> None:
    """Print the failed checks that stopped a run to stderr, one line each."""
    console = Console(stderr=True)
    for check in checks:
        console.print(
            Text(f"analyze: {check.condition}: {check.name}: FAILED: {check.observed}"), soft_wrap=True
        )
    text = "Nothing was scored. `analyze check` with the same -d and --attack shows the prompts."
    console.print(Text(text), soft_wrap=True)


def make_table_console() -> Console:
    """Return the console for tables; a file or a pipe has no width, so it gets 120 columns."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def print_trust_warnings(summary: pd.DataFrame, console: Console) -> None:
    """Print the conditions whose margins generated text contradicts, and how many were not validated."""
    untrusted = summary[summary["trusted"] == Trust.NOT_TRUSTED]
    is_judged = has_judged_rates(summary)
    if len(untrusted):
        names = join_first_texts([format_condition(row) for _, row in untrusted.iterrows()])
        print_line(
            console,
            f"Margins not trusted: {names}. In these conditions the first token does not predict whether the "
            "generated response refuses.",
        )
    if (count := int((summary["trusted"] == Trust.NOT_VALIDATED).sum())) > 0 and not is_judged:
        print_line(
            console,
            f"{count} of {len(summary)} conditions are not validated against generated text; run "
            "`analyze validate` with the same options.",
        )


def print_run_location(out: Path, failures: Mapping[ConditionKey, str], console: Console) -> None:
    """Print the folder of a run and the conditions that failed."""
    make_notifier(console)(f"Wrote tables, figures and run.json to {out}")
    print_failures(failures, console)


def print_failures(failures: Mapping[ConditionKey, str], console: Console) -> None:
    """Print one line for each condition that failed, with the reason."""
    notify = make_notifier(console)
    for (attack, defense), reason in failures.items():
        notify(f"Failed: {format_condition({'attack': attack, 'defense': defense})}: {reason}")
