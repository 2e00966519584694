"""Whether defenses act through the same parts: the cosine of their attribution profiles, pair by pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from analysis.curves import NUMBERED, one_attack
from analysis.heads import NONE, SHADES, scale
from analysis.lettering import blank, fit, inset
from analysis.palette import BLACK, STYLE, WRITTEN
from analysis.panels import estimates, headed

_GAP = 0.35  # inches between the panels


def likeness(profiles: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the cosine of each two defenses, a panel per contrast; blue is alike, orange is opposite.

    >>> row = {"attack": "direct", "defense": "a", "other": "b", "contrast": "shift", "cosine": -0.5}
    >>> [text.get_text() for text in likeness(pd.DataFrame([row])).child_axes[0].texts]
    ['−0.50', '−0.50']

    Args:
        profiles: `profiles.csv`, of one attack.
        ax: where to draw; it only lends its place to the panels.
    """
    one_attack(profiles)
    kinds = list(dict.fromkeys(profiles["contrast"]))
    names = list(dict.fromkeys([*profiles["defense"], *profiles["other"]]))
    cell = 0.36 if len(names) <= NUMBERED else 0.17
    side = cell * len(names)
    step = max(side, 1.6) + _GAP
    whole = len(kinds) * step - _GAP, side
    with rc_context(STYLE):
        ax = ax or blank(*whole)
        ax.set_axis_off()
        panels = [inset(ax, whole, (number * step, 0, side, side)) for number in range(len(kinds))]
        headed(panels, kinds)
        shown = [fit(name, 130, WRITTEN, 1) for name in names]
        for number, (kind, panel) in enumerate(zip(kinds, panels, strict=True)):
            _panel(panel, profiles[profiles["contrast"] == kind], names)
            panel.set_xticks(range(len(names)), shown, rotation=90, fontsize=WRITTEN)
            panel.set_yticks(range(len(names)), shown if number == 0 else [""] * len(names), fontsize=WRITTEN)
        bar = inset(
            ax, whole, ((len(kinds) - 1) * step + side + 0.2, side - min(side, 1.5), 0.11, min(side, 1.5))
        )
        scale(bar, 1.0, ["\N{MINUS SIGN}1 opposite", "0 unlike", "+1 same"])
    return ax


def _panel(ax: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    """Draw one contrast of all pairs on both sides of the diagonal."""
    values, sure = np.full((len(names),) * 2, np.nan), np.zeros((len(names),) * 2, dtype=bool)
    pairs = zip(rows["defense"], rows["other"], estimates(rows, "cosine"), strict=True)
    for one, two, (value, low, high) in pairs:
        for row, column in ((one, two), (two, one)):
            if row != column:
                values[names.index(row), names.index(column)] = value
                sure[names.index(row), names.index(column)] = low > 0 or high < 0
    edges = np.arange(len(names) + 1) - 0.5
    look: Any = {"cmap": SHADES.with_extremes(bad=NONE), "norm": Normalize(-1, 1), "edgecolors": "white"}
    ax.pcolormesh(edges, edges, np.ma.masked_invalid(values), linewidth=0.6, gid="cosine", **look)
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value, certain = values[row, column], sure[row, column]
        words = f"{round(value, 2) + 0.0:+.2f}" if len(names) <= NUMBERED else "\N{BULLET}" * bool(certain)
        style: Any = {"weight": "bold" if certain else "normal", "size": WRITTEN - 1.0, "gid": "cosine"}
        style |= {"color": "white" if abs(value) > 0.7 else BLACK, "ha": "center", "va": "center_baseline"}
        ax.text(column, row, words.replace("-", "\N{MINUS SIGN}"), **style)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
