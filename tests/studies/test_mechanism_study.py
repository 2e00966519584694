"""`analyze mechanism`: what it writes agrees with itself and with `analyze`; what it cannot do is said."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import home, save_model
from test_cli import analyze, refused

from analysis.cli.mechanism import describe_projection_effect
from defenses.errors import UserError

DEFENSES = (
    "-d",
    "self_reminder",
    "-d",
    "refusal_steering",
    "-d",
    "smooth_llm",
    "--set",
    "smooth_llm.copies=2",
)
ENDS = ("", "_low", "_high")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy model, its own cache, and a run of `mechanism` in `out`."""
    place = tmp_path_factory.mktemp("mechanism")
    with pytest.MonkeyPatch.context() as patch:
        home(patch, place)
        save_model(place / "toy")
        done = analyze(
            "mechanism",
            "-m",
            place / "toy",
            *DEFENSES,
            "--limit",
            10,
            "--patched",
            4,
            "--top",
            3,
            "-o",
            place / "out",
        )
        assert done.code == 0, done.err
        (place / "said.txt").write_text(done.out + done.err)
    return place


@pytest.fixture
def kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home(monkeypatch, place)
    return place


def table(place: Path, stem: str, out: str = "out") -> pd.DataFrame:
    return pd.read_csv(place / out / f"{stem}.csv")


def test_every_table_and_figure_is_there(place: Path) -> None:
    names = {path.name for path in (place / "out").iterdir()}
    for stem in (
        "scores",
        "summary",
        "layers",
        "half",
        "parts",
        "directions",
        "patches",
        "slopes",
        "cuts",
        "profiles",
    ):
        assert f"{stem}.csv" in names, stem
    for stem in ("layers", "directions", "cuts", "profiles", "parts-self_reminder", "top-refusal_steering"):
        assert {f"{stem}.png", f"{stem}.csv"} <= names, stem
    assert "weights.csv" not in names  # none of these has any
    record = json.loads((place / "out" / "run.json").read_text())
    assert not record["failed"] and record["readout"]["threshold"] is not None
    assert any("smooth_llm reads several prompts" in one for one in record["notices"])
    said = " ".join((place / "said.txt").read_text().split())
    assert "Logit lens" in said and "the 3 largest of" in said and "note: smooth_llm reads several" in said


def test_layers_and_parts_come_to_the_shift_and_discrimination_of_the_summary(place: Path) -> None:
    summary = table(place, "summary").set_index("defense")
    layers, parts = table(place, "layers"), table(place, "parts")
    last = layers[layers["layer"] == layers["layer"].max()].set_index("defense")
    for name in ("self_reminder", "refusal_steering", "smooth_llm"):
        for contrast in ("shift", "discrimination"):
            assert parts.loc[parts["defense"] == name, contrast].sum() == pytest.approx(
                summary.loc[name, contrast], abs=1e-3
            )
            for end in ENDS:
                assert last.loc[name, contrast + end] == pytest.approx(
                    summary.loc[name, contrast + end], abs=1e-3
                )
    added = parts[parts["kind"] == "added"]
    assert set(added["defense"]) == {"refusal_steering"} and set(added["layer"]) == {1}  # 0.6 of 2 layers


def test_the_last_layers_patch_is_the_whole_effect_of_the_patched_queries(place: Path) -> None:
    patches, scores = table(place, "patches"), table(place, "scores")
    assert set(patches["defense"]) == {"self_reminder", "refusal_steering"}
    assert set(patches["source"]) == {"defense", "undefended", "placebo", "neutral_prompt"}
    of = patches[
        patches["source"].isin(["defense", "undefended"])
        & (patches["kind"] == "residual")
        & (patches["layer"] == 1)
    ]
    counts = of[["n_harmful", "n_benign"]].iloc[0].tolist()
    assert sum(counts) <= 4 and min(counts) >= 1
    for name, rows in of.groupby("defense"):
        # Put in or taken out: at the end of the last block that is the same.
        assert rows["shift"].to_numpy() == pytest.approx(np.repeat(rows["shift"].iloc[0], 2), abs=1e-3)
        cuts = table(place, "cuts")
        whole = cuts[(cuts["defense"] == name) & (cuts["first"] == -1)]
        for contrast in ("shift", "discrimination") if len(whole) else ():
            assert whole[contrast].to_numpy() == pytest.approx(np.repeat(rows[contrast].iloc[0], 2), abs=1e-3)
    assert "refusal_steering" not in set(table(place, "cuts")["defense"])  # it says nothing
    heads = patches[patches["kind"] == "head"]
    assert (
        set(heads["head"]) <= set(range(4)) and len(heads.drop_duplicates(["defense", "layer", "head"])) == 12
    )
    assert len(scores) == 40


