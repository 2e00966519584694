"""What defenses that bring weights of their own have in common."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from defenses.adapters import Adapter, apply_adapter, find_adapter, load_adapter
from defenses.contract import Defense, ModelInfo
from defenses.settings import HIDDEN_FIELD


@dataclass(frozen=True)
class TunedDefense(Defense):
    """A defense that brings weights of its own; which ones, its class says by the name of the adapter.

    Attributes:
        weights: folder of the adapter; by default this model's own, the user's before the shipped one.
    """

    state: ClassVar[str]
    recipe: ClassVar[str]
    cost = "weights"

    weights: Path | None = None
    adapter: Adapter | None = dataclasses.field(default=None, repr=False, metadata=HIDDEN_FIELD)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return this defense with its adapter, if there is one for this model."""
        adapter = (
            load_adapter(self.weights) if self.weights is not None else find_adapter(self.state, model_info)
        )
        if adapter is not None:
            adapter.check_base_model(model_info.sha256)
        return dataclasses.replace(self, adapter=adapter)

    def apply_to(self, model: Any) -> AbstractContextManager[None]:
        """While open, the model has the tuned weights; afterwards it is what it was, bit for bit."""
        return nullcontext() if self.adapter is None else apply_adapter(model, self.adapter)

    def weights_fingerprint(self) -> str:
        """Return the SHA-256 of the weights that it brings, and how they are scaled."""
        return "" if self.adapter is None else f"{self.adapter.sha256} {self.adapter.scaling}"

    def missing_requirements(self) -> str:
        """Return what is missing, and how to make it."""
        if self.adapter is not None:
            return ""
        return f"no tuned weights for this model; `analyze train {self.recipe} -m MODEL` makes them"

    def trained_on(self) -> frozenset[str]:
        """Return the fingerprints of the queries that its weights have seen."""
        return frozenset() if self.adapter is None else self.adapter.trained_on
