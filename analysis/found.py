"""What a command found out, before anything of it is saved or printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import saving
from analysis.folder import Run
from analysis.preparing import Ready
from analysis.sweeping import Cell


@dataclass(frozen=True)
class Found:
    """What a command found out.

    Attributes:
        run: its record, its tables, and what can be drawn of them.
        pictures: the figures, by file stem.
        lost: what failed, and why.
    """

    run: Run
    pictures: Mapping[str, Any]
    lost: Mapping[Cell, str]

    @classmethod
    def of(
        cls,
        name: str,
        record: Mapping[str, Any],
        tables: Mapping[str, pd.DataFrame],
        drawn: Mapping[str, tuple[Any, pd.DataFrame]],
        ready: Ready,
        lost: Mapping[Cell, str],
    ) -> Found:
        """Return it, the tables of the figures among the others.

        Args:
            name: what was done.
            record: for run.json.
            tables: by file stem.
            drawn: figures and their tables, by file stem.
            ready: what was loaded for it.
            lost: what failed, and why.
        """
        whole = {**tables, **{stem: table for stem, (_, table) in drawn.items()}}
        texts = {query.id: query.text for query in ready.data.queries}
        run = Run(name, record, whole, texts=texts, figures=tuple(drawn))
        return cls(run, {stem: figure for stem, (figure, _) in drawn.items()}, lost)

    def save(self, out: Path) -> None:
        """Write tables, figures and run.json."""
        saving.save(out, self.run.tables, self.pictures, self.run.record)
