"""`analyze` itself and `analyze check`; heavy libraries are imported inside the functions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from analysis.cli.app import app
from analysis.cli.options import (
    DEFAULT_DATA,
    DEFAULT_MODEL,
    AnswerPrefixOption,
    AttackOption,
    BatchSizeOption,
    ControlsOption,
    DataOption,
    DefenseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelOption,
    ModelsOption,
    OfflineOption,
    ReadoutOption,
    ResponsesOption,
    SeedOption,
    SettingsOption,
    SharePrefixOption,
    SplitOption,
    TemplateOption,
    TokenizerOption,
    TrainOption,
)
from defenses.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.report.results import Run
    from analysis.studies.run_spec import RunSpec


def print_version(is_asked: bool) -> bool:
    """Print the version and exit, if the user asked for it."""
    if is_asked:
        from analysis import __version__

        typer.echo(f"refusalscope {__version__}")
        raise typer.Exit
    return is_asked


@app.callback(invoke_without_command=True)
def analyze(
    context: typer.Context,
    defense: DefenseOption = None,
    model: ModelsOption = DEFAULT_MODEL,
    data: DataOption = DEFAULT_DATA,
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: ReadoutOption = "outcome",
    responses: ResponsesOption = "auto",
    controls: ControlsOption = 20,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "auto",
    share_prefix: SharePrefixOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    template: TemplateOption = None,
    answer_prefix: AnswerPrefixOption = None,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output folder. Default: runs/TIME-MODEL-DEFENSE.")
    ] = None,
    settings: SettingsOption = None,
    train: TrainOption = False,
    cost: Annotated[
        bool, typer.Option("--cost", help="Also measure the cost of each defense: tokens, calls, time.")
    ] = False,
    side_effects: Annotated[
        bool,
        typer.Option(
            "--side-effects",
            help="Also measure how far each defense moves the first token, and the first 12 tokens, of the "
            "responses to benign queries (KL divergence): one more pass over their prompts.",
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            help="With several -m: number of models at a time, each in a process of its own, and on a GPU of "
            "its own if there are as many."
        ),
    ] = 1,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure what a jailbreak defense does: refuse more, or separate harmful from benign queries better.

    analyze --defense backdoor --model smollm2
    """
    from analysis.studies.run_spec import build_run_spec, check_control_draws, check_worker_count

    if context.invoked_subcommand is not None:
        return
    if not defense:
        if len(sys.argv) == 1:
            typer.echo(context.get_help())
            raise typer.Exit
        raise UserError("no defense chosen: use -d NAME (see `analyze list defenses`) or -d all")
    spec = build_run_spec(
        model[0],
        data,
        split,
        limit,
        batch_size,
        device,
        dtype,
        seed,
        offline,
        attack,
        readout,
        responses=responses,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
        allows_served=True,
        tokenizer=tokenizer,
    )
    check_control_draws(controls)
    check_worker_count(workers)
    options = {
        "with_cost": cost,
        "n_control_draws": controls,
        "with_training": train,
        "with_side_effects": side_effects,
    }
    if len(model) > 1:
        from analysis.cli.models import run_models_command

        code = run_models_command(spec, model, defense, settings or [], out, as_json, workers, options)
    else:
        code = run_analyze_command(spec, defense, settings or [], out, as_json, **options)
    raise typer.Exit(code)


@app.command()
def check(
    defense: DefenseOption = None,
    model: ModelOption = DEFAULT_MODEL,
    data: DataOption = DEFAULT_DATA,
    split: SplitOption = None,
    attack: AttackOption = None,
    share_prefix: SharePrefixOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    template: TemplateOption = None,
    answer_prefix: AnswerPrefixOption = None,
    tokenizer: TokenizerOption = None,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
    queries: Annotated[int, typer.Option(help="Number of queries to show and check.")] = 4,
) -> None:
    """Show the prompts that the model reads and check that the defense reaches it (exit 1 if not)."""
    from analysis.studies.run_spec import build_run_spec

    spec = build_run_spec(
        model,
        data,
        split,
        None,
        None,
        device,
        dtype,
        seed,
        offline,
        attack,
        template=template,
        answer_prefix=answer_prefix,
        allows_served=True,
        tokenizer=tokenizer,
        share_prefix=share_prefix,
    )
    raise typer.Exit(run_check_command(spec, defense or ["none"], settings or [], queries))


