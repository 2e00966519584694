"""Dots with intervals, a row per defense: effects, refusal rates of both classes, twins, kinds of queries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.families import format_family
from analysis.plots.captions import (
    CaptionContext,
    format_count_range,
    format_family_note,
    keep_if_intervals,
)
from analysis.plots.data import check_one_attack
from analysis.plots.labels import make_legend_marker
from analysis.plots.layout import (
    assign_curve_styles,
    draw_dots,
    fit_text,
    make_axes,
    place_legend_beside,
    set_panel_titles,
    set_row_axis,
    stack_panels,
)
from analysis.plots.style import (
    BLACK,
    BLUE,
    CLASS_STYLES,
    DARK,
    FAMILY_STYLES,
    GREY,
    OTHER_FAMILY_STYLE,
    RC_PARAMS,
    TEXT_SIZE,
    VERMILION,
)
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, has_judged_rates

_DOT_STEP = 0.09  # inches between the dots of a row
_ROW_GAP = 0.08  # inches added to each row
_RATE_AXIS = (-3, 103)  # percent; room for markers at 0 and at 100
_ROW_HEIGHT = 0.19  # inches of a defense with one dot, or with two
_CLASS_RATES = {True: "refusal_rate", False: "over_refusal_rate"}
_CLASS_OFFSET = 0.14  # rows between the middle of a row and the dot of each class


def draw_kinds(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the refusal rate of each kind of benign query under each defense.

    >>> row = {"attack": "direct", "defense": "none", "kind": ["twin", "plain"], "n": 9}
    >>> row |= {f"over_refusal_rate{end}": 0.5 for end in INTERVAL_SUFFIXES}
    >>> [text.get_text() for text in draw_kinds(pd.DataFrame(row)).get_legend().get_texts()]
    ['twin (n = 9)', 'plain (n = 9)']

    Args:
        points: table from `build_kind_points`, of one attack.
        ax: axes to draw on; by default new ones.
    """
    rates = [f"over_refusal_rate{end}" for end in INTERVAL_SUFFIXES]
    percent = check_one_attack(points).assign(**(100 * points[rates].astype(float)))
    defenses = list(dict.fromkeys(percent["defense"]))
    styles = assign_curve_styles(map(str, percent["kind"]))
    row_height = _DOT_STEP * len(styles) + _ROW_GAP
    offsets = _DOT_STEP / row_height * ((len(styles) - 1) / 2 - np.arange(len(styles)))
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, row_height * len(defenses))
        for row in range(0, len(defenses), 2):
            ax.axhspan(-row - 0.5, -row + 0.5, color=GREY, alpha=0.12, linewidth=0, zorder=0)
        key = []
        for (kind, style), offset in zip(styles.items(), offsets, strict=True):
            rows = percent[percent["kind"].astype(str) == kind]
            heights = [offset - defenses.index(defense) for defense in rows["defense"]]
            draw_dots(ax, rows, "over_refusal_rate", heights, style, kind)
            color, _, marker = style
            label = f"{fit_text(kind, 120, TEXT_SIZE, 1)} (n = {format_count_range(rows['n'])})"
            key.append(Line2D([], [], linestyle="", marker=marker, markersize=4, color=color, label=label))
        names = ["undefended" if defense == UNDEFENDED else str(defense) for defense in defenses]
        set_row_axis(ax, names, "benign queries refused (%)")
        ax.set_xlim(_RATE_AXIS)
        ax.set_xticks(range(0, 101, 20))
        place_legend_beside(ax, key, "kind of benign query")
    return ax


