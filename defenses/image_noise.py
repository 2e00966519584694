"""Image noise: changes of a query's image that keep most of its content, and break brittle attack images.

A change is a function of the image, the settings and a seed, which is drawn by the generator of the query:
the image of a query is changed in the same way in every run with that seed. Size and mode (RGB) stay, and a
chat without an image stays as it is. Pillow and numpy are imported when pixels are needed.
"""

from __future__ import annotations

import io
import json
import random
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

from defenses.chats import copy_chat
from defenses.contract import Chat, Defense, Source
from defenses.images import edit_images
from defenses.perturbations import check_rate
from defenses.settings import get_settings

if TYPE_CHECKING:
    from PIL.Image import Image

_JAILGUARD_SOURCE = Source(
    "JailGuard: A Universal Detection Framework for Prompt-based Attacks on LLM Systems "
    "(Zhang et al., 2023), one of its changes of images",
    "https://arxiv.org/abs/2312.10766",
    wording="no text of its own; the strength is ours",
)
_N_MASK_CELLS = 16  # the mask divides each side of the image into as many cells


@dataclass(frozen=True)
class ImageNoise(Defense):
    """Base class of defenses that change the image of a query and nothing else.

    Attributes:
        is_random: whether the change depends on the seed.
    """

    family = "image_noise"
    needs_images = True
    is_random: ClassVar[bool] = True

    @abstractmethod
    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the changed image, of the same size and mode.

        Args:
            image: in mode RGB.
            rng: the only source of randomness.
        """

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with its image changed."""
        seed = rng.getrandbits(32) if self.is_random else 0
        identity = json.dumps([self.name, get_settings(self), seed], default=str)
        return edit_images(chat, lambda image: self.change_image(image, random.Random(seed)), identity)


def _check_range(name: str, value: float, lowest: float, highest: float) -> None:
    """Raise ValueError unless a setting is within its range."""
    if not lowest <= value <= highest:
        raise ValueError(f"{name}={value}: it must be from {lowest:g} to {highest:g}")


@final
@dataclass(frozen=True)
class GaussianNoise(ImageNoise):
    """Adds Gaussian noise to the pixels of the image.

    Adversarial pixels are optimized to the last digit, so noise is expected to break them and to leave the
    content recognizable.

    Attributes:
        strength: standard deviation of the noise, as a share of the range of a pixel, up to 1.
    """

    source = Source(
        "How Jailbreak Defenses Work and Ensemble? (Long et al., EMNLP Findings 2025), noise injection",
        "https://arxiv.org/abs/2502.14486",
        wording="no text of its own; the strength is ours",
    )

    strength: float = 0.1

    def __post_init__(self) -> None:
        """Check the strength."""
        _check_range("strength", self.strength, 0.01, 1)

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the image with noise."""
        import numpy as np
        from PIL import Image as image_module

        pixels = np.asarray(image, dtype=np.float64)
        # The stream of RandomState is the same in every version of numpy.
        noise = np.random.RandomState(rng.getrandbits(32)).normal(0, 255 * self.strength, pixels.shape)
        return image_module.fromarray(np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8))


@final
@dataclass(frozen=True)
class ImageBlur(ImageNoise):
    """Blurs the image with a Gaussian filter.

    Fine patterns and small letters disappear; large shapes stay.

    Attributes:
        radius: standard deviation of the filter, as a share of the shorter side, up to 0.1.
    """

    source = _JAILGUARD_SOURCE
    is_random = False

    radius: float = 0.005

    def __post_init__(self) -> None:
        """Check the radius."""
        _check_range("radius", self.radius, 0.001, 0.1)

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the blurred image."""
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(self.radius * min(image.size)))


@final
@dataclass(frozen=True)
class ImageMask(ImageNoise):
    """Blackens a random share of the image.

    The image is divided into 16 × 16 cells, of which a share becomes black. An attack that needs the whole
    image is expected to fail.

    Attributes:
        rate: share of the cells that become black.
    """

    source = _JAILGUARD_SOURCE

    rate: float = 0.2

    def __post_init__(self) -> None:
        """Check that the rate is in (0, 1]."""
        check_rate(self.rate)

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the image with black cells."""
        masked, (width, height), n = image.copy(), image.size, _N_MASK_CELLS
        for cell in rng.sample(range(n * n), max(1, round(self.rate * n * n))):
            row, column = divmod(cell, n)
            top, bottom = height * row // n, height * (row + 1) // n
            left, right = width * column // n, width * (column + 1) // n
            masked.paste((0, 0, 0), (left, top, right, bottom))
        return masked


@final
@dataclass(frozen=True)
class ImageCrop(ImageNoise):
    """Cuts a random part out of the image and enlarges it to the size of the whole.

    Content near the edges is lost, such as a line of text at the lower edge, and no pixel keeps its place.

    Attributes:
        rate: share by which both sides become shorter, below 1.
    """

    source = _JAILGUARD_SOURCE

    rate: float = 0.1

    def __post_init__(self) -> None:
        """Check the rate."""
        _check_range("rate", self.rate, 0.01, 0.9)

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the enlarged part."""
        from PIL.Image import Resampling

        width, height = (side * (1 - self.rate) for side in image.size)
        left, top = (rng.uniform(0, side * self.rate) for side in image.size)
        return image.resize(image.size, Resampling.BICUBIC, (left, top, left + width, top + height))


