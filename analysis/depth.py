"""Where in the depth of a model a defense acts: curves over its layers, a panel per contrast."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.curves import INTERVAL_SUFFIXES, check_one_attack
from analysis.lettering import place_legend_beside
from analysis.palette import BLACK, GREY, RC_PARAMS
from analysis.panels import CONTRAST_LABELS, draw_curve, extract_estimates, set_panel_titles, make_line_legend, assign_curve_styles, to_numbers, set_layer_axis, stack_panels

_DIRECTION_TITLES = {"auroc": "AUROC", "shift": "shift", "discrimination": "discrimination"}
_CURVE_PANEL_HEIGHT, _MARK_ROW_HEIGHT = 1.7, 0.1  # inches: a panel of curves, a defense's row of half-way marks


def build_layer_points(layers: pd.DataFrame, half_layers: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the logit lens of each defense, and beside it the layer from which half of the effect is there.

    >>> layers = pd.DataFrame({"attack": "direct", "defense": "a", "layer": [0, 1], "shift": [0.0, 1.0]})
    >>> row = {"attack": "direct", "defense": "a", "contrast": "shift", "half": 1}
    >>> layer_points(layers, pd.DataFrame([row]))["shift_half"].tolist()
    [1, 1]

    Args:
        layers: `layers.csv`.
        half_layers: `half.csv`.
    """
    found = layers.reset_index(drop=True)
    for name in CONTRAST_LABELS if half_layers is not None else ():
        of = half_layers[half_layers["contrast"] == name] if half_layers is not None else layers
        wanted = {f"half{end}": f"{name}_half{end}" for end in INTERVAL_SUFFIXES if f"half{end}" in of}
        columns = of[["attack", "defense", *wanted]].rename(columns=wanted)
        found = found.merge(columns, "left", ["attack", "defense"]) if len(of) else found
    return found


def draw_layers(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each defense's effect as it appears from layer to layer; below, the layer where half is there.

    >>> row = {"attack": "direct", "defense": "a", "layer": 0, "shift": 0.0, "discrimination": 0.0}
    >>> layers(pd.DataFrame([row, row | {"layer": 1, "shift": 1.0}])).child_axes[0].get_xlabel()
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
    >>> [panel.get_ylabel() for panel in directions(pd.DataFrame([row])).child_axes]
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


def _draw_half_way_marks(ax: Axes, points: pd.DataFrame, column: str, styles: dict[str, tuple[str, Any, str]]) -> None:
    """Draw a mark with its interval for each defense whose half-way layer is known."""
    each = points.drop_duplicates("defense").set_index("defense")
    for place, (defense, (color, _, mark)) in enumerate(styles.items()):
        value, low, high = extract_estimates(each.loc[[defense]], column)[0]
        ax.hlines(-place, low, high, color=color, linewidth=1.2, alpha=0.6, zorder=2)
        ax.plot([value], [-place], mark, color=color, markersize=4.5, zorder=3, gid=defense)
    ax.set_ylim(-len(styles), 1)
