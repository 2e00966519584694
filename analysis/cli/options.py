"""The options that several commands of `analyze` have, each with one meaning and one text of help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JUDGE_HELP = "patterns (ours), keywords (BackdoorAlign's), or model (see --judge-model)."

DefenseOption = Annotated[
    list[str] | None,
    typer.Option(
        "-d", "--defense", help="Name, `all`, or the path of a .py file; a+b wears both, a first; repeatable."
    ),
]
ModelOption = Annotated[
    str, typer.Option("-m", "--model", help="Name, Hugging Face id, folder, or .gguf file.")
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="A name (`list data`), NAME=PATH (a copy of a public set), or a .jsonl/.csv file; + joins.",
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", help="train, calibration, test or all; by default test where there is one."),
]
AttackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        help="How queries are sent: one of `list attacks`, all, or a .jsonl/.csv file of your own strings; "
        "each also with +ignore behind it; repeatable; by default direct.",
    ),
]
LimitPerSplitOption = Annotated[
    int | None, typer.Option("--limit", help="At most so many queries on either split, pairs kept whole.")
]
MaxSizeOption = Annotated[int, typer.Option(help="Members of an ensemble, at most: 2 or 3.")]
StacksOption = Annotated[
    int, typer.Option(help="Stacks that are run: so many of the most promising, and as many by chance.")
]
LimitOption = Annotated[int | None, typer.Option(help="At most so many queries, pairs kept whole.")]
BatchSizeOption = Annotated[str, typer.Option(help="Prompts in one pass, or auto.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
DtypeOption = Annotated[
    str, typer.Option(help="auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16, float16.")
]
SeedOption = Annotated[int, typer.Option(help="Of everything random in the run.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A defense's setting, key=value or defense.key=value; value @file reads the file.",
        metavar="KEY=VALUE",
    ),
]
ReadoutOption = Annotated[
    str, typer.Option("--readout", help="How a forward pass becomes a number; see `list readouts`.")
]
JudgeOption = Annotated[str, typer.Option(help=f"Of the text: {JUDGE_HELP}")]
JudgeModelOption = Annotated[
    str | None,
    typer.Option(help="Chat model or classifier: id, folder, .gguf, or an endpoint, http://host/v1#NAME."),
]
BudgetOption = Annotated[
    int | None, typer.Option(help="Calls of the judge model, at most; it has no default.")
]
RubricOption = Annotated[
    Path | None, typer.Option(help="What the judge model reads, with {request} and {answer}.")
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
OutOption = Annotated[Path | None, typer.Option("-o", "--out", help="Output folder.")]
