"""The commands that study: readouts against text, ensembles, mechanism. Imports are late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from analysis.cli.app import app
from analysis.cli.options import (
    AttackOption,
    BatchSizeOption,
    BudgetOption,
    DataOption,
    DefenseOption,
    DeviceOption,
    DtypeOption,
    JudgeModelOption,
    JudgeOption,
    LimitOption,
    ModelOption,
    OfflineOption,
    OutOption,
    RubricOption,
    SeedOption,
    SettingsOption,
    SplitOption,
)

if TYPE_CHECKING:
    import pandas as pd

    from analysis.studies.validate import ConditionResponses


@app.command()
def validate(
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: Annotated[
        list[str] | None,
        typer.Option(
            "--readout", help="Readout: a name (`list readouts`) or all. Repeatable. Default: words."
        ),
    ] = None,
    judge: JudgeOption = "patterns",
    judge_model: JudgeModelOption = None,
    budget: BudgetOption = None,
    rubric: RubricOption = None,
    grade: Annotated[
        bool, typer.Option("--grade", help="Have the judge model also grade the responses to benign queries.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Maximum number of tokens generated per response.")] = 48,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Validate readouts against generated text, and rate the quality of the responses."""
    from analysis.studies.run_spec import build_run_spec

    wanted = readout or ["words"]
    request = build_run_spec(
        model, data, split, limit, batch_size, device, dtype, seed, offline, attack, wanted
    )
    from analysis.studies.judge_file import JudgeOptions
    from analysis.studies.validate import validate_readouts

    jury = JudgeOptions(judge, judge_model, budget, rubric, grade)
    raise typer.Exit(validate_readouts(request, defense or ["none"], settings or [], out, jury, tokens))


