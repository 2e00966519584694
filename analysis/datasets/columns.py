"""Which columns of a published table hold the text, the class and the image of a query.

A name of a set may end in `?COLUMN=NAME&...`, which says so; columns with usual names are found without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from analysis.datasets.queries import HARMFUL_VALUES, QUERY_COLUMNS
from defenses.errors import UserError, unknown_name_error

# Usual names of the columns, the most telling first.
_USUAL_NAMES = {
    "text": ("text", "prompt", "query", "question", "goal", "behavior", "instruction", "request", "input"),
    "harmful": ("harmful", "is_harmful", "unsafe", "is_unsafe", "toxic", "prompt_harm_label", "label"),
    "category": ("category",),
    "image": ("image",),
}
# Words of a published label → whether the query is harmful, besides those of a query file.
_CLASS_WORDS = HARMFUL_VALUES | dict.fromkeys(("unsafe", "toxic", "malicious"), True)
_CLASS_WORDS |= dict.fromkeys(("safe", "harmless", "unharmful", "non-toxic", "nontoxic"), False)
_CONSTANTS = {"true": True, "false": False}
_MAX_SHOWN_VALUES = 8

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ColumnChoice:
    """The user's choice of columns.

    Attributes:
        columns: column of a query file (see `QUERY_COLUMNS`) → column of the table. For `harmful`, it may
            also be true or false, if all rows are of one class and no column has that name.
        harmful_value: value of the column of the class that means harmful; None if its words say it.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    harmful_value: str | None = None


def split_column_choice(name: str) -> tuple[str, ColumnChoice | None]:
    """Return the name of a set without the choice of columns behind it, and the choice.

    >>> base, choice = split_column_choice("mine.csv?text=prompt&harmful=label:unsafe")
    >>> base, dict(choice.columns), choice.harmful_value
    ('mine.csv', {'text': 'prompt', 'harmful': 'label'}, 'unsafe')

    Args:
        name: of a set; in the choice, characters may be written as in a URL (`%26` for &).

    Raises:
        UserError: if the choice cannot be read.
    """
    base, mark, query = name.partition("?")
    if not mark:
        return name, None
    columns: dict[str, str] = {}
    harmful_value = None
    for part in query.split("&"):
        key, _, column = (unquote(text) for text in part.partition("="))
        if key not in QUERY_COLUMNS:
            raise unknown_name_error(f"column of queries in {name!r}:", key, QUERY_COLUMNS)
        if not column or key in columns:
            raise UserError(f"--data {name}: {key} takes one column, such as {key}=prompt")
        if key == "harmful" and ":" in column:
            column, _, harmful_value = column.rpartition(":")
        columns[key] = column
    return base, ColumnChoice(columns, harmful_value)


def choose_columns(
    rows: Sequence[Row], choice: ColumnChoice, source: str
) -> tuple[list[dict[str, Any]], str]:
    """Return the rows with the columns of a query file, and a description of what was chosen.

    Columns that the user does not name are found by their usual names: the text, the class, the category and
    the image. Splits, pairs, kinds and ids are used only where they are named, because they may mean
    something else in another table.

    >>> rows, chosen = choose_columns([{"prompt": "Hi", "label": "safe"}], ColumnChoice(), "a set")
    >>> rows, chosen
    ([{'text': 'Hi', 'harmful': False}], 'text is prompt, harmful is label')

    Args:
        rows: of the table; all have the same columns.
        choice: the user's.
        source: the set, for error messages.

    Raises:
        UserError: if a column is missing or its values cannot be read.
    """
    present = list(dict.fromkeys(name for row in rows for name in row))
    chosen = dict(choice.columns)
    for key, column in chosen.items():
        if column not in present and not (key == "harmful" and column in _CONSTANTS):
            raise unknown_name_error(f"column of {source}:", column, present)
    by_lowercase = {name.casefold(): name for name in reversed(present)}
    for key, usual_names in _USUAL_NAMES.items():
        found = [by_lowercase[name] for name in usual_names if name in by_lowercase]
        if key not in chosen and found:
            chosen[key] = found[0]
    if missing := [key for key in ("text", "harmful") if key not in chosen]:
        example = {"text": "text=COLUMN", "harmful": "harmful=COLUMN:VALUE (or true, or false)"}[missing[0]]
        raise UserError(
            f"{source} has no column with a usual name for {missing[0]}; its columns are "
            f"{', '.join(present)}: add ?{example} behind the name"
        )
    harmful = _read_classes(rows, chosen["harmful"], choice.harmful_value, source, present)
    others = {key: column for key, column in chosen.items() if key != "harmful"}
    converted = [
        {key: row.get(column) for key, column in others.items()} | {"harmful": is_harmful}
        for row, is_harmful in zip(rows, harmful, strict=True)
    ]
    value = f" = {choice.harmful_value}" if choice.harmful_value is not None else ""
    return converted, ", ".join(
        f"{key} is {column}{value if key == 'harmful' else ''}" for key, column in chosen.items()
    )


def _read_classes(
    rows: Sequence[Row], column: str, harmful_value: str | None, source: str, present: Sequence[str]
) -> list[bool]:
    """Return whether each row is harmful."""
    if column in _CONSTANTS and column not in present:
        return [_CONSTANTS[column]] * len(rows)
    values = [str(row.get(column)).strip() for row in rows]
    if harmful_value is not None:
        if harmful_value not in values:
            raise unknown_name_error(f"value of {column} in {source}:", harmful_value, _list_values(values))
        return [value == harmful_value for value in values]
    words = [value.casefold() for value in values]
    if unread := [word for word in words if word not in _CLASS_WORDS]:
        raise UserError(
            f"{source}: {column} has the values {', '.join(_list_values(values))}, and {unread[0]!r} does "
            f"not say whether a query is harmful: add ?harmful={column}:VALUE behind the name, with the "
            "value of the harmful queries"
        )
    return [_CLASS_WORDS[word] for word in words]


def _list_values(values: Sequence[str]) -> list[str]:
    """Return the most frequent values, shortened."""
    counts = Counter(values).most_common(_MAX_SHOWN_VALUES + 1)
    shown = [value[:40] for value, _ in counts[:_MAX_SHOWN_VALUES]]
    return [*shown, "…"] if len(counts) > _MAX_SHOWN_VALUES else shown
