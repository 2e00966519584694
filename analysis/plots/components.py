"""Direct logit attribution by component: all heads and MLPs, and those with the largest effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, Normalize

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
from analysis.plots.heatmaps import draw_heatmap
from analysis.plots.layout import (
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
from analysis.stats.format import Interval
from analysis.stats.tables import READOUT_PART, READOUT_PART_MEANING, iterate_rows

MIN_DOTTED_CELL = 0.1  # inches: smallest cell that has room for a dot
_LAYER_PART_LABELS = {"mlp": "MLP", "bias": "bias", "added": "added"}  # kinds with one component per layer
_PART_KIND_LABELS = {
    "mlp": "MLP",
    "embedding": "embedding",
    "bias": "bias",
    "head": "head",
    "added": "added",
    READOUT_PART: "readout curvature",
}
_CONTRAST_GAP, _PART_COLUMN_GAP = 0.55, 0.08  # inches between the contrasts, and beside the heads
_MINUS = "\N{MINUS SIGN}"
_MAX_OUTLINED_CELLS = 400  # cells up to which each has an outline


def draw_part_map(cells: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the attribution to every head, a row per layer, and beside them to the layer's other components.

    >>> row = {"attack": "direct", "defense": "a", "layer": 0, "kind": "head", "head": 0, "shift": -1.0}
    >>> ax = draw_part_map(pd.DataFrame([row | {"discrimination": 0.5}]))
    >>> ax.child_axes[0].collections[0].get_array().tolist()
    [[-1.0]]

    Args:
        cells: table from `build_part_cells`, of one attack and one defense.
        ax: axes that the panels are placed in; by default new ones.
    """
    check_one_attack(cells)
    n_layers, n_heads, kinds = _measure_part_map(cells)
    cell_width, cell_height = choose_cell_size(n_layers, max(n_heads, 1))
    heads_width, height = n_heads * cell_width, max(n_layers * cell_height, 0.7)
    kinds_left = heads_width + (_PART_COLUMN_GAP if n_heads else 0.0)
    kind_width = max(cell_width, 0.16)
    width = kinds_left + kind_width * len(kinds) if kinds else heads_width
    step = max(width, 1.6) + _CONTRAST_GAP
    size = 2 * step - _CONTRAST_GAP, height
    limit = find_color_limit(cells)
    is_dotted = min(cell_width, cell_height) >= MIN_DOTTED_CELL
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(*size)
        ax.set_axis_off()
        for index, (contrast, title) in enumerate(CONTRAST_LABELS.items()):
            values, excludes_zero = _arrange_parts(cells, contrast, n_layers, n_heads, kinds)
            panels = []
            if n_heads:
                panel = add_inset_axes(ax, size, (index * step, 0, heads_width, height))
                _draw_parts(panel, values[:, :n_heads], excludes_zero[:, :n_heads], limit, "heads", is_dotted)
                heads = [*choose_tick_places(n_heads, cell_width, 0.2)]
                panel.set_xticks([head + 0.5 for head in heads], [str(head) for head in heads])
                panel.set_xlabel("head", fontsize=8)
                panels.append(panel)
            if kinds:
                box = index * step + kinds_left, 0, kind_width * len(kinds), height
                panel = add_inset_axes(ax, size, box)
                _draw_parts(panel, values[:, n_heads:], excludes_zero[:, n_heads:], limit, "parts", is_dotted)
                names = [_LAYER_PART_LABELS[kind] for kind in kinds]
                panel.set_xticks(np.arange(len(kinds)) + 0.5, names, rotation=90)
                panels.append(panel)
            for panel in panels:
                panel.tick_params(length=2, labelsize=TEXT_SIZE - 0.5)
            layers = choose_tick_places(n_layers, cell_height, 0.15)
            panels[0].set_yticks(
                [layer + 0.5 for layer in layers], [str(layer) for layer in layers], rotation=0
            )
            set_panel_titles(panels[:1], [title])
            if index == 0:
                panels[0].set_ylabel("layer", fontsize=8)
        scale_height = min(height, 1.5)
        scale = add_inset_axes(ax, size, (step + width + 0.2, height - scale_height, 0.11, scale_height))
        draw_color_scale(scale, limit, _nats_scale_labels(limit), norm=make_root_norm(limit))
    return ax


