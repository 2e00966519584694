"""Tokenizer of a GGUF, which splits texts as llama.cpp does for the file's `tokenizer.ggml.pre`.

The rules are those of https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp; each regular expression is
the one of the tokenizer.json that llama.cpp's own stands for. A name that is not listed here is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.checkpoints.sentencepiece_vocabulary import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    build_sentencepiece_bpe,
    set_space_rules,
)
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.checkpoints.gguf_files import GgufModel

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_SLASHES = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_TEKKEN = rf"{_CASED}{_UPPER}*{_LOWER}+|{_CASED}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}"
_GPT4O = (
    rf"{_CASED}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_CASED}{_UPPER}+{_LOWER}*{_SUFFIX}?|\p{{N}}{{1,3}}|{_SLASHES}"
)
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
# Cased letters, without the blocks that DeepSeek's list of ranges leaves out.
_DEEPSEEK_LETTER = (
    "(?![\u0560-\u0588\u10c7\u10cd\u10d0-\u10ff\u1c80-\u1c8a\u1fbe\u2d00-\u2d2d\ua78f-\ua7fa\uab30-\uab68"
    "\U00010570-\U000105bc\U00016e40-\U00016e7f\U0001d400-\U0001d7cb\U0001df00-\U0001df2a])[\\p{Lu}\\p{Ll}\\p{Lt}]"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?(?:{_DEEPSEEK_LETTER})+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
_LLAMA3 = rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}"
_QWEN2 = rf"{_SUFFIX}|{_WORD}|\p{{N}}|{_PUNCTUATION}"
_QWEN35 = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
# Regular expressions that split a text one after the other, and the names that stand for them.
_SPLITS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
        "default",
    ),
    (
        (_LLAMA3,),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 chatglm-bpe",
    ),
    ((_QWEN2,), "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2"),
    ((_QWEN35,), "qwen35"),
    (
        (_GPT2,),
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais "
        "trillion granite-docling exaone4 jina-v1-en jina-v2-code roberta-bpe",
    ),
    ((r"\p{N}", _GPT2), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    ((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"), "falcon"),
    (_DEEPSEEK_LLM, "deepseek-llm"),
    ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"), "deepseek-coder"),
    (
        (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3_WORDS),
        "deepseek-v3 hunyuan-dense",
    ),
    ((_TEKKEN,), "tekken"),
    ((_GPT4O,), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    ((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O), "tiny_aya cohere2moe"),
    ((r"\p{N}+", r"(?=(\d{3})+(?!\d))"), "superbpe"),
    ((_BLOOM,), "poro-chat bloom gpt3-finnish"),
    ((_BLOOM, r"\p{N}"), "viking"),
    (
        (
            rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    ((rf"{_SUFFIX}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}",), "seed-coder"),
)
_SPLITS_BY_NAME = {name: splits for splits, names in _SPLITS for name in names.split()}
# Names with which a word that is in the vocabulary as a whole is one token, whatever the merges say.
_IGNORING_MERGES = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
)
# What llama.cpp takes for the end of a turn by its text, whatever kind the file says.
_END_TOKENS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
        *("<EOT>", "<|eom_id|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    )
)
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
_UNDERSTOOD_KEYS = frozenset(
    f"tokenizer.ggml.{name}"
    for name in (
        *("model", "pre", "tokens", "token_type", "scores", "merges", *_FLAGS),
        *(f"{role}_token_id" for role in (*_ROLES.values(), "eot", "eom")),
    )
)
# The same vocabulary in other forms.
_IGNORED_KEYS = ("tokenizer.huggingface.json", "tokenizer.chat_templates", "tokenizer.rwkv.world")


def classify_tokenizer_keys(model: GgufModel) -> tuple[list[str], list[str]]:
    """Return the tokenizer's metadata keys that are understood, and those that are ignored.

    Raises:
        UserError: if a key is of neither sort and not switched off.
    """
    understood, ignored = [], []
    for key, value in model.metadata.items():
        name = key.removeprefix("tokenizer.ggml.")
        if not key.startswith("tokenizer."):
            continue
        if key in _UNDERSTOOD_KEYS or key.startswith("tokenizer.chat_template"):
            understood.append(key)
        elif name.endswith(("_token_id", "_token_ids")) or key in _IGNORED_KEYS or not value:
            ignored.append(key)
        elif name in (
            "token_type_count",
            "remove_extra_whitespaces",
            "add_sep_token",
            "precompiled_charsmap",
        ):
            ignored.append(key)  # for other kinds of tokenizers
        else:
            raise UserError(
                f"{model.paths[0]} says {key} = {str(value)[:40]}, which the conversion does not understand, "
                "so its texts could become other tokens than in llama.cpp: use the model's folder or hub id"
            )
    return understood, ignored


def build_gguf_tokenizer(model: GgufModel) -> Any:
    """Return the tokenizer of a GGUF as a fast tokenizer of transformers, with its chat template.

    Raises:
        UserError: if the file has no chat template, or a kind of tokenizer or a rule that is not known.
    """
    from transformers import PreTrainedTokenizerFast

    metadata, path = model.metadata, model.paths[0]
    kind = metadata.get("tokenizer.ggml.model")
    pieces: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(pieces)
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{path} has a tokenizer of the kind {kind!r}; those that are read are gpt2 (byte-level BPE) and "
            "llama (sentencepiece BPE): use the model's folder or hub id"
        )
    if not pieces or len(set(pieces)) < len(pieces) or len(kinds) != len(pieces):
        raise UserError(
            f"{path} has a broken vocabulary: no tokens, some twice, or not as many kinds of them"
        )
    roles = {
        role: pieces[index]
        for role, name in _ROLES.items()
        if (index := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None and index < len(pieces)
    }
    backend = (
        _build_byte_level(model, pieces) if kind == "gpt2" else _build_sentencepiece(model, pieces, kinds)
    )
    _add_tokens(model, backend, pieces, kinds, set(roles.values()))
    _add_start_and_end(model, backend, kind, roles)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read_chat_template(model),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": token for role, token in roles.items()},
    )


def read_chat_template(model: GgufModel) -> Any:
    """Return the chat template of a GGUF: its text, or several by name if it has several.

    Raises:
        UserError: if there is none.
    """
    first, prefix = "tokenizer.chat_template", "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in model.metadata.items() if key.startswith(prefix)}
    templates = ({"default": model.metadata[first]} if first in model.metadata else {}) | named
    if not templates:
        raise UserError(
            f"{model.paths[0]} has no chat template, so its prompt format is unknown; use the GGUF of an "
            "instruct model, or a folder with a chat_template.jinja"
        )
    return templates if len(templates) > 1 else next(iter(templates.values()))


def find_end_token_ids(model: GgufModel) -> list[int]:
    """Return the ids of the tokens that end a response: of the text, of the turn, of the message."""
    ids = [model.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(int(index) for index in ids if index is not None))


def _build_byte_level(model: GgufModel, pieces: list[str]) -> Any:
    """Return a byte-level BPE tokenizer that splits text by the rule that the file names."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    name = model.metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS_BY_NAME:
        raise UserError(
            f"{model.paths[0]} splits text by the rule {name!r} (tokenizer.ggml.pre), which is not known "
            "here: use the model's folder or hub id"
        )
    if "tokenizer.ggml.merges" not in model.metadata:
        raise UserError(
            f"{model.paths[0]} has a byte-level vocabulary without merges (tokenizer.ggml.merges)"
        )
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = _read_merges(model.metadata["tokenizer.ggml.merges"])
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=name in _IGNORING_MERGES))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS_BY_NAME[name]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _build_sentencepiece(model: GgufModel, pieces: list[str], kinds: list[int]) -> Any:
    """Return a BPE tokenizer over whole texts, whose spaces are written as "▁"."""
    from tokenizers import Tokenizer

    # Gemma's scores do not follow the order of its merges; the order of its pieces does.
    scores = model.metadata.get("tokenizer.ggml.scores", [])
    if model.architecture.startswith("gemma") or len(scores) != len(pieces):
        scores = [-float(index) for index in range(len(pieces))]
    backend = Tokenizer(build_sentencepiece_bpe(pieces, scores, kinds))
    has_prefix = model.metadata.get("tokenizer.ggml.add_space_prefix", True)
    set_space_rules(backend, "always" if has_prefix else "never")
    return backend


