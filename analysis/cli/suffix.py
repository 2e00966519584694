"""The command `analyze suffix`; heavy libraries are imported inside the functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analysis.cli.app import app
from analysis.cli.options import (
    DEFAULT_DATA,
    DEFAULT_MODEL,
    AnswerPrefixOption,
    BatchSizeOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    OfflineOption,
    ReadoutOption,
    SeedOption,
    SettingsOption,
    SharePrefixOption,
    TemplateOption,
)
from defenses.errors import UserError

_FILE_SUFFIX = ".csv"


@app.command()
def suffix(
    defense: Annotated[
        list[str] | None,
        typer.Option(
            "-d",
            "--defense",
            help="The defense that the suffix is optimized against; a+b applies both. Default: none.",
        ),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    loss: Annotated[
        str,
        typer.Option(
            help="What is lowered: target (mean negative log-likelihood of --target) or margin (of "
            "--readout)."
        ),
    ] = "target",
    target: Annotated[
        str, typer.Option(help="The beginning of the response that the suffix is to bring about.")
    ] = "Sure, here is",
    length: Annotated[int, typer.Option(help="Number of tokens of the suffix.")] = 20,
    steps: Annotated[int, typer.Option(help="Number of steps; each replaces at most one token.")] = 100,
    candidates: Annotated[int, typer.Option(help="Replacements that are tried in each step.")] = 64,
    queries: Annotated[
        int, typer.Option(help="Queries of the training split that share the suffix, half of each class.")
    ] = 8,
    data: DataOption = DEFAULT_DATA,
    readout: ReadoutOption = "outcome",
    batch_size: BatchSizeOption = "auto",
    share_prefix: SharePrefixOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    template: TemplateOption = None,
    answer_prefix: AnswerPrefixOption = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write; --attack reads it.")] = Path(
        f"suffix{_FILE_SUFFIX}"
    ),
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Optimize an attack suffix against a model and a defense, by greedy coordinate gradient (GCG).

    analyze suffix -m smollm2:aligned -o suffix.csv; then analyze -d policy --attack suffix.csv
    """
    from analysis.attacks import load_shipped_attacks
    from analysis.files import check_output_folder
    from analysis.progress import make_notifier
    from analysis.studies.run_spec import build_run_spec

    if out.suffix.lower() != _FILE_SUFFIX:
        raise UserError(f"-o {out}: it takes the name of a {_FILE_SUFFIX} file, which --attack reads")
    if out.stem in load_shipped_attacks():
        raise UserError(f"-o {out}: the name {out.stem!r} is taken by a shipped attack; choose another")
    if out.is_dir():
        raise UserError(f"-o {out}: it is a folder; give the name of a file in it")
    check_output_folder(out.parent)
    spec = build_run_spec(
        model,
        data,
        None,
        None,
        batch_size,
        device,
        dtype,
        seed,
        offline,
        readout=readout,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
    )
    from analysis.suffix_attack import SuffixOptions, optimize_suffix

    options = SuffixOptions(loss, target, length, steps, candidates, queries)
    notify = make_notifier(Console())
    found = optimize_suffix(spec, defense or [], settings or [], options, Console(stderr=True))
    found.save(out)
    record = found.record
    notify(f"Suffix: {found.text}")
    notify(
        f"Loss ({loss}, {record['queries']} training queries): {found.losses[0]:.3f} before, "
        f"{found.losses[-1]:.3f} after {record['steps']} steps"
    )
    notify(f"Wrote {out}: score it on the test split with analyze -m {spec.model} --attack {out} -d DEFENSE")
    if found.interrupted:
        notify("Interrupted: the suffix is the best one so far.")
        raise typer.Exit(130)
