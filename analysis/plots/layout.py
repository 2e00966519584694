"""Layout of figures: text that fits, panels, legends, curves, and a canvas that fits its content."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator

from analysis.plots.data import to_numbers
from analysis.plots.style import BLACK, BLUE, FONT_FAMILY, GREY, LINE_STYLES, TEXT_SIZE, VERMILION, VIOLET
from analysis.stats.tables import INTERVAL_SUFFIXES

LINE_HEIGHT = 1.25  # height of a line of text over its font size
CANVAS_MARGIN = 0.14  # inches between the content and the edge of the canvas
MIN_CANVAS_WIDTH = 5.8  # inches of content, where a caption needs them
PAPER_TEXT_SIZE = 8.0  # points
SETTING_SIZE = 6.75  # font size of the sentences on model, data and readout below a caption
EFFECT_COLORS = LinearSegmentedColormap.from_list("effect", (VERMILION, "white", BLUE))
MISSING_COLOR = "#E4E4E4"  # distinct from the white of no effect
CURVE_STYLES = (*LINE_STYLES, (BLACK, "-", "o"), (VIOLET, (0, (4, 1, 1, 1)), "h"))
REMAINING_STYLE = (GREY, "-", ".")  # for all curves after the last style
_PANEL_GAP = 0.5  # inches between two panels of a row
_LEGEND_HANDLE = 0.5  # inches of a legend's column beside its text
_MIN_SHARE_BESIDE = 0.75  # of the width of the axes, at which a legend may stay beside them
_WIDTH_TOLERANCE = 0.05  # inches
_MAX_FITS = 5  # drawings until the content has the wanted width


class FigureError(ValueError):
    """A figure cannot be drawn as asked; the message is one line for the user."""


@dataclass(frozen=True)
class AxesScale:
    """How much wider and higher axes are made than a drawing function asks, and where legends go.

    Attributes:
        x: factor of the width.
        y: factor of the height.
        legend_width: width in inches of a legend below the axes; None leaves legends where they are.
    """

    x: float = 1.0
    y: float = 1.0
    legend_width: float | None = None


_AXES_SCALE: ContextVar[AxesScale] = ContextVar("axes scale", default=AxesScale())  # noqa: B039  # frozen


@contextmanager
def scale_axes(scale: AxesScale) -> Iterator[None]:
    """Make the axes that are created meanwhile larger or smaller; texts keep their sizes.

    >>> with scale_axes(AxesScale(x=0.5)):
    ...     ax = make_axes(4, 3)
    >>> float((ax.get_window_extent().width / 150).round(3))
    2.0
    """
    token = _AXES_SCALE.set(scale)
    try:
        yield
    finally:
        _AXES_SCALE.reset(token)


def escape_unprintable(text: str) -> str:
    r"""Return the text with every character that the font lacks replaced by its code point.

    >>> escape_unprintable("\u62b1\u6b49 Sorry\n")
    '\\u62b1\\u6b49 Sorry '
    """
    spaced = re.sub(r"[\t\r\n\f\v]", " ", text)
    return "".join(c if ord(c) in _font_glyphs() else f"\\u{ord(c):04x}" for c in spaced)


@cache
def measure_text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of one line of text, points.

    >>> measure_text_width("refuses more", 8) > measure_text_width("refuses", 8)
    True
    """
    font = FontProperties(family=FONT_FAMILY, size=size, weight=weight)
    width: float = TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]
    return width * 1.02  # the renderer rounds each glyph to whole pixels


