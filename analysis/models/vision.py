"""Images as a model reads them: pixels prepared once per image, features computed once and reused.

An image is prepared by the processor of the model, alone, so that no other image of a batch matters. Its
features are computed alone as well.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from analysis.checkpoints.pixel_share import measure_pixel_share
from analysis.models.batches import BatchForm
from analysis.models.image_features import (
    Features,
    FeatureStore,
    count_bytes,
    list_tensors,
    list_vision_weights,
)
from analysis.models.image_tokens import FIRST_IMAGE_ID, MAX_IMAGE_TOKENS, is_image_id, make_image_ids
from defenses.errors import UserError, describe_library_error
from defenses.images import QueryImage

if TYPE_CHECKING:
    from PIL.Image import Image

_TEST_IMAGE = "a test image"  # name of images that no query has
_MIN_SEEN_SHARE = 0.95  # of an image's pixels; less is told
_MAX_PIXEL_BYTES = 2**30  # of prepared pixels in memory; others are prepared again
_PIXEL_INPUTS = ("pixel_values", "pixel_attention_mask")  # not needed where features are given
_KIND_INPUTS = ("mm_token_type_ids", "token_type_ids")  # 1 at the tokens of images
_TEXT_INPUTS = ("input_ids", "attention_mask", *_KIND_INPUTS, "cross_attention_mask")  # of the whole prompt
_FEATURES = ("pooler_output", "deepstack_features")  # of the outputs of the part that reads images


@dataclass(frozen=True)
class PreparedImage:
    """What a prompt needs to know of an image as the processor prepares it.

    Attributes:
        image: the image.
        ids: the token ids that stand for it.
        text: what the processor writes in the place of the image's mark, placeholders included.
        layout: arguments of the model that say how the pixels are arranged, such as the number of patches.
        size: width and height of the image, in pixels.
        target: what the pixels are scaled to, such as "336×336".
        seen_share: share of the pixels that reach the model, from 0 to 1; None if it could not be measured.
    """

    image: QueryImage
    ids: range
    text: str
    layout: dict[str, Tensor]
    size: tuple[int, int]
    target: str
    seen_share: float | None

    def describe(self) -> str:
        """Return tokens, size and the share of pixels that reach the model, for the user."""
        width, height = self.size
        share = "" if self.seen_share is None else f", {self.seen_share:.0%} of the pixels"
        tokens = f"{len(self.ids)} token{'' if len(self.ids) == 1 else 's'}"
        return f"[image: {tokens}, {width}×{height} → {self.target}{share}]"


@dataclass(frozen=True)
class MissingImageReader:
    """In the place of an image reader of a model that cannot be given images; text is read as ever.

    Attributes:
        reason: why, for the user.
    """

    reason: str

    @property
    def identity(self) -> dict[str, Any]:
        """What prompts of text depend on: nothing."""
        return {}


class ImageReader:
    """Prepares images for one model, and gives the model their features in place of their token ids.

    Args:
        processor: of transformers.
        model: reads images; it gets a hook that replaces the ids of images by the model's placeholder.
        name: of the model, for errors.

    Attributes:
        feature_store: features of images under the model's present weights.
        n_computed: number of images whose features were computed.
        hook: of the model.
    """

    def __init__(self, processor: Any, model: Any, name: str) -> None:
        self.processor, self.model, self.name = processor, model, name
        self.n_computed = 0
        self.feature_store = FeatureStore(model)
        self._prepared: dict[str, PreparedImage] = {}
        self._by_first_id: dict[int, PreparedImage] = {}
        self._pixels: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._seen_shares: dict[tuple[int, int], float | None] = {}
        if (other := getattr(model, "image_reader", None)) is not None:
            other.hook.remove()
        model.image_reader = self
        self.hook = model.register_forward_pre_hook(self._replace_ids, with_kwargs=True)

    @cached_property
    def placeholder_id(self) -> int:
        """The token id that the model replaces by features."""
        placeholder = getattr(self.model.config, "image_token_id", None)
        if placeholder is None:
            raise UserError(
                f"{self.name} has no placeholder for images in its prompts, which is not supported"
            )
        return int(placeholder)

    @cached_property
    def _neutral_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    @cached_property
    def image_mark(self) -> str:
        """The text that a chat template writes where an image stands."""
        if not self._marks:
            raise UserError(f"the processor of {self.name} has no token for images; use another model")
        template = str(self.processor.tokenizer.chat_template)
        return next((mark for mark in self._marks if mark in template), self._marks[0])

    @cached_property
    def _marks(self) -> list[str]:
        """The texts that may stand for an image in a template."""
        names = ("image_token", "boi_token")
        return [str(mark) for name in names if (mark := getattr(self.processor, name, None)) is not None]

    @cached_property
    def reserved_texts(self) -> tuple[str, ...]:
        """The texts that stand for images, which no message may contain."""
        tokens = [*self.processor.all_special_multimodal_tokens, *self._marks]
        if (placeholder := getattr(self.model.config, "image_token_id", None)) is not None:
            tokens.append(self.processor.tokenizer.decode([placeholder]))
        return tuple(dict.fromkeys(str(token) for token in tokens if token))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the pixels that reach the model depend on, in plain values, for run.json and cache keys."""
        import PIL

        settings = self.processor.image_processor.to_dict()
        return {
            "processor": type(self.processor).__name__,
            "pillow": PIL.__version__,
            "image_processor": type(self.processor.image_processor).__name__,
            "settings": {key: value for key, value in sorted(settings.items()) if key != "processor_class"},
        }

    def prepare(self, image: QueryImage) -> PreparedImage:
        """Return an image as the model reads it.

        Raises:
            UserError: if the image cannot be loaded or prepared.
        """
        if image.digest not in self._prepared:
            pixels = image.load()
            inputs, text, n_tokens = self._process(pixels, image.name)
            if n_tokens > MAX_IMAGE_TOKENS:
                raise UserError(f"{image.name}: {n_tokens} tokens are too many for {self.name}")
            prepared = PreparedImage(
                image,
                make_image_ids(image.digest, n_tokens),
                text,
                {name: value for name, value in inputs.items() if name not in _PIXEL_INPUTS},
                pixels.size,
                _describe_target(inputs),
                self._measure_seen_share(pixels.size),
            )
            other = self._by_first_id.setdefault(prepared.ids.start, prepared)
            if other is not prepared:
                raise UserError(f"{image.name} and {other.image.name} cannot be told apart by their digests")
            self._prepared[image.digest] = prepared
            self._keep_pixels(image.digest, inputs)
        return self._prepared[image.digest]

    def _get_pixels(self, image: QueryImage) -> dict[str, Tensor]:
        """Return the arguments of the model that hold an image's pixels."""
        if image.digest not in self._pixels:
            inputs, _, _ = self._process(image.load(), image.name)
            self._keep_pixels(image.digest, inputs)
        self._pixels.move_to_end(image.digest)
        return self._pixels[image.digest]

    def _keep_pixels(self, digest: str, inputs: dict[str, Tensor]) -> None:
        self._pixels[digest] = {name: value for name, value in inputs.items() if name in _PIXEL_INPUTS}
        while len(self._pixels) > 1 and sum(map(count_bytes, self._pixels.values())) > _MAX_PIXEL_BYTES:
            self._pixels.popitem(last=False)

    def encode_text(self, text: str, prepared: Sequence[PreparedImage]) -> list[int]:
        """Return the token ids of a rendered chat, with those of the images in the places of their marks.

        Args:
            text: contains one `image_mark` for each image.
            prepared: the images, in their order.
        """
        if self.reads_by_cross_attention and len(prepared) > 1:
            raise UserError(f"{self.name} is given one image per prompt only: use queries of one image each")
        pieces = text.split(self.image_mark)
        if len(pieces) != len(prepared) + 1:
            raise UserError(
                f"the chat template of {self.name} writes {len(pieces) - 1} marks for {len(prepared)} "
                "images: give one that shows images with --template"
            )
        expanded = pieces[0] + "".join(
            image.text + piece for image, piece in zip(prepared, pieces[1:], strict=True)
        )
        ids: list[int] = self.processor.tokenizer.encode(expanded, add_special_tokens=False)
        image_ids = [token_id for image in prepared for token_id in image.ids]
        if (n_places := ids.count(self.placeholder_id)) != len(image_ids):
            raise UserError(
                f"a prompt of {self.name} has {n_places} placeholders for {len(image_ids)} features of images"
            )
        remaining = iter(image_ids)
        return [next(remaining) if token_id == self.placeholder_id else token_id for token_id in ids]

    def describe_losses(self) -> str:
        """Return how many of the images read so far reach the model in part only; empty if none."""
        read = [image for image in self._prepared.values() if image.image.name != _TEST_IMAGE]
        cut = [image for image in read if image.seen_share and image.seen_share < _MIN_SEEN_SHARE]
        if not cut:
            return ""
        least = min(cut, key=lambda image: image.seen_share or 1)
        return (
            f"{len(cut)} of {len(read)} images reach the model in part only, because its processor "
            f"cuts them; of {least.image.name}, {least.seen_share:.0%} of the pixels"
        )

    def draw_probe_prompts(self) -> list[tuple[int, ...]]:
        """Return three prompts of words and random images; the last two have equal length."""
        import numpy as np
        from PIL import Image as Images

        generator, prompts = np.random.default_rng(0), []
        for size, words in (((80, 40, 3), "this is"), ((48, 64, 3), "what is"), ((48, 64, 3), "what is")):
            pixels = Images.fromarray(generator.integers(0, 256, size, dtype=np.uint8))
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            prepared = self.prepare(QueryImage(_TEST_IMAGE, digest, pixels.copy))
            if self._takes_features:
                self._get_features(prepared)  # raises if processor and model do not fit
            text = f"look at the image: {self.image_mark} {words}"
            prompts.append(tuple(self.encode_text(text, [prepared])))
        return prompts

    def build_inputs(self, token_ids: Tensor) -> dict[str, Any]:
        """Return the arguments of the model for rows of token ids in which images occur.

        Args:
            token_ids: rows × length, on any device; every image is complete.

        Returns:
            `input_ids` with the placeholder, and features, layouts and kinds of tokens.
        """
        built, prepared = self._list_token_inputs(token_ids)
        if not self._takes_features:
            return built | self._merge_inputs(prepared)
        features = _merge_values([self._get_features(image) for image in prepared])
        if self.reads_by_cross_attention:
            return built | features
        layout = _merge_values([image.layout for image in prepared])
        built |= {
            name: value.to(self.model.device) for name, value in layout.items() if name in self._parameters
        }
        return built | {"mm_encoder_outputs": {"image": _FeatureOutput(features)}}

    def build_plain_inputs(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of the model for one prompt with the pixels themselves, to compare with."""
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        built, prepared = self._list_token_inputs(ids)
        return built | self._merge_inputs(prepared)

    @property
    def fastest_form(self) -> BatchForm:
        """The fastest form of a batch that prompts with images may have."""
        if self._parameters & {*_KIND_INPUTS} and not self.has_image_axes:
            # The tokens of an image attend to each other, which split attention does not do.
            return BatchForm.REPEATED
        # In cross-attention, also the tokens before an image read it.
        return BatchForm.PADDED if self.reads_by_cross_attention else BatchForm.PACKED

    @cached_property
    def has_image_axes(self) -> bool:
        """Whether the model places the parts of an image on several axes, such as rows and columns."""
        return "mm_token_type_ids" in self._parameters and hasattr(self.model.base_model, "get_rope_index")

    def locate_tokens(self, token_ids: Sequence[int]) -> Int[Tensor, "axes tokens"]:
        """Return the position of each token on each axis, for models with `has_image_axes`.

        The text behind an image goes on from the largest position in it.

        Args:
            token_ids: of a prompt, or of the rest of one, counted from 0; every image is complete.
        """
        compute_positions = self.model.base_model.get_rope_index
        built, prepared = self._list_token_inputs(torch.tensor([list(token_ids)]))
        layout = _merge_values([image.layout for image in prepared]) if prepared else {}
        accepted = inspect.signature(compute_positions).parameters
        positions, _ = compute_positions(
            **{name: value for name, value in (built | layout).items() if name in accepted}
        )
        return torch.as_tensor(positions[:, 0])

    @property
    def reads_by_cross_attention(self) -> bool:
        """Whether the model reads an image from outside of the prompt, where one token stands for it."""
        return "cross_attention_states" in self._parameters

    @property
    def _takes_features(self) -> bool:
        """Whether the model takes features in the place of pixels."""
        return self.reads_by_cross_attention or "mm_encoder_outputs" in self._parameters

    @cached_property
    def _parameters(self) -> frozenset[str]:
        """Names of the arguments that the model takes."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    def _list_token_inputs(self, token_ids: Tensor) -> tuple[dict[str, Any], list[PreparedImage]]:
        """Return ids with placeholders and the kinds of tokens, and the images in their order."""
        is_image = token_ids >= FIRST_IMAGE_ID
        # A placeholder that the model itself generated is no image.
        text_ids = token_ids.masked_fill(token_ids == self.placeholder_id, self._neutral_id)
        built: dict[str, Any] = {"input_ids": torch.where(is_image, self.placeholder_id, text_ids)}
        built |= {name: is_image.long() for name in _KIND_INPUTS if name in self._parameters}
        prepared = self._list_images(token_ids)
        if self.reads_by_cross_attention:
            # rows × length × images × tiles: an image is read by its token and those behind it.
            is_tile = torch.cat([image.layout["aspect_ratio_mask"] for image in prepared])
            is_behind = is_image.long().cumsum(1)[:, :, None, None]
            built["cross_attention_mask"] = is_behind * is_tile[:, None].to(token_ids.device)
        return built, prepared

    def _merge_inputs(self, prepared: Sequence[PreparedImage]) -> dict[str, Tensor]:
        """Return pixels and layouts of several images, as if they had been prepared together."""
        inputs = _merge_values([image.layout | self._get_pixels(image.image) for image in prepared])
        return {
            name: value.to(self.model.device) for name, value in inputs.items() if name in self._parameters
        }

    def _replace_ids(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the model: put features in the place of the ids of images."""
        token_ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if kwargs.get("cross_attention_states") is not None and cache is not None and cache.get_seq_length():
            # `generate` gives them with every token, and their keys and values are in the cache.
            return args, {**kwargs, "cross_attention_states": None}
        if token_ids is None or not bool((token_ids >= FIRST_IMAGE_ID).any()):
            return None
        built = self.build_inputs(token_ids)
        if cache is not None and (n_cached := cache.get_seq_length()):
            # The kinds of all tokens that are attended to; images that are cached already count as text.
            built |= {name: pad(built[name], (n_cached, 0)) for name in _KIND_INPUTS if name in built}
        return args, {**kwargs, **built}

    def _list_images(self, token_ids: Tensor) -> list[PreparedImage]:
        """Return the images of rows of token ids in their order; raise unless each row has whole images."""
        images: list[PreparedImage] = []
        for row in token_ids.tolist():
            image_ids = [token_id for token_id in row if is_image_id(token_id)]
            firsts = [token_id for token_id in image_ids if token_id % MAX_IMAGE_TOKENS == 0]
            in_row = [self._by_first_id[token_id] for token_id in firsts]
            if [token_id for image in in_row for token_id in image.ids] != image_ids:
                raise ValueError("an image is not complete in a prompt, or its parts are in another order")
            images += in_row
        return images

    def _process(self, pixels: Image, name: str) -> tuple[dict[str, Tensor], str, int]:
        """Return the inputs for an image, the text in the place of its mark, and the number of tokens."""
        try:
            outputs = self.processor(
                images=[pixels],
                text=[self.image_mark],
                return_tensors="pt",
                return_text_replacement_offsets=True,
                add_special_tokens=False,
            )
        except Exception as error:  # of transformers, numpy or Pillow
            raise UserError(
                f"{name}: {self.name} cannot take this image: {describe_library_error(error)}"
            ) from error
        replacements = outputs.pop("text_replacement_offsets", None)
        n_tokens = int((outputs["input_ids"] == self.placeholder_id).sum())
        if not n_tokens:
            raise UserError(
                f"the processor of {self.name} writes no placeholder for an image, so that it would not be "
                "read; use another model"
            )
        text = (
            self.processor.tokenizer.decode(outputs["input_ids"][0])
            if not replacements or not replacements[0]
            else self.image_mark.replace(replacements[0][0]["text"], replacements[0][0]["replacement"])
        )
        if self.reads_by_cross_attention:
            text = self.image_mark  # to which some processors add a BOS
        inputs = {key: torch.as_tensor(value) for key, value in outputs.items() if key not in _TEXT_INPUTS}
        return inputs, text, n_tokens

    def _measure_seen_share(self, size: tuple[int, int]) -> float | None:
        """Return the share of an image's pixels that reach the model, measured once for each size."""
        if size not in self._seen_shares:
            self._seen_shares[size] = measure_pixel_share(
                lambda pixels: self._process(pixels, _TEST_IMAGE)[0], size
            )
        return self._seen_shares[size]

    @torch.inference_mode()
    def _get_features(self, prepared: PreparedImage) -> Features:
        """Return the features of an image under the model's present weights."""
        return self.feature_store.get_features(prepared.ids.start, lambda: self._compute_features(prepared))

    def _compute_features(self, prepared: PreparedImage) -> Features:
        """Return the output of the part that reads images: features, and those of deeper layers if any."""
        base = self.model.base_model
        compute = base.vision_model if self.reads_by_cross_attention else base.get_image_features
        accepted = inspect.signature(getattr(compute, "forward", compute)).parameters
        self.n_computed += 1
        dtype = next(weight.dtype for weight in list_vision_weights(self.model) if weight.is_floating_point())
        inputs = {
            name: value.to(self.model.device, dtype if value.is_floating_point() else None)
            for name, value in (prepared.layout | self._get_pixels(prepared.image)).items()
            if name in accepted
        }
        output = compute(**inputs, return_dict=True)
        if self.reads_by_cross_attention:  # one row per tile, as the model makes them of pixels
            states = base.multi_modal_projector(output.last_hidden_state)
            return {"cross_attention_states": states.flatten(0, -3)}
        features = {name: output[name] for name in _FEATURES if output.get(name) is not None}
        tensors = list_tensors(features["pooler_output"])
        n_features = sum(tensor.numel() // tensor.shape[-1] for tensor in tensors)
        if n_features != len(prepared.ids):
            raise UserError(
                f"the processor of {self.name} writes {len(prepared.ids)} placeholders for "
                f"{prepared.image.name}, and the model makes {n_features} features of it: processor "
                "and model do not fit"
            )
        return features


def _describe_target(inputs: dict[str, Tensor]) -> str:
    """Return what an image is scaled to: the size of its tiles, or the number of its patches."""
    shape = inputs["pixel_values"].shape
    if len(shape) >= 4:
        is_tile = inputs.get("aspect_ratio_mask")  # of a fixed number of places
        n_tiles = math.prod(shape[:-3]) if is_tile is None else int(is_tile.sum())
        return f"{f'{n_tiles} × ' if n_tiles > 1 else ''}{shape[-1]}×{shape[-2]}"
    if "image_grid_thw" in inputs:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return f"{columns}×{rows} patches"
    positions = inputs.get("image_position_ids")  # of a fixed number of places, as far as there are patches
    n_patches = shape[-2] if positions is None else int((positions >= 0).all(-1).sum())
    return f"{n_patches} patches"


class _FeatureOutput(dict[str, Any]):
    """Features of images, as the model's own part for images returns them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def _merge_values(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of several images, joined as if the images had been prepared together."""
    return {name: _join([part[name] for part in parts]) for name in parts[0]}


def _join(values: Sequence[Any]) -> Any:
    first = values[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return first if len(values) == 1 else torch.cat(list(values))
    # A sequence over images, or one over layers of sequences over images.
    if first and isinstance(first[0], Tensor):
        return [tensor for value in values for tensor in value]
    return [_join(layer) for layer in zip(*values, strict=True)]
