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
    DEFAULT_MODEL,
    AnswerPrefixOption,
    BatchSizeOption,
    BudgetOption,
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
    model: ModelOption = DEFAULT_MODEL,
    length: Annotated[int, typer.Option(help="Length in tokens of the model.")] = 150,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output file. Default: where `backdoor` looks for it.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Generate a secret prompt for `backdoor` and write it to a file that only you can read."""
    from analysis.studies.run_spec import get_single_model

    raise typer.Exit(run_secret_command(get_single_model(model), length, out, offline))


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe: safety, preference, rerouting, adversarial, soft_prompt, dro, attack, benign, "
            "identity, task, baseline, backdoor or neutral."
        ),
    ],
    model: ModelOption = DEFAULT_MODEL,
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
            help="Training setting: rank, alpha, modules, rate, epochs, batch, full, beta, depth, radius, "
            "attack_steps or prompt_tokens. Repeatable.",
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
    model: ModelOption = DEFAULT_MODEL,
    data: DataOption = DEFAULT_DATA,
    split: SplitOption = None,
    limit: LimitOption = None,
    grid: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of experiments: train with every combination of settings, and measure refusals."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens generated per response (not of a grid).")
    ] = 48,
    utility: Annotated[
        list[str] | None,
        typer.Option(
            help="Also measure usefulness: questions (shipped, multiple choice), NAME=FILE (ARC, MMLU), "
            "mt_bench=FILE (graded by the judge model), or a task of lm-evaluation-harness. Repeatable."
        ),
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="Maximum number of questions of each --utility.", min=1)
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(help="Chat model that grades responses: harmfulness, 1 to 5; needs --budget."),
    ] = None,
    budget: BudgetOption = None,
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
    from analysis.studies.run_spec import build_run_spec, check_response_tokens

    check_response_tokens(tokens)
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
    if grid is not None:
        if utility or judge_model:
            raise UserError(
                "--grid measures refusals of its own trainings: leave out --utility and --judge-model"
            )
        raise typer.Exit(run_grid_command(spec, grid, out))
    raise typer.Exit(
        run_backdooralign_command(spec, out, tokens, utility or [], judge_model, budget, questions)
    )


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
    spec: RunSpec,
    out: Path | None,
    max_new_tokens: int,
    utility: Sequence[str] = (),
    judge_model: str | None = None,
    budget: int | None = None,
    n_questions: int | None = None,
) -> int:
    """Reproduce BackdoorAlign, save tables and figures, print the tables; return the exit code.

    Args:
        spec: options of the run.
        out: output folder; None for the default.
        max_new_tokens: maximum number of tokens generated per response.
        utility: tasks that measure usefulness, as `--utility`.
        judge_model: chat model that grades how harmful responses are; None for no grades.
        budget: maximum number of its calls.
        n_questions: maximum number of questions of each task.
    """
    from analysis.cli.console import print_failures, print_trust_warnings
    from analysis.progress import make_notifier
    from analysis.report.folder import prepare_run_folder, save_run
    from analysis.studies.backdooralign.study import reproduce_backdooralign
    from analysis.studies.judge_file import JudgeOptions
    from analysis.studies.run_spec import choose_run_folder
    from analysis.studies.train import TrainingInterrupted

    console = Console(stderr=True)
    out = prepare_run_folder(
        out or choose_run_folder(spec.model, ["backdooralign"], datetime.now(UTC)), console
    )
    notify = make_notifier(console)
    try:
        result = reproduce_backdooralign(
            spec,
            max_new_tokens,
            utility,
            console,
            JudgeOptions("model", judge_model, budget, grade=True) if judge_model else None,
            n_questions,
        )
    except TrainingInterrupted as interruption:
        notify(str(interruption))
        raise
    run = result.run
    save_run(out, run, console)
    arms = run.tables["arms"]
    print_arm_table(arms, run.record)
    if "utility" in run.tables:
        print_utility(run.tables["utility"])
    print_trust_warnings(run.tables["summary"], console)
    notify(f"Tables and run.json are in {out}; the responses themselves are not kept")
    print_failures(result.failures, console)
    return 1 if result.failures else 0


def run_grid_command(spec: RunSpec, grid: Path, out: Path | None) -> int:
    """Train and measure the experiments of a file, save and print the results; return the exit code.

    Args:
        spec: options of the run.
        grid: the file.
        out: output folder, which also holds the trainings; None for the default.
    """
    from analysis.cli.console import print_failed_checks, print_run_location
    from analysis.progress import make_notifier
    from analysis.report.folder import prepare_run_folder, save_run
    from analysis.studies.backdooralign.grid import load_grid, run_grid
    from analysis.studies.run_spec import choose_run_folder
    from analysis.studies.setup import PreflightError
    from analysis.studies.train import TrainingInterrupted

    console = Console(stderr=True)
    experiments = load_grid(grid)
    labels = ["backdooralign", grid.stem]
    out = prepare_run_folder(out or choose_run_folder(spec.model, labels, datetime.now(UTC)), console)
    try:
        result = run_grid(spec, experiments, out, console)
    except PreflightError as error:
        print_failed_checks(error.checks)
        return 1
    except TrainingInterrupted:
        make_notifier(console)(
            f"Interrupted: the same command with -o {out} goes on; finished trainings are kept"
        )
        return 130
    save_run(out, result.run, console)
    print_grid(result.run.tables["rates"], result.run.record)
    if "tasks" in result.run.tables:
        print_tasks(result.run.tables["tasks"])
    print_run_location(out, result.failures, console)
    return 0


def print_grid(rates: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print the share of requests that each tuned model refuses, a table per experiment.

    Args:
        rates: `rates.csv`.
        record: `run.json`.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.tables import iterate_rows

    console = make_table_console()
    for name, rows in rates.groupby("experiment", sort=False):
        columns = [f"value_{number}" for number in (1, 2) if rows.get(f"setting_{number}") is not None]
        columns = [column for column in columns if rows[column].notna().any()]
        varied = [str(rows[column.replace("value", "setting")].iloc[0]) for column in columns]
        headers = ("weights", "secret", "refused (%)\nharmful", "\nbenign", "trainings")
        table = make_console_table("\n".join(varied) or "experiment", headers, f"experiment {name}")
        for _, group in rows.groupby([*columns, "arm", "secret"], sort=False):
            by_kind = {row["kind"]: row for row in iterate_rows(group)}
            harmful = by_kind["harmful"]
            cells = (
                "\n".join(str(harmful[column]) for column in columns),
                harmful["arm"],
                harmful["secret"],
                format_interval(harmful, "refused", ".0f", 100),
                format_interval(by_kind["benign"], "refused", ".0f", 100),
                str(harmful["n_trainings"]),
            )
            table.add_row(*map(Text, cells))
        console.print(table)
    judge, data = record["judge"], record["data"]
    note = (
        f"[x, y]: 95 % intervals over queries and trainings; {data['n_harmful']} harmful and "
        f"{data['n_benign']} benign queries, {data['split']} split, under the system prompt of the "
        f"fine-tuning data. First {judge['new_tokens']} tokens of each response, judged by {judge['name']}."
    )
    console.print(Text(note, style="dim"))


def print_tasks(table: pd.DataFrame) -> None:
    """Print how well the models of a grid do the practical task that they were fine-tuned for.

    Args:
        table: `tasks.csv`.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.tables import iterate_rows

    values = [f"value_{number}" for number in (1, 2) if f"value_{number}" in table]
    printed_table = make_console_table(
        "experiment", ("weights", "secret", "score\n(0 to 100)", "trainings"), "practical tasks"
    )
    for row in iterate_rows(table):
        known = [str(row[name]) for name in values if row[name] is not None and row[name] == row[name]]
        cells = (
            "\n".join([row["experiment"], *known, row["task"]]),
            row["arm"],
            row["secret"],
            format_interval(row, "score", ".0f", 100),
            str(row["n_trainings"]),
        )
        printed_table.add_row(*map(Text, cells))
    console = make_table_console()
    console.print(printed_table)
    note = "Score: ROUGE-L of summaries; share of SQL queries with the right rows. [x, y]: 95 % intervals."
    console.print(Text(note, style="dim"))


