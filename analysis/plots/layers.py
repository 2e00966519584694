"""Where in the depth of a model a defense acts: curves over its layers, a panel per contrast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import (
    CONTRASTS_SENTENCE,
    CaptionContext,
    format_grey_note,
    format_interval_note,
    format_query_counts,
    format_run_sentences,
)
from analysis.plots.data import CONTRAST_LABELS, check_one_attack, to_numbers
from analysis.plots.layout import (
    assign_curve_styles,
    draw_curve,
    extract_estimates,
    make_line_legend,
    place_legend_beside,
    set_layer_axis,
    set_panel_titles,
    stack_panels,
)
from analysis.plots.style import BLACK, GREY, RC_PARAMS

if TYPE_CHECKING:
    from analysis.plots.captions import QueryCounts

_DIRECTION_TITLES = {"auroc": "AUROC", "shift": "shift", "discrimination": "discrimination"}
_CURVE_PANEL_HEIGHT, _MARK_ROW_HEIGHT = (
    1.7,
    0.1,
)  # inches: a panel of curves, a defense's row of half-way marks


def draw_layers(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each defense's effect as it appears from layer to layer; below, the layer where half is there.

    >>> row = {"attack": "direct", "defense": "a", "layer": 0, "shift": 0.0, "discrimination": 0.0}
    >>> draw_layers(pd.DataFrame([row, row | {"layer": 1, "shift": 1.0}])).child_axes[0].get_xlabel()
    'layer entered'

    Args:
        points: what `layer_points` returned, of one attack.
        ax: where to draw; it only lends its place to the panels.
    """
    of = assign_curve_styles(check_one_attack(points)["defense"])
    halves = [f"{name}_half" for name in CONTRAST_LABELS if f"{name}_half" in points]
    marked = bool(points[halves].notna().any(axis=None))
    last, words = float(to_numbers(points["layer"]).max()), "layer entered"
    with rc_context(RC_PARAMS):
        heights = [_CURVE_PANEL_HEIGHT, _MARK_ROW_HEIGHT * (len(of) + 1)] if marked else [_CURVE_PANEL_HEIGHT]
        ax, (row, *strips) = stack_panels(ax, heights, [0.06] * marked)
        set_panel_titles(row, CONTRAST_LABELS.values())
        for place, (name, panel) in enumerate(zip(CONTRAST_LABELS, row, strict=True)):
            for defense, look in of.items():
                draw_curve(panel, points[points["defense"] == defense], name, look, defense, len(of))
            set_layer_axis(panel, last, "" if marked else words)
            if strips:
                panel.tick_params(labelbottom=False)
                _draw_half_way_marks(strips[0][place], points, f"{name}_half", of)
                set_layer_axis(strips[0][place], last, words)
                strips[0][place].set_yticks([])
        if strips:
            strips[0][0].set_ylabel("half-way", fontsize=8, rotation=0, ha="right", va="center")
        place_legend_beside(ax, make_line_legend(of))
    return ax


def draw_directions(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how well each layer holds refusal and harm, and how far a defense moves queries along both.

    >>> row = {"attack": "direct", "defense": "a", "layer": 0, "direction": "refusal", "auroc": 0.9}
    >>> row |= {"auroc_after": 0.8, "shift": 0.5, "discrimination": 0.0, "chosen": True}
    >>> [panel.get_ylabel() for panel in draw_directions(pd.DataFrame([row])).child_axes]
    ['refusal', '', '']

    Args:
        points: `directions.csv`, of one attack.
        ax: where to draw; it only lends its place to the panels.
    """
    of = assign_curve_styles(check_one_attack(points)["defense"])
    kinds = list(dict.fromkeys(points["direction"]))
    last = float(to_numbers(points["layer"]).max())
    with rc_context(RC_PARAMS):
        ax, rows = stack_panels(ax, [1.35] * len(kinds), [0.25] * (len(kinds) - 1), 3, 1.7)
        set_panel_titles(rows[0], _DIRECTION_TITLES.values())
        for kind, row in zip(kinds, rows, strict=True):
            here = points[points["direction"] == kind]
            for name, panel in zip(_DIRECTION_TITLES, row, strict=True):
                if name == "auroc":
                    _draw_undefended_auroc(panel, here)
                for defense, look in of.items():
                    column = "auroc_after" if name == "auroc" else name
                    draw_curve(panel, here[here["defense"] == defense], column, look, defense, len(of))
                for layer in sorted(set(here.loc[here["chosen"].astype(bool), "layer"])):
                    panel.axvline(layer, color=GREY, linewidth=0.8, linestyle=":", zorder=1, gid="chosen")
                set_layer_axis(panel, last, "layer" if kind == kinds[-1] else "")
            row[0].set_ylabel(kind, fontsize=8)
        undefended = Line2D([], [], color=BLACK, linewidth=2, alpha=0.5, label="undefended (AUROC)")
        chosen = Line2D([], [], color=GREY, linewidth=0.8, linestyle=":", label="layer chosen in training")
        place_legend_beside(ax, [*make_line_legend(of), undefended, chosen])
    return ax


def _draw_undefended_auroc(ax: Axes, rows: pd.DataFrame) -> None:
    """Draw how well the undefended model tells the classes, which is the same beside every defense."""
    first = rows[rows["defense"] == rows["defense"].iloc[0]].sort_values("layer")
    value, low, high = extract_estimates(first, "auroc").T
    ax.axhline(0.5, color=GREY, linewidth=0.6, zorder=1, gid="chance")
    layer = to_numbers(first["layer"]).to_numpy()
    ax.fill_between(layer, low, high, color=BLACK, alpha=0.1, linewidth=0, zorder=2)
    mark: Any = {"marker": "o", "markersize": 3} if len(first) <= 12 else {}
    ax.plot(layer, value, color=BLACK, linewidth=2, alpha=0.5, zorder=2.5, gid="undefended", **mark)


def _draw_half_way_marks(
    ax: Axes, points: pd.DataFrame, column: str, styles: dict[str, tuple[str, Any, str]]
) -> None:
    """Draw a mark with its interval for each defense whose half-way layer is known."""
    each = points.drop_duplicates("defense").set_index("defense")
    for place, (defense, (color, _, mark)) in enumerate(styles.items()):
        value, low, high = extract_estimates(each.loc[[defense]], column)[0]
        ax.hlines(-place, low, high, color=color, linewidth=1.2, alpha=0.6, zorder=2)
        ax.plot([value], [-place], mark, color=color, markersize=4.5, zorder=3, gid=defense)
    ax.set_ylim(-len(styles), 1)


def caption_layers(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `depth.layers` draws from these points."""
    halves = [name for name in points if str(name).endswith("_half")]
    marked = bool(points[halves].notna().any(axis=None))
    half = (
        "Below: the layer from which on the contrast stays beyond half of its final value; no mark where the "
        "final interval holds 0. "
    )
    last = f"{to_numbers(points['layer']).max():.0f}"
    return (
        f"Logit lens {format_query_counts(points, counts)}: the margin read off the residual stream that enters each "
        f"layer; {last} is behind the last one, the whole effect. {CONTRASTS_SENTENCE}{half * marked}"
        f"{format_interval_note(points, 'Bands')}{format_grey_note(points)}{format_run_sentences(points, context)}"
    )


def caption_directions(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `depth.directions` draws from these points."""
    return (
        "Projection of the residual stream of each layer on a direction learned on training queries (a row "
        f"per direction), {format_query_counts(points, counts)}, all held out. AUROC: how well the projection tells the "
        "classes; the thin line at .5 is chance. Shift (mean of the two class means of the change) and "
        "discrimination (harmful minus benign) are in units of the distance between the classes' training "
        f"means. {format_interval_note(points, 'Bands')}Upright dotted line: the layer chosen in training. "
        f"{format_grey_note(points)}{format_run_sentences(points, context)}"
    )
