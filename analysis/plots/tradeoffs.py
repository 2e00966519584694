"""What can be had: each defense and ensemble by the benign queries it answers and the harmful it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.lines import Line2D

from analysis.plots.captions import (
    CaptionContext,
    format_count_range,
    format_shared_query_counts,
    omit_interval_note,
)
from analysis.plots.data import ATTACKED_COLUMN, BENIGN_COLUMN, HARMFUL_COLUMN
from analysis.plots.labels import label_points, make_legend_marker
from analysis.plots.layout import add_inset_axes, fit_text, make_axes, place_legend_beside
from analysis.plots.style import (
    BLACK,
    BLUE,
    FAMILY_STYLES,
    GREY,
    OTHER_FAMILY_STYLE,
    RC_PARAMS,
    SKY,
    TEXT_SIZE,
)
from analysis.stats.ensembles import ALONE, STACK
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED

_COMBINATION_MARKERS = {ALONE: ("o", "one defense"), STACK: ("D", "stack"), "vote": ("^", "vote")}
_COST_COLORS = LinearSegmentedColormap.from_list("cost", ("#E3F1FA", SKY, BLUE, "#1A0A33"))
_FRONT_PANEL_SIDE, _FRONT_PANEL_GAP = 3.3, 0.65  # inches: a panel, and between two


def draw_pareto_front(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw every candidate, those on the front large and colored by cost; beside it the same under attack.

    >>> point = {"members": "a", "how": "alone", "cost": 2.0, "on_front": True, "number": 1}
    >>> point |= {"benign_test": 0.5, "harmful_test": 0.75, "attacked_test": float("nan")}
    >>> draw_pareto_front(pd.DataFrame([point])).child_axes[0].get_xlabel()
    'benign queries answered (%)'

    Args:
        points: what `front_points` returned.
        ax: where to draw; it only lends its place to the panels.
    """
    attacked = bool(points[ATTACKED_COLUMN].notna().any())
    panels = {HARMFUL_COLUMN: "harmful queries refused (%" + ", mean over attacks" * attacked + ")"}
    panels |= {ATTACKED_COLUMN: "harmful queries refused under attack (%)"} if attacked else {}
    whole = len(panels) * (_FRONT_PANEL_SIDE + _FRONT_PANEL_GAP) - _FRONT_PANEL_GAP, _FRONT_PANEL_SIDE
    costs = points.loc[points["on_front"], "cost"].dropna()
    span = LogNorm(costs.min(), max(costs.max(), 1.2 * costs.min())) if len(costs) else LogNorm(1, 2)
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(*whole)
        ax.set_axis_off()
        for place, (column, words) in enumerate(panels.items()):
            panel = add_inset_axes(
                ax,
                whole,
                (place * (_FRONT_PANEL_SIDE + _FRONT_PANEL_GAP), 0, _FRONT_PANEL_SIDE, _FRONT_PANEL_SIDE),
            )
            _draw_front_panel(panel, points, column, span)
            panel.set_xlabel("benign queries answered (%)")
            panel.set_ylabel(words)
        if len(costs):
            _draw_cost_scale(add_inset_axes(ax, whole, (0, _FRONT_PANEL_SIDE + 0.36, 1.5, 0.09)), span)
        place_legend_beside(ax, _front_legend(points, span))
    return ax