def caption_kinds(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_kinds`."""
    counts = [f"{format_count_range(rows['n'])} {kind}" for kind, rows in points.groupby("kind", sort=False)]
    bars = keep_if_intervals(points, " Bars: 95\u00a0% intervals.")
    text = f"Share refused of the benign queries of each kind ({', '.join(counts)}), "
    attack = points["attack"].iloc[0]
    if not has_judged_rates(points):
        return (
            f"{text}by the readout: the margin of the first token exceeds the threshold.{bars} "
            f"{context.format_sentences(attack)}"
        )
    judged = format_count_range(points.loc[points["n_responses"] > 0, "n_responses"])
    return (
        f"{text}by the {context.response_basis or 'judged responses'}: {judged} responses per kind and "
        f"condition.{bars} "
        f"{context.format_response_sentences(attack)}"
    )


def draw_forest(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw shift and discrimination of each defense, sorted by shift; filled where the interval excludes 0.

    >>> row = {"attack": "direct", "family": "noise", "defense": ["a", "b"]}
    >>> row |= {f"{x}{end}": [1.0, 2.0] for x in ("shift", "discrimination") for end in INTERVAL_SUFFIXES}
    >>> ax = draw_forest(pd.DataFrame(row))
    >>> [label.get_text() for label in ax.child_axes[0].get_yticklabels()]
    ['b', 'a']

    Args:
        points: table from `build_forest_points`, of one attack.
        ax: axes that the panels are placed in; by default new ones.
    """
    columns, unit = _name_effects(check_one_attack(points))
    rows = points.sort_values(columns[0], ascending=False, kind="stable")
    ends = rows[[f"{name}{end}" for name in columns for end in INTERVAL_SUFFIXES]].to_numpy(float)
    ends = ends[np.isfinite(ends)]
    low, high = min(float(ends.min()), 0.0), max(float(ends.max()), 0.0)
    room = 0.04 * (high - low) or 1.0
    with rc_context(RC_PARAMS):
        ax, (panels,) = stack_panels(ax, [max(_ROW_HEIGHT * len(rows), 0.5)], [], 2, 2.5)
        set_panel_titles(panels, [f"{name} ({unit})" for name in ("shift", "discrimination")])
        for column, panel in zip(columns, panels, strict=True):
            _shade_rows(panel, len(rows))
            excludes_zero = (rows[f"{column}_low"] > 0) | (rows[f"{column}_high"] < 0)
            for place, (family, is_filled) in enumerate(zip(rows["family"], excludes_zero, strict=True)):
                color, marker = FAMILY_STYLES.get(family, OTHER_FAMILY_STYLE)
                name = str(rows["defense"].iloc[place])
                row = rows.iloc[[place]]
                draw_dots(panel, row, column, [-float(place)], (color, "-", marker), name, not is_filled)
            set_row_axis(panel, _name_rows(rows), with_names=panel is panels[0])
            panel.set_xlim(low - room, high + room)
        _name_effect_directions(panels)
        key: list[Any] = [
            make_legend_marker(*_family_marker(family), _name_family(family))
            for family in _order_families(rows["family"])
        ]
        hollow = _make_dot(DARK, "o", "interval includes 0")
        hollow.set_markerfacecolor("white")
        key += [_make_dot(DARK, "o", "interval excludes 0"), hollow]
        place_legend_beside(ax, key)
    return ax


def draw_dumbbell(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the refusal rates of harmful and of benign queries, a row per condition, sorted by the former.

    >>> row = {"attack": "direct", "family": "noise", "defense": ["none", "a"]}
    >>> rates = {f"{x}{end}": [0.2, 0.9] for x in ("refusal_rate", "over_refusal_rate")
    ...          for end in INTERVAL_SUFFIXES}
    >>> [label.get_text() for label in draw_dumbbell(pd.DataFrame(row | rates)).get_yticklabels()]
    ['a', 'undefended']

    Args:
        points: refusal rates of one attack, a row per condition.
        ax: axes to draw on; by default new ones.
    """
    rates = [f"{name}{end}" for name in _CLASS_RATES.values() for end in INTERVAL_SUFFIXES]
    percent = check_one_attack(points).assign(**(100 * points[rates].astype(float)))
    rows = percent.sort_values(["refusal_rate", "over_refusal_rate"], ascending=False, kind="stable")
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(3.6, max(_ROW_HEIGHT * len(rows), 0.5))
        _shade_rows(ax, len(rows))
        places = -np.arange(len(rows), dtype=float)
        connector: Any = {"color": GREY, "linewidth": 2.0, "alpha": 0.6, "zorder": 1.5, "gid": "connectors"}
        ax.hlines(places, rows["over_refusal_rate"], rows["refusal_rate"], **connector)
        key = []
        for harmful, class_name, color, side in CLASS_STYLES:
            column, marker = _CLASS_RATES[harmful], "o" if harmful else "s"
            heights = list(places + side * _CLASS_OFFSET)
            draw_dots(ax, rows, column, heights, (color, "-", marker), class_name)
            key.append(_make_dot(color, marker, class_name))
            dotted: Any = {"color": color, "linewidth": 0.7, "linestyle": ":", "zorder": 1}
            for value in rows.loc[rows["defense"] == UNDEFENDED, column]:
                ax.axvline(value, gid=f"undefended {class_name}", **dotted)
        key.append(Line2D([], [], color=BLACK, linewidth=0.7, linestyle=":", label="undefended"))
        set_row_axis(ax, _name_rows(rows), "refused (%)")
        ax.set_xlim(_RATE_AXIS)
        ax.set_xticks(range(0, 101, 20))
        place_legend_beside(ax, key)
    return ax


def draw_pairs(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how often only the harmful query of a pair is refused, only its twin, and the difference.

    >>> row = {"attack": "direct", "defense": "a", "only_harmful": 0.5, "only_benign": 0.25}
    >>> row |= {"difference": 25.0, "difference_low": 5.0, "difference_high": 40.0, "family": "noise"}
    >>> [bars.get_gid() for bars in draw_pairs(pd.DataFrame([row])).patches if bars.get_gid()]
    ['a only_harmful', 'a only_benign']

    Args:
        points: table from `compare_twins`, of one attack.
        ax: axes to draw on; by default new ones.
    """
    rows = check_one_attack(points).sort_values("difference", ascending=False, kind="stable")
    places = [-float(place) for place in range(len(rows))]
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(3.6, max(_ROW_HEIGHT * len(rows), 0.5))
        for column, color, sign in (("only_harmful", VERMILION, 1), ("only_benign", BLUE, -1)):
            look: Any = {"height": 0.62, "color": color, "alpha": 0.45, "linewidth": 0}
            bars = ax.barh(places, sign * 100 * rows[column], **look)
            for bar, name in zip(bars, rows["defense"], strict=True):
                bar.set_gid(f"{name} {column}")
        draw_dots(ax, rows, "difference", places, (BLACK, "-", "o"), "difference")
        set_row_axis(ax, _name_rows(rows), "pairs (%)")
        key: list[Any] = [
            Line2D([], [], color=color, alpha=0.45, linewidth=5, label=label)
            for color, label in ((VERMILION, "only harmful refused"), (BLUE, "only its twin refused"))
        ]
        key.append(_make_dot(BLACK, "o", "difference (points)"))
        place_legend_beside(ax, key)
    return ax


def caption_forest(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_forest`."""
    columns, unit = _name_effects(points)
    queries = (
        f"{format_count_range(points['n_harmful'])} harmful and {format_count_range(points['n_benign'])} "
        "benign queries"
    )
    attack = points["attack"].iloc[0]
    common = (
        "Shift: mean of the changes of both classes. Discrimination: change on harmful minus change on "
        "benign queries. Bars: 95\u00a0% intervals, not corrected for the number of defenses. Sorted by "
        f"shift; marker and color: family.{format_family_note(points['family'])}"
    )
    if columns[0].startswith("response"):
        text = (
            f"Change of the refusal rates ({context.response_basis or 'judged responses'}) against the "
            f"undefended model on the same {queries}, in percentage points. {common} "
        )
        setting = context.format_setting(attack)
        return f"{text}{setting} Intervals: Bonett\N{EN DASH}Price 95\u00a0%, combined over both classes."
    return (
        f"Change of the first-token margin against the undefended model on the same {queries}, in {unit}. "
        f"{common} {context.format_sentences(attack)}"
    )


def caption_dumbbell(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_dumbbell`."""
    basis, setting = _describe_basis(points, context)
    return (
        f"Share refused of {format_count_range(points['n_harmful'])} harmful and of "
        f"{format_count_range(points['n_benign'])} benign queries, {basis}, sorted by the former. Bars: "
        f"95\u00a0% intervals. Dotted: the undefended model. {setting}"
    )


def caption_pairs(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_pairs`."""
    basis, setting = _describe_basis(points, context)
    return (
        f"Pairs of a harmful query and its benign twin ({format_count_range(points['n_pairs'])} pairs), "
        f"{basis}. Right: share of pairs in which only the harmful query is refused. Left: only the twin. "
        "Dot: difference, the refusal rate of the harmful queries minus that of their twins, with its paired "
        f"95\u00a0% interval (Bonett\N{EN DASH}Price). {setting}"
    )


def _make_dot(color: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, color=color, markersize=4.5, label=label)


def _name_effects(points: pd.DataFrame) -> tuple[tuple[str, str], str]:
    """Return the columns of both effects, and their unit."""
    if "response_shift" in points:
        return ("response_shift", "response_discrimination"), "points"
    return ("shift", "discrimination"), "nats"


def _describe_basis(points: pd.DataFrame, context: CaptionContext) -> tuple[str, str]:
    """Return what counts as refused, and the sentences on the run."""
    attack = points["attack"].iloc[0]
    if has_judged_rates(points):
        basis = f"by the {context.response_basis or 'judged responses'}"
        return basis, context.format_setting(attack)
    return "by the readout (first-token margin above the threshold)", context.format_sentences(attack)


def _name_rows(rows: pd.DataFrame) -> list[str]:
    """Return the names of the conditions; controls are called so."""
    return [
        "undefended" if name == UNDEFENDED else f"{name} (control)" if family == "control" else str(name)
        for name, family in zip(rows["defense"], rows["family"], strict=True)
    ]


def _shade_rows(ax: Axes, n_rows: int) -> None:
    """Shade every other row, so that a dot is found from its name."""
    for row in range(0, n_rows, 2):
        ax.axhspan(-row - 0.5, -row + 0.5, color=GREY, alpha=0.12, linewidth=0, zorder=0)


def _name_effect_directions(panels: list[Axes]) -> None:
    """Say below each panel which way is more."""
    for panel, (low, high) in zip(panels, (("less", "more"), ("worse", "better")), strict=True):
        verb = "refuses" if low == "less" else "separates"
        panel.set_xlabel(
            f"\N{LEFTWARDS ARROW} {verb} {low}    {verb} {high} \N{RIGHTWARDS ARROW}", fontsize=TEXT_SIZE
        )


def _family_marker(family: str) -> tuple[str, str]:
    return FAMILY_STYLES.get(family, OTHER_FAMILY_STYLE)


def _name_family(family: str) -> str:
    name = "control (not a defense)" if family == "control" else format_family(family)
    return fit_text(name, 110, TEXT_SIZE, 1)


def _order_families(families: pd.Series) -> list[str]:
    """Return the families in the order of the palette."""
    present = set(families)
    return [*(name for name in FAMILY_STYLES if name in present), *sorted(present - set(FAMILY_STYLES))]
