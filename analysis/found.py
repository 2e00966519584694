"""What a command found out, before anything of it is saved or printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.folder import Run
from analysis.preparing import Ready
from analysis.sweeping import Cell


@dataclass(frozen=True)
class Found:
    """What a command found out.

    Attributes:
        run: its record, its tables, and what can be drawn of them.
        lost: what failed, and why.
    """

    run: Run
    lost: Mapping[Cell, str]

    @classmethod
    def of(
        cls,
        name: str,
        record: Mapping[str, Any],
        tables: Mapping[str, pd.DataFrame],
        points: Mapping[str, pd.DataFrame],
        ready: Ready,
        lost: Mapping[Cell, str],
    ) -> Found:
        """Return it, the points of the figures among the tables.

        Args:
            name: what was done.
            record: for run.json.
            tables: by file stem.
            points: what figures are drawn from, by file stem.
            ready: what was loaded for it.
            lost: what failed, and why.
        """
        texts = {query.id: query.text for query in ready.data.queries}
        return cls(Run(name, record, {**tables, **points}, texts=texts, figures=tuple(points)), lost)
