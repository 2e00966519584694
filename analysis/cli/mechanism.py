"""What `analyze mechanism` prints: where an effect arises, what carries it, what interventions leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from analysis.cli.app import app
from analysis.cli.options import (
    AttackOption,
    BatchSizeOption,
    DataOption,
    DefenseOption,
    DeviceOption,
    DtypeOption,
    LimitOption,
    ModelOption,
    OfflineOption,
    OutOption,
    ReadoutOption,
    SeedOption,
    SettingsOption,
    SplitOption,
)
from analysis.studies.run_spec import PATCH_SITES
from defenses.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.studies.mechanism import MechanismOptions
    from analysis.studies.run_spec import RunSpec


_CONTRAST_HEADERS = ("shift\n(nats)", "discrimination\n(nats)")


def print_mechanism(tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any], n_top: int) -> None:
    """Print the main findings of each condition.

    Args:
        tables: by file stem.
        record: of the run.
        n_top: how many parts.
    """
    from analysis.cli.console import make_table_console
    from analysis.stats.tables import format_condition

    data, console = record["data"], make_table_console()
    console.print(
        f"{record['model']['name']} ({record['dtype']}) on {data['name']}, {data['split']} split: "
        f"{data['n_harmful']} harmful, {data['n_benign']} benign; [x, y]: 95 % intervals",
        markup=False,
        highlight=False,
    )
    if "half" in tables:
        _print_half_way_layers(tables)
    if "parts" in tables:
        _print_top_parts(tables["parts"], n_top)
    if "directions" in tables:
        _print_directions(tables["directions"])
    if "patches" in tables:
        _print_patches(tables["patches"])
    for row in record["mechanism"]["slopes_against_patches"]:
        rank = row["rank_correlation"]
        ranked = "" if rank is None else f"with rank correlation {rank:+.2f}, "
        _print_finding(
            f"{format_condition(row)}: slopes guess the effect of patching {row['heads']:.0f} heads (those with "
            "the largest guesses, and as many by chance) "
            f"on {row['contrast']} {ranked}off by {row['mean_error']:.3f} nats of "
            f"{row['mean_size']:.3f} on average"
        )
    if "cuts" in tables:
        _print_attention_knockouts(tables["cuts"])
    if "weights" in tables:
        _print_weight_patches(tables["weights"])
    if "overlap" in tables:
        _print_overlap_relation(tables["overlap"])


def _print_half_way_layers(tables: Mapping[str, pd.DataFrame]) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.tables import format_condition, iterate_rows

    shown = make_console_table(
        "defense", ("contrast", "whole effect\n(nats)", "half of it\nby layer"), "Logit lens"
    )
    for row in iterate_rows(tables["half"]):
        half = format_interval(row, "half", ".0f")
        shown.add_row(
            *map(Text, (format_condition(row), row["contrast"], format_interval(row, "final", "+.2f"), half))
        )
    make_table_console().print(shown)


def _iterate_conditions(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the name and the rows of each condition."""
    from analysis.stats.tables import format_condition, iterate_rows

    for _, rows in table.groupby(["attack", "defense"], sort=False):
        yield format_condition(next(iterate_rows(rows))), rows


def _contrast_cells(row: Mapping[str, Any], *labels: str, format_spec: str = "+.2f") -> list[Text]:
    """A row of a table: words, and behind them both contrasts with their intervals."""
    from analysis.stats.attribution import CONTRASTS
    from analysis.stats.format import format_interval

    return [Text(one) for one in (*labels, *(format_interval(row, name, format_spec) for name in CONTRASTS))]


def _print_top_parts(part_effects: pd.DataFrame, n_top: int) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.attribution import CONTRASTS
    from analysis.stats.tables import iterate_rows

    for name, parts in _iterate_conditions(part_effects):
        size = parts[list(CONTRASTS)].abs().max(axis=1)
        largest = size.sort_values(ascending=False, kind="stable").index[:n_top]
        title = f"{name}: the {len(largest)} largest of {len(parts)} parts"
        shown = make_console_table("part", _CONTRAST_HEADERS, title)
        for row in iterate_rows(parts.loc[largest]):
            shown.add_row(*_contrast_cells(row, get_part_name(row), format_spec="+.3f"))
        make_table_console().print(shown)