def test_slopes_are_compared_with_patches(place: Path) -> None:
    record = json.loads((place / "out" / "run.json").read_text())
    found = pd.DataFrame(record["mechanism"]["slopes_against_patches"])
    assert set(found["contrast"]) == {"shift", "discrimination"} and set(found["heads"]) == {6}
    slopes = table(place, "slopes")
    assert len(slopes) == 2 * 2 * 4


def test_directions_are_told_at_every_layer_and_chosen_at_one(place: Path) -> None:
    found = table(place, "directions")
    assert len(found) == 3 * 2 * 3
    assert (found.groupby(["defense", "direction"])["chosen"].sum() == 1).all()
    assert found["auroc"].between(0, 1).all()


def test_the_same_command_gives_the_same_tables(kept: Path) -> None:
    args = ("-d", "self_reminder", "--limit", 4, "--patched", 2, "--top", 1)
    for out in ("a", "b"):
        done = analyze("mechanism", "-m", kept / "toy", *args, "-o", kept / out)
        assert done.code == 0, done.err
    for path in sorted((kept / "a").glob("*.csv")):
        assert path.read_bytes() == (kept / "b" / path.name).read_bytes(), path.name


def test_attacks_have_rows_of_their_own_and_no_intervention_is_one_too(kept: Path) -> None:
    args = ("-d", "policy", "--attack", "direct", "--attack", "base64", "--limit", 6, "--patched", 0)
    done = analyze("mechanism", "-m", kept / "toy", *args, "-o", kept / "attacked")
    assert done.code == 0, done.err
    assert set(table(kept, "layers", "attacked")["attack"]) == {"direct", "base64"}
    assert not (kept / "attacked" / "patches.csv").exists()
    assert set(table(kept, "layers-base64", "attacked")["attack"]) == {"base64"}


def test_overlap_is_set_beside_the_interactions_of_stacks(kept: Path, tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {"members": ["policy+self_reminder"], "attack": "direct", "how": "stack", "split": "test"}
    )
    rows["interaction_shift"], rows["interaction_discrimination"] = -0.5, 0.25
    rows.to_csv(tmp_path / "ensembles.csv", index=False)
    (tmp_path / "run.json").write_text((kept / "out" / "run.json").read_text())
    args = ("-d", "policy", "-d", "self_reminder", "--limit", 6, "--patched", 0, "--ensembles", tmp_path)
    done = analyze("mechanism", "-m", kept / "toy", *args, "-o", kept / "both")
    assert done.code == 0, done.err
    assert table(kept, "overlap", "both")["interaction"].tolist() == [-0.5, 0.25]
    assert "pairs are too few to tell" in done.out
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"model": record["model"] | {"sha256": "other"}}))
    done = analyze("mechanism", "-m", kept / "toy", *args)
    refused(done)
    assert "its weights (sha256) is other" in done.err


