"""Whether the readout can be believed: its probability against how often the text refuses, and its rates."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.lettering import beside, blank, fit
from analysis.palette import BLACK, BLUE, DARK, GREY, STYLE, VERMILION, WRITTEN

# What was found → color, mark and whether it is filled.
_LOOKS = {
    "trusted": (BLUE, "o", BLUE),
    "cannot tell": (DARK, "s", GREY),
    "not trusted": (VERMILION, "D", "white"),
}


def calibration(curve: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how often the text refuses where the readout gives a probability; on the diagonal they are one.

    >>> calibration(pd.DataFrame([{"chance": 0.9, "refused": 1.0, "refused_low": 0.7, "refused_high": 1.0,
    ...                           "refused_n": 9}])).get_xlabel()
    "readout's probability of refusing"

    Args:
        curve: what `agreement.reliability` returned.
        ax: where to draw.
    """
    with rc_context(STYLE):
        ax = ax or blank(3.6, 3.6)
        _diagonal(ax)
        bar: Any = {"color": BLUE, "linewidth": 1.1, "alpha": 0.6, "zorder": 2}
        ax.vlines(curve["chance"], curve["refused_low"], curve["refused_high"], **bar)
        ax.plot(curve["chance"], curve["refused"], color=BLUE, linewidth=1.0, zorder=2)
        ax.scatter(curve["chance"], curve["refused"], color=BLUE, s=30, zorder=3, ec="white", lw=0.5)
        ax.set_xlim(-0.03, 1.03)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel("readout's probability of refusing")
        ax.set_ylabel("share of answers that refuse")
    return ax


def rates(found: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each condition at its refusal rate by text and by readout; hollow where it is not trusted.

    Args:
        found: `validity.csv`, of one attack.
        ax: where to draw.
    """
    with rc_context(STYLE):
        ax = ax or blank(3.6, 3.6)
        _diagonal(ax)
        key: list[Any] = []
        for number, row in enumerate(found.to_dict("records"), 1):
            color, marker, fill = _LOOKS[row["trusted"]]
            x, y = 100 * row["refused"] / row["n"], 100 * row["readout_refused"] / row["n"]
            ax.scatter(x, y, s=46, marker=marker, color=fill, ec=color, lw=1.2, zorder=3)
            ax.annotate(str(number), (x, y), (5, 4), textcoords="offset points", fontsize=WRITTEN)
            words = f"{number}  {fit(str(row['condition']), 150, WRITTEN, 1)}"
            look: Any = {"marker": marker, "markerfacecolor": fill, "markeredgecolor": color}
            key.append(Line2D([], [], linestyle="", label=words, **look))
        for name, (color, marker, fill) in _LOOKS.items():
            look = {"marker": marker, "markerfacecolor": fill, "markeredgecolor": color}
            key.append(Line2D([], [], linestyle="", label=f"= {name}", **look))
        ax.set_xlabel("answers that refuse (%)")
        ax.set_ylabel("readout says refuse (%)")
        ax.set_xlim(-4, 104)
        ax.set_ylim(-4, 104)
        beside(ax, key)
    return ax


def _diagonal(ax: Axes) -> None:
    ax.axline((0, 0), slope=1, color=BLACK, linewidth=0.8, linestyle=":", zorder=1)
