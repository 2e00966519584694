"""labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from analysis.plots.layout import LINE_HEIGHT, measure_text_width
from analysis.plots.style import TEXT_SIZE
from analysis.stats.tables import INTERVAL_SUFFIXES

# Rows of coordinates. (numpy's ArrayLike is a recursive protocol that run-time checks stumble over.)
_Coordinates = np.ndarray | Sequence[Any]

LABEL_GAP = 6.0  # points between a label and its point where nothing is in the way


def label_points(
    ax: Axes,
    points: pd.DataFrame,
    texts: Sequence[str],
    reach: float,
    columns: tuple[str, str] = ("shift", "discrimination"),
    keep_clear: pd.DataFrame | None = None,
) -> bool:
    """Write a text beside each point, clear of the origin; where room is short write none and return False.

    >>> ends = {f"{x}{end}": [1.0, 1.0] for x in ("shift", "discrimination") for end in ENDS}
    >>> ax = blank(3, 3)
    >>> label_points(ax, pd.DataFrame(ends), ["one", "two"], reach=40), len(ax.texts)
    (True, 2)

    Args:
        ax: axes whose size and limits are final.
        points: as `plane_points` returns them.
        texts: one for each point.
        reach: how far from its point a text may lie, points (1/72 inch).
        columns: the columns along both axes.
        keep_clear: further points that no text may cover.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    (x, x_low, x_high), (y, y_low, y_high) = (
        points[[f"{name}{end}" for end in INTERVAL_SUFFIXES]].to_numpy(float).T for name in columns
    )
    corners = [[x, y], [0 * x, 0 * y], [x_low, y], [x_high, y], [x, y_low], [x, y_high]]
    at = ax.transData.transform(np.moveaxis(np.array(corners), 1, 2).reshape(-1, 2)) * 72 / figure.dpi
    spots, origin, left, right, low, high = at.reshape(len(corners), len(points), 2)
    bars = np.concatenate([np.concatenate([left, right], axis=1), np.concatenate([low, high], axis=1)])
    window = np.array(ax.get_window_extent().extents) * 72 / figure.dpi
    if keep_clear is not None and len(keep_clear):
        origin = np.concatenate([origin, ax.transData.transform(keep_clear[[*columns]]) * 72 / figure.dpi])
    offsets = place_labels(
        spots, texts, window, np.concatenate([origin - 4, origin + 4], axis=1), bars, reach
    )
    for spot_x, spot_y, text, (right_by, up_by, gap) in zip(x, y, texts, offsets or [], strict=False):
        leader = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        set_by: Any = {"ha": "center", "va": "center", "size": TEXT_SIZE, "linespacing": 1.1, "zorder": 9}
        set_by |= {"textcoords": "offset points", "annotation_clip": False}
        set_by |= {"arrowprops": leader} if gap > LABEL_GAP else {}
        words = ax.annotate(text, (spot_x, spot_y), (right_by, up_by), **set_by)
        words.set_path_effects([withStroke(linewidth=2, foreground="white")])
    return offsets is not None


def place_labels(
    anchors: _Coordinates,
    texts: Sequence[str],
    bounds: _Coordinates,
    obstacles: _Coordinates,
    avoided_boxes: _Coordinates,
    reach: float,
) -> list[tuple[float, float, float]] | None:
    """Return where to center each label, so that no label hides another or a point.

    Rings of candidates around each point are tried in a fixed order, so equal input gives equal figures.

    >>> offsets = place_labels([(50, 50), (50, 50)], ["a", "b"], (0, 0, 100, 100), [], [], reach=40)
    >>> offsets is not None and offsets[0] != offsets[1]
    True

    Args:
        anchors: float[n 2], where the points are, in points (1/72 inch).
        texts: one label for each, lines parted by a newline.
        bounds: the box that no label may leave.
        obstacles: float[t 4], boxes x0, y0, x1, y1 that no label may touch, besides the points themselves.
        avoided_boxes: float[a 4], boxes that are better left free (interval bars); an edge may be NaN.
        reach: how far from its point a label may lie.

    Returns:
        For each label its offset x, y and the gap to its point, all in points; None where room is short.
    """
    angles = np.pi * np.array([0.25, 0.75, -0.25, -0.75, *np.arange(-7, 9) / 8])
    radii = np.arange(LABEL_GAP, max(reach, 7.0), 4.0)
    ring = np.stack([np.repeat(radii, len(angles)), np.tile(angles, len(radii))])
    way = np.stack([np.cos(ring[1]), np.sin(ring[1])], axis=1)
    spots, window = np.asarray(anchors, dtype=float), np.asarray(bounds, dtype=float)
    marks = np.concatenate([spots - 4, spots + 4], axis=1)
    hard = np.concatenate([marks, np.asarray(obstacles, dtype=float).reshape(-1, 4)])
    fixed = len(hard)
    soft = np.asarray(avoided_boxes, dtype=float).reshape(-1, 4)
    found: list[tuple[float, float, float]] = []
    for anchor, text in zip(spots, texts, strict=True):
        lines = text.split("\n")
        half = np.array(
            [
                max(measure_text_width(line, TEXT_SIZE) for line in lines) / 2 + 1,
                len(lines) * TEXT_SIZE * LINE_HEIGHT / 2 + 1,
            ]
        )
        offsets = way * ring[0][:, None] + way * half
        boxes = np.concatenate([anchor + offsets - half, anchor + offsets + half], axis=1)
        free = ~_boxes_overlap(boxes, hard).any(axis=1)
        free &= (boxes[:, :2] >= window[:2]).all(axis=1) & (boxes[:, 2:] <= window[2:]).all(axis=1)
        if not free.any():
            return None
        steps = np.linspace(0.15, 0.95, 9)[:, None] * (way * ring[0][:, None])[:, None, :] + anchor
        crossed = _boxes_overlap(np.concatenate([steps, steps], axis=2).reshape(-1, 4), hard[fixed:]).any(
            axis=1
        )
        leader = crossed.reshape(len(offsets), -1).any(axis=1)
        cost = ring[0] + 9 * _boxes_overlap(boxes, soft).sum(axis=1) + 40 * leader
        best = int(np.where(free, cost, np.inf).argmin())
        hard = np.concatenate([hard, boxes[best : best + 1]])
        soft = np.concatenate([soft, np.concatenate([steps[best], steps[best]], axis=1)])
        found.append((float(offsets[best][0]), float(offsets[best][1]), float(ring[0][best])))
    return found


def _boxes_overlap(boxes: Any, others: Any) -> Any:
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (low <= high).all(axis=2)


def make_legend_marker(color: str, marker: str, text: str) -> Line2D:
    """Return the entry of a key for points of this look."""
    style: Any = {"linestyle": "", "markersize": 8 if marker in "PX*" else 6.5, "markeredgecolor": "white"}
    return Line2D([], [], color=color, marker=marker, markeredgewidth=0.5, label=text, **style)
