"""Weight patching: apply the weight change of a tuned defense to some matrices only."""

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

WeightChanges = dict[str, tuple[Tensor, Tensor]]  # original and changed tensor, by weight name


def find_changed_weights(model: Any, defense: Defense) -> WeightChanges:
    """Return the weights that a defense replaces, by name; empty if it replaces none.

    Weights whose values are changed in place are not detected.
    """
    # Tied weights have several names; a defense may change one of them, and add a bias.
    original = {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}
    with defense.apply_to(model):
        changed = {name: parameter.data for name, parameter in model.named_parameters()}
    original |= {name: torch.zeros_like(changed[name]) for name in changed.keys() - original.keys()}
    return {
        name: (original[name], tensor)
        for name, tensor in changed.items()
        if tensor.data_ptr() != original[name].data_ptr() and not torch.equal(tensor, original[name])
    }


def list_weight_patches(weight_names: Iterable[str]) -> list[tuple[str, int | None, str, list[str]]]:
    """Return the weight patches: kind, layer, module, and the names of the weights that are changed together.

    >>> [kind for kind, *_ in list_weight_patches(["layers.0.q_proj.weight"])]
    ['nothing', 'alone', 'up to', 'module', 'everything']
    """
    names = list(weight_names)
    layer_by_name = {name: _layer_number(name) for name in names}
    module_by_name = {name: name.split(".")[-2] for name in names}
    patches: list[tuple[str, int | None, str, list[str]]] = [("nothing", None, "", [])]
    layers = sorted({layer for layer in layer_by_name.values() if layer is not None})
    for kind in ("alone", "up to"):
        for number in layers:
            changed = [
                name
                for name, layer in layer_by_name.items()
                if layer is not None and (layer == number if kind == "alone" else layer <= number)
            ]
            patches.append((kind, number, "", changed))
    for module in sorted(set(module_by_name.values())):
        changed = [name for name, weight_module in module_by_name.items() if weight_module == module]
        patches.append(("module", None, module, changed))
    return [*patches, ("everything", None, "", names)]


@contextmanager
def restore_original_weights(
    model: Any, weight_changes: WeightChanges, weight_names: Iterable[str]
) -> Iterator[None]:
    """Restore some original weights of a defended model within a context; then reinstate the changed ones.

    Args:
        model: transformers model with the defense applied.
        weight_changes: original and changed weights by name.
        weight_names: weights that are restored.
    """
    restored_names = list(weight_names)
    try:
        for name in restored_names:
            model.get_parameter(name).data = weight_changes[name][0]
        yield
    finally:
        for name in restored_names:
            model.get_parameter(name).data = weight_changes[name][1]


def compute_weight_patch_margins(
    session: ModelSession,
    defense: Defense,
    weight_changes: WeightChanges,
    prompt_ids: Sequence[tuple[int, ...]],
    readout: Readout,
    on_progress: Callable[[], None] = lambda: None,
) -> Float[Tensor, "prompts patches"]:
    """Return the margin of every prompt under each patch of `list_weight_patches`.

    Everything else that the defense changes stays in place.

    Args:
        session: the model.
        defense: defense whose weight change is patched.
        weight_changes: result of `find_changed_weights`.
        prompt_ids: token ids of the prompts under the defense.
        readout: readout that defines the margin.
        on_progress: called after each patch.
    """
    margins, model = [], session.loaded_model.model
    with defense.apply_to(model):
        # Applying the defense again may create new tensors; these are the ones to reinstate.
        weight_changes = {
            name: (original, model.get_parameter(name).data) for name, (original, _) in weight_changes.items()
        }
        for *_, changed_names in list_weight_patches(weight_changes):
            with restore_original_weights(model, weight_changes, weight_changes.keys() - set(changed_names)):
                margins.append(session.engine.read_first_token(prompt_ids, readout.compute_margins)[:, 0])
            on_progress()
    return torch.stack(margins, 1)


def _layer_number(weight_name: str) -> int | None:
    """Number of the block that a weight belongs to."""
    match = re.search(r"\.(\d+)\.", f".{weight_name}")
    return int(match[1]) if match else None
