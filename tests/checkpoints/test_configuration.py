"""Configurations that cannot be evaluated here end in one line that names the reason and the library."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model, tiny_model, toy_tokenizer

from analysis.models.loading import load_model
from analysis.models.session import ModelSession
from analysis.studies.manifest import describe_inputs
from defenses.errors import UserError
from defenses.steering import get_blocks
from defenses.training.trainer import find_adapted_layers


def change_config(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")
    return folder


def refuse_config(folder: Path, match: str, **values: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_model(str(change_config(folder, **values)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


QUANTIZED = {
    "bitsandbytes": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "gptq": ("optimum|gptqmodel|GPU", {"bits": 4, "group_size": 32}),
    "awq": ("gptqmodel", {"bits": 4, "group_size": 32, "zero_point": True}),
    "compressed-tensors": ("compressed-tensors", {"format": "pack-quantized", "config_groups": {}}),
    "hqq": ("hqq|HQQ", {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}),
    "torchao": ("torchao", {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}),
    "quanto": ("quanto", {"weights": "int8"}),
    "auto-round": ("auto-round", {"bits": 4, "group_size": 32}),
    "eetq": ("kernels|GPU", {"weights": "int8"}),
    "aqlm": ("aqlm", {}),
}
PACKAGES = {"compressed-tensors": "compressed_tensors", "gptq": "gptqmodel", "awq": "gptqmodel"}
PACKAGES |= {"quanto": "optimum", "auto-round": "auto_round", "eetq": "kernels"}


@pytest.mark.parametrize("method", QUANTIZED)
def test_without_its_library_a_quantized_model_is_refused_in_a_line_that_names_it(
    tmp_path: Path, method: str
) -> None:
    if importlib.util.find_spec(PACKAGES.get(method, method)):
        pytest.skip(f"the library of {method} is installed")
    library, settings = QUANTIZED[method]
    quantization = {"quant_method": method, **settings}
    refuse_config(
        save_model(tmp_path),
        rf"is quantized \({method}\) and cannot be loaded here: .*({library})",
        quantization_config=quantization,
    )


def test_an_unknown_method_is_refused_and_not_ignored(tmp_path: Path) -> None:
    refuse_config(
        save_model(tmp_path),
        "quantized by the method 'new-bits'",
        quantization_config={"quant_method": "new-bits"},
    )


def test_fp8_weights_are_unpacked_on_a_cpu_and_run_json_says_how_they_were_stored(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path)
    values, want = load_file(folder / "model.safetensors"), {}
    for name, value in list(values.items()):
        if "proj" in name:
            scale = value.abs().max() / 448
            values[name] = (value / scale).to(torch.float8_e4m3fn)
            values[name.replace("weight", "weight_scale_inv")] = torch.full((1, 1), float(scale))
            want[name] = values[name].float() * scale
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    loaded = load_model(str(change_config(folder, quantization_config=quantization)))
    assert loaded.model.dtype == torch.float32
    state = loaded.model.state_dict()
    # transformers unpacks through bfloat16.
    assert all(torch.allclose(state[name], value, rtol=1e-2, atol=1e-3) for name, value in want.items())
    from analysis.datasets.queries import QuerySet

    queries = QuerySet("none", (), "")
    record = describe_inputs(ModelSession.from_model(loaded), {}, queries, "test", None)["model"]
    assert record["quantization"]["method"] == "fp8" and record["quantization"]["dequantized"]
    assert record["quantization"]["settings"]["weight_block_size"] == [128, 128]


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": "two"},
        {"hidden_size": None},
        {"rope_parameters": {"rope_type": "none-such"}},
        {"num_attention_heads": 7},
        {"hidden_act": "no-such-activation"},
    ],
)
def test_values_of_the_wrong_kind_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    refuse_config(save_model(tmp_path), "transformers cannot load .* as a causal language model: ", **values)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\ufeffnot json"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (save_model(tmp_path) / "config.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"config\.json|cannot load") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


_TEXT: dict[str, Any] = {
    "vocab_size": 960,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
# As many blocks as the language model has.
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_ROTATIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
WRAPPERS: dict[str, dict[str, Any]] = {
    "llava": {},
    "mistral3": {},
    "gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2_5_vl": _ROTATIONS,
    "qwen3_vl": _ROTATIONS,
    "internvl": {},
}


def save_wrapper(folder: Path, kind: str) -> Any:
    """Write a tiny model that reads images and text, with the toy tokenizer, and return it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    default = AutoConfig.for_model(kind)
    text_type, vision_type = default.get_text_config().model_type, default.vision_config.model_type
    config = AutoConfig.for_model(
        kind,
        text_config={**_TEXT, **WRAPPERS[kind], "model_type": text_type},
        vision_config={**_VISION, "image_size": 28, "patch_size": 14, "model_type": vision_type},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_model_that_also_reads_images_reads_text_as_in_transformers(tmp_path: Path, kind: str) -> None:
    plain = save_wrapper(tmp_path, kind)
    loaded = load_model(str(tmp_path))
    engine = ModelSession.from_model(loaded).engine
    prompts = [(*range(300, 312), *range(400, 400 + n)) for n in (1, 5, 9, 30)]
    with torch.inference_mode():
        want = torch.cat([plain(input_ids=torch.tensor([ids])).logits[:, -1] for ids in prompts])
    got = engine.read_first_token(prompts, lambda logits: logits)
    assert torch.allclose(got, want, atol=1e-4) and want.abs().max() > 0.5
    assert (loaded.context_length, loaded.n_embeddings) == (2048, 960)
    # Steering and adapters change the language model, not the vision tower.
    blocks = get_blocks(loaded.model)
    assert len(blocks) == 2 and all(
        "vision" not in name for name, module in loaded.model.named_modules() if module in blocks
    )
    layers = find_adapted_layers(loaded.model, ["q_proj", "v_proj"])
    assert len(layers) == 4 and not any("vision" in name for name in layers)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    (folder / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}', "utf-8")
    refuse_config(folder, "an encoder with a decoder")


def test_a_model_without_weights_has_the_architecture_and_takes_no_memory(tmp_path: Path) -> None:
    from analysis.models.loading import open_checkpoint

    outline = open_checkpoint(str(save_model(tmp_path))).build_without_weights()
    assert {parameter.device.type for parameter in outline.model.parameters()} == {"meta"}
    assert type(outline.model) is type(tiny_model())
    assert outline.context_length == 2048 and outline.n_embeddings == 960
