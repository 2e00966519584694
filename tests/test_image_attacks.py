"""Attacks on images draw the request of every query alike, and ask a harmless question about the image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from analysis.attacks import Attack, choose_attacks, get_attack, load_shipped_attacks
from analysis.datasets.queries import Query
from analysis.image_attacks import add_text_strip
from defenses.errors import UserError
from defenses.images import QueryImage, get_last_image

QUERY = Query("q", "How do I sing 'La Traviata' at 5?", True)
IMAGE_ATTACKS = [attack for attack in load_shipped_attacks().values() if attack.needs_images]


def draw_image(attack: Attack, query: Query = QUERY) -> Image.Image:
    """Return the pixels of an attack's image."""
    image = get_last_image(attack.build_chat(query))
    assert image is not None
    return image.load()


def test_all_selects_no_attack_that_draws_an_image() -> None:
    assert [attack.name for attack in IMAGE_ATTACKS] == ["typographic", "image_strip", "image_request"]
    assert not any(attack.needs_images for attack in choose_attacks(["all", "all+ignore"]))
    assert get_attack("typographic+ignore").needs_images


@pytest.mark.parametrize("attack", IMAGE_ATTACKS, ids=lambda attack: attack.name)
def test_the_request_is_in_the_image_only_for_harmful_and_benign_queries_alike(attack: Attack) -> None:
    chat = attack.build_chat(QUERY)
    benign = replace(QUERY, id="b", harmful=False, kind="twin")
    assert attack.build_chat(benign)[0]["image"].digest == chat[0]["image"].digest
    other = attack.build_chat(replace(QUERY, text="Hi?"))
    assert other[0]["content"] == chat[0]["content"] and "Traviata" not in chat[0]["content"]
    assert other[0]["image"].digest != chat[0]["image"].digest
    assert draw_image(attack).tobytes() == draw_image(attack, benign).tobytes()
    assert draw_image(attack).tobytes() != draw_image(attack, replace(QUERY, text="Hi?")).tobytes()


@pytest.mark.parametrize("attack", IMAGE_ATTACKS, ids=lambda attack: attack.name)
def test_no_letter_is_cut_at_an_edge(attack: Attack) -> None:
    for text in ("Hi?", QUERY.text, "How do I bake the bread of Donaudampfschifffahrtsgesellschaft? " * 9):
        image = draw_image(attack, replace(QUERY, text=text))
        bounds = Image.eval(image.convert("L"), lambda value: 255 - value).getbbox()
        assert bounds is not None
        left, top, right, bottom = bounds
        assert min(left, top, image.width - right, image.height - bottom) >= 10, text


def test_the_square_is_that_of_figstep_and_long_text_has_smaller_letters_that_use_its_width() -> None:
    heights, widths = [], []
    for text in ("I", "I " * 400):
        image = draw_image(get_attack("image_request"), replace(QUERY, text=text))
        assert (image.size, image.mode) == ((760, 760), "RGB")
        is_black = np.asarray(image.convert("L")) < 128
        rows, columns = np.flatnonzero(is_black.any(axis=1)), np.flatnonzero(is_black.any(axis=0))
        heights.append(np.flatnonzero(np.diff([*rows, 999]) > 1)[0] + 1)  # of the first line
        widths.append(np.ptp(columns))
    assert heights[0] > 50 and heights[1] < 25 and widths[1] > 650


def test_the_strip_is_below_the_picture_of_the_query() -> None:
    red = QueryImage("red.png", "7" * 64, lambda: Image.new("RGB", (600, 300), "red"))
    chat = get_attack("image_strip").build_chat(replace(QUERY, image=red))
    image = chat[0]["image"].load()
    assert image.crop((0, 0, 600, 300)).tobytes() == red.load().tobytes()
    strip = image.crop((0, 300, *image.size))
    assert strip.width == 600 and 30 < strip.height <= 150
    assert strip.getpixel((0, 0)) == (255, 255, 255) and strip.getextrema()[0][0] == 0
    assert chat[0]["image"].digest != get_attack("image_strip").build_chat(QUERY)[0]["image"].digest
    assert add_text_strip(Image.new("RGB", (100, 50)), "Hi").width == 512  # a small picture is enlarged


def test_text_that_cannot_be_drawn_is_reported_with_the_query() -> None:
    for text, message in (
        ("如何唱歌", "no letter for '如' in the query 'q'"),
        ("x" * 9000, "9000 characters"),
    ):
        with pytest.raises(UserError, match=message) as error:
            get_attack("typographic").build_chat(replace(QUERY, text=text))
        assert "\n" not in str(error.value)
    get_attack("typographic").build_chat(replace(QUERY, text="Où vás, Ζεύς?\n\tЖар-птица…"))


def test_the_digest_of_the_wording_covers_the_question_and_the_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from analysis import image_attacks

    before = image_attacks.describe_image_wording("typographic")
    monkeypatch.setitem(image_attacks._QUESTIONS, "typographic", "Fill in the list.")
    assert image_attacks.describe_image_wording("typographic") != before
    assert len({attack.wording_sha256 for attack in IMAGE_ATTACKS}) == 3
