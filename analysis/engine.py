"""How fast a model is asked: first-answer logits, with what the prompts share computed only once.

Most of a defended prompt (system turn, demonstrations, the head of the user turn) is the same for every
query. The engine runs that shared prefix once, lends its keys and values to batches of suffixes of like
length, and applies the unembedding to the last position only. What only some suffixes begin with, such as the
copies of one query, is computed once a batch on a CPU. The result is that of one prompt at a time, up to
float noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from analysis import attention
from analysis.batching import batches, shared_prefix
from analysis.lending import Prefix, can_share, ends_only, lent
from defenses.errors import UserError, out_of_memory

Reduce = Callable[[Float[Tensor, "rows vocab"]], Float[Tensor, "rows values"]]


@dataclass
class Work:
    """What scoring cost: tokens sent through the model, and tokens that the shared prefix saved."""

    computed: int = 0
    saved: int = 0

    def reset(self) -> None:
        """Start counting again."""
        self.computed = self.saved = 0


class Engine:
    """A causal language model of transformers, read at the first token of its answer.

    >>> engine = Engine(model)  # doctest: +SKIP
    >>> engine.read([[1, 5, 9], [1, 5, 7, 2]], lambda logits: logits[:, :1]).shape  # doctest: +SKIP
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
        self.work = Work()
        self.ends: tuple[Tensor, Tensor] | None = None

    def read(
        self,
        prompts: Sequence[Sequence[int]],
        reduce: Reduce,
        done: Callable[[int], None] = lambda rows: None,
    ) -> Float[Tensor, "prompts values"]:
        """Return `reduce` of the first-answer logits of every prompt, in the order of the prompts.

        Args:
            prompts: token ids; they may share a prefix, all or nothing, and be of any length from 1 on.
            reduce: called with raw float32 logits, rows × vocabulary; what it returns is kept, the logits are
                not.
            done: told how many more prompts are finished, for a progress bar.
        """
        values: dict[int, Tensor] = {}
        for rows, read in self.batches(prompts, reduce):
            values.update(zip(rows, read, strict=True))
            done(len(rows))
        return torch.stack([values[row] for row in range(len(prompts))])

    def batches(
        self, prompts: Sequence[Sequence[int]], reduce: Reduce
    ) -> Iterator[tuple[list[int], Float[Tensor, "rows values"]]]:
        """Yield what `read` returns batch by batch: which prompts, and their values.

        Args:
            prompts: as for `read`.
            reduce: as for `read`.
        """
        with torch.inference_mode():
            for rows, logits in self.sweep(prompts, [1] * len(prompts)):
                yield rows, reduce(logits)

    def likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        done: Callable[[int], None] = lambda rows: None,
    ) -> list[Float[Tensor, " tokens"]]:
        """Return the log-probability of every token of an answer behind its prompt, nats.

        Args:
            prompts: token ids.
            answers: token ids, at least one each.
            done: told how many more answers are finished.
        """
        whole = [(*prompt, *answer[:-1]) for prompt, answer in zip(prompts, answers, strict=True)]
        values: dict[int, Tensor] = {}
        with torch.inference_mode():
            for rows, logits in self.sweep(whole, [len(answer) for answer in answers]):
                said = torch.tensor([token for row in rows for token in answers[row]], device=logits.device)
                chances = logits.gather(1, said[:, None])[:, 0] - logits.logsumexp(1)
                values.update(
                    zip(rows, chances.cpu().split([len(answers[row]) for row in rows]), strict=True)
                )
                done(len(rows))
        return [values[row] for row in range(len(prompts))]

    def sweep(
        self, prompts: Sequence[Sequence[int]], ends: Sequence[int], share: bool = True
    ) -> Iterator[tuple[list[int], Float[Tensor, "ends vocab"]]]:
        """Yield which prompts, and the logits behind the last so many tokens of each, batch by batch.

        Args:
            prompts: as for `read`.
            ends: how many tokens of each, from 1 on.
            share: whether what all prompts begin with is computed once, in a pass of its own.
        """
        if not prompts or not all(map(len, prompts)):
            raise ValueError("no prompts to read, or an empty one")
        # A row's own part holds all its ends.
        most = min(len(prompt) - end for prompt, end in zip(prompts, ends, strict=True))
        shared = min(shared_prefix(prompts), most) if share and can_share(self.model) else 0
        prefix = self._prefix(prompts[0][:shared]) if shared else None
        in_line = prefix is not None and prefix.in_line
        own, device = [prompt[shared:] for prompt in prompts], self.model.device.type
        for rows in batches(own, in_line, device, lambda: self.batch_size):
            suffixes = [own[row] for row in rows]
            for part, logits in self._forward(suffixes, [ends[row] for row in rows], shared, prefix):
                yield rows[part], logits
        self.work.saved += shared * (len(prompts) - 1)

    def _prefix(self, tokens: Sequence[int]) -> Prefix:
        """Keys and values of the shared tokens, to be lent to batches of any size."""
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([list(tokens)], device=self.model.device)
        self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(len(tokens), device=ids.device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.work.computed += len(tokens)
        return lent(self.model, cache)

    def _forward(
        self, suffixes: list[Sequence[int]], ends: list[int], shared: int, prefix: Prefix | None
    ) -> Iterator[tuple[slice, Float[Tensor, "ends vocab"]]]:
        """Logits of the last tokens of each suffix; where memory runs out, half the rows at a time."""
        size, start = len(suffixes), 0
        while start < len(suffixes):
            part = slice(start, start + size)
            try:
                logits = self._logits(suffixes[part], ends[part], shared, prefix)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError(
                        f"memory ran out on {self.model.device} with one prompt of "
                        f"{shared + len(suffixes[start])} tokens: take --dtype bfloat16, --device cpu, or a "
                        "smaller model"
                    ) from error
                size = (size + 1) // 2
                # What fitted once is what later batches start from.
                self.batch_size = size
                continue
            yield part, logits
            start += size

    def _logits(
        self, suffixes: list[Sequence[int]], ends: list[int], shared: int, prefix: Prefix | None
    ) -> Float[Tensor, "ends vocab"]:
        lengths = torch.tensor([len(suffix) for suffix in suffixes])
        tokens = [torch.tensor(list(suffix)) for suffix in suffixes]
        if prefix is not None and prefix.in_line:
            line = attention.Rows.merged(suffixes)
            row, column = line.taken
            ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)[row, column]
            wanted = [
                at[len(one) - n : len(one)] for at, one, n in zip(line.places, tokens, ends, strict=True)
            ]
            self.work.saved += int(lengths.sum()) - len(ids)
            return self.line(prefix.cache, shared, ids, column, line, torch.cat(wanted))
        # Padding on the right: index and position agree, so that sliding windows see what they would see
        # alone, and what is computed at the padding comes too late for a causal model to see it.
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        seen = torch.ones(len(suffixes), shared, dtype=torch.long)
        mask = torch.cat([seen, (positions < lengths[:, None]).long()], dim=1)
        rows = torch.arange(len(suffixes)).repeat_interleave(torch.tensor(ends))
        last = torch.cat([torch.arange(end - n, end) for end, n in zip(lengths, ends, strict=True)])
        return self._run(prefix.cache if prefix else None, ids, mask, shared + positions, rows, last)

    def line(
        self,
        cache: DynamicCache,
        shared: int,
        tokens: Int[Tensor, " tokens"],
        places: Int[Tensor, " tokens"],
        rows: attention.Rows,
        last: Int[Tensor, " ends"],
        hidden: attention.Hidden | None = None,
    ) -> Float[Tensor, "ends vocab"]:
        """Return the logits behind some tokens of a line of rows.

        Args:
            cache: of the shared tokens, lent apart.
            shared: how many they are.
            tokens: ids, row behind row.
            places: of each token behind the shared ones.
            rows: of the line.
            last: where in the line logits are wanted, such as `rows.last`.
            hidden: see `attention.in_two_parts`.
        """
        mask = torch.ones(1, shared + len(tokens), dtype=torch.long)  # the attention to a line has its own
        with attention.in_two_parts(rows, hidden):
            return self._run(cache, tokens[None], mask, shared + places[None], torch.zeros_like(last), last)

    def repeating(self, prompt: Sequence[int]) -> Callable[[int], Float[Tensor, "rows vocab"]]:
        """Return what reads a prompt's end so many times at once, the tokens before it having been computed.

        Hooks may then change what each row holds there; nothing before it can see that.

        Args:
            prompt: two tokens at least.
        """
        shared = len(prompt) - 1
        prefix = self._prefix(prompt[:shared])

        def read(rows: int) -> Float[Tensor, "rows vocab"]:
            ids = torch.full((rows,), prompt[shared])
            if prefix.in_line:
                line = attention.Rows.of(torch.ones(rows, dtype=torch.long))
                places = torch.zeros(rows, dtype=torch.long)
                return self.line(prefix.cache, shared, ids, places, line, line.last)
            mask = torch.ones(rows, shared + 1, dtype=torch.long)
            last = torch.zeros(rows, dtype=torch.long)
            return self._run(
                prefix.cache, ids[:, None], mask, last[:, None] + shared, torch.arange(rows), last
            )

        return read

    def _run(
        self,
        cache: DynamicCache | None,
        ids: Int[Tensor, "batch length"],
        mask: Int[Tensor, "batch seen"],
        positions: Int[Tensor, "batch length"],
        rows: Int[Tensor, " ends"],
        last: Int[Tensor, " ends"],
    ) -> Float[Tensor, "ends vocab"]:
        device = self.model.device
        self.ends = rows.to(device), last.to(device)
        try:
            with ends_only(self.model, rows, last):
                out = self.model(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    position_ids=positions.to(device),
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
        finally:
            self.ends = None
        self.work.computed += ids.numel()
        # One position of each row is left, or all of them where a model does not call its unembedding module.
        logits = out.logits
        return (logits[:, 0] if logits.shape[1] == 1 else logits[rows, last]).float()
