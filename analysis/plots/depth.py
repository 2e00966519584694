"""Prefilled responses: effects of each defense, and refusal rates, after the first tokens of an opener."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import CaptionContext, format_count_range, format_grey_note
from analysis.plots.data import check_one_attack
from analysis.plots.layout import (
    assign_curve_styles,
    extract_estimates,
    fit_text,
    make_line_legend,
    place_legend_beside,
    set_panel_titles,
    stack_panels,
)
from analysis.plots.style import BLACK, CLASS_STYLES, GREY, RC_PARAMS, TEXT_SIZE
from analysis.stats.tables import UNDEFENDED

_EFFECTS = {"response_shift": "shift (points)", "response_discrimination": "discrimination (points)"}
_RATES = {True: "refusal_rate", False: "over_refusal_rate"}  # by class
_SPREAD = 0.5  # of the distance between two numbers of tokens, over which the defenses are spread
_CLASS_OFFSET = 0.07  # of the same distance: the markers of each class stand to one side


def draw_depth_effects(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw shift and discrimination of each defense by the number of tokens that are given.

    >>> row = {"attack": "direct", "defense": "a", "prefix": "complying", "tokens": 0}
    >>> row |= {"response_shift": 10.0, "response_discrimination": 0.0}
    >>> [panel.get_ylabel() for panel in draw_depth_effects(pd.DataFrame([row])).child_axes]
    ['complying opener', '']

    Args:
        points: table from `build_depth_points`, of one attack.
        ax: axes that the panels are placed in; by default new ones.
    """
    styles = assign_curve_styles(check_one_attack(points)["defense"])
    prefixes, lengths = _list_values(points["prefix"]), sorted(_list_values(points["tokens"]))
    offsets = np.linspace(-_SPREAD / 2, _SPREAD / 2, len(styles)) if len(styles) > 1 else [0.0]
    with rc_context(RC_PARAMS):
        n_rows = len(prefixes)
        ax, panel_rows = stack_panels(ax, [1.7] * n_rows, [0.35] * (n_rows - 1), 2, 2.5)
        set_panel_titles(panel_rows[0], _EFFECTS.values())
        for prefix, panels in zip(prefixes, panel_rows, strict=True):
            rows = points[points["prefix"] == prefix]
            for column, panel in zip(_EFFECTS, panels, strict=True):
                panel.axhline(0, color=GREY, linewidth=0.6, zorder=1)
                for (defense, style), offset in zip(styles.items(), offsets, strict=True):
                    curve = rows[rows["defense"] == defense]
                    _draw_estimates(panel, curve, column, lengths, style, defense, float(offset))
                _set_length_axis(panel, lengths, "tokens given" if prefix == prefixes[-1] else "")
            panels[0].set_ylabel(f"{prefix} opener", fontsize=8)
        place_legend_beside(ax, make_line_legend(styles))
    return ax


