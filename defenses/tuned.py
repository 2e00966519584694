"""Base class of defenses that apply an adapter to the model."""

from __future__ import annotations

import dataclasses
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from defenses.adapters import Adapter, apply_adapter, find_adapter, load_adapter
from defenses.contract import Defense, MatchedControl, ModelInfo
from defenses.settings import HIDDEN_FIELD


@dataclass(frozen=True)
class TunedDefense(Defense):
    """Base class of defenses with tuned weights.

    Attributes:
        state: name of the adapter, which is also the model state that it creates.
        recipe: name of the training recipe that creates the adapter.
        reference_recipes: recipes of the weights that the defense is compared with.
        weights: folder of the adapter; by default the user's adapter for this model, or else the shipped one.
        adapter: the loaded adapter, set by `prepare`.
    """

    state: ClassVar[str]
    recipe: ClassVar[str]
    reference_recipes: ClassVar[tuple[str, ...]] = ()
    cost = "weights"

    weights: Path | None = None
    adapter: Adapter | None = dataclasses.field(default=None, repr=False, metadata=HIDDEN_FIELD)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy with the adapter for this model, if one exists."""
        adapter = self.load_weights(model_info)
        if adapter is not None:
            adapter.check_base_model(model_info.sha256)
        return dataclasses.replace(self, adapter=adapter)

    def load_weights(self, model_info: ModelInfo) -> Adapter | None:
        """Return the adapter in the folder of the settings, or else that of the model; None without any."""
        return (
            load_adapter(self.weights) if self.weights is not None else find_adapter(self.state, model_info)
        )

    def apply_to(self, model: Any) -> AbstractContextManager[None]:
        """Apply the tuned weights within a context; restore the model bit for bit afterwards."""
        return nullcontext() if self.adapter is None else apply_adapter(model, self.adapter)

    def build_control(self, model_info: ModelInfo, draw: int) -> MatchedControl | None:
        """Return the defense with weights that were tuned as long on ordinary requests, if there are any.

        Every draw has the same weights, because each would need a training of its own.
        """
        adapter = find_adapter(f"{self.state}-control", model_info)
        if self.adapter is None or adapter is None:
            return None
        adapter.check_base_model(model_info.sha256)
        effort = _describe_effort(self.adapter)
        if effort is None or effort != _describe_effort(adapter):
            return None
        control = dataclasses.replace(self, adapter=adapter)
        return MatchedControl(control, "weights tuned on ordinary requests", varies=False)

    def weights_fingerprint(self) -> str:
        """Return the SHA-256 of the weights and the configuration that affects their change."""
        return "" if self.adapter is None else f"{self.adapter.sha256} {self.adapter.config}"

    def missing_requirements(self) -> str:
        """Return what is missing and how to create it."""
        if self.adapter is not None:
            return ""
        return (
            "no tuned weights for this model: add --train to the command, which trains them first (or "
            f"`analyze train {self.recipe} -m MODEL`)"
        )

    def trained_on(self) -> frozenset[str]:
        """Return the fingerprints of the queries that the weights were trained on."""
        return frozenset() if self.adapter is None else self.adapter.trained_on


def _describe_effort(adapter: Adapter) -> dict[str, Any] | None:
    """Return what is equal for two trainings of the same size: start, matrices, steps; None if unknown."""
    manifest = adapter.manifest
    if not {"started_from", "settings", "n_examples"} <= set(manifest):
        return None
    settings = manifest["settings"]
    n_steps = math.ceil(manifest["n_examples"] / settings["batch"]) * settings["epochs"]
    names = ("rank", "alpha", "modules", "rate", "batch")
    return {name: settings[name] for name in names} | {"steps": n_steps, "start": manifest["started_from"]}
