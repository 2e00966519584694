"""What run.json says: everything that another person needs to make the same numbers again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.attacks import Attack
from analysis.bench import Bench
from analysis.models import LoadedModel
from analysis.queries import QuerySet
from analysis.readout import Readout
from defenses import Defense
from defenses.backdoor import Secret
from defenses.ensemble import Stack, members
from defenses.settings import settings_of
from defenses.tuned import Tuned


def of(
    bench: Bench,
    readout: Readout,
    defenses: Mapping[str, Defense],
    data: QuerySet,
    split: str,
    limit: int | None,
) -> dict[str, Any]:
    """Return how the numbers of a run are made, in plain values; secrets as fingerprints.

    Args:
        bench: the model, and the seed.
        readout: how margins are read.
        defenses: by their names in the tables.
        data: the queries that are scored.
        split: which part of the set they are.
        limit: as the user gave it.
    """
    return {
        "model": {"name": bench.loaded.name, **bench.loaded.origin},
        "device": str(bench.loaded.model.device),
        "dtype": str(bench.loaded.model.dtype).removeprefix("torch."),
        "readout": of_readout(readout),
        "system_role": bench.renderer.system_policy,
        "defenses": {name: of_defense(defense) for name, defense in defenses.items()},
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "sources": data.sources,
            "split": split,
            "limit": limit,
            "n_harmful": sum(query.harmful for query in data.queries),
            "n_benign": sum(not query.harmful for query in data.queries),
        },
        "seed": bench.seed,
        "versions": versions("refusalscope", "torch", "transformers", "numpy", "pandas", "scipy"),
    }


def of_readout(readout: Readout) -> dict[str, Any]:
    """Return how a readout makes a forward pass a number."""
    sides = {
        name: [
            token for token, weight in zip(readout.tokens, readout.weights, strict=True) if weight * sign > 0
        ]
        for name, sign in (("refuse", 1), ("comply", -1))
    }
    return {
        "name": readout.name,
        **sides,
        "ids": readout.ids,
        "weights": readout.weights,
        "threshold": readout.threshold,
        "answer_prefix": readout.prefix,
        "answers_begin": readout.begins,
        "threshold_fitted": readout.fitted,
        "questions": readout.questions,
        "log_odds": readout.odds,
        "made": readout.notices,
    }


def of_attacks(attacks: Sequence[Attack]) -> dict[str, Any]:
    """Return the names of attacks, and the SHA-256 of the rows or files that word them."""
    return {
        "attacks": [attack.name for attack in attacks],
        "attacks_sha256": {attack.name: attack.made_from for attack in attacks if attack.made_from},
    }


def versions(*packages: str) -> dict[str, str]:
    """Return what is installed, Python first.

    >>> list(versions("numpy"))
    ['python', 'numpy']
    """
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **installed}


def of_model(loaded: LoadedModel) -> list[str | None]:
    """Return what tells one set of weights from another."""
    origin = loaded.origin
    return [origin.get("sha256"), origin.get("state_sha256"), str(loaded.model.dtype)]


def of_defense(defense: Defense) -> dict[str, Any]:
    """Return a defense's family and settings; secrets as fingerprints, weights by their SHA-256."""
    if isinstance(defense, Stack):
        return {"family": defense.family, "members": {one.name: of_defense(one) for one in defense.members}}
    settings = settings_of(defense)
    adapter, arms = (defense.adapter if isinstance(defense, Tuned) else None), defense.arms()
    return {
        "family": defense.family,
        "settings": {key: str(one) if isinstance(one, Path) else one for key, one in settings.items()},
        "secrets": [Secret(text).fingerprint for text in defense.secrets()],
        **({"weights_sha256": adapter.sha256, "weights_scaling": adapter.scaling} if adapter else {}),
        **({"armed": arms} if arms and not adapter else {}),
        # What a user's own class does is known by its source alone.
        **({"source_sha256": _source_sha256(type(defense))} if defense.own else {}),
    }


def told_apart(defense: Defense, seed: int) -> list[Any] | None:
    """Return what tells a defense from all others, or None where nothing does.

    Of a class that was typed into a notebook, what it calls may change unseen.
    """
    for one in members(defense):
        if one.own and not _files(type(one)):
            return None
    return [type(defense).__qualname__, of_defense(defense), seed]


def _source_sha256(kind: type[Defense]) -> str | None:
    """The digest of the file that defines a class, or, of one typed into a notebook, of its methods."""
    written, files = _written(kind), _files(kind)
    if len(files) == 1:
        return hashlib.sha256(files.pop().read_bytes()).hexdigest()
    return hashlib.sha256("".join(map(inspect.getsource, written)).encode()).hexdigest() if written else None


def _files(kind: type[Defense]) -> set[Path]:
    """The files that define a class; none if it was typed in."""
    found = {Path(inspect.getfile(one)) for one in _written(kind)}
    return found if all(path.is_file() for path in found) else set()


def _written(kind: type[Defense]) -> list[Any]:
    """What somebody wrote of a class and can be read: its methods, or itself where it has none."""
    methods = map(inspect.unwrap, filter(inspect.isfunction, vars(kind).values()))  # not what decorates them
    return [one for one in methods if _of_source(one)] or ([kind] if _of_source(kind) else [])


def _of_source(written: Any) -> bool:
    """Whether somebody wrote it and it can be read; dataclasses make some methods."""
    try:
        return bool(inspect.getsource(written))
    except (OSError, TypeError):
        return False
