"""Cost of defenses: time to first token and per further token, prompt tokens, calls, and memory.

Also their side effect: how far the first token of the responses to benign queries moves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from transformers import DynamicCache

from analysis.datasets.queries import sample_queries
from analysis.models.cache import make_json_cache_path, read_cached_json, write_cached_json
from analysis.models.chat_template import redact_secrets
from analysis.models.engine import Engine
from analysis.models.session import ModelSession
from analysis.progress import make_progress_bar, show_preliminary_work
from analysis.readouts.divergence import Divergence, iterate_divergences
from analysis.served.served_engine import ServedEngine
from analysis.stats.cost import DIVERGENCE_COLUMNS, summarize_costs
from analysis.stats.tables import UNDEFENDED, iterate_rows
from analysis.studies.manifest import identify_defense
from analysis.studies.setup import RunSetup
from analysis.studies.sweep import ConditionFrames, ConditionKey
from defenses.contract import Defense, QueryChat
from defenses.errors import UserError, describe_error
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
N_COST_QUERIES = 8
_N_DECODE_STEPS = 4  # tokens decoded after each prompt
_N_TIMING_REPEATS = 2  # repetitions of each measurement; the fastest counts


def measure_cost(
    setup: RunSetup,
    conditions: Mapping[str, Defense],
    seed: int,
    console: Console,
    n_queries: int = N_COST_QUERIES,
) -> pd.DataFrame:
    """Measure the cost of each condition under the first attack; add what training its weights took.

    Args:
        setup: loaded and prepared.
        conditions: condition name → defense, the undefended model among them.
        seed: random seed of the intervals.
        console: shows progress.
        n_queries: number of queries to time.
    """
    attack = setup.attacks[0]
    query_chats = attack.build_query_chats(sample_queries(setup.query_set.queries, n_queries))
    with make_progress_bar(console) as bar:
        task = bar.add_task("timing", total=len(conditions) * len(query_chats))
        timings = time_conditions(setup.session, conditions, query_chats, lambda: bar.advance(task))
    manifests = {
        name: member.adapter.manifest
        for name, defense in conditions.items()
        for member in list_members(defense)
        if isinstance(member, TunedDefense) and member.adapter is not None
    }
    costs = summarize_costs(timings, seed).assign(attack=attack.name)
    for column, key in (("training_examples", "n_examples"), ("training_seconds", "wall_seconds")):
        costs[column] = [manifests.get(name, {}).get(key) for name in costs["defense"]]
    return costs


def cached_cost(
    setup: RunSetup, conditions: Mapping[str, Defense], seed: int, console: Console, n_queries: int
) -> pd.DataFrame:
    """Return what `measure_cost` returns; conditions in the cache of this machine are not timed again.

    Args:
        setup: loaded and prepared.
        conditions: condition name → defense, the undefended model among them.
        seed: random seed of the intervals.
        console: shows progress.
        n_queries: number of queries to time.
    """
    paths = {name: _cost_cache_path(setup, defense, n_queries) for name, defense in conditions.items()}
    rows = {name: row for name, path in paths.items() if (row := read_cached_json(path, dict)) is not None}
    untimed = {name: defense for name, defense in conditions.items() if name not in rows}
    if untimed:
        reference = {UNDEFENDED: conditions[UNDEFENDED]}
        costs = measure_cost(setup, reference | untimed, seed, console, n_queries)
        for row in iterate_rows(costs):
            if row["defense"] in untimed:
                write_cached_json(paths[row["defense"]], row)
                rows[row["defense"]] = row
    return pd.DataFrame([rows[name] | {"defense": name} for name in conditions])


class ResponseDivergences(ConditionFrames):
    """Divergences on benign queries; they are missing where there is no first token to compare."""

    columns = ("query", "kind", "attack", "defense", *DIVERGENCE_COLUMNS)


def check_lists_all(engine: Engine, option: str) -> None:
    """Raise if whole distributions of the first token are needed and a server does not list them.

    Args:
        engine: runs or asks the model.
        option: that needs them, for the error.
    """
    if isinstance(engine, ServedEngine) and not engine.lists_all:
        raise UserError(
            f"{option}: it needs the probabilities of all first tokens, and the server lists "
            f"{engine.server.abilities.describe()}: start it so that it lists all (vLLM: --max-logprobs -1)"
        )


def measure_divergences(
    setup: RunSetup, condition_keys: Collection[ConditionKey], console: Console
) -> ResponseDivergences:
    """Measure in every condition how far the first tokens of the responses to benign queries move.

    A condition that fails is left out. If the user interrupts, the finished conditions are kept.

    Args:
        setup: loaded and prepared.
        condition_keys: attack and defense of the conditions; the undefended one is the reference.
        console: shows progress.
    """
    result, started = ResponseDivergences(), time.perf_counter()
    benign = [query for query in setup.query_set.queries if not query.harmful]
    keys = [key for key in condition_keys if key[1] != UNDEFENDED]
    with make_progress_bar(console) as bar:
        task = bar.add_task("side effects", total=len(keys) * len(benign))
        show_preliminary_work(bar, task, setup.session)
        for attack in setup.attacks:
            conditions = {name: setup.conditions[name] for other, name in keys if other == attack.name}

            def on_failure(name: str, error: Exception, attack_name: str = attack.name) -> None:
                secrets = setup.conditions[name].secret_texts()
                result.failures[attack_name, name] = redact_secrets(describe_error(error), secrets)

            values: dict[str, list[Divergence]] = {name: [] for name in conditions}
            try:
                for name, divergences in iterate_divergences(
                    setup.session,
                    setup.conditions[UNDEFENDED],
                    conditions,
                    attack.build_query_chats(benign),
                    setup.readout.prefill,
                    on_failure,
                ):
                    values[name] += divergences or []
                    bar.update(task, description=f"side effects of {name}", advance=len(divergences or []))
            except KeyboardInterrupt:
                result.interrupted = True
                break
            for name, found in values.items():
                if (attack.name, name) in result.failures:
                    continue
                columns = {
                    "query": [query.id for query in benign],
                    "kind": [query.kind for query in benign],
                    "attack": attack.name,
                    "defense": name,
                }
                rows = found if len(found) == len(benign) else [(float("nan"),) * 2] * len(benign)
                result.frames[attack.name, name] = pd.DataFrame(columns).assign(
                    **dict(zip(DIVERGENCE_COLUMNS, zip(*rows, strict=True), strict=True))
                )
    result.wall_seconds = time.perf_counter() - started
    return result


def time_conditions(
    session: ModelSession,
    conditions: Mapping[str, Defense],
    query_chats: Sequence[QueryChat],
    on_progress: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Time every condition on a few queries; return `TIMING_COLUMNS`, a row per query and condition.

    All conditions are timed on one query before the next, so that a machine that slows down slows all.

    Args:
        session: the model.
        conditions: condition name → defense.
        query_chats: the queries, an attack applied.
        on_progress: called after each measurement.
    """
    rows = []
    for query_chat in query_chats:
        for name, defense in conditions.items():
            timing = _time_condition(session, defense, query_chat)
            rows.append((query_chat.query_id, name, *timing))
            on_progress()
    return pd.DataFrame(rows, columns=list(TIMING_COLUMNS))


