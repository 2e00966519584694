"""Contributions add up to the margin: in every model family, with hooks, tuned weights, several prompts."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import (
    FAMILIES,
    TOY_READOUT,
    fresh_model,
    make_adapter,
    make_toy_session,
    render_query,
    tiny_model,
    toy_tokenizer,
)
from torch import nn

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.loading import load_queries
from analysis.mechanism.attribution import DirectLogitAttribution
from analysis.mechanism.components import locate_components
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from analysis.run import score_condition
from analysis.stats.tables import Decomposition, ModelPart
from defenses.adapters import apply_adapter, load_adapter
from defenses.catalog import get_defense
from defenses.contract import Defense, ModelInfo
from defenses.errors import UserError
from defenses.steering import change_block_input, get_blocks

QUERIES = load_queries("contrast").select_split("test").limit_queries(6).queries
NONE, REMINDER = get_defense("none"), get_defense("self_reminder")


def make_attribution(session: ModelSession, readout: Readout = TOY_READOUT) -> DirectLogitAttribution:
    return DirectLogitAttribution(locate_components(session.loaded_model.model), readout)


def make_session(model: nn.Module) -> ModelSession:
    return ModelSession.from_model(LoadedModel("toy", model, toy_tokenizer(), {"id": "toy"}))


def score_margins(session: ModelSession, defense: Defense, queries, readout: Readout = TOY_READOUT):
    return score_condition(session, defense.name, defense, queries, readout)["margin"].to_numpy()


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_contributions_add_up_to_the_scored_margins(family):
    session = make_toy_session(family)
    queries = QUERIES if family != "gpt2" else QUERIES[:2]  # its context is short
    n_layers = len(locate_components(session.loaded_model.model).layers)
    for defense in (NONE, REMINDER):
        attribution = make_attribution(session).attribute_margins(
            session, defense, DIRECT_ATTACK.build_query_chats(queries)
        )
        scored = score_margins(session, defense, queries)
        assert np.abs(attribution.margins - scored).max() < 1e-5
        assert attribution.parts is not None
        assert np.abs(attribution.parts.contributions.sum(1) - scored).max() < 1e-5
        assert np.abs(attribution.margins_by_layer[:, -1] - scored).max() < 1e-5
        heads = [column for column, part in enumerate(attribution.parts.parts) if part.kind == "head"]
        assert len(heads) == 4 * n_layers
        assert (np.abs(attribution.parts.contributions[:, heads]).max(0) > 1e-4).all()  # none is omitted


def test_the_biases_of_output_projections_are_attributed():
    model = fresh_model("gpt2")  # random models have biases of 0
    for block in model.transformer.h:
        block.attn.c_proj.bias.data = torch.linspace(-0.1, 0.1, len(block.attn.c_proj.bias))
    session = make_session(model)
    parts = (
        make_attribution(session)
        .attribute_margins(session, NONE, DIRECT_ATTACK.build_query_chats(QUERIES[:2]))
        .parts
    )
    scored = score_margins(session, NONE, QUERIES[:2])
    assert np.abs(parts.contributions.sum(1) - scored).max() < 1e-5
    biases = [part.kind == "bias" and part.layer is not None for part in parts.parts]
    assert (np.abs(parts.contributions[:, biases]).max(0) > 1e-4).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_equal_the_outputs_that_transformer_lens_records(family):
    """A second derivation: outputs from a bridge on a copy, and the linear readout written out here."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    session = make_toy_session(family)
    direct_attribution = make_attribution(session)
    (query,) = QUERIES[:1]
    (prompt,) = render_query(session, REMINDER, query)
    contributions = direct_attribution.attribute_margins(
        session, REMINDER, DIRECT_ATTACK.build_query_chats([query])
    ).parts.contributions[0]
    model = copy.deepcopy(tiny_model(family))
    full_logits = model(torch.tensor([prompt.ids])).logits[0, -1]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    unembedding = model.get_output_embeddings().weight.detach()
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(torch.tensor([prompt.ids]))
    assert (logits[0, -1] - full_logits).abs().max() < 1e-4
    n_layers = len(direct_attribution.components.layers)
    last = cache[f"blocks.{n_layers - 1}.hook_resid_post"][0, -1]
    gain, eps = weights["model.norm.weight"] + ("gemma" in family), 1e-6
    scale = (last.pow(2).mean() + eps).sqrt()
    raw_logits = unembedding @ (gain * last / scale)
    cap = getattr(model.config, "final_logit_softcapping", None)
    capped_logits = raw_logits if cap is None else cap * torch.tanh(raw_logits / cap)
    assert (capped_logits - full_logits).abs().max() < 1e-4
    ids = list(TOY_READOUT.ids)
    slopes = (capped_logits / raw_logits)[ids] * torch.tensor(TOY_READOUT.weights)
    direction = (slopes @ unembedding[ids]) * gain / scale
    parts = direct_attribution.parts
    for layer in range(n_layers):
        mlp = cache[f"blocks.{layer}.hook_mlp_out"][0, -1]
        contribution = contributions[parts.index(ModelPart("mlp", layer))]
        assert contribution == pytest.approx(float(mlp @ direction), abs=1e-4)
        attention = cache[f"blocks.{layer}.hook_attn_out"][0, -1]
        in_attention = [part.layer == layer and part.kind in ("head", "bias") for part in parts]
        assert contributions[in_attention].sum() == pytest.approx(float(attention @ direction), abs=1e-4)
        # A single head: the output projection of its own values, the other heads set to 0.
        if family.startswith("gemma"):
            continue  # a norm follows the output projection, so only the sum over heads can be compared
        head_outputs = cache[f"blocks.{layer}.attn.o.hook_in"][0, -1].flatten()
        single_head = torch.zeros_like(head_outputs)
        size = len(head_outputs) // 4
        single_head[size : 2 * size] = head_outputs[size : 2 * size]
        output = weights[f"model.layers.{layer}.self_attn.o_proj.weight"] @ single_head
        contribution = contributions[parts.index(ModelPart("head", layer, 1))]
        assert contribution == pytest.approx(float(output @ direction), abs=1e-4)


