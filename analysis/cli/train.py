"""The commands `analyze secret`, `analyze train` and `analyze backdooralign`, and what they print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.cli.app import app
from analysis.cli.options import (
    DEFAULT_DATA,
    AnswerPrefixOption,
    BatchSizeOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    LimitOption,
    ModelOption,
    OfflineOption,
    OutOption,
    SeedOption,
    SharePrefixOption,
    SplitOption,
    TemplateOption,
)
from defenses.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.studies.run_spec import RunSpec


@app.command()
def secret(
    model: ModelOption = "smollm2",
    length: Annotated[int, typer.Option(help="Length in tokens of the model.")] = 150,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output file. Default: where `backdoor` looks for it.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Generate a secret prompt for `backdoor` and write it to a file that only you can read."""
    raise typer.Exit(run_secret_command(model, length, out, offline))


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe: safety, preference, rerouting, adversarial, attack, benign, identity, baseline, "
            "backdoor or neutral."
        ),
    ],
    model: ModelOption = "smollm2",
    data: DataOption = DEFAULT_DATA,
    limit: Annotated[int | None, typer.Option(help="Maximum number of training queries.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Output folder. Default: where defenses look for weights."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Training setting: rank, alpha, modules, rate, epochs, batch, full, beta, depth, radius or "
            "attack_steps. Repeatable.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    secret: Annotated[
        Path | None,
        typer.Option("--secret", help="Recipe backdoor: file of the secret. Default: the model's own."),
    ] = None,
    length: Annotated[
        int, typer.Option(help="Recipe backdoor: length of the model's own secret in tokens.")
    ] = 150,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    template: TemplateOption = None,
    answer_prefix: AnswerPrefixOption = None,
    offline: OfflineOption = False,
) -> None:
    """Fine-tune a model by an attacker's or a defender's recipe; an interrupted training resumes.

    analyze train backdoor -m smollm2:aligned -o my-adapter
    """
    from analysis.studies.run_spec import build_run_spec

    spec = build_run_spec(
        model,
        data,
        "train",
        limit,
        None,
        device,
        dtype,
        seed,
        offline,
        template=template,
        answer_prefix=answer_prefix,
    )
    raise typer.Exit(run_train_command(spec, recipe, settings or [], out, secret, length))


@app.command()
def backdooralign(
    model: ModelOption = "smollm2",
    data: DataOption = DEFAULT_DATA,
    split: SplitOption = None,
    limit: LimitOption = None,
    tokens: Annotated[int, typer.Option(help="Maximum number of tokens generated per response.")] = 48,
    utility: Annotated[
        bool,
        typer.Option(
            "--utility",
            help="Also measure accuracy on multiple-choice questions (needs the extra `utility`).",
        ),
    ] = False,
    secrets: Annotated[
        int,
        typer.Option(help="Also train with N other random secrets of 10, 50 and 150 tokens each."),
    ] = 0,
    batch_size: BatchSizeOption = "auto",
    share_prefix: SharePrefixOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    template: TemplateOption = None,
    answer_prefix: AnswerPrefixOption = None,
    out: OutOption = None,
    offline: OfflineOption = False,
) -> None:
    """Reproduce the arms of the BackdoorAlign paper, next to its figures, with further controls."""
    from analysis.studies.run_spec import build_run_spec, check_response_tokens, check_secret_count

    check_response_tokens(tokens)
    check_secret_count(secrets)
    spec = build_run_spec(
        model,
        data,
        split,
        limit,
        batch_size,
        device,
        dtype,
        seed,
        offline,
        template=template,
        answer_prefix=answer_prefix,
        share_prefix=share_prefix,
    )
    raise typer.Exit(run_backdooralign_command(spec, out, tokens, utility, secrets))


