"""GGUF files: parts of a split model are read as one, and a missing or foreign part is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf_models import write_gguf

from analysis.checkpoints.gguf_files import find_gguf_parts, read_gguf_model, write_gguf_copy
from defenses.errors import UserError


@pytest.fixture(scope="module")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny Llama in one file and in three."""
    folder = tmp_path_factory.mktemp("split")
    return write_gguf(folder / "whole.gguf"), write_gguf(folder / "toy.gguf", parts=3)


def test_any_part_of_a_split_model_stands_for_all_of_them(split_model: tuple[Path, Path]) -> None:
    whole, first = split_model
    third = first.with_name("toy-00003-of-00003.gguf")
    parts = find_gguf_parts(third)
    assert parts == find_gguf_parts(first) and len(parts) == 3
    model, expected = read_gguf_model(parts), read_gguf_model((whole,))
    assert model.tensors == expected.tensors and len(model.tensors) > 10
    assert model.metadata["tokenizer.ggml.tokens"] == expected.metadata["tokenizer.ggml.tokens"]


def test_a_copy_holds_the_metadata_and_tensors_of_all_parts(
    split_model: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, first = split_model
    model = read_gguf_model(find_gguf_parts(first))
    path = write_gguf_copy(model, tmp_path / "copy.gguf", {"llama.attention.head_count_kv": 4})
    copy, expected = read_gguf_model((path,)), read_gguf_model((whole,))
    expected.metadata["llama.attention.head_count_kv"] = 4
    described = [{k: v for k, v in m.metadata.items() if "GGUF" not in k} for m in (copy, expected)]
    assert described[0] == described[1]
    assert copy.tensors == expected.tensors
    assert copy.read_tensor("output_norm.weight") == expected.read_tensor("output_norm.weight")


def test_a_missing_part_is_named(split_model: tuple[Path, Path], tmp_path: Path) -> None:
    part = tmp_path / split_model[1].name
    shutil.copy(split_model[1], part)
    with pytest.raises(
        UserError, match=r"one of 3 parts.*toy-00002-of-00003\.gguf is missing \(and 1 more\)"
    ):
        find_gguf_parts(part)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("renamed.gguf", r"holds part 2 of 3 of a split model, which its name does not say"),
        ("x-00001-of-00001.gguf", r"holds part 2 of 3 of a split model, which its name does not say"),
    ],
)
def test_a_part_under_another_name_is_told(
    split_model: tuple[Path, Path], tmp_path: Path, name: str, message: str
) -> None:
    shutil.copy(split_model[1].with_name("toy-00002-of-00003.gguf"), tmp_path / name)
    with pytest.raises(UserError, match=message):
        read_gguf_model(find_gguf_parts(tmp_path / name))


@pytest.mark.parametrize("content", [b"no gguf at all", b"GGUF\x03\x00\x00\x00", b"GGUF" + b"\xff" * 64])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match="is not a readable GGUF file") as error:
        read_gguf_model((tmp_path / "x.gguf",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull")],
)
def test_a_file_without_content_says_how_to_get_it(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_gguf_model((tmp_path / "x.gguf",))


def test_a_truncated_file_is_refused(split_model: tuple[Path, Path], tmp_path: Path) -> None:
    whole = split_model[0].read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=r"is not a readable GGUF file.*download it again"):
        read_gguf_model((tmp_path / "x.gguf",))
