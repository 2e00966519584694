"""How far stacks of two are from what their members add up to: a heat map over pairs of defenses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Patch, Rectangle

from analysis.curves import INTERVAL_SUFFIXES, MAX_NUMBERED_DEFENSES, check_one_attack
from analysis.ensembles import REPORT_SPLIT, STACK
from analysis.lettering import LINE_HEIGHT, place_legend_beside, make_axes, fit_text, wrap_text
from analysis.palette import BLACK, BLUE, DARK, FAMILY_STYLES, GREY, OTHER_FAMILY_STYLE, RC_PARAMS, VERMILION, TEXT_SIZE

INTERACTION_PANELS = {
    "interaction_shift": ("interaction on shift (nats)", "refuses less", "refuses more"),
    "interaction_discrimination": (
        "interaction on discrimination (nats)",
        "separates worse",
        "separates better",
    ),
}
_INTERACTION_COLORS = LinearSegmentedColormap.from_list("interaction", (VERMILION, "white", BLUE))
_NOT_RUN_COLOR = "#E4E4E4"  # told from the white of no interaction
_MIN_INTERACTION_PANEL, _INTERACTION_PANEL_GAP, _INTERACTION_FAMILY_GAP, _FAMILY_STRIP_WIDTH = 2.6, 0.3, 0.05, 0.06  # inches: a panel, between two, between families, a strip


def build_interaction_cells(
    rows: pd.DataFrame, families: Mapping[str, str], split: str = REPORT_SPLIT
) -> pd.DataFrame:
    """Return a row for each stack of two that was run under the first attack: how far it is from its sum.

    >>> row = {"attack": "direct", "split": "test", "members": "a+b/c", "how": "stack", "size": 2}
    >>> row |= {"observed_shift": 1.0, "interaction_shift": 0.5, "interaction_discrimination": 0.25}
    >>> interaction_cells(pd.DataFrame([row]), {"a": "noise"})[["second", "family_second"]].values.tolist()
    [['b/c', 'other']]

    Args:
        rows: `ensembles.csv`.
        families: of each defense.
        split: whose queries.

    Returns:
        `first` and `second` with their families, and the interactions on shift and discrimination (nats) with
        their intervals, which are missing where there are none.
    """
    here = rows[(rows["attack"] == rows["attack"].iloc[0]) & (rows["split"] == split)]
    pairs = here[(here["how"] == STACK) & (here["size"] == 2) & here["observed_shift"].notna()]
    members = [str(name).split("+") for name in pairs["members"]]
    names = {side: [team[place] for team in members] for place, side in enumerate(("first", "second"))}
    numbers = pairs.reindex(columns=[f"{name}{end}" for name in INTERACTION_PANELS for end in INTERVAL_SUFFIXES])
    found = {"attack": pairs["attack"].tolist(), **names}
    found |= {
        f"family_{side}": [families.get(name, "other") for name in team] for side, team in names.items()
    }
    return pd.concat([pd.DataFrame(found), numbers.reset_index(drop=True)], axis=1)


def draw_interactions(cells: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw what each pair does beyond what its members add up to; blue is more than that, orange is less.

    >>> cell = {"attack": "direct", "first": "a", "second": "b", "family_first": "noise"}
    >>> cell |= {"family_second": "tuning", "interaction_shift": -1.25, "interaction_discrimination": 0.5}
    >>> [text.get_text() for text in interactions(pd.DataFrame([cell])).texts if "a b" in str(text.get_gid())]
    ['−1.2', '+0.50']

    Args:
        cells: what `interaction_cells` returned, of one attack.
        ax: where to draw; its data units become inches, so that a new one is best.
    """
    check_one_attack(cells)
    of = _families_by_defense(cells)
    numbered = len(of) <= MAX_NUMBERED_DEFENSES
    cell = 0.36 if numbered else 0.15
    places, end = _interaction_offsets(of, cell)
    across = max(end, _MIN_INTERACTION_PANEL)
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(2 * across + _INTERACTION_PANEL_GAP, end)
        ax.set_axis_off()
        heads = {name: wrap_text(words, 72 * across, 8, "bold") for name, (words, *_) in INTERACTION_PANELS.items()}
        for number, name in enumerate(INTERACTION_PANELS):
            left = number * (across + _INTERACTION_PANEL_GAP)
            span = _draw_interaction_panel(ax, cells, name, places, cell, left)
            _draw_interaction_scale(ax, name, span, left)
            style: Any = {"va": "bottom", "size": 8, "weight": "bold"}
            ax.text(left, 0.47, "\n".join(heads[name]), linespacing=LINE_HEIGHT, **style)
            _label_interaction_axes(ax, of, places, cell, (left, end), with_row_names=number == 0)
        ax.set_xlim(0, 2 * across + _INTERACTION_PANEL_GAP)
        ax.set_ylim(-end, 0)
        key: list[Any] = [
            Patch(color=FAMILY_STYLES.get(family, OTHER_FAMILY_STYLE)[0], label=family) for family in dict.fromkeys(of.values())
        ]
        every = len(cells) == len(of) * (len(of) - 1) / 2
        key += [] if every else [Patch(color=_NOT_RUN_COLOR, label="pair was not run")]
        place_legend_beside(ax, key, title="family (strip)")
    return ax


def _families_by_defense(cells: pd.DataFrame) -> dict[str, str]:
    """The family of each defense, families together."""
    found = dict(zip(cells["first"], cells["family_first"], strict=True))
    found |= dict(zip(cells["second"], cells["family_second"], strict=True))
    order = [*FAMILY_STYLES, *sorted(set(found.values()) - set(FAMILY_STYLES))]
    return dict(sorted(found.items(), key=lambda item: (order.index(item[1]), item[0])))


