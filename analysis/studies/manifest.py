"""The manifest of a run (run.json): everything that is needed to reproduce its numbers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from analysis.attacks import Attack
from analysis.datasets.queries import QuerySet
from analysis.models.cache import SCORING_SOURCES, hash_code
from analysis.models.chat_template import redact_secrets
from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from analysis.studies.run_spec import RunSpec
from defenses.backdoor import Secret
from defenses.contract import Defense
from defenses.detection import Detector
from defenses.errors import UserError
from defenses.settings import get_settings, parse_setting
from defenses.stack import Stack, list_members
from defenses.steering import SelectiveSteering
from defenses.tuned import TunedDefense
from defenses.tuning import AdapterWeights


@dataclass(frozen=True)
class RunTimer:
    """When a run started, and how long it has taken.

    Attributes:
        started: date and time of the start.
        clock: monotonic clock at the start, seconds.
    """

    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.perf_counter)

    def describe_time(self) -> dict[str, Any]:
        """Return the entries of run.json: start, and wall time until now in seconds."""
        return {
            "created": self.started.isoformat(timespec="seconds"),
            "wall_seconds": round(time.perf_counter() - self.clock, 1),
        }


def describe_run(
    session: ModelSession,
    readout: Readout,
    defenses: Mapping[str, Defense],
    query_set: QuerySet,
    split: str,
    limit: int | None,
) -> dict[str, Any]:
    """Return how the numbers of a run are made, in plain values; secrets appear as fingerprints.

    Args:
        session: the model, and the seed.
        readout: the readout of the margins.
        defenses: condition name → defense.
        query_set: the queries that are scored.
        split: name of their split.
        limit: maximum number of queries, as the user gave it.
    """
    return {
        **describe_inputs(session, defenses, query_set, split, limit),
        "readout": describe_readout(readout),
        "versions": collect_versions("refusalscope", "torch", "transformers", "numpy", "pandas", "scipy"),
    }


def describe_inputs(
    session: ModelSession, defenses: Mapping[str, Defense], query_set: QuerySet, split: str, limit: int | None
) -> dict[str, Any]:
    """Return the entries of `describe_run` on the model, the defenses and the queries.

    Args:
        session: the model, and the seed.
        defenses: condition name → defense.
        query_set: the queries that are scored.
        split: name of their split.
        limit: maximum number of queries, as the user gave it.
    """
    quantization = session.loaded_model.quantization
    return {
        "model": {
            "name": session.loaded_model.name,
            **session.loaded_model.origin,
            **({"quantization": quantization} if quantization else {}),
        },
        **session.loaded_model.hardware,
        "system_role": session.chat_template.system_policy,
        "chat_template": session.chat_template.identity,
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
    }


def describe_options(
    spec: RunSpec,
    defenses: Sequence[str | Defense] = (),
    settings: Sequence[str] = (),
    secrets: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the options with which the same model, queries, attacks and defenses are made again.

    Args:
        spec: options of the run.
        defenses: as the user asked for them. An object of a shipped class is stored as its name and settings.
        settings: settings of the named defenses, `key=value`, as the user gave them.
        secrets: texts that are redacted.

    Returns:
        Plain values; `not_repeatable` is the reason why they do not suffice, or None.
    """
    reasons = []
    if not isinstance(spec.data, str):
        reasons.append(f"its queries were {spec.data.name}, which is in no file: write them to a .csv file")
    names, all_settings = [], list(settings)
    for defense in defenses:
        restated = (defense, []) if isinstance(defense, str) else _restate_defense(defense)
        if restated is None:
            assert isinstance(defense, Defense)
            reasons.append(
                f"its defense {defense.name!r} was made in Python: put the class into a .py file, give it "
                "defaults"
            )
            restated = (defense.name, [])
        names.append(restated[0])
        all_settings += restated[1]
    redacted = [redact_secrets(setting, secrets) for setting in all_settings]
    if redacted != all_settings:
        reasons.append("a setting contains a secret, which is not stored: put the secret into a file")
    return {
        "model": spec.model,
        "data": spec.data if isinstance(spec.data, str) else None,
        "split": spec.split,
        "limit": spec.limit,
        "batch_size": spec.batch_size,
        "share_prefix": spec.share_prefix,
        "device": spec.device,
        "dtype": spec.dtype,
        "seed": spec.seed,
        "attacks": [attack.option for attack in spec.attacks],
        "readouts": list(spec.readouts),
        "template": spec.template,
        "answer_prefix": spec.answer_prefix,
        **({"tokenizer": spec.tokenizer} if spec.tokenizer else {}),
        "responses": "all" if spec.max_responses is None else spec.max_responses or "none",
        "defenses": names,
        "settings": redacted,
        "code_sha256": hash_code(*SCORING_SOURCES),
        "not_repeatable": reasons[0] if reasons else None,
    }


