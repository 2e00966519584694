"""GGUF → safetensors: the same logits as the model that was written, once, whole, and again if damaged."""

from __future__ import annotations

import contextlib
import json
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import fresh_model, tiny_model, toy_tokenizer
from gguf_models import write_gguf

from analysis.checkpoints.gguf_conversion import convert_gguf
from analysis.models.loading import load_model, load_tokenizer
from defenses.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is made here out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_notifier() -> Any:
    """Return an object whose `say` keeps the lines."""
    lines: list[str] = []
    return SimpleNamespace(lines=lines, say=lines.append)


def build_model(kind: str, **settings: Any) -> Any:
    """Return a random model of a type, whose norms and biases are not trivial."""
    from conftest import _SIZES
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**_SIZES, **settings})
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def compute_logits(model: Any) -> torch.Tensor:
    """Return the last logits of a short and a longer text."""
    with torch.inference_mode():
        texts = [torch.arange(30, 30 + length)[None] for length in (5, 90)]
        return torch.stack([model(input_ids=ids).logits[0, -1] for ids in texts])


ROPE = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {
    "ARCH.rope.scaling.type": "yarn",
    "ARCH.rope.scaling.factor": 4.0,
    "ARCH.rope.scaling.original_context_length": 64,
}
FACTORS = [1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 5.0, 8.0]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": FACTORS,
    "long_factor": [2 * factor for factor in FACTORS],
    "original_max_position_embeddings": 64,
    "attention_factor": 1.2,
}
LONGROPE_KEYS = {
    "ARCH.rope.scaling.type": "longrope",
    "ARCH.rope.scaling.attn_factor": 1.2,
    "ARCH.rope.scaling.original_context_length": 64,
}
LONGROPE_TENSORS = {
    "rope_factors_short.weight": LONGROPE["short_factor"],
    "rope_factors_long.weight": LONGROPE["long_factor"],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def rotate(**settings: Any) -> dict[str, Any]:
    """Return the rotation of a model, as settings of `build_model`."""
    return {"rope_parameters": ROPE | settings}


# Name → type and settings of the model, metadata and tensors of the file beside the usual ones.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama with biases": ("llama", {"attention_bias": True}, {}, {}),
    "llama, another head size": ("llama", {"head_dim": 32}, {}, {}),
    "llama, a scale as usual": ("llama", {}, {"ARCH.attention.scale": 0.25}, {}),
    "llama, no number of key heads": (
        "llama",
        {"num_key_value_heads": 4},
        {"ARCH.attention.head_count_kv": None},
        {},
    ),
    "llama, a number for each layer": ("llama", {}, {"ARCH.attention.head_count_kv": [2, 2]}, {}),
    "llama, linear": (
        "llama",
        rotate(rope_type="linear", factor=4.0),
        {"ARCH.rope.scaling.type": "linear", "ARCH.rope.scaling.factor": 4.0},
        {},
    ),
    "llama, linear by its old name": (
        "llama",
        rotate(rope_type="linear", factor=4.0),
        {"ARCH.rope.scale_linear": 4.0},
        {},
    ),
    "llama, scaling off": (
        "llama",
        {},
        {"ARCH.rope.scaling.type": "none", "ARCH.rope.scaling.factor": 4.0},
        {},
    ),
    "llama, yarn": ("llama", rotate(**YARN), YARN_KEYS, {}),
    "qwen3, yarn with betas": (
        "qwen3",
        {"head_dim": 16, **rotate(**YARN, beta_fast=16.0, beta_slow=2.0)},
        {
            **YARN_KEYS,
            "ARCH.rope.scaling.yarn_beta_fast": 16.0,
            "ARCH.rope.scaling.yarn_beta_slow": 2.0,
        },
        {},
    ),
    "llama, longrope": ("llama", rotate(**LONGROPE), LONGROPE_KEYS, LONGROPE_TENSORS),
    "phi3, longrope": (
        "phi3",
        {"original_max_position_embeddings": 64, **rotate(**LONGROPE)},
        LONGROPE_KEYS,
        LONGROPE_TENSORS,
    ),
    "phi3, half of each head, sliding": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 8}, {}, {}),
    "starcoder2": ("starcoder2", rotate(rope_theta=1e5), {}, {}),
    "gemma2, other caps": (
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {},
        {},
    ),
    "gemma3": (
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPE},
        {"ARCH.rope.scaling.type": "linear", "ARCH.rope.scaling.factor": 8.0},
        {},
    ),
    "qwen2moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 48}, {}, {}),
    "qwen3moe": ("qwen3_moe", {**MOE, "head_dim": 16, "norm_topk_prob": True}, {}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_has_the_logits_of_the_model_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    kind, settings, metadata, tensors = MODELS[name]
    model = build_model(kind, **settings)
    path = write_gguf(tmp_path / "x.gguf", model, metadata=metadata, tensors=tensors)
    loaded = load_model(str(path))
    torch.testing.assert_close(compute_logits(loaded.model), compute_logits(model), atol=1e-4, rtol=0)


def test_the_divisors_of_llama_3_1_are_read_from_their_tensor(tmp_path: Path) -> None:
    model = build_model("llama", **rotate(**LLAMA3))
    plain = build_model("llama").model.rotary_emb.inv_freq
    divisors = (plain / model.model.rotary_emb.inv_freq).tolist()
    path = write_gguf(tmp_path / "x.gguf", model, tensors={"rope_freqs.weight": divisors})
    converted = load_model(str(path))
    torch.testing.assert_close(compute_logits(converted.model), compute_logits(model), atol=1e-4, rtol=0)
    assert "rope_freqs.weight" in converted.origin["gguf"]["understood"]


def test_a_factor_on_the_rotation_itself_is_kept(tmp_path: Path) -> None:
    model = fresh_model()
    path = write_gguf(tmp_path / "x.gguf", model, metadata={"ARCH.rope.scaling.attn_factor": 1.5})
    model.model.rotary_emb.attention_scaling = 1.5
    torch.testing.assert_close(
        compute_logits(load_model(str(path)).model), compute_logits(model), atol=1e-4, rtol=0
    )


def test_a_gguf_becomes_safetensors_once(tmp_path: Path) -> None:
    path, told = write_gguf(tmp_path / "toy.gguf", metadata={"general.name": "Toy"}), make_notifier()
    loaded = load_model(str(path), notify=told.say)
    assert torch.allclose(compute_logits(loaded.model), compute_logits(tiny_model()), atol=1e-4)
    digest = sha256(path.read_bytes()).hexdigest()
    assert loaded.origin | {"gguf": {}} == {
        "id": "toy.gguf",
        "revision": "local file",
        "sha256": digest,
        "gguf": {},
    }
    assert "llama.rope.freq_base" in loaded.origin["gguf"]["understood"]
    assert "general.name" in loaded.origin["gguf"]["ignored"]
    assert len(told.lines) == 1 and told.lines[0].startswith("Converting toy.gguf")
    (folder,) = (tmp_path / "cache" / "refusalscope" / "gguf").iterdir()
    assert digest[:32] in folder.name and (folder / "model.safetensors").is_file()
    # By content, not by name: the same file elsewhere is not converted again.
    other = tmp_path / "elsewhere.gguf"
    path.rename(other)
    assert convert_gguf(other, told.say)[0] == folder
    assert len(told.lines) == 1


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "no tokenizer", "no record", "cut record"])
def test_a_damaged_copy_is_made_again(damage: str, tmp_path: Path) -> None:
    path, told = write_gguf(tmp_path / "toy.gguf"), make_notifier()
    folder, _ = convert_gguf(path, told.say)
    names = {"weights": "model.safetensors", "tokenizer": "tokenizer.json", "record": "conversion.json"}
    file = folder / names[damage.split()[1]]
    whole = file.read_bytes()
    if damage.startswith("no"):
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) // 2])
    assert convert_gguf(path, told.say)[0] == folder
    assert file.read_bytes() == whole
    assert len(told.lines) == 2 and "damaged" in told.lines[1]
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_copy_made_by_other_versions_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "toy.gguf")
    folder, source = convert_gguf(path, make_notifier().say)
    monkeypatch.setattr("analysis.checkpoints.gguf_conversion.version", lambda package: f"{package}-99")
    other, same_source = convert_gguf(path, make_notifier().say)
    assert other != folder and source == same_source


