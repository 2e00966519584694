"""Causes: the change that tuned weights bring, switched on in some matrices and not in others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from defenses import Defense

if TYPE_CHECKING:
    from analysis.bench import Bench
    from analysis.readout import Readout

Weights = dict[str, Tensor]


def changed(model: Any, defense: Defense) -> Weights:
    """Return the weights that differ while a defense is armed, by name; none where it changes no weights."""
    before = {name: one.data for name, one in model.named_parameters()}
    with defense.armed(model):
        after = {name: one.data for name, one in model.named_parameters()}
    return {
        name: one
        for name, one in after.items()
        if one.data_ptr() != before[name].data_ptr() and not torch.equal(one, before[name])
    }


def switches(weights: Weights) -> list[tuple[str, int | None, str, list[str]]]:
    """Return what is switched on together: how, up to which layer or in which, in which module, which names.

    >>> [one[:3] for one in switches({"layers.0.q_proj.weight": torch.ones(1)})]
    [('alone', 0, ''), ('up to', 0, ''), ('module', None, 'q_proj')]
    """
    layers, modules = (
        {name: _layer(name) for name in weights},
        {name: name.split(".")[-2] for name in weights},
    )
    found: list[tuple[str, int | None, str, list[str]]] = []
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
    return found


@contextmanager
def switched_on(model: Any, weights: Weights) -> Iterator[None]:
    """While open, the model has these weights; then it is what it was, bit for bit."""
    before = {name: model.get_parameter(name).data for name in weights}
    try:
        for name, tensor in weights.items():
            model.get_parameter(name).data = tensor
        yield
    finally:
        for name, tensor in before.items():
            model.get_parameter(name).data = tensor


def margins(
    bench: Bench,
    weights: Weights,
    prompts: Sequence[tuple[int, ...]],
    readout: Readout,
    done: Callable[[], None] = lambda: None,
) -> Float[Tensor, "prompts switches"]:
    """Return the margin of every prompt under each of `switches`, and at last with nothing switched on.

    Args:
        bench: the model.
        weights: what `changed` returned.
        prompts: as the defended model reads them.
        readout: how logits become a margin.
        done: told when another switch is read.
    """
    found = []
    for *_, names in [*switches(weights), ("nothing", None, "", [])]:
        with switched_on(bench.loaded.model, {name: weights[name] for name in names}):
            found.append(bench.engine.read(prompts, readout.read)[:, 0])
        done()
    return torch.stack(found, 1)


def _layer(name: str) -> int | None:
    """The number of the block that a weight is in."""
    place = re.search(r"\.(\d+)\.", f".{name}")
    return int(place[1]) if place else None
