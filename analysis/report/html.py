"""One page of one or several runs that holds all it shows: charts, tables, pictures, queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.plots.data import LINEAR_RANGE, build_plane_points, is_stretched
from analysis.plots.figures import (
    FIGURE_SECTIONS,
    find_figure_kind,
    find_single_defense,
    format_figure_caption,
    format_figure_title,
)
from analysis.plots.style import BLUE, FAMILY_STYLES, GREEN, ORANGE, PURPLE, SKY, VERMILION
from analysis.report.embed import (
    build_content_policy,
    choose_fitting,
    dump_script_json,
    encode_picture,
    encode_table,
)
from analysis.report.results import Run
from analysis.report.tables import (
    HtmlTable,
    build_attack_tables,
    build_cost_tables,
    build_ensemble_tables,
    build_summary_tables,
    build_validity_tables,
    compare_runs,
)

MAX_PAGE_BYTES = 7_900_000  # bytes of a page: what a mail server takes, and a phone opens
RUN_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_SCRIPT_FILES = ("look.js", "plane.js", "closer.js", "start.js")
_PAGE_FOLDER = Path(__file__).parent / "page"


@dataclass(frozen=True)
class _RunSection:
    """A run, made ready for the template."""

    run: Run
    summaries: list[HtmlTable]
    sections: list[tuple[str, str, list[HtmlTable], list[ReportFigure]]]
    files: list[str]


def render_page(runs: Sequence[Run], max_bytes: int = MAX_PAGE_BYTES) -> str:
    """Return the page as HTML.

    Args:
        runs: in the order of the page, no two with one name.
        max_bytes: bytes; pictures, then tables, are left out where they would pass it, and the page says which.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from vl_convert import javascript_bundle

    maker = Environment(
        loader=FileSystemLoader(_PAGE_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Nothing may come before the first byte or behind the last: the policy names scripts by their hashes.
    ours = "\n".join((_PAGE_FOLDER / one).read_text("utf-8") for one in _SCRIPT_FILES)
    # Its own type hints ask for a snippet; without one it shows its libraries to the page.
    bundle: Any = javascript_bundle
    scripts = (bundle(), f'(() => {{\n"use strict";\n{ours}\n}})();')
    compared, dots = compare_runs(runs)
    data = {
        "runs": [build_chart_data(run) for run in runs],
        "across": dots,
        "colors": RUN_COLORS,
        "shapes": map_family_shapes(),
    }
    told: dict[str, Any] = {
        "parts": [_build_run_section(run) for run in runs],
        "compared": compared,
        "policy": build_content_policy(scripts),
        "scripts": [Markup(script) for script in scripts],
        "style": Markup((_PAGE_FOLDER / "report.css").read_text("utf-8")),
        "data": Markup(dump_script_json(data)),
        "colors": {name: color for name, (color, _) in FAMILY_STYLES.items()},
    }
    template = maker.get_template("report.html")
    bare = template.render(told, held={}, left_out=[])
    held = {
        (run.name, name): encode_table(name, file) if name.endswith(".csv") else (name, encode_picture(file))
        for run in runs
        for name, file in run.files.items()
    }
    # Pictures first, then tables, the short ones first: so most of what there is finds room.
    order = sorted(held, key=lambda key: (key[1].endswith(".csv"), len(held[key][1])))
    room = max_bytes - len(bare.encode()) - 20_000
    kept = choose_fitting({key: len(held[key][1]) for key in order}, room)
    left = [f"{run}/{name}" for run, name in order if (run, name) not in kept]
    return template.render(told, held={key: held[key] for key in kept}, left_out=left)


def _build_run_section(run: Run) -> _RunSection:
    found = list_report_figures(run)
    tables = {
        "run": ("Pictures of the run", []),
        "attacks": ("Defenses × attacks", build_attack_tables(run)),
        "validity": ("Validity of the readout", build_validity_tables(run)),
        "cost": ("Cost", build_cost_tables(run)),
        "ensembles": ("Ensembles", build_ensemble_tables(run)),
        "mechanism": ("Mechanism: where in the model", []),
    }
    drawn = (
        "plane" if "summary" in run.tables else "",
        *(INTERACTIVE_KINDS[1:] if "scores" in run.tables else ()),
    )
    folded = [one for one in found if one.kind in drawn]
    rooms = [
        (name, head, shown, pictures)
        for name, (head, shown) in tables.items()
        if (pictures := [one for one in found if one.section == name and one not in folded]) or shown
    ]
    if folded:
        rooms.append(("drawn", "The charts above, as the command drew them", [], folded))
    files = sorted(name for name in run.files if name.endswith(".csv"))
    return _RunSection(run, build_summary_tables(run) if "summary" in run.tables else [], rooms, files)


MAX_QUERY_LENGTH = 1500  # signs of a query that are carried
# matplotlib's marks, as Vega calls them.
_VEGA_SHAPES = {
    "o": "circle",
    "D": "diamond",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "P": "cross",
    "h": "M-0.5,-0.87L0.5,-0.87L1,0L0.5,0.87L-0.5,0.87L-1,0Z",
    "p": "M0,-1L0.95,-0.31L0.59,0.81L-0.59,0.81L-0.95,-0.31Z",
    "X": "M-1,-0.5L-0.5,-1L0,-0.5L0.5,-1L1,-0.5L0.5,0L1,0.5L0.5,1L0,0.5L-0.5,1L-1,0.5L-0.5,0Z",
}
_OTHER_VEGA_SHAPE = "triangle-right"  # a family of the user's own


def map_family_shapes() -> dict[str, str]:
    """Return the mark of each family, as Vega calls it."""
    return {name: _VEGA_SHAPES.get(mark, _OTHER_VEGA_SHAPE) for name, (_, mark) in FAMILY_STYLES.items()}


def build_chart_data(run: Run) -> dict[str, Any]:
    """Return what the charts of a run are drawn from; of a run without such tables, nothing.

    Args:
        run: one with `summary.csv`, `scores.csv`, both or neither.

    Returns:
        `plane`: attack → its points and whether its axes are logarithmic; `queries`: id, text, class and
        category of each; `margins`: attack → defense → a margin of each query (nats; null where it was not
        asked); `read`: attack → defense → what the model read.
    """
    found: dict[str, Any] = {"name": run.name, "threshold": run.threshold, "linear": LINEAR_RANGE}
    if "summary" in run.tables:
        summary = run.tables["summary"]
        found["plane"] = {
            str(attack): _build_plane_data(rows) for attack, rows in summary.groupby("attack", sort=False)
        }
    if "scores" in run.tables:
        scores = run.tables["scores"]
        each = scores.drop_duplicates("query")
        ids = each["query"].astype(str).tolist()
        category = each["category"].fillna("").astype(str)
        found["queries"] = [
            [one, _truncate_text(run.texts.get(one, "")), int(harmful), topic]
            for one, harmful, topic in zip(ids, each["harmful"], category, strict=True)
        ]
        found["margins"] = {}
        for (attack, defense), rows in scores.groupby(["attack", "defense"], sort=False):
            margin = pd.Series(rows["margin"].to_numpy(float), rows["query"].astype(str)).reindex(ids)
            found["margins"].setdefault(str(attack), {})[str(defense)] = margin.round(3).tolist()
        found["read"] = _collect_prompts(run.tables.get("prompts"), run.texts)
    return found


def _collect_prompts(prompts: pd.DataFrame | None, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What the model read, by attack and defense: what stands around a request, or examples.

    Where two requests stand between the same words, so does every other: `around` has these words. Else
    `seen` has what was read of either, by its id; `readings` says of how many copies that is the first.

    Args:
        prompts: `prompts.csv`.
        texts: of the queries.
    """
    found: dict[str, dict[str, Any]] = {}
    cells = () if prompts is None else prompts.groupby(["attack", "defense"], sort=False)
    for (attack, defense), rows in cells:
        seen = dict(zip(rows["query"].astype(str), rows["read"].astype(str), strict=True))
        around = {tuple(read.split(texts[one])) if texts.get(one) else () for one, read in seen.items()}
        alike = around.pop() if len(around) == 1 and len(seen) > 1 else ()
        told = {"around": list(alike)} if len(alike) > 1 else {"seen": seen}
        found.setdefault(str(attack), {})[str(defense)] = told | {"readings": int(rows["readings"].max())}
    return found


def _build_plane_data(summary: pd.DataFrame) -> dict[str, Any]:
    rows = build_plane_points(summary).assign(
        verdict=summary.loc[summary["defense"] != "none", "verdict"].tolist()
    )
    rows = rows.dropna(subset=["shift", "discrimination"])
    named = {"shift": "x", "shift_low": "xl", "shift_high": "xh"}
    named |= {"discrimination": "y", "discrimination_low": "yl", "discrimination_high": "yh"}
    named |= {"defense": "name", "family": "family", "verdict": "verdict"}
    points = rows[list(named)].rename(columns=named).round(4)
    doubt = rows.get("trusted", pd.Series("", rows.index)) == "not trusted"
    return {
        "points": points.assign(hollow=doubt).to_dict("records"),
        "stretched": is_stretched(rows),
    }


def _truncate_text(text: str) -> str:
    return (
        text
        if len(text) <= MAX_QUERY_LENGTH
        else f"{text[:MAX_QUERY_LENGTH]} … ({len(text) - MAX_QUERY_LENGTH:,} more signs)"
    )


# Pictures that the page draws anew, so that they can be asked; they are kept behind a fold.
INTERACTIVE_KINDS = ("plane", "roc", "margins", "attacks")


@dataclass(frozen=True)
class ReportFigure:
    """A picture of a run.

    Attributes:
        name: of its file.
        kind: what is drawn, such as `plane`.
        section: the part of the page that it belongs to.
        title: a line above it.
        caption: what stands in it, for those who cannot see it.
        table: name of the file that it was drawn from; empty where there is none.
    """

    name: str
    kind: str
    section: str
    title: str
    caption: str
    table: str


def list_report_figures(run: Run) -> list[ReportFigure]:
    """Return the pictures of a run, in the order of the page."""
    found = [_describe_report_figure(run, name) for name in run.files if name.endswith(".png")]
    rank = list(FIGURE_SECTIONS)
    return sorted(
        found, key=lambda one: (rank.index(one.kind) if one.kind in FIGURE_SECTIONS else len(rank), one.name)
    )


def _describe_report_figure(run: Run, name: str) -> ReportFigure:
    stem = name.removesuffix(".png")
    kind = find_figure_kind(stem)
    table = f"{stem}.csv" if f"{stem}.csv" in run.files else ""
    points = run.tables.get(stem, pd.DataFrame())
    title = format_figure_title(kind, points) if kind in FIGURE_SECTIONS else stem.replace("-", " ")
    of = find_single_defense(kind, points) or stem.removeprefix(kind).lstrip("-")
    title += f" ({of})" * bool(of and of not in title)
    caption = ""
    if len(points):
        # A table of another version may lack what its caption says.
        with suppress(KeyError, ValueError, TypeError, IndexError, AttributeError):
            caption = format_figure_caption(run, stem)
    plain = f"Figure {name} of this run, as the command drew it"
    plain += "; its numbers are in the table beside it." * bool(table) or "."
    return ReportFigure(name, kind, FIGURE_SECTIONS.get(kind, "run"), title, caption or plain, table)
