"""Divergence of a defended model's distributions of response tokens from those of the undefended model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.models.cache import CacheKey, describe_computation
from analysis.models.chat_template import Prompt
from analysis.models.engine import RemoteEngine
from analysis.models.generation import generate_token_ids
from analysis.models.numerics import check_finite
from analysis.models.session import ModelSession, iterate_defended_logits, list_blend_members
from defenses.contract import Defense, QueryChat

N_TOKENS = 12  # of the undefended response
# Queries whose distributions, undefended and defended, are held in memory at a time: 2 × 75 MB if the
# vocabulary has 50,000 tokens.
_MAX_HELD_QUERIES = 32


def has_first_token(defense: Defense, prompts: Sequence[Prompt], reference: Prompt) -> bool:
    """Return whether the first token of a defended response can be compared with that of the undefended one.

    It cannot if a detector may answer in place of the model, or if the defense writes the first tokens of the
    response itself.

    Args:
        defense: prepared for this model.
        prompts: prompts of a query under the defense.
        reference: prompt of the same query without it.
    """
    return not defense.detects and all(prompt.prefill == reference.prefill for prompt in prompts)


class Divergence(NamedTuple):
    """Divergences KL(undefended ‖ defended) of a query, in nats.

    Attributes:
        first: of the first token that the model generates.
        response: mean over the first `N_TOKENS` tokens of the undefended model's greedy response, and over
            the end of a shorter one; each follows the same tokens in both.
    """

    first: float
    response: float


def iterate_divergences(
    session: ModelSession,
    undefended: Defense,
    conditions: Mapping[str, Defense],
    query_chats: Sequence[QueryChat],
    prefix: tuple[int, ...],
    on_failure: Callable[[str, Exception], None],
) -> Iterator[tuple[str, list[Divergence] | None]]:
    """Yield each condition with the divergences of some of the queries.

    The distributions are those over the whole vocabulary. The distribution of a defense that reads several
    copies of a query is the mean of those of its copies. The first token of a blend follows from the blended
    logits, and the others from the defended model itself, as in its responses. The queries are taken in
    parts, whose undefended distributions all conditions share; a condition is yielded once for each part,
    with None if it has no first token to compare.

    Args:
        session: the model.
        undefended: the undefended model as a defense.
        conditions: condition name → defense, without the undefended one.
        query_chats: the queries, an attack applied.
        prefix: token ids with which responses start that are not prefilled.
        on_failure: called with a condition that failed and its exception; it is then left out.
    """
    failed: set[str] = set()
    for start in range(0, len(query_chats), _MAX_HELD_QUERIES):
        part = query_chats[start : start + _MAX_HELD_QUERIES]
        references = [prompts[0] for prompts in session.render_prompts(undefended, part)]
        reader = _PartReader(session, undefended, references, prefix)
        for name, defense in conditions.items():
            if name in failed:
                continue
            try:
                prompts_by_query = session.render_prompts(defense, part)
                is_defined = all(
                    has_first_token(defense, prompts, reference)
                    for prompts, reference in zip(prompts_by_query, references, strict=True)
                )
                divergences = reader.compute_divergences(defense, prompts_by_query) if is_defined else None
            except Exception as error:
                failed.add(name)
                on_failure(name, error)
            else:
                yield name, divergences


class _PartReader:
    """Reads the tokens of responses to some queries; the undefended ones once, when they are first needed."""

    def __init__(
        self,
        session: ModelSession,
        undefended: Defense,
        references: Sequence[Prompt],
        prefix: tuple[int, ...],
    ) -> None:
        self._session, self._undefended = session, undefended
        self._references = [reference.append_prefix(prefix) for reference in references]
        self._prefix = prefix
        # Of each query: the tokens before the last position that is read, and the log-probabilities.
        self._responses: dict[int, list[int]] = {}
        self._distributions: dict[int, Float[Tensor, "tokens vocab"]] = {}

    def compute_divergences(
        self, defense: Defense, prompts_by_query: Sequence[Sequence[Prompt]]
    ) -> list[Divergence]:
        """Return the divergences of each query, from the cache where they are known."""
        session = self._session
        fingerprints = [
            (weight, member.cacheable_fingerprint())
            for weight, member in ((1.0, defense), *list_blend_members(defense))
        ]
        is_known = all(fingerprint is not None for _, fingerprint in fingerprints)
        cache = session.score_cache if is_known else None
        ends = sorted(session.loaded_model.end_token_ids)
        settings = {"divergence": fingerprints, "tokens": N_TOKENS, "ends": ends}
        cache_key = CacheKey({**describe_computation(session.loaded_model), **settings})
        keys = [
            cache_key.make_key(reference, *self._list_ids(prompts))
            for reference, prompts in zip(self._references, prompts_by_query, strict=True)
        ]
        known = cache.read_scores(keys) if cache is not None else {}
        rows = [row for row, key in enumerate(keys) if key not in known]
        new = dict(zip(rows, self._compute_missing(defense, prompts_by_query, rows), strict=True))
        if cache is not None:
            cache.write_scores((keys[row], *value) for row, value in new.items())
        return [new[row] if row in new else Divergence(*known[key]) for row, key in enumerate(keys)]

    def _list_ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Return the token ids of the copies of a query, and of their members."""
        return [
            ids
            for prompt in prompts
            for ids in (prompt.append_prefix(self._prefix), *prompt.list_member_ids(self._prefix))
        ]

    def _compute_missing(
        self, defense: Defense, prompts_by_query: Sequence[Sequence[Prompt]], rows: Sequence[int]
    ) -> list[Divergence]:
        """Return the divergences of some queries."""
        if not rows:
            return []
        self._read_references(rows)
        prompts = [(row, prompt) for row in rows for prompt in prompts_by_query[row]]
        prompt_ids = [prompt.append_prefix(self._prefix) for _, prompt in prompts]
        responses = [self._responses[row] for row, _ in prompts]
        distributions = self._read_tokens(defense, prompt_ids, responses)
        if defense.logit_blend():
            members = [prompt.list_member_ids(self._prefix) for _, prompt in prompts]
            for indices, first in iterate_defended_logits(
                self._session.engine,
                self._session.loaded_model,
                defense,
                prompt_ids,
                _compute_log_probabilities,
                members,
            ):
                for index, values in zip(indices, first, strict=True):
                    distributions[index] = torch.cat([values[None], distributions[index][1:]])
        mixtures: dict[int, Float[Tensor, "tokens vocab"]] = {}
        for index, (row, _) in enumerate(prompts):
            weighted = distributions.pop(index) - math.log(len(prompts_by_query[row]))
            mixtures[row] = torch.logaddexp(mixtures[row], weighted) if row in mixtures else weighted
        divergences = []
        for row in rows:
            pairs = zip(self._distributions[row], mixtures.pop(row), strict=True)
            by_token = [compute_divergence(reference, other) for reference, other in pairs]
            divergences.append(Divergence(by_token[0], sum(by_token) / len(by_token)))
        check_finite(self._session.loaded_model, torch.tensor(divergences))
        return divergences

    def _read_references(self, rows: Sequence[int]) -> None:
        """Generate the undefended responses to some queries, if they are not known yet, and read them."""
        missing = [row for row in rows if row not in self._distributions]
        if not missing:
            return
        session, prompts = self._session, [self._references[row] for row in missing]
        with self._undefended.apply_to(session.loaded_model.model):
            responses = generate_token_ids(
                session.engine, prompts, N_TOKENS, session.loaded_model.end_token_ids
            )
        # The last position that is read follows the token before it.
        forced = [response[: N_TOKENS - 1] for response in responses]
        found = self._read_tokens(self._undefended, prompts, forced)
        for index, row in enumerate(missing):
            self._responses[row], self._distributions[row] = forced[index], found[index]

    def _read_tokens(
        self, defense: Defense, prompts: Sequence[tuple[int, ...]], responses: Sequence[Sequence[int]]
    ) -> dict[int, Float[Tensor, "tokens vocab"]]:
        """Return the log-probabilities after each prompt and after each token of its response, by prompt."""
        engine, model = self._session.engine, self._session.loaded_model.model
        sequences = [(*ids, *response) for ids, response in zip(prompts, responses, strict=True)]
        n_positions = [len(response) + 1 for response in responses]
        if isinstance(engine, RemoteEngine):  # it reads first tokens, so each position is a prompt's end
            ends = [
                ids[: len(ids) - n + 1 + number]
                for ids, n in zip(sequences, n_positions, strict=True)
                for number in range(n)
            ]
            values = engine.read_first_token(ends, _compute_log_probabilities)
            return dict(enumerate(values.split(n_positions)))
        found: dict[int, Float[Tensor, "tokens vocab"]] = {}
        with torch.inference_mode(), defense.apply_to(model), engine.read_responses(None):
            for rows, logits in engine.iterate_logits(sequences, n_positions):
                parts = _compute_log_probabilities(logits).split([n_positions[row] for row in rows])
                found.update(zip(rows, parts, strict=True))
        return found


def compute_divergence(reference: Float[Tensor, " vocab"], other: Float[Tensor, " vocab"]) -> float:
    """Return the Kullback-Leibler divergence of a distribution from a reference, in nats; at least 0.

    >>> reference, other = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(compute_divergence(reference, other), 4), compute_divergence(reference, reference)
    (0.1438, 0.0)

    Args:
        reference: log-probabilities of the distribution over which the mean is taken, nats.
        other: log-probabilities of the other one, nats.
    """
    p = reference.double().exp()
    terms = torch.where(p > 0, p * (reference.double() - other.double()), 0.0)
    return max(float(terms.sum()), 0.0)


def _compute_log_probabilities(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    """Return the log-probability of every token, on the CPU."""
    return logits.log_softmax(1).cpu()