def _add_tokens(model: GgufModel, backend: Any, pieces: list[str], kinds: list[int], roles: set[str]) -> None:
    """Add the tokens that are found in a text as a whole: control tokens and those of the user's own."""
    from tokenizers import AddedToken

    name = str(model.metadata.get("general.name", "")).lower()
    # Phi-3's templates write a newline behind such a token, which its tokenizer drops. So does llama.cpp,
    # which goes by the name, too.
    is_phi3 = "phi-3" in name or "phi3" in name
    keeps_spaces = {"<unk>", "<s>", "<|endoftext|>"}
    for piece, kind in zip(pieces, kinds, strict=True):
        is_special = kind in (CONTROL, UNKNOWN) or piece in roles or piece in _END_TOKENS
        if piece and (is_special or kind == USER_DEFINED):
            strips = is_phi3 and piece not in keeps_spaces
            token = AddedToken(piece, normalized=False, special=is_special, rstrip=strips)
            (backend.add_special_tokens if is_special else backend.add_tokens)([token])


def _add_start_and_end(model: GgufModel, backend: Any, kind: str, roles: dict[str, str]) -> None:
    """Add the tokens at the start and the end of a text, if the file or its kind of tokenizer has them."""
    from tokenizers import processors

    name = model.metadata.get("tokenizer.ggml.pre")
    adds_bos = kind == "llama" or (name in _IGNORING_MERGES)
    adds_bos = model.metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    adds_eos = model.metadata.get("tokenizer.ggml.add_eos_token", False)
    start = [roles["bos"]] if adds_bos and "bos" in roles else []
    end = [roles["eos"]] if adds_eos and "eos" in roles else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", *end],
        pair=[*start, "$A", *end, *start, "$B:1", *end],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*start, *end}],
    )


def _read_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    """Return merges as pairs; the space between the halves is never the first character."""
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1)
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs
