"""Features of images under a model's present weights: kept, reused, and computed again if a weight changes.

Features are kept in memory up to a limit, then in files of a temporary folder while the disk has room.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MAX_FEATURE_BYTES = 2**30  # in memory
MIN_FREE_BYTES = 2**32  # that files leave on the disk

# Outputs of the part that reads images, by name: tensors, or sequences of them over images or layers.
Features: TypeAlias = dict[str, Any]


class FeatureStore:
    """Features of images, each computed once for one state of the weights.

    Args:
        model: reads images.

    Attributes:
        n_files: number of images whose features are in files.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._weights: list[Tensor] = []  # that the features were computed with, so that none is freed
        self._weight_versions: list[tuple[int, int]] = []
        self._features: OrderedDict[int, Features] = OrderedDict()
        self._n_bytes = 0
        self._files: dict[int, dict[str, Any]] = {}  # names of the tensors in the file

    @property
    def n_files(self) -> int:
        """Number of images whose features are in files."""
        return len(self._files)

    def get_features(self, key: int, compute: Callable[[], Features]) -> Features:
        """Return an image's features under the model's present weights.

        Args:
            key: of the image.
            compute: returns the features; called where none can be reused.
        """
        if not self._can_reuse():
            return compute()
        if key in self._features:
            self._features.move_to_end(key)
            return self._features[key]
        if key in self._files:
            stored = load_file(self._get_file(key))
            return _map_leaves(self._files[key], lambda name: stored[name].to(self._model.device))
        features = compute()
        self._features[key] = features
        self._n_bytes += count_bytes(features)
        while self._n_bytes > MAX_FEATURE_BYTES and len(self._features) > 1:
            old_key, old = self._features.popitem(last=False)
            self._n_bytes -= count_bytes(old)
            self._write_file(old_key, old)
        return features

    def _write_file(self, key: int, features: Features) -> None:
        """Write features into a file, unless the disk is nearly full: then they are computed again."""
        if shutil.disk_usage(self._folder.name).free < MIN_FREE_BYTES + count_bytes(features):
            return
        tensors: dict[str, Tensor] = {}
        self._files[key] = _map_leaves(features, partial(_name_tensor, tensors))
        save_file(tensors, self._get_file(key))

    def forget(self) -> None:
        """Forget all features, so that they are computed again."""
        self._features.clear()
        self._files.clear()
        self._n_bytes = 0

    def _can_reuse(self) -> bool:
        """Return whether features may be reused; forget those of other weights.

        Weights may be changed in place, replaced, or changed while a module runs, by its hooks.
        """
        hooks = [
            hook
            for module in list_vision_modules(self._model)
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ]
        if not all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
            return False
        weights = list_vision_weights(self._model)
        versions = [(weight.data_ptr(), weight._version) for weight in weights]
        if versions != self._weight_versions:
            self.forget()
            self._weights = [weight.detach() for weight in weights]
            self._weight_versions = versions
        return True

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="refusalscope-features-")

    def _get_file(self, key: int) -> Path:
        return Path(self._folder.name) / f"{key:x}.safetensors"


def list_vision_modules(model: Any) -> list[nn.Module]:
    """Return the modules on which features depend: all but the language part and the output."""
    language = set(model.get_decoder().modules())
    others = {model, model.base_model, model.get_output_embeddings()}
    return [module for module in model.modules() if module not in language | others]


def list_vision_weights(model: Any) -> list[Tensor]:
    """Return the weights on which features depend, as they are now."""
    own = [model.base_model, *list_vision_modules(model)]
    return [weight for module in own for weight in module.parameters(recurse=False)]


def list_tensors(value: Any) -> list[Tensor]:
    """Return the tensors of nested sequences."""
    return (
        [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in list_tensors(part)]
    )


def count_bytes(values: Features) -> int:
    """Return the number of bytes that named tensors, or nested sequences of them, take."""
    return sum(
        tensor.numel() * tensor.element_size()
        for value in values.values()
        if value is not None
        for tensor in list_tensors(value)
    )


def _name_tensor(tensors: dict[str, Tensor], tensor: Tensor) -> str:
    """Add a tensor to those of a file, and return its name."""
    name = str(len(tensors))
    tensors[name] = tensor.cpu().contiguous()
    return name


def _map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return nested dictionaries and sequences with a function applied to what they hold."""
    if isinstance(value, dict):
        return {key: _map_leaves(part, function) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_map_leaves(part, function) for part in value]
    return function(value)
