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

from analysis.curves import INTERVAL_SUFFIXES
from analysis.lettering import make_axes, fit_text, add_inset_axes
from analysis.palette import BLACK, GREY, LINE_STYLES, VIOLET, TEXT_SIZE

CONTRAST_LABELS = {"shift": "shift (nats)", "discrimination": "discrimination (nats)"}
CURVE_STYLES = (*LINE_STYLES, (BLACK, "-", "o"), (VIOLET, (0, (4, 1, 1, 1)), "h"))
REMAINING_STYLE = (GREY, "-", ".")  # whatever comes behind the last look
_PANEL_GAP = 0.5  # inches between two panels of a row


def stack_panels(
    ax: Axes | None, heights: Sequence[float], gaps: Sequence[float], columns: int = 2, panel_width: float = 2.3
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
        panel_width: a panel, inches.
    """
    whole = columns * (panel_width + _PANEL_GAP) - _PANEL_GAP, sum(heights) + sum(gaps)
    ax = ax or make_axes(*whole)
    ax.set_axis_off()
    rows, below = [], whole[1]
    for height, gap in zip(heights, [*gaps, 0.0], strict=True):
        below -= height
        boxes = [(column * (panel_width + _PANEL_GAP), below, panel_width, height) for column in range(columns)]
        rows.append([add_inset_axes(ax, whole, box) for box in boxes])
        below -= gap
    for panel in ax.child_axes:
        panel.tick_params(labelsize=TEXT_SIZE - 0.5)
    return ax, rows


def set_panel_titles(panels: Sequence[Axes], titles: Iterable[str]) -> None:
    """Write what each panel of a row shows above it."""
    for panel, words in zip(panels, titles, strict=True):
        panel.set_title(words, loc="left", fontsize=8, weight="bold")


def assign_curve_styles(names: Iterable[str]) -> dict[str, tuple[str, Any, str]]:
    """Return color, dash and mark of each name, in the order in which they come; past eight all are grey.

    >>> looks(["a", "b", "a"])["b"][2]
    'D'
    """
    found = list(dict.fromkeys(names))
    return {name: CURVE_STYLES[place] if place < len(CURVE_STYLES) else REMAINING_STYLE for place, name in enumerate(found)}


def make_line_legend(styles: Mapping[str, tuple[str, Any, str]], labels: Mapping[str, str] | None = None) -> list[Line2D]:
    """Return the entries of a key of lines."""
    return [
        Line2D([], [], color=color, linestyle=dash, label=(labels or {}).get(name, fit_text(name, 140, TEXT_SIZE)))
        for name, (color, dash, _) in styles.items()
    ]


def extract_estimates(rows: pd.DataFrame, column: str) -> Float[np.ndarray, "n 3"]:
    """Return an estimate with the ends of its interval, missing where there are none."""
    return rows.reindex(columns=[f"{column}{end}" for end in INTERVAL_SUFFIXES]).to_numpy(float, na_value=np.nan)


def to_numbers(column: pd.Series) -> pd.Series:
    """Return layers or heads as numbers, missing where a part has none."""
    return pd.to_numeric(column, errors="coerce").astype(float)


def draw_curve(
    ax: Axes, rows: pd.DataFrame, column: str, style: tuple[str, Any, str], gid: str, n_lines: int = 1
) -> None:
    """Draw an estimate over the layers as a line in its band, which is fainter where there are many lines.

    >>> ax = blank(1, 1)
    >>> curve(ax, pd.DataFrame({"layer": [1, 0], "shift": [2.0, 1.0]}), "shift", LOOKS[0], "a")
    >>> ax.lines[1].get_xydata().tolist()
    [[0.0, 1.0], [1.0, 2.0]]
    """
    if not ax.lines:
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1, gid="no effect")
    color, dash, mark = style
    layer = to_numbers(rows["layer"]).to_numpy()
    order = np.argsort(layer, kind="stable")
    value, low, high = extract_estimates(rows, column)[order].T
    ax.fill_between(
        layer[order],
        low,
        high,
        color=color,
        alpha=0.16 if n_lines < 5 else 0.07,
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


def set_layer_axis(ax: Axes, last_layer: float, x_label: str = "", first_layer: float = 0.0) -> None:
    """Set the axes of something over the layers, whole numbers below."""
    room = 0.03 * (last_layer - first_layer) or 0.5
    ax.set_xlim(first_layer - room, last_layer + room)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.set_xlabel(x_label, fontsize=8)


def draw_dots(
    ax: Axes,
    rows: pd.DataFrame,
    column: str,
    heights: Sequence[float],
    style: tuple[str, Any, str],
    gid: str,
    hollow: bool = False,
) -> None:
    """Draw an estimate of each row as a dot with its interval, at a height of its own."""
    color, _, mark = style
    value, low, high = extract_estimates(rows, column).T
    ax.hlines(heights, low, high, color=color, linewidth=1.0, alpha=0.6, zorder=2)
    fill: Any = {"markerfacecolor": "white" if hollow else color, "markeredgewidth": 0.8}
    ax.plot(value, heights, linestyle="", marker=mark, color=color, markersize=4, zorder=3, gid=gid, **fill)


def set_row_axis(ax: Axes, names: Sequence[str], x_label: str = "", with_names: bool = True) -> None:
    """Set the axes of rows of dots: a line at no effect, a name per row, the first at the top."""
    ax.axvline(0, color=GREY, linewidth=0.6, zorder=1)
    ax.set_ylim(0.5 - len(names), 0.5)
    shown = [fit_text(name, 110, TEXT_SIZE, 1) if with_names else "" for name in names]
    ax.set_yticks(range(0, -len(names), -1), shown, fontsize=TEXT_SIZE)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.set_xlabel(x_label, fontsize=8)
