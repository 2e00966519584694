"""Trade-offs: benign queries answered against harmful queries refused, and separation against cost."""

from __future__ import annotations

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
    format_query_counts,
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
    """Draw every candidate, those on the Pareto front large and colored by cost; also under attack, if known.

    >>> point = {"members": "a", "how": "alone", "cost": 2.0, "on_front": True, "number": 1}
    >>> point |= {"benign_test": 0.5, "harmful_test": 0.75, "attacked_test": float("nan")}
    >>> draw_pareto_front(pd.DataFrame([point])).child_axes[0].get_xlabel()
    'benign queries answered (%)'

    Args:
        points: table from `build_front_points`.
        ax: axes that the panels are placed in; by default new ones.
    """
    attacked = bool(points[ATTACKED_COLUMN].notna().any())
    panels = {HARMFUL_COLUMN: "harmful queries refused (%" + ", mean over attacks" * attacked + ")"}
    panels |= {ATTACKED_COLUMN: "harmful queries refused under attack (%)"} if attacked else {}
    side = _FRONT_PANEL_SIDE
    size = len(panels) * (side + _FRONT_PANEL_GAP) - _FRONT_PANEL_GAP, side
    costs = points.loc[points["on_front"], "cost"].dropna()
    cost_norm = LogNorm(costs.min(), max(costs.max(), 1.2 * costs.min())) if len(costs) else LogNorm(1, 2)
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(*size)
        ax.set_axis_off()
        for place, (column, label) in enumerate(panels.items()):
            panel = add_inset_axes(ax, size, (place * (side + _FRONT_PANEL_GAP), 0, side, side))
            _draw_front_panel(panel, points, column, cost_norm)
            panel.set_xlabel("benign queries answered (%)")
            panel.set_ylabel(label)
        if len(costs):
            _draw_cost_scale(add_inset_axes(ax, size, (0, side + 0.36, 1.5, 0.09)), cost_norm)
        place_legend_beside(ax, _front_legend(points, cost_norm))
    return ax


def draw_cost(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the change of AUROC against the time to the first token, as a multiple of the undefended model's.

    >>> row = {"defense": "x", "family": "noise", "prefill_ratio": 2.0, "delta_auroc": 0.1}
    >>> row |= {f"{name}{end}": 0.1 for name in ("prefill_ratio", "delta_auroc") for end in ("_low", "_high")}
    >>> draw_cost(pd.DataFrame([row])).get_ylabel()
    'ΔAUROC (separates better)'

    Args:
        points: `cost.csv`.
        ax: axes to draw on; by default new ones.
    """
    known = points[points["defense"] != "none"]
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, 3.4)
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.axvline(1, color=GREY, linewidth=0.6, zorder=1)
        ax.plot([1], [0], "o", color=BLACK, markersize=5, zorder=3)
        key = [make_legend_marker(BLACK, "o", "undefended")]
        for number, row in enumerate(known.to_dict("records"), 1):
            color, marker = FAMILY_STYLES.get(row["family"], OTHER_FAMILY_STYLE)
            bar: Any = {"color": color, "alpha": 0.5, "linewidth": 1.0, "zorder": 2}
            ax.hlines(row["delta_auroc"], row["prefill_ratio_low"], row["prefill_ratio_high"], **bar)
            ax.vlines(row["prefill_ratio"], row["delta_auroc_low"], row["delta_auroc_high"], **bar)
            style: Any = {"marker": marker, "color": color, "edgecolors": "white", "linewidths": 0.5}
            ax.scatter(row["prefill_ratio"], row["delta_auroc"], s=44, zorder=3, **style)
            name = fit_text(str(row["defense"]), 140, TEXT_SIZE, 1)
            key.append(make_legend_marker(color, marker, f"{number}  {name}"))
        numbers = [str(number + 1) for number in range(len(known))]
        label_points(ax, known, numbers, 300, ("prefill_ratio", "delta_auroc"))
        ax.set_xlabel("time to the first token (× undefended)")
        ax.set_ylabel("\N{GREEK CAPITAL LETTER DELTA}AUROC (separates better)")
        place_legend_beside(ax, key)
    return ax


def draw_side_effects(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how far each defense moves the first token on benign queries against its shift.

    >>> row = {"defense": "x", "family": "noise"}
    >>> row |= {f"{name}{end}": 0.1 for name in ("shift", "kl_benign") for end in ("", "_low", "_high")}
    >>> draw_side_effects(pd.DataFrame([row])).get_ylabel()
    'KL of the first token on benign queries (nats)'

    Args:
        points: table from `build_side_effect_points`.
        ax: axes to draw on; by default new ones.
    """
    is_judged = "response_shift" in points
    shift = "response_shift" if is_judged else "shift"
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, 3.4)
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.axvline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.plot([0], [0], "o", color=BLACK, markersize=5, zorder=3)
        key = [make_legend_marker(BLACK, "o", "undefended")]
        for number, row in enumerate(points.to_dict("records"), 1):
            color, marker = FAMILY_STYLES.get(row["family"], OTHER_FAMILY_STYLE)
            bar: Any = {"color": color, "alpha": 0.5, "linewidth": 1.0, "zorder": 2}
            ax.hlines(row["kl_benign"], row[f"{shift}_low"], row[f"{shift}_high"], **bar)
            ax.vlines(row[shift], row["kl_benign_low"], row["kl_benign_high"], **bar)
            style: Any = {"marker": marker, "color": color, "edgecolors": "white", "linewidths": 0.5}
            ax.scatter(row[shift], row["kl_benign"], s=44, zorder=3, **style)
            name = fit_text(str(row["defense"]), 140, TEXT_SIZE, 1)
            key.append(make_legend_marker(color, marker, f"{number}  {name}"))
        numbers = [str(number + 1) for number in range(len(points))]
        label_points(ax, points, numbers, 300, (shift, "kl_benign"))
        ax.set_xlabel("shift (points)" if is_judged else "shift (nats)")
        ax.set_ylabel("KL of the first token on benign queries (nats)")
        place_legend_beside(ax, key)
    return ax