@final
@dataclass(frozen=True)
class HorizontalFlip(ImageNoise):
    """Exchanges the left and the right of the image.

    Objects stay recognizable, and letters are mirrored.
    """

    source = _JAILGUARD_SOURCE
    is_random = False

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the mirrored image."""
        from PIL import ImageOps

        return ImageOps.mirror(image)


@final
@dataclass(frozen=True)
class VerticalFlip(ImageNoise):
    """Exchanges the top and the bottom of the image.

    Objects are upside down, and letters are mirrored.
    """

    source = _JAILGUARD_SOURCE
    is_random = False

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the flipped image."""
        from PIL import ImageOps

        return ImageOps.flip(image)


@final
@dataclass(frozen=True)
class ImageRotation(ImageNoise):
    """Rotates the image by a random angle about its center.

    The corners that become empty are white, and the corners that leave the frame are lost.

    Attributes:
        degrees: largest angle in either direction, 1 to 180.
    """

    source = _JAILGUARD_SOURCE

    degrees: float = 15.0

    def __post_init__(self) -> None:
        """Check the angle."""
        _check_range("degrees", self.degrees, 1, 180)

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the rotated image."""
        from PIL.Image import Resampling

        angle = rng.uniform(-self.degrees, self.degrees)
        return image.rotate(angle, Resampling.BICUBIC, fillcolor=(255, 255, 255))


@final
@dataclass(frozen=True)
class Solarize(ImageNoise):
    """Inverts all bright pixels of the image.

    Shapes stay and colors change: black letters on white become black on black.

    Attributes:
        threshold: brightness from which a value is inverted, 0 to 255.
    """

    source = _JAILGUARD_SOURCE
    is_random = False

    threshold: int = 128

    def __post_init__(self) -> None:
        """Check the threshold."""
        _check_range("threshold", self.threshold, 0, 255)

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the image with bright pixels inverted."""
        from PIL import ImageOps

        return ImageOps.solarize(image, self.threshold)


@final
@dataclass(frozen=True)
class Posterize(ImageNoise):
    """Reduces the number of colors of the image.

    Small differences between pixels disappear, and adversarial pixels with them; shapes and letters stay.

    Attributes:
        bits: bits that are kept of each color, 1 to 7 of 8.
    """

    source = _JAILGUARD_SOURCE
    is_random = False

    bits: int = 2

    def __post_init__(self) -> None:
        """Check the number of bits."""
        _check_range("bits", self.bits, 1, 7)

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the image with fewer colors."""
        from PIL import ImageOps

        return ImageOps.posterize(image, self.bits)


@final
@dataclass(frozen=True)
class Grayscale(ImageNoise):
    """Removes the colors of the image.

    Brightness stays. An image in black and white, such as drawn text, does not change.
    """

    source = _JAILGUARD_SOURCE
    is_random = False

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the image in shades of gray."""
        return image.convert("L").convert("RGB")


@final
@dataclass(frozen=True)
class ColorJitter(ImageNoise):
    """Changes brightness, contrast and saturation of the image at random.

    Shapes and letters stay.

    Attributes:
        strength: largest change of each, as a share, up to 1.
    """

    source = _JAILGUARD_SOURCE

    strength: float = 0.5

    def __post_init__(self) -> None:
        """Check the strength."""
        _check_range("strength", self.strength, 0.01, 1)

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the image with the three changes one after the other."""
        from PIL import ImageEnhance

        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(rng.uniform(1 - self.strength, 1 + self.strength))
        return image


@final
@dataclass(frozen=True)
class Jpeg(ImageNoise):
    """Compresses the image as JPEG and reads it again.

    The compression removes fine patterns that people do not see, among them adversarial pixels.

    Attributes:
        quality: quality of the compression, 1 to 95; low values remove more.
    """

    source = Source(
        "A study of the effect of JPG compression on adversarial images (Dziugaite et al., 2016)",
        "https://arxiv.org/abs/1608.00853",
        wording="no text of its own; the quality is ours",
    )
    is_random = False

    quality: int = 50

    def __post_init__(self) -> None:
        """Check the quality."""
        _check_range("quality", self.quality, 1, 95)

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the image after compression."""
        from PIL import Image as image_module

        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.quality)
        with image_module.open(buffer, formats=("JPEG",)) as compressed:
            return compressed.convert("RGB")


