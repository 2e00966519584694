"""Activated LoRA: adapters that change only the tokens from their invocation on, and so cannot be merged.

The invocation is a sequence of tokens. An adapter acts on the tokens from its last occurrence in the prompt
on, and on the whole response; where the prompt does not hold it, the model is unchanged.

Source: Activated LoRA (Greenewald et al., 2025), https://arxiv.org/abs/2504.12397
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from defenses.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_ACTIVATION = "_activation"


class LowRankChange(NamedTuple):
    """The change of one linear module: its output becomes `output + scaling · up · down · input`.

    Attributes:
        down: rank x inputs, float32.
        up: outputs x rank, float32.
        scaling: factor of the product.
    """

    down: Tensor
    up: Tensor
    scaling: float


@dataclass
class Activation:
    """An adapter that is applied to the tokens from its invocation on, while it is attached to a model.

    Whole prompts are searched in every forward pass. Behind cached keys, only a response that transformers
    generates token by token can follow; any other pass with a cache is refused.

    Attributes:
        invocation: token ids.
        changes: the changes by name of the module.
        prompt_lengths: number of tokens of each row, without padding, that belong to the prompt; what follows
            is a response, in which an invocation counts for nothing. None if rows are prompts.
    """

    invocation: tuple[int, ...]
    changes: Mapping[str, LowRankChange]
    prompt_lengths: Sequence[int] | None = None
    _mask: Tensor | None = field(default=None, repr=False)  # rows × tokens; None between forward passes
    # The cache of a response that is being generated, and which of its rows hold the invocation.
    _cache: Any = field(default=lambda: None, repr=False)
    _is_invoked: Tensor | None = field(default=None, repr=False)

    def attach(self, model: Any) -> list[Any]:
        """Attach the adapter to a model; return the handles of its hooks."""
        handles = [
            model.register_forward_pre_hook(self._find_invocations, with_kwargs=True),
            model.register_forward_hook(self._forget_mask, always_call=True),
        ]
        for name, change in self.changes.items():
            handles.append(model.get_submodule(name).register_forward_hook(self._make_hook(name, change)))
        return handles

    def extend_prompts(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the prompts, all but the first with the invocation before the last token."""
        return [prompts[0], *((*prompt[:-1], *self.invocation, prompt[-1]) for prompt in prompts[1:])]

    def _find_invocations(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the tokens on which the adapter acts, before a forward pass."""
        import torch

        token_ids, attention_mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if args or token_ids is None or (attention_mask is not None and attention_mask.ndim != 2):
            raise RuntimeError("an activated adapter needs the token ids of whole prompts, and their mask")
        if attention_mask is None:  # transformers leaves out a mask that hides nothing
            attention_mask = torch.ones_like(token_ids)
        cache = kwargs.get("past_key_values")
        if kwargs.get("use_cache") is not False and cache is None:
            raise RuntimeError("an activated adapter cannot follow the cache of this model")
        if cache is not None and cache.get_seq_length() > 0:
            if cache is not self._cache() or self._is_invoked is None or token_ids.shape[1] != 1:
                raise RuntimeError("an activated adapter reads whole prompts, and these start behind a cache")
            self._mask = self._is_invoked[:, None]
            return
        starts = torch.full((len(token_ids), 1), token_ids.shape[1])
        for row, (ids, is_token) in enumerate(zip(token_ids.cpu(), attention_mask.cpu().bool(), strict=True)):
            columns = is_token.nonzero()[:, 0]
            if self.prompt_lengths is not None:
                columns = columns[: self.prompt_lengths[row]]
            start = find_last_occurrence(ids[columns].tolist(), self.invocation)
            if start is not None:
                starts[row] = columns[start]
        self._mask = torch.arange(token_ids.shape[1]) >= starts
        self._cache = weakref.ref(cache) if cache is not None else lambda: None
        self._is_invoked = self._mask.any(1)

    def _forget_mask(self, *_: Any) -> None:
        """Forget the tokens of a forward pass after it."""
        self._mask = None

    def _make_hook(self, name: str, change: LowRankChange) -> Any:
        """Return the hook that adds a change to the output of a module."""

        def add_change(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._mask is None or args[0].ndim != 3 or args[0].shape[:2] != self._mask.shape:
                raise UserError(
                    f"{name} of this model does not read one row of tokens per prompt, so that an activated "
                    "adapter cannot be applied to it; use PEFT, or train an ordinary adapter"
                )
            if not self._mask.any():
                return None
            down, up = change.down.to(output.device), change.up.to(output.device)
            changed = args[0].to(down.dtype) @ down.T @ up.T * change.scaling
            is_unchanged = ~self._mask[..., None].to(output.device)
            return (output + changed.masked_fill(is_unchanged, 0)).to(output.dtype)

        return add_change


def find_last_occurrence(token_ids: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Return where the last occurrence of an invocation starts, or None.

    >>> find_last_occurrence([7, 5, 6, 5, 6, 9], [5, 6]), find_last_occurrence([5], [5, 6])
    (3, None)
    """
    ids, wanted = list(token_ids), list(invocation)
    starts = range(len(ids) - len(wanted), -1, -1)
    return next((start for start in starts if ids[start : start + len(wanted)] == wanted), None)


def get_activation(model: Any) -> Activation | None:
    """Return the activated adapter that is applied to a model, or None."""
    return getattr(model, _ACTIVATION, (None, ()))[0]


def attach_activation(model: Any, activation: Activation) -> None:
    """Apply an activated adapter to a model permanently."""
    setattr(model, _ACTIVATION, (activation, activation.attach(model)))


@contextmanager
def replace_activation(model: Any, activation: Activation | None) -> Iterator[None]:
    """Context manager: apply this activated adapter to a model, or none, instead of the present one."""
    previous, handles = getattr(model, _ACTIVATION, (None, ()))
    for handle in handles:
        handle.remove()
    vars(model).pop(_ACTIVATION, None)
    try:
        if activation is not None:
            attach_activation(model, activation)
        yield
    finally:
        for handle in getattr(model, _ACTIVATION, (None, ()))[1]:
            handle.remove()
        vars(model).pop(_ACTIVATION, None)
        if previous is not None:
            attach_activation(model, previous)