def get_part_name(row: Mapping[str, Any]) -> str:
    """Return a part's name, by the columns of a table.

    >>> get_part_name({"kind": "head", "layer": 3, "head": 1}), get_part_name({"kind": "mlp", "layer": 3, "head": pd.NA})
    ('L3H1', 'L3 mlp')
    """
    import pandas as pd

    from analysis.stats.tables import ModelPart

    layer, head = (None if pd.isna(row[name]) else int(row[name]) for name in ("layer", "head"))
    return str(ModelPart(row["kind"], layer, head))


def _print_directions(directions: pd.DataFrame) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.attribution import CONTRASTS
    from analysis.stats.format import format_interval
    from analysis.stats.tables import format_condition, iterate_rows

    heads = ("direction\nin layer", "AUROC\nΔAUROC", "shift\ndiscrimination")
    shown = make_console_table(
        "defense\n", heads, "Projections, in distances between the classes", with_row_lines=True
    )
    for row in iterate_rows(directions[directions["chosen"]]):
        cells = (
            f"{format_condition(row)}\n{describe_projection_effect(row)}",
            f"{row['direction']}\n{row['layer']}",
            f"{format_interval(row, 'auroc', '.2f')}\n{format_interval(row, 'delta_auroc', '+.2f')}",
            "\n".join(format_interval(row, name, "+.2f") for name in CONTRASTS),
        )
        shown.add_row(*map(Text, cells))
    make_table_console().print(shown)


def describe_projection_effect(row: Mapping[str, Any]) -> str:
    """Return in words what a defense does to a projection at the chosen layer.

    The model knows more of harm where the classes lie farther apart and are told apart better on the
    harmfulness direction; it acts more where both move to refusal on the refusal direction.

    Args:
        row: of directions.csv.
    """

    def beyond(name: str) -> int:
        return int(row[f"{name}_low"] > 0) - int(row[f"{name}_high"] < 0)

    if row["direction"] == "harmfulness":
        sides = {beyond("discrimination"), beyond("delta_auroc")}
        side = sides.pop() if len(sides) == 1 else 0
        return {
            1: "knows more of harm",
            0: "knows no more and no less, as far as seen",
            -1: "knows less of harm",
        }[side]
    return {1: "acts more", 0: "acts no more and no less, as far as seen", -1: "acts less"}[beyond("shift")]


def _print_patches(patches: pd.DataFrame) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.attribution import CONTRASTS
    from analysis.stats.tables import iterate_rows

    for name, rows in _iterate_conditions(
        patches[(patches["into"] == "undefended") & (patches["kind"] != "head")]
    ):
        title = f"{name}: put into the undefended run, one layer at a time; the largest of each site"
        shown = make_console_table("site", ("patched with", *_CONTRAST_HEADERS), title)
        for kind, of_kind in rows.groupby("kind", sort=False):
            # What leaves the last block is all there is: nothing to find there.
            within = of_kind[of_kind["layer"] < of_kind["layer"].max()] if kind == "residual" else of_kind
            defended = within[within["source"] == "defense"]
            for contrast in CONTRASTS if len(defended) else ():
                largest = defended.sort_values(contrast, key=abs, ascending=False, kind="stable")
                for row in iterate_rows(within[within["layer"] == largest["layer"].iloc[0]]):
                    shown.add_row(
                        *_contrast_cells(row, f"{get_part_name(row)}, by {contrast}", row["source"])
                    )
        make_table_console().print(shown)


def _print_attention_knockouts(knockouts: pd.DataFrame) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.tables import iterate_rows

    for name, rows in _iterate_conditions(knockouts):
        title = f"{name}: what is left when attention to its own tokens is cut"
        shown = make_console_table("cut", ("in layers", *_CONTRAST_HEADERS), title)
        for row in iterate_rows(rows):
            where = "none" if row["first"] < 0 else f"{row['first']}-{row['last']}"
            shown.add_row(*_contrast_cells(row, f"from {row['reader']}", where))
        make_table_console().print(shown)


