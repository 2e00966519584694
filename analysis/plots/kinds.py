"""Over-refusal by kind of benign query: a row per defense, a dot per kind."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import CaptionContext, format_count_range, keep_if_intervals
from analysis.plots.data import check_one_attack
from analysis.plots.layout import (
    assign_curve_styles,
    draw_dots,
    fit_text,
    make_axes,
    place_legend_beside,
    set_row_axis,
)
from analysis.plots.style import GREY, RC_PARAMS, TEXT_SIZE
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, has_judged_rates

_DOT_STEP = 0.09  # inches between the dots of a row
_ROW_GAP = 0.08  # inches added to each row
_RATE_AXIS = (-3, 103)  # percent; room for markers at 0 and at 100


def draw_kinds(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the refusal rate of each kind of benign query under each defense.

    >>> row = {"attack": "direct", "defense": "none", "kind": ["twin", "plain"], "n": 9}
    >>> row |= {f"over_refusal_rate{end}": 0.5 for end in INTERVAL_SUFFIXES}
    >>> [text.get_text() for text in draw_kinds(pd.DataFrame(row)).get_legend().get_texts()]
    ['twin (n = 9)', 'plain (n = 9)']

    Args:
        points: table from `build_kind_points`, of one attack.
        ax: axes to draw on; by default new ones.
    """
    rates = [f"over_refusal_rate{end}" for end in INTERVAL_SUFFIXES]
    percent = check_one_attack(points).assign(**(100 * points[rates].astype(float)))
    defenses = list(dict.fromkeys(percent["defense"]))
    styles = assign_curve_styles(map(str, percent["kind"]))
    row_height = _DOT_STEP * len(styles) + _ROW_GAP
    offsets = _DOT_STEP / row_height * ((len(styles) - 1) / 2 - np.arange(len(styles)))
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, row_height * len(defenses))
        for row in range(0, len(defenses), 2):
            ax.axhspan(-row - 0.5, -row + 0.5, color=GREY, alpha=0.12, linewidth=0, zorder=0)
        key = []
        for (kind, style), offset in zip(styles.items(), offsets, strict=True):
            rows = percent[percent["kind"].astype(str) == kind]
            heights = [offset - defenses.index(defense) for defense in rows["defense"]]
            draw_dots(ax, rows, "over_refusal_rate", heights, style, kind)
            color, _, marker = style
            label = f"{fit_text(kind, 120, TEXT_SIZE, 1)} (n = {format_count_range(rows['n'])})"
            key.append(Line2D([], [], linestyle="", marker=marker, markersize=4, color=color, label=label))
        names = ["undefended" if defense == UNDEFENDED else str(defense) for defense in defenses]
        set_row_axis(ax, names, "benign queries refused (%)")
        ax.set_xlim(_RATE_AXIS)
        ax.set_xticks(range(0, 101, 20))
        place_legend_beside(ax, key, "kind of benign query")
    return ax


def caption_kinds(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_kinds`."""
    counts = [f"{format_count_range(rows['n'])} {kind}" for kind, rows in points.groupby("kind", sort=False)]
    bars = keep_if_intervals(points, " Bars: 95\u00a0% intervals.")
    text = f"Share refused of the benign queries of each kind ({', '.join(counts)}), "
    attack = points["attack"].iloc[0]
    if not has_judged_rates(points):
        return (
            f"{text}by the readout: the margin of the first token exceeds the threshold.{bars} "
            f"{context.format_sentences(attack)}"
        )
    judged = format_count_range(points.loc[points["n_responses"] > 0, "n_responses"])
    return (
        f"{text}by the {context.response_basis or 'judged responses'}: {judged} responses per kind and "
        f"condition.{bars} "
        f"{context.format_response_sentences(attack)}"
    )
