"""A run is written whole or not at all, and a folder is read only if every file is what a command wrote."""

import errno
import hashlib
import io
import json
from dataclasses import replace

import pandas as pd
import pytest
from conftest import assert_user_error, run_cli
from matplotlib.figure import Figure
from rich.console import Console
from saved_runs import make_picture, parse_chart_data, render_folders, write_run

from analysis.report.folder import add_tables, prepare_run_folder, read_run, save_run
from analysis.report.results import Run

TABLES = {
    "scores": pd.DataFrame({"margin": [0.1 + 0.2]}),
    "summary": pd.DataFrame({"x": [1 / 3]}),
    "plane": pd.DataFrame({"x": [1.0]}),
}


def save(folder, record, figures=()):
    save_run(folder, Run("toy", record, TABLES, figures=figures), Console(quiet=True))


def fail_on_full_disk(*_):
    raise OSError(errno.ENOSPC, "disk full")


def save_planted_run(folder):
    """Write the planted run as a command does, without its pictures."""
    write_run(folder.with_name("planted"))
    save_run(folder, replace(load(folder.with_name("planted")), figures=()), Console(quiet=True))
    return folder


def load(folder):
    """Read a run without the texts of its queries."""
    return read_run(folder, lambda name: ({}, ""))


# --- writing ----------------------------------------------------------------------------------------------


def test_every_file_is_written_and_nothing_else_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.plots.figures.draw_figure", lambda *_, **__: Figure())
    save(tmp_path / "a" / "out", {"seed": 0, "text": "d′"}, ("plane",))
    names = sorted(path.name for path in (tmp_path / "a" / "out").iterdir())
    assert names == ["plane.csv", "plane.png", "run.json", "scores.csv", "summary.csv"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    record = json.loads((tmp_path / "a" / "out" / "run.json").read_text("utf-8"))
    digests = {
        name: hashlib.sha256((tmp_path / "a" / "out" / name).read_bytes()).hexdigest() for name in names
    }
    del digests["run.json"]
    assert record == {"seed": 0, "text": "d′", "files": digests}


def test_scores_are_exact_and_other_tables_are_rounded(tmp_path):
    save(tmp_path, {})
    assert (tmp_path / "scores.csv").read_text() == "margin\n0.30000000000000004\n"
    assert (tmp_path / "summary.csv").read_text() == "x\n0.3333333\n"


def test_files_that_no_run_wrote_stay_under_another_name_if_a_table_has_theirs(tmp_path):
    (tmp_path / "run.json").write_text("old")
    for name in ("notes.txt", "summary.csv", "summary.kept-1.csv"):
        (tmp_path / name).write_text(f"my {name}")
    console = Console(file=io.StringIO(), width=300)
    for _ in range(2):  # the second time, all tables are of the run before
        save_run(tmp_path, Run("toy", {"new": 1}, TABLES), console)
        assert json.loads((tmp_path / "run.json").read_text())["new"] == 1
        assert (tmp_path / "notes.txt").read_text() == "my notes.txt"
        assert (tmp_path / "summary.kept-1.csv").read_text() == "my summary.kept-1.csv"
        assert (tmp_path / "summary.kept-2.csv").read_text() == "my summary.csv"
        assert (tmp_path / "summary.csv").read_text() == "x\n0.3333333\n"
    assert console.file.getvalue().count("that no run wrote: summary.csv as summary.kept-2.csv\n") == 1
    assert len(list(tmp_path.iterdir())) == 7


def test_a_users_file_keeps_its_name_if_the_run_cannot_be_moved(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("old")
    (tmp_path / "summary.csv").write_text("mine")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("analysis.files._move_files", fail_on_full_disk)
        save(tmp_path, {})
    assert (tmp_path / "summary.csv").read_text() == "mine"
    save(tmp_path, {})
    assert (tmp_path / "summary.csv").read_text() == "x\n0.3333333\n"
    assert [path.read_text() for path in tmp_path.glob("summary.kept-*.csv")] == ["mine"]


def test_a_run_replaces_the_unchanged_files_of_the_run_before_it_and_says_so(tmp_path):
    record = json.loads((write_run(tmp_path / "old") / "run.json").read_text("utf-8"))
    run = load(tmp_path / "old")
    folder, console = tmp_path / "out", Console(file=io.StringIO(), width=300)
    assert prepare_run_folder(folder, console) == folder and console.file.getvalue() == ""
    save_run(folder, replace(run, record=record, figures=()), console)
    for name in ("own.csv", "odd.png"):  # not of the run
        (folder / name).write_bytes(b"x\n1\n")
    (folder / "prompts.csv").write_text("changed by hand\n")
    prepare_run_folder(folder, console)
    assert (
        f"note: a run of toy on {record['data']['name']} (2026-11-21 19:46) is in" in console.file.getvalue()
    )
    tables = {name: run.tables[name] for name in ("scores", "summary")}
    save_run(folder, replace(run, record=record, tables=tables, figures=()), console)
    assert "as files of the run before: plane.csv\n" in console.file.getvalue()
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["odd.png", "own.csv", "prompts.csv", "run.json", "scores.csv", "summary.csv"]
    again = load(folder)
    assert list(again.tables) == ["scores", "summary"] and again.figures == (), "the rest is not read"


def test_tables_are_added_to_a_run_and_removed_from_it(tmp_path):
    write_run(tmp_path / "old")
    folder = tmp_path / "out"
    save_run(folder, replace(load(tmp_path / "old"), figures=()), Console(quiet=True))
    (folder / "odd.csv").write_text("x\n1\n")
    for rows in (2, 3):
        add_tables(folder, {"labels": pd.DataFrame({"query": ["001"] * rows})})
        run = load(folder)
        assert run.tables["labels"]["query"].tolist() == ["001"] * rows and "odd" not in run.tables
    add_tables(folder, {"labels": pd.DataFrame()})
    assert "labels" not in load(folder).tables
    assert not (folder / "labels.csv").exists()


TEXTS = [
    "NA",
    "nan",
    "None",
    "null",
    "001",
    "1e5",
    "True",
    "1_000",
    " a ",
    "a,b",
    'q"x',
    "a\nb",
    "a\rb",
    "=1+1",
]
TEXTS += ["-1", "#c", "日本", "<NA>", "inf", "1.0", "\u2028"]


def test_ids_and_names_stay_texts_in_every_table_that_is_read_back(tmp_path):
    folder = write_run(tmp_path / "old", n_queries=len(TEXTS) + 1)
    run = load(folder)
    ids = dict(zip(run.tables["scores"]["query"].unique(), [*TEXTS, "x"], strict=True))
    named = run.tables["scores"].assign(
        query=lambda rows: rows["query"].map(ids), category="None", attack="1"
    )
    named["pair"] = named["query"].where(named["query"].isin(TEXTS[:6]))
    summary = run.tables["summary"].assign(attack="1")
    tables = {"scores": named, "summary": summary, "other": named[["query", "pair"]].assign(n=1.5)}
    save_run(tmp_path / "out", replace(run, tables=tables, figures=()), Console(quiet=True))
    again = load(tmp_path / "out").tables
    for name in ("query", "pair", "category", "attack", "defense"):
        assert again["scores"][name].dropna().tolist() == named[name].dropna().tolist(), name
        assert again["scores"][name].isna().tolist() == named[name].isna().tolist(), name
    assert again["scores"]["margin"].tolist() == named["margin"].tolist()
    assert again["other"]["query"].tolist() == named["query"].tolist() and set(again["other"]["n"]) == {1.5}
    assert (
        again["summary"].merge(again["scores"], on=["attack", "defense"])["query"].nunique() == len(TEXTS) + 1
    )


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("ours")])
def test_a_fault_at_the_last_file_leaves_the_folder_unchanged(tmp_path, monkeypatch, fault):
    class FaultyFigure(Figure):
        def savefig(self, path):
            path.write_bytes(b"half")
            raise fault

    monkeypatch.setattr("analysis.plots.figures.draw_figure", lambda *_, **__: FaultyFigure())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.csv").write_text("old")
    with pytest.raises(type(fault)):
        save(tmp_path / "out", {}, ("plane",))
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [("scores.csv", "old")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["missing", "changed"])
def test_without_their_texts_queries_are_shown_by_their_ids(tmp_path, change):
    folder = write_run(tmp_path / "run")
    if change == "missing":
        (tmp_path / "run-queries.csv").unlink()
    else:
        path = folder / "run.json"
        record = json.loads(path.read_text("utf-8"))
        record["data"]["sha256"] = "0" * 64
        path.write_text(json.dumps(record), "utf-8")
    html = render_folders(folder)
    assert "queries are shown by their ids" in html
    assert {query[1] for query in parse_chart_data(html)["runs"][0]["queries"]} == {""}


