"""How long a defended model takes: each prompt alone, then a few tokens more; conditions take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from transformers import DynamicCache

from analysis.bench import ModelSession
from analysis.queries import Query
from defenses import Defense

TIMING_COLUMNS = (
    "query",
    "defense",
    "prompt_tokens",
    "draft_tokens",
    "calls",
    "prefill_seconds",
    "token_seconds",
    "peak_bytes",
)
_DECODE_STEPS, _TIMING_REPEATS = 4, 2  # tokens behind a prompt; tries, of which the faster counts


def time_conditions(
    session: ModelSession,
    conditions: Mapping[str, Defense],
    queries: Sequence[Query],
    on_progress: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Return the columns `MEASURED`, a row per query and condition.

    All conditions are timed on a query before the next one comes: a machine that slows down slows all.

    Args:
        session: the model.
        conditions: by name.
        queries: a few.
        on_progress: told after each measurement.
    """
    rows = []
    for query in queries:
        for name, defense in conditions.items():
            # What the model is asked first is part of the time until the answer begins.
            drafts = session.defense_calls.copy_uncached()
            started = _synchronized_time(session.loaded_model.model)
            prompts = [prompt.ids for prompt in replace(session, defense_calls=drafts).render_query(defense, query)]
            asked = _synchronized_time(session.loaded_model.model) - started if drafts.n_calls else 0.0
            members = [one for _, one in defense.logit_blend()] or [defense]
            taken = [_fastest_timing(session.loaded_model.model, one, prompts) for one in members]
            # Several models choose the first token alone, and where the worst of several readings counts, one
            # answer is given.
            goes_on = taken[0][1] / (len(prompts) if defense.pool == "max" else 1)
            tokens, calls = len(members) * sum(map(len, prompts)), len(members) * len(prompts)
            prefill, peak = asked + sum(one[0] for one in taken), max(one[2] for one in taken)
            calls += drafts.n_calls
            rows.append((query.id, name, tokens, drafts.n_tokens, calls, prefill, goes_on, peak))
            on_progress()
    return pd.DataFrame(rows, columns=list(TIMING_COLUMNS))


def _fastest_timing(model: Any, defense: Defense, prompt_ids: Sequence[Sequence[int]]) -> tuple[float, float, int]:
    """The faster of some tries, while the defense is armed, see `_time`."""
    with defense.apply_to(model):
        tries = [_time_prompts(model, prompt_ids) for _ in range(_TIMING_REPEATS)]
    return min(one[0] for one in tries), min(one[1] for one in tries), tries[0][2]


def _time_prompts(model: Any, prompt_ids: Sequence[Sequence[int]]) -> tuple[float, float, int]:
    """Seconds for all prompts of a query, seconds for one further token, and bytes at the peak (GPU only)."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    prefill, steps = 0.0, 0.0
    with torch.inference_mode():
        for prompt in prompt_ids:
            cache = DynamicCache(config=model.config)
            ids = torch.tensor([list(prompt)], device=model.device)
            started = _synchronized_time(model)
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            middle = _synchronized_time(model)
            for _ in range(_DECODE_STEPS):
                following = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=following, past_key_values=cache, use_cache=True)
            prefill, steps = prefill + middle - started, steps + _synchronized_time(model) - middle
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else 0
    return prefill, steps / _DECODE_STEPS, peak


def _synchronized_time(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
