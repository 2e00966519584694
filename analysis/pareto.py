"""What can be had: each defense and ensemble by the benign queries it answers and the harmful it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.lines import Line2D

from analysis.curves import INTERVAL_SUFFIXES
from analysis.ensembles import ALONE, SELECTION_SPLIT, REPORT_SPLIT, STACK
from analysis.fronts import find_undominated
from analysis.lettering import place_legend_beside, make_axes, fit_text, add_inset_axes
from analysis.palette import BLACK, BLUE, GREY, SKY, RC_PARAMS, TEXT_SIZE
from analysis.plane import label_points
from analysis.tables import UNDEFENDED

MAX_NAMED_CANDIDATES = 15  # points of the front at most that have a number and a line in the key
_COMBINATION_MARKERS = {ALONE: ("o", "one defense"), STACK: ("D", "stack"), "vote": ("^", "vote")}
_COST_COLORS = LinearSegmentedColormap.from_list("cost", ("#E3F1FA", SKY, BLUE, "#1A0A33"))
_FRONT_PANEL_SIDE, _FRONT_PANEL_GAP = 3.3, 0.65  # inches: a panel, and between two
BENIGN_COLUMN, HARMFUL_COLUMN, ATTACKED_COLUMN = f"benign_{REPORT_SPLIT}", f"harmful_{REPORT_SPLIT}", f"attacked_{REPORT_SPLIT}"


def build_front_points(candidates: pd.DataFrame) -> pd.DataFrame:
    """Return what the figure draws of each candidate, and the `number` of those on the front that are named.

    Where the front is too long to name, those come first that no other beats in both rates whatever it costs,
    and among them those that refuse most harm; both on the calibration split, as the front itself.

    >>> found = {"members": ["none", "a"], "how": "alone", "cost": 1.0, "on_front": True}
    >>> found |= {f"{x}_{split}": [0.5, 0.75] for x in ("benign", "harmful", "attacked")
    ...           for split in ("calibration", "test")}
    >>> front_points(pd.DataFrame(found))["number"].tolist()
    [0, 1]

    Args:
        candidates: what `fronts.candidates` returned.

    Returns:
        A row per candidate: its rates on the test split (shares), `cost` (× undefended), `on_front`, and
        `number`, 0 where it has none. Numbers run from the most harm refused on the test split downwards.
    """
    front = candidates[candidates["on_front"] & (candidates["members"] != UNDEFENDED)]
    chosen = [f"harmful_{SELECTION_SPLIT}", f"benign_{SELECTION_SPLIT}"]
    goods = front[chosen].to_numpy(float)
    best = np.lexsort([-goods[:, 1], -goods[:, 0], ~find_undominated(goods)])[:MAX_NAMED_CANDIDATES]
    named = front.iloc[best].sort_values([HARMFUL_COLUMN, BENIGN_COLUMN], ascending=False, kind="stable")
    columns = ["members", "how", BENIGN_COLUMN, HARMFUL_COLUMN, ATTACKED_COLUMN, "cost", "on_front"]
    found = candidates[columns].assign(number=0)
    found.loc[named.index, "number"] = range(1, len(named) + 1)
    return found.reset_index(drop=True)


def draw_pareto_front(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw every candidate, those on the front large and colored by cost; beside it the same under attack.

    >>> point = {"members": "a", "how": "alone", "cost": 2.0, "on_front": True, "number": 1}
    >>> point |= {"benign_test": 0.5, "harmful_test": 0.75, "attacked_test": float("nan")}
    >>> pareto(pd.DataFrame([point])).child_axes[0].get_xlabel()
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
            panel = add_inset_axes(ax, whole, (place * (_FRONT_PANEL_SIDE + _FRONT_PANEL_GAP), 0, _FRONT_PANEL_SIDE, _FRONT_PANEL_SIDE))
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
        look = {"markerfacecolor": _cost_color(row["cost"], cost_norm), "marker": _COMBINATION_MARKERS[_combination_kind(row["how"])][0]}
        key.append(Line2D([], [], label=f"{row['number']}  {way}{words}", markersize=6.5, **dot, **look))
    return key
