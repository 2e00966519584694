"""sentencepiece vocabularies as `tokenizers` objects: of a `tokenizer.model` or of a GGUF, with the same ids.

transformers' own conversion loses a space where a text begins with one, and adds the space in front of a text
by another rule. The algorithm: https://github.com/google/sentencepiece/blob/master/src/bpe_model.cc
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defenses.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2  # kinds of models
_SPACE = "\u2581"
_FIRST_BYTE = b"\n"  # of a sentencepiece file, which begins with its first piece
_UNUSED_SCORE = -1e6  # of a unigram piece that no text is split into
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model")


def build_sentencepiece_bpe(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], has_symbols: bool = False
) -> Any:
    """Return the BPE model of `tokenizers` that joins pieces in the order in which sentencepiece joins them.

    Args:
        pieces: by id.
        scores: by id; the pair whose piece has the highest score is joined first.
        kinds: by id, one of the constants of this module; only normal and unused pieces result from joining.
        has_symbols: the text comes with user-defined pieces split off, each to be one token.
    """
    from tokenizers.models import BPE

    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    joinable = {
        piece: score
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
        if kind in (NORMAL, UNUSED)
    }
    pairs = [
        # Of equal scores sentencepiece joins the leftmost pair. Where two pairs of one piece can overlap, the
        # left one is the one whose right half the piece also begins with.
        (-score, vocabulary[piece], not piece.startswith(piece[cut:]), piece[:cut], piece[cut:])
        for piece, score in joinable.items()
        for cut in range(1, len(piece))
        if piece[:cut] in joinable and piece[cut:] in joinable
    ]
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == UNKNOWN), None)
    return BPE(
        vocabulary,
        [(left, right) for *_, left, right in sorted(pairs)],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=BYTE in kinds,
        ignore_merges=has_symbols,
    )


def set_space_rules(
    backend: Tokenizer, prefix: str, steps: Sequence[Any] = (), merges_spaces: bool = False
) -> None:
    """Set how a tokenizer writes spaces, and where it adds one in front of a text.

    Args:
        backend: changed in place.
        prefix: "always", at the start and behind each special token, as sentencepiece does; "first", at the
            start only; "never".
        steps: normalizers that come before.
        merges_spaces: the added space and one that is there make one.
    """
    from tokenizers import decoders, normalizers, pre_tokenizers

    prepend = [normalizers.Prepend(_SPACE)] if prefix == "always" else []
    backend.normalizer = normalizers.Sequence([*steps, *prepend, normalizers.Replace(" ", _SPACE)])
    # A Metaspace adds nothing to a text that begins with its sign. To add a space all the same, its sign is a
    # plain space, of which none is left, and becomes the other in a second step.
    signs = (_SPACE,) if merges_spaces else (" ", _SPACE)
    schemes = ("first", "never")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(sign, prepend_scheme=scheme, split=False)
            for sign, scheme in zip(signs, schemes, strict=False)
            if prefix == "first"
        ]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix != "never" else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def follow_sentencepiece(tokenizer: Any, folder: Path) -> Any:
    """Return a tokenizer with sentencepiece's ids for one that was read from a `tokenizer.model` alone.

    The setting `legacy` of `tokenizer_config.json` says whether a space is added behind special tokens, too:
    it is, as sentencepiece does with every text, unless it is false.

    Args:
        tokenizer: of transformers, whose special tokens and chat template are kept.
        folder: of the model.

    Raises:
        UserError: if the file is incomplete, the tokenizer's class numbers the pieces differently, or
            sentencepiece's rule has no counterpart.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = _find_sentencepiece_file(folder)
    spec = _read_sentencepiece_file(path) if path and tokenizer.is_fast else None
    if spec is None:  # another kind of file, such as tiktoken's
        return tokenizer
    kinds = {piece.piece: piece.type for piece in spec.pieces}
    is_renumbered = any(
        kind == NORMAL and tokenizer.convert_tokens_to_ids(piece) != index
        for index, (piece, kind) in enumerate(kinds.items())
    )
    if is_renumbered or spec.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(
            f"{path} cannot be read as {type(tokenizer).__name__}, which numbers its pieces or writes its "
            "spaces differently: save the tokenizer with its tokenizer.json (save_pretrained())"
        )
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
    rules = spec.normalizer_spec
    has_prefix = rules.add_dummy_prefix and (config.get("add_prefix_space") is not False)
    prefix = "never" if not has_prefix else "first" if config.get("legacy") is False else "always"
    backend = Tokenizer(_build_model(spec))
    set_space_rules(
        backend, prefix, _build_normalizers(rules, prefix != "first"), rules.remove_extra_whitespaces
    )
    splits = []
    if BYTE in kinds.values():  # "<0x41>" as a text is not the byte
        splits.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
    # sentencepiece's own symbols are found in the written text, and no space is added behind them.
    listed = {token["content"] for token in config.get("added_tokens_decoder", {}).values()}
    symbols = [piece for piece, kind in kinds.items() if kind == USER_DEFINED and piece not in listed]
    if spec.trainer_spec.model_type == _UNIGRAM and (crossing := _find_crossing_symbols(symbols)):
        raise UserError(
            f"{path} has the symbols {crossing[0]!r} and {crossing[1]!r}, which can overlap in a text, and "
            "sentencepiece's choice there cannot be repeated: save the tokenizer with its tokenizer.json "
            "(save_pretrained())"
        )
    if symbols and spec.trainer_spec.model_type == _BPE:
        pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        splits.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([backend.pre_tokenizer, *splits])
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.content not in symbols:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            assert backend.token_to_id(token.content) == index
    backend.post_processor = tokenizer.backend_tokenizer.post_processor
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        model_input_names=tokenizer.model_input_names,
        clean_up_tokenization_spaces=False,
        **{name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
    )


