"""Bounds of margins where only some first tokens are listed: the true margin always lies between them."""

from __future__ import annotations

import math

import pytest
import torch

from analysis.readouts.bounds import UnboundedMarginError, bound_margins
from analysis.readouts.readout import OpeningBranch, Readout
from analysis.served.listed_tokens import ListedTokens, TokenList

VOCAB = 60
IDS = (7, 2, 30, 41, 55)
WORDS = Readout("words", tuple("abcde"), IDS, (0.5, 0.5, -1 / 3, -1 / 3, -1 / 3))
LOG_ODDS = Readout("log-odds", tuple("abcde"), IDS, (0.2,) * 5, is_log_odds=True)


def make_outcome(sharpness: float) -> Readout:
    """Return an outcome readout with values from 0.05 to 0.9."""
    weights = (0.7, 0.3, 0.1, -0.1, -0.15)
    return Readout("outcome", tuple("abcde"), IDS, weights, base_value=0.2, sharpness=sharpness)


def list_most_probable(logits: torch.Tensor, n_listed: int, also: tuple[int, ...] = ()) -> TokenList:
    """Return the list of a server: the most probable tokens, and some others that were asked for."""
    log_probabilities = logits.double().log_softmax(0)
    top = log_probabilities.topk(n_listed)
    cap = float(top.values[-1])
    listed = {int(one): float(log_probabilities[one]) for one in (*top.indices.tolist(), *also)}
    return TokenList(listed, cap)


@pytest.mark.parametrize("readout", [LOG_ODDS, make_outcome(1.0), make_outcome(2.0), make_outcome(8.0)])
def test_the_true_margin_and_that_of_every_possible_completion_lie_between_the_bounds(readout):
    drawn = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40, VOCAB, generator=drawn)
    if readout.is_log_odds:
        logits[:, IDS[0]] += 9  # listed; else there is no lower bound
    listed = ListedTokens.from_lists([list_most_probable(row, 10) for row in logits], VOCAB)
    low, high, coverage = bound_margins(readout, listed).T
    assert torch.isfinite(low).all() and (high - low > 1e-9).any()
    true = readout.compute_margins(logits.double())
    assert ((low <= true[:, 0] + 1e-9) & (true[:, 0] <= high + 1e-9)).all()
    assert (coverage <= true[:, 1] + 1e-9).all()
    # Other distributions that have the same list: the rest is divided anew, below the cap.
    for _ in range(50):
        shares = torch.rand(40, VOCAB, generator=drawn, dtype=torch.float64) * ~listed.is_listed
        others = shares / shares.sum(1, keepdim=True) * listed.other_mass[:, None]
        fits = (others <= listed.other_cap.exp()[:, None]).all(1)
        possible = torch.where(listed.is_listed, listed.log_probabilities, others.log())
        margins = readout.compute_margins(possible)[:, 0]
        assert (((low <= margins + 1e-9) & (margins <= high + 1e-9)) | ~fits).all() and fits.sum() > 20


def test_bounds_by_hand():
    """Two of four tokens are listed; 0.2 is left, and no token of the rest has more than 0.15."""
    tokens = TokenList({0: math.log(0.5), 1: math.log(0.3)}, math.log(0.15))
    listed = ListedTokens.from_lists([tokens], 4)
    outcome = Readout("outcome", ("a", "b"), (2, 0), (0.7, -0.1), base_value=0.2)
    low, high, coverage = bound_margins(outcome, listed)[0].tolist()
    expected = [0.2 - 0.1 * 0.5, 0.2 - 0.1 * 0.5 + 0.7 * 0.15]
    assert [low, high] == pytest.approx([math.log(q / (1 - q)) for q in expected])
    assert coverage == pytest.approx(0.5)
    odds = Readout("log-odds", ("a", "b"), (2, 0), (0.5, 0.5), is_log_odds=True)
    low, high, _ = bound_margins(odds, listed)[0].tolist()
    # Token 2 has 0.05 at least, because token 3 has 0.15 at most.
    assert [low, high] == pytest.approx([math.log(0.55 / 0.45), math.log(0.65 / 0.35)])


@pytest.mark.parametrize("readout", [WORDS, LOG_ODDS, make_outcome(1.0)])
def test_a_margin_whose_tokens_are_all_listed_is_exact(readout):
    logits = 2 * torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(1))
    lists = [list_most_probable(row, 1, IDS) for row in logits]
    low, high, _ = bound_margins(readout, ListedTokens.from_lists(lists, VOCAB)).T
    true = readout.compute_margins(logits.double())[:, 0]
    assert torch.allclose(low, true, atol=1e-9) and torch.allclose(high, true, atol=1e-9)


def test_what_has_no_bounds_is_refused_with_the_next_step():
    logits = torch.zeros(VOCAB)
    logits[[50, 51]] = 5.0
    listed = ListedTokens.from_lists([list_most_probable(logits, 2)], VOCAB)
    with pytest.raises(UnboundedMarginError, match=r"5 of its 5 tokens are not listed.*--readout outcome"):
        bound_margins(WORDS, listed)
    with pytest.raises(UnboundedMarginError, match="none of its tokens is listed"):
        bound_margins(LOG_ODDS, listed)
    deep = Readout(
        "outcome-3", ("a",), (7,), (0.5,), base_value=0.2, branches=(OpeningBranch((7,), (2,), (0.1,)),)
    )
    with pytest.raises(UnboundedMarginError, match="outcome-3 reads several tokens"):
        bound_margins(deep, listed)
    with pytest.raises(ValueError, match="add up to 2"):
        ListedTokens.from_lists([TokenList({0: 0.0, 1: 0.0})], VOCAB)
