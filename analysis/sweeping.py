"""The whole grid of a run, attack by attack and defense by defense; what fails is left out and told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich.console import Console

from analysis import showing
from analysis.preparing import NO_REFERENCE, RunSetup
from analysis.rendering import redact_secrets
from analysis.request import make_notifier
from analysis.run import iterate_condition_scores
from analysis.tables import UNDEFENDED, format_condition
from defenses import Defense
from defenses.errors import describe_error

ConditionKey = tuple[str, str]  # attack and condition


@dataclass
class SweepResult:
    """What came of a sweep.

    Attributes:
        n_conditions: how many conditions there are under all attacks.
        score_frames: the scores of those that are finished.
        failures: why the others failed.
        interrupted: whether the user ended it.
    """

    n_conditions: int
    score_frames: dict[ConditionKey, pd.DataFrame] = field(default_factory=dict)
    failures: dict[ConditionKey, str] = field(default_factory=dict)
    interrupted: bool = False

    def select_finished(self, conditions: Mapping[str, Defense]) -> dict[str, Defense]:
        """Return the conditions that are finished under one attack at least."""
        return {name: conditions[name] for name in conditions if any(name == one for _, one in self.score_frames)}


def sweep_conditions(setup: RunSetup, conditions: Mapping[str, Defense], failures: Mapping[ConditionKey, str], console: Console) -> SweepResult:
    """Score every condition under every attack, with one progress bar over all of it.

    Args:
        setup: loaded and prepared.
        conditions: the conditions, the undefended one first.
        failures: those that are known to fail, and why.
        console: for progress.
    """
    queries, swept = setup.query_set.queries, SweepResult(len(setup.attacks) * len(conditions), failures=dict(failures))
    with showing.make_progress_bar(console) as bar:
        task = bar.add_task("scoring", total=swept.n_conditions * len(queries))
        setup.session.defense_calls.on_progress = showing.make_defense_call_callback(bar, task)
        for attack in setup.attacks:
            bench = setup.session.with_attack(attack)
            here = {name: one for name, one in conditions.items() if (attack.name, name) not in failures}
            here = here if UNDEFENDED in here else {}
            bar.advance(task, (len(conditions) - len(here)) * len(queries))

            def done(name: str, count: int) -> None:
                bar.update(task, description=f"scoring {name}", advance=count)

            def failed(name: str, error: Exception, sent: str = attack.name) -> None:
                swept.failures[sent, name] = redact_secrets(describe_error(error), conditions[name].secret_texts())

            try:
                for name, frame in iterate_condition_scores(bench, here, queries, setup.readout, done, failed):
                    swept.score_frames[attack.name, name] = frame
            except KeyboardInterrupt:
                swept.interrupted = True
                break
            if (attack.name, UNDEFENDED) not in swept.score_frames:
                for name in conditions:
                    swept.failures.setdefault((attack.name, name), NO_REFERENCE)
    return swept


def list_failures(failures: Mapping[ConditionKey, str]) -> list[dict[str, str]]:
    """Return what run.json says of the conditions that failed."""
    return [{"attack": sent, "defense": name, "why": why} for (sent, name), why in failures.items()]


def print_run_location(out: Path, failures: Mapping[ConditionKey, str], console: Console) -> None:
    """Say where a run is, and what failed in it."""
    make_notifier(console)(f"Tables, figures and run.json are in {out}")
    print_failures(failures, console)


def print_failures(failures: Mapping[ConditionKey, str], console: Console) -> None:
    """Say what failed in a run, and why."""
    for (sent, name), why in failures.items():
        make_notifier(console)(f"Failed: {format_condition({'attack': sent, 'defense': name})}: {why}")