def _interaction_offsets(families: Mapping[str, str], cell_width: float) -> tuple[dict[str, float], float]:
    """How far from the corner each defense begins, and where all end."""
    places, far, last = {}, 0.0, None
    for name, family in families.items():
        far += _INTERACTION_FAMILY_GAP * (last not in (None, family))
        places[name], far, last = far, far + cell_width, family
    return places, far


def _draw_interaction_panel(
    ax: Axes, cells: pd.DataFrame, column: str, offsets: Mapping[str, float], cell_width: float, left: float
) -> float:
    """Draw one interaction of all pairs; return the value of the darkest color."""
    ends = [f"{column}{end}" for end in INTERVAL_SUFFIXES]
    pairs = list(zip(cells["first"], cells["second"], strict=True))
    found: dict[Any, Any] = dict(zip(pairs, cells.reindex(columns=ends).to_numpy(float), strict=True))
    sizes = np.abs(cells[column].to_numpy(float))
    most = float(np.nanmax(sizes)) if np.isfinite(sizes).any() else 0.0
    most = most or 1.0
    digits = 2 if most < 1 else 1
    for row, down in offsets.items():
        for name, right in offsets.items():
            if row == name:
                continue
            ran = found.get((row, name), found.get((name, row)))
            value, low, high = (np.nan,) * 3 if ran is None else ran
            known = value == value
            color: Any = (
                _INTERACTION_COLORS(Normalize(-most, most)(value)) if known else _NOT_RUN_COLOR if ran is None else "white"
            )
            box = Rectangle((left + right, -down - cell_width), cell_width, cell_width, facecolor=color, edgecolor="white")
            box.set_linewidth(0.6)
            box.set_gid(f"{column} {row} {name}")
            ax.add_patch(box)
            sure = low > 0 or high < 0
            words = "\N{BULLET}" if sure else ""
            if len(offsets) <= MAX_NUMBERED_DEFENSES:
                words = f"{round(value, digits) + 0.0:+.{digits}f}" if known else "\N{EN DASH}"
            if ran is None or not words:
                continue
            red, green, blue = color[:3] if known else (1, 1, 1)
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
            look: Any = {"color": "white" if dark else BLACK, "weight": "bold" if sure else "normal"}
            look |= {"size": TEXT_SIZE - 0.5, "ha": "center", "va": "center_baseline"}
            spot = left + right + cell_width / 2, -down - cell_width / 2
            words = words.replace("-", "\N{MINUS SIGN}")
            text = ax.text(*spot, words, gid=f"{column} {row} {name}", **look)
            text.set_in_layout(False)  # lies inside of the axes: nothing to measure
    return most


def _draw_interaction_scale(ax: Axes, column: str, max_value: float, left: float) -> None:
    """Draw the colors with their numbers above a panel."""
    _, less, more = INTERACTION_PANELS[column]
    edges = np.linspace(left, left + _MIN_INTERACTION_PANEL, 65)
    shades = np.linspace(-max_value, max_value, 64)[None]
    ax.pcolormesh(edges, [0.28, 0.38], shades, cmap=_INTERACTION_COLORS, vmin=-max_value, vmax=max_value, clip_on=False)
    frame: Any = {"fill": False, "edgecolor": GREY, "linewidth": 0.5, "clip_on": False, "gid": "scale"}
    ax.add_patch(Rectangle((left, 0.28), _MIN_INTERACTION_PANEL, 0.1, **frame))
    form = ".2f" if max_value < 1 else ".1f"
    for place, side, words in (
        (0.0, "left", f"\N{MINUS SIGN}{max_value:{form}} {less}"),
        (0.5, "center", "0"),
        (1.0, "right", f"{more} +{max_value:{form}}"),
    ):
        style: Any = {"ha": side, "va": "top", "size": TEXT_SIZE - 0.7, "color": DARK}
        ax.text(left + place * _MIN_INTERACTION_PANEL, 0.25, words, **style)


def _label_interaction_axes(
    ax: Axes,
    families: Mapping[str, str],
    offsets: Mapping[str, float],
    cell_width: float,
    left_and_end: tuple[float, float],
    with_row_names: bool,
) -> None:
    """Draw the strips of the families, the names of the columns, and those of the rows where wanted."""
    left, end = left_and_end
    size = TEXT_SIZE if cell_width > 0.2 else TEXT_SIZE - 0.7
    for name, along in offsets.items():
        color = FAMILY_STYLES.get(families[name], OTHER_FAMILY_STYLE)[0]
        for corner, wide, tall in (
            ((left - _FAMILY_STRIP_WIDTH - 0.02, -along - cell_width), _FAMILY_STRIP_WIDTH, cell_width),
            ((left + along, -end - _FAMILY_STRIP_WIDTH - 0.02), cell_width, _FAMILY_STRIP_WIDTH),
        ):
            ax.add_patch(Rectangle(corner, wide, tall, color=color, linewidth=0, clip_on=False, gid="family"))
        shown = fit_text(name, 115, size, 1)
        below: Any = {"rotation": 90, "ha": "center", "va": "top", "size": size}
        ax.text(left + along + cell_width / 2, -end - _FAMILY_STRIP_WIDTH - 0.06, shown, gid="column", **below)
        beyond: Any = {"ha": "right", "va": "center_baseline", "size": size}
        if with_row_names:
            ax.text(left - _FAMILY_STRIP_WIDTH - 0.06, -along - cell_width / 2, shown, gid="row", **beyond)
