"""Batched first-token inference with a shared prefix.

Most of a defended prompt (system turn, demonstrations, the start of the user turn) is the same for every
query. The engine computes that shared prefix once, reuses its keys and values for batches of suffixes of
similar length, and applies the unembedding at the last position only. On a CPU, tokens with which only some
suffixes of a batch start, such as the copies of one query, are computed once per batch. The logits equal
those of one prompt at a time, up to floating-point noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from analysis.models.prefix_attention import (
    PackedRows,
    can_split_attention,
    make_split_update,
    use_split_attention,
)
from defenses.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    from analysis.models.prefix_attention import HiddenMask

# Tokens per batch of suffixes. On a CPU, more only overflow its caches; 512 to 1,024 are equally fast.
_TOKENS_PER_BATCH = {"cpu": 512, "cuda": 16384}
# Minimum share of tokens saved for which rows are ordered by their first tokens instead of by length.
_MIN_MERGED_SHARE = 0.1
# Cost of attending to a merged token from one more row, as a share of the cost of computing a token.
_ATTENTION_COST = 0.125
# Cache layers that hold keys and values only; a recurrent state advances and cannot be shared.
_SHAREABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)

LogitReducer = Callable[[Float[Tensor, "rows vocab"]], Float[Tensor, "rows values"]]


@dataclass
class WorkCounter:
    """Counts of tokens run through the model, and of tokens that shared prefixes saved."""

    computed_tokens: int = 0
    saved_tokens: int = 0

    def reset_counts(self) -> None:
        """Set both counts to zero."""
        self.computed_tokens = self.saved_tokens = 0


class Engine:
    """Computes next-token logits of a transformers causal language model for many prompts.

    >>> engine = Engine(model)  # doctest: +SKIP
    >>> prompts = [[1, 5, 9], [1, 5, 7, 2]]  # doctest: +SKIP
    >>> engine.read_first_token(prompts, lambda logits: logits[:, :1]).shape  # doctest: +SKIP
    torch.Size([2, 1])

    Args:
        model: in evaluation mode, on its device; never changed.
        batch_size: prompts per forward pass; by default it follows from the number of tokens.

    Attributes:
        work_counter: counts of computed and saved tokens.
        logit_positions: for hooks: while prompts run, rows and columns of the hidden states (rows × columns ×
            width) at which logits are computed, in the order of the logits. None otherwise, and while a
            shared prefix runs.
    """

    def __init__(self, model: Any, batch_size: int | None = None) -> None:
        self.model = model
        self.batch_size = batch_size
        self.work_counter = WorkCounter()
        self.logit_positions: tuple[Tensor, Tensor] | None = None

    def read_first_token(
        self,
        prompts: Sequence[Sequence[int]],
        reducer: LogitReducer,
        on_progress: Callable[[int], None] = lambda rows: None,
    ) -> Float[Tensor, "prompts values"]:
        """Return the reduced first-token logits of every prompt, in the order of the prompts.

        Args:
            prompts: token ids, of any length from 1 on; they may share a prefix.
            reducer: called with raw float32 logits, rows × vocabulary; only its result is stored.
            on_progress: called with the number of prompts finished since the last call.
        """
        values: dict[int, Tensor] = {}
        for rows, batch_values in self.iterate_first_token(prompts, reducer):
            values.update(zip(rows, batch_values, strict=True))
            on_progress(len(rows))
        return torch.stack([values[row] for row in range(len(prompts))])

    def iterate_first_token(
        self, prompts: Sequence[Sequence[int]], reducer: LogitReducer
    ) -> Iterator[tuple[list[int], Float[Tensor, "rows values"]]]:
        """Yield the prompt indices and the reduced first-token logits of each batch.

        Args:
            prompts: as for `read_first_token`.
            reducer: as for `read_first_token`.
        """
        with torch.inference_mode():
            for rows, logits in self.iterate_logits(prompts, [1] * len(prompts)):
                yield rows, reducer(logits)

    def compute_log_probabilities(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        on_progress: Callable[[int], None] = lambda rows: None,
    ) -> list[Float[Tensor, " tokens"]]:
        """Return the log-probability (nats) of every token of each response after its prompt.

        Args:
            prompts: token ids.
            responses: token ids, at least one per response.
            on_progress: called with the number of responses finished since the last call.
        """
        sequences = [(*prompt, *ids[:-1]) for prompt, ids in zip(prompts, responses, strict=True)]
        values: dict[int, Tensor] = {}
        with torch.inference_mode():
            for rows, logits in self.iterate_logits(sequences, [len(ids) for ids in responses]):
                targets = torch.tensor(
                    [token for row in rows for token in responses[row]], device=logits.device
                )
                log_probabilities = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
                lengths = [len(responses[row]) for row in rows]
                values.update(zip(rows, log_probabilities.cpu().split(lengths), strict=True))
                on_progress(len(rows))
        return [values[row] for row in range(len(prompts))]

    def iterate_logits(
        self, prompts: Sequence[Sequence[int]], n_positions: Sequence[int], share_prefix: bool = True
    ) -> Iterator[tuple[list[int], Float[Tensor, "ends vocab"]]]:
        """Yield the prompt indices and the next-token logits at each prompt's last positions, batch by batch.

        Args:
            prompts: as for `read_first_token`.
            n_positions: number of last positions per prompt, from 1 on.
            share_prefix: compute the common prefix of all prompts once, in a forward pass of its own.
        """
        if not prompts or not all(map(len, prompts)):
            raise ValueError("no prompts to read, or an empty one")
        # All positions of a prompt with logits belong to its own suffix.
        max_shared = min(len(prompt) - n for prompt, n in zip(prompts, n_positions, strict=True))
        can_share = share_prefix and can_share_prefix(self.model)
        n_shared = min(count_shared_prefix(prompts), max_shared) if can_share else 0
        prefix = self._compute_prefix(prompts[0][:n_shared]) if n_shared else None
        is_packed = prefix is not None and prefix.is_packed
        suffixes, device = [prompt[n_shared:] for prompt in prompts], self.model.device.type
        for rows in plan_batches(suffixes, is_packed, device, lambda: self.batch_size):
            batch = [suffixes[row] for row in rows]
            for part, logits in self._run_within_memory(
                batch, [n_positions[row] for row in rows], n_shared, prefix
            ):
                yield rows[part], logits
        self.work_counter.saved_tokens += n_shared * (len(prompts) - 1)

    def _compute_prefix(self, token_ids: Sequence[int]) -> SharedPrefix:
        """Return keys and values of the shared tokens, to be used by batches of any size."""
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(len(token_ids), device=ids.device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.work_counter.computed_tokens += len(token_ids)
        return prepare_shared_prefix(self.model, cache)

    def _run_within_memory(
        self,
        suffixes: list[Sequence[int]],
        n_positions: list[int],
        n_shared: int,
        prefix: SharedPrefix | None,
    ) -> Iterator[tuple[slice, Float[Tensor, "ends vocab"]]]:
        """Yield the logits of a whole batch, or of halves of it whenever memory runs out."""
        size, start = len(suffixes), 0
        while start < len(suffixes):
            part = slice(start, start + size)
            try:
                logits = self._compute_suffix_logits(suffixes[part], n_positions[part], n_shared, prefix)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError(
                        f"memory ran out on {self.model.device} with one prompt of "
                        f"{n_shared + len(suffixes[start])} tokens: use --dtype bfloat16, --device cpu, or "
                        "a smaller model"
                    ) from error
                size = (size + 1) // 2
                # Later batches start with the size that fits.
                self.batch_size = size
                continue
            yield part, logits
            start += size

    def _compute_suffix_logits(
        self,
        suffixes: list[Sequence[int]],
        n_positions: list[int],
        n_shared: int,
        prefix: SharedPrefix | None,
    ) -> Float[Tensor, "ends vocab"]:
        """Return the logits at the last positions of each suffix."""
        lengths = torch.tensor([len(suffix) for suffix in suffixes])
        if prefix is not None and prefix.is_packed:
            packed_rows = PackedRows.from_tokens(suffixes)
            logit_index = [
                index[length - n : length]
                for index, length, n in zip(packed_rows.packed_index, lengths, n_positions, strict=True)
            ]
            return self.compute_packed_suffixes(
                prefix.cache, n_shared, suffixes, packed_rows, torch.cat(logit_index)
            )
        padded_ids = _pad_suffixes(suffixes)
        # Padding on the right: index and position agree, so that sliding windows cover the same tokens as
        # without padding, and a causal model never attends to the padding.
        positions = torch.arange(padded_ids.shape[1]).expand_as(padded_ids)
        prefix_mask = torch.ones(len(suffixes), n_shared, dtype=torch.long)
        mask = torch.cat([prefix_mask, (positions < lengths[:, None]).long()], dim=1)
        rows = torch.arange(len(suffixes)).repeat_interleave(torch.tensor(n_positions))
        columns = torch.cat([torch.arange(end - n, end) for end, n in zip(lengths, n_positions, strict=True)])
        cache = prefix.cache if prefix else None
        return self._run_model(cache, padded_ids, mask, n_shared + positions, rows, columns)

    def compute_packed_suffixes(
        self,
        cache: DynamicCache,
        n_shared: int,
        suffixes: Sequence[Sequence[int]],
        packed_rows: PackedRows,
        logit_index: Int[Tensor, " ends"],
    ) -> Float[Tensor, "ends vocab"]:
        """Return the next-token logits at some tokens of whole suffixes, which start at the shared prefix.

        Args:
            cache: as for `compute_packed_logits`.
            n_shared: as for `compute_packed_logits`.
            suffixes: token ids.
            packed_rows: of these suffixes; tokens with which several of them start may be packed once.
            logit_index: as for `compute_packed_logits`.
        """
        row, column = packed_rows.grid_index
        token_ids = _pad_suffixes(suffixes)[row, column]
        self.work_counter.saved_tokens += sum(map(len, suffixes)) - len(token_ids)
        return self.compute_packed_logits(cache, n_shared, token_ids, column, packed_rows, logit_index)

    def compute_packed_logits(
        self,
        cache: DynamicCache,
        n_shared: int,
        token_ids: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        packed_rows: PackedRows,
        logit_index: Int[Tensor, " ends"],
        hidden_mask: HiddenMask | None = None,
    ) -> Float[Tensor, "ends vocab"]:
        """Return the next-token logits at some tokens of packed rows.

        Args:
            cache: keys and values of the shared prefix, attended to separately.
            n_shared: number of tokens of the shared prefix.
            token_ids: packed token ids, row after row.
            positions: position of each token, counted from the end of the shared prefix.
            packed_rows: where the rows lie in the packed sequence.
            logit_index: indices in the packed sequence at which logits are computed, such as
                `packed_rows.last_index`.
            hidden_mask: as for `use_split_attention`.
        """
        mask = torch.ones(1, n_shared + len(token_ids), dtype=torch.long)  # split attention has its own mask
        with use_split_attention(packed_rows, hidden_mask):
            return self._run_model(
                cache,
                token_ids[None],
                mask,
                n_shared + positions[None],
                torch.zeros_like(logit_index),
                logit_index,
            )

    def make_last_token_reader(self, prompt: Sequence[int]) -> Callable[[int], Float[Tensor, "rows vocab"]]:
        """Return a function that re-runs the prompt's last token for N rows, reusing the cached prefix.

        Hooks may change the activations of each row at the last token; no earlier token depends on them.

        Args:
            prompt: token ids, at least two.
        """
        n_shared = len(prompt) - 1
        prefix = self._compute_prefix(prompt[:n_shared])

        def read_last_token(n_rows: int) -> Float[Tensor, "rows vocab"]:
            token_ids = torch.full((n_rows,), prompt[n_shared])
            zeros = torch.zeros(n_rows, dtype=torch.long)
            if prefix.is_packed:
                packed_rows = PackedRows.from_lengths(torch.ones(n_rows, dtype=torch.long))
                return self.compute_packed_logits(
                    prefix.cache, n_shared, token_ids, zeros, packed_rows, packed_rows.last_index
                )
            mask = torch.ones(n_rows, n_shared + 1, dtype=torch.long)
            return self._run_model(
                prefix.cache, token_ids[:, None], mask, zeros[:, None] + n_shared, torch.arange(n_rows), zeros
            )

        return read_last_token

    def _run_model(
        self,
        cache: DynamicCache | None,
        token_ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch seen"],
        positions: Int[Tensor, "batch length"],
        logit_rows: Int[Tensor, " ends"],
        logit_columns: Int[Tensor, " ends"],
    ) -> Float[Tensor, "ends vocab"]:
        """Run one forward pass and return float32 logits at the given rows and columns."""
        device = self.model.device
        self.logit_positions = logit_rows.to(device), logit_columns.to(device)
        try:
            with restrict_unembedding(self.model, logit_rows, logit_columns):
                output = self.model(
                    input_ids=token_ids.to(device),
                    attention_mask=attention_mask.to(device),
                    position_ids=positions.to(device),
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
        finally:
            self.logit_positions = None
        self.work_counter.computed_tokens += token_ids.numel()
        # One position per logit is left, or all positions if the model does not call its unembedding module.
        logits = output.logits
        return (logits[:, 0] if logits.shape[1] == 1 else logits[logit_rows, logit_columns]).float()


def count_shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens with which all prompts start, leaving at least one token of each prompt.

    >>> count_shared_prefix([[1, 2, 3], [1, 2, 4, 5]])
    2
    >>> count_shared_prefix([[1, 2], [1, 2, 3]]), count_shared_prefix([[1]])
    (1, 0)
    """
    rows = [list(prompt) for prompt in prompts]
    # In lexicographic order, the first and the last row have the shortest common prefix.
    return min(count_common_prefix(min(rows), max(rows)), min(map(len, rows)) - 1)