def wrap_text(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Return the text in lines at most `width` points wide; a word too long for a line is broken.

    >>> wrap_text("retokenize+paraphrase", 60, 8)
    ['retokenize+', 'paraphrase']
    """
    lines = [""]
    # A line may end at a space and after + / _ - , which join the parts of names.
    for piece in re.findall(r" *[^ +/_-]+[+/_-]*| *[+/_-]+", escape_unprintable(text)):
        if measure_text_width(lines[-1] + piece, size, weight) <= width:
            lines[-1] += piece
            continue
        lines.append("")
        for sign in piece.lstrip(" "):
            if lines[-1] and measure_text_width(lines[-1] + sign, size, weight) > width:
                lines.append("")
            lines[-1] += sign
    return [line.strip(" ") for line in lines if line.strip(" ")]


def fit_text(name: str, width: float, size: float, max_lines: int = 2) -> str:
    """Return a name in at most `max_lines` lines of `width` points, its middle omitted if it is longer.

    >>> fit_text("x" * 90, 60, 8, max_lines=1).count("x") < 20
    True
    """
    lines = wrap_text(name, width, size)
    best = lines
    low, high = 1, len(name) // 2  # bounds of the number of characters kept at each end
    while len(lines) > max_lines and low < high:
        keep = (low + high) // 2
        shorter = wrap_text(f"{name[:keep]}\N{HORIZONTAL ELLIPSIS}{name[-keep:]}", width, size)
        if len(shorter) > max_lines:
            high = keep
        else:
            low = keep + 1
            best = shorter
    return "\n".join(best)


def get_width_scale() -> float:
    """Return the factor by which axes are made wider now."""
    return _AXES_SCALE.get().x


def place_legend_beside(ax: Axes, handles: Sequence[Any], title: str | None = None) -> None:
    """Place a legend to the right of the axes, or below them where `scale_axes` says so.

    >>> ax = Figure().subplots()
    >>> place_legend_beside(ax, ax.plot([0, 1], label="a curve"))
    >>> ax.get_legend().get_texts()[0].get_text()
    'a curve'
    """
    width = _AXES_SCALE.get().legend_width
    if width is not None:
        texts = [line for handle in handles for line in str(handle.get_label()).split("\n")]
        widest = max((measure_text_width(text, TEXT_SIZE) for text in texts), default=0.0) / 72
        n_columns = max(1, min(len(handles), int(width / (widest + _LEGEND_HANDLE))))
        (left, below, _, _), _, _ = measure_content(ax)
        place_legend_below(ax, handles, n_columns, float(below) + 0.1, title, float(left))
        return
    style: Any = {
        "loc": "upper left",
        "bbox_to_anchor": (1.02, 1.0),
        "borderaxespad": 0.0,
        "alignment": "left",
    }
    ax.legend(handles=handles, title=title, labelspacing=0.45, handlelength=2.6, **style)


def place_legend_below(
    ax: Axes,
    handles: Sequence[Any],
    n_columns: int,
    gap: float,
    title: str | None = None,
    outdent: float = 0.0,
) -> None:
    """Place a legend in several columns below the axes.

    Args:
        ax: axes whose size is final.
        handles: entries.
        n_columns: number of columns.
        gap: distance from the axes, inches; the axis label and the tick labels need it.
        title: line above the entries.
        outdent: how far the legend begins left of the axes, inches.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    window = ax.get_window_extent()
    anchor = -outdent * figure.dpi / window.width, -gap * figure.dpi / window.height
    style: Any = {"loc": "upper left", "bbox_to_anchor": anchor, "borderaxespad": 0.0}
    style |= {"ncols": n_columns, "title": title, "alignment": "left"}
    ax.legend(handles=handles, labelspacing=0.45, handlelength=2.0, **style)


def measure_content(ax: Axes) -> tuple[Float[np.ndarray, " 4"], float, float]:
    """Return how far the content reaches beyond the axes (left, below, right, above) and their size, inches.

    Glyphs are placed on whole pixels, so text is wider at some resolutions; the widest counts.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    before, spans = figure.dpi, []
    for dpi in (100, 150, 300):
        figure.set_dpi(dpi)
        tight = ax.get_tightbbox()
        assert tight is not None
        spans.append(np.array([tight.extents, ax.get_window_extent().extents]) / dpi)
    figure.set_dpi(before)
    inner = spans[0][1]
    beyond = np.abs([span[0] - span[1] for span in spans]).max(axis=0)
    return beyond, float(inner[2] - inner[0]), float(inner[3] - inner[1])


def fit_width(
    draw: Callable[[], Axes], width: float, keeps_shape: bool, min_scale: float, margin: float
) -> Axes:
    """Draw a figure with axes of the size at which its content is as wide as wanted; texts keep their sizes.

    A legend beside the axes moves below them if they would become small.

    Args:
        draw: draws the figure on new axes and returns them.
        width: of the canvas, inches.
        keeps_shape: whether the height changes like the width; otherwise it stays.
        min_scale: smallest width of the axes, as a share of what the drawing function asks.
        margin: between the content and the edge of the canvas, inches.

    Raises:
        FigureError: if the texts leave too little room; it states the width that would do.
    """
    room, needed = width - 2 * margin, np.inf
    for legend_width, min_share in ((None, max(min_scale, _MIN_SHARE_BESIDE)), (max(room, 1.0), min_scale)):
        scale = AxesScale(legend_width=legend_width)
        for _ in range(_MAX_FITS):
            with scale_axes(scale):
                ax = draw()
            (left, _, right, _), across, _ = measure_content(ax)
            if scale.x < min_share:
                break
            if abs(left + across + right - room) < _WIDTH_TOLERANCE:
                return ax
            needed = min(needed, left + right + min_scale * across / scale.x)
            x = scale.x * (room - left - right) / across
            if x < min_share:
                break
            scale = AxesScale(x, x if keeps_shape else 1.0, legend_width)
        else:
            return ax
    raise FigureError(
        f"its texts need a width of at least {np.ceil(10 * (needed + 2 * margin)) / 10:.1f} inches"
    )


def finish_figure(
    ax: Axes,
    title: str = "",
    caption: str = "",
    banner: str = "",
    width: float | None = None,
    margin: float = CANVAS_MARGIN,
) -> Figure:
    r"""Return the figure of `ax` with title, caption and banner, its canvas resized to fit the content.

    The title is above the axes, the caption below, the banner (white on dark red) above the title. The axes
    keep their size in inches, so labels placed before stay where they are.

    >>> figure = finish_figure(make_axes(4, 3), "A title", "A caption.\nModel: toy.")
    >>> [(text.get_gid(), text.get_text()) for text in figure.texts]
    [('title', 'A title'), ('caption', 'A caption.'), ('setting', 'Model: toy.')]

    Args:
        ax: axes that hold everything else.
        title: empty for none.
        caption: what is shown and, after a line break, model, data and readout in small print.
        banner: warning.
        width: of the canvas, inches; by default as wide as its content.
        margin: between the content and the edge of the canvas, inches.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    (left, below, right, above), across, tall = measure_content(ax)
    content = left + across + right
    wide = max(content, MIN_CANVAS_WIDTH if caption else 0.0) + 2 * margin if width is None else width
    start = margin if width is None else max(min(margin, (width - content) / 2), 0.0)
    room = (wide - 2 * start) * 72
    about, _, setting = caption.partition("\n")
    blocks = {
        "title": wrap_text(title, room, 10.5, "bold") if title else [],
        "caption": wrap_text(about, room, 7.5) if about else [],
        "setting": wrap_text(setting, room, SETTING_SIZE) if setting else [],
    }
    flag = wrap_text(banner, room - 6, 8.5, "bold") if banner else []
    over = (len(flag) * 8.5 * LINE_HEIGHT + 12) / 72 if flag else 0.0
    sizes = {"title": 10.5, "caption": 7.5, "setting": SETTING_SIZE}
    heights = {name: len(lines) * sizes[name] * LINE_HEIGHT / 72 for name, lines in blocks.items()}
    gap = 0.04 if blocks["setting"] else 0.0
    foot = heights["caption"] + gap + heights["setting"]
    bottom = margin + foot + (0.12 if foot else 0.0) + below
    head = heights["title"] + (0.1 if title else 0.0)
    height = bottom + tall + above + head + margin + over
    figure.set_size_inches(wide, height)
    ax.set_position(((start + left) / wide, bottom / height, across / wide, tall / height))
    style: dict[str, Any] = {"family": FONT_FAMILY, "linespacing": 1.15, "parse_math": False, "usetex": False}
    places: dict[str, tuple[float, dict[str, Any]]] = {
        "title": (height - margin - over, {"va": "top", "weight": "bold"}),
        "caption": (margin + heights["setting"] + gap, {"va": "bottom", "color": "#333333"}),
        "setting": (margin, {"va": "bottom", "color": "#555555"}),
    }
    for name, lines in blocks.items():
        if lines:
            y, look = places[name]
            x, text = start / wide, "\n".join(lines)
            figure.text(x, y / height, text, size=sizes[name], gid=name, **look, **style)
    if flag:
        edge, ground = start + 3 / 72, {"facecolor": "#A50F15", "edgecolor": "none", "pad": 3}
        warning: Any = {"va": "top", "size": 8.5, "weight": "bold", "color": "white", "bbox": ground}
        figure.text(
            edge / wide, 1 - (margin + 3 / 72) / height, "\n".join(flag), gid="banner", **warning, **style
        )
    return figure


def shrink_texts(ax: Axes, size: float = PAPER_TEXT_SIZE) -> None:
    """Give no text of the axes more than that size, points."""
    for text in ax.findobj(Text):
        if isinstance(text, Text) and float(text.get_fontsize()) > size:
            text.set_fontsize(size)


def make_axes(width: float, height: float) -> Axes:
    """Return axes of that size in inches, times `scale_axes`, on a canvas that `finish_figure` resizes.

    >>> make_axes(4, 3).get_window_extent().width / 150 == 4
    np.True_
    """
    scale = _AXES_SCALE.get()
    size = width * scale.x / 0.5, height * scale.y / 0.5
    return Figure(figsize=size, dpi=150).add_axes((0.25, 0.25, 0.5, 0.5))


def add_inset_axes(ax: Axes, host_size: tuple[float, float], box: tuple[float, float, float, float]) -> Axes:
    """Return axes inside other axes, placed in inches; `finish_figure` resizes the canvas around all.

    >>> host = make_axes(4, 3)
    >>> float(add_inset_axes(host, (4, 3), (2, 0, 1, 1)).get_window_extent().width.round(3)) / 150
    1.0

    Args:
        ax: outer axes.
        host_size: intended width and height of the outer axes, inches.
        box: left, bottom, width and height, inches; it may lie outside the outer axes.
    """
    (host_width, host_height), (left, bottom, width, height) = host_size, box
    return ax.inset_axes((left / host_width, bottom / host_height, width / host_width, height / host_height))


def draw_color_scale(
    ax: Axes,
    max_value: float,
    labels: Sequence[str],
    is_horizontal: bool = False,
    norm: Normalize | None = None,
) -> None:
    """Draw the effect colors from minus to plus `max_value`, with labels at both ends and in the middle.

    Args:
        ax: axes of the scale.
        max_value: value of the last color.
        labels: at the lower end, in the middle and at the upper end.
        is_horizontal: whether the scale runs from left to right.
        norm: mapping of values to colors; by default linear.
    """
    edges = np.linspace(-max_value, max_value, 65)
    shades = ((edges[1:] + edges[:-1]) / 2)[:, None]
    look: Any = {"cmap": EFFECT_COLORS, "norm": norm or Normalize(-max_value, max_value)}
    ax.set_gid("scale")
    if is_horizontal:
        ax.pcolormesh(edges, [0, 1], shades.T, **look)
        ax.set_yticks([])
        ax.set_xticks([-max_value, 0, max_value], labels, fontsize=TEXT_SIZE - 0.7)
        first, _, last = ax.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
    else:
        ax.pcolormesh([0, 1], edges, shades, **look)
        ax.set_xticks([])
        ax.yaxis.tick_right()
        ax.set_yticks([-max_value, 0, max_value], labels, fontsize=TEXT_SIZE - 0.5)
    ax.tick_params(length=2)
    for spine in ax.spines.values():
        spine.set(visible=True, linewidth=0.5, color=GREY)


def stack_panels(
    ax: Axes | None,
    heights: Sequence[float],
    gaps: Sequence[float],
    columns: int = 2,
    panel_width: float = 2.3,
) -> tuple[Axes, list[list[Axes]]]:
    """Return outer axes and, inside of them, rows of panels from the top.

    >>> host, rows = stack_panels(None, [1.5, 0.5], [0.25])
    >>> [len(row) for row in rows], len(host.child_axes)
    ([2, 2], 4)

    Args:
        ax: outer axes; by default new ones.
        heights: height of each row, inches.
        gaps: gaps between rows, inches.
        columns: panels per row.
        panel_width: width of a panel, inches.
    """
    step = panel_width + _PANEL_GAP
    size = columns * step - _PANEL_GAP, sum(heights) + sum(gaps)
    ax = ax or make_axes(*size)
    ax.set_axis_off()
    rows, bottom = [], size[1]
    for height, gap in zip(heights, [*gaps, 0.0], strict=True):
        bottom -= height
        boxes = [(column * step, bottom, panel_width, height) for column in range(columns)]
        rows.append([add_inset_axes(ax, size, box) for box in boxes])
        bottom -= gap
    for panel in ax.child_axes:
        panel.tick_params(labelsize=TEXT_SIZE - 0.5)
    return ax, rows


def set_panel_titles(panels: Sequence[Axes], titles: Iterable[str]) -> None:
    """Write the title of each panel of a row above it."""
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, loc="left", fontsize=8, weight="bold")


