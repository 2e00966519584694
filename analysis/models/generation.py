"""What a model goes on to say: greedy answers, in batches, what the prompts share computed only once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from analysis.models.engine import Engine, count_shared_prefix
from analysis.models.prefix_attention import PackedRows, RowCache, can_split_attention, make_split_update

_MAX_PADDED_ROWS, _MAX_PACKED_ROWS = 32, 64  # in a batch; rows in a line take less memory

# Told an answer so far, says whether the rest of it no longer matters.
StopCondition = Callable[[list[int]], bool]


def generate_token_ids(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_id: int,
    should_stop: StopCondition = lambda answer: False,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """Return the greedy answer to each prompt: up to `tokens` ids, without the one that ends it.

    Args:
        engine: holds the model.
        prompts: token ids.
        max_new_tokens: at most, of each answer.
        eos_token_id: the id that ends an answer.
        should_stop: told an answer so far, says whether the rest of it no longer matters; then it ends there.
        on_progress: told how many more answers are finished.
    """
    model = engine.model
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    shared = count_shared_prefix(prompts) if plain else 0
    found: dict[int, list[int]] = {}
    with torch.inference_mode():
        prefix = DynamicCache(config=model.config)
        if shared:
            ids = torch.tensor([list(prompts[0][:shared])], device=model.device)
            model(input_ids=ids, past_key_values=prefix, use_cache=True, logits_to_keep=1)
        in_line = shared > 0 and can_split_attention(model, prefix.layers)
        for rows in _group_by_length(
            [len(prompt) for prompt in prompts], plain, _MAX_PACKED_ROWS if in_line else _MAX_PADDED_ROWS
        ):
            if in_line:
                suffixes = [prompts[row][shared:] for row in rows]
                said = _generate_packed(
                    engine, prefix, shared, suffixes, max_new_tokens, eos_token_id, should_stop
                )
            else:
                said = _generate_padded(
                    [list(prompts[row]) for row in rows],
                    model,
                    prefix,
                    shared,
                    max_new_tokens,
                    eos_token_id,
                    should_stop,
                )
            found.update(zip(rows, said, strict=True))
            on_progress(len(rows))
    return [found[row] for row in range(len(prompts))]


def _generate_packed(
    engine: Engine,
    prefix: DynamicCache,
    n_shared: int,
    suffixes: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_id: int,
    should_stop: StopCondition,
) -> list[list[int]]:
    """Greedy answers of rows that lie in one line: the prefix is not copied, and ended rows are dropped."""
    memories = []
    for layer in prefix.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        memories.append(RowCache())
        layer.update = make_split_update(layer.keys, layer.values, memories[-1])  # type: ignore[method-assign]
    said: list[list[int]] = [[] for _ in suffixes]
    going = list(range(len(suffixes)))
    lengths = torch.tensor([len(suffix) for suffix in suffixes])
    rows = PackedRows.from_lengths(lengths)
    remembered = rows.is_token
    ids = torch.cat([torch.tensor(list(suffix)) for suffix in suffixes])
    logits = engine.compute_packed_logits(
        prefix, n_shared, ids, torch.cat([torch.arange(n) for n in lengths]), rows, rows.last_index
    )
    while True:
        ended = []
        for at, token in enumerate(logits.argmax(-1).tolist()):
            answer = said[going[at]]
            if token != eos_token_id:
                answer.append(token)
            ended.append(token == eos_token_id or len(answer) == max_new_tokens or should_stop(answer))
        if all(ended):
            return said
        if any(ended):
            kept = torch.tensor([at for at, over in enumerate(ended) if not over])
            going = [going[at] for at in kept]
            lengths, remembered = lengths[kept], remembered[kept]
            for memory in memories:
                memory.select_rows(kept)
        # One more token of each row; it sees all of its row but the padding.
        remembered = torch.cat([remembered, torch.ones(len(going), 1, dtype=torch.bool)], dim=1)
        ids = torch.tensor([said[row][-1] for row in going])
        places = lengths + torch.tensor([len(said[row]) - 1 for row in going])
        rows = PackedRows.from_lengths(torch.ones_like(lengths))
        logits = engine.compute_packed_logits(
            prefix, n_shared, ids, places, rows, rows.last_index, ~remembered[:, None]
        )


def _generate_padded(
    prompts: list[list[int]],
    model: Any,
    prefix: DynamicCache,
    n_shared: int,
    max_new_tokens: int,
    eos_token_id: int,
    should_stop: StopCondition,
) -> list[list[int]]:
    """Greedy answers of a batch by transformers, the prefix laid under each row."""
    ids, mask = _pad_prompts(prompts, n_shared, model.device)
    cache = copy.deepcopy(prefix)
    if n_shared:
        cache.batch_repeat_interleave(len(prompts))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache if n_shared else None,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        stopping_criteria=[_RowStoppingCriteria(should_stop, ids.shape[1], len(prompts))],
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    said = out[:, ids.shape[1] :].tolist()
    return [answer[: answer.index(eos_token_id)] if eos_token_id in answer else answer for answer in said]


class _RowStoppingCriteria(StoppingCriteria):
    """Ends a row once what more it would say no longer matters."""

    def __init__(self, should_stop: StopCondition, prompt_length: int, n_rows: int) -> None:
        self.should_stop, self.prompt_length, self.is_stopped = should_stop, prompt_length, [False] * n_rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows end here."""
        for row, answer in enumerate(input_ids[:, self.prompt_length :].tolist()):
            self.is_stopped[row] = self.is_stopped[row] or self.should_stop(answer)
        return torch.tensor(self.is_stopped, device=input_ids.device)


def _group_by_length(lengths: Sequence[int], allows_padding: bool, max_rows: int) -> Iterator[list[int]]:
    """Rows of like length; of the very same where a model's memory has no place for padding."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    while order:
        rows = [row for row in order[:max_rows] if allows_padding or lengths[row] == lengths[order[0]]]
        yield rows
        order = order[len(rows) :]


def _pad_prompts(
    prompts: list[list[int]], n_shared: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of one length, and where they are real: the padding stands behind what all of them share."""
    longest = max(map(len, prompts))
    ids = [[*row[:n_shared], *[0] * (longest - len(row)), *row[n_shared:]] for row in prompts]
    mask = [[*[1] * n_shared, *[0] * (longest - len(row)), *[1] * (len(row) - n_shared)] for row in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
