"""Reading of the text in an image (OCR), with RapidOCR, whose weights come with its package."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from defenses.errors import UserError
from defenses.images import QueryImage

MISSING_OCR = "reading the text in images needs RapidOCR: pip install 'refusalscope[vision]'"
_MIN_CONFIDENCE = 0.5
# Named, so that RapidOCR never looks for others, and never downloads any.
_WEIGHT_FILES = {
    "Det": "PP-OCRv6_det_small.onnx",  # finds the lines
    "Rec": "PP-OCRv6_rec_small.onnx",  # reads a line
}
_LIST_ITEM = re.compile(r"(\d{1,2}[.)]|[•*-])(\s|$)")
_read_texts: dict[str, str] = {}  # digest of an image → its text


@dataclass(frozen=True)
class TextLine:
    """A line of text in an image.

    Attributes:
        text: the line.
        left: left edge, pixels.
        top: upper edge, pixels from the top.
        right: right edge, pixels.
        bottom: lower edge, pixels from the top.
    """

    text: str
    left: float
    top: float
    right: float
    bottom: float

    @property
    def height(self) -> float:
        """Height, pixels."""
        return self.bottom - self.top


def is_ocr_installed() -> bool:
    """Return whether the packages that read text in images are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("rapidocr", "onnxruntime"))


def read_image_text(image: QueryImage) -> str:
    """Return the text in an image, in reading order; empty if there is none.

    Lines are read from top to bottom and from left to right. A line that continues the one above it is
    joined to it by a space, and other lines begin a new line. Lines that are read with a confidence below
    0.5 are left out, and text that is upside down is not read. The text of an image is kept in memory.

    Args:
        image: the image.

    Raises:
        UserError: if RapidOCR is not installed.
    """
    if image.digest not in _read_texts:
        _read_texts[image.digest] = join_lines(_find_lines(image))
    return _read_texts[image.digest]


def join_lines(lines: list[TextLine]) -> str:
    r"""Return the text of lines in reading order, with the lines of a paragraph joined by spaces.

    A line continues the one above it if its first word would not have fit there: into the width of the widest
    line. A list item, letters of twice or half the size, or a gap of more than half a line begin a new line.

    >>> first, second = TextLine("Bake a loaf", 0, 0, 110, 20), TextLine("today.", 0, 22, 60, 42)
    >>> join_lines([second, first, TextLine("1.", 0, 44, 20, 64)])
    'Bake a loaf today.\n1.'
    """
    rows = _merge_rows(lines)
    text, edge = "", max((row.right for row in rows), default=0)
    for row, above in zip(rows, [None, *rows], strict=False):
        if above is not None:
            text += " " if _continues(row, above, edge) else "\n"
        text += row.text
    return text


def _continues(row: TextLine, above: TextLine, edge: float) -> bool:
    """Return whether a row continues the row above it."""
    letter_width = (row.right - row.left) / len(row.text)
    first_word = row.text.split()[0]
    fits_above = above.right + letter_width * (1 + len(first_word)) <= edge
    has_same_size = max(row.height, above.height) < 2 * min(row.height, above.height)
    is_near = row.top - above.bottom < 0.5 * min(row.height, above.height)
    return not fits_above and has_same_size and is_near and not _LIST_ITEM.match(row.text)


def _merge_rows(lines: list[TextLine]) -> list[TextLine]:
    """Return the rows from top to bottom; lines beside each other become one row, from left to right."""
    rows: list[list[TextLine]] = []
    for line in sorted(lines, key=lambda line: line.top + line.bottom):
        center = (line.top + line.bottom) / 2
        if rows and rows[-1][0].top <= center <= rows[-1][0].bottom:
            rows[-1].append(line)
        else:
            rows.append([line])
    merged = []
    for row in rows:
        row.sort(key=lambda line: line.left)
        bounds = min(line.top for line in row), max(line.right for line in row)
        bottom = max(line.bottom for line in row)
        merged.append(TextLine(" ".join(line.text for line in row), row[0].left, *bounds, bottom))
    return merged


def _find_lines(image: QueryImage) -> list[TextLine]:
    """Return the lines of text in an image, in any order."""
    found = _load_engine()(image.load())
    if found.txts is None:
        return []
    return [
        TextLine(text.strip(), *box.min(axis=0).tolist(), *box.max(axis=0).tolist())
        for box, text, confidence in zip(found.boxes, found.txts, found.scores, strict=True)
        if confidence >= _MIN_CONFIDENCE and text.strip()
    ]


@cache
def _load_engine() -> Any:
    """Return the engine of this process, which uses one thread and prints nothing."""
    if not is_ocr_installed():
        raise UserError(MISSING_OCR)
    import rapidocr

    folder = Path(rapidocr.__file__).parent / "models"
    paths = {part: folder / name for part, name in _WEIGHT_FILES.items()}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise UserError(
            f"the installed RapidOCR comes without {missing[0]}: pip install rapidocr==3.10.0, which has it"
        )
    return rapidocr.RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.use_cls": False,  # it turned some upright lines upside down, which were then misread
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            **{f"{part}.model_path": str(path) for part, path in paths.items()},
        }
    )
