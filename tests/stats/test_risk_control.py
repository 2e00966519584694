"""Certified candidates keep to their limit as often as promised, in simulations of calibration samples."""

import numpy as np
import pandas as pd
import pytest
from planted_margins import make_classes_and_pairs
from scipy.special import ndtr, ndtri
from scipy.stats import beta, binomtest

from analysis.stats.bootstrap import ResamplingUnits
from analysis.stats.risk_control import (
    ERROR_BUDGET,
    ORDERING_SHARE,
    certify_candidates,
    compute_risk_p_values,
    count_queries_needed,
    estimate_smooth_rates,
    order_candidates,
    split_ordering_units,
)

N_DRAWS, N_CANDIDATES = 400, 60


def certify_all(losses, *args):
    """Return the certificate of candidates whose losses (candidates × queries) are all known."""
    return certify_candidates(losses.__getitem__, *losses.shape, *args)


def draw_margins(rng, centers, n):
    """Return margins, draws × candidates × queries; candidates agree on which queries are hard."""
    common, own = rng.normal(size=(N_DRAWS, 1, n)), rng.normal(size=(N_DRAWS, len(centers), n))
    return centers[:, None] + np.sqrt(0.6) * common + np.sqrt(0.4) * own


@pytest.mark.parametrize(
    ("n_benign", "limit", "spread"),
    [(48, 0.2, 0.0), (72, 0.05, 0.4), (72, 0.2, 0.1), (150, 0.05, 0.0), (150, 0.1, 0.4)],
)
def test_the_limit_is_exceeded_at_most_as_often_as_promised(n_benign, limit, spread):
    """Spread 0: all candidates are just above the limit, the worst case. Candidates are correlated."""
    rng = np.random.default_rng(0)
    # Half of the candidates are above the limit in any case; with a spread, some are far from it.
    centers = ndtri(limit * 1.02) + spread * rng.normal(size=N_CANDIDATES)
    exceeds = ndtr(centers) > limit
    gains = ndtr(centers + 1)  # who refuses more benign queries refuses more harmful ones
    margins = draw_margins(rng, centers, n_benign)
    n_ordering = round(ORDERING_SHARE * n_benign)
    smooth = [estimate_smooth_rates(draw[:, :n_ordering]) for draw in margins]
    certified = np.array(
        [
            certify_all(draw[:, n_ordering:] > 0, [order_candidates(rates, gains)], limit).is_certified
            for draw, rates in zip(margins, smooth, strict=True)
        ]
    )
    monte_carlo_error = np.sqrt(ERROR_BUDGET * (1 - ERROR_BUDGET) / N_DRAWS)
    assert (certified & exceeds).any(1).mean() <= ERROR_BUDGET + 2 * monte_carlo_error
    # The test has teeth: a test of each candidate by itself breaks the promise for the one that is chosen.
    refused = (margins > 0).sum(2)
    passes = beta.cdf(limit, refused + 0.5, n_benign - refused + 0.5) >= 1 - ERROR_BUDGET
    chosen = np.where(passes, gains, -1).argmax(1)
    assert (passes.any(1) & exceeds[chosen]).mean() > ERROR_BUDGET + 2 * monte_carlo_error


def test_the_budget_is_nearly_used_at_the_limit_and_shared_by_several_starting_points():
    rng = np.random.default_rng(1)
    losses = draw_margins(rng, np.full(4, ndtri(0.2001)), 150) > 0
    for sequences in ([[0, 1, 2, 3]], [[0, 1], [2, 3]]):
        errors = np.mean([certify_all(draw, sequences, 0.2).is_certified.any() for draw in losses])
        assert 0.02 < errors <= 0.1 + 2 * np.sqrt(0.09 / N_DRAWS)
    # Without an order, the same four candidates break the promise.
    assert (np.stack([compute_risk_p_values(d.sum(1), 150, 0.2) for d in losses]) <= 0.1).any(1).mean() > 0.11


def test_candidates_far_below_the_limit_are_certified_up_to_the_first_failure():
    n = 100
    losses = np.arange(n) < np.array([0, 2, 40, 1])[:, None]
    certificate = certify_all(losses, [[0, 1, 2, 3]], 0.2)
    assert certificate.is_certified.tolist() == [True, True, False, False]
    assert certificate.was_tested.tolist() == [True, True, True, False]
    assert certificate.n_losses.tolist() == [0, 2, 40, 0] and certificate.n_queries == n
    assert np.isnan(certificate.p_values[3])  # nothing was read after the failure
    for k, p_value in zip(certificate.n_losses[:3], certificate.p_values[:3], strict=True):
        assert p_value == pytest.approx(binomtest(k, n, 0.2, alternative="less").pvalue)
    # Half the budget for each of two sequences: of 50 queries, none may be refused at 5 %.
    few = np.zeros((2, 50), dtype=bool)
    assert certify_all(few, [[0], [1]], 0.05).is_certified.tolist() == [False, False]
    assert certify_all(few, [[0, 1]], 0.05).is_certified.tolist() == [True, True]
    assert certify_all(~few, [[0, 1]], 1.0).is_certified.all()  # no rate exceeds 100 %
    with pytest.raises(ValueError, match="twice"):
        certify_all(few, [[0, 0]], 0.05)
    with pytest.raises(ValueError, match="between 0 and 1"):
        certify_all(few, [[0]], 0.05, 1.0)


def test_no_candidate_of_the_order_is_superfluous_and_the_safest_is_first():
    rng = np.random.default_rng(2)
    rates, gains = np.round(rng.random((2, 50)), 1)
    sequence = order_candidates(rates, gains)
    assert (np.diff(rates[sequence]) > 0).all() and (np.diff(gains[sequence]) > 0).all()
    for candidate in range(50):
        kept = [other for other in sequence if rates[other] <= rates[candidate]]
        assert max(gains[kept]) >= gains[candidate]


def test_pairs_are_kept_whole_when_the_ordering_queries_are_drawn():
    is_harmful, names = make_classes_and_pairs()
    units = ResamplingUnits.from_pairs(pd.Series(names), is_harmful)
    is_ordering = split_ordering_units(units, 0.25, seed=3)
    assert is_ordering.sum() == 0.25 * len(is_harmful)
    assert (pd.Series(is_ordering).groupby(units.unit_of_query).nunique() == 1).all()
    assert (is_ordering != split_ordering_units(units, 0.25, seed=4)).any()
    assert (is_ordering == split_ordering_units(units, 0.25, seed=3)).all()
    part = units.select_queries(is_ordering)
    assert len(part.composition) == len(set(units.unit_of_query[is_ordering]))


def test_a_candidate_passes_with_the_number_of_queries_that_it_needs_and_not_with_fewer():
    for rate, limit in ((0.0, 0.05), (0.02, 0.05), (0.1, 0.2)):
        n = count_queries_needed(rate, limit)
        assert n is not None
        for size, passes in ((n, True), (n - 1, False)):
            p_value = compute_risk_p_values(np.array([int(np.ceil(rate * size - 1e-9))]), size, limit)[0]
            assert (p_value <= ERROR_BUDGET) == passes
    assert count_queries_needed(0.2, 0.2) is None and count_queries_needed(0.0, 0.0) is None
