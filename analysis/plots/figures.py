"""Registry of all figures: for each kind its report section, title, drawing function and caption.

A new figure is one function that draws a table, one that writes its caption, and one row of `FIGURES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plots.backdooralign import caption_grid, draw_grid
from analysis.plots.captions import QueryCounts, make_caption_context
from analysis.plots.components import caption_part_map, caption_top_parts, draw_part_map, draw_top_parts
from analysis.plots.depth import (
    caption_depth_effects,
    caption_depth_rates,
    draw_depth_effects,
    draw_depth_rates,
)
from analysis.plots.dot_plots import (
    caption_dumbbell,
    caption_forest,
    caption_kinds,
    caption_pairs,
    draw_dumbbell,
    draw_forest,
    draw_kinds,
    draw_pairs,
)
from analysis.plots.heatmaps import (
    caption_attack_grid,
    caption_categories,
    caption_interactions,
    caption_profile_similarity,
    draw_attack_grid,
    draw_categories,
    draw_interactions,
    draw_profile_similarity,
)
from analysis.plots.interventions import (
    caption_attention_knockouts,
    caption_patches,
    caption_weight_patches,
    draw_attention_knockouts,
    draw_patches,
    draw_weight_patches,
)
from analysis.plots.layers import caption_directions, caption_layers, draw_directions, draw_layers
from analysis.plots.layout import (
    CANVAS_MARGIN,
    FigureError,
    finish_figure,
    fit_text,
    fit_width,
    shrink_texts,
    wrap_text,
)
from analysis.plots.models import (
    caption_model_effects,
    caption_model_order,
    caption_model_planes,
    draw_model_effects,
    draw_model_order,
    draw_model_planes,
)
from analysis.plots.plane import (
    caption_plane,
    caption_refusals,
    caption_square,
    draw_plane,
    draw_refusals,
    draw_square,
)
from analysis.plots.predictions import caption_forecast, draw_forecast
from analysis.plots.rank_agreement import caption_rank_agreement, draw_rank_agreement
from analysis.plots.scores import (
    caption_margins,
    caption_roc,
    caption_thresholds,
    draw_margins,
    draw_roc,
    draw_thresholds,
)
from analysis.plots.tradeoffs import (
    caption_cost,
    caption_pareto_front,
    caption_side_effects,
    draw_cost,
    draw_pareto_front,
    draw_side_effects,
)
from analysis.plots.validity import (
    caption_calibration,
    caption_refusal_rates,
    draw_calibration,
    draw_refusal_rates,
)
from analysis.stats.tables import UNDEFENDED, Trust, format_condition

STYLES = ("screen", "paper")
PAPER_WIDTHS = (3.3, 6.9)  # inches: a column of a page, and both
PAPER_MARGIN = 0.03  # inches around a figure on paper
PAPER_DPI = 300  # of what has pixels
# Smallest width of axes, as a share of what the drawing function asks: of one panel, of several, and without
# a width that the user has chosen.
_MIN_SINGLE_SCALE, _MIN_PANEL_SCALE, _LEGIBLE_SCALE = 0.3, 0.45, 0.55
_DEFENSE_COLUMNS = ("defense", "other", "first", "second")


@dataclass(frozen=True)
class FigureKind:
    """One kind of figure.

    Attributes:
        kind: stem of its files, such as `plane`; a readout, a defense or an attack may follow after a hyphen.
        section: section of the report that shows it.
        title: line above the figure; `{}` stands for the defense.
        table: kind of the table that the caption counts from; usually the one that is drawn.
        draw: draws the table and returns the axes.
        caption: returns the caption, given that table and the facts about the run.
        has_units: whether both take the unit of the axes.
        is_single: whether it has one panel, so that it can be drawn into given axes.
        keeps_shape: whether its height changes with its width; otherwise, rows or panels give the height.
    """

    kind: str
    section: str
    title: str
    table: str
    draw: Callable[..., Axes]
    caption: Callable[..., str]
    has_units: bool = False
    is_single: bool = False
    keeps_shape: bool = False


# In the order of the report.
_FIGURE_KINDS = (
    FigureKind(
        "refusals",
        "run",
        "Refusal rates under each defense, by judged responses",
        "refusals",
        draw_refusals,
        caption_refusals,
        is_single=True,
        keeps_shape=True,
    ),
    FigureKind(
        "plane",
        "run",
        "Safety shift and harmfulness discrimination of each defense",
        "plane",
        draw_plane,
        caption_plane,
        has_units=True,
        is_single=True,
        keeps_shape=True,
    ),
    FigureKind(
        "forest",
        "run",
        "Shift and discrimination of each defense with their intervals",
        "forest",
        draw_forest,
        caption_forest,
    ),
    FigureKind(
        "dumbbell",
        "run",
        "Refusal rates of harmful and of benign queries, by defense",
        "dumbbell",
        draw_dumbbell,
        caption_dumbbell,
        is_single=True,
    ),
    FigureKind(
        "pairs",
        "run",
        "Refusals of harmful queries and of their benign twins, by defense",
        "pairs",
        draw_pairs,
        caption_pairs,
        is_single=True,
    ),
    FigureKind(
        "categories",
        "run",
        "Refusal rates by category of queries and defense",
        "categories",
        draw_categories,
        caption_categories,
    ),
    FigureKind(
        "thresholds",
        "run",
        "Shift and discrimination of the readout's refusals, by its threshold",
        "thresholds",
        draw_thresholds,
        caption_thresholds,
    ),
    FigureKind(
        "roc",
        "run",
        "ROC curves of the first-token margin, by defense",
        "roc",
        draw_roc,
        caption_roc,
        is_single=True,
        keeps_shape=True,
    ),
    FigureKind(
        "margins",
        "run",
        "Margins of harmful and benign queries, by defense",
        "margins",
        draw_margins,
        caption_margins,
        is_single=True,
    ),
    FigureKind(
        "square",
        "run",
        "Shift and discrimination by ingredient: secret prompt, tuned weights",
        "square",
        draw_square,
        caption_square,
        is_single=True,
        keeps_shape=True,
    ),
    FigureKind(
        "grid",
        "run",
        "Refusal rates of fine-tuned models, by settings of the training",
        "grid",
        draw_grid,
        caption_grid,
    ),
    FigureKind(
        "agreement",
        "run",
        "Rank correlation of the defenses' effects on two data sets, by measure",
        "agreement",
        draw_rank_agreement,
        caption_rank_agreement,
        is_single=True,
    ),
    FigureKind(
        "models_plane",
        "models",
        "Shift and discrimination of each defense, by model",
        "models_plane",
        draw_model_planes,
        caption_model_planes,
    ),
    FigureKind(
        "models_effects",
        "models",
        "Shift and discrimination of each defense over the models",
        "models_effects",
        draw_model_effects,
        caption_model_effects,
    ),
    FigureKind(
        "models_order",
        "models",
        "Agreement of the models on the order of the defenses",
        "models_order",
        draw_model_order,
        caption_model_order,
    ),
    FigureKind(
        "kinds",
        "kinds",
        "Over-refusal by kind of benign query, under each defense",
        "kinds",
        draw_kinds,
        caption_kinds,
        is_single=True,
    ),
    FigureKind(
        "attacks",
        "attacks",
        "Margins and refusal rates of each defense under each attack",
        "attacks",
        draw_attack_grid,
        caption_attack_grid,
    ),
    FigureKind(
        "depth_effects",
        "depth",
        "Shift and discrimination after the first tokens of an opener",
        "depth_effects",
        draw_depth_effects,
        caption_depth_effects,
    ),
    FigureKind(
        "depth_rates",
        "depth",
        "Refusal rates after the first tokens of an opener, by defense",
        "depth_rates",
        draw_depth_rates,
        caption_depth_rates,
    ),
    FigureKind(
        "cost",
        "cost",
        "Change of AUROC and time to the first token, by defense",
        "cost",
        draw_cost,
        caption_cost,
        is_single=True,
        keeps_shape=True,
    ),
    FigureKind(
        "side_effects",
        "cost",
        "Change of the first token on benign queries and shift, by defense",
        "side_effects",
        draw_side_effects,
        caption_side_effects,
        is_single=True,
        keeps_shape=True,
    ),
    FigureKind(
        "calibration",
        "validity",
        "Calibration of the readout: refusal probability and share of refusals",
        "rates",
        draw_calibration,
        caption_calibration,
        is_single=True,
        keeps_shape=True,
    ),
    FigureKind(
        "rates",
        "validity",
        "Refusal rates of each condition, by generated text and by readout",
        "rates",
        draw_refusal_rates,
        caption_refusal_rates,
        is_single=True,
    ),
    FigureKind(
        "forecast",
        "ensembles",
        "Predicted and observed effects of ensembles",
        "forecast",
        draw_forecast,
        caption_forecast,
        keeps_shape=True,
    ),
    FigureKind(
        "interactions",
        "ensembles",
        "Interaction of two defenses: observed effect of the stack minus the sum of its members",
        "interactions",
        draw_interactions,
        caption_interactions,
        keeps_shape=True,
    ),
    FigureKind(
        "front",
        "ensembles",
        "Benign queries answered, harmful queries refused and cost: Pareto front",
        "front",
        draw_pareto_front,
        caption_pareto_front,
        keeps_shape=True,
    ),
    FigureKind(
        "layers",
        "mechanism",
        "Effect of each defense by layer (logit lens)",
        "layers",
        draw_layers,
        caption_layers,
    ),
    FigureKind(
        "parts",
        "mechanism",
        "Direct logit attribution of the effect of {}, by head and MLP",
        "parts",
        draw_part_map,
        caption_part_map,
        keeps_shape=True,
    ),
    FigureKind(
        "top",
        "mechanism",
        "Largest attributions to the effect of {}",
        "top",
        draw_top_parts,
        caption_top_parts,
    ),
    FigureKind(
        "directions",
        "mechanism",
        "Effect of each defense along the refusal and harmfulness directions, by layer",
        "directions",
        draw_directions,
        caption_directions,
    ),
    FigureKind(
        "patches",
        "mechanism",
        "Activation patching of {}: effect of each patch, by layer and head",
        "patches",
        draw_patches,
        caption_patches,
    ),
    FigureKind(
        "cuts",
        "mechanism",
        "Effect of each defense under attention knockout",
        "cuts",
        draw_attention_knockouts,
        caption_attention_knockouts,
    ),
    FigureKind(
        "weights",
        "mechanism",
        "Weight patching of {}: effect of its weight change, by layer and module",
        "weights",
        draw_weight_patches,
        caption_weight_patches,
    ),
    FigureKind(
        "profiles",
        "mechanism",
        "Cosine similarity of the defenses' attribution profiles",
        "profiles",
        draw_profile_similarity,
        caption_profile_similarity,
        keeps_shape=True,
    ),
)
FIGURES = {figure.kind: figure for figure in _FIGURE_KINDS}


def draw_figure(
    tables: Mapping[str, pd.DataFrame],
    record: Mapping[str, Any],
    name: str,
    unit: str | None = None,
    *,
    ax: Axes | None = None,
    defenses: Sequence[str] | None = None,
    title: bool | None = None,
    caption: bool | None = None,
    style: str = "screen",
    width: float | None = None,
) -> Figure:
    """Return a figure, with a warning above it if generated text contradicts the readout.

    Args:
        tables: tables of the run by stem, among them the one of that name.
        record: contents of the run's `run.json`.
        name: name of the figure, such as `plane` or `parts-backdoor`.
        unit: unit of the axes of the plane, SD or nats; by default SD where the run has it.
        ax: axes to draw into, of a figure with one panel; they get no caption.
        defenses: the defenses to draw besides the undefended model; by default all.
        title: whether to write the title; by default on a screen.
        caption: whether to write the caption below the figure; by default on a screen, and never into `ax`.
        style: screen or paper (texts of 8 points, `PAPER_WIDTHS`, no title and no caption by default).
        width: of the figure, inches; by default, on paper the smaller of `PAPER_WIDTHS` in which the axes
            stay legible, on a screen as wide as the content.

    Raises:
        FigureError: if the run has no such figure, or it cannot be drawn as asked.
    """
    kind = find_figure_kind(name)
    if name not in tables or kind not in FIGURES:
        known = ", ".join(stem for stem in tables if find_figure_kind(stem) in FIGURES)
        raise FigureError(f"no figure {name!r} in this run; it has {known or 'none'}")
    _check_options(name, kind, unit, ax, style, width)
    figure = FIGURES[kind]
    if defenses is not None:
        counted = figure.table + name.removeprefix(kind)
        chosen = {stem: select_defenses(tables[stem], stem, defenses) for stem in {name, counted} & {*tables}}
        tables = {**tables, **chosen}
    points = tables[name]
    options = {} if unit is None else {"unit": unit}
    is_paper = style == "paper"
    heading = format_figure_title(kind, points) if (not is_paper if title is None else title) else ""
    if ax is not None:
        return _draw_into_axes(name, figure, points, ax, heading, is_paper, options)
    text = (
        format_figure_caption(tables, record, name, unit)
        if (not is_paper if caption is None else caption)
        else ""
    )
    warning = _format_warning(points, tables.get("summary")) if figure.section == "mechanism" else ""

    def draw() -> Axes:
        drawn = figure.draw(points, **options)
        if is_paper:
            shrink_texts(drawn)
        return drawn

    margin = PAPER_MARGIN if is_paper else CANVAS_MARGIN
    min_scale = _MIN_SINGLE_SCALE if figure.is_single else _MIN_PANEL_SCALE
    drawn: Axes | None = None
    if width is not None:
        try:
            drawn = fit_width(draw, width, figure.keeps_shape, min_scale, margin)
        except FigureError as error:
            raise FigureError(f"figure {name} at a width of {width:g} inches: {error}") from error
    elif is_paper:
        for paper_width in PAPER_WIDTHS:
            with suppress(FigureError):
                drawn = fit_width(draw, paper_width, figure.keeps_shape, _LEGIBLE_SCALE, margin)
                width = paper_width
                break
    finished = finish_figure(drawn or draw(), heading, text, warning, width, margin)
    if is_paper:
        finished.set_dpi(PAPER_DPI)
    return finished


def select_defenses(points: pd.DataFrame, name: str, defenses: Sequence[str]) -> pd.DataFrame:
    """Return the rows of some defenses and of the undefended model.

    >>> select_defenses(pd.DataFrame({"defense": ["none", "a", "b"]}), "plane", ["b"])["defense"].tolist()
    ['none', 'b']

    Args:
        points: table of a figure.
        name: name of the figure, for the error message.
        defenses: names of defenses.

    Raises:
        FigureError: if the figure does not show one of them, or shows no defenses to choose from.
    """
    shown = list_shown_defenses(points)
    if not shown:
        raise FigureError(f"figure {name} shows no defenses to choose from; draw it without this choice")
    for defense in defenses:
        if defense not in shown:
            raise FigureError(f"figure {name} does not show {defense!r}; it shows {', '.join(shown)}")
    kept = {UNDEFENDED, *defenses}
    if "members" in points:
        return points[[kept.issuperset(team.split("+")) for team in points["members"].astype(str)]]
    columns = [column for column in _DEFENSE_COLUMNS if column in points]
    return points[points[columns].isin(kept).all(axis=1)].reset_index(drop=True)


def list_shown_defenses(points: pd.DataFrame) -> list[str]:
    """Return the defenses among which the rows of a figure can be chosen; none for one design of several."""
    if "corner" in points:  # the square of an ablation needs all four
        return []
    if "members" in points:
        names: list[str] = [name for team in points["members"].astype(str) for name in team.split("+")]
    else:
        names = [str(name) for column in _DEFENSE_COLUMNS if column in points for name in points[column]]
    return [name for name in dict.fromkeys(names) if name != UNDEFENDED]


def _check_options(
    name: str, kind: str, unit: str | None, ax: Axes | None, style: str, width: float | None
) -> None:
    """Raise if a figure has no such option."""
    if unit is not None and not FIGURES[kind].has_units:
        raise FigureError(f"the figure {name!r} has no choice of units; only the plane has one")
    if style not in STYLES:
        raise FigureError(f"unknown style {style!r}; there are {' and '.join(STYLES)}")
    if width is not None and not 1 <= width <= 100:
        raise FigureError(
            f"width {width:g}: it takes inches, from 1 to 100; a column is {PAPER_WIDTHS[0]} wide"
        )
    if ax is not None and width is not None:
        raise FigureError("width: given axes keep their size; omit it, or omit ax")
    if ax is not None and not FIGURES[kind].is_single:
        raise FigureError(_explain_panels(name))


def _explain_panels(name: str) -> str:
    single = ", ".join(figure.kind for figure in FIGURES.values() if figure.is_single)
    return f"figure {name} has several panels and is not drawn into given axes; with one panel: {single}"


def _draw_into_axes(
    name: str,
    figure: FigureKind,
    points: pd.DataFrame,
    ax: Axes,
    heading: str,
    is_paper: bool,
    options: Mapping[str, Any],
) -> Figure:
    """Draw a figure of one panel into axes of the caller; return the figure that they belong to."""
    figure.draw(points, ax=ax, **options)
    if is_paper:
        shrink_texts(ax)
    if heading:
        ax.set_title(
            "\n".join(wrap_text(heading, ax.get_window_extent().width * 72 / ax.figure.dpi, 9, "bold")),
            loc="left",
            fontsize=9,
            weight="bold",
        )
    owner = ax.get_figure(root=True)
    assert owner is not None
    return owner


def find_figure_kind(stem: str) -> str:
    """Return the kind of a figure from its name, which may end in a readout, a defense or an attack.

    >>> find_figure_kind("parts-backdoor"), find_figure_kind("plane-base64"), find_figure_kind("mine")
    ('parts', 'plane', 'mine')
    """
    return next((kind for kind in FIGURES if re.match(rf"{kind}(-|$)", stem)), stem)


def format_figure_title(kind: str, points: pd.DataFrame) -> str:
    """Return the title of a figure.

    Args:
        kind: kind of the figure.
        points: drawn table.
    """
    return FIGURES[kind].title.format(find_single_defense(kind, points) or "the defense")


def find_single_defense(kind: str, points: pd.DataFrame) -> str:
    """Return the defense that a mechanism figure shows, empty if it shows several."""
    is_mechanism = kind in FIGURES and FIGURES[kind].section == "mechanism"
    is_single = is_mechanism and "defense" in points and points["defense"].nunique() == 1
    return str(points["defense"].iloc[0]) if is_single else ""


def format_figure_caption(
    tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any], name: str, unit: str | None = None
) -> str:
    """Return the caption of a figure.

    Args:
        tables: tables of the run by stem, among them the one of that name.
        record: contents of the run's `run.json`.
        name: name of the figure.
        unit: unit of the axes, of a figure that has units.
    """
    kind = find_figure_kind(name)
    suffix = name.removeprefix(kind)
    context = make_caption_context(record, suffix.removeprefix("-"), _count_queries(tables, record))
    options = {} if unit is None else {"unit": unit}
    return FIGURES[kind].caption(tables[FIGURES[kind].table + suffix], context, **options)


def _count_queries(tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any]) -> QueryCounts:
    """Return the numbers of harmful and benign queries drawn; None if one split is drawn and not counted."""
    names = ("n_harmful", "n_benign")
    if "reported_on" not in record:
        if not set(names) <= set(record["data"]):
            return None
        harmful, benign = (int(record["data"][name]) for name in names)
        return harmful, benign
    if "summary" not in tables:
        return None
    harmful, benign = (int(tables["summary"][name].iloc[0]) for name in names)
    return harmful, benign


def _format_warning(points: pd.DataFrame, summary: pd.DataFrame | None) -> str:
    """Return the warning above a mechanism figure, empty if no drawn condition is known to be untrusted."""
    if summary is None or not len(summary):
        return ""
    # Every contrast is against the undefended model, which therefore counts as drawn.
    names = {UNDEFENDED, *points["defense"], *points.get("other", [])}
    rows = summary[(summary["attack"] == points["attack"].iloc[0]) & summary["defense"].isin(names)]
    untrusted = [
        fit_text(format_condition(row), 190, 8.5, 1)
        for row in rows[rows["trusted"] == Trust.NOT_TRUSTED].to_dict("records")
    ]
    if not untrusted:
        return ""
    return f"Not trusted: generated text contradicts the readout under {', '.join(dict.fromkeys(untrusted))}"
