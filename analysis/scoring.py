"""Steps 4 and 5: token ids → margin and coverage, while the defense is armed, none computed twice."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.engine import Engine, Reduce
from analysis.models import LoadedModel
from analysis.readout import Readout
from analysis.store import Namer, Store
from defenses import Defense

# Modules of this package that decide what a model reads and what is read off it.
_ASKING = {"attacks", "attention", "batching", "bench", "drafts", "engine", "generation", "lending"}
_ASKING |= {"readout", "rendering", "residuals", "run", "scoring", "spoken"}
_BLENDED = 128  # prompts whose logits are held at once, where those of several models are added up


@cache
def code() -> str:
    """Return the SHA-256 of the source by which a model is asked: another version finds nothing of this one.

    >>> len(code())
    64
    """
    digest = hashlib.sha256()
    for package in ("analysis", "defenses"):
        for path in sorted(Path(str(importlib.import_module(package).__file__)).parent.glob("*.py")):
            if package == "defenses" or path.stem in _ASKING:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def about(loaded: LoadedModel) -> dict[str, Any]:
    """Return what all that a model computes depends on: weights, configuration, device, code, libraries."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "weights": [loaded.origin.get("sha256"), loaded.origin.get("state_sha256")],
        "config": {**loaded.model.config.to_dict(), "_name_or_path": ""},
        "code": code(),
        "dtype": str(loaded.model.dtype),
        "device": loaded.model.device.type,
        "versions": versions,
    }


def read(
    loaded: LoadedModel,
    engine: Engine,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    readout: Readout,
    store: Store | None = None,
    done: Callable[[int], None] = lambda prompts: None,
) -> Float[Tensor, "prompts 2"]:
    """Return margin and coverage of every prompt, those of earlier runs from the store.

    Args:
        loaded: the model.
        engine: that holds it.
        defense: is armed meanwhile.
        prompts: token ids, the readout's prefix included.
        readout: how logits become a margin.
        store: where scores are looked up and kept.
        done: told how many more prompts are finished.
    """
    arms = [(weight, one.changes()) for weight, one in members(defense)]
    if any(change is None for _, change in arms):
        store = None
    namer = Namer({**about(loaded), "arms": arms, "readout": [readout.ids, readout.weights, readout.odds]})
    names = [namer.name(ids) for ids in prompts]
    known = store.scores(names) if store is not None else {}
    if store is not None:
        store.found += sum(name in known for name in names)
    # Prompts that are the same are read once.
    new = list({name: at for at, name in enumerate(names) if name not in known}.values())
    asked = [prompts[at] for at in new]
    for rows, values in batches(engine, loaded, defense, asked, readout.read) if new else ():
        fresh = {names[new[row]]: (float(m), float(c)) for row, (m, c) in zip(rows, values, strict=True)}
        if store is not None:
            store.keep_scores((name, *value) for name, value in fresh.items())
        known |= fresh
        done(len(rows))
    done(len(prompts) - len(new))
    return torch.tensor([known[name] for name in names], dtype=torch.float64)


def members(defense: Defense) -> tuple[tuple[float, Defense], ...]:
    """Return what is armed for a first token, and by what weight its logits count."""
    return defense.blend() or ((1.0, defense),)


def batches(
    engine: Engine,
    loaded: LoadedModel,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    reduce: Reduce,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield which prompts, and what is made of their first-answer logits while the defense is armed.

    Args:
        engine: that holds the model.
        loaded: the model.
        defense: where it chooses from several models, their logits are added up by weight.
        prompts: token ids.
        reduce: logits -> what is kept of them.
    """
    blend = members(defense)
    if not defense.blend():
        with defense.armed(loaded.model):
            yield from engine.batches(prompts, reduce)
        return
    for start in range(0, len(prompts), _BLENDED):
        rows = list(range(start, min(start + _BLENDED, len(prompts))))
        logits = []
        for weight, one in blend:
            with one.armed(loaded.model):
                logits.append(weight * engine.read([prompts[row] for row in rows], lambda all_: all_.cpu()))
        yield rows, reduce(sum(logits[1:], start=logits[0]))
