"""The commands of every day: `analyze` itself, what there is, what is read and kept. Imports are late."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from analysis.cli.app import app
from analysis.cli.options import (
    AttackOption,
    BatchSizeOption,
    DataOption,
    DefenseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelOption,
    OfflineOption,
    ReadoutOption,
    SeedOption,
    SettingsOption,
    SplitOption,
)
from defenses.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.studies.run_spec import RunSpec


@app.callback(invoke_without_command=True)
def analyze(
    context: typer.Context,
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: ReadoutOption = "words",
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output folder; by default runs/TIME-MODEL-DEFENSE.")
    ] = None,
    settings: SettingsOption = None,
    cost: Annotated[bool, typer.Option("--cost", help="Also measure what each defense costs.")] = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """What does a jailbreak defense do: refuse more of everything, or tell harm from harmless better?

    analyze --defense backdoor --model smollm2
    """
    from analysis.studies.run_spec import build_run_spec

    if context.invoked_subcommand is not None:
        return
    if not defense:
        if len(sys.argv) == 1:
            typer.echo(context.get_help())
            raise typer.Exit
        raise UserError("which defense? -d NAME (see `analyze list defenses`) or -d all")
    request = build_run_spec(
        model, data, split, limit, batch_size, device, dtype, seed, offline, attack, readout
    )

    code = run_analyze_command(request, defense, settings or [], out, as_json, cost)
    raise typer.Exit(code)


@app.command()
def check(
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    attack: AttackOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
    queries: Annotated[int, typer.Option(help="How many queries to look at.")] = 4,
) -> None:
    """Show what the model will read under a defense, and check that the defense reaches it (else exit 1)."""
    from analysis.studies.run_spec import build_run_spec

    request = build_run_spec(model, data, split, None, None, device, dtype, seed, offline, attack)

    raise typer.Exit(run_check_command(request, defense or ["none"], settings or [], queries))


def run_analyze_command(
    spec: RunSpec,
    defenses: Sequence[str],
    settings: Sequence[str],
    out: Path | None,
    as_json: bool,
    with_cost: bool = False,
) -> int:
    """Score every defense and the undefended model, save tables and figures, print the summary."""
    from analysis.cli.console import (
        print_costs,
        print_failed_checks,
        print_json_table,
        print_run_location,
        print_summary,
        print_trust_warnings,
    )
    from analysis.files import check_output_folder
    from analysis.report.folder import save_run
    from analysis.studies.analyze import analyze_defenses
    from analysis.studies.progress import make_notifier
    from analysis.studies.run_spec import choose_run_folder
    from analysis.studies.setup import PreflightError

    out = check_output_folder(out or choose_run_folder(spec.model, defenses, datetime.now(UTC)))
    console = Console(stderr=True)
    try:
        found = analyze_defenses(spec, defenses, settings, console, with_cost)
    except PreflightError as error:
        print_failed_checks(error.checks)
        return 1
    run = found.run
    save_run(out, found.run, console)
    summary = run.tables["summary"]
    if as_json:
        print_json_table(summary)
    else:
        print_summary(summary, run.record)
        if with_cost:
            print_costs(run.tables["cost"])
    _print_coverage_warning(summary, console)
    print_trust_warnings(summary, console)
    print_run_location(out, found.failures, console)
    if run.record["interrupted"]:
        wanted = run.record["conditions_wanted"]
        make_notifier(console)(
            f"Interrupted: {len(summary)} of {wanted} conditions were finished and kept; the rest is "
            "not. The same command goes on from here."
        )
        return 130
    return 1 if found.failures else 0


def run_check_command(spec: RunSpec, defenses: Sequence[str], settings: Sequence[str], n_queries: int) -> int:
    """Print what the model reads under each defense, and every check; 1 if one fails."""
    from analysis.cli.console import print_checks
    from analysis.datasets.queries import sample_queries
    from analysis.models.chat_template import redact_secrets
    from analysis.run import build_conditions
    from analysis.studies.preflight import check_condition
    from analysis.studies.progress import print_note
    from analysis.studies.setup import prepare_setup

    if n_queries < 2:
        raise UserError(f"--queries {n_queries}: at least 2 are needed, a harmful and a benign one")
    console = Console()
    ready = prepare_setup(spec, defenses, settings, Console(stderr=True), with_threshold=False)
    looked_at = sample_queries(ready.query_set.queries, n_queries)
    failed = 0
    for bench in map(ready.session.with_attack, spec.attacks):
        for name, defense in build_conditions(ready.defenses).items():
            checks = check_condition(bench, name, defense, looked_at, ready.readout)
            failed += sum(not one.passed for one in checks)
            texts = [
                (query.id, redact_secrets(prompt.text, defense.secret_texts()))
                for query in looked_at
                for prompt in bench.render_query(defense, query)
            ]
            print_checks(console, checks[0].condition, checks, texts)
    for notice in (*ready.session.chat_template.notices, *ready.readout.notices):
        print_note(console, notice)
    return 1 if failed else 0


def _print_coverage_warning(summary: pd.DataFrame, console: Console) -> None:
    """Warn where the readout's words are rarely what the model opens with."""
    from analysis.readouts.readout import LOW_COVERAGE
    from analysis.stats.tables import format_condition
    from analysis.studies.progress import join_first_texts

    low = summary[summary["coverage"] < LOW_COVERAGE].sort_values("coverage", kind="stable")
    if len(low):
        worst = join_first_texts(
            [f"{format_condition(row)} {row['coverage']:.0%}" for _, row in low.iterrows()]
        )
        console.print(
            f"Warning: the readout's words are under {LOW_COVERAGE:.0%} of the first-token probability here "
            f"({worst}): these margins see little of how the model answers.",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
