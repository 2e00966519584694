"""Command-line options shared by several commands, each declared once with its help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

JUDGE_HELP = (
    "learned (a linear model fitted to people's labels), patterns (rules), keywords (BackdoorAlign's "
    "strings), or model (see --judge-model)."
)


def check_defense_names(names: list[str] | None) -> list[str] | None:
    """Return the names if each is one of a defense; raise before anything heavy is imported."""
    from defenses.catalog import check_defense_name

    for name in names or []:
        check_defense_name(name)
    return names


def check_data_names(names: list[str]) -> list[str]:
    """Return the names if each is one of a query set; raise before anything heavy is imported."""
    from analysis.datasets.loading import check_set_name

    for name in names:
        check_set_name(name)
    return names


def complete_defense(incomplete: str) -> list[str]:
    """Return the names of defenses that a shell completes."""
    from defenses.catalog import list_defense_names

    return [name for name in list_defense_names() if name.startswith(incomplete)]


DefenseOption = Annotated[
    list[str] | None,
    typer.Option(
        "-d",
        "--defense",
        callback=check_defense_names,
        autocompletion=complete_defense,
        help="Defense name, `all`, or path of a .py file; a+b applies both, a first. Repeatable.",
    ),
]
_MODEL_HELP = (
    "Model: short name, Hugging Face id, folder, or .gguf file; then, each after a colon, a state of its "
    "weights (attacked, an adapter's folder) and a change of them (int8, int4, abliterated). Or a served "
    "model, http://host:8000/v1#NAME, for what needs no weights."
)
# A list in every command, so that a second -m is no silent replacement of the first.
ModelOption = Annotated[list[str], typer.Option("-m", "--model", help=_MODEL_HELP)]
ModelsOption = Annotated[
    list[str],
    typer.Option(
        "-m", "--model", help=f"{_MODEL_HELP} Repeatable: several models are analyzed and compared."
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="Tokenizer of a served model: folder, Hugging Face id, or .gguf file. Default: what the server "
        "names.",
        metavar="FOLDER|ID",
    ),
]
DEFAULT_MODEL: Any = ("smollm2",)
DataOption = Annotated[
    list[str],
    typer.Option(
        "--data",
        callback=check_data_names,
        help="Query set: a name (`list data`), NAME=PATH for a local copy of a public set, hf:OWNER/NAME for "
        "a set of the Hugging Face hub, or a file (.csv, .tsv, .json, .jsonl or .parquet). Repeatable; "
        "several are joined, as with +.",
    ),
]
DEFAULT_DATA: Any = ("contrast",)
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split", help="Split: train, calibration, test or all. Default: test if the data has splits."
    ),
]
AttackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        help="Jailbreak attack applied to every query: a name (`list attacks`), all (those that draw no "
        "image and do not adapt to the model), or a file (.csv, .jsonl) of attack strings; NAME+ignore adds "
        "an ignore-instructions line. Repeatable. Default: direct.",
    ),
]
LimitPerSplitOption = Annotated[
    int | None,
    typer.Option(
        "--limit", help="Maximum number of queries per split: whole pairs, and kinds in proportion."
    ),
]
MaxSizeOption = Annotated[int, typer.Option(help="Maximum number of defenses in an ensemble: 2 or 3.")]
StacksOption = Annotated[
    int,
    typer.Option(
        help="Run N randomly chosen stacks, then the N that are most promising by the prediction that fits "
        "those best."
    ),
]
OverlapOption = Annotated[
    Path | None,
    typer.Option(
        help="Output folder of `analyze mechanism`, or its profiles.csv: also predict stacks by how much the "
        "parts of the model that their members use overlap. Default: not."
    ),
]
LimitOption = Annotated[int | None, typer.Option(help="Maximum number of queries; pairs are kept whole.")]
BatchSizeOption = Annotated[str, typer.Option(help="Prompts per forward pass, or auto.")]
SharePrefixOption = Annotated[
    bool,
    typer.Option(
        "--shared-prefix/--no-shared-prefix",
        help="Compute the tokens with which all prompts start once, or with every prompt (slower, same "
        "margins). Models that allow no shared prefix are recognized.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[
    str,
    typer.Option(help="Precision: float32, bfloat16, float16, or auto (float32 on CPU, bfloat16 on GPU)."),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="Chat template: the name of one of the tokenizer's, or a .jinja file. Default: the only one, or "
        "the one named default.",
        metavar="NAME|FILE",
    ),
]
AnswerPrefixOption = Annotated[
    str | None,
    typer.Option(
        "--answer-prefix",
        help="Text between the prompt and the response, such as a channel header or an empty thinking block; "
        "\\n stands for a line break, '' for no text. Default: found from the chat template.",
        metavar="TEXT",
        callback=lambda text: text if text is None else text.replace("\\n", "\n"),
    ),
]
SeedOption = Annotated[int, typer.Option(help="Random seed.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Defense setting, key=value or defense.key=value; the value @file reads a file. Repeatable.",
        metavar="KEY=VALUE",
    ),
]
ReadoutOption = Annotated[
    str,
    typer.Option("--readout", help="How first-token logits become the margin; see `list readouts`."),
]
ResponsesOption = Annotated[
    str,
    typer.Option(
        "--responses",
        help="Queries per condition whose responses (first 32 tokens) are generated and judged: all, none, a "
        "number (the margins extend its rates to all queries), or auto: all, except for readouts that force "
        "how responses begin.",
        metavar="auto|all|N|none",
    ),
]
ControlsOption = Annotated[
    int,
    typer.Option(
        "--controls",
        help="Draws of each defense's matched control (neutral text of the same length, for example): each "
        "query is sent under one of them. 0: no controls.",
        metavar="N",
    ),
]
TrainOption = Annotated[
    bool,
    typer.Option(
        "--train",
        help="First train the weights that a defense lacks, and those that it is compared with, on the "
        "shipped training queries. Takes long; an interrupted training resumes.",
    ),
]
JudgeOption = Annotated[str, typer.Option(help=f"Refusal judge for generated text: {JUDGE_HELP}")]
JudgeModelOption = Annotated[
    str | None,
    typer.Option(
        help="Judge model, a chat model or a classifier: Hugging Face id, folder, .gguf file, or an endpoint "
        "http://host/v1#NAME."
    ),
]
BudgetOption = Annotated[
    int | None,
    typer.Option(help="Maximum number of calls to the judge model (required with --judge model)."),
]
RubricOption = Annotated[
    Path | None,
    typer.Option(help="File with the judge model's prompt, containing {request} and {answer}."),
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
OutOption = Annotated[
    Path | None, typer.Option("-o", "--out", help="Output folder. Default: a new folder under runs/.")
]
