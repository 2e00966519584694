"""Whether the readout can be believed: its probability against how often the text refuses, and its rates."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.curves import ENDS
from analysis.lettering import beside, blank, fit
from analysis.palette import BLACK, BLUE, DARK, GREY, STYLE, VERMILION, WRITTEN
from analysis.plane import label
from analysis.tables import condition

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
        found: `validity.csv`, of one readout.
        ax: where to draw.
    """
    with rc_context(STYLE):
        ax = ax or blank(3.6, 3.6)
        _diagonal(ax)
        points = pd.DataFrame(
            {
                f"{name}{end}": 100 * found[count] / found["n"]
                for name, count in (("text", "refused"), ("readout", "readout_refused"))
                for end in ENDS
            }
        )
        key = []
        for number, row in enumerate(found.to_dict("records"), 1):
            color, marker, fill = _LOOKS[row["trusted"]]
            x, y = (100 * row[count] / row["n"] for count in ("refused", "readout_refused"))
            ax.scatter(x, y, s=46, marker=marker, color=fill, ec=color, lw=1.2, zorder=3)
            key.append(_entry(row["trusted"], f"{number}  {fit(condition(row), 150, WRITTEN, 1)}"))
        key += [_entry(name, f"= {name}") for name in _LOOKS]
        ax.set_xlim(-4, 104)
        ax.set_ylim(-4, 104)
        label(ax, points, [str(number + 1) for number in range(len(points))], 300, ("text", "readout"))
        ax.set_xlabel("answers that refuse (%)")
        ax.set_ylabel("readout says refuse (%)")
        beside(ax, key)
    return ax


def _entry(verdict: str, words: str) -> Line2D:
    color, marker, fill = _LOOKS[verdict]
    look: Any = {"marker": marker, "markerfacecolor": fill, "markeredgecolor": color, "linestyle": ""}
    return Line2D([], [], label=words, **look)


def _diagonal(ax: Axes) -> None:
    ax.axline((0, 0), slope=1, color=BLACK, linewidth=0.8, linestyle=":", zorder=1)
