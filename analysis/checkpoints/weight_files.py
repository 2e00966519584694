"""Weight files of a model folder: which of them are read, whether they are complete, and how they are stored.

A folder may hold more than one model's weights: those of a checkpoint, an adapter, copies in other formats or
precisions. Only the files that transformers loads count as the model's weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from analysis.files import LFS_POINTER, check_not_lfs_pointer, combine_digests, hash_file
from defenses.adapter_merge import ADAPTER_CONFIG_FILE
from defenses.errors import UserError, describe_library_error

CONFIG_FILE = "config.json"
_SINGLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# Sharded files of a distributed training, which transformers prefers to all others.
_DISTRIBUTED_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# Surplus weights that cannot change the first token's logits: buffers that are computed anew, heads for
# training (a value head) or for faster generation (several tokens at once).
_UNUSED_WEIGHTS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|_extra_state|v_head\..*|medusa_head\..*)$"
    r"|(^|\.)mtp(\.|_)"
)
_MAX_NAMED_WEIGHTS = 3


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model.

    Raises:
        UserError: if the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not readable JSON ({describe_library_error(error)}); save or download the model again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; save or download the model again")
    return content


def list_weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads as the weights of a folder, whether or not they exist.

    These are the file that config.json names, or else `model.safetensors`, or else the shards of the index.

    Raises:
        UserError: if configuration or index is damaged, or names other files than safetensors in the folder.
    """
    config_path = folder / CONFIG_FILE
    named = read_json_object(config_path).get("transformers_weights") if config_path.is_file() else None
    if named is not None and not (
        isinstance(named, str) and _is_safetensors_name(named.removesuffix(".index.json"))
    ):
        raise UserError(
            f"{config_path} names {named!r} as the weights; only safetensors files beside it are read"
        )
    if distributed := sorted(
        path for path in folder.glob("shard-*") if _DISTRIBUTED_FILE.fullmatch(path.name)
    ):
        raise UserError(
            f"{folder} holds a checkpoint of a distributed training ({distributed[0].name}): load it with "
            "transformers and save it with save_pretrained()"
        )
    if named is None:
        named = _SINGLE_FILE if (folder / _SINGLE_FILE).is_file() else _INDEX_FILE
    if not named.endswith(".json"):
        return [folder / named]
    if not (folder / named).is_file():
        return [folder / _SINGLE_FILE]
    shards = {key: str(name) for key, name in _read_weight_map(folder / named).items()}
    if outside := sorted(name for name in shards.values() if not _is_safetensors_name(name)):
        raise UserError(f"{folder / named} names {outside[0]!r}, which is no safetensors file in its folder")
    return [folder / name for name in sorted(set(shards.values()))]


def find_missing_weights(folder: Path) -> str:
    """Return the name of a weight file that is missing from the folder; empty if the folder is complete."""
    return next((path.name for path in list_weight_files(folder) if not path.is_file()), "")


def hash_weights(folder: Path) -> str:
    """Return one SHA-256 for a folder's weights: of a single file, or of the digests of several."""
    digests = []
    for path in list_weight_files(folder):
        blob_name = path.resolve().name  # the hub's cache names a file by its SHA-256
        is_digest = len(blob_name) == 64 and set(blob_name) <= set("0123456789abcdef")
        digests.append(blob_name if is_digest else hash_file(path))
    return combine_digests(digests)


def has_only_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter without the weights of its base model."""
    return (folder / ADAPTER_CONFIG_FILE).is_file() and not any(
        path.is_file() for path in list_weight_files(folder)
    )


def check_weight_files(folder: Path, is_quantized: bool = False) -> None:
    """Check that the weight files of a folder are no placeholders, and that an index agrees with its shards.

    transformers reads all tensors of all shards, whatever the index says, so that a shard of another save
    would replace weights in silence. Without a quantization in the configuration, it takes whole numbers for
    the weights themselves.

    Args:
        folder: of the model.
        is_quantized: whether its configuration says that weights are quantized.

    Raises:
        UserError: if a file is damaged, belongs to another save, or holds quantized weights unexpectedly.
    """
    from safetensors import SafetensorError, safe_open

    paths = list_weight_files(folder)
    for path in paths:
        check_not_placeholder(path)
    weight_map = _read_weight_map(folder / _INDEX_FILE) if len(paths) > 1 else {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                slices = [(name, file.get_slice(name)) for name in names if name.endswith(".weight")]
                integers = [name for name, part in slices if _is_integer_matrix(part)]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged ({describe_library_error(error)}); save or download the model again"
            ) from error
        if other := [name for name in names if weight_map.get(name, path.name) != path.name]:
            raise UserError(
                f"{path} holds {other[0]}, which is in {weight_map[other[0]]} by the index: the files come "
                "from different saves; save or download the model again"
            )
        if integers and not is_quantized:
            raise UserError(
                f"{path} stores {integers[0]} as whole numbers, but config.json has no quantization_config "
                "that says what they stand for: save or download the model again"
            )


def check_not_placeholder(path: Path) -> None:
    """Raise UserError if a file of a model is empty, or only the pointer to it that Git LFS leaves."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    check_not_lfs_pointer(path, start, "download the model with `hf download`")
    if not start:
        raise UserError(f"{path} is empty; save or download the model again")


