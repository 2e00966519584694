"""Which heads and MLPs write a defense's effect: a heat map of all of them, of both contrasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize

from analysis.curves import one_attack
from analysis.lettering import blank, inset
from analysis.palette import BLACK, BLUE, GREY, STYLE, VERMILION, WRITTEN
from analysis.panels import CONTRASTS, estimates, headed, numbers

SHADES = LinearSegmentedColormap.from_list("effect", (VERMILION, "white", BLUE))
NONE = "#E4E4E4"  # told from the white of no effect
DOTTED = 0.1  # inches: the least cell that has room for a dot
_BESIDE = {"mlp": "MLP", "bias": "bias", "added": "added"}  # kinds with one part in a layer
_GAP = 0.55  # inches between the panels


def part_cells(parts: pd.DataFrame) -> pd.DataFrame:
    """Return the parts that stand in a layer: all but the embedding and the final bias.

    >>> part_cells(pd.DataFrame({"layer": [None, 0], "kind": ["embedding", "mlp"]}))["kind"].tolist()
    ['mlp']
    """
    return parts[numbers(parts["layer"]).notna()].reset_index(drop=True)


def limit(values: Any) -> float:
    """Return the value of the darkest color: the largest, unless a few are far beyond all others.

    >>> limit([0.5, -1.0]), limit([0.0, float("nan")])
    (1.0, 1.0)
    """
    sizes = np.abs(np.asarray(values, dtype=float).ravel())
    sizes = sizes[np.isfinite(sizes)]
    most = float(sizes.max()) if len(sizes) else 0.0
    usual = float(np.quantile(sizes, 0.98)) if len(sizes) else 0.0
    return (usual if most > 3 * usual > 0 else most) or 1.0


def cell_size(layers: int, heads: int) -> tuple[float, float]:
    """Return width and height of a cell, inches."""
    return float(np.clip(2.6 / heads, 0.04, 0.28)), float(np.clip(3.2 / layers, 0.05, 0.22))


def heads(cells: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw what every head writes, a row per layer, and beside them what other parts of the layer write.

    >>> row = {"attack": "direct", "defense": "a", "layer": 0, "kind": "head", "head": 0, "shift": -1.0}
    >>> ax = heads(pd.DataFrame([row | {"discrimination": 0.5}]))
    >>> ax.child_axes[0].collections[0].get_array().tolist()
    [[-1.0]]

    Args:
        cells: what `part_cells` returned, of one attack and defense.
        ax: where to draw; it only lends its place to the panels.
    """
    layer, head = (numbers(one_attack(cells)[name]).fillna(-1).astype(int) for name in ("layer", "head"))
    single = cells["kind"] == "head"
    down, across = int(layer.max()) + 1, int(head[single].max()) + 1 if single.any() else 0
    more = [kind for kind in _BESIDE if (cells["kind"] == kind).any()]
    wide, tall = cell_size(down, max(across, 1))
    broad = max(wide, 0.16) / wide  # a column beside the heads, in heads
    edges = [across + 0.08 / wide + number * (broad + 0.03 / wide) for number in range(len(more))]
    whole = ((edges[-1] + broad) if more else across) * wide, max(down * tall, 0.7)
    most = limit(cells[[*CONTRASTS]])
    with rc_context(STYLE):
        size = max(whole[0], 1.6) + _GAP
        host = ax or blank(2 * size - _GAP, whole[1])
        host.set_axis_off()
        area = 2 * size - _GAP, whole[1]
        panels = [inset(host, area, (number * size, 0, *whole)) for number in range(2)]
        headed(panels, CONTRASTS.values())
        for name, panel in zip(CONTRASTS, panels, strict=True):
            values = np.full((down, across + len(more)), np.nan)
            sure = np.zeros(values.shape, dtype=bool)
            columns = [
                at if kind == "head" else across + more.index(kind)
                for at, kind in zip(head, cells["kind"], strict=True)
            ]
            found = estimates(cells, name)
            values[layer, columns] = found[:, 0]
            sure[layer, columns] = (found[:, 1] > 0) | (found[:, 2] < 0)
            centers = [*(np.arange(across) + 0.5), *(edge + broad / 2 for edge in edges)]
            if across:
                _mesh(panel, np.arange(across + 1.0), values[:, :across], most, "heads")
            for number, edge in enumerate(edges):
                part = values[:, [across + number]]
                _mesh(panel, np.array([edge, edge + broad]), part, most, more[number])
            if min(wide, tall) >= DOTTED:
                y, x = np.nonzero(sure)
                at = np.array(centers)[x] if len(x) else x
                panel.scatter(at, y + 0.5, s=3, color=BLACK, linewidths=0, zorder=3, gid="sure")
            panel.set_xlim(0, whole[0] / wide)
            _axes(panel, down, across, (wide, tall), dict(zip(more, centers[across:], strict=True)))
        panels[0].set_ylabel("layer", fontsize=8)
        high = min(whole[1], 1.5)
        bar = inset(host, area, (size + whole[0] + 0.2, whole[1] - high, 0.11, high))
        scale(bar, most, _in_nats(most, bool((cells[[*CONTRASTS]].abs() > most).any(axis=None))))
    return host


