"""Image noise: pixels change as a function of image, settings and seed; size, mode and words stay."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defenses.catalog import find_defense_classes, get_defense
from defenses.contract import Chat, Message
from defenses.errors import UserError
from defenses.image_noise import ImageNoise
from defenses.images import QueryImage, get_last_image

NAMES = [name for name, cls in find_defense_classes().items() if issubclass(cls, ImageNoise)]
SETTINGS = {  # another value of a setting of each
    "gaussian_noise": {"strength": "0.3"},
    "image_blur": {"radius": "0.05"},
    "image_mask": {"rate": "0.5"},
    "image_crop": {"rate": "0.3"},
    "image_rotation": {"degrees": "40"},
    "solarize": {"threshold": "50"},
    "posterize": {"bits": "1"},
    "color_jitter": {"strength": "0.9"},
    "jpeg": {"quality": "5"},
    "image_denoise": {"size": "9"},
}
WITHOUT_SETTINGS = {"horizontal_flip", "vertical_flip", "grayscale", "blank_image"}


def draw_picture() -> Image.Image:
    """Return a picture of all colors without symmetry, wider than high."""
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (48, 80, 3)).astype(np.uint8))


CHAT: Chat = [
    Message(role="user", content="Hello."),
    Message(role="assistant", content="Hello, what can I do?"),
    Message(role="user", content="What is this?", image=QueryImage("a.png", "0" * 64, draw_picture)),
]


def change_picture(name: str, seed: int = 0, **settings: str) -> QueryImage:
    """Return the image under a defense."""
    image = get_last_image(get_defense(name, settings).rewrite(CHAT, random.Random(seed)))
    assert image is not None
    return image


def read_pixels(image: QueryImage) -> bytes:
    return image.load().tobytes()


def test_every_image_noise_is_tested_with_another_setting() -> None:
    assert set(NAMES) == SETTINGS.keys() | WITHOUT_SETTINGS and len(NAMES) == 14


@pytest.mark.parametrize("name", NAMES)
def test_pixels_change_and_size_mode_and_words_stay(name: str) -> None:
    chat = get_defense(name).rewrite(CHAT, random.Random(0))
    image = chat[-1]["image"]
    pixels = image.load()
    assert (pixels.size, pixels.mode) == ((80, 48), "RGB") and pixels.tobytes() != draw_picture().tobytes()
    assert [turn["content"] for turn in chat] == [turn["content"] for turn in CHAT]
    assert CHAT[-1]["image"].digest == "0" * 64 != image.digest


@pytest.mark.parametrize("name", NAMES)
def test_the_change_depends_on_the_seed_and_the_settings_and_the_digest_on_the_change(name: str) -> None:
    images = [change_picture(name), change_picture(name), change_picture(name, seed=1)]
    if name in SETTINGS:
        images.append(change_picture(name, **SETTINGS[name]))
    pixels, digests = map(read_pixels, images), [image.digest for image in images]
    first, again, *others = pixels
    assert first == again == read_pixels(images[0]) and digests[0] == digests[1]
    is_random: Any = find_defense_classes()[name].is_random  # type: ignore[attr-defined]
    differs = [is_random, *[True] * (name in SETTINGS)]
    assert [other != first for other in others] == differs
    assert [digest != digests[0] for digest in digests[2:]] == differs


def test_a_share_of_the_image_is_masked() -> None:
    white = QueryImage("white", "1", lambda: Image.new("RGB", (70, 50), "white"))
    chat = [Message(role="user", content="?", image=white)]
    for rate in ("0.25", "1"):
        image = get_last_image(get_defense("image_mask", {"rate": rate}).rewrite(chat, random.Random(3)))
        assert image is not None
        pixels = np.asarray(image.load())
        assert (pixels == 0).mean() == pytest.approx(float(rate), abs=0.04)
        assert set(np.unique(pixels)) <= {0, 255}


def test_a_blank_image_is_white_and_a_control() -> None:
    assert set(change_picture("blank_image").load().tobytes()) == {255}
    assert get_defense("blank_image").family == "control"


def test_an_image_of_an_earlier_turn_is_changed_as_well() -> None:
    chat = [CHAT[-1], Message(role="assistant", content="A picture."), CHAT[0]]
    changed = get_defense("vertical_flip").rewrite(chat, random.Random(0))
    assert read_pixels(changed[0]["image"]) == read_pixels(change_picture("vertical_flip"))
    assert "image" not in changed[2]


def test_copies_of_jailguard_are_changed_in_different_ways() -> None:
    copies = get_defense("jailguard").rewrite_copies(CHAT, random.Random(0))
    images = [copy[-1]["image"] for copy in copies]
    assert len({image.digest for image in images}) == len({read_pixels(image) for image in images}) == 8
    masks = get_defense("jailguard", {"noise": "image_mask", "copies": "3"})
    rng = random.Random(4)
    expected = [get_defense("image_mask").rewrite(CHAT, rng)[-1]["image"].digest for _ in range(3)]
    copies = masks.rewrite_copies(CHAT, random.Random(4))
    assert [copy[-1]["image"].digest for copy in copies] == expected and len(set(expected)) == 3
    assert (masks.reads, masks.pool) == ("several", "mean")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gaussian_noise", {"strength": "0"}, "strength=0.0: it must be from 0.01 to 1"),
        ("image_mask", {"rate": "2"}, "rate=2.0: it must be a share"),
        ("image_crop", {"rate": "1"}, "rate=1.0"),
        ("image_denoise", {"size": "4"}, "size=4: it must be odd"),
        ("jpeg", {"quality": "96"}, "quality=96"),
        ("jailguard", {"copies": "11"}, "copies=11: it must be 1 to 10"),
    ],
)
def test_a_setting_out_of_range_is_rejected(name: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_defense(name, settings)


def test_a_stack_with_words_changes_both_and_draws_the_same_noise() -> None:
    from defenses.rng import QueryRng

    stack = get_defense("image_mask+self_reminder")
    chat = stack.rewrite(CHAT, QueryRng("0/q", stack.name))
    alone = get_defense("image_mask").rewrite(CHAT, QueryRng("0/q", "image_mask"))
    assert chat[-1]["image"] == alone[-1]["image"] != CHAT[-1]["image"]
    assert chat[0]["role"] == "system" and chat[-1]["content"] != CHAT[-1]["content"]
    assert stack.needs_images and not get_defense("policy+self_reminder").needs_images
