"""LoRA adapters: equal to PEFT, applied only to their own base model, and removed without a trace."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_model, make_adapter, save_model, tiny_model, toy_tokenizer
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from analysis.models.loading import load_model
from analysis.studies.manifest import describe_options
from analysis.studies.run_spec import RunSpec
from defenses.adapter_merge import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from defenses.adapters import (
    ADAPTER_MANIFEST_FILE,
    apply_adapter,
    find_adapter,
    fingerprint_queries,
    load_adapter,
    load_external_adapter,
    merge_adapter,
)
from defenses.catalog import choose_defenses, get_defense
from defenses.contract import ModelInfo
from defenses.errors import UserError
from defenses.training.adapter_files import check_can_continue

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


def test_training_continues_a_plain_adapter_that_changes_other_modules(tmp_path: Path) -> None:
    folder, peft_model = write_peft_folder(tmp_path / "own", lora(r=2, layers_to_transform=[1]))
    base_adapter = load_external_adapter(folder, MODEL_INFO)
    model = fresh_model()
    merge_adapter(model, base_adapter)
    assert torch.allclose(compute_logits(model), compute_logits(peft_model), atol=1e-4)
    both = make_adapter(tmp_path / "both", seed=2, model=model, under=base_adapter)
    stepwise = PeftModel.from_pretrained(peft_model.merge_and_unload(), tmp_path / "both-alone")
    released = fresh_model()
    with apply_adapter(released, load_adapter(both)):
        assert torch.allclose(compute_logits(released), compute_logits(stepwise), atol=5e-3)
    edit_config(folder, use_rslora=True)
    with pytest.raises(UserError, match=r"start from a plain LoRA adapter only, but .* has use_rslora"):
        check_can_continue(load_external_adapter(folder, MODEL_INFO))


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


def test_an_adapter_of_another_architecture_is_an_error_and_changes_nothing(qv_adapter: Path) -> None:
    model = fresh_model("gpt2")
    before = copy_state(model)
    with (
        pytest.raises(UserError, match=r"cannot be applied to this model.*not found in the base model"),
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

QV = ["q_proj", "v_proj"]
EMBEDDINGS = ["embed_tokens", "lm_head"]


def write_peft_folder(folder: Path, config: PeftConfig, base: Any = None, seed: int = 0) -> tuple[Path, Any]:
    """Write an adapter with PEFT itself, without a manifest; return it and the PEFT model.

    Args:
        folder: output folder.
        config: of a new adapter, whose weights become random.
        base: model that is adapted; changed in place.
        seed: of the weights.
    """
    peft_model = get_peft_model(copy.deepcopy(tiny_model()) if base is None else base, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
    peft_model.save_pretrained(str(folder))
    return folder, peft_model


@cache
def build_model(family: str) -> Any:
    """Return a tiny model, which also may have experts; tests do not change it."""
    if family != "mixtral":
        return tiny_model(family)
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.2)).eval()


def load_defense(folder: Path) -> Any:
    """Return the defense of an external adapter."""
    return get_defense("adapter", {"weights": str(folder)}).prepare(MODEL_INFO)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": QV} | settings)


def make_vera_without_matrices() -> VeraConfig:
    """Return a configuration of which PEFT warns that the matrices are drawn again from its seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return VeraConfig(r=4, target_modules=["q_proj"], d_initial=1.0, save_projection=False)


