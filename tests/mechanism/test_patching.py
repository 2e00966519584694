"""Patched margins equal those of plain forward passes with the same activation, in any batching."""

from functools import partialmethod

import numpy as np
import pytest
import torch
from conftest import (
    FAMILIES,
    LOG_ODDS_READOUT,
    OUTCOME_READOUT,
    TOY_READOUT,
    make_toy_session,
    pair_runs,
    read_plain_margins,
)

from analysis.datasets.loading import load_queries
from analysis.mechanism.patching import LAYER_SITES, ActivationPatcher
from analysis.models.batches import BatchForm
from analysis.stats.tables import ModelPart
from defenses.catalog import get_defense
from defenses.errors import UserError

QUERIES = load_queries("contrast").select_split("test").limit_queries(2).queries
NONE, REMINDER = get_defense("none"), get_defense("self_reminder")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_patch_equals_a_full_forward_pass_with_that_activation(family):
    """A second derivation: the whole prompt by itself, with plain PyTorch hooks."""
    session = make_toy_session(family)
    paired_runs = pair_runs(session, REMINDER, QUERIES[:1])
    sites = [*paired_runs.patcher.list_sites(LAYER_SITES), ModelPart("head", 1, 2)]
    (ids,) = paired_runs.encode_prompts(NONE)
    (activations,) = paired_runs.patcher.record_site_activations(
        REMINDER, paired_runs.encode_prompts(REMINDER), sites
    )
    effects = paired_runs.patch_activations(sites, {}, seed=0)["undefended", "defense"][0]
    (before,) = read_plain_margins(session, NONE, [ids])
    layers = session.loaded_model.model.model.layers
    for site, effect in zip(sites, effects, strict=True):
        layer = layers[site.layer]
        if site.kind == "head":

            def replace_head(_, args, activation=activations[site], head=site.head):
                states = args[0].clone()
                size = states.shape[-1] // 4
                states[0, -1, head * size : (head + 1) * size] = activation
                return (states,)

            handle = layer.self_attn.o_proj.register_forward_pre_hook(replace_head)
        else:
            modules = {"attention": layer.self_attn, "mlp": layer.mlp, "residual": layer}
            if family == "gemma2":
                modules |= {
                    "attention": layer.post_attention_layernorm,
                    "mlp": layer.post_feedforward_layernorm,
                }

            def replace_output(_, args, output, activation=activations[site]):
                states = (output[0] if isinstance(output, tuple) else output).clone()
                states[0, -1] = activation
                return (states, *output[1:]) if isinstance(output, tuple) else states

            handle = modules[site.kind].register_forward_hook(replace_output)
        (after,) = read_plain_margins(session, NONE, [ids])
        handle.remove()
        assert effect == pytest.approx(after - before, abs=1e-4), site


def test_many_patches_in_one_pass_equal_each_patch_alone(monkeypatch):
    paired_runs = pair_runs(make_toy_session(), REMINDER, QUERIES)
    sites = paired_runs.patcher.list_sites(LAYER_SITES, paired_runs.patcher.list_heads(1))
    controls = {"other": get_defense("policy")}
    expected = paired_runs.patch_activations(sites, controls, seed=0)
    monkeypatch.setattr("analysis.mechanism.patching.PATCHES_PER_PASS", 3)
    monkeypatch.setattr("analysis.mechanism.interventions.QUERIES_PER_CHUNK", 1)
    in_small_passes = paired_runs.patch_activations(sites, controls, seed=0)
    assert set(in_small_passes) == set(expected)
    for key, effects in in_small_passes.items():
        assert effects == pytest.approx(expected[key], abs=1e-5)


def test_passes_become_smaller_if_memory_runs_out(monkeypatch):
    paired_runs = pair_runs(make_toy_session(), REMINDER, QUERIES)
    sites = paired_runs.patcher.list_sites(LAYER_SITES)
    expected = paired_runs.patch_activations(sites, {}, seed=0)
    original, pass_sizes = ActivationPatcher._margins_in_one_pass, []

    def run_out_of_memory(self, read_logits, patches, largest=3):
        pass_sizes.append(len(patches))
        if len(patches) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, read_logits, patches)

    monkeypatch.setattr(ActivationPatcher, "_margins_in_one_pass", run_out_of_memory)
    for key, effects in paired_runs.patch_activations(sites, {}, seed=0).items():
        assert effects == pytest.approx(expected[key], abs=1e-5)
    assert max(pass_sizes) == 13 and pass_sizes.count(13) == 2  # once per run, not per query
    monkeypatch.setattr(
        ActivationPatcher, "_margins_in_one_pass", partialmethod(run_out_of_memory, largest=0)
    )
    with pytest.raises(UserError, match="out of memory with a single prompt of"):
        paired_runs.patch_activations(sites, {}, seed=0)


def test_packed_rows_separate_rows_and_whole_prompts_give_the_same_effects():
    packed_runs = pair_runs(make_toy_session(), REMINDER, QUERIES)
    sites = packed_runs.patcher.list_sites(("attention", "mlp"))
    expected = packed_runs.patch_activations(sites, {}, seed=0)
    _, expected_estimates = packed_runs.estimate_head_effects()
    for form in (BatchForm.REPEATED, BatchForm.PADDED):
        session = make_toy_session()
        session.engine.batch_form = form
        runs = pair_runs(session, REMINDER, QUERIES)
        for key, effects in runs.patch_activations(sites, {}, seed=0).items():
            assert effects == pytest.approx(expected[key], abs=1e-4)
        assert runs.estimate_head_effects()[1] == pytest.approx(expected_estimates, abs=1e-4)


@pytest.mark.parametrize(
    ("family", "readout"),
    [
        *((family, TOY_READOUT) for family in FAMILIES),
        ("llama", LOG_ODDS_READOUT),
        ("gemma2", LOG_ODDS_READOUT),
        ("llama", OUTCOME_READOUT),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_estimated_effects_are_the_slopes_of_patches(family, readout):
    """A small step toward the defended activation changes the margin by the estimate times the step."""
    session = make_toy_session(family)
    paired_runs = pair_runs(session, REMINDER, QUERIES[:1], readout)
    heads, estimates = paired_runs.estimate_head_effects()
    before, after = (
        paired_runs.patcher.record_site_activations(defense, paired_runs.encode_prompts(defense), heads)[0]
        for defense in (NONE, REMINDER)
    )
    step = 0.02
    for sign in (1, -1):
        patches = [(head, before[head] + sign * step * (after[head] - before[head])) for head in heads]
        (margins,) = paired_runs.patcher.compute_patched_margins(
            NONE, paired_runs.encode_prompts(NONE), [[(heads[0], before[heads[0]]), *patches]]
        )
        slopes = ((margins[1:] - margins[0]) / (sign * step)).numpy()
        assert slopes == pytest.approx(estimates[0], abs=0.03 * np.abs(estimates).max() + 5e-3)
    assert all(parameter.grad is None for parameter in session.loaded_model.model.parameters())


def test_a_placebo_has_the_size_of_the_patch_and_depends_only_on_its_key():
    patcher = pair_runs(make_toy_session(), REMINDER, QUERIES).patcher
    base, source = torch.zeros(64), torch.ones(64)
    first, repeated, other = (
        patcher.draw_placebo(ModelPart("mlp", 0), base, source, key) for key in ("a", "a", "b")
    )
    assert first.norm() == pytest.approx(8.0, abs=1e-4) and torch.equal(first, repeated)
    assert not torch.equal(first, other)
