"""Which heads and MLPs write a defense's effect: a heat map of all of them, of both contrasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from analysis.plots.captions import (
    CONTRASTS_SENTENCE,
    CaptionContext,
    format_interval_note,
    format_query_counts,
    format_run_sentences,
    format_signed_nats,
    keep_if_intervals,
)
from analysis.plots.data import CONTRAST_LABELS, check_one_attack, to_numbers
from analysis.plots.layout import (
    EFFECT_COLORS,
    MISSING_COLOR,
    add_inset_axes,
    draw_color_scale,
    draw_dots,
    extract_estimates,
    make_axes,
    set_panel_titles,
    set_row_axis,
    stack_panels,
)
from analysis.plots.style import BLACK, RC_PARAMS, TEXT_SIZE

if TYPE_CHECKING:
    from analysis.plots.captions import QueryCounts

MIN_DOTTED_CELL = 0.1  # inches: the least cell that has room for a dot
_LAYER_PART_LABELS = {"mlp": "MLP", "bias": "bias", "added": "added"}  # kinds with one part in a layer
_HEAD_PANEL_GAP = 0.55  # inches between the panels


def find_color_limit(values: Any) -> float:
    """Return the value of the darkest color: the largest, unless a few are far beyond all others.

    >>> find_color_limit([0.5, -1.0]), find_color_limit([0.0, float("nan")])
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
    >>> ax = draw_part_map(pd.DataFrame([row | {"discrimination": 0.5}]))
    >>> ax.child_axes[0].collections[0].get_array().tolist()
    [[-1.0]]

    Args:
        cells: what `part_cells` returned, of one attack and defense.
        ax: where to draw; it only lends its place to the panels.
    """
    layer, head = (
        to_numbers(check_one_attack(cells)[name]).fillna(-1).astype(int) for name in ("layer", "head")
    )
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
            _set_part_map_axes(
                panel, down, across, (wide, tall), dict(zip(more, centers[across:], strict=True))
            )
        panels[0].set_ylabel("layer", fontsize=8)
        high = min(whole[1], 1.5)
        bar = add_inset_axes(host, area, (size + whole[0] + 0.2, whole[1] - high, 0.11, high))
        draw_color_scale(
            bar, most, _nats_scale_labels(most, bool((cells[[*CONTRAST_LABELS]].abs() > most).any(axis=None)))
        )
    return host


def _nats_scale_labels(max_value: float, is_clipped: bool) -> list[str]:
    digits = max(0, 1 - int(np.floor(np.log10(max_value))))
    signs = ("\N{LESS-THAN OR EQUAL TO}", "", "\N{GREATER-THAN OR EQUAL TO}") if is_clipped else ("",) * 3
    numbers = (f"\N{MINUS SIGN}{max_value:.{digits}f}", "0", f"+{max_value:.{digits}f}")
    return [f"{sign}{number} nats" for sign, number in zip(signs, numbers, strict=True)]


def choose_tick_places(count: int, cell_length: float, min_length: float) -> Sequence[int]:
    """Return which of many places have room for their numbers.

    >>> list(choose_tick_places(64, 0.04, 0.2))[:3]
    [0, 5, 10]
    """
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128) if step * cell_length >= min_length)
    return range(0, count, step)


def _draw_mesh(ax: Axes, column_edges: Any, values: Any, max_value: float, gid: str) -> None:
    look: Any = {
        "cmap": EFFECT_COLORS.with_extremes(bad=MISSING_COLOR),
        "norm": Normalize(-max_value, max_value),
        "gid": gid,
    }
    edge: Any = {"edgecolors": "#DDDDDD", "linewidth": 0.3} if values.size <= 400 else {"rasterized": True}
    ax.pcolormesh(column_edges, np.arange(len(values) + 1.0), np.ma.masked_invalid(values), **look, **edge)


def _set_part_map_axes(
    ax: Axes, n_layers: int, n_heads: int, cell_shape: tuple[float, float], part_centers: dict[str, float]
) -> None:
    ax.set_ylim(n_layers, 0)
    told = [*choose_tick_places(n_heads, cell_shape[0], 0.2)]
    ax.set_xticks([place + 0.5 for place in told], [str(place) for place in told])
    for kind, center in part_centers.items():
        spot: Any = {
            "rotation": 90,
            "ha": "center",
            "va": "top",
            "fontsize": TEXT_SIZE - 0.5,
            "gid": "beside",
        }
        across_down: Any = {"xytext": (0, -4), "textcoords": "offset points", "annotation_clip": False}
        ax.annotate(_LAYER_PART_LABELS[kind], (center, n_layers), **across_down, **spot)
    rows = choose_tick_places(n_layers, cell_shape[1], 0.15)
    ax.set_yticks([place + 0.5 for place in rows], [str(place) for place in rows])
    ax.tick_params(length=2, labelsize=TEXT_SIZE - 0.5)
    ax.spines[["left", "bottom"]].set_visible(False)
    if n_heads:
        ax.set_xlabel("head", fontsize=8, x=n_heads / 2 / ax.get_xlim()[1])


_PART_KIND_LABELS = {"mlp": "MLP", "embedding": "embedding", "bias": "bias", "head": "head", "added": "added"}


def draw_top_parts(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the parts with the largest effects, a row each, both contrasts beside each other.

    >>> row = {"attack": "direct", "defense": "a", "layer": 3, "kind": "head", "head": 1, "shift": -1.0}
    >>> ax = draw_top_parts(pd.DataFrame([row | {"discrimination": 0.5}]))
    >>> ax.child_axes[0].get_yticklabels()[0].get_text()
    'head 3.1'

    Args:
        points: what `top_parts` returned, of one attack and defense.
        ax: where to draw; it only lends its place to the panels.
    """
    layer, head = (to_numbers(check_one_attack(points)[name]) for name in ("layer", "head"))
    names = [format_part_name(*row) for row in zip(points["kind"], layer, head, strict=True)]
    with rc_context(RC_PARAMS):
        ax, (row,) = stack_panels(ax, [max(0.2 * len(names), 0.7)], [])
        set_panel_titles(row, CONTRAST_LABELS.values())
        for place, (name, panel) in enumerate(zip(CONTRAST_LABELS, row, strict=True)):
            draw_dots(
                panel, points, name, [-float(place) for place in range(len(names))], (BLACK, "-", "o"), name
            )
            set_row_axis(panel, names, "nats", with_names=place == 0)
    return ax


