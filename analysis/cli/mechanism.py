"""The command `analyze mechanism` and its terminal tables."""

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
    DEFAULT_DATA,
    DEFAULT_MODEL,
    AnswerPrefixOption,
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
    SharePrefixOption,
    SplitOption,
    TemplateOption,
)
from analysis.studies.run_spec import PATCH_SITES
from defenses.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.studies.mechanism import MechanismOptions
    from analysis.studies.run_spec import RunSpec

_CONTRAST_HEADERS = ("shift\n(nats)", "discrimination\n(nats)")
_DEPTH_SHARES = (0, 0.25, 0.5, 0.75, 1)  # shares of the depth at which weight patches are printed


@app.command()
def mechanism(
    defense: DefenseOption = None,
    model: ModelOption = DEFAULT_MODEL,
    data: DataOption = DEFAULT_DATA,
    split: SplitOption = None,
    attack: AttackOption = None,
    readout: ReadoutOption = "words",
    sites: Annotated[
        str,
        typer.Option(help=f"Activation sites to patch, comma-separated: {', '.join(PATCH_SITES)}."),
    ] = ",".join(PATCH_SITES),
    top: Annotated[
        int, typer.Option(help="Number of components to list and plot, and of heads to patch.")
    ] = 10,
    patched: Annotated[
        int,
        typer.Option(
            help="Maximum number of queries for interventions; pairs are kept whole. 0: no interventions."
        ),
    ] = 32,
    ensembles: Annotated[
        Path | None,
        typer.Option(
            help="Output folder of `analyze ensembles`: test whether similar defenses interact when stacked."
        ),
    ] = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "auto",
    share_prefix: SharePrefixOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    template: TemplateOption = None,
    answer_prefix: AnswerPrefixOption = None,
    out: OutOption = None,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Locate the effect of a defense in layers, heads and MLPs, and test it with interventions.

    analyze mechanism -d backdoor -m smollm2:attacked
    """
    from analysis.studies.mechanism import MechanismOptions
    from analysis.studies.run_spec import build_run_spec, check_mechanism_options, parse_sites

    if not defense:
        raise UserError("no defense chosen: use -d NAME (see `analyze list defenses`)")
    chosen_sites = parse_sites([name.strip() for name in sites.split(",") if name.strip()])
    check_mechanism_options(top, patched)
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
        readout,
        share_prefix=share_prefix,
        template=template,
        answer_prefix=answer_prefix,
    )
    options = MechanismOptions(chosen_sites, top, patched, ensembles)
    raise typer.Exit(run_mechanism_command(spec, defense, settings or [], options, out))


def run_mechanism_command(
    spec: RunSpec,
    defenses: Sequence[str],
    settings: Sequence[str],
    options: MechanismOptions,
    out: Path | None,
) -> int:
    """Locate the effects of defenses, save tables and figures, and print the main results.

    Args:
        spec: model, data and options of the run.
        defenses: names or .py files, as typed.
        settings: `key=value` settings of the defenses.
        options: options of the study.
        out: output folder, or None for a new one under runs/.

    Returns:
        The exit code: 0, or 1 if a condition failed.
    """
    from analysis.cli.console import print_run_location, print_trust_warnings
    from analysis.report.folder import prepare_run_folder, save_run
    from analysis.studies.mechanism import study_mechanism
    from analysis.studies.run_spec import choose_run_folder

    console = Console(stderr=True)
    out = prepare_run_folder(
        out or choose_run_folder(spec.model, ["mechanism", *defenses], datetime.now(UTC)), console
    )
    result = study_mechanism(spec, defenses, settings, options, console)
    save_run(out, result.run, console)
    print_mechanism(result.run.tables, result.run.record, options.n_top)
    print_trust_warnings(result.run.tables["summary"], console)
    print_run_location(out, result.failures, console)
    return 1 if result.failures else 0


def print_mechanism(tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any], n_top: int) -> None:
    """Print the main results of each condition.

    Args:
        tables: tables of the run, by file stem.
        record: content of run.json.
        n_top: number of components to list.
    """
    from analysis.cli.console import make_table_console

    data = record["data"]
    make_table_console().print(
        f"{record['model']['name']} ({record['dtype']}) on {data['name']}, {data['split']} split: "
        f"{data['n_harmful']} harmful, {data['n_benign']} benign; [x, y]: 95 % intervals",
        markup=False,
        highlight=False,
    )
    if "half" in tables:
        _print_half_way_layers(tables["half"])
    if "parts" in tables:
        _print_top_parts(tables["parts"], n_top)
    if "directions" in tables:
        _print_directions(tables["directions"])
    if "patches" in tables:
        _print_patches(tables["patches"])
    _print_slope_agreement(record["mechanism"]["slopes_against_patches"])
    if "cuts" in tables:
        _print_attention_knockouts(tables["cuts"])
    if "weights" in tables:
        _print_weight_patches(tables["weights"])
    if "overlap" in tables:
        _print_overlap_relation(tables["overlap"])


def describe_projection_effect(row: Mapping[str, Any]) -> str:
    """Describe the effect of a defense on the projections at the chosen layer.

    On the harmfulness direction, a defense changes the separation of the classes if discrimination and
    ΔAUROC agree; on the refusal direction, it moves both classes if the shift's interval excludes 0.

    Args:
        row: row of directions.csv.
    """

    def get_sign(name: str) -> int:
        return int(row[f"{name}_low"] > 0) - int(row[f"{name}_high"] < 0)

    if row["direction"] == "harmfulness":
        signs = {get_sign("discrimination"), get_sign("delta_auroc")}
        sign = signs.pop() if len(signs) == 1 else 0
        return {1: "classes more separate", 0: "no change found", -1: "classes less separate"}[sign]
    return {1: "moves toward refusal", 0: "no change found", -1: "moves away from refusal"}[get_sign("shift")]


def get_part_name(row: Mapping[str, Any]) -> str:
    """Return the name of a component from the columns of a table.

    >>> get_part_name({"kind": "head", "layer": 3, "head": 1})
    'L3H1'
    >>> get_part_name({"kind": "mlp", "layer": 3, "head": None})
    'L3 mlp'
    """
    import pandas as pd

    from analysis.stats.tables import ModelPart

    layer, head = (None if pd.isna(row[name]) else int(row[name]) for name in ("layer", "head"))
    return str(ModelPart(row["kind"], layer, head))


def _print_half_way_layers(half_way_layers: pd.DataFrame) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.format import format_interval
    from analysis.stats.tables import format_condition, iterate_rows

    table = make_console_table(
        "defense", ("contrast", "final value\n(nats)", "half of it\nfrom layer"), "Logit lens"
    )
    for row in iterate_rows(half_way_layers):
        final, layer = format_interval(row, "final", "+.2f"), format_interval(row, "half", ".0f")
        table.add_row(*map(Text, (format_condition(row), row["contrast"], final, layer)))
    make_table_console().print(table)


def _print_top_parts(part_effects: pd.DataFrame, n_top: int) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.attribution import CONTRASTS
    from analysis.stats.tables import READOUT_PART, READOUT_PART_MEANING, iterate_rows

    for condition, parts in _iterate_conditions(part_effects):
        is_remainder = parts["kind"] == READOUT_PART
        components = parts[~is_remainder]
        magnitudes = components[list(CONTRASTS)].abs().max(axis=1)
        largest = magnitudes.sort_values(ascending=False, kind="stable").index[:n_top]
        title = f"{condition}: logit attribution, the {len(largest)} largest of {len(components)} components"
        table = make_console_table("component", _CONTRAST_HEADERS, title)
        for row in iterate_rows(parts.loc[[*largest, *parts.index[is_remainder]]]):
            table.add_row(*_contrast_cells(row, get_part_name(row), format_spec="+.3f"))
        make_table_console().print(table)
    if (part_effects["kind"] == READOUT_PART).any():
        _print_line(f"{READOUT_PART}: {READOUT_PART_MEANING}")


def _print_directions(directions: pd.DataFrame) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.attribution import CONTRASTS
    from analysis.stats.format import format_interval
    from analysis.stats.tables import format_condition, iterate_rows

    headers = ("direction\nlayer", "AUROC\nΔAUROC", "shift\ndiscrimination")
    title = "Projections on directions, in units of the distance between the class means"
    table = make_console_table("defense\neffect", headers, title, with_row_lines=True)
    for row in iterate_rows(directions[directions["chosen"]]):
        cells = (
            f"{format_condition(row)}\n{describe_projection_effect(row)}",
            f"{row['direction']}\n{row['layer']}",
            f"{format_interval(row, 'auroc', '.2f')}\n{format_interval(row, 'delta_auroc', '+.2f')}",
            "\n".join(format_interval(row, name, "+.2f") for name in CONTRASTS),
        )
        table.add_row(*map(Text, cells))
    make_table_console().print(table)


def _print_patches(patches: pd.DataFrame) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.attribution import CONTRASTS
    from analysis.stats.tables import iterate_rows

    layer_patches = patches[(patches["into"] == "undefended") & (patches["kind"] != "head")]
    for condition, rows in _iterate_conditions(layer_patches):
        title = f"{condition}: largest effect of each site, patched into the undefended run"
        table = make_console_table("site", ("source", *_CONTRAST_HEADERS), title)
        for kind, kind_rows in rows.groupby("kind", sort=False):
            # The last residual stream determines the margin, so patching it always gives the whole effect.
            is_last = (kind_rows["layer"] == kind_rows["layer"].max()) & (kind == "residual")
            candidates = kind_rows[~is_last]
            defended = candidates[candidates["source"] == "defense"]
            for contrast in CONTRASTS if len(defended) else ():
                by_size = defended.sort_values(contrast, key=abs, ascending=False, kind="stable")
                for row in iterate_rows(candidates[candidates["layer"] == by_size["layer"].iloc[0]]):
                    table.add_row(
                        *_contrast_cells(row, f"{get_part_name(row)}, by {contrast}", row["source"])
                    )
        make_table_console().print(table)


def _print_slope_agreement(agreements: Sequence[Mapping[str, Any]]) -> None:
    from analysis.stats.tables import format_condition

    for row in agreements:
        rank = row["rank_correlation"]
        correlation = "" if rank is None else f"rank correlation {rank:+.2f}, "
        _print_line(
            f"{format_condition(row)}: attribution against activation patching, {row['contrast']}, on "
            f"{row['heads']:.0f} heads (largest estimates and random ones): {correlation}mean error "
            f"{row['mean_error']:.3f} nats, mean effect {row['mean_size']:.3f} nats"
        )


def _print_attention_knockouts(knockouts: pd.DataFrame) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.tables import iterate_rows

    blocked = {"defense": "its tokens is blocked", "image": "images is blocked in both runs"}
    for condition, rows in _iterate_conditions(knockouts):
        for tokens, of_tokens in rows.groupby("tokens", sort=False):
            title = f"{condition}: effect that remains when attention to {blocked[str(tokens)]}"
            table = make_console_table("blocked from", ("in layers", *_CONTRAST_HEADERS), title)
            for row in iterate_rows(of_tokens):
                layers = "none" if row["first"] < 0 else f"{row['first']}-{row['last']}"
                table.add_row(*_contrast_cells(row, row["reader"], layers))
            make_table_console().print(table)


def _print_weight_patches(weight_patches: pd.DataFrame) -> None:
    import numpy as np

    from analysis.cli.console import make_console_table, make_table_console
    from analysis.stats.tables import iterate_rows

    for condition, rows in _iterate_conditions(weight_patches):
        title = f"{condition}: effect of its prompt with parts of its weight change"
        table = make_console_table("changed weights", _CONTRAST_HEADERS, title)
        layers = rows.loc[rows["how"] == "up to", "layer"]
        shares = _DEPTH_SHARES if len(layers) else ()
        printed_layers = {int(np.quantile(layers, share, method="nearest")) for share in shares}
        for row in iterate_rows(rows):
            if row["how"] == "module":
                label = f"{row['module']} in all layers"
            elif row["how"] in ("nothing", "everything"):
                label = row["how"]
            elif row["how"] == "up to" and row["layer"] in printed_layers:
                label = f"all up to layer {row['layer']}"
            else:
                continue
            table.add_row(*_contrast_cells(row, label))
        make_table_console().print(table)


def _print_overlap_relation(overlap: pd.DataFrame) -> None:
    """Print whether defenses with similar attribution profiles interact."""
    from analysis.stats.attribution import compute_mantel_correlation

    for (_, contrast), rows in overlap.groupby(["attack", "contrast"], sort=False):
        test = compute_mantel_correlation(rows)
        prefix = f"Similarity of profiles and interaction of stacks, {contrast}: "
        if test["p"] != test["p"]:
            _print_line(f"{prefix}{test['pairs']} pairs are too few for a test")
            continue
        _print_line(
            f"{prefix}rank correlation {test['rank_correlation']:+.2f} over {test['pairs']} pairs "
            f"(p = {test['p']:.2g}, permuting defenses)" + (": no relation found" if test["p"] > 0.05 else "")
        )


def _print_line(text: str) -> None:
    from analysis.cli.console import make_table_console
    from analysis.progress import print_line

    print_line(make_table_console(), text)


def _iterate_conditions(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the name and the rows of each condition."""
    from analysis.stats.tables import format_condition, iterate_rows

    for _, rows in table.groupby(["attack", "defense"], sort=False):
        yield format_condition(next(iterate_rows(rows))), rows


def _contrast_cells(row: Mapping[str, Any], *labels: str, format_spec: str = "+.2f") -> list[Text]:
    """The cells of a table row: labels, then both contrasts with their intervals."""
    from analysis.stats.attribution import CONTRASTS
    from analysis.stats.format import format_interval

    estimates = (format_interval(row, name, format_spec) for name in CONTRASTS)
    return [Text(cell) for cell in (*labels, *estimates)]