def _draw_front_panel(ax: Axes, points: pd.DataFrame, column: str, cost_norm: LogNorm) -> None:
    """Draw all candidates at two rates."""
    shown = points.assign(x=100 * points[BENIGN_COLUMN], y=100 * points[column]).dropna(subset=["x", "y"])
    bare = (shown["members"] == UNDEFENDED) & (shown["how"] == ALONE)
    crowd = len(shown) > 2000
    for how, (marker, _) in _COMBINATION_MARKERS.items():
        of_kind = shown[(shown["how"].map(_combination_kind) == how) & ~bare]
        rest, front = of_kind[~of_kind["on_front"]], of_kind[of_kind["on_front"]]
        small: Any = {"s": 5 if crowd else 14, "alpha": 0.35 if crowd else 0.6, "linewidths": 0}
        ax.scatter(rest["x"], rest["y"], color=GREY, marker=marker, rasterized=crowd, zorder=2, **small)
        look: Any = {"s": 46, "marker": marker, "edgecolors": BLACK, "linewidths": 0.7, "zorder": 4}
        colors = [_cost_color(cost, cost_norm) for cost in front["cost"]]
        ax.scatter(front["x"], front["y"], c=colors or None, label=f"front {how}", **look)
    ax.plot(shown.loc[bare, "x"], shown.loc[bare, "y"], "o", color=BLACK, markersize=4, zorder=5, gid="none")
    for name, limit in (("x", ax.set_xlim), ("y", ax.set_ylim)):
        limit(*_rate_limits(shown[name]))
    named = shown[shown["number"] > 0].sort_values("number")
    # Rates have no bars here that a number could hide.
    spots = named.assign(**{f"{name}{end}": np.nan for name in ("x", "y") for end in INTERVAL_SUFFIXES[1:]})
    label_points(
        ax,
        spots,
        [str(number) for number in named["number"]],
        300,
        ("x", "y"),
        shown[shown["on_front"] | bare],
    )


def _rate_limits(values: pd.Series[float]) -> tuple[float, float]:
    """Limits that hold all values, at least a tenth of the whole scale, with room for numbers."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 100.0)
    middle = min(max((low + high) / 2, 5.0), 95.0)
    low, high = min(low, middle - 5), max(high, middle + 5)
    room = 0.08 * (high - low)
    return low - room, high + room


def _combination_kind(how: str) -> str:
    return how if how in _COMBINATION_MARKERS else "vote"


def _cost_color(cost: float, cost_norm: LogNorm) -> Any:
    return _COST_COLORS(cost_norm(cost)) if cost == cost else (1.0, 1.0, 1.0, 1.0)


def _draw_cost_scale(ax: Axes, cost_norm: LogNorm) -> None:
    """Draw what the colors stand for."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    assert cost_norm.vmin is not None and cost_norm.vmax is not None
    bar = figure.colorbar(ScalarMappable(cost_norm, _COST_COLORS), cax=ax, orientation="horizontal")
    ticks = np.geomspace(cost_norm.vmin, cost_norm.vmax, 3)
    bar.set_ticks(list(ticks), labels=[f"{tick:.{1 if tick < 9.95 else 0}f}" for tick in ticks])
    ax.set_gid("cost")
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=TEXT_SIZE - 0.5, length=2)
    bar.outline.set_linewidth(0.5)
    style: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "size": TEXT_SIZE}
    words = "cost of those on the front: time until the first token (× undefended)"
    ax.annotate(words, (0, 1), (0, 4), va="bottom", annotation_clip=False, **style)


def _front_legend(points: pd.DataFrame, cost_norm: LogNorm) -> list[Any]:
    """The shapes, then a line for each number."""
    dot: Any = {"linestyle": "", "markeredgecolor": BLACK, "markeredgewidth": 0.7}
    bare = points["members"] == UNDEFENDED
    key = [Line2D([], [], color=BLACK, marker="o", markersize=4, linestyle="", label="undefended")]
    key *= bool(bare.any())
    kinds = points.loc[~bare, "how"].map(_combination_kind)
    for how, (marker, words) in _COMBINATION_MARKERS.items():
        if (kinds == how).any():
            look: Any = {"markerfacecolor": "none", "marker": marker, "markersize": 5.5}
            key.append(Line2D([], [], label=words, **dot, **look))
    rest: Any = {"color": GREY, "marker": "o", "markersize": 3.5, "linestyle": ""}
    key += [Line2D([], [], label="not on the front", **rest)] * bool((~points["on_front"] & ~bare).any())
    named = points[points["number"] > 0].sort_values("number")
    for row in named.to_dict("records"):
        way = "" if row["how"] in (ALONE, STACK) else f"{row['how']}: "
        words = fit_text(row["members"], 165, TEXT_SIZE, 1 if len(named) > 6 else 2).replace("\n", "\n      ")
        look = {
            "markerfacecolor": _cost_color(row["cost"], cost_norm),
            "marker": _COMBINATION_MARKERS[_combination_kind(row["how"])][0],
        }
        key.append(Line2D([], [], label=f"{row['number']}  {way}{words}", markersize=6.5, **dot, **look))
    return key


