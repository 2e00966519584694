"""What is gained for what it costs: each defense by the time it adds and by how much better it separates."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis.lettering import beside, blank, fit
from analysis.palette import BLACK, FAMILIES, GREY, OTHER, STYLE, WRITTEN
from analysis.plane import label, mark


def price(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the gain in AUROC over the time that a prompt takes, as a multiple of the undefended.

    >>> row = {"defense": "x", "family": "noise", "prefill_ratio": 2.0, "delta_auroc": 0.1}
    >>> row |= {f"{name}{end}": 0.1 for name in ("prefill_ratio", "delta_auroc") for end in ("_low", "_high")}
    >>> price(pd.DataFrame([row])).get_ylabel()
    'ΔAUROC (separates better)'

    Args:
        points: `cost.csv`.
        ax: where to draw.
    """
    known = points[points["defense"] != "none"]
    with rc_context(STYLE):
        ax = ax or blank(4.2, 3.4)
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.axvline(1, color=GREY, linewidth=0.6, zorder=1)
        ax.plot([1], [0], "o", color=BLACK, markersize=5, zorder=3)
        key = [mark(BLACK, "o", "undefended")]
        for number, row in enumerate(known.to_dict("records"), 1):
            color, shape = FAMILIES.get(row["family"], OTHER)
            bar: Any = {"color": color, "alpha": 0.5, "linewidth": 1.0, "zorder": 2}
            ax.hlines(row["delta_auroc"], row["prefill_ratio_low"], row["prefill_ratio_high"], **bar)
            ax.vlines(row["prefill_ratio"], row["delta_auroc_low"], row["delta_auroc_high"], **bar)
            look: Any = {"marker": shape, "color": color, "edgecolors": "white", "linewidths": 0.5}
            ax.scatter(row["prefill_ratio"], row["delta_auroc"], s=44, zorder=3, **look)
            key.append(mark(color, shape, f"{number}  {fit(str(row['defense']), 140, WRITTEN, 1)}"))
        numbers = [str(number + 1) for number in range(len(known))]
        label(ax, known, numbers, 300, ("prefill_ratio", "delta_auroc"))
        ax.set_xlabel("time until the first token (× undefended)")
        ax.set_ylabel("\N{GREEK CAPITAL LETTER DELTA}AUROC (separates better)")
        beside(ax, key)
    return ax
