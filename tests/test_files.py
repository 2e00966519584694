"""Output paths are checked before the work, and a file is written whole or not at all."""

import errno
import multiprocessing
import os
import signal
from datetime import UTC, datetime

import pytest
from fault_runs import limit_file_size

from analysis.files import (
    check_output_folder,
    delay_interrupts,
    lock_folder,
    stage_folder,
    unlock_folder,
    write_text_file,
)
from analysis.studies.run_spec import choose_run_folder
from defenses.errors import UserError


def test_a_folder_is_usable_if_it_exists_or_can_be_created(tmp_path):
    assert check_output_folder(tmp_path) == tmp_path
    assert check_output_folder(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert list(tmp_path.iterdir()) == []


def test_a_file_or_a_place_that_takes_no_folder_is_rejected_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; give a new or an existing folder"):
        check_output_folder(tmp_path / "file")
    # 245 letters are a name, but not one from which the name of a folder beside it can be made.
    for name in ("file/below", "x" * 300, "x" * 245, f"{'x' * 245}/new", "a\0b"):
        with pytest.raises(UserError, match=r"cannot be written \(.*\); choose another folder"):
            check_output_folder(tmp_path / name)
    monkeypatch.setattr(type(tmp_path), "mkdir", raise_read_only)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\); choose another"):
        check_output_folder(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def raise_read_only(path):
    """Fail as a folder of a read-only file system does, also for root."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_written_file_has_the_usual_mode_and_is_whole_or_absent(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text_file(tmp_path / "new" / "page.html", "whole")
    assert (tmp_path / "new" / "page.html").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(UnicodeEncodeError):
        write_text_file(tmp_path / "new" / "page.html", "half \ud800")
    assert [(path.name, path.read_text()) for path in (tmp_path / "new").iterdir()] == [
        ("page.html", "whole")
    ]


def test_a_file_that_does_not_fit_the_disk_leaves_the_earlier_one(tmp_path):
    write_text_file(tmp_path / "page.html", "earlier")
    with limit_file_size(50), pytest.raises(OSError, match="too large"):
        write_text_file(tmp_path / "page.html", "later" * 50_000)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "earlier"


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "existing"])
@pytest.mark.parametrize("size", [0, 5_000, 15_000])
def test_a_folder_is_as_before_if_any_of_its_files_does_not_fit_the_disk(tmp_path, size, is_new):
    folder = tmp_path / "run"
    if not is_new:
        folder.mkdir()
        (folder / "a.csv").write_text("earlier")
    before = sorted(tmp_path.rglob("*"))
    with limit_file_size(size), pytest.raises(OSError, match="too large"), stage_folder(folder) as staging:
        for number, name in enumerate(("a.csv", "b.csv", "run.json"), 1):
            (staging / name).write_text("x" * 10_000 * number)
    assert sorted(tmp_path.rglob("*")) == before
    assert is_new or (folder / "a.csv").read_text() == "earlier"


def test_a_staged_folder_has_the_usual_mode_and_its_manifest_moves_last(tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    moved, replace = [], type(tmp_path).replace
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda path, target: moved.append(path.name) or replace(path, target)
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for folder in (tmp_path / "new", tmp_path / "new", tmp_path / "link"):
        with stage_folder(folder) as staging:
            for name in ("run.json", "a.csv", "z.csv"):
                (staging / name).write_text(name)
        assert sorted(path.name for path in folder.iterdir()) == ["a.csv", "run.json", "z.csv"]
    assert [name for name in moved if name == "run.json"] == moved[2::3] and len(moved) == 6
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_killed_process_left_is_removed_but_not_what_is_in_use(tmp_path):
    left = [tmp_path / ".other.partial-0123abcd", tmp_path / "run" / ".partial-0123abcd"]
    mine = [tmp_path / "notes.partial-0123abcd", tmp_path / ".notes"]
    for path in (*left, *mine):
        path.mkdir(parents=True)
    with stage_folder(tmp_path / "a") as first, stage_folder(tmp_path / "b") as second:
        (first / "run.json").write_text("a")
        (second / "run.json").write_text("b")
    with stage_folder(tmp_path / "run") as staging:
        (staging / "run.json").write_text("c")
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)
    assert [(tmp_path / name / "run.json").read_text() for name in ("a", "b", "run")] == ["a", "b", "c"]


def test_ctrl_c_waits_for_the_end_of_a_short_step(interruptible):
    steps = []
    with pytest.raises(KeyboardInterrupt), delay_interrupts():
        signal.raise_signal(signal.SIGINT)
        steps.append("finished")
    assert steps == ["finished"]


def test_a_folder_that_is_unlocked_can_be_locked_by_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert lock_folder(tmp_path) and not pool.apply(lock_folder, [tmp_path])
        unlock_folder(tmp_path)
        assert pool.apply(lock_folder, [tmp_path]) and not lock_folder(tmp_path)


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = []
    for _ in range(3):  # as after a clock that was set back
        folder = choose_run_folder("m", ["policy"], datetime(2026, 1, 2, tzinfo=UTC))
        folder.mkdir(parents=True)
        names.append(folder.name)
    assert names == [f"20260102-000000-m-policy{number}" for number in ("", "-2", "-3")]
