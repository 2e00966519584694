"""Output paths are checked before the work, and a file is written whole or not at all."""

import os

import pytest

from analysis.files import check_output_folder, write_text_file
from defenses.errors import UserError


def test_a_folder_is_usable_if_it_exists_or_can_be_created(tmp_path):
    assert check_output_folder(tmp_path) == tmp_path
    assert check_output_folder(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert list(tmp_path.iterdir()) == []


def test_a_file_or_a_read_only_folder_is_rejected_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; give a new or an existing folder"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        check_output_folder(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot be written: .* choose another folder"):
        check_output_folder(tmp_path / "new")


def test_a_written_file_has_the_usual_mode_and_is_whole_or_absent(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text_file(tmp_path / "new" / "page.html", "whole")
    assert (tmp_path / "new" / "page.html").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(UnicodeEncodeError):
        write_text_file(tmp_path / "new" / "page.html", "half \ud800")
    assert [(path.name, path.read_text()) for path in (tmp_path / "new").iterdir()] == [
        ("page.html", "whole")
    ]