def describe_leftover_files(folder: Path, name: str) -> list[str]:
    """Return a notice for each file that another program could take for the weights, and that is not read.

    Args:
        folder: of the model.
        name: of the model.
    """
    notices = []
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        notices.append(
            f"{name} also holds an adapter ({ADAPTER_CONFIG_FILE}), which is not applied: the model's own "
            "weights are evaluated. To apply the adapter, move its files into another folder and use --model "
            f"{name}:FOLDER"
        )
    if (folder / _SINGLE_FILE).is_file() and (folder / _INDEX_FILE).is_file():
        notices.append(
            f"{name} holds {_SINGLE_FILE} and an index of shards; as in transformers, {_SINGLE_FILE} is read"
        )
    return notices


def check_weights_complete(name: str, loading_info: dict[str, Any]) -> None:
    """Check that weights and model fit each other exactly.

    transformers draws missing weights at random and drops surplus ones, and only logs it.

    Args:
        name: of the model, for the error.
        loading_info: from `from_pretrained(output_loading_info=True)`.

    Raises:
        UserError: if weights are missing, have another shape, or are not used.
    """
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(
            f"{name} lacks {len(missing)} of its model's weights ({_name_first(missing)}), which "
            "transformers would initialize at random: save or download the model again"
        )
    mismatched = sorted(loading_info.get("mismatched_keys", ()))
    if mismatched:
        first, stored, expected = mismatched[0]
        raise UserError(
            f"{name}: {len(mismatched)} of the weights have another shape than config.json says ({first}: "
            f"{list(stored)}, not {list(expected)}); save or download the model again"
        )
    surplus = sorted(key for key in loading_info["unexpected_keys"] if not _UNUSED_WEIGHTS.search(key))
    if surplus:
        raise UserError(
            f"{name} holds {len(surplus)} weights that its model does not use ({_name_first(surplus)}): they "
            "belong to another architecture or configuration, an adapter that was not merged, or a format "
            "that transformers does not read. If the model is right without them, load it with transformers "
            "and save it again with save_pretrained()"
        )


def count_loaded_bytes(folder: Path, bytes_per_weight: int | None) -> int:
    """Return the memory that the weights of a folder take, in bytes.

    Args:
        folder: with safetensors.
        bytes_per_weight: of the precision they are converted to; None if they stay as they are stored.
    """
    from math import prod

    from safetensors import safe_open

    paths = list_weight_files(folder)
    if bytes_per_weight is None:
        return sum(path.stat().st_size for path in paths)
    n_weights = 0
    for path in paths:
        with safe_open(path, framework="pt") as file:
            n_weights += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return n_weights * bytes_per_weight


def _is_integer_matrix(tensor: Any) -> bool:
    """Return whether a tensor of a safetensors file is a matrix of whole numbers."""
    return len(tensor.get_shape()) > 1 and str(tensor.get_dtype()).startswith(("I", "U", "BOOL"))


def _is_safetensors_name(name: str) -> bool:
    """Return whether a name is that of a safetensors file, without a folder."""
    return bool(re.fullmatch(r"[\w.-]+\.safetensors", name))


def _read_weight_map(index_path: Path) -> dict[str, Any]:
    """Return weight → file name from an index of shards."""
    index = read_json_object(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(index.get("metadata"), dict):
        raise UserError(
            f"{index_path} is no index of weights (it needs `metadata` and `weight_map`); save or download "
            "the model again"
        )
    return weight_map


def _name_first(names: list[str]) -> str:
    """Return the first names of a list."""
    return ", ".join(names[:_MAX_NAMED_WEIGHTS]) + ", …" * (len(names) > _MAX_NAMED_WEIGHTS)
