"""Read a run from its folder, and write a run into one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.files import stage_folder
from analysis.report.results import Run
from defenses.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

# Columns that a known table must have; other tables are optional and shown as they are.
REQUIRED_COLUMNS = {
    "scores": ("query", "category", "harmful", "attack", "defense", "margin"),
    "prompts": ("attack", "defense", "query", "readings", "read"),
    "summary": (
        *("attack", "defense", "family", "n_harmful", "n_benign", "verdict"),
        *(
            f"{name}{suffix}"
            for name in (
                *("refusal_rate", "over_refusal_rate", "auroc", "delta_auroc"),
                *("shift", "discrimination"),
            )
            for suffix in ("", "_low", "_high")
        ),
    ),
}
_REQUIRED_RECORD_FIELDS = {
    "model": ("name",),
    "data": ("name", "split", "n_harmful", "n_benign"),
    "readout": ("name", "threshold"),
}
_RUN_HINT = "`analyze -d NAME -o FOLDER` writes a run"

# Name of a data set → texts of its queries by id, and the SHA-256 of the set.
TextLoader = Callable[[str], tuple[Mapping[str, str], str]]


def read_run(folder: Path, load_texts: TextLoader, taken_names: Container[str] = ()) -> Run:
    """Read a run from its folder.

    Args:
        folder: with `run.json` and tables.
        load_texts: loads the query texts of a data set without the network; it may raise a UserError.
        taken_names: names of other runs in the same report; the run gets another name.

    Raises:
        UserError: if the folder holds no run, or one of its files is damaged or has another format.
    """
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {problem}; give the folder of a run: {_RUN_HINT}")
    record_path = folder / "run.json"
    if not record_path.is_file():
        raise UserError(f"{folder} is not a run: it lacks run.json; {_RUN_HINT}")
    record = _read_record(record_path)
    files = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".csv", ".png") and path.is_file()
    }
    tables = {
        name.removesuffix(".csv"): _read_table(folder / name, content)
        for name, content in files.items()
        if name.endswith(".csv")
    }
    if not tables:
        raise UserError(f"{folder} is not a run: it lacks summary.csv and every other table; {_RUN_HINT}")
    for name, content in files.items():
        if name.endswith(".png") and not _is_whole_png(content):
            raise UserError(f"{folder / name} is not a complete PNG; remove it or repeat the run")
    texts, missing_texts_reason = _load_query_texts(record, load_texts)
    figures = tuple(name.removesuffix(".png") for name in files if name.endswith(".png"))
    name = _choose_free_name(folder.resolve().name, taken_names)
    return Run(name, record, tables, files, texts, missing_texts_reason, figures)


def save_run(folder: Path, run: Run, console: Console) -> None:
    """Write the tables, figures and run.json of a run: all of them, or none if one cannot be written.

    Args:
        folder: created if it does not exist; files of the same names are replaced.
        run: a run that was just computed.
        console: shows the progress.
    """
    with console.status("figures and tables"), stage_folder(folder) as staging:
        for stem, table in run.tables.items():
            # Scores are written exactly, so that the summary can be recomputed from them.
            float_format = None if stem in ("scores", "controls") else "%.7g"
            table.to_csv(staging / f"{stem}.csv", index=False, float_format=float_format)
        for stem in run.figures:
            run.draw_figure(stem).savefig(staging / f"{stem}.png")
        text = json.dumps(run.record, indent=2, ensure_ascii=False)
        (staging / "run.json").write_text(text + "\n", encoding="utf-8")


def _choose_free_name(name: str, taken_names: Container[str]) -> str:
    """Return the name, with a number if it is taken."""
    free_name, number = name, 2
    while free_name in taken_names:
        free_name = f"{name} ({number})"
        number += 1
    return free_name


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); repeat the run") from error
    for section, fields in _REQUIRED_RECORD_FIELDS.items():
        values = record.get(section) if isinstance(record, dict) else None
        missing = [name for name in fields if not isinstance(values, dict) or name not in values]
        if missing:
            raise UserError(f"{path} lacks {section}: {', '.join(missing)}; {_RUN_HINT} that has them")
    return record


def _read_table(path: Path, content: bytes) -> pd.DataFrame:
    try:
        table = pd.read_csv(io.BytesIO(content))
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(
            f"{path} is not a CSV table ({str(error).splitlines()[0]}); repeat the run"
        ) from error
    if "defense" not in table:
        table = table.rename(columns={"condition": "defense"})  # the column's name in older runs
    if "verdict_note" in table:  # read_csv takes an empty text for missing, and an empty column for numbers
        for name in ("verdict_note", "verdict_over_control", "control_note"):
            if name in table:
                table[name] = table[name].astype(object).fillna("")
    missing = [column for column in REQUIRED_COLUMNS.get(path.stem, ()) if column not in table]
    if missing:
        raise UserError(f"{path} lacks the column {missing[0]}; repeat the run")
    if path.stem == "scores" and table["harmful"].dtype != bool:
        raise UserError(f"{path}: harmful must be True or False in every row; repeat the run")
    return table


def _is_whole_png(content: bytes) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _load_query_texts(record: Mapping[str, Any], load_texts: TextLoader) -> tuple[Mapping[str, str], str]:
    """Load the texts of a run's queries by id; if that fails, none and the reason."""
    data = record["data"]
    try:
        texts, sha256 = load_texts(str(data["name"]))
    except (UserError, OSError) as error:
        return {}, f"queries are shown by their ids, because their texts cannot be read: {error}"
    if data.get("sha256") not in (None, sha256):
        return (
            {},
            f"queries are shown by their ids, because {data['name']} has changed since the run (SHA-256)",
        )
    return texts, ""
