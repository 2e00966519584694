"""Prompts on both sides of a line where rotary positions change are read as each is alone."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from conftest import VOCAB
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from analysis.models.batches import BatchForm
from analysis.models.engine import Engine
from analysis.models.generation import generate_token_ids
from analysis.models.plain_passes import compute_plain_logits
from analysis.models.rotation import RotationSchedule

LIMIT = 16
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.2, 2.0, 4.0, 10.0, 20.0, 40.0, 64.0],
    "original_max_position_embeddings": LIMIT,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def build_model(kind: str) -> Any:
    """Return a new tiny model whose rotation changes beyond `LIMIT` tokens, as just loaded."""
    torch.manual_seed(0)
    if kind == "longrope":
        config = Phi3Config(
            **SIZES,
            max_position_embeddings=128,
            original_max_position_embeddings=LIMIT,
            rope_parameters=LONGROPE,
        )
        return Phi3ForCausalLM(config).eval()
    if kind == "scaled longrope":
        scales = {"short_mscale": 1.0, "long_mscale": 1.4}
        config = PhimoeConfig(
            **SIZES,
            max_position_embeddings=128,
            num_local_experts=2,
            rope_parameters=LONGROPE | scales,
        )
        return PhimoeForCausalLM(config).eval()
    if kind == "dynamic by layer":
        config = Gemma3TextConfig(
            **SIZES,
            head_dim=16,
            max_position_embeddings=LIMIT,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=64,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": DYNAMIC,
            },
        )
        return Gemma3ForCausalLM(config).eval()
    config = LlamaConfig(**SIZES, max_position_embeddings=LIMIT, rope_parameters=DYNAMIC)
    return LlamaForCausalLM(config).eval()


KINDS = ("longrope", "scaled longrope", "dynamic", "dynamic by layer")


def draw(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(10, VOCAB) for _ in range(length)]


SHARED = draw(8, 0)
# Short and long prompts, at the line and next to it; two long ones share a start beyond the line.
BEYOND = [*SHARED, *draw(12, 9)]
PROMPTS = [
    *([*SHARED, *draw(length - 8, length)] for length in (30, 12, LIMIT, LIMIT + 1, 9, 30)),
    *([*BEYOND, *draw(3, seed)] for seed in (20, 21)),
]


def read_alone(kind: str, prompt: list[int]) -> Tensor:
    """Return the logits at every token, from a plain pass of a model that has read nothing before."""
    model = build_model(kind)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]


@cache
def read_prompts_alone(kind: str) -> Tensor:
    return torch.stack([read_alone(kind, prompt)[-1] for prompt in PROMPTS])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_across_the_line_equals_each_prompt_alone(kind: str) -> None:
    wanted, model = read_prompts_alone(kind), build_model(kind)
    for form in BatchForm:
        for batch_size in (None, 2):
            logits = Engine(model, batch_size, form).read_first_token(PROMPTS, lambda logits: logits)
            assert (logits - wanted).abs().max() < 1e-4, (form, batch_size)
    # The line matters to these models.
    model = build_model(kind)
    with torch.inference_mode():
        ids = torch.zeros(2, LIMIT + 4, dtype=torch.long)
        ids[0, : len(PROMPTS[1])] = torch.tensor(PROMPTS[1])
        mixed = model(input_ids=ids, use_cache=False).logits[0, len(PROMPTS[1]) - 1]
    assert (mixed - wanted[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_share_a_prefix_that_is_itself_beyond_the_line_of_longrope(kind: str) -> None:
    engine = Engine(build_model(kind))
    engine.read_first_token(PROMPTS[-2:], lambda logits: logits)
    assert engine.work_counter.saved_tokens == (0 if "dynamic" in kind else len(BEYOND))
    # These share 8 tokens only.
    engine.read_first_token([PROMPTS[0], [*SHARED, *draw(22, 99)]], lambda logits: logits)
    assert engine.work_counter.saved_tokens == (0 if "dynamic" in kind else len(BEYOND))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_forgets_the_rotation_of_earlier_prompts(kind: str) -> None:
    # At exactly the line, transformers itself keeps the frequencies of an earlier, longer sequence.
    model, wanted = build_model(kind), read_prompts_alone(kind)
    for row in (0, 2, 3, 1):
        assert (compute_plain_logits(model, PROMPTS[row])[-1] - wanted[row]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_responses_that_cross_the_line_are_those_of_plain_passes(kind: str) -> None:
    prompts = [PROMPTS[row] for row in (1, 2, 3, 0, 4)]
    wanted = []
    for prompt in prompts:
        sequence = list(prompt)
        for _ in range(6):
            sequence.append(int(read_alone(kind, sequence)[-1].argmax()))
        wanted.append(sequence[len(prompt) :])
    assert generate_token_ids(Engine(build_model(kind)), prompts, 6, frozenset()) == wanted


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_likelihoods_and_single_tokens_are_read_on_the_right_side_of_the_line(kind: str) -> None:
    model = build_model(kind)
    responses = [draw(6, 40 + row) for row in range(len(PROMPTS))]
    found = Engine(model).compute_log_probabilities(PROMPTS, responses)
    for prompt, response, log_probabilities in zip(PROMPTS, responses, found, strict=True):
        sequence = [*prompt, *response[:-1]]
        plain = read_alone(kind, sequence)[len(prompt) - 1 :].log_softmax(-1)
        assert torch.allclose(
            log_probabilities, plain.gather(1, torch.tensor(response)[:, None])[:, 0], atol=1e-4
        )
    with torch.inference_mode():
        for row in (0, 2, 3):
            logits = Engine(model).make_last_token_reader(PROMPTS[row])(2)
            assert (logits - read_prompts_alone(kind)[row]).abs().max() < 1e-4


def test_a_model_without_such_positions_has_one_group() -> None:
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    assert RotationSchedule.from_model(LlamaForCausalLM(config)) == RotationSchedule()
