"""Registry of all figures: for each kind its report section, title, drawing function and caption.

A new figure is one function that draws a table, one that writes its caption, and one row of `FIGURES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plots.backdooralign import caption_grid, caption_secrets, draw_grid, draw_secrets
from analysis.plots.captions import QueryCounts, make_caption_context
from analysis.plots.components import caption_part_map, caption_top_parts, draw_part_map, draw_top_parts
from analysis.plots.depth import (
    caption_depth_effects,
    caption_depth_rates,
    draw_depth_effects,
    draw_depth_rates,
)
from analysis.plots.heatmaps import (
    caption_attack_grid,
    caption_interactions,
    caption_profile_similarity,
    draw_attack_grid,
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
from analysis.plots.kinds import caption_kinds, draw_kinds
from analysis.plots.layers import caption_directions, caption_layers, draw_directions, draw_layers
from analysis.plots.layout import finish_figure, fit_text
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
from analysis.plots.scores import caption_margins, caption_roc, draw_margins, draw_roc
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
    """

    kind: str
    section: str
    title: str
    table: str
    draw: Callable[..., Axes]
    caption: Callable[..., str]
    has_units: bool = False


# In the order of the report.
_FIGURE_KINDS = (
    FigureKind(
        "refusals",
        "run",
        "Refusal rates under each defense, by judged responses",
        "refusals",
        draw_refusals,
        caption_refusals,
    ),
    FigureKind(
        "plane",
        "run",
        "Safety shift and harmfulness discrimination of each defense",
        "plane",
        draw_plane,
        caption_plane,
        has_units=True,
    ),
    FigureKind(
        "roc", "run", "ROC curves of the first-token margin, by defense", "roc", draw_roc, caption_roc
    ),
    FigureKind(
        "margins",
        "run",
        "Margins of harmful and benign queries, by defense",
        "margins",
        draw_margins,
        caption_margins,
    ),
    FigureKind(
        "square",
        "run",
        "Shift and discrimination by ingredient: secret prompt, tuned weights",
        "square",
        draw_square,
        caption_square,
    ),
    FigureKind(
        "secrets",
        "run",
        "Attack success rate by secret prompt, without and with the secret",
        "secrets",
        draw_secrets,
        caption_secrets,
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
    ),
    FigureKind(
        "side_effects",
        "cost",
        "Change of the first token on benign queries and shift, by defense",
        "side_effects",
        draw_side_effects,
        caption_side_effects,
    ),
    FigureKind(
        "calibration",
        "validity",
        "Calibration of the readout: refusal probability and share of refusals",
        "rates",
        draw_calibration,
        caption_calibration,
    ),
    FigureKind(
        "rates",
        "validity",
        "Refusal rates of each condition, by generated text and by readout",
        "rates",
        draw_refusal_rates,
        caption_refusal_rates,
    ),
    FigureKind(
        "forecast",
        "ensembles",
        "Predicted and observed effects of ensembles",
        "forecast",
        draw_forecast,
        caption_forecast,
    ),
    FigureKind(
        "interactions",
        "ensembles",
        "Interaction of two defenses: observed effect of the stack minus the sum of its members",
        "interactions",
        draw_interactions,
        caption_interactions,
    ),
    FigureKind(
        "front",
        "ensembles",
        "Benign queries answered, harmful queries refused and cost: Pareto front",
        "front",
        draw_pareto_front,
        caption_pareto_front,
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
    ),
)
FIGURES = {figure.kind: figure for figure in _FIGURE_KINDS}


def draw_figure(
    tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any], name: str, unit: str | None = None
) -> Figure:
    """Return a figure with title and caption, and a warning if generated text contradicts the readout.

    Args:
        tables: tables of the run by stem, among them the one of that name.
        record: contents of the run's `run.json`.
        name: name of the figure, such as `plane` or `parts-backdoor`.
        unit: unit of the axes of the plane, SD or nats; by default SD where the run has it.

    Raises:
        ValueError: if the run has no such figure, or the figure no such unit.
    """
    kind = find_figure_kind(name)
    if name not in tables or kind not in FIGURES:
        known = ", ".join(stem for stem in tables if find_figure_kind(stem) in FIGURES)
        raise ValueError(f"no figure {name!r} in this run; it has {known or 'none'}")
    points, figure = tables[name], FIGURES[kind]
    warning = _format_warning(points, tables.get("summary")) if figure.section == "mechanism" else ""
    if unit is not None and not figure.has_units:
        raise ValueError(f"the figure {name!r} has no choice of units; only the plane has one")
    options = {} if unit is None else {"unit": unit}
    caption = format_figure_caption(tables, record, name, unit)
    title = format_figure_title(kind, points)
    return finish_figure(figure.draw(points, **options), title, caption, warning)


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
