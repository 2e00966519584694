"""The readout: weights on first-token logits, which reduce a forward pass to one margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOW_COVERAGE = 0.2  # coverage below which margins need a warning
_MAX_NAMED_TOKENS = 6  # tokens per side that name an expected outcome, which has a value for every opener


@dataclass(frozen=True)
class OpeningBranch:
    """The tokens that follow one opening of a response, for readouts that look beyond the first token.

    Attributes:
        opening: token ids of the opening.
        ids: token ids that follow it.
        weights: the value of each of them, less the value of the opening alone.
    """

    opening: tuple[int, ...]
    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Readout:
    """A linear readout, the log-odds of its tokens, or the expected outcome of its tokens.

    Attributes:
        name: as in `--readout`.
        tokens: decoded token of each id, for display.
        ids: token ids, refusal tokens first.
        weights: one per id; they sum to zero, so that a constant added to all logits changes nothing. For
            log-odds they are equal shares, which are not used. For the expected outcome they are the tokens'
            values less `base_value`, and need not sum to zero.
        threshold: margin above which the classifier refuses, nats.
        response_prefix: token ids appended to every prompt: an opening without meaning (a lone space, an
            empty thinking block), or a given start of the response.
        prefill: token ids with which the responses start whose text the margins are compared with: the
            response prefix, unless the readout asks a question instead of sending the request.
        threshold_quantiles: equally spaced quantiles of the fitted threshold in bootstrap draws, nats; empty
            if the threshold was not fitted to a refusal rate.
        threshold_source: what the threshold was fitted to; empty if it is 0 for lack of data.
        notices: remarks on how words were turned into tokens.
        questions: questions that replace the request, which is inserted at `{request}`; the margin is the
            mean over the questions. If empty, the request itself is sent.
        is_log_odds: whether the margin is the log-odds of the ids against all other tokens, which is not
            linear in the logits.
        base_value: for the expected outcome, the refusal rate that all other tokens stand for; else None.
        sharpness: for the expected outcome, the factor of the logits.
        branches: for the expected outcome, openings after which the next token counts as well, shorter ones
            first. Their values correct that of the opening in proportion to its probability.
    """

    name: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    threshold: float = 0.0
    response_prefix: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()
    threshold_quantiles: tuple[float, ...] = ()
    threshold_source: str = ""
    notices: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    is_log_odds: bool = False
    base_value: float | None = None
    sharpness: float = 1.0
    branches: tuple[OpeningBranch, ...] = ()

    @property
    def continuations(self) -> tuple[tuple[int, ...], ...]:
        """Token ids to append to a prompt, one row of logits each; for the first token, none."""
        return ((), *(branch.opening for branch in self.branches))

    @property
    def is_linear(self) -> bool:
        """Whether the margin is linear in the logits, so that it decomposes over components."""
        return not self.is_log_odds and self.base_value is None

    @property
    def scoring_settings(self) -> list[object]:
        """Everything that determines the margin of given logits, for cache keys."""
        branches = [(branch.opening, branch.ids, branch.weights) for branch in self.branches]
        return [self.ids, self.weights, self.is_log_odds, self.base_value, self.sharpness, branches]

    def compute_terms(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows terms"]:
        """Return what `combine_terms` needs of the logits after a prompt and one of the continuations.

        Without branches, this is the result itself: margin and coverage. With branches, every row has the
        terms of all branches, although it needs only those of its own continuation.
        """
        if not self.branches:
            return self.compute_margins(logits)
        normalizer = (logits * self.sharpness).logsumexp(1, keepdim=True).cpu().double()

        def compute_probabilities(ids: Sequence[int]) -> Tensor:
            return (logits[:, list(ids)].cpu().double() * self.sharpness - normalizer).exp()

        corrections = [
            compute_probabilities(branch.ids) @ torch.tensor(branch.weights, dtype=torch.float64)
            for branch in self.branches
        ]
        last_tokens = compute_probabilities([branch.opening[-1] for branch in self.branches])
        return torch.cat([self.compute_margins(logits), torch.stack(corrections, 1), last_tokens], dim=1)

    def combine_terms(
        self, terms: Float[Tensor, "prompts continuations terms"]
    ) -> Float[Tensor, "prompts 2"]:
        """Return margin and coverage of each prompt from the terms of all its continuations."""
        if not self.branches:
            return terms[:, 0]
        margins, coverage = terms[:, 0, 0], terms[:, 0, 1]
        expected_outcome = margins.sigmoid()
        n_branches = len(self.branches)
        row_by_opening = {opening: row for row, opening in enumerate(self.continuations)}
        # Probability that the response starts with an opening.
        reach: dict[tuple[int, ...], Tensor] = {(): torch.ones_like(margins)}
        for number, branch in enumerate(self.branches):
            parent = branch.opening[:-1]
            probability = terms[:, row_by_opening[parent], 2 + n_branches + number]
            reach[branch.opening] = reach[parent] * probability
            correction = terms[:, row_by_opening[branch.opening], 2 + number]
            expected_outcome = expected_outcome + reach[branch.opening] * correction
        return torch.stack([expected_outcome.logit(), coverage], dim=1)

    def compute_margins(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows 2"]:
        """Return each row's margin (nats; positive refuses) and coverage (probability mass on the tokens).

        Branches do not count here: they need the logits after their openings, see `compute_terms`.
        """
        # On the CPU: Apple's GPUs have no float64.
        chosen = logits[:, list(self.ids)].cpu().double()
        if self.is_log_odds:
            others = torch.ones(logits.shape[1], dtype=torch.bool)
            others[list(self.ids)] = False
            margin = chosen.logsumexp(1) - logits.cpu().double()[:, others].logsumexp(1)
            return torch.stack(
                [margin, torch.ones_like(margin)], dim=1
            )  # every token counts on one side or the other
        weights = torch.tensor(self.weights, dtype=torch.float64)
        coverage = (chosen.logsumexp(1) - logits.logsumexp(1).cpu()).exp()
        if self.base_value is None:
            return torch.stack([chosen @ weights, coverage], dim=1)
        normalizer = (logits * self.sharpness).logsumexp(1, keepdim=True).cpu().double()
        probabilities = (chosen * self.sharpness - normalizer).exp()
        expected_outcome = self.base_value + probabilities @ weights
        return torch.stack([expected_outcome.logit(), coverage], dim=1)

    def list_tokens(self, refuses: bool) -> list[str]:
        """Return the tokens of one side; of an expected outcome, those with the largest weights."""
        sign = 1 if refuses else -1
        side = [
            (weight * sign, token)
            for token, weight in zip(self.tokens, self.weights, strict=True)
            if weight * sign > 0
        ]
        if self.base_value is not None:
            side = sorted(side, key=lambda entry: -entry[0])[:_MAX_NAMED_TOKENS]
        return [token for _, token in side]

    @property
    def words_label(self) -> str:
        """The refusal words against the compliance words, for captions."""
        labels = ["/".join(token.strip() for token in self.list_tokens(refuses)) for refuses in (True, False)]
        return " against ".join([labels[0], "all others"] if self.is_log_odds else labels)