def _time_condition(
    session: ModelSession, defense: Defense, query_chat: QueryChat
) -> tuple[int, int, int, float, float, int]:
    """Return the columns of `TIMING_COLUMNS` after the first two."""
    model = session.loaded_model.model
    # Calls of the defense to the model, and its detector, are part of the time until the response begins.
    defense_calls = session.defense_calls.copy_uncached()
    started = _synchronized_time(model)
    timed_session = replace(session, defense_calls=defense_calls, score_cache=None)
    (prompts,) = timed_session.render_prompts(defense, [query_chat])
    counter = session.engine.work_counter
    n_tokens_before = counter.computed_tokens
    timed_session.score_requests(defense, [query_chat])
    detector_tokens = counter.computed_tokens - n_tokens_before
    is_timed = defense_calls.n_calls or defense.detects
    call_seconds = _synchronized_time(model) - started if is_timed else 0.0
    members = [member for _, member in defense.logit_blend()] or [defense]
    ids_by_member = [
        [(prompt.list_member_ids() or (prompt.ids,) * len(members))[number] for prompt in prompts]
        for number in range(len(members))
    ]
    timings = [
        _fastest_timing(model, member, ids) for member, ids in zip(members, ids_by_member, strict=True)
    ]
    # A blend of models chooses the first token only. With `max`, one of the copies is answered.
    token_seconds = timings[0][1] / (len(prompts) if defense.pool == "max" else 1)
    return (
        sum(len(ids) for member_ids in ids_by_member for ids in member_ids),
        defense_calls.n_tokens + detector_tokens,
        len(members) * len(prompts) + defense_calls.n_calls,
        call_seconds + sum(prefill_seconds for prefill_seconds, _, _ in timings),
        token_seconds,
        max(peak_bytes for _, _, peak_bytes in timings),
    )


def _fastest_timing(
    model: Any, defense: Defense, prompt_ids: Sequence[Sequence[int]]
) -> tuple[float, float, int]:
    """Return the fastest of several measurements with the defense applied."""
    with defense.apply_to(model):
        timings = [_time_prompts(model, prompt_ids) for _ in range(_N_TIMING_REPEATS)]
    return min(prefill for prefill, _, _ in timings), min(token for _, token, _ in timings), timings[0][2]


def _time_prompts(model: Any, prompt_ids: Sequence[Sequence[int]]) -> tuple[float, float, int]:
    """Return seconds for all prompts of a query, seconds per further token, and peak bytes (GPU only)."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    prefill_seconds, decode_seconds = 0.0, 0.0
    with torch.inference_mode():
        for prompt in prompt_ids:
            cache = DynamicCache(config=model.config)
            ids = torch.tensor([list(prompt)], device=model.device)
            started = _synchronized_time(model)
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            first_token = _synchronized_time(model)
            for _ in range(_N_DECODE_STEPS):
                next_ids = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=next_ids, past_key_values=cache, use_cache=True)
            prefill_seconds = prefill_seconds + first_token - started
            decode_seconds = decode_seconds + _synchronized_time(model) - first_token
    peak_bytes = torch.cuda.max_memory_allocated(model.device) if on_gpu else 0
    return prefill_seconds, decode_seconds / _N_DECODE_STEPS, peak_bytes


def _synchronized_time(model: Any) -> float:
    """Return the clock in seconds, after the GPU has finished its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _cost_cache_path(setup: RunSetup, defense: Defense, n_queries: int) -> Path | None:
    """Return the cache file of a cost, named by all that the time depends on; secrets as fingerprints."""
    session, attack = setup.session, setup.attacks[0]
    key = {
        "device": [str(session.loaded_model.device), torch.get_num_threads()],
        "defense": identify_defense(defense, session.seed),
        "attack": [attack.name, *attack.wording_sha256],
        "queries": [query.text for query in sample_queries(setup.query_set.queries, n_queries)],
    }
    return make_json_cache_path("cost", session.loaded_model, key)
