"""Validity of a readout: its calibration curve, and its refusal rates against those of generated text."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import CaptionContext, format_count_range
from analysis.plots.layout import make_axes, place_legend_beside, set_row_axis
from analysis.plots.style import BLACK, BLUE, DARK, GREY, RC_PARAMS, TEXT_SIZE, VERMILION
from analysis.stats.agreement import MAX_RATE_ERROR, RESPONSES_READOUT
from analysis.stats.tables import UNDEFENDED, Trust, format_condition

_ROW_HEIGHT = 0.24  # inches of a condition
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
        above: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
        above |= {"fontsize": TEXT_SIZE, "color": DARK, "annotation_clip": False, "gid": "count"}
        for chance, count in zip(curve["chance"], curve.get("refused_n", ()), strict=False):
            ax.annotate(f"{count:.0f}", (chance, 1), (0, 4), va="bottom", **above)
        if "refused_n" in curve:
            number: Any = above | {"xycoords": "axes fraction", "ha": "left"}
            ax.annotate("responses", (1, 1), (4, 4), va="bottom", **number)
        ax.set_xlabel("readout's refusal probability")
        ax.set_ylabel("share of responses that refuse")
    return ax


def draw_refusal_rates(validity: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the refusal rates of each condition by text and by readout, a row each, sorted by the former.

    Args:
        validity: `validity.csv`, of one readout, and if known of the first tokens of the responses, which
            are drawn as crosses. The mark of the readout is hollow if its rates are not trusted.
        ax: axes to draw on; by default new ones.
    """
    readout_rows, response_rows = _split_rows(validity)
    trust = _choose_trust_column(validity)
    rates = pd.DataFrame(_compute_rates(readout_rows))
    order = rates["text"].sort_values(ascending=False, kind="stable").index
    rows, rates = readout_rows.loc[order], rates.loc[order]
    heights = dict(zip(_key_conditions(rows), -np.arange(len(rows), dtype=float), strict=True))
    places = np.array([*heights.values()])
    names = [_name_condition(row) for row in rows.to_dict("records")]
    half_width = 100 * MAX_RATE_ERROR
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(3.6, max(_ROW_HEIGHT * len(rows), 0.6))
        band: Any = {"color": GREY, "alpha": 0.3, "linewidth": 9, "zorder": 0.5, "gid": "band"}
        ax.hlines(places, rates["text"] - half_width, rates["text"] + half_width, **band)
        ax.hlines(places, rates["text"], rates["readout"], color=GREY, linewidth=1.0, zorder=1)
        text: Any = {"color": BLACK, "marker": "|", "s": 70, "linewidths": 1.6}
        ax.scatter(rates["text"], places, zorder=3, label="text", **text)
        for row, rate, height in zip(rows.to_dict("records"), rates["readout"], places, strict=True):
            color, marker, fill = _VERDICT_STYLES[row[trust]]
            ax.scatter(rate, height, s=40, marker=marker, color=fill, ec=color, lw=1.2, zorder=4)
        text_style: Any = {"linestyle": "", "color": BLACK, "marker": "|", "markersize": 8, "mew": 1.6}
        key = [Line2D([], [], label="generated text", **text_style)]
        present = [verdict for verdict in _VERDICT_STYLES if (rows[trust] == verdict).any()]
        key += [_verdict_legend_entry(verdict, f"readout: {verdict}") for verdict in present]
        if len(response_rows):
            cross: Any = {"marker": "+", "color": BLUE}
            known = [name in heights for name in _key_conditions(response_rows)]
            shown = response_rows[known]
            at = [heights[name] for name in _key_conditions(shown)]
            ax.scatter(_compute_rates(shown)["readout"], at, s=50, lw=1.2, zorder=5, label="crosses", **cross)
            key.append(Line2D([], [], linestyle="", label="first tokens, judged", **cross))
        set_row_axis(ax, names, "refused (%)")
        ax.set_xlim(-6, 106)
        ax.set_xticks(range(0, 101, 20))
        place_legend_beside(ax, key)
    return ax


def caption_calibration(validity: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_calibration`.

    Args:
        validity: `validity.csv`, of the readout, whose conditions the curve pools.
        context: facts about the run.
    """
    wilson = replace(context, interval="Wilson 95\u00a0%, which treat responses as independent")
    validity, _ = _split_rows(validity)
    return (
        f"Share of {_describe_responses(validity, context)}, against the refusal probability of the readout, "
        "in bins of the probability, all conditions pooled; above, the number of responses in each bin. Bars "
        "are intervals. Dotted diagonal: perfect calibration. "
        f"{wilson.format_sentences(_join_attacks(validity))}"
    )


def caption_refusal_rates(validity: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_refusal_rates`.

    Args:
        validity: `validity.csv`, of one readout, and if known of the first tokens of the responses.
        context: facts about the run.
    """
    readout_rows, response_rows = _split_rows(validity)
    points = f"{100 * MAX_RATE_ERROR:.0f} points"
    if _choose_trust_column(validity) == "rate_trusted":
        rule = (
            f"Trusted: the rates of harmful and of benign queries both differ by at most {points}, by "
            "their intervals; not trusted: one of them differs by more; cannot tell: otherwise. "
        )
        context = replace(context, interval="Bonett\N{EN DASH}Price 95\u00a0%, not drawn")
    else:
        rule = (
            "Not trusted: the upper end of the interval is below .80 for the readout's AUROC against the "
            "text, or below .60 for kappa; cannot tell: mostly, too few responses of one class. "
        )
    crosses = (
        f"Crosses: share that refuse by a judge that reads only the first {context.n_opening_tokens} tokens. "
    )
    return (
        f"Share of {_describe_responses(readout_rows, context)} (line), and share of the same queries whose "
        f"margin exceeds the threshold (mark). {crosses * bool(len(response_rows))}"
        f"Band: within {points} of the generated text. {rule}"
        f"{context.format_sentences(_join_attacks(readout_rows))}"
    )


def _split_rows(validity: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of the readout, and those of the first tokens of responses."""
    if "readout" not in validity:
        return validity, validity.iloc[:0]
    is_response = validity["readout"] == RESPONSES_READOUT
    return validity[~is_response], validity[is_response]


def _choose_trust_column(validity: pd.DataFrame) -> str:
    """Return the column of the verdict that is drawn; older runs have none on rates."""
    return "rate_trusted" if "rate_trusted" in validity else "trusted"


def _compute_rates(validity: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the refusal rates of each condition by text and by readout, in percent."""
    counts = {"text": "refused", "readout": "readout_refused"}
    return {name: 100 * validity[count] / validity["n"] for name, count in counts.items()}


def _describe_responses(validity: pd.DataFrame, context: CaptionContext) -> str:
    return (
        f"greedy responses ({context.max_new_tokens} tokens) that refuse (judge: "
        f"{context.judge_name}), for {format_count_range(validity['n'])} queries under each of "
        f"{len(validity)} conditions"
    )


def _key_conditions(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Return attack and defense of each row."""
    return list(zip(rows["attack"].astype(str), rows["defense"].astype(str), strict=True))


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
