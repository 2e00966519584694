"""Conversion of a GGUF to safetensors, once, into the cache, so that it computes what llama.cpp computes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.checkpoints.gguf_config import (
    ROPE_TENSORS,
    apply_config_changes,
    find_corrections,
    read_config_changes,
)
from analysis.checkpoints.gguf_files import find_gguf_parts, read_gguf_model, write_gguf_copy
from analysis.checkpoints.gguf_tokenizer import (
    build_gguf_tokenizer,
    classify_tokenizer_keys,
    find_end_token_ids,
)
from analysis.checkpoints.weight_files import check_weights_complete
from analysis.files import combine_digests, get_cache_folder, hash_file
from defenses.errors import UserError, describe_library_error

if TYPE_CHECKING:
    from analysis.checkpoints.gguf_files import GgufModel
    from analysis.files import Notifier

# Incremented when the conversion changes, so that older converted copies are not used.
_CONVERSION_VERSION = 3
_RECORD_FILE = "conversion.json"


def convert_gguf(path: Path, notify: Notifier) -> tuple[Path, dict[str, Any]]:
    """Return a folder with a safetensors copy of a GGUF, converted at first use, and where it comes from.

    The copy is cached under the SHA-256 of the GGUF and the versions of the libraries that make it, in
    float32, so that nothing is rounded a second time. A copy that is not complete is made again.

    Args:
        path: of the file, or of any part of a split model.
        notify: called with a line of text before a conversion.

    Returns:
        The folder, and `sha256` (of the file, or of all parts' digests) and `gguf`: which metadata keys were
        understood and which were ignored.

    Raises:
        UserError: if the file cannot be converted, or would compute something else.
    """
    paths = find_gguf_parts(path)
    sha256 = combine_digests([hash_file(part) for part in paths])
    versions = f"transformers{version('transformers')}-gguf{version('gguf')}"
    folder = get_cache_folder() / "gguf" / f"{sha256[:32]}-v{_CONVERSION_VERSION}-{versions}"
    record = _read_record(folder)
    if record is None:
        is_again = folder.is_dir()
        model = read_gguf_model(paths)
        tokenizer = _build_tokenizer(model)
        reason = "the copy there is damaged" if is_again else "this happens once"
        notify(f"Converting {path.name} to safetensors in {folder}; {reason}.")
        record = _write_copy(model, tokenizer, folder)
    return folder, {"sha256": sha256, "gguf": {key: record[key] for key in ("understood", "ignored")}}


def _build_tokenizer(model: GgufModel) -> Any:
    """Return the tokenizer of a GGUF, or raise UserError if its vocabulary contradicts itself."""
    try:
        return build_gguf_tokenizer(model)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise UserError(
            f"{model.paths[0]} has a vocabulary that cannot be read ({describe_library_error(error)}): "
            "download the file again, or use the model's folder or hub id"
        ) from error


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a converted copy; None if it, or a file as long as it says, is missing."""
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD_FILE).read_text("utf-8"))
        sizes = record["files"].items()
        is_complete = all((folder / name).stat().st_size == size for name, size in sizes)
        return record if is_complete and {"understood", "ignored"} <= record.keys() else None
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None


def _write_copy(model: GgufModel, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write the converted model into a folder, whole or not at all, and return its record."""
    part = folder.with_name(f"{folder.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        part.mkdir(parents=True)
        path = model.paths[0]
        corrections = find_corrections(model)
        if corrections or len(model.paths) > 1:
            path = write_gguf_copy(model, part / "copy.gguf", corrections)
        converted, changes = _convert_weights(model, path)
        (part / "copy.gguf").unlink(missing_ok=True)
        converted.save_pretrained(part)
        tokenizer.save_pretrained(part)
        understood, ignored = classify_tokenizer_keys(model)
        record = {
            "understood": sorted([*changes.understood, *understood]),
            "ignored": sorted([*changes.ignored, *ignored]),
            "files": {
                str(file.relative_to(part)): file.stat().st_size for file in part.rglob("*") if file.is_file()
            },
        }
        (part / _RECORD_FILE).write_text(json.dumps(record, indent=1), "utf-8")
        _move_copy(part, folder)
    except OSError as error:
        raise UserError(f"cannot write the converted model to {folder.parent}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return record


def _move_copy(part: Path, folder: Path) -> None:
    """Put a finished copy into its place, unless a concurrent run was first; a damaged one makes room."""
    if _read_record(folder) is not None:
        return
    damaged = part.with_name(f"{part.name}.damaged")
    with contextlib.suppress(FileNotFoundError):
        folder.replace(damaged)
    shutil.rmtree(damaged, ignore_errors=True)
    try:
        part.replace(folder)
    except OSError:
        if _read_record(folder) is None:
            raise


def _convert_weights(model: GgufModel, path: Path) -> tuple[Any, Any]:
    """Return the model of a GGUF in float32, and how its configuration was changed."""
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # so that they are listed, and refused here
    if hasattr(transformers, "GgufConfig"):  # weights of some architectures would stay packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loader: Any = transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        changes = read_config_changes(model, config)
        config = apply_config_changes(config, changes)
        loaded, loading_info = loader.from_pretrained(
            path.parent, config=config, gguf_file=path.name, trust_remote_code=False, **options
        )
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever its parts raise
        raise UserError(
            f"{model.paths[0]} cannot be converted ({describe_library_error(error)}): use the model's folder "
            "or hub id"
        ) from error
    check_weights_complete(str(model.paths[0]), loading_info)
    # transformers marks the model as quantized and does not save it, although its weights are float32 now.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    converted = type(loaded)(config)
    converted.load_state_dict(loaded.state_dict())
    _check_tensors_used(model, converted)
    converted.generation_config.eos_token_id = find_end_token_ids(model) or None
    return converted, changes


def _check_tensors_used(model: GgufModel, converted: Any) -> None:
    """Check that the converted model holds every tensor of the file: transformers drops others in silence."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    n_layers = converted.config.num_hidden_layers
    # Blocks behind the last layer guess further tokens ahead, and do not change the next; they also count.
    n_blocks = int(model.metadata[f"{model.architecture}.block_count"])
    extra = tuple(f"blk.{number}." for number in range(n_layers, n_blocks))
    tensors = {
        name: size
        for name, size in model.tensors.items()
        if name not in ROPE_TENSORS and not name.startswith(extra)
    }
    # Tied weights, which share their memory, count once, as in the file.
    weights = {tensor.data_ptr(): tensor.numel() for tensor in converted.state_dict().values()}
    if sum(tensors.values()) == sum(weights.values()):
        return
    architectures = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(architectures[model.architecture], n_layers)
    known = {names.get_name(key, try_suffixes=(".weight", ".bias")) for key in converted.state_dict()}
    unused = [name for name in tensors if name not in known] or ["some of those in layers"]
    raise UserError(
        f"{model.paths[0]} holds tensors that transformers does not read ({', '.join(sorted(unused)[:3])}), "
        "so it would compute something else than llama.cpp: use the model's folder or hub id"
    )
