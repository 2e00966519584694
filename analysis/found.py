"""What a command found out, before anything of it is saved or printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.folder import Run
from analysis.preparing import RunSetup
from analysis.sweeping import ConditionKey


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
        return cls(Run(name, record, {**tables, **figure_tables}, texts=texts, figures=tuple(figure_tables)), failures)
