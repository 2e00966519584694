"""Margins as sums over parts: every family, as TransformerLens sees it, under hooks, weights, readings."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, fresh_model, made_adapter, tiny_model, toy_bench, toy_tokenizer
from torch import nn

from analysis.datasets.loading import load_queries
from analysis.mechanism.attribution import DirectLogitAttribution
from analysis.mechanism.components import NormModule, locate_components
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

ASKED = load_queries("contrast").select_split("test").limit_queries(8).queries
NONE, REMINDER = get_defense("none"), get_defense("self_reminder")
READOUT = Readout("words", ("a", "b", "c"), (300, 301, 302), (0.5, 0.5, -1.0))


def splitter(bench: ModelSession, readout: Readout = READOUT) -> DirectLogitAttribution:
    return DirectLogitAttribution(locate_components(bench.loaded_model.model), readout)


def bench_of(model: nn.Module) -> ModelSession:
    return ModelSession.from_model(LoadedModel("toy", model, toy_tokenizer(), {"id": "toy"}))


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
@pytest.mark.parametrize("defense", [NONE, REMINDER], ids=lambda one: one.name)
def test_parts_add_up_to_the_margins_that_scoring_gives(family, defense):
    bench = toy_bench(family)
    asked = ASKED if family != "gpt2" else ASKED[:2]  # its context is short
    split = splitter(bench).attribute_margins(bench, defense, asked)
    scored = score_condition(bench, defense.name, defense, asked, READOUT)["margin"].to_numpy()
    assert np.abs(split.margins - scored).max() < 1e-5
    assert split.parts is not None and np.abs(split.parts.contributions.sum(1) - scored).max() < 1e-5
    assert np.abs(split.margins_by_layer[:, -1] - scored).max() < 1e-5
    heads = [place for place, part in enumerate(split.parts.parts) if part.kind == "head"]
    assert len(heads) == 4 * len(locate_components(bench.loaded_model.model).layers)
    assert (np.abs(split.parts.contributions[:, heads]).max(0) > 1e-4).all()  # none is left out


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_what_transformer_lens_sees_the_parts_write(family):
    """A second way: its bridge, on a copy, gives what each part writes; the reading is written out here."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    bench = toy_bench(family)
    found = splitter(bench)
    (query,) = ASKED[:1]
    (prompt,) = bench.render_query(REMINDER, query)
    split = found.attribute_margins(bench, REMINDER, [query])
    model = copy.deepcopy(tiny_model(family))
    whole = model(torch.tensor([prompt.ids])).logits[0, -1]
    weights = {name: one.detach().clone() for name, one in model.named_parameters()}
    unembedding = model.get_output_embeddings().weight.detach()
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(torch.tensor([prompt.ids]))
    assert (logits[0, -1] - whole).abs().max() < 1e-4
    last = cache[f"blocks.{len(found.components.layers) - 1}.hook_resid_post"][0, -1]
    gain, eps = weights["model.norm.weight"] + ("gemma" in family), 1e-6
    raw = unembedding @ (gain * last / (last.pow(2).mean() + eps).sqrt())
    cap = getattr(model.config, "final_logit_softcapping", None)
    shown = raw if cap is None else cap * torch.tanh(raw / cap)
    assert (shown - whole).abs().max() < 1e-4
    ids = list(READOUT.ids)
    slopes = (shown / raw)[ids] * torch.tensor(READOUT.weights)
    along = (slopes @ unembedding[ids]) * gain
    along = along / (last.pow(2).mean() + eps).sqrt()
    for layer in range(len(found.components.layers)):
        mlp = cache[f"blocks.{layer}.hook_mlp_out"][0, -1]
        assert split.parts.contributions[0, found.parts.index(ModelPart("mlp", layer))] == pytest.approx(
            float(mlp @ along), abs=1e-4
        )
        attention = cache[f"blocks.{layer}.hook_attn_out"][0, -1]
        mine = [part.layer == layer and part.kind in ("head", "bias") for part in found.parts]
        assert split.parts.contributions[0, mine].sum() == pytest.approx(float(attention @ along), abs=1e-4)
        # A head alone: what the joining matrix makes of its own numbers, the others at nothing.
        if family.startswith("gemma"):
            continue  # a norm stands behind: the sum above is what can be seen
        z = cache[f"blocks.{layer}.attn.o.hook_in"][0, -1].flatten()
        only = torch.zeros_like(z)
        size = len(z) // 4
        only[size : 2 * size] = z[size : 2 * size]
        wrote = weights[f"model.layers.{layer}.self_attn.o_proj.weight"] @ only
        assert split.parts.contributions[0, found.parts.index(ModelPart("head", layer, 1))] == pytest.approx(
            float(wrote @ along), abs=1e-4
        )


def test_what_hooks_add_between_blocks_is_a_part_of_its_own():
    @dataclass(frozen=True)
    class Pushed(Defense):
        """Adds a constant in front of block 1."""

        def rewrite(self, chat, rng):
            return list(chat)

        def apply_to(self, model):
            return change_block_input(get_blocks(model)[1], lambda states: states + 0.5)

        def weights_fingerprint(self):
            return "pushed"

    bench = bench_of(fresh_model())
    split = splitter(bench).attribute_margins(bench, Pushed(), ASKED)
    shares = dict(zip(split.parts.parts, np.abs(split.parts.contributions).max(0), strict=True))
    assert shares[ModelPart("added", 1)] > 0.01
    assert shares[ModelPart("added", 0)] < 1e-6 and shares[ModelPart("added", 2)] < 1e-6
    assert not get_blocks(bench.loaded_model.model)[1]._forward_pre_hooks


