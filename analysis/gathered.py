"""What the work on a mechanism gathers: tables, what failed, what was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas as pd
from rich.console import Console

from analysis import showing
from analysis.rendering import redact_secrets
from analysis.sweeping import ConditionKey
from defenses import Defense
from defenses.errors import describe_error


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
            showing.print_note(self.console, text)

    @contextmanager
    def show_progress(self, label: str, n_steps: int) -> Iterator[Callable[[], None]]:
        """Show a progress bar; lend what moves it on.

        Args:
            label: beside it.
            n_steps: of steps.
        """
        with showing.make_progress_bar(self.console) as bar:
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
            self.failures[attack, condition] = before + redact_secrets(describe_error(error), defense.secret_texts())
