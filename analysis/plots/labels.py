"""Placement of labels beside points so that no label covers a point or another label."""

from __future__ import annotations

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

# Rows of coordinates. (numpy's ArrayLike is a recursive protocol that run-time checks fail on.)
_Coordinates = np.ndarray | Sequence[Any]

LABEL_GAP = 6.0  # points between a label and its point if nothing is in the way
_NUMBER_REACH = 300.0  # points between a number and its point at most
_REACH_OF_POINT = np.array([-4.0, -4.0, 4.0, 4.0])  # points: a label this near to a point seems to name it
_CROWD_RADIUS = 60.0  # points: a point with many others this near gets its name last


class LabelPlacer:
    """Finds a free position for one label after another.

    Positions on rings around the point are tried in a fixed order, so equal input gives equal figures.

    >>> placer = LabelPlacer([(50, 50)], (0, 0, 100, 100), [], [])
    >>> first, second = placer.place((50, 50), "a", reach=40), placer.place((50, 50), "b", reach=40)
    >>> first is not None and second is not None and first != second
    True

    Args:
        points: float[n 2], points that no label may cover, in points (1/72 inch).
        bounds: box x0, y0, x1, y1 that no label may leave.
        obstacles: float[k 4], boxes that no label may touch.
        avoided_boxes: float[m 4], boxes that are better left free (interval bars); an edge may be NaN.
    """

    def __init__(
        self,
        points: _Coordinates,
        bounds: _Coordinates,
        obstacles: _Coordinates,
        avoided_boxes: _Coordinates,
    ) -> None:
        """Store the obstacles; `place` adds each label to them."""
        spots = np.asarray(points, dtype=float).reshape(-1, 2)
        marks = np.concatenate([spots - 4, spots + 4], axis=1)
        self._bounds = np.asarray(bounds, dtype=float)
        self._hard = np.concatenate([marks, np.asarray(obstacles, dtype=float).reshape(-1, 4)])
        self._soft = np.asarray(avoided_boxes, dtype=float).reshape(-1, 4)
        self._n_fixed = len(self._hard)
        self._leaders = np.empty((0, 4))

    def place(self, anchor: _Coordinates, text: str, reach: float) -> tuple[float, float, float] | None:
        """Return where to center a label: its offset x and y from the point and its gap to it, in points.

        Args:
            anchor: position of the point, in points.
            text: label; lines are separated by newlines.
            reach: largest gap between label and point, in points.

        Returns:
            None if the label has no room.
        """
        spot = np.asarray(anchor, dtype=float)
        half = _measure_half_size(text)
        angles = np.pi * np.array([0.25, 0.75, -0.25, -0.75, *np.arange(-7, 9) / 8])
        radii = np.arange(LABEL_GAP, max(reach, 7.0), 4.0)
        gaps, turns = np.repeat(radii, len(angles)), np.tile(angles, len(radii))
        directions = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        offsets = directions * gaps[:, None] + directions * half
        boxes = np.concatenate([spot + offsets - half, spot + offsets + half], axis=1)
        free = ~_boxes_overlap(boxes, self._hard).any(axis=1)
        free &= (boxes[:, :2] >= self._bounds[:2]).all(axis=1) & (boxes[:, 2:] <= self._bounds[2:]).all(
            axis=1
        )
        if not free.any():
            return None
        # Points along the line from label to point, which should cross no label, point or line of another.
        steps = np.linspace(0.15, 0.95, 9)[:, None] * (directions * gaps[:, None])[:, None, :] + spot
        is_own = _boxes_overlap(np.concatenate([spot, spot])[None], self._hard)[0]
        others = np.concatenate([self._hard[~is_own], self._leaders])
        crossed = _boxes_overlap(np.concatenate([steps, steps], axis=2).reshape(-1, 4), others).any(axis=1)
        leader_crosses = crossed.reshape(len(offsets), -1).any(axis=1)
        cost = gaps + 9 * _boxes_overlap(boxes, self._soft).sum(axis=1) + 40 * leader_crosses
        # Without a line to its point, a label belongs to the nearest point.
        points = self._hard[: self._n_fixed][~is_own[: self._n_fixed]]
        cost += 9 * ((gaps <= LABEL_GAP) & _boxes_overlap(boxes + _REACH_OF_POINT, points).any(axis=1))
        best = int(np.where(free, cost, np.inf).argmin())
        self._hard = np.concatenate([self._hard, boxes[best : best + 1]])
        self._soft = np.concatenate([self._soft, np.concatenate([steps[best], steps[best]], axis=1)])
        self._leaders = np.concatenate(
            [self._leaders, np.concatenate([steps[best] - 1, steps[best] + 1], axis=1)]
        )
        return float(offsets[best][0]), float(offsets[best][1]), float(gaps[best])