def test_what_a_defense_adds_between_blocks_is_a_component():
    @dataclass(frozen=True)
    class ShiftedStream(Defense):
        """Adds a constant to the input of block 1."""

        def rewrite(self, chat, rng):
            return list(chat)

        def apply_to(self, model):
            return change_block_input(get_blocks(model)[1], lambda states: states + 0.5)

        def weights_fingerprint(self):
            return "shifted"

    session = make_session(fresh_model())
    parts = (
        make_attribution(session)
        .attribute_margins(session, ShiftedStream(), DIRECT_ATTACK.build_query_chats(QUERIES))
        .parts
    )
    largest = dict(zip(parts.parts, np.abs(parts.contributions).max(0), strict=True))
    assert largest[ModelPart("added", 1)] > 0.01
    assert largest[ModelPart("added", 0)] < 1e-6 and largest[ModelPart("added", 2)] < 1e-6
    assert not get_blocks(session.loaded_model.model)[1]._forward_pre_hooks


def test_margins_of_tuned_weights_and_of_several_prompts_are_attributed(tmp_path):
    session = make_toy_session()
    adapter = load_adapter(make_adapter(tmp_path / "a"))
    tuned = replace(get_defense("safety_tuning"), adapter=adapter)
    attribution = make_attribution(session).attribute_margins(
        session, tuned, DIRECT_ATTACK.build_query_chats(QUERIES)
    )
    with apply_adapter(session.loaded_model.model, adapter):
        expected = make_attribution(session).attribute_margins(
            session, NONE, DIRECT_ATTACK.build_query_chats(QUERIES)
        )
    assert np.allclose(attribution.parts.contributions, expected.parts.contributions, atol=1e-6)
    model_info = ModelInfo("toy", session.loaded_model.tokenizer, ())
    for name in ("smooth_llm", "erase_and_check"):
        defense = get_defense(name).prepare(model_info)
        attribution = make_attribution(session).attribute_margins(
            session, defense, DIRECT_ATTACK.build_query_chats(QUERIES[:3])
        )
        scored = score_margins(session, defense, QUERIES[:3])
        assert np.abs(attribution.parts.contributions.sum(1) - scored).max() < 1e-5


