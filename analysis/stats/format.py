"""Words in the cells of the page's tables: an estimate with its interval, a name, a verdict, a shade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.stats.tables import UNDEFENDED

# What is shown: the column, its head, its form, a factor, and whether it has an interval.
ColumnFormat = tuple[str, str, str, float, bool]
_NAME_COLUMNS = ("defense", "members")  # columns of a table that name a condition


def format_estimate(row: Any, column: ColumnFormat) -> str:
    """Return an estimate with its interval; a dash where there is none, and of the reference."""
    name, _, form, factor, with_interval = column
    if row.get("verdict") == "reference" and name in ("delta_auroc", "shift", "discrimination"):
        return "–"
    text = format_number(row[name], form, factor)
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if not with_interval or text == "–" or low is None or low != low:
        return text
    return f"{text} [{format_number(low, form, factor)}, {format_number(high, form, factor)}]"


def format_number(value: Any, format_spec: str, scale: float) -> str:
    """Return a number in a form, times a factor; a dash where there is none.

    >>> format_number(-0.25, "+.0f", 100), format_number(None, ".2f", 1)
    ('−25', '–')
    """
    if value is None or value != value:
        return "–"
    return f"{scale * float(value):{format_spec}}".replace("-", "\N{MINUS SIGN}")


def intervals(frame: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """Return a table for readers: each estimate and its interval in one column, other numbers rounded.

    >>> intervals(pd.DataFrame({"shift": [0.512], "shift_low": [0.4], "shift_high": [0.6], "n": [8]}))
                   shift  n
    0  0.51 [0.40, 0.60]  8

    Args:
        frame: any table of a run; `x_low` and `x_high` bound `x`.
        digits: behind the point.
    """
    ends = {f"{name}{end}" for name in frame for end in ("_low", "_high")} & {*map(str, frame)}
    shown = frame.drop(columns=[name for name in frame if name in ends]).round(digits)
    for name in shown:
        if {f"{name}_low", f"{name}_high"} <= ends:
            rows = frame.to_dict("records")
            shown[name] = [format_estimate(row, (str(name), "", f".{digits}f", 1, True)) for row in rows]
    return shown


def format_cell(value: Any, column: str) -> str:
    """Return a word of a table as the page has it."""
    if value != value:
        return "–"
    return "undefended" if column in _NAME_COLUMNS and value == UNDEFENDED else str(value)


def format_defense_name(row: Any) -> str:
    """Return the name of a row's defense as the page has it."""
    name = "undefended" if row["defense"] == "none" else str(row["defense"])
    return f"{name} (control)" if row["family"] == "control" else name


def format_verdict(row: Any) -> str:
    """Return what the intervals of a row say, and whether that is not to be trusted."""
    words = str(row["verdict"]).replace(" -", " \N{MINUS SIGN}")
    return f"{words} (not trusted)" if row.get("trusted") == "not trusted" else words


def format_interval(row: Mapping[str, Any], column: str, format_spec: str, scale: float = 1.0) -> str:
    """Return an estimate with its interval as text, a dash where there is none."""
    value, low, high = (scale * row[f"{column}{end}"] for end in ("", "_low", "_high"))
    if value != value:  # there is none: a class is missing, or nothing varies
        return "–"
    return (
        f"{value:{format_spec}} [{low:{format_spec}}, {high:{format_spec}}]"
        if low <= high
        else f"{value:{format_spec}}"
    )
