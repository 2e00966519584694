"""Tokenizers of GGUF files: split as llama.cpp splits, with the tokens and the template of the file."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import CHATML, toy_tokenizer
from gguf_models import write_gguf

from analysis.checkpoints.gguf_files import GgufModel, read_gguf_model
from analysis.checkpoints.gguf_tokenizer import build_gguf_tokenizer
from analysis.models.loading import LoadedModel
from defenses.errors import UserError

SAMPLE = "Don't pay 12345!?\n\n1  é漢字ABc\t'LL "
# Compared with llama.cpp itself on 1,443 texts for each rule: no difference, but for tekken and gpt-4o, whose
# regular expressions llama.cpp only approximates, and for spaces that are not ASCII.
WORDS = {
    "default": "Don·'·t· pay· ·123·45·!?·\n·\n·1· · é漢字ABc·\t·'·LL· ",
    "gpt-2": "Don·'t· pay· 12345·!?·\n·\n·1· · é漢字ABc·\t·'·LL· ",
    "smollm": "Don·'t· pay· ·1·2·3·4·5·!?·\n\n·1· · é漢字ABc·\t·'·LL· ",
    "llama-bpe": "Don·'t· pay· ·123·45·!?\n\n·1· · é漢字ABc·\t·'LL· ",
    "qwen2": "Don·'t· pay· ·1·2·3·4·5·!?\n\n·1· · é漢字ABc·\t·'LL· ",
    "qwen35": "Don·'t· pay· ·1·2·3·4·5·!?\n\n·1· · é漢字ABc·\t·'LL· ",
    "falcon": "Don·'·t· pay· ·123·45·!?·\n·\n·1· · é漢字ABc·\t·'·LL· ",
    "deepseek-llm": "Don·'·t· pay· ·12345·!?·\n·\n·1· · é·漢字·ABc·\t'·LL· ",
    "deepseek-coder": "Don·'·t· pay· ·1·2·3·4·5·!?·\n·\n·1· · é·漢字·ABc·\t'·LL· ",
    "deepseek-v3": "Don·'t· pay· ·123·45·!?\n\n·1· · é·漢字·ABc·\t·'LL· ",
    "tekken": "Don·'t· pay· ·1·2·3·4·5·!?\n\n·1· · é漢字·ABc·\t·'LL· ",
    "gpt-4o": "Don't· pay· ·123·45·!?\n\n·1· · é漢字·ABc·\t·'LL· ",
    "tiny_aya": "Don't· pay· ·12·345·!?\n\n·1· · é漢字·ABc·\t·'LL· ",
    "superbpe": "Don't pay ·12·345·!?\n\n·1·  é漢字ABc\t'LL ",
    "bloom": "Don't· pay· 12345·!?\n\n·1· · é漢字ABc·\t·'LL· ",
    "viking": "Don't· pay· ·1·2·3·4·5·!?\n\n·1· · é漢字ABc·\t·'LL· ",
    "bailingmoe": "Don·'t· pay· ·1·2·3·4·5·!?\n\n·1· · é漢字ABc·\t·'LL· ",
    "seed-coder": "Don·'t· pay· ·1·2·3·4·5·!?·\n\n·1· · é漢字ABc·\t·'LL· ",
}


@pytest.fixture(scope="module")
def toy_gguf(tmp_path_factory: pytest.TempPathFactory) -> GgufModel:
    """The tiny Llama with the toy tokenizer, as a file."""
    return read_gguf_model((write_gguf(tmp_path_factory.mktemp("gguf") / "toy.gguf"),))


def change_metadata(model: GgufModel, /, **values: Any) -> GgufModel:
    """Return a file with other values under `tokenizer.ggml.`; None leaves a key out."""
    changed = model.metadata | {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    metadata = {key: value for key, value in changed.items() if value is not None}
    return GgufModel(model.paths, metadata, model.tensors)


@pytest.mark.parametrize("name", WORDS)
def test_a_text_is_split_as_llama_cpp_splits_it(name: str, toy_gguf: GgufModel) -> None:
    tokenizer = build_gguf_tokenizer(change_metadata(toy_gguf, pre=name))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(SAMPLE)
    assert [SAMPLE[start:end] for _, (start, end) in pieces] == WORDS[name].split("·")


def test_the_ids_are_those_of_the_tokenizer_that_was_written(toy_gguf: GgufModel) -> None:
    tokenizer, plain = build_gguf_tokenizer(toy_gguf), toy_tokenizer()
    chat = [{"role": "user", "content": "How do I bake bread,\n\n 12 times? Caf\u00e9 \u6f22\u5b57"}]
    got, want = (
        one.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        for one in (tokenizer, plain)
    )
    assert got == want
    assert tokenizer.chat_template == plain.chat_template
    for role in ("bos_token", "eos_token"):
        assert getattr(tokenizer, role) == getattr(plain, role)


def test_an_unlisted_rule_is_refused_by_name(toy_gguf: GgufModel) -> None:
    with pytest.raises(UserError, match=r"splits text by the rule 'brand-new' \(tokenizer\.ggml\.pre\)"):
        build_gguf_tokenizer(change_metadata(toy_gguf, pre="brand-new"))


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "plamo2", "none", None])
def test_other_kinds_of_tokenizers_are_refused_by_name(kind: str | None, toy_gguf: GgufModel) -> None:
    with pytest.raises(UserError, match=f"a tokenizer of the kind {kind!r}"):
        build_gguf_tokenizer(change_metadata(toy_gguf, model=kind))


def test_a_token_twice_is_refused(toy_gguf: GgufModel) -> None:
    tokens = [*toy_gguf.metadata["tokenizer.ggml.tokens"][:-1], "a"]
    with pytest.raises(UserError, match="broken vocabulary"):
        build_gguf_tokenizer(change_metadata(toy_gguf, tokens=tokens))


def test_whole_words_of_llama_3_need_no_merges(toy_gguf: GgufModel) -> None:
    tokens = list(toy_gguf.metadata["tokenizer.ggml.tokens"])
    kinds = list(toy_gguf.metadata["tokenizer.ggml.token_type"])
    tokens[-1], kinds[-1] = "zqx", 1
    changed = change_metadata(toy_gguf, tokens=tokens, token_type=kinds, pre="llama-bpe")
    assert build_gguf_tokenizer(changed).encode("zqx", add_special_tokens=False) == [len(tokens) - 1]
    changed = change_metadata(toy_gguf, tokens=tokens, token_type=kinds, pre="gpt-2")
    assert len(build_gguf_tokenizer(changed).encode("zqx", add_special_tokens=False)) == 3


def test_control_tokens_are_found_whole_in_any_script(toy_gguf: GgufModel) -> None:
    tokens = list(toy_gguf.metadata["tokenizer.ggml.tokens"])
    kinds = list(toy_gguf.metadata["tokenizer.ggml.token_type"])
    tokens[-3:] = ["<\uff5cUser\uff5c>", "    ", "<|eom_id|>"]
    kinds[-3:] = [3, 4, 1]  # control, the user's own, and one that llama.cpp knows by its text
    tokenizer = build_gguf_tokenizer(change_metadata(toy_gguf, tokens=tokens, token_type=kinds))
    n = len(tokens)
    ids = tokenizer.encode("a<\uff5cUser\uff5c>    b<|eom_id|>", add_special_tokens=False)
    assert ids[1:3] == [n - 3, n - 2] and ids[-1] == n - 1 and len(ids) == 5


@pytest.mark.parametrize(
    ("values", "n_start", "n_end"),
    [
        ({}, 0, 0),
        ({"add_bos_token": True}, 1, 0),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 1),
        ({"pre": "llama-bpe"}, 1, 0),
        ({"pre": "llama-bpe", "add_bos_token": False}, 0, 0),
    ],
)
def test_start_and_end_are_added_as_the_file_says(
    values: dict[str, Any], n_start: int, n_end: int, toy_gguf: GgufModel
) -> None:
    tokenizer = build_gguf_tokenizer(change_metadata(toy_gguf, **values))
    ids = tokenizer.encode("bread")
    assert (ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id) == (
        bool(n_start),
        bool(n_end),
    )
    assert len(ids) == len(tokenizer.encode("bread", add_special_tokens=False)) + n_start + n_end


def test_templates_under_other_names_are_kept(toy_gguf: GgufModel) -> None:
    key, tool = "tokenizer.chat_template", "{{ 'tools' }}"
    both = GgufModel(toy_gguf.paths, toy_gguf.metadata | {f"{key}.tool_use": tool}, toy_gguf.tensors)
    assert build_gguf_tokenizer(both).chat_template == {"default": CHATML, "tool_use": tool}
    only = {name: value for name, value in both.metadata.items() if name != key}
    assert build_gguf_tokenizer(GgufModel(both.paths, only, both.tensors)).chat_template == tool


def make_sentencepiece_gguf(toy: GgufModel, name: str = "Toy", **values: Any) -> GgufModel:
    """Return a file with a small sentencepiece vocabulary: letters, bytes, a few pieces."""
    pieces = ["<unk>", "<s>", "</s>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, 3] + [6] * 256
    words = ["\u2581", *"abhi", "hi", "\u2581hi", "\u2581\u2581", "ab", "\u2581a"]
    changed = change_metadata(
        toy,
        model="llama",
        pre=None,
        merges=None,
        tokens=[*pieces, *words],
        token_type=kinds + [1] * len(words),
        scores=[0.0] * len(pieces) + [-float(number) for number in range(len(words))],
        bos_token_id=1,
        eos_token_id=2,
        **values,
    )
    return GgufModel(changed.paths, changed.metadata | {"general.name": name}, changed.tensors)


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("hi", {}, ["\u2581hi"]),
        ("  hi", {}, ["\u2581\u2581", "\u2581hi"]),
        ("hi", {"add_space_prefix": False}, ["hi"]),
        ("ab<|end|>hi", {}, ["\u2581", "ab", "<|end|>", "\u2581hi"]),
        ("ab\n\u00e9", {}, ["\u2581", "ab", "<0x0A>", "<0xC3>", "<0xA9>"]),
        ("ab<|end|>\nhi", {}, ["\u2581", "ab", "<|end|>", "\u2581", "<0x0A>", "hi"]),
        # Phi-3's templates write a newline that its tokens drop.
        ("ab<|end|>\nhi", {"name": "Phi-3 Mini"}, ["\u2581", "ab", "<|end|>", "\u2581hi"]),
    ],
)
def test_a_sentencepiece_vocabulary_reads_spaces_as_llama_cpp_does(
    text: str, values: dict[str, Any], expected: list[str], toy_gguf: GgufModel
) -> None:
    tokenizer = build_gguf_tokenizer(make_sentencepiece_gguf(toy_gguf, **values))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.encode(text) == [1, *ids]  # as llama.cpp does where the file says nothing


@pytest.mark.embedded
def test_the_embedded_models_tokens_survive_a_round_trip(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    text = (
        "<|im_start|>user\nHow do I bake  bread?\n\n Caf\u00e9, \u6f22\u5b57, \U0001f642 I'd say<|im_end|>\n"
    )
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    # Digits are split off first, so that the two newlines are one token (llama.cpp's rule "smollm").
    assert tokenizer.tokenize("so:\n\n12") == ["so", ":", "\u010a\u010a", "1", "2"]
    plain = [i for i in range(len(tokenizer)) if "\ufffd" not in tokenizer.decode([i])]
    assert len(plain) > 0.95 * len(tokenizer)
    texts = tokenizer.batch_decode([[i] for i in plain], clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(again, clean_up_tokenization_spaces=False) == texts