KINDS: dict[str, tuple[str, PeftConfig]] = {
    "plain": ("llama", lora()),
    "patterns": ("llama", lora(alpha_pattern={"v_proj": 32}, rank_pattern={"q_proj": 2})),
    "rslora": ("llama", lora(use_rslora=True)),
    "some layers": ("llama", lora(layers_to_transform=[1])),
    "excluded modules": ("llama", lora(exclude_modules=["layers.0.self_attn.q_proj"])),
    "expression": ("llama", lora(target_modules=r".*\.1\..*(q|o)_proj")),
    "all linear": ("llama", lora(target_modules="all-linear")),
    "unusual start": ("llama", lora(init_lora_weights="orthogonal")),
    "alpha of zero": ("llama", lora(lora_alpha=0, alpha_pattern={"v_proj": 32})),
    "dora": ("llama", lora(use_dora=True)),
    "dora of a transposed matrix": ("gpt2", lora(use_dora=True, target_modules=["c_attn", "wte"])),
    "bias of a transposed matrix": ("gpt2", lora(bias="all", lora_bias=True, target_modules=["c_attn"])),
    "new bias": ("llama", lora(lora_bias=True)),
    "blocks": (
        "llama",
        lora(use_bdlora={"nblocks": 2, "target_modules_bd_a": QV, "target_modules_bd_b": []}),
    ),
    "embeddings": ("llama", lora(target_modules=[*QV, *EMBEDDINGS])),
    "tied embedding": ("qwen3", lora(target_modules=[*QV, "embed_tokens"])),
    "tied unembedding": ("qwen3", lora(target_modules=[*QV, "lm_head"])),
    "modules": ("llama", lora(modules_to_save=[*EMBEDDINGS, "norm"])),
    "tied modules": ("qwen3", lora(modules_to_save=EMBEDDINGS)),
    "modules that stay tied": ("qwen3", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tokens": ("llama", lora(trainable_token_indices=[5, 60])),
    "tied tokens": ("qwen3", TrainableTokensConfig(token_indices=[5, 60])),
    "experts": ("mixtral", lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])),
    "adalora": ("llama", AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=QV)),
    "boft": ("llama", BOFTConfig(boft_block_size=4, target_modules=QV)),
    "boft, a number of blocks": (
        "llama",
        BOFTConfig(boft_block_size=0, boft_block_num=8, target_modules=QV),
    ),
    "fourierft, another seed": (
        "llama",
        FourierFTConfig(n_frequency=20, random_loc_seed=0, target_modules=QV),
    ),
    "fourierft": ("llama", FourierFTConfig(n_frequency=20, target_modules=QV)),
    "hra": ("llama", HRAConfig(r=4, target_modules=QV)),
    "ia3": ("llama", IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])),
    "norms": ("llama", LNTuningConfig(target_modules=["norm", "input_layernorm"])),
    "loha": ("llama", LoHaConfig(r=4, target_modules=QV)),
    "lokr": ("llama", LoKrConfig(r=4, target_modules=QV)),
    "miss": ("llama", MissConfig(r=4, target_modules=QV)),
    "oft": ("llama", OFTConfig(r=0, oft_block_size=4, target_modules=QV)),
    "oft, exact": (
        "llama",
        OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=QV),
    ),
    "oft, a number of blocks": ("llama", OFTConfig(r=4, oft_block_size=0, target_modules=QV)),
    "miss by blocks": ("llama", MissConfig(r=4, init_weights="bat", target_modules=QV)),
    "shira": ("llama", ShiraConfig(r=2, target_modules=["q_proj"])),
    "vera without its matrices": ("llama", make_vera_without_matrices()),
    "vera": ("llama", VeraConfig(r=4, target_modules=["q_proj"], d_initial=1.0)),
}


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("kind", KINDS)
def test_an_external_adapter_equals_peft_and_leaves_no_trace(tmp_path: Path, kind: str) -> None:
    family, config = KINDS[kind]
    model = build_model(family)
    folder, peft_model = write_peft_folder(tmp_path / "a", copy.deepcopy(config), copy.deepcopy(model))
    expected, released = compute_logits(peft_model), compute_logits(model)
    assert (expected - released).abs().max() > 0.05
    before, modules = copy_state(model), dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    defense, random_state = load_defense(folder), torch.get_rng_state()
    with defense.apply_to(model):
        assert torch.allclose(compute_logits(model), expected, atol=1e-4)
        assert dict(model.named_modules()) == modules
    assert states_equal(copy_state(model), before)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in after)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not [name for name in vars(model) if "adapter" in name or "released" in name]


def test_the_experts_of_an_older_transformers_are_found(tmp_path: Path) -> None:
    """Adapters of Mixtral made before version 5 have matrices for each expert; now experts are one tensor."""
    model = build_model("mixtral")
    tensors, generator = {}, torch.Generator().manual_seed(0)
    experts = model.model.layers[0].mlp.experts
    n_experts, width, size = experts.down_proj.shape
    for layer, expert in itertools.product(range(len(model.model.layers)), range(n_experts)):
        for name, (n_in, n_out) in {"w1": (width, size), "w3": (width, size), "w2": (size, width)}.items():
            key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, n_in, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(n_out, 2, generator=generator)
    expected = experts.gate_up_proj.detach().clone()
    for expert, (half, name) in itertools.product(range(n_experts), enumerate(("w1", "w3"))):
        key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}.lora_"
        change = tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
        expected[expert, half * size : (half + 1) * size] += 3 / 2 * change
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS_FILE)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / ADAPTER_CONFIG_FILE).write_text(json.dumps(config))
    with load_defense(tmp_path).apply_to(model):
        assert torch.allclose(experts.gate_up_proj, expected, atol=1e-5)


