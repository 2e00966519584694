"""What the work on a mechanism gathers: tables, what failed, what was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas as pd
from rich.console import Console

from analysis import showing
from analysis.rendering import redact
from analysis.sweeping import Cell
from defenses import Defense
from defenses.errors import told


@dataclass(kw_only=True)
class Gathered:
    """Tables that grow, attack by attack and defense by defense.

    Attributes:
        tables: by file stem.
        lost: what failed, and why.
        notices: what was left out, and why.
    """

    console: Console
    lost: dict[Cell, str]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def add(self, attack: str, name: str, **found: pd.DataFrame) -> None:
        """Put what was found about a condition behind what there is.

        Args:
            attack: of the condition.
            name: of the condition.
            found: tables by file stem.
        """
        for stem, table in found.items():
            first = pd.DataFrame({"attack": attack, "defense": name}, index=table.index)
            self.put(stem, pd.concat([first, table], axis=1))

    def put(self, stem: str, table: pd.DataFrame) -> None:
        """Put rows behind those of a table."""
        there = [self.tables[stem]] if stem in self.tables else []
        self.tables[stem] = pd.concat([*there, table], ignore_index=True)

    def note(self, text: str) -> None:
        """Say once what was left out, and why."""
        if text not in self.notices:
            self.notices.append(text)
            showing.note(self.console, text)

    @contextmanager
    def steps(self, text: str, count: int) -> Iterator[Callable[[], None]]:
        """Show a progress bar; lend what moves it on.

        Args:
            text: beside it.
            count: of steps.
        """
        with showing.progress(self.console) as bar:
            task = bar.add_task(text, total=count)
            yield lambda: bar.advance(task)

    @contextmanager
    def guarded(self, attack: str, name: str, defense: Defense) -> Iterator[None]:
        """While open, what fails is left out and told at the end; what there is already is kept.

        Args:
            attack: of the condition.
            name: of the condition.
            defense: whose secrets are not told.
        """
        try:
            yield
        except Exception as error:
            before = f"{self.lost[attack, name]}; " if (attack, name) in self.lost else ""
            self.lost[attack, name] = before + redact(told(error), defense.secrets())
