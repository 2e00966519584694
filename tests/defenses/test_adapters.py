"""Adapters: what PEFT would compute, for a while or for good, on their own base, gone without a trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_model, made_adapter
from peft import PeftModel

from defenses.adapters import (
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

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_worn_adapter_is_what_peft_makes_of_it(tmp_path: Path) -> None:
    folder = made_adapter(tmp_path / "a", seed=1)
    model = fresh_model()
    before = logits(model)
    with apply_adapter(model, load_adapter(folder)):
        worn = logits(model)
    theirs = logits(PeftModel.from_pretrained(fresh_model(), folder))
    assert torch.allclose(worn, theirs, atol=1e-5)
    assert (worn - before).abs().max() > 0.1


def test_afterwards_the_model_is_bit_for_bit_what_it_was_also_after_an_error(tmp_path: Path) -> None:
    adapter = load_adapter(made_adapter(tmp_path / "a"))
    model = fresh_model()
    before = state(model)
    with pytest.raises(KeyError), apply_adapter(model, adapter):
        assert not same(state(model), before)
        raise KeyError
    assert same(state(model), before)


def test_an_adapter_worn_over_a_state_replaces_it_and_gives_it_back(tmp_path: Path) -> None:
    one = load_adapter(made_adapter(tmp_path / "one", seed=1, modules=("q_proj", "o_proj")))
    two = load_adapter(made_adapter(tmp_path / "two", seed=2, modules=("q_proj", "v_proj")))
    plain, model = fresh_model(), fresh_model()
    with apply_adapter(plain, two):
        expected = logits(plain)
    merge_adapter(model, one)
    in_state = state(model)
    with apply_adapter(model, two):
        assert torch.equal(logits(model), expected)  # nothing of the state is left, o_proj included
    assert same(state(model), in_state)


def test_what_is_trained_on_a_state_is_written_relative_to_the_released_weights(tmp_path: Path) -> None:
    under = load_adapter(made_adapter(tmp_path / "under", seed=1, modules=("q_proj", "o_proj")))
    model = fresh_model()
    merge_adapter(model, under)
    folder = made_adapter(tmp_path / "both", seed=2, modules=("q_proj", "v_proj"), model=model, under=under)
    theirs = logits(PeftModel.from_pretrained(fresh_model(), folder))
    released = fresh_model()
    with apply_adapter(released, load_adapter(folder)):
        ours = logits(released)
    assert torch.allclose(ours, theirs, atol=1e-5)
    # By hand: the state first, then the second change on top of it.
    step = fresh_model()
    merge_adapter(step, under)
    tuned = PeftModel.from_pretrained(step, tmp_path / "both-alone")
    assert torch.allclose(ours, logits(tuned), atol=5e-3)  # the file has half precision


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    folder = made_adapter(tmp_path / "backdoor")
    host = ModelInfo("other", None, (tmp_path,), (tmp_path,), sha256="0" * 64)
    with pytest.raises(UserError, match=r"was made for toy .*analyze train"):
        get_defense("baseline_tuning", {"weights": str(folder)}).prepare(host)


def test_a_changed_file_a_missing_one_and_a_strange_manifest_are_refused(tmp_path: Path) -> None:
    folder = made_adapter(tmp_path / "a")
    (folder / ADAPTER_WEIGHTS_FILE).write_bytes((folder / ADAPTER_WEIGHTS_FILE).read_bytes() + b" ")
    with pytest.raises(UserError, match="sha256 differs"):
        load_adapter(folder)
    (folder / ADAPTER_WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=r"lacks adapter_model\.safetensors"):
        load_adapter(folder)
    folder = made_adapter(tmp_path / "b")
    (folder / ADAPTER_MANIFEST_FILE).write_text(json.dumps({"recipe": "attack"}))
    with pytest.raises(UserError, match="no manifest of `analyze train`"):
        load_adapter(folder)


def test_only_plain_lora_is_read(tmp_path: Path) -> None:
    folder = made_adapter(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match="only plain LoRA"):
        merge_adapter(fresh_model(), load_adapter(folder))


def test_a_matrix_that_the_model_lacks_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    adapter = load_adapter(made_adapter(tmp_path / "a"))
    model = fresh_model("gpt2")
    before = state(model)
    with pytest.raises(UserError, match="does not have"), apply_adapter(model, adapter):
        pass
    assert same(state(model), before)


def test_the_users_own_adapter_comes_before_the_shipped_one(tmp_path: Path) -> None:
    shipped = made_adapter(tmp_path / "shipped" / "aligned")
    host = ModelInfo("toy", None, (tmp_path,), (tmp_path / "mine", tmp_path / "shipped"), sha256="toy")
    assert find_adapter("aligned", host) == load_adapter(shipped)
    mine = tmp_path / "mine" / "aligned"
    shutil.copytree(shipped, mine)
    found = find_adapter("aligned", host)
    assert found is not None and found.folder == mine
    assert find_adapter("attacked", host) is None


def test_fingerprints_know_a_request_again_but_do_not_show_it() -> None:
    assert fingerprint_queries(["How do I\nsing?"]) == fingerprint_queries(["how do i sing?"])
    assert fingerprint_queries(["How do I sing?"]) != fingerprint_queries(["How do I swing?"])
    assert len(fingerprint_queries(["a", "A", "b"])) == 2
