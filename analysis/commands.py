"""What each command does, in order; `analysis.cli` has parsed and checked the options by then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from rich.console import Console

from analysis import (
    factorial,
    manifest,
    models,
    preflight,
    pricing,
    queries,
    saving,
    showing,
    states,
    validity,
)
from analysis.decompose import summarize
from analysis.preparing import prepare, unreached, why_lost
from analysis.readout import LOW_COVERAGE
from analysis.rendering import redact
from analysis.request import Request, default_out, teller
from analysis.run import conditions
from analysis.sweeping import failed_cells, say_written, sweep
from analysis.tables import UNDEFENDED, ScoreTable, condition
from defenses import UserError
from defenses.backdoor import draw_secret, write_secret


def analyze(
    request: Request,
    names: Sequence[str],
    settings: Sequence[str],
    out: Path | None,
    as_json: bool,
    with_cost: bool = False,
) -> int:
    """Score every defense and the undefended model, save tables and figures, print the summary."""
    started, clock = datetime.now(UTC), time.perf_counter()
    out = saving.usable(out or default_out(request.model, names, started))
    console = Console(stderr=True)
    ready = prepare(request, names, settings, console)
    bench = ready.bench
    every = conditions(ready.defenses)
    failed = unreached(ready, every, console)
    lost = why_lost(failed)
    left = [
        (attack.name, name)
        for attack in request.attacks
        for name in every
        if name != UNDEFENDED and not {(attack.name, name), (attack.name, UNDEFENDED)} & lost.keys()
    ]
    if lost and not left:  # nothing to compare, or nothing to compare it with
        showing.failures([one for checks in failed.values() for one in checks])
        return 1
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
        "failed": failed_cells(swept.lost),
        **manifest.of(
            bench,
            ready.readout,
            finished,
            ready.data,
            ready.split,
            request.limit,
        ),
        "notices": ready.notices,
        "wall_seconds": round(time.perf_counter() - clock, 1),
        "tokens": {"computed": bench.engine.work.computed, "saved": bench.engine.work.saved},
        "scores_found_in_cache": bench.store.found if bench.store is not None else 0,
    }
    record |= manifest.of_attacks(request.attacks)
    record["trusted"] = validity.of_run(bench, request.attacks, finished, ready.readout, frames)
    scores = ScoreTable(pd.concat(list(frames.values()), ignore_index=True), record)
    with console.status("intervals and figures"):
        summary = summarize(scores, seed=request.seed)
        from analysis.plots import figures, of_price

        context = showing.context(record, ready.readout)
        drawn = figures(scores.frame, summary.frame, context)
        if spent is not None:
            gained = ["defense", "family", "refusal_rate", "over_refusal_rate"]
            gained += [f"delta_auroc{end}" for end in ("", "_low", "_high")]
            first = summary.frame["attack"] == request.attacks[0].name
            spent = spent.merge(summary.frame.loc[first, gained], on="defense")
            drawn["cost"] = of_price(spent, context)
        tables = {
            **_effects(scores, request.seed),
            "scores": scores.frame,
            "summary": summary.frame,
            **{stem: table for stem, (_, table) in drawn.items()},
        }
        saving.save(out, tables, {stem: figure for stem, (figure, _) in drawn.items()}, record)
    if as_json:
        showing.as_json(summary.frame)
    else:
        showing.summary(summary, record)
        if spent is not None:
            showing.costs(spent)
    _say_coverage(summary.frame, console)
    showing.trust(summary.frame, console)
    say_written(out, swept.lost, console)
    if swept.interrupted:
        teller(console)(
            f"Interrupted: {len(frames)} of {swept.wanted} conditions were finished and kept; the rest is "
            "not. The same command goes on from here."
        )
        return 130
    return 1 if swept.lost else 0


def check(request: Request, names: Sequence[str], settings: Sequence[str], count: int) -> int:
    """Print what the model reads under each defense, and every check; 1 if one fails."""
    if count < 2:
        raise UserError(f"--queries {count}: at least 2 are needed, a harmful and a benign one")
    console = Console()
    ready = prepare(request, names, settings, Console(stderr=True), fitted=False)
    looked_at = queries.sample(ready.data.queries, count)
    failed = 0
    for bench in map(ready.bench.under, request.attacks):
        for name, defense in conditions(ready.defenses).items():
            checks = preflight.check(bench, name, defense, looked_at, ready.readout)
            failed += sum(not one.passed for one in checks)
            texts = [
                (query.id, redact(prompt.text, defense.secrets()))
                for query in looked_at
                for prompt in bench.prompts(defense, query)
            ]
            showing.checks(console, checks[0].condition, checks, texts)
    for notice in (*ready.bench.renderer.notices, *ready.readout.notices):
        teller(console)(f"note: {notice}")
    return 1 if failed else 0


def secret(model: str, length: int, out: Path | None, offline: bool) -> None:
    """Draw a secret prompt for a model's tokenizer and write it into a new file of mode 0600."""
    if length < 1:
        raise UserError(f"--length {length}: a secret has at least 1 token; the paper's has 150")
    console = Console(stderr=True)
    tokenizer = models.load_tokenizer(model, offline, teller(console))
    path = out or states.host(model, tokenizer).secrets[0] / f"{length}.txt"
    drawn = draw_secret(tokenizer, length)
    write_secret(path, drawn)
    print(f"{path}  {drawn.fingerprint}  {length} tokens, readable by you alone")


def _effects(scores: ScoreTable, seed: int) -> dict[str, pd.DataFrame]:
    """The effects of each 2 × 2 that was run whole."""
    there = set(scores.conditions)
    found = [
        factorial.effects(scores, attack, defense, seed)
        for attack, defense in scores.conditions
        if all((attack, cell) in there for cell in factorial.cells(defense))
    ]
    return {"effects": pd.concat(found, ignore_index=True)} if found else {}


def _say_coverage(summary: pd.DataFrame, console: Console) -> None:
    """Warn where the readout's words are rarely what the model opens with."""
    low = summary[summary["coverage"] < LOW_COVERAGE].sort_values("coverage", kind="stable")
    if len(low):
        worst = showing.few([f"{condition(row)} {row['coverage']:.0%}" for _, row in low.iterrows()])
        console.print(
            f"Warning: the readout's words are under {LOW_COVERAGE:.0%} of the first-token probability here "
            f"({worst}): these margins see little of how the model answers.",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
