"""What is gained for what it costs: each defense by the time it adds and by how much better it separates."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis.lettering import place_legend_beside, make_axes, fit_text
from analysis.palette import BLACK, FAMILY_STYLES, GREY, OTHER_FAMILY_STYLE, RC_PARAMS, TEXT_SIZE
from analysis.plane import label_points, make_legend_marker


def draw_cost(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
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
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, 3.4)
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.axvline(1, color=GREY, linewidth=0.6, zorder=1)
        ax.plot([1], [0], "o", color=BLACK, markersize=5, zorder=3)
        key = [make_legend_marker(BLACK, "o", "undefended")]
        for number, row in enumerate(known.to_dict("records"), 1):
            color, shape = FAMILY_STYLES.get(row["family"], OTHER_FAMILY_STYLE)
            bar: Any = {"color": color, "alpha": 0.5, "linewidth": 1.0, "zorder": 2}
            ax.hlines(row["delta_auroc"], row["prefill_ratio_low"], row["prefill_ratio_high"], **bar)
            ax.vlines(row["prefill_ratio"], row["delta_auroc_low"], row["delta_auroc_high"], **bar)
            look: Any = {"marker": shape, "color": color, "edgecolors": "white", "linewidths": 0.5}
            ax.scatter(row["prefill_ratio"], row["delta_auroc"], s=44, zorder=3, **look)
            key.append(make_legend_marker(color, shape, f"{number}  {fit_text(str(row['defense']), 140, TEXT_SIZE, 1)}"))
        numbers = [str(number + 1) for number in range(len(known))]
        label_points(ax, known, numbers, 300, ("prefill_ratio", "delta_auroc"))
        ax.set_xlabel("time until the first token (× undefended)")
        ax.set_ylabel("\N{GREEK CAPITAL LETTER DELTA}AUROC (separates better)")
        place_legend_beside(ax, key)
    return ax