def caption_side_effects(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_side_effects`."""
    attack = str(points["attack"].iloc[0])
    is_judged = "response_shift" in points
    shift = f"of the refusal rates ({context.response_basis})" if is_judged else "of the margin"
    return (
        "Mean Kullback-Leibler divergence of the defended model's distribution of the first token from the "
        "undefended model's, over the whole vocabulary, on "
        f"{format_count_range(points['n_benign'])} benign queries, against the shift {shift}. Bars: "
        "95\u00a0% intervals; those of the divergence from a bootstrap over queries, 2,000 draws. Several "
        "copies of a query: the mean of their distributions. Not drawn: defenses whose detector may answer, "
        "or that write the first tokens of the response. "
        f"{context.format_setting(attack)}"
    )


def caption_cost(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_cost`."""
    return (
        "Change of AUROC on the queries of the run against the time to the first token, measured on "
        f"{format_count_range(points['n'])} queries one at a time, each relative to the same query "
        "undefended (geometric means; conditions in alternation). Bars: 95\u00a0% intervals. Not included: "
        f"generation of the response, and training. {context.format_sentences(points['attack'].iloc[0])}"
    )


def caption_pareto_front(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_pareto_front`."""
    n_front = int((points["on_front"] & (points["members"] != UNDEFENDED)).sum())
    n_unnamed = n_front - int((points["number"] > 0).sum())
    unnamed = (
        f"{n_unnamed} of the front's {n_front} are not named: named are first those that no other candidate "
        "beats in both rates at any cost, then those that refuse most harmful queries there. "
    )
    attacks = context.attacks
    has_several = len(attacks) > 1
    over = f" (mean over {len(attacks)} attacks, no attack included; second panel: without the first)"
    sent = (
        ", ".join("none" if attack == "direct" else attack for attack in attacks)
        if has_several
        else attacks[0]
    )
    has_unknown_cost = points.loc[points["on_front"], "cost"].isna().any()
    return (
        "Every single defense and ensemble that was observed, "
        f"{format_query_counts(points, context.query_counts)}: share of benign queries "
        f"answered{' without attack' if has_several else ''} and share of harmful queries "
        f"refused{over if has_several else ''}. Large: on the Pareto front, that is, no other candidate is "
        "at least as good in both rates and in cost and better in one, on the calibration split; the figure "
        f"shows the test split, where some no longer look best. {unnamed if n_unnamed else ''}"
        f"{'White: cost not measured. ' if has_unknown_cost else ''}"
        f"{omit_interval_note(context, True).format_sentences(sent)}"
    )


def _draw_front_panel(ax: Axes, points: pd.DataFrame, column: str, cost_norm: LogNorm) -> None:
    """Draw all candidates at two rates."""
    shown = points.assign(x=100 * points[BENIGN_COLUMN], y=100 * points[column]).dropna(subset=["x", "y"])
    undefended = (shown["members"] == UNDEFENDED) & (shown["how"] == ALONE)
    is_crowded = len(shown) > 2000
    for how, (marker, _) in _COMBINATION_MARKERS.items():
        of_kind = shown[(shown["how"].map(_combination_kind) == how) & ~undefended]
        rest, front = of_kind[~of_kind["on_front"]], of_kind[of_kind["on_front"]]
        small: Any = {"s": 5 if is_crowded else 14, "alpha": 0.35 if is_crowded else 0.6, "linewidths": 0}
        ax.scatter(rest["x"], rest["y"], color=GREY, marker=marker, rasterized=is_crowded, zorder=2, **small)
        large: Any = {"s": 46, "marker": marker, "edgecolors": BLACK, "linewidths": 0.7, "zorder": 4}
        colors = [_cost_color(cost, cost_norm) for cost in front["cost"]]
        ax.scatter(front["x"], front["y"], c=colors or None, label=f"front {how}", **large)
    black: Any = {"color": BLACK, "markersize": 4, "zorder": 5, "gid": "none"}
    ax.plot(shown.loc[undefended, "x"], shown.loc[undefended, "y"], "o", **black)
    for name, limit in (("x", ax.set_xlim), ("y", ax.set_ylim)):
        limit(*_rate_limits(shown[name]))
    named = shown[shown["number"] > 0].sort_values("number")
    # Rates have no intervals here that a number could cover.
    spots = named.assign(**{f"{name}{end}": np.nan for name in ("x", "y") for end in INTERVAL_SUFFIXES[1:]})
    numbers = [str(number) for number in named["number"]]
    label_points(ax, spots, numbers, 300, ("x", "y"), shown)


def _rate_limits(values: pd.Series[float]) -> tuple[float, float]:
    """Return limits that contain all values, at least a tenth of the whole scale, with room for numbers."""
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
    """Draw the color scale of the cost."""
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
    label = "cost of points on the front: time to the first token (× undefended)"
    ax.annotate(label, (0, 1), (0, 4), va="bottom", annotation_clip=False, **style)


def _front_legend(points: pd.DataFrame, cost_norm: LogNorm) -> list[Any]:
    """Return the legend: the markers, then an entry for each number."""
    dot: Any = {"linestyle": "", "markeredgecolor": BLACK, "markeredgewidth": 0.7}
    undefended = points["members"] == UNDEFENDED
    key = []
    if undefended.any():
        key.append(Line2D([], [], color=BLACK, marker="o", markersize=4, linestyle="", label="undefended"))
    kinds = points.loc[~undefended, "how"].map(_combination_kind)
    for how, (marker, label) in _COMBINATION_MARKERS.items():
        if (kinds == how).any():
            style: Any = {"markerfacecolor": "none", "marker": marker, "markersize": 5.5}
            key.append(Line2D([], [], label=label, **dot, **style))
    if (~points["on_front"] & ~undefended).any():
        rest: Any = {"color": GREY, "marker": "o", "markersize": 3.5, "linestyle": ""}
        key.append(Line2D([], [], label="not on the front", **rest))
    named = points[points["number"] > 0].sort_values("number")
    for row in named.to_dict("records"):
        rule = "" if row["how"] in (ALONE, STACK) else f"{row['how']}: "
        name = fit_text(row["members"], 165, TEXT_SIZE, 1 if len(named) > 6 else 2).replace("\n", "\n      ")
        style = {
            "markerfacecolor": _cost_color(row["cost"], cost_norm),
            "marker": _COMBINATION_MARKERS[_combination_kind(row["how"])][0],
        }
        key.append(Line2D([], [], label=f"{row['number']}  {rule}{name}", markersize=6.5, **dot, **style))
    return key
