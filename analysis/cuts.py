"""In which layers a defense's own tokens are read: what is left when attention to them is cut there."""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.curves import check_one_attack
from analysis.lettering import place_legend_beside, fit_text
from analysis.palette import DARK, RC_PARAMS, TEXT_SIZE
from analysis.panels import CONTRAST_LABELS, draw_dots, set_panel_titles, set_row_axis, assign_curve_styles, stack_panels

KNOCKOUT_READERS = {"answer": "answer position", "everything": "every later token"}
_KNOCKOUT_DOT_HEIGHT, _KNOCKOUT_ROW_GAP, _KNOCKOUT_MAX_HEIGHT = 0.065, 0.1, 12.0  # inches: a dot's row, between two ranges, all of them


def draw_attention_knockouts(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw what is left of each defense, a row per range of layers; filled where only the answer is cut off.

    >>> row = {"attack": "direct", "defense": "a", "reader": "answer", "first": -1, "last": -1}
    >>> rows = pd.DataFrame([row, row | {"first": 0, "last": 3}]).assign(shift=1.0, discrimination=0.5)
    >>> [label.get_text() for label in cuts(rows).child_axes[0].get_yticklabels()]
    ['nothing cut', 'layers 0–3']

    Args:
        points: `cuts.csv`, of one attack.
        ax: where to draw; it only lends its place to the panels.
    """
    of = assign_curve_styles(check_one_attack(points)["defense"])
    spans = list(dict.fromkeys(zip(points["first"].astype(int), points["last"].astype(int), strict=True)))
    readers = [name for name in KNOCKOUT_READERS if (points["reader"] == name).any()]
    count = len(of) * len(readers)
    tall = min(max(_KNOCKOUT_DOT_HEIGHT * count + _KNOCKOUT_ROW_GAP, 0.22), max(_KNOCKOUT_MAX_HEIGHT / len(spans), 0.16))
    with rc_context(RC_PARAMS):
        ax, (row,) = stack_panels(ax, [max(tall * len(spans), 0.7)], [])
        set_panel_titles(row, CONTRAST_LABELS.values())
        for column, (name, panel) in enumerate(zip(CONTRAST_LABELS, row, strict=True)):
            for place in range(1, len(spans)):
                panel.axhline(0.5 - place, color="#E0E0E0", linewidth=0.6, zorder=0.5)
            for number, (defense, look) in enumerate(of.items()):
                for side, reader in enumerate(readers):
                    here = points[(points["defense"] == defense) & (points["reader"] == reader)]
                    rank = (number * len(readers) + side - (count - 1) / 2) / count * (1 - _KNOCKOUT_ROW_GAP / tall / 2)
                    at = [
                        -spans.index((int(first), int(last))) - rank
                        for first, last in zip(here["first"], here["last"], strict=True)
                    ]
                    draw_dots(panel, here, name, at, look, f"{defense} {reader}", reader == "everything")
            set_row_axis(panel, [_layer_range_label(*span) for span in spans], "nats left", with_names=column == 0)
        key = [
            Line2D(
                [], [], color=color, marker=mark, linestyle="", markersize=4.5, label=fit_text(name, 140, TEXT_SIZE)
            )
            for name, (color, _, mark) in of.items()
        ]
        for reader in readers:
            fill = "white" if reader == "everything" else DARK
            label = f"cut from: {KNOCKOUT_READERS[reader]}"
            key.append(
                Line2D([], [], color=DARK, marker="o", mfc=fill, linestyle="", markersize=4.5, label=label)
            )
        place_legend_beside(ax, key)
    return ax


def _layer_range_label(first_layer: int, last_layer: int) -> str:
    if first_layer < 0:
        return "nothing cut"
    return f"layer {first_layer}" if first_layer == last_layer else f"layers {first_layer}\N{EN DASH}{last_layer}"