def test_tuned_weights_and_many_readings_are_split_too(tmp_path):
    bench = toy_bench()
    tuned = get_defense("safety_tuning")
    adapter = load_adapter(made_adapter(tmp_path / "a"))
    tuned = replace(tuned, adapter=adapter)
    split = splitter(bench).attribute_margins(bench, tuned, ASKED)
    with apply_adapter(bench.loaded_model.model, adapter):
        expected = splitter(bench).attribute_margins(bench, NONE, ASKED)
    assert np.allclose(split.parts.contributions, expected.parts.contributions, atol=1e-6)
    host = ModelInfo("toy", bench.loaded_model.tokenizer, ())
    for name in ("smooth_llm", "erase_and_check"):
        many = get_defense(name).prepare(host)
        split = splitter(bench).attribute_margins(bench, many, ASKED[:3])
        scored = score_condition(bench, name, many, ASKED[:3], READOUT)["margin"].to_numpy()
        assert np.abs(split.parts.contributions.sum(1) - scored).max() < 1e-5


def test_questions_about_a_request_are_averaged():
    bench = toy_bench()
    asking = replace(READOUT, questions=("Refuse {request}? Yes or No.", "{request}: No or Yes?"))
    split = splitter(bench, asking).attribute_margins(bench, REMINDER, ASKED[:3])
    scored = score_condition(bench, "self_reminder", REMINDER, ASKED[:3], asking)["margin"].to_numpy()
    assert np.abs(split.parts.contributions.sum(1) - scored).max() < 1e-5


def test_a_block_that_hands_on_more_than_its_parts_is_refused():
    model = fresh_model()
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1.0, *args[1:]))
    bench = bench_of(model)
    with pytest.raises(UserError, match="what its blocks hand on"):
        splitter(bench).attribute_margins(bench, NONE, ASKED[:2])


def test_what_does_not_add_up_is_refused():
    bench = toy_bench("bloom")  # its attention hands the stream on by itself
    with pytest.raises(UserError, match="BloomForCausalLM: the sum of its parts misses the margin by"):
        splitter(bench).attribute_margins(bench, NONE, ASKED[:2])
    with pytest.raises(ValueError, match="miss the margin by 1"):
        Decomposition((ModelPart("embedding"),), np.ones((2, 1)), np.zeros(2))


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_an_architecture_of_other_parts_is_named_and_what_works_is_said(family):
    with pytest.raises(UserError, match=f"(?i){family}.*`recommend` work on it"):
        locate_components(tiny_model(family))


def test_an_architecture_that_nobody_knows_is_named():
    class OwnForCausalLM(nn.Module):
        config = tiny_model().config
        dtype = torch.float32

    with pytest.raises(UserError, match="does not know the architecture OwnForCausalLM"):
        locate_components(OwnForCausalLM())


def test_half_precision_has_layers_and_no_parts():
    bench = bench_of(fresh_model().bfloat16())
    split = splitter(bench).attribute_margins(bench, NONE, ASKED[:2])
    assert split.parts is None and split.margins_by_layer.shape == (2, 3)
    assert np.abs(split.margins_by_layer[:, -1] - split.margins).max() < 0.1


def test_what_norms_do_is_measured_whatever_they_call_it():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    torch.manual_seed(0)
    layer, gemma = nn.LayerNorm(8), Gemma2RMSNorm(8)
    for parameter in (*layer.parameters(), *gemma.parameters()):
        nn.init.normal_(parameter)
    x, along = torch.randn(5, 8), torch.randn(5, 8)
    for module in (layer, gemma):
        norm = NormModule(module)
        out = module(x)
        back = norm.pull_back_direction(along, norm.measure_scale(x, out))
        assert torch.allclose(
            (x * back).sum(1) + along @ norm.measure_bias(x), (out * along).sum(1), atol=1e-4
        )


def test_a_defense_may_change_the_norms_too():
    @dataclass(frozen=True)
    class Renormed(Defense):
        """Has other gains in the final norm."""

        def rewrite(self, chat, rng):
            return list(chat)

        @contextmanager
        def apply_to(self, model):
            weight = model.model.norm.weight
            before = weight.data
            try:
                weight.data = before * torch.linspace(0.5, 1.5, len(before))
                yield
            finally:
                weight.data = before

        def weights_fingerprint(self):
            return "renormed"

    bench = toy_bench()
    found = splitter(bench)
    found.attribute_margins(bench, NONE, ASKED[:2])
    split = found.attribute_margins(bench, Renormed(), ASKED[:2])
    with Renormed().apply_to(bench.loaded_model.model):
        expected = splitter(bench).attribute_margins(bench, NONE, ASKED[:2])
    assert np.allclose(split.parts.contributions, expected.parts.contributions, atol=1e-6)


def test_the_model_is_left_as_it_was():
    bench = bench_of(fresh_model())
    before = {name: one.clone() for name, one in bench.loaded_model.model.state_dict().items()}
    splitter(bench).attribute_margins(bench, REMINDER, ASKED[:2])
    assert all(torch.equal(before[name], one) for name, one in bench.loaded_model.model.state_dict().items())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in bench.loaded_model.model.modules())
