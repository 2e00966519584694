"""Read the rows of CSV, JSON and Parquet files, with one-line errors that name the place."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.files import check_not_lfs_pointer
from defenses.errors import UserError, check_unicode, unknown_name_error

# Formats of the user's own files; each may be compressed (.csv.gz), and capitals do not matter.
RECORD_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
RECORD_FORMATS = ".parquet, .tsv, .json, .jsonl or .csv file"
_DELIMITERS = (",", ";", "\t", "|")
_FIRST_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)?")
_SPREADSHEET_DELIMITER = re.compile(r"sep=(.)[ \t]*(?:\r\n|\r|\n)", re.IGNORECASE)  # first line, by Excel

Rows = list[dict[str, Any]]


def get_record_suffix(path: Path) -> str:
    """Return the suffix that tells the format of a file, without the one of its compression.

    >>> get_record_suffix(Path("queries.v2.CSV.gz"))
    '.csv'
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix


def expand_path(name: str) -> Path:
    """Return a path as the user gave it, with ~ for the home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~NAME of nobody
        return Path(name)


def names_existing_file(name: str) -> bool:
    """Return whether a text is the path of a file or folder that exists."""
    try:
        return name != "" and expand_path(name).exists()
    except OSError:  # too long for a path
        return False


def names_record_file(name: str) -> bool:
    """Return whether a text is the path of a file, rather than the name of something shipped."""
    is_path = name.startswith(("/", "./", "../", "~"))
    return is_path or get_record_suffix(Path(name)) in RECORD_SUFFIXES or names_existing_file(name)


def read_records(
    path: Path, required_columns: Sequence[str], format_hint: str, known_columns: Sequence[str] = ()
) -> tuple[Rows, bytes]:
    """Return the rows of a file, and its bytes.

    Args:
        path: a file in one of `RECORD_SUFFIXES`, compressed by gzip or not. A CSV file has a header (lines
            that start with # before it are skipped), and a comma, semicolon, tab or | between its values. A
            `.json` file holds an array of objects, or an object of objects, whose names become the column id.
        required_columns: columns that the file must have.
        format_hint: description of the expected format, for error messages.
        known_columns: columns whose names the file may write in other case.

    Raises:
        UserError: if the file cannot be read, holds no rows or lacks a column.
    """
    content = _read_bytes(path, format_hint)
    data, suffix = _decompress(path, content), get_record_suffix(path)
    if suffix == ".parquet":
        rows = _parse_parquet(path, data)
    elif suffix in (".csv", ".tsv"):
        expected = {name.casefold() for name in (*required_columns, *known_columns)}
        rows = _parse_csv(path, _decode_text(path, data), expected)
    elif suffix in RECORD_SUFFIXES:
        rows = _parse_json(path, _decode_text(path, data), format_hint)
    else:
        raise UserError(f"{path} has no known format: save it as a {RECORD_FORMATS}; {format_hint}")
    if not rows:
        raise UserError(f"{path} holds no rows; {format_hint}")
    rows = _rename_columns(rows, known_columns)
    _check_columns(path, rows, required_columns, format_hint)
    return rows, content


def _read_bytes(path: Path, format_hint: str) -> bytes:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if get_record_suffix(file) in RECORD_SUFFIXES)
        example = f", such as {files[0]}" if files else ""
        raise UserError(f"{path} is a folder; give a file in it{example}; {format_hint}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {format_hint}") from error
    check_not_lfs_pointer(path, content, "download the file")
    return content


def _decompress(path: Path, content: bytes) -> bytes:
    """Return the content of a compressed file, whatever its name; that of any other file unchanged."""
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); get it or compress it again") from error


def _decode_text(path: Path, data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:1000]:
        raise UserError(
            f"{path} is not UTF-8 text, but UTF-16 or no text; save it as UTF-8 (in a spreadsheet: CSV UTF-8)"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8 (in a "
            "spreadsheet: CSV UTF-8)"
        ) from error


# --- CSV --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CsvHeader:
    """The header of a CSV file.

    Attributes:
        start: position of its first character in the text.
        delimiter: character between its names, and between the values of the rows.
        names: as written, spaces around them included.
    """

    start: int
    delimiter: str
    names: tuple[str, ...]


def _parse_csv(path: Path, text: str, expected_names: set[str]) -> Rows:
    previous_limit = csv.field_size_limit()
    csv.field_size_limit(max(previous_limit, len(text)))  # the default refuses cells over 131,072 characters
    try:
        text = text.lstrip("\r\n")
        header = _find_csv_header(path, text, expected_names)
        is_expected = any(name.casefold() in expected_names for name in _clean_names(header.names))
        if not is_expected and re.match(r"(?:\[\s*)?\{", text):
            raise UserError(f"{path} holds JSON, not CSV: rename it to {path.with_suffix('.jsonl').name}")
        return _parse_csv_rows(path, text[header.start :], header)
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV ({error})") from error
    finally:
        csv.field_size_limit(previous_limit)


def _find_csv_header(path: Path, text: str, expected_names: set[str]) -> _CsvHeader:
    """Return the header whose names are most of the expected ones.

    It is the first line that does not start with #; or, if the expected names are there, a line before it
    that starts with #.

    Args:
        path: for the suffix: in a `.tsv` file, tabs come first.
        text: of the file.
        expected_names: in lowercase.
    """
    declared = _SPREADSHEET_DELIMITER.match(text)
    delimiters = [declared[1]] if declared else list(_DELIMITERS)
    if get_record_suffix(path) == ".tsv":
        delimiters.sort(key=lambda delimiter: delimiter != "\t")
    starts = [declared.end() if declared else 0]
    while text.startswith("#", starts[-1]) and (line := _FIRST_LINE.match(text, starts[-1])):
        starts.append(line.end())
    # Only the first line without # may go on behind its end, inside quotes.
    ends = [*starts[1:], len(text)]
    headers = [
        _read_csv_header(text[start:end], start, delimiter)
        for start, end in zip(starts[::-1], ends[::-1], strict=True)
        for delimiter in delimiters
    ]

    def count_expected(header: _CsvHeader) -> int:
        return len(expected_names & {name.casefold() for name in _clean_names(header.names)})

    best = max(headers, key=count_expected)
    first_line = headers[: len(delimiters)]
    return best if count_expected(best) else max(first_line, key=lambda header: len(header.names))


def _read_csv_header(text: str, start: int, delimiter: str) -> _CsvHeader:
    lines = io.StringIO(text, newline="")
    return _CsvHeader(start, delimiter, tuple(next(csv.reader(lines, delimiter=delimiter), [])))


def _clean_names(names: Sequence[str]) -> list[str]:
    """Return column names without spaces around them, and without a # that marks the header."""
    cleaned = [name.strip() for name in names]
    return [cleaned[0].lstrip("#").strip() or cleaned[0], *cleaned[1:]] if cleaned else []


def _parse_csv_rows(path: Path, text: str, header: _CsvHeader) -> Rows:
    names = _clean_names(header.names)
    is_spaced = any(name.startswith(" ") for name in header.names[1:])
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=header.delimiter, skipinitialspace=is_spaced)
    cell_rows, start_line = [], 0
    for cells in reader:
        if cells:
            cell_rows.append(cells)
            last_lines = lines[start_line : reader.line_num]
        start_line = reader.line_num
    if len(cell_rows) > 1 and len(last_lines) > 1 and "".join(last_lines).count('"') % 2:
        raise UserError(
            f"{path}: a double quote is opened and never closed in the row that begins with "
            f"{last_lines[0].strip()[:60]!r}; close it, or write two of them for one inside a text"
        )
    named = _find_named_columns(path, names, cell_rows[1:])
    rows = []
    for number, cells in enumerate(cell_rows[1:], 1):
        if any(cells[len(names) :]):
            raise UserError(
                f"{path}, row {number} has more values than the {len(names)} columns; put a text that "
                f"contains {header.delimiter!r} between double quotes"
            )
        padded = cells + [None] * (len(names) - len(cells))
        rows.append({names[column]: padded[column] for column in named})
    return rows


