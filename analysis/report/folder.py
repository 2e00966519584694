"""Read a run from its folder, and write a run into one.

`run.json` lists the files of the run under `files`, each with its SHA-256; what else lies in the folder is
not read. Files that are added to a run later (by `analyze label`) have null in place of the digest. Runs of
earlier versions have no such list: every table and figure in their folders is read.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.files import (
    check_output_folder,
    hash_file,
    lock_folder,
    stage_folder,
    write_file,
    write_text_file,
)
from analysis.report.results import Run
from analysis.stats.tables import format_table, read_table
from defenses.errors import UserError, unknown_name_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from defenses.images import QueryImage

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
# Tables of a model's run from which a comparison of models was computed, and which may not change after it.
_COMPARED_FILES = ("scores.csv", "summary.csv", "responses.csv")
_REQUIRED_RECORD_FIELDS = {
    "model": ("name",),
    "data": ("name", "split", "n_harmful", "n_benign"),
    "readout": ("name", "threshold"),
}
RECORD_FILE = "run.json"
_FILE_SUFFIXES = (".csv", ".png")
FIGURE_FORMATS = ("pdf", "svg", "png")
_RUN_HINT = "`analyze -d NAME -o FOLDER` writes a run"

# Name of a data set → texts of its queries by id, and the SHA-256 of the set.
TextLoader = Callable[[str], tuple[Mapping[str, str], str]]
# Name of a data set → images of its queries by id.
ImageLoader = Callable[[str], Mapping[str, "QueryImage"]]


def read_run(
    folder: Path,
    load_texts: TextLoader,
    taken_names: Container[str] = (),
    load_images: ImageLoader | None = None,
) -> Run:
    """Read a run from its folder.

    Args:
        folder: with `run.json` and tables.
        load_texts: loads the query texts of a data set without the network; it may raise a UserError.
        taken_names: names of other runs in the same report; the run gets another name.
        load_images: loads the images of the queries of a data set, as `load_texts` does the texts; None
            leaves them out.

    Raises:
        UserError: if the folder holds no run, or one of its files is damaged or has another format.
    """
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {problem}; give the folder of a run: {_RUN_HINT}")
    record_path = folder / RECORD_FILE
    if not record_path.is_file():
        raise UserError(f"{folder} is not a run: it lacks run.json; {_RUN_HINT}")
    record = read_record(record_path)
    files = {name: _read_file(folder / name, digest) for name, digest in _list_files(folder, record).items()}
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
    digests = _list_image_digests(tables.get("scores", pd.DataFrame()))
    texts, images, reason = _load_queries(record, load_texts, load_images, digests)
    figures = tuple(name.removesuffix(".png") for name in files if name.endswith(".png"))
    name = _choose_free_name(folder.resolve().name, taken_names)
    model_runs = {}
    for label, (model_folder, files_then) in _list_model_folders(folder, record).items():
        model_run = read_run(folder / model_folder, load_texts, (), load_images)
        if describe_model_folder(folder, model_folder)["files"] != files_then:
            raise UserError(
                f"{folder / model_folder} was written again after the models of {folder} were compared; "
                "repeat the run with all models"
            )
        model_runs[label] = replace(model_run, name=f"{name}/{model_folder}")
    return Run(name, record, tables, files, texts, reason, figures, images, model_runs)


def describe_model_folder(folder: Path, name: str) -> dict[str, Any]:
    """Return the entries of run.json on the folder of one of several models.

    Args:
        folder: of the run with several models.
        name: of the model's folder in it.

    Returns:
        `folder`, and `files`: the SHA-256 of the tables that the comparison was computed from.
    """
    files = read_record(folder / name / RECORD_FILE).get("files", {})
    return {"folder": name, "files": {file: files[file] for file in _COMPARED_FILES if file in files}}


def save_run(folder: Path, run: Run, console: Console) -> None:
    """Write the tables, figures and run.json of a run: all of them, or none if one cannot be written.

    Args:
        folder: created if it does not exist. Files of the run that was there before are replaced or, if they
            are unchanged, removed; other files of the same names get another name.
        run: a run that was just computed.
        console: shows the progress, and which files were removed or renamed.
    """
    earlier_files = _list_saved_files(folder)
    with console.status("figures and tables"), stage_folder(folder) as staging:
        for stem, table in run.tables.items():
            # Scores are written exactly, so that the summary can be recomputed from them.
            float_format = None if stem in ("scores", "controls") else "%.7g"
            path = staging / f"{stem}.csv"
            path.write_text(format_table(table, float_format), encoding="utf-8", newline="")
        for stem in run.figures:
            run.draw_figure(stem).savefig(staging / f"{stem}.png")
        files = {path.name: hash_file(path) for path in sorted(staging.iterdir())}
        record = {**run.record, "files": files}
        (staging / RECORD_FILE).write_text(_format_record(record), encoding="utf-8")
        kept = _rename_other_files(folder, files, earlier_files)
    if kept:
        _print_line(console, f"Kept in {folder}, as files that no run wrote: {', '.join(kept)}")
    removed = [
        name
        for name, digest in earlier_files.items()
        if name not in files and (folder / name).is_file() and hash_file(folder / name) == digest
    ]
    for name in removed:
        (folder / name).unlink()
    if removed:
        more = f" and {len(removed) - 6} more" if len(removed) > 6 else ""
        names = ", ".join(removed[:6]) + more
        _print_line(console, f"Removed from {folder}, as files of the run before: {names}")


def write_figures(
    run: Run,
    folder: Path,
    names: Sequence[str] = (),
    file_format: str = "pdf",
    defenses: Sequence[str] = (),
    **options: Any,
) -> tuple[list[Path], list[str]]:
    """Draw figures of a run from its tables, and write each to a file of its own.

    The table of a figure that was not saved with the run is written beside it.

    Args:
        run: a run.
        folder: created if it does not exist; not that of a run, whose files are listed in its `run.json`.
        names: of the figures; by default all that the run has and that show the defenses.
        file_format: one of `FIGURE_FORMATS`.
        defenses: the defenses to draw besides the undefended model; by default all.
        **options: passed to `Run.draw_figure`.

    Returns:
        The files of the figures, and the figures that were left out because they do not show the defenses.

    Raises:
        UserError: if a figure cannot be drawn as asked; then no file is written.
    """
    if file_format not in FIGURE_FORMATS:
        raise unknown_name_error("format", file_format, FIGURE_FORMATS)
    if (check_output_folder(folder) / RECORD_FILE).exists():
        raise UserError(f"--out {folder}: the folder of a run holds only what run.json lists; choose another")
    from analysis.plots.figures import list_shown_defenses

    known = [*(name for name in run.figures if name in run.tables), *run.further_figures]
    tables = {name: run.build_figure_table(name) for name in names or known}
    shown = [
        name for name, table in tables.items() if names or set(defenses) <= set(list_shown_defenses(table))
    ]
    if not shown:
        nothing = (
            f"no figure of {run.name} shows {', '.join(defenses)}" if known else f"{run.name} has no figures"
        )
        raise UserError(f"{nothing}; figures: {', '.join(known) or 'none'}")
    drawn = replace(run, tables={**run.tables, **tables}, figures=tuple(tables))
    files: dict[Path, bytes] = {}
    for name in shown:
        figure = drawn.draw_figure(name, defenses=defenses or None, **options)
        files[folder / f"{name}.{file_format}"] = render_figure(figure, file_format)
    figures = list(files)
    for name in shown:
        if name not in run.tables:
            files[folder / f"{name}.csv"] = format_table(tables[name], "%.7g").encode("utf-8")
    for path, content in files.items():
        write_file(path, content)
    return figures, [name for name in tables if name not in shown]


def render_figure(figure: Figure, file_format: str) -> bytes:
    """Return a figure as a file, equal for equal figures: without dates, with fonts embedded, SVG with text.

    Args:
        figure: from `Run.draw_figure`.
        file_format: one of `FIGURE_FORMATS`.
    """
    from matplotlib import rc_context

    # Type 42 is TrueType: texts can be searched and edited; journals reject type 3.
    settings: Any = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "refusalscope"}
    dates: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    buffer = io.BytesIO()
    with rc_context(settings):
        figure.savefig(buffer, format=file_format, metadata=dates.get(file_format))
    return buffer.getvalue()


def _rename_other_files(folder: Path, files: Mapping[str, str], earlier_names: Container[str]) -> list[str]:
    """Give another name to files that a run would replace, but that the run before did not write.

    Args:
        folder: of the run.
        files: of the new run, with their SHA-256.
        earlier_names: files of the run before.

    Returns:
        The old and the new names, for the user.
    """
    renamed = []
    for name, digest in files.items():
        path = folder / name
        if name in earlier_names or not path.is_file() or hash_file(path) == digest:
            continue
        numbers = itertools.count(1)
        others = (path.with_name(f"{path.stem}.kept-{number}{path.suffix}") for number in numbers)
        # The same file under another name is from a run that failed.
        other = next(other for other in others if not other.exists() or other.samefile(path))
        if not other.exists():
            _add_name(path, other)
        renamed.append(f"{name} as {other.name}")
    return renamed


def _add_name(path: Path, other: Path) -> None:
    """Give a file a second name, so that it keeps the first one until another file takes it."""
    try:
        other.hardlink_to(path)
    except OSError:  # a file system without links
        path.rename(other)


def add_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Add tables to the run in a folder; one without rows is removed.

    Args:
        folder: of a run.
        tables: by stem.
    """
    for stem, table in tables.items():
        path = folder / f"{stem}.csv"
        if len(table):
            write_text_file(path, format_table(table, "%.7g"))
        else:
            path.unlink(missing_ok=True)
    record = read_record(folder / RECORD_FILE)
    if "files" not in record:
        return
    files = {name: digest for name, digest in record["files"].items() if Path(name).stem not in tables}
    files |= {f"{stem}.csv": None for stem, table in tables.items() if len(table)}
    if files != record["files"]:
        write_text_file(folder / RECORD_FILE, _format_record({**record, "files": files}))


def read_run_table(path: Path, option: str, command: str, *names: str) -> pd.DataFrame:
    """Read the first of several tables that a run has.

    Args:
        path: folder of the run, or the file itself.
        option: that the user gave the path with, for error messages.
        command: that writes the table, for error messages.
        names: file names, the preferred ones first.

    Raises:
        UserError: if there is no such table, or it is damaged.
    """
    file: Path | None = path
    if path.is_dir():
        is_run = (path / RECORD_FILE).is_file()
        listed = _list_files(path, read_record(path / RECORD_FILE)) if is_run else names
        file = next((path / name for name in names if name in listed), None)
    if file is None or not file.is_file():
        raise UserError(f"{option} {path}: there is no {' or '.join(names)}; `{command}` writes one")
    try:
        return read_table(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {file} is not a CSV table ({str(error).splitlines()[0]})") from error


def prepare_run_folder(folder: Path, console: Console) -> Path:
    """Return the folder if a run can be written to it; print which run this would replace.

    Called before the work starts.

    Args:
        folder: which may not exist yet.
        console: where to print.
    """
    if not lock_folder(check_output_folder(folder)):
        raise UserError(
            f"--out {folder}: a run that has not ended yet will write into it; wait for that run, or choose "
            "another folder"
        )
    if (folder / RECORD_FILE).exists():
        _print_line(
            console,
            f"note: {_describe_saved_run(folder)} is in {folder}; this run replaces it when it is finished",
        )
    return folder


def _describe_saved_run(folder: Path) -> str:
    """Return which run is in a folder, in a few words."""
    try:
        record = read_record(folder / RECORD_FILE)
    except UserError:
        return f"a {RECORD_FILE} of something else"
    created = str(record.get("created", ""))[:16].replace("T", " ")
    return f"a run of {record['model']['name']} on {record['data']['name']}" + f" ({created})" * bool(created)


def _print_line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _choose_free_name(name: str, taken_names: Container[str]) -> str:
    """Return the name, with a number if it is taken."""
    free_name, number = name, 2
    while free_name in taken_names:
        free_name = f"{name} ({number})"
        number += 1
    return free_name


def locate_record(path: Path) -> Path:
    """Return the path of the `run.json` that belongs to a run's folder, or to a table in it."""
    return (path if path.is_dir() else path.parent) / RECORD_FILE


def read_record(path: Path) -> dict[str, Any]:
    """Read the `run.json` of a run.

    Raises:
        UserError: if it is damaged, or lacks what every run has.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); repeat the run") from error
    for section, fields in _REQUIRED_RECORD_FIELDS.items():
        values = record.get(section) if isinstance(record, dict) else None
        if isinstance(values, dict) and "models" in record and section == "readout":
            fields = ("name",)  # each of several models has its own threshold
        missing = [name for name in fields if not isinstance(values, dict) or name not in values]
        if missing:
            raise UserError(f"{path} lacks {section}: {', '.join(missing)}; {_RUN_HINT} that has them")
    return record


def _format_record(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _list_files(folder: Path, record: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the files of a run with their SHA-256, as far as they are known."""
    if "files" not in record:  # a run of an earlier version
        paths = sorted(path for path in folder.iterdir() if path.suffix in _FILE_SUFFIXES and path.is_file())
        return {path.name: None for path in paths}
    files = record["files"]
    if not isinstance(files, dict) or any(
        Path(name).name != name or Path(name).suffix not in _FILE_SUFFIXES for name in files
    ):
        raise UserError(f"{folder / RECORD_FILE}: files has to list tables and figures; repeat the run")
    # Tables without a digest were added later, such as labels, and may be removed again.
    return {name: digest for name, digest in files.items() if digest or (folder / name).is_file()}


def _list_model_folders(folder: Path, record: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the folder of each model of a run with several, and the digests of its tables at that time."""
    folders = {}
    for entry in record.get("models", []):
        label, name = (
            (entry.get(key) for key in ("label", "folder")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(name, str) or name == ".." or Path(name).name != name:
            raise UserError(f"{folder / RECORD_FILE}: models has to list folders in this one; repeat the run")
        if "models" in read_record(folder / name / RECORD_FILE):
            raise UserError(f"{folder / name} holds several models itself; repeat the run")
        folders[str(label)] = name, entry.get("files")
    return folders


def _list_saved_files(folder: Path) -> dict[str, str | None]:
    """Return the files of the run in a folder; none if there is no run, or one that cannot be read."""
    try:
        return _list_files(folder, read_record(folder / RECORD_FILE))
    except UserError:
        return {}


def _read_file(path: Path, digest: str | None) -> bytes:
    """Return the content of a file of a run; raise if it is not the one that the run wrote."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); repeat the run") from error
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise UserError(
            f"{path} is not the file that the run wrote (its SHA-256 differs from that in run.json): it was "
            "changed since, or another run into this folder was cut short; repeat the run, or remove `files` "
            "from run.json to have the folder read as it is"
        )
    return content


def _read_table(path: Path, content: bytes) -> pd.DataFrame:
    try:
        table = read_table(content)
    except ValueError as error:
        raise UserError(
            f"{path} is not a CSV table ({str(error).splitlines()[0]}); repeat the run"
        ) from error
    if "defense" not in table:
        table = table.rename(columns={"condition": "defense"})  # the column's name in older runs
    if "verdict_note" in table:  # an empty text is read as missing
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


def _list_image_digests(scores: pd.DataFrame) -> dict[str, str]:
    """Return the digests of the images of a run's queries by id; none for a run without images."""
    if "image" not in scores:
        return {}
    rows = scores.dropna(subset=["image"]).drop_duplicates("query")
    return dict(zip(rows["query"].astype(str), rows["image"].astype(str), strict=True))


def _load_queries(
    record: Mapping[str, Any],
    load_texts: TextLoader,
    load_images: ImageLoader | None,
    digests: Mapping[str, str],
) -> tuple[Mapping[str, str], Mapping[str, QueryImage], str]:
    """Load the texts and images of a run's queries by id; if that fails, none and the reason.

    Args:
        record: contents of `run.json`.
        load_texts: loads the texts of a data set.
        load_images: loads the images of a data set; None if they are not wanted.
        digests: of the images of the run by query id; an image with another digest is left out.
    """
    data = record["data"]
    name = str(data["name"])
    has_images = bool(load_images and digests)
    how = "by their ids and without their images" if has_images else "by their ids"
    try:
        texts, sha256 = load_texts(name)
        loaded = load_images(name) if load_images and digests else {}
    except (UserError, OSError) as error:
        what = "texts and images" if has_images else "texts"
        return {}, {}, f"queries are shown {how}, because their {what} cannot be read: {error}"
    if data.get("sha256") not in (None, sha256):
        return {}, {}, f"queries are shown {how}, because {name} has changed since the run (SHA-256)"
    images = {query_id: image for query_id, image in loaded.items() if digests.get(query_id) == image.digest}
    return texts, images, ""
