"""The commands of every day: `analyze` itself, what there is, what is read and kept. Imports are late."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from analysis import asking
from analysis.cli_app import app
from analysis.options import (
    AttackOption,
    BatchSizeOption,
    BudgetOption,
    DataOption,
    DefenseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    JudgeModelOption,
    JudgeOption,
    LimitOption,
    ModelOption,
    OfflineOption,
    ReadoutOption,
    RubricOption,
    SeedOption,
    SettingsOption,
    SplitOption,
)
from defenses.errors import UserError, unknown_name_error


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
    if context.invoked_subcommand is not None:
        return
    if not defense:
        if len(sys.argv) == 1:
            typer.echo(context.get_help())
            raise typer.Exit
        raise UserError("which defense? -d NAME (see `analyze list defenses`) or -d all")
    request = asking.build_run_spec(
        model, data, split, limit, batch_size, device, dtype, seed, offline, attack, readout
    )
    from analysis import commands

    code = commands.run_analyze_command(request, defense, settings or [], out, as_json, cost)
    raise typer.Exit(code)


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument(help="defenses, models, data, attacks or readouts")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what there is: defenses, models, data sets, attacks, readouts."""
    from analysis import listing

    shelves = listing.collect_catalog()
    if what is not None and what not in shelves:
        raise unknown_name_error("list", what, shelves)
    chosen = {what: shelves[what]} if what else shelves
    if as_json:
        typer.echo(json.dumps(chosen, indent=2, ensure_ascii=False))
    else:
        listing.print_catalog(chosen)


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
    request = asking.build_run_spec(model, data, split, None, None, device, dtype, seed, offline, attack)
    from analysis import commands

    raise typer.Exit(commands.run_check_command(request, defense or ["none"], settings or [], queries))


@app.command()
def explain(
    defense: Annotated[str, typer.Argument(help="Name, or the path of a .py file.")],
    model: ModelOption = "smollm2",
    text: Annotated[
        str | None, typer.Option("--text", help="The request; by default a harmless one of the shipped.")
    ] = None,
    attack: AttackOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Print a defense's card, and what the model would read of one request under it.

    analyze explain smooth_llm --set copies=3
    """
    request = asking.build_run_spec(model, "contrast", "test", None, None, device, dtype, seed, offline, attack)
    from analysis import explaining

    raise typer.Exit(explaining.run_explain_command(request, defense, settings or [], text))


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what earlier runs have found out and later ones need not, by kind; or clear it.

    Scores and drafts; readouts with their thresholds; the verdicts they were made from; what `analyze
    validate` found; residual means; costs. Converted models and data sets that were fetched stay.
    """
    from analysis import store

    place = store.get_score_cache_path()
    held = store.count_cached_rows(place) if not clear else None
    kinds = store.count_json_files(place)
    if held is None:
        store.clear_cache(place)
        typer.echo(f"{place} is cleared, and so is what was kept beside it: {', '.join(kinds)}")
    elif as_json:
        typer.echo(json.dumps({"path": str(place), **held, "kept": kinds}))
    else:
        size = held["bytes"] / 2**20
        typer.echo(f"{place}: {held['scores']} scores and {held['drafts']} drafts, {size:.1f} MiB")
        for kind, found in kinds.items():
            typer.echo(f"{place.with_name(kind)}: {found['count']} files, {found['bytes']:,} bytes")


@app.command()
def judge(
    file: Annotated[Path, typer.Argument(help="A .csv or .jsonl with a column of answers.")],
    column: Annotated[str, typer.Option(help="The column of the answers.")] = "response",
    request: Annotated[
        str | None,
        typer.Option(help="The column of what was asked: answers to something else are then refusals too."),
    ] = None,
    judge: JudgeOption = "patterns",
    judge_model: JudgeModelOption = None,
    budget: BudgetOption = None,
    rubric: RubricOption = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New file; by default FILE.judged.csv or .jsonl.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Say of each answer in a file whether it refuses (full, partial, none), and by which words."""
    from analysis import judging

    jury = judging.JudgeOptions(judge, judge_model, budget, rubric)
    raise typer.Exit(judging.judge_file(file, column, request, jury, out, offline))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are also compared.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page, one file.")] = Path("report.html"),
) -> None:
    """Make one page of one or several runs, which can be asked: from a defense to its queries. No network.

    analyze report runs/a runs/b -o report.html
    """
    from analysis import reporting

    raise typer.Exit(reporting.write_report(runs, out))
