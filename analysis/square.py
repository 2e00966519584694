"""The 2 × 2 of a defense on the shift-discrimination plane: what the secret adds, what the weights add."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.curves import check_one_attack
from analysis.lettering import place_legend_beside, make_axes
from analysis.palette import BLACK, BLUE, GREY, RC_PARAMS, VERMILION
from analysis.plane import _name_directions, _plane_limits, label_points

# Corner → its words: of the weights, then of the secret.
SQUARE_CORNERS = {
    "neither": "neither",
    "no_weights": "secret only",
    "no_secret": "weights only",
    "both": "weights and secret",
}
# Side of the square → color and dash: what is added along it.
_SQUARE_SIDES = (
    ("neither", "no_weights", BLUE, "the secret is added"),
    ("no_secret", "both", BLUE, ""),
    ("neither", "no_secret", VERMILION, "the weights are tuned"),
    ("no_weights", "both", VERMILION, ""),
)


def build_square_points(points: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `plane_points` that make a 2 × 2, with their `corner`; none if one is missing.

    >>> names = ["a", "b", "b/no_secret", "b/no_weights", "b/neither"]
    >>> square_points(pd.DataFrame({"defense": names}))["corner"].tolist()
    ['both', 'no_secret', 'no_weights', 'neither']
    """
    whole = points["defense"].str.partition("/")[0]
    part = points["defense"].str.partition("/")[2].replace("", "both")
    found = points.assign(corner=part, whole=whole)[part.isin(SQUARE_CORNERS)]
    complete = found.groupby("whole")["corner"].transform("nunique") == len(SQUARE_CORNERS)
    return found[complete].drop(columns="whole").reset_index(drop=True)


def draw_square(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the four corners at their shift and discrimination, and an arrow for each ingredient added.

    Args:
        points: what `square_points` returned, of one attack and one defense.
        ax: where to draw; its size must be final, because labels are placed by it.
    """
    at = check_one_attack(points).set_index("corner")
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, 4.2)
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.axvline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.plot([0], [0], "o", color=BLACK, markersize=5, zorder=3, gid="undefended")
        key: list[Any] = [Line2D([], [], color=BLACK, marker="o", linestyle="", label="undefended (origin)")]
        for start, end, color, words in _SQUARE_SIDES:
            one, two = (at.loc[corner, ["shift", "discrimination"]].astype(float) for corner in (start, end))
            ax.annotate(
                "",
                xy=(two["shift"], two["discrimination"]),
                xytext=(one["shift"], one["discrimination"]),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": color,
                    "linewidth": 1.4,
                    "shrinkA": 5,
                    "shrinkB": 5,
                },
                zorder=2,
            )
            if words:
                key.append(Line2D([], [], color=color, linewidth=1.4, label=words))
        bar: Any = {"color": BLACK, "alpha": 0.55, "linewidth": 1.1, "zorder": 3}
        ax.hlines(at["discrimination"], at["shift_low"], at["shift_high"], **bar)
        ax.vlines(at["shift"], at["discrimination_low"], at["discrimination_high"], **bar)
        ax.scatter(at["shift"], at["discrimination"], s=42, color=BLACK, marker="D", zorder=4, ec="white")
        ax.set_xlim(_plane_limits(points, "shift"))
        ax.set_ylim(_plane_limits(points, "discrimination"))
        label_points(ax, points, [SQUARE_CORNERS[corner] for corner in points["corner"]], reach=300)
        ax.set_xlabel("shift (nats)")
        ax.set_ylabel("discrimination (nats)")
        _name_directions(ax)
        place_legend_beside(ax, key)
    return ax