def draw_depth_rates(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the refusal rates of each condition by the number of tokens that are given, a row per condition.

    >>> row = {"attack": "direct", "defense": "none", "prefix": "complying", "tokens": [0, 1]}
    >>> row |= {"refusal_rate": 0.5, "over_refusal_rate": 0.25}
    >>> ax = draw_depth_rates(pd.DataFrame(row))
    >>> [line.get_ydata().tolist() for line in ax.child_axes[0].lines]
    [[50.0, 50.0], [25.0, 25.0]]

    Args:
        points: table from `build_depth_points`, of one attack.
        ax: axes that the panels are placed in; by default new ones.
    """
    conditions = _list_values(check_one_attack(points)["defense"])
    prefixes, lengths = _list_values(points["prefix"]), sorted(_list_values(points["tokens"]))
    with rc_context(RC_PARAMS):
        n_rows = len(conditions)
        ax, panel_rows = stack_panels(ax, [0.85] * n_rows, [0.2] * (n_rows - 1), len(prefixes), 2.5)
        set_panel_titles(panel_rows[0], [f"{prefix} opener" for prefix in prefixes])
        for condition, panels in zip(conditions, panel_rows, strict=True):
            is_last = condition == conditions[-1]
            for prefix, panel in zip(prefixes, panels, strict=True):
                rows = points[points["prefix"] == prefix]
                for harmful, _, color, _ in CLASS_STYLES:
                    if condition != UNDEFENDED:
                        reference = rows[rows["defense"] == UNDEFENDED]
                        _draw_reference(panel, reference, _RATES[harmful], lengths, color)
                    curve = rows[rows["defense"] == condition]
                    style = (color, "-", "o" if harmful else "s")
                    side = -_CLASS_OFFSET if harmful else _CLASS_OFFSET
                    _draw_estimates(panel, curve, _RATES[harmful], lengths, style, condition, side, 100)
                _set_length_axis(panel, lengths, "tokens given" if is_last else "")
                panel.tick_params(labelbottom=is_last)
                panel.set_ylim(-6, 106)
                panel.set_yticks([0, 50, 100])
            name = "undefended" if condition == UNDEFENDED else str(condition)
            label = fit_text(name, 90, TEXT_SIZE, 2)
            panels[0].set_ylabel(label, fontsize=TEXT_SIZE, rotation=0, ha="right", va="center")
        place_legend_beside(ax, _make_rate_legend(len(conditions) > 1), "refused (%)")
    return ax


def caption_depth_effects(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_depth_effects`."""
    return (
        "Shift and discrimination of the refusal rates, against the undefended model after the same tokens, "
        "by the number of tokens of the opener that are put at the start of the response. "
        f"{_describe(points)} Shift: mean of the changes of both classes. Discrimination: change on harmful "
        "minus change on benign queries. Bars: 95\u00a0% intervals of Bonett and Price, combined over the "
        "classes, with the correlation of twins. "
        f"{format_grey_note(points)}{_describe_run(points, context)}"
    )


def caption_depth_rates(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_depth_rates`."""
    dotted = "Dotted: the undefended model. " * (points["defense"].nunique() > 1)
    return (
        "Share of harmful and of benign queries refused, by the number of tokens of the opener that are put "
        f"at the start of the response. {_describe(points)} Bars: 95\u00a0% Wilson intervals. {dotted}"
        f"{_describe_run(points, context)}"
    )


def _describe(points: pd.DataFrame) -> str:
    """Return the sentences on what counts as refused, and on the numbers of queries."""
    counts = (
        f"{format_count_range(points['n_harmful'])} harmful and {format_count_range(points['n_benign'])} "
        "benign queries, divided among the openers of each kind."
    )
    meanings = {
        "complying": "Complying openers: the continuation alone is judged.",
        "refusing": "Refusing openers: opener and continuation are judged together, and a refusal with an "
        "answer beside it counts as dropped; where the tokens given already refuse, the rate says only how "
        "often the refusal is kept.",
    }
    return " ".join([counts, *(meanings[prefix] for prefix in _list_values(points["prefix"]))])


def _describe_run(points: pd.DataFrame, context: CaptionContext) -> str:
    setting = context.format_setting(str(points["attack"].iloc[0]))
    return f"{setting} Judged: {context.response_basis}."


def _draw_estimates(
    panel: Axes,
    rows: pd.DataFrame,
    column: str,
    lengths: list[Any],
    style: tuple[str, Any, str],
    gid: str,
    offset: float = 0.0,
    scale: float = 1.0,
) -> None:
    """Draw estimates by number of tokens as a line of markers with their intervals."""
    color, dash, marker = style
    rows = rows.sort_values("tokens")
    places = np.array([lengths.index(length) for length in rows["tokens"]]) + offset
    value, low, high = scale * extract_estimates(rows, column).T
    panel.vlines(places, low, high, color=color, linewidth=1.0, alpha=0.45, zorder=2)
    look: Any = {"color": color, "linestyle": dash, "marker": marker, "markersize": 3, "linewidth": 1.0}
    panel.plot(places, value, zorder=3, gid=gid, **look)


def _draw_reference(panel: Axes, rows: pd.DataFrame, column: str, lengths: list[Any], color: str) -> None:
    """Draw the rates of the undefended model as a dotted line."""
    rows = rows.sort_values("tokens")
    places = [lengths.index(length) for length in rows["tokens"]]
    look: Any = {"color": color, "linestyle": ":", "linewidth": 1.0, "alpha": 0.8, "zorder": 1}
    panel.plot(places, 100 * rows[column].astype(float), gid="undefended", **look)


def _set_length_axis(panel: Axes, lengths: list[Any], label: str) -> None:
    """Set up an axis on which every number of tokens has the same distance to the next."""
    panel.set_xlim(-0.5, len(lengths) - 0.5)
    panel.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    panel.set_xlabel(label, fontsize=8)


def _make_rate_legend(has_reference: bool) -> list[Line2D]:
    legend = [
        Line2D([], [], color=color, marker="o" if harmful else "s", markersize=4, label=name)
        for harmful, name, color, _ in CLASS_STYLES
    ]
    dotted = Line2D([], [], color=BLACK, linestyle=":", label="the same,\nundefended")
    return [*legend, *([dotted] if has_reference else [])]


def _list_values(values: Iterable[Any]) -> list[Any]:
    """Return the different values in their order."""
    return list(dict.fromkeys(values))
