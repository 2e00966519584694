"""Rotary positions whose frequencies depend on the length of the sequence.

longrope has one set of frequencies for sequences of up to `original_max_position_embeddings` tokens and one
for longer ones (https://arxiv.org/abs/2402.13753); dynamic NTK has a set of its own for every length beyond
`max_position_embeddings`. transformers chooses the set by the longest row of a forward pass, and cached keys
keep the set that they were computed with. So only sequences with the same set may share a pass or a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class RotationSchedule:
    """Lengths at which a model changes the frequencies of its rotary positions.

    Attributes:
        limits: longest sequences (tokens) that are rotated with the short set of longrope; layers may differ.
        dynamic_limit: longest sequence that dynamic NTK leaves alone; None without dynamic NTK.
        dynamic_modules: modules that remember the frequencies of an earlier, longer sequence.
    """

    limits: tuple[int, ...] = ()
    dynamic_limit: int | None = None
    dynamic_modules: tuple[nn.Module, ...] = ()

    @classmethod
    def from_model(cls, model: nn.Module) -> RotationSchedule:
        """Return the schedule of a transformers model."""
        limits: set[int] = set()
        dynamic_modules: list[Any] = []
        for module in model.modules():
            parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
            if not hasattr(module, "rope_type") or not isinstance(parameters, dict):
                continue
            by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
            for rope in by_layer_type or [parameters]:
                # PhiMoE scales by `long_mscale` beyond the limit, whatever its rope_type.
                if rope.get("rope_type") == "longrope" or "long_mscale" in rope:
                    limits.add(int(rope["original_max_position_embeddings"]))
                if "dynamic" in str(rope.get("rope_type")) and module not in dynamic_modules:
                    dynamic_modules.append(module)
        dynamic_limit = min((int(module.original_max_seq_len) for module in dynamic_modules), default=None)
        return cls(tuple(sorted(limits)), dynamic_limit, tuple(dynamic_modules))

    def get_frequency_set(self, length: int) -> tuple[int, int]:
        """Return a label of the frequencies with which a sequence of this length is rotated.

        >>> schedule = RotationSchedule(limits=(4,), dynamic_limit=8)
        >>> [schedule.get_frequency_set(length) for length in (4, 5, 8, 9)]
        [(0, 0), (1, 0), (1, 0), (1, 9)]
        """
        is_dynamic = self.dynamic_limit is not None and length > self.dynamic_limit
        return sum(length > limit for limit in self.limits), length if is_dynamic else 0

    def changes_between(self, first_length: int, last_length: int) -> bool:
        """Return whether a sequence that grows from one length to another changes its frequencies."""
        return self.get_frequency_set(first_length) != self.get_frequency_set(last_length)

    def group_rows(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the indices of the rows that are rotated with the same frequencies, longest rows first.

        >>> list(RotationSchedule(limits=(4,)).group_rows([3, 6, 4, 9]))
        [[1, 3], [0, 2]]
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for row, length in enumerate(lengths):
            groups.setdefault(self.get_frequency_set(length), []).append(row)
        for frequency_set in sorted(groups, reverse=True):
            yield groups[frequency_set]

    def reset_modules(self) -> None:
        """Make modules forget the frequencies of earlier sequences, as in a model just loaded."""
        for module in self.dynamic_modules:
            for name in list(vars(module)):
                if name.endswith("max_seq_len_cached"):
                    setattr(module, name, module.original_max_seq_len)
            for name, frequencies in list(module.named_buffers(recurse=False)):
                prefix = name.removesuffix("inv_freq")
                if name.endswith("inv_freq") and not prefix.endswith("original_"):
                    original = getattr(module, f"{prefix}original_inv_freq")
                    module.register_buffer(name, original.to(frequencies.device).clone(), persistent=False)
