"""What `analyze` computes: every defense and the undefended model, scored and summed up, not printed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import pandas as pd
from rich.console import Console

from analysis import factorial, manifest, pricing, queries, validity
from analysis.decompose import summarize
from analysis.found import Found
from analysis.preparing import Ready, left_out, prepare, unreached
from analysis.rendering import redact
from analysis.request import Request
from analysis.run import conditions
from analysis.sweeping import Cell, failed_cells, sweep
from analysis.tables import ScoreTable
from defenses import Defense, UserError


def find(
    request: Request,
    names: Sequence[str | Defense],
    settings: Sequence[str],
    console: Console,
    with_cost: bool = False,
) -> Found:
    """Score every defense and the undefended model, and say what each does.

    Args:
        request: what the user asked for.
        names: of the defenses, or defenses themselves.
        settings: of those that are named.
        console: for progress.
        with_cost: whether it is also measured what each defense costs.

    Raises:
        NotReached: if no defense reaches the model.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    ready = prepare(request, names, settings, console)
    bench = ready.bench
    every = conditions(ready.defenses)
    cells = [(attack.name, name) for attack in request.attacks for name in every]
    lost = left_out(unreached(ready, every, console), cells)
    bench.engine.work.reset()
    swept = sweep(ready, every, lost, console)
    frames, finished = swept.frames, swept.finished(every)
    if not frames or (swept.interrupted and len(frames) < 2):
        # An attack's undefended condition alone says nothing of a defense.
        if swept.interrupted:
            raise KeyboardInterrupt
        raise UserError(f"nothing could be scored: {next(iter(swept.lost.values()))}")
    timed = {name: one for name, one in finished.items() if (request.attacks[0].name, name) in frames}
    spent = pricing.priced(ready, timed, request.seed, console) if with_cost else None
    record = {
        "created": started.isoformat(timespec="seconds"),
        "interrupted": swept.interrupted,
        "conditions_wanted": swept.wanted,
        "failed": failed_cells(swept.lost),
        **manifest.of(bench, ready.readout, finished, ready.data, ready.split, request.limit),
        "notices": ready.notices,
        "wall_seconds": round(time.perf_counter() - clock, 1),
        "tokens": {"computed": bench.engine.work.computed, "saved": bench.engine.work.saved},
        "scores_found_in_cache": bench.store.found if bench.store is not None else 0,
    }
    record |= manifest.of_attacks(request.attacks)
    record["trusted"] = validity.of_run(bench, request.attacks, finished, ready.readout, frames)
    scores = ScoreTable(pd.concat(list(frames.values()), ignore_index=True), record)
    with console.status("intervals"):
        summary = summarize(scores, seed=request.seed)
        from analysis import points

        drawn = points.of_analysis(scores.frame, summary.frame, scores.threshold)
        if spent is not None:
            gained = ["defense", "family", "refusal_rate", "over_refusal_rate"]
            gained += [f"delta_auroc{end}" for end in ("", "_low", "_high")]
            first = summary.frame["attack"] == request.attacks[0].name
            drawn["cost"] = spent.merge(summary.frame.loc[first, gained], on="defense")
    tables = {
        **_effects(scores, request.seed),
        "prompts": _prompts(ready, list(frames), finished),
        "scores": scores.frame,
        "summary": summary.frame,
    }
    return Found.of("analyze", record, tables, drawn, ready, swept.lost)


def _prompts(ready: Ready, cells: Sequence[Cell], every: Mapping[str, Defense]) -> pd.DataFrame:
    """What the model reads of a harmful and of a benign query under each condition, secrets as a mark."""
    secrets = tuple(one for defense in every.values() for one in defense.secrets())
    asked = queries.sample(ready.data.queries, 2)
    rows = []
    for attack, name in cells:
        (sent,) = [one for one in ready.attacks if one.name == attack]
        prompts = ready.bench.under(sent).every_prompt(every[name], asked)
        rows += [
            {
                "attack": attack,
                "defense": name,
                "query": query.id,
                "readings": len(readings),
                "read": redact(readings[0].text, secrets),
            }
            for query, readings in zip(asked, prompts, strict=True)
        ]
    return pd.DataFrame(rows)


def _effects(scores: ScoreTable, seed: int) -> dict[str, pd.DataFrame]:
    """The effects of each 2 × 2 that was run whole."""
    there = set(scores.conditions)
    found = [
        factorial.effects(scores, attack, defense, seed)
        for attack, defense in scores.conditions
        if all((attack, cell) in there for cell in factorial.cells(defense))
    ]
    return {"effects": pd.concat(found, ignore_index=True)} if found else {}
