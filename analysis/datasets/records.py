"""Read the rows of CSV, JSONL and JSON files, with one-line errors that name the place."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defenses.errors import UserError, unknown_name_error

RECORD_SUFFIXES = (".jsonl", ".csv")  # formats of the user's own files


def read_records(
    path: Path, required_columns: Sequence[str], format_hint: str
) -> tuple[list[dict[str, Any]], bytes]:
    """Return the rows of a file, and its bytes.

    Args:
        path: a `.jsonl` file; a `.csv` file with a header (lines that start with # before it are skipped); or
            a `.json` file with an object of objects, whose names become the column id.
        required_columns: columns that the file must have.
        format_hint: description of the expected format, for error messages.

    Raises:
        UserError: if the file cannot be read, holds no rows or lacks a column.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {format_hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    if path.suffix == ".csv":
        rows, columns = _parse_csv(path, text)
    elif path.suffix == ".json":
        rows, columns = _parse_json_objects(path, text, format_hint)
    else:
        rows, columns = _parse_jsonl(path, text, format_hint)
    if not rows:
        raise UserError(f"{path} holds no rows; {format_hint}")
    missing = [name for name in required_columns if name not in columns]
    if len(missing) == 1 == len(required_columns):
        raise unknown_name_error(f"column of {path}:", missing[0], columns)
    if missing:
        raise UserError(
            f"{path} lacks {' and '.join(missing)} (has {', '.join(sorted(columns))}); {format_hint}"
        )
    return rows, content


def _parse_csv(path: Path, text: str) -> tuple[list[dict[str, Any]], set[str]]:
    while text.startswith("#"):
        text = text.partition("\n")[2]
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names, rows = list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error
    if len(names) > len(set(names)):
        raise UserError(f"{path} has two columns of the same name ({', '.join(names)}); rename one")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise UserError(
                f"{path}, row {number} has more values than the {len(names)} columns; put a text that "
                "contains commas between double quotes"
            )
    return [dict(row) for row in rows], set(names)


def _parse_jsonl(path: Path, text: str, format_hint: str) -> tuple[list[dict[str, Any]], set[str]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg}); write one object per line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; {format_hint}")
        rows.append(row)
    return rows, _shared_columns(rows)


def _parse_json_objects(path: Path, text: str, format_hint: str) -> tuple[list[dict[str, Any]], set[str]]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); {format_hint}") from error
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise UserError(f"{path}: not a JSON object of objects; {format_hint}")
    rows = [{"id": name, **row} for name, row in table.items()]
    return rows, _shared_columns(rows)


def _shared_columns(rows: Sequence[dict[str, Any]]) -> set[str]:
    """Columns that every row has."""
    return set.intersection(*map(set, rows)) if rows else set()
