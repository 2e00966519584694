"""Predicted against observed effects of ensembles: a panel per measure, a point per ensemble."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import CaptionContext, format_query_counts, omit_interval_note
from analysis.plots.data import FORECAST_PANELS, MAX_BARRED_STACKS, MAX_SHAPED_VOTES, check_one_attack
from analysis.plots.layout import LINE_HEIGHT, add_inset_axes, make_axes
from analysis.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    OTHER_FAMILY_STYLE,
    PURPLE,
    RC_PARAMS,
    TEXT_SIZE,
    VERMILION,
)
from analysis.stats.ensembles import STACK
from analysis.stats.voting import MEAN_VOTE_RULES, compute_fit_statistics

ENSEMBLE_STYLES = {
    STACK: (BLACK, "D", "stack: all applied together"),
    "mean": (BLUE, "o", "vote: mean"),
    "highest": (VERMILION, "^", "vote: highest"),
    "lowest": (GREEN, "v", "vote: lowest"),
    "majority": (PURPLE, "s", "vote: majority"),
    "fitted": (ORANGE, "P", "vote: fitted weights"),
}
_FORECAST_PANEL_SIDE, _FORECAST_COLUMN_GAP, _FORECAST_ROW_GAP = 1.75, 0.5, 0.86  # inches
_PANELS_PER_ROW = 3


def draw_forecast(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each ensemble at its predicted and its observed value; on the diagonal they are equal.

    >>> row = {"attack": "direct", "members": "a+b", "how": "stack", "kind": "inter"}
    >>> row |= {f"{side}_{x}": 0.5 for side in ("predicted", "observed") for x in FORECAST_PANELS}
    >>> ax = draw_forecast(pd.DataFrame([row]))
    >>> [panel.get_title(loc="left") for panel in ax.child_axes][:2]
    ['shift (nats)', 'discrimination (nats)']

    Args:
        points: table from `build_forecast_points`, of one attack.
        ax: axes that the panels are placed in; by default new ones.
    """
    check_one_attack(points)
    side = _FORECAST_PANEL_SIDE
    step_x, step_y = side + _FORECAST_COLUMN_GAP, side + _FORECAST_ROW_GAP
    n_rows = -(-len(FORECAST_PANELS) // _PANELS_PER_ROW)
    size = _PANELS_PER_ROW * step_x - _FORECAST_COLUMN_GAP, n_rows * step_y - _FORECAST_ROW_GAP
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(*size)
        ax.set_axis_off()
        for number, measure in enumerate(FORECAST_PANELS):
            row, column = divmod(number, _PANELS_PER_ROW)
            box = column * step_x, size[1] - side - row * step_y, side, side
            panel = add_inset_axes(ax, size, box)
            _draw_forecast_panel(panel, points, measure)
            if column == 0:
                panel.set_ylabel("observed")
            if number + _PANELS_PER_ROW >= len(FORECAST_PANELS):
                panel.set_xlabel("predicted")
        # In the place of the panel that the last row lacks.
        free = len(FORECAST_PANELS) % _PANELS_PER_ROW * step_x / size[0]
        place: Any = {"loc": "upper left", "bbox_to_anchor": (free - 0.04, side / size[1])}
        key = _forecast_legend(points, bool((points["how"] == STACK).any()))
        ax.legend(handles=key, borderaxespad=0.0, labelspacing=0.5, **place)
    return ax


def caption_forecast(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_forecast`."""
    n_stacks = int((points["how"] == STACK).sum())
    n_votes = len(points) - n_stacks
    # Runs of older versions predicted from the queries on which they observed.
    where = " on the calibration split" if "predicted_on" in points else ""
    by_definition = (
        ""
        if where
        else "both exclude shift and discrimination of mean and fitted votes, which are exact by definition; "
    )
    stacks = (
        "Stacks (all members applied together) were run; their margins are predicted query by query as the "
        f"sum of the members' changes from the undefended model{where}. "
    )
    votes = (
        "Votes are computed from the margins of their members; they are predicted from the members' means, "
        f"spreads and correlations{where} alone, as if margins were normal. "
    )
    has_kinds = "kind" in points and bool(points["kind"].isin(["intra", "inter"]).any())
    is_crowded = n_votes > MAX_SHAPED_VOTES
    hollow = (
        "Hollow: members of two mechanisms (shift and discrimination); filled: members of one"
        f"{', shown of stacks only' if is_crowded and n_stacks else ''}. "
    )
    intervals = points.filter(like="_low")[points["how"] == STACK]
    has_bars = n_stacks <= MAX_BARRED_STACKS and bool(intervals.notna().any(axis=None))
    bars = "Bars on stacks: 95\u00a0% intervals of the observed values. " if has_bars else ""
    return (
        "Each point is an ensemble of two or more defenses, "
        f"{format_query_counts(points, context.query_counts)}: shift is the mean of the two class means of "
        "the margin's change against the undefended model, discrimination is harmful minus benign. "
        f"{stacks if n_stacks else ''}{votes if n_votes else ''}"
        f"{hollow if has_kinds and (n_stacks or not is_crowded) else ''}{bars}R²: of the prediction itself, "
        f"no line fitted; ρ: rank correlation (Spearman); {by_definition}\N{EN DASH}: fewer than three "
        "observed values, or all equal. "
        f"{omit_interval_note(context, not has_bars).format_sentences(points['attack'].iloc[0])}"
    )


def _draw_forecast_panel(ax: Axes, points: pd.DataFrame, measure: str) -> None:
    """Draw one measure of all ensembles."""
    title, factor, is_share = FORECAST_PANELS[measure]
    sides = [f"{side}_{measure}" for side in ("predicted", "observed")]
    known = points.dropna(subset=sides)
    at = factor * known[sides].to_numpy(float)
    stacked = (known["how"] == STACK).to_numpy(bool)
    # Predictions from the same queries, of older runs, are on the diagonal by definition and say nothing.
    is_exact = known["how"].isin(MEAN_VOTE_RULES).to_numpy(bool) & (
        measure in ("shift", "discrimination") and "predicted_on" not in points
    )
    bars = factor * _stack_intervals(known[stacked], measure)
    drawn = [*at.ravel(), *bars[np.isfinite(bars)]]
    low, high = (float(min(drawn)), float(max(drawn))) if drawn else (0.0, 0.0)
    low, high = (0.0, 100.0) if is_share else (low, high)
    room = 0.07 * (high - low) or 1.0
    ax.axline((low, low), slope=1, color=GREY, linewidth=0.8, zorder=1, gid="diagonal")
    _draw_votes(ax, known[~stacked], at[~stacked])
    _draw_stacks(ax, known[stacked], at[stacked], bars)
    ax.set_xlim(low - room, high + room)
    ax.set_ylim(low - room, high + room)
    ax.locator_params(nbins=4)
    if is_share:
        ax.set_xticks([0, 50, 100])
        ax.set_yticks([0, 50, 100])
    ax.tick_params(labelsize=TEXT_SIZE - 0.5)
    lines = []
    for chosen, noun in ((stacked, "stack"), (~stacked & ~is_exact, "vote")):
        if chosen.any():
            statistics = compute_fit_statistics(*at[chosen].T[:, None])
            r2, rank = (_format_statistic(float(statistics[name][0])) for name in ("r2", "rank_correlation"))
            lines.append(f"{_format_counted_noun(int(chosen.sum()), noun)}: R² {r2}, ρ {rank}")
    small = TEXT_SIZE - 0.7
    ax.set_title(title, loc="left", fontsize=8, weight="bold", pad=6 + len(lines) * small * LINE_HEIGHT)
    above: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": small}
    ax.annotate("\n".join(lines), (0, 1), (0, 4), va="bottom", annotation_clip=False, gid="follows", **above)


def _draw_votes(ax: Axes, rows: pd.DataFrame, positions: Any) -> None:
    """Draw votes by rule and mechanism; very many of them as specks of one layer."""
    if len(rows) > MAX_SHAPED_VOTES:
        # In random order, so that no rule covers all others.
        mixed = np.random.default_rng(0).permutation(len(rows))
        colors = rows["how"].map({how: style[0] for how, style in ENSEMBLE_STYLES.items()}).to_numpy()[mixed]
        speck: Any = {"s": 2.2, "linewidths": 0, "alpha": 0.4, "rasterized": True, "label": "votes"}
        ax.scatter(positions[mixed, 0], positions[mixed, 1], c=list(colors), zorder=2, **speck)
        return
    for how in dict.fromkeys(rows["how"]):
        color, marker, _ = ENSEMBLE_STYLES.get(how, (*OTHER_FAMILY_STYLE, how))
        for hollow in (False, True):
            chosen = ((rows["how"] == how) & (_has_two_mechanisms(rows) == hollow)).to_numpy(bool)
            style: Any = {"marker": marker, "edgecolors": color, "facecolors": "none" if hollow else color}
            style |= {"s": 15 if len(rows) < 300 else 8, "linewidths": 0.7, "alpha": 0.75}
            if chosen.any():
                ax.scatter(*positions[chosen].T, zorder=2, label=how, **style)


def _stack_intervals(stacks: pd.DataFrame, measure: str) -> Any:
    """Return the intervals to draw, NaN if there are none or too many."""
    ends = [f"observed_{measure}_low", f"observed_{measure}_high"]
    intervals = stacks.reindex(columns=ends).to_numpy(float)
    return intervals if len(stacks) <= MAX_BARRED_STACKS else np.full_like(intervals, np.nan)


def _draw_stacks(ax: Axes, rows: pd.DataFrame, positions: Any, intervals: Any) -> None:
    """Draw stacks with their intervals, hollow if their members have two mechanisms."""
    color, marker, _ = ENSEMBLE_STYLES[STACK]
    ax.vlines(positions[:, 0], *intervals.T, color=color, linewidth=0.8, alpha=0.5, zorder=3)
    for hollow in (False, True):
        chosen = (_has_two_mechanisms(rows) == hollow).to_numpy(bool)
        fill, edge = ("white", color) if hollow else (color, "white")
        style: Any = {"marker": marker, "facecolors": fill, "edgecolors": edge}
        style |= {"s": 30 if len(rows) <= MAX_BARRED_STACKS else 18, "linewidths": 0.9 if hollow else 0.5}
        if chosen.any():
            ax.scatter(*positions[chosen].T, zorder=4, label=STACK, **style)


def _forecast_legend(points: pd.DataFrame, has_stacks: bool) -> list[Any]:
    """Return the legend: the ways of combining, hollow and filled, the diagonal."""
    is_crowded = int((points["how"] != STACK).sum()) > MAX_SHAPED_VOTES
    present = [how for how in ENSEMBLE_STYLES if (points["how"] == how).any()]
    present += sorted(set(points["how"]) - set(ENSEMBLE_STYLES))
    key = []
    for how in present:
        color, marker, label = ENSEMBLE_STYLES.get(how, (*OTHER_FAMILY_STYLE, f"vote: {how}"))
        marker = "o" if is_crowded and how != STACK else marker
        style: Any = {"color": color, "marker": marker, "markersize": 5.5 if how == STACK else 4.5}
        key.append(Line2D([], [], linestyle="", label=label, **style))
    if "kind" in points and (has_stacks or not is_crowded):
        for kind, fill, label in (
            ("intra", GREY, "filled: members of one mechanism"),
            ("inter", "white", "hollow: members of two mechanisms"),
        ):
            style = {"color": GREY, "marker": "o", "markerfacecolor": fill, "markersize": 5.5}
            if (points["kind"] == kind).any():
                key.append(Line2D([], [], linestyle="", label=label, **style))
    return [*key, Line2D([], [], color=GREY, linewidth=0.8, label="observed = predicted")]


def _has_two_mechanisms(rows: pd.DataFrame) -> pd.Series[bool]:
    """Return which ensembles have members of both mechanisms; these are drawn hollow."""
    return rows.get("kind", pd.Series("", rows.index)) == "inter"


def _format_counted_noun(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _format_statistic(value: float) -> str:
    if value != value:
        return "\N{EN DASH}"
    return (f"{value:.2f}" if value > -10 else f"{value:,.0f}").replace("-", "\N{MINUS SIGN}")
