"""The form of batches follows from a comparison with plain passes, in float32 and in half precision."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from conftest import VOCAB, fresh_model, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from analysis.models.batches import BatchForm, CacheUse
from analysis.models.engine import Engine
from analysis.models.generation import generate_token_ids
from analysis.models.plain_passes import (
    choose_batch_form,
    compute_plain_logits,
    draw_probe_prompts,
    run_in_float32,
)
from defenses.errors import UserError

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# Model type → settings, and the form of batches in which it is read right.
ARCHITECTURES: dict[str, tuple[dict[str, Any], BatchForm]] = {
    "llama": ({}, BatchForm.PACKED),
    "deepseek_v3": (LATENT, BatchForm.REPEATED),  # packed rows crash
    "diffllama": ({}, BatchForm.REPEATED),  # packed rows would be wrong
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, BatchForm.REPEATED),
    "rwkv": ({"attention_hidden_size": 32, "context_length": 128}, BatchForm.PADDED),  # ignores cached keys
    "roberta": ({"is_decoder": True}, BatchForm.EQUAL),  # counts positions from 2
}


@cache
def build_model(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny model, with random weights large enough for every part to matter."""
    torch.manual_seed(0)
    sizes = SIZES | ARCHITECTURES.get(model_type, ({},))[0]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    return model.to(dtype)


PROMPTS = [[*range(20, 32), *tail] for tail in ([40], [50, 51, 52, 53], [50, 51, 60, 61], range(70, 79))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_fastest_form_is_chosen_that_agrees_with_plain_passes(
    model_type: str, dtype: torch.dtype
) -> None:
    model, expected = build_model(model_type, dtype), ARCHITECTURES[model_type][1]
    form, notice = choose_batch_form(model)
    assert form is expected
    is_notable = model_type in ("deepseek_v3", "diffllama", "rwkv", "roberta")
    assert (type(model).__name__ in notice) == is_notable and bool(notice) == is_notable
    if dtype == torch.float32:
        plain = torch.stack([compute_plain_logits(model, prompt)[-1] for prompt in PROMPTS])
        logits = Engine(model, batch_form=form).read_first_token(PROMPTS, lambda logits: logits)
        assert (logits - plain).abs().max() < 1e-3 * plain.std()


@pytest.mark.parametrize("model_type", ["mpt", "rwkv", "roberta", "deepseek_v3"])
def test_responses_are_those_of_plain_passes(model_type: str) -> None:
    model = build_model(model_type)
    engine = Engine(model, batch_form=ARCHITECTURES[model_type][1])
    wanted = []
    for prompt in PROMPTS:
        sequence = list(prompt)
        for _ in range(4):
            sequence.append(int(compute_plain_logits(model, sequence)[-1].argmax()))
        wanted.append(sequence[len(prompt) :])
    assert generate_token_ids(engine, PROMPTS, 4, frozenset()) == wanted
    # MPT loses count of positions behind padding; transformers' cache of RWKV and RoBERTa is of no use here.
    uses = {"mpt": CacheUse.EQUAL, "deepseek_v3": CacheUse.PADDED}
    assert engine.cache_uses[False] is uses.get(model_type, CacheUse.NONE)
    assert bool(engine.notices) == (engine.cache_uses[False] is CacheUse.NONE)


def test_a_model_that_reads_later_tokens_is_refused() -> None:
    with pytest.raises(UserError, match=r'no causal language model: .*"is_decoder": true'):
        choose_batch_form(build_model("bert"))


def test_a_model_that_does_not_run_on_text_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model()

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("pixel_values are missing\nhere")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(UserError, match=r"on text alone \(ValueError: pixel_values are missing\)"):
        choose_batch_form(model)


def test_without_sharing_whole_prompts_are_padded_and_without_a_line() -> None:
    assert choose_batch_form(tiny_model(), share_prefix=False) == (BatchForm.PADDED, "")
    engine = Engine(tiny_model(), batch_form=BatchForm.PADDED)
    engine.read_first_token(PROMPTS, lambda logits: logits)
    assert engine.work_counter.saved_tokens == 0


def test_a_model_whose_logits_are_no_numbers_is_left_to_the_preflight() -> None:
    model = fresh_model()
    with torch.no_grad():
        model.lm_head.weight[:] = torch.nan
    assert choose_batch_form(model) == (BatchForm.PACKED, "")


def test_half_precision_is_measured_again_in_float32_which_leaves_the_weights_alone() -> None:
    model = fresh_model("qwen3").bfloat16()  # with tied embeddings
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wide = copy.deepcopy(model).float()
    prompt = draw_probe_prompts(model)[0]
    with run_in_float32(model):
        logits = compute_plain_logits(model, prompt)
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[VOCAB]]))
    assert torch.equal(logits, compute_plain_logits(wide, prompt))
    assert not torch.equal(logits, compute_plain_logits(model, prompt))
    after = model.state_dict()
    assert all(
        torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_model_that_rounds_by_the_whole_batch_is_run_one_prompt_at_a_time() -> None:
    model = fresh_model()

    def round_by_largest(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        step = output.abs().max() / 256  # of all tokens of all prompts, as in bitsandbytes' 8 bits
        return (output / step).round() * step

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(round_by_largest)
    form, reason = choose_batch_form(model)
    assert form is BatchForm.SINGLE
    assert "is run with passes of one prompt each, which takes longer" in reason
    prompts = draw_probe_prompts(model)
    plain = torch.stack([compute_plain_logits(model, prompt)[-1] for prompt in prompts])
    engine = Engine(model, batch_size=8, batch_form=form)
    torch.testing.assert_close(engine.read_first_token(prompts, lambda logits: logits), plain)