def test_weights_in_half_precision_are_rounded_once(tmp_path: Path) -> None:
    folder, _ = write_peft_folder(tmp_path / "a", lora(use_dora=True))
    model = fresh_model().to(torch.bfloat16)
    exact = PeftModel.from_pretrained(copy.deepcopy(model).float(), folder).merge_and_unload()
    with load_defense(folder).apply_to(model):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, exact.get_parameter(name).to(torch.bfloat16)), name


SUBTRACTED = {
    "pissa": ("llama", lora(init_lora_weights="pissa")),
    "olora": ("llama", lora(init_lora_weights="olora")),
    "pissa of transposed matrices": ("gpt2", lora(init_lora_weights="pissa", target_modules=["c_attn"])),
    "olora with patterns": (
        "llama",
        lora(init_lora_weights="olora", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
    ),
    "pissa, rslora and a module": (
        "llama",
        lora(init_lora_weights="pissa", use_rslora=True, modules_to_save=["norm"]),
    ),
    "pissa, dora": ("llama", lora(init_lora_weights="pissa", use_dora=True)),
    "olora, a tied unembedding": ("qwen3", lora(init_lora_weights="olora", target_modules=["lm_head"])),
    "pissa, the unembedding": ("llama", lora(init_lora_weights="pissa", target_modules=[*QV, "lm_head"])),
}


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("kind", SUBTRACTED)
def test_an_adapter_whose_start_is_subtracted_from_the_weights_equals_peft(tmp_path: Path, kind: str) -> None:
    family, config = SUBTRACTED[kind]
    folder, trained = write_peft_folder(tmp_path / "a", copy.deepcopy(config), fresh_model(family))
    model, loaded = fresh_model(family), PeftModel.from_pretrained(fresh_model(family), folder)
    before, expected = copy_state(model), compute_logits(loaded)
    assert torch.allclose(expected, compute_logits(trained), atol=1e-4)
    assert (expected - compute_logits(model)).abs().max() > 0.05
    with load_defense(folder).apply_to(model):
        assert torch.allclose(compute_logits(model), expected, atol=1e-4)
    assert states_equal(copy_state(model), before)
    # In half precision, the sum is rounded once; PEFT rounds what is left of the weights as well.
    half = fresh_model(family).to(torch.bfloat16)
    exact = PeftModel.from_pretrained(copy.deepcopy(half).float(), folder).merge_and_unload()
    with load_defense(folder).apply_to(half):
        for name, parameter in half.named_parameters():
            if (
                "lm_head" in str(config.target_modules) and parameter.shape[0] > 900
            ):  # its rest is read from the file, and rounded first
                continue
            gap = (parameter.float() - exact.get_parameter(name)).abs()
            assert (gap <= exact.get_parameter(name).abs() * 2**-8 + 1e-6).all(), name


def test_starts_of_stacked_adapters_are_those_of_the_released_weights(tmp_path: Path) -> None:
    kinds = ("pissa", "olora", True)
    folders = [
        write_peft_folder(tmp_path / f"{kind}", lora(init_lora_weights=kind), seed=seed)[0]
        for seed, kind in enumerate(kinds)
    ]
    released, expected = copy_state(tiny_model()), copy_state(tiny_model())
    for folder in folders:
        merged = PeftModel.from_pretrained(fresh_model(), folder).merge_and_unload().state_dict()
        for name, tensor in expected.items():
            tensor += merged[name] - released[name]
    model = fresh_model()
    stack: Any = get_defense("+".join(map(str, folders))).prepare(MODEL_INFO)
    with stack.apply_to(model):
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, expected[name], atol=1e-5), name
    assert states_equal(copy_state(model), released)
    scaled, _ = write_peft_folder(tmp_path / "dora", lora(use_dora=True))
    stack = get_defense(f"{folders[0]}+{scaled}").prepare(MODEL_INFO)
    with pytest.raises(
        UserError, match=r"cannot be applied together: one needs the weights .*use one at a time"
    ):
        stack.apply_to(model).__enter__()


