"""Attack success rate under different BackdoorAlign secrets: a row per kind of secret, a dot per secret."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import CaptionContext, format_count_range
from analysis.plots.layout import make_axes
from analysis.plots.style import BLUE, GREY, RC_PARAMS, VERMILION

# Value of the column `secret`, color, marker and label.
_SECRET_SIDES = (("none", VERMILION, "o", "without the secret"), ("own", BLUE, "D", "with the secret"))


def draw_secrets(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the attack success rate under each secret with its interval; a tall tick is the mean of a row.

    Args:
        points: table from `build_secret_points`.
        ax: axes to draw on; by default new ones.
    """
    kinds = points.groupby(["secret_wording", "secret_length"], sort=True).ngroup()
    names = {
        kind: _name_secret(int(rows["secret_length"].iloc[0]), str(rows["secret_wording"].iloc[0]))
        for kind, rows in points.groupby(kinds)
    }
    order = sorted(names, key=lambda kind: (not names[kind].endswith("random tokens"), kind))
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.0, 0.75 * len(order))
        for row, kind in enumerate(order):
            ax.axhline(-row, color=GREY, linewidth=0.4, zorder=1)
            for side, (secret, color, marker, _) in zip((-1, 1), _SECRET_SIDES, strict=True):
                arms = points[(kinds == kind) & (points["secret"] == secret)].sort_values("arm")
                heights = [-row - side * (0.08 + 0.09 * place) for place in range(len(arms))]
                bar: Any = {"color": color, "linewidth": 0.8, "alpha": 0.5, "zorder": 2}
                ax.hlines(heights, 100 * arms["asr_low"], 100 * arms["asr_high"], **bar)
                dot: Any = {"color": color, "markersize": 4.5, "zorder": 3, "gid": f"{kind} {secret}"}
                ax.plot(100 * arms["asr"], heights, marker, **dot)
                mean = 100 * arms["asr"].mean()
                ax.plot([mean, mean], [-row, -row - side * 0.42], color=color, linewidth=2, zorder=4)
        ax.set_yticks(range(0, -len(order), -1), [names[kind] for kind in order])
        ax.set_ylim(0.5 - len(order), 0.5)
        ax.set_xlim(-2, 102)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("attack success rate by generated text (%)")
        key = [
            Line2D([], [], color=color, marker=marker, linestyle="", label=label)
            for _, color, marker, label in _SECRET_SIDES
        ]
        ax.legend(handles=key, loc="lower right", bbox_to_anchor=(1.02, 1), ncols=2)
    return ax


def caption_secrets(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_secrets`."""
    return (
        "Each point is one BackdoorAlign model, trained with its own secret and otherwise identical "
        "settings, and evaluated under the attack's system prompt without and with the secret. Attack "
        f"success rate: share of {format_count_range(points['text_refused_harmful_n'])} harmful queries "
        f"whose greedy response ({context.max_new_tokens} tokens) contains none of the paper's 29 refusal "
        "strings. Bars: Wilson 95\u00a0% intervals. Tall tick: mean over the secrets of a row. "
        f"Model: {context.model}. "
        f"Data: {context.data}, {context.split} split."
    )


def _name_secret(n_tokens: int, wording: str) -> str:
    """Return the name of a kind of secret, whose length is in tokens whatever it consists of."""
    return f"{n_tokens} {wording}" if wording.endswith("tokens") else f"{n_tokens} tokens of {wording}"
