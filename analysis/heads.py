"""Which heads and MLPs write a defense's effect: a heat map of all of them, of both contrasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize

from analysis.curves import check_one_attack
from analysis.lettering import make_axes, add_inset_axes
from analysis.palette import BLACK, BLUE, GREY, RC_PARAMS, VERMILION, TEXT_SIZE
from analysis.panels import CONTRAST_LABELS, extract_estimates, set_panel_titles, to_numbers

EFFECT_COLORS = LinearSegmentedColormap.from_list("effect", (VERMILION, "white", BLUE))
MISSING_COLOR = "#E4E4E4"  # told from the white of no effect
MIN_DOTTED_CELL = 0.1  # inches: the least cell that has room for a dot
_LAYER_PART_LABELS = {"mlp": "MLP", "bias": "bias", "added": "added"}  # kinds with one part in a layer
_HEAD_PANEL_GAP = 0.55  # inches between the panels


def build_part_cells(parts: pd.DataFrame) -> pd.DataFrame:
    """Return the parts that stand in a layer: all but the embedding and the final bias.

    >>> part_cells(pd.DataFrame({"layer": [None, 0], "kind": ["embedding", "mlp"]}))["kind"].tolist()
    ['mlp']
    """
    return parts[to_numbers(parts["layer"]).notna()].reset_index(drop=True)


def find_color_limit(values: Any) -> float:
    """Return the value of the darkest color: the largest, unless a few are far beyond all others.

    >>> limit([0.5, -1.0]), limit([0.0, float("nan")])
    (1.0, 1.0)
    """
    sizes = np.abs(np.asarray(values, dtype=float).ravel())
    sizes = sizes[np.isfinite(sizes)]
    most = float(sizes.max()) if len(sizes) else 0.0
    usual = float(np.quantile(sizes, 0.98)) if len(sizes) else 0.0
    return (usual if most > 3 * usual > 0 else most) or 1.0


def choose_cell_size(n_layers: int, n_heads: int) -> tuple[float, float]:
    """Return width and height of a cell, inches."""
    return float(np.clip(2.6 / n_heads, 0.04, 0.28)), float(np.clip(3.2 / n_layers, 0.05, 0.22))


def draw_part_map(cells: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw what every head writes, a row per layer, and beside them what other parts of the layer write.

    >>> row = {"attack": "direct", "defense": "a", "layer": 0, "kind": "head", "head": 0, "shift": -1.0}
    >>> ax = heads(pd.DataFrame([row | {"discrimination": 0.5}]))
    >>> ax.child_axes[0].collections[0].get_array().tolist()
    [[-1.0]]

    Args:
        cells: what `part_cells` returned, of one attack and defense.
        ax: where to draw; it only lends its place to the panels.
    """
    layer, head = (to_numbers(check_one_attack(cells)[name]).fillna(-1).astype(int) for name in ("layer", "head"))
    single = cells["kind"] == "head"
    down, across = int(layer.max()) + 1, int(head[single].max()) + 1 if single.any() else 0
    more = [kind for kind in _LAYER_PART_LABELS if (cells["kind"] == kind).any()]
    wide, tall = choose_cell_size(down, max(across, 1))
    broad = max(wide, 0.16) / wide  # a column beside the heads, in heads
    edges = [across + 0.08 / wide + number * (broad + 0.03 / wide) for number in range(len(more))]
    whole = ((edges[-1] + broad) if more else across) * wide, max(down * tall, 0.7)
    most = find_color_limit(cells[[*CONTRAST_LABELS]])
    with rc_context(RC_PARAMS):
        size = max(whole[0], 1.6) + _HEAD_PANEL_GAP
        host = ax or make_axes(2 * size - _HEAD_PANEL_GAP, whole[1])
        host.set_axis_off()
        area = 2 * size - _HEAD_PANEL_GAP, whole[1]
        panels = [add_inset_axes(host, area, (number * size, 0, *whole)) for number in range(2)]
        set_panel_titles(panels, CONTRAST_LABELS.values())
        for name, panel in zip(CONTRAST_LABELS, panels, strict=True):
            values = np.full((down, across + len(more)), np.nan)
            sure = np.zeros(values.shape, dtype=bool)
            columns = [
                at if kind == "head" else across + more.index(kind)
                for at, kind in zip(head, cells["kind"], strict=True)
            ]
            found = extract_estimates(cells, name)
            values[layer, columns] = found[:, 0]
            sure[layer, columns] = (found[:, 1] > 0) | (found[:, 2] < 0)
            centers = [*(np.arange(across) + 0.5), *(edge + broad / 2 for edge in edges)]
            if across:
                _draw_mesh(panel, np.arange(across + 1.0), values[:, :across], most, "heads")
            for number, edge in enumerate(edges):
                part = values[:, [across + number]]
                _draw_mesh(panel, np.array([edge, edge + broad]), part, most, more[number])
            if min(wide, tall) >= MIN_DOTTED_CELL:
                y, x = np.nonzero(sure)
                at = np.array(centers)[x] if len(x) else x
                panel.scatter(at, y + 0.5, s=3, color=BLACK, linewidths=0, zorder=3, gid="sure")
            panel.set_xlim(0, whole[0] / wide)
            _set_part_map_axes(panel, down, across, (wide, tall), dict(zip(more, centers[across:], strict=True)))
        panels[0].set_ylabel("layer", fontsize=8)
        high = min(whole[1], 1.5)
        bar = add_inset_axes(host, area, (size + whole[0] + 0.2, whole[1] - high, 0.11, high))
        draw_color_scale(bar, most, _nats_scale_labels(most, bool((cells[[*CONTRAST_LABELS]].abs() > most).any(axis=None))))
    return host


