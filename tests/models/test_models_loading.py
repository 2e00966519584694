"""The table of models is sane, and whatever cannot be loaded is refused in one line that says what to do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, save_model, tiny_model, toy_tokenizer
from safetensors.torch import load_file, save_file

from analysis.checkpoints.registry import MODEL_REGISTRY
from analysis.models.chat_template import ChatTemplate
from analysis.models.loading import (
    SMOLLM2_SHA256,
    LoadedModel,
    _choose_dtype,
    build_model_info,
    limit_threads,
    load_model,
    load_tokenizer,
    open_checkpoint,
)
from defenses.errors import UserError


def test_rows_are_unique_and_look_like_models_of_the_hub() -> None:
    assert len({card.repo for card in MODEL_REGISTRY.values()}) == len(MODEL_REGISTRY)
    for name, card in MODEL_REGISTRY.items():
        assert name == card.name and re.fullmatch(r"[a-z0-9.-]+", name)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", card.repo)
        assert card.gated == card.repo.startswith(("meta-llama/", "google/"))


def test_the_promised_names_are_there() -> None:
    assert MODEL_REGISTRY["llama2"].repo == "meta-llama/Llama-2-7b-chat-hf"
    families = " ".join(card.repo.lower() for card in MODEL_REGISTRY.values())
    for family in (
        "smollm2",
        "llama-3",
        "qwen2.5",
        "qwen3",
        "gemma-2",
        "gemma-3",
        "mistral",
        "phi-",
        "vicuna",
    ):
        assert family in families


def test_vicunas_template_is_the_format_it_was_tuned_on() -> None:
    renderer = ChatTemplate(toy_tokenizer(MODEL_REGISTRY["vicuna"].chat_template, "metaspace"))
    chat = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    text = renderer.render_prompt([{"role": role, "content": content} for role, content in chat]).text
    assert text == "<s>Be kind. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_a_saved_folder_comes_back_as_it_was(tmp_path: Path, family: str, kind: str) -> None:
    loaded = load_model(str(save_model(tmp_path / "toy", family, "llama2", kind)))
    want = tiny_model(family)
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    assert all(
        torch.equal(loaded.model.state_dict()[name], value) for name, value in want.state_dict().items()
    )
    plain = toy_tokenizer("llama2", kind)
    text = "<s>[INST] Tell me [/INST] Caf\u00e9"
    assert loaded.tokenizer.encode(text) == plain.encode(text)
    assert loaded.tokenizer.chat_template == plain.chat_template
    assert loaded.context_length == 2048
    assert loaded.origin["id"] == "toy" and len(loaded.origin["sha256"]) == 64
    assert load_tokenizer(str(tmp_path / "toy")).encode(text) == plain.encode(text)


def test_the_tokenizer_json_is_taken_as_it_is_whatever_class_the_folder_names(tmp_path: Path) -> None:
    # Llama 2's: the class LlamaTokenizer of transformers 5 would leave out the space in front of "[INST]".
    save_model(tmp_path, "llama", "llama2", "metaspace")
    rules = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    rules["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space],
    }
    rules["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = load_tokenizer(str(tmp_path))
    prompt = ChatTemplate(tokenizer).render_prompt([{"role": "user", "content": "Hi"}])
    assert tokenizer.convert_ids_to_tokens(prompt.ids)[:3] == ["<s>", "\u2581", "["]


def test_a_response_ends_with_the_end_of_a_turn_or_of_a_text(tmp_path: Path) -> None:
    # As Gemma and Phi do: the tokenizer knows the end of a text, the generation settings also that of a turn.
    folder = save_model(tmp_path)
    ends = {toy_tokenizer().eos_token_id}
    for added, setting in (({7, 9}, [7, 9]), ({7}, 7), (set(), None)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": setting}), "utf-8")
        assert load_model(str(folder)).end_token_ids == ends | added


def refused(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_model(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    refused(r"unknown model 'lama2': did you mean 'llama2'.*Hugging Face id, a folder, a \.gguf", "lama2")


def test_a_path_that_is_not_there_is_no_name_of_the_hub(tmp_path: Path) -> None:
    refused("no file", str(tmp_path / "no.gguf"))
    refused("no folder '.*': --model takes the path of a folder", str(tmp_path / "no" / "folder"))
    for name in ("./nofolder", "../nofolder", "~/nofolder", "nofolder/"):
        refused(f"no folder '{name}'", name)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.pt"])
def test_a_single_file_of_weights_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    refused(r"a folder or a \.gguf, not a single weight file", str(tmp_path / name))


def test_a_folder_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    refused(r"has no chat template.*chat_template\.jinja", str(save_model(tmp_path, template=None)))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    refused("the tokenizer of .* cannot be loaded", str(tmp_path))


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (save_model(tmp_path) / "tokenizer.json").write_text("{}", "utf-8")
    refused("the tokenizer of .* cannot be loaded", str(tmp_path))


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    (save_model(tmp_path) / "config.json").write_text('{"model_type": "vit"}', "utf-8")
    refused("cannot load .* as a causal language model", str(tmp_path))


def test_a_model_type_never_heard_of_is_refused(tmp_path: Path) -> None:
    (save_model(tmp_path) / "config.json").write_text('{"model_type": "llama99"}', "utf-8")
    refused("cannot load .* as a causal language model", str(tmp_path))


def test_code_beside_the_weights_is_never_run(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", "utf-8")
    refused("cannot load .* as a causal language model", str(folder))
    assert not (tmp_path / "ran").exists()


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    weights = save_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("is damaged .*save or download the model again", str(tmp_path))


def test_weights_that_would_be_drawn_at_random_are_refused(tmp_path: Path) -> None:
    weights = save_model(tmp_path) / "model.safetensors"
    values = load_file(weights)
    del values["model.layers.1.mlp.up_proj.weight"]
    save_file(values, weights, {"format": "pt"})
    refused(r"lacks 1 of its model's weights \(model.layers.1.mlp.up_proj.weight\).*at random", str(tmp_path))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    weights = save_model(tmp_path) / "model.safetensors"
    values = load_file(weights)
    values["model.norm.weight"] = torch.ones(7)
    save_file(values, weights, {"format": "pt"})
    refused(r"1 of the weights have another shape .* \(model.norm.weight: \[7\], not \[64\]\)", str(tmp_path))


def test_unknown_devices_and_kinds_of_numbers_are_refused() -> None:
    refused(r"unknown device 'gpu'.*cuda", "smollm2", device="gpu")
    refused(r"unknown dtype 'float31': did you mean 'float32'", "smollm2", dtype="float31")
    refused(r"unknown dtype 'int8'", "smollm2", dtype="int8")
    refused(r"this machine has no such device.*--device cpu", "smollm2", device="xpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    refused(r"--device cuda:1: this machine has no such device", "smollm2", device="cuda:1")


def test_auto_is_float32_on_a_cpu_and_bfloat16_elsewhere() -> None:
    assert _choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert _choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert _choose_dtype("bf16", torch.device("cpu")) == _choose_dtype("bfloat16", torch.device("cpu"))


def test_what_does_not_fit_one_card_is_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cuda = save_model(tmp_path), torch.device("cuda:0")
    size = 4 * sum(value.numel() for value in load_file(folder / "model.safetensors").values())

    checkpoint = open_checkpoint(str(folder))

    def free(amount: float, is_quantized: bool = False) -> Any:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(amount), 10 * size))
        return replace(checkpoint, device=cuda)._choose_device_map(is_quantized)

    assert free(1.2 * size) == cuda
    assert free(size) == "auto"
    assert checkpoint._choose_device_map(False) == torch.device("cpu")
    # Quantized weights take as much as their file, whatever the precision of the rest.
    checkpoint = replace(checkpoint, dtype=torch.float64)
    assert (free(1.2 * size), free(1.2 * size, is_quantized=True)) == ("auto", cuda)


def test_a_bfloat16_load_is_bfloat16(tmp_path: Path) -> None:
    loaded = load_model(str(save_model(tmp_path)), dtype="bfloat16")
    assert {value.dtype for value in loaded.model.parameters()} == {torch.bfloat16}


def test_threads_are_limited_to_the_cpus_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    n_threads = torch.get_num_threads()
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    monkeypatch.setattr("analysis.models.loading._CPU_QUOTA_FILE", quota)
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        limit_threads()
        assert torch.get_num_threads() == 2  # the user's own setting
        monkeypatch.delenv("OMP_NUM_THREADS")
        limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(n_threads)


def test_a_secret_belongs_to_name_and_vocabulary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    one, two = toy_tokenizer("chatml", "bytes"), toy_tokenizer("chatml", "metaspace")
    folders = [
        build_model_info(name, tok).secret_folders[0]
        for name, tok in (("a/b", one), ("a/c", one), ("a/b", two))
    ]
    assert len(set(folders)) == 3
    assert build_model_info("a/b", toy_tokenizer("llama2", "bytes")).secret_folders[0] == folders[0]
    assert all(folder.parent == tmp_path / "refusalscope" / "secrets" for folder in folders)


@pytest.mark.embedded
def test_the_embedded_model_is_what_the_table_says(smollm2: LoadedModel) -> None:
    assert smollm2.origin["sha256"] == SMOLLM2_SHA256
    assert smollm2.model.config.model_type == "llama" and smollm2.context_length >= 2048
    assert smollm2.model.get_output_embeddings().weight is smollm2.model.get_input_embeddings().weight
