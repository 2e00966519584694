"""Responses of a run: their first tokens are generated and judged in every condition; no text is kept.

Where the prompts are those of scoring, their first-token logits are computed only once: they are scored while
the responses are generated, and scoring finds them in the cache.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.attacks import Attack
from analysis.datasets.queries import Query, group_units, rank_units
from analysis.judges.judge import Judge, Verdict, generate_verdicts
from analysis.judges.learned import LEARNED_JUDGE
from analysis.models.cache import CacheKey, describe_computation, hash_code
from analysis.models.chat_template import redact_secrets
from analysis.models.session import ModelSession, ResponseOpenings, list_blend_members
from analysis.progress import make_progress_bar, show_preliminary_work
from analysis.readouts.prompt_scores import make_score_writer
from analysis.readouts.readout import Readout
from analysis.run import build_condition_chats
from analysis.stats.tables import ResponseVerdict
from analysis.studies.run_spec import RunSpec
from analysis.studies.setup import RunSetup
from analysis.studies.sweep import ConditionFrames, ConditionKey, list_failures
from defenses.contract import Defense, QueryChat
from defenses.errors import describe_error

RESPONSE_COLUMNS = ("query", "pair", "category", "harmful", "kind", "attack", "defense", "verdict")
N_RESPONSE_TOKENS = 32  # 16 miss refusals of models that do not open with them; see docs/validity.md
RESPONSE_JUDGE = LEARNED_JUDGE
_JUDGE_SOURCES = ("analysis/judges/**/*.py",)


class ResponseVerdicts(ConditionFrames):
    """Verdicts on the responses of a run, a row per query and condition."""

    columns = RESPONSE_COLUMNS

    def drop_unscored(self, condition_keys: Container[ConditionKey]) -> None:
        """Remove the verdicts of conditions without scores."""
        self.frames = {key: frame for key, frame in self.frames.items() if key in condition_keys}

    def describe(self) -> dict[str, Any]:
        """Return the entry of run.json on the responses of a run."""
        table = self.table
        return {
            "judge": RESPONSE_JUDGE.manifest_entry,
            "new_tokens": N_RESPONSE_TOKENS,
            "queries": int(table["query"].nunique()),
            "conditions": len(self.frames),
            "unjudged": int((table["verdict"] == ResponseVerdict.UNJUDGED).sum()),
            "interrupted": self.interrupted,
            "wall_seconds": round(self.wall_seconds, 1),
            "failed": list_failures(self.failures),
        }


def judge_conditions(
    setup: RunSetup, condition_keys: Sequence[ConditionKey], spec: RunSpec, console: Console
) -> ResponseVerdicts:
    """Generate and judge responses in every condition, the same queries in each.

    A condition that fails is left out. If the user interrupts, the finished conditions are kept.

    Args:
        setup: loaded and prepared.
        condition_keys: attack and defense of each condition.
        spec: options of the run, among them the number of responses.
        console: shows progress.
    """
    attacks = {attack.name: attack for attack in setup.attacks}
    queries = sample_answered_queries(setup.query_set.queries, spec.max_responses, spec.seed)
    result, started = ResponseVerdicts(), time.perf_counter()
    with make_progress_bar(console) as bar:
        task = bar.add_task("generating responses", total=len(condition_keys) * len(queries))
        show_preliminary_work(bar, task, setup.session)
        for number, (attack, name) in enumerate(condition_keys, 1):
            bar.update(task, description=f"generating responses: {name} ({attack})")
            defense = setup.conditions[name]
            try:
                verdicts = judge_condition(
                    setup.session,
                    attacks[attack],
                    defense,
                    queries,
                    RESPONSE_JUDGE,
                    setup.readout,
                    lambda n_queries: bar.advance(task, n_queries),
                )
            except KeyboardInterrupt:
                result.interrupted = True
                break
            except Exception as error:
                reason = redact_secrets(describe_error(error), defense.secret_texts())
                result.failures[attack, name] = reason
            else:
                result.frames[attack, name] = _make_response_frame(queries, attack, name, verdicts)
            bar.update(task, completed=number * len(queries))
    result.wall_seconds = time.perf_counter() - started
    return result


def judge_condition(
    session: ModelSession,
    attack: Attack,
    defense: Defense,
    queries: Sequence[Query],
    judge: Judge,
    readout: Readout,
    on_progress: Callable[[int], None] = lambda n_queries: None,
    openings: ResponseOpenings | None = None,
) -> list[str]:
    """Return the verdict on the response to each query; cached verdicts are not computed again.

    Args:
        session: the model.
        attack: the attack through which the queries are sent.
        defense: prepared for this model.
        queries: the queries to answer.
        judge: the judge of the responses.
        readout: its prefill (a lone space, an empty thinking block) is how the responses start.
        on_progress: called with the number of queries finished since the last call.
        openings: put at the start of the response to each query.

    Returns:
        The text of a `ResponseVerdict` for each query.
    """
    query_chats = build_condition_chats(session, defense, queries, readout, attack)
    keys = _make_keys(session, query_chats, defense, queries, judge, readout, openings)
    cache = session.score_cache if keys else None
    verdicts: dict[int, str] = {}
    if cache is not None:
        cached = cache.read_verdicts(keys)
        verdicts = {row: cached[key] for row, key in enumerate(keys) if key in cached}
    on_progress(len(verdicts))
    missing = [row for row in range(len(queries)) if row not in verdicts]
    # Behind an opening, the first logits are not those that are scored.
    store_scores = make_score_writer(
        session.loaded_model, defense, readout, None if openings else session.score_cache
    )
    # Verdicts are cached batch by batch, so that a killed run keeps most of them.
    size = session.engine.responses_per_batch
    for start in range(0, len(missing), size):
        rows = missing[start : start + size]
        batch = [queries[row] for row in rows]
        batch_verdicts = generate_verdicts(
            session,
            defense,
            [query_chats[row] for row in rows],
            [query.text for query in batch],
            judge,
            readout.prefill,
            N_RESPONSE_TOKENS,
            on_first_logits=store_scores,
            openings=openings.select_rows(rows) if openings else None,
        )
        new_verdicts = dict(zip(rows, map(name_verdict, batch_verdicts), strict=True))
        if cache is not None:
            cache.write_verdicts((keys[row], verdict) for row, verdict in new_verdicts.items())
        verdicts |= new_verdicts
        on_progress(len(rows))
    return [verdicts[row] for row in range(len(queries))]


def sample_answered_queries(queries: Sequence[Query], max_responses: int | None, seed: int) -> list[Query]:
    """Return a random sample of queries with whole pairs, in which each stratum has its share.

    The strata are pairs, single harmful queries and single benign ones; each has at least one member in the
    sample, so that a tiny sample may be larger than asked for. Within a stratum, kinds are in proportion.

    Args:
        queries: all queries.
        max_responses: size of the sample; None or a large number keeps every query.
        seed: of the run.
    """
    if max_responses is None or max_responses >= len(queries):
        return list(queries)
    units_by_stratum: dict[str, list[list[Query]]] = defaultdict(list)
    for unit in group_units(queries):
        stratum = "pair" if len(unit) > 1 else "harmful" if unit[0].harmful else "benign"
        units_by_stratum[stratum].append(unit)
    shares = {
        stratum: max_responses * len(units) / len(queries) for stratum, units in units_by_stratum.items()
    }
    counts = {stratum: max(1, int(share + 1e-9)) for stratum, share in shares.items()}
    # Largest remainders first, as long as there is room.
    for stratum in sorted(shares, key=lambda name: int(shares[name] + 1e-9) - shares[name]):
        unit_size = len(units_by_stratum[stratum][0])
        n_sampled = sum(counts[name] * len(units_by_stratum[name][0]) for name in counts)
        if shares[stratum] > counts[stratum] and n_sampled + unit_size <= max_responses:
            counts[stratum] += 1
    sampled_ids: set[str] = set()
    for stratum, units in sorted(units_by_stratum.items()):
        shuffled = random.Random(f"{seed}/responses/{stratum}").sample(units, len(units))
        for unit in rank_units(shuffled, lambda unit: unit[0].kind)[: counts[stratum]]:
            sampled_ids |= {query.id for query in unit}
    return [query for query in queries if query.id in sampled_ids]


def name_verdict(verdict: Verdict) -> str:
    """Return a verdict without its kind; a response without text neither refuses nor complies."""
    if not verdict.is_judged:
        return ResponseVerdict.UNJUDGED.value
    return (ResponseVerdict.REFUSED if verdict.is_refusal else ResponseVerdict.NOT_REFUSED).value


def _make_keys(
    session: ModelSession,
    query_chats: Sequence[QueryChat],
    defense: Defense,
    queries: Sequence[Query],
    judge: Judge,
    readout: Readout,
    openings: ResponseOpenings | None = None,
) -> list[bytes]:
    """Return the cache key of each query's verdict; no keys if nothing may be cached."""
    # A blend chooses the first token; the defense itself is applied while the rest is generated.
    fingerprints = [defense.cacheable_fingerprint()]
    fingerprints += [member.cacheable_fingerprint() for _, member in list_blend_members(defense)]
    if None in fingerprints:
        return []
    settings = {
        **describe_computation(session.loaded_model),
        "fingerprints": fingerprints,
        "blend": [weight for weight, _ in list_blend_members(defense)],
        "pool": defense.pool,
        "judge": [judge.manifest_entry, hash_code(*_JUDGE_SOURCES)],
        "response": [readout.prefill, N_RESPONSE_TOKENS],
        "tokenizer": [session.chat_template.vocabulary_sha256, sorted(session.loaded_model.end_token_ids)],
    }
    log_odds = session.score_requests(defense, query_chats) or [0.0] * len(queries)
    prompts_by_query = session.render_prompts(defense, query_chats)
    opening_ids = openings.ids if openings else ((),) * len(queries)
    return [
        # The judge also reads the query.
        CacheKey(
            {
                **settings,
                "query": query.text,
                "detector_refuses": value > 0,
                "ids": [[prompt.ids, *prompt.list_member_ids()] for prompt in prompts],
                "opening": [opening, openings is not None and openings.in_text] if opening else None,
            }
        ).make_key(())
        for query, prompts, value, opening in zip(
            queries, prompts_by_query, log_odds, opening_ids, strict=True
        )
    ]


def _make_response_frame(
    queries: Sequence[Query], attack: str, defense: str, verdicts: Sequence[str]
) -> pd.DataFrame:
    """Return one row per query in the columns `RESPONSE_COLUMNS`."""
    columns = {
        "query": [query.id for query in queries],
        "pair": [query.pair for query in queries],
        "category": [query.category for query in queries],
        "harmful": [query.harmful for query in queries],
        "kind": [query.kind for query in queries],
        "attack": attack,
        "defense": defense,
        "verdict": list(verdicts),
    }
    return pd.DataFrame(columns, columns=list(RESPONSE_COLUMNS))
