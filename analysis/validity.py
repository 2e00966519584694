"""What is known of a readout's validity, kept per model, defense and readout for later runs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from analysis import agreement, judge, kept, manifest, refusals, spoken
from analysis.attacks import Attack
from analysis.bench import ModelSession
from analysis.readout import Readout
from analysis.tables import UNVALIDATED
from defenses import Defense


def save_validity(
    session: ModelSession, defense: Defense, readout: Readout, judge_name: str, max_new_tokens: int, row: dict[str, Any]
) -> None:
    """Keep a condition's row of `validity.csv`, unless one that rests on more answers is there."""
    place = _validity_cache_path(session, defense, readout)
    if (kept.read_cached_json(place) or {}).get("n", 0) <= row["n"]:
        kept.write_cached_json(place, row | {"judge": judge_name, "new_tokens": max_new_tokens})


def load_validity(session: ModelSession, defense: Defense, readout: Readout) -> dict[str, Any]:
    """Return the row that was kept; empty where there is none."""
    return kept.read_cached_json(_validity_cache_path(session, defense, readout)) or {}


def load_trust(session: ModelSession, defense: Defense, readout: Readout) -> str:
    """Return `trusted`, `not trusted` or `cannot tell` as it was measured, or that it was not."""
    return str(load_validity(session, defense, readout).get("trusted", UNVALIDATED))


def collect_trust(
    session: ModelSession,
    attacks: Iterable[Attack],
    conditions: Mapping[str, Defense],
    readout: Readout,
    scored_conditions: Container[tuple[str, str]],
) -> dict[str, dict[str, str]]:
    """Return what is known of each condition of a run, by attack and name.

    Args:
        session: the model.
        attacks: of the run.
        conditions: by their names in the tables.
        readout: of the run.
        scored_conditions: attack and name of the conditions that were scored; of others nothing is said.
    """
    return {
        attack.name: {
            name: load_trust(session.with_attack(attack), defense, readout)
            for name, defense in conditions.items()
            if (attack.name, name) in scored_conditions
        }
        for attack in attacks
    }


def _validity_cache_path(session: ModelSession, defense: Defense, readout: Readout) -> Path | None:
    """A file named by all that the margins depend on, the queries aside; secrets enter as fingerprints."""
    about = {
        "defense": manifest.identify_defense(defense, session.seed),
        "template": session.loaded_model.tokenizer.chat_template,
        "attack": "/".join((session.attack.name, *session.attack.wording_sha256)),
        "readout": [readout.ids, readout.weights, readout.threshold, readout.response_prefix],
        "asked": [readout.questions, readout.is_log_odds],
    }
    return kept.make_json_cache_path("validity", session.loaded_model, about)
