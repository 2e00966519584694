"""Text of estimates with their intervals, and of names and verdicts, for tables of readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, Basis, Trust

# A column of a table: its name, its heading, the format and the scale of its values, and whether it has an
# interval.
ColumnFormat = tuple[str, str, str, float, bool]
_NAME_COLUMNS = ("defense", "members")  # columns that name a condition
_EFFECT_COLUMNS = ("delta_auroc", "shift", "discrimination")
_MISSING = "–"
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    >>> Interval(0.5, 0.4, 0.6).format_text(".2f"), Interval(-0.5).format_text(".0f", 100, minus="−")
    ('0.50 [0.40, 0.60]', '−50')

    Attributes:
        value: the estimate; None or NaN if it does not exist.
        low: lower end of the interval; None or NaN if there is none.
        high: upper end of the interval; None or NaN if there is none.
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def from_row(cls, row: Any, column: str) -> Interval:
        """Return the estimate `column` of a row, with its ends `column_low` and `column_high` if present."""
        return cls(row[column], row.get(f"{column}_low"), row.get(f"{column}_high"))

    def format_text(self, format_spec: str, scale: float = 1.0, minus: str = "-") -> str:
        """Return `value [low, high]`; only the value if it has no interval, a dash if it does not exist.

        Args:
            format_spec: format of each number, such as `+.2f`.
            scale: factor that each number is multiplied by, such as 100 for percent.
            minus: minus sign: a hyphen in the terminal, the typographic sign on a page.
        """
        text = _format_scaled(self.value, format_spec, scale, minus)
        if text == _MISSING or self.low is None or self.high is None or not self.low <= self.high:
            return text
        ends = (_format_scaled(end, format_spec, scale, minus) for end in (self.low, self.high))
        return f"{text} [{', '.join(ends)}]"


def format_interval(row: Mapping[str, Any], column: str, format_spec: str, scale: float = 1.0) -> str:
    """Return an estimate of a row with its interval, as the terminal shows it; a dash if it is missing.

    >>> format_interval({"shift": -0.5, "shift_low": -0.6, "shift_high": -0.4}, "shift", "+.1f")
    '-0.5 [-0.6, -0.4]'

    Args:
        row: row of a table with the columns `column`, `column_low` and `column_high`.
        column: name of the estimate.
        format_spec: format of each number.
        scale: factor that each number is multiplied by.
    """
    return Interval.from_row(row, column).format_text(format_spec, scale)


def format_estimate(row: Any, column: ColumnFormat) -> str:
    """Return an estimate of a row with its interval, as a page shows it.

    A dash stands for a missing estimate, and for the effects of the reference condition.
    """
    name, _, format_spec, scale, with_interval = column
    if row.get("verdict") == "reference" and name.removeprefix("response_") in _EFFECT_COLUMNS:
        return _MISSING
    if not with_interval:
        return format_number(row[name], format_spec, scale)
    return Interval.from_row(row, name).format_text(format_spec, scale, _MINUS)


def format_number(value: Any, format_spec: str, scale: float) -> str:
    """Return a scaled number as a page shows it; a dash if it is missing.

    >>> format_number(-0.25, "+.0f", 100), format_number(None, ".2f", 1)
    ('−25', '–')
    """
    return _format_scaled(value, format_spec, scale, _MINUS)


def intervals(frame: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """Return a table for readers: each estimate with its interval in one column, other numbers rounded.

    >>> intervals(pd.DataFrame({"shift": [0.512], "shift_low": [0.4], "shift_high": [0.6], "n": [8]}))
                   shift  n
    0  0.51 [0.40, 0.60]  8

    Args:
        frame: any table of a run; `x_low` and `x_high` are the ends of the interval of `x`.
        digits: number of decimals.
    """
    end_columns = {f"{name}{suffix}" for name in frame for suffix in INTERVAL_SUFFIXES[1:]} & {
        *map(str, frame)
    }
    table = frame.drop(columns=[name for name in frame if name in end_columns]).round(digits)
    for name in table:
        if {f"{name}_low", f"{name}_high"} <= end_columns:
            rows = frame.to_dict("records")
            table[name] = [format_estimate(row, (str(name), "", f".{digits}f", 1, True)) for row in rows]
    return table


def format_cell(value: Any, column: str) -> str:
    """Return the text of a table cell as a page shows it."""
    if value != value:
        return _MISSING
    return "undefended" if column in _NAME_COLUMNS and value == UNDEFENDED else str(value)


def format_defense_name(row: Any) -> str:
    """Return the name of a row's defense as a page shows it; controls are marked."""
    name = "undefended" if row["defense"] == UNDEFENDED else str(row["defense"])
    return f"{name} (control)" if row["family"] == "control" else name


def format_verdict(row: Any) -> str:
    """Return the verdict on a row's effects, marked if it rests on a readout that is not trusted there."""
    text = str(row["verdict"]).replace(" -", f" {_MINUS}")
    is_judged = row.get("based_on") == Basis.RESPONSES
    is_untrusted = row.get("trusted") == Trust.NOT_TRUSTED and not is_judged
    return f"{text} ({Trust.NOT_TRUSTED})" if is_untrusted else text


def _format_scaled(value: Any, format_spec: str, scale: float, minus: str) -> str:
    """Return a scaled number with the given minus sign; a dash if it is missing."""
    if value is None or value != value:  # NaN: a class is missing, or nothing varies
        return _MISSING
    return f"{scale * float(value):{format_spec}}".replace("-", minus)