@final
@dataclass(frozen=True)
class ImageDenoise(ImageNoise):
    """Removes fine noise from the image with a median filter.

    The authors denoise the image step by step with a diffusion model, and reject a query if the similarity of
    image and text changes much. Here a median filter takes the place of the diffusion model, and the model
    reads the result.

    Attributes:
        size: side of the filter in pixels, odd, 3 to 15.
    """

    source = Source(
        "Cross-modality Information Check for Detecting Jailbreaking in Multimodal Large Language Models "
        "(Xu et al., EMNLP Findings 2024), its denoising",
        "https://arxiv.org/abs/2407.21659",
        wording="no text of its own; the filter is ours",
    )
    is_random = False

    size: int = 5

    def __post_init__(self) -> None:
        """Check the size."""
        _check_range("size", self.size, 3, 15)
        if self.size % 2 == 0:
            raise ValueError(f"size={self.size}: it must be odd")

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return the filtered image."""
        from PIL import ImageFilter

        return image.filter(ImageFilter.MedianFilter(self.size))


@final
@dataclass(frozen=True)
class BlankImage(ImageNoise):
    """Replaces the image by a white one of the same size.

    This is a control, not a defense: what stays under it is due to the words and to the presence of an image,
    and not to what the image shows.
    """

    family = "control"
    source = Source("control of this project", wording="no text of its own")
    is_random = False

    def change_image(self, image: Image, rng: random.Random) -> Image:
        """Return a white image."""
        from PIL import Image as image_module

        return image_module.new("RGB", image.size, (255, 255, 255))


# The changes that copies draw from.
_COPY_NOISE: dict[str, ImageNoise] = {
    noise.name: noise
    for noise in (
        *(HorizontalFlip(), VerticalFlip(), ImageRotation(), ImageCrop(), ImageMask(), ImageBlur()),
        *(Solarize(), Posterize(), Grayscale(), ColorJitter()),
    )
}


@final
@dataclass(frozen=True)
class Jailguard(Defense):
    """Scores several changed copies of the image and decides by their mean.

    The authors generate a response to each copy and reject the query if the responses differ much, because
    attacks are less robust than ordinary queries. Here the margin is the mean over the copies; the share of
    copies that refuse is reported as `vote`. Each copy is changed in another of ten ways, or all in one way
    with other random numbers.

    Attributes:
        copies: number of copies; with `any`, at most the number of changes.
        noise: the change of every copy; `any` draws one for each copy, without replacement.
    """

    cost = "N calls"
    reads = "several"
    family = "image_noise"
    needs_images = True
    source = replace(
        _JAILGUARD_SOURCE,
        title="JailGuard: A Universal Detection Framework for Prompt-based Attacks on LLM Systems "
        "(Zhang et al., 2023)",
        wording="no text of its own; the strengths are ours",
    )

    copies: int = 8
    noise: Literal[
        "any",
        "color_jitter",
        "image_crop",
        "image_mask",
        "image_rotation",
    ] = "any"

    def __post_init__(self) -> None:
        """Check the number of copies."""
        if self.copies < 1:
            raise ValueError(f"copies={self.copies}: at least 1 is required")
        if self.noise == "any" and self.copies > len(_COPY_NOISE):
            raise ValueError(f"copies={self.copies}: it must be 1 to {len(_COPY_NOISE)} (number of changes)")

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return one changed copy."""
        name = rng.choice(list(_COPY_NOISE)) if self.noise == "any" else self.noise
        return _COPY_NOISE[name].rewrite(chat, rng)

    def rewrite_copies(self, chat: Chat, rng: random.Random) -> list[Chat]:
        """Return the changed copies; a chat without an image as its only copy."""
        if not any("image" in message for message in chat):
            return [copy_chat(chat)]
        is_any = self.noise == "any"
        names = rng.sample(list(_COPY_NOISE), self.copies) if is_any else [self.noise] * self.copies
        return [_COPY_NOISE[name].rewrite(chat, rng) for name in names]
