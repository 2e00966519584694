"""Attention of many rows to one prefix, without laying a copy of the prefix under each row.

The usual way (keys of prefix and row put together, then repeated for grouped queries) copies the prefix four
times a layer and row. Here all rows multiply with the prefix's own keys as one matrix, and one softmax joins
that with the row's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Queries = Float[Tensor, "rows heads length size"]
Keys = Float[Tensor, "rows groups keys size"]
Values = Float[Tensor, "rows groups keys width"]

# What a model may hand to attention beside the arguments named below and still mean plain causal attention.
_PLAIN = {"dropout", "is_causal", "use_cache", "output_attentions", "position_ids", "cache_position"}


def can_split(model: Any, layers: list[Any]) -> bool:
    """Return whether the model's attention can be computed in two parts.

    It must go through transformers' interface, to PyTorch's kernel, in every layer to all of the prefix. On a
    GPU, whose kernels read keys faster than this can multiply, copies are laid as usual.
    """
    return (
        model.device.type == "cpu"
        and model._supports_attention_backend
        and model.config.get_text_config()._attn_implementation == "sdpa"
        and all(type(layer) is DynamicLayer for layer in layers)
    )


def lent_apart(keys: Keys, values: Values) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `update` of a cache layer that gives a batch its own keys back, the prefix's tied to them."""

    def update(new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new_keys.prefix = keys, values  # type: ignore[attr-defined]
        return new_keys, new_values

    return update


@contextmanager
def in_two_parts() -> Iterator[None]:
    """While open, keys that carry a prefix are attended to together with it; all others as ever."""
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any,
        query: Queries,
        key: Keys,
        value: Values,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        if (prefix := getattr(key, "prefix", None)) is not None:
            shared_keys, shared_values = prefix
            if all(given is None or name in _PLAIN for name, given in more.items()):
                scale = query.shape[-1] ** -0.5 if scaling is None else scaling
                return _attend(query, key, value, shared_keys, shared_values, scale), None
            key = torch.cat([shared_keys.expand(len(key), -1, -1, -1), key], dim=-2)
            value = torch.cat([shared_values.expand(len(value), -1, -1, -1), value], dim=-2)
        return usual(module, query, key, value, attention_mask, scaling=scaling, **more)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual


def _attend(
    query: Queries,
    keys: Keys,
    values: Values,
    shared_keys: Float[Tensor, "1 groups shared size"],
    shared_values: Float[Tensor, "1 groups shared width"],
    scaling: float,
) -> Float[Tensor, "rows length heads width"]:
    """Causal attention to the prefix and to what a row holds itself; padding stands at a row's end."""
    rows, heads, length, size = query.shape
    groups, shared = keys.shape[1], shared_keys.shape[2]
    # groups × (rows · heads of a group · length) × size: against the prefix, a group is one matrix.
    asked = (query * scaling).reshape(rows, groups, -1, size).transpose(0, 1).contiguous()
    flat = asked.view(groups, -1, size)
    weights = query.new_empty(groups, flat.shape[1], shared + length)
    torch.bmm(flat, shared_keys[0].mT, out=weights[..., :shared])
    # Among a row's own tokens none sees a later one; so none sees the padding, which stands at the end.
    later = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(heads // groups, 1)
    own = (asked @ keys.transpose(0, 1).mT).masked_fill_(later, -torch.inf)
    weights[..., shared:] = own.view(groups, -1, length)
    weights = weights.softmax(-1)
    seen = weights[..., shared:].view_as(own) @ values.transpose(0, 1)
    seen += torch.bmm(weights[..., :shared], shared_values[0]).view_as(seen)
    return seen.transpose(0, 1).reshape(rows, heads, length, -1).transpose(1, 2).contiguous()
