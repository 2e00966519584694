"""Defenses against attacks: a row per defense, a column per attack, a panel per measure, numbers in cells."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle

from analysis.lettering import LINE_HEIGHT, make_axes, fit_text, measure_text_width, wrap_text
from analysis.palette import BLACK, BLUE, DARK, FAMILY_STYLES, GREY, RC_PARAMS, VERMILION, TEXT_SIZE

# Column → what it is, factor, form, and the colors from its lowest to its highest value.
_ATTACK_PANELS: dict[str, tuple[str, float, str, tuple[str, ...]]] = {
    "margin": ("harmful queries: margin above the threshold (nats)", 1, "+.1f", (VERMILION, "white", BLUE)),
    "refusal_rate": ("harmful queries refused (%)", 100, ".0f", ("white", BLUE)),
    "over_refusal_rate": ("benign queries refused (%)", 100, ".0f", ("white", VERMILION)),
}
_CELL_HEIGHT, _MIN_CELL_WIDTH, _MIN_PANEL_WIDTH = 0.2, 0.4, 1.5  # inches: a cell, and the least width of a panel
_ATTACK_PANEL_GAP, _ATTACK_FAMILY_GAP = 0.25, 0.06  # inches between panels, and between families
_MAX_ATTACKS_ABREAST = 6  # attacks up to which the panels stand side by side; more, and each stands below the last


def draw_attack_grid(cells: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw what is left of each defense under each attack; cells that generated text contradicts are hollow.

    >>> row = {"attack": "direct", "defense": "none", "family": "none", "margin": 1.5, "trusted": "trusted"}
    >>> cell = pd.DataFrame([row | {"refusal_rate": 0.9, "over_refusal_rate": 0.25}])
    >>> [text.get_text() for text in grid(cell).texts if text.get_gid()]
    ['+1.5', '90', '25']

    Args:
        cells: what `attack_cells` returned.
        ax: where to draw; its data units become inches, so that a new one is best.
    """
    attacks = list(dict.fromkeys(cells["attack"]))
    places, tall = _attack_row_offsets(cells)
    wide = max(_MIN_CELL_WIDTH, _MIN_PANEL_WIDTH / len(attacks))
    across = wide * len(attacks)
    with rc_context(RC_PARAMS):
        columns = [fit_text(_attack_label(name), 115, TEXT_SIZE, 1) for name in attacks]
        lettered = max(measure_text_width(name, TEXT_SIZE) for name in columns) / 72 + 0.08
        heads = {name: wrap_text(words, 72 * across, 8, "bold") for name, (words, *_) in _ATTACK_PANELS.items()}
        above = lettered + max(map(len, heads.values())) * 8 * LINE_HEIGHT / 72 + 0.06
        abreast = len(attacks) <= _MAX_ATTACKS_ABREAST
        step = (across + _ATTACK_PANEL_GAP, 0.0) if abreast else (0.0, -(tall + above + _ATTACK_PANEL_GAP))
        ax = ax or make_axes(across + 2 * step[0], tall + 2 * -step[1])
        ax.set_axis_off()
        for number, column in enumerate(_ATTACK_PANELS):
            left, top = number * step[0], number * step[1]
            _draw_attack_panel(ax, cells, column, places, attacks, (left, top, wide))
            for place, name in enumerate(columns):
                spot: Any = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": TEXT_SIZE}
                ax.text(left + (place + 0.5) * wide, top + 0.05, name, **spot)
            ax.text(left, top + lettered, "\n".join(heads[column]), va="bottom", size=8, weight="bold")
            if number == 0 or not abreast:
                _write_defense_names(ax, cells, places, left, top)
            if number == 2 or not abreast:
                _write_family_names(ax, cells, places, left + across, top)
        ax.set_xlim(0, across + 2 * step[0])
        ax.set_ylim(2 * step[1] - tall, 0)
    return ax


