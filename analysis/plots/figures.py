"""Titles and captions of the figures of where in a model a defense acts; each caption needs no other page."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plots.backdooralign import caption_secrets, draw_secrets
from analysis.plots.captions import CaptionContext, make_caption_context
from analysis.plots.components import caption_part_map, caption_top_parts, draw_part_map, draw_top_parts
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
from analysis.plots.layers import caption_directions, caption_layers, draw_directions, draw_layers
from analysis.plots.layout import finish_figure, fit_text
from analysis.plots.plane import caption_plane, caption_square, draw_plane, draw_square
from analysis.plots.predictions import caption_forecast, draw_forecast
from analysis.plots.scores import caption_margins, caption_roc, draw_margins, draw_roc
from analysis.plots.tradeoffs import caption_cost, caption_pareto_front, draw_cost, draw_pareto_front
from analysis.plots.validity import caption_validity, draw_calibration, draw_refusal_rates
from analysis.report.results import Run
from analysis.stats.tables import UNDEFENDED, format_condition

if TYPE_CHECKING:
    from analysis.plots.captions import QueryCounts

# A "{}" stands for the defense.
MECHANISM_TITLES = {
    "layers": "The layers in which a defense's effect appears",
    "parts": "Colored: the heads and MLPs that write the effect of {}",
    "top": "The parts that write most of the effect of {}",
    "directions": "Whether a defense moves what the model holds of refusal and of harm",
    "patches": "Beyond its placebos, a patch carries the effect of {}",
    "cuts": "Near 0: there the defense's own tokens have to be read",
    "weights": "Where the tuned weights of {} act",
    "profiles": "Blue: two defenses act through the same parts",
}

MECHANISM_CAPTIONS: dict[str, Callable[[pd.DataFrame, CaptionContext, QueryCounts], str]] = {
    "layers": caption_layers,
    "parts": caption_part_map,
    "top": caption_top_parts,
    "directions": caption_directions,
    "patches": caption_patches,
    "cuts": caption_attention_knockouts,
    "weights": caption_weight_patches,
    "profiles": caption_profile_similarity,
}

FIGURE_TITLES = {
    "margins": "Shift moves both halves of a row; discrimination moves them apart",
    "plane": "Right: refuses more of everything. Up: separates better",
    "square": "What the secret adds, what the weights add, and what both do together",
    "calibration": "On the diagonal, the readout's probability can be believed",
    "rates": "On the diagonal, the readout counts refusals as the text does",
    "cost": "Up: separates better. Right: takes longer",
    "secrets": "Does it matter which secret? Each dot is one, trained anew",
    "attacks": "What is left of each defense under each attack",
    "roc": "Higher curve: separates better. Mark further along: refuses more",
    "forecast": "On the diagonal, an ensemble does what its members let expect",
    "interactions": "Blue: two defenses do more than both add up to. Orange: less",
    "front": "Up: refuses more harm. Right: answers more queries. Dark: slower",
}

FIGURE_SECTIONS = {
    "plane": "run",
    "roc": "run",
    "margins": "run",
    "square": "run",
    "secrets": "run",
    "attacks": "attacks",
    "cost": "cost",
    "calibration": "validity",
    "rates": "validity",
    "forecast": "ensembles",
    "interactions": "ensembles",
    "front": "ensembles",
    **dict.fromkeys(MECHANISM_TITLES, "mechanism"),
}


def find_figure_kind(stem: str) -> str:
    """Return what a picture of that name shows; behind it stands a readout, a defense or an attack.

    >>> find_figure_kind("parts-backdoor"), find_figure_kind("plane-base64"), find_figure_kind("mine")
    ('parts', 'plane', 'mine')
    """
    return next((one for one in FIGURE_SECTIONS if re.match(rf"{one}(-|$)", stem)), stem)


def format_figure_title(kind: str, points: pd.DataFrame) -> str:
    """Return the title that the command puts above a picture."""
    return {**FIGURE_TITLES, **MECHANISM_TITLES}[kind].format(
        find_single_defense(kind, points) or "the defense"
    )


def find_single_defense(kind: str, points: pd.DataFrame) -> str:
    """The defense that a picture of a mechanism is of, empty where there are several."""
    alone = kind in MECHANISM_TITLES and "defense" in points and points["defense"].nunique() == 1
    return str(points["defense"].iloc[0]) if alone else ""


def format_figure_caption(run: Run, stem: str) -> str:
    """Return the caption that the command puts below a picture, made from the table of that name."""
    kind, points = find_figure_kind(stem), run.tables[stem]
    judge = run.record.get("judge") or {}
    told: dict[str, Callable[[pd.DataFrame, Any], str]] = {
        "margins": caption_margins,
        "plane": caption_plane,
        "square": caption_square,
        "roc": caption_roc,
        "attacks": caption_attack_grid,
        "forecast": lambda rows, about: caption_forecast(rows, about, _count_drawn_queries(run)),
        "interactions": lambda rows, about: caption_interactions(rows, about, _count_drawn_queries(run)),
        "front": lambda rows, about: caption_pareto_front(
            rows, about, run.record["attacks"], _count_drawn_queries(run)
        ),
        "cost": caption_cost,
        "rates": lambda rows, about: caption_validity(rows, about, judge["name"], judge["new_tokens"]),
        "calibration": lambda rows, about: caption_validity(
            run.tables[stem.replace("calibration", "rates", 1)], about, judge["name"], judge["new_tokens"]
        ),
        "secrets": lambda rows, about: caption_secrets(rows, about, judge["new_tokens"]),
    }
    if kind in MECHANISM_CAPTIONS:
        told[kind] = lambda rows, about: MECHANISM_CAPTIONS[kind](rows, about, _count_drawn_queries(run))
    return told[kind](points, make_caption_context(run.record, stem.removeprefix(f"{kind}-")))


def _count_drawn_queries(run: Run) -> tuple[int, int] | None:
    """How many harmful and benign queries figures are of; None where one half is drawn and not counted."""
    named = ("n_harmful", "n_benign")
    if "reported_on" not in run.record:
        harmful, benign = (int(run.record["data"][name]) for name in named)
        return harmful, benign
    if "summary" not in run.tables:
        return None
    harmful, benign = (int(run.tables["summary"][name].iloc[0]) for name in named)
    return harmful, benign


FIGURES: dict[str, Callable[[pd.DataFrame], Axes]] = {
    "margins": draw_margins,
    "plane": draw_plane,
    "square": draw_square,
    "roc": draw_roc,
    "attacks": draw_attack_grid,
    "cost": draw_cost,
    "calibration": draw_calibration,
    "rates": draw_refusal_rates,
    "secrets": draw_secrets,
    "forecast": draw_forecast,
    "interactions": draw_interactions,
    "front": draw_pareto_front,
    "layers": draw_layers,
    "parts": draw_part_map,
    "top": draw_top_parts,
    "directions": draw_directions,
    "patches": draw_patches,
    "cuts": draw_attention_knockouts,
    "weights": draw_weight_patches,
    "profiles": draw_profile_similarity,
}


def draw_figure(run: Run, name: str) -> Figure:
    """Return a figure of a run with title and caption, and a warning where text contradicts what it shows.

    Args:
        run: as it was made, or as `read` found it in its folder.
        name: one of `run.figures`.
    """
    kind = find_figure_kind(name)
    if name not in run.figures or name not in run.tables or kind not in FIGURES:
        known = ", ".join(one for one in run.figures if one in run.tables)
        raise ValueError(f"no figure {name!r} in this run; it has {known or 'none'}")
    points = run.tables[name]
    warning = _untrusted_banner(points, run.tables.get("summary")) if kind in MECHANISM_TITLES else ""
    return finish_figure(
        FIGURES[kind](points), format_figure_title(kind, points), format_figure_caption(run, name), warning
    )


def _untrusted_banner(points: pd.DataFrame, summary: pd.DataFrame | None) -> str:
    """Return the warning above a figure, empty where nothing drawn is known to be wrong."""
    if summary is None or not len(summary):
        return ""
    # Every contrast is against the undefended model, which therefore is drawn too.
    names = {UNDEFENDED, *points["defense"], *points.get("other", [])}
    of = summary[(summary["attack"] == points["attack"].iloc[0]) & summary["defense"].isin(names)]
    doubtful = [
        fit_text(format_condition(row), 190, 8.5, 1)
        for row in of[of["trusted"] == "not trusted"].to_dict("records")
    ]
    if not doubtful:
        return ""
    return f"Not trusted: generated text contradicts the readout under {', '.join(dict.fromkeys(doubtful))}"
