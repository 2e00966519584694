"""The shift-discrimination plane: what a defense does, as one point; the undefended model is the origin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.plots.captions import format_count_range
from analysis.plots.data import LINEAR_RANGE, SQUARE_CORNERS, check_one_attack, is_stretched
from analysis.plots.labels import label_points, make_legend_marker
from analysis.plots.layout import fit_text, make_axes, place_legend_beside
from analysis.plots.style import (
    BLACK,
    BLUE,
    FAMILY_STYLES,
    GREY,
    OTHER_FAMILY_STYLE,
    RC_PARAMS,
    TEXT_SIZE,
    VERMILION,
)
from analysis.stats.tables import INTERVAL_SUFFIXES

if TYPE_CHECKING:
    from analysis.plots.captions import CaptionContext

_LOG_AXIS_TICKS = sorted([0, *(sign * tick for sign in (-1, 1) for tick in (0.5, 1, 2, 5, 10, 20, 50, 100))])


def draw_plane(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each defense at its shift and discrimination, by name where names find room, else by number.

    >>> row = {"attack": "direct", "defense": "retokenize", "family": "refactoring"}
    >>> row |= {f"{x}{end}": 1.0 for x in ("shift", "discrimination") for end in ENDS}
    >>> draw_plane(pd.DataFrame([row])).texts[0].get_text()
    'retokenize'

    Args:
        points: what `plane_points` returned, of one attack; a row without a value is named in the key only.
        ax: where to draw; its size must be final, because labels are placed by it.
    """
    present = set(check_one_attack(points)["family"])
    families = [
        *(family for family in FAMILY_STYLES if family in present),
        *sorted(present - set(FAMILY_STYLES)),
    ]
    points = points.sort_values("family", key=lambda column: column.map(families.index), kind="stable")
    known = points.dropna(subset=["shift", "discrimination"])
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, 4.2)
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.axvline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.plot([0], [0], "o", color=BLACK, markersize=5, zorder=3, gid="undefended")
        for family, group in known.groupby("family", sort=False):
            color, marker = FAMILY_STYLES.get(str(family), OTHER_FAMILY_STYLE)
            x, y = group["shift"], group["discrimination"]
            bar: Any = {"color": color, "alpha": 0.55, "linewidth": 1.1, "zorder": 2}
            ax.hlines(y, group["shift_low"], group["shift_high"], **bar)
            ax.vlines(x, group["discrimination_low"], group["discrimination_high"], **bar)
            size = 62 if marker in "PX*" else 40
            doubt = group.get("trusted", pd.Series("", group.index)) == "not trusted"
            for here, fill, edge, wide in ((~doubt, color, "white", 0.5), (doubt, "white", color, 1.2)):
                look: Any = {"marker": marker, "facecolors": fill, "edgecolors": edge, "linewidths": wide}
                if here.any():
                    ax.scatter(x[here], y[here], s=size, zorder=3, label=str(family), **look)
        far = is_stretched(known)
        ax.set_xlim(_plane_limits(known, "shift", far))
        ax.set_ylim(_plane_limits(known, "discrimination", far))
        if far:
            _use_log_axes(ax)
        labels = [fit_text(name, 95, TEXT_SIZE) for name in known["defense"]]
        named = len(labels) <= 10 and label_points(ax, known, labels, reach=36)
        if not named:
            labels = [str(number) for number in range(1, len(labels) + 1)]
            label_points(ax, known, labels, reach=300)
        ax.set_xlabel("shift (nats)")
        ax.set_ylabel("discrimination (nats)")
        _name_directions(ax)
        key = [make_legend_marker(BLACK, "o", "undefended (origin)")]
        most = 1 if len(points) > 10 else 2
        for family in families:
            color, marker = FAMILY_STYLES.get(family, OTHER_FAMILY_STYLE)
            key.append(
                make_legend_marker(
                    color, marker, "control (not a defense)" if family == "control" else family
                )
            )
            numbers = [] if named else zip(known["family"], labels, known["defense"], strict=True)
            texts = [
                f"{number}  {fit_text(name, 140, TEXT_SIZE, most)}"
                for of, number, name in numbers
                if of == family
            ]
            key += [make_legend_marker("none", "", text) for text in texts]
        unknown = points.loc[~points.index.isin(known.index), "defense"]
        key += [
            make_legend_marker("none", "", fit_text(f"no value: {name}", 150, TEXT_SIZE, most))
            for name in unknown
        ]
        place_legend_beside(ax, key)
    return ax


def _name_directions(ax: Axes) -> None:
    """Name the four directions, level with the axis labels wherever the tick labels push them."""
    style: Any = {"fontsize": TEXT_SIZE, "fontstyle": "italic", "color": "#444444", "annotation_clip": False}
    across: Any = style | {"xycoords": ("axes fraction", ax.xaxis.label), "va": "center"}
    ax.annotate("\N{LEFTWARDS ARROW} refuses less", (0, 0.5), ha="left", **across)
    ax.annotate("refuses more \N{RIGHTWARDS ARROW}", (1, 0.5), ha="right", **across)
    up: Any = style | {"xycoords": (ax.yaxis.label, "axes fraction"), "ha": "center", "rotation": 90}
    ax.annotate("\N{LEFTWARDS ARROW} separates worse", (0.5, 0), va="bottom", **up)
    ax.annotate("separates better \N{RIGHTWARDS ARROW}", (0.5, 1), va="top", **up)