def scale(ax: Axes, most: float, words: Sequence[str]) -> None:
    """Draw the colors from the bottom up, with words at the lowest, the middle and the highest."""
    edges = np.linspace(-most, most, 65)
    shades = ((edges[1:] + edges[:-1]) / 2)[:, None]
    ax.pcolormesh([0, 1], edges, shades, cmap=SHADES, norm=Normalize(-most, most))
    ax.set_gid("scale")
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.set_yticks([-most, 0, most], words, fontsize=WRITTEN - 0.5)
    ax.tick_params(axis="y", length=2)
    for spine in ax.spines.values():
        spine.set(visible=True, linewidth=0.5, color=GREY)


def _in_nats(most: float, beyond: bool) -> list[str]:
    digits = max(0, 1 - int(np.floor(np.log10(most))))
    signs = ("\N{LESS-THAN OR EQUAL TO}", "", "\N{GREATER-THAN OR EQUAL TO}") if beyond else ("",) * 3
    numbers = (f"\N{MINUS SIGN}{most:.{digits}f}", "0", f"+{most:.{digits}f}")
    return [f"{sign}{number} nats" for sign, number in zip(signs, numbers, strict=True)]


def every(count: int, cell: float, room: float) -> Sequence[int]:
    """Return which of many places have room for their numbers.

    >>> list(every(64, 0.04, 0.2))[:3]
    [0, 5, 10]
    """
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128) if step * cell >= room)
    return range(0, count, step)


def _mesh(ax: Axes, across: Any, values: Any, most: float, gid: str) -> None:
    look: Any = {"cmap": SHADES.with_extremes(bad=NONE), "norm": Normalize(-most, most), "gid": gid}
    edge: Any = {"edgecolors": "#DDDDDD", "linewidth": 0.3} if values.size <= 400 else {"rasterized": True}
    ax.pcolormesh(across, np.arange(len(values) + 1.0), np.ma.masked_invalid(values), **look, **edge)


def _axes(ax: Axes, down: int, across: int, cell: tuple[float, float], beside: dict[str, float]) -> None:
    ax.set_ylim(down, 0)
    told = [*every(across, cell[0], 0.2)]
    ax.set_xticks([place + 0.5 for place in told], [str(place) for place in told])
    for kind, center in beside.items():
        spot: Any = {"rotation": 90, "ha": "center", "va": "top", "fontsize": WRITTEN - 0.5, "gid": "beside"}
        across_down: Any = {"xytext": (0, -4), "textcoords": "offset points", "annotation_clip": False}
        ax.annotate(_BESIDE[kind], (center, down), **across_down, **spot)
    rows = every(down, cell[1], 0.15)
    ax.set_yticks([place + 0.5 for place in rows], [str(place) for place in rows])
    ax.tick_params(length=2, labelsize=WRITTEN - 0.5)
    ax.spines[["left", "bottom"]].set_visible(False)
    if across:
        ax.set_xlabel("head", fontsize=8, x=across / 2 / ax.get_xlim()[1])
