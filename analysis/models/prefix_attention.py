"""Attention of many rows to one prefix, without a copy of the prefix under each row and without padding.

The usual way (keys of prefix and row put together, then repeated for grouped queries) copies the prefix four
times a layer and row. Here all rows multiply with the prefix's own keys as one matrix, and one softmax joins
that with the row's own tokens. Outside of attention the rows lie behind each other in one line of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

QueryTensor = Float[Tensor, "rows heads length size"]
KeyTensor = Float[Tensor, "rows groups keys size"]
ValueTensor = Float[Tensor, "rows groups keys width"]
HiddenMask = Bool[Tensor, "some length keys"]  # some: of each row, or one for all


@dataclass(frozen=True)
class PackedRows:
    """Rows of unlike length behind each other in one line of tokens, and beside each other in a grid.

    What rows begin with alike may stand in the line once: there all of them hold the same.

    Attributes:
        packed_index: where in the line each token of the grid is; anywhere at the padding, at the end of a row.
        is_token: where in the grid a token is, not padding.
        grid_index: for each token of the line, in which row and column of the grid it is first.
    """

    packed_index: Int[Tensor, "rows length"]
    is_token: Bool[Tensor, "rows length"]
    grid_index: Int[Tensor, "2 tokens"]

    @classmethod
    def from_lengths(cls, lengths: Int[Tensor, " rows"]) -> PackedRows:
        """Return the rows of these lengths.

        >>> rows = Rows.from_lengths(torch.tensor([2, 3]))
        >>> rows.packed_index.tolist(), rows.last_index.tolist()
        ([[0, 1, 0], [2, 3, 4]], [1, 4])
        """
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        places = torch.zeros(real.shape, dtype=torch.long).masked_scatter_(
            real, torch.arange(int(real.sum()))
        )
        return cls(places, real, real.nonzero().T)

    @classmethod
    def from_tokens(cls, token_rows: Sequence[Sequence[int]]) -> PackedRows:
        """Return rows of these tokens, those that some rows begin with alike once in the line.

        >>> rows = Rows.from_tokens([[5, 6, 7], [5, 6, 9, 9], [8]])
        >>> rows.packed_index.tolist(), rows.grid_index.tolist()
        ([[0, 1, 2, 0], [0, 1, 3, 4], [5, 0, 0, 0]], [[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 3, 0]])
        """
        known: dict[tuple[int, int], int] = {}  # the token before in the line, and the token
        places = torch.zeros(len(token_rows), max(map(len, token_rows)), dtype=torch.long)
        real = torch.zeros(places.shape, dtype=torch.bool)
        taken: list[tuple[int, int]] = []
        for number, row in enumerate(token_rows):
            place = -1
            for column, token in enumerate(row):
                place = known.setdefault((place, token), len(known))
                if place == len(taken):
                    taken.append((number, column))
                places[number, column] = place
            real[number, : len(row)] = True
        return cls(places, real, torch.tensor(taken).T)

    @property
    def last_index(self) -> Int[Tensor, " rows"]:
        """Where in the line each row ends."""
        return self.packed_index.gather(1, self.is_token.sum(1, keepdim=True) - 1)[:, 0]

    @property
    def future_mask(self) -> Bool[Tensor, "1 length length"]:
        """What no token of a row sees: those behind it, and so the padding, which stands at the end."""
        length = self.is_token.shape[1]
        return torch.ones(1, length, length, dtype=torch.bool).triu(1)

    def unpack_rows(
        self, packed: Float[Tensor, "1 heads tokens size"]
    ) -> Float[Tensor, "rows heads length size"]:
        """Return the tokens of a line as rows."""
        return packed[0].transpose(0, 1)[self.packed_index].transpose(1, 2)

    def pack_rows(
        self, grid: Float[Tensor, "rows length heads size"]
    ) -> Float[Tensor, "1 tokens heads size"]:
        """Return the tokens of rows as a line."""
        return grid[self.grid_index[0], self.grid_index[1]][None]


# What a model may hand to attention beside the arguments named below and still mean plain causal attention.
_CAUSAL_ATTENTION_ARGUMENTS = {
    "dropout",
    "is_causal",
    "use_cache",
    "output_attentions",
    "position_ids",
    "cache_position",
}


def can_split_attention(model: Any, cache_layers: list[Any]) -> bool:
    """Return whether the model's attention can be computed in two parts.

    It must go through transformers' interface, to PyTorch's kernel, in every layer to all of the prefix. On a
    GPU, whose kernels read keys faster than this can multiply, copies are laid as usual.
    """
    return (
        model.device.type == "cpu"
        and model._supports_attention_backend
        and model.config.get_text_config()._attn_implementation == "sdpa"
        and all(type(layer) is DynamicLayer for layer in cache_layers)
    )


class RowCache:
    """What the rows of a batch have said themselves behind the prefix, in one layer; it may grow.

    Attributes:
        keys: rows × groups × tokens × size; none before the first pass.
        values: of the same rows and tokens.
    """

    keys: Tensor | None = None
    values: Tensor | None = None

    def append_tokens(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put new tokens behind the old ones; return all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def select_rows(self, row_index: Tensor) -> None:
        """Forget all other rows."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[row_index], self.values[row_index]


