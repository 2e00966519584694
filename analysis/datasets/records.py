"""The rows of a .csv, .jsonl or .json file, as they stand in it; what is wrong is said in one line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defenses.errors import UserError, unknown_name_error

RECORD_SUFFIXES = (".jsonl", ".csv")  # of a user's own files


def read_records(
    path: Path, required_columns: Sequence[str], format_hint: str
) -> tuple[list[dict[str, Any]], bytes]:
    """Return the rows of a file and its bytes.

    Args:
        path: of a `.jsonl`; of a `.csv` with a head line (lines with # in front of that are skipped); or of a
            `.json` that holds an object of objects, whose names become the column id.
        required_columns: columns that must be there.
        format_hint: said where the file is not what it must be.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {format_hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    if path.suffix == ".csv":
        rows, columns = _parse_csv(path, text)
    else:
        rows, columns = (_parse_json_objects if path.suffix == ".json" else _parse_jsonl)(
            path, text, format_hint
        )
    if not rows:
        raise UserError(f"{path} holds no rows; {format_hint}")
    missing = [name for name in required_columns if name not in columns]
    if len(missing) == 1 == len(required_columns):
        raise unknown_name_error(f"column of {path}:", missing[0], columns)
    if missing:
        raise UserError(
            f"{path} lacks {' and '.join(missing)} (has {', '.join(sorted(columns))}); {format_hint}"
        )
    return rows, raw


def _parse_csv(path: Path, text: str) -> tuple[list[dict[str, Any]], set[str]]:
    while text.startswith("#"):
        text = text.partition("\n")[2]
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names, rows = list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: no CSV that can be read ({error})") from error
    if len(names) > len(set(names)):
        raise UserError(f"{path} has two columns of one name ({', '.join(names)}); rename one")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise UserError(
                f"{path}, row {number} has more values than {len(names)} columns; a text with commas goes "
                "between double quotes"
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
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}); one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; {format_hint}")
        rows.append(row)
    return rows, set.intersection(*map(set, rows)) if rows else set()


def _parse_json_objects(path: Path, text: str, format_hint: str) -> tuple[list[dict[str, Any]], set[str]]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); {format_hint}") from error
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise UserError(f"{path}: not a JSON object of objects; {format_hint}")
    rows = [{"id": name, **row} for name, row in table.items()]
    return rows, set.intersection(*map(set, rows)) if rows else set()