def test_a_folder_that_is_not_a_run_is_rejected_with_what_it_lacks(tmp_path):
    out = ("-o", tmp_path / "page.html")
    assert_user_error(
        run_cli("report", tmp_path / "nothing", *out), "nothing does not exist", "-d NAME -o FOLDER"
    )
    (tmp_path / "file").write_text("x", "utf-8")
    assert_user_error(run_cli("report", tmp_path / "file", *out), "is a file", "analyze -d NAME")
    (tmp_path / "empty").mkdir()
    assert_user_error(run_cli("report", tmp_path / "empty", *out), "lacks run.json", "analyze -d NAME")
    folder = write_run(tmp_path / "run")
    for name in ("scores.csv", "summary.csv", "plane.csv", "prompts.csv"):
        (folder / name).unlink()
    assert_user_error(run_cli("report", folder, *out), "lacks summary.csv")
    assert_user_error(run_cli("report", *out), "Missing argument 'runs'")
    assert not (tmp_path / "page.html").exists()


def test_a_file_of_another_run_or_a_missing_one_is_named(tmp_path):
    write_run(tmp_path / "old")
    folder = tmp_path / "out"
    save_run(folder, replace(load(tmp_path / "old"), figures=()), Console(quiet=True))
    for change, words in (
        (lambda path: path.write_text(path.read_text() + "\n"), "is not the file that the run wrote"),
        (lambda path: path.unlink(), "cannot be read"),
    ):
        change(folder / "plane.csv")
        result = run_cli("report", folder, "-o", tmp_path / "page.html")
        assert_user_error(result, "plane.csv", words, "repeat the run")
    record = json.loads((folder / "run.json").read_text("utf-8"))
    (folder / "run.json").write_text(json.dumps(record | {"files": {"../planted/plane.csv": None}}), "utf-8")
    assert_user_error(run_cli("report", folder, "-o", tmp_path / "page.html"), "files has to list tables")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.json", "{", "is not JSON"),
        ("run.json", "[]", "lacks model: name"),
        ("run.json", '{"model": {"name": "toy"}}', "lacks data: name, split"),
        ("summary.csv", "attack,defense\ndirect,none\n", "lacks the column family"),
        ("scores.csv", "", "lacks the column query"),
        ("odd.png", "no picture", "is not a complete PNG"),
        ("odd.png", make_picture(noise_seed=1)[:9000], "is not a complete PNG"),
    ],
    ids=["no JSON", "no record", "no data", "no family", "no scores", "no picture", "half a picture"],
)
def test_a_damaged_file_is_named(tmp_path, name, content, words):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_user_error(run_cli("report", folder, "-o", tmp_path / "page.html"), name, words)