def label_points(
    ax: Axes,
    points: pd.DataFrame,
    texts: Sequence[str],
    reach: float,
    columns: tuple[str, str] = ("shift", "discrimination"),
    keep_clear: pd.DataFrame | None = None,
    number_rest: bool = False,
) -> list[int]:
    """Write a text beside each point that has room for it, and number the other points if wanted.

    >>> from analysis.plots.layout import make_axes
    >>> ends = {f"{x}{end}": [1.0, 1.0] for x in ("shift", "discrimination") for end in INTERVAL_SUFFIXES}
    >>> ax = make_axes(3, 3)
    >>> label_points(ax, pd.DataFrame(ends), ["one", "two"], reach=40), len(ax.texts)
    ([0, 0], 2)

    Args:
        ax: axes whose size and limits are final.
        points: table with both coordinates and the ends of their intervals.
        texts: text of each point.
        reach: largest gap between a text and its point, points (1/72 inch).
        columns: columns along both axes.
        keep_clear: further points that no text may cover.
        number_rest: write numbers, which may be farther from their points, where a text has no room.

    Returns:
        The number of each point; 0 if it has a text.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    (x, x_low, x_high), (y, y_low, y_high) = (
        points[[f"{name}{end}" for end in INTERVAL_SUFFIXES]].to_numpy(float).T for name in columns
    )
    corners = [[x, y], [0 * x, 0 * y], [x_low, y], [x_high, y], [x, y_low], [x, y_high]]
    at = ax.transData.transform(np.moveaxis(np.array(corners), 1, 2).reshape(-1, 2)) * 72 / figure.dpi
    spots, clear, left, right, low, high = at.reshape(len(corners), len(points), 2)
    bars = np.concatenate([np.concatenate([left, right], axis=1), np.concatenate([low, high], axis=1)])
    window = np.array(ax.get_window_extent().extents) * 72 / figure.dpi
    if keep_clear is not None and len(keep_clear):
        clear = np.concatenate([clear, ax.transData.transform(keep_clear[[*columns]]) * 72 / figure.dpi])
    boxes = np.concatenate([clear - 4, clear + 4], axis=1)
    order: Any = range(len(points))
    if number_rest:  # points far from others first: their names take no room from others
        distances = np.linalg.norm(spots[:, None] - spots[None], axis=2)
        order = np.argsort((distances < _CROWD_RADIUS).sum(axis=1), kind="stable")
    written, numbers = dict(enumerate(texts)), [0] * len(points)
    for with_texts in (True, False):
        placer = LabelPlacer(spots, window, boxes, bars)
        places = {
            index: place
            for index in (order if with_texts else ())
            if (place := placer.place(spots[index], texts[index], reach)) is not None
        }
        if not number_rest:
            break
        rest = [index for index in range(len(points)) if index not in places]
        for number, index in enumerate(rest, 1):
            place = placer.place(spots[index], str(number), _NUMBER_REACH)
            written[index], numbers[index] = str(number), number
            if place is not None:
                places[index] = place
        if len(places) == len(points):
            break
    for index, place in sorted(places.items()):
        _write_label(ax, (x[index], y[index]), written[index], place)
    return numbers


def make_legend_marker(color: str, marker: str, text: str) -> Line2D:
    """Return the legend entry of points of this color and marker."""
    style: Any = {"linestyle": "", "markersize": 8 if marker in "PX*" else 6.5, "markeredgecolor": "white"}
    return Line2D([], [], color=color, marker=marker, markeredgewidth=0.5, label=text, **style)


def _write_label(ax: Axes, point: tuple[float, float], text: str, place: tuple[float, float, float]) -> None:
    """Write a label at its offset, with a line to its point if it is not next to it."""
    right, up, gap = place
    leader = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
    style: Any = {"ha": "center", "va": "center", "size": TEXT_SIZE, "linespacing": 1.1, "zorder": 9}
    style |= {"textcoords": "offset points", "annotation_clip": False}
    style |= {"arrowprops": leader} if gap > LABEL_GAP else {}
    label = ax.annotate(text, point, (right, up), **style)
    label.set_path_effects([withStroke(linewidth=2, foreground="white")])


def _measure_half_size(text: str) -> np.ndarray:
    lines = text.split("\n")
    width = max(measure_text_width(line, TEXT_SIZE) for line in lines)
    return np.array([width / 2 + 1, len(lines) * TEXT_SIZE * LINE_HEIGHT / 2 + 1])


def _boxes_overlap(boxes: Any, others: Any) -> Any:
    """Return whether each box touches each other one, boxes × others; a box with a NaN edge touches none."""
    is_box, is_other = ((part[:, :2] <= part[:, 2:]).all(axis=1) for part in (boxes, others))
    overlap = is_box[:, None] & is_other
    for low, high in ((0, 2), (1, 3)):
        overlap &= (boxes[:, None, low] <= others[:, high]) & (others[:, low] <= boxes[:, None, high])
    return overlap
