"""What a server tells of the token after a prompt: log-probabilities of some tokens, bounds on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROUNDING_MASS = 1e-4  # by which probabilities of a server may add up to more than one


@dataclass(frozen=True)
class TokenList:
    """Log-probabilities (nats) of the token after one prompt, for some tokens.

    Attributes:
        log_probabilities: by token id.
        other_cap: largest log-probability that a token outside the list can have.
    """

    log_probabilities: dict[int, float]
    other_cap: float = 0.0

    def join(self, other: TokenList) -> TokenList:
        """Return what both lists tell together."""
        return TokenList(
            self.log_probabilities | other.log_probabilities, min(self.other_cap, other.other_cap)
        )


@dataclass(frozen=True)
class ListedTokens:
    """Log-probabilities of the token after several prompts, where a server lists them.

    An unlisted token is at most as probable as `other_cap` says, and all of them together as `other_mass`.

    Attributes:
        log_probabilities: nats; minus infinity where a token is not listed.
        is_listed: whether a token is listed.
        other_cap: largest log-probability of an unlisted token, nats.
        other_mass: probability of all unlisted tokens together.
    """

    log_probabilities: Float[Tensor, "rows vocab"]
    is_listed: Bool[Tensor, "rows vocab"]
    other_cap: Float[Tensor, " rows"]
    other_mass: Float[Tensor, " rows"]

    @classmethod
    def from_lists(cls, lists: Sequence[TokenList], n_vocabulary: int) -> ListedTokens:
        """Return the lists of several prompts.

        >>> listed = ListedTokens.from_lists([TokenList({0: -0.5, 2: -1.5}, -1.5)], 3)
        >>> listed.is_listed.tolist(), round(float(listed.other_mass[0]), 3)
        ([[True, False, True]], 0.17)

        Args:
            lists: one per prompt.
            n_vocabulary: number of token ids.

        Raises:
            ValueError: if the listed probabilities add up to more than one.
        """
        log_probabilities = torch.full((len(lists), n_vocabulary), -torch.inf, dtype=torch.float64)
        for row, tokens in enumerate(lists):
            ids = torch.tensor(list(tokens.log_probabilities))
            values = torch.tensor(list(tokens.log_probabilities.values()), dtype=torch.float64)
            log_probabilities[row, ids] = values
        is_listed = torch.zeros_like(log_probabilities, dtype=torch.bool)
        for row, tokens in enumerate(lists):
            is_listed[row, list(tokens.log_probabilities)] = True
        mass = log_probabilities.exp().sum(1)
        if not (mass <= 1 + _ROUNDING_MASS).all():
            raise ValueError(f"the listed probabilities add up to {float(mass.max()):.4g}")
        other_mass = (1 - mass).clamp_min(0).where(~is_listed.all(1), 0)
        caps = torch.tensor([tokens.other_cap for tokens in lists], dtype=torch.float64)
        return cls(log_probabilities, is_listed, torch.minimum(caps, other_mass.log()), other_mass)

    def complete(self) -> Float[Tensor, "rows vocab"]:
        """Return log-probabilities of all tokens, the unlisted ones as probable as one another."""
        n_others = (~self.is_listed).sum(1, keepdim=True)
        share = (self.other_mass[:, None] / n_others.clamp_min(1)).log()
        return torch.where(self.is_listed, self.log_probabilities, share)


@dataclass(frozen=True)
class TokenNames:
    """Names that servers give to tokens.

    Attributes:
        tokenizer: a transformers tokenizer.
    """

    tokenizer: object
    _ids_by_text: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    def find_id(self, name: str) -> int | None:
        """Return the id of a token: from a name such as `token_id:17`, or by its text if only one has it."""
        prefix, _, number = name.rpartition("token_id:")
        if number.isdecimal() and not prefix:
            return int(number)
        if not self._ids_by_text:
            tokenizer: object = self.tokenizer
            for token_id in range(len(tokenizer)):  # type: ignore[arg-type]
                text = str(tokenizer.decode([token_id]))  # type: ignore[attr-defined]
                self._ids_by_text.setdefault(text, []).append(token_id)
        ids = self._ids_by_text.get(name, [])
        return ids[0] if len(ids) == 1 else None
