"""Several models in one analysis: the tables of single runs, joined; a failing model is left out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import CommandResult, assert_user_error, run_cli, save_model

from analysis import analyze, read
from analysis.comparison import workers
from analysis.comparison.study import COMBINED_TABLES, compare_model_runs
from analysis.comparison.workers import ModelOutcome, plan_environments
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query
from analysis.progress import RelayConsole, make_progress_bar
from analysis.stats.tables import read_table
from defenses.errors import UserError

DEFENSES = ("policy", "self_reminder", "goal_priority", "word_drop")
# Their own calibration queries are fewer than the shipped ones.
OPTIONS: tuple[Any, ...] = (
    "--data",
    "mine.csv",
    "--readout",
    "words",
    "--controls",
    0,
    "--responses",
    "none",
)
OPTIONS += tuple(part for name in DEFENSES for part in ("-d", name))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder with two tiny models, and a folder that holds no whole model."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "one")
    save_model(folder / "two", "qwen2", "qwen2.5")
    shutil.copytree(folder / "one", folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"nothing")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_DATA_HOME", str(folder / "share"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        queries = load_queries("twins").queries
        chosen = [query for split in ("test", "calibration") for query in select_split(queries, split)]
        pd.DataFrame(chosen)[["id", "text", "harmful", "pair", "split"]].to_csv("mine.csv", index=False)
        # The figures of single models are no concern of these tests.
        patch.setattr("analysis.plots.data.build_analysis_points", lambda *_: {})
        yield folder


def select_split(queries: Sequence[Query], split: str) -> list[Query]:
    """Return twelve queries of a split, six of each class."""
    return [query for query in queries if query.split == split][:12]


@pytest.fixture(scope="module")
def both(home: Path) -> CommandResult:
    """The run with both models and a broken one, written to `both`."""
    return run_cli(*OPTIONS, "-m", "one", "-m", "broken", "-m", "two", "-o", "both")


@pytest.fixture(scope="module")
def singles(home: Path, both: CommandResult) -> list[str]:
    """The runs of each model alone, written to folders of these names."""
    for model in ("one", "two"):
        assert run_cli(*OPTIONS, "-m", model, "-o", f"single-{model}").code == 0
    return ["single-one", "single-two"]


def test_every_model_has_the_files_of_a_run_of_its_own(home: Path, singles: list[str]) -> None:
    for single, model in zip(singles, ("one", "two"), strict=True):
        files = {path.name: path.read_bytes() for path in Path(single).iterdir()}
        others = {path.name: path.read_bytes() for path in Path("both", model).iterdir()}
        assert set(files) == set(others)
        assert [name for name in files if name != "run.json" and files[name] != others[name]] == []


def test_the_tables_of_all_models_are_those_of_the_single_runs(home: Path, singles: list[str]) -> None:
    for stem in ("scores", "summary", "kinds"):
        combined = read_table(Path("both", f"{stem}.csv").read_bytes())
        assert next(iter(combined)) == "model"
        alone = [
            read_table(Path(single, f"{stem}.csv").read_bytes()).assign(model=model)
            for single, model in zip(singles, ("one", "two"), strict=True)
        ]
        expected = pd.concat(alone, ignore_index=True)[list(combined)]
        pd.testing.assert_frame_equal(combined, expected)
    assert not {"one", "two"} & {path.stem for path in Path("both").glob("*.csv")}
    # The comparison can be computed again from the stored runs.
    again = compare_model_runs({model: read(f"single-{model}") for model in ("one", "two")}, {})
    order, pooled = (read_table(Path("both", f"{stem}.csv").read_bytes()) for stem in ("order", "pooled"))
    pd.testing.assert_frame_equal(order, again.tables["order"], check_dtype=False, rtol=1e-5)
    pd.testing.assert_frame_equal(pooled, again.tables["pooled"], check_dtype=False, rtol=1e-4, atol=1e-6)


def test_a_broken_model_is_left_out_and_told(home: Path, both: CommandResult) -> None:
    assert both.code == 1
    (line,) = [line for line in both.err.splitlines() if line.startswith("Failed: ")]
    assert line.startswith("Failed: broken: ") and "Left out: broken: " in both.err
    record = json.loads(Path("both", "run.json").read_text("utf-8"))
    assert [entry["folder"] for entry in record["models"]] == ["one", "two"]
    assert [failure["model"] for failure in record["failed_models"]] == ["broken"]
    assert not Path("both", "broken").exists() and not record["interrupted"]
    for entry in record["models"]:
        digests = json.loads(Path("both", entry["folder"], "run.json").read_text("utf-8"))["files"]
        assert entry["files"] == {name: digests[name] for name in ("scores.csv", "summary.csv")}
    assert "order.csv" in record["files"] and "models_plane.png" in record["files"]
    for name in DEFENSES:
        assert f"\n{name}: " in both.out


def test_a_stored_run_of_several_models_is_read_and_reported(home: Path, both: CommandResult) -> None:
    run = read("both")
    assert list(run.model_runs) == ["one", "two"] and run.model == "one and two"
    assert run.headline.startswith("Comparison of 4 defenses on one and two (mine.csv, test split).")
    assert list(run.format_summary().index.names) == ["model", "defense"]
    assert run.model_runs["two"].threshold == read("both/two").threshold
    with pytest.raises(ValueError, match="threshold"):
        run.threshold  # noqa: B018
    assert "left out: broken: " in str(run)
    assert run_cli("report", "both", "-o", "page.html").code == 0
    page = Path("page.html").read_text("utf-8")
    for text in ("Does each finding hold on all models?", "both/one", "both/two", "Kendall"):
        assert text in page
    assert_user_error(run_cli("label", "both"), "holds the runs of several models: label one of them")
    assert_user_error(run_cli("agreement", "both", "both/one"), "holds the runs of several models")


def test_a_model_that_was_run_again_no_longer_belongs_to_the_comparison(
    home: Path, both: CommandResult, tmp_path: Path
) -> None:
    shutil.copytree("both", tmp_path / "both")
    record_path = tmp_path / "both" / "two" / "run.json"
    record = json.loads(record_path.read_text("utf-8"))
    del record["files"]["scores.csv"]
    record_path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(UserError, match="was written again after the models"):
        read(tmp_path / "both")
    combined = json.loads((tmp_path / "both" / "run.json").read_text("utf-8"))
    combined["models"][0]["folder"] = ".."
    (tmp_path / "both" / "run.json").write_text(json.dumps(combined), "utf-8")
    with pytest.raises(UserError, match="models has to list folders in this one"):
        read(tmp_path / "both")


def test_of_one_remaining_model_nothing_is_compared_and_of_none_there_is_no_run(
    home: Path, both: CommandResult
) -> None:
    result = run_cli(*OPTIONS, "-m", "one", "-m", "broken", "-o", "rest", "--json")
    assert result.code == 1 and "only one has results, so there is nothing to compare" in result.err
    assert {row["model"] for row in json.loads(result.out)} == {"one"}
    assert {path.name for path in Path("rest").iterdir()} == {
        *("one", "run.json", *(f"{stem}.csv" for stem in ("scores", "summary", "kinds")))
    }
    assert read("rest").headline == read("rest/one").headline
    shutil.copytree("broken", "broken-too")
    result = run_cli(*OPTIONS, "-m", "broken", "-m", "broken-too", "-o", "nothing")
    assert result.code == 2 and not Path("nothing", "run.json").exists()
    assert result.err.splitlines()[-1].startswith("analyze: no model could be analyzed: broken: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-d", "policy", "-m", "one", "-m", "./one"), "-m one is given more than once"),
        (("-d", "policy", "-m", "qwen3", "-m", "Qwen/Qwen3-8B"), "-m qwen3 is given more than once"),
        (("-d", "policy", "-m", "one", "-m", "two", "--workers", 0), "--workers 0: it takes 1 or more"),
        *(
            ((command, *more, "-m", "one", "-m", "two"), "-m one, two: this command takes one model")
            for command, *more in (
                *(("check",), ("explain", "policy"), ("secret",), ("validate",), ("ensembles",)),
                *(("recommend", "--max-over-refusal", "5%"), ("mechanism", "-d", "policy")),
                *(("depth", "-d", "policy"), ("suffix",), ("train", "safety"), ("backdooralign",)),
            )
        ),
    ],
)
def test_a_wrong_choice_of_models_is_one_line(home: Path, arguments: tuple[Any, ...], words: str) -> None:
    assert_user_error(run_cli(*arguments), words)


def test_workers_give_the_same_and_a_killed_one_is_tried_again(
    home: Path, both: CommandResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A copy of this process needs no imports. What the command uses, `spawn`, is in the sweep below.
    monkeypatch.setattr(workers, "_START_METHOD", "fork")
    start, started = workers._start_process, []

    def start_and_kill_first(job: Any, *arguments: Any) -> Any:
        process, connection = start(job, *arguments)
        started.append(job.label)
        if started == ["one"] or job.label == "broken":
            process.kill()
        return process, connection

    monkeypatch.setattr(workers, "_start_process", start_and_kill_first)
    models = ("-m", "one", "-m", "broken", "-m", "two")
    result = run_cli(*OPTIONS, *models, "-o", "worked", "--workers", 2)
    assert result.code == 1, result.err
    assert sorted(started) == ["broken", "broken", "one", "one", "two"]
    assert "one: its worker was killed by signal 9, as when memory runs out; it is tried again" in result.err
    assert "Failed: broken: its worker was killed by signal 9, as when memory runs out, 2 times" in result.err
    assert "one: note: reused from earlier runs: " in result.err
    for stem in (*COMBINED_TABLES, "pooled", "findings", "order"):
        paths = [Path(folder, f"{stem}.csv") for folder in ("both", "worked")]
        assert paths[0].exists() == paths[1].exists()
        assert not paths[0].exists() or paths[0].read_bytes() == paths[1].read_bytes(), stem


@pytest.mark.sweep
def test_new_processes_give_the_same(home: Path, both: CommandResult) -> None:
    result = run_cli(*OPTIONS, "-m", "one", "-m", "two", "-o", "spawned", "--workers", 2)
    assert result.code == 0, result.err
    for stem in ("scores", "summary", "pooled", "order"):
        assert Path("both", f"{stem}.csv").read_bytes() == Path("spawned", f"{stem}.csv").read_bytes()


def test_an_interruption_keeps_the_finished_models(
    home: Path, both: CommandResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job = workers.run_job

    def interrupt_second(job: Any, console: Any) -> ModelOutcome:
        if job.label == "two":
            raise KeyboardInterrupt
        return run_job(job, console)

    monkeypatch.setattr(workers, "run_job", interrupt_second)
    result = run_cli(*OPTIONS, "-m", "one", "-m", "two", "-o", "stopped")
    assert result.code == 130 and "Interrupted: 1 of 2 models have results" in result.err
    run = read("stopped")
    assert run.record["interrupted"] and list(run.model_runs) == ["one"]
    assert "interrupted: 1 of 2 models have results" in str(run)


def test_the_function_returns_the_run_of_each_model(home: Path, both: CommandResult) -> None:
    options: dict[str, Any] = {"data": "mine.csv", "readout": "words", "controls": 0, "responses": "none"}
    run = analyze(list(DEFENSES), ["one", "two"], **options)
    stored = read("both")
    assert set(stored.tables) == set(run.tables) and run.figures == (
        *("models_plane", "models_effects", "models_order"),
    )
    pd.testing.assert_frame_equal(
        stored.tables["summary"], run.tables["summary"], check_dtype=False, rtol=1e-5
    )
    columns = ["query", "defense", "margin"]
    pd.testing.assert_frame_equal(
        run.model_runs["two"].tables["scores"][columns], read("both/two").tables["scores"][columns]
    )
    with pytest.raises(UserError, match="takes one model"):
        analyze("policy", [])


def test_each_worker_has_a_gpu_and_its_share_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    monkeypatch.setattr(workers, "_count_threads", lambda: 7)
    planned = plan_environments(3, "auto")
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in planned] == ["3", "5", "3"]
    assert {variables["OMP_NUM_THREADS"] for variables in planned} == {"2"}
    assert {variables["OMP_WAIT_POLICY"] for variables in planned} == {"PASSIVE"}
    for device in ("cpu", "cuda:1"):
        assert all("CUDA_VISIBLE_DEVICES" not in variables for variables in plan_environments(2, device))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert (
        plan_environments(2, "cuda")
        == [{"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}] * 2
    )


def test_a_worker_passes_on_lines_steps_and_progress() -> None:
    messages: list[tuple[str, Any]] = []
    console = RelayConsole(lambda kind, value: messages.append((kind, value)))
    with console.status("loading"), make_progress_bar(console) as bar:
        task = bar.add_task("scoring", total=9)
        bar.update(task, description="scoring policy", advance=4)
        bar.advance(task)  # too soon after the one before
    console.print("two\nlines")
    assert messages == [
        *(("step", "loading"), ("progress", ("scoring policy", 4, 9)), ("line", "two"), ("line", "lines")),
    ]
