"""Removal of the refusal direction from the weights, against projections by hooks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import fresh_model, make_toy_session

from analysis.mechanism.abliteration import DIRECTION_DEPTH, remove_refusal_direction
from analysis.mechanism.directions import record_last_token_states
from defenses.contract import MeanActivations
from defenses.errors import UserError

PROMPTS = [(301, 302, 303), (305, 301, 309, 311, 302)]


def open_session(family: str) -> Any:
    """Return a session with a new tiny model."""
    session = make_toy_session(family)
    loaded = replace(session.loaded_model, model=fresh_model(family))
    return type(session).from_model(loaded)


def draw_activations(session: Any) -> MeanActivations:
    """Return random means for each layer of a model."""
    config = session.loaded_model.model.config
    generator = torch.Generator().manual_seed(0)
    shape = config.num_hidden_layers, config.hidden_size
    harmful, benign = (torch.randn(shape, generator=generator) for _ in range(2))
    return MeanActivations(harmful, benign, frozenset(), "")


def compute_logits(session: Any) -> torch.Tensor:
    """Return the first-token logits of some prompts."""
    return session.engine.read_first_token(PROMPTS, lambda logits: logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_weights_do_what_projections_of_their_outputs_do(family: str) -> None:
    session = open_session(family)
    activations = draw_activations(session)
    layer = int(DIRECTION_DEPTH * len(activations.harmful))
    difference = activations.harmful[layer] - activations.benign[layer]
    unit = difference / difference.norm()
    projected = open_session(family)
    model: Any = projected.loaded_model.model
    if family == "gpt2":
        writers = [part for block in model.transformer.h for part in (block.attn.c_proj, block.mlp.c_proj)]
    else:
        layers = model.model.layers
        writers = [part for block in layers for part in (block.self_attn.o_proj, block.mlp.down_proj)]
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    with ExitStack() as stack:
        for module in (*embeddings, *writers):
            hook = module.register_forward_hook(
                lambda _, args, output: output - (output @ unit)[..., None] * unit
            )
            stack.callback(hook.remove)
        expected, states = compute_logits(projected), record_last_token_states(projected, PROMPTS)
    before = compute_logits(projected)
    remove_refusal_direction(session, activations)
    assert (states @ unit).abs().max() < 1e-5
    torch.testing.assert_close(compute_logits(session), expected, atol=1e-5, rtol=1e-4)
    assert (expected - before).abs().max() > 1e-3
    # The output layer is not changed, although some models use the embedding as such.
    assert torch.equal(session.loaded_model.model.lm_head.weight, model.lm_head.weight)


def test_norms_behind_the_attention_are_noticed() -> None:
    session = open_session("gemma2")
    with torch.no_grad():
        for block in session.loaded_model.model.model.layers:
            block.post_attention_layernorm.weight.normal_()
    with pytest.raises(UserError, match=r"Gemma2ForCausalLM writes along .* use -d direction_ablation"):
        remove_refusal_direction(session, draw_activations(session))