def _use_log_axes(ax: Axes) -> None:
    """Make both axes logarithmic but for their middle, so that far points leave room for the crowd."""
    ax.set_xscale("symlog", linthresh=LINEAR_RANGE, linscale=1.0)
    ax.set_yscale("symlog", linthresh=LINEAR_RANGE, linscale=1.0)
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        ends = [tick for tick in _LOG_AXIS_TICKS if low <= tick <= high]
        axis.set_major_locator(FixedLocator(ends))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}")))


def _plane_limits(points: pd.DataFrame, column: str, is_logarithmic: bool = False) -> tuple[float, float]:
    """Return limits that hold every interval and the origin, with room for labels."""
    reached = points[[f"{column}{end}" for end in INTERVAL_SUFFIXES]].to_numpy(float)
    reached = reached[np.isfinite(reached)]
    low, high = min(reached.min(initial=0), 0), max(reached.max(initial=0), 0)
    if is_logarithmic:  # as much on paper, on a logarithmic axis
        return 1.5 * low - 0.2 * LINEAR_RANGE, 1.5 * high + 0.2 * LINEAR_RANGE
    room = 0.12 * (high - low) or 1.0
    return low - room, high + room


def caption_plane(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `plots.plane` draws from these points.

    >>> points = pd.DataFrame({"attack": ["direct"], "n_harmful": [9], "n_benign": [8], "family": ["noise"]})
    >>> caption_plane(points, Context("smollm2", "twins", "test", 0.0, ("I",)))[:47]
    'Change of the first-answer-token margin against'
    """
    controls = " Controls (grey) are not defenses." if (points["family"] == "control").any() else ""
    doubtful = "trusted" in points and (points["trusted"] == "not trusted").any()
    hollow = " Hollow: generated text contradicts the readout there." if doubtful else ""
    bent = "shift" in points and is_stretched(points)
    scale = f" Both axes are logarithmic beyond ±{LINEAR_RANGE:g}\u00a0nats." if bent else ""
    return (
        "Change of the first-answer-token margin against the undefended model (the origin) on the same "
        f"{format_count_range(points['n_harmful'])} harmful and {format_count_range(points['n_benign'])} benign queries: shift is "
        "the mean of the two class means of the change, discrimination is harmful minus benign; bars are "
        f"95\u00a0% intervals. Shape and color name the family.{controls}{hollow}{scale} "
        f"{context.format_sentences(points['attack'].iloc[0])}"
    )


def caption_square(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `plots.square` draws from these points."""
    name = points["defense"].str.partition("/")[0].iloc[0]
    return (
        f"{name} taken apart: tuned weights on or off, secret prompt on or off, each as the change of the "
        f"first-answer-token margin against the undefended model (the origin) on the same "
        f"{format_count_range(points['n_harmful'])} harmful and {format_count_range(points['n_benign'])} benign queries; bars are "
        "95\u00a0% intervals. Were the two ingredients independent, the arrows of one color would be equal. "
        f"{context.format_sentences(points['attack'].iloc[0])}"
    )


# Side of the square → color and dash: what is added along it.
_SQUARE_SIDES = (
    ("neither", "no_weights", BLUE, "the secret is added"),
    ("no_secret", "both", BLUE, ""),
    ("neither", "no_secret", VERMILION, "the weights are tuned"),
    ("no_weights", "both", VERMILION, ""),
)


def draw_square(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the four corners at their shift and discrimination, and an arrow for each ingredient added.

    Args:
        points: what `square_points` returned, of one attack and one defense.
        ax: where to draw; its size must be final, because labels are placed by it.
    """
    at = check_one_attack(points).set_index("corner")
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, 4.2)
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.axvline(0, color=GREY, linewidth=0.6, zorder=1)
        ax.plot([0], [0], "o", color=BLACK, markersize=5, zorder=3, gid="undefended")
        key: list[Any] = [Line2D([], [], color=BLACK, marker="o", linestyle="", label="undefended (origin)")]
        for start, end, color, words in _SQUARE_SIDES:
            one, two = (at.loc[corner, ["shift", "discrimination"]].astype(float) for corner in (start, end))
            ax.annotate(
                "",
                xy=(two["shift"], two["discrimination"]),
                xytext=(one["shift"], one["discrimination"]),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": color,
                    "linewidth": 1.4,
                    "shrinkA": 5,
                    "shrinkB": 5,
                },
                zorder=2,
            )
            if words:
                key.append(Line2D([], [], color=color, linewidth=1.4, label=words))
        bar: Any = {"color": BLACK, "alpha": 0.55, "linewidth": 1.1, "zorder": 3}
        ax.hlines(at["discrimination"], at["shift_low"], at["shift_high"], **bar)
        ax.vlines(at["shift"], at["discrimination_low"], at["discrimination_high"], **bar)
        ax.scatter(at["shift"], at["discrimination"], s=42, color=BLACK, marker="D", zorder=4, ec="white")
        ax.set_xlim(_plane_limits(points, "shift"))
        ax.set_ylim(_plane_limits(points, "discrimination"))
        label_points(ax, points, [SQUARE_CORNERS[corner] for corner in points["corner"]], reach=300)
        ax.set_xlabel("shift (nats)")
        ax.set_ylabel("discrimination (nats)")
        _name_directions(ax)
        place_legend_beside(ax, key)
    return ax
