"""Tokenizers made from a `tokenizer.model` alone: the ids of the sentencepiece library itself."""

from __future__ import annotations

import io
import itertools
import json
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML

from analysis.models.loading import _read_tokenizer
from defenses.errors import UserError

_SENTENCES = [
    "How do I bake bread with 12 eggs?",
    "I can't help with that. As an AI, I won't do it!",
    "a  b   c\n\nd\te",
    "Caf\u00e9 na\u00efve \u6f22\u5b57 \u304b\u306a",
    "aaa aaaa aaaaa == === ---- abab",
] * 20
_PLAIN = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}
TRAINERS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 400, **_PLAIN},
    "bpe, unknown characters": {"model_type": "bpe", "character_coverage": 0.98, "vocab_size": 110, **_PLAIN},
    "bpe, no space in front": {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 400,
        "add_dummy_prefix": False,
        **_PLAIN,
    },
    "bpe, symbols of its own": {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 400,
        "user_defined_symbols": ["<|im_start|>", "\u2581\u2581", "aba"],
        **_PLAIN,
    },
    "bpe, normalized": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 400},
    "unigram": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 300, **_PLAIN},
    "unigram, symbols of its own": {
        "model_type": "unigram",
        "byte_fallback": True,
        "vocab_size": 305,
        "user_defined_symbols": ["<|im_start|>", "\u2581\u2581", "\u2581\u2581\u2581", "ab", "abb"],
        **_PLAIN,
    },
}
TEXTS = [
    *["bread", " bread", "   bread  with ", " ", "   ", "\n", "a\n\nb", "\t\ta", "I can't!  12 eggs"],
    *[
        "\u6f22\u5b57 \U0001f642\U0001f642 \u00e9 \ufb01 z\u00fc",
        "=" * 23,
        "a" * 37,
        " " * 9 + "x",
        "ababa aba",
    ],
    *[
        "x<|im_start|>user\n  I",
        "a<0x41> <0x4 <<0x0A>>",
        "<|im_start|><0x41>",
        "</s>",
        "a</s>b",
        "a </s>  b\n</s>c",
        "</s> I",
        "<unk>a <s> I",
    ],
    # Decomposed: Korean, Japanese, Vietnamese, and a letter with two marks.
    *(
        unicodedata.normalize("NFD", text)
        for text in ("\ud55c\uad6d\uc5b4 \uac01", "\u304c\u30d1 \u30f4", "\u1ebf \u1ed9 caf\u00e9", "\u01fa")
    ),
    *("".join(letters) for letters in itertools.product("a =\n", repeat=4)),
]


@cache
def train_sentencepiece(name: str) -> bytes:
    """Return a trained sentencepiece file."""
    from sentencepiece import SentencePieceTrainer

    buffer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=buffer,
        minloglevel=2,
        num_threads=1,
        **TRAINERS[name],
    )
    return buffer.getvalue()


def encode_by_sentencepiece(content: bytes, text: str, legacy: bool) -> list[int]:
    """Return the ids of sentencepiece, with special tokens split off.

    Of old, each text between special tokens is encoded as one of its own. Otherwise, as transformers 4 does
    with `legacy=False`, only the first gets the space in front, and the others keep a space of theirs.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(content)
    has_prefix = spec.normalizer_spec.add_dummy_prefix
    spec.normalizer_spec.add_dummy_prefix = has_prefix and legacy
    processor = SentencePieceProcessor(model_proto=spec.SerializeToString())
    ids: list[int] = []
    position = 0
    for part in re.split(r"(<s>|</s>|<unk>)", text):
        if part in ("<s>", "</s>", "<unk>"):
            ids.append(processor.piece_to_id(part))
        elif part and legacy:
            ids += processor.encode(part)
        elif part:
            part = "\u2581" + part if has_prefix and position == 0 else part
            guard = "<unk>" if part[0] in " \u2581" else ""  # keeps the space behind it
            ids += processor.encode(guard + part)[len(processor.encode(guard)) :]
        position += len(part)
    return ids


def write_tokenizer(folder: Path, name: str, **settings: Any) -> Path:
    """Write a folder with a `tokenizer.model` and its configuration, without a `tokenizer.json`."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(name))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    config |= {"chat_template": CHATML, "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings), "utf-8")
    return folder


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_ids_are_sentencepieces(name: str, legacy: bool | None, tmp_path: Path) -> None:
    settings = {} if legacy is None else {"legacy": legacy}
    tokenizer = _read_tokenizer(write_tokenizer(tmp_path / "t", name, **settings), "toy")
    content = train_sentencepiece(name)
    for text in TEXTS:
        want = encode_by_sentencepiece(content, text, legacy is not False)
        assert tokenizer.encode(text, add_special_tokens=False) == want, text


