"""Candidates whose over-refusal stays within a limit, certified together: fixed-sequence testing.

Many candidates are tried, so a test of each by itself would certify some that exceed the limit by chance.
Fixed-sequence testing keeps the chance of any such error within a budget, however many candidates there are
and however their losses depend on each other, if the order of the tests is chosen without the tested queries
(Angelopoulos et al. 2021, Learn then Test, https://arxiv.org/abs/2110.01052). As in Pareto testing
(Laufer-Goldshtein et al. 2022, https://arxiv.org/abs/2210.07913), one part of the calibration queries
determines the order, and the other part is tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import ndtr
from scipy.stats import binom

from analysis.stats.bootstrap import ResamplingUnits

ERROR_BUDGET = 0.1  # highest probability that any certified candidate exceeds the limit
# Share of the calibration queries that determine the order of the tests. In simulations with 72 and 150
# benign queries, a quarter certified more than a third or a half: what is tested decides what can pass.
ORDERING_SHARE = 0.25
_MAX_QUERIES_NEEDED = 20_000  # beyond this number, no number is given


@dataclass(frozen=True)
class RiskCertificate:
    """Which candidates are certified to stay within a limit, all at once.

    Attributes:
        is_certified: whether each candidate is certified.
        was_tested: whether each candidate was tested; a sequence ends with its first failure.
        p_values: p-value of each tested candidate for "its loss exceeds the limit"; valid for the tests only
            in their order. NaN for the others.
        n_losses: number of losses of each tested candidate on the tested queries; 0 for the others.
        n_queries: number of tested queries.
    """

    is_certified: Bool[np.ndarray, " candidates"]
    was_tested: Bool[np.ndarray, " candidates"]
    p_values: Float[np.ndarray, " candidates"]
    n_losses: Int[np.ndarray, " candidates"]
    n_queries: int


def compute_risk_p_values(
    n_losses: Int[np.ndarray, " candidates"], n_queries: int, limit: float
) -> Float[np.ndarray, " candidates"]:
    """Return the exact binomial p-value of each candidate for the hypothesis "loss rate above the limit".

    It is P(at most `n_losses` losses) at a rate of `limit`. A p-value of at most δ means that the upper end
    of the one-sided Clopper-Pearson interval at confidence 1 − δ is within the limit.

    >>> compute_risk_p_values(np.array([0, 1]), 45, 0.05).round(3).tolist()
    [0.099, 0.335]

    Args:
        n_losses: number of losses of each candidate, on independent queries.
        n_queries: number of queries.
        limit: highest allowed loss rate, 0 to 1.
    """
    if limit >= 1:  # no rate exceeds it
        return np.zeros(len(n_losses))
    return np.asarray(binom.cdf(n_losses, n_queries, limit), dtype=float)


def certify_candidates(
    read_losses: Callable[[int], Bool[np.ndarray, " n"]],
    n_candidates: int,
    n_queries: int,
    sequences: Sequence[Sequence[int]],
    limit: float,
    error_budget: float = ERROR_BUDGET,
) -> RiskCertificate:
    """Test candidates in fixed sequences; certify each until the first one of its sequence that fails.

    The guarantee: with a probability of at least 1 − `error_budget` over the tested queries, every certified
    candidate has a loss rate of at most `limit` on new queries of the same kind. Each sequence may spend
    `error_budget` divided by the number of sequences. In one sequence, an error requires that the first
    candidate above the limit passes, which happens with at most that probability; later ones are not tested
    unless it passes, so their number does not matter. Losses are read only of the candidates that are tested.

    >>> losses = np.arange(60) < np.array([[0], [20], [0]])
    >>> certify_candidates(losses.__getitem__, 3, 60, [[0, 1, 2]], 0.05).is_certified.tolist()
    [True, False, False]

    Args:
        read_losses: called with the index of a candidate; returns whether it makes the error on each query
            (refuses a benign query). The queries are independent of each other and were not used to choose
            the sequences or the candidates.
        n_candidates: number of candidates.
        n_queries: number of tested queries.
        sequences: indices of candidates in the order of their tests; several sequences are several starting
            points. A candidate in none of them is not tested.
        limit: highest allowed loss rate, 0 to 1.
        error_budget: highest probability δ that any certified candidate exceeds the limit.

    Raises:
        ValueError: if the budget is not between 0 and 1, or a sequence names a candidate twice.
    """
    if not 0 < error_budget < 1:
        raise ValueError(f"an error budget is between 0 and 1, not {error_budget}")
    if any(len(set(sequence)) < len(sequence) for sequence in sequences):
        raise ValueError("a sequence tests a candidate twice")
    is_certified, was_tested = np.zeros(n_candidates, dtype=bool), np.zeros(n_candidates, dtype=bool)
    n_losses, p_values = np.zeros(n_candidates, dtype=int), np.full(n_candidates, np.nan)
    for sequence in sequences:
        for candidate in sequence:
            was_tested[candidate] = True
            n_losses[candidate] = int(read_losses(candidate).sum())
            p_values[[candidate]] = compute_risk_p_values(n_losses[[candidate]], n_queries, limit)
            if p_values[candidate] > error_budget / len(sequences):
                break
            is_certified[candidate] = True
    return RiskCertificate(is_certified, was_tested, p_values, n_losses, n_queries)


def estimate_smooth_rates(margins: Float[np.ndarray, "candidates n"]) -> Float[np.ndarray, " candidates"]:
    """Return the share of positive margins of each candidate, if its margins were normally distributed.

    For the order of tests: among few queries, many candidates have the same observed rate, and the best
    of them looks better than it is.

    >>> estimate_smooth_rates(np.array([[-1.0, 1.0], [-3.0, -1.0]])).round(3).tolist()
    [0.5, 0.023]

    Args:
        margins: margins of the queries, nats above the threshold.
    """
    return np.asarray(ndtr(margins.mean(1) / (margins.std(1) + 1e-9)))


def order_candidates(
    loss_rates: Float[np.ndarray, " candidates"], gains: Float[np.ndarray, " candidates"]
) -> list[int]:
    """Return the candidates to test, in the order of their loss rates, lowest first.

    A candidate is left out if another one with a loss rate no higher has a gain no lower: certifying it would
    not change which certified candidate has the highest gain.

    >>> order_candidates(np.array([0.2, 0.0, 0.1, 0.3]), np.array([0.8, 0.1, 0.05, 0.9]))
    [1, 0, 3]

    Args:
        loss_rates: loss rate of each candidate on queries that are not tested.
        gains: gain of each candidate, such as the share of harmful queries refused, on the same queries.
    """
    sequence: list[int] = []
    for candidate in np.lexsort([-gains, loss_rates]):
        if not sequence or gains[candidate] > gains[sequence[-1]]:
            sequence.append(int(candidate))
    return sequence


def split_ordering_units(units: ResamplingUnits, share: float, seed: int = 0) -> Bool[np.ndarray, " n"]:
    """Return which queries determine the order of the tests; the others are tested.

    Units, such as a harmful query and its benign twin, are kept whole, because their margins are dependent.
    Each kind of unit is split in the same proportion; of two or more, at least one determines the order.

    Args:
        units: units of the queries.
        share: share of the units that determine the order, 0 to 1.
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    is_ordering = np.zeros(len(units.composition), dtype=bool)
    for kind in np.unique(units.composition):
        members = rng.permutation(np.flatnonzero(units.composition == kind))
        is_ordering[members[: max(round(share * len(members)), int(len(members) > 1))]] = True
    return is_ordering[units.unit_of_query]