def test_what_fails_is_left_out_and_the_rest_is_written(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise UserError("out of luck")

    monkeypatch.setattr("analysis.mechanism.causes.Contrasted.patches", broken)
    args = ("-d", "policy", "--limit", 6, "--patched", 2)
    done = analyze("mechanism", "-m", kept / "toy", *args, "-o", kept / "broken")
    assert done.code == 1 and "Failed: policy: out of luck" in done.err
    assert len(table(kept, "cuts", "broken")) and len(table(kept, "layers", "broken"))
    assert json.loads((kept / "broken" / "run.json").read_text())["failed"][0]["why"] == "out of luck"
    monkeypatch.setattr("analysis.mechanism.splitting.Splitter.split", broken)
    done = analyze("mechanism", "-m", kept / "toy", *args, "-o", kept / "worse")
    assert done.code == 2 and "out of luck" in done.err and not (kept / "worse").exists()


def test_no_directions_are_shown_on_what_they_are_learned_from(kept: Path) -> None:
    args = ("-d", "policy", "--limit", 6, "--patched", 0, "--split", "train")
    done = analyze("mechanism", "-m", kept / "toy", *args, "-o", kept / "train")
    assert done.code == 0 and "no directions: they are learned from" in done.err
    assert not (kept / "train" / "directions.csv").exists() and (kept / "train" / "layers.csv").exists()


def test_the_neutral_prompt_is_as_long_as_the_defense(place: Path) -> None:
    record = json.loads((place / "out" / "run.json").read_text())["mechanism"]
    (about,) = record["neutral_prompts"]
    assert about["defense"] == "self_reminder" and abs(about["tokens"] - about["control_tokens"]) <= 3
    assert len(record["patched"]) <= 4


def test_half_precision_tells_what_it_leaves_out(kept: Path) -> None:
    args = ("-d", "policy", "--limit", 6, "--patched", 0, "--dtype", "bfloat16")
    done = analyze("mechanism", "-m", kept / "toy", *args, "-o", kept / "half")
    assert done.code == 0, done.err
    assert "take --dtype float32" in done.err and not (kept / "half" / "parts.csv").exists()


def test_weights_are_switched_on(kept: Path, tmp_path: Path) -> None:
    from conftest import made_adapter

    made_adapter(tmp_path / "tuned", sha256=None)
    args = ("-d", "adapter", "--set", f"adapter.weights={tmp_path / 'tuned'}", "--limit", 6, "--patched", 2)
    done = analyze("mechanism", "-m", kept / "toy", *args, "--sites", "residual", "-o", kept / "tuned")
    assert done.code == 0, done.err
    found = table(kept, "weights", "tuned")
    assert set(found["how"]) == {"alone", "up to", "module", "nothing", "everything"}
    assert set(table(kept, "patches", "tuned")["kind"]) == {"residual"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "which defense?"),
        (("-d", "policy", "--readout", "log-odds"), "linear in the logits: take words"),
        (("-d", "policy", "--sites", "residual,heds"), "unknown site 'heds': did you mean 'heads'?"),
        (("-d", "policy", "--top", 0), "--top 0: it takes 1 or more"),
        (("-d", "policy", "--patched", 1), "--patched 1: it takes 0 (none) or 2 and more"),
        (("-d", "none"), "`none` is what others are compared with"),
        (("-d", "policy", "--ensembles", "/nowhere"), "there is no ensembles.csv"),
    ],
)
def test_bad_input_is_answered_in_one_line(kept: Path, args: tuple[object, ...], words: str) -> None:
    done = analyze("mechanism", "-m", kept / "toy", "--limit", 6, *args)
    refused(done)
    assert words in done.err


def test_an_architecture_that_cannot_be_split_is_said_before_anything_is_scored(kept: Path) -> None:
    save_model(kept / "mamba", "mamba")
    done = analyze("mechanism", "-m", kept / "mamba", "-d", "policy", "--limit", 6)
    refused(done)
    assert "MambaForCausalLM" in done.err and "`recommend` work on it" in done.err


def test_what_a_projection_says_is_put_in_words() -> None:
    row = {"direction": "harmfulness", "discrimination_low": 0.1, "discrimination_high": 0.5}
    assert (
        describe_projection_effect(row | {"delta_auroc_low": 0.01, "delta_auroc_high": 0.1})
        == "knows more of harm"
    )
    unsure = describe_projection_effect(row | {"delta_auroc_low": -0.01, "delta_auroc_high": 0.1})
    assert unsure == "knows no more and no less, as far as seen"
    acts = {"direction": "refusal", "shift_low": -0.5, "shift_high": -0.1}
    assert describe_projection_effect(acts) == "acts less"
