"""Each defense as a point: the shift-discrimination plane, the refusal rates, and the square of ablations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from analysis.families import format_family
from analysis.plots.captions import CaptionContext, format_count_range, format_family_note
from analysis.plots.data import (
    LINEAR_RANGE,
    PLANE_COLUMNS,
    RATE_NAMES,
    SQUARE_CORNERS,
    check_one_attack,
    choose_plane_unit,
    is_stretched,
)
from analysis.plots.labels import label_points, make_legend_marker
from analysis.plots.layout import (
    fit_text,
    make_axes,
    measure_text_width,
    place_legend_below,
    place_legend_beside,
)
from analysis.plots.style import (
    BLACK,
    BLUE,
    DARK,
    FAMILY_STYLES,
    GREY,
    OTHER_FAMILY_STYLE,
    RC_PARAMS,
    TEXT_SIZE,
    VERMILION,
)
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, Trust

_MAX_SMALL_PLANE = 10  # defenses up to which the plane is small and its legend beside it
_MAX_BOLD_BARS = 16  # points up to which their intervals are as strong as the points
_AXIS_LABELS = {
    "SD": ("shift: change of the midpoint (SD)", "discrimination:\nchange of the separation (SD)"),
    "nats": ("shift (nats)", "discrimination (nats)"),
}
_RATE_AXIS = (-4, 104)  # percent; room for markers at 0 and at 100
_CONTOUR_STEP = 20  # percentage points between two lines of equal discrimination
_LINEAR_SCALE = 2.0  # length of either linear half of an axis, in decades of its logarithmic part
_LOG_AXIS_TICKS = sorted([0, *(sign * tick for sign in (-1, 1) for tick in (0.5, 1, 2, 5, 10, 20, 50, 100))])
_LOG_AXIS_MINOR_TICKS = [
    sign * tick
    for sign in (-1, 1)
    for tick in (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 3, 4, 6, 7, 8, 9, 30, 40, 60, 70, 80, 90)
]
# Corners at both ends of a side of the square, color, and the ingredient added along it.
_SQUARE_SIDES = (
    ("neither", "no_weights", BLUE, "the secret is added"),
    ("no_secret", "both", BLUE, ""),
    ("neither", "no_secret", VERMILION, "the weights are tuned"),
    ("no_weights", "both", VERMILION, ""),
)


def draw_plane(points: pd.DataFrame, ax: Axes | None = None, unit: str = "SD") -> Axes:
    """Draw each defense at its shift and discrimination; points without room for their name are numbered.

    >>> row = {"attack": "direct", "defense": "retokenize", "family": "refactoring"}
    >>> row |= {f"{x}{end}": 1.0 for x in ("shift", "discrimination") for end in INTERVAL_SUFFIXES}
    >>> draw_plane(pd.DataFrame([row])).texts[0].get_text()
    'retokenize'

    Args:
        points: table from `build_plane_points`, of one attack; rows without values are only in the legend.
        ax: axes to draw on, whose size must be final because labels are placed by it; by default new ones.
        unit: unit of both axes: SD (free of the margin's scale) or nats; nats if the table has no SDs.
    """
    points = sort_families(check_one_attack(points))
    unit = choose_plane_unit(points, unit)
    columns = PLANE_COLUMNS[unit]
    known = points.dropna(subset=[*columns])
    with rc_context(RC_PARAMS):
        ax = ax or _make_plane_axes(points)
        origin = draw_origin(ax)
        controls = _draw_controls(ax, known, columns)
        for family, rows in known.groupby("family", sort=False):
            draw_family(ax, str(family), rows, columns, len(known) > _MAX_BOLD_BARS)
        is_logarithmic = [is_stretched(known, unit, column) for column in columns]
        ax.set_xlim(compute_plane_limits(known, columns[0], is_logarithmic[0]))
        ax.set_ylim(compute_plane_limits(known, columns[1], is_logarithmic[1]))
        _use_log_axes(ax, *is_logarithmic)
        x_label, y_label = _AXIS_LABELS[unit]
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        _name_points(ax, points, known, columns, [origin, *controls])
        name_directions(ax)
    return ax


def draw_refusals(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each condition at its refusal rates by judged responses; points without room are numbered.

    >>> row = {"attack": "direct", "family": "noise", "defense": ["none", "retokenize"]}
    >>> row |= {f"{x}{end}": 0.5 for x in RATE_NAMES for end in INTERVAL_SUFFIXES}
    >>> draw_refusals(pd.DataFrame(row)).texts[0].get_text()
    'retokenize'

    Args:
        points: table from `build_refusal_points`, of one attack; rows without values are only in the legend.
        ax: axes to draw on, whose size must be final because labels are placed by it; by default new ones.
    """
    numbers = [f"{x}{end}" for x in RATE_NAMES for end in INTERVAL_SUFFIXES]
    numbers += [name for name in (f"control_{x}" for x in RATE_NAMES) if name in points]
    percent = check_one_attack(points).assign(**(100 * points[numbers].astype(float)))
    is_undefended = percent["defense"] == UNDEFENDED
    undefended = percent[is_undefended].dropna(subset=[*RATE_NAMES])
    points = sort_families(percent[~is_undefended])
    known = points.dropna(subset=[*RATE_NAMES])
    harmful, benign = RATE_NAMES
    with rc_context(RC_PARAMS):
        ax = ax or _make_plane_axes(points, is_square=True)
        ax.set_xlim(_RATE_AXIS)
        ax.set_ylim(_RATE_AXIS)
        ax.set_aspect("equal")
        ax.apply_aspect()  # now, because labels are placed by the final size
        for row in undefended.to_dict("records"):
            _draw_contours(ax, row[harmful] - row[benign])
        _draw_bars(ax, undefended, (benign, harmful), BLACK)
        controls = _draw_controls(ax, known, (benign, harmful))
        for family, rows in known.groupby("family", sort=False):
            draw_family(ax, str(family), rows, (benign, harmful), len(known) > _MAX_BOLD_BARS)
        ring = _draw_undefended(ax, undefended[benign], undefended[harmful], "undefended")
        ax.set_xlabel("benign queries refused (%)")
        ax.set_ylabel("harmful queries refused (%)")
        _name_points(ax, points, known, (benign, harmful), [ring, *controls], keep_clear=undefended)
    return ax


def draw_square(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the four combinations of weights and secret, with an arrow for each ingredient that is added.

    Args:
        points: table from `build_square_points`, of one attack and one defense.
        ax: axes to draw on, whose size must be final because labels are placed by it; by default new ones.
    """
    corners = check_one_attack(points).set_index("corner")
    coordinates: Any = corners[["shift", "discrimination"]].astype(float)
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, 4.2)
        key: list[Any] = [draw_origin(ax)]
        for start, end, color, label in _SQUARE_SIDES:
            tail, head = (tuple(coordinates.loc[corner]) for corner in (start, end))
            arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "shrinkA": 5, "shrinkB": 5}
            ax.annotate("", xy=head, xytext=tail, arrowprops=arrow, zorder=2)
            if label:
                key.append(Line2D([], [], color=color, linewidth=1.4, label=label))
        _draw_bars(ax, corners, PLANE_COLUMNS["nats"], BLACK, level=3)
        diamond: Any = {"s": 42, "color": BLACK, "marker": "D", "zorder": 4, "ec": "white"}
        ax.scatter(corners["shift"], corners["discrimination"], **diamond)
        ax.set_xlim(compute_plane_limits(points, "shift"))
        ax.set_ylim(compute_plane_limits(points, "discrimination"))
        names = [SQUARE_CORNERS[corner] for corner in points["corner"]]
        label_points(ax, points, names, reach=300, keep_clear=_sample_sides(coordinates))
        x_label, y_label = _AXIS_LABELS["nats"]
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        name_directions(ax)
        place_legend_beside(ax, key)
    return ax


def caption_plane(points: pd.DataFrame, context: CaptionContext, unit: str = "SD") -> str:
    """Return the caption of `draw_plane`.

    >>> points = pd.DataFrame({"attack": ["direct"], "n_harmful": [9], "n_benign": [8], "family": ["noise"]})
    >>> caption_plane(points, CaptionContext("smollm2", "twins", "test", 0.0, ("I",)))[:43]
    'Change of the first-token margin from the u'
    """
    unit = choose_plane_unit(points, unit)
    is_untrusted = "trusted" in points and (points["trusted"] == Trust.NOT_TRUSTED).any()
    hollow = (
        " Hollow: the margin is not trusted, because generated text contradicts the readout."
        if is_untrusted
        else ""
    )
    columns = PLANE_COLUMNS[unit]
    names = [
        name
        for name, column in zip(("shift", "discrimination"), columns, strict=True)
        if column in points and is_stretched(points, unit, column)
    ]
    axes = f"The axis of {names[0]} is" if len(names) == 1 else "Both axes are"
    scale = f" {axes} logarithmic beyond ±{LINEAR_RANGE:g}\u00a0{unit}." if names else ""
    scale += " The axes have different scales." * (not names)
    definition = (
        "shift is the change of the midpoint (how far the middle of the two class means lies above the "
        "threshold), discrimination the change of the separation (how far the mean of harmful queries lies "
        "above that of benign ones), both in within-class SDs of the margin under the same condition"
        if unit == "SD"
        else "shift is the mean of the two class means of the change, discrimination is harmful minus benign"
    )
    return (
        "Change of the first-token margin from the undefended model (the origin) on the same "
        f"{format_count_range(points['n_harmful'])} harmful and {format_count_range(points['n_benign'])} "
        f"benign queries: {definition}. Bars: 95\u00a0% intervals. Marker and color: family."
        f"{format_family_note(points['family'])}{_format_control_note(points, PLANE_COLUMNS[unit])}"
        f"{hollow}{scale} "
        f"{context.format_sentences(points['attack'].iloc[0])}"
    )


def caption_refusals(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_refusals`."""
    points = points.dropna(subset=["refusal_rate", "over_refusal_rate"])
    harmful, benign, judged = (
        format_count_range(points[name]) for name in ("n_harmful", "n_benign", "n_responses")
    )
    is_sample = points["n_responses"].max() < (points["n_harmful"] + points["n_benign"]).max()
    has_reference = (points["defense"] == UNDEFENDED).any()
    ring = " Ring: the undefended model." * bool(has_reference)
    dashed = "; the dashed one goes through the undefended model" * bool(has_reference)
    predicted = ", completed by the margins of the other queries (prediction-powered)" if is_sample else ""
    basis = context.response_basis or "judged responses"
    return (
        f"Share refused of {harmful} harmful queries against share refused of {benign} benign queries, by "
        f"the {basis}: {judged} responses per condition{predicted}.{ring} Along a grey "
        "line, both rates change equally (shift); across the lines, their difference changes "
        f"(discrimination). The lines are {_CONTOUR_STEP} percentage points apart{dashed}. Bars: "
        f"95\u00a0% intervals. Marker and color: family.{format_family_note(points['family'])}"
        f"{_format_control_note(points, RATE_NAMES)} "
        f"{context.format_response_sentences(points['attack'].iloc[0])}"
    )


def caption_square(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_square`."""
    name = points["defense"].str.partition("/")[0].iloc[0]
    return (
        f"Ablation of {name}: tuned weights on or off, secret prompt on or off, each as the change of the "
        "first-token margin from the undefended model (the origin) on the same "
        f"{format_count_range(points['n_harmful'])} harmful and {format_count_range(points['n_benign'])} "
        "benign queries. Bars: 95\u00a0% intervals. If the two ingredients acted independently, arrows of "
        f"one color would be equal. {context.format_sentences(points['attack'].iloc[0])}"
    )


def _sample_sides(coordinates: pd.DataFrame) -> pd.DataFrame:
    """Return points along the sides of the square and the origin, which no label may cover."""
    shares = np.linspace(0, 1, 101)[:, None]
    sides = [
        (1 - shares) * coordinates.loc[start].to_numpy() + shares * coordinates.loc[end].to_numpy()
        for start, end, *_ in _SQUARE_SIDES
    ]
    return pd.DataFrame(np.concatenate([*sides, [[0.0, 0.0]]]), columns=coordinates.columns)


def _format_control_note(points: pd.DataFrame, columns: tuple[str, ...]) -> str:
    """Return the sentences on control conditions and on matched controls, where there are any."""
    text = " Controls (grey) are not defenses." if (points["family"] == "control").any() else ""
    controls = points.get(f"control_{columns[0]}")
    if controls is not None and controls.notna().any():
        text += (
            f" Grey squares: matched controls of {controls.notna().sum()} conditions, with other content of "
            "the same size in the same place, each with a dotted line to its defense."
        )
    return text


def sort_families(points: pd.DataFrame) -> pd.DataFrame:
    """Return the rows by family, in the order of the palette."""
    present = set(points["family"])
    families = [family for family in FAMILY_STYLES if family in present]
    families += sorted(present - set(FAMILY_STYLES))
    return points.sort_values("family", key=lambda column: column.map(families.index), kind="stable")


def _make_plane_axes(points: pd.DataFrame, is_square: bool = False) -> Axes:
    """Return axes on which names have more room if there are many points."""
    if len(points) <= _MAX_SMALL_PLANE:
        return make_axes(4.2, 4.2)
    return make_axes(5.8, 5.8) if is_square else make_axes(6.6, 5.2)


def _name_points(
    ax: Axes,
    points: pd.DataFrame,
    known: pd.DataFrame,
    columns: tuple[str, str],
    first_entries: list[Line2D],
    keep_clear: pd.DataFrame | None = None,
) -> None:
    """Write names or numbers beside the known points, and place the legend that explains them."""
    is_small = len(points) <= _MAX_SMALL_PLANE
    names = [fit_text(name, 95, TEXT_SIZE) for name in known["defense"]]
    reach = 36 if is_small else 16
    numbers = label_points(ax, known, names, reach, columns, keep_clear, number_rest=True)
    key = [*first_entries, *_plane_legend(points, known, numbers)]
    if is_small:
        place_legend_beside(ax, key)
    else:
        place_legend_below(ax, key, n_columns=3, gap=0.52)


def _draw_contours(ax: Axes, discrimination: float) -> None:
    """Draw lines of equal discrimination, a step apart, from that of the undefended model (points)."""
    steps = range(-200 // _CONTOUR_STEP, 200 // _CONTOUR_STEP + 1)
    for difference in (discrimination + step * _CONTOUR_STEP for step in steps):
        low, high = max(0, -difference), min(100, 100 - difference)
        if low < high:
            style: Any = {"color": GREY, "linewidth": 0.4, "zorder": 0.5, "gid": "equal discrimination"}
            if difference == discrimination:
                style |= {"color": DARK, "linewidth": 0.8, "linestyle": (0, (4, 2))}
            ax.plot([low, high], [low + difference, high + difference], **style)


def draw_origin(ax: Axes) -> Line2D:
    """Draw the zero lines and the undefended model; return its legend entry."""
    ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
    ax.axvline(0, color=GREY, linewidth=0.6, zorder=1)
    return _draw_undefended(ax, [0], [0], "undefended (origin)")


def _draw_undefended(ax: Axes, x: Any, y: Any, label: str) -> Line2D:
    """Draw the undefended model as a ring; return its legend entry."""
    ring: Any = {
        "linestyle": "",
        "marker": "o",
        "color": BLACK,
        "markerfacecolor": "none",
        "markeredgewidth": 1.4,
    }
    ax.plot(x, y, markersize=9, zorder=5, gid="undefended", **ring)
    return Line2D([], [], markersize=7, label=label, **ring)


def _draw_controls(ax: Axes, points: pd.DataFrame, columns: tuple[str, str]) -> list[Line2D]:
    """Draw the matched controls, each with a line to its defense; return their legend entry."""
    names = [f"control_{name}" for name in columns]
    if not set(names) <= set(points):
        return []
    matched = points[[*names, *columns]].astype(float).dropna()
    if matched.empty:
        return []
    controls, defenses = matched[names].to_numpy(), matched[list(columns)].to_numpy()
    segments = list(np.stack([controls, defenses], axis=1))
    lines = LineCollection(segments, colors=GREY, linewidths=0.7, linestyles=":", zorder=0.8)
    lines.set_gid("control lines")
    ax.add_collection(lines)
    x, y = controls.T
    ax.scatter(x, y, s=12, marker="s", color=GREY, zorder=2.5, linewidths=0, gid="controls")
    return [make_legend_marker(GREY, "s", "matched controls")]


def _draw_bars(
    ax: Axes,
    rows: pd.DataFrame,
    columns: tuple[str, str],
    color: str,
    level: float = 2,
    is_faint: bool = False,
) -> None:
    """Draw both intervals of each point; faint ones where many cross."""
    x, y = columns
    bar: Any = {"color": color, "alpha": 0.55, "linewidth": 1.1, "zorder": level}
    bar |= {"alpha": 0.35, "linewidth": 0.7} if is_faint else {}
    ax.hlines(rows[y], rows[f"{x}_low"], rows[f"{x}_high"], **bar)
    ax.vlines(rows[x], rows[f"{y}_low"], rows[f"{y}_high"], **bar)


def draw_family(
    ax: Axes, family: str, rows: pd.DataFrame, columns: tuple[str, str], is_faint: bool = False
) -> None:
    """Draw the points and intervals of a family; untrusted points are hollow."""
    color, marker = FAMILY_STYLES.get(family, OTHER_FAMILY_STYLE)
    x, y = (rows[name] for name in columns)
    _draw_bars(ax, rows, columns, color, is_faint=is_faint)
    size = 62 if marker in "PX*" else 40
    untrusted = rows.get("trusted", pd.Series("", rows.index)) == Trust.NOT_TRUSTED
    for chosen, fill, edge, width in ((~untrusted, color, "white", 0.5), (untrusted, "white", color, 1.2)):
        style: Any = {"marker": marker, "facecolors": fill, "edgecolors": edge, "linewidths": width}
        if chosen.any():
            ax.scatter(x[chosen], y[chosen], s=size, zorder=3, label=family, **style)


def _plane_legend(points: pd.DataFrame, known: pd.DataFrame, numbers: list[int]) -> list[Line2D]:
    """Return the entries of the legend: each family, followed by its numbered defenses."""
    max_lines = 1 if len(points) > _MAX_SMALL_PLANE else 2
    key = []
    for family in dict.fromkeys(points["family"]):
        color, marker = FAMILY_STYLES.get(family, OTHER_FAMILY_STYLE)
        label = "control (not a defense)" if family == "control" else format_family(family)
        label = fit_text(label, 110, TEXT_SIZE, 1)
        key.append(make_legend_marker(color, marker, label))
        for name, number, of_family in zip(known["defense"], numbers, known["family"], strict=True):
            if number and of_family == family:
                label = f"{number}  {fit_text(name, 110, TEXT_SIZE, max_lines)}"
                key.append(make_legend_marker("none", "", label))
    missing = points.loc[~points.index.isin(known.index), "defense"]
    key += [
        make_legend_marker("none", "", fit_text(f"no value: {name}", 120, TEXT_SIZE, max_lines))
        for name in missing
    ]
    return key


def name_directions(ax: Axes) -> None:
    """Name the four directions, level with the axis labels wherever the tick labels push them."""
    style: Any = {"fontsize": TEXT_SIZE, "fontstyle": "italic", "color": "#444444", "annotation_clip": False}
    style |= {"textcoords": "offset points"}
    less, more = "\N{LEFTWARDS ARROW} refuses less", "refuses more \N{RIGHTWARDS ARROW}"
    worse, better = "\N{LEFTWARDS ARROW} separates worse", "separates better \N{RIGHTWARDS ARROW}"
    figure = ax.get_figure(root=True)
    assert figure is not None
    window = ax.get_window_extent()
    # In axes too short for label and directions side by side, the directions have a line of their own.
    lowered, outer = (
        -1.6 * TEXT_SIZE * _is_too_short(label.get_text(), texts, side * 72 / figure.dpi)
        for label, texts, side in (
            (ax.xaxis.label, (less, more), window.width),
            (ax.yaxis.label, (worse, better), window.height),
        )
    )
    across: Any = style | {"xycoords": ("axes fraction", ax.xaxis.label), "va": "center"}
    ax.annotate(less, (0, 0.5), (0, lowered), ha="left", **across)
    ax.annotate(more, (1, 0.5), (0, lowered), ha="right", **across)
    beside = 0.5 if outer == 0 else 0.0
    up: Any = style | {"xycoords": (ax.yaxis.label, "axes fraction"), "ha": "center", "rotation": 90}
    ax.annotate(worse, (beside, 0), (outer / 2, 0), va="bottom", **up)
    ax.annotate(better, (beside, 1), (outer / 2, 0), va="top", **up)


def _use_log_axes(ax: Axes, is_x: bool, is_y: bool) -> None:
    """Make axes logarithmic except for their middle, so that far points leave room for the others."""
    scale: Any = {"linthresh": LINEAR_RANGE, "linscale": _LINEAR_SCALE}
    if is_x:
        ax.set_xscale("symlog", **scale)
    if is_y:
        ax.set_yscale("symlog", **scale)
    limits = [(ax.xaxis, ax.get_xlim())] * is_x + [(ax.yaxis, ax.get_ylim())] * is_y
    for axis, (low, high) in limits:
        ticks = [tick for tick in _LOG_AXIS_TICKS if low <= tick <= high]
        axis.set_major_locator(FixedLocator(_thin_ticks(ax, ticks, is_vertical=axis is ax.yaxis)))
        axis.set_minor_locator(FixedLocator([tick for tick in _LOG_AXIS_MINOR_TICKS if low <= tick <= high]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}")))
        axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _is_too_short(label: str, directions: tuple[str, str], length: float) -> bool:
    """Return whether an axis of that length (points) has no room for its label between both directions."""
    widest = max(measure_text_width(line, 9) for line in label.split("\n"))
    return bool(widest + sum(measure_text_width(text, TEXT_SIZE) for text in directions) + 12 > length)


def _thin_ticks(ax: Axes, ticks: list[float], is_vertical: bool) -> list[float]:
    """Return the ticks whose numbers do not touch each other, from zero outwards."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    min_distance = figure.dpi * (10 if is_vertical else 18) / 72
    axis_index = 1 if is_vertical else 0
    positions = {tick: float(ax.transData.transform((tick, tick))[axis_index]) for tick in ticks}
    kept: list[float] = []
    for tick in sorted(ticks, key=abs):
        if all(abs(positions[tick] - positions[other]) >= min_distance for other in kept):
            kept.append(tick)
    return sorted(kept)


def compute_plane_limits(
    points: pd.DataFrame, column: str, is_logarithmic: bool = False
) -> tuple[float, float]:
    """Return limits that contain every interval and the origin, with room for labels."""
    names = [*(f"{column}{end}" for end in INTERVAL_SUFFIXES), f"control_{column}"]
    ends = points[[name for name in names if name in points]].to_numpy(float)
    ends = ends[np.isfinite(ends)]
    low, high = min(ends.min(initial=0), 0), max(ends.max(initial=0), 0)
    if is_logarithmic:  # the same length on paper, on a logarithmic axis
        return 1.5 * low - 0.2 * LINEAR_RANGE, 1.5 * high + 0.2 * LINEAR_RANGE
    room = 0.12 * (high - low) or 1.0
    return low - room, high + room
