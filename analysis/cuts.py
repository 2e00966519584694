"""In which layers a defense's own tokens are read: what is left when attention to them is cut there."""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.curves import one_attack
from analysis.lettering import beside, fit
from analysis.palette import DARK, STYLE, WRITTEN
from analysis.panels import CONTRASTS, dots, headed, in_rows, looks, stacked

READERS = {"answer": "answer position", "everything": "every later token"}
_DOT, _AIR, _MOST = 0.065, 0.1, 12.0  # inches: a dot's row, between two ranges, all of them


def cuts(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw what is left of each defense, a row per range of layers; filled where only the answer is cut off.

    >>> row = {"attack": "direct", "defense": "a", "reader": "answer", "first": -1, "last": -1}
    >>> rows = pd.DataFrame([row, row | {"first": 0, "last": 3}]).assign(shift=1.0, discrimination=0.5)
    >>> [label.get_text() for label in cuts(rows).child_axes[0].get_yticklabels()]
    ['nothing cut', 'layers 0–3']

    Args:
        points: `cuts.csv`, of one attack.
        ax: where to draw; it only lends its place to the panels.
    """
    of = looks(one_attack(points)["defense"])
    spans = list(dict.fromkeys(zip(points["first"].astype(int), points["last"].astype(int), strict=True)))
    readers = [name for name in READERS if (points["reader"] == name).any()]
    count = len(of) * len(readers)
    tall = min(max(_DOT * count + _AIR, 0.22), max(_MOST / len(spans), 0.16))
    with rc_context(STYLE):
        ax, (row,) = stacked(ax, [max(tall * len(spans), 0.7)], [])
        headed(row, CONTRASTS.values())
        for column, (name, panel) in enumerate(zip(CONTRASTS, row, strict=True)):
            for place in range(1, len(spans)):
                panel.axhline(0.5 - place, color="#E0E0E0", linewidth=0.6, zorder=0.5)
            for number, (defense, look) in enumerate(of.items()):
                for side, reader in enumerate(readers):
                    here = points[(points["defense"] == defense) & (points["reader"] == reader)]
                    rank = (number * len(readers) + side - (count - 1) / 2) / count * (1 - _AIR / tall / 2)
                    at = [
                        -spans.index((int(first), int(last))) - rank
                        for first, last in zip(here["first"], here["last"], strict=True)
                    ]
                    dots(panel, here, name, at, look, f"{defense} {reader}", reader == "everything")
            in_rows(panel, [_span(*span) for span in spans], "nats left", written=column == 0)
        key = [
            Line2D(
                [], [], color=color, marker=mark, linestyle="", markersize=4.5, label=fit(name, 140, WRITTEN)
            )
            for name, (color, _, mark) in of.items()
        ]
        for reader in readers:
            fill = "white" if reader == "everything" else DARK
            label = f"cut from: {READERS[reader]}"
            key.append(
                Line2D([], [], color=DARK, marker="o", mfc=fill, linestyle="", markersize=4.5, label=label)
            )
        beside(ax, key)
    return ax


def _span(first: int, last: int) -> str:
    if first < 0:
        return "nothing cut"
    return f"layer {first}" if first == last else f"layers {first}\N{EN DASH}{last}"
