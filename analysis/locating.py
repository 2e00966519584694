"""What `analyze mechanism` does: score, split, intervene, draw; its tables are told in docs/mechanism.md."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from rich.console import Console

from analysis import findings, manifest, saving, showing, validity
from analysis.decompose import summarize
from analysis.found import Found
from analysis.looking import Room, Wanted
from analysis.overlaps import overlap
from analysis.preparing import Ready, prepare, unreached, why_lost
from analysis.queries import sample
from analysis.request import Request, default_out
from analysis.run import conditions
from analysis.sweeping import failed_cells, say_written, sweep
from analysis.tables import UNDEFENDED, ScoreTable
from defenses import Defense, UserError


def locate(
    request: Request, names: Sequence[str], settings: Sequence[str], wanted: Wanted, out: Path | None
) -> int:
    """Say in which layers, heads and MLPs defenses act; save tables and figures, print the main ones."""
    out = saving.usable(out or default_out(request.model, ["mechanism", *names], datetime.now(UTC)))
    console = Console(stderr=True)
    found = find(request, names, settings, wanted, console)
    saving.save(out, found.run, console)
    findings.show(found.run.tables, found.run.record, wanted.top)
    showing.trust(found.run.tables["summary"], console)
    say_written(out, found.lost, console)
    return 1 if found.lost else 0


def find(
    request: Request,
    names: Sequence[str | Defense],
    settings: Sequence[str],
    wanted: Wanted,
    console: Console,
) -> Found:
    """Find out in which layers, heads and MLPs defenses act.

    Args:
        request: what the user asked for.
        names: of the defenses, or defenses themselves.
        settings: of those that are named.
        wanted: what is looked at.
        console: for progress.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    stacks = None if wanted.ensembles is None else findings.interactions(wanted.ensembles)
    ready = prepare(request, names, settings, console)
    _refuse_odd(ready)
    if wanted.ensembles is not None:
        findings.refuse_other_model(wanted.ensembles, ready)
    every = conditions(ready.defenses)
    if set(every) == {UNDEFENDED}:
        raise UserError("which defense? `none` is what others are compared with; see `analyze list defenses`")
    from analysis.mechanism.lens import anatomy
    from analysis.mechanism.splitting import Splitter

    with console.status("finding the model's parts"):
        parts = anatomy(ready.bench.loaded.model)
        # What cannot be split is told before anything is scored.
        few = sample(ready.data.queries, 2)
        Splitter(parts, ready.readout).split(ready.bench.under(request.attacks[0]), every[UNDEFENDED], few)
    lost = why_lost(unreached(ready, every, console))
    swept = sweep(ready, every, lost, console)
    if swept.interrupted:
        raise KeyboardInterrupt
    if not any(name != UNDEFENDED for _, name in swept.frames):
        raise UserError(f"nothing could be scored: {next(iter(swept.lost.values()))}")
    record = {
        "created": started.isoformat(timespec="seconds"),
        **manifest.of(
            ready.bench, ready.readout, swept.finished(every), ready.data, ready.split, request.limit
        ),
        **manifest.of_attacks(request.attacks),
        "notices": ready.notices,
        "trusted": validity.of_run(ready.bench, request.attacks, every, ready.readout, swept.frames),
    }
    scores = ScoreTable(pd.concat(list(swept.frames.values()), ignore_index=True), record)
    room = Room(
        ready=ready,
        anatomy=parts,
        every=every,
        scores=scores,
        wanted=wanted,
        seed=request.seed,
        console=console,
        lost=dict(swept.lost),
    )
    for attack in request.attacks:
        room.enter(attack)
    tables = room.tables | {"scores": scores.frame, "summary": summarize(scores, seed=request.seed).frame}
    if not any(name in tables for name in ("layers", "directions")):
        raise UserError(f"nothing could be split: {next(iter(room.lost.values()))}")
    if stacks is not None and len(tables.get("profiles", ())):
        tables["overlap"] = overlap(tables["profiles"], stacks)
    record |= {
        "failed": failed_cells(room.lost),
        "notices": [*ready.notices, *room.notices],
        "mechanism": {
            "sites": wanted.sites,
            "top": wanted.top,
            "patched": [query.id for query in room.sample],
            "neutral_prompts": room.controls,
            "directions_learned_from": "contrast, train split, undefended and as they are",
            "slopes_against_patches": room.agreement,
            "ensembles": None if wanted.ensembles is None else wanted.ensembles.name,
        },
        "wall_seconds": round(time.perf_counter() - clock, 1),
    }
    from analysis import points

    drawn = points.of_mechanism(tables, wanted.top)
    return Found.of("mechanism", record, tables, drawn, ready, room.lost)


def _refuse_odd(ready: Ready) -> None:
    """Raise where margins do not split."""
    if ready.readout.odds:
        raise UserError(
            f"--readout {ready.readout.name} is not linear in the logits, so its margin does not split over "
            "parts: take words, calibrated, question or prefilled-K"
        )