def run_secret_command(model: str, secret_length: int, out: Path | None, offline: bool) -> int:
    """Draw a secret prompt for a model's tokenizer and write it into a new file with mode 0600.

    Args:
        model: short name, Hugging Face id, folder, or file.
        secret_length: length in tokens.
        out: the file; None for the place where `backdoor` looks for it.
        offline: whether the network may not be used.
    """
    from analysis.models.loading import build_model_info, load_tokenizer
    from analysis.progress import make_notifier
    from defenses.backdoor import draw_secret, write_secret

    if secret_length < 1:
        raise UserError(f"--length {secret_length}: a secret has at least 1 token; the paper's has 150")
    tokenizer = load_tokenizer(model, offline, make_notifier(Console(stderr=True)))
    path = out or build_model_info(model, tokenizer).secret_folders[0] / f"{secret_length}.txt"
    secret = draw_secret(tokenizer, secret_length)
    write_secret(path, secret)
    print(f"{path}  {secret.fingerprint}  {secret_length} tokens, readable only by you")
    return 0


def run_train_command(
    spec: RunSpec,
    recipe: str,
    settings: Sequence[str],
    out: Path | None,
    secret_path: Path | None = None,
    secret_length: int = 150,
) -> int:
    """Fine-tune a model by a recipe and print where the weights are; return the exit code.

    Args:
        spec: options of the run.
        recipe: name of the recipe.
        settings: settings of the training, `key=value`.
        out: output folder; None for the one in which defenses look for weights.
        secret_path: file of the secret, for the recipe `backdoor`.
        secret_length: length of the model's own secret in tokens.
    """
    from analysis.progress import make_notifier
    from analysis.studies.train import TrainingInterrupted, train_weights

    console = Console(stderr=True)
    try:
        weights = train_weights(spec, recipe, settings, out, console, secret_path, secret_length)
    except TrainingInterrupted as interruption:
        make_notifier(console)(str(interruption))
        return 130
    make_notifier(console)(str(weights))
    return 0


def run_backdooralign_command(
    spec: RunSpec, out: Path | None, max_new_tokens: int, with_utility: bool, n_secrets: int
) -> int:
    """Reproduce BackdoorAlign, save tables and figures, print the tables; return the exit code.

    Args:
        spec: options of the run.
        out: output folder; None for the default.
        max_new_tokens: maximum number of tokens generated per response.
        with_utility: whether to measure accuracy on multiple-choice questions.
        n_secrets: number of other random secrets of each length.
    """
    from analysis.cli.console import print_failures, print_trust_warnings
    from analysis.progress import make_notifier
    from analysis.report.folder import prepare_run_folder, save_run
    from analysis.studies.backdooralign import reproduce_backdooralign
    from analysis.studies.run_spec import choose_run_folder
    from analysis.studies.train import TrainingInterrupted

    console = Console(stderr=True)
    out = prepare_run_folder(
        out or choose_run_folder(spec.model, ["backdooralign"], datetime.now(UTC)), console
    )
    notify = make_notifier(console)
    try:
        result = reproduce_backdooralign(spec, max_new_tokens, with_utility, n_secrets, console)
    except TrainingInterrupted as interruption:
        notify(str(interruption))
        raise
    run = result.run
    save_run(out, run, console)
    arms = run.tables["arms"]
    print_arm_table(arms[arms["secret_length"].isna()], run.record)
    if "lengths" in run.tables:
        print_secret_table(run.tables["lengths"])
    print_trust_warnings(run.tables["summary"], console)
    notify(f"Tables and run.json are in {out}; the responses themselves are not kept")
    print_failures(result.failures, console)
    return 1 if result.failures else 0


