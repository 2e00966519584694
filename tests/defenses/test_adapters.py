"""LoRA adapters: equal to PEFT, applied only to their own base model, and removed without a trace."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_model, make_adapter, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model

from defenses.adapters import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_MANIFEST_FILE,
    ADAPTER_WEIGHTS_FILE,
    apply_adapter,
    find_adapter,
    fingerprint_queries,
    load_adapter,
    merge_adapter,
)
from defenses.catalog import get_defense
from defenses.contract import ModelInfo
from defenses.errors import UserError

IDS = torch.tensor([[5, 60, 70, 81, 9]])
MODEL_INFO = ModelInfo("toy", None, ())


def compute_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def copy_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def states_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def edit_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps({**config, **settings}))


@pytest.fixture(scope="module")
def qv_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the query and value matrices; tests do not change it."""
    return make_adapter(tmp_path_factory.mktemp("adapters") / "qv", seed=2)


@pytest.fixture(scope="module")
def qo_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the query and output matrices; tests do not change it."""
    return make_adapter(tmp_path_factory.mktemp("adapters") / "qo", seed=1, modules=("q_proj", "o_proj"))


def test_an_applied_adapter_equals_peft(qv_adapter: Path) -> None:
    model = fresh_model()
    before = compute_logits(model)
    with apply_adapter(model, load_adapter(qv_adapter)):
        ours = compute_logits(model)
    assert torch.allclose(
        ours, compute_logits(PeftModel.from_pretrained(fresh_model(), qv_adapter)), atol=1e-5
    )
    assert (ours - before).abs().max() > 0.1


def test_the_model_is_restored_bit_for_bit_also_after_an_error(qv_adapter: Path) -> None:
    model = fresh_model()
    before = copy_state(model)
    with pytest.raises(KeyError), apply_adapter(model, load_adapter(qv_adapter)):
        assert not states_equal(copy_state(model), before)
        raise KeyError
    assert states_equal(copy_state(model), before)


def test_an_adapter_replaces_the_state_of_a_model_and_restores_it(qv_adapter: Path, qo_adapter: Path) -> None:
    released, model = fresh_model(), fresh_model()
    with apply_adapter(released, load_adapter(qv_adapter)):
        expected = compute_logits(released)
    merge_adapter(model, load_adapter(qo_adapter))
    in_state = copy_state(model)
    with apply_adapter(model, load_adapter(qv_adapter)):
        assert torch.equal(compute_logits(model), expected)  # nothing of the state remains, o_proj included
    assert states_equal(copy_state(model), in_state)


def test_an_adapter_trained_on_a_state_is_written_relative_to_the_released_weights(
    tmp_path: Path, qo_adapter: Path
) -> None:
    base_adapter = load_adapter(qo_adapter)
    model = fresh_model()
    merge_adapter(model, base_adapter)
    folder = make_adapter(tmp_path / "both", seed=2, model=model, under=base_adapter)
    released = fresh_model()
    with apply_adapter(released, load_adapter(folder)):
        ours = compute_logits(released)
    assert torch.allclose(ours, compute_logits(PeftModel.from_pretrained(fresh_model(), folder)), atol=1e-5)
    # The state first, then the second change on top of it.
    stepwise = fresh_model()
    merge_adapter(stepwise, base_adapter)
    tuned = PeftModel.from_pretrained(stepwise, tmp_path / "both-alone")
    assert torch.allclose(ours, compute_logits(tuned), atol=5e-3)  # the file has half precision


def test_an_adapter_of_another_base_model_is_rejected(qv_adapter: Path, tmp_path: Path) -> None:
    other = ModelInfo("other", None, (tmp_path,), (tmp_path,), sha256="0" * 64)
    with pytest.raises(UserError, match=r"was made for toy .*analyze train"):
        get_defense("baseline_tuning", {"weights": str(qv_adapter)}).prepare(other)


def test_changed_weights_missing_weights_and_an_invalid_manifest_are_rejected(
    tmp_path: Path, qv_adapter: Path
) -> None:
    folder = Path(shutil.copytree(qv_adapter, tmp_path / "a"))
    (folder / ADAPTER_WEIGHTS_FILE).write_bytes((folder / ADAPTER_WEIGHTS_FILE).read_bytes() + b" ")
    with pytest.raises(UserError, match="sha256 differs"):
        load_adapter(folder)
    (folder / ADAPTER_WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=r"lacks adapter_model\.safetensors"):
        load_adapter(folder)
    folder = Path(shutil.copytree(qv_adapter, tmp_path / "b"))
    (folder / ADAPTER_MANIFEST_FILE).write_text(json.dumps({"recipe": "attack"}))
    with pytest.raises(UserError, match="not a manifest of `analyze train`"):
        load_adapter(folder)


def test_only_plain_lora_is_merged(tmp_path: Path, qv_adapter: Path) -> None:
    folder = Path(shutil.copytree(qv_adapter, tmp_path / "a"))
    edit_config(folder, use_dora=True)
    with pytest.raises(UserError, match="only plain LoRA"):
        merge_adapter(fresh_model(), load_adapter(folder))


def test_a_missing_parameter_is_an_error_and_changes_nothing(qv_adapter: Path) -> None:
    model = fresh_model("gpt2")
    before = copy_state(model)
    with (
        pytest.raises(UserError, match="does not have"),
        apply_adapter(model, load_adapter(qv_adapter)),
    ):
        pass
    assert states_equal(copy_state(model), before)


def test_a_users_adapter_takes_precedence_over_a_shipped_one(tmp_path: Path, qv_adapter: Path) -> None:
    shipped = Path(shutil.copytree(qv_adapter, tmp_path / "shipped" / "aligned"))
    folders = (tmp_path / "mine", tmp_path / "shipped")
    model_info = ModelInfo("toy", None, (tmp_path,), folders, sha256="toy")
    assert find_adapter("aligned", model_info) == load_adapter(shipped)
    mine = tmp_path / "mine" / "aligned"
    shutil.copytree(shipped, mine)
    adapter = find_adapter("aligned", model_info)
    assert adapter is not None and adapter.folder == mine
    assert find_adapter("attacked", model_info) is None


def test_fingerprints_identify_a_request_without_showing_it() -> None:
    assert fingerprint_queries(["How do I\nsing?"]) == fingerprint_queries(["how do i sing?"])
    assert fingerprint_queries(["How do I sing?"]) != fingerprint_queries(["How do I swing?"])
    assert len(fingerprint_queries(["a", "A", "b"])) == 2


# --- external adapters ------------------------------------------------------------------------------------


def write_peft_folder(folder: Path, **settings: Any) -> tuple[Path, Any]:
    """Write an adapter with PEFT itself, without a manifest; return it and the PEFT model."""
    model = copy.deepcopy(tiny_model())
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    peft_model.save_pretrained(str(folder))
    return folder, peft_model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha_pattern": {"v_proj": 32}, "rank_pattern": {"q_proj": 2}},
        {"use_rslora": True},
    ],
    ids=["plain", "patterns", "rslora"],
)
def test_an_external_adapter_equals_peft(tmp_path: Path, settings: Any) -> None:
    folder, peft_model = write_peft_folder(tmp_path / "a", **settings)
    defense: Any = get_defense("adapter", {"weights": str(folder)}).prepare(MODEL_INFO)
    assert not defense.missing_requirements()
    expected, released = compute_logits(peft_model), compute_logits(tiny_model())
    with defense.apply_to(tiny_model()):
        assert torch.allclose(compute_logits(tiny_model()), expected, atol=1e-4)
    assert (expected - released).abs().max() > 0.05


def test_an_unsupported_external_adapter_is_rejected_before_anything_runs(tmp_path: Path) -> None:
    folder, _ = write_peft_folder(tmp_path / "a")
    config = (folder / ADAPTER_CONFIG_FILE).read_text()
    for key, value in (("use_dora", True), ("init_lora_weights", "pissa"), ("bias", "all")):
        (folder / ADAPTER_CONFIG_FILE).write_text(config)
        edit_config(folder, **{key: value})
        with pytest.raises(UserError, match=f"only plain LoRA adapters are supported; this one has {key}"):
            get_defense("adapter", {"weights": str(folder)}).prepare(MODEL_INFO)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("../nothere", "is neither a folder nor a Hugging Face id"),
        ("nobody/nothing", "cannot be fetched"),
        ("{folder}", "it lacks adapter_config.json"),
    ],
)
@pytest.mark.parametrize("setting", ["adapter.weights", "weights.path"])
def test_missing_weights_are_answered_in_one_line(
    tmp_path: Path, source: str, message: str, setting: str
) -> None:
    defense, _, key = setting.partition(".")
    if defense == "weights" and source == "{folder}":
        message = "holds no .safetensors"
    with pytest.raises(UserError, match=message) as error:
        get_defense(defense, {key: source.format(folder=tmp_path)}).prepare(replace(MODEL_INFO, offline=True))
    assert "\n" not in str(error.value)