def count_common_prefix(tokens: Sequence[int], other_tokens: Sequence[int]) -> int:
    """Return the number of tokens with which both rows start.

    >>> count_common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, other_tokens, strict=False)))


def plan_batches(
    suffixes: Sequence[Sequence[int]], is_packed: bool, device: str, get_batch_size: Callable[[], int | None]
) -> Iterator[list[int]]:
    """Yield batches of row indices.

    Rows are ordered by length, longest first: a batch has rows of similar length, and an out-of-memory error
    shows at once. Packed rows are ordered by their tokens instead if that saves many: tokens with which
    several rows of a batch start are computed once.

    >>> list(plan_batches([[1], [1, 2, 3], [1, 2]], False, "cpu", lambda: 2))
    [[1, 2], [0]]

    Args:
        suffixes: token ids.
        is_packed: whether rows are packed into one sequence, not padded to one length.
        device: cpu or cuda.
        get_batch_size: called before each batch; returns its number of rows, or None to let the number of
            tokens decide.
    """
    order, costs = order_rows(suffixes, is_packed)
    lengths = [len(suffixes[row]) for row in order]
    max_tokens = _TOKENS_PER_BATCH.get(device, _TOKENS_PER_BATCH["cpu"])
    start = 0
    while start < len(order):
        size = get_batch_size() or _count_fitting_rows(costs[start:], lengths[start:], is_packed, max_tokens)
        yield order[start : start + size]
        start += size


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of a shared prefix.

    Attributes:
        cache: keys and values of all layers.
        is_packed: whether rows are packed into one sequence, not padded to one length.
    """

    cache: DynamicCache
    is_packed: bool


