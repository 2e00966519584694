"""The share of an image's pixels that reach the model, measured with an image that shows where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from defenses.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def measure_pixel_share(prepare: Callable[[Image], dict[str, Tensor]], size: tuple[int, int]) -> float | None:
    """Return the share of an image's pixels that reach the model, from 0 to 1; None if it cannot be measured.

    An image whose red rises from left to right and whose green rises from top to bottom is prepared; the
    largest and the smallest value that are left tell what was cut off. Which prepared values are red or green
    follows from images that differ in that color only, whatever their order and what fills the margins.

    Args:
        prepare: image → arguments of the model, among them `pixel_values`.
        size: width and height of the image, in pixels.
    """
    import numpy as np
    from PIL import Image as Images

    width, height = size
    low, high = 64, 192
    dark = np.full((height, width, 3), low, dtype=np.uint8)
    rising = dark.copy()
    rising[..., 0] = np.linspace(low, high, width).round()[None, :]
    rising[..., 1] = np.linspace(low, high, height).round()[:, None]

    def read_values(pixels: Any) -> Tensor:
        return prepare(Images.fromarray(pixels))["pixel_values"].float()

    share = 1.0
    try:
        lowest, values = read_values(dark), read_values(rising)
        for channel in (0, 1):
            bright = dark.copy()
            bright[..., channel] = high
            span = read_values(bright) - lowest
            is_channel = span > 0
            places = ((values - lowest)[is_channel] / span[is_channel]).clamp(0, 1)
            share *= float(places.max() - places.min())
    except (UserError, RuntimeError, ValueError, KeyError):
        return None
    return share
