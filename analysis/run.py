"""Steps 4 and 5: token ids → margin and coverage, while the defense is armed, none computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from scipy.special import expit
from torch import Tensor

from analysis.datasets.queries import Query
from analysis.models.cache import CacheKey, ScoreCache, describe_computation
from analysis.models.engine import Engine
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession, iterate_defended_logits, list_blend_members
from analysis.readouts.readout import Readout
from analysis.stats.tables import SCORE_COLUMNS, UNDEFENDED
from defenses.contract import Defense


def score_prompts(
    loaded_model: LoadedModel,
    engine: Engine,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    readout: Readout,
    score_cache: ScoreCache | None = None,
    on_progress: Callable[[int], None] = lambda prompts: None,
) -> Float[Tensor, "prompts 2"]:
    """Return margin and coverage of every prompt, those of earlier runs from the store.

    Args:
        loaded_model: the model.
        engine: that holds it.
        defense: is armed meanwhile.
        prompts: token ids, the readout's prefix included.
        readout: how logits become a margin.
        score_cache: where scores are looked up and kept.
        on_progress: told how many more prompts are finished.
    """
    arms = [(weight, one.cacheable_fingerprint()) for weight, one in list_blend_members(defense)]
    if any(change is None for _, change in arms):
        score_cache = None
    namer = CacheKey(
        {
            **describe_computation(loaded_model),
            "arms": arms,
            "readout": [readout.ids, readout.weights, readout.is_log_odds],
        }
    )
    names = [namer.make_key(ids) for ids in prompts]
    known = score_cache.read_scores(names) if score_cache is not None else {}
    if score_cache is not None:
        score_cache.n_hits += sum(name in known for name in names)
    # Prompts that are the same are read once.
    new = list({name: at for at, name in enumerate(names) if name not in known}.values())
    asked = [prompts[at] for at in new]
    for rows, values in (
        iterate_defended_logits(engine, loaded_model, defense, asked, readout.compute_margins) if new else ()
    ):
        fresh = {names[new[row]]: (float(m), float(c)) for row, (m, c) in zip(rows, values, strict=True)}
        if score_cache is not None:
            score_cache.write_scores((name, *value) for name, value in fresh.items())
        known |= fresh
        on_progress(len(rows))
    on_progress(len(prompts) - len(new))
    return torch.tensor([known[name] for name in names], dtype=torch.float64)


def build_conditions(defenses: Sequence[Defense]) -> dict[str, Defense]:
    """Return what is scored, by the name it has in the tables: each defense, and behind it its parts.

    What the model lacks something for, such as tuned weights, is left out.

    >>> import defenses
    >>> list(build_conditions([defenses.get("none"), defenses.get("backdoor")]))
    ['none', 'backdoor/no_weights', 'backdoor/neither']
    """
    found: dict[str, Defense] = {}
    for defense in defenses:
        parts = {f"{defense.name}/{missing}": part for missing, part in defense.build_ablations().items()}
        found |= {defense.name: defense} | parts
    return {name: defense for name, defense in found.items() if not defense.missing_requirements()}


def score_condition(
    session: ModelSession,
    condition: str,
    defense: Defense,
    queries: Sequence[Query],
    readout: Readout,
    on_progress: Callable[[int], None] = lambda prompts: None,
) -> pd.DataFrame:
    """Return the margins of all queries under one defense, in the columns of scores.csv.

    Args:
        session: the model.
        condition: the defense's name in the tables.
        defense: prepared for this model.
        queries: what is asked.
        readout: how a forward pass becomes a margin.
        on_progress: told how many more queries are finished.
    """
    session = session.with_questions(readout.questions)
    prompts = session.render_queries(defense, queries)  # steps 2 and 3
    owner = [row for row, readings in enumerate(prompts) for _ in readings]
    flat = [prompt.append_prefix(readout.response_prefix) for readings in prompts for prompt in readings]
    read_by_now = 0

    def tell(readings: int) -> None:
        nonlocal read_by_now
        before, read_by_now = read_by_now, read_by_now + readings
        on_progress(read_by_now * len(queries) // len(flat) - before * len(queries) // len(flat))

    read = score_prompts(
        session.loaded_model, session.engine, defense, flat, readout, session.score_cache, tell
    )  # 4 and 5
    readings = pd.DataFrame(read.tolist(), columns=["margin", "coverage"]).assign(query=owner)
    values = _pool_copies(readings, defense, readout)
    tokens = [
        sum(len(prompt.append_prefix(readout.response_prefix)) for prompt in readings) for readings in prompts
    ]
    frame = pd.DataFrame(
        {
            "query": [query.id for query in queries],
            "pair": [query.pair for query in queries],
            "category": [query.category for query in queries],
            "harmful": [query.harmful for query in queries],
            "attack": session.attack.name,
            "defense": condition,
            "margin": values["margin"],
            "p_refuse": expit(values["margin"] - readout.threshold),
            "prompt_tokens": tokens,
            "coverage": values["coverage"],
        },
        columns=list(SCORE_COLUMNS),
    )
    copies = [len(readings) // max(1, len(readout.questions)) for readings in prompts]
    return frame.assign(readings=copies, vote=values["vote"]) if max(copies) > 1 else frame


def _pool_copies(copy_scores: pd.DataFrame, defense: Defense, readout: Readout) -> pd.DataFrame:
    """What becomes of the readings of each query: one margin, one coverage, and the share that refuses."""
    # What is asked about a reading has one mean.
    copy_scores = copy_scores.groupby(copy_scores.index // max(1, len(readout.questions))).mean()
    copy_scores["vote"] = copy_scores["margin"] > readout.threshold
    return copy_scores.groupby("query").agg({"margin": defense.pool, "coverage": "mean", "vote": "mean"})


def iterate_condition_scores(
    session: ModelSession,
    conditions: Mapping[str, Defense],
    queries: Sequence[Query],
    readout: Readout,
    on_progress: Callable[[str, int], None] = lambda name, prompts: None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the margins of each condition as it is finished, so that an interrupted run keeps what it has.

    Args:
        session: the model.
        conditions: by their names in the tables, the undefended one first.
        queries: what is asked.
        readout: how a forward pass becomes a margin.
        on_progress: told how many more queries of a condition are finished.
        on_failure: told of a condition that cannot be scored; the others go on, unless it is the undefended one.
    """
    for name, defense in conditions.items():
        try:
            frame = score_condition(session, name, defense, queries, readout, partial(on_progress, name))
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(name, error)
            if name == UNDEFENDED:
                return
        else:
            yield name, frame