def test_parts_are_converted_as_one_model(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "toy.gguf", parts=3)
    told = make_notifier()
    loaded = load_model(str(first), notify=told.say)
    assert torch.equal(compute_logits(loaded.model), compute_logits(tiny_model()))
    digests = [sha256(part.read_bytes()).hexdigest() for part in sorted(tmp_path.glob("*.gguf"))]
    assert loaded.origin["sha256"] == sha256("".join(digests).encode()).hexdigest()
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    second = convert_gguf(first.with_name("toy-00002-of-00003.gguf"), told.say)
    assert second[1]["sha256"] == loaded.origin["sha256"] and len(told.lines) == 1


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"ARCH.attention.scale": 0.1}, {}, r"llama\.attention\.scale = 0\.1"),
        ({"ARCH.logit_scale": 0.5}, {}, r"llama\.logit_scale = 0\.5"),
        ({"ARCH.attention.causal": False}, {}, r"llama\.attention\.causal = False"),
        ({"ARCH.attention.sliding_window": 8}, {}, r"llama\.attention\.sliding_window = 8"),
        ({"ARCH.expert_count": 4}, {}, "expert"),
        ({"ARCH.some.new_thing": 3}, {}, r"llama\.some\.new_thing = 3.*folder or hub id"),
        ({"ARCH.attention.head_count_kv": [2, 4]}, {}, "head_count_kv|num_key_value_heads"),
        ({"ARCH.rope.dimension_count": 8}, {}, r"rope\.dimension_count = 8"),
        ({"ARCH.rope.scaling.type": "dynamic"}, {}, r"rope\.scaling\.type = dynamic"),
        ({"ARCH.rope.scaling.alpha": 1000.0}, {}, r"rope\.scaling\.alpha"),
        (YARN_KEYS | {"ARCH.rope.scaling.yarn_ext_factor": 0.5}, {}, "yarn_ext_factor"),
        (YARN_KEYS, {"rope_freqs.weight": FACTORS}, r"yarn beside rope_freqs\.weight"),
        (LONGROPE_KEYS, {}, "longrope.*without its two tensors"),
        ({}, {"rope_factors_short.weight": FACTORS}, "without its two tensors"),
        (LONGROPE_KEYS, {"rope_factors_long.weight": FACTORS}, "without its two tensors"),
        ({"general.type": "adapter"}, {}, "no whole model but one of type 'adapter'"),
        # Files of image encoders have no tokenizer.
        ({"general.type": "mmproj", "tokenizer.ggml.model": None}, {}, "one of type 'mmproj'"),
        ({"ARCH.block_count": 1}, {}, r"does not read \(blk\.1\."),
        ({"ARCH.block_count": None}, {}, r"lacks llama\.block_count"),
        ({"ARCH.attention.head_count": None}, {}, r"lacks llama\.attention\.head_count"),
        ({"ARCH.attention.layer_norm_rms_epsilon": None}, {}, r"lacks llama\.attention\.layer_norm_rms_eps"),
        ({"ARCH.vocab_size": 961}, {}, "another shape"),
        ({"tokenizer.ggml.merges": ["q x"]}, {}, "vocabulary that cannot be read.*download the file again"),
        ({"tokenizer.ggml.new_rule": True}, {}, r"tokenizer\.ggml\.new_rule = True"),
        ({}, {"blk.0.attn_v.bias": [1.0] * 32}, r"does not read \(blk\.0\.attn_v\.bias\)"),
        ({}, {"blk.1.attn_q_norm.weight": [1.0] * 16}, r"does not read \(blk\.1\.attn_q_norm\.weight\)"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    metadata: dict[str, Any], tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "x.gguf", metadata=metadata, tensors=tensors)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(path))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_gemma_without_a_window_turns_all_layers_by_the_same_base(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    settings = {**GEMMA, "num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}
    model = build_model("gemma3_text", **settings, rope_parameters={"full_attention": rope})
    for window in (None, 0):
        path = write_gguf(
            tmp_path / f"{window}.gguf", model, metadata={"ARCH.attention.sliding_window": window}
        )
        loaded = load_model(str(path))
        torch.testing.assert_close(compute_logits(loaded.model), compute_logits(model), atol=1e-4, rtol=0)


def test_settings_that_are_switched_off_are_ignored(tmp_path: Path) -> None:
    off = {"ARCH.some.new_thing": 0.0, "ARCH.logit_scale": 1.0, "ARCH.attention.causal": True}
    _, source = convert_gguf(write_gguf(tmp_path / "x.gguf", metadata=off), make_notifier().say)
    assert {"llama.some.new_thing", "llama.logit_scale"} <= set(source["gguf"]["ignored"])


def test_code_that_lies_beside_a_gguf_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who is asked says yes
    path = write_gguf(tmp_path / "toy.gguf")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n", "utf-8")
    named = {"auto_map": {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}}
    named["auto_map"]["AutoModelForCausalLM"] = "evil.Evil"
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text(json.dumps(named), "utf-8")
    with contextlib.suppress(UserError):
        convert_gguf(path, make_notifier().say)
    assert not (tmp_path / "ran").exists()


def test_a_gguf_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "base.gguf", tokenizer=toy_tokenizer(None))
    with pytest.raises(UserError, match=r"has no chat template.*instruct model"):
        load_model(str(path))
    assert not (tmp_path / "cache").exists()


def test_a_gguf_that_lacks_weights_is_refused_since_they_would_be_random(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at random"):
        load_model(str(write_gguf(tmp_path / "holes.gguf", leave_out="blk.1.ffn_up")))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_conversion_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "toy.gguf")

    def fill_disk(self: Any, folder: Any, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", fill_disk)
    with pytest.raises(UserError, match="cannot write the converted model"):
        load_model(str(path))
    assert not list((tmp_path / "cache" / "refusalscope" / "gguf").iterdir())


def test_the_ends_of_a_response_are_kept_for_generation(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", metadata={"tokenizer.ggml.eot_token_id": 9})
    loaded = load_model(str(path))
    assert loaded.model.generation_config.eos_token_id == [loaded.tokenizer.eos_token_id, 9]
    assert load_tokenizer(str(path)).eos_token == toy_tokenizer().eos_token
