"""What a model goes on to say: greedy answers, in batches, what the prompts share computed only once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from analysis.engine import Engine, shared_prefix

_ROWS = 32  # in a batch


def answers(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    stop: int,
    settled: Callable[[list[int]], bool] = lambda answer: False,
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
        for rows in _batches([len(prompt) for prompt in prompts], padded=plain):
            ids, mask = _laid([list(prompts[row]) for row in rows], shared, model.device)
            cache = copy.deepcopy(prefix)
            if shared:
                cache.batch_repeat_interleave(len(rows))
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache if shared else None,
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                stopping_criteria=[_Settled(settled, ids.shape[1], len(rows))],
                eos_token_id=stop,
                pad_token_id=stop,
            )
            for row, answer in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                found[row] = answer[: answer.index(stop)] if stop in answer else answer
            done(len(rows))
    return [found[row] for row in range(len(prompts))]


class _Settled(StoppingCriteria):
    """Ends a row once what more it would say no longer matters."""

    def __init__(self, settled: Callable[[list[int]], bool], start: int, rows: int) -> None:
        self.settled, self.start, self.known = settled, start, [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows end here."""
        for row, answer in enumerate(input_ids[:, self.start :].tolist()):
            self.known[row] = self.known[row] or self.settled(answer)
        return torch.tensor(self.known, device=input_ids.device)


def _batches(lengths: Sequence[int], padded: bool) -> Iterator[list[int]]:
    """Rows of like length; of the very same where a model's memory has no place for padding."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    while order:
        rows = [row for row in order[:_ROWS] if padded or lengths[row] == lengths[order[0]]]
        yield rows
        order = order[len(rows) :]


def _laid(rows: list[list[int]], shared: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of one length, and where they are real: the padding stands behind what all of them share."""
    longest = max(map(len, rows))
    ids = [[*row[:shared], *[0] * (longest - len(row)), *row[shared:]] for row in rows]
    mask = [[*[1] * shared, *[0] * (longest - len(row)), *[1] * (len(row) - shared)] for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
