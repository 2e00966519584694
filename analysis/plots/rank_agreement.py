"""Agreement of data sets on the order of the defenses: rank correlations with intervals and ceilings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import CaptionContext, format_count_range
from analysis.plots.data import check_one_attack
from analysis.plots.layout import (
    assign_curve_styles,
    draw_dots,
    fit_text,
    make_axes,
    place_legend_beside,
)
from analysis.plots.style import BLACK, GREY, RC_PARAMS, TEXT_SIZE
from analysis.stats.rank_agreement import RANKED_MEASURES

_ROW_HEIGHT = 0.36  # inches per pair of data sets and measure
_MEASURE_GAP = 0.5  # rows between two measures
_OFFSET = 0.17  # rows between the middle of a row and each of its two dots


def draw_rank_agreement(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the rank correlation of each pair of data sets, observed and corrected, with its ceiling.

    >>> row = {"attack": "direct", "first": "a", "second": "b", "measure": "shift", "n_defenses": 9}
    >>> row |= {"rank_correlation": 0.5, "corrected": 0.75, "ceiling": 0.7}
    >>> [text.get_text() for text in draw_rank_agreement(pd.DataFrame([row])).get_yticklabels()]
    ['shift (nats)']

    Args:
        points: `agreement.csv`, of one attack.
        ax: axes to draw on; by default new ones.
    """
    check_one_attack(points)
    pairs = _name_pairs(points)
    styles = assign_curve_styles(pairs)
    measures = [name for name in RANKED_MEASURES if (points["measure"] == name).any()]
    step = len(styles) + _MEASURE_GAP
    tops = {measure: -place * step for place, measure in enumerate(measures)}
    rows_of_pair = {pair: place for place, pair in enumerate(styles)}
    heights = points["measure"].map(tops).to_numpy(float) - pairs.map(rows_of_pair).to_numpy(float)
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, _ROW_HEIGHT * step * len(measures) + 0.2)
        for value in (-1, 0, 1):
            ax.axvline(value, color=GREY, linewidth=0.6, zorder=1)
        for pair, style in styles.items():
            is_pair = (pairs == pair).to_numpy(bool)
            rows, at = points[is_pair], heights[is_pair]
            draw_dots(ax, rows, "rank_correlation", list(at + _OFFSET), style, f"observed {pair}")
            draw_dots(ax, rows, "corrected", list(at - _OFFSET), style, f"corrected {pair}", hollow=True)
            ceilings: Any = {"color": BLACK, "linewidth": 1.4, "zorder": 4, "gid": f"ceiling {pair}"}
            known = rows["ceiling"].notna().to_numpy(bool)
            ax.vlines(rows["ceiling"][known], at[known] + 0.02, at[known] + 2 * _OFFSET, **ceilings)
        middles = [top - (len(styles) - 1) / 2 for top in tops.values()]
        ax.set_yticks(middles, [RANKED_MEASURES[measure] for measure in measures], fontsize=TEXT_SIZE)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(min(tops.values()) - len(styles) + 0.3, 0.7)
        ax.set_xlim(-1.05, 1.05)
        ax.set_xticks(np.linspace(-1, 1, 5))
        ax.set_xlabel("rank correlation of the defenses' effects (Spearman's ρ)")
        place_legend_beside(ax, _make_legend(styles))
    return ax


def caption_rank_agreement(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_rank_agreement`.

    Args:
        points: `agreement.csv`, of one attack.
        context: facts about the runs.
    """
    attack = str(points["attack"].iloc[0])
    sent = "none (queries sent unchanged)" if attack == "direct" else attack
    basis = f" Rates: {context.response_basis}." if context.response_basis else ""
    return (
        f"Spearman's rank correlation of the effects of {format_count_range(points['n_defenses'])} defenses "
        "on two data sets, by measure. Filled: as observed. Black line: ceiling, the correlation to be "
        "expected of the observed effects if both sets ordered the defenses alike, from the agreement of "
        "random halves of each set; without a line, the halves of a set agree no better than by chance. "
        "Hollow: corrected for the sampling of queries, that is, of the effects in the populations of "
        "queries of both sets. Bars: 95\u00a0% intervals of a bootstrap that resamples pairs of queries in "
        "each set, stratified by class, 2,000 draws; they hold for these defenses, which are not resampled. "
        "Shift and discrimination in nats and ΔAUROC: of the first-token margin; the other measures: of "
        "judged responses. Controls and ablations are left out. "
        f"\nModel: {context.model}. Data: {context.data}, {context.split} split. Attack: {sent}.{basis}"
    )


def _name_pairs(points: pd.DataFrame) -> pd.Series:
    """Return the name of each row's pair of data sets."""
    return points["first"].astype(str) + ", " + points["second"].astype(str)


def _make_legend(styles: dict[str, tuple[str, Any, str]]) -> list[Line2D]:
    """Return the legend: the pairs of data sets, then what the marks mean."""
    dot: Any = {"linestyle": "", "markersize": 4.5}
    key = [
        Line2D([], [], color=color, marker=marker, label=fit_text(pair, 140, TEXT_SIZE), **dot)
        for pair, (color, _, marker) in styles.items()
    ]
    hollow: Any = {"markerfacecolor": "white", "color": BLACK, "marker": "o"}
    return [
        *key,
        Line2D([], [], color=BLACK, marker="o", label="observed", **dot),
        Line2D([], [], label="corrected", **hollow, **dot),
        Line2D(
            [], [], color=BLACK, marker="|", markersize=8, markeredgewidth=1.4, linestyle="", label="ceiling"
        ),
    ]
