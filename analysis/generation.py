"""What a model goes on to say: greedy answers, in batches, what the prompts share computed only once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from analysis import attention
from analysis.batching import shared_prefix
from analysis.engine import Engine

_ROWS, _LINE_ROWS = 32, 64  # in a batch; rows in a line take less memory

# Told an answer so far, says whether the rest of it no longer matters.
Settled = Callable[[list[int]], bool]


def answers(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    stop: int,
    settled: Settled = lambda answer: False,
    done: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """Return the greedy answer to each prompt: up to `tokens` ids, without the one that ends it.

    Args:
        engine: holds the model.
        prompts: token ids.
        tokens: at most, of each answer.
        stop: the id that ends an answer.
        settled: told an answer so far, says whether the rest of it no longer matters; then it ends there.
        done: told how many more answers are finished.
    """
    model = engine.model
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    shared = shared_prefix(prompts) if plain else 0
    found: dict[int, list[int]] = {}
    with torch.inference_mode():
        prefix = DynamicCache(config=model.config)
        if shared:
            ids = torch.tensor([list(prompts[0][:shared])], device=model.device)
            model(input_ids=ids, past_key_values=prefix, use_cache=True, logits_to_keep=1)
        in_line = shared > 0 and attention.can_split(model, prefix.layers)
        for rows in _batches([len(prompt) for prompt in prompts], plain, _LINE_ROWS if in_line else _ROWS):
            if in_line:
                suffixes = [prompts[row][shared:] for row in rows]
                said = _in_line(engine, prefix, shared, suffixes, tokens, stop, settled)
            else:
                said = _beside(
                    [list(prompts[row]) for row in rows], model, prefix, shared, tokens, stop, settled
                )
            found.update(zip(rows, said, strict=True))
            done(len(rows))
    return [found[row] for row in range(len(prompts))]


def _in_line(
    engine: Engine,
    prefix: DynamicCache,
    shared: int,
    suffixes: Sequence[Sequence[int]],
    tokens: int,
    stop: int,
    settled: Settled,
) -> list[list[int]]:
    """Greedy answers of rows that lie in one line: the prefix is not copied, and ended rows are dropped."""
    memories = []
    for layer in prefix.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        memories.append(attention.Memory())
        layer.update = attention.lent_apart(layer.keys, layer.values, memories[-1])  # type: ignore[method-assign]
    said: list[list[int]] = [[] for _ in suffixes]
    going = list(range(len(suffixes)))
    lengths = torch.tensor([len(suffix) for suffix in suffixes])
    rows = attention.Rows.of(lengths)
    remembered = rows.real
    ids = torch.cat([torch.tensor(list(suffix)) for suffix in suffixes])
    logits = engine.line(prefix, shared, ids, torch.cat([torch.arange(n) for n in lengths]), rows, rows.last)
    while True:
        ended = []
        for at, token in enumerate(logits.argmax(-1).tolist()):
            answer = said[going[at]]
            if token != stop:
                answer.append(token)
            ended.append(token == stop or len(answer) == tokens or settled(answer))
        if all(ended):
            return said
        if any(ended):
            kept = torch.tensor([at for at, over in enumerate(ended) if not over])
            going = [going[at] for at in kept]
            lengths, remembered = lengths[kept], remembered[kept]
            for memory in memories:
                memory.keep(kept)
        # One more token of each row; it sees all of its row but the padding.
        remembered = torch.cat([remembered, torch.ones(len(going), 1, dtype=torch.bool)], dim=1)
        ids = torch.tensor([said[row][-1] for row in going])
        places = lengths + torch.tensor([len(said[row]) - 1 for row in going])
        rows = attention.Rows.of(torch.ones_like(lengths))
        logits = engine.line(prefix, shared, ids, places, rows, rows.last, ~remembered[:, None])


def _beside(
    prompts: list[list[int]],
    model: Any,
    prefix: DynamicCache,
    shared: int,
    tokens: int,
    stop: int,
    settled: Settled,
) -> list[list[int]]:
    """Greedy answers of a batch by transformers, the prefix laid under each row."""
    ids, mask = _laid(prompts, shared, model.device)
    cache = copy.deepcopy(prefix)
    if shared:
        cache.batch_repeat_interleave(len(prompts))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache if shared else None,
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        stopping_criteria=[_Ending(settled, ids.shape[1], len(prompts))],
        eos_token_id=stop,
        pad_token_id=stop,
    )
    said = out[:, ids.shape[1] :].tolist()
    return [answer[: answer.index(stop)] if stop in answer else answer for answer in said]


class _Ending(StoppingCriteria):
    """Ends a row once what more it would say no longer matters."""

    def __init__(self, settled: Settled, start: int, rows: int) -> None:
        self.settled, self.start, self.known = settled, start, [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows end here."""
        for row, answer in enumerate(input_ids[:, self.start :].tolist()):
            self.known[row] = self.known[row] or self.settled(answer)
        return torch.tensor(self.known, device=input_ids.device)


def _batches(lengths: Sequence[int], padded: bool, most: int) -> Iterator[list[int]]:
    """Rows of like length; of the very same where a model's memory has no place for padding."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    while order:
        rows = [row for row in order[:most] if padded or lengths[row] == lengths[order[0]]]
        yield rows
        order = order[len(rows) :]


def _laid(rows: list[list[int]], shared: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of one length, and where they are real: the padding stands behind what all of them share."""
    longest = max(map(len, rows))
    ids = [[*row[:shared], *[0] * (longest - len(row)), *row[shared:]] for row in rows]
    mask = [[*[1] * shared, *[0] * (longest - len(row)), *[1] * (len(row) - shared)] for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
