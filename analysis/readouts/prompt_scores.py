"""Scores of prompts: first-token logits → margin and coverage, with a cache (steps 4 and 5)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.models.cache import CacheKey, ScoreCache, describe_computation
from analysis.models.engine import Engine
from analysis.models.loading import LoadedModel
from analysis.models.numerics import check_finite
from analysis.models.session import (
    MemberIds,
    PromptLogitCallback,
    iterate_defended_logits,
    list_blend_members,
)
from analysis.readouts.bounds import bound_margins, needs_most_probable
from analysis.readouts.readout import Readout
from analysis.served.served_engine import ServedEngine
from defenses.contract import Defense

SCORE_NAMES = ("margin", "coverage", "margin_low", "margin_high")


def score_prompts(
    loaded_model: LoadedModel,
    engine: Engine,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    readout: Readout,
    score_cache: ScoreCache | None = None,
    on_progress: Callable[[int], None] = lambda n_prompts: None,
    member_prompts: Sequence[MemberIds] = (),
) -> Float[Tensor, "prompts values"]:
    """Return margin (nats; positive refuses) and coverage of every prompt; cached scores are not recomputed.

    Of a server that lists some tokens only, margins are known up to bounds: then these follow, and the margin
    is halfway between them. The columns are the first of `SCORE_NAMES`.

    Args:
        loaded_model: the model.
        engine: runs the model.
        defense: applied to the model while it runs.
        prompts: token ids, the readout's response prefix included.
        readout: reduces first-token logits to a margin.
        score_cache: scores of earlier runs, to which new ones are added; None disables caching.
        on_progress: called with the number of prompts finished since the last call.
        member_prompts: as for `iterate_defended_logits`, with the response prefix.

    Raises:
        UserError: if a score is no finite number.
    """
    if not _is_cacheable(defense):
        score_cache = None
    if isinstance(engine, ServedEngine) and not engine.lists_all:
        return _score_bounds(loaded_model, engine, defense, prompts, readout, score_cache, on_progress)
    cache_key = _make_score_key(loaded_model, defense, readout)
    members = list(member_prompts) or [()] * len(prompts)
    keys = [cache_key.make_key(ids, *more) for ids, more in zip(prompts, members, strict=True)]
    scores = score_cache.read_scores(keys) if score_cache is not None else {}
    if score_cache is not None:
        score_cache.n_hits += sum(key in scores for key in keys)
    # Identical prompts have the same key and are scored once.
    new_rows = list({key: row for row, key in enumerate(keys) if key not in scores}.values())
    new_prompts, new_members = [prompts[row] for row in new_rows], [members[row] for row in new_rows]
    for batch_rows, values in _iterate_scores(
        loaded_model, engine, defense, new_prompts, new_members, readout
    ):
        batch_keys = [keys[new_rows[row]] for row in batch_rows]
        new_scores = dict(zip(batch_keys, map(tuple, values.tolist()), strict=True))
        if score_cache is not None:  # which skips scores that are not finite
            score_cache.write_scores((key, *score) for key, score in new_scores.items())
        scores |= new_scores
        on_progress(len(batch_rows))
    on_progress(len(prompts) - len(new_rows))
    result = torch.tensor([scores[key] for key in keys], dtype=torch.float64)
    check_finite(loaded_model, result.abs())
    return result


def _score_bounds(
    loaded_model: LoadedModel,
    engine: ServedEngine,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    readout: Readout,
    score_cache: ScoreCache | None,
    on_progress: Callable[[int], None],
) -> Float[Tensor, "prompts 4"]:
    """Return what `score_prompts` returns, with the bounds of margins, each in a cached row of its own."""
    ends = [_make_score_key(loaded_model, defense, readout, end) for end in ("low", "high")]
    keys = [(ends[0].make_key(ids), ends[1].make_key(ids)) for ids in prompts]
    known = score_cache.read_scores([key for pair in keys for key in pair]) if score_cache is not None else {}
    if score_cache is not None:
        score_cache.n_hits += sum(pair[0] in known and pair[1] in known for pair in keys)
    new_rows = list({pair: row for row, pair in enumerate(keys) if not known.keys() >= set(pair)}.values())
    new_prompts = [prompts[row] for row in new_rows]
    on_progress(len(prompts) - len(new_rows))
    if new_rows:
        for index, listed in engine.iterate_listed_tokens(
            new_prompts, readout.ids, needs_most_probable(readout)
        ):
            low, high, coverage = bound_margins(readout, listed)[0].tolist()
            pair = keys[new_rows[index]]
            rows = {pair[0]: (low, coverage), pair[1]: (high, coverage)}
            if score_cache is not None:
                score_cache.write_scores((key, *score) for key, score in rows.items())
            known |= rows
            on_progress(1)
    lows, highs = (torch.tensor([known[pair[end]] for pair in keys], dtype=torch.float64) for end in (0, 1))
    return torch.stack([(lows[:, 0] + highs[:, 0]) / 2, lows[:, 1], lows[:, 0], highs[:, 0]], dim=1)


def make_score_writer(
    loaded_model: LoadedModel, defense: Defense, readout: Readout, score_cache: ScoreCache | None
) -> PromptLogitCallback:
    """Return a function that caches the scores of prompts whose first-token logits were computed elsewhere.

    Args:
        loaded_model: the model.
        defense: applied to the model while the logits were computed.
        readout: reduces first-token logits to a margin.
        score_cache: receives the scores; None discards them.
    """
    reads_other_prompts = readout.questions or readout.branches or readout.response_prefix != readout.prefill
    if score_cache is None or reads_other_prompts or not _is_cacheable(defense):
        return lambda prompts, logits: None
    cache_key = _make_score_key(loaded_model, defense, readout)

    def write_scores(prompts: Sequence[tuple[int, ...]], logits: Float[Tensor, "rows vocab"]) -> None:
        values = readout.compute_margins(logits)
        check_finite(loaded_model, values.abs())
        scores = zip(prompts, values.tolist(), strict=True)
        score_cache.write_scores((cache_key.make_key(ids), *score) for ids, score in scores)

    return write_scores


def _iterate_scores(
    loaded_model: LoadedModel,
    engine: Engine,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    members: Sequence[MemberIds],
    readout: Readout,
) -> Iterator[tuple[list[int], Float[Tensor, "rows 2"]]]:
    """Yield the indices and scores of prompts, once the logits of all their continuations are computed."""
    if not prompts:
        return
    continuations = readout.continuations
    sequences = [(*prompt, *tokens) for prompt in prompts for tokens in continuations]
    member_sequences = [
        tuple((*ids, *tokens) for ids in prompt_members)
        for prompt_members in members
        for tokens in continuations
    ]
    # Terms of prompts, some of whose continuations are in a later batch.
    pending: dict[int, dict[int, Tensor]] = defaultdict(dict)

    def compute_terms(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows terms"]:
        # Checked here, while the defense is applied, so that a damaged weight of it is found.
        terms = readout.compute_terms(logits)
        check_finite(loaded_model, terms.abs())
        return terms

    for indices, values in iterate_defended_logits(
        engine, loaded_model, defense, sequences, compute_terms, member_sequences
    ):
        finished: dict[int, Tensor] = {}
        for index, terms in zip(indices, values, strict=True):
            row, number = divmod(index, len(continuations))
            pending[row][number] = terms
            if len(pending[row]) == len(continuations):
                finished[row] = torch.stack([terms for _, terms in sorted(pending.pop(row).items())])
        if finished:
            yield list(finished), readout.combine_terms(torch.stack(list(finished.values())))


def _is_cacheable(defense: Defense) -> bool:
    """Whether scores can be cached; not if nothing is known about a user-defined change of the model."""
    return all(member.cacheable_fingerprint() is not None for _, member in list_blend_members(defense))


def _make_score_key(
    loaded_model: LoadedModel, defense: Defense, readout: Readout, bound: str | None = None
) -> CacheKey:
    """Return the key of a condition's scores, or of a bound of them; they depend on the token ids besides."""
    members = [(weight, member.cacheable_fingerprint()) for weight, member in list_blend_members(defense)]
    settings = {**describe_computation(loaded_model), "arms": members, "readout": readout.scoring_settings}
    return CacheKey(settings | ({"bound": bound} if bound else {}))