def assign_curve_styles(names: Iterable[str]) -> dict[str, tuple[str, Any, str]]:
    """Return color, dash and marker of each name, in order of appearance; after the eighth all are grey.

    >>> assign_curve_styles(["a", "b", "a"])["b"][2]
    'D'
    """
    return {
        name: CURVE_STYLES[place] if place < len(CURVE_STYLES) else REMAINING_STYLE
        for place, name in enumerate(dict.fromkeys(names))
    }


def make_line_legend(
    styles: Mapping[str, tuple[str, Any, str]], labels: Mapping[str, str] | None = None
) -> list[Line2D]:
    """Return the legend entries of lines, labeled by name if `labels` has no entry."""
    return [
        Line2D(
            [],
            [],
            color=color,
            linestyle=dash,
            label=(labels or {}).get(name, fit_text(name, 140, TEXT_SIZE)),
        )
        for name, (color, dash, _) in styles.items()
    ]


def extract_estimates(rows: pd.DataFrame, column: str) -> Float[np.ndarray, "n 3"]:
    """Return estimates with the ends of their intervals, NaN if they are missing."""
    return rows.reindex(columns=[f"{column}{end}" for end in INTERVAL_SUFFIXES]).to_numpy(
        float, na_value=np.nan
    )


def draw_curve(
    ax: Axes, rows: pd.DataFrame, column: str, style: tuple[str, Any, str], gid: str, n_lines: int = 1
) -> None:
    """Draw an estimate by layer as a line in its band, which is fainter if there are many lines.

    >>> ax = make_axes(1, 1)
    >>> draw_curve(ax, pd.DataFrame({"layer": [1, 0], "shift": [2.0, 1.0]}), "shift", CURVE_STYLES[0], "a")
    >>> ax.lines[1].get_xydata().tolist()
    [[0.0, 1.0], [1.0, 2.0]]
    """
    if not ax.lines:
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=1, gid="no effect")
    color, dash, marker = style
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
    alone = known & ~beside[:-2] & ~beside[2:]  # a band needs two neighboring layers
    ax.vlines(layer[order][alone], low[alone], high[alone], color=color, alpha=0.4, linewidth=1.2, zorder=2)
    small: Any = {"marker": marker, "markersize": 3} if len(rows) <= 12 else {}
    ax.plot(layer[order], value, color=color, linestyle=dash, linewidth=1.2, zorder=3, gid=gid, **small)