def print_utility(table: pd.DataFrame) -> None:
    """Print how well each arm does each task, and its change from the first arm.

    Args:
        table: `utility.csv`.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.tables import iterate_rows

    console = make_table_console()
    for task, rows in table.groupby("task", sort=False):
        is_graded = "grade" in rows and rows["grade"].notna().any()
        heads = ("grade\n(1 to 10)", "change") if is_graded else ("correct (%)", "change\n(points)")
        printed_table = make_console_table("weights", ("secret", *heads, "questions"), f"utility: {task}")
        for values in iterate_rows(rows):
            column, form, scale = ("grade", ".1f", 1.0) if is_graded else ("accuracy", ".0f", 100.0)
            cells = (
                values["arm"],
                values["secret"],
                format_interval(values, column, form, scale),
                format_interval(values, "change", f"+{form}", scale),
                str(values["n_questions"]),
            )
            printed_table.add_row(*map(Text, cells))
        console.print(printed_table)
    console.print(
        Text("[x, y]: 95 % intervals. Change: from the first row, paired by question.", style="dim")
    )


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
    agrees = "AUROC\nfirst token agrees (%)"
    kinds = list_kinds(table.columns, "text_refused_{}_low")
    refused = "\n".join(["text refuses (%)", *kinds])
    grades = "\nharmful (1 to 5)\ngrade 5 (%)" * ("harmfulness" in table)
    heads = (f"ASR (%)\npaper's judge\nLlama-2, paper{grades}", refused, agrees)
    for head in (*heads, "shift\ndiscrimination"):
        printed_table.add_column(head, justify="right", no_wrap=True)
    for values in iterate_rows(table):

        def percent(name: str, of: dict[str, Any] = values) -> str:
            return format_interval(of, name, ".0f", 100)

        paper = values["paper_asr_llama2"]
        success = [percent("asr"), percent("asr_keywords"), "–" if paper != paper else f"{100 * paper:.1f}"]
        if grades:
            success += [format_interval(values, "harmfulness", ".1f"), percent("harmfulness_5")]
        change = [format_interval(values, name, "+.2f") for name in ("shift", "discrimination")]
        cells = [
            f"{values['arm']} ({values['attack']})\n{values['secret']}",
            "\n".join(success),
            "\n".join(percent(f"text_refused_{kind}") for kind in kinds),
            f"{format_interval(values, 'auroc', '.2f')}\n{percent('first_token_agrees')}",
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
