"""The whole grid of a run, attack by attack and defense by defense; what fails is left out and told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich.console import Console

from analysis import showing
from analysis.preparing import NO_REFERENCE, Ready
from analysis.rendering import redact
from analysis.request import teller
from analysis.run import score_all
from analysis.tables import UNDEFENDED, condition
from defenses import Defense
from defenses.errors import told

Cell = tuple[str, str]  # attack and condition


@dataclass
class Swept:
    """What came of a sweep.

    Attributes:
        wanted: how many conditions there are under all attacks.
        frames: the scores of those that are finished.
        lost: why the others failed.
        interrupted: whether the user ended it.
    """

    wanted: int
    frames: dict[Cell, pd.DataFrame] = field(default_factory=dict)
    lost: dict[Cell, str] = field(default_factory=dict)
    interrupted: bool = False

    def finished(self, every: Mapping[str, Defense]) -> dict[str, Defense]:
        """Return the conditions that are finished under one attack at least."""
        return {name: every[name] for name in every if any(name == one for _, one in self.frames)}


def sweep(ready: Ready, every: Mapping[str, Defense], lost: Mapping[Cell, str], console: Console) -> Swept:
    """Score every condition under every attack, with one progress bar over all of it.

    Args:
        ready: loaded and prepared.
        every: the conditions, the undefended one first.
        lost: those that are known to fail, and why.
        console: for progress.
    """
    queries, swept = ready.data.queries, Swept(len(ready.attacks) * len(every), lost=dict(lost))
    with showing.progress(console) as bar:
        task = bar.add_task("scoring", total=swept.wanted * len(queries))
        ready.bench.drafts.watch = showing.drafting(bar, task)
        for attack in ready.attacks:
            bench = ready.bench.under(attack)
            here = {name: one for name, one in every.items() if (attack.name, name) not in lost}
            here = here if UNDEFENDED in here else {}
            bar.advance(task, (len(every) - len(here)) * len(queries))

            def done(name: str, count: int) -> None:
                bar.update(task, description=f"scoring {name}", advance=count)

            def failed(name: str, error: Exception, sent: str = attack.name) -> None:
                swept.lost[sent, name] = redact(told(error), every[name].secrets())

            try:
                for name, frame in score_all(bench, here, queries, ready.readout, done, failed):
                    swept.frames[attack.name, name] = frame
            except KeyboardInterrupt:
                swept.interrupted = True
                break
            if (attack.name, UNDEFENDED) not in swept.frames:
                for name in every:
                    swept.lost.setdefault((attack.name, name), NO_REFERENCE)
    return swept


def failed_cells(lost: Mapping[Cell, str]) -> list[dict[str, str]]:
    """Return what run.json says of the conditions that failed."""
    return [{"attack": sent, "defense": name, "why": why} for (sent, name), why in lost.items()]


def say_written(out: Path, lost: Mapping[Cell, str], console: Console) -> None:
    """Say where a run is, and what failed in it."""
    teller(console)(f"Tables, figures and run.json are in {out}")
    say_failed(lost, console)


def say_failed(lost: Mapping[Cell, str], console: Console) -> None:
    """Say what failed in a run, and why."""
    for (sent, name), why in lost.items():
        teller(console)(f"Failed: {condition({'attack': sent, 'defense': name})}: {why}")
