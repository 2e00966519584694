"""Load the images of queries: the same rules for every image, whatever set it belongs to."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.datasets.records import expand_path
from defenses.errors import UserError, check_unicode, describe_library_error
from defenses.images import QueryImage

if TYPE_CHECKING:
    from PIL.Image import Image

    from analysis.datasets.queries import Query

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_LOADING_RULES = b"image rules 1\n"  # is part of every digest; count up when a rule changes
_DOCUMENT_SUFFIXES = (".svg", ".svgz", ".pdf", ".eps", ".ps")  # drawings and pages, which have no pixels
_ADDRESS = re.compile(r"data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_MAX_NAME = 120  # characters of a path that are shown
# Nominal ranges of pixels that have more than 8 bits; in the mode I, values up to 255 could be 8-bit values.
_MAX_VALUES = {"F": 1.0}
_MAX_16_BIT_VALUE = 65535.0


def find_image_path(value: Any, folder: Path, place: str) -> Path:
    """Return the path in a cell of the column `image`.

    >>> find_image_path("pictures/1.png", Path("data"), "queries.csv").as_posix()
    'data/pictures/1.png'

    Args:
        value: of the cell.
        folder: folder to which a relative path is relative.
        place: file and query, for error messages.

    Raises:
        UserError: if the value is no path, or the path names no image of pixels.
    """
    if not isinstance(value, str | Path):
        raise UserError(f"{place}: image is {value!r:.60}; it takes the path of a file")
    name = str(value).strip()
    check_unicode(name, f"{place}: image")
    if _ADDRESS.match(name):
        raise UserError(
            f"{place}: the image {_shorten(name)} is an address or the image itself, and images are never "
            "downloaded; save it as a file and write its path"
        )
    if name.lower().endswith(_DOCUMENT_SUFFIXES):
        raise UserError(
            f"{place}: the image {_shorten(name)} is a drawing or a document without pixels; save it as a "
            ".png file"
        )
    return folder / expand_path(name)


class ImageFile(QueryImage):
    """An image in a file, which is opened when its digest or its pixels are needed first.

    A set may have many more images than the queries that are evaluated.
    """

    def __init__(self, path: Path, place: str) -> None:
        # The digest is computed below, so the fields are set one by one.
        object.__setattr__(self, "name", str(path))
        object.__setattr__(self, "load", self._load_pixels)
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_title", f"{place}: the image {_shorten(str(path))}")

    @cached_property
    def digest(self) -> str:  # a field of the base class
        """SHA-256 of the file's content and of the rules by which it is loaded."""
        return _hash_content(_read_content(self._path, self._title))

    def _load_pixels(self) -> Image:
        digest, content = self.digest, _read_content(self._path, self._title)
        if _hash_content(content) != digest:
            raise UserError(f"{self._title} has changed since it was first read; run again")
        return decode_image(content, self._title)

    if TYPE_CHECKING:
        _path: Path
        _title: str


def open_image(path: Path, place: str) -> QueryImage:
    """Return the image in a file; the file is opened when its digest or its pixels are needed.

    Args:
        path: of the file.
        place: file and query that the image belongs to, for error messages.

    Raises:
        UserError: if there is no such file; `digest` and `load` of the image raise one if it cannot be read,
            and `load` if it is no image, damaged, animated or too large, or if the file has changed since.
    """
    image = ImageFile(path, place)
    try:
        exists = path.is_file()
    except (OSError, ValueError):  # ValueError: a null character
        exists = False
    if not exists:
        _read_content(path, image._title)  # says why it cannot be read
    return image


def list_images(queries: Iterable[Query]) -> list[QueryImage]:
    """Return the images of queries, each content once."""
    images = (query.image for query in queries if query.image is not None)
    return list({image.digest: image for image in images}.values())


def check_images(queries: Iterable[Query], on_progress: Callable[[int, int], None]) -> None:
    """Decode every image of the queries once, so that a bad one is reported before anything takes long.

    Args:
        queries: with or without images.
        on_progress: called after each image with the number of decoded images and of all images.

    Raises:
        UserError: if an image cannot be decoded.
    """
    images = list_images(queries)
    for number, image in enumerate(images, 1):
        image.load()
        on_progress(number, len(images))


def decode_image(content: bytes, name: str) -> Image:
    """Return the pixels of an image file in the mode RGB, upright and without transparency.

    Args:
        content: of the file.
        name: of the image, for error messages.

    Raises:
        UserError: if the content is no image in one of `IMAGE_FORMATS`, damaged, animated or too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not content:
        raise UserError(f"{name} is an empty file; get it again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, which do not change the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
                _check_single_frame(image, name)
                image.load()
                return _convert_to_rgb(ImageOps.exif_transpose(image), name)
        except UserError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise UserError(
                f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"
            ) from error
        except UnidentifiedImageError as error:
            raise UserError(
                f"{name} is not an image that can be read ({', '.join(IMAGE_FORMATS)}), whatever its name "
                "says, or it has no pixels; save it as a .png file"
            ) from error
        except Exception as error:  # decoders raise many kinds of errors
            raise UserError(
                f"{name} is damaged and cannot be decoded ({describe_library_error(error)}); get it again"
            ) from error


def _check_single_frame(image: Image, name: str) -> None:
    """Raise if an image has several frames; a photo in the format MPO has previews beside its only one."""
    n_frames = getattr(image, "n_frames", 1)
    if n_frames > 1 and image.format != "MPO":
        raise UserError(
            f"{name} has {n_frames} frames or pages, and a model sees one; save the one that counts as a "
            ".png file"
        )


def _convert_to_rgb(image: Image, name: str) -> Image:
    """Return the image in the mode RGB; what is transparent becomes white."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scale_to_8_bits(image, name)
    elif {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        pixels = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    return image.convert("RGB")


def _scale_to_8_bits(image: Image, name: str) -> Image:
    """Return a gray image of 16 or 32 bits in 8 bits, which `convert` would clip at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    lowest, highest = values.min(), values.max()
    max_value = _MAX_VALUES.get(image.mode, _MAX_16_BIT_VALUE)
    is_ambiguous = image.mode == "I" and highest <= 255
    if is_ambiguous or not (lowest >= 0 and highest <= max_value):
        raise UserError(
            f"{name} has pixel values from {lowest:g} to {highest:g}, whose range is not known; save it as "
            "a .png file with 8 bits"
        )
    scaled = np.rint(values * (255 / max_value))
    scaled[values == image.info.get("transparency")] = 255
    return Image.fromarray(scaled.astype(np.uint8))


def _read_content(path: Path, name: str) -> bytes:
    try:
        if path.is_dir():
            raise UserError(f"{name} is a folder; write the path of a file in it")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist; correct the path or add the file") from error
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{name} cannot be read ({reason}); correct the path or its permissions") from error


def _hash_content(content: bytes) -> str:
    return hashlib.sha256(_LOADING_RULES + content).hexdigest()


def _shorten(name: str) -> str:
    """Return the start of a long address, or the end of a long path, in one line."""
    text = " ".join(name.split())
    if len(text) <= _MAX_NAME:
        return text
    return f"{text[:40]}…" if _ADDRESS.match(text) else f"…{text[-_MAX_NAME:]}"
