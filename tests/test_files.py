"""Either all files of a run are there, whole, or none is."""

import errno
import json
import os

import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from analysis.files import check_output_folder, write_text_file
from analysis.report.folder import save_run
from analysis.report.results import Run
from defenses.errors import UserError

TABLES = {"scores": pd.DataFrame({"margin": [0.1 + 0.2]}), "summary": pd.DataFrame({"x": [1 / 3]})}


def save(folder, record, figures=()):
    save_run(folder, Run("toy", record, TABLES, figures=figures), Console(quiet=True))


def test_every_file_is_written_and_nothing_else_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.plots.figures.draw_figure", lambda *_: Figure())
    save(tmp_path / "a" / "out", {"seed": 0, "text": "d′"}, ("plane",))
    found = sorted(path.name for path in (tmp_path / "a" / "out").iterdir())
    assert found == ["plane.png", "run.json", "scores.csv", "summary.csv"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert json.loads((tmp_path / "a" / "out" / "run.json").read_text("utf-8")) == {"seed": 0, "text": "d′"}


def test_scores_are_exact_and_other_tables_short(tmp_path):
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
def test_a_fault_at_the_last_file_leaves_the_folder_as_it_was(tmp_path, monkeypatch, fault):
    class Faulty(Figure):
        def savefig(self, path):
            path.write_bytes(b"half")
            raise fault

    monkeypatch.setattr("analysis.plots.figures.draw_figure", lambda *_: Faulty())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.csv").write_text("old")
    with pytest.raises(type(fault)):
        save(tmp_path / "out", {}, ("plane",))
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [("scores.csv", "old")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_usable_where_it_is_or_can_be_made(tmp_path):
    assert check_output_folder(tmp_path) == tmp_path
    assert check_output_folder(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert list(tmp_path.iterdir()) == []


def test_a_file_or_a_folder_that_is_closed_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; give a new or an existing folder"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        check_output_folder(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot be written: .* choose another folder"):
        check_output_folder(tmp_path / "new")


def test_a_file_is_as_readable_as_any_that_its_user_makes_and_is_whole_or_not_there(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text_file(tmp_path / "new" / "page.html", "whole")
    assert (tmp_path / "new" / "page.html").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(UnicodeEncodeError):
        write_text_file(tmp_path / "new" / "page.html", "half \ud800")
    assert [(path.name, path.read_text()) for path in (tmp_path / "new").iterdir()] == [
        ("page.html", "whole")
    ]
