"""What each secret does: a row per kind of secret, a dot per secret, without it and with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import format_count_range
from analysis.plots.layout import make_axes
from analysis.plots.style import BLUE, GREY, RC_PARAMS, VERMILION

if TYPE_CHECKING:
    from analysis.plots.captions import CaptionContext

# Secret off or on → color, mark and word.
_SECRET_SIDES = (("none", VERMILION, "o", "without the secret"), ("own", BLUE, "D", "with the secret"))


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


def caption_secrets(points: pd.DataFrame, context: CaptionContext, max_new_tokens: int) -> str:
    """Return the caption of the figure that `strip.secrets` draws from these points."""
    return (
        "BackdoorAlign's weights trained once for each secret, all else equal, and asked under the attack's "
        f"system prompt, without the secret and with it: share of {format_count_range(points['text_refused_harmful_n'])} "
        f"harmful queries whose greedy answer ({max_new_tokens} tokens) holds none of the paper's 29 strings, with "
        "Wilson 95\u00a0% intervals; the tall tick is the mean over secrets. "
        f"Model: {context.model}. Data: {context.data}, {context.split} split."
    )