def _find_named_columns(path: Path, names: Sequence[str], cell_rows: Iterable[Sequence[str]]) -> list[int]:
    """Return the columns to read: all but empty ones without a name, which spreadsheets append."""
    named = list(range(len(names)))
    if names.count("") > 1:
        used = {column for cells in cell_rows for column, cell in enumerate(cells) if cell}
        named = [column for column in named if names[column] or column in used]
    kept = [names[column] for column in named]
    if len(kept) > len(set(kept)):
        raise UserError(f"{path} has two columns of the same name ({', '.join(names)}); rename one")
    return named


# --- JSON and Parquet -------------------------------------------------------------------------------------


def _parse_json(path: Path, text: str, format_hint: str) -> Rows:
    """Return the rows of one object a line, of an array of objects, or of an object of objects."""
    is_array = text.lstrip().startswith("[")
    if get_record_suffix(path) != ".json" and not is_array:
        return _parse_json_lines(path, text, format_hint)
    try:
        document = _load_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and not is_array:
            return _parse_json_lines(path, text, format_hint)
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); {format_hint}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; {format_hint}") from error
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        if len(lists) == 1 == len(document):  # {"queries": [...]}
            document = lists[0]
    if isinstance(document, dict) and all(isinstance(row, dict) for row in document.values()):
        rows = [{"id": name, **row} for name, row in document.items()]
    elif isinstance(document, list) and all(isinstance(row, dict) for row in document):
        rows = document
    else:
        raise UserError(f"{path}: not a JSON array of objects or object of objects; {format_hint}")
    for number, row in enumerate(rows, 1):
        _check_row_text(row, f"{path}, object {number}", text)
    return rows


