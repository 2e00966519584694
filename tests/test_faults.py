"""Runs that are killed or stopped, and several at once: nothing is lost, and nothing is half-written."""

import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_user_error, run_cli, save_model
from fault_runs import check_files_are_whole, finish_run, limit_file_size, start_run
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from analysis.cli.main import main
from defenses.errors import is_disk_full

ARGUMENTS = ("-d", "policy", "-m", "tiny", "--limit", 6, "--controls", 0, "-o", "out")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "tiny")
    return folder


@pytest.fixture
def home(tmp_path, model_folder):
    """A current folder for runs."""
    (tmp_path / "tiny").symlink_to(model_folder / "tiny")
    return tmp_path


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, model_folder):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny").symlink_to(model_folder / "tiny")
    code, messages = finish_run(folder, *ARGUMENTS)
    assert code == 0, messages
    assert "reused" not in messages
    return folder / "out"


def assert_equal_runs(folder, reference):
    """Assert that two run folders hold the same files and scores, and that no other file is left."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in reference.iterdir())
    scores, expected = (pd.read_csv(path / "scores.csv") for path in (folder, reference))
    assert scores[["query", "defense"]].equals(expected[["query", "defense"]])
    assert np.allclose(scores["margin"], expected["margin"], atol=1e-5)
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.sweep
def test_a_killed_run_goes_on_from_what_it_has_computed(home, whole_run):
    # In a cached file, in a commit of scores, in a table, and before the folder gets its name.
    for place in (("readouts", 2), ("commit", 3), ("scores.csv", 1), ("move out", 1)):
        code, messages = finish_run(home, *ARGUMENTS, fault="kill", places=(place,))
        assert code == -signal.SIGKILL, (place, messages)
        check_files_are_whole(home)
    code, messages = finish_run(home, *ARGUMENTS)
    assert code == 0 and "note: reused from earlier runs: 12 margins, 12 verdicts on responses" in messages
    assert_equal_runs(home / "out", whole_run)
    # Between two files of another run that it replaces.
    other = ("--limit", 4, *ARGUMENTS[6:])
    assert (
        finish_run(home, *ARGUMENTS[:4], *other, fault="kill", places=(("summary.csv", 2),))[0]
        == -signal.SIGKILL
    )
    report = run_cli("report", home / "out", "-o", home / "page.html")
    assert_user_error(report, "another run into this folder was cut short")
    assert finish_run(home, *ARGUMENTS)[0] == 0
    assert_equal_runs(home / "out", whole_run)


@pytest.mark.sweep
def test_a_stopped_run_says_so_in_one_line_and_goes_on_later(home, whole_run, interruptible):
    twice = (("commit", 11), ("scores.csv", 1))  # again while the two finished conditions are written
    for fault, places, expected in (("terminate", (("commit", 4),), 143), ("interrupt", twice, 130)):
        code, messages = finish_run(home, "-d", "word_drop", *ARGUMENTS, fault=fault, places=places)
        assert code == expected and "Traceback" not in messages
        assert messages.splitlines()[-1] == "analyze: interrupted; nothing was written"
        check_files_are_whole(home)
    code, messages = finish_run(home, *ARGUMENTS)
    assert code == 0 and "note: reused from earlier runs: " in messages
    assert_equal_runs(home / "out", whole_run)


def test_a_second_run_into_a_folder_is_refused_while_the_first_one_lasts(home, whole_run, monkeypatch):
    shutil.copytree(whole_run.parent / "cache", home / "cache")
    first = start_run(home, *ARGUMENTS, fault="wait", places=(("scores.csv", 1),))
    while not (home / "waits").exists():
        assert first.is_alive()
        time.sleep(0.01)
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert_user_error(run_cli(*ARGUMENTS), "--out out: a run that has not ended yet")
    (home / "goes-on").touch()
    first.join()
    assert first.exitcode == 0
    assert_equal_runs(home / "out", whole_run)


# How the results of the toolkit are written.
WRITERS = {
    "text": lambda path: path.write_text("x" * 9_000),
    "table": lambda path: pd.DataFrame({"text": ["x" * 9_000]}).to_csv(path),
    "safetensors": lambda path: save_file({"weight": torch.zeros(9_000)}, path),
    "checkpoint of a training": lambda path: torch.save({"weight": torch.zeros(9_000)}, path),
    "picture": lambda path: Image.effect_noise((200, 200), 100).save(path, "PNG"),
    "copy": lambda path: shutil.copyfile(np.__file__, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_recognized_whatever_writes(tmp_path, writer):
    with limit_file_size(2_000), pytest.raises((OSError, RuntimeError, SafetensorError)) as caught:
        WRITERS[writer](tmp_path / "file")
    assert is_disk_full(caught.value), repr(caught.value)


def test_output_into_a_full_device_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analyze", "list", "defenses"])
    with Path("/dev/full").open("w") as full, pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(sys, "stdout", full)
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(
        "analyze: no space left on the disk: the results could not be written"
    )


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_a_run_of_all_defenses_killed_at_twenty_random_moments(home):
    arguments = ("-d", "all", *ARGUMENTS[2:])
    (home / "reference").mkdir()
    (home / "reference" / "tiny").symlink_to(home / "tiny")
    started = time.monotonic()
    assert finish_run(home / "reference", *arguments)[0] == 0
    shutil.copytree(home / "reference" / "share", home / "share")  # with the secret of BackdoorAlign
    seconds = time.monotonic() - started
    rng = random.Random(22)
    for _ in range(20):
        run = start_run(home, *arguments)
        run.join(rng.uniform(0, seconds))
        run.kill()
        run.join()
        check_files_are_whole(home)
    assert finish_run(home, *arguments)[0] == 0
    assert_equal_runs(home / "out", home / "reference" / "out")
