"""How long a defended model takes: each prompt alone, then a few tokens more; conditions take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from transformers import DynamicCache

from analysis.datasets.queries import Query, sample_queries
from analysis.models.cache import make_json_cache_path, read_cached_json, write_cached_json
from analysis.models.session import ModelSession
from analysis.stats.cost import summarize_costs
from analysis.stats.tables import UNDEFENDED, iterate_rows
from analysis.studies.manifest import identify_defense
from analysis.studies.progress import make_progress_bar
from analysis.studies.setup import RunSetup
from defenses.contract import Defense
from defenses.stack import list_members
from defenses.tuned import TunedDefense

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
            prompts = [
                prompt.ids for prompt in replace(session, defense_calls=drafts).render_query(defense, query)
            ]
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


def _fastest_timing(
    model: Any, defense: Defense, prompt_ids: Sequence[Sequence[int]]
) -> tuple[float, float, int]:
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


N_COST_QUERIES = 8  # queries on which costs are measured


def measure_cost(
    setup: RunSetup,
    conditions: Mapping[str, Defense],
    seed: int,
    console: Console,
    n_queries: int = N_COST_QUERIES,
) -> pd.DataFrame:
    """Return what each condition costs under the first attack; weights with what it took to train them.

    Args:
        setup: loaded and prepared.
        conditions: the conditions, the undefended one among them.
        seed: of the intervals.
        console: for progress.
        n_queries: queries that are timed.
    """
    few = sample_queries(setup.query_set.queries, n_queries)
    with make_progress_bar(console) as bar:
        task = bar.add_task("timing", total=len(conditions) * len(few))
        bench = setup.session.with_attack(setup.attacks[0])
        measured = time_conditions(bench, conditions, few, lambda: bar.advance(task))
    trained = {
        name: one.adapter.manifest
        for name, defense in conditions.items()
        for one in list_members(defense)
        if isinstance(one, TunedDefense) and one.adapter is not None
    }
    found = summarize_costs(measured, seed).assign(attack=bench.attack.name)
    for column, key in (("training_examples", "n_examples"), ("training_seconds", "wall_seconds")):
        found[column] = [trained.get(name, {}).get(key) for name in found["defense"]]
    return found


def cached_cost(
    setup: RunSetup, conditions: Mapping[str, Defense], seed: int, console: Console, n_queries: int
) -> pd.DataFrame:
    """Return what `priced` returns; what an earlier run has timed on this machine is not timed again.

    Args:
        setup: as for `priced`.
        conditions: as for `priced`.
        seed: as for `priced`.
        console: as for `priced`.
        n_queries: as for `priced`.
    """
    places = {name: _cost_cache_path(setup, one, n_queries) for name, one in conditions.items()}
    rows = {name: row for name, place in places.items() if (row := read_cached_json(place)) is not None}
    new = {name: one for name, one in conditions.items() if name not in rows}
    if new:
        measured = measure_cost(setup, {UNDEFENDED: conditions[UNDEFENDED]} | new, seed, console, n_queries)
        for row in iterate_rows(measured):
            if row["defense"] in new:
                write_cached_json(places[row["defense"]], row)
                rows[row["defense"]] = row
    return pd.DataFrame([rows[name] | {"defense": name} for name in conditions])


def _cost_cache_path(setup: RunSetup, defense: Defense, n_queries: int) -> Path | None:
    """A file named by what the time depends on; secrets enter as fingerprints."""
    bench = setup.session
    about = {
        "device": [str(bench.loaded_model.model.device), torch.get_num_threads()],
        "defense": identify_defense(defense, bench.seed),
        "attack": [setup.attacks[0].name, *setup.attacks[0].wording_sha256],
        "queries": [query.text for query in sample_queries(setup.query_set.queries, n_queries)],
    }
    return make_json_cache_path("cost", bench.loaded_model, about)