def can_share_prefix(model: Any) -> bool:
    """Return whether a model's state after a prefix is keys and values only, which several rows can reuse."""
    return all(type(layer) in _SHAREABLE_LAYERS for layer in DynamicCache(config=model.config).layers)


def prepare_shared_prefix(model: Any, cache: DynamicCache) -> SharedPrefix:
    """Return a prefix that batches of any size can use, after replacing the `update` of its cache layers.

    Args:
        model: that computed the prefix.
        cache: keys and values of the prefix.
    """
    is_packed = can_split_attention(model, cache.layers)
    make_update = make_split_update if is_packed else _make_broadcast_update
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)  # one of _SHAREABLE_LAYERS
        if layer.keys is not None and layer.values is not None:  # some layers use those of another layer
            layer.update = make_update(layer.keys, layer.values)  # type: ignore[method-assign]
    return SharedPrefix(cache, is_packed)


@contextmanager
def restrict_unembedding(
    model: Any, logit_rows: Int[Tensor, " ends"], logit_columns: Int[Tensor, " ends"]
) -> Iterator[None]:
    """Context manager: apply the unembedding only at the given positions (ends × 1 × width).

    Args:
        model: restored on exit.
        logit_rows: row of the hidden states, one per position.
        logit_columns: column of the hidden states, one per position.
    """

    def select_positions(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[logit_rows.to(hidden.device), logit_columns.to(hidden.device)][:, None], *args[1:])

    unembedding = model.get_output_embeddings()
    handle = unembedding.register_forward_pre_hook(select_positions) if unembedding is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _pad_suffixes(suffixes: Sequence[Sequence[int]]) -> Int[Tensor, "rows length"]:
    """Return token ids padded on the right to one length."""
    return nn.utils.rnn.pad_sequence([torch.tensor(list(suffix)) for suffix in suffixes], batch_first=True)


