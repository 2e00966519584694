"""Weights of the logits in a margin: its gradient at the logits of a run, or averaged between two runs.

A readout that is linear in the logits has the same weights in every prompt. For any other readout, a margin
is written as a weighted sum of this prompt's logits plus a remainder that belongs to no component,

    margin = Σ_t weight_t · logit_t + remainder.

With the gradient at the run's own logits as weights, the difference between two runs contains the difference
of two remainders, which can be as large as the effect. With the gradient averaged over the straight path
between the logits of two runs (integrated gradients, https://arxiv.org/abs/1703.01365), both runs have the
same weights and the same remainder, so the weighted difference of the logits is the whole difference of the
margins.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.readouts.readout import Readout

# Sum of the absolute gradient below which a readout counts as saturated: to first order, no change of the
# logits by up to 1 nat each moves the margin by more than this, in nats. For words and log-odds the sum is 2.
SATURATED_WEIGHT = 0.1
PATH_TOLERANCE = 0.01  # nats; error of a difference of margins, above which the average takes more points
_MIN_PATH_POINTS, _MAX_PATH_POINTS = 8, 256
Logits = Float[Tensor, "rows vocab"]


def compute_logit_gradients(readout: Readout, logits: Logits) -> Logits:
    """Return the derivative of each row's margin with respect to each logit.

    >>> readout = Readout("words", ("a", "b"), (0, 2), (1.0, -1.0))
    >>> compute_logit_gradients(readout, torch.zeros(1, 3)).tolist()
    [[1.0, 0.0, -1.0]]

    For log-odds, it is the softmax among the refusal tokens minus the softmax among all others. For the
    expected outcome q = Σ_t p_t v_t, it is sharpness · p_t (v_t − q) / (q (1 − q)).

    Args:
        readout: readout that defines the margin.
        logits: first-token logits, nats.
    """
    ids = torch.tensor(readout.ids, device=logits.device)
    if readout.is_log_odds:
        is_refusal = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        is_refusal[ids] = True
        refusal_share, other_share = (
            logits.masked_fill(is_excluded, -torch.inf).softmax(1)
            for is_excluded in (~is_refusal, is_refusal)
        )
        return refusal_share - other_share
    token_weights = logits.new_zeros(logits.shape[1])
    token_weights[ids] = torch.tensor(readout.weights, dtype=logits.dtype, device=logits.device)
    if readout.base_value is None:
        return token_weights.expand_as(logits)
    # The weights of this readout are values above the base value, so differences of values are theirs.
    probabilities = (logits * readout.sharpness).softmax(1)
    mean_weight = probabilities @ token_weights
    outcome = readout.base_value + mean_weight
    slope = readout.sharpness / (outcome * (1 - outcome))
    return probabilities * (token_weights - mean_weight[:, None]) * slope[:, None]


def average_logit_gradients(readout: Readout, logits_before: Logits, logits_after: Logits) -> Logits:
    """Return each row's gradient, averaged over the straight path between its logits in two runs.

    The average times the difference of the logits is the difference of the margins, up to `PATH_TOLERANCE`
    (nats), for which points are added to the path, up to a limit.

    Args:
        readout: readout that defines the margin.
        logits_before: logits of one run, nats.
        logits_after: logits of the other run, nats.
    """
    margin_change = (
        readout.compute_margins(logits_after)[:, 0] - readout.compute_margins(logits_before)[:, 0]
    ).cpu()
    averages = torch.empty_like(logits_after)
    rows, n_points = torch.arange(len(averages)), _MIN_PATH_POINTS
    while len(rows) and n_points <= _MAX_PATH_POINTS:
        before = logits_before[rows.to(logits_before.device)]
        change = logits_after[rows.to(logits_after.device)] - before
        # The Gauss-Legendre rule needs far fewer points than equal steps.
        points, shares = np.polynomial.legendre.leggauss(n_points)
        average = torch.zeros_like(change)
        for point, share in zip(points.tolist(), shares.tolist(), strict=True):
            average += compute_logit_gradients(readout, before + change * ((1 + point) / 2)) * (share / 2)
        averages[rows.to(averages.device)] = average
        errors = (margin_change[rows] - (average * change).sum(1).cpu()).abs()
        rows, n_points = rows[errors > PATH_TOLERANCE], 2 * n_points
    return averages