def _parse_json_lines(path: Path, text: str, format_hint: str) -> Rows:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = _load_json(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON ({error.msg}); write one object per line") from error
        except ValueError as error:
            raise UserError(f"{place}: {error}; write one object per line") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object; {format_hint}")
        _check_row_text(row, place, line)
        rows.append(row)
    return rows


def _load_json(text: str) -> Any:
    """Return a JSON document; raise ValueError if it cannot be read, or has the same key twice."""
    try:
        return json.loads(text, object_pairs_hook=_build_object, parse_int=_parse_integer)
    except RecursionError as error:
        raise ValueError("the brackets are nested too deeply") from error


def _parse_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:  # Python reads at most 4,300 digits
        raise ValueError(f"a number has {len(text)} digits; write it in quotes, as text") from error


def _build_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {repeated!r} twice")
    return built


def _check_row_text(row: dict[str, Any], place: str, source: str) -> None:
    """Raise if a value holds half of a character.

    Args:
        row: column → value.
        place: for the error message.
        source: JSON text that contains the row.
    """
    if "\\ud" not in source.lower():
        return
    row_id = f" (id {row['id']!r})" if "id" in row else ""
    for column, value in row.items():
        text = json.dumps([column, value], ensure_ascii=False)
        check_unicode(text, f"{place}{row_id}: {column!a}")


def _parse_parquet(path: Path, data: bytes) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{path}: a Parquet file needs pyarrow: pip install pyarrow, or save it as .csv or .jsonl"
        ) from error
    try:
        table = parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable Parquet file ({reason}); write it again") from error
    if len(names := table.column_names) > len(set(names)):
        raise UserError(f"{path} has two columns of the same name ({', '.join(names)}); rename one")
    return table.to_pylist()


# --- columns ----------------------------------------------------------------------------------------------


def _rename_columns(rows: Rows, known_columns: Sequence[str]) -> Rows:
    """Write the names of known columns as they are known, if exactly one column of the file is meant."""
    present = list(dict.fromkeys(name for row in rows for name in row))
    renamed = {}
    for known in known_columns:
        meant = [name for name in present if name.strip().casefold() == known.casefold()]
        if len(meant) == 1 and meant != [known]:
            renamed[meant[0]] = known
    return (
        [{renamed.get(name, name): value for name, value in row.items()} for row in rows] if renamed else rows
    )


def _check_columns(path: Path, rows: Rows, required_columns: Sequence[str], format_hint: str) -> None:
    """Raise if a required column is missing, in all rows or in one."""
    present = {name for row in rows for name in row}
    missing = [name for name in required_columns if name not in present]
    if len(missing) == 1 == len(required_columns):
        raise unknown_name_error(f"column of {path}:", missing[0], present)
    if missing:
        raise UserError(
            f"{path} lacks {' and '.join(missing)} (has {', '.join(sorted(present))}); {format_hint}"
        )
    for number, row in enumerate(rows, 1):
        if lacking := [name for name in required_columns if name not in row]:
            raise UserError(f"{path}, row {number} lacks {' and '.join(lacking)}; {format_hint}")
