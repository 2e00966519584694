"""What conditions cost on this machine: timed once, and kept for later runs."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from rich.console import Console

from analysis import cost, queries, showing, timing
from analysis.preparing import Ready
from defenses import Defense
from defenses.adapters import Tuned
from defenses.ensemble import members

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
