"""What each secret does: a row per kind of secret, a dot per secret, without it and with it."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.lettering import make_axes
from analysis.palette import BLUE, GREY, RC_PARAMS, VERMILION

# Secret off or on → color, mark and word.
_SECRET_SIDES = (("none", VERMILION, "o", "without the secret"), ("own", BLUE, "D", "with the secret"))


def build_secret_points(arms: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `arms.csv` that compare secrets, with the columns that the figure draws.

    >>> secret_points(pd.DataFrame({"secret_length": [None, 10], "arm": ["clean", "10-1"]}))["arm"].tolist()
    ['10-1']
    """
    wanted = ["arm", "secret", "secret_length", "secret_wording", "asr", "asr_low", "asr_high"]
    known = arms.dropna(subset="secret_length")
    return known[
        [
            *(name for name in wanted if name in known),
            *(name for name in known.columns if str(name).endswith("_n")),
        ]
    ]


def draw_secrets(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the success of the attack under each secret with its interval; a tall tick is a row's mean.

    Args:
        points: what `secret_points` returned.
        ax: where to draw.
    """
    kinds = points.groupby(["secret_wording", "secret_length"], sort=True).ngroup()
    names = {
        number: f"{int(group['secret_length'].iloc[0])} {group['secret_wording'].iloc[0]}"
        for number, group in points.groupby(kinds)
    }
    order = sorted(names, key=lambda number: (not names[number].endswith("random tokens"), number))
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.0, 0.75 * len(order))
        for row, number in enumerate(order):
            ax.axhline(-row, color=GREY, linewidth=0.4, zorder=1)
            for side, (kind, color, mark, _) in zip((-1, 1), _SECRET_SIDES, strict=True):
                here = points[(kinds == number) & (points["secret"] == kind)].sort_values("arm")
                ys = [-row - side * (0.08 + 0.09 * place) for place in range(len(here))]
                ends: Any = {"color": color, "linewidth": 0.8, "alpha": 0.5, "zorder": 2}
                ax.hlines(ys, 100 * here["asr_low"], 100 * here["asr_high"], **ends)
                ax.plot(
                    100 * here["asr"], ys, mark, color=color, markersize=4.5, zorder=3, gid=f"{number} {kind}"
                )
                mean = [100 * here["asr"].mean()] * 2
                ax.plot(mean, [-row, -row - side * 0.42], color=color, linewidth=2, zorder=4)
        ax.set_yticks(range(0, -len(order), -1), [names[number] for number in order])
        ax.set_ylim(0.5 - len(order), 0.5)
        ax.set_xlim(-2, 102)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("attack success in text (% of harmful queries answered)")
        key = [
            Line2D([], [], color=color, marker=mark, linestyle="", label=word)
            for _, color, mark, word in _SECRET_SIDES
        ]
        ax.legend(handles=key, loc="lower right", bbox_to_anchor=(1.02, 1), ncols=2)
    return ax