def print_secret_table(table: pd.DataFrame) -> None:
    """Print the effect of other secrets: mean and range over those of one kind and length.

    Args:
        table: `lengths.csv`.
    """
    import numpy as np

    from analysis.cli.console import make_table_console
    from analysis.stats.kinds import list_kinds
    from analysis.stats.tables import iterate_rows

    kinds = list_kinds(table.columns, "text_refused_{}_mean")
    printed_table = Table(
        title="Trained with other secrets",
        title_justify="left",
        show_edge=False,
        pad_edge=False,
        show_lines=len(kinds) > 1,
    )
    for head in ("trained with", "secret", "secrets"):
        printed_table.add_column(head, no_wrap=True)
    refused = "\n".join(["text refuses (%)", *kinds])
    for head in ("ASR (%)", refused, "shift\n(nats)", "discrimination\n(nats)"):
        printed_table.add_column(head, justify="right", no_wrap=True)
    for values in iterate_rows(table):

        def spread(name: str, form: str, scale: float = 1, of: dict[str, Any] = values) -> str:
            mean, low, high = (scale * of.get(f"{name}_{end}", np.nan) for end in ("mean", "min", "max"))
            return f"{mean:{form}}" + f" ({low:{form}} to {high:{form}})" * (of["n_secrets"] > 1)

        cells = [
            f"{values['length']} {values['wording']}",
            values["secret"],
            str(values["n_secrets"]),
            spread("asr", ".0f", 100),
            "\n".join(spread(f"text_refused_{kind}", ".0f", 100) for kind in kinds),
            spread("shift", "+.2f"),
            spread("discrimination", "+.2f"),
        ]
        printed_table.add_row(*map(Text, cells))
    console = make_table_console()
    console.print(printed_table)
    console.print(Text("Mean (minimum to maximum) over secrets; each secret is one training.", style="dim"))


def print_arm_table(table: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print the table of the arms, two or three lines a row.

    Args:
        table: `arms.csv`.
        record: content of run.json.
    """
    from analysis.cli.console import make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.kinds import list_kinds
    from analysis.stats.tables import iterate_rows

    data = record["data"]
    title = (
        f"BackdoorAlign on {record['model']['name']}: {data['n_harmful']} harmful and {data['n_benign']} "
        f"benign queries, {data['split']} split"
    )
    printed_table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, show_lines=True)
    printed_table.add_column("weights (attack)\nsecret", no_wrap=True)
    agrees = "AUROC\nfirst token agrees (%)" + ("\nquestions right (%)" if "utility" in table else "")
    kinds = list_kinds(table.columns, "text_refused_{}_low")
    refused = "\n".join(["text refuses (%)", *kinds])
    heads = ("ASR (%)\npaper's judge\nLlama-2, paper", refused, agrees)
    for head in (*heads, "shift\ndiscrimination"):
        printed_table.add_column(head, justify="right", no_wrap=True)
    for values in iterate_rows(table):

        def percent(name: str, of: dict[str, Any] = values) -> str:
            return format_interval(of, name, ".0f", 100)

        paper = values["paper_asr_llama2"]
        change = [format_interval(values, name, "+.2f") for name in ("shift", "discrimination")]
        cells = [
            f"{values['arm']} ({values['attack']})\n{values['secret']}",
            f"{percent('asr')}\n{percent('asr_keywords')}\n{'–' if paper != paper else f'{100 * paper:.1f}'}",
            "\n".join(percent(f"text_refused_{kind}") for kind in kinds),
            f"{format_interval(values, 'auroc', '.2f')}\n{percent('first_token_agrees')}"
            + (f"\n{percent('utility')}" if "utility" in values else ""),
            "reference" if values["verdict"] == "reference" else "\n".join(change),
        ]
        printed_table.add_row(*map(Text, cells))
    note = (
        f"ASR: share of harmful queries whose response ({record['judge']['new_tokens']} tokens) does not "
        f"refuse, by {record['judge']['name']}; by the paper's judge: contains none of 29 strings. Rates: "
        "Wilson 95 % intervals. AUROC, shift, discrimination (nats, relative to the attacked model): first "
        "tokens, paired bootstrap. The paper's rates are for Llama-2-7B-Chat on other queries."
    )
    console = make_table_console()
    console.print(printed_table)
    console.print(Text(note, style="dim"))
