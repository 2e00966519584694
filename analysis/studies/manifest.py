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
from analysis.datasets.queries import QuerySet
from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from defenses.backdoor import Secret
from defenses.contract import Defense
from defenses.settings import get_settings
from defenses.stack import Stack, list_members
from defenses.tuned import TunedDefense


def describe_run(
    session: ModelSession,
    readout: Readout,
    defenses: Mapping[str, Defense],
    query_set: QuerySet,
    split: str,
    limit: int | None,
) -> dict[str, Any]:
    """Return how the numbers of a run are made, in plain values; secrets as fingerprints.

    Args:
        session: the model, and the seed.
        readout: how margins are read.
        defenses: by their names in the tables.
        query_set: the queries that are scored.
        split: which part of the set they are.
        limit: as the user gave it.
    """
    return {
        "model": {"name": session.loaded_model.name, **session.loaded_model.origin},
        "device": str(session.loaded_model.model.device),
        "dtype": str(session.loaded_model.model.dtype).removeprefix("torch."),
        "readout": describe_readout(readout),
        "system_role": session.chat_template.system_policy,
        "defenses": {name: describe_defense(defense) for name, defense in defenses.items()},
        "data": {
            "name": query_set.name,
            "sha256": query_set.sha256,
            "sources": query_set.sources,
            "split": split,
            "limit": limit,
            "n_harmful": sum(query.harmful for query in query_set.queries),
            "n_benign": sum(not query.harmful for query in query_set.queries),
        },
        "seed": session.seed,
        "versions": collect_versions("refusalscope", "torch", "transformers", "numpy", "pandas", "scipy"),
    }


def describe_readout(readout: Readout) -> dict[str, Any]:
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
        "answer_prefix": readout.response_prefix,
        "answers_begin": readout.prefill,
        "threshold_fitted": readout.threshold_source,
        "questions": readout.questions,
        "log_odds": readout.is_log_odds,
        "made": readout.notices,
    }


def describe_attacks(attacks: Sequence[Attack]) -> dict[str, Any]:
    """Return the names of attacks, and the SHA-256 of the rows or files that word them."""
    return {
        "attacks": [attack.name for attack in attacks],
        "attacks_sha256": {attack.name: attack.wording_sha256 for attack in attacks if attack.wording_sha256},
    }


def collect_versions(*packages: str) -> dict[str, str]:
    """Return what is installed, Python first.

    >>> list(collect_versions("numpy"))
    ['python', 'numpy']
    """
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **installed}


def describe_defense(defense: Defense) -> dict[str, Any]:
    """Return a defense's family and settings; secrets as fingerprints, weights by their SHA-256."""
    if isinstance(defense, Stack):
        return {
            "family": defense.family,
            "members": {one.name: describe_defense(one) for one in defense.members},
        }
    settings = get_settings(defense)
    adapter, arms = (
        (defense.adapter if isinstance(defense, TunedDefense) else None),
        defense.weights_fingerprint(),
    )
    return {
        "family": defense.family,
        "settings": {key: str(one) if isinstance(one, Path) else one for key, one in settings.items()},
        "secrets": [Secret(text).fingerprint for text in defense.secret_texts()],
        **({"weights_sha256": adapter.sha256, "weights_scaling": adapter.scaling} if adapter else {}),
        **({"armed": arms} if arms and not adapter else {}),
        # What a user's own class does is known by its source alone.
        **({"source_sha256": _hash_class_source(type(defense))} if defense.is_user_defined else {}),
    }


def identify_defense(defense: Defense, seed: int) -> list[Any] | None:
    """Return what tells a defense from all others, or None where nothing does.

    Of a class that was typed into a notebook, what it calls may change unseen.
    """
    for one in list_members(defense):
        if one.is_user_defined and not _class_source_files(type(one)):
            return None
    return [type(defense).__qualname__, describe_defense(defense), seed]


def _hash_class_source(defense_class: type[Defense]) -> str | None:
    """The digest of the file that defines a class, or, of one typed into a notebook, of its methods."""
    written, files = _readable_definitions(defense_class), _class_source_files(defense_class)
    if len(files) == 1:
        return hashlib.sha256(files.pop().read_bytes()).hexdigest()
    return hashlib.sha256("".join(map(inspect.getsource, written)).encode()).hexdigest() if written else None


def _class_source_files(defense_class: type[Defense]) -> set[Path]:
    """The files that define a class; none if it was typed in."""
    found = {Path(inspect.getfile(one)) for one in _readable_definitions(defense_class)}
    return found if all(path.is_file() for path in found) else set()


def _readable_definitions(defense_class: type[Defense]) -> list[Any]:
    """What somebody wrote of a class and can be read: its methods, or itself where it has none."""
    methods = map(
        inspect.unwrap, filter(inspect.isfunction, vars(defense_class).values())
    )  # not what decorates them
    return [one for one in methods if _has_readable_source(one)] or (
        [defense_class] if _has_readable_source(defense_class) else []
    )


def _has_readable_source(definition: Any) -> bool:
    """Whether somebody wrote it and it can be read; dataclasses make some methods."""
    try:
        return bool(inspect.getsource(definition))
    except (OSError, TypeError):
        return False