def _attack_row_offsets(cells: pd.DataFrame) -> tuple[dict[str, float], float]:
    """How far below the top each row begins, the undefended first, families together; and where all end."""
    first = cells.drop_duplicates("defense").set_index("defense")["family"]
    order = ["none", *FAMILY_STYLES, *sorted(set(first) - set(FAMILY_STYLES) - {"none"})]
    places, below, last = {}, 0.0, None
    for name, family in sorted(first.items(), key=lambda item: order.index(item[1])):
        below += _ATTACK_FAMILY_GAP * (last not in (None, family))
        places[str(name)], below, last = below, below + _CELL_HEIGHT, family
    return places, below


def _draw_attack_panel(
    ax: Axes,
    cells: pd.DataFrame,
    column: str,
    row_offsets: dict[str, float],
    attacks: list[str],
    corner_and_width: tuple[float, float, float],
) -> None:
    """Draw one measure of all cells, from a corner on, in columns of a width."""
    _, factor, form, colors = _ATTACK_PANELS[column]
    left, top, wide = corner_and_width
    values = (factor * cells[column].astype(float)).round(1) + 0.0  # no number is -0.0
    doubt = cells.get("trusted", pd.Series("", cells.index)) == "not trusted"
    margin = column == "margin"
    most = float(values[~doubt].abs().max()) if margin else 100.0
    span = Normalize(-most if margin else 0, most) if most > 0 else Normalize(-1, 1)
    shades = LinearSegmentedColormap.from_list(column, colors)
    for attack, defense, value, hollow in zip(cells["attack"], cells["defense"], values, doubt, strict=True):
        x, y = left + attacks.index(attack) * wide, top - row_offsets[defense] - _CELL_HEIGHT
        known = value == value
        red, green, blue, _ = shades(span(value)) if known and not hollow else (1, 1, 1, 1)
        edge: Any = {"edgecolor": GREY, "linestyle": ":"} if hollow else {"edgecolor": "white"}
        box = Rectangle((x + 0.01, y + 0.01), wide - 0.02, _CELL_HEIGHT - 0.02, linewidth=0.7, **edge)
        box.set_facecolor((red, green, blue))
        ax.add_patch(box)
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
        look: Any = {"color": "white" if dark else DARK if hollow else BLACK, "size": TEXT_SIZE - 0.5}
        look |= {"style": "italic"} if hollow else {}
        words = f"{value:{form}}".replace("-", "\N{MINUS SIGN}") if known else "\N{EN DASH}"
        gid = f"{column} {defense} {attack}"
        text = ax.text(x + wide / 2, y + _CELL_HEIGHT / 2, words, ha="center", va="center_baseline", gid=gid, **look)
        text.set_in_layout(False)  # lies inside of the axes: nothing to measure


def _write_defense_names(ax: Axes, cells: pd.DataFrame, row_offsets: dict[str, float], left: float, top: float) -> None:
    controls = set(cells.loc[cells["family"] == "control", "defense"])
    for name, below in row_offsets.items():
        words = "undefended" if name == "none" else f"{name} (control)" if name in controls else name
        style: Any = {"ha": "right", "va": "center_baseline", "size": TEXT_SIZE}
        style |= {"color": DARK if name in controls else BLACK}
        ax.text(left - 0.06, top - below - _CELL_HEIGHT / 2, fit_text(words, 130, TEXT_SIZE, 1), **style)


def _write_family_names(ax: Axes, cells: pd.DataFrame, row_offsets: dict[str, float], right: float, top: float) -> None:
    family = cells.drop_duplicates("defense").set_index("defense")["family"]
    told = {"none", "control"}
    for name, below in row_offsets.items():
        if family[name] not in told:
            told.add(family[name])
            style: Any = {"va": "center_baseline", "size": TEXT_SIZE, "style": "italic", "color": DARK}
            ax.text(right + 0.06, top - below - _CELL_HEIGHT / 2, fit_text(family[name], 90, TEXT_SIZE, 1), **style)


def _attack_label(attack: str) -> str:
    return "no attack" if attack == "direct" else attack