def test_special_tokens_and_template_are_kept(tmp_path: Path) -> None:
    added = {"400": {"content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False}}
    added["400"] |= {"rstrip": False, "single_word": False}
    folder = write_tokenizer(tmp_path / "t", "bpe", added_tokens_decoder=added, pad_token="<unk>")
    tokenizer = _read_tokenizer(folder, "toy")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.encode("a<|im_end|>")[-1] == 400 and tokenizer.encode("a")[0] == 1
    assert tokenizer.decode(tokenizer.encode("I can't  do"), skip_special_tokens=True) == "I can't  do"


def test_a_class_that_numbers_the_pieces_differently_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t", "unigram", tokenizer_class="XLMRobertaTokenizer")
    with pytest.raises(
        UserError, match=r"tokenizer\.model cannot be read as XLMRobertaTokenizer.*tokenizer\.json"
    ):
        _read_tokenizer(folder, "toy")


def test_symbols_of_a_unigram_model_that_can_overlap_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    settings = TRAINERS["unigram"] | {"vocab_size": 303, "user_defined_symbols": ["aba", "bab"]}
    monkeypatch.setitem(TRAINERS, "overlapping", settings)
    with pytest.raises(UserError, match=r"'aba', which can overlap.*tokenizer\.json"):
        _read_tokenizer(write_tokenizer(tmp_path / "t", "overlapping"), "toy")


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_an_incomplete_file_is_refused_wherever_it_ends(name: str, tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    folder, content = write_tokenizer(tmp_path / "t", name), train_sentencepiece(name)
    spec = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(content)
    spec.ClearField("normalizer_spec")
    without_normalizer = len(spec.SerializeToString())
    spec.ClearField("trainer_spec")  # the pieces alone are a file that can be read
    ends = (1, len(content) // 2, len(spec.SerializeToString()), without_normalizer, len(content) - 1)
    for end in ends:
        (folder / "tokenizer.model").write_bytes(content[:end])
        with pytest.raises(UserError, match=r"tokenizer\.model is incomplete.*download") as error:
            _read_tokenizer(folder, "toy")
        assert "\n" not in str(error.value)


def test_a_kind_of_file_without_counterpart_is_refused(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    folder, buffer = write_tokenizer(tmp_path / "t", "bpe"), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=buffer,
        minloglevel=2,
        model_type="char",
        vocab_size=60,
    )
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="only BPE and unigram"):
        _read_tokenizer(folder, "toy")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", r"tokenizer\.model is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", r"Git LFS.*git lfs pull"),
    ],
)
def test_a_file_without_a_vocabulary_is_refused(content: str, match: str, tmp_path: Path) -> None:
    # transformers reads an empty one as a tokenizer that gives no ids, and takes the other for tiktoken's.
    folder = write_tokenizer(tmp_path / "t", "bpe")
    (folder / "tokenizer.model").write_text(content, "utf-8")
    with pytest.raises(UserError, match=match) as error:
        _read_tokenizer(folder, "toy")
    assert "\n" not in str(error.value)
