"""A run is written whole or not at all, and a folder is read only if every file is what a command wrote."""

import errno
import json

import pandas as pd
import pytest
from conftest import assert_user_error, run_cli
from matplotlib.figure import Figure
from rich.console import Console
from saved_runs import make_picture, parse_chart_data, render_folders, write_run

from analysis.report.folder import save_run
from analysis.report.results import Run

TABLES = {
    "scores": pd.DataFrame({"margin": [0.1 + 0.2]}),
    "summary": pd.DataFrame({"x": [1 / 3]}),
    "plane": pd.DataFrame({"x": [1.0]}),
}


def save(folder, record, figures=()):
    save_run(folder, Run("toy", record, TABLES, figures=figures), Console(quiet=True))


# --- writing ----------------------------------------------------------------------------------------------


def test_every_file_is_written_and_nothing_else_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.plots.figures.draw_figure", lambda *_: Figure())
    save(tmp_path / "a" / "out", {"seed": 0, "text": "d′"}, ("plane",))
    names = sorted(path.name for path in (tmp_path / "a" / "out").iterdir())
    assert names == ["plane.csv", "plane.png", "run.json", "scores.csv", "summary.csv"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert json.loads((tmp_path / "a" / "out" / "run.json").read_text("utf-8")) == {"seed": 0, "text": "d′"}


def test_scores_are_exact_and_other_tables_are_rounded(tmp_path):
    save(tmp_path, {})
    assert (tmp_path / "scores.csv").read_text() == "margin\n0.30000000000000004\n"
    assert (tmp_path / "summary.csv").read_text() == "x\n0.3333333\n"


def test_files_of_the_same_name_are_replaced_and_others_stay(tmp_path):
    (tmp_path / "run.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, {"new": 1})
    assert json.loads((tmp_path / "run.json").read_text()) == {"new": 1}
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("ours")])
def test_a_fault_at_the_last_file_leaves_the_folder_unchanged(tmp_path, monkeypatch, fault):
    class FaultyFigure(Figure):
        def savefig(self, path):
            path.write_bytes(b"half")
            raise fault

    monkeypatch.setattr("analysis.plots.figures.draw_figure", lambda *_: FaultyFigure())
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
