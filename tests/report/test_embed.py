"""Embedded files and data survive unchanged, and no text leaves its element."""

import base64
import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image
from saved_runs import HOSTILE_TEXTS

from analysis.report.embed import dump_script_json, encode_picture, encode_table


@pytest.mark.parametrize("text", [*HOSTILE_TEXTS, "<!--<script>", "]]>", "\u2029"])
def test_no_text_ends_the_element_that_contains_it(text):
    dumped = dump_script_json({text: [text]})
    assert not set("<>&\u2028\u2029") & set(dumped)
    assert json.loads(dumped) == {text: [text]}


def test_a_picture_keeps_the_colors_of_its_small_marks_in_fewer_bytes():
    across, down = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 200))
    pixels = np.dstack([across, 0.5 * across + 0.5 * down, np.full_like(down, 200)])
    pixels = (pixels * np.random.default_rng(0).uniform(0.9, 1, pixels.shape)).astype(np.uint8)
    marks = ((213, 94, 0), (204, 121, 167), (0, 158, 115))
    for place, color in enumerate(marks):
        pixels[20:26, 20 + 30 * place : 26 + 30 * place] = color
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    address = encode_picture(buffer.getvalue())
    encoded = base64.b64decode(address.partition(",")[2])
    assert address.startswith("data:image/png;base64,") and len(encoded) < len(buffer.getvalue())
    decoded = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
    for place, color in enumerate(marks):
        assert np.abs(decoded[22, 23 + 30 * place] - color).max() <= 24


def test_a_table_can_be_restored_from_the_page():
    long_table = b"x,y\n" + b"1,2\n" * 9000
    for content, name in ((b"x\n1\n", "a.csv"), (long_table, "a.csv.gz")):
        saved_name, address = encode_table("a.csv", content)
        data = base64.b64decode(address.partition(",")[2])
        assert saved_name == name and (gzip.decompress(data) if name.endswith("gz") else data) == content
