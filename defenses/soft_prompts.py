"""Soft prompts: learned embeddings that stand in the system turn, where a text would have its tokens.

In a chat they are placeholders: a token of the vocabulary, once for each embedding. In the prompt, each
placeholder gets a token id of its own above every vocabulary, which follows from the digest of the
embeddings, so that prefixes are shared and caches told apart as for any other tokens. While the defense is
applied, the model's embedding layer returns the learned embedding of each of these ids.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defenses.adapters import Adapter, find_adapter
from defenses.contract import LearnedTokens, ModelInfo
from defenses.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

SOFT_PROMPT_FILE = "soft_prompt.safetensors"
FIRST_LEARNED_ID = 1 << 60  # above every vocabulary, and below the ids of images
_TENSOR_NAME = "embeddings"
# Layout of an id: the bit above, 43 bits of the digest of the embeddings, 16 bits of the position.
_POSITION_BITS = 16
_DIGEST_BITS = 43
# Tokens that models with images or sound replace themselves.
_REPLACED_TOKEN = re.compile("image|img|video|vision|audio", re.IGNORECASE)


@dataclass(frozen=True)
class SoftPrompt(Adapter):
    """A folder with learned embeddings and their manifest."""

    files = (SOFT_PROMPT_FILE,)

    @property
    def config(self) -> dict[str, Any]:
        """Nothing: the embeddings are the whole of the change."""
        return {}

    @cached_property
    def embeddings(self) -> Tensor:
        """The learned embeddings: tokens x width, float32 on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.folder / SOFT_PROMPT_FILE)[_TENSOR_NAME].float()

    def make_tokens(self, tokenizer: Any) -> LearnedTokens:
        """Return the token ids of the embeddings and their placeholders in a tokenizer's texts."""
        return make_learned_tokens(tokenizer, self.sha256, len(self.embeddings))


def find_soft_prompt(name: str, model_info: ModelInfo) -> SoftPrompt | None:
    """Return the soft prompt of a kind that was trained for this state of the model, or None."""
    return find_adapter(name_soft_prompt(name, model_info.state), model_info, SoftPrompt)


def name_soft_prompt(name: str, state: str) -> str:
    """Return the name of the folder of a soft prompt, which fits one state of the model.

    >>> name_soft_prompt("dro", ""), name_soft_prompt("dro", "aligned")
    ('dro', 'dro-aligned')
    """
    suffix = re.sub(r"[^\w.]+", "-", state).strip("-.")
    return f"{name}-{suffix}" if suffix else name


def write_soft_prompt(folder: Path, embeddings: Tensor, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write learned embeddings, and return their manifest with their digest.

    Args:
        folder: output folder.
        embeddings: tokens x width.
        manifest: manifest without `sha256`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SOFT_PROMPT_FILE
    save_file({_TENSOR_NAME: embeddings.detach().float().cpu().contiguous()}, path, {"format": "pt"})
    return {**manifest, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def make_learned_tokens(tokenizer: Any, digest: str, n_tokens: int) -> LearnedTokens:
    """Return the token ids of learned embeddings and their placeholders.

    Args:
        tokenizer: transformers tokenizer.
        digest: SHA-256 of the embeddings, hexadecimal.
        n_tokens: number of the embeddings.
    """
    placeholder = find_placeholder(tokenizer)
    high_bits = int(digest, 16) % (1 << _DIGEST_BITS)
    first = FIRST_LEARNED_ID + (high_bits << _POSITION_BITS)
    token_id = int(tokenizer.convert_tokens_to_ids(placeholder))
    return LearnedTokens(placeholder, token_id, range(first, first + n_tokens))


def find_placeholder(tokenizer: Any) -> str:
    """Return a token that stays one token, wherever it stands and however often it is repeated.

    Special tokens do so. One that the chat template does not write is preferred, so that placeholders are
    found at once; other texts of the prompt may still hold it.

    Raises:
        UserError: if the tokenizer has no such token.
    """
    ends = {tokenizer.bos_token, tokenizer.eos_token}
    template = str(tokenizer.chat_template or "")

    def rank(token: Any) -> tuple[bool, bool, bool]:
        text = str(token)
        return text in ends or text in template, token.lstrip or token.rstrip, text == tokenizer.pad_token

    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in sorted((token for token in special if not _REPLACED_TOKEN.search(str(token))), key=rank):
        text = str(token)
        token_id = tokenizer.convert_tokens_to_ids(text)
        if tokenizer.encode(text * 3, add_special_tokens=False) == [token_id] * 3:
            return text
    raise UserError(
        "this tokenizer has no special token that could stand for learned embeddings: soft prompts need one"
    )


@contextmanager
def insert_embeddings(model: Any, ids: range, embeddings: Tensor) -> Iterator[None]:
    """Make the model's embedding layer return learned embeddings for their ids, within a context.

    Args:
        model: transformers model.
        ids: token ids of the embeddings, above the vocabulary.
        embeddings: tokens x width; they get gradients if they require them.
    """
    layer = model.get_input_embeddings()
    width = layer.weight.shape[1]
    if embeddings.shape[1] != width:
        raise UserError(
            f"the soft prompt has embeddings of width {embeddings.shape[1]}, and this model's have {width}: "
            "train one for this model with `analyze train`"
        )
    hide_ids, insert_rows = _make_hooks(ids, embeddings)
    handles = [layer.register_forward_pre_hook(hide_ids), layer.register_forward_hook(insert_rows)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_hooks(ids: range, embeddings: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the hooks before and after the embedding layer."""
    positions: list[Tensor] = []  # position of each token in the soft prompt, between the two hooks

    def hide_ids(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        token_ids, *others = args
        is_learned = (token_ids >= ids.start) & (token_ids < ids.stop)
        positions[:] = [(token_ids - ids.start).masked_fill(~is_learned, -1)]
        return (token_ids.masked_fill(is_learned, 0), *others)

    def insert_rows(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows = positions.pop()
        learned = embeddings.to(output)[rows.clamp_min(0)]
        return learned.where((rows >= 0)[..., None], output)

    return hide_ids, insert_rows