def order_rows(suffixes: Sequence[Sequence[int]], is_packed: bool) -> tuple[list[int], list[int]]:
    """Return the order in which rows are batched, and the number of tokens that each adds to those before it.

    Args:
        suffixes: token ids.
        is_packed: whether tokens with which several rows of a batch start are computed once.
    """
    by_length = sorted(range(len(suffixes)), key=lambda row: -len(suffixes[row]))
    lengths = [len(suffixes[row]) for row in by_length]
    if is_packed:
        by_tokens = sorted(by_length, key=lambda row: tuple(suffixes[row]))
        merged = [0, *(count_common_prefix(suffixes[a], suffixes[b]) for a, b in pairwise(by_tokens))]
        if sum(merged) > _MIN_MERGED_SHARE * sum(lengths):
            return by_tokens, [len(suffixes[row]) - n for row, n in zip(by_tokens, merged, strict=True)]
    return by_length, lengths


def _count_fitting_rows(
    costs: Sequence[int], lengths: Sequence[int], is_packed: bool, max_tokens: int
) -> int:
    """Return the number of first rows that fit into a batch of that many tokens, at least one.

    Two sums are bounded: computed tokens, where padded rows all count as long as the longest; and attention,
    in which every row has its full length, also where its tokens are merged with those of other rows.
    """
    n_rows = computed_tokens = longest = 0
    for cost, length in zip(costs, lengths, strict=True):
        computed_tokens += cost if is_packed else costs[0]
        longest = max(longest, length)
        if max(computed_tokens, _ATTENTION_COST * (n_rows + 1) * longest) > max_tokens:
            break
        n_rows += 1
    return max(1, n_rows)


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
