"""Which files of a folder are the model's weights, and that they fit the model exactly or are refused."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_model, make_adapter, save_model, tiny_model, toy_tokenizer
from safetensors.torch import load_file, save_file

from analysis.checkpoints.weight_files import hash_weights, list_weight_files
from analysis.models.loading import load_model
from defenses.errors import UserError

PROMPT = torch.tensor([[5, 300, 310, 320]])


def refuse_folder(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def read_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=PROMPT).logits


def edit_weights(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    values = load_file(path)
    edit(values)
    save_file(values, path, {"format": "pt"})


def save_shards(folder: Path) -> list[Path]:
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    toy_tokenizer().save_pretrained(folder)
    return sorted(folder.glob("model-*.safetensors"))


def test_sha256_of_the_weights_is_that_of_the_files_that_are_loaded(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "single")
    digest = hash_weights(folder)
    assert digest == sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    # Copies for other programs are not the weights.
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"):
        (folder / name).write_bytes(b"other")
    assert hash_weights(folder) == digest == load_model(str(folder)).origin["sha256"]
    shards = save_shards(tmp_path / "shards")
    assert list_weight_files(tmp_path / "shards") == shards
    both = hash_weights(tmp_path / "shards")
    shards[1].write_bytes(b"another")
    assert both != hash_weights(tmp_path / "shards") and len(both) == 64


def test_the_hub_caches_own_names_are_taken_as_digests(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"never read")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert hash_weights(tmp_path) == "ab" * 32


# --- adapters ---------------------------------------------------------------------------------------------


def test_an_adapter_left_in_a_merged_folder_is_not_applied_and_a_notice_says_so(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, plain = save_model(tmp_path / "merged"), save_model(tmp_path / "plain")
    adapter = make_adapter(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    loaded = load_model(str(folder))
    worn, own = (read_logits(AutoModelForCausalLM.from_pretrained(path)) for path in (folder, plain))
    assert not torch.allclose(worn, own, atol=0.01)  # what transformers does without a word
    assert torch.equal(read_logits(loaded.model), own)
    (notice,) = loaded.notices
    assert "also holds an adapter" in notice and "not applied" in notice
    assert load_model(str(plain)).notices == ()


def test_a_folder_that_is_only_an_adapter_says_how_to_name_it(tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    (adapter / "manifest.json").unlink()  # as PEFT writes it
    option = f"{base}:{adapter}"
    refuse_folder(adapter, f"is an adapter without the weights of its base model: use --model {option}")
    toy_tokenizer().save_pretrained(adapter)  # as trainers write it
    shutil.copy(base / "config.json", adapter)
    refuse_folder(adapter, f"is an adapter .* use --model {option}")
    # What the line says works, and is what PEFT computes.
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(fresh_model(), adapter).merge_and_unload()
    loaded = load_model(option)
    assert torch.allclose(read_logits(loaded.model), read_logits(tuned), atol=1e-5)
    assert loaded.origin["state"] == str(adapter) and len(loaded.origin["state_sha256"]) == 64


# --- weights that do not fit ------------------------------------------------------------------------------


def test_surplus_weights_are_refused_with_their_names(tmp_path: Path) -> None:
    # Of more layers than the configuration has, and of an adapter that was not merged.
    folder = save_model(tmp_path)
    edit_weights(
        folder,
        lambda values: values.update(
            {
                "model.layers.2.mlp.up_proj.weight": torch.ones(96, 64),
                "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64),
            }
        ),
    )
    refuse_folder(
        folder,
        r"holds 2 weights that its model does not use \(model.layers.0.self_attn.q_proj.lora_A.weight, model",
    )


def test_surplus_weights_that_cannot_matter_are_left_out(tmp_path: Path) -> None:
    folder, want = save_model(tmp_path), read_logits(tiny_model())
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight", "mtp.layers.0.weight"]
    edit_weights(folder, lambda values: values.update({name: torch.ones(8) for name in names}))
    loaded = load_model(str(folder))
    assert torch.equal(read_logits(loaded.model), want) and not loaded.notices


def test_an_output_layer_of_its_own_is_used_although_the_configuration_ties_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), "utf-8")
    loaded = load_model(str(folder))
    assert torch.equal(read_logits(loaded.model), read_logits(tiny_model()))
    assert "the output layer is the embedding" in loaded.notices[0]


# --- files ------------------------------------------------------------------------------------------------


def test_where_a_folder_has_one_file_and_shards_the_one_file_is_read_and_named(tmp_path: Path) -> None:
    save_shards(tmp_path)
    save_model(tmp_path / "other", "llama")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    edit_weights(tmp_path, lambda values: values["model.norm.weight"].mul_(2))
    loaded = load_model(str(tmp_path))
    assert torch.equal(loaded.model.model.norm.weight.data, 2 * tiny_model().model.norm.weight)
    assert "model.safetensors is read" in loaded.notices[0]
    assert loaded.origin["sha256"] == sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_a_shard_of_another_save_is_refused(tmp_path: Path) -> None:
    first, *_, last = save_shards(tmp_path)
    values = load_file(last) | {name: value for name, value in list(load_file(first).items())[:1]}
    save_file(values, last, {"format": "pt"})
    refuse_folder(
        tmp_path, r"holds .*, which is in model-00001.* by the index: the files come from different"
    )


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("{", "is not readable JSON"),
        ("[]", "holds no JSON object"),
        ('{"metadata": {}}', "is no index of weights"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "is no index of weights"),
        ('{"metadata": {}, "weight_map": {"a": "../x.safetensors"}}', r"names '\.\./x\.safetensors'"),
        ('{"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}', "names 'pytorch_model.bin'"),
        ("[" * 100_000, "is not readable JSON"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, index: str, match: str) -> None:
    save_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index, "utf-8")
    refuse_folder(tmp_path, match)


def test_whole_numbers_are_not_taken_for_weights(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = save_model(tmp_path)
    edit_weights(folder, lambda values: values.update({name: (values[name] * 100).to(torch.int8)}))
    refuse_folder(folder, rf"stores {name} as whole numbers.*no quantization_config")


def test_a_placeholder_of_git_lfs_is_named_as_such(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (save_model(tmp_path) / "model.safetensors").write_text(pointer, "utf-8")
    refuse_folder(tmp_path, "placeholder of Git LFS.*git lfs pull")


@pytest.mark.parametrize("name", ["adapter_model.bin", "../model.safetensors", "sub/model.safetensors"])
def test_a_configuration_cannot_name_a_pickle_or_another_folder_as_the_weights(
    tmp_path: Path, name: str
) -> None:
    config = save_model(tmp_path) / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text("utf-8")) | {"transformers_weights": name}), "utf-8"
    )
    refuse_folder(tmp_path, "only safetensors files beside it are read")


def test_shards_of_a_distributed_training_do_not_take_the_place_of_the_weights(tmp_path: Path) -> None:
    (save_model(tmp_path) / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    refuse_folder(tmp_path, "checkpoint of a distributed training")


def test_weights_under_another_name_and_models_in_folders_are_pointed_out(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "run" / "checkpoint-500")
    refuse_folder(tmp_path / "run", r"no config\.json.*use --model .*checkpoint-500")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    refuse_folder(
        folder, r"holds no model\.safetensors, which transformers reads, but consolidated\.safetensors"
    )
