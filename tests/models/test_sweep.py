"""Every causal architecture of the installed transformers: margins and responses are those of plain passes.

These tests are marked `sweep`, take some minutes, and run by `make sweep` only. `REWRITE=1 make sweep` writes
the table of docs/models.md; check the difference before you commit it.
"""

from __future__ import annotations

import inspect
import math
import os
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from analysis.models.batches import BatchForm
from analysis.models.engine import Engine
from analysis.models.generation import generate_token_ids
from analysis.models.plain_passes import FORM_PHRASES, choose_batch_form, compute_plain_logits
from defenses.errors import UserError

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
TABLE = re.compile(r"^\| result .*\n(?:^\|.*\n)+", re.MULTILINE)
VOCAB = 128
MAX_PARAMETERS = 1e8
# Gaps in standard deviations of the logits.
TOLERANCE = 2e-3

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
# Set only where the configuration has them.
MORE_SIZES = {
    "attention_chunk_size": 8,
    "d_ff": 64,
    "d_model": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "decoder_layers": 4,
    "embedding_size": 32,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "encoder_layers": 1,
    "expand_ratio": 2,
    "ffn_dim": 64,
    "first_k_dense_replace": 1,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "moe_intermediate_size": 32,
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_topk": 2,
    "n_embd": 32,
    "n_group": 1,
    "n_head": 4,
    "n_inner": 64,
    "n_layer": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "num_expert_group": 1,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "num_local_experts": 4,
    "rotary_dim": 4,
    "shared_expert_intermediate_size": 32,
    "sliding_window": 8,
    "state_size": 8,
    "topk_group": 1,
    "vocab_size_per_layer_input": VOCAB,
}
LATENT = {  # multi-head latent attention
    "kv_lora_rank": 16,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
TOWER = {  # the encoder of images or sounds
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 14,
}
ALTERNATE = ["sliding_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PART = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
# What single architectures need besides.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **dict.fromkeys(("patcher_config", "encoder_config", "decoder_config", "global_config"), PART),
    },
    "cohere_compass_text": {
        "layer_types": ALTERNATE,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "dbrx": {
        "n_heads": 4,
        "n_layers": 4,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "layer_types": ALTERNATE,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8, "num_layers": 4},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "prophetnet": {"num_decoder_layers": 4, "num_decoder_attention_heads": 4, "num_encoder_layers": 1},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 16),
        "attention_head_size": 8,
        "feed_forward_size": 64,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 12, "attn_layer_period": 6, "attn_layer_offset": 4, "n_mamba_heads": 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
        "num_query_groups": 4,
        "kv_channels": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
WITHOUT = {
    "falcon": ("head_dim",),
    "prophetnet": ("num_hidden_layers",),
    "reformer": ("num_hidden_layers", "intermediate_size", "num_key_value_heads", "head_dim"),
    "xlnet": ("max_position_embeddings",),
    "zamba2": ("head_dim",),
}


@dataclass(frozen=True)
class Reading:
    """What became of an architecture.

    Attributes:
        class_name: of transformers.
        outcome: `right`, `refused`, `not built`, or what is wrong.
        detail: the form of batches, or the reason.
    """

    class_name: str
    outcome: str
    detail: str


def collect_sizes(model_type: str) -> dict[str, Any]:
    """Return the settings of a tiny model of an architecture; of a composite one, of all its parts."""
    # Some configurations are invalid by default.
    fields = inspect.signature(CONFIG_MAPPING[model_type]).parameters
    sub_configs = CONFIG_MAPPING[model_type].sub_configs
    if "text_config" in sub_configs:
        text_class = sub_configs["text_config"]
        if text_class is AutoConfig:
            text_class = type(AutoConfig.for_model(model_type).text_config)
        text_type = text_class.model_type
        towers = {name: TOWER for name in sub_configs if name in ("vision_config", "audio_config")}
        own = OWN_SIZES.get(model_type, {})
        return {"text_config": {"model_type": text_type, **collect_sizes(text_type)}, **towers, **own}
    try:
        names = {*fields, *AutoConfig.for_model(model_type).to_dict()}
    except Exception:
        names = set(fields)
    sizes = SIZES | {name: value for name, value in MORE_SIZES.items() if name in names}
    if "kv_lora_rank" in names:
        sizes |= {name: value for name, value in LATENT.items() if name in {*names, "num_key_value_heads"}}
        del sizes["head_dim"]
    sizes |= OWN_SIZES.get(model_type, {})
    return {name: value for name, value in sizes.items() if name not in WITHOUT.get(model_type, ())}


def build_model(model_type: str, is_decoder: bool = False) -> Any:
    """Return a tiny model of an architecture, with random weights large enough for every part to matter."""
    sizes = collect_sizes(model_type)
    if is_decoder:
        sizes["is_decoder"] = True
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n_parameters > MAX_PARAMETERS:
        raise ValueError(f"{n_parameters / 1e6:,.0f} million parameters with the sizes set here")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.5 / math.sqrt(parameter.shape[-1]))
            elif parameter.ndim == 1 and "A_log" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def draw_tokens(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(4, VOCAB - 8) for _ in range(length)]


