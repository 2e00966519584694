"""GGUF files: metadata and tensors of a model in one file or in the parts that `llama-gguf-split` writes.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.checkpoints.weight_files import check_not_placeholder
from defenses.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufModel:
    """What the files of one model hold.

    Attributes:
        paths: the file, or all its parts in order.
        metadata: key → value, arrays as lists; of the first part, which alone describes the model.
        tensors: name → number of elements, of all parts.
    """

    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, int]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture, which prefixes the keys of its settings."""
        return str(self.metadata["general.architecture"])

    def read_tensor(self, name: str) -> list[float]:
        """Return the values of a small tensor of float32."""
        for path in self.paths:
            for tensor in _open_gguf(path).tensors:
                if tensor.name == name:
                    return [float(value) for value in tensor.data.ravel()]
        raise KeyError(name)


def find_gguf_parts(path: Path) -> tuple[Path, ...]:
    """Return the files of the model that a GGUF belongs to: the file itself, or all parts of a split model.

    Raises:
        UserError: if a part is missing.
    """
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    parts = tuple(
        path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf")
        for number in range(1, int(match["count"]) + 1)
    )
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(
            f"{path.name} is one of {len(parts)} parts of a model, and beside it {missing[0]} is missing"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            + f": put all parts into {path.parent.resolve()}"
        )
    return parts


def read_gguf_model(paths: tuple[Path, ...]) -> GgufModel:
    """Return the metadata and the tensors' sizes of a model in one or several files.

    Raises:
        UserError: if a file is not a readable GGUF, or the files are not a model or not the parts of one.
    """
    metadata: dict[str, Any] = {}
    tensors: dict[str, int] = {}
    for number, path in enumerate(paths):
        reader = _open_gguf(path)
        count = int(_read_field(reader, "split.count") or 1)
        if count != len(paths) or int(_read_field(reader, "split.no") or 0) != number:
            part = f"part {int(_read_field(reader, 'split.no') or 0) + 1} of {count} of a split model"
            raise UserError(
                f"{path} holds {part if count > 1 else 'a whole model'}, which its name does not say: name "
                "the parts NAME-00001-of-0000N.gguf and so on, as they were written, in one folder"
            )
        if number == 0:
            metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors |= {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    expected = int(metadata.get("split.tensors.count") or len(tensors))
    if expected != len(tensors):
        raise UserError(
            f"{paths[0]} and its other parts hold {len(tensors)} of the model's {expected} tensors: download "
            "all parts again, from one source"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise UserError(f"{paths[0]} holds no whole model but one of type {kind!r}: give the model's file")
    if "general.architecture" not in metadata:
        raise UserError(f"{paths[0]} is not a readable GGUF file: it names no general.architecture")
    return GgufModel(paths, metadata, tensors)


def write_gguf_copy(model: GgufModel, path: Path, corrections: Mapping[str, Any]) -> Path:
    """Write a model into one file and return it; the tensors keep their quantization.

    Args:
        model: in one or several files.
        path: of the new file.
        corrections: metadata keys with whole numbers to write instead of the file's own, or beside them.
    """
    from gguf import GGUFValueType, GGUFWriter

    readers = [_open_gguf(part) for part in model.paths]
    writer = GGUFWriter(path, model.architecture)
    for name, field in readers[0].fields.items():
        if name.startswith(("GGUF.", "split.")) or name == "general.architecture" or name in corrections:
            continue
        is_array = field.types[0] == GGUFValueType.ARRAY
        if not is_array or field.data:  # an empty array has no type of elements
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if is_array else None
            )
    for name, value in corrections.items():
        writer.add_uint32(name, value)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        array = tensor.data
        writer.add_tensor_info(tensor.name, array.shape, array.dtype, array.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    return path


def _open_gguf(path: Path) -> GGUFReader:
    """Return a reader of one file, which maps the tensors without reading them."""
    from gguf import GGUFReader

    try:
        check_not_placeholder(path)
        return GGUFReader(path)
    except (ValueError, OSError, LookupError, OverflowError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} is not a readable GGUF file ({reason}), or only a part of one: download it again"
        ) from error


def _read_field(reader: GGUFReader, name: str) -> Any:
    """Return the value of a key, or None."""
    field = reader.fields.get(name)
    return None if field is None else field.contents()