def run_analyze_command(
    spec: RunSpec,
    defenses: Sequence[str],
    settings: Sequence[str],
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Score each defense and the undefended model, save tables and figures, and print the summary.

    Args:
        spec: model, data and options of the run.
        defenses: names or .py files, as typed.
        settings: `key=value` settings of the defenses.
        out: output folder, or None for a new one under runs/.
        as_json: whether to print the summary as JSON instead of a table.
        options: `with_cost`, `n_control_draws`, `with_training` and `with_side_effects`, as for
            `analyze_defenses`.

    Returns:
        The exit code: 0, 1 if a check or a condition failed, 130 if the run was interrupted.
    """
    from analysis.cli.console import print_failed_checks, print_json_table, print_run_location
    from analysis.progress import make_notifier
    from analysis.report.folder import prepare_run_folder, save_run
    from analysis.studies.analyze import analyze_defenses
    from analysis.studies.run_spec import choose_run_folder
    from analysis.studies.setup import PreflightError
    from analysis.studies.train import TrainingInterrupted

    console = Console(stderr=True)
    out = prepare_run_folder(out or choose_run_folder(spec.model, defenses, datetime.now(UTC)), console)
    try:
        result = analyze_defenses(spec, defenses, settings, console, **options)
    except TrainingInterrupted as interruption:
        make_notifier(console)(str(interruption))
        return 130
    except PreflightError as error:
        print_failed_checks(error.checks)
        return 1
    run = result.run
    save_run(out, run, console)
    if as_json:
        print_json_table(run.tables["summary"])
    else:
        print_run_tables(run)
    print_run_warnings(run, console)
    print_run_location(out, result.failures, console)
    if run.record["interrupted"]:
        n_conditions = run.record["conditions_wanted"]
        make_notifier(console)(
            f"Interrupted: {run.n_finished_conditions} of {n_conditions} conditions were finished; they are "
            "saved. Run the same command again to continue."
        )
        return 130
    return 1 if result.failures else 0


def print_run_tables(run: Run) -> None:
    """Print the tables of a run of one model.

    Args:
        run: of `analyze`.
    """
    from analysis.cli.console import (
        print_control_comparison,
        print_costs,
        print_kinds,
        print_side_effects,
        print_summary,
    )

    summary = run.tables["summary"]
    print_summary(summary, run.record)
    print_control_comparison(summary)
    print_kinds(run.tables["kinds"])
    if "cost" in run.tables:
        print_costs(run.tables["cost"])
    print_side_effects(summary)


def print_run_warnings(run: Run, console: Console) -> None:
    """Print in which conditions of a run of one model the margins are to be treated with caution.

    Args:
        run: of `analyze`.
        console: where to print.
    """
    from analysis.cli.console import print_trust_warnings

    _print_coverage_warning(run.tables["summary"], console)
    print_trust_warnings(run.tables["summary"], console)


def run_check_command(spec: RunSpec, defenses: Sequence[str], settings: Sequence[str], n_queries: int) -> int:
    """Print the prompts that the model reads under each defense and the result of every check.

    Args:
        spec: model, data and options of the run.
        defenses: names or .py files, as typed.
        settings: `key=value` settings of the defenses.
        n_queries: number of queries to show and check.

    Returns:
        The exit code: 0, or 1 if a check failed.
    """
    from analysis.cli.console import print_checks
    from analysis.datasets.queries import sample_queries
    from analysis.models.chat_template import redact_secrets
    from analysis.progress import print_note
    from analysis.run import build_conditions
    from analysis.studies.preflight import check_condition
    from analysis.studies.setup import prepare_setup, select_preflight_queries

    if n_queries < 2:
        raise UserError(f"--queries {n_queries}: at least 2 are needed, one harmful and one benign")
    console = Console()
    setup = prepare_setup(spec, defenses, settings, Console(stderr=True), with_threshold=False)
    queries = sample_queries(setup.query_set.queries, n_queries)
    n_failed = 0
    for attack in spec.attacks:
        query_chats = attack.build_query_chats(queries)
        checked = select_preflight_queries(setup, attack, n_queries)
        for name, defense in build_conditions(setup.defenses).items():
            checks = check_condition(setup.session, name, defense, checked, setup.readout, attack)
            n_failed += sum(not check.passed for check in checks)
            prompts_by_query = setup.session.render_prompts(defense, query_chats)
            texts = [
                (query.id, redact_secrets(prompt.text, defense.secret_texts()))
                for query, prompts in zip(queries, prompts_by_query, strict=True)
                for prompt in prompts
            ]
            print_checks(console, checks[0].condition, checks, texts)
        if attack.is_adaptive:
            shown = (
                "a placeholder stands for each of the model's own responses"
                if attack.asks_model
                else f"the first of {len(attack.variants)} variants is shown"
            )
            print_note(console, f"{attack.name} adapts its chats to each condition; {shown}")
    notices = *setup.session.chat_template.notices, *setup.session.engine.notices, *setup.readout.notices
    for notice in notices:
        print_note(console, notice)
    return 1 if n_failed else 0


def _print_coverage_warning(summary: pd.DataFrame, console: Console) -> None:
    """Warn about conditions in which the readout's words hold little of the first-token probability."""
    from analysis.progress import join_first_texts
    from analysis.readouts.readout import LOW_COVERAGE
    from analysis.stats.tables import format_condition

    low_rows = summary[summary["coverage"] < LOW_COVERAGE].sort_values("coverage", kind="stable")
    if len(low_rows):
        worst = join_first_texts(
            [f"{format_condition(row)} {row['coverage']:.0%}" for _, row in low_rows.iterrows()]
        )
        console.print(
            f"Warning: less than {LOW_COVERAGE:.0%} of the first-token probability falls on the readout's "
            f"words ({worst}); treat these margins with caution.",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
