"""What was predicted of ensembles against what was observed: a panel per coordinate, a point per ensemble."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import CaptionContext, format_shared_query_counts, omit_interval_note
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
    STACK: (BLACK, "D", "stack: all worn at once"),
    "mean": (BLUE, "o", "vote: mean"),
    "highest": (VERMILION, "^", "vote: highest"),
    "lowest": (GREEN, "v", "vote: lowest"),
    "majority": (PURPLE, "s", "vote: majority"),
    "fitted": (ORANGE, "P", "vote: fitted weights"),
}
_FORECAST_PANEL_SIDE, _FORECAST_COLUMN_GAP, _FORECAST_ROW_GAP, _PANELS_PER_ROW = (
    1.75,
    0.5,
    0.86,
    3,
)  # inches: a panel, the gaps; panels in a row


def draw_forecast(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each ensemble at what was predicted and what came; on the diagonal the prediction came true.

    >>> row = {"attack": "direct", "members": "a+b", "how": "stack", "kind": "inter"}
    >>> row |= {f"{side}_{x}": 0.5 for side in ("predicted", "observed") for x in PANELS}
    >>> ax = draw_forecast(pd.DataFrame([row]))
    >>> [panel.get_title(loc="left") for panel in ax.child_axes][:2]
    ['shift (nats)', 'discrimination (nats)']

    Args:
        points: what `forecast_points` returned, of one attack.
        ax: where to draw; it only lends its place to the panels.
    """
    check_one_attack(points)
    rows = -(-len(FORECAST_PANELS) // _PANELS_PER_ROW)
    whole = (
        _PANELS_PER_ROW * (_FORECAST_PANEL_SIDE + _FORECAST_COLUMN_GAP) - _FORECAST_COLUMN_GAP,
        rows * (_FORECAST_PANEL_SIDE + _FORECAST_ROW_GAP) - _FORECAST_ROW_GAP,
    )
    stacked = points["how"] == STACK
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(*whole)
        ax.set_axis_off()
        for number, name in enumerate(FORECAST_PANELS):
            row, column = divmod(number, _PANELS_PER_ROW)
            corner = (
                column * (_FORECAST_PANEL_SIDE + _FORECAST_COLUMN_GAP),
                whole[1] - _FORECAST_PANEL_SIDE - row * (_FORECAST_PANEL_SIDE + _FORECAST_ROW_GAP),
            )
            panel = add_inset_axes(ax, whole, (*corner, _FORECAST_PANEL_SIDE, _FORECAST_PANEL_SIDE))
            _draw_forecast_panel(panel, points, name)
            if column == 0:
                panel.set_ylabel("observed")
            if number + _PANELS_PER_ROW >= len(FORECAST_PANELS):
                panel.set_xlabel("predicted")
        free = (
            len(FORECAST_PANELS) % _PANELS_PER_ROW * (_FORECAST_PANEL_SIDE + _FORECAST_COLUMN_GAP) / whole[0]
        )
        place: Any = {"loc": "upper left", "bbox_to_anchor": (free - 0.04, _FORECAST_PANEL_SIDE / whole[1])}
        ax.legend(
            handles=_forecast_legend(points, bool(stacked.any())),
            borderaxespad=0.0,
            labelspacing=0.5,
            **place,
        )
    return ax


def _draw_forecast_panel(ax: Axes, points: pd.DataFrame, coordinate: str) -> None:
    """Draw one coordinate of all ensembles."""
    words, factor, share = FORECAST_PANELS[coordinate]
    sides = [f"{side}_{coordinate}" for side in ("predicted", "observed")]
    known = points.dropna(subset=sides)
    at = factor * known[sides].to_numpy(float)
    stacked = (known["how"] == STACK).to_numpy(bool)
    # By definition, on the diagonal: that tells nothing of the prediction.
    sure = known["how"].isin(MEAN_VOTE_RULES).to_numpy(bool) & (coordinate in ("shift", "discrimination"))
    bars = factor * _stack_intervals(known[stacked], coordinate)
    reached = [*at.ravel(), *bars[np.isfinite(bars)]]
    low, high = (float(min(reached)), float(max(reached))) if reached else (0.0, 0.0)
    low, high = (0.0, 100.0) if share else (low, high)
    room = 0.07 * (high - low) or 1.0
    ax.axline((low, low), slope=1, color=GREY, linewidth=0.8, zorder=1, gid="diagonal")
    _draw_votes(ax, known[~stacked], at[~stacked])
    _draw_stacks(ax, known[stacked], at[stacked], bars)
    ax.set_xlim(low - room, high + room)
    ax.set_ylim(low - room, high + room)
    ax.locator_params(nbins=4)
    if share:
        ax.set_xticks([0, 50, 100])
        ax.set_yticks([0, 50, 100])
    ax.tick_params(labelsize=TEXT_SIZE - 0.5)
    told = [
        f"{_format_counted_noun(int(which.sum()), word)}: R² {_format_statistic(r2)}, ρ {_format_statistic(rank)}"
        for which, word in ((stacked, "stack"), (~stacked & ~sure, "vote"))
        if which.any()
        for r2, rank in [
            [float(value[0]) for value in compute_fit_statistics(*at[which].T[:, None]).values()]
        ]
    ]
    small = TEXT_SIZE - 0.7
    ax.set_title(words, loc="left", fontsize=8, weight="bold", pad=6 + len(told) * small * LINE_HEIGHT)
    above: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": small}
    ax.annotate("\n".join(told), (0, 1), (0, 4), va="bottom", annotation_clip=False, gid="follows", **above)


def _draw_votes(ax: Axes, rows: pd.DataFrame, positions: Any) -> None:
    if len(rows) > MAX_SHAPED_VOTES:
        # In one mixed order, so that no way of voting lies on top of all others.
        mixed = np.random.default_rng(0).permutation(len(rows))
        colors = rows["how"].map({how: look[0] for how, look in ENSEMBLE_STYLES.items()}).to_numpy()[mixed]
        speck: Any = {"s": 2.2, "linewidths": 0, "alpha": 0.4, "rasterized": True, "label": "votes"}
        ax.scatter(positions[mixed, 0], positions[mixed, 1], c=list(colors), zorder=2, **speck)
        return
    for how in dict.fromkeys(rows["how"]):
        color, marker, _ = ENSEMBLE_STYLES.get(how, (*OTHER_FAMILY_STYLE, how))
        for hollow in (False, True):
            here = ((rows["how"] == how) & (_has_two_mechanisms(rows) == hollow)).to_numpy(bool)
            look: Any = {"marker": marker, "edgecolors": color, "facecolors": "none" if hollow else color}
            if here.any():
                size = 15 if len(rows) < 300 else 8
                ax.scatter(
                    positions[here, 0],
                    positions[here, 1],
                    s=size,
                    linewidths=0.7,
                    alpha=0.75,
                    zorder=2,
                    label=how,
                    **look,
                )


def _stack_intervals(stacks: pd.DataFrame, coordinate: str) -> Any:
    """The intervals that are drawn, which are missing where there are none or too many."""
    ends = [f"observed_{coordinate}_low", f"observed_{coordinate}_high"]
    found = stacks.reindex(columns=ends).to_numpy(float)
    return found if len(stacks) <= MAX_BARRED_STACKS else np.full_like(found, np.nan)


def _draw_stacks(ax: Axes, rows: pd.DataFrame, positions: Any, intervals: Any) -> None:
    color, marker, _ = ENSEMBLE_STYLES[STACK]
    ax.vlines(positions[:, 0], *intervals.T, color=color, linewidth=0.8, alpha=0.5, zorder=3)
    for hollow in (False, True):
        here = (_has_two_mechanisms(rows) == hollow).to_numpy(bool)
        fill, edge = ("white", color) if hollow else (color, "white")
        look: Any = {"marker": marker, "facecolors": fill, "edgecolors": edge}
        if here.any():
            ax.scatter(
                positions[here, 0],
                positions[here, 1],
                s=30 if len(rows) <= MAX_BARRED_STACKS else 18,
                linewidths=0.9 if hollow else 0.5,
                zorder=4,
                label=STACK,
                **look,
            )


def _forecast_legend(points: pd.DataFrame, has_stacks: bool) -> list[Any]:
    crowd = int((points["how"] != STACK).sum()) > MAX_SHAPED_VOTES
    present = [how for how in ENSEMBLE_STYLES if (points["how"] == how).any()]
    present += sorted(set(points["how"]) - set(ENSEMBLE_STYLES))
    key = []
    for how in present:
        color, marker, words = ENSEMBLE_STYLES.get(how, (*OTHER_FAMILY_STYLE, f"vote: {how}"))
        marker = "o" if crowd and how != STACK else marker
        look: Any = {"color": color, "marker": marker, "markersize": 5.5 if how == STACK else 4.5}
        key.append(Line2D([], [], linestyle="", label=words, **look))
    if "kind" in points and (has_stacks or not crowd):
        color, marker, _ = (
            ENSEMBLE_STYLES[STACK]
            if has_stacks
            else ENSEMBLE_STYLES.get(present[0], (*OTHER_FAMILY_STYLE, ""))
        )
        for kind, fill, words in (("intra", color, "one mechanism"), ("inter", "white", "two mechanisms")):
            look = {"color": color, "marker": marker, "markerfacecolor": fill, "markersize": 5.5}
            word = f"{'filled' if kind == 'intra' else 'hollow'}: members of {words}"
            key += [Line2D([], [], linestyle="", label=word, **look)] * bool((points["kind"] == kind).any())
    return [*key, Line2D([], [], color=GREY, linewidth=0.8, label="prediction came true")]


def _has_two_mechanisms(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which ensembles are drawn hollow."""
    return rows.get("kind", pd.Series("", rows.index)) == "inter"


def _format_counted_noun(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _format_statistic(value: float) -> str:
    if value != value:
        return "\N{EN DASH}"
    return (f"{value:.2f}" if value > -10 else f"{value:,.0f}").replace("-", "\N{MINUS SIGN}")


def caption_forecast(
    points: pd.DataFrame, context: CaptionContext, counts: tuple[int, int] | None = None
) -> str:
    """Return the caption of the figure that `forecast.forecast` draws from these points.

    Args:
        points: what was drawn.
        context: what is said about the run.
        counts: harmful and benign queries of the split, where they are known.
    """
    stacked = int((points["how"] == "stack").sum())
    stacks = (
        "Stacks (all members worn at once) were run; their margins are predicted query by query, by adding "
        "up what each member changes of the undefended model. "
    )
    votes = (
        "Votes are read from the margins of their members; they are predicted from the members' means, "
        "spreads and correlations alone, as if margins were normal. "
    )
    kinds = "kind" in points and bool(points["kind"].isin(["intra", "inter"]).any())
    crowd = len(points) - stacked > MAX_SHAPED_VOTES
    hollow = (
        "Hollow: members work by two mechanisms (shift and discrimination), filled: by one"
        f"{', shown of stacks only' if crowd and stacked else ''}. "
    )
    barred = stacked <= MAX_BARRED_STACKS and bool(
        points.filter(like="_low")[points["how"] == "stack"].notna().any(axis=None)
    )
    bars = "Bars on stacks: 95\u00a0% intervals of what was observed. " if barred else ""
    return (
        f"Ensembles of two and more defenses, each a point, {format_shared_query_counts(counts)}: shift is the mean of the two "
        "class means of the margin's change against the undefended model, discrimination is harmful minus "
        f"benign. {stacks * bool(stacked)}{votes * (stacked < len(points))}"
        f"{hollow * (kinds and bool(stacked or not crowd))}"
        f"{bars}R²: of the prediction as it is, no line fitted; ρ: rank correlation (Spearman); both without "
        "shift and discrimination of means and fitted votes, which are right by definition; an "
        f"\N{EN DASH} stands where fewer than three, or all equal, were observed. "
        f"{omit_interval_note(context, not barred).format_sentences(points['attack'].iloc[0])}"
    )
