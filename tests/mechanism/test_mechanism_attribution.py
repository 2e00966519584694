"""Contributions add up to the margin: in every model family, with hooks, tuned weights, several prompts."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import (
    FAMILIES,
    LOG_ODDS_READOUT,
    OUTCOME_READOUT,
    TOY_READOUT,
    compute_autograd_weights,
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
from analysis.mechanism.attribution import DirectLogitAttribution, MarginAttribution
from analysis.mechanism.components import locate_components
from analysis.mechanism.logit_weights import PATH_TOLERANCE
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
NONLINEAR_READOUTS = (LOG_ODDS_READOUT, OUTCOME_READOUT)


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


# --- readouts that are not linear in the logits ---


def get_kind_contributions(attribution: MarginAttribution, kind: str) -> np.ndarray:
    """Return the contributions of all parts of one kind, queries × parts."""
    is_kind = [part.kind == kind for part in attribution.parts.parts]
    return attribution.parts.contributions[:, is_kind]


def read_plain_logits(session: ModelSession, defense: Defense, queries) -> torch.Tensor:
    """Return the logits of single prompts from one plain forward pass each."""
    prompts = [render_query(session, defense, query)[0] for query in queries]
    with torch.no_grad():
        return torch.stack(
            [session.loaded_model.model(torch.tensor([prompt.ids])).logits[0, -1] for prompt in prompts]
        )


@pytest.mark.parametrize("readout", NONLINEAR_READOUTS, ids=lambda readout: readout.name)
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_components_and_remainder_add_up_to_margins_that_are_not_linear(family, readout):
    session = make_toy_session(family)
    queries = QUERIES[:2]
    attribution = make_attribution(session, readout).attribute_margins(
        session, REMINDER, DIRECT_ATTACK.build_query_chats(queries)
    )
    scored = score_margins(session, REMINDER, queries, readout)
    assert np.abs(attribution.margins - scored).max() < 1e-5
    assert np.abs(attribution.parts.contributions.sum(1) - scored).max() < 1e-4
    assert np.abs(attribution.margins_by_layer[:, -1] - scored).max() < 1e-4
    # The remainder a second way: derivatives by autograd at the logits of plain forward passes.
    logits = read_plain_logits(session, REMINDER, queries)
    weights = compute_autograd_weights(readout, logits)
    remainders = readout.compute_margins(logits)[:, 0] - (weights * logits).sum(1)
    assert attribution.parts.parts[-1] == ModelPart("readout")
    assert attribution.parts.contributions[:, -1] == pytest.approx(remainders.numpy(), abs=1e-4)
    assert np.abs(remainders.numpy()).min() > 0.01
    assert attribution.weight_sizes == pytest.approx(weights.abs().sum(1).numpy(), abs=1e-5)


def test_a_linear_readout_has_no_remainder_and_the_same_weights_in_every_run():
    session = make_toy_session()
    query_chats = DIRECT_ATTACK.build_query_chats(QUERIES[:3])
    direct_attribution = make_attribution(session)
    attributions = direct_attribution.attribute_change(session, NONE, REMINDER, query_chats)
    for attribution, defense in zip(attributions, (NONE, REMINDER), strict=True):
        expected = direct_attribution.attribute_margins(session, defense, query_chats)
        assert np.array_equal(attribution.parts.contributions, expected.parts.contributions)
        assert not get_kind_contributions(attribution, "readout").size
        assert attribution.weight_sizes.tolist() == [2.0] * 3


@pytest.mark.parametrize("readout", NONLINEAR_READOUTS, ids=lambda readout: readout.name)
def test_the_logit_lens_shows_the_margin_itself_and_no_linearization(readout):
    session = make_session(fresh_model())  # transformers leaves hooks on a model that returns hidden states
    attribution = make_attribution(session, readout).attribute_margins(
        session, REMINDER, DIRECT_ATTACK.build_query_chats(QUERIES[:2])
    )
    model = session.loaded_model.model
    for query, margins_by_layer in zip(QUERIES[:2], attribution.margins_by_layer, strict=True):
        (prompt,) = render_query(session, REMINDER, query)
        with torch.no_grad():
            states = model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
            for layer, stream in enumerate(states[:-1]):  # the last one has passed the final norm
                logits = model.lm_head(model.model.norm(stream[:, -1]))
                margin = float(readout.compute_margins(logits)[0, 0])
                assert margins_by_layer[layer] == pytest.approx(margin, abs=1e-4)


@pytest.mark.parametrize("readout", NONLINEAR_READOUTS, ids=lambda readout: readout.name)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_averaged_weights_explain_the_whole_change_by_components(family, readout):
    session = make_toy_session(family)
    query_chats = DIRECT_ATTACK.build_query_chats(QUERIES[:4])
    direct_attribution = make_attribution(session, readout)
    before, after = direct_attribution.attribute_change(session, NONE, REMINDER, query_chats)
    for attribution, defense in ((before, NONE), (after, REMINDER)):
        scored = score_margins(session, defense, QUERIES[:4], readout)
        assert attribution.margins == pytest.approx(scored, abs=1e-5)
        assert attribution.parts.contributions.sum(1) == pytest.approx(scored, abs=1e-4)
        own = direct_attribution.attribute_margins(session, defense, query_chats)
        assert attribution.margins_by_layer == pytest.approx(own.margins_by_layer, abs=1e-5)
    remainders = [get_kind_contributions(attribution, "readout") for attribution in (before, after)]
    assert np.abs(remainders[1] - remainders[0]).max() < PATH_TOLERANCE
    assert np.abs(remainders[0]).max() > 0.1  # each run has one, but it is the same


def test_both_runs_are_projected_on_the_average_of_the_gradients_between_them():
    """A second derivation: autograd at many steps, and the output of an MLP recorded by a plain hook."""
    session, query = make_toy_session(), QUERIES[0]
    direct_attribution = make_attribution(session, LOG_ODDS_READOUT)
    attributions = direct_attribution.attribute_change(
        session, NONE, REMINDER, DIRECT_ATTACK.build_query_chats([query])
    )
    model, recorded = session.loaded_model.model, {}
    handles = [
        model.model.layers[1].mlp.register_forward_hook(
            lambda _, args, output: recorded.update(mlp=output[0, -1])
        ),
        model.model.norm.register_forward_hook(lambda _, args, output: recorded.update(last=args[0][0, -1])),
    ]
    logits, projected = [], []
    for defense in (NONE, REMINDER):
        logits.append(read_plain_logits(session, defense, [query]))
        projected.append((recorded["mlp"], recorded["last"]))
    for handle in handles:
        handle.remove()
    steps = [logits[0] + (logits[1] - logits[0]) * (step + 0.5) / 200 for step in range(200)]
    weights = torch.stack([compute_autograd_weights(LOG_ODDS_READOUT, step) for step in steps]).mean(0)[0]
    with torch.no_grad():
        for attribution, (mlp, last) in zip(attributions, projected, strict=True):
            scale = (last.pow(2).mean() + model.config.rms_norm_eps).sqrt()
            direction = (weights @ model.lm_head.weight) * model.model.norm.weight / scale
            column = direct_attribution.parts.index(ModelPart("mlp", 1))
            contribution = attribution.parts.contributions[0, column]
            assert contribution == pytest.approx(float(mlp @ direction), abs=1e-4)


@pytest.mark.parametrize("name", ["smooth_llm", "erase_and_check"])
def test_averaged_weights_of_several_prompts_follow_the_pooling_of_the_defense(name, monkeypatch):
    session = make_toy_session()
    defense = get_defense(name).prepare(ModelInfo("toy", session.loaded_model.tokenizer, ()))
    assert defense.pool == {"smooth_llm": "mean", "erase_and_check": "max"}[name]
    readout = replace(LOG_ODDS_READOUT, questions=("Refuse {request}? Yes or No.", "{request}: No or Yes?"))
    query_chats = DIRECT_ATTACK.build_query_chats(QUERIES[:3])
    direct_attribution = make_attribution(session, readout)
    before, after = direct_attribution.attribute_change(session, NONE, defense, query_chats)
    for attribution, condition in ((before, NONE), (after, defense)):
        scored = score_margins(session, condition, QUERIES[:3], readout)
        assert attribution.parts.contributions.sum(1) == pytest.approx(scored, abs=1e-4)
    changes = get_kind_contributions(after, "readout") - get_kind_contributions(before, "readout")
    assert np.abs(changes).max() < 1e-3  # log-odds are smooth, so that the average is nearly exact
    assert np.abs(get_kind_contributions(before, "readout")).max() > 0.1
    # Queries are paired in chunks, which must not change anything.
    monkeypatch.setattr("analysis.mechanism.attribution._MAX_PAIRED_PROMPTS", 3)
    in_chunks = direct_attribution.attribute_change(session, NONE, defense, query_chats)
    for attribution, expected in zip(in_chunks, (before, after), strict=True):
        assert attribution.parts.contributions == pytest.approx(expected.parts.contributions, abs=1e-4)


def test_the_logits_of_several_models_are_attributed_only_if_the_margin_is_their_sum(tmp_path):
    session = make_toy_session()
    adapter = load_adapter(make_adapter(tmp_path / "a"))
    mixing = replace(get_defense("safe_decoding"), adapter=adapter)
    query_chats = DIRECT_ATTACK.build_query_chats(QUERIES[:2])
    attribution = make_attribution(session).attribute_margins(session, mixing, query_chats)
    scored = score_margins(session, mixing, QUERIES[:2])
    assert attribution.parts.contributions.sum(1) == pytest.approx(scored, abs=1e-4)
    direct_attribution = make_attribution(session, LOG_ODDS_READOUT)
    for attribute in (
        lambda: direct_attribution.attribute_margins(session, mixing, query_chats),
        lambda: direct_attribution.attribute_change(session, NONE, mixing, query_chats),
    ):
        with pytest.raises(UserError, match=r"safe_decoding mixes the logits of 2 models.*as words"):
            attribute()
