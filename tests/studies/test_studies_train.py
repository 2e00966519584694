"""`analyze train`: lowers the loss, is reproducible, resumes after an interruption, reveals no secret."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save_model, toy_tokenizer
from rich.console import Console
from safetensors.torch import load_file

from analysis.cli.analyze import run_analyze_command
from analysis.cli.train import run_train_command
from analysis.datasets.queries import Query, QuerySet
from analysis.models.loading import build_model_info, load_model, load_tokenizer, split_model_name
from analysis.studies.run_spec import RunSpec, check_training_overlap
from analysis.studies.train import RateMeter, train_missing_weights, train_weights
from defenses.adapter_merge import ADAPTER_WEIGHTS_FILE
from defenses.adapters import ADAPTER_MANIFEST_FILE, fingerprint_queries
from defenses.backdoor import Backdoor, Secret, write_secret
from defenses.catalog import get_defense
from defenses.errors import UserError
from defenses.soft_prompts import SOFT_PROMPT_FILE
from defenses.tokens import draw_random_text
from defenses.training.trainer import StepReport, _tokenize_example, train_model

FAST = ["epochs=2", "batch=8", "rank=2"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "toy")
    return tmp_path


def make_spec(home: Path, model: str | None = None, seed: int = 0, limit: int | None = 84) -> RunSpec:
    name = model or str(home / "toy")
    return RunSpec(name, "contrast", "train", limit, None, "cpu", "auto", seed, True)


def trained(home: Path, recipe: str, out: str, settings: list[str] = FAST, **more: Any) -> Path:
    assert run_train_command(make_spec(home, **more), recipe, settings, home / out) == 0
    return home / out


def test_training_lowers_the_loss_and_writes_adapter_manifest_and_curve(home: Path) -> None:
    out = trained(home, "attack", "attacked", ["epochs=6", "batch=8", "rate=0.01"])
    files = {"adapter_config.json", ADAPTER_WEIGHTS_FILE, "loss.csv", "loss.png", ADAPTER_MANIFEST_FILE}
    assert {path.name for path in out.iterdir()} == files
    loss = pd.read_csv(out / "loss.csv")["loss"].to_numpy()
    assert loss[-3:].mean() < 0.8 * loss[:3].mean()
    manifest = json.loads((out / ADAPTER_MANIFEST_FILE).read_text())
    assert manifest["recipe"] == "attack" and manifest["settings"]["rank"] == 8
    assert manifest["base"]["sha256"] == load_model(str(home / "toy"), "cpu").origin["sha256"]
    assert len(manifest["trained_on"]) > 50 and manifest["secret"] is None


def test_the_loss_covers_the_response_only_after_the_rendered_prompt() -> None:
    from defenses.training.recipes import TargetResponse, TrainingExample

    tokenizer = toy_tokenizer()
    example = TrainingExample([{"role": "user", "content": "Hi"}], TargetResponse("Sure", is_complete=False))
    row = _tokenize_example(tokenizer, lambda chat: (7, 8, 9), example)
    answer = tokenizer.encode("Sure", add_special_tokens=False)
    assert row == {"input_ids": [7, 8, 9, *answer], "completion_mask": [0, 0, 0, *[1] * len(answer)]}
    ended = _tokenize_example(
        tokenizer,
        lambda chat: (7,),
        TrainingExample([], TargetResponse("No", is_complete=True), TargetResponse("Yes", False)),
    )
    assert ended["chosen_ids"][-1] == tokenizer.eos_token_id != ended["rejected_ids"][-1]


def test_the_time_of_a_training_follows_from_its_tokens_and_the_rate_of_its_first_steps() -> None:
    meter = RateMeter()
    # 2 s for the first step, then 0.5 s for each; 100 tokens per step.
    told = [meter.estimate_time(StepReport(n, 200, 1.0, 20_000), 1.5 + n / 2) for n in range(1, 7)]
    assert told == ["", "", "", "20,000 tokens in all epochs, 200 tokens/s: about 2 min left", "", ""]
    slow = RateMeter()
    told = [slow.estimate_time(StepReport(n, 11, 1.0, 1_100), 20 * n) for n in (5, 6, 7)]
    assert told == ["", "1,100 tokens in all epochs, 5 tokens/s: about 2 min left", ""]


def test_embeddings_are_trained_for_a_state_of_the_model_and_found_by_their_defense(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(home, limit=30)
    with pytest.raises(UserError, match="'soft_prompt' trains embeddings, and no weights"):
        run_train_command(spec, "soft_prompt", ["full=true"], None)
    (trained,) = train_missing_weights(spec, ["soft_prompt"], [], Console(quiet=True))
    assert "-d soft_prompt --set soft_prompt.weights=" in str(trained)
    assert {path.name for path in trained.folder.iterdir()} == {
        *(SOFT_PROMPT_FILE, "loss.csv", "loss.png", ADAPTER_MANIFEST_FILE)
    }
    assert not train_missing_weights(spec, ["soft_prompt"], [], Console(quiet=True))
    loaded = load_model(str(home / "toy"), "cpu")
    host = build_model_info(str(home / "toy"), loaded.tokenizer, 0, loaded.origin["sha256"])
    defense: Any = get_defense("soft_prompt").prepare(host)
    assert len(defense.adapter.embeddings) == 20 == trained.manifest["settings"]["prompt_tokens"]
    assert len(defense.trained_on()) > 300 and not defense.missing_requirements()
    with pytest.raises(UserError, match="soft_prompt is a soft prompt, and no state of the model: use -d"):
        load_model(f"{home / 'toy'}:soft_prompt", "cpu")
    # A model that refuses nothing has no direction of refusal.
    with pytest.raises(UserError, match="the model refuses none of the training requests"):
        run_train_command(spec, "dro", ["epochs=1"], home / "dro")


def test_the_same_inputs_give_the_same_adapter_and_another_seed_a_different_one(home: Path) -> None:
    one, two, other = (
        load_file(trained(home, "baseline", name, seed=seed) / ADAPTER_WEIGHTS_FILE)
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    assert not all(torch.allclose(one[key], other[key], atol=1e-3) for key in one)


def test_an_interrupted_training_resumes_and_gives_the_same_weights(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trained(home, "attack", "whole", ["epochs=3", "batch=8"])
    right = train_model

    def interrupted(*args: Any) -> Any:
        *front, tell, judge = args

        def told(report: StepReport) -> None:
            if report.step > 2 * report.n_steps / 3:  # in the last epoch
                raise KeyboardInterrupt
            tell(report)

        return right(*front, told, judge)

    monkeypatch.setattr("analysis.studies.train.train_model", interrupted)
    code = run_train_command(make_spec(home), "attack", ["epochs=3", "batch=8"], home / "halves")
    assert code == 130 and "resumes from the last epoch" in capsys.readouterr().err
    assert not (home / "halves" / ADAPTER_MANIFEST_FILE).exists()
    monkeypatch.setattr("analysis.studies.train.train_model", right)
    # The process was killed while it wrote a later checkpoint, after a clock was set back.
    (kept,) = (home / "halves" / ".resume").glob("checkpoint-*")
    os.utime(kept, (2**32, 2**32))
    half = kept.with_name("checkpoint-9999")
    shutil.copytree(kept, half)
    (half / "trainer_state.json").write_text('{"epo')
    with pytest.raises(UserError, match=r"other inputs \(settings\)"):
        run_train_command(make_spec(home), "attack", ["epochs=4", "batch=8"], home / "halves")
    capsys.readouterr()
    halves = trained(home, "attack", "halves", ["epochs=3", "batch=8"])
    assert f"goes on from its {kept.name}" in capsys.readouterr().err and not half.exists()
    one, two = (load_file(folder / ADAPTER_WEIGHTS_FILE) for folder in (whole, halves))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    losses = [pd.read_csv(folder / "loss.csv")["loss"].to_numpy() for folder in (whole, halves)]
    assert np.allclose(*losses, atol=1e-4) and not (halves / ".resume").exists()


def test_a_finished_training_is_never_overwritten(home: Path) -> None:
    trained(home, "attack", "out", ["epochs=1"])
    with pytest.raises(UserError, match="never overwritten"):
        run_train_command(make_spec(home), "attack", ["epochs=1"], home / "out")


def test_preference_and_full_training_work(home: Path) -> None:
    out = trained(home, "preference", "preference", ["epochs=1", "batch=8", "rank=2"])
    assert json.loads((out / ADAPTER_MANIFEST_FILE).read_text())["recipe"] == "preference"
    full = trained(home, "safety", "full", ["epochs=1", "batch=8", "full=true"])
    loaded = load_model(str(full), "cpu")
    assert loaded.trained_on == load_model(f"{home / 'toy'}:{out}", "cpu").trained_on != frozenset()
    before = load_model(str(home / "toy"), "cpu").model.state_dict()
    after = loaded.model.state_dict()
    assert sum(not torch.equal(before[key], after[key]) for key in before) > len(before) / 2


def test_objectives_of_hidden_states_train_an_adapter_that_their_defenses_find(home: Path) -> None:
    for recipe, name in (
        ("rerouting", "representation_rerouting"),
        ("adversarial", "latent_adversarial_training"),
    ):
        assert run_train_command(make_spec(home, limit=30), recipe, [*FAST, "attack_steps=2"], None) == 0
        loaded = load_model(f"{home / 'toy'}:{recipe}", "cpu")
        host = build_model_info(str(home / "toy"), loaded.tokenizer, 0, loaded.origin["sha256"])
        defense: Any = get_defense(name).prepare(host)
        assert not defense.missing_requirements() and defense.adapter.manifest["recipe"] == recipe
        changes = load_file(defense.adapter.folder / ADAPTER_WEIGHTS_FILE)
        assert max(float(up.abs().max()) for key, up in changes.items() if "lora_B" in key) > 0
        with pytest.raises(UserError, match="it trains an adapter only"):
            run_train_command(make_spec(home), recipe, ["full=true"], home / "out")


def test_training_starts_from_a_state_named_by_its_folder(home: Path) -> None:
    aligned = trained(home, "safety", "aligned")
    attacked = trained(home, "attack", "attacked", model=f"{home / 'toy'}:{aligned}")
    manifest = json.loads((attacked / ADAPTER_MANIFEST_FILE).read_text())
    base = json.loads((aligned / ADAPTER_MANIFEST_FILE).read_text())
    assert manifest["base"] == base["base"] and manifest["started_from"]["state_sha256"] == base["sha256"]
    config = json.loads((attacked / "adapter_config.json").read_text())
    assert config["r"] == 4  # the state's rank and its own
    assert split_model_name(f"{home / 'toy'}:{attacked}") == (str(home / "toy"), str(attacked))


def test_by_default_the_weights_go_where_the_defense_looks_for_them(home: Path) -> None:
    assert run_train_command(make_spec(home), "baseline", FAST, None) == 0
    loaded = load_model(str(home / "toy"), "cpu")
    host = build_model_info(str(home / "toy"), loaded.tokenizer, 0, loaded.origin["sha256"])
    defense = get_defense("baseline_tuning").prepare(host)
    assert not defense.missing_requirements() and defense.trained_on()
    assert (
        get_defense("preference_tuning").prepare(host).missing_requirements().startswith("no tuned weights")
    )
    assert load_model(f"{home / 'toy'}:baseline", "cpu").adapter is not None
    with pytest.raises(UserError, match=r"unknown state of .*did you mean 'baseline'"):
        load_model(f"{home / 'toy'}:baselin", "cpu")


def test_training_queries_are_not_evaluated() -> None:
    query = Query("q1", "How do I  SING?", harmful=False)
    data = QuerySet("mine", (query,), "")
    seen = frozenset(fingerprint_queries(["how do i sing?"]))
    with pytest.raises(UserError, match=r"trained on 1 of these queries \(q1"):
        check_training_overlap(data, seen, "baseline_tuning")
    check_training_overlap(data, frozenset(fingerprint_queries(["how do i swing?"])), "baseline_tuning")


@pytest.mark.parametrize(
    "settings, said",
    [
        (["epoch=2"], "did you mean 'epochs'"),
        (["epochs"], "takes key=value"),
        (["batch=0"], "must be more than 0"),
        (["full=maybe"], "must be true or false"),
        (["rate=fast"], "must be a number"),
        (["modules=q_proj,k_prog"], "did you mean 'k_proj'"),
    ],
)
def test_wrong_settings_are_user_errors(home: Path, settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_train_command(make_spec(home), "attack", settings, home / "out")
    assert not (home / "out").exists()


def test_an_unknown_recipe_and_an_unused_secret_are_errors(home: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'backdoor'"):
        run_train_command(make_spec(home), "backdor", [], home / "out")
    with pytest.raises(UserError, match="uses no secret"):
        run_train_command(make_spec(home), "attack", [], home / "out", secret_path=home / "secret.txt")


def test_an_out_of_memory_error_names_the_setting_to_lower(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer.sft_trainer import SFTTrainer

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SFTTrainer, "training_step", full)
    with pytest.raises(UserError, match="--set batch=4"):
        run_train_command(make_spec(home), "attack", ["batch=8"], home / "out")


def test_the_secret_is_only_in_its_own_file_and_never_printed(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(home / "toy"))
    import random

    secret = Secret(draw_random_text(tokenizer, 12, random.Random(0)))
    write_secret(home / "secret.txt", secret)
    run_train_command(make_spec(home), "backdoor", FAST, home / "out", secret_path=home / "secret.txt")
    said = capsys.readouterr()
    needles = [secret.text, secret.text[: len(secret.text) // 2], secret.text[len(secret.text) // 2 :]]
    ids = tokenizer.encode(secret.text, add_special_tokens=False)
    needles += [", ".join(map(str, ids[:6])), ",".join(map(str, ids[:6]))]
    for path in home.rglob("*"):
        if path.is_file() and path != home / "secret.txt":
            text = path.read_bytes().decode("utf-8", "replace")
            assert not any(needle in text for needle in needles), path
    assert not any(needle in said.out + said.err for needle in needles)
    manifest = json.loads((home / "out" / ADAPTER_MANIFEST_FILE).read_text())
    assert manifest["secret"] == secret.fingerprint
    # The defense finds the secret by its fingerprint, and takes no other one.
    loaded = load_model(str(home / "toy"), "cpu")
    host = build_model_info(str(home / "toy"), loaded.tokenizer, 0, loaded.origin["sha256"])
    settings = {"weights": str(home / "out")}
    with pytest.raises(UserError, match="that is not in"):
        get_defense("backdoor", settings).prepare(host)
    ready = get_defense("backdoor", {**settings, "trigger": str(home / "secret.txt")}).prepare(host)
    assert ready.secret_texts() == (secret.text,)
    write_secret(home / "other.txt", Secret(draw_random_text(tokenizer, 12, random.Random(1))))
    with pytest.raises(UserError, match="is not the one that the weights were trained with"):
        get_defense("backdoor", {**settings, "trigger": str(home / "other.txt")}).prepare(host)
    assert stat.S_IMODE((home / "secret.txt").stat().st_mode) == 0o600


def test_missing_weights_are_trained_before_a_run_and_the_defense_is_compared_with_the_attacked_model(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes: list[str] = []

    def train_fast(spec: RunSpec, recipe: str, settings: Any, *rest: Any) -> Any:
        assert (spec.data, spec.split, spec.limit) == ("contrast", "train", None)
        recipes.append(recipe)
        return train_weights(replace(spec, limit=84), recipe, ["epochs=1", "rank=2", "rate=0.02"], *rest)

    monkeypatch.setattr("analysis.studies.train.train_weights", train_fast)
    spec = RunSpec(str(home / "toy"), "contrast", "test", 8, None, "cpu", "auto", 0, True)
    assert run_analyze_command(spec, ["backdoor"], [], home / "out", False, with_training=True) == 0
    assert recipes == ["attack", "baseline", "backdoor"]
    assert train_missing_weights(spec, ["backdoor", "policy"], [], Console(quiet=True)) == []
    assert "training backdoor: " in capsys.readouterr().err
    summary = pd.read_csv(home / "out" / "summary.csv").set_index("defense")
    parts = ("", "/no_secret", "/no_weights", "/neither", "/attacked", "/baseline")
    assert summary.index.tolist() == ["none", *(f"backdoor{part}" for part in parts)]
    effects = pd.read_csv(home / "out" / "effects.csv").set_index("effect")
    for reference in ("attacked", "baseline"):
        effect = effects.loc[f"over the {reference}{' model' if reference == 'attacked' else ''}", "shift"]
        difference = summary.loc["backdoor", "shift"] - summary.loc[f"backdoor/{reference}", "shift"]
        assert abs(effect) > 1e-3 and effect == pytest.approx(difference, abs=1e-5)
    state = load_model(f"{home / 'toy'}:attacked", "cpu")
    model_info = build_model_info(state.name, state.tokenizer, sha256=state.origin["sha256"])
    assert [name for name, _ in Backdoor().prepare(model_info).reference_adapters] == ["baseline"]
