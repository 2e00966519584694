"""Whether the readout can be believed: its probability against how often the text refuses, and its rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import format_count_range
from analysis.plots.labels import label_points
from analysis.plots.layout import fit_text, make_axes, place_legend_beside
from analysis.plots.style import BLACK, BLUE, DARK, GREY, RC_PARAMS, TEXT_SIZE, VERMILION
from analysis.stats.tables import INTERVAL_SUFFIXES, format_condition

if TYPE_CHECKING:
    from analysis.plots.captions import CaptionContext

# What was found → color, mark and whether it is filled.
_VERDICT_STYLES = {
    "trusted": (BLUE, "o", BLUE),
    "cannot tell": (DARK, "s", GREY),
    "not trusted": (VERMILION, "D", "white"),
}


def draw_calibration(curve: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how often the text refuses where the readout gives a probability; on the diagonal they are one.

    >>> draw_calibration(pd.DataFrame([{"chance": 0.9, "refused": 1.0, "refused_low": 0.7, "refused_high": 1.0,
    ...                           "refused_n": 9}])).get_xlabel()
    "readout's probability of refusing"

    Args:
        curve: what `agreement.reliability` returned.
        ax: where to draw.
    """
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(3.6, 3.6)
        _draw_diagonal(ax)
        bar: Any = {"color": BLUE, "linewidth": 1.1, "alpha": 0.6, "zorder": 2}
        ax.vlines(curve["chance"], curve["refused_low"], curve["refused_high"], **bar)
        ax.plot(curve["chance"], curve["refused"], color=BLUE, linewidth=1.0, zorder=2)
        ax.scatter(curve["chance"], curve["refused"], color=BLUE, s=30, zorder=3, ec="white", lw=0.5)
        ax.set_xlim(-0.03, 1.03)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel("readout's probability of refusing")
        ax.set_ylabel("share of answers that refuse")
    return ax


def draw_refusal_rates(validity: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each condition at its refusal rate by text and by readout; hollow where it is not trusted.

    Args:
        validity: `validity.csv`, of one readout.
        ax: where to draw.
    """
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(3.6, 3.6)
        _draw_diagonal(ax)
        points = pd.DataFrame(
            {
                f"{name}{end}": 100 * validity[count] / validity["n"]
                for name, count in (("text", "refused"), ("readout", "readout_refused"))
                for end in INTERVAL_SUFFIXES
            }
        )
        key = []
        for number, row in enumerate(validity.to_dict("records"), 1):
            color, marker, fill = _VERDICT_STYLES[row["trusted"]]
            x, y = (100 * row[count] / row["n"] for count in ("refused", "readout_refused"))
            ax.scatter(x, y, s=46, marker=marker, color=fill, ec=color, lw=1.2, zorder=3)
            key.append(
                _verdict_legend_entry(
                    row["trusted"], f"{number}  {fit_text(format_condition(row), 150, TEXT_SIZE, 1)}"
                )
            )
        key += [_verdict_legend_entry(name, f"= {name}") for name in _VERDICT_STYLES]
        ax.set_xlim(-4, 104)
        ax.set_ylim(-4, 104)
        label_points(ax, points, [str(number + 1) for number in range(len(points))], 300, ("text", "readout"))
        ax.set_xlabel("answers that refuse (%)")
        ax.set_ylabel("readout says refuse (%)")
        place_legend_beside(ax, key)
    return ax


def _verdict_legend_entry(verdict: str, text: str) -> Line2D:
    color, marker, fill = _VERDICT_STYLES[verdict]
    look: Any = {"marker": marker, "markerfacecolor": fill, "markeredgecolor": color, "linestyle": ""}
    return Line2D([], [], label=text, **look)


def _draw_diagonal(ax: Axes) -> None:
    ax.axline((0, 0), slope=1, color=BLACK, linewidth=0.8, linestyle=":", zorder=1)


def caption_validity(
    validity: pd.DataFrame, context: CaptionContext, judge_name: str, max_new_tokens: int
) -> str:
    """Return what the captions of both figures of `analyze validate` say."""
    return (
        f"Greedy answers ({max_new_tokens} tokens) of {format_count_range(validity['n'])} queries under each of {len(validity)} "
        f"conditions, judged by their text (judge: {judge_name}), against the first-token readout at its "
        "threshold; the calibration curve pools all conditions, and its bars are Wilson 95\u00a0% intervals "
        "that take answers as independent. Not trusted: the upper end of the "
        "AUROC's interval against the text is under .80, or of kappa under .60; cannot tell: mostly, too "
        "few of one class. "
        f"{context.format_sentences(', '.join(validity['attack'].unique()))}"
    )
