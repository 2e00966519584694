"""What conditions cost on this machine: timed once, and kept for later runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from analysis import cost, kept, manifest, queries, showing, timing
from analysis.preparing import Ready
from analysis.tables import UNDEFENDED
from defenses import Defense
from defenses.ensemble import members
from defenses.tuned import Tuned

TIMED = 8  # queries on which costs are measured


def priced(
    ready: Ready, every: Mapping[str, Defense], seed: int, console: Console, asked: int = TIMED
) -> pd.DataFrame:
    """Return what each condition costs under the first attack; weights with what it took to train them.

    Args:
        ready: loaded and prepared.
        every: the conditions, the undefended one among them.
        seed: of the intervals.
        console: for progress.
        asked: queries that are timed.
    """
    few = queries.sample(ready.data.queries, asked)
    with showing.progress(console) as bar:
        task = bar.add_task("timing", total=len(every) * len(few))
        bench = ready.bench.under(ready.attacks[0])
        measured = timing.timed(bench, every, few, lambda: bar.advance(task))
    trained = {
        name: one.adapter.manifest
        for name, defense in every.items()
        for one in members(defense)
        if isinstance(one, Tuned) and one.adapter is not None
    }
    found = cost.costs(measured, seed).assign(attack=bench.attack.name)
    for column, key in (("training_examples", "n_examples"), ("training_seconds", "wall_seconds")):
        found[column] = [trained.get(name, {}).get(key) for name in found["defense"]]
    return found


def once(ready: Ready, every: Mapping[str, Defense], seed: int, console: Console, asked: int) -> pd.DataFrame:
    """Return what `priced` returns; what an earlier run has timed on this machine is not timed again.

    Args:
        ready: as for `priced`.
        every: as for `priced`.
        seed: as for `priced`.
        console: as for `priced`.
        asked: as for `priced`.
    """
    places = {name: _place(ready, one, asked) for name, one in every.items()}
    rows = {name: row for name, place in places.items() if (row := kept.read(place)) is not None}
    new = {name: one for name, one in every.items() if name not in rows}
    if new:
        measured = priced(ready, {UNDEFENDED: every[UNDEFENDED]} | new, seed, console, asked)
        for row in showing.rows(measured):
            if row["defense"] in new:
                kept.write(places[row["defense"]], row)
                rows[row["defense"]] = row
    return pd.DataFrame([rows[name] | {"defense": name} for name in every])


def _place(ready: Ready, defense: Defense, asked: int) -> Path | None:
    """A file named by what the time depends on; secrets enter as fingerprints."""
    bench = ready.bench
    about = {
        "device": [str(bench.loaded.model.device), torch.get_num_threads()],
        "defense": manifest.told_apart(defense, bench.seed),
        "attack": [ready.attacks[0].name, *ready.attacks[0].made_from],
        "queries": [query.text for query in queries.sample(ready.data.queries, asked)],
    }
    return kept.place("cost", bench.loaded, about, (timing, cost))
