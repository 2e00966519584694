"""What the figures of where a defense acts are built of: panels beside each other, curves, rows of dots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.curves import ENDS
from analysis.lettering import blank, fit, inset
from analysis.palette import BLACK, GREY, LINES, VIOLET, WRITTEN

CONTRASTS = {"shift": "shift (nats)", "discrimination": "discrimination (nats)"}
LOOKS = (*LINES, (BLACK, "-", "o"), (VIOLET, (0, (4, 1, 1, 1)), "h"))
REST = (GREY, "-", ".")  # whatever comes behind the last look
_ASIDE = 0.5  # inches between two panels of a row


def stacked(
    ax: Axes | None, heights: Sequence[float], gaps: Sequence[float], columns: int = 2, wide: float = 2.3
) -> tuple[Axes, list[list[Axes]]]:
    """Return axes that only lend their place, and rows of panels inside of them, from the top.

    >>> host, rows = stacked(None, [1.5, 0.5], [0.25])
    >>> [len(row) for row in rows], len(host.child_axes)
    ([2, 2], 4)

    Args:
        ax: the axes that lend their place; by default new ones.
        heights: of each row, inches.
        gaps: between two rows, inches.
        columns: panels of a row.
        wide: a panel, inches.
    """
    whole = columns * (wide + _ASIDE) - _ASIDE, sum(heights) + sum(gaps)
    ax = ax or blank(*whole)
    ax.set_axis_off()
    rows, below = [], whole[1]
    for height, gap in zip(heights, [*gaps, 0.0], strict=True):
        below -= height
        boxes = [(column * (wide + _ASIDE), below, wide, height) for column in range(columns)]
        rows.append([inset(ax, whole, box) for box in boxes])
        below -= gap
    for panel in ax.child_axes:
        panel.tick_params(labelsize=WRITTEN - 0.5)
    return ax, rows


def headed(row: Sequence[Axes], heads: Iterable[str]) -> None:
    """Write what each panel of a row shows above it."""
    for panel, words in zip(row, heads, strict=True):
        panel.set_title(words, loc="left", fontsize=8, weight="bold")


def looks(names: Iterable[str]) -> dict[str, tuple[str, Any, str]]:
    """Return color, dash and mark of each name, in the order in which they come; past eight all are grey.

    >>> looks(["a", "b", "a"])["b"][2]
    'D'
    """
    found = list(dict.fromkeys(names))
    return {name: LOOKS[place] if place < len(LOOKS) else REST for place, name in enumerate(found)}


def key(of: Mapping[str, tuple[str, Any, str]], words: Mapping[str, str] | None = None) -> list[Line2D]:
    """Return the entries of a key of lines."""
    return [
        Line2D([], [], color=color, linestyle=dash, label=(words or {}).get(name, fit(name, 140, WRITTEN)))
        for name, (color, dash, _) in of.items()
    ]


def estimates(rows: pd.DataFrame, column: str) -> Float[np.ndarray, "n 3"]:
    """Return an estimate with the ends of its interval, missing where there are none."""
    return rows.reindex(columns=[f"{column}{end}" for end in ENDS]).to_numpy(float, na_value=np.nan)


def numbers(column: pd.Series) -> pd.Series:
    """Return layers or heads as numbers, missing where a part has none."""
    return pd.to_numeric(column, errors="coerce").astype(float)


def curve(
    ax: Axes, rows: pd.DataFrame, column: str, look: tuple[str, Any, str], gid: str, lines: int = 1
) -> None:
    """Draw an estimate over the layers as a line in its band, which is fainter where there are many lines.

    >>> ax = blank(1, 1)
    >>> curve(ax, pd.DataFrame({"layer": [1, 0], "shift": [2.0, 1.0]}), "shift", LOOKS[0], "a")
    >>> ax.lines[1].get_xydata().tolist()
    [[0.0, 1.0], [1.0, 2.0]]
    """
    if not ax.lines:
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1, gid="no effect")
    color, dash, mark = look
    layer = numbers(rows["layer"]).to_numpy()
    order = np.argsort(layer, kind="stable")
    value, low, high = estimates(rows, column)[order].T
    ax.fill_between(
        layer[order],
        low,
        high,
        color=color,
        alpha=0.16 if lines < 5 else 0.07,
        linewidth=0,
        zorder=2,
        gid=f"{gid} band",
    )
    known = np.isfinite(low) & np.isfinite(high)
    beside = np.pad(known, 1)
    alone = known & ~beside[:-2] & ~beside[2:]  # a band needs two layers
    ax.vlines(layer[order][alone], low[alone], high[alone], color=color, alpha=0.4, linewidth=1.2, zorder=2)
    small: Any = {"marker": mark, "markersize": 3} if len(rows) <= 12 else {}
    ax.plot(layer[order], value, color=color, linestyle=dash, linewidth=1.2, zorder=3, gid=gid, **small)


def over_layers(ax: Axes, last: float, words: str = "", first: float = 0.0) -> None:
    """Set the axes of something over the layers, whole numbers below."""
    room = 0.03 * (last - first) or 0.5
    ax.set_xlim(first - room, last + room)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.set_xlabel(words, fontsize=8)


def dots(
    ax: Axes,
    rows: pd.DataFrame,
    column: str,
    at: Sequence[float],
    look: tuple[str, Any, str],
    gid: str,
    hollow: bool = False,
) -> None:
    """Draw an estimate of each row as a dot with its interval, at a height of its own."""
    color, _, mark = look
    value, low, high = estimates(rows, column).T
    ax.hlines(at, low, high, color=color, linewidth=1.0, alpha=0.6, zorder=2)
    fill: Any = {"markerfacecolor": "white" if hollow else color, "markeredgewidth": 0.8}
    ax.plot(value, at, linestyle="", marker=mark, color=color, markersize=4, zorder=3, gid=gid, **fill)


def in_rows(ax: Axes, names: Sequence[str], words: str = "", written: bool = True) -> None:
    """Set the axes of rows of dots: a line at no effect, a name per row, the first at the top."""
    ax.axvline(0, color=GREY, linewidth=0.6, zorder=1)
    ax.set_ylim(0.5 - len(names), 0.5)
    shown = [fit(name, 110, WRITTEN, 1) if written else "" for name in names]
    ax.set_yticks(range(0, -len(names), -1), shown, fontsize=WRITTEN)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.set_xlabel(words, fontsize=8)
