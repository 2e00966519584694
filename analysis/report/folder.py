"""The command `analyze report`: run folders in, one page out."""

from __future__ import annotations

import io
import json
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.datasets.loading import load_queries
from analysis.files import stage_folder
from analysis.report.results import Run
from defenses.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

# What a table of a run has to hold to be shown; other tables are shown by what they have.
REQUIRED_COLUMNS = {
    "scores": ("query", "category", "harmful", "attack", "defense", "margin"),
    "prompts": ("attack", "defense", "query", "readings", "read"),
    "summary": (
        *("attack", "defense", "family", "n_harmful", "n_benign", "verdict"),
        *(
            f"{name}{end}"
            for name in (
                *("refusal_rate", "over_refusal_rate", "auroc", "delta_auroc"),
                *("shift", "discrimination"),
            )
            for end in ("", "_low", "_high")
        ),
    ),
}
_REQUIRED_RECORD_FIELDS = {
    "model": ("name",),
    "data": ("name", "split", "n_harmful", "n_benign"),
    "readout": ("name", "threshold"),
}
_RUN_HINT = "`analyze -d NAME -o FOLDER` writes a run"


def read_run(folder: Path, taken_names: Container[str] = ()) -> Run:
    """Return the run that lies in a folder.

    Args:
        folder: with `run.json` and tables.
        taken_names: names of other runs of the page.

    Raises:
        UserError: if no run lies there, or one of its files is not what the command wrote.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "is not there"
        raise UserError(f"{folder} {found}; give the folder of a run: {_RUN_HINT}")
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder} is no run: it lacks run.json; {_RUN_HINT}")
    record = _read_record(path)
    files = {
        one.name: one.read_bytes()
        for one in sorted(folder.iterdir())
        if one.suffix in (".csv", ".png") and one.is_file()
    }
    tables = {
        name.removesuffix(".csv"): _read_table(folder / name, held)
        for name, held in files.items()
        if name.endswith(".csv")
    }
    if not tables:
        raise UserError(f"{folder} is no run: it lacks summary.csv and every other table; {_RUN_HINT}")
    for name, held in files.items():
        if name.endswith(".png") and not _is_whole_png(held):
            raise UserError(f"{folder / name} is no PNG, or half of one; remove it, or repeat the run")
    texts, unread = _load_query_texts(record)
    name = folder.resolve().name
    place = 2
    while name in taken_names:
        name = f"{folder.resolve().name} ({place})"
        place += 1
    drawn = tuple(one.removesuffix(".png") for one in files if one.endswith(".png"))
    return Run(name, record, tables, files, texts, unread, drawn)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); repeat the run") from error
    for name, fields in _REQUIRED_RECORD_FIELDS.items():
        held = record.get(name) if isinstance(record, dict) else None
        lacks = [field for field in fields if not isinstance(held, dict) or field not in held]
        if lacks:
            raise UserError(f"{path} lacks {name}: {', '.join(lacks)}; {_RUN_HINT} that has them")
    return record


def _read_table(path: Path, content: bytes) -> pd.DataFrame:
    try:
        table = pd.read_csv(io.BytesIO(content))
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path} is no table ({str(error).splitlines()[0]}); repeat the run") from error
    if "defense" not in table:
        table = table.rename(columns={"condition": "defense"})  # as older runs named it
    lacks = [column for column in REQUIRED_COLUMNS.get(path.stem, ()) if column not in table]
    if lacks:
        raise UserError(f"{path} lacks the column {lacks[0]}; repeat the run")
    if path.stem == "scores" and table["harmful"].dtype != bool:
        raise UserError(f"{path}: harmful must be True or False in every row; repeat the run")
    return table


def _is_whole_png(content: bytes) -> bool:
    """Whether these bytes are a whole PNG."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _load_query_texts(record: dict[str, Any]) -> tuple[dict[str, str], str]:
    """The texts of a run's queries by id, if they can be had without the network; else why not."""
    data = record["data"]
    try:
        found = load_queries(str(data["name"]), offline=True)
    except (UserError, OSError) as error:
        return {}, f"queries are shown by their ids, as their texts cannot be read: {error}"
    if data.get("sha256") not in (None, found.sha256):
        return (
            {},
            f"queries are shown by their ids: {data['name']} is not the file that the run read (SHA-256)",
        )
    return {query.id: query.text for query in found.queries}, ""


def save_run(folder: Path, run: Run, console: Console) -> None:
    """Write a run, tables, figures and run.json: all of its files, or, if one cannot be written, none.

    Args:
        folder: made where there is none; files of the same names are replaced.
        run: just made.
        console: for progress.
    """
    with console.status("figures and tables"), stage_folder(folder) as new:
        for stem, table in run.tables.items():
            # The scores are exact, so that the summary can be made from them again.
            form = None if stem == "scores" else "%.7g"
            table.to_csv(new / f"{stem}.csv", index=False, float_format=form)
        for stem in run.figures:
            run.draw_figure(stem).savefig(new / f"{stem}.png")
        text = json.dumps(run.record, indent=2, ensure_ascii=False)
        (new / "run.json").write_text(text + "\n", encoding="utf-8")
