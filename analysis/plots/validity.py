"""Validity of a readout: its calibration curve, and its refusal rates against those of generated text."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import CaptionContext, format_count_range
from analysis.plots.labels import label_points
from analysis.plots.layout import fit_text, make_axes, place_legend_beside
from analysis.plots.style import BLACK, BLUE, DARK, GREY, RC_PARAMS, TEXT_SIZE, VERMILION
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, Trust, format_condition

# Verdict → color, marker and fill.
_VERDICT_STYLES: dict[str, tuple[str, str, str]] = {
    Trust.TRUSTED: (BLUE, "o", BLUE),
    Trust.CANNOT_TELL: (DARK, "s", GREY),
    Trust.NOT_TRUSTED: (VERMILION, "D", "white"),
}


def draw_calibration(curve: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the share of responses that refuse against the readout's refusal probability.

    >>> row = {"chance": 0.9, "refused": 1.0, "refused_low": 0.7, "refused_high": 1.0, "refused_n": 9}
    >>> draw_calibration(pd.DataFrame([row])).get_xlabel()
    "readout's refusal probability"

    Args:
        curve: calibration curve, a row per bin: probability, share of refusals with its interval, count.
        ax: axes to draw on; by default new ones.
    """
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(5.0, 3.6)  # as wide as the title
        _draw_diagonal(ax)
        bar: Any = {"color": BLUE, "linewidth": 1.1, "alpha": 0.6, "zorder": 2}
        ax.vlines(curve["chance"], curve["refused_low"], curve["refused_high"], **bar)
        ax.plot(curve["chance"], curve["refused"], color=BLUE, linewidth=1.0, zorder=2)
        ax.scatter(curve["chance"], curve["refused"], color=BLUE, s=30, zorder=3, ec="white", lw=0.5)
        ax.set_xlim(-0.03, 1.03)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel("readout's refusal probability")
        ax.set_ylabel("share of responses that refuse")
    return ax


def draw_refusal_rates(validity: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each condition at its refusal rates by text and by readout; hollow if the readout is not trusted.

    Args:
        validity: `validity.csv`, of one readout.
        ax: axes to draw on; by default new ones.
    """
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(3.6, 3.6)
        _draw_diagonal(ax)
        points = pd.DataFrame(
            {
                f"{name}{end}": 100 * validity[count] / validity["n"]
                for name, count in (("text", "refused"), ("readout", "readout_refused"))
                for end in INTERVAL_SUFFIXES
            }
        )
        key = []
        for number, row in enumerate(validity.to_dict("records"), 1):
            color, marker, fill = _VERDICT_STYLES[row["trusted"]]
            x, y = (100 * row[count] / row["n"] for count in ("refused", "readout_refused"))
            ax.scatter(x, y, s=46, marker=marker, color=fill, ec=color, lw=1.2, zorder=3)
            name = fit_text(_name_condition(row), 150, TEXT_SIZE, 1)
            key.append(_verdict_legend_entry(row["trusted"], f"{number}  {name}"))
        key += [_verdict_legend_entry(verdict, f"readout: {verdict}") for verdict in _VERDICT_STYLES]
        ax.set_xlim(-6, 108)
        ax.set_ylim(-6, 108)
        numbers = [str(number + 1) for number in range(len(points))]
        label_points(ax, points, numbers, 300, ("text", "readout"))
        ax.set_xlabel("refusal rate by generated text (%)")
        ax.set_ylabel("refusal rate by readout (%)")
        place_legend_beside(ax, key)
    return ax


def caption_calibration(validity: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_calibration`.

    Args:
        validity: `validity.csv`, of the readout, whose conditions the curve pools.
        context: facts about the run.
    """
    wilson = replace(context, interval="Wilson 95\u00a0%, which treat responses as independent")
    return (
        f"Share of {_describe_responses(validity, context)}, against the refusal probability of the readout, "
        "in bins of the probability, all conditions pooled. Bars are intervals. Dotted diagonal: perfect "
        f"calibration. {wilson.format_sentences(_join_attacks(validity))}"
    )


def caption_refusal_rates(validity: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_refusal_rates`.

    Args:
        validity: `validity.csv`, of one readout.
        context: facts about the run.
    """
    return (
        "Each point is one condition: share of queries whose margin exceeds the threshold, against the share "
        f"of {_describe_responses(validity, context)}. Dotted diagonal: equal rates. Not trusted: the upper "
        "end of the interval is below .80 for the readout's AUROC against the text, or below .60 for kappa; "
        f"cannot tell: mostly, too few responses of one class. "
        f"{context.format_sentences(_join_attacks(validity))}"
    )


def _describe_responses(validity: pd.DataFrame, context: CaptionContext) -> str:
    return (
        f"greedy responses ({context.max_new_tokens} tokens) that refuse (judge: "
        f"{context.judge_name}), for {format_count_range(validity['n'])} queries under each of "
        f"{len(validity)} conditions"
    )


def _name_condition(row: dict[Hashable, Any]) -> str:
    return format_condition(row | {"defense": "undefended"} if row["defense"] == UNDEFENDED else row)


def _join_attacks(validity: pd.DataFrame) -> str:
    return ", ".join(validity["attack"].unique())


def _verdict_legend_entry(verdict: str, text: str) -> Line2D:
    color, marker, fill = _VERDICT_STYLES[verdict]
    style: Any = {"marker": marker, "markerfacecolor": fill, "markeredgecolor": color, "linestyle": ""}
    return Line2D([], [], label=text, **style)


def _draw_diagonal(ax: Axes) -> None:
    ax.axline((0, 0), slope=1, color=BLACK, linewidth=0.8, linestyle=":", zorder=1)