def set_layer_axis(ax: Axes, last_layer: float, x_label: str = "", first_layer: float = 0.0) -> None:
    """Set limits and ticks of a panel over layers, with whole numbers on the x axis."""
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
    """Draw the estimate of each row as a dot with its interval, at its own height."""
    color, _, marker = style
    value, low, high = extract_estimates(rows, column).T
    ax.hlines(heights, low, high, color=color, linewidth=1.0, alpha=0.6, zorder=2)
    fill: Any = {"markerfacecolor": "white" if hollow else color, "markeredgewidth": 0.8}
    ax.plot(value, heights, linestyle="", marker=marker, color=color, markersize=4, zorder=3, gid=gid, **fill)


def set_row_axis(ax: Axes, names: Sequence[str], x_label: str = "", with_names: bool = True) -> None:
    """Set up a panel of rows of dots: a line at zero, a name per row, the first row at the top."""
    ax.axvline(0, color=GREY, linewidth=0.6, zorder=1)
    ax.set_ylim(0.5 - len(names), 0.5)
    shown = [fit_text(name, 110, TEXT_SIZE, 1) if with_names else "" for name in names]
    ax.set_yticks(range(0, -len(names), -1), shown, fontsize=TEXT_SIZE)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.set_xlabel(x_label, fontsize=8)


@cache
def _font_glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT_FAMILY)).get_charmap())
