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

from analysis.engine import Engine, LogitReducer
from analysis.models import LoadedModel
from analysis.readout import Readout
from analysis.store import CacheKey, ScoreCache
from defenses import Defense

# The code that decides what a model reads and how its logits become a margin.
SCORING_SOURCES = (
    "analysis/models/*.py",
    "analysis/readouts/*.py",
    "analysis/attacks.py",
    "analysis/run.py",
    "analysis/mechanism/directions.py",
    "defenses/*.py",
)
# The code that turns margins and responses into thresholds, verdicts and costs.
STUDY_SOURCES = ("analysis/judges/*.py", "analysis/stats/*.py", "analysis/studies/*.py")
_MAX_BLENDED_PROMPTS = 128  # prompts whose logits are held at once, where those of several models are added up


@cache
def hash_code(*patterns: str) -> str:
    """Return the SHA-256 of the source files that match the patterns, so that other code finds no cached result.

    >>> len(hash_code(*SCORING_SOURCES))
    64

    Args:
        patterns: glob patterns, relative to the folder that holds both packages.
    """
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def describe_computation(loaded_model: LoadedModel) -> dict[str, Any]:
    """Return what all that a model computes depends on: weights, configuration, device, code, libraries."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "weights": [loaded_model.origin.get("sha256"), loaded_model.origin.get("state_sha256")],
        "config": {**loaded_model.model.config.to_dict(), "_name_or_path": ""},
        "code": hash_code(*SCORING_SOURCES),
        "dtype": str(loaded_model.model.dtype),
        "device": loaded_model.model.device.type,
        "versions": versions,
    }


def score_prompts(
    loaded_model: LoadedModel,
    engine: Engine,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    readout: Readout,
    score_cache: ScoreCache | None = None,
    on_progress: Callable[[int], None] = lambda prompts: None,
) -> Float[Tensor, "prompts 2"]:
    """Return margin and coverage of every prompt, those of earlier runs from the store.

    Args:
        loaded_model: the model.
        engine: that holds it.
        defense: is armed meanwhile.
        prompts: token ids, the readout's prefix included.
        readout: how logits become a margin.
        score_cache: where scores are looked up and kept.
        on_progress: told how many more prompts are finished.
    """
    arms = [(weight, one.cacheable_fingerprint()) for weight, one in list_blend_members(defense)]
    if any(change is None for _, change in arms):
        score_cache = None
    namer = CacheKey({**describe_computation(loaded_model), "arms": arms, "readout": [readout.ids, readout.weights, readout.is_log_odds]})
    names = [namer.make_key(ids) for ids in prompts]
    known = score_cache.read_scores(names) if score_cache is not None else {}
    if score_cache is not None:
        score_cache.n_hits += sum(name in known for name in names)
    # Prompts that are the same are read once.
    new = list({name: at for at, name in enumerate(names) if name not in known}.values())
    asked = [prompts[at] for at in new]
    for rows, values in iterate_defended_logits(engine, loaded_model, defense, asked, readout.compute_margins) if new else ():
        fresh = {names[new[row]]: (float(m), float(c)) for row, (m, c) in zip(rows, values, strict=True)}
        if score_cache is not None:
            score_cache.write_scores((name, *value) for name, value in fresh.items())
        known |= fresh
        on_progress(len(rows))
    on_progress(len(prompts) - len(new))
    return torch.tensor([known[name] for name in names], dtype=torch.float64)


def list_blend_members(defense: Defense) -> tuple[tuple[float, Defense], ...]:
    """Return what is armed for a first token, and by what weight its logits count."""
    return defense.logit_blend() or ((1.0, defense),)


def iterate_defended_logits(
    engine: Engine,
    loaded_model: LoadedModel,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    reducer: LogitReducer,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield which prompts, and what is made of their first-answer logits while the defense is armed.

    Args:
        engine: that holds the model.
        loaded_model: the model.
        defense: where it chooses from several models, their logits are added up by weight.
        prompts: token ids.
        reducer: logits -> what is kept of them.
    """
    blend = list_blend_members(defense)
    if not defense.logit_blend():
        with defense.apply_to(loaded_model.model):
            yield from engine.iterate_first_token(prompts, reducer)
        return
    for start in range(0, len(prompts), _MAX_BLENDED_PROMPTS):
        rows = list(range(start, min(start + _MAX_BLENDED_PROMPTS, len(prompts))))
        logits = []
        for weight, one in blend:
            with one.apply_to(loaded_model.model):
                logits.append(weight * engine.read_first_token([prompts[row] for row in rows], lambda all_: all_.cpu()))
        yield rows, reducer(sum(logits[1:], start=logits[0]))