def test_a_start_is_not_subtracted_from_a_weight_that_two_modules_share(tmp_path: Path) -> None:
    _, config = SUBTRACTED["olora, a tied unembedding"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, _ = write_peft_folder(tmp_path / "a", copy.deepcopy(config), fresh_model("qwen3"))
    tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
    del tensors["base_model.model.lm_head.base_layer.weight"]  # some leave it out
    save_file(tensors, folder / ADAPTER_WEIGHTS_FILE)
    model = fresh_model("qwen3")
    before = copy_state(model)
    with pytest.raises(UserError, match="a weight that two modules of this model share") as error:
        load_defense(folder).apply_to(model).__enter__()
    assert "\n" not in str(error.value) and states_equal(copy_state(model), before)


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "loftq", "lora_ga"])
def test_a_start_that_the_weights_do_not_determine_is_refused_with_the_way_out(
    tmp_path: Path, init: str
) -> None:
    folder, _ = write_peft_folder(tmp_path / "a", lora())
    edit_config(folder, init_lora_weights=init)
    with pytest.raises(UserError, match=f"={init} .*path_initial_model_for_weight_conversion") as error:
        load_defense(folder)
    assert "\n" not in str(error.value)


UNSUPPORTED = {
    "peft_type": "PROMPT_TUNING",
    "init_lora_weights": "pissa_niter_4",
    "layer_replication": [[0, 2], [1, 2]],
    "use_qalora": True,
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1},
    "megatron_config": {"a": 1},
    "use_some_later_idea": True,
}


def test_an_unsupported_external_adapter_is_rejected_before_anything_runs(tmp_path: Path) -> None:
    folder, _ = write_peft_folder(tmp_path / "a", lora())
    text = (folder / ADAPTER_CONFIG_FILE).read_text()
    for key, value in UNSUPPORTED.items():
        (folder / ADAPTER_CONFIG_FILE).write_text(text)
        edit_config(folder, **{key: value})
        with pytest.raises(UserError, match=re.escape(str(value))) as error:
            load_defense(folder)
        assert "\n" not in str(error.value) and (key in str(error.value) or key == "peft_type")
    (folder / ADAPTER_CONFIG_FILE).write_text(text)
    edit_config(folder, use_some_later_idea=None, lorap_emb_lr=1e-6, auto_mapping={"unsloth_fixed": True})
    load_defense(folder)


def test_the_tensors_of_an_adapter_are_just_those_that_its_configuration_calls_for(tmp_path: Path) -> None:
    folder, _ = write_peft_folder(tmp_path / "a", lora(modules_to_save=["lm_head"]))
    tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
    prefix, model = "base_model.model.model.layers.0.self_attn", tiny_model()
    before = copy_state(model)
    for changed, message in (
        (
            {f"{prefix}.k_proj.lora_A.weight": torch.ones(4, 64)},
            r"1 tensors for .* no place \(.*k_proj.lora_A",
        ),
        ({"base_model.model.score.weight": torch.ones(2, 64)}, r"no place \(score.weight"),
        ({f"{prefix}.q_proj.lora_B.weight": None}, r"lacks 1 tensors .*q_proj.lora_B"),
        ({"base_model.model.lm_head.weight": None}, r"lacks 1 tensors .*lm_head.weight"),
        ({f"{prefix}.q_proj.lora_A.weight": torch.ones(4, 32)}, "cannot be applied .*size mismatch"),
        ({"base_model.model.lm_head.weight": torch.ones(900, 64)}, "holds 900 token embeddings, and this"),
    ):
        edited = {key: tensor for key, tensor in (tensors | changed).items() if tensor is not None}
        save_file(edited, folder / ADAPTER_WEIGHTS_FILE)
        with pytest.raises(UserError, match=message) as error, load_defense(folder).apply_to(model):
            pass
        assert "\n" not in str(error.value)
        assert states_equal(copy_state(model), before)