def describe_readout(readout: Readout) -> dict[str, Any]:
    """Return how a readout turns a forward pass into a margin."""
    return {
        "name": readout.name,
        "refuse": readout.list_tokens(refuses=True),
        "comply": readout.list_tokens(refuses=False),
        "ids": readout.ids,
        "weights": readout.weights,
        "threshold": readout.threshold,
        "answer_prefix": readout.response_prefix,
        "answers_begin": readout.prefill,
        "threshold_quantiles": readout.threshold_quantiles,
        "threshold_fitted": readout.threshold_source,
        "questions": readout.questions,
        "log_odds": readout.is_log_odds,
        "base_value": readout.base_value,
        "sharpness": readout.sharpness,
        "branches": [asdict(branch) for branch in readout.branches],
        "made": readout.notices,
    }


def describe_attacks(attacks: Sequence[Attack]) -> dict[str, Any]:
    """Return the names of attacks and the SHA-256 of the rows or files that hold their wording."""
    return {
        "attacks": [attack.name for attack in attacks],
        "attacks_sha256": {attack.name: attack.wording_sha256 for attack in attacks if attack.wording_sha256},
    }


def collect_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of installed packages.

    >>> list(collect_versions("numpy"))
    ['python', 'numpy']
    """
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **installed}


def describe_defense(defense: Defense) -> dict[str, Any]:
    """Return a defense's family and settings; secrets as fingerprints, weights as SHA-256."""
    if isinstance(defense, Stack):
        return {
            "family": defense.family,
            "members": {member.name: describe_defense(member) for member in defense.members},
        }
    settings = get_settings(defense)
    adapter = defense.adapter if isinstance(defense, TunedDefense) else None
    fingerprint = defense.weights_fingerprint()
    return {
        "family": defense.family,
        "settings": {
            key: str(value) if isinstance(value, Path) else value for key, value in settings.items()
        },
        "secrets": [Secret(text).fingerprint for text in defense.secret_texts()],
        **({"weights_sha256": adapter.sha256, "weights_config": adapter.config} if adapter else {}),
        **({"armed": fingerprint} if fingerprint and not adapter else {}),
        **({"detector": defense.describe_fit()} if isinstance(defense, Detector) else {}),
        **({"condition": defense.describe_fit()} if isinstance(defense, SelectiveSteering) else {}),
        # The behavior of a user-defined class is known from its source only.
        **({"source_sha256": _hash_class_source(type(defense))} if defense.is_user_defined else {}),
    }


def identify_defense(defense: Defense, seed: int) -> list[Any] | None:
    """Return what distinguishes a defense from all others in cache keys, or None if nothing does.

    A class typed into a notebook has no such identity: the functions that it calls may change unnoticed.

    Args:
        defense: prepared for a model.
        seed: random seed of the run.
    """
    for member in list_members(defense):
        if member.is_user_defined and not _class_source_files(type(member)):
            return None
    return [type(defense).__qualname__, describe_defense(defense), seed]


def _restate_defense(defense: Defense) -> tuple[str, list[str]] | None:
    """Return the name and the settings that make a defense object again; None if nothing does."""
    names, settings = [], []
    for member in list_members(defense):
        if member.is_user_defined:
            return None
        # An adapter with a name of its own is made again from its folder.
        if isinstance(member, AdapterWeights) and member.label:
            names.append(str(member.weights))
        else:
            names.append(member.name)
        defaults = get_settings(type(member))
        for key, value in get_settings(member).items():
            if value == defaults[key]:
                continue
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            try:
                is_restored = parse_setting(type(member), key, text) == value
            except UserError:
                is_restored = False
            if not is_restored:
                return None
            settings.append(f"{member.name}.{key}={text}")
    return "+".join(names), settings


def _hash_class_source(defense_class: type[Defense]) -> str | None:
    """Hash the file that defines a class, or, for a class typed into a notebook, its methods."""
    definitions, files = _readable_definitions(defense_class), _class_source_files(defense_class)
    if len(files) == 1:
        return hashlib.sha256(files.pop().read_bytes()).hexdigest()
    if not definitions:
        return None
    return hashlib.sha256("".join(map(inspect.getsource, definitions)).encode()).hexdigest()


def _class_source_files(defense_class: type[Defense]) -> set[Path]:
    """Return the files that define a class; none for a class typed into a notebook."""
    files = {Path(inspect.getfile(definition)) for definition in _readable_definitions(defense_class)}
    return files if all(path.is_file() for path in files) else set()


def _readable_definitions(defense_class: type[Defense]) -> list[Any]:
    """Return the methods of a class with readable source, or else the class itself."""
    functions = filter(inspect.isfunction, vars(defense_class).values())
    methods = map(inspect.unwrap, functions)  # the methods themselves, not their decorators
    return [method for method in methods if _has_readable_source(method)] or (
        [defense_class] if _has_readable_source(defense_class) else []
    )


def _has_readable_source(definition: Any) -> bool:
    """Return whether the source can be read; the methods that dataclasses generate have none."""
    try:
        return bool(inspect.getsource(definition))
    except (OSError, TypeError):
        return False
