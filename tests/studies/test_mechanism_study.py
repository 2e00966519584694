"""`analyze mechanism`: its tables agree with each other and with `analyze`; its errors name the problem."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CommandResult, assert_user_error, make_adapter, run_cli, save_model, set_home_folder

from analysis.cli.mechanism import describe_projection_effect
from defenses.errors import UserError

DEFENSES = ("-d", "self_reminder", "-d", "refusal_steering", "-d", "smooth_llm")
SETTINGS = ("--set", "smooth_llm.copies=2")
SUFFIXES = ("", "_low", "_high")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy model, its own cache, and a run of three defenses in `out`."""
    folder = tmp_path_factory.mktemp("mechanism")
    with pytest.MonkeyPatch.context() as patch:
        set_home_folder(patch, folder)
        save_model(folder / "toy")
        options = ("--readout", "words", "--limit", 10, "--patched", 4, "--top", 3, "-o", folder / "out")
        result = run_cli("mechanism", "-m", folder / "toy", *DEFENSES, *SETTINGS, *options)
        assert result.code == 0, result.err
        (folder / "output.txt").write_text(result.out + result.err)
    return folder


@pytest.fixture
def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, with its cache and without drawing, which only the run in `out` needs."""

    class BlankFigure:
        def savefig(self, path: Path) -> None:
            path.touch()

    set_home_folder(monkeypatch, folder)
    monkeypatch.setattr("analysis.report.results.Run.draw_figure", lambda self, stem: BlankFigure())
    return folder


def run_mechanism(folder: Path, *args: object, out: str) -> CommandResult:
    return run_cli("mechanism", "-m", folder / "toy", *args, "-o", folder / out)


def read_table(folder: Path, stem: str, out: str = "out") -> pd.DataFrame:
    return pd.read_csv(folder / out / f"{stem}.csv")


def read_record(folder: Path, out: str = "out") -> dict:
    return json.loads((folder / out / "run.json").read_text())


def test_a_run_has_every_table_and_figure(folder: Path) -> None:
    names = {path.name for path in (folder / "out").iterdir()}
    tables = "scores summary layers half parts directions patches slopes cuts profiles"
    assert {f"{stem}.csv" for stem in tables.split()} <= names
    for stem in ("layers", "directions", "cuts", "profiles", "parts-self_reminder", "top-refusal_steering"):
        assert {f"{stem}.png", f"{stem}.csv"} <= names, stem
    assert "weights.csv" not in names  # none of these defenses changes weights
    record = read_record(folder)
    assert not record["failed"] and record["readout"]["threshold"] is not None
    assert any("smooth_llm, which reads several prompts" in notice for notice in record["notices"])
    output = " ".join((folder / "output.txt").read_text().split())
    assert "Logit lens" in output and "the 3 largest of" in output
    assert "note: no interventions on smooth_llm, which reads several" in output


def test_layers_and_components_add_up_to_the_contrasts_of_the_summary(folder: Path) -> None:
    summary = read_table(folder, "summary").set_index("defense")
    layers, parts = read_table(folder, "layers"), read_table(folder, "parts")
    last_layer = layers[layers["layer"] == layers["layer"].max()].set_index("defense")
    for defense in ("self_reminder", "refusal_steering", "smooth_llm"):
        for contrast in ("shift", "discrimination"):
            total = parts.loc[parts["defense"] == defense, contrast].sum()
            assert total == pytest.approx(summary.loc[defense, contrast], abs=1e-3)
            for column in (contrast + suffix for suffix in SUFFIXES):
                expected = summary.loc[defense, column]
                assert last_layer.loc[defense, column] == pytest.approx(expected, abs=1e-3)
    added = parts[parts["kind"] == "added"]
    assert set(added["defense"]) == {"refusal_steering"} and set(added["layer"]) == {1}  # 0.6 of 2 layers


@pytest.mark.parametrize("readout", ["log-odds", "outcome"])
def test_the_remainder_of_a_readout_that_is_not_linear_is_shown(own_cache: Path, readout: str) -> None:
    args = ("-d", "self_reminder", "--readout", readout, "--limit", 10, "--patched", 0, "--top", 3)
    result = run_mechanism(own_cache, *args, out=readout)
    assert result.code == 0, result.err
    summary = read_table(own_cache, "summary", readout).set_index("defense")
    parts = read_table(own_cache, "parts", readout)
    (remainder,) = parts[parts["kind"] == "readout"].to_dict("records")
    for contrast in ("shift", "discrimination"):
        assert parts[contrast].sum() == pytest.approx(summary.loc["self_reminder", contrast], abs=1e-3)
        assert remainder[f"{contrast}_low"] <= remainder[contrast] <= remainder[f"{contrast}_high"]
        assert abs(remainder[contrast]) < 0.02  # the weights are averaged between both runs
    top = read_table(own_cache, "top-self_reminder", readout)
    assert top["kind"].tolist().index("readout") == len(top) - 1 == 3
    output = " ".join(result.out.split())
    assert "the 3 largest of" in output and "due to the curvature of the readout" in output
    assert "is saturated in" not in result.err  # a notice on attribution patching, which is left out


def test_a_saturated_readout_is_noted_where_slopes_are_estimated(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.studies.mechanism.SATURATED_WEIGHT", 100.0)
    args = ("-d", "self_reminder", "--readout", "words", "--limit", 4, "--patched", 2, "--top", 1)
    result = run_mechanism(own_cache, *args, out="saturated")
    assert result.code == 0, result.err
    notice = "readout words is saturated in 100% of the undefended prompts"
    assert any(text.startswith(notice) for text in read_record(own_cache, "saturated")["notices"])
    assert all("saturated" not in text for text in read_record(own_cache)["notices"])


def test_patching_the_last_layer_gives_the_whole_effect_on_the_patched_queries(folder: Path) -> None:
    patches, knockouts = read_table(folder, "patches"), read_table(folder, "cuts")
    assert set(patches["defense"]) == {"self_reminder", "refusal_steering"}
    assert set(patches["source"]) == {"defense", "undefended", "placebo", "neutral_prompt"}
    is_other_run = patches["source"].isin(["defense", "undefended"])
    last_layer = patches[is_other_run & (patches["kind"] == "residual") & (patches["layer"] == 1)]
    counts = last_layer[["n_harmful", "n_benign"]].iloc[0].tolist()
    assert sum(counts) <= 4 and min(counts) >= 1
    for defense, rows in last_layer.groupby("defense"):
        # After the last block, adding the defense's activation and removing it have the same effect.
        assert rows["shift"].to_numpy() == pytest.approx(np.repeat(rows["shift"].iloc[0], 2), abs=1e-3)
        whole = knockouts[(knockouts["defense"] == defense) & (knockouts["first"] == -1)]
        for contrast in ("shift", "discrimination") if len(whole) else ():
            expected = np.repeat(rows[contrast].iloc[0], 2)
            assert whole[contrast].to_numpy() == pytest.approx(expected, abs=1e-3)
    assert set(knockouts["defense"]) == {"self_reminder"}  # steering adds no tokens
    heads = patches[patches["kind"] == "head"]
    assert set(heads["head"]) <= set(range(4))
    assert len(heads.drop_duplicates(["defense", "layer", "head"])) == 12
    assert len(read_table(folder, "scores")) == 40


def test_attribution_patching_is_compared_with_activation_patching(folder: Path) -> None:
    agreement = pd.DataFrame(read_record(folder)["mechanism"]["slopes_against_patches"])
    assert set(agreement["contrast"]) == {"shift", "discrimination"} and set(agreement["heads"]) == {6}
    assert len(read_table(folder, "slopes")) == 2 * 2 * 4


def test_directions_have_every_layer_and_one_chosen_layer(folder: Path) -> None:
    directions = read_table(folder, "directions")
    assert len(directions) == 3 * 2 * 3
    assert (directions.groupby(["defense", "direction"])["chosen"].sum() == 1).all()
    assert directions["auroc"].between(0, 1).all()


def test_the_neutral_prompt_is_as_long_as_the_defense(folder: Path) -> None:
    record = read_record(folder)["mechanism"]
    (control,) = record["neutral_prompts"]
    assert control["defense"] == "self_reminder"
    assert abs(control["tokens"] - control["control_tokens"]) <= 3
    assert len(record["patched"]) <= 4


def test_the_same_command_writes_the_same_tables(own_cache: Path) -> None:
    args = ("-d", "self_reminder", "--limit", 4, "--patched", 2, "--top", 1)
    for out in ("a", "b"):
        result = run_mechanism(own_cache, *args, out=out)
        assert result.code == 0, result.err
    for path in sorted((own_cache / "a").glob("*.csv")):
        assert path.read_bytes() == (own_cache / "b" / path.name).read_bytes(), path.name


def test_every_attack_has_its_own_rows_and_interventions_can_be_omitted(own_cache: Path) -> None:
    args = ("-d", "policy", "--attack", "direct", "--attack", "base64", "--limit", 6, "--patched", 0)
    result = run_mechanism(own_cache, *args, out="attacked")
    assert result.code == 0, result.err
    assert set(read_table(own_cache, "layers", "attacked")["attack"]) == {"direct", "base64"}
    assert not (own_cache / "attacked" / "patches.csv").exists()
    assert set(read_table(own_cache, "layers-base64", "attacked")["attack"]) == {"base64"}


def test_similarity_is_compared_with_the_interactions_of_stacks(own_cache: Path, tmp_path: Path) -> None:
    stacks = pd.DataFrame(
        {"members": ["policy+self_reminder"], "attack": "direct", "how": "stack", "split": "test"}
    )
    stacks["interaction_shift"], stacks["interaction_discrimination"] = -0.5, 0.25
    stacks.to_csv(tmp_path / "ensembles.csv", index=False)
    record = json.loads((own_cache / "out" / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"files": {"ensembles.csv": None}}))
    args = ("-d", "policy", "-d", "self_reminder", "--readout", "words", "--limit", 6, "--patched", 0)
    args = (*args, "--ensembles", tmp_path)
    result = run_mechanism(own_cache, *args, out="both")
    assert result.code == 0, result.err
    assert read_table(own_cache, "overlap", "both")["interaction"].tolist() == [-0.5, 0.25]
    assert "pairs are too few for a test" in result.out
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"model": record["model"] | {"sha256": "other"}}))
    assert_user_error(run_mechanism(own_cache, *args, out="other"), "its weights (sha256) is other")


def test_a_failed_step_is_reported_and_the_other_tables_are_written(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> object:
        raise UserError("out of luck")

    monkeypatch.setattr("analysis.mechanism.interventions.PairedRuns.patch_activations", fail)
    args = ("-d", "policy", "--limit", 6, "--patched", 2)
    result = run_mechanism(own_cache, *args, out="partial")
    assert result.code == 1 and "policy: out of luck" in result.err
    for stem in ("cuts", "layers", "slopes"):
        assert len(read_table(own_cache, stem, "partial"))
    assert read_record(own_cache, "partial")["failed"][0]["why"] == "out of luck"
    monkeypatch.setattr("analysis.mechanism.attribution.DirectLogitAttribution.attribute_margins", fail)
    assert_user_error(run_mechanism(own_cache, *args, out="nothing"), "out of luck")
    assert not (own_cache / "nothing").exists()


def test_directions_are_omitted_for_the_queries_that_they_are_learned_from(own_cache: Path) -> None:
    args = ("-d", "policy", "--limit", 6, "--patched", 0, "--split", "train")
    result = run_mechanism(own_cache, *args, out="train")
    assert result.code == 0 and "no directions: 6 of these queries are used to learn them" in result.err
    assert not (own_cache / "train" / "directions.csv").exists()
    assert (own_cache / "train" / "layers.csv").exists()


def test_half_precision_omits_components_with_a_notice(own_cache: Path) -> None:
    args = ("-d", "policy", "--limit", 6, "--patched", 0, "--dtype", "bfloat16")
    result = run_mechanism(own_cache, *args, out="half")
    assert result.code == 0, result.err
    assert "use --dtype float32" in result.err and not (own_cache / "half" / "parts.csv").exists()


def test_tuned_weights_are_patched(own_cache: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "tuned", sha256=None)
    settings = ("--set", f"adapter.weights={tmp_path / 'tuned'}")
    args = ("-d", "adapter", *settings, "--limit", 6, "--patched", 2, "--sites", "residual")
    result = run_mechanism(own_cache, *args, out="tuned")
    assert result.code == 0, result.err
    kinds = set(read_table(own_cache, "weights", "tuned")["how"])
    assert kinds == {"alone", "up to", "module", "nothing", "everything"}
    assert set(read_table(own_cache, "patches", "tuned")["kind"]) == {"residual"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "no defense chosen: use -d NAME"),
        (("-d", "policy", "--readout", "all"), "--readout all: a run uses one"),
        (("-d", "policy", "--sites", "residual,heds"), "unknown site 'heds': did you mean 'heads'?"),
        (("-d", "policy", "--top", 0), "--top 0: it takes 1 or more"),
        (("-d", "policy", "--patched", 1), "--patched 1: it takes 0 (none) or 2 and more"),
        (("-d", "none"), "no defense chosen except `none`"),
        (("-d", "policy", "--ensembles", "/nowhere"), "there is no ensembles.csv"),
    ],
)
def test_bad_input_is_answered_in_one_line(own_cache: Path, args: tuple[object, ...], words: str) -> None:
    assert_user_error(run_mechanism(own_cache, "--limit", 6, *args, out="bad"), words)


def test_an_unsupported_architecture_is_reported_before_scoring(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> object:
        raise AssertionError("scored")

    monkeypatch.setattr("analysis.studies.sweep.sweep_conditions", fail)
    save_model(own_cache / "mamba", "mamba")
    result = run_cli("mechanism", "-m", own_cache / "mamba", "-d", "policy", "--limit", 6)
    assert_user_error(result, "MambaForCausalLM", "`recommend` work with this model")


def test_the_effect_on_projections_is_described_in_words() -> None:
    row = {"direction": "harmfulness", "discrimination_low": 0.1, "discrimination_high": 0.5}
    separate = describe_projection_effect(row | {"delta_auroc_low": 0.01, "delta_auroc_high": 0.1})
    assert separate == "classes more separate"
    uncertain = describe_projection_effect(row | {"delta_auroc_low": -0.01, "delta_auroc_high": 0.1})
    assert uncertain == "no change found"
    refusal = {"direction": "refusal", "shift_low": -0.5, "shift_high": -0.1}
    assert describe_projection_effect(refusal) == "moves away from refusal"
