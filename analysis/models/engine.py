"""How fast a model is asked: first-answer logits, with what the prompts share computed only once.

Most of a defended prompt (system turn, demonstrations, the head of the user turn) is the same for every
query. The engine runs that shared prefix once, lends its keys and values to batches of suffixes of like
length, and applies the unembedding to the last position only. What only some suffixes begin with, such as the
copies of one query, is computed once a batch on a CPU. The result is that of one prompt at a time, up to
float noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
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

LogitReducer = Callable[[Float[Tensor, "rows vocab"]], Float[Tensor, "rows values"]]


@dataclass
class WorkCounter:
    """What scoring cost: tokens sent through the model, and tokens that the shared prefix saved."""

    computed_tokens: int = 0
    saved_tokens: int = 0

    def reset_counts(self) -> None:
        """Start counting again."""
        self.computed_tokens = self.saved_tokens = 0


class Engine:
    """A causal language model of transformers, read at the first token of its answer.

    >>> engine = Engine(model)  # doctest: +SKIP
    >>> engine.read_first_token([[1, 5, 9], [1, 5, 7, 2]], lambda logits: logits[:, :1]).shape  # doctest: +SKIP
    torch.Size([2, 1])

    Args:
        model: in evaluation mode, on its device; it is never changed.
        batch_size: prompts in one pass; None lets the number of tokens decide.

    Attributes:
        ends: while prompts run, in which row and column of the hidden states (rows x columns x width) the
            positions are whose logits are wanted, in the order of the logits; for hooks. None otherwise, and
            while a shared prefix runs.
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
        """Return `reduce` of the first-answer logits of every prompt, in the order of the prompts.

        Args:
            prompts: token ids; they may share a prefix, all or nothing, and be of any length from 1 on.
            reducer: called with raw float32 logits, rows × vocabulary; what it returns is kept, the logits are
                not.
            on_progress: told how many more prompts are finished, for a progress bar.
        """
        values: dict[int, Tensor] = {}
        for rows, read in self.iterate_first_token(prompts, reducer):
            values.update(zip(rows, read, strict=True))
            on_progress(len(rows))
        return torch.stack([values[row] for row in range(len(prompts))])

    def iterate_first_token(
        self, prompts: Sequence[Sequence[int]], reducer: LogitReducer
    ) -> Iterator[tuple[list[int], Float[Tensor, "rows values"]]]:
        """Yield what `read` returns batch by batch: which prompts, and their values.

        Args:
            prompts: as for `read`.
            reducer: as for `read`.
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
        """Return the log-probability of every token of an answer behind its prompt, nats.

        Args:
            prompts: token ids.
            responses: token ids, at least one each.
            on_progress: told how many more answers are finished.
        """
        whole = [(*prompt, *answer[:-1]) for prompt, answer in zip(prompts, responses, strict=True)]
        values: dict[int, Tensor] = {}
        with torch.inference_mode():
            for rows, logits in self.iterate_logits(whole, [len(answer) for answer in responses]):
                said = torch.tensor([token for row in rows for token in responses[row]], device=logits.device)
                chances = logits.gather(1, said[:, None])[:, 0] - logits.logsumexp(1)
                values.update(
                    zip(rows, chances.cpu().split([len(responses[row]) for row in rows]), strict=True)
                )
                on_progress(len(rows))
        return [values[row] for row in range(len(prompts))]

    def iterate_logits(
        self, prompts: Sequence[Sequence[int]], n_positions: Sequence[int], share_prefix: bool = True
    ) -> Iterator[tuple[list[int], Float[Tensor, "ends vocab"]]]:
        """Yield which prompts, and the logits behind the last so many tokens of each, batch by batch.

        Args:
            prompts: as for `read`.
            n_positions: how many tokens of each, from 1 on.
            share_prefix: whether what all prompts begin with is computed once, in a pass of its own.
        """
        if not prompts or not all(map(len, prompts)):
            raise ValueError("no prompts to read, or an empty one")
        # A row's own part holds all its ends.
        most = min(len(prompt) - end for prompt, end in zip(prompts, n_positions, strict=True))
        shared = (
            min(count_shared_prefix(prompts), most) if share_prefix and can_share_prefix(self.model) else 0
        )
        prefix = self._compute_prefix(prompts[0][:shared]) if shared else None
        in_line = prefix is not None and prefix.is_packed
        own, device = [prompt[shared:] for prompt in prompts], self.model.device.type
        for rows in plan_batches(own, in_line, device, lambda: self.batch_size):
            suffixes = [own[row] for row in rows]
            for part, logits in self._run_within_memory(
                suffixes, [n_positions[row] for row in rows], shared, prefix
            ):
                yield rows[part], logits
        self.work_counter.saved_tokens += shared * (len(prompts) - 1)

    def _compute_prefix(self, token_ids: Sequence[int]) -> SharedPrefix:
        """Keys and values of the shared tokens, to be lent to batches of any size."""
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
        """Logits of the last tokens of each suffix; where memory runs out, half the rows at a time."""
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
                        f"{n_shared + len(suffixes[start])} tokens: take --dtype bfloat16, --device cpu, or a "
                        "smaller model"
                    ) from error
                size = (size + 1) // 2
                # What fitted once is what later batches start from.
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
        lengths = torch.tensor([len(suffix) for suffix in suffixes])
        tokens = [torch.tensor(list(suffix)) for suffix in suffixes]
        if prefix is not None and prefix.is_packed:
            line = PackedRows.from_tokens(suffixes)
            row, column = line.grid_index
            ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)[row, column]
            wanted = [
                at[len(one) - n : len(one)]
                for at, one, n in zip(line.packed_index, tokens, n_positions, strict=True)
            ]
            self.work_counter.saved_tokens += int(lengths.sum()) - len(ids)
            return self.compute_packed_logits(prefix.cache, n_shared, ids, column, line, torch.cat(wanted))
        # Padding on the right: index and position agree, so that sliding windows see what they would see
        # alone, and what is computed at the padding comes too late for a causal model to see it.
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        seen = torch.ones(len(suffixes), n_shared, dtype=torch.long)
        mask = torch.cat([seen, (positions < lengths[:, None]).long()], dim=1)
        rows = torch.arange(len(suffixes)).repeat_interleave(torch.tensor(n_positions))
        last = torch.cat([torch.arange(end - n, end) for end, n in zip(lengths, n_positions, strict=True)])
        return self._run_model(prefix.cache if prefix else None, ids, mask, n_shared + positions, rows, last)

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
        """Return the logits behind some tokens of a line of rows.

        Args:
            cache: of the shared tokens, lent apart.
            n_shared: how many they are.
            token_ids: ids, row behind row.
            positions: of each token behind the shared ones.
            packed_rows: of the line.
            logit_index: where in the line logits are wanted, such as `rows.last`.
            hidden_mask: see `attention.in_two_parts`.
        """
        mask = torch.ones(
            1, n_shared + len(token_ids), dtype=torch.long
        )  # the attention to a line has its own
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
        """Return what reads a prompt's end so many times at once, the tokens before it having been computed.

        Hooks may then change what each row holds there; nothing before it can see that.

        Args:
            prompt: two tokens at least.
        """
        shared = len(prompt) - 1
        prefix = self._compute_prefix(prompt[:shared])

        def read(rows: int) -> Float[Tensor, "rows vocab"]:
            ids = torch.full((rows,), prompt[shared])
            if prefix.is_packed:
                line = PackedRows.from_lengths(torch.ones(rows, dtype=torch.long))
                places = torch.zeros(rows, dtype=torch.long)
                return self.compute_packed_logits(prefix.cache, shared, ids, places, line, line.last_index)
            mask = torch.ones(rows, shared + 1, dtype=torch.long)
            last = torch.zeros(rows, dtype=torch.long)
            return self._run_model(
                prefix.cache, ids[:, None], mask, last[:, None] + shared, torch.arange(rows), last
            )

        return read

    def _run_model(
        self,
        cache: DynamicCache | None,
        token_ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch seen"],
        positions: Int[Tensor, "batch length"],
        logit_rows: Int[Tensor, " ends"],
        logit_columns: Int[Tensor, " ends"],
    ) -> Float[Tensor, "ends vocab"]:
        device = self.model.device
        self.logit_positions = logit_rows.to(device), logit_columns.to(device)
        try:
            with restrict_unembedding(self.model, logit_rows, logit_columns):
                out = self.model(
                    input_ids=token_ids.to(device),
                    attention_mask=attention_mask.to(device),
                    position_ids=positions.to(device),
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
        finally:
            self.logit_positions = None
        self.work_counter.computed_tokens += token_ids.numel()
        # One position of each row is left, or all of them where a model does not call its unembedding module.
        logits = out.logits
        return (logits[:, 0] if logits.shape[1] == 1 else logits[logit_rows, logit_columns]).float()


# Tokens in one batch of suffixes. On a CPU more only overflow its caches (512 to 1,024 are alike).
_TOKENS_PER_BATCH = {"cpu": 512, "cuda": 16384}
# Of all tokens, the share from which it is worth to lay rows by what they begin with, not by length.
_MIN_MERGED_SHARE = 0.1
_ATTENTION_COST = 0.125  # of a token's cost, what it costs to attend to it once more in a row that shares it


def count_shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, leaving each at least one token of its own.

    >>> count_shared_prefix([[1, 2, 3], [1, 2, 4, 5]]), count_shared_prefix([[1, 2], [1, 2, 3]]), count_shared_prefix([[1]])
    (2, 1, 0)
    """
    rows = [list(prompt) for prompt in prompts]
    # The two that differ soonest, in the order of lists.
    return min(count_common_prefix(min(rows), max(rows)), min(map(len, rows)) - 1)


