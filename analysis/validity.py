"""What is known of a readout's validity, kept per model, defense and readout for later runs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from analysis import agreement, judge, kept, manifest, refusals, spoken
from analysis.attacks import Attack
from analysis.bench import Bench
from analysis.readout import Readout
from analysis.tables import UNVALIDATED
from defenses import Defense


def keep(
    bench: Bench, defense: Defense, readout: Readout, judged_by: str, tokens: int, row: dict[str, Any]
) -> None:
    """Keep a condition's row of `validity.csv`, unless one that rests on more answers is there."""
    place = _place(bench, defense, readout)
    if (kept.read(place) or {}).get("n", 0) <= row["n"]:
        kept.write(place, row | {"judge": judged_by, "new_tokens": tokens})


def row(bench: Bench, defense: Defense, readout: Readout) -> dict[str, Any]:
    """Return the row that was kept; empty where there is none."""
    return kept.read(_place(bench, defense, readout)) or {}


def known(bench: Bench, defense: Defense, readout: Readout) -> str:
    """Return `trusted`, `not trusted` or `cannot tell` as it was measured, or that it was not."""
    return str(row(bench, defense, readout).get("trusted", UNVALIDATED))


def of_run(
    bench: Bench,
    attacks: Iterable[Attack],
    defenses: Mapping[str, Defense],
    readout: Readout,
    scored: Container[tuple[str, str]],
) -> dict[str, dict[str, str]]:
    """Return what is known of each condition of a run, by attack and name.

    Args:
        bench: the model.
        attacks: of the run.
        defenses: by their names in the tables.
        readout: of the run.
        scored: attack and name of the conditions that were scored; of others nothing is said.
    """
    return {
        attack.name: {
            name: known(bench.under(attack), defense, readout)
            for name, defense in defenses.items()
            if (attack.name, name) in scored
        }
        for attack in attacks
    }


def _place(bench: Bench, defense: Defense, readout: Readout) -> Path | None:
    """A file named by all that the margins depend on, the queries aside; secrets enter as fingerprints."""
    about = {
        "defense": manifest.told_apart(defense, bench.seed),
        "template": bench.loaded.tokenizer.chat_template,
        "attack": "/".join((bench.attack.name, *bench.attack.made_from)),
        "readout": [readout.ids, readout.weights, readout.threshold, readout.prefix],
        "asked": [readout.questions, readout.odds],
    }
    return kept.place("validity", bench.loaded, about, (agreement, judge, refusals, spoken))
