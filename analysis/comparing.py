"""What `analyze ensembles` does: predict, observe, compare, draw; the tables are shared with `recommend`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis import additivity, saving, showing, standings
from analysis.additivity import Drawn
from analysis.combining import Tried, combine, promising
from analysis.decompose import summarize
from analysis.ensembles import ALONE, CHOSEN_ON, REPORTED_ON, STACK
from analysis.found import Found
from analysis.request import Request, default_out
from analysis.sweeping import failed_cells, say_written
from defenses import Defense

_ALL = 1000  # rows up to which all have intervals; of more, single defenses, stacks and the front


def compare(
    request: Request,
    names: Sequence[str],
    settings: Sequence[str],
    size: int,
    runs: int,
    out: Path | None,
) -> int:
    """Predict and observe what defenses come to together; save tables and figures, print the front."""
    out = saving.usable(out or default_out(request.model, ["ensembles", *names], datetime.now(UTC)))
    console = Console(stderr=True)
    found = find(request, names, settings, size, runs, console)
    saving.save(out, found.run, console)
    tables = found.run.tables
    standings.front(tables["candidates"], found.run.record)
    standings.agreement(tables["additivity"])
    standings.distances(tables["distance"])
    say_written(out, found.lost, console)
    return 1 if found.lost else 0


def find(
    request: Request,
    names: Sequence[str | Defense],
    settings: Sequence[str],
    size: int,
    runs: int,
    console: Console,
) -> Found:
    """Predict and observe what defenses come to together.

    Args:
        request: what the user asked for.
        names: of the defenses, or defenses themselves.
        settings: of those that are named.
        size: members of a team at most.
        runs: how many stacks are run that promise most, and how many that are drawn by chance.
        console: for progress.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    tried = combine(request, names, settings, size, runs, promising, console)
    tables, record = told(tried, tried.candidates(), request, console)
    record |= {
        "created": started.isoformat(timespec="seconds"),
        "wall_seconds": round(time.perf_counter() - clock, 1),
    }
    return whole("ensembles", tried, tables, record)


def told(
    tried: Tried, found: pd.DataFrame, request: Request, console: Console
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Return the tables of what was tried, intervals among them, and the beginning of run.json.

    Args:
        tried: what came of it.
        found: the candidates.
        request: what the user asked for.
        console: for progress.
    """
    rows = tried.rows
    front = pd.MultiIndex.from_frame(found.loc[found["on_front"], ["members", "how"]])
    told_of = rows["how"].isin((ALONE, STACK)) | pd.MultiIndex.from_frame(rows[["members", "how"]]).isin(
        front
    )
    known = (rows["split"] == REPORTED_ON) & rows["observed_shift"].notna()
    told_of |= known.sum() <= _ALL
    seen = rows[told_of & known]
    wanted = dict(zip(map(int, seen.index), showing.rows(seen), strict=True))
    clouds: dict[int, Drawn] = {}
    ends: dict[int, dict[str, float]] = {}
    with showing.progress(console) as bar:
        task = bar.add_task("intervals", total=len(wanted))
        for index, row in wanted.items():
            half = tried.halves[row["attack"], REPORTED_ON]
            if row["how"] != ALONE:
                team = row["members"].split("+")
                clouds[index] = additivity.drawn(half, team, row["how"], tried.fitted_to)
            ends[index] = additivity.intervals(half, row, tried.fitted_to, clouds.get(index))
            bar.advance(task)
    with console.status("comparing"):
        shifting = dict(zip(tried.mechanisms["defense"], tried.mechanisms["p_shift"], strict=True))
        raised = [
            additivity.raised_distance(
                half,
                rows[(rows["attack"] == attack) & (rows["split"] == split)],
                shifting,
                tried.fitted_to,
            )
            for (attack, split), half in tried.halves.items()
            if split == REPORTED_ON
        ]
        whole = rows.join(pd.DataFrame.from_dict(ends, orient="index"))
        tables = {
            "scores": pd.concat([table.frame.assign(split=name) for name, table in tried.scores.items()]),
            "summary": summarize(tried.scores[REPORTED_ON], seed=request.seed).frame,
            "mechanisms": tried.mechanisms,
            "ensembles": whole,
            "additivity": additivity.agreement(whole, clouds),
            "distance": pd.concat(raised, ignore_index=True),
            "cost": tried.costs,
            "candidates": found,
        }
    record = dict(tried.scores[REPORTED_ON].made_with) | {
        "notices": tried.ready.notices,
        "failed": failed_cells(tried.lost),
        "chosen_on": CHOSEN_ON,
        "reported_on": REPORTED_ON,
    }
    return tables, record


def whole(name: str, tried: Tried, tables: dict[str, pd.DataFrame], record: dict[str, Any]) -> Found:
    """Return all of it, what figures are drawn from among it.

    Args:
        name: what was done.
        tried: what came of it.
        tables: by file stem.
        record: for run.json.
    """
    from analysis import points

    families = {name: one.family for name, one in tried.every.items()}
    drawn = points.of_ensembles(tables["ensembles"], tables["candidates"], families)
    return Found.of(name, record, tables, drawn, tried.ready, tried.lost)
