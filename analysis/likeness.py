"""Whether defenses act through the same parts: the cosine of their attribution profiles, pair by pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from analysis.curves import MAX_NUMBERED_DEFENSES, check_one_attack
from analysis.heads import MISSING_COLOR, EFFECT_COLORS, draw_color_scale
from analysis.lettering import make_axes, fit_text, add_inset_axes
from analysis.palette import BLACK, RC_PARAMS, TEXT_SIZE
from analysis.panels import extract_estimates, set_panel_titles

_SIMILARITY_PANEL_GAP = 0.35  # inches between the panels


def draw_profile_similarity(profiles: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the cosine of each two defenses, a panel per contrast; blue is alike, orange is opposite.

    >>> row = {"attack": "direct", "defense": "a", "other": "b", "contrast": "shift", "cosine": -0.5}
    >>> [text.get_text() for text in likeness(pd.DataFrame([row])).child_axes[0].texts]
    ['−0.50', '−0.50']

    Args:
        profiles: `profiles.csv`, of one attack.
        ax: where to draw; it only lends its place to the panels.
    """
    check_one_attack(profiles)
    kinds = list(dict.fromkeys(profiles["contrast"]))
    names = list(dict.fromkeys([*profiles["defense"], *profiles["other"]]))
    cell = 0.36 if len(names) <= MAX_NUMBERED_DEFENSES else 0.17
    side = cell * len(names)
    step = max(side, 1.6) + _SIMILARITY_PANEL_GAP
    whole = len(kinds) * step - _SIMILARITY_PANEL_GAP, side
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(*whole)
        ax.set_axis_off()
        panels = [add_inset_axes(ax, whole, (number * step, 0, side, side)) for number in range(len(kinds))]
        set_panel_titles(panels, kinds)
        shown = [fit_text(name, 130, TEXT_SIZE, 1) for name in names]
        for number, (kind, panel) in enumerate(zip(kinds, panels, strict=True)):
            _draw_similarity_panel(panel, profiles[profiles["contrast"] == kind], names)
            panel.set_xticks(range(len(names)), shown, rotation=90, fontsize=TEXT_SIZE)
            panel.set_yticks(range(len(names)), shown if number == 0 else [""] * len(names), fontsize=TEXT_SIZE)
        bar = add_inset_axes(
            ax, whole, ((len(kinds) - 1) * step + side + 0.2, side - min(side, 1.5), 0.11, min(side, 1.5))
        )
        draw_color_scale(bar, 1.0, ["\N{MINUS SIGN}1 opposite", "0 unlike", "+1 same"])
    return ax


def _draw_similarity_panel(ax: Axes, rows: pd.DataFrame, defenses: list[str]) -> None:
    """Draw one contrast of all pairs on both sides of the diagonal."""
    values, sure = np.full((len(defenses),) * 2, np.nan), np.zeros((len(defenses),) * 2, dtype=bool)
    pairs = zip(rows["defense"], rows["other"], extract_estimates(rows, "cosine"), strict=True)
    for one, two, (value, low, high) in pairs:
        for row, column in ((one, two), (two, one)):
            if row != column:
                values[defenses.index(row), defenses.index(column)] = value
                sure[defenses.index(row), defenses.index(column)] = low > 0 or high < 0
    edges = np.arange(len(defenses) + 1) - 0.5
    look: Any = {"cmap": EFFECT_COLORS.with_extremes(bad=MISSING_COLOR), "norm": Normalize(-1, 1), "edgecolors": "white"}
    ax.pcolormesh(edges, edges, np.ma.masked_invalid(values), linewidth=0.6, gid="cosine", **look)
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value, certain = values[row, column], sure[row, column]
        words = f"{round(value, 2) + 0.0:+.2f}" if len(defenses) <= MAX_NUMBERED_DEFENSES else "\N{BULLET}" * bool(certain)
        style: Any = {"weight": "bold" if certain else "normal", "size": TEXT_SIZE - 1.0, "gid": "cosine"}
        style |= {"color": "white" if abs(value) > 0.7 else BLACK, "ha": "center", "va": "center_baseline"}
        ax.text(column, row, words.replace("-", "\N{MINUS SIGN}"), **style)
    ax.set_ylim(len(defenses) - 0.5, -0.5)
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
