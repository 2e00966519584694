"""Embed pictures, tables and data in an HTML page as text that a browser never runs as code."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL.Image import Image

MAX_PICTURE_WIDTH = 1900  # pixels
MAX_THUMBNAIL_SIDE = 256  # pixels
MAX_PLAIN_TABLE_BYTES = 20_000  # larger tables are compressed; smaller ones open in any program


def dump_script_json(value: Any) -> Markup:
    r"""Return JSON that stays data inside a script element, whatever text it contains.

    >>> str(dump_script_json({"text": "</script><b>&", "number": float("nan")}))
    '{"text":"\\u003c/script\\u003e\\u003cb\\u003e\\u0026","number":null}'

    Args:
        value: plain values, mappings and sequences; a number that is not finite becomes null.
    """
    from jinja2.utils import htmlsafe_json_dumps

    return htmlsafe_json_dumps(_replace_nonfinite(value), allow_nan=False, separators=(",", ":"))


def encode_picture(png: bytes) -> str:
    """Return a PNG as a data URI, with at most 256 colors and the maximal width."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as source:
        drawing = source.convert("RGBA")
    picture = Image.new("RGBA", drawing.size, "white")
    picture.alpha_composite(drawing)
    if picture.width > MAX_PICTURE_WIDTH:
        height = max(1, round(picture.height * MAX_PICTURE_WIDTH / picture.width))
        picture = picture.resize((MAX_PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    # Among Pillow's methods for 256 colors, this one preserves the colors of small marks.
    reduced = picture.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    reduced.save(buffer, "PNG", optimize=True)
    return _data_uri("image/png", min(buffer.getvalue(), png, key=len))


def encode_thumbnail(image: Image) -> str:
    """Return an RGB image as a data URI, reduced until its longer side is at most `MAX_THUMBNAIL_SIDE`."""
    small = image.copy()
    small.thumbnail((MAX_THUMBNAIL_SIDE, MAX_THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=75)
    return _data_uri("image/webp", buffer.getvalue())


def encode_table(name: str, content: bytes) -> tuple[str, str]:
    r"""Return the name for saving a table, and its data URI; a long table is compressed.

    >>> encode_table("a.csv", b"x\n1\n")
    ('a.csv', 'data:text/csv;base64,eAoxCg==')

    Args:
        name: of the CSV file.
        content: of the CSV file.
    """
    if len(content) <= MAX_PLAIN_TABLE_BYTES:
        return name, _data_uri("text/csv", content)
    return f"{name}.gz", _data_uri("application/gzip", gzip.compress(content, mtime=0))


def choose_fitting(sizes: Mapping[Any, int], budget: int) -> set[Any]:
    """Return the items that fit into the budget, taken in their order.

    >>> sorted(choose_fitting({"a": 5, "b": 9, "c": 4}, budget=10))
    ['a', 'c']
    """
    fitting = set()
    for name, size in sizes.items():
        if size <= budget:
            fitting.add(name)
            budget -= size
    return fitting


def build_content_policy(scripts: Iterable[str]) -> str:
    """Return a content security policy that allows these scripts and forbids every network request.

    >>> build_content_policy(["1"])[:38]
    "default-src 'none'; script-src 'sha256"
    """
    hashes = " ".join(f"'sha256-{_hash_script(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash_script(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _replace_nonfinite(value: Any) -> Any:
    """Copy plain values, with None for numbers that are not finite and Python numbers for NumPy's."""
    if isinstance(value, Mapping):
        return {str(key): _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(item) for item in value]
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