def draw_top_parts(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the components with the largest effects, a row each, both contrasts side by side.

    >>> row = {"attack": "direct", "defense": "a", "layer": 3, "kind": "head", "head": 1, "shift": -1.0}
    >>> ax = draw_top_parts(pd.DataFrame([row | {"discrimination": 0.5}]))
    >>> ax.child_axes[0].get_yticklabels()[0].get_text()
    'head 3.1'

    Args:
        points: table from `build_top_parts`, of one attack and one defense.
        ax: axes that the panels are placed in; by default new ones.
    """
    layers, heads = (to_numbers(check_one_attack(points)[name]) for name in ("layer", "head"))
    names = [format_part_name(*part) for part in zip(points["kind"], layers, heads, strict=True)]
    rows = [-float(row) for row in range(len(names))]
    with rc_context(RC_PARAMS):
        ax, (panels,) = stack_panels(ax, [max(0.2 * len(names), 0.7)], [])
        set_panel_titles(panels, CONTRAST_LABELS.values())
        for contrast, panel in zip(CONTRAST_LABELS, panels, strict=True):
            draw_dots(panel, points, contrast, rows, (BLACK, "-", "o"), contrast)
            set_row_axis(panel, names, "nats", with_names=panel is panels[0])
    return ax


def find_color_limit(cells: pd.DataFrame) -> float:
    """Return the value of the darkest color: the largest of all defenses of the run, or of the table.

    >>> find_color_limit(pd.DataFrame({"shift": [0.5, -1.0], "discrimination": 0.0}))
    1.0
    """
    sizes = cells[[*CONTRAST_LABELS]].abs().to_numpy(float)
    largest = float(np.nanmax(sizes)) if np.isfinite(sizes).any() else 0.0
    if "largest_of_run" in cells and len(cells):
        largest = max(largest, float(cells["largest_of_run"].iloc[0]))
    return largest or 1.0


def make_root_norm(limit: float) -> Normalize:
    """Return the mapping of values to colors by their signed square root, so that small ones can be seen.

    >>> [float(share) for share in make_root_norm(4.0)([-4.0, 0.0, 1.0])]
    [0.0, 0.5, 0.75]
    """
    return FuncNorm((_take_signed_root, _take_signed_square), -limit, limit)


def choose_cell_size(n_layers: int, n_heads: int) -> tuple[float, float]:
    """Return width and height of a cell of the heat map, inches."""
    return float(np.clip(2.6 / n_heads, 0.04, 0.28)), float(np.clip(3.2 / n_layers, 0.05, 0.22))


def choose_tick_places(count: int, cell_length: float, min_length: float) -> Sequence[int]:
    """Return the cells that are numbered, so that numbers are at least `min_length` inches apart.

    >>> list(choose_tick_places(64, 0.04, 0.2))[:3]
    [0, 5, 10]
    """
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128) if step * cell_length >= min_length)
    return range(0, count, step)


def format_part_name(kind: str, layer: float, head: float) -> str:
    """Return the name of a component, layer before head.

    >>> nan = float("nan")
    >>> format_part_name("head", 3.0, 1.0), format_part_name("bias", nan, nan)
    ('head 3.1', 'final bias')
    >>> format_part_name("bias", 2.0, nan)
    'bias 2'
    """
    if layer != layer:
        return "final bias" if kind == "bias" else _PART_KIND_LABELS.get(kind, kind)
    return f"{_PART_KIND_LABELS.get(kind, kind)} {layer:.0f}" + (f".{head:.0f}" if head == head else "")


def caption_part_map(cells: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_part_map`."""
    others = " and for all defenses of the run" * ("largest_of_run" in cells)
    n_layers, n_heads, kinds = _measure_part_map(cells)
    is_dotted = min(choose_cell_size(n_layers, max(n_heads, 1))) >= MIN_DOTTED_CELL
    dot = "Dot: the 95\u00a0% interval excludes 0, not corrected for the number of components. "
    dot = keep_if_intervals(cells, dot if is_dotted else "Intervals are in the table. ")
    has_gaps = len(cells) < (n_heads + len(kinds)) * n_layers or cells["shift"].isna().any()
    grey = "Grey: no such part. " if has_gaps else ""
    return (
        f"Direct logit attribution {format_query_counts(cells, context.query_counts)}: contribution of each "
        f"component to the change of the margin. {CONTRASTS_SENTENCE}Blue: positive contribution; orange: "
        f"negative; one scale for both panels{others}, by the square root. {dot}{grey}The embedding and the "
        f"final bias, which belong to no layer, are omitted. {_describe_remainder(cells)}"
        f"{format_run_sentences(cells, context)}"
    )


def caption_top_parts(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_top_parts`."""
    is_remainder = points["kind"] == READOUT_PART
    components = points[~is_remainder]
    sums = " and ".join(
        f"{format_signed_nats(components[name].sum())} of "
        f"{format_signed_nats(points[f'total_{name}'].iloc[0])}\u00a0nats of {name}"
        for name in CONTRAST_LABELS
    )
    remainder = f"Last row: {READOUT_PART_MEANING}. " if is_remainder.any() else ""
    return (
        f"Direct logit attribution {format_query_counts(points, context.query_counts)}: the "
        f"{len(components)} of {points['n_parts'].iloc[0]} components with the largest effect on either "
        f"contrast (heads are named layer.head); together they contribute {sums}. {CONTRASTS_SENTENCE}"
        f"{format_interval_note(points, 'Bars')}The components were selected by these estimates, so the "
        f"largest are biased away from 0. {remainder}{format_run_sentences(points, context)}"
    )


def _describe_remainder(cells: pd.DataFrame) -> str:
    """Return the sentence on the remainder of a readout that is not linear; empty if there is none."""
    if "readout_shift" not in cells or not len(cells):
        return ""
    row = next(iterate_rows(cells))
    values = " and ".join(
        f"{Interval.from_row(row, f'readout_{name}').format_text('+.2f', minus=_MINUS)}\u00a0nats of {name}"
        for name in CONTRAST_LABELS
    )
    return f"Also omitted, {READOUT_PART_MEANING}: {values}. "


def _measure_part_map(cells: pd.DataFrame) -> tuple[int, int, list[str]]:
    """Return the numbers of layers and heads, and the kinds of components beside the heads."""
    heads = to_numbers(cells.loc[cells["kind"] == "head", "head"])
    kinds = [kind for kind in _LAYER_PART_LABELS if (cells["kind"] == kind).any()]
    return int(to_numbers(cells["layer"]).max()) + 1, int(heads.max()) + 1 if len(heads) else 0, kinds


def _arrange_parts(
    cells: pd.DataFrame, contrast: str, n_layers: int, n_heads: int, kinds: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return two layer × component matrices: estimates, and whether their interval excludes 0."""
    values = np.full((n_layers, n_heads + len(kinds)), np.nan)
    excludes_zero = np.zeros(values.shape, dtype=bool)
    layers, heads = (to_numbers(cells[name]).fillna(-1).astype(int) for name in ("layer", "head"))
    columns = [
        head if kind == "head" else n_heads + kinds.index(kind)
        for head, kind in zip(heads, cells["kind"], strict=True)
    ]
    estimates = extract_estimates(cells, contrast)
    values[layers, columns] = estimates[:, 0]
    excludes_zero[layers, columns] = (estimates[:, 1] > 0) | (estimates[:, 2] < 0)
    return values, excludes_zero


def _draw_parts(
    ax: Axes, values: np.ndarray, excludes_zero: np.ndarray, limit: float, gid: str, is_dotted: bool
) -> None:
    """Draw a matrix of components and a dot in each cell whose interval excludes 0."""
    outline: Any = {"linewidths": 0.3, "linecolor": "#DDDDDD"}
    is_outlined = values.size <= _MAX_OUTLINED_CELLS
    look: Any = {"gid": gid, "norm": make_root_norm(limit)}
    look |= outline if is_outlined else {"rasterized": True}
    draw_heatmap(ax, values, (-limit, limit), **look)
    if is_dotted:
        rows, columns = np.nonzero(excludes_zero)
        ax.scatter(columns + 0.5, rows + 0.5, s=3, color=BLACK, linewidths=0, zorder=3, gid="sure")


def _nats_scale_labels(max_value: float) -> list[str]:
    digits = max(0, 1 - int(np.floor(np.log10(max_value))))
    numbers = (f"\N{MINUS SIGN}{max_value:.{digits}f}", "0", f"+{max_value:.{digits}f}")
    return [f"{number} nats" for number in numbers]


def _take_signed_root(values: Any) -> Any:
    return np.sign(values) * np.sqrt(np.abs(values))


def _take_signed_square(values: Any) -> Any:
    return np.sign(values) * np.square(values)
