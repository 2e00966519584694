"""Attention of many rows to one shared prefix: split from their own tokens, or to copies of the prefix.

The usual implementation concatenates the keys of prefix and row and repeats them for grouped queries, which
copies the prefix four times per layer and row. In split attention, the queries of all rows are multiplied
with the prefix's keys as one matrix, and one softmax covers the prefix and the row's own tokens. Outside of
attention, the rows are packed into one sequence of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

QueryTensor = Float[Tensor, "rows heads length size"]
KeyTensor = Float[Tensor, "rows groups keys size"]
ValueTensor = Float[Tensor, "rows groups keys width"]
HiddenMask = Bool[Tensor, "some length keys"]  # some: one mask per row, or one for all rows

# Arguments that a model may pass to its attention function without changing plain causal attention.
_CAUSAL_ATTENTION_ARGUMENTS = {
    "dropout",
    "is_causal",
    "use_cache",
    "output_attentions",
    "position_ids",
    "cache_position",
}

# Cache layers that hold keys and values only; a recurrent state advances and cannot be shared.
_SHAREABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class PackedRows:
    """Index between rows packed into one sequence of tokens, and the same rows as a padded grid.

    Tokens with which several rows start may be packed once, because their activations are equal.

    Attributes:
        packed_index: position in the packed sequence of each token of the grid; arbitrary at the padding,
            which is on the right.
        is_token: False at the padding of the grid.
        grid_index: row and column of the grid at which each packed token occurs first.
    """

    packed_index: Int[Tensor, "rows length"]
    is_token: Bool[Tensor, "rows length"]
    grid_index: Int[Tensor, "2 tokens"]

    @classmethod
    def from_lengths(cls, lengths: Int[Tensor, " rows"]) -> PackedRows:
        """Return the index of rows of these lengths.

        >>> rows = PackedRows.from_lengths(torch.tensor([2, 3]))
        >>> rows.packed_index.tolist(), rows.last_index.tolist()
        ([[0, 1, 0], [2, 3, 4]], [1, 4])
        """
        is_token = torch.arange(int(lengths.max())) < lengths[:, None]
        positions = torch.arange(int(is_token.sum()))
        packed_index = torch.zeros(is_token.shape, dtype=torch.long).masked_scatter_(is_token, positions)
        return cls(packed_index, is_token, is_token.nonzero().T)

    @classmethod
    def from_tokens(cls, token_rows: Sequence[Sequence[int]]) -> PackedRows:
        """Return the index of rows of these tokens; tokens with which several rows start are packed once.

        >>> rows = PackedRows.from_tokens([[5, 6, 7], [5, 6, 9, 9], [8]])
        >>> rows.packed_index.tolist(), rows.grid_index.tolist()
        ([[0, 1, 2, 0], [0, 1, 3, 4], [5, 0, 0, 0]], [[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 3, 0]])
        """
        # A token's position follows from the position of the token before it, and the token (a trie).
        positions: dict[tuple[int, int], int] = {}
        packed_index = torch.zeros(len(token_rows), max(map(len, token_rows)), dtype=torch.long)
        is_token = torch.zeros(packed_index.shape, dtype=torch.bool)
        first_occurrences: list[tuple[int, int]] = []
        for row, tokens in enumerate(token_rows):
            position = -1
            for column, token in enumerate(tokens):
                position = positions.setdefault((position, token), len(positions))
                if position == len(first_occurrences):
                    first_occurrences.append((row, column))
                packed_index[row, column] = position
            is_token[row, : len(tokens)] = True
        return cls(packed_index, is_token, torch.tensor(first_occurrences).T)

    @property
    def last_index(self) -> Int[Tensor, " rows"]:
        """Position in the packed sequence of each row's last token."""
        return self.packed_index.gather(1, self.is_token.sum(1, keepdim=True) - 1)[:, 0]

    @property
    def future_mask(self) -> Bool[Tensor, "1 length length"]:
        """Causal mask: True at the later tokens of a row, which include the padding on the right."""
        length = self.is_token.shape[1]
        return torch.ones(1, length, length, dtype=torch.bool).triu(1)

    def unpack_rows(
        self, packed: Float[Tensor, "1 heads tokens size"]
    ) -> Float[Tensor, "rows heads length size"]:
        """Return packed queries, keys or values as a padded grid."""
        return packed[0].transpose(0, 1)[self.packed_index].transpose(1, 2)

    def pack_rows(
        self, grid: Float[Tensor, "rows length heads size"]
    ) -> Float[Tensor, "1 tokens heads size"]:
        """Return the output of attention on a padded grid as a packed sequence."""
        return grid[self.grid_index[0], self.grid_index[1]][None]


def can_split_attention(model: Any, cache_layers: list[Any]) -> bool:
    """Return whether the model's attention can be split into prefix and row.

    Every layer must attend to the whole prefix, through the attention interface of transformers and PyTorch's
    SDPA kernel. GPUs use copies of the prefix: their kernels read keys faster than this can multiply.
    """
    return (
        model.device.type == "cpu"
        and model._supports_attention_backend
        and model.config.get_text_config()._attn_implementation == "sdpa"
        and all(type(layer) is DynamicLayer for layer in cache_layers)
    )


class RowCache:
    """Growing keys and values of the rows' own tokens after the prefix, in one layer.

    Attributes:
        keys: rows × groups × tokens × size; None before the first forward pass.
        values: of the same rows and tokens.
    """

    keys: Tensor | None = None
    values: Tensor | None = None

    def append_tokens(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens and return those of all tokens."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def select_rows(self, row_index: Tensor) -> None:
        """Keep only the rows with these indices."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[row_index], self.values[row_index]


def make_split_update(
    keys: KeyTensor, values: ValueTensor, row_cache: RowCache | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a cache layer's `update` that returns a batch's own keys and values and attaches the prefix's.

    Args:
        keys: of the prefix.
        values: of the prefix.
        row_cache: stores the rows' own keys and values; without it, nothing is stored beyond a forward pass.
    """

    def update(new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new_keys.prefix = keys, values, row_cache  # type: ignore[attr-defined]
        return new_keys, new_values

    return update


@contextmanager
def use_split_attention(packed_rows: PackedRows, hidden_mask: HiddenMask | None = None) -> Iterator[None]:
    """Context manager: packed rows attend to the prefix attached to their keys, and to their own tokens.

    Args:
        packed_rows: index of the packed rows.
        hidden_mask: True where a new token does not attend to a token of its own row, cached tokens first; by
            default the causal mask.
    """
    original_attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    hidden = packed_rows.future_mask if hidden_mask is None else hidden_mask

    def attend(
        module: Any,
        query: QueryTensor,
        key: KeyTensor,
        value: ValueTensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        if not hasattr(key, "prefix"):  # of the part that reads images
            return original_attention(module, query, key, value, attention_mask, scaling=scaling, **more)
        shared_keys, shared_values, row_cache = key.prefix
        query, key, value = map(packed_rows.unpack_rows, (query, key, value))
        if row_cache is not None:
            key, value = row_cache.append_tokens(key, value)
        if all(setting is None or name in _CAUSAL_ATTENTION_ARGUMENTS for name, setting in more.items()):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            output = _compute_split_attention(query, key, value, shared_keys, shared_values, hidden, scale)
            return packed_rows.pack_rows(output), None
        # Other settings, such as soft caps: the original attention on concatenated keys and values.
        key = torch.cat([shared_keys.expand(len(key), -1, -1, -1), key], dim=-2)
        value = torch.cat([shared_values.expand(len(value), -1, -1, -1), value], dim=-2)
        prefix_mask = torch.ones(len(query), query.shape[2], shared_keys.shape[2], dtype=torch.bool)
        mask = torch.cat([prefix_mask, ~hidden.expand(len(query), -1, -1)], dim=2)[:, None]
        output, _ = original_attention(module, query, key, value, mask, scaling=scaling, **more)
        return packed_rows.pack_rows(output), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original_attention


def _compute_split_attention(
    query: QueryTensor,
    keys: KeyTensor,
    values: ValueTensor,
    shared_keys: Float[Tensor, "1 groups shared size"],
    shared_values: Float[Tensor, "1 groups shared width"],
    hidden_mask: HiddenMask,
    scaling: float,
) -> Float[Tensor, "rows length heads width"]:
    """Return attention to the shared prefix and to the row's own tokens, except hidden ones.

    softmax([q·K_shared, q·K_own] · scaling) [V_shared; V_own], with one softmax over both parts.
    """
    rows, heads, length, size = query.shape
    groups, n_own, n_shared = keys.shape[1], keys.shape[2], shared_keys.shape[2]
    # groups × rows × (heads of a group · length) × size; flat: groups × (rows · heads of a group · length) ×
    # size, so that for each group all queries are one matrix against the prefix.
    queries = (query * scaling).reshape(rows, groups, -1, size).transpose(0, 1).contiguous()
    flat_queries = queries.view(groups, -1, size)
    weights = query.new_empty(groups, flat_queries.shape[1], n_shared + n_own)
    torch.bmm(flat_queries, shared_keys[0].mT, out=weights[..., :n_shared])
    own_scores = (queries @ keys.transpose(0, 1).mT).masked_fill_(
        hidden_mask.repeat(1, heads // groups, 1), -torch.inf
    )
    weights[..., n_shared:] = own_scores.view(groups, -1, n_own)
    weights = weights.softmax(-1)
    output = weights[..., n_shared:].view_as(own_scores) @ values.transpose(0, 1)
    output += torch.bmm(weights[..., :n_shared], shared_values[0]).view_as(output)
    return output.transpose(0, 1).reshape(rows, heads, length, -1).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of a shared prefix.

    Attributes:
        cache: keys and values of all layers.
        is_packed: whether rows are packed into one sequence, not padded to one length.
        end_position: position of the token behind it, which is not its length where an image takes fewer
            positions than tokens.
    """

    cache: DynamicCache
    is_packed: bool
    end_position: int


def can_share_prefix(model: Any) -> bool:
    """Return whether a model's cache holds keys and values only, which several rows can reuse."""
    return all(type(layer) in _SHAREABLE_LAYERS for layer in DynamicCache(config=model.config).layers)


def prepare_shared_prefix(cache: DynamicCache, is_packed: bool, end_position: int) -> SharedPrefix:
    """Return a prefix that batches of any size can use, after replacing the `update` of its cache layers.

    Args:
        cache: keys and values of the prefix.
        is_packed: whether rows will be packed into one sequence, with split attention.
        end_position: see `SharedPrefix`.
    """
    make_update = make_split_update if is_packed else _make_broadcast_update
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)  # one of _SHAREABLE_LAYERS
        if layer.keys is not None and layer.values is not None:  # some layers use those of another layer
            layer.update = make_update(layer.keys, layer.values)  # type: ignore[method-assign]
    return SharedPrefix(cache, is_packed, end_position)


def _make_broadcast_update(keys: Tensor, values: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a cache layer's `update` that repeats the prefix for all rows of a batch and stores nothing.

    New keys and values are needed in their own layer only. Stored, as transformers does, a batch would hold
    those of all layers at once: at 7B parameters, tens of gigabytes instead of one.
    """

    def update(new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = (len(new_keys), -1, -1, -1)
        return (
            torch.cat([keys.expand(rows), new_keys], dim=-2),
            torch.cat([values.expand(rows), new_values], dim=-2),
        )

    return update
