"""What each command does, in order; `analysis.cli` has parsed and checked the options by then."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from rich.console import Console

from analysis import analyzing, models, preflight, queries, saving, showing, states
from analysis.preparing import NotReached, prepare
from analysis.readout import LOW_COVERAGE
from analysis.rendering import redact
from analysis.request import Request, default_out, teller
from analysis.run import conditions
from analysis.sweeping import say_written
from analysis.tables import condition
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
    out = saving.usable(out or default_out(request.model, names, datetime.now(UTC)))
    console = Console(stderr=True)
    try:
        found = analyzing.find(request, names, settings, console, with_cost)
    except NotReached as error:
        showing.failures(error.checks)
        return 1
    run = found.run
    saving.save(out, found.run, console)
    summary = run.tables["summary"]
    if as_json:
        showing.as_json(summary)
    else:
        showing.summary(summary, run.record)
        if with_cost:
            showing.costs(run.tables["cost"])
    _say_coverage(summary, console)
    showing.trust(summary, console)
    say_written(out, found.lost, console)
    if run.record["interrupted"]:
        wanted = run.record["conditions_wanted"]
        teller(console)(
            f"Interrupted: {len(summary)} of {wanted} conditions were finished and kept; the rest is "
            "not. The same command goes on from here."
        )
        return 130
    return 1 if found.lost else 0


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
        showing.note(console, notice)
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
