"""How words are set on a figure: lines that fit, and a canvas that grows until it holds all of them."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import TextToPath

FONT_FAMILY = "DejaVu Sans"  # comes with matplotlib, so that a figure has the same size on every machine
LINE_HEIGHT = 1.25  # height of a line of text over its font size
CANVAS_MARGIN = 0.14  # inches between the content and the edge of the canvas


@cache
def _font_glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT_FAMILY)).get_charmap())


def escape_unprintable(text: str) -> str:
    r"""Return the text with every sign that the font cannot draw written as its code point.

    >>> printable("\u62b1\u6b49 Sorry\n")
    '\\u62b1\\u6b49 Sorry '
    """
    spaced = re.sub(r"[\t\r\n\f\v]", " ", text)
    return "".join(c if ord(c) in _font_glyphs() else f"\\u{ord(c):04x}" for c in spaced)


@cache
def measure_text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of one line of text, points.

    >>> width_of("refuses more", 8) > width_of("refuses", 8)
    True
    """
    font = FontProperties(family=FONT_FAMILY, size=size, weight=weight)
    width: float = TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]
    return width * 1.02  # the renderer rounds each glyph to whole pixels


def wrap_text(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Return the text in lines no wider than `width` points; a word too long for a line is broken.

    >>> wrap("retokenize+paraphrase", 60, 8)
    ['retokenize+', 'paraphrase']
    """
    lines = [""]
    # A line may end at a space and after + / _ - , where names of defenses and models have their joints.
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
    """Return a name in at most `most` lines of `width` points, its middle left out where it is longer.

    >>> fit("x" * 90, 60, 8, most=1).count("x") < 20
    True
    """
    lines = wrap_text(name, width, size)
    best, low, high = (
        lines,
        1,
        len(name) // 2,
    )  # signs kept at each end: the least that is worth reading, and too many
    while len(lines) > max_lines and low < high:
        keep = (low + high) // 2
        shorter = wrap_text(f"{name[:keep]}\N{HORIZONTAL ELLIPSIS}{name[-keep:]}", width, size)
        if len(shorter) > max_lines:
            high = keep
        else:
            low = keep + 1
            best = shorter
    return "\n".join(best)


def place_legend_beside(ax: Axes, handles: Sequence[Any], title: str | None = None) -> None:
    """Set a key to the right of the axes.

    >>> ax = Figure().subplots()
    >>> beside(ax, ax.plot([0, 1], label="a curve"))
    >>> ax.get_legend().get_texts()[0].get_text()
    'a curve'
    """
    style: Any = {
        "loc": "upper left",
        "bbox_to_anchor": (1.02, 1.0),
        "borderaxespad": 0.0,
        "alignment": "left",
    }
    ax.legend(handles=handles, title=title, labelspacing=0.45, handlelength=2.6, **style)


def finish_figure(ax: Axes, title: str, caption: str, banner: str = "") -> Figure:
    """Return the figure of `ax` with a title above and a caption below, its canvas cut to hold all.

    A banner, white on dark red, comes above the title.

    The axes keep their size in inches, so that labels placed before stay where they are.

    >>> figure = complete(blank(4, 3), "What to see", "What is drawn.")
    >>> [text.get_text() for text in figure.texts]
    ['What to see', 'What is drawn.']
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    before, spans = figure.dpi, []
    for dpi in (100, 150, 300):  # glyphs are set on whole pixels, so text is wider at some resolutions
        figure.set_dpi(dpi)
        tight = ax.get_tightbbox()
        assert tight is not None
        spans.append(np.array([tight.extents, ax.get_window_extent().extents]) / dpi)
    figure.set_dpi(before)
    inner = spans[0][1]
    left, below, right, above = np.abs([span[0] - span[1] for span in spans]).max(axis=0)
    across, tall = inner[2] - inner[0], inner[3] - inner[1]
    width = max(left + across + right, 5.8) + 2 * CANVAS_MARGIN
    room = (width - 2 * CANVAS_MARGIN) * 72
    head, foot = wrap_text(title, room, 10.5, "bold"), wrap_text(caption, room, 7.5)
    flag = wrap_text(banner, room - 6, 8.5, "bold") if banner else []
    over = (len(flag) * 8.5 * LINE_HEIGHT + 12) / 72 if flag else 0.0
    bottom = CANVAS_MARGIN + len(foot) * 7.5 * LINE_HEIGHT / 72 + 0.12 + below
    height = bottom + tall + above + 0.1 + len(head) * 10.5 * LINE_HEIGHT / 72 + CANVAS_MARGIN + over
    figure.set_size_inches(width, height)
    ax.set_position(((CANVAS_MARGIN + left) / width, bottom / height, across / width, tall / height))
    style: dict[str, Any] = {"family": FONT_FAMILY, "linespacing": 1.15, "parse_math": False, "usetex": False}
    figure.text(
        CANVAS_MARGIN / width,
        1 - (CANVAS_MARGIN + over) / height,
        "\n".join(head),
        va="top",
        size=10.5,
        weight="bold",
        **style,
    )
    figure.text(
        CANVAS_MARGIN / width, CANVAS_MARGIN / height, "\n".join(foot), va="bottom", size=7.5, color="#333333", **style
    )
    if flag:
        edge, ground = CANVAS_MARGIN + 3 / 72, {"facecolor": "#A50F15", "edgecolor": "none", "pad": 3}
        look: Any = {"va": "top", "size": 8.5, "weight": "bold", "color": "white", "bbox": ground}
        figure.text(edge / width, 1 - edge / height, "\n".join(flag), gid="banner", **look, **style)
    return figure


def make_axes(width: float, height: float) -> Axes:
    """Return axes of that size in inches on a canvas of their own, which `complete` cuts to measure.

    >>> blank(4, 3).get_window_extent().width / 150 == 4
    np.True_
    """
    return Figure(figsize=(width / 0.5, height / 0.5), dpi=150).add_axes((0.25, 0.25, 0.5, 0.5))


def add_inset_axes(ax: Axes, host_size: tuple[float, float], box: tuple[float, float, float, float]) -> Axes:
    """Return axes inside of others, which only lend their place: `complete` cuts the canvas around all.

    >>> host = blank(4, 3)
    >>> float(inset(host, (4, 3), (2, 0, 1, 1)).get_window_extent().width.round(3)) / 150
    1.0

    Args:
        ax: the others.
        host_size: their width and height in inches, as meant.
        box: left, bottom, width and height in inches; it may lie outside.
    """
    (wide, tall), (left, below, across, up) = host_size, box
    return ax.inset_axes((left / wide, below / tall, across / wide, up / tall))
