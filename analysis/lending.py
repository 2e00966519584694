"""What a model remembers of a shared prefix, lent to batches of rows; its last step, at their ends only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from analysis import attention

# Layers that remember keys and values alone; a recurrent state goes on from where it is and is not shared.
_SHAREABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class SharedPrefix:
    """What the model remembers of the shared tokens, and how it is lent.

    Attributes:
        cache: keys and values.
        is_packed: whether rows lie behind each other in one line, not padded beside each other.
    """

    cache: DynamicCache
    is_packed: bool


def can_share_prefix(model: Any) -> bool:
    """Return whether all that a model remembers of a prefix can be laid under several rows."""
    return all(type(one) in _SHAREABLE_LAYERS for one in DynamicCache(config=model.config).layers)


def prepare_shared_prefix(model: Any, cache: DynamicCache) -> SharedPrefix:
    """Return what a model remembers of a prefix, made so that batches of any size can be laid on it."""
    in_line = attention.can_split_attention(model, cache.layers)
    lend = attention.make_split_update if in_line else _make_broadcast_update
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)  # of _SHAREABLE
        if layer.keys is not None and layer.values is not None:  # some layers use those of another
            layer.update = lend(layer.keys, layer.values)  # type: ignore[method-assign]
    return SharedPrefix(cache, in_line)


def _make_broadcast_update(keys: Tensor, values: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """`update` of a cache layer that lays its one row under all rows of a batch, and remembers nothing new.

    What a layer adds is needed in that layer only. Were it kept, as transformers does, a batch would hold the
    keys and values of all layers at once: at 7B, tens of gigabytes instead of one.
    """

    def update(new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = (len(new_keys), -1, -1, -1)
        return (
            torch.cat([keys.expand(rows), new_keys], dim=-2),
            torch.cat([values.expand(rows), new_values], dim=-2),
        )

    return update


@contextmanager
def restrict_unembedding(model: Any, logit_rows: Int[Tensor, " ends"], logit_columns: Int[Tensor, " ends"]) -> Iterator[None]:
    """While open, the unembedding sees the places where prompts end only (ends × 1 × width).

    Args:
        model: it is left as it was.
        logit_rows: of the hidden states, one for each end.
        logit_columns: the column.
    """

    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[logit_rows.to(hidden.device), logit_columns.to(hidden.device)][:, None], *args[1:])

    unembedding = model.get_output_embeddings()
    handle = unembedding.register_forward_pre_hook(pick) if unembedding is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