def test_the_margins_of_several_questions_are_averaged():
    session = make_toy_session()
    readout = replace(TOY_READOUT, questions=("Refuse {request}? Yes or No.", "{request}: No or Yes?"))
    attribution = make_attribution(session, readout).attribute_margins(
        session, REMINDER, DIRECT_ATTACK.build_query_chats(QUERIES[:3])
    )
    scored = score_margins(session, REMINDER, QUERIES[:3], readout)
    assert np.abs(attribution.parts.contributions.sum(1) - scored).max() < 1e-5


def test_an_error_says_that_the_stream_changes_between_the_blocks_of_an_unmodified_model():
    model = fresh_model()
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1.0, *args[1:]))
    session = make_session(model)
    with pytest.raises(UserError, match="the stream between its blocks changes the margin by"):
        make_attribution(session).attribute_margins(
            session, NONE, DIRECT_ATTACK.build_query_chats(QUERIES[:2])
        )


def test_an_error_says_that_contributions_do_not_add_up():
    session = make_toy_session("bloom")  # its attention adds the residual stream itself
    with pytest.raises(UserError, match="BloomForCausalLM: the sum of its components misses the margin by"):
        make_attribution(session).attribute_margins(
            session, NONE, DIRECT_ATTACK.build_query_chats(QUERIES[:2])
        )
    with pytest.raises(ValueError, match="differ from the margin by 1 nats"):
        Decomposition((ModelPart("embedding"),), np.ones((2, 1)), np.zeros(2))


def test_half_precision_has_a_logit_lens_and_no_contributions():
    session = make_session(fresh_model().bfloat16())
    attribution = make_attribution(session).attribute_margins(
        session, NONE, DIRECT_ATTACK.build_query_chats(QUERIES[:2])
    )
    assert attribution.parts is None and attribution.margins_by_layer.shape == (2, 3)
    assert np.abs(attribution.margins_by_layer[:, -1] - attribution.margins).max() < 0.1


def test_a_defense_may_change_the_final_norm():
    @dataclass(frozen=True)
    class OtherGains(Defense):
        """Changes the gains of the final norm."""

        def rewrite(self, chat, rng):
            return list(chat)

        @contextmanager
        def apply_to(self, model):
            weight = model.model.norm.weight
            original = weight.data
            try:
                weight.data = original * torch.linspace(0.5, 1.5, len(original))
                yield
            finally:
                weight.data = original

        def weights_fingerprint(self):
            return "other gains"

    session = make_toy_session()
    direct_attribution = make_attribution(session)
    direct_attribution.attribute_margins(session, NONE, DIRECT_ATTACK.build_query_chats(QUERIES[:2]))
    attribution = direct_attribution.attribute_margins(
        session, OtherGains(), DIRECT_ATTACK.build_query_chats(QUERIES[:2])
    )
    with OtherGains().apply_to(session.loaded_model.model):
        expected = make_attribution(session).attribute_margins(
            session, NONE, DIRECT_ATTACK.build_query_chats(QUERIES[:2])
        )
    assert np.allclose(attribution.parts.contributions, expected.parts.contributions, atol=1e-6)


def test_an_attribution_leaves_the_model_unchanged():
    session = make_session(fresh_model())
    model = session.loaded_model.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_attribution(session).attribute_margins(
        session, REMINDER, DIRECT_ATTACK.build_query_chats(QUERIES[:2])
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
