"""Bounds of margins where a server lists some first tokens only.

An unlisted token is at most as probable as the least probable listed one, and all unlisted tokens together
have the probability that the list leaves. A margin whose tokens are all listed is exact; else it lies between
two bounds.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.readouts.readout import Readout
from analysis.served.listed_tokens import ListedTokens
from defenses.errors import UserError

_REMEDY = (
    "use --readout outcome, or a server that lists more (vLLM: --max-logprobs) or takes token ids (recent "
    "versions of vLLM; SGLang)"
)


class UnboundedMarginError(UserError):
    """A readout whose margins cannot be bounded by what a server lists."""


def needs_most_probable(readout: Readout) -> bool:
    """Return whether margins depend on more tokens than those of the readout, beyond their probability.

    The sum of sharpened probabilities does, not that of the probabilities themselves, which is one.
    """
    return readout.base_value is not None and readout.sharpness != 1


def bound_margins(readout: Readout, listed: ListedTokens) -> Float[Tensor, "rows 3"]:
    """Return the lower and the upper bound of each row's margin (nats), and the least coverage.

    Args:
        readout: one that reads the first token.
        listed: what a server lists.

    Raises:
        UnboundedMarginError: if margins have no bounds, because a token of a linear readout or of log-odds
            may have any probability down to zero, or because the readout reads more than the first token.
    """
    if readout.branches:
        raise UnboundedMarginError(
            f"--readout {readout.name} reads several tokens, which needs a server that lists all tokens: "
            "use --readout outcome"
        )
    ids = list(readout.ids)
    chosen, is_known = listed.log_probabilities[:, ids], listed.is_listed[:, ids]
    coverage = chosen.exp().sum(1)
    if readout.base_value is not None:
        low, high = _bound_outcome(readout, listed)
    elif readout.is_log_odds:
        if not is_known.any(1).all():
            raise UnboundedMarginError(f"--readout {readout.name}: none of its tokens is listed: {_REMEDY}")
        low, high = _bound_log_odds(ids, listed)
        coverage = torch.ones_like(coverage)
    else:
        if n_missing := int((~is_known).any(0).sum()):
            raise UnboundedMarginError(
                f"--readout {readout.name}: {n_missing} of its {len(ids)} tokens are not listed, and may "
                f"have any small probability, so its margins have no bounds: {_REMEDY}"
            )
        low = high = chosen @ torch.tensor(readout.weights, dtype=torch.float64)
    return torch.stack([low, high, coverage], dim=1)


def _bound_log_odds(ids: list[int], listed: ListedTokens) -> tuple[Tensor, Tensor]:
    """Return bounds of the log-odds of tokens against all others."""
    is_chosen = torch.zeros(listed.is_listed.shape[1], dtype=torch.bool)
    is_chosen[ids] = True
    probabilities = listed.log_probabilities.exp()
    mass, other_mass = probabilities[:, is_chosen].sum(1), probabilities[:, ~is_chosen].sum(1)
    n_chosen = (~listed.is_listed[:, is_chosen]).sum(1)
    n_others = (~listed.is_listed[:, ~is_chosen]).sum(1)
    cap, rest = listed.other_cap.exp(), listed.other_mass
    most = torch.minimum(rest, n_chosen * cap)
    least = torch.minimum((rest - n_others * cap).clamp_min(0), most)
    return tuple(  # type: ignore[return-value]
        (mass + moved).log() - (other_mass + rest - moved).log() for moved in (least, most)
    )


def _bound_outcome(readout: Readout, listed: ListedTokens) -> tuple[Tensor, Tensor]:
    """Return bounds of the margin of an expected outcome.

    L is the sum of the sharpened probabilities of the listed tokens, and A that of their products with
    the values of the tokens. The unlisted tokens add X to L, each with the base value b, and D by those
    among them that have another value: the outcome is (A + b X + D) / (L + X).
    """
    base, sharpness, ids = float(readout.base_value or 0), readout.sharpness, list(readout.ids)
    weights = torch.tensor(readout.weights, dtype=torch.float64)
    is_unknown = ~listed.is_listed[:, ids]
    # Relative to the largest probability, so that no power is too small for a number.
    scale = listed.log_probabilities.amax(1, keepdim=True)
    sharp = ((listed.log_probabilities - scale) * sharpness).exp()
    cap = ((listed.other_cap - scale[:, 0]) * sharpness).exp()
    n_others = (~listed.is_listed).sum(1).clamp_min(1)
    mass = listed.other_mass / scale[:, 0].exp()
    # Of a given sum, powers add up to least if all are equal, and to most if as few as possible are not zero.
    least = n_others * (mass / n_others) ** sharpness
    most = torch.minimum(mass * (listed.other_cap - scale[:, 0]).exp() ** (sharpness - 1), n_others * cap)
    if sharpness == 1:
        most = least
    least = torch.minimum(least, most)
    listed_sum = sharp.sum(1)
    value_sum = base * listed_sum + sharp[:, ids] @ weights
    bounds = []
    for sign, choose in ((-1, torch.minimum), (1, torch.maximum)):
        gain = _fill_largest((sign * weights).clamp_min(0) * is_unknown, cap, most) * sign
        ends = [(value_sum + base * others + gain) / (listed_sum + others) for others in (least, most)]
        bounds.append(choose(*ends))
    values = [base, *(base + weights).tolist()]
    low, high = (bound.clamp(min(values), max(values)) for bound in bounds)
    return low.logit(), high.logit()


def _fill_largest(
    gains: Float[Tensor, "rows tokens"], cap: Float[Tensor, " rows"], total: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Return the largest sum of gains times shares, each at most the cap, all at most the total."""
    ordered = gains.sort(dim=1, descending=True).values
    before = torch.arange(gains.shape[1]) * cap[:, None]
    shares = torch.minimum(cap[:, None], (total[:, None] - before).clamp_min(0))
    return (ordered * shares).sum(1)