def check_sentencepiece_file(folder: Path) -> None:
    """Raise UserError if the sentencepiece file in a model's folder is incomplete."""
    if path := _find_sentencepiece_file(folder):
        _read_sentencepiece_file(path)


def _find_sentencepiece_file(folder: Path) -> Path | None:
    return next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()), None)


def _read_sentencepiece_file(path: Path) -> Any:
    """Return a sentencepiece file as its protocol buffer; None if it is a file of another kind."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    content = path.read_bytes()
    spec: Any = vars(sentencepiece_model_pb2)["ModelProto"]()
    try:
        spec.ParseFromString(content)
        is_whole = spec.HasField("trainer_spec") and spec.HasField("normalizer_spec")
    except DecodeError:
        is_whole = False
    if not is_whole and content[:1] == _FIRST_BYTE:
        raise UserError(f"{path} is incomplete: its end is missing; save or download the model again")
    return spec if is_whole and spec.pieces else None


def _find_crossing_symbols(symbols: Sequence[str]) -> tuple[str, str] | None:
    """Return two symbols of which one can begin within the other; None if there are only runs of a character.

    >>> _find_crossing_symbols(["aba", "x"]), _find_crossing_symbols(["--", "---", "ab"])
    (('aba', 'aba'), None)
    """
    for first, second in product(symbols, repeat=2):
        sizes = range(1, min(len(first), len(second)))
        if len({*first, *second}) > 1 and any(first.endswith(second[:size]) for size in sizes):
            return first, second
    return None


def _build_model(spec: Any) -> Any:
    """Return the model of `tokenizers` for a sentencepiece file, BPE or unigram."""
    from tokenizers.models import Unigram

    pieces, kinds = [piece.piece for piece in spec.pieces], [piece.type for piece in spec.pieces]
    scores = [piece.score for piece in spec.pieces]
    if spec.trainer_spec.model_type == _BPE:
        return build_sentencepiece_bpe(pieces, scores, kinds, USER_DEFINED in kinds)
    if spec.trainer_spec.model_type != _UNIGRAM:
        raise UserError("a tokenizer.model of words or characters cannot be read: only BPE and unigram ones")
    normal = [score for score, kind in zip(scores, kinds, strict=True) if kind == NORMAL]
    scored = {
        # The bonus of sentencepiece for symbols; bytes and control tokens are found in other ways.
        piece: {
            NORMAL: score,
            USER_DEFINED: len(piece) * max(0.0, *normal) - 0.1,
            UNUSED: _UNUSED_SCORE,
        }.get(kind, min(normal))
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
    }
    return Unigram(list(scored.items()), kinds.index(UNKNOWN), spec.trainer_spec.byte_fallback)


def _build_normalizers(rules: Any, is_whole_text: bool) -> list[Any]:
    """Return the normalizers of a sentencepiece file, without those that write spaces.

    Args:
        rules: of the file.
        is_whole_text: each text between special tokens counts as a text of its own, whose first spaces go.
    """
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if rules.precompiled_charsmap:
        # tokenizers looks up a character with its marks, and only if it is short; sentencepiece finds longer
        # sequences in the text, such as the parts of a Korean syllable, which these rules compose.
        if "nfkc" in rules.name:
            steps.append(normalizers.NFC())
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=is_whole_text), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps
