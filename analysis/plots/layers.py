"""Effects of defenses by layer: logit lens, and projections on the refusal and harmfulness directions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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
    fit_text,
    make_line_legend,
    place_legend_beside,
    set_layer_axis,
    set_panel_titles,
    stack_panels,
)
from analysis.plots.style import BLACK, GREY, RC_PARAMS, TEXT_SIZE

_DIRECTION_TITLES = {
    "auroc": "AUROC",
    "shift": "shift (distances)",
    "discrimination": "discrimination (distances)",
}
_MAX_PEAK = 5.0  # a curve whose peak is this many times its usual size has a partly logarithmic axis
_CURVE_PANEL_HEIGHT, _MARK_ROW_HEIGHT = 1.7, 0.13  # inches: a panel of curves, a row of half-way marks


def draw_layers(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each defense's effect by layer and, below, the layer at which half of it is reached.

    >>> row = {"attack": "direct", "defense": "a", "layer": 0, "shift": 0.0, "discrimination": 0.0}
    >>> draw_layers(pd.DataFrame([row, row | {"layer": 1, "shift": 1.0}])).child_axes[0].get_xlabel()
    'layer entered'

    Args:
        points: table from `build_layer_points`, of one attack.
        ax: axes that the panels are placed in; by default new ones.
    """
    styles = assign_curve_styles(check_one_attack(points)["defense"])
    half_columns = [f"{name}_half" for name in CONTRAST_LABELS if f"{name}_half" in points]
    has_marks = bool(points[half_columns].notna().any(axis=None))
    last_layer, label = float(to_numbers(points["layer"]).max()), "layer entered"
    with rc_context(RC_PARAMS):
        heights = [_CURVE_PANEL_HEIGHT] + [_MARK_ROW_HEIGHT * (len(styles) + 1)] * has_marks
        ax, (panels, *mark_panels) = stack_panels(ax, heights, [0.06] * has_marks)
        names = [fit_text(str(name), 110, TEXT_SIZE, 1) for name in styles]
        set_panel_titles(panels, CONTRAST_LABELS.values())
        for place, (contrast, panel) in enumerate(zip(CONTRAST_LABELS, panels, strict=True)):
            for defense, style in styles.items():
                rows = points[points["defense"] == defense]
                draw_curve(panel, rows, contrast, style, defense, len(styles))
            set_layer_axis(panel, last_layer, "" if has_marks else label)
            if has_marks:
                panel.tick_params(labelbottom=False)
                _draw_half_way_marks(mark_panels[0][place], points, f"{contrast}_half", styles)
                set_layer_axis(mark_panels[0][place], last_layer, label)
                shown = names if place == 0 else [""] * len(names)
                mark_panels[0][place].set_yticks(range(0, -len(names), -1), shown, fontsize=TEXT_SIZE - 0.7)
                mark_panels[0][place].tick_params(axis="y", length=0)
        if has_marks:
            mark_panels[0][0].set_ylabel("half-way", fontsize=8)
        place_legend_beside(ax, make_line_legend(styles))
    return ax


def draw_directions(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw, by layer, the AUROC of each direction and how far a defense moves queries along it.

    >>> row = {"attack": "direct", "defense": "a", "layer": 0, "direction": "refusal", "auroc": 0.9}
    >>> row |= {"auroc_after": 0.8, "shift": 0.5, "discrimination": 0.0, "chosen": True}
    >>> [panel.get_ylabel() for panel in draw_directions(pd.DataFrame([row])).child_axes]
    ['refusal', '', '']

    Args:
        points: `directions.csv`, of one attack.
        ax: axes that the panels are placed in; by default new ones.
    """
    styles = assign_curve_styles(check_one_attack(points)["defense"])
    directions = list(dict.fromkeys(points["direction"]))
    last_layer = float(to_numbers(points["layer"]).max())
    with rc_context(RC_PARAMS):
        n_rows = len(directions)
        ax, panel_rows = stack_panels(ax, [1.35] * n_rows, [0.25] * (n_rows - 1), 3, 1.7)
        set_panel_titles(panel_rows[0], _DIRECTION_TITLES.values())
        for direction, panels in zip(directions, panel_rows, strict=True):
            rows = points[points["direction"] == direction]
            for name, panel in zip(_DIRECTION_TITLES, panels, strict=True):
                if name == "auroc":
                    _draw_undefended_auroc(panel, rows)
                column = "auroc_after" if name == "auroc" else name
                for defense, style in styles.items():
                    curve = rows[rows["defense"] == defense]
                    draw_curve(panel, curve, column, style, defense, len(styles))
                for layer in sorted(set(rows.loc[rows["chosen"].astype(bool), "layer"])):
                    panel.axvline(layer, color=GREY, linewidth=0.8, linestyle=":", zorder=1, gid="chosen")
                set_layer_axis(panel, last_layer, "layer" if direction == directions[-1] else "")
                linear_range = _find_linear_range(rows, name)
                if np.isfinite(linear_range):
                    panel.set_yscale("symlog", linthresh=linear_range, linscale=1.5)
                    panel.yaxis.set_major_locator(FixedLocator(_choose_log_ticks(panel, linear_range)))
                    panel.yaxis.set_major_formatter(FuncFormatter(_format_tick))
                    panel.yaxis.set_minor_locator(NullLocator())
            panels[0].set_ylabel(direction, fontsize=8)
        undefended = Line2D([], [], color=BLACK, linewidth=2, alpha=0.5, label="undefended (AUROC)")
        chosen = Line2D([], [], color=GREY, linewidth=0.8, linestyle=":", label="layer chosen in training")
        place_legend_beside(ax, [*make_line_legend(styles), undefended, chosen])
    return ax


def caption_layers(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_layers`."""
    half_columns = [name for name in points if str(name).endswith("_half")]
    half = (
        "Below: the first layer from which the contrast stays beyond half of its final value; no mark if the "
        "final interval includes 0. "
    )
    half = half if points[half_columns].notna().any(axis=None) else ""
    last_layer = f"{to_numbers(points['layer']).max():.0f}"
    return (
        f"Logit lens {format_query_counts(points, context.query_counts)}: margin computed from the residual "
        f"stream that enters each layer; {last_layer} is the output of the last layer, that is, the whole "
        f"effect. {CONTRASTS_SENTENCE}{half}{format_interval_note(points, 'Bands')}{format_grey_note(points)}"
        f"{format_run_sentences(points, context)}"
    )


def caption_directions(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_directions`."""
    return (
        "Projection of the residual stream of each layer on a direction learned from training queries (a "
        f"row per direction), {format_query_counts(points, context.query_counts)}, all held out. AUROC: "
        "separation of the classes by the projection; the thin line at .5 is chance. Shift (mean of the two "
        "class means of the change) and discrimination (harmful minus benign) are in units of the distance "
        f"between the classes' training means. {_describe_scales(points)}"
        f"{format_interval_note(points, 'Bands')}Vertical dotted line: "
        f"the layer chosen in training. {format_grey_note(points)}{format_run_sentences(points, context)}"
    )


def _find_linear_range(rows: pd.DataFrame, column: str) -> float:
    """Return the size beyond which the axis of a panel is logarithmic, infinite without a high peak.

    >>> _find_linear_range(pd.DataFrame({"shift": [1.0] * 9 + [20.0]}), "shift")
    1.0
    """
    sizes = rows[column].abs().dropna() if column != "auroc" else pd.Series(dtype=float)
    usual = float(sizes.quantile(0.8)) if len(sizes) else 0.0
    if not usual > 0 or sizes.max() <= _MAX_PEAK * usual:
        return np.inf
    magnitude = 10.0 ** np.floor(np.log10(usual))
    return float(magnitude * np.ceil(usual / magnitude))


def _choose_log_ticks(panel: Axes, linear_range: float) -> list[float]:
    """Return ticks at 0, at the ends of the linear part and, beyond, at its multiples by 5."""
    low, high = panel.get_ylim()
    places = [0.0, *(sign * factor * linear_range for factor in (1, 5, 25) for sign in (-1, 1))]
    return sorted(place for place in places if low <= place <= high)


def _format_tick(value: float, _: Any) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _describe_scales(points: pd.DataFrame) -> str:
    """Return the sentence on panels whose axis is partly logarithmic, empty if there is none."""
    ranges = [
        _find_linear_range(rows, column)
        for _, rows in points.groupby("direction")
        for column in ("shift", "discrimination")
    ]
    return "Where a peak is far higher than the rest, the axis is logarithmic beyond its middle. " * bool(
        np.isfinite(ranges).any()
    )


def _draw_undefended_auroc(ax: Axes, rows: pd.DataFrame) -> None:
    """Draw the AUROC of the undefended model, which is the same for every defense."""
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
    """Draw the half-way layer of each defense with its interval, if it is known."""
    each = points.drop_duplicates("defense").set_index("defense")
    for place, (defense, (color, _, marker)) in enumerate(styles.items()):
        value, low, high = extract_estimates(each.loc[[defense]], column)[0]
        ax.hlines(-place, low, high, color=color, linewidth=1.2, alpha=0.6, zorder=2)
        ax.plot([value], [-place], marker, color=color, markersize=4.5, zorder=3, gid=defense)
    ax.set_ylim(-len(styles), 1)
