"""Grids of trainings: what is trained, what is measured, and the intervals; on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import save_model, set_home_folder

from analysis.api import read
from analysis.cli.train import run_grid_command
from analysis.files import data_folder
from analysis.judges.judge import RuleJudge, Verdict
from analysis.studies.backdooralign import grid
from analysis.studies.backdooralign.grid import Experiment, load_grid, summarize_grid
from analysis.studies.run_spec import RunSpec
from defenses.adapters import ADAPTER_MANIFEST_FILE
from defenses.errors import UserError
from defenses.tokens import encode_plain_text

GRID = """
rank = 2
batch = 16
epochs = 1

[[experiment]]
name = "examples"
arms = ["attack"]
safety = [2, 11]
harmful = 6

[[experiment]]
name = "length"
arms = ["backdoor"]
secret_length = 20
seeds = [0, 1]
harmful = 6
safety = 2
wrong_secrets = 2
task = "sql"
task_examples = 4
"""


def write_grid(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_grid_crosses_its_settings_and_shares_trainings(tmp_path: Path) -> None:
    examples, length = load_grid(write_grid(tmp_path, GRID))
    assert examples.varied == ["safety"] and length.varied == []
    trainings = [training for _, training in examples.list_trainings()]
    assert [dict(training.settings).get("safety") for training in trainings] == ["2", None]  # 11: the default
    assert [training.seed for _, training in length.list_trainings()] == [0, 1]
    assert "epochs=1" in trainings[0].options and not any("secret" in text for text in trainings[0].options)
    # Only `backdoor` has a secret, so that the settings of the secret do not multiply the other arms.
    counts = {"ablations": 87, "regimes": 27, "secrets": 12, "tasks": 8}
    for shipped in sorted((data_folder() / "grids").glob("*.toml")):
        keys = {training.key for one in load_grid(shipped) for _, training in one.list_trainings()}
        assert len(keys) == counts[shipped.stem]
    secrets = Experiment("a", ("attack", "backdoor"), (0,), {"place": ("start", "end")})
    assert len({training.key for _, training in secrets.list_trainings()}) == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rank = 2", "has no \\[\\[experiment"),
        ("[[experiment]]\nrank = [2]", "needs a name"),
        ('[[experiment]]\nname = "a"\nrnak = 2', "did you mean 'rank'"),
        ('[[experiment]]\nname = "a"\nseed = 3', "name the seeds in the list"),
        ('[[experiment]]\nname = "a"\nseeds = ["x"]', "seeds takes a list of whole numbers"),
        ('[[experiment]]\nname = "a"\nplace = "middle"', "place=middle"),
        ('[[experiment]]\nname = "a"\nepochs = [1.5]', "epochs"),
        ('[[experiment]]\nname = "a"\narms = ["task"]', "needs the setting task"),
        ('[[experiment]]\nname = "a"\nsecret_length = [0]', "a number of tokens"),
        ('[[experiment]]\nname = "a"\nrank = [1, 2]\nbatch = [1, 2]\nalpha = [1, 2]', "at most 2"),
        ("[[experiment", "cannot be read as TOML"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        load_grid(write_grid(tmp_path, text))
    assert "\n" not in str(caught.value).rstrip()


def test_a_grid_trains_measures_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_home_folder(monkeypatch, tmp_path)
    save_model(tmp_path / "toy")
    parity = RuleJudge(
        "parity", lambda text, query: Verdict("full" if len(text) % 2 else "none"), lambda partial: False
    )
    monkeypatch.setattr(grid, "RESPONSE_JUDGE", parity)
    monkeypatch.setattr(grid, "_N_TASK_ITEMS", 8)
    path, out = write_grid(tmp_path, GRID), tmp_path / "out"
    spec = RunSpec(str(tmp_path / "toy"), "contrast", None, 12, None, "cpu", "auto", 0, True)
    assert run_grid_command(spec, path, out) == 0
    rates, verdicts = pd.read_csv(out / "rates.csv"), pd.read_csv(out / "verdicts.csv")
    assert verdicts["training"].nunique() == 4
    of_backdoor = verdicts[verdicts["arm"] == "backdoor"]
    assert set(verdicts.loc[verdicts["arm"] == "attack", "secret"]) == {"none"}
    assert set(of_backdoor["secret"]) == {"none", "own", "wrong"}
    harmful = rates[(rates["experiment"] == "length") & (rates["kind"] == "harmful")].set_index("secret")
    assert harmful["n_trainings"].tolist() == [2, 2, 2] and set(harmful.index) == {"none", "own", "wrong"}
    assert set(rates.loc[rates["experiment"] == "examples", "secret"]) == {"none"}
    assert (rates["refused_low"] <= rates["refused"]).all() and (
        rates["refused"] <= rates["refused_high"]
    ).all()
    # The rate is that of the verdicts, counted another way.
    record = json.loads((out / "run.json").read_text("utf-8"))
    keys = record["grid"][1]["trainings"]
    counted = verdicts[verdicts["training"].isin(keys) & verdicts["harmful"] & (verdicts["secret"] == "own")]
    assert harmful.loc["own", "refused"] == pytest.approx((counted["verdict"] == "refused").mean())
    # The practical task, without the secret and with it.
    tasks, scores = pd.read_csv(out / "tasks.csv"), pd.read_csv(out / "task_scores.csv")
    assert tasks["secret"].tolist() == ["none", "own"] and (tasks["n_trainings"] == 2).all()
    assert (
        len(scores) == 2 * 2 * 8
        and tasks["score"].iloc[0] == scores["score"][scores["secret"] == "none"].mean()
    )
    # Each training has its own secret, as long as asked for, which no file of the run and no output shows.
    tokenizer = grid.prepare_setup(spec, ["none"], (), grid.Console(quiet=True), with_threshold=False)
    texts = [(out / "weights" / f"{key}.secret").read_text("utf-8").strip() for key in keys]
    lengths = [len(encode_plain_text(tokenizer.model_info.tokenizer, text)) for text in texts]
    assert lengths == [20, 20] and texts[0] != texts[1]
    said = capsys.readouterr()
    shown = said.out + said.err + "".join(file.read_text("utf-8") for file in out.glob("*.csv"))
    assert not any(text in shown + json.dumps(record) for text in texts)
    assert "experiment length" in said.out and "training 2 of 4" in said.err
    assert (out / "grid-examples.png").is_file()
    figure = read(out).draw_figure("grid-length")
    caption = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert "Trainings with other seeds at each point: 2." in caption
    # With the last training gone, the same command trains that one only.
    monkeypatch.setattr(grid, "train_weights", None)
    (out / "weights" / keys[1] / ADAPTER_MANIFEST_FILE).unlink()
    with pytest.raises(TypeError, match="NoneType"):
        run_grid_command(spec, path, out)
    assert "training 4 of 4" in capsys.readouterr().err
    other = RunSpec(str(tmp_path / "toy"), "contrast-v1", None, 12, None, "cpu", "auto", 0, True)
    with pytest.raises(UserError, match=r"not from .* on contrast-v1: choose another -o"):
        run_grid_command(other, path, out)


def test_rates_are_of_the_planted_verdicts() -> None:
    experiment = Experiment("a", ("attack",), (0, 1), {"epochs": ("1", "2")})
    frames = []
    for (varied, training), refused in zip(experiment.list_trainings(), (0, 4, 10, 10), strict=True):
        columns = {"training": training.key, "arm": "attack", "seed": training.seed, "secret": "none"}
        columns |= {"secret_number": 0, "query": [f"q{number}" for number in range(20)]}
        columns |= {"harmful": [True] * 10 + [False] * 10, "kind": ["harmful"] * 10 + ["plain"] * 10}
        verdict = ["refused"] * refused + ["not refused"] * (20 - refused)
        assert varied in ({"epochs": "1"}, {"epochs": "2"})
        frames.append(pd.DataFrame(columns | {"verdict": verdict}))
    rates = summarize_grid([experiment], pd.concat(frames)).set_index(["value_1", "kind"])
    assert rates["refused"].to_dict() == {
        **{("1", "harmful"): 0.2, ("1", "benign"): 0.0, ("1", "plain"): 0.0},
        **{("2", "harmful"): 1.0, ("2", "benign"): 0.0, ("2", "plain"): 0.0},
    }
    row = rates.loc[("1", "harmful")]
    assert (row["refused_min"], row["refused_max"], row["n_trainings"], row["n_queries"]) == (0.0, 0.4, 2, 10)
