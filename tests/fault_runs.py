"""Runs of the command in processes of their own, with a fault at a chosen write; for `test_faults.py`."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The libraries are imported once, in the process from which each run is forked.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "analysis.api", "analysis.cli.main", "analysis.report.html"]
)
# A place is a text and a number: the fault comes with the n-th write whose description contains the text.
Place = tuple[str, int]


def start_run(folder: Path, *args: Any, fault: str = "", places: tuple[Place, ...] = ()) -> Any:
    """Start `analyze` in a folder, with its cache in there; return the process.

    Args:
        folder: current folder of the process; its output goes to out.txt and err.txt.
        args: arguments of the command.
        fault: name of a function in `FAULTS`.
        places: writes at which the fault comes, each of them once.
    """
    process = _PROCESSES.Process(target=_run_command, args=(folder, args, fault, places))
    process.start()
    return process


def finish_run(folder: Path, *args: Any, fault: str = "", places: tuple[Place, ...] = ()) -> tuple[int, str]:
    """Run `analyze` in a folder until it ends; return its exit code and what it wrote to stderr."""
    process = start_run(folder, *args, fault=fault, places=places)
    process.join()
    return process.exitcode, (folder / "err.txt").read_text("utf-8")


def check_files_are_whole(folder: Path) -> None:
    """Assert that the output folder is not there or whole, and that everything in the cache can be read."""
    if (folder / "out").exists():
        json.loads((folder / "out" / "run.json").read_text("utf-8"))
        assert (folder / "out" / "summary.csv").read_text("utf-8").endswith("\n")
    for path in (folder / "cache").rglob("*.json"):
        json.loads(path.read_text("utf-8"))
    for path in (folder / "cache").rglob("*.sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@contextlib.contextmanager
def limit_file_size(n_bytes: int) -> Iterator[None]:
    """Context manager: no file can grow beyond a size, as on a disk that is full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _run_command(folder: Path, args: tuple[Any, ...], fault: str, places: tuple[Place, ...]) -> None:
    os.chdir(folder)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_DATA_HOME": str(folder / "share")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "140"}
    for descriptor, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    from analysis.plots import data

    if "all" not in args:
        data.build_analysis_points = lambda *_: {}  # figures take longer than everything else
    if fault:
        _watch_writes(places, FAULTS[fault])
    sys.argv = ["analyze", *map(str, args)]
    from analysis.cli.main import main

    main()


def _watch_writes(places: tuple[Place, ...], on_place: Callable[[], None]) -> None:
    """Call a function at some of the writes: commits of the score cache, files opened, moved or removed."""
    from analysis.models.cache import ScoreCache

    counts = dict.fromkeys(range(len(places)), 0)
    commit_rows = ScoreCache._write_rows

    def count_write(description: str) -> None:
        for index, (text, number) in enumerate(places):
            if text in description:
                counts[index] += 1
                if counts[index] == number:
                    on_place()

    def count_commit(*args: Any) -> None:
        count_write("commit")
        commit_rows(*args)
        count_write("commit")

    def watch_event(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            count_write(f"open {args[0]}")
        elif event == "os.rename":
            count_write(f"move {args[1]}")

    ScoreCache._write_rows = count_commit  # type: ignore[method-assign]
    sys.addaudithook(watch_event)


def _wait_for_file() -> None:
    """Wait until the test lets the run go on."""
    Path("waits").touch()
    while not Path("goes-on").exists():
        time.sleep(0.01)


FAULTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "wait": _wait_for_file,
}
