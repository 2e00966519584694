"""What `analyze mechanism` prints: where an effect arises, what carries it, what interventions leave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.text import Text

from analysis import showing
from analysis.ensembles import REPORT_SPLIT, STACK
from analysis.located import CONTRASTS
from analysis.overlaps import compute_mantel_correlation
from analysis.preparing import RunSetup
from analysis.tables import ModelPart, format_condition
from defenses import UserError

_CONTRAST_HEADERS = ("shift\n(nats)", "discrimination\n(nats)")


def load_stack_interactions(ensembles_folder: Path) -> pd.DataFrame:
    """Return the stacks that a run of `analyze ensembles` has observed.

    Args:
        ensembles_folder: where it wrote.
    """
    path = ensembles_folder / "ensembles.csv" if ensembles_folder.is_dir() else ensembles_folder
    if not path.is_file():
        raise UserError(f"--ensembles {ensembles_folder}: there is no ensembles.csv; `analyze ensembles` writes one")
    found = pd.read_csv(path)
    wanted = {"attack", "members", "how", "split", *(f"interaction_{name}" for name in CONTRASTS)}
    if missing := sorted(wanted - set(found.columns)):
        raise UserError(f"{path} lacks {', '.join(missing)}: it is not what `analyze ensembles` writes")
    return found[(found["how"] == STACK) & (found["split"] == REPORT_SPLIT)]


def check_same_model(ensembles_folder: Path, setup: RunSetup) -> None:
    """Raise if a run was made on another model, or read otherwise, than this one.

    Args:
        ensembles_folder: of `analyze ensembles`.
        setup: what this run is made with.
    """
    path = (ensembles_folder if ensembles_folder.is_dir() else ensembles_folder.parent) / "run.json"
    if not path.is_file():
        raise UserError(
            f"--ensembles {ensembles_folder}: there is no run.json beside it, so whose it is cannot be seen"
        )
    record, origin = json.loads(path.read_text("utf-8")), setup.session.loaded_model.origin
    for what, there, here in (
        *(
            (f"weights ({key})", record["model"].get(key), origin.get(key))
            for key in ("sha256", "state_sha256")
        ),
        ("readout", record["readout"]["name"], setup.readout.name),
    ):
        if there != here:
            raise UserError(
                f"--ensembles {ensembles_folder} is of {record['model']['name']}: its {what} is {str(there)[:12]}, and "
                f"this run's {str(here)[:12]}; `analyze ensembles` with the same -m and --readout makes one"
            )


def print_mechanism(tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any], n_top: int) -> None:
    """Print the main findings of each condition.

    Args:
        tables: by file stem.
        record: of the run.
        n_top: how many parts.
    """
    data, console = record["data"], showing.make_table_console()
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
    shown = showing.make_console_table(
        "defense", ("contrast", "whole effect\n(nats)", "half of it\nby layer"), "Logit lens"
    )
    for row in showing.iterate_rows(tables["half"]):
        half = showing.format_interval(row, "half", ".0f")
        shown.add_row(
            *map(Text, (format_condition(row), row["contrast"], showing.format_interval(row, "final", "+.2f"), half))
        )
    showing.make_table_console().print(shown)


def _iterate_conditions(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the name and the rows of each condition."""
    for _, rows in table.groupby(["attack", "defense"], sort=False):
        yield format_condition(next(showing.iterate_rows(rows))), rows


def _contrast_cells(row: Mapping[str, Any], *labels: str, format_spec: str = "+.2f") -> list[Text]:
    """A row of a table: words, and behind them both contrasts with their intervals."""
    return [Text(one) for one in (*labels, *(showing.format_interval(row, name, format_spec) for name in CONTRASTS))]


def _print_top_parts(part_effects: pd.DataFrame, n_top: int) -> None:
    for name, parts in _iterate_conditions(part_effects):
        size = parts[list(CONTRASTS)].abs().max(axis=1)
        largest = size.sort_values(ascending=False, kind="stable").index[:n_top]
        title = f"{name}: the {len(largest)} largest of {len(parts)} parts"
        shown = showing.make_console_table("part", _CONTRAST_HEADERS, title)
        for row in showing.iterate_rows(parts.loc[largest]):
            shown.add_row(*_contrast_cells(row, get_part_name(row), format_spec="+.3f"))
        showing.make_table_console().print(shown)


