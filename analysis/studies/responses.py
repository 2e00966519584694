"""Responses of a run: their first tokens are generated and judged in every condition; no text is kept."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from rich.console import Console

from analysis.attacks import Attack
from analysis.datasets.queries import Query
from analysis.judges.judge import Judge, generate_verdicts
from analysis.judges.rules import RULE_JUDGES
from analysis.models.cache import CacheKey, describe_computation, hash_code
from analysis.models.chat_template import redact_secrets
from analysis.models.session import ModelSession, list_blend_members
from analysis.readouts.readout import Readout
from analysis.studies.progress import make_defense_call_callback, make_progress_bar
from analysis.studies.run_spec import RunSpec
from analysis.studies.setup import RunSetup
from analysis.studies.sweep import ConditionKey
from defenses.contract import Defense
from defenses.errors import UserError, describe_error

RESPONSE_COLUMNS = ("query", "pair", "category", "harmful", "kind", "attack", "defense", "refusal")
N_RESPONSE_TOKENS = 12  # enough to tell a refusal from compliance; see docs/validity.md
RESPONSE_JUDGE = RULE_JUDGES["patterns"]
_QUERIES_PER_BATCH = 64  # queries whose verdicts are cached together, so that a killed run keeps most of them
_JUDGE_SOURCES = ("analysis/judges/**/*.py",)


def judge_conditions(
    setup: RunSetup,
    condition_keys: Sequence[ConditionKey],
    spec: RunSpec,
    failures: dict[ConditionKey, str],
    console: Console,
) -> pd.DataFrame:
    """Generate and judge responses in every condition, the same queries in each.

    Args:
        setup: loaded and prepared.
        condition_keys: attack and defense of each condition.
        spec: options of the run, among them the number of responses.
        failures: what failed, and why; conditions whose responses fail are added.
        console: shows progress.

    Returns:
        The columns `RESPONSE_COLUMNS`, one row per answered query and condition.

    Raises:
        UserError: if no condition has responses.
    """
    attacks = {attack.name: attack for attack in setup.attacks}
    queries = sample_answered_queries(setup.query_set.queries, spec.max_responses, spec.seed)
    frames = []
    with make_progress_bar(console) as bar:
        task = bar.add_task("generating responses", total=len(condition_keys) * len(queries))
        setup.session.defense_calls.on_progress = make_defense_call_callback(bar, task)
        for attack, name in condition_keys:
            bar.update(task, description=f"generating responses: {name} ({attack})")
            defense = setup.conditions[name]
            try:
                kinds = judge_condition(
                    setup.session,
                    attacks[attack],
                    defense,
                    queries,
                    RESPONSE_JUDGE,
                    setup.readout,
                    lambda n_queries: bar.advance(task, n_queries),
                )
            except Exception as error:
                reason = redact_secrets(describe_error(error), defense.secret_texts())
                failures[attack, name] = f"responses: {reason}"
            else:
                frames.append(_make_response_frame(queries, attack, name, kinds))
    if not frames:
        raise UserError(f"no response could be generated: {next(iter(failures.values()))}")
    return pd.concat(frames, ignore_index=True)


def describe_responses(responses: pd.DataFrame) -> dict[str, object]:
    """Return the entry of run.json on the responses of a run."""
    return {
        "judge": RESPONSE_JUDGE.manifest_entry,
        "new_tokens": N_RESPONSE_TOKENS,
        "queries": int(responses["query"].nunique()),
        "unjudged": int((responses["refusal"] == "unjudged").sum()),
    }


def judge_condition(
    session: ModelSession,
    attack: Attack,
    defense: Defense,
    queries: Sequence[Query],
    judge: Judge,
    readout: Readout,
    on_progress: Callable[[int], None] = lambda n_queries: None,
) -> list[str]:
    """Return the judge's verdict (a kind of refusal) on the response to each query; cached ones are kept.

    Args:
        session: the model.
        attack: the attack through which the queries are sent.
        defense: prepared for this model.
        queries: the queries to answer.
        judge: the judge of the responses.
        readout: its prefill is how the responses start.
        on_progress: called with the number of queries finished since the last call.
    """
    keys = _make_keys(session, attack, defense, queries, judge, readout)
    cache = session.score_cache if keys else None
    kinds: dict[int, str] = {}
    if cache is not None:
        kind_by_key = cache.read_refusals(keys)
        kinds = {row: kind_by_key[key] for row, key in enumerate(keys) if key in kind_by_key}
    on_progress(len(kinds))
    missing = [row for row in range(len(queries)) if row not in kinds]
    for start in range(0, len(missing), _QUERIES_PER_BATCH):
        rows = missing[start : start + _QUERIES_PER_BATCH]
        batch = [queries[row] for row in rows]
        verdicts = generate_verdicts(
            session,
            defense,
            attack.build_query_chats(batch),
            [query.text for query in batch],
            judge,
            readout.prefill,
            N_RESPONSE_TOKENS,
        )
        batch_kinds = dict(zip(rows, (verdict.refusal for verdict in verdicts), strict=True))
        if cache is not None:
            cache.write_refusals((keys[row], kind) for row, kind in batch_kinds.items())
        kinds |= batch_kinds
        on_progress(len(rows))
    return [kinds[row] for row in range(len(queries))]


def sample_answered_queries(queries: Sequence[Query], max_responses: int | None, seed: int) -> list[Query]:
    """Return a random sample of queries, with whole pairs and each kind of query in proportion.

    Args:
        queries: all queries.
        max_responses: maximum size of the sample; None or a large number keeps every query.
        seed: of the run.
    """
    if max_responses is None or max_responses >= len(queries):
        return list(queries)
    units_by_kinds: dict[tuple[str, ...], list[list[Query]]] = defaultdict(list)
    for unit in _group_pairs(queries):
        units_by_kinds[tuple(sorted(query.kind for query in unit))].append(unit)
    share = max_responses / len(queries)
    sampled_ids: set[str] = set()
    for kinds, units in sorted(units_by_kinds.items()):
        random.Random(f"{seed}/responses/{kinds}").shuffle(units)
        for unit in units[: int(share * len(units))]:
            sampled_ids |= {query.id for query in unit}
    return [query for query in queries if query.id in sampled_ids]


def _group_pairs(queries: Sequence[Query]) -> list[list[Query]]:
    """Return pairs and single queries as lists."""
    units: dict[tuple[bool, str], list[Query]] = defaultdict(list)
    for query in queries:
        units[query.pair is None, query.pair or query.id].append(query)
    return list(units.values())


def _make_keys(
    session: ModelSession,
    attack: Attack,
    defense: Defense,
    queries: Sequence[Query],
    judge: Judge,
    readout: Readout,
) -> list[bytes]:
    """Return the cache key of each query's verdict; no keys if nothing may be cached."""
    members = [(weight, member.cacheable_fingerprint()) for weight, member in list_blend_members(defense)]
    if any(fingerprint is None for _, fingerprint in members):
        return []
    settings = {
        **describe_computation(session.loaded_model),
        "arms": members,
        "pool": defense.pool,
        "judge": [judge.manifest_entry, hash_code(*_JUDGE_SOURCES)],
        "response": [readout.prefill, N_RESPONSE_TOKENS],
    }
    prompts_by_query = session.render_prompts(defense, attack.build_query_chats(queries))
    keys = []
    for query, prompts in zip(queries, prompts_by_query, strict=True):
        # The judge also reads the query.
        key = CacheKey({**settings, "query": query.text, "ids": [prompt.ids for prompt in prompts]})
        keys.append(key.make_key(()))
    return keys


def _make_response_frame(
    queries: Sequence[Query], attack: str, defense: str, kinds: Sequence[str]
) -> pd.DataFrame:
    """Return one row per query in the columns `RESPONSE_COLUMNS`."""
    columns: Mapping[str, object] = {
        "query": [query.id for query in queries],
        "pair": [query.pair for query in queries],
        "category": [query.category for query in queries],
        "harmful": [query.harmful for query in queries],
        "kind": [query.kind for query in queries],
        "attack": attack,
        "defense": defense,
        "refusal": list(kinds),
    }
    return pd.DataFrame(columns, columns=list(RESPONSE_COLUMNS))
