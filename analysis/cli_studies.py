"""The commands that study: readouts against text, ensembles, mechanism. Imports are late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    LimitPerSplitOption,
    JsonOption,
    JudgeModelOption,
    JudgeOption,
    LimitOption,
    ModelOption,
    OfflineOption,
    OutOption,
    ReadoutOption,
    RubricOption,
    SeedOption,
    SettingsOption,
    MaxSizeOption,
    SplitOption,
    StacksOption,
)
from defenses.errors import UserError

if TYPE_CHECKING:
    pass


@app.command()
def validate(
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: Annotated[
        list[str] | None,
        typer.Option("--readout", help="As `list readouts` has them, or all; repeatable; by default words."),
    ] = None,
    judge: JudgeOption = "patterns",
    judge_model: JudgeModelOption = None,
    budget: BudgetOption = None,
    rubric: RubricOption = None,
    grade: Annotated[bool, typer.Option("--grade", help="The judge model grades benign answers.")] = False,
    tokens: Annotated[int, typer.Option(help="New tokens of each answer that is judged.")] = 48,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Compare readouts with what the model goes on to say: where to trust them; what answers are worth."""
    wanted = readout or ["words"]
    request = asking.build_run_spec(
        model, data, split, limit, batch_size, device, dtype, seed, offline, attack, wanted
    )
    from analysis import validating
    from analysis.judging import JudgeOptions

    jury = JudgeOptions(judge, judge_model, budget, rubric, grade)
    raise typer.Exit(validating.validate_readouts(request, defense or ["none"], settings or [], out, jury, tokens))


@app.command()
def ensembles(
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    attack: AttackOption = None,
    readout: ReadoutOption = "words",
    size: MaxSizeOption = 2,
    stacks: StacksOption = 5,
    limit: LimitPerSplitOption = None,
    batch_size: BatchSizeOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Which defenses (-d; else all) to combine, and how? All predicted; votes and the best stacks observed.

    analyze ensembles -m smollm2:aligned -d self_reminder -d paraphrase -d policy
    """
    request = asking.build_run_spec(
        model, data, None, limit, batch_size, device, dtype, seed, offline, attack, readout
    )
    asking.check_ensemble_options(size, stacks)
    from analysis import comparing

    names = defense or ["all"]
    raise typer.Exit(comparing.run_ensembles_command(request, names, settings or [], size, stacks, out))


@app.command()
def recommend(
    max_over_refusal: Annotated[
        str, typer.Option(help="Share of benign queries refused, at most: 5% or 0.05.")
    ],
    max_cost: Annotated[
        float | None, typer.Option(help="Time until the first token, times undefended, at most.")
    ] = None,
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    attack: AttackOption = None,
    readout: ReadoutOption = "words",
    size: MaxSizeOption = 2,
    stacks: StacksOption = 5,
    limit: LimitPerSplitOption = None,
    batch_size: BatchSizeOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Which defense, or combination, of those (-d; else all) refuses most harm within limits, and how surely?

    analyze recommend -m smollm2:aligned --max-over-refusal 5% --max-cost 1.5
    """
    request = asking.build_run_spec(
        model, data, None, limit, batch_size, device, dtype, seed, offline, attack, readout
    )
    asking.check_ensemble_options(size, stacks)
    share = asking.parse_share(max_over_refusal)
    if max_cost is not None and not max_cost >= 1:
        raise UserError(f"--max-cost {max_cost:g}: the undefended model costs 1, so it takes 1 or more")
    from analysis import recommending

    limits, names = recommending.RecommendationLimits(share, max_cost), defense or ["all"]
    raise typer.Exit(
        recommending.run_recommend_command(request, names, settings or [], size, stacks, limits, out, as_json)
    )


@app.command()
def mechanism(
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: ReadoutOption = "words",
    sites: Annotated[
        str, typer.Option(help=f"What is patched: {', '.join(asking.PATCH_SITES)}; joined by commas.")
    ] = ",".join(asking.PATCH_SITES),
    top: Annotated[int, typer.Option(help="Parts that are told and drawn; heads that are patched.")] = 10,
    patched: Annotated[
        int, typer.Option(help="Queries, at most, that interventions run on, pairs kept whole; 0: none.")
    ] = 32,
    ensembles: Annotated[
        Path | None,
        typer.Option(help="Folder of `analyze ensembles`: do defenses that use the same parts interact?"),
    ] = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Where in the model does a defense act? Layers, heads and MLPs, and interventions that test them.

    analyze mechanism -d backdoor -m smollm2:attacked
    """
    if not defense:
        raise UserError("which defense? -d NAME (see `analyze list defenses`)")
    chosen = asking.parse_sites([one.strip() for one in sites.split(",") if one.strip()])
    asking.check_mechanism_options(top, patched)
    request = asking.build_run_spec(
        model, data, split, limit, batch_size, device, dtype, seed, offline, attack, readout, needs_linear_readout=True
    )
    from analysis import locating
    from analysis.looking import MechanismOptions

    wanted = MechanismOptions(chosen, top, patched, ensembles)
    raise typer.Exit(locating.run_mechanism_command(request, defense, settings or [], wanted, out))
