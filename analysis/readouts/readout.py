"""readout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOW_COVERAGE = 0.2


@dataclass(frozen=True)
class Readout:
    """Words and their tokens, and what they weigh.

    Attributes:
        name: as in `--readout`.
        tokens: the decoded token of each id, for people.
        ids: token ids, refusing ones first.
        weights: one per id; they sum to zero, so that a constant added to all logits changes nothing. Of
            log-odds, equal shares that are not used.
        threshold: margin above which the classifier says "refuse", nats.
        response_prefix: token ids that are put behind every prompt: an opening that carries no meaning (a lone space,
            an empty thinking block), or an opener that is put into the model's mouth.
        prefill: token ids that the answers begin with whose text the margin is compared with; the prefix,
            unless something else than the request is asked.
        threshold_source: what the threshold was fitted to; empty where it is 0 for want of anything.
        notices: how the words were turned into tokens, where it was not obvious.
        questions: what is asked in place of a request, which stands at `{request}`; each is read, and the
            margin is the mean. Empty: the request itself.
        is_log_odds: whether the margin is the log-odds of the ids against all other tokens. It is not linear then.
    """

    name: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    threshold: float = 0.0
    response_prefix: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()
    threshold_source: str = ""
    notices: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    is_log_odds: bool = False

    def compute_margins(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows 2"]:
        """Return each row's margin (nats; positive refuses) and coverage (probability on the words)."""
        # On the CPU: Apple's GPUs have no float64.
        chosen = logits[:, list(self.ids)].cpu().double()
        if self.is_log_odds:
            others = torch.ones(logits.shape[1], dtype=torch.bool)
            others[list(self.ids)] = False
            margin = chosen.logsumexp(1) - logits.cpu().double()[:, others].logsumexp(1)
            return torch.stack([margin, torch.ones_like(margin)], dim=1)  # all tokens count on one side
        margin = chosen @ torch.tensor(self.weights, dtype=torch.float64)
        coverage = (chosen.logsumexp(1) - logits.logsumexp(1).cpu()).exp()
        return torch.stack([margin, coverage], dim=1)

    @property
    def words_label(self) -> str:
        """The words on either side, for captions."""
        sides = (
            [t for t, w in zip(self.tokens, self.weights, strict=True) if (w > 0) == side]
            for side in (True, False)
        )
        told = ["/".join(token.strip() for token in side) for side in sides]
        return " against ".join([told[0], "all others"] if self.is_log_odds else told)
