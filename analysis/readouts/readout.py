"""The readout: weights on first-token logits, which reduce a forward pass to one margin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOW_COVERAGE = 0.2  # coverage below which margins need a warning


@dataclass(frozen=True)
class Readout:
    """A linear readout, or the log-odds of its tokens.

    Attributes:
        name: as in `--readout`.
        tokens: decoded token of each id, for display.
        ids: token ids, refusal tokens first.
        weights: one per id; they sum to zero, so that a constant added to all logits changes nothing. For
            log-odds they are equal shares, which are not used.
        threshold: margin above which the classifier refuses, nats.
        response_prefix: token ids appended to every prompt: an opening without meaning (a lone space, an
            empty thinking block), or a given start of the response.
        prefill: token ids with which the responses start whose text the margins are compared with: the
            response prefix, unless the readout asks a question instead of sending the request.
        threshold_source: what the threshold was fitted to; empty if it is 0 for lack of data.
        notices: remarks on how words were turned into tokens.
        questions: questions that replace the request, which is inserted at `{request}`; the margin is the
            mean over the questions. If empty, the request itself is sent.
        is_log_odds: whether the margin is the log-odds of the ids against all other tokens, which is not
            linear in the logits.
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
        """Return each row's margin (nats; positive refuses) and coverage (probability mass on the tokens)."""
        # On the CPU: Apple's GPUs have no float64.
        chosen = logits[:, list(self.ids)].cpu().double()
        if self.is_log_odds:
            others = torch.ones(logits.shape[1], dtype=torch.bool)
            others[list(self.ids)] = False
            margin = chosen.logsumexp(1) - logits.cpu().double()[:, others].logsumexp(1)
            return torch.stack(
                [margin, torch.ones_like(margin)], dim=1
            )  # every token counts on one side or the other
        margin = chosen @ torch.tensor(self.weights, dtype=torch.float64)
        coverage = (chosen.logsumexp(1) - logits.logsumexp(1).cpu()).exp()
        return torch.stack([margin, coverage], dim=1)

    @property
    def words_label(self) -> str:
        """The refusal words against the compliance words, for captions."""
        sides = (
            [
                token
                for token, weight in zip(self.tokens, self.weights, strict=True)
                if (weight > 0) == refuses
            ]
            for refuses in (True, False)
        )
        labels = ["/".join(token.strip() for token in side) for side in sides]
        return " against ".join([labels[0], "all others"] if self.is_log_odds else labels)