def format_part_name(kind: str, layer: float, head: float) -> str:
    """Return the name of a part, layer before head.

    >>> format_part_name("head", 3.0, 1.0), format_part_name("bias", float("nan"), float("nan")), format_part_name("bias", 2.0, float("nan"))
    ('head 3.1', 'final bias', 'bias 2')
    """
    if layer != layer:
        return "final bias" if kind == "bias" else _PART_KIND_LABELS.get(kind, kind)
    return f"{_PART_KIND_LABELS.get(kind, kind)} {layer:.0f}" + (f".{head:.0f}" if head == head else "")


def caption_part_map(cells: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `heads.heads` draws from these cells."""
    most = find_color_limit(cells[[*CONTRAST_LABELS]])
    beyond = int((cells[[*CONTRAST_LABELS]].abs() > most).any(axis=1).sum())
    cut = f"{beyond} parts beyond the ends of the scale have its end colors. " if beyond > 1 else ""
    cut = "One part beyond the ends of the scale has its end color. " if beyond == 1 else cut
    across = int(to_numbers(cells["head"]).max()) + 1 if cells["head"].notna().any() else 1
    room = min(choose_cell_size(int(to_numbers(cells["layer"]).max()) + 1, across)) >= MIN_DOTTED_CELL
    dot = "Dot: the 95\u00a0% interval excludes 0. " if room else "Intervals are in the table. "
    dot = keep_if_intervals(cells, dot)
    many = across + len({"mlp", "bias", "added"} & set(cells["kind"]))
    holes = len(cells) < many * (int(to_numbers(cells["layer"]).max()) + 1) or cells["shift"].isna().any()
    grey = "Grey: no such part. " * bool(holes)
    return (
        f"Direct logit attribution {format_query_counts(cells, counts)}: what each part of the model writes of the "
        f"change of the margin. {CONTRASTS_SENTENCE}Blue adds to it, orange takes from it; one scale for both "
        f"panels. {cut}{dot}{grey}The embedding and the final bias, which stand in no layer, are left "
        "out. "
        f"{format_run_sentences(cells, context)}"
    )


def caption_top_parts(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `parts.top` draws from these points."""
    total = points["n_parts"].iloc[0]
    sums = " and ".join(
        f"{format_signed_nats(points[name].sum())} of {format_signed_nats(points[f'total_{name}'].iloc[0])}\u00a0nats of {name}"
        for name in CONTRAST_LABELS
    )
    return (
        f"Direct logit attribution {format_query_counts(points, counts)}: the {len(points)} of {total} parts "
        "with the largest effect on either contrast (head layer.head); together they write "
        f"{sums}. {CONTRASTS_SENTENCE}{format_interval_note(points, 'Bars')}The parts were chosen by these numbers, so that the "
        f"largest look larger than they are. {format_run_sentences(points, context)}"
    )
