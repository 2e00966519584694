"""The commands `analyze validate` and `analyze judge`, and the tables that they print."""

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
    AttackOption,
    BatchSizeOption,
    BudgetOption,
    DataOption,
    DefenseOption,
    DeviceOption,
    DtypeOption,
    JudgeModelOption,
    JudgeOption,
    LimitOption,
    ModelOption,
    OfflineOption,
    OutOption,
    RubricOption,
    SeedOption,
    SettingsOption,
    SharePrefixOption,
    SplitOption,
    TemplateOption,
    TokenizerOption,
)
from defenses.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.studies.judge_file import JudgeOptions, SampleOptions
    from analysis.studies.run_spec import RunSpec


@app.command()
def validate(
    defense: DefenseOption = None,
    model: ModelOption = DEFAULT_MODEL,
    data: DataOption = DEFAULT_DATA,
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: Annotated[
        list[str] | None,
        typer.Option(
            "--readout", help="Readout: a name (`list readouts`) or all. Repeatable. Default: outcome."
        ),
    ] = None,
    judge: JudgeOption = "learned",
    judge_model: JudgeModelOption = None,
    budget: BudgetOption = None,
    rubric: RubricOption = None,
    grade: Annotated[
        bool,
        typer.Option("--grade", help="Have the judge model also grade responses: harmfulness, helpfulness."),
    ] = False,
    tokens: Annotated[int, typer.Option(help="Maximum number of tokens generated per response.")] = 48,
    samples: Annotated[
        int, typer.Option(help="Number of sampled responses to each query, judged besides the greedy one.")
    ] = 0,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampled responses.")] = 1.0,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "auto",
    share_prefix: SharePrefixOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    template: TemplateOption = None,
    answer_prefix: AnswerPrefixOption = None,
    tokenizer: TokenizerOption = None,
    out: OutOption = None,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Validate readouts against generated text, and rate the quality of the responses."""
    from analysis.studies.run_spec import build_run_spec, check_response_tokens

    readouts = readout or ["outcome"]
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
        attack,
        readouts,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
        allows_served=True,
        tokenizer=tokenizer,
    )
    check_response_tokens(tokens)
    from analysis.studies.judge_file import JudgeOptions, SampleOptions

    sample_options = SampleOptions(samples, temperature) if samples else None
    judge_options = JudgeOptions(judge, judge_model, budget, rubric, grade)
    raise typer.Exit(
        run_validate_command(
            spec, defense or ["none"], settings or [], out, judge_options, tokens, sample_options
        )
    )


@app.command()
def judge(
    file: Annotated[
        Path, typer.Argument(help="A .csv, .tsv, .json, .jsonl or .parquet file with responses.")
    ],
    column: Annotated[str, typer.Option(help="Name of the column with the responses.")] = "response",
    request: Annotated[
        str | None,
        typer.Option(help="Name of the column with the queries; off-topic responses then count as refusals."),
    ] = None,
    judge: JudgeOption = "learned",
    judge_model: JudgeModelOption = None,
    budget: BudgetOption = None,
    rubric: RubricOption = None,
    grade: Annotated[
        bool,
        typer.Option("--grade", help="Have the judge model also grade how harmful each response is, 1 to 5."),
    ] = False,
    labels: Annotated[
        str | None,
        typer.Option(help="Name of a column with people's grades, 1 to 5, to compare the judge's with."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output file. Default: FILE.judged.csv or .jsonl.")
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Judge whether each response in a file refuses (full, partial, none), and show the deciding words."""
    from analysis.studies.judge_file import JudgeOptions

    judge_options = JudgeOptions(judge, judge_model, budget, rubric, grade)
    raise typer.Exit(run_judge_command(file, column, request, judge_options, out, offline, labels))


def run_validate_command(
    spec: RunSpec,
    defenses: Sequence[str],
    settings: Sequence[str],
    out: Path | None,
    judge_options: JudgeOptions,
    max_new_tokens: int,
    samples: SampleOptions | None = None,
) -> int:
    """Validate readouts, save tables and figures, print the tables; return the exit code.

    Args:
        spec: options of the run.
        defenses: names of defenses.
        settings: settings of the defenses, `key=value`.
        out: output folder; None for the default.
        judge_options: the judge of the responses.
        max_new_tokens: maximum number of tokens generated per response.
        samples: how many responses are sampled besides the greedy one; None for none.
    """
    from analysis.cli.console import print_failed_checks, print_failures
    from analysis.progress import make_notifier
    from analysis.report.folder import prepare_run_folder, save_run
    from analysis.studies.run_spec import choose_run_folder
    from analysis.studies.setup import PreflightError
    from analysis.studies.validate import validate_readouts

    console = Console(stderr=True)
    out = prepare_run_folder(
        out or choose_run_folder(spec.model, ["validate", *defenses], datetime.now(UTC)), console
    )
    try:
        result = validate_readouts(spec, defenses, settings, judge_options, max_new_tokens, console, samples)
    except PreflightError as error:
        print_failed_checks(error.checks)
        return 1
    run, notify = result.run, make_notifier(console)
    save_run(out, run, console)
    print_validity(run.tables["validity"], run.record)
    print_response_quality(run.tables["worth"], judge_options.name, max_new_tokens)
    if samples and "sampling" in run.tables:
        print_sampled_rates(run.tables["sampling"], samples.temperature)
    if reasons := result.unjudged_reasons:
        notify(f"{len(reasons)} responses have no verdict and count nowhere; mostly: {_most_common(reasons)}")
    notify(f"Tables, figures and run.json are in {out}; the responses themselves are not kept")
    print_failures(result.failures, console)
    if result.stop_reason is not None:
        n_finished = len(run.tables["worth"])
        n_wanted = run.record["conditions_wanted"]
        notify(f"Interrupted: {n_finished} of {n_wanted} conditions were finished and kept.")
        if isinstance(result.stop_reason, UserError):
            raise result.stop_reason
        return 130
    return 1 if result.unjudged_reasons or result.failures else 0


def run_judge_command(
    path: Path,
    response_column: str,
    query_column: str | None,
    judge_options: JudgeOptions,
    out: Path | None,
    offline: bool = False,
    label_column: str | None = None,
) -> int:
    """Judge the responses in a file, write them with their verdicts, print the shares; return the exit code.

    Responses that the judge left without a verdict are written as well; the same command on the new file
    judges only those.

    Args:
        path: a file with one response per row.
        response_column: column with the responses.
        query_column: column with the queries, with which off-topic responses are recognized.
        judge_options: the judge.
        out: a new file of the same format; None for the default beside the input.
        offline: whether the network may not be used.
        label_column: column with people's grades of harmfulness.
    """
    from analysis.progress import make_notifier
    from analysis.studies.judge_file import choose_judged_path, judge_file

    out = choose_judged_path(path, out)
    console = Console(stderr=True)
    notify = make_notifier(console)
    judged = judge_file(path, response_column, query_column, judge_options, console, offline, label_column)
    judged.write_records(out)
    print_verdict_shares([str(record["refusal"]) for record in judged.records], judged.judge_name)
    if judged.harmfulness:
        print(describe_harmfulness(judged.harmfulness))
    notify(f"The verdicts are in {out}")
    reasons = judged.unjudged_reasons
    if reasons:
        notify(
            f"{len(reasons)} responses have no verdict, mostly: {_most_common(reasons)}. `analyze judge "
            f"{out}` with the same options judges only those."
        )
    return 130 if "interrupted" in reasons else 1 if reasons else 0


def _most_common(reasons: Sequence[str]) -> str:
    return max(set(reasons), key=reasons.count)


def describe_harmfulness(summary: Mapping[str, Any]) -> str:
    """Return the mean grade, the share of 5, and the agreement with people's grades, in one line.

    Args:
        summary: from `JudgedResponses.harmfulness`.
    """
    from analysis.stats.format import format_interval

    if not summary["n_harmfulness"]:
        return "Harmfulness: the judge gave no grade."
    text = (
        f"Harmfulness (1 to 5): mean {format_interval(summary, 'harmfulness', '.2f')}, grade 5 "
        f"{format_interval(summary, 'harmfulness_5', '.0f', 100)} %, {summary['n_harmfulness']} responses."
    )
    if summary.get("n_labeled"):
        text += (
            f" Against {summary['n_labeled']} grades by people: equal "
            f"{format_interval(summary, 'grades_equal', '.0f', 100)} %, weighted kappa "
            f"{format_interval(summary, 'grade_kappa', '.2f')}."
        )
    return text


def print_verdict_shares(refusals: list[str], judge_name: str) -> None:
    """Print the share of each verdict among the responses that have one.

    Args:
        refusals: the column `refusal`.
        judge_name: name of the judge.
    """
    from analysis.cli.console import make_table_console
    from analysis.judges.judge import REFUSAL_KINDS
    from analysis.stats.bootstrap import make_rate_columns
    from analysis.stats.format import format_interval

    n = sum(refusal in REFUSAL_KINDS for refusal in refusals)
    printed_table = Table(show_edge=False)
    for head in ("refusal", "responses", "share (%)"):
        printed_table.add_column(head, justify="left" if head == "refusal" else "right")
    for kind in REFUSAL_KINDS:
        share = format_interval(make_rate_columns("share", refusals.count(kind), n), "share", ".1f", 100)
        printed_table.add_row(kind, str(refusals.count(kind)), share)
    console = make_table_console()
    console.print(Text(f"{n} responses, judge: {judge_name}"))
    console.print(printed_table)
    console.print(Text("Wilson 95 % intervals.", style="dim"))


def print_validity(validity: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print the agreement of each readout with the text, three lines a condition, and the trust in it.

    Args:
        validity: `validity.csv`.
        record: `run.json`.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.report.headline import describe_readout_trust
    from analysis.stats.agreement import RESPONSES_READOUT, TRUST_RULE
    from analysis.stats.format import Interval, format_interval
    from analysis.stats.tables import format_condition, iterate_rows

    data = record["data"]
    title = (
        f"{record['model']['name']}: readouts against the text of {data['n_harmful'] + data['n_benign']} "
        f"responses per condition, judge {record['judge']['name']}"
    )
    heads = (
        "single queries\nrates\nn per class for rates",
        "refused, text (%)\nby readout\nagrees",
        "AUROC\nkappa\ncalibration error",
        "rate error (points)\nharmful\nbenign",
        "threshold\nneeded\ncoverage",
    )
    printed_table = make_console_table("defense\nreadout", heads, title)
    for values in iterate_rows(validity):
        n = max(values["n"], 1)
        needed = Interval(values["n_needed"]).format_text(",.0f")
        refused, readout_refused = (
            f"{100 * values[count] / n:.0f}" for count in ("refused", "readout_refused")
        )
        thresholds = [
            Interval(values[name]).format_text("+.2f") for name in ("threshold", "needed_threshold")
        ]
        agrees, coverage = (
            format_interval(values, "agrees", ".0f", 100),
            Interval(values["coverage"]).format_text(".0%"),
        )
        cells = [
            [format_condition(values), values["readout"]],
            [values["trusted"], values["rate_trusted"], needed],
            [refused, readout_refused, agrees],
            [format_interval(values, name, ".2f") for name in ("auroc", "kappa", "calibration_error")],
            [
                "",
                *(
                    format_interval(values, f"rate_error_{name}", "+.0f", 100)
                    for name in ("harmful", "benign")
                ),
            ],
            [*thresholds, coverage],
        ]
        printed_table.add_row(*(Text("\n".join(lines)) for lines in cells), end_section=True)
    console = make_table_console()
    console.print(printed_table)
    note = (
        f"{TRUST_RULE[0].upper()}{TRUST_RULE[1:]}. n per class for rates: how many queries of each class "
        "would decide, if only their number is missing. Needed: the threshold (nats) at which the readout "
        "would refuse as often as the text of this condition."
    )
    if RESPONSES_READOUT in set(validity["readout"]):
        openings = record["openings"]
        note += (
            f" Readout {RESPONSES_READOUT}: the judge {openings['judge']['name']}, which reads only the "
            f"first {openings['new_tokens']} tokens, as `analyze` does."
        )
    console.print(Text(note, style="dim"))
    for clause in describe_readout_trust(validity):
        console.print(Text(f"{clause[0].upper()}{clause[1:]}."))
    for row in record["ranks"]:
        text = format_interval(row, "rank_correlation", "+.2f")
        label = f"{row['readout']} against text ({row['attack']})"
        console.print(Text(f"Refusal rates of the conditions, {label}: Spearman {text}."))


def print_response_quality(quality: pd.DataFrame, judge_name: str, max_new_tokens: int) -> None:
    """Print the quality of the responses, two lines a condition.

    Args:
        quality: `worth.csv`.
        judge_name: the judge whose rates come first.
        max_new_tokens: maximum number of tokens generated per response.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.kinds import list_kinds
    from analysis.stats.tables import UNDEFENDED, format_condition, iterate_rows

    kinds = list_kinds(quality.columns, f"over_refusal_{{}}_{judge_name}")
    heads = (
        f"ASR (%)\nby {judge_name}\nby keywords",
        "\n".join(["refuses (%)", *kinds]),
        "\nchrF\nlength ratio",
        "change of\nrepetition (%)\nlog-probability",
        *(["harmfulness\n(1 to 5)\ngrade 5 (%)"] if "harmfulness" in quality else []),
        *(["grade (1 to 10)\nhere\nchange"] if "grade" in quality else []),
    )
    printed_table = make_console_table("\ndefense\nresponses compared", heads, "Quality of the responses")
    for values in iterate_rows(quality):

        def cell(name: str, form: str, scale: float = 1, of: dict[str, Any] = values) -> str:
            return format_interval(of, name, form, scale) if name in of else "–"

        reference = values["defense"] == UNDEFENDED
        cells = [
            f"{format_condition(values)}\n{values['n_complied']} responses",
            f"{cell(f'asr_{judge_name}', '.0f', 100)}\n{cell('asr_keywords', '.0f', 100)}",
            "\n".join(cell(f"over_refusal_{kind}_{judge_name}", ".0f", 100) for kind in kinds),
        ]
        if reference:
            cells += ["reference", ""]
        else:
            cells.append(f"{cell('chrf', '.0f')}\n{cell('length_ratio', '.2f')}")
            cells.append(f"{cell('repetition_change', '+.1f', 100)}\n{cell('log_likelihood_change', '+.2f')}")
        if "harmfulness" in quality:
            cells.append(f"\n{cell('harmfulness', '.1f')}\n{cell('harmfulness_5', '.0f', 100)}")
        if "grade" in quality:
            change = "" if reference else f"\n{cell('grade_change', '+.1f')}"
            cells.append(f"{cell('grade', '.1f')}{change}")
        printed_table.add_row(*map(Text, cells), end_section=True)
    console = make_table_console()
    console.print(printed_table)
    note = (
        "Rates: Wilson 95 % intervals. Other columns: benign queries answered with and without the defense "
        f"({max_new_tokens} tokens), compared with the undefended response; bootstrap over queries. Length "
        "ratio: only if one of the two ended by itself. Log-probability: mean over the tokens of the "
        "response under the undefended model, nats."
    )
    console.print(Text(note, style="dim"))


def print_sampled_rates(sampling: pd.DataFrame, temperature: float) -> None:
    """Print the refusal rates of sampled responses beside those of greedy ones.

    Args:
        sampling: `sampling.csv`.
        temperature: of the samples.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import Interval, format_interval
    from analysis.stats.tables import format_condition, iterate_rows

    n_samples = int(sampling["n_samples"].iloc[0])
    title = f"Refused, % of responses: {n_samples} samples per query at temperature {temperature:g}"
    heads = ("class", "sampled", "greedy", "varies (%)", "greedy\ndiffers (%)")
    printed_table = make_console_table("defense", heads, title)
    for values in iterate_rows(sampling):
        cells = [
            format_condition(values),
            f"{values['class']}, {values['n_queries']}",
            *(format_interval(values, name, ".0f", 100) for name in ("sampled", "greedy")),
            *(Interval(values[name]).format_text(".0f", 100) for name in ("varies", "greedy_differs")),
        ]
        printed_table.add_row(*map(Text, cells))
    console = make_table_console()
    console.print(printed_table)
    note = (
        "Sampled: 95 % interval over queries and responses; greedy: Wilson, over queries. Varies: queries "
        "some of whose samples refuse and some do not. Greedy differs: queries whose greedy response is not "
        "judged as most of their samples are."
    )
    console.print(Text(note, style="dim"))
