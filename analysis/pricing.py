"""What conditions cost on this machine: timed once, and kept for later runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from analysis import cost, kept, manifest, queries, showing, timing
from analysis.preparing import RunSetup
from analysis.tables import UNDEFENDED
from defenses import Defense
from defenses.ensemble import list_members
from defenses.tuned import TunedDefense

N_COST_QUERIES = 8  # queries on which costs are measured


def measure_cost(
    setup: RunSetup, conditions: Mapping[str, Defense], seed: int, console: Console, n_queries: int = N_COST_QUERIES
) -> pd.DataFrame:
    """Return what each condition costs under the first attack; weights with what it took to train them.

    Args:
        setup: loaded and prepared.
        conditions: the conditions, the undefended one among them.
        seed: of the intervals.
        console: for progress.
        n_queries: queries that are timed.
    """
    few = queries.sample_queries(setup.query_set.queries, n_queries)
    with showing.make_progress_bar(console) as bar:
        task = bar.add_task("timing", total=len(conditions) * len(few))
        bench = setup.session.with_attack(setup.attacks[0])
        measured = timing.time_conditions(bench, conditions, few, lambda: bar.advance(task))
    trained = {
        name: one.adapter.manifest
        for name, defense in conditions.items()
        for one in list_members(defense)
        if isinstance(one, TunedDefense) and one.adapter is not None
    }
    found = cost.summarize_costs(measured, seed).assign(attack=bench.attack.name)
    for column, key in (("training_examples", "n_examples"), ("training_seconds", "wall_seconds")):
        found[column] = [trained.get(name, {}).get(key) for name in found["defense"]]
    return found


def cached_cost(setup: RunSetup, conditions: Mapping[str, Defense], seed: int, console: Console, n_queries: int) -> pd.DataFrame:
    """Return what `priced` returns; what an earlier run has timed on this machine is not timed again.

    Args:
        setup: as for `priced`.
        conditions: as for `priced`.
        seed: as for `priced`.
        console: as for `priced`.
        n_queries: as for `priced`.
    """
    places = {name: _cost_cache_path(setup, one, n_queries) for name, one in conditions.items()}
    rows = {name: row for name, place in places.items() if (row := kept.read_cached_json(place)) is not None}
    new = {name: one for name, one in conditions.items() if name not in rows}
    if new:
        measured = measure_cost(setup, {UNDEFENDED: conditions[UNDEFENDED]} | new, seed, console, n_queries)
        for row in showing.iterate_rows(measured):
            if row["defense"] in new:
                kept.write_cached_json(places[row["defense"]], row)
                rows[row["defense"]] = row
    return pd.DataFrame([rows[name] | {"defense": name} for name in conditions])


def _cost_cache_path(setup: RunSetup, defense: Defense, n_queries: int) -> Path | None:
    """A file named by what the time depends on; secrets enter as fingerprints."""
    bench = setup.session
    about = {
        "device": [str(bench.loaded_model.model.device), torch.get_num_threads()],
        "defense": manifest.identify_defense(defense, bench.seed),
        "attack": [setup.attacks[0].name, *setup.attacks[0].wording_sha256],
        "queries": [query.text for query in queries.sample_queries(setup.query_set.queries, n_queries)],
    }
    return kept.make_json_cache_path("cost", bench.loaded_model, about)
