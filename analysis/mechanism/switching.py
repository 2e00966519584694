"""Causes: the change that tuned weights bring, switched on in some matrices and not in others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from defenses import Defense

if TYPE_CHECKING:
    from analysis.bench import Bench
    from analysis.readout import Readout

Weights = dict[str, tuple[Tensor, Tensor]]  # as they are, and as they are under a defense


def changed(model: Any, defense: Defense) -> Weights:
    """Return the weights that are others while a defense is armed, by name; none where it changes no weights.

    Weights whose numbers are changed in place are not seen.
    """
    before = {name: one.data for name, one in model.named_parameters()}
    with defense.armed(model):
        after = {name: one.data for name, one in model.named_parameters()}
    return {
        name: (before[name], one)
        for name, one in after.items()
        if one.data_ptr() != before[name].data_ptr() and not torch.equal(one, before[name])
    }


def switches(names: Iterable[str]) -> list[tuple[str, int | None, str, list[str]]]:
    """Return what is switched on together: how, up to which layer or in which, in which module, which names.

    >>> [one[0] for one in switches(["layers.0.q_proj.weight"])]
    ['nothing', 'alone', 'up to', 'module', 'everything']
    """
    weights = list(names)
    layers, modules = (
        {name: _layer(name) for name in weights},
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
def switched_off(model: Any, weights: Weights, names: Iterable[str]) -> Iterator[None]:
    """While open, some weights of the armed model are as they were before; then it is armed whole again."""
    off = list(names)
    try:
        for name in off:
            model.get_parameter(name).data = weights[name][0]
        yield
    finally:
        for name in off:
            model.get_parameter(name).data = weights[name][1]


def margins(
    bench: Bench,
    defense: Defense,
    weights: Weights,
    prompts: Sequence[tuple[int, ...]],
    readout: Readout,
    done: Callable[[], None] = lambda: None,
) -> Float[Tensor, "prompts switches"]:
    """Return the margin of every prompt under each of `switches`; all else that is armed stays.

    Args:
        bench: the model.
        defense: whose weights are switched.
        weights: what `changed` returned.
        prompts: as the defended model reads them.
        readout: how logits become a margin.
        done: told when another switch is read.
    """
    found, model = [], bench.loaded.model
    with defense.armed(model):
        # Armed anew, it may bring tensors of its own: those are put back.
        weights = {name: (before, model.get_parameter(name).data) for name, (before, _) in weights.items()}
        for *_, on in switches(weights):
            with switched_off(model, weights, weights.keys() - set(on)):
                found.append(bench.engine.read(prompts, readout.read)[:, 0])
            done()
    return torch.stack(found, 1)


def _layer(name: str) -> int | None:
    """The number of the block that a weight is in."""
    place = re.search(r"\.(\d+)\.", f".{name}")
    return int(place[1]) if place else None