def caption_cost(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `price.price` draws from these points."""
    return (
        "Gain in AUROC on the queries of the run against the time until the first token: "
        f"{format_count_range(points['n'])} queries each alone, every one against itself undefended (geometric means; "
        "conditions took turns). Bars are 95\u00a0% intervals. Not in it: the answer's tokens, and training. "
        f"{context.format_sentences(points['attack'].iloc[0])}"
    )


def caption_pareto_front(
    points: pd.DataFrame,
    context: CaptionContext,
    attacks: Sequence[str],
    counts: tuple[int, int] | None = None,
) -> str:
    """Return the caption of the figure that `pareto.pareto` draws from these points.

    Args:
        points: what was drawn.
        context: what is said about the run.
        attacks: how queries were sent, what users send first.
        counts: harmful and benign queries of the split, where they are known.
    """
    front = int((points["on_front"] & (points["members"] != "none")).sum())
    left = front - int((points["number"] > 0).sum())
    named = (
        f"{left} of the front's {front} are not named: named are first those that no other beats in both "
        "rates whatever it costs, then those that refuse most harm there. "
    )
    several = len(attacks) > 1
    over = f" (the mean over {len(attacks)} ways of sending them; second panel: without the first)" * several
    sent = ", ".join("none" if name == "direct" else name for name in attacks) if several else attacks[0]
    unknown = "White: cost not measured. " * bool(points.loc[points["on_front"], "cost"].isna().any())
    return (
        f"Every single defense and ensemble that was observed, {format_shared_query_counts(counts)}: share of benign queries "
        f"answered{' as users send them' * several} and of harmful queries refused{over}. Large: on the "
        "front, that is, on the calibration split no other is at least as good in both rates and in cost "
        "and better in one; chosen there and shown here on the test split, where some no longer look best. "
        f"{named * bool(left)}{unknown}{omit_interval_note(context, True).format_sentences(sent)}"
    )


def draw_cost(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the gain in AUROC over the time that a prompt takes, as a multiple of the undefended.

    >>> row = {"defense": "x", "family": "noise", "prefill_ratio": 2.0, "delta_auroc": 0.1}
    >>> row |= {f"{name}{end}": 0.1 for name in ("prefill_ratio", "delta_auroc") for end in ("_low", "_high")}
    >>> draw_cost(pd.DataFrame([row])).get_ylabel()
    'ΔAUROC (separates better)'

    Args:
        points: `cost.csv`.
        ax: where to draw.
    """
    known = points[points["defense"] != "none"]
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, 3.4)
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.axvline(1, color=GREY, linewidth=0.6, zorder=1)
        ax.plot([1], [0], "o", color=BLACK, markersize=5, zorder=3)
        key = [make_legend_marker(BLACK, "o", "undefended")]
        for number, row in enumerate(known.to_dict("records"), 1):
            color, shape = FAMILY_STYLES.get(row["family"], OTHER_FAMILY_STYLE)
            bar: Any = {"color": color, "alpha": 0.5, "linewidth": 1.0, "zorder": 2}
            ax.hlines(row["delta_auroc"], row["prefill_ratio_low"], row["prefill_ratio_high"], **bar)
            ax.vlines(row["prefill_ratio"], row["delta_auroc_low"], row["delta_auroc_high"], **bar)
            look: Any = {"marker": shape, "color": color, "edgecolors": "white", "linewidths": 0.5}
            ax.scatter(row["prefill_ratio"], row["delta_auroc"], s=44, zorder=3, **look)
            key.append(
                make_legend_marker(
                    color, shape, f"{number}  {fit_text(str(row['defense']), 140, TEXT_SIZE, 1)}"
                )
            )
        numbers = [str(number + 1) for number in range(len(known))]
        label_points(ax, known, numbers, 300, ("prefill_ratio", "delta_auroc"))
        ax.set_xlabel("time until the first token (× undefended)")
        ax.set_ylabel("\N{GREEK CAPITAL LETTER DELTA}AUROC (separates better)")
        place_legend_beside(ax, key)
    return ax
