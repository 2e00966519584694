"""What a page carries within itself: pictures, tables and numbers, as text that no browser takes for code."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

MAX_PICTURE_WIDTH = 1900  # pixels across a picture
MAX_PLAIN_TABLE_BYTES = (
    20_000  # bytes of a table up to which it is carried as it is, so that any program opens it
)


def dump_script_json(value: Any) -> str:
    r"""Return JSON that stays data inside of a script element, whatever texts it holds.

    >>> dump_script_json({"text": "</script><b>&", "number": float("nan")})
    '{"text":"\\u003c/script\\u003e\\u003cb\\u003e\\u0026","number":null}'

    Args:
        value: of plain values; a number that is not finite becomes null.
    """
    text = json.dumps(_replace_nonfinite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def encode_picture(png: bytes) -> str:
    """Return a PNG as an address that holds it, in fewer colors and bytes."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as opened:
        drawn = opened.convert("RGBA")
    paper = Image.new("RGBA", drawn.size, "white")
    paper.alpha_composite(drawn)
    if paper.width > MAX_PICTURE_WIDTH:
        tall = max(1, round(paper.height * MAX_PICTURE_WIDTH / paper.width))
        paper = paper.resize((MAX_PICTURE_WIDTH, tall), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    # Of Pillow's ways to 256 colors the one that keeps those of small marks.
    few = paper.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(small, "PNG", optimize=True)
    return _data_uri("image/png", min(small.getvalue(), png, key=len))


def encode_table(name: str, content: bytes) -> tuple[str, str]:
    r"""Return the name under which a table is saved, and an address that holds it, packed if it is long.

    >>> encode_table("a.csv", b"x\n1\n")
    ('a.csv', 'data:text/csv;base64,eAoxCg==')

    Args:
        name: of the file.
        content: what is in it.
    """
    if len(content) <= MAX_PLAIN_TABLE_BYTES:
        return name, _data_uri("text/csv", content)
    return f"{name}.gz", _data_uri("application/gzip", gzip.compress(content, mtime=0))


def choose_fitting(sizes: Mapping[Any, int], budget: int) -> set[Any]:
    """Return which of several things are carried, in their order, where not all find room.

    >>> sorted(choose_fitting({"a": 5, "b": 9, "c": 4}, budget=10))
    ['a', 'c']
    """
    kept = set()
    for name, size in sizes.items():
        if size <= budget:
            kept.add(name)
            budget -= size
    return kept


def build_content_policy(scripts: Iterable[str]) -> str:
    """Return the page's content security policy: these scripts run, and no request leaves.

    >>> build_content_policy(["1"])[:38]
    "default-src 'none'; script-src 'sha256"
    """
    allowed = " ".join(f"'sha256-{_hash_script(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash_script(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _replace_nonfinite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(one) for one in value]
    if hasattr(value, "item"):  # of numpy
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
