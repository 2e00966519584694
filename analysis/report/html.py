"""Render one self-contained HTML page from one or several runs: charts, tables, figures and queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.families import format_family
from analysis.plots.data import (
    LINEAR_RANGE,
    PLANE_COLUMNS,
    build_plane_points,
    choose_plane_unit,
    is_stretched,
)
from analysis.plots.figures import (
    FIGURES,
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
from analysis.report.results import RATE_COLUMNS, Run
from analysis.report.tables import (
    HtmlTable,
    build_attack_tables,
    build_control_tables,
    build_cost_tables,
    build_depth_tables,
    build_ensemble_tables,
    build_kind_tables,
    build_model_tables,
    build_summary_tables,
    build_validity_tables,
    compare_runs,
)
from analysis.report.thumbnails import describe_left_out_images, embed_thumbnails, locate_thumbnails
from analysis.stats.format import ColumnFormat, format_estimate, format_verdict
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, Trust, iterate_rows

if TYPE_CHECKING:
    from jinja2 import Template

MAX_PAGE_BYTES = 7_900_000  # small enough for mail servers and for a phone
MAX_QUERY_LENGTH = 1500  # characters of a query's text
RUN_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
# Figures that the page also draws as interactive charts; the static ones are folded.
INTERACTIVE_KINDS = ("plane", "roc", "margins", "attacks")
_LEFT_OUT_LIST_BYTES = 20_000  # reserved for the list of files that are left out
_SCRIPT_FILES = ("charts.js", "plane.js", "closer_look.js", "page.js")
_PAGE_FOLDER = Path(__file__).parent / "page"
# matplotlib markers as Vega symbols.
_VEGA_SHAPES = {
    "o": "circle",
    "D": "diamond",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "<": "triangle-left",
    "8": "M-0.41,-1L0.41,-1L1,-0.41L1,0.41L0.41,1L-0.41,1L-1,0.41L-1,-0.41Z",
    "P": "cross",
    "h": "M-0.5,-0.87L0.5,-0.87L1,0L0.5,0.87L-0.5,0.87L-1,0Z",
    "p": "M0,-1L0.95,-0.31L0.59,0.81L-0.59,0.81L-0.95,-0.31Z",
    "X": "M-1,-0.5L-0.5,-1L0,-0.5L0.5,-1L1,-0.5L0.5,0L1,0.5L0.5,1L0,0.5L-0.5,1L-1,0.5L-0.5,0Z",
}
_OTHER_VEGA_SHAPE = "triangle-right"


@dataclass(frozen=True)
class ReportFigure:
    """A static figure of a run.

    Attributes:
        name: of its file.
        kind: kind of figure, such as `plane`.
        section: section of the page.
        title: line above the figure.
        caption: alternative text.
        table: name of the CSV file that it was drawn from; empty if there is none.
    """

    name: str
    kind: str
    section: str
    title: str
    caption: str
    table: str


@dataclass(frozen=True)
class _PageSection:
    """A section of a run: tables and static figures; folded if the page shows them as charts."""

    title: str
    tables: list[HtmlTable]
    figures: list[ReportFigure]
    is_folded: bool = False


@dataclass(frozen=True)
class _RunContent:
    """The content of a run, prepared for the template; the unit of its plane is SD or nats."""

    run: Run
    summaries: list[HtmlTable]
    sections: list[_PageSection]
    csv_names: list[str]
    plane_unit: str


def render_page(runs: Sequence[Run], max_bytes: int = MAX_PAGE_BYTES) -> str:
    """Return the page as HTML.

    Args:
        runs: in the order of the page, with unique names.
        max_bytes: size limit of the page; figures and tables beyond it are left out, and the page names them.
            Thumbnails of images take up to half of what the page itself leaves.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_PAGE_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = _load_scripts()
    comparison, comparison_points = compare_runs(runs)
    data: dict[str, Any] = {
        "runs": [build_chart_data(run) for run in runs],
        "comparison": comparison_points,
        "colors": RUN_COLORS,
        "shapes": map_family_shapes(),
        "thumbnails": [],
    }
    context: dict[str, Any] = {
        "contents": [_build_run_content(run) for run in runs],
        "comparison": comparison,
        "policy": build_content_policy(scripts),
        "scripts": [Markup(script) for script in scripts],
        "style": Markup((_PAGE_FOLDER / "report.css").read_text("utf-8")),
        "data": dump_script_json(data),
        "image_notes": [""] * len(runs),
        "colors": {family: color for family, (color, _) in FAMILY_STYLES.items()},
    }
    template = environment.get_template("report.html")
    budget = max_bytes - _LEFT_OUT_LIST_BYTES - _measure_without_files(template, context)
    if any(run.images for run in runs):
        thumbnails = embed_thumbnails(runs, budget // 2)
        for run, run_data in zip(runs, data["runs"], strict=True):
            run_data["images"] = locate_thumbnails(run, thumbnails)
        data["thumbnails"] = list(thumbnails.values())
        context["data"] = dump_script_json(data)
        context["image_notes"] = [describe_left_out_images(run, thumbnails) for run in runs]
        budget = max_bytes - _LEFT_OUT_LIST_BYTES - _measure_without_files(template, context)
    encoded = _encode_files(runs)
    # Figures before tables and short files before long ones, so that as many as possible fit.
    order = sorted(encoded, key=lambda key: (key[1].endswith(".csv"), len(encoded[key][1])))
    fitting = choose_fitting({key: len(encoded[key][1]) for key in order}, budget)
    left_out = [f"{run_name}/{name}" for run_name, name in order if (run_name, name) not in fitting]
    return template.render(context, embedded={key: encoded[key] for key in fitting}, left_out=left_out)


def _measure_without_files(template: Template, context: Mapping[str, Any]) -> int:
    """Return the size of the page in bytes without the figures and tables that it embeds."""
    return len(template.render(context, embedded={}, left_out=[]).encode())


@cache
def _load_scripts() -> tuple[str, str]:
    """Return Vega's JavaScript bundle and the page's own script.

    The content security policy contains their hashes, so not a byte may be added in the template.
    """
    from vl_convert import javascript_bundle

    own_script = "\n".join((_PAGE_FOLDER / name).read_text("utf-8") for name in _SCRIPT_FILES)
    # Without a snippet, contrary to its type hints, it returns the bundle that exposes the libraries.
    make_bundle: Any = javascript_bundle
    return make_bundle(), f'(() => {{\n"use strict";\n{own_script}\n}})();'


def _encode_files(runs: Sequence[Run]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (run, file) → (name for saving, data URI)."""
    return {
        (run.name, name): (
            encode_table(name, content) if name.endswith(".csv") else (name, encode_picture(content))
        )
        for run in runs
        for name, content in run.files.items()
    }


def _build_run_content(run: Run) -> _RunContent:
    figures = list_report_figures(run)
    interactive = (
        *(INTERACTIVE_KINDS[:1] if "summary" in run.tables else ()),
        *(INTERACTIVE_KINDS[1:] if "scores" in run.tables else ()),
    )
    folded = [figure for figure in figures if figure.kind in interactive]
    sections = []
    for name, title, tables in (
        ("run", "Figures", []),
        ("models", "Comparison of models", build_model_tables(run)),
        ("controls", "Matched controls", build_control_tables(run)),
        ("kinds", "Kinds of benign queries", build_kind_tables(run)),
        ("attacks", "Defenses × attacks", build_attack_tables(run)),
        ("validity", "Validity of the readout", build_validity_tables(run)),
        ("depth", "Responses after the first tokens of an opener", build_depth_tables(run)),
        ("cost", "Cost", build_cost_tables(run)),
        ("ensembles", "Ensembles", build_ensemble_tables(run)),
        ("mechanism", "Mechanism: where in the model", []),
    ):
        shown = [figure for figure in figures if figure.section == name and figure not in folded]
        if shown or tables:
            sections.append(_PageSection(title, tables, shown))
    if folded:
        sections.append(_PageSection("The charts above as static figures", [], folded, is_folded=True))
    csv_names = sorted(name for name in run.files if name.endswith(".csv"))
    summaries = build_summary_tables(run) if "summary" in run.tables else []
    plane_unit = choose_plane_unit(run.tables.get("summary", pd.DataFrame()))
    return _RunContent(run, summaries, sections, csv_names, plane_unit)


def map_family_shapes() -> dict[str, str]:
    """Return the Vega symbol of each family of defenses."""
    return {
        family: _VEGA_SHAPES.get(marker, _OTHER_VEGA_SHAPE) for family, (_, marker) in FAMILY_STYLES.items()
    }


def build_chart_data(run: Run) -> dict[str, Any]:
    """Return the data of a run's interactive charts; entries without a table are missing.

    Args:
        run: with `summary.csv`, `scores.csv`, both or neither.

    Returns:
        `plane`: attack → points, the unit of both axes, and whether they are stretched; `queries`: id, text,
        class and category of each; `margins`: attack → defense → margin of each query (nats; null if it was
        not scored); `prompts`: attack → defense → what the model read.
    """
    data: dict[str, Any] = {"name": run.name, "linear_range": LINEAR_RANGE}
    if not run.model_runs:
        data["threshold"] = run.threshold
    if "summary" in run.tables:
        summary = run.tables["summary"]
        data["plane"] = {
            str(attack): _build_plane_data(rows) for attack, rows in summary.groupby("attack", sort=False)
        }
    if "scores" in run.tables:
        scores = run.tables["scores"]
        queries = scores.drop_duplicates("query")
        ids = queries["query"].astype(str).tolist()
        categories = queries["category"].fillna("").astype(str)
        data["queries"] = [
            [query_id, _truncate_text(run.texts.get(query_id, "")), int(harmful), category]
            for query_id, harmful, category in zip(ids, queries["harmful"], categories, strict=True)
        ]
        data["margins"] = {}
        for (attack, defense), rows in scores.groupby(["attack", "defense"], sort=False):
            margins = pd.Series(rows["margin"].to_numpy(float), rows["query"].astype(str)).reindex(ids)
            data["margins"].setdefault(str(attack), {})[str(defense)] = margins.round(3).tolist()
        data["prompts"] = _collect_prompts(run.tables.get("prompts"), run.texts)
    return data


def _collect_prompts(prompts: pd.DataFrame | None, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return what the model read: attack → defense → the text around every request, or examples.

    If two queries are surrounded by the same text, so is every other: `around` holds that text. Otherwise,
    `examples` holds the prompts of both queries by id. `readings` is the number of copies of a prompt, of
    which the first is shown.

    Args:
        prompts: `prompts.csv`.
        texts: of the queries, by id.
    """
    collected: dict[str, dict[str, Any]] = {}
    groups = () if prompts is None else prompts.groupby(["attack", "defense"], sort=False)
    for (attack, defense), rows in groups:
        examples = dict(zip(rows["query"].astype(str), rows["read"].astype(str), strict=True))
        surroundings = {
            tuple(prompt.split(texts[query_id])) if texts.get(query_id) else ()
            for query_id, prompt in examples.items()
        }
        around = surroundings.pop() if len(surroundings) == 1 and len(examples) > 1 else ()
        entry = {"around": list(around)} if len(around) > 1 else {"examples": examples}
        collected.setdefault(str(attack), {})[str(defense)] = entry | {
            "readings": int(rows["readings"].max())
        }
    return collected


def _build_plane_data(summary: pd.DataFrame) -> dict[str, Any]:
    conditions = list(iterate_rows(summary[summary["defense"] != UNDEFENDED]))
    rows = build_plane_points(summary).assign(
        family_name=[format_family(str(row["family"])) for row in conditions],
        verdict=[format_verdict(row) for row in conditions],
        rates=[", ".join(_format_rate(row, column) for column in RATE_COLUMNS) for row in conditions],
    )
    unit = choose_plane_unit(rows)
    columns = PLANE_COLUMNS[unit]
    rows = rows.dropna(subset=[*columns])
    names = {
        f"{column}{end}": f"{axis}{end}"
        for column, axis in zip(columns, "xy", strict=True)
        for end in INTERVAL_SUFFIXES
    }
    names |= {"defense": "name"} | {name: name for name in ("family", "family_name", "verdict", "rates")}
    points = rows[list(names)].rename(columns=names).round(4)
    is_untrusted = rows.get("trusted", pd.Series("", rows.index)) == Trust.NOT_TRUSTED
    return {
        "points": points.assign(untrusted=is_untrusted).to_dict("records"),
        "stretched": is_stretched(rows, unit),
        "unit": unit,
    }


def _format_rate(row: Mapping[str, Any], column: ColumnFormat) -> str:
    """Return a rate with its name and interval, such as `harmful refused 25 % [7, 59]`."""
    name = column[1].removesuffix(" (%)")
    value, _, interval = format_estimate(row, column).partition(" ")
    return f"{name} {value}" if value == "–" else f"{name} {value}\u00a0% {interval}".rstrip(" ")


def _truncate_text(text: str) -> str:
    if len(text) <= MAX_QUERY_LENGTH:
        return text
    return f"{text[:MAX_QUERY_LENGTH]} … ({len(text) - MAX_QUERY_LENGTH:,} more characters)"


def list_report_figures(run: Run) -> list[ReportFigure]:
    """Return the static figures of a run, in the order of the page."""
    figures = [_describe_report_figure(run, name) for name in run.files if name.endswith(".png")]
    ranks = {kind: rank for rank, kind in enumerate(FIGURES)}
    return sorted(figures, key=lambda figure: (ranks.get(figure.kind, len(ranks)), figure.name))


def _describe_report_figure(run: Run, name: str) -> ReportFigure:
    stem = name.removesuffix(".png")
    kind = find_figure_kind(stem)
    table = f"{stem}.csv" if f"{stem}.csv" in run.files else ""
    points = run.tables.get(stem, pd.DataFrame())
    title = format_figure_title(kind, points) if kind in FIGURES else stem.replace("-", " ")
    subject = find_single_defense(kind, points) or stem.removeprefix(kind).lstrip("-")
    if subject and subject not in title:
        title += f" ({subject})"
    caption = f"Figure {name} of this run, as drawn by the command" + (
        f"; its numbers are in {table}." if table else "."
    )
    if len(points):
        # A table of another version may lack a column that its caption needs.
        with suppress(KeyError, ValueError, TypeError, IndexError, AttributeError):
            caption = format_figure_caption(run.tables, run.record, stem) or caption
    section = FIGURES[kind].section if kind in FIGURES else "run"
    return ReportFigure(name, kind, section, title, caption, table)