SHARED = draw_tokens(12, 0)
MERGED = draw_tokens(4, 1)
PROMPTS = [
    [*SHARED, *draw_tokens(1, 2)],
    [*SHARED, *MERGED, *draw_tokens(3, 3)],
    [*SHARED, *MERGED, *draw_tokens(2, 4)],
    [*SHARED, *draw_tokens(20, 5)],
]


def generate_plainly(model: Any, prompt: list[int], n_tokens: int) -> list[int]:
    """Return greedy tokens by plain forward passes, up to the first near tie, which rounding decides."""
    sequence = list(prompt)
    for _ in range(n_tokens):
        logits = compute_plain_logits(model, sequence)[-1]
        first, second = logits.topk(2).values
        if first - second < 0.02 * logits.std():
            break
        sequence.append(int(logits.argmax()))
    return sequence[len(prompt) :]


@cache
def read_architecture(model_type: str, is_decoder: bool = False) -> Reading:
    """Read the prompts with a tiny model of an architecture and compare with plain passes."""
    class_name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    try:
        model = build_model(model_type, is_decoder)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Reading(class_name, "not built", f"{type(error).__name__}: {lines[-1] if lines else ''}"[:110])
    class_name = type(model).__name__
    try:
        form, _ = choose_batch_form(model)
    except UserError as error:
        if "cannot run" in str(error):
            return Reading(class_name, "not built", "transformers cannot run it with the sizes set here")
        return Reading(class_name, "refused", str(error).removeprefix(f"{class_name} "))
    plain = torch.stack([compute_plain_logits(model, prompt)[-1] for prompt in PROMPTS])
    engine = Engine(model, batch_form=form)
    gap = float((engine.read_first_token(PROMPTS, lambda logits: logits) - plain).abs().max() / plain.std())
    if not gap <= TOLERANCE:
        return Reading(class_name, f"logits differ by {gap:.2g} SD", form)
    wanted = [generate_plainly(model, prompt, 6) for prompt in PROMPTS]
    responses = generate_token_ids(engine, PROMPTS, 6, frozenset())
    if any(response[: len(tokens)] != tokens for response, tokens in zip(responses, wanted, strict=True)):
        return Reading(class_name, "responses differ", form)
    return Reading(class_name, "right", form)


def read_variants(model_type: str) -> list[Reading]:
    """Read an architecture as it is by default, and as a decoder if it attends to later tokens by default."""
    readings = [read_architecture(model_type)]
    if (
        readings[0].outcome == "refused"
        and "is_decoder" in inspect.signature(CONFIG_MAPPING[model_type]).parameters
    ):
        decoder = read_architecture(model_type, is_decoder=True)
        readings += [decoder] if decoder.outcome != "refused" else []
    return readings


@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_an_architecture_is_read_right_or_refused(model_type: str) -> None:
    readings = read_variants(model_type)
    if readings[0].outcome == "not built":
        pytest.skip(readings[0].detail)
    assert all(reading.outcome in ("right", "refused") for reading in readings), readings


def test_the_page_on_models_lists_what_is_read_right() -> None:
    page = PAGE.read_text("utf-8")
    table = format_table()
    if os.environ.get("REWRITE"):
        page = TABLE.sub(lambda match: table, page)
        PAGE.write_text(page, "utf-8")
    assert TABLE.findall(page) == [table]


def format_table() -> str:
    """Return the table of all architectures, by what became of them."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for reading in read_variants(model_type):
            label = f"`{model_type}`"
            detail = FORM_PHRASES[BatchForm(reading.detail)] if reading.outcome == "right" else ""
            if reading.outcome != "right":
                label += f" ({reading.detail.partition(' (its')[0].partition(': use another')[0]})"
            elif len(read_variants(model_type)) > 1:
                label += " as a decoder"
            groups[reading.outcome, detail].append(label)
    order = [("right", phrase) for phrase in FORM_PHRASES.values()]
    order += [(outcome, "") for outcome in ("refused", "not built")]
    rows = [
        f"| {outcome} | {detail} | {len(groups[outcome, detail])} | {', '.join(groups[outcome, detail])} |\n"
        for outcome, detail in [*order, *sorted(set(groups) - set(order))]
        if groups[outcome, detail]
    ]
    return "| result | run in | number | architectures |\n|---|---|---|---|\n" + "".join(rows)