def draw_color_scale(ax: Axes, max_value: float, labels: Sequence[str]) -> None:
    """Draw the colors from the bottom up, with words at the lowest, the middle and the highest."""
    edges = np.linspace(-max_value, max_value, 65)
    shades = ((edges[1:] + edges[:-1]) / 2)[:, None]
    ax.pcolormesh([0, 1], edges, shades, cmap=EFFECT_COLORS, norm=Normalize(-max_value, max_value))
    ax.set_gid("scale")
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.set_yticks([-max_value, 0, max_value], labels, fontsize=TEXT_SIZE - 0.5)
    ax.tick_params(axis="y", length=2)
    for spine in ax.spines.values():
        spine.set(visible=True, linewidth=0.5, color=GREY)


def _nats_scale_labels(max_value: float, is_clipped: bool) -> list[str]:
    digits = max(0, 1 - int(np.floor(np.log10(max_value))))
    signs = ("\N{LESS-THAN OR EQUAL TO}", "", "\N{GREATER-THAN OR EQUAL TO}") if is_clipped else ("",) * 3
    numbers = (f"\N{MINUS SIGN}{max_value:.{digits}f}", "0", f"+{max_value:.{digits}f}")
    return [f"{sign}{number} nats" for sign, number in zip(signs, numbers, strict=True)]


def choose_tick_places(count: int, cell_length: float, min_length: float) -> Sequence[int]:
    """Return which of many places have room for their numbers.

    >>> list(every(64, 0.04, 0.2))[:3]
    [0, 5, 10]
    """
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128) if step * cell_length >= min_length)
    return range(0, count, step)


def _draw_mesh(ax: Axes, column_edges: Any, values: Any, max_value: float, gid: str) -> None:
    look: Any = {"cmap": EFFECT_COLORS.with_extremes(bad=MISSING_COLOR), "norm": Normalize(-max_value, max_value), "gid": gid}
    edge: Any = {"edgecolors": "#DDDDDD", "linewidth": 0.3} if values.size <= 400 else {"rasterized": True}
    ax.pcolormesh(column_edges, np.arange(len(values) + 1.0), np.ma.masked_invalid(values), **look, **edge)


def _set_part_map_axes(ax: Axes, n_layers: int, n_heads: int, cell_shape: tuple[float, float], part_centers: dict[str, float]) -> None:
    ax.set_ylim(n_layers, 0)
    told = [*choose_tick_places(n_heads, cell_shape[0], 0.2)]
    ax.set_xticks([place + 0.5 for place in told], [str(place) for place in told])
    for kind, center in part_centers.items():
        spot: Any = {"rotation": 90, "ha": "center", "va": "top", "fontsize": TEXT_SIZE - 0.5, "gid": "beside"}
        across_down: Any = {"xytext": (0, -4), "textcoords": "offset points", "annotation_clip": False}
        ax.annotate(_LAYER_PART_LABELS[kind], (center, n_layers), **across_down, **spot)
    rows = choose_tick_places(n_layers, cell_shape[1], 0.15)
    ax.set_yticks([place + 0.5 for place in rows], [str(place) for place in rows])
    ax.tick_params(length=2, labelsize=TEXT_SIZE - 0.5)
    ax.spines[["left", "bottom"]].set_visible(False)
    if n_heads:
        ax.set_xlabel("head", fontsize=8, x=n_heads / 2 / ax.get_xlim()[1])
