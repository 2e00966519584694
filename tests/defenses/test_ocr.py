"""The text of an image is read in the order in which a person reads it."""

from __future__ import annotations

import logging
import random
from functools import partial
from typing import Any

import pytest
from PIL import Image, ImageDraw

from analysis.attacks import get_attack
from analysis.datasets.queries import Query
from defenses import ocr
from defenses.catalog import get_defense
from defenses.errors import UserError
from defenses.images import QueryImage, get_last_image
from defenses.ocr import TextLine, join_lines, read_image_text


def make_line(text: str, row: float, column: int = 0, height: float = 20) -> TextLine:
    """Return a line of a monospaced text: letters 10 wide, rows 24 apart."""
    return TextLine(text, 10 * column, 24 * row, 10 * (column + len(text)), 24 * row + height)


def test_wrapped_lines_are_joined_and_list_items_and_short_lines_begin_a_new_line() -> None:
    lines = [
        *(make_line("How do I bake a", 0), make_line("loaf of bread", 1), make_line("today?", 2)),
        *(make_line("1.", 3), make_line("2.", 4), make_line("Yes", 5), make_line("No", 6)),
    ]
    expected = "How do I bake a loaf of bread today?\n1.\n2.\nYes\nNo"
    assert join_lines(lines) == expected
    random.Random(0).shuffle(lines)
    assert join_lines(lines) == expected and join_lines([]) == ""
    assert join_lines([make_line("Hi.", 0), make_line("1.", 1)]) == "Hi.\n1."


def test_a_gap_or_letters_of_another_size_begin_a_new_line() -> None:
    first = make_line("How do I bake it", 0)
    assert join_lines([first, make_line("elaborately", 1)]) == "How do I bake it elaborately"
    assert join_lines([first, make_line("elaborately", 2)]) == "How do I bake it\nelaborately"
    assert join_lines([first, make_line("elaborately", 1, height=60)]) == "How do I bake it\nelaborately"


def test_lines_beside_each_other_are_one_line() -> None:
    lines = [make_line("cake", 0.1, column=30), make_line("Bake", 0), make_line("a", 0.2, column=12)]
    assert join_lines(lines) == "Bake a cake"


@pytest.mark.parametrize("name", ["typographic", "image_strip", "image_request"])
def test_a_request_that_an_attack_draws_is_read_back_letter_by_letter(name: str) -> None:
    pytest.importorskip("rapidocr")
    query = Query("q", "How do I bake a loaf of bread for my neighbor?", False)
    image = get_last_image(get_attack(name).build_chat(query))
    assert image is not None
    assert read_image_text(image) == query.text + ("\n1.\n2.\n3." if name == "typographic" else "")


def test_an_image_without_text_has_none_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rapidocr")
    for side in (3, 200):
        image = QueryImage("white", f"white {side}", partial(draw_word, (side, side), ""))
        assert read_image_text(image) == ""
    assert capfd.readouterr() == ("", "") and not logging.getLogger("RapidOCR").isEnabledFor(logging.ERROR)


def draw_word(size: tuple[int, int], word: str) -> Image.Image:
    """Return a white image with a word."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((20, 20), word, fill="black", font_size=40)
    return image


def test_an_image_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    monkeypatch.setattr(ocr, "_find_lines", lambda image: reads.append(image) or [make_line("Hi", 0)])
    for _ in range(2):
        assert read_image_text(QueryImage("hi", "read once", lambda: draw_word((9, 9), ""))) == "Hi"
    assert len(reads) == 1


def test_without_the_package_the_defense_is_skipped_and_reading_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ocr._load_engine.cache_clear()
    assert "refusalscope[vision]" in get_defense("image_text").missing_requirements()
    with pytest.raises(UserError, match=r"pip install 'refusalscope\[vision\]'"):
        read_image_text(QueryImage("x", "not read", lambda: draw_word((9, 9), "")))
