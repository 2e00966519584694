"""Causes: the change that tuned weights bring, switched on in some matrices and not in others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from defenses.contract import Defense

if TYPE_CHECKING:
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout

WeightChanges = dict[str, tuple[Tensor, Tensor]]  # as they are, and as they are under a defense


def find_changed_weights(model: Any, defense: Defense) -> WeightChanges:
    """Return the weights that are others while a defense is armed, by name; none where it changes no weights.

    Weights whose numbers are changed in place are not seen.
    """
    before = {name: one.data for name, one in model.named_parameters()}
    with defense.apply_to(model):
        after = {name: one.data for name, one in model.named_parameters()}
    return {
        name: (before[name], one)
        for name, one in after.items()
        if one.data_ptr() != before[name].data_ptr() and not torch.equal(one, before[name])
    }


def list_weight_patches(weight_names: Iterable[str]) -> list[tuple[str, int | None, str, list[str]]]:
    """Return what is switched on together: how, up to which layer or in which, in which module, which names.

    >>> [one[0] for one in list_weight_patches(["layers.0.q_proj.weight"])]
    ['nothing', 'alone', 'up to', 'module', 'everything']
    """
    weights = list(weight_names)
    layers, modules = (
        {name: _layer_number(name) for name in weights},
        {name: name.split(".")[-2] for name in weights},
    )
    found: list[tuple[str, int | None, str, list[str]]] = [("nothing", None, "", [])]
    numbers = sorted({layer for layer in layers.values() if layer is not None})
    for how in ("alone", "up to"):
        for number in numbers:
            on = [
                name
                for name, layer in layers.items()
                if layer is not None and (layer == number if how == "alone" else layer <= number)
            ]
            found.append((how, number, "", on))
    for module in sorted(set(modules.values())):
        found.append(("module", None, module, [name for name, one in modules.items() if one == module]))
    return [*found, ("everything", None, "", weights)]


@contextmanager
def restore_original_weights(
    model: Any, weight_changes: WeightChanges, weight_names: Iterable[str]
) -> Iterator[None]:
    """While open, some weights of the armed model are as they were before; then it is armed whole again."""
    off = list(weight_names)
    try:
        for name in off:
            model.get_parameter(name).data = weight_changes[name][0]
        yield
    finally:
        for name in off:
            model.get_parameter(name).data = weight_changes[name][1]


def compute_weight_patch_margins(
    session: ModelSession,
    defense: Defense,
    weight_changes: WeightChanges,
    prompt_ids: Sequence[tuple[int, ...]],
    readout: Readout,
    on_progress: Callable[[], None] = lambda: None,
) -> Float[Tensor, "prompts switches"]:
    """Return the margin of every prompt under each of `switches`; all else that is armed stays.

    Args:
        session: the model.
        defense: whose weights are switched.
        weight_changes: what `changed` returned.
        prompt_ids: as the defended model reads them.
        readout: how logits become a margin.
        on_progress: told when another switch is read.
    """
    found, model = [], session.loaded_model.model
    with defense.apply_to(model):
        # Armed anew, it may bring tensors of its own: those are put back.
        weight_changes = {
            name: (before, model.get_parameter(name).data) for name, (before, _) in weight_changes.items()
        }
        for *_, on in list_weight_patches(weight_changes):
            with restore_original_weights(model, weight_changes, weight_changes.keys() - set(on)):
                found.append(session.engine.read_first_token(prompt_ids, readout.compute_margins)[:, 0])
            on_progress()
    return torch.stack(found, 1)


def _layer_number(weight_name: str) -> int | None:
    """The number of the block that a weight is in."""
    place = re.search(r"\.(\d+)\.", f".{weight_name}")
    return int(place[1]) if place else None
