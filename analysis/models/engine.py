"""Batched first-token inference with a shared prefix.

Most of a defended prompt (system turn, demonstrations, the start of the user turn) is the same for every
query. The engine computes that shared prefix once, reuses its keys and values for batches of suffixes of
similar length, and applies the unembedding at the last position only. On a CPU, tokens with which only some
suffixes of a batch start, such as the copies of one query, are computed once per batch. The logits equal
those of one prompt at a time, up to floating-point noise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from analysis.models.batches import BatchForm, CacheUse, count_shared_prefix, plan_batches
from analysis.models.image_tokens import contains_image, find_whole_prefix
from analysis.models.prefix_attention import (
    PackedRows,
    SharedPrefix,
    can_share_prefix,
    can_split_attention,
    prepare_shared_prefix,
    use_split_attention,
)
from analysis.models.rotation import RotationSchedule
from defenses.activated_lora import get_activation
from defenses.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    from analysis.models.prefix_attention import HiddenMask

LogitReducer = Callable[[Float[Tensor, "rows vocab"]], Float[Tensor, "rows values"]]


@dataclass
class WorkCounter:
    """Counts of tokens run through the model, and of tokens that shared prefixes saved."""

    computed_tokens: int = 0
    saved_tokens: int = 0

    def reset_counts(self) -> None:
        """Set both counts to zero."""
        self.computed_tokens = self.saved_tokens = 0


@dataclass
class EngineRecords:
    """What the engines of one model record together.

    Attributes:
        notices: lines for the user on the form of the batches.
        work_counter: counts of computed and saved tokens.
        logit_positions: see `Engine.logit_positions`.
        n_response_tokens: see `Engine.read_responses`.
    """

    notices: list[str] = field(default_factory=list)
    work_counter: WorkCounter = field(default_factory=WorkCounter)
    logit_positions: tuple[Tensor, Tensor] | None = None
    n_response_tokens: int | None = 0


class Engine:
    """Computes next-token logits of a transformers causal language model for many prompts.

    >>> engine = Engine(model)  # doctest: +SKIP
    >>> prompts = [[1, 5, 9], [1, 5, 7, 2]]  # doctest: +SKIP
    >>> engine.read_first_token(prompts, lambda logits: logits[:, :1]).shape  # doctest: +SKIP
    torch.Size([2, 1])

    Args:
        model: in evaluation mode, on its device; never changed.
        batch_size: prompts per forward pass; by default it follows from the number of tokens.
        batch_form: by default the fastest that the model's kind of cache allows; `choose_batch_form` also
            compares its logits with those of plain forward passes.
        make_image_engine: returns the engine for prompts with images, which may need another form of batches;
            called with the records of this engine when the first one is read.
        probe_prompts: prompts with which ways of generation are compared; None draws some of text.
        records: of other engines of the model, which this one continues.

    Attributes:
        rotation: prompts that are rotated with different frequencies share no forward pass and no prefix.
        responses_per_batch: responses that are generated, and stored, together.
        cache_uses: how transformers generates with its cache, once `generate_token_ids` has compared the
            ways: with an adapter that is activated by tokens (True) and without one.
    """

    responses_per_batch: ClassVar[int] = 64

    def __init__(
        self,
        model: Any,
        batch_size: int | None = None,
        batch_form: BatchForm | None = None,
        make_image_engine: Callable[[EngineRecords], Engine] | None = None,
        probe_prompts: Sequence[tuple[int, ...]] | None = None,
        records: EngineRecords | None = None,
    ) -> None:
        self.model = model
        self.batch_form = self._first_form = batch_form or find_fastest_form(model)
        self.batch_size = 1 if self.batch_form is BatchForm.SINGLE else batch_size
        self.cache_uses: dict[bool, CacheUse] = {}
        self.rotation = RotationSchedule.from_model(model)
        self.probe_prompts = probe_prompts
        self._records = records or EngineRecords()
        self._make_image_engine = make_image_engine

    @cached_property
    def image_engine(self) -> Engine:
        """The engine for prompts with images; this one, if it was not told otherwise."""
        return self if self._make_image_engine is None else self._make_image_engine(self._records)

    @property
    def has_changed_form(self) -> bool:
        """Whether the form of the batches was changed since the engine was made."""
        return vars(self).get("batch_form") is not vars(self).get("_first_form")

    @property
    def notices(self) -> list[str]:
        """Lines for the user on the form of the batches."""
        return self._records.notices

    @property
    def work_counter(self) -> WorkCounter:
        """Counts of computed and saved tokens."""
        return self._records.work_counter

    @property
    def logit_positions(self) -> tuple[Tensor, Tensor] | None:
        """For hooks: rows and columns of the hidden states at which logits are computed, while prompts run.

        The hidden states are rows × columns × width; the positions are in the order of the logits. None
        otherwise, and while a shared prefix runs.
        """
        return self._records.logit_positions

    @contextmanager
    def read_responses(self, n_tokens: int | None) -> Iterator[None]:
        """Context manager: the last tokens of every row belong to a response, not to the prompt.

        Args:
            n_tokens: their number; None if a row has logits at its last prompt token and at each of them.
        """
        self._records.n_response_tokens = n_tokens
        try:
            yield
        finally:
            self._records.n_response_tokens = 0

    def split_rows(self, prompts: Sequence[Sequence[int]]) -> list[tuple[Engine, list[int]]]:
        """Return the engines that read the prompts, each with the indices of its prompts."""
        image_rows = [row for row, prompt in enumerate(prompts) if contains_image(prompt)]
        if not image_rows or self.image_engine is self:
            return [(self, list(range(len(prompts))))]
        text_rows = sorted(set(range(len(prompts))) - set(image_rows))
        return [(self.image_engine, image_rows), *([(self, text_rows)] if text_rows else [])]

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

    def read_token_logits(
        self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> Float[Tensor, "prompts tokens"]:
        """Return the first-token logits of some tokens, up to a constant of each prompt, on the CPU.

        Args:
            prompts: as for `read_first_token`.
            token_ids: ids of the tokens.
        """
        return self.read_first_token(prompts, lambda logits: logits[:, list(token_ids)].cpu())

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
        with torch.inference_mode(), self.read_responses(None):
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
        for engine, engine_rows in self.split_rows(prompts):
            for group in engine._group_rows([len(prompts[row]) for row in engine_rows]):
                rows = [engine_rows[index] for index in group]
                group_prompts = [prompts[row] for row in rows]
                group_positions = [n_positions[row] for row in rows]
                for part, logits in engine._iterate_group_logits(
                    group_prompts, group_positions, share_prefix
                ):
                    yield [rows[row] for row in part], logits

    def can_extend_prefix(self, n_shared: int, length: int) -> bool:
        """Return whether keys and values of the first tokens serve a longer sequence that starts with them.

        Args:
            n_shared: number of the first tokens.
            length: number of tokens of the sequence.
        """
        has_prefix = self.batch_form in (BatchForm.PACKED, BatchForm.REPEATED) and n_shared > 0
        has_prefix = has_prefix and get_activation(self.model) is None  # it searches whole prompts
        return has_prefix and not self.rotation.changes_between(n_shared, length)

    def _group_rows(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the indices of rows that may share forward passes and a prefix, longest rows first."""
        if self.batch_form not in (BatchForm.EQUAL, BatchForm.SINGLE):
            yield from self.rotation.group_rows(lengths)
            return
        for length in sorted(set(lengths), reverse=True):
            yield [row for row, row_length in enumerate(lengths) if row_length == length]

    def _iterate_group_logits(
        self, prompts: Sequence[Sequence[int]], n_positions: Sequence[int], share_prefix: bool
    ) -> Iterator[tuple[list[int], Float[Tensor, "ends vocab"]]]:
        """Yield the same as `iterate_logits` for prompts that may share forward passes."""
        # All positions of a prompt with logits belong to its own suffix.
        max_shared = min(len(prompt) - n for prompt, n in zip(prompts, n_positions, strict=True))
        n_shared = min(count_shared_prefix(prompts), max_shared) if share_prefix else 0
        n_shared = find_whole_prefix(prompts[0], n_shared)
        if not self.can_extend_prefix(n_shared, len(prompts[0])):
            n_shared = 0
        prefix = self.compute_prefix(prompts[0][:n_shared]) if n_shared else None
        is_packed = prefix is not None and prefix.is_packed
        suffixes, device = [prompt[n_shared:] for prompt in prompts], self.model.device.type
        for rows in plan_batches(suffixes, is_packed, device, lambda: self.batch_size):
            batch = [suffixes[row] for row in rows]
            for part, logits in self._run_within_memory(
                batch, [n_positions[row] for row in rows], n_shared, prefix
            ):
                yield rows[part], logits
        self.work_counter.saved_tokens += n_shared * (len(prompts) - 1)

    def compute_prefix(self, token_ids: Sequence[int]) -> SharedPrefix:
        """Return keys and values of the shared tokens, to be used by batches of any size."""
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        positions = self.locate_tokens([token_ids])
        self.rotation.reset_modules()
        self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions.to(ids.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.work_counter.computed_tokens += len(token_ids)
        is_packed = self.batch_form is BatchForm.PACKED and can_split_attention(self.model, cache.layers)
        return prepare_shared_prefix(cache, is_packed, int(positions.max()) + 1)

    def locate_tokens(self, rows: Sequence[Sequence[int]]) -> Int[Tensor, "*axes rows length"]:
        """Return the position of each token in its row, from 0 on; arbitrary at the padding on the right.

        Some models place the parts of an image on several axes; then the first dimension is that of the axes.

        Args:
            rows: token ids; every image is complete.
        """
        length = max(map(len, rows))
        positions = torch.arange(length).expand(len(rows), length)
        reader = getattr(self.model, "image_reader", None)
        if reader is None or not reader.has_image_axes or not any(map(contains_image, rows)):
            return positions
        located = [reader.locate_tokens(row) for row in rows]
        positions = positions.expand(len(located[0]), -1, -1).clone()
        for number, row_positions in enumerate(located):
            positions[:, number, : row_positions.shape[1]] = row_positions
        return positions

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
                prefix, n_shared, suffixes, packed_rows, torch.cat(logit_index)
            )
        padded_ids = _pad_suffixes(suffixes)
        # Padding on the right: index and position agree, so that sliding windows cover the same tokens as
        # without padding, and a causal model never attends to the padding.
        positions = self.locate_tokens(suffixes) + (prefix.end_position if prefix else 0)
        is_token = torch.arange(padded_ids.shape[1]) < lengths[:, None]
        prefix_mask = torch.ones(len(suffixes), n_shared, dtype=torch.long)
        mask = torch.cat([prefix_mask, is_token.long()], dim=1)
        rows = torch.arange(len(suffixes)).repeat_interleave(torch.tensor(n_positions))
        columns = torch.cat([torch.arange(end - n, end) for end, n in zip(lengths, n_positions, strict=True)])
        cache = prefix.cache if prefix else None
        if (activation := get_activation(self.model)) is not None:
            n_tokens = self._records.n_response_tokens
            activation.prompt_lengths = [
                int(length) - (n - 1 if n_tokens is None else n_tokens)
                for length, n in zip(lengths, n_positions, strict=True)
            ]
        try:
            return self._run_model(cache, padded_ids, mask, positions, rows, columns)
        finally:
            if activation is not None:
                activation.prompt_lengths = None

    def compute_packed_suffixes(
        self,
        prefix: SharedPrefix,
        n_shared: int,
        suffixes: Sequence[Sequence[int]],
        packed_rows: PackedRows,
        logit_index: Int[Tensor, " ends"],
    ) -> Float[Tensor, "ends vocab"]:
        """Return the next-token logits at some tokens of whole suffixes, which start at the shared prefix.

        Args:
            prefix: keys and values of the shared prefix, attended to separately.
            n_shared: as for `compute_packed_logits`.
            suffixes: token ids.
            packed_rows: of these suffixes; tokens with which several of them start may be packed once.
            logit_index: as for `compute_packed_logits`.
        """
        row, column = packed_rows.grid_index
        token_ids = _pad_suffixes(suffixes)[row, column]
        positions = self.locate_tokens(suffixes)[..., row, column] + prefix.end_position
        self.work_counter.saved_tokens += sum(map(len, suffixes)) - len(token_ids)
        return self.compute_packed_logits(
            prefix.cache, n_shared, token_ids, positions, packed_rows, logit_index
        )

    def compute_packed_logits(
        self,
        cache: DynamicCache,
        n_shared: int,
        token_ids: Int[Tensor, " tokens"],
        positions: Int[Tensor, "*axes tokens"],
        packed_rows: PackedRows,
        logit_index: Int[Tensor, " ends"],
        hidden_mask: HiddenMask | None = None,
    ) -> Float[Tensor, "ends vocab"]:
        """Return the next-token logits at some tokens of packed rows.

        Args:
            cache: keys and values of the shared prefix, attended to separately.
            n_shared: number of tokens of the shared prefix.
            token_ids: packed token ids, row after row.
            positions: position of each token in its prompt.
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
                positions[..., None, :],
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
        if not self.can_extend_prefix(n_shared, len(prompt)):

            def read_whole_prompt(n_rows: int) -> Float[Tensor, "rows vocab"]:
                return self._compute_suffix_logits([prompt] * n_rows, [1] * n_rows, 0, None)

            return read_whole_prompt
        prefix = self.compute_prefix(prompt[:n_shared])

        def read_last_token(n_rows: int) -> Float[Tensor, "rows vocab"]:
            token_ids, positions = (torch.full((n_rows,), n) for n in (prompt[n_shared], prefix.end_position))
            if prefix.is_packed:
                packed_rows = PackedRows.from_lengths(torch.ones(n_rows, dtype=torch.long))
                return self.compute_packed_logits(
                    prefix.cache, n_shared, token_ids, positions, packed_rows, packed_rows.last_index
                )
            mask = torch.ones(n_rows, n_shared + 1, dtype=torch.long)
            rows, columns = torch.arange(n_rows), torch.zeros(n_rows, dtype=torch.long)
            return self._run_model(prefix.cache, token_ids[:, None], mask, positions[:, None], rows, columns)

        return read_last_token

    def _run_model(
        self,
        cache: DynamicCache | None,
        token_ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch seen"],
        positions: Int[Tensor, "*axes batch length"],
        logit_rows: Int[Tensor, " ends"],
        logit_columns: Int[Tensor, " ends"],
    ) -> Float[Tensor, "ends vocab"]:
        """Run one forward pass and return float32 logits at the given rows and columns."""
        device = self.model.device
        # Some models count positions from another number than 0; without padding, they do so themselves.
        own_positions = self.batch_form in (BatchForm.EQUAL, BatchForm.SINGLE)
        self.rotation.reset_modules()
        self._records.logit_positions = logit_rows.to(device), logit_columns.to(device)
        try:
            with restrict_unembedding(self.model, logit_rows, logit_columns):
                output = self.model(
                    input_ids=token_ids.to(device),
                    attention_mask=attention_mask.to(device),
                    position_ids=None if own_positions else positions.to(device),
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
        finally:
            self._records.logit_positions = None
        self.work_counter.computed_tokens += token_ids.numel()
        # One position per logit is left, or all positions if the model does not call its unembedding module.
        logits = output.logits
        return (logits[:, 0] if logits.shape[1] == 1 else logits[logit_rows, logit_columns]).float()


class DeferredEngine(Engine):
    """An engine of a model whose weights are loaded when a prompt is computed.

    Args:
        make_engine: returns the engine with the model; called once, or never.
        notices: lines for the user on the form of the batches, from when the model was loaded before.
    """

    def __init__(self, make_engine: Callable[[EngineRecords], Engine], notices: Sequence[str]) -> None:
        self._records = EngineRecords(list(notices))
        self._make_engine = make_engine

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that depends on the model: all that `Engine` has and this engine lacks."""
        if name.startswith("__") or "_make_engine" not in vars(self):
            raise AttributeError(name)
        vars(self).update(vars(vars(self).pop("_make_engine")(self._records)))
        return getattr(self, name)


class RemoteEngine(Engine):
    """An engine whose model runs elsewhere, where it also generates."""

    @abstractmethod
    def generate_token_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        append_token: Callable[[list[int], int], bool],
        on_progress: Callable[[int], None],
    ) -> list[list[int]]:
        """Return the greedy response to each prompt as token ids, without the end token.

        Args:
            prompts: token ids.
            max_new_tokens: maximum length of each response.
            append_token: appends a token to a response, except an end token; returns whether it is finished.
            on_progress: called with the number of responses finished since the last call.
        """


def find_fastest_form(model: Any) -> BatchForm:
    """Return the fastest form of a batch that the model's kind of cache and of attention allow."""
    if not can_share_prefix(model):
        return BatchForm.PADDED
    layers = DynamicCache(config=model.config).layers
    return BatchForm.PACKED if can_split_attention(model, layers) else BatchForm.REPEATED


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