def make_split_update(
    keys: KeyTensor, values: ValueTensor, row_cache: RowCache | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `update` of a cache layer that gives a batch its own keys back, the prefix's tied to them.

    Args:
        keys: of the prefix.
        values: of the prefix.
        row_cache: where the rows remember what they said; without it, nothing outlives a pass.
    """

    def update(new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new_keys.prefix = keys, values, row_cache  # type: ignore[attr-defined]
        return new_keys, new_values

    return update


@contextmanager
def use_split_attention(packed_rows: PackedRows, hidden_mask: HiddenMask | None = None) -> Iterator[None]:
    """While open, a line of these rows is attended to together with the prefix that its keys carry.

    Args:
        packed_rows: of the line.
        hidden_mask: what each new token does not see of its row's own tokens, remembered ones first; by default
            those behind it.
    """
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    unseen = packed_rows.future_mask if hidden_mask is None else hidden_mask

    def attend(
        module: Any,
        query: QueryTensor,
        key: KeyTensor,
        value: ValueTensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        shared_keys, shared_values, memory = key.prefix  # type: ignore[attr-defined]
        query, key, value = (
            packed_rows.unpack_rows(query),
            packed_rows.unpack_rows(key),
            packed_rows.unpack_rows(value),
        )
        if memory is not None:
            key, value = memory.append_tokens(key, value)
        if all(given is None or name in _CAUSAL_ATTENTION_ARGUMENTS for name, given in more.items()):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return packed_rows.pack_rows(
                _compute_split_attention(query, key, value, shared_keys, shared_values, unseen, scale)
            ), None
        key = torch.cat([shared_keys.expand(len(key), -1, -1, -1), key], dim=-2)
        value = torch.cat([shared_values.expand(len(value), -1, -1, -1), value], dim=-2)
        seen = torch.ones(len(query), query.shape[2], shared_keys.shape[2], dtype=torch.bool)
        mask = torch.cat([seen, ~unseen.expand(len(query), -1, -1)], dim=2)[:, None]
        out, _ = usual(module, query, key, value, mask, scaling=scaling, **more)
        return packed_rows.pack_rows(out), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual


def _compute_split_attention(
    query: QueryTensor,
    keys: KeyTensor,
    values: ValueTensor,
    shared_keys: Float[Tensor, "1 groups shared size"],
    shared_values: Float[Tensor, "1 groups shared width"],
    hidden_mask: HiddenMask,
    scaling: float,
) -> Float[Tensor, "rows length heads width"]:
    """Attention to the prefix and to what a row holds itself, short of what is hidden."""
    rows, heads, length, size = query.shape
    groups, own_length, shared = keys.shape[1], keys.shape[2], shared_keys.shape[2]
    # groups × (rows · heads of a group · length) × size: against the prefix, a group is one matrix.
    asked = (query * scaling).reshape(rows, groups, -1, size).transpose(0, 1).contiguous()
    flat = asked.view(groups, -1, size)
    weights = query.new_empty(groups, flat.shape[1], shared + own_length)
    torch.bmm(flat, shared_keys[0].mT, out=weights[..., :shared])
    own = (asked @ keys.transpose(0, 1).mT).masked_fill_(
        hidden_mask.repeat(1, heads // groups, 1), -torch.inf
    )
    weights[..., shared:] = own.view(groups, -1, own_length)
    weights = weights.softmax(-1)
    seen = weights[..., shared:].view_as(own) @ values.transpose(0, 1)
    seen += torch.bmm(weights[..., :shared], shared_values[0]).view_as(seen)
    return seen.transpose(0, 1).reshape(rows, heads, length, -1).transpose(1, 2).contiguous()