def _print_weight_patches(weight_patches: pd.DataFrame) -> None:
    import numpy as np

    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.tables import iterate_rows

    for name, rows in _iterate_conditions(weight_patches):
        title = f"{name}: its weights switched on, its prompt always there"
        shown = make_console_table("switched on", _CONTRAST_HEADERS, title)
        depth = rows.loc[rows["how"] == "up to", "layer"]
        shares = (0, 0.25, 0.5, 0.75, 1) if len(depth) else ()
        told = {int(np.quantile(depth, share, method="nearest")) for share in shares}
        for row in iterate_rows(rows):
            if row["how"] == "module":
                what = f"{row['module']} in all layers"
            elif row["how"] in ("nothing", "everything"):
                what = row["how"]
            elif row["how"] == "up to" and row["layer"] in told:
                what = f"all up to layer {row['layer']}"
            else:
                continue
            shown.add_row(*_contrast_cells(row, what))
        make_table_console().print(shown)


def _print_overlap_relation(overlap: pd.DataFrame) -> None:
    """Whether defenses that work by the same parts interact."""
    from analysis.stats.attribution import compute_mantel_correlation

    for (_, contrast), rows in overlap.groupby(["attack", "contrast"], sort=False):
        about = compute_mantel_correlation(rows)
        if about["p"] != about["p"]:
            _print_finding(
                f"Overlap of parts and interaction, {contrast}: {about['pairs']} pairs are too few to tell"
            )
            continue
        _print_finding(
            f"Overlap of parts and interaction, {contrast}: over {about['pairs']} pairs the rank correlation "
            f"is {about['rank_correlation']:+.2f} (p = {about['p']:.2g}, defenses permuted)"
            + (": none is seen" if about["p"] > 0.05 else "")
        )


def _print_finding(text: str) -> None:
    from analysis.cli.console import make_table_console
    from analysis.studies.progress import print_line

    print_line(make_table_console(), text)


@app.command()
def mechanism(
    defense: DefenseOption = None,
    model: ModelOption = "smollm2",
    data: DataOption = "contrast",
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: ReadoutOption = "words",
    sites: Annotated[
        str, typer.Option(help=f"Activation sites to patch, comma-separated: {', '.join(PATCH_SITES)}.")
    ] = ",".join(PATCH_SITES),
    top: Annotated[
        int, typer.Option(help="Number of components to list and plot, and of heads to patch.")
    ] = 10,
    patched: Annotated[
        int, typer.Option(help="Maximum number of queries for interventions, pairs kept whole; 0 skips them.")
    ] = 32,
    ensembles: Annotated[
        Path | None,
        typer.Option(
            help="Run folder of `analyze ensembles`: test whether defenses that share components interact."
        ),
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
    """Locate the effect of a defense in layers, heads and MLPs, and test it by interventions.

    analyze mechanism -d backdoor -m smollm2:attacked
    """
    from analysis.studies.mechanism import MechanismOptions
    from analysis.studies.run_spec import build_run_spec, check_mechanism_options, parse_sites

    if not defense:
        raise UserError("which defense? -d NAME (see `analyze list defenses`)")
    chosen = parse_sites([one.strip() for one in sites.split(",") if one.strip()])
    check_mechanism_options(top, patched)
    request = build_run_spec(
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
        readout,
        needs_linear_readout=True,
    )

    wanted = MechanismOptions(chosen, top, patched, ensembles)
    raise typer.Exit(run_mechanism_command(request, defense, settings or [], wanted, out))


def run_mechanism_command(
    spec: RunSpec,
    defenses: Sequence[str],
    settings: Sequence[str],
    options: MechanismOptions,
    out: Path | None,
) -> int:
    """Say in which layers, heads and MLPs defenses act; save tables and figures, print the main ones."""
    from analysis.cli.console import print_run_location, print_trust_warnings
    from analysis.files import check_output_folder
    from analysis.report.folder import save_run
    from analysis.studies.mechanism import study_mechanism
    from analysis.studies.run_spec import choose_run_folder

    out = check_output_folder(
        out or choose_run_folder(spec.model, ["mechanism", *defenses], datetime.now(UTC))
    )
    console = Console(stderr=True)
    found = study_mechanism(spec, defenses, settings, options, console)
    save_run(out, found.run, console)
    print_mechanism(found.run.tables, found.run.record, options.n_top)
    print_trust_warnings(found.run.tables["summary"], console)
    print_run_location(out, found.failures, console)
    return 1 if found.failures else 0
