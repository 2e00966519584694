"""The command `analyze agreement`: do stored runs on different data sets order the defenses alike?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from analysis.cli.app import app
from analysis.cli.options import JsonOption, OutOption, SeedOption

if TYPE_CHECKING:
    import pandas as pd


@app.command()
def agreement(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs of `analyze` of one model and readout on different data."),
    ],
    seed: SeedOption = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the order of the defenses between data sets: rank correlations, and how high they could be.

    analyze agreement runs/contrast runs/jbb
    """
    raise typer.Exit(run_agreement_command(runs, seed, out, as_json))


def run_agreement_command(folders: Sequence[Path], seed: int, out: Path | None, as_json: bool) -> int:
    """Compare the runs, save tables and figure, and print the table; return the exit code.

    Args:
        folders: of the runs.
        seed: random seed.
        out: output folder, or None for a new one under runs/.
        as_json: whether to print the agreement as JSON instead of a table.
    """
    from analysis.api import compare_rankings
    from analysis.cli.console import print_json_table
    from analysis.progress import make_notifier, print_note
    from analysis.report.folder import prepare_run_folder, save_run
    from analysis.studies.run_spec import choose_run_folder

    console = Console(stderr=True)
    if out is not None:
        prepare_run_folder(out, console)
    with console.status("comparing the runs"):
        run = compare_rankings(folders, seed=seed)
    labels = [str(entry["label"]) for entry in run.record["runs"]]
    if out is None:
        folder = choose_run_folder(run.model, ["agreement", *labels], datetime.now(UTC))
        out = prepare_run_folder(folder, console)
    save_run(out, run, console)
    if as_json:
        print_json_table(run.tables["agreement"])
    else:
        print_rank_agreement(run.tables["agreement"], run.record)
    for notice in run.record["notices"]:
        print_note(console, notice)
    make_notifier(console)(f"Wrote tables, figures and run.json to {out}")
    return 0


def print_rank_agreement(table: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print a table per attack and pair of data sets, one row per measure.

    Args:
        table: `agreement.csv`.
        record: `run.json` of the comparison.
    """
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.rank_agreement import RANKED_MEASURES
    from analysis.stats.tables import DIRECT, iterate_rows

    console = make_table_console()
    headers = (
        "rank correlation\nceiling",
        "corrected\n(true effects)",
        "within\neach set",
        "one defense\nleft out",
    )
    for (attack, first, second), rows in table.groupby(["attack", "first", "second"], sort=False):
        under = "" if attack == DIRECT else f", attack {attack}"
        title = f"{record['model']['name']}: order of the defenses on {first} and on {second}{under}"
        printed = make_console_table("measure\ndefenses", headers, title, with_row_lines=True)
        for row in iterate_rows(rows):
            observed, ceiling = (
                format_interval(row, name, "+.2f") for name in ("rank_correlation", "ceiling")
            )
            within = [format_interval(row, f"within_{side}", "+.2f") for side in ("first", "second")]
            left_out = [format_interval(row, f"without_one_{end}", "+.2f") for end in ("low", "high")]
            cells = (
                f"{RANKED_MEASURES[row['measure']]}\n{row['n_defenses']}",
                f"{observed}\n{ceiling}",
                format_interval(row, "corrected", "+.2f"),
                "\n".join(within),
                f"{left_out[0]} to {left_out[1]}\n{row['most_influential']}",
            )
            printed.add_row(*map(Text, cells))
        console.print(printed)
    note = (
        "[x, y]: 95 % intervals: queries of both sets resampled, these defenses kept. Ceiling: the rank "
        "correlation to be expected if both sets ordered the defenses alike, from the agreement of random "
        "halves of each set. Corrected: for the sampling of queries. Within each set: the rank correlation "
        "to be expected of two samples of its size. Left out: lowest and highest rank correlation without "
        "one of the defenses, and the defense that changes it most. Controls and ablations are not compared."
    )
    console.print(Text(note, style="dim"))
