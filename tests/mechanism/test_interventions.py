"""Interventions are exact where the result is known, and find the heads of a circuit written by hand."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    FAMILIES,
    TOY_READOUT,
    fresh_model,
    make_toy_session,
    pair_runs,
    read_plain_margins,
    toy_tokenizer,
)

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query
from analysis.mechanism.attribution import DirectLogitAttribution
from analysis.mechanism.interventions import (
    HeadEstimates,
    PromptPatches,
    choose_patch_sites,
    compare_estimated_effects,
    find_length_control,
    measure_patches,
)
from analysis.mechanism.knockout import ATTENTION_READERS
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession
from analysis.stats.attribution import (
    CONTRASTS,
    ContrastEstimator,
    estimate_layer_contrasts,
    estimate_part_contrasts,
    find_half_way_layers,
)
from analysis.stats.tables import ModelPart
from defenses.catalog import get_defense
from defenses.chats import prepend_system
from defenses.contract import Defense

QUERIES = load_queries("contrast").select_split("test").limit_queries(4).queries
NONE, REMINDER = get_defense("none"), get_defense("self_reminder")


# --- on random models ---


def test_changes_are_split_by_source_in_the_order_of_the_patches():
    sites = [ModelPart("mlp", 0), ModelPart("mlp", 1)]
    by_source = {
        source: [(site, torch.tensor([10.0 * number + layer])) for layer, site in enumerate(sites)]
        for number, source in enumerate(("defense", "placebo", "other"), 1)
    }
    patches = PromptPatches((sites[0], torch.tensor([5.0])), by_source)
    values = torch.stack([activation for _, activation in patches.list_patches()])[:, 0]
    assert values.tolist() == [5, 10, 11, 20, 21, 30, 31]
    changes = patches.split_changes(torch.stack([values, values + 1]))
    assert {source: change[0].tolist() for source, change in changes.items()} == {
        "defense": [5, 6],
        "placebo": [15, 16],
        "other": [25, 26],
    }


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_patching_the_output_of_the_last_block_gives_the_whole_effect(family):
    session = make_toy_session(family)
    paired_runs = pair_runs(session, REMINDER, QUERIES[:2])
    before, after = (
        read_plain_margins(session, defense, paired_runs.encode_prompts(defense))
        for defense in (NONE, REMINDER)
    )
    last_layer = len(paired_runs.components.layers) - 1
    effects = paired_runs.patch_activations(
        [ModelPart("residual", last_layer), ModelPart("head", 0, 1)], {}, seed=0
    )
    for patched_run, source in (("undefended", "defense"), ("defended", "undefended")):
        assert effects[patched_run, source][:, 0] == pytest.approx(after - before, abs=1e-4)
        assert np.abs(effects[patched_run, "placebo"][:, 0] - (after - before)).min() > 1e-3


def test_patches_have_one_row_per_patched_run_source_and_site():
    paired_runs = pair_runs(make_toy_session(), REMINDER, QUERIES)
    estimator = ContrastEstimator(
        pd.Series([query.pair for query in QUERIES]), np.array([query.harmful for query in QUERIES])
    )
    control = find_length_control(paired_runs, seed=0)
    assert control is not None and abs(control.n_defense_tokens - control.n_control_tokens) <= 3
    assert find_length_control(replace(paired_runs, defense=NONE), seed=0) is None
    sites = choose_patch_sites(paired_runs, ("mlp", "residual", "heads"), [ModelPart("head", 1, 2)])
    assert [site.kind for site in sites] == ["residual", "residual", "mlp", "mlp", "head"]
    patches = measure_patches(paired_runs, estimator, sites, {control.name: control.defense}, seed=0)
    assert patches.groupby(["into", "source"], sort=False).size().to_dict() == {
        ("undefended", "defense"): 5,
        ("undefended", "placebo"): 5,
        ("undefended", "neutral_prompt"): 5,
        ("defended", "undefended"): 5,
        ("defended", "placebo"): 5,
    }
    assert {tuple(sizes) for sizes in patches[["n_harmful", "n_benign"]].to_numpy()} == {
        estimator.class_sizes
    }


def test_estimated_and_patched_effects_are_compared():
    agreement = compare_estimated_effects(np.array([1.0, -2.0, 0.0]), np.array([1.5, -2.0, 0.5]))
    assert agreement["heads"] == 3 and agreement["rank_correlation"] == 1
    assert agreement["mean_error"] == pytest.approx(1 / 3)
    assert agreement["mean_size"] == pytest.approx(4 / 3)


def test_the_largest_estimates_and_as_many_random_heads_are_patched():
    heads = [ModelPart("head", 0, head) for head in range(8)]
    shift = [0.0, 3.0, 0.1, 0.2, -0.3, 0.4, 0.5, 0.6]
    contrasts = pd.DataFrame({"shift": shift, "discrimination": [0.0] * 7 + [-4.0]})
    positions = HeadEstimates(heads, contrasts).choose_heads(n_top=2, seed=0)
    assert {1, 7} <= set(positions) and len(set(positions)) == 4 and positions == sorted(positions)
    assert HeadEstimates(heads, contrasts).choose_heads(n_top=20, seed=0) == list(range(8))


def test_interventions_need_a_single_prompt_per_query():
    session = make_toy_session()
    assert pair_runs(session, REMINDER, QUERIES).reads_single_prompts()
    assert not pair_runs(session, get_defense("smooth_llm"), QUERIES).reads_single_prompts()
    with_questions = replace(TOY_READOUT, questions=("Refuse {request}?",))
    assert not pair_runs(session, REMINDER, QUERIES, with_questions).reads_single_prompts()


# --- on a circuit written by hand ---

ONE, TRIGGER, HARM, ARMED, REFUSAL = range(5)  # directions of the residual stream
SHIFT_HEAD, ARMING_HEAD, HARM_HEAD = ModelPart("head", 0, 1), ModelPart("head", 0, 3), ModelPart("head", 1, 2)
WORDS = ("bake", "message", "letter", "friend", "answer", "steps")


@dataclass(frozen=True)
class Trigger(Defense):
    """Adds a system prompt with the word that the planted circuit reads."""

    def rewrite(self, chat, rng):
        return prepend_system(chat, "You are a responsible assistant.")


def plant_circuit():
    """Return a model in which one head turns the trigger into refusal; another, once armed, detects harm."""
    tokenizer = toy_tokenizer()
    (trigger,), (harm,) = (tokenizer.encode(text) for text in (" responsible", " harm"))
    model = fresh_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
    embedding = model.model.embed_tokens.weight.data
    embedding[:, ONE] = 20.0  # large, so that the scale of the norms hardly depends on the other directions
    embedding[trigger, TRIGGER] = embedding[harm, HARM] = 10.0
    size, last = 16, 7  # head size; the slowest pair of rotary dimensions, which hardly rotates

    def write(layer, head, source, target, strength):
        """Make a head copy a direction into another; two heads share keys and values."""
        attention = model.model.layers[layer].self_attn
        value = 1 + head % 2  # a value dimension of its own within the shared group
        attention.v_proj.weight.data[size * (head // 2) + value, source] = 1.0
        attention.o_proj.weight.data[target, size * head + value] = strength

    write(SHIFT_HEAD.layer, SHIFT_HEAD.head, TRIGGER, REFUSAL, 20.0)
    write(ARMING_HEAD.layer, ARMING_HEAD.head, TRIGGER, ARMED, 20.0)
    write(HARM_HEAD.layer, HARM_HEAD.head, HARM, REFUSAL, 1.4)
    attention = model.model.layers[HARM_HEAD.layer].self_attn
    attention.q_proj.weight.data[size * HARM_HEAD.head + last, ARMED] = 3.7
    attention.k_proj.weight.data[size * (HARM_HEAD.head // 2) + last, HARM] = 3.7
    unembedding = model.get_output_embeddings().weight.data
    unembedding[300:302, REFUSAL], unembedding[302, REFUSAL] = 1.0, -1.0
    return ModelSession.from_model(LoadedModel("planted", model, tokenizer, {"id": "planted"}))


def make_circuit_queries():
    queries = []
    for number in range(6):
        words = [WORDS[(number + step) % len(WORDS)] for step in range(1 + number % 3)]
        for harmful in (True, False):
            text = f"How do I {' '.join(words)} {'harm' if harmful else 'message'} a friend?"
            queries.append(
                Query(f"{number}-{harmful}", text, harmful, "c", f"p{number}", "test", "harmful", None)
            )
    return tuple(queries)


@pytest.fixture(scope="module")
def circuit():
    session, queries = plant_circuit(), make_circuit_queries()
    paired_runs = pair_runs(session, Trigger(), queries)
    estimator = ContrastEstimator(
        pd.Series([query.pair for query in queries]), np.array([query.harmful for query in queries])
    )
    attribution = DirectLogitAttribution(paired_runs.components, TOY_READOUT)
    before, after = (
        attribution.attribute_margins(session, defense, paired_runs.query_chats)
        for defense in (NONE, Trigger())
    )
    return paired_runs, estimator, before, after


def test_attribution_finds_the_planted_heads_and_no_others(circuit):
    _, estimator, before, after = circuit
    contrasts = estimate_part_contrasts(estimator, before.parts, after.parts)
    contrasts = contrasts.set_index(["layer", "kind", "head"])
    whole = estimator.estimate_contrasts((after.margins - before.margins)[:, None]).iloc[0]
    assert whole["shift"] > 1 and whole["discrimination"] > 1
    assert contrasts["shift"].sum() == pytest.approx(whole["shift"], abs=1e-3)
    assert contrasts["discrimination"].sum() == pytest.approx(whole["discrimination"], abs=1e-3)
    harm, shift = contrasts.loc[(1, "head", 2)], contrasts.loc[(0, "head", 1)]
    assert harm["discrimination"] == pytest.approx(whole["discrimination"], rel=0.2)
    assert abs(shift["discrimination"]) < 0.2 * whole["discrimination"]
    # Detected harm raises the margin of one class, so half of it is shift; the rest is the other head's.
    assert shift["shift"] + harm["discrimination"] / 2 == pytest.approx(whole["shift"], rel=0.1)
    others = contrasts.drop([(1, "head", 2), (0, "head", 1)])
    assert others[["shift", "discrimination"]].abs().max().max() < 1e-5


def test_the_logit_lens_shows_shift_in_an_earlier_layer_than_discrimination(circuit):
    _, estimator, before, after = circuit
    margins = before.margins_by_layer, after.margins_by_layer
    contrasts = estimate_layer_contrasts(estimator, *margins)
    assert contrasts["shift"].abs()[0] < 1e-6 and contrasts["shift"][1] > 0.5
    assert contrasts["discrimination"].abs()[:2].max() < 0.05 * contrasts["discrimination"][2]
    half = find_half_way_layers(estimator, *margins).set_index("contrast")["half"]
    assert half["discrimination"] == 2 and half["shift"] <= 2


def test_patching_finds_the_planted_heads_and_the_head_that_arms_them(circuit):
    paired_runs, estimator, *_ = circuit
    heads = [head for layer in (0, 1) for head in paired_runs.patcher.list_heads(layer)]

    def by_head(effects):
        return dict(zip(heads, estimator.estimate_contrasts(effects).to_dict("records"), strict=True))

    effects = paired_runs.patch_activations(heads, {}, seed=0)
    sufficient = by_head(effects["undefended", "defense"])
    assert sufficient[SHIFT_HEAD]["shift"] > 0.5 and abs(sufficient[SHIFT_HEAD]["discrimination"]) < 0.3
    assert sufficient[HARM_HEAD]["discrimination"] > 1
    assert sufficient[ARMING_HEAD]["discrimination"] > 1  # through the head that it arms
    others = set(heads) - {SHIFT_HEAD, ARMING_HEAD, HARM_HEAD}
    assert max(abs(sufficient[head][name]) for head in others for name in CONTRASTS) < 1e-5
    necessary = by_head(effects["defended", "undefended"])
    assert necessary[ARMING_HEAD]["discrimination"] > 1 and necessary[SHIFT_HEAD]["shift"] > 0.5
    estimated = by_head(paired_runs.estimate_head_effects()[1])
    assert estimated[SHIFT_HEAD]["shift"] > 0.5 and estimated[HARM_HEAD]["discrimination"] > 1
    assert max(abs(estimated[head][name]) for head in others for name in CONTRASTS) < 1e-5


def test_attention_knockout_finds_the_layer_that_reads_the_defense(circuit):
    paired_runs, _, before, after = circuit
    margins = paired_runs.measure_knockouts(paired_runs.defense, paired_runs.find_defense_tokens())
    knockouts = [(reader, tuple(layers)) for reader, layers in paired_runs.list_knockouts()]
    effect_of = dict(zip(knockouts, (margins - before.margins[:, None]).T, strict=True))
    whole = after.margins - before.margins
    for reader in ATTENTION_READERS:
        assert effect_of[reader, ()] == pytest.approx(whole, abs=1e-4)
        assert np.abs(effect_of[reader, (0,)]).max() < 0.25 * np.abs(whole).min()  # no refusal, no arming
        assert effect_of[reader, (1,)] == pytest.approx(whole, rel=0.25)  # layer 1 reads the user's text only
