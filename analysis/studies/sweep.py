"""The whole grid of a run, attack by attack and defense by defense; what fails is left out and told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.models.chat_template import redact_secrets
from analysis.report.results import Run
from analysis.run import iterate_condition_scores
from analysis.stats.tables import UNDEFENDED
from analysis.studies.progress import make_defense_call_callback, make_progress_bar, print_note
from analysis.studies.setup import NO_REFERENCE, RunSetup
from defenses.contract import Defense
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
        return {
            name: conditions[name] for name in conditions if any(name == one for _, one in self.score_frames)
        }


def sweep_conditions(
    setup: RunSetup, conditions: Mapping[str, Defense], failures: Mapping[ConditionKey, str], console: Console
) -> SweepResult:
    """Score every condition under every attack, with one progress bar over all of it.

    Args:
        setup: loaded and prepared.
        conditions: the conditions, the undefended one first.
        failures: those that are known to fail, and why.
        console: for progress.
    """
    queries, swept = (
        setup.query_set.queries,
        SweepResult(len(setup.attacks) * len(conditions), failures=dict(failures)),
    )
    with make_progress_bar(console) as bar:
        task = bar.add_task("scoring", total=swept.n_conditions * len(queries))
        setup.session.defense_calls.on_progress = make_defense_call_callback(bar, task)
        for attack in setup.attacks:
            bench = setup.session.with_attack(attack)
            here = {name: one for name, one in conditions.items() if (attack.name, name) not in failures}
            here = here if UNDEFENDED in here else {}
            bar.advance(task, (len(conditions) - len(here)) * len(queries))

            def done(name: str, count: int) -> None:
                bar.update(task, description=f"scoring {name}", advance=count)

            def failed(name: str, error: Exception, sent: str = attack.name) -> None:
                swept.failures[sent, name] = redact_secrets(
                    describe_error(error), conditions[name].secret_texts()
                )

            try:
                for name, frame in iterate_condition_scores(
                    bench, here, queries, setup.readout, done, failed
                ):
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


@dataclass(frozen=True)
class StudyResult:
    """What a command found out.

    Attributes:
        run: its record, its tables, and what can be drawn of them.
        failures: what failed, and why.
    """

    run: Run
    failures: Mapping[ConditionKey, str]

    @classmethod
    def from_tables(
        cls,
        name: str,
        record: Mapping[str, Any],
        tables: Mapping[str, pd.DataFrame],
        figure_tables: Mapping[str, pd.DataFrame],
        setup: RunSetup,
        failures: Mapping[ConditionKey, str],
    ) -> StudyResult:
        """Return it, the points of the figures among the tables.

        Args:
            name: what was done.
            record: for run.json.
            tables: by file stem.
            figure_tables: what figures are drawn from, by file stem.
            setup: what was loaded for it.
            failures: what failed, and why.
        """
        texts = {query.id: query.text for query in setup.query_set.queries}
        return cls(
            Run(name, record, {**tables, **figure_tables}, texts=texts, figures=tuple(figure_tables)),
            failures,
        )


@dataclass(kw_only=True)
class TableCollector:
    """Tables that grow, attack by attack and defense by defense.

    Attributes:
        tables: by file stem.
        failures: what failed, and why.
        notices: what was left out, and why.
    """

    console: Console
    failures: dict[ConditionKey, str]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def add_condition_tables(self, attack: str, condition: str, **tables: pd.DataFrame) -> None:
        """Put what was found about a condition behind what there is.

        Args:
            attack: of the condition.
            condition: of the condition.
            tables: tables by file stem.
        """
        for stem, table in tables.items():
            first = pd.DataFrame({"attack": attack, "defense": condition}, index=table.index)
            self.append_rows(stem, pd.concat([first, table], axis=1))

    def append_rows(self, stem: str, table: pd.DataFrame) -> None:
        """Put rows behind those of a table."""
        there = [self.tables[stem]] if stem in self.tables else []
        self.tables[stem] = pd.concat([*there, table], ignore_index=True)

    def add_notice(self, text: str) -> None:
        """Say once what was left out, and why."""
        if text not in self.notices:
            self.notices.append(text)
            print_note(self.console, text)

    @contextmanager
    def show_progress(self, label: str, n_steps: int) -> Iterator[Callable[[], None]]:
        """Show a progress bar; lend what moves it on.

        Args:
            label: beside it.
            n_steps: of steps.
        """
        with make_progress_bar(self.console) as bar:
            task = bar.add_task(label, total=n_steps)
            yield lambda: bar.advance(task)

    @contextmanager
    def record_failures(self, attack: str, condition: str, defense: Defense) -> Iterator[None]:
        """While open, what fails is left out and told at the end; what there is already is kept.

        Args:
            attack: of the condition.
            condition: of the condition.
            defense: whose secrets are not told.
        """
        try:
            yield
        except Exception as error:
            before = f"{self.failures[attack, condition]}; " if (attack, condition) in self.failures else ""
            self.failures[attack, condition] = before + redact_secrets(
                describe_error(error), defense.secret_texts()
            )