def test_pickled_and_damaged_weights_are_rejected(tmp_path: Path) -> None:
    folder, _ = write_peft_folder(tmp_path / "a", lora())
    (folder / ADAPTER_WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        load_defense(folder)
    (folder / ADAPTER_WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"lacks adapter_model\.safetensors.*pickled weights, \.bin"):
        load_defense(folder)


def test_values_that_are_no_numbers_are_rejected(tmp_path: Path) -> None:
    folder, _ = write_peft_folder(tmp_path / "a", lora())
    tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    tensors[key][0, 0] = torch.nan
    save_file(tensors, folder / ADAPTER_WEIGHTS_FILE)
    model = fresh_model()
    before = copy_state(model)
    with pytest.raises(UserError, match=r"no numbers.*q_proj\.lora_A.*obtain it again"):
        load_defense(folder).apply_to(model).__enter__()
    assert states_equal(copy_state(model), before)


def test_quantized_weights_are_not_merged(tmp_path: Path) -> None:
    folder, _ = write_peft_folder(tmp_path / "a", lora())
    packed, small, elsewhere = fresh_model(), fresh_model(), fresh_model()
    integers = torch.zeros(30720, 1, dtype=torch.uint8)
    packed.lm_head.weight = torch.nn.Parameter(integers, requires_grad=False)
    floats = small.lm_head.weight.detach().to(torch.float8_e4m3fn)
    small.lm_head.weight = torch.nn.Parameter(floats, requires_grad=False)
    del elsewhere.lm_head.weight
    elsewhere.lm_head.register_buffer("qweight", integers)
    for model in (packed, small, elsewhere):
        with pytest.raises(UserError, match=r"lm_head\.weight of this model is quantized"):
            load_defense(folder).apply_to(model).__enter__()


# --- several adapters -------------------------------------------------------------------------------------


@pytest.fixture
def two_folders(tmp_path: Path) -> list[Path]:
    """Two adapters in folders of the same name, the second with a module of its own."""
    configs = lora(use_dora=True), lora(target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    for seed, config in enumerate(configs):
        write_peft_folder(tmp_path / "ab"[seed] / "best", config, seed=seed)
    return [tmp_path / "a" / "best", tmp_path / "b" / "best"]


def test_stacked_adapters_add_up_as_in_peft(two_folders: list[Path]) -> None:
    first, second = two_folders
    peft_model = PeftModel.from_pretrained(fresh_model(), first, adapter_name="first")
    peft_model.load_adapter(str(second), "second")
    peft_model.base_model.set_adapter(["first", "second"])
    model = fresh_model()
    before = copy_state(model)
    defenses: list[Any] = choose_defenses([str(first), str(second), f"{first}+{second}"], [])
    assert [defense.name for defense in defenses] == ["none", "a-best", "b-best", "a-best+b-best"]
    _, alone, _, stack = [defense.prepare(MODEL_INFO) for defense in defenses]
    with alone.apply_to(model):
        of_first = compute_logits(model)
    with stack.apply_to(model):
        assert torch.allclose(compute_logits(model), compute_logits(peft_model), atol=1e-4)
        assert (compute_logits(model) - of_first).abs().max() > 0.1
    assert states_equal(copy_state(model), before)
    options = describe_options(RunSpec("toy", "twins"), defenses)
    assert options["not_repeatable"] is None
    assert choose_defenses(options["defenses"], options["settings"]) == defenses
    merge_adapter(model, load_external_adapter(second, MODEL_INFO))
    with stack.apply_to(model):  # the state is replaced
        assert torch.allclose(compute_logits(model), compute_logits(peft_model), atol=1e-4)


def test_adapters_that_replace_the_same_module_are_not_stacked(tmp_path: Path) -> None:
    folders = [write_peft_folder(tmp_path / name, lora(modules_to_save=["lm_head"]))[0] for name in "ab"]
    stack: Any = get_defense("+".join(map(str, folders))).prepare(MODEL_INFO)
    with pytest.raises(UserError, match="cannot be applied together: Only one adapter") as error:
        stack.apply_to(fresh_model()).__enter__()
    assert "\n" not in str(error.value)


# --- an adapter as the state of a model, with tokens of its own ---------------------------------------------


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("saved", [{"modules_to_save": EMBEDDINGS}, {"trainable_token_indices": [960, 961]}])
def test_an_adapter_extends_the_vocabulary_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, saved: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT would ask the hub for the size of the vocabulary
    base = save_model(tmp_path / "base", family)
    model = load_model(str(base), "cpu").model
    assert len(model.get_input_embeddings().weight) == 960
    model.resize_token_embeddings(962, mean_resizing=False)
    folder, peft_model = write_peft_folder(tmp_path / "chat", lora(**saved), model)
    tokenizer = toy_tokenizer("llama3")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    loaded = load_model(f"{base}:{folder}", "cpu")
    assert torch.allclose(compute_logits(loaded.model), compute_logits(peft_model), atol=1e-4)
    assert (
        loaded.tokenizer.chat_template == tokenizer.chat_template
        and "<extra>" in loaded.tokenizer.get_vocab()
    )
    lines: list[str] = []
    model_info = replace(MODEL_INFO, tokenizer=toy_tokenizer("chatml"), notify=lines.append)
    defense: Any = get_defense(str(folder)).prepare(model_info)
    assert "the tokens <extra>" in lines[0] and "another chat template" in lines[0]
    with pytest.raises(UserError, match=r"holds 962 token embeddings, and this model has 960.*-m MODEL:"):
        defense.apply_to(tiny_model(family)).__enter__()
    with pytest.raises(UserError, match="vocabulary of this state of the model was extended"):
        defense.apply_to(loaded.model).__enter__()


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
