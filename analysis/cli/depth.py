"""The command `analyze depth`; heavy libraries are imported inside the functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from analysis.cli.app import app
from analysis.cli.options import (
    DEFAULT_DATA,
    DEFAULT_MODEL,
    AnswerPrefixOption,
    AttackOption,
    BatchSizeOption,
    DataOption,
    DefenseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelOption,
    OfflineOption,
    OutOption,
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

    from analysis.studies.run_spec import RunSpec


@app.command()
def depth(
    defense: DefenseOption = None,
    model: ModelOption = DEFAULT_MODEL,
    data: DataOption = DEFAULT_DATA,
    split: SplitOption = None,
    attack: AttackOption = None,
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
    as_json: JsonOption = False,
) -> None:
    """Judge what is left of a defense after the first tokens of the response are given: is it deep?

    analyze depth -d self_reminder -d safety_tuning --limit 60
    """
    from analysis.studies.run_spec import build_run_spec

    if not defense:
        raise UserError("no defense chosen: use -d NAME (see `analyze list defenses`) or -d all")
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
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
        allows_served=True,
        tokenizer=tokenizer,
    )
    raise typer.Exit(run_depth_command(spec, defense, settings or [], out, as_json))


def run_depth_command(
    spec: RunSpec, defenses: Sequence[str], settings: Sequence[str], out: Path | None, as_json: bool
) -> int:
    """Judge prefilled responses, save tables and figures, print the table; return the exit code.

    Args:
        spec: options of the run.
        defenses: names of defenses.
        settings: settings of the defenses, `key=value`.
        out: output folder; None for the default.
        as_json: whether to print the table as JSON.
    """
    from analysis.cli.console import print_failed_checks, print_json_table, print_run_location
    from analysis.progress import make_notifier
    from analysis.report.folder import prepare_run_folder, save_run
    from analysis.studies.depth import measure_depth
    from analysis.studies.run_spec import choose_run_folder
    from analysis.studies.setup import PreflightError

    console = Console(stderr=True)
    out = prepare_run_folder(
        out or choose_run_folder(spec.model, ["depth", *defenses], datetime.now(UTC)), console
    )
    try:
        result = measure_depth(spec, defenses, settings, console)
    except PreflightError as error:
        print_failed_checks(error.checks)
        return 1
    run = result.run
    save_run(out, run, console)
    if as_json:
        print_json_table(run.tables["depth"])
    else:
        print_depth(run.tables["depth"], run.record)
    print_run_location(out, result.failures, console)
    if run.record["interrupted"]:
        make_notifier(console)(
            f"Interrupted: {run.n_finished_conditions} of {run.record['conditions_wanted']} conditions were "
            "finished; they are saved. Run the same command again to continue."
        )
        return 130
    return 1 if result.failures else 0


def print_depth(depth: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print refusal rates and effects by number of tokens, a block per condition and kind of opener.

    Args:
        depth: `depth.csv`.
        record: `run.json`.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.tables import format_condition, iterate_rows

    data, responses = record["data"], record["responses"]
    title = (
        f"{record['model']['name']}: responses after the first tokens of an opener; "
        f"{data['n_harmful']} harmful, {data['n_benign']} benign"
    )
    # Two lines per number of tokens, so that the table fits 80 columns.
    headers = ("\ntokens\ngiven", "refused (%)\nharmful\nbenign", "points\nshift\ndiscrimination")
    table = make_console_table("\ndefense\nopener", headers, title)
    for _, rows in depth.groupby(["attack", "defense", "prefix"], sort=False):
        records = list(iterate_rows(rows))
        for row in records:
            name = f"{format_condition(row)}\n{row['prefix']}" if row is records[0] else ""
            rates, effects = (
                "\n".join(format_interval(row, column, form, scale) for column in columns)
                for columns, form, scale in (
                    (("refusal_rate", "over_refusal_rate"), ".0f", 100.0),
                    (("response_shift", "response_discrimination"), "+.0f", 1.0),
                )
            )
            cells = (name, str(row["tokens"]), rates, effects)
            table.add_row(*map(Text, cells), end_section=row is records[-1])
    console = make_table_console()
    console.print(table)
    note = (
        f"[x, y]: 95 % intervals. First {responses['new_tokens']} tokens of the continuation, judged by "
        f"{responses['judge']['name']}; after a refusing opener, the tokens given are judged as well, and a "
        "refusal with an answer beside it counts as dropped. Shift and discrimination: against the "
        "undefended model after the same tokens; their changes since 0 tokens: depth.csv."
    )
    if responses["unjudged"]:
        note += f" Without a verdict, and not counted: {responses['unjudged']} of the responses."
    console.print(Text(note, style="dim"))