def count_common_prefix(tokens: Sequence[int], other_tokens: Sequence[int]) -> int:
    """Return how many tokens two rows begin with alike.

    >>> count_common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, other_tokens, strict=False)))


def plan_batches(
    suffixes: Sequence[Sequence[int]], is_packed: bool, device: str, get_batch_size: Callable[[], int | None]
) -> Iterator[list[int]]:
    """Yield rows in batches, longest first: like lengths lie together, and too little memory shows at once.

    In a line, rows that begin alike lie together instead, where that saves much: what several of them begin
    with is computed once.

    >>> list(plan_batches([[1], [1, 2, 3], [1, 2]], False, "cpu", lambda: 2))
    [[1, 2], [0]]

    Args:
        suffixes: token ids.
        is_packed: whether rows lie behind each other in one line, not padded beside each other.
        device: cpu or cuda.
        get_batch_size: asked before each batch: rows in it; None lets the number of tokens decide.
    """
    order = sorted(range(len(suffixes)), key=lambda row: -len(suffixes[row]))
    cost = [len(suffixes[row]) for row in order]
    if is_packed:
        alike = sorted(order, key=lambda row: tuple(suffixes[row]))
        begun = [0, *(count_common_prefix(suffixes[one], suffixes[other]) for one, other in pairwise(alike))]
        if sum(begun) > _MIN_MERGED_SHARE * sum(cost):
            order = alike
            cost = [len(suffixes[row]) - known for row, known in zip(alike, begun, strict=True)]
    most = _TOKENS_PER_BATCH.get(device, _TOKENS_PER_BATCH["cpu"])
    while order:
        tokens = accumulate(cost if is_packed else [cost[0]] * len(cost))  # padded to the longest
        # Attention sees every row whole, whatever is computed once.
        longest = accumulate((len(suffixes[row]) for row in order), max)
        seen = (_ATTENTION_COST * rows * length for rows, length in enumerate(longest, 1))
        within = takewhile(lambda two: max(two) <= most, zip(tokens, seen, strict=True))
        number = get_batch_size() or max(1, sum(1 for _ in within))
        yield order[:number]
        order, cost = order[number:], cost[number:]


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
    in_line = can_split_attention(model, cache.layers)
    lend = make_split_update if in_line else _make_broadcast_update
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
def restrict_unembedding(
    model: Any, logit_rows: Int[Tensor, " ends"], logit_columns: Int[Tensor, " ends"]
) -> Iterator[None]:
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