def count_queries_needed(loss_rate: float, limit: float, error_budget: float = ERROR_BUDGET) -> int | None:
    """Return the number of tested queries with which a candidate would pass, if its loss rate stays the same.

    >>> count_queries_needed(0.0, 0.05), count_queries_needed(0.02, 0.05), count_queries_needed(0.05, 0.05)
    (45, 132, None)

    Args:
        loss_rate: observed loss rate, 0 to 1.
        limit: highest allowed loss rate.
        error_budget: highest allowed p-value.

    Returns:
        The number, or None if the rate is not below the limit or more than 20,000 queries would be needed.
    """
    if loss_rate >= limit:
        return None
    start = math.ceil(math.log(error_budget) / math.log1p(-limit)) if limit < 1 else 1
    sizes = np.arange(max(start, 1), _MAX_QUERIES_NEEDED + 1)
    n_losses = np.ceil(loss_rate * sizes - 1e-9).astype(int)
    passes = np.flatnonzero(binom.cdf(n_losses, sizes, limit) <= error_budget)
    return int(sizes[passes[0]]) if len(passes) else None


def describe_guarantee(limit: float, error_budget: float = ERROR_BUDGET) -> str:
    """Return the guarantee of `certify_candidates` on over-refusal in plain words.

    >>> describe_guarantee(0.05)
    'In at least 90 of 100 calibration samples of this size, no certified combination would refuse more than 5% of new benign queries of this kind.'

    Args:
        limit: highest allowed share of benign queries refused.
        error_budget: highest probability that any certified candidate exceeds it.
    """  # noqa: E501
    return (
        f"In at least {100 * (1 - error_budget):.0f} of 100 calibration samples of this size, no certified "
        f"combination would refuse more than {100 * limit:g}% of new benign queries of this kind."
    )
