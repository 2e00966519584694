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
    largest and the smallest value that are left tell what was cut off. What fills the margins may lie
    between them.

    Args:
        prepare: image → arguments of the model, among them `pixel_values`.
        size: width and height of the image, in pixels.
    """
    import numpy as np
    from PIL import Image as Images

    width, height = size
    low, high = 64, 192
    ramps = np.full((height, width, 3), 128, dtype=np.uint8)
    ramps[..., 0] = np.linspace(low, high, width).round()[None, :]
    ramps[..., 1] = np.linspace(low, high, height).round()[:, None]

    def read_channels(pixels: Any) -> list[Tensor]:
        values = prepare(Images.fromarray(pixels))["pixel_values"].float()
        if values.ndim == 2:  # patches, each with its channels one after another
            values = values.reshape(len(values), 3, -1).transpose(0, 1)
        else:
            values = values.movedim(-3, 0)
        return [channel.flatten() for channel in values[:2]]

    try:
        bounds = [read_channels(np.full_like(ramps, value)) for value in (low, high)]
        shares = []
        for channel, darkest, brightest in zip(read_channels(ramps), *bounds, strict=True):
            first, last = darkest.median(), brightest.median()
            places = (channel - first) / (last - first)
            places = places[(places > -0.02) & (places < 1.02)]
            shares.append(float((places.max() - places.min()).clamp(0, 1)))
    except (UserError, RuntimeError, ValueError, KeyError):
        return None
    return shares[0] * shares[1]