def get_part_name(row: Mapping[str, Any]) -> str:
    """Return a part's name, by the columns of a table.

    >>> name_of({"kind": "head", "layer": 3, "head": 1}), name_of({"kind": "mlp", "layer": 3, "head": pd.NA})
    ('L3H1', 'L3 mlp')
    """
    layer, head = (None if pd.isna(row[name]) else int(row[name]) for name in ("layer", "head"))
    return str(ModelPart(row["kind"], layer, head))


def _print_directions(directions: pd.DataFrame) -> None:
    heads = ("direction\nin layer", "AUROC\nΔAUROC", "shift\ndiscrimination")
    shown = showing.make_console_table("defense\n", heads, "Projections, in distances between the classes", with_row_lines=True)
    for row in showing.iterate_rows(directions[directions["chosen"]]):
        cells = (
            f"{format_condition(row)}\n{describe_projection_effect(row)}",
            f"{row['direction']}\n{row['layer']}",
            f"{showing.format_interval(row, 'auroc', '.2f')}\n{showing.format_interval(row, 'delta_auroc', '+.2f')}",
            "\n".join(showing.format_interval(row, name, "+.2f") for name in CONTRASTS),
        )
        shown.add_row(*map(Text, cells))
    showing.make_table_console().print(shown)


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
    for name, rows in _iterate_conditions(patches[(patches["into"] == "undefended") & (patches["kind"] != "head")]):
        title = f"{name}: put into the undefended run, one layer at a time; the largest of each site"
        shown = showing.make_console_table("site", ("patched with", *_CONTRAST_HEADERS), title)
        for kind, of_kind in rows.groupby("kind", sort=False):
            # What leaves the last block is all there is: nothing to find there.
            within = of_kind[of_kind["layer"] < of_kind["layer"].max()] if kind == "residual" else of_kind
            defended = within[within["source"] == "defense"]
            for contrast in CONTRASTS if len(defended) else ():
                largest = defended.sort_values(contrast, key=abs, ascending=False, kind="stable")
                for row in showing.iterate_rows(within[within["layer"] == largest["layer"].iloc[0]]):
                    shown.add_row(*_contrast_cells(row, f"{get_part_name(row)}, by {contrast}", row["source"]))
        showing.make_table_console().print(shown)


def _print_attention_knockouts(knockouts: pd.DataFrame) -> None:
    for name, rows in _iterate_conditions(knockouts):
        title = f"{name}: what is left when attention to its own tokens is cut"
        shown = showing.make_console_table("cut", ("in layers", *_CONTRAST_HEADERS), title)
        for row in showing.iterate_rows(rows):
            where = "none" if row["first"] < 0 else f"{row['first']}-{row['last']}"
            shown.add_row(*_contrast_cells(row, f"from {row['reader']}", where))
        showing.make_table_console().print(shown)


def _print_weight_patches(weight_patches: pd.DataFrame) -> None:
    for name, rows in _iterate_conditions(weight_patches):
        title = f"{name}: its weights switched on, its prompt always there"
        shown = showing.make_console_table("switched on", _CONTRAST_HEADERS, title)
        depth = rows.loc[rows["how"] == "up to", "layer"]
        shares = (0, 0.25, 0.5, 0.75, 1) if len(depth) else ()
        told = {int(np.quantile(depth, share, method="nearest")) for share in shares}
        for row in showing.iterate_rows(rows):
            if row["how"] == "module":
                what = f"{row['module']} in all layers"
            elif row["how"] in ("nothing", "everything"):
                what = row["how"]
            elif row["how"] == "up to" and row["layer"] in told:
                what = f"all up to layer {row['layer']}"
            else:
                continue
            shown.add_row(*_contrast_cells(row, what))
        showing.make_table_console().print(shown)


def _print_overlap_relation(overlap: pd.DataFrame) -> None:
    """Whether defenses that work by the same parts interact."""
    for (_, contrast), rows in overlap.groupby(["attack", "contrast"], sort=False):
        about = compute_mantel_correlation(rows)
        if about["p"] != about["p"]:
            _print_finding(f"Overlap of parts and interaction, {contrast}: {about['pairs']} pairs are too few to tell")
            continue
        _print_finding(
            f"Overlap of parts and interaction, {contrast}: over {about['pairs']} pairs the rank correlation "
            f"is {about['rank_correlation']:+.2f} (p = {about['p']:.2g}, defenses permuted)"
            + (": none is seen" if about["p"] > 0.05 else "")
        )


def _print_finding(text: str) -> None:
    showing.print_line(showing.make_table_console(), text)
