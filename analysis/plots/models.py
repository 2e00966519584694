"""Comparison of models: a plane for each, each effect over the models, and agreement on the order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.families import format_family
from analysis.plots.captions import CaptionContext, format_count_range, format_family_note
from analysis.plots.data import check_one_attack
from analysis.plots.labels import label_points, make_legend_marker
from analysis.plots.layout import (
    assign_curve_styles,
    draw_dots,
    extract_estimates,
    fit_text,
    place_legend_below,
    place_legend_beside,
    set_panel_titles,
    set_row_axis,
    stack_panels,
)
from analysis.plots.plane import compute_plane_limits, draw_family, draw_origin, sort_families
from analysis.plots.style import BLACK, FAMILY_STYLES, GREY, OTHER_FAMILY_STYLE, RC_PARAMS, TEXT_SIZE

_EFFECTS = ("shift", "discrimination")
_DIRECTIONS = {
    "shift": ("refuses less", "refuses more"),
    "discrimination": ("separates worse", "separates better"),
}
_N_COLUMNS = 3  # panels of planes in a row
_PLANE_SIZE, _PLANE_GAP = 2.3, 0.62  # inches
_DOT_STEP, _ROW_GAP = 0.11, 0.1  # inches between the dots of a defense, and added to each defense
_PAIR_HEIGHT = 0.34  # inches per pair of models
_MEAN = "mean over models"
_MEAN_DOT: Any = {
    "linestyle": "",
    "marker": "D",
    "markersize": 4.5,
    "color": BLACK,
    "markerfacecolor": "white",
}


def draw_model_planes(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw shift and discrimination of each defense, a panel per model; numbers name the defenses.

    >>> row = {"model": ["a", "b"], "attack": "direct", "defense": "policy", "family": "reminders"}
    >>> row |= {f"{x}{end}": 1.0 for x in ("shift", "discrimination") for end in ("", "_low", "_high")}
    >>> len(draw_model_planes(pd.DataFrame(row | {"unit": "SD"})).child_axes)
    2

    Args:
        points: rows with a model of the effects over models, of one attack.
        ax: axes to draw on; by default new ones.
    """
    points = sort_families(check_one_attack(points))
    unit = str(points["unit"].iloc[0])
    models = list(dict.fromkeys(points["model"]))
    numbers = {defense: place for place, defense in enumerate(dict.fromkeys(points["defense"]), 1)}
    n_columns = 2 if len(models) in (2, 4) else min(len(models), _N_COLUMNS)
    n_rows = -(-len(models) // n_columns)
    with rc_context(RC_PARAMS):
        ax, rows = stack_panels(
            ax, [_PLANE_SIZE] * n_rows, [_PLANE_GAP] * (n_rows - 1), n_columns, _PLANE_SIZE
        )
        panels = [panel for row in rows for panel in row]
        limits = [compute_plane_limits(points, effect) for effect in _EFFECTS]
        for panel, model in zip(panels, models, strict=False):
            of_model = points[points["model"] == model]
            origin = draw_origin(panel)
            panel.lines[-1].set_markersize(6)
            for family, members in of_model.groupby("family", sort=False):
                draw_family(panel, str(family), members, _EFFECTS)
            panel.set_xlim(limits[0])
            panel.set_ylim(limits[1])
            texts = [str(numbers[defense]) for defense in of_model["defense"]]
            label_points(panel, of_model, texts, 300, _EFFECTS)
            set_panel_titles([panel], [fit_text(str(model), 150, 8, 1)])
            panel.set_xlabel(f"shift ({unit})", fontsize=8)
        for row in rows:
            row[0].set_ylabel(f"discrimination ({unit})", fontsize=8)
        for panel in panels[len(models) :]:
            panel.set_visible(False)
        key = [origin, *_list_families(points, numbers)]
        place_legend_below(ax, key, n_columns=max(2, n_columns), gap=0.52)
    return ax


def draw_model_effects(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw shift and discrimination of each defense on each model, and their means over the models.

    >>> row = {"model": ["a", "b"], "attack": "direct", "defense": "policy", "family": "reminders"}
    >>> row |= {f"{x}{end}": 1.0 for x in ("shift", "discrimination") for end in ("", "_low", "_high")}
    >>> panels = draw_model_effects(pd.DataFrame(row | {"unit": "SD"})).child_axes
    >>> [text.get_text() for text in panels[0].get_yticklabels()]
    ['policy']

    Args:
        points: effects over models, of one attack; rows without a model are means.
        ax: axes to draw on; by default new ones.
    """
    check_one_attack(points)
    unit = str(points["unit"].iloc[0])
    by_model, means = points[points["model"].notna()], points[points["model"].isna()]
    defenses = list(dict.fromkeys(points["defense"]))
    styles = assign_curve_styles(map(str, by_model["model"]))
    n_dots = len(styles) + (1 if len(means) else 0)
    row_height = _DOT_STEP * n_dots + _ROW_GAP
    offsets = _DOT_STEP / row_height * ((n_dots - 1) / 2 - np.arange(n_dots))
    places = {defense: -place for place, defense in enumerate(defenses)}
    with rc_context(RC_PARAMS):
        ax, (panels,) = stack_panels(ax, [row_height * len(defenses)], [])
        for panel, effect in zip(panels, _EFFECTS, strict=True):
            for row in range(0, len(defenses), 2):
                panel.axhspan(-row - 0.5, -row + 0.5, color=GREY, alpha=0.12, linewidth=0, zorder=0)
            for (model, style), offset in zip(styles.items(), offsets, strict=False):
                rows = by_model[by_model["model"].astype(str) == model]
                draw_dots(
                    panel, rows, effect, [places[name] + offset for name in rows["defense"]], style, model
                )
            _draw_means(panel, means, effect, [places[name] + offsets[-1] for name in means["defense"]])
            set_row_axis(panel, defenses, f"{effect} ({unit})", with_names=panel is panels[0])
            panel.set_xlim(_effect_limits(by_model, effect))
            _name_directions(panel, effect)
        key = [
            Line2D(
                [],
                [],
                linestyle="",
                marker=marker,
                markersize=4,
                color=color,
                label=fit_text(model, 140, TEXT_SIZE),
            )
            for model, (color, _, marker) in styles.items()
        ]
        if len(means):
            key.append(Line2D([], [], label=_MEAN, **_MEAN_DOT))
        if _has_predictions(means):
            key.append(
                Line2D([], [], linewidth=0.8, linestyle=":", color=BLACK, label="another model (95\u00a0%)")
            )
        place_legend_beside(panels[1], key)
    return ax


def draw_model_order(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    r"""Draw Kendall's τ of each pair of models, for shift and for discrimination.

    >>> row = {"attack": "direct", "first": "a", "second": "b", "measure": ["shift", "discrimination"]}
    >>> row |= {"tau": 0.5, "tau_low": 0.25, "tau_high": 0.75, "n_defenses": 9}
    >>> panels = draw_model_order(pd.DataFrame(row)).child_axes
    >>> [text.get_text() for text in panels[0].get_yticklabels()]
    ['a\nb']

    Args:
        points: `order.csv`, of one attack and of two measures, one of shift and one of discrimination.
        ax: axes to draw on; by default new ones.
    """
    check_one_attack(points)
    names = _name_pairs(points)
    pairs = list(dict.fromkeys(names))
    heights = {pair: -place for place, pair in enumerate(pairs)}
    with rc_context(RC_PARAMS):
        ax, (panels,) = stack_panels(ax, [_PAIR_HEIGHT * len(pairs) + 0.1], [])
        for panel, effect in zip(panels, _EFFECTS, strict=True):
            rows = points[points["measure"].str.endswith(effect)]
            for is_mean, style in ((False, (GREY, "-", "o")), (True, (BLACK, "-", "D"))):
                chosen = rows[rows["first"].eq("all pairs") == is_mean]
                at = [heights[name] for name in names[chosen.index]]
                draw_dots(panel, chosen, "tau", at, style, "mean" if is_mean else "pairs")
            set_row_axis(panel, pairs, "Kendall's τ", with_names=False)
            if panel is panels[0]:
                panel.set_yticklabels(map(_fit_pair, pairs))
            for end in (-1, 1):
                panel.axvline(end, color=GREY, linewidth=0.6, zorder=1)
            panel.set_xlim(-1.05, 1.05)
            panel.set_xticks(np.linspace(-1, 1, 5))
            set_panel_titles([panel], [f"order by {effect}"])
    return ax


def caption_model_planes(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_model_planes`."""
    return (
        f"{_describe_effects(points, context)} The undefended model is the origin; all panels have the same "
        "axes. Bars: 95\u00a0% intervals. Marker and color: family; number: defense."
        f"{format_family_note(points['family'])} {_format_setting(points, context)}"
    )


def caption_model_effects(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_model_effects`."""
    by_model, means = points[points["model"].notna()], points[points["model"].isna()]
    text = f"{_describe_effects(by_model, context)} Bars: 95\u00a0% intervals."
    if len(means):
        text += (
            " White: mean over the models (random effects; variance between models by REML), with the "
            "95\u00a0% interval of Hartung and Knapp where there are three models or more; it treats the "
            "models as a sample of models and is for these queries, which all models share."
            if _has_predictions(means)
            else " White: mean over the models (random effects); its interval is not drawn, because two "
            "models say little about others."
        )
    if _has_predictions(means):
        text += (
            " Dotted: 95\u00a0% prediction interval of the effect on another model. Intervals that go beyond "
            "a panel are cut at its edge."
        )
    return f"{text} {_format_setting(points, context)}"


def caption_model_order(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_model_order`."""
    is_judged = points["measure"].str.startswith("response_").any()
    measured = (
        f"of the refusal rates ({context.response_basis or 'judged responses'})"
        if is_judged
        else "of the first-token margin (nats)"
    )
    missing = " Without a dot: a model has the same effect of all defenses." * bool(
        points["tau"].isna().any()
    )
    return (
        f"Agreement of models on the order of {format_count_range(points['n_defenses'])} defenses by shift "
        f"and by discrimination {measured}: Kendall's τ of each pair of models, 1 for the same order, 0 for "
        "none, \N{MINUS SIGN}1 for the reverse. Bars: 95\u00a0% intervals of a bootstrap that resamples the "
        "queries, the same for all models, 2,000 draws; they hold for these defenses, which are not "
        f"resampled. Sampling errors of the effects lower τ.{missing} Controls and ablations are left out. "
        f"{_format_setting(points, context)}"
    )


def _list_families(points: pd.DataFrame, numbers: Mapping[str, int]) -> list[Line2D]:
    """Return the legend entries of the families, each followed by those of its numbered defenses."""
    key = []
    for family, rows in points.groupby("family", sort=False):
        color, marker = FAMILY_STYLES.get(str(family), OTHER_FAMILY_STYLE)
        key.append(make_legend_marker(color, marker, fit_text(format_family(str(family)), 125, TEXT_SIZE, 1)))
        for defense in dict.fromkeys(rows["defense"]):
            label = f"{numbers[defense]}  {fit_text(str(defense), 125, TEXT_SIZE, 1)}"
            key.append(make_legend_marker("none", "", label))
    return key


def _describe_effects(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return what is drawn, from how many queries."""
    counts = (
        f"{format_count_range(points['n_harmful'])} harmful and {format_count_range(points['n_benign'])} "
        "benign queries"
    )
    if points["unit"].iloc[0] == "points":
        return (
            f"Change of the refusal rates ({context.response_basis or 'judged responses'}) from the "
            f"undefended model, on the same {counts} for every model, in percentage points: shift is the "
            "mean change of both classes (+ refuses more), discrimination the change on harmful minus the "
            "change on benign queries (+ separates better)."
        )
    return (
        f"Change of the first-token margin from the undefended model, on the same {counts} for every model, "
        "in within-class SDs of the margin: shift is the change of the midpoint of both classes against the "
        "threshold (+ refuses more), discrimination the change of their distance (+ separates better)."
    )


def _format_setting(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the sentences on models, data and attack."""
    return context.format_setting(str(points["attack"].iloc[0])).replace("Model:", "Models:", 1)


def _has_predictions(means: pd.DataFrame) -> bool:
    return "shift_prediction_low" in means and bool(means["shift_prediction_low"].notna().any())


def _draw_means(ax: Axes, means: pd.DataFrame, effect: str, heights: Sequence[float]) -> None:
    """Draw the means over models, with the intervals of those of three models or more."""
    if not len(means):
        return
    value, low, high = extract_estimates(means, effect).T
    names = [f"{effect}_prediction{end}" for end in ("_low", "_high")]
    predicted = means.reindex(columns=names).to_numpy(float)
    is_known = np.isfinite(predicted[:, 0])
    at = np.array(heights)
    bar: Any = {"color": BLACK, "zorder": 2.5}
    ax.hlines(at[is_known], *predicted[is_known].T, linewidth=0.8, linestyle=":", **bar)
    ax.hlines(at[is_known], low[is_known], high[is_known], linewidth=1.4, **bar)
    ax.plot(value, heights, zorder=3, gid=_MEAN, **_MEAN_DOT)


def _effect_limits(points: pd.DataFrame, effect: str) -> tuple[float, float]:
    """Return limits that contain zero and the intervals of all models."""
    ends = extract_estimates(points, effect)
    low, high = (float(end(ends[np.isfinite(ends)], initial=0)) for end in (np.min, np.max))
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _name_directions(ax: Axes, effect: str) -> None:
    """Name the two directions of an effect above its panel."""
    less, more = _DIRECTIONS[effect]
    style: Any = {"fontsize": TEXT_SIZE, "fontstyle": "italic", "color": "#444444", "va": "bottom"}
    style |= {"transform": ax.transAxes}
    ax.text(0, 1.0, f"\N{LEFTWARDS ARROW} {less}", ha="left", **style)
    ax.text(1, 1.0, f"{more} \N{RIGHTWARDS ARROW}", ha="right", **style)


def _fit_pair(pair: str) -> str:
    """Return the names of two models on a line each."""
    return "\n".join(fit_text(name, 150, TEXT_SIZE, 1) for name in pair.split("\n"))


def _name_pairs(points: pd.DataFrame) -> pd.Series:
    """Return the name of each row's pair of models."""
    seconds = points["second"].fillna("").astype(str)
    pairs = points["first"].astype(str) + "\n" + seconds
    return pairs.where(seconds != "", "mean of all pairs")
