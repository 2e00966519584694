"""Weights of the logits equal derivatives that are computed a second way, and averages give differences."""

import pytest
import torch
from conftest import LOG_ODDS_READOUT, OUTCOME_READOUT, TOY_READOUT, VOCAB, compute_autograd_weights

from analysis.mechanism.logit_weights import (
    PATH_TOLERANCE,
    average_logit_gradients,
    compute_logit_gradients,
)
from analysis.readouts.readout import Readout

SHARP_READOUT = Readout("outcome", ("a", "b", "c"), (7, 2, 5), (0.7, 0.2, -0.19), base_value=0.2, sharpness=8)
READOUTS = (TOY_READOUT, LOG_ODDS_READOUT, OUTCOME_READOUT, SHARP_READOUT)


def draw_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    logits = scale * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[:, [300, 301, 302, 7, 2, 5]] += 3 * scale  # so that the tokens of the readouts matter
    return logits


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: f"{readout.name}-{readout.sharpness:g}")
def test_weights_are_the_derivatives_of_the_margin(readout: Readout) -> None:
    logits = draw_logits(0).double()
    weights = compute_logit_gradients(readout, logits)
    assert torch.allclose(weights, compute_autograd_weights(readout, logits), atol=1e-9)
    assert weights.abs().sum(1).max() > 0.05
    assert weights.sum(1).abs().max() < 1e-4  # a constant added to all logits changes no margin


def test_the_remainder_of_log_odds_is_the_difference_of_two_entropies() -> None:
    """For any logits z, logsumexp(z) = Σ p z + H(p), where p = softmax(z)."""
    logits = draw_logits(1)
    ids = list(LOG_ODDS_READOUT.ids)
    others = [token for token in range(VOCAB) if token not in ids]
    entropies = [
        torch.distributions.Categorical(logits=logits[:, tokens].double()).entropy()
        for tokens in (ids, others)
    ]
    weighted_logits = (compute_logit_gradients(LOG_ODDS_READOUT, logits) * logits).sum(1)
    remainders = LOG_ODDS_READOUT.compute_margins(logits)[:, 0] - weighted_logits
    assert torch.allclose(remainders, entropies[0] - entropies[1], atol=1e-4)
    assert remainders.abs().min() > 0.5


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: f"{readout.name}-{readout.sharpness:g}")
def test_averaged_weights_give_the_whole_difference_of_two_margins(readout: Readout) -> None:
    before, after = draw_logits(2), draw_logits(3)
    averages = average_logit_gradients(readout, before, after)
    difference = readout.compute_margins(after)[:, 0] - readout.compute_margins(before)[:, 0]
    assert difference.abs().max() > 0.5
    assert torch.allclose((averages * (after - before)).sum(1).double(), difference, atol=PATH_TOLERANCE)
    # A second way: derivatives by autograd at many equal steps.
    steps = [before + (after - before) * (step + 0.5) / 400 for step in range(400)]
    expected = torch.stack([compute_autograd_weights(readout, logits) for logits in steps]).mean(0)
    assert torch.allclose(averages, expected, atol=5e-3)
    # Weights at either end alone would miss most of a difference that a saturated readout has in between.
    if readout is SHARP_READOUT:
        at_ends = (compute_logit_gradients(readout, before) + compute_logit_gradients(readout, after)) / 2
        assert ((at_ends * (after - before)).sum(1) - difference).abs().max() > 0.5


def test_weights_between_equal_runs_are_those_of_the_run() -> None:
    logits = draw_logits(4)
    averages = average_logit_gradients(OUTCOME_READOUT, logits, logits)
    assert torch.allclose(averages, compute_logit_gradients(OUTCOME_READOUT, logits), atol=1e-6)


def test_each_row_has_the_average_that_it_has_alone() -> None:
    """Rows need different numbers of points; those that need more must not be mixed up."""
    before, after = draw_logits(5), draw_logits(6)
    after[1] = before[1] + 0.01  # needs the fewest points
    together = average_logit_gradients(SHARP_READOUT, before, after)
    for row in range(len(before)):
        alone = average_logit_gradients(SHARP_READOUT, before[row : row + 1], after[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-6)
