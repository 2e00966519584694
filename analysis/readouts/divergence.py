"""Divergence of a defended model's first-token distribution from the undefended model's on a query."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.models.cache import CacheKey, describe_computation
from analysis.models.chat_template import Prompt
from analysis.models.numerics import check_finite
from analysis.models.session import ModelSession, iterate_defended_logits, list_blend_members
from defenses.contract import Defense, QueryChat

# Queries whose distributions, undefended and defended, are held in memory at a time: 2 × 50 MB if the
# vocabulary has 50,000 tokens.
_MAX_HELD_QUERIES = 256


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


def iterate_divergences(
    session: ModelSession,
    undefended: Defense,
    conditions: Mapping[str, Defense],
    query_chats: Sequence[QueryChat],
    prefix: tuple[int, ...],
    on_failure: Callable[[str, Exception], None],
) -> Iterator[tuple[str, list[float] | None]]:
    """Yield each condition with the divergences KL(undefended ‖ defended) of some of the queries, in nats.

    The distributions are those of the first token that the model generates, over the whole vocabulary.
    The distribution of a defense that reads several copies of a query is the mean of those of its copies;
    that of a blend follows from the blended logits. The queries are taken in parts, whose undefended
    distributions all conditions share; a condition is yielded once for each part, with None if it has no
    first token to compare.

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
    """Reads the first tokens of some queries; the undefended ones once, when they are first needed."""

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
        self._distributions: dict[int, Float[Tensor, " vocab"]] = {}

    def compute_divergences(
        self, defense: Defense, prompts_by_query: Sequence[Sequence[Prompt]]
    ) -> list[float]:
        """Return the divergence of each query, from the cache where it is known."""
        session = self._session
        fingerprints = [
            (weight, member.cacheable_fingerprint()) for weight, member in list_blend_members(defense)
        ]
        is_known = all(fingerprint is not None for _, fingerprint in fingerprints)
        cache = session.score_cache if is_known else None
        settings = {**describe_computation(session.loaded_model), "divergence": fingerprints}
        cache_key = CacheKey(settings)
        keys = [
            cache_key.make_key(reference, *self._list_ids(prompts))
            for reference, prompts in zip(self._references, prompts_by_query, strict=True)
        ]
        known = cache.read_scores(keys) if cache is not None else {}
        rows = [row for row, key in enumerate(keys) if key not in known]
        new = dict(zip(rows, self._compute_missing(defense, prompts_by_query, rows), strict=True))
        if cache is not None:
            cache.write_scores((keys[row], value, 1.0) for row, value in new.items())
        return [new[row] if row in new else known[key][0] for row, key in enumerate(keys)]

    def _list_ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Return the token ids of the copies of a query, and of their members."""
        return [
            ids
            for prompt in prompts
            for ids in (prompt.append_prefix(self._prefix), *prompt.list_member_ids(self._prefix))
        ]

    def _compute_missing(
        self, defense: Defense, prompts_by_query: Sequence[Sequence[Prompt]], rows: Sequence[int]
    ) -> list[float]:
        """Return the divergences of some queries."""
        if not rows:
            return []
        self._read_references(rows)
        prompts = [(row, prompt) for row in rows for prompt in prompts_by_query[row]]
        batches = iterate_defended_logits(
            self._session.engine,
            self._session.loaded_model,
            defense,
            [prompt.append_prefix(self._prefix) for _, prompt in prompts],
            _compute_log_probabilities,
            [prompt.list_member_ids(self._prefix) for _, prompt in prompts],
        )
        mixtures: dict[int, Float[Tensor, " vocab"]] = {}
        for indices, log_probabilities in batches:
            for index, values in zip(indices, log_probabilities, strict=True):
                row = prompts[index][0]
                weighted = values - math.log(len(prompts_by_query[row]))
                mixtures[row] = torch.logaddexp(mixtures[row], weighted) if row in mixtures else weighted
        divergences = [compute_divergence(self._distributions[row], mixtures[row]) for row in rows]
        check_finite(self._session.loaded_model, torch.tensor(divergences))
        return divergences

    def _read_references(self, rows: Sequence[int]) -> None:
        """Read the undefended distributions of some queries, if they are not known yet."""
        missing = [row for row in rows if row not in self._distributions]
        if not missing:
            return
        batches = iterate_defended_logits(
            self._session.engine,
            self._session.loaded_model,
            self._undefended,
            [self._references[row] for row in missing],
            _compute_log_probabilities,
        )
        for indices, log_probabilities in batches:
            self._distributions |= {
                missing[index]: values for index, values in zip(indices, log_probabilities, strict=True)
            }


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
