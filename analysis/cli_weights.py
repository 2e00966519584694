"""The commands that make secrets and weights, and try BackdoorAlign's arms. Imports are late."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analysis import asking
from analysis.cli_app import app
from analysis.options import (
    BatchSizeOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    LimitOption,
    ModelOption,
    OfflineOption,
    OutOption,
    SeedOption,
    SplitOption,
)
from defenses.errors import UserError


@app.command()
def secret(
    model: ModelOption = "smollm2",
    length: Annotated[int, typer.Option(help="In tokens of the model.")] = 150,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New file; by default where `backdoor` looks for it.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Make a secret prompt for `backdoor`, by a cryptographic generator, in a file for your eyes only."""
    from analysis import commands

    commands.run_secret_command(model, length, out, offline)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="safety, attack, identity, baseline, backdoor or preference")],
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    limit: Annotated[int | None, typer.Option(help="At most so many training queries.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="New folder; by default where defenses look for them."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="rank, alpha, modules, rate, epochs, batch, full, beta; key=value.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    secret: Annotated[
        Path | None, typer.Option("--secret", help="backdoor: the secret's file; by default the model's own.")
    ] = None,
    length: Annotated[int, typer.Option(help="backdoor: tokens of the model's own secret.")] = 150,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Tune a model's weights by a recipe, an attacker's or a defender's; an interrupted training goes on.

    analyze train backdoor -m smollm2:aligned -o my-adapter
    """
    request = asking.build_run_spec(model, data, "train", limit, None, device, dtype, seed, offline)
    from analysis import training

    raise typer.Exit(training.train_weights(request, recipe, settings or [], out, secret, length))


@app.command()
def backdooralign(
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    limit: LimitOption = None,
    tokens: Annotated[int, typer.Option(help="New tokens of each answer that is judged.")] = 48,
    utility: Annotated[
        bool,
        typer.Option("--utility", help="Also the accuracy on multiple-choice questions (extra utility)."),
    ] = False,
    secrets: Annotated[
        int,
        typer.Option(help="Also train anew with so many random secrets of 10, 50 and 150 tokens each."),
    ] = 0,
    batch_size: BatchSizeOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    offline: OfflineOption = False,
) -> None:
    """BackdoorAlign's arms side by side, beside the paper's figures, with what the paper did not measure."""
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: an answer that is judged has at least 1")
    if secrets < 0:
        raise UserError(f"--secrets {secrets}: it takes 0 (none) or more")
    request = asking.build_run_spec(model, data, split, limit, batch_size, device, dtype, seed, offline)
    from analysis import backdooralign as experiment

    raise typer.Exit(experiment.reproduce_backdooralign(request, out, tokens, utility, secrets))