@app.command()
def judge(
    file: Annotated[Path, typer.Argument(help="A .csv or .jsonl file with a column of responses.")],
    column: Annotated[str, typer.Option(help="Name of the column with the responses.")] = "response",
    request: Annotated[
        str | None,
        typer.Option(help="Name of the column with the queries; off-topic responses then count as refusals."),
    ] = None,
    judge: JudgeOption = "patterns",
    judge_model: JudgeModelOption = None,
    budget: BudgetOption = None,
    rubric: RubricOption = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output file. Default: FILE.judged.csv or .jsonl.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Judge whether each response in a file refuses (full, partial, none), and show the deciding words."""
    from analysis.studies.judge_file import JudgeOptions, judge_file

    jury = JudgeOptions(judge, judge_model, budget, rubric)
    raise typer.Exit(judge_file(file, column, request, jury, out, offline))


def print_verdict_shares(refusals: list[str], judge_name: str) -> None:
    """Print the shares among the answers that have a verdict."""
    from analysis.cli.console import make_table_console
    from analysis.judges.judge import REFUSAL_KINDS
    from analysis.stats.bootstrap import make_rate_columns
    from analysis.stats.format import format_interval

    n = sum(one in REFUSAL_KINDS for one in refusals)
    shown = Table(show_edge=False)
    for head in ("refusal", "answers", "share (%)"):
        shown.add_column(head, justify="left" if head == "refusal" else "right")
    for kind in REFUSAL_KINDS:
        share = format_interval(make_rate_columns("share", refusals.count(kind), n), "share", ".1f", 100)
        shown.add_row(kind, str(refusals.count(kind)), share)
    console = make_table_console()
    console.print(Text(f"{n} answers, judge: {judge_name}"))
    console.print(shown)
    console.print(Text("Wilson 95 % intervals.", style="dim"))


def print_validity(validity: pd.DataFrame, record: dict[str, Any]) -> None:
    """Print how far each readout agrees with the text, two lines a condition, and what follows from it.

    Args:
        validity: `validity.csv`.
        record: `run.json`.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.agreement import TRUST_RULE
    from analysis.stats.format import format_interval
    from analysis.stats.tables import format_condition, iterate_rows

    data = record["data"]
    title = (
        f"{record['model']['name']}: readouts against the text of {data['n_harmful'] + data['n_benign']} "
        f"answers a condition, judge {record['judge']['name']}"
    )
    heads = (
        "refused, text (%)\nby readout",
        "agrees (%)\ncoverage",
        "AUROC\nkappa",
        "calibration\nerror",
    )
    shown = make_console_table("defense\nreadout: verdict", heads, title)
    for values in iterate_rows(validity):
        n = max(values["n"], 1)
        kappa = format_interval(values, "kappa", ".2f")
        shown.add_row(
            *map(
                Text,
                (
                    f"{format_condition(values)}\n{values['readout']}: {values['trusted']}",
                    f"{100 * values['refused'] / n:.0f}\n{100 * values['readout_refused'] / n:.0f}",
                    f"{format_interval(values, 'agrees', '.0f', 100)}\n{values['coverage']:.0%}",
                    f"{format_interval(values, 'auroc', '.2f')}\n{kappa}",
                    format_interval(values, "calibration_error", ".2f"),
                ),
            ),
            end_section=True,
        )
    console = make_table_console()
    console.print(shown)
    console.print(Text(f"{TRUST_RULE[0].upper()}{TRUST_RULE[1:]}.", style="dim"))
    for name, group in validity.groupby("readout", sort=False):
        counts = ", ".join(f"{count} {says}" for says, count in group["trusted"].value_counts().items())
        console.print(Text(f"Readout {name}: of {len(group)} conditions {counts}."))
    for row in record["ranks"]:
        text = format_interval(row, "rank_correlation", "+.2f")
        what = f"{row['readout']} against text ({row['attack']})"
        console.print(Text(f"Conditions ranked by refusals, {what}: Spearman {text}."))


def print_response_quality(quality: pd.DataFrame, judge_name: str, max_new_tokens: int) -> None:
    """Print what the answers are worth, two lines a condition.

    Args:
        quality: `worth.csv`.
        judge_name: whose count comes first.
        max_new_tokens: that answers were cut at.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.tables import UNDEFENDED, format_condition, iterate_rows

    heads = (
        f"ASR (%)\nby {judge_name}\nby keywords",
        "refuses (%)\ntwins\nplain",
        "\nchrF\nlength ratio",
        "change of\nrepetition (%)\nlog-probability",
        *(["grade (1 to 10)\nhere\nchange"] if "grade" in quality else []),
    )
    shown = make_console_table("\ndefense\nanswers compared", heads, "What the answers are worth")
    for values in iterate_rows(quality):

        def cell(name: str, form: str, scale: float = 1, of: dict[str, Any] = values) -> str:
            return format_interval(of, name, form, scale) if name in of else "–"

        reference = values["defense"] == UNDEFENDED
        cells = [
            f"{format_condition(values)}\n{values['n_complied']} answers",
            f"{cell(f'asr_{judge_name}', '.0f', 100)}\n{cell('asr_keywords', '.0f', 100)}",
            "\n".join(cell(f"over_refusal_{kind}_{judge_name}", ".0f", 100) for kind in ("twin", "plain")),
        ]
        if reference:
            cells += ["reference", ""]
        else:
            cells.append(f"{cell('chrf', '.0f')}\n{cell('length_ratio', '.2f')}")
            cells.append(f"{cell('repetition_change', '+.1f', 100)}\n{cell('log_likelihood_change', '+.2f')}")
        if "grade" in quality:
            change = "" if reference else f"\n{cell('grade_change', '+.1f')}"
            cells.append(f"{cell('grade', '.1f')}{change}")
        shown.add_row(*map(Text, cells), end_section=True)
    console = make_table_console()
    console.print(shown)
    note = (
        "Rates: Wilson 95 % intervals. The rest: benign queries answered with and without the defense "
        f"({max_new_tokens} tokens), against the undefended answer; bootstrap over queries. Length: where one of "
        "both ended before the cut. Log-probability: mean over "
        "the answer's tokens under the undefended model, nats."
    )
    console.print(Text(note, style="dim"))


def print_unjudged(all_responses: Sequence[ConditionResponses], judge_name: str, notify: Any) -> bool:
    """Say how many answers have no verdict, and why; return whether any."""
    why = [
        verdict.evidence
        for one in all_responses
        for said in one.verdicts.values()
        for verdict in said[judge_name]
        if not verdict.is_judged
    ]
    if why:
        common = max(set(why), key=why.count)
        notify(f"{len(why)} answers have no verdict and count nowhere; mostly: {common}")
    return bool(why)
