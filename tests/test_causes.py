"""Interventions: exact where the answer is known; and a circuit written by hand that all methods find."""

import copy
from dataclasses import dataclass, replace
from functools import partialmethod

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, fresh_model, made_adapter, tiny_model, toy_bench, toy_tokenizer

from analysis.attacks import choose_attacks
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query
from analysis.mechanism.attribution import DirectLogitAttribution
from analysis.mechanism.components import locate_components
from analysis.mechanism.directions import ConceptDirections, record_residual_states
from analysis.mechanism.interventions import PairedRuns, compare_estimated_effects
from analysis.mechanism.knockout import (
    ATTENTION_READERS,
    compute_knockout_margin,
    describe_unsupported_attention,
)
from analysis.mechanism.weight_patching import find_changed_weights, restore_original_weights
from analysis.models.loading import LoadedModel
from analysis.models.prefix_attention import can_split_attention
from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from analysis.stats.attribution import (
    CONTRASTS,
    ContrastEstimator,
    estimate_layer_contrasts,
    estimate_part_contrasts,
    find_half_way_layers,
)
from analysis.stats.tables import ModelPart
from defenses.adapters import load_adapter
from defenses.catalog import get_defense
from defenses.chats import prepend_system
from defenses.contract import Defense
from defenses.errors import UserError

ASKED = load_queries("contrast").select_split("test").limit_queries(4).queries
NONE, REMINDER = get_defense("none"), get_defense("self_reminder")
READOUT = Readout("words", ("a", "b", "c"), (300, 301, 302), (0.5, 0.5, -1.0))


def pair(bench, defense=REMINDER, asked=ASKED, readout=READOUT):
    return PairedRuns(bench, locate_components(bench.loaded.model), readout, NONE, defense, asked)


def margins(bench, defense, ids, readout=READOUT):
    """Return margins of prompts that are read one by one, nothing shared."""
    with torch.no_grad(), defense.armed(bench.loaded.model):
        logits = [bench.loaded.model(torch.tensor([one])).logits[0, -1] for one in ids]
    return readout.compute_margins(torch.stack(logits))[:, 0].numpy()


# --- on random models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_what_leaves_the_last_block_is_all_there_is(family):
    bench = toy_bench(family)
    one = pair(bench, asked=ASKED[:2])
    before, after = (margins(bench, defense, one.encode_prompts(defense)) for defense in (NONE, REMINDER))
    depth = len(one.components.layers)
    found = one.patch_activations([ModelPart("residual", depth - 1), ModelPart("head", 0, 1)], {}, seed=0)
    for into, source in (("undefended", "defense"), ("defended", "undefended")):
        assert found[into, source][:, 0] == pytest.approx(after - before, abs=1e-4)
        assert np.abs(found[into, "placebo"][:, 0] - (after - before)).min() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_patch_is_what_a_whole_pass_with_that_activation_gives(family):
    """A second way: the prompt whole, by itself, with plain hooks of PyTorch."""
    bench = toy_bench(family)
    one = pair(bench, asked=ASKED[:1])
    sites = [*one.patcher.list_sites(("residual", "attention", "mlp")), ModelPart("head", 1, 2)]
    (ids,) = one.encode_prompts(NONE)
    (states,) = one.patcher.record_site_activations(REMINDER, one.encode_prompts(REMINDER), sites)
    found = one.patch_activations(sites, {}, seed=0)["undefended", "defense"][0]
    (before,) = margins(bench, NONE, [ids])
    layers = bench.loaded_model.model.model.layers
    for site, effect in zip(sites, found, strict=True):
        layer = layers[site.layer]
        if site.kind == "head":

            def change(_, args, new=states[site], head=site.head):
                states_ = args[0].clone()
                size = states_.shape[-1] // 4
                states_[0, -1, head * size : (head + 1) * size] = new
                return (states_,)

            handle = layer.self_attn.o_proj.register_forward_pre_hook(change)
        else:
            behind = {"attention": layer.self_attn, "mlp": layer.mlp, "residual": layer}
            if family == "gemma2":
                behind |= {
                    "attention": layer.post_attention_layernorm,
                    "mlp": layer.post_feedforward_layernorm,
                }

            def put(_, args, out, new=states[site]):
                whole = (out[0] if isinstance(out, tuple) else out).clone()
                whole[0, -1] = new
                return (whole, *out[1:]) if isinstance(out, tuple) else whole

            handle = behind[site.kind].register_forward_hook(put)
        (after,) = margins(bench, NONE, [ids])
        handle.remove()
        assert effect == pytest.approx(after - before, abs=1e-4), site


def test_many_patches_at_once_are_what_each_is_alone(monkeypatch):
    one = pair(toy_bench(), asked=ASKED[:2])
    sites = one.patcher.list_sites(("residual", "attention", "mlp"), one.patcher.list_heads(1))
    whole = one.patch_activations(sites, {"other": get_defense("policy")}, seed=0)
    monkeypatch.setattr("analysis.mechanism.patching.ROWS", 3)
    monkeypatch.setattr("analysis.mechanism.causes.KEPT", 1)
    for key, found in one.patch_activations(sites, {"other": get_defense("policy")}, seed=0).items():
        assert found == pytest.approx(whole[key], abs=1e-5)


def test_where_memory_runs_out_fewer_patches_are_read_at_once(monkeypatch):
    one = pair(toy_bench(), asked=ASKED[:2])
    sites = one.patcher.list_sites(("residual", "attention", "mlp"))
    whole = one.patch_activations(sites, {}, seed=0)
    usual, tried = type(one.patcher)._margins_in_one_pass, []

    def small(self, read_, patches, most=3):
        tried.append(len(patches))
        if len(patches) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(self, read_, patches)

    monkeypatch.setattr("analysis.mechanism.patching.Patcher._margins", small)
    for key, found in one.patch_activations(sites, {}, seed=0).items():
        assert found == pytest.approx(whole[key], abs=1e-5)
    assert max(tried) == 13 and tried.count(13) == 2  # once for each run, not for each query
    monkeypatch.setattr("analysis.mechanism.patching.Patcher._margins", partialmethod(small, most=0))
    with pytest.raises(UserError, match="memory ran out with a prompt of"):
        one.patch_activations(sites, {}, seed=0)


def test_rows_are_read_alike_in_a_line_and_beside_each_other():
    in_line = toy_bench()
    model = copy.deepcopy(tiny_model())
    model.config._attn_implementation = "eager"
    beside = ModelSession.from_model(LoadedModel("toy", model, toy_tokenizer(), {"id": "toy"}))
    assert not can_split_attention(model, [])
    sites = pair(in_line).patcher.list_sites(("attention", "mlp"))
    found = [pair(bench, asked=ASKED[:2]).patch_activations(sites, {}, seed=0) for bench in (in_line, beside)]
    for key in found[0]:
        assert found[0][key] == pytest.approx(found[1][key], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_the_slopes_of_patches(family):
    """A small step towards the defended activation changes the margin by the slope times the step."""
    bench = toy_bench(family)
    one = pair(bench, asked=ASKED[:1])
    heads, guessed = one.estimate_head_effects()
    before, after = (
        one.patcher.record_site_activations(defense, ids, heads)[0]
        for defense, ids in ((NONE, one.encode_prompts(NONE)), (REMINDER, one.encode_prompts(REMINDER)))
    )
    step = 0.02
    for sign in (1, -1):
        patches = [(head, before[head] + sign * step * (after[head] - before[head])) for head in heads]
        (read_,) = one.patcher.compute_patched_margins(
            NONE, one.encode_prompts(NONE), [[(heads[0], before[heads[0]]), *patches]]
        )
        near = ((read_[1:] - read_[0]) / (sign * step)).numpy()
        assert near == pytest.approx(guessed[0], abs=0.03 * np.abs(guessed).max() + 5e-3)
    assert all(parameter.grad is None for parameter in bench.loaded_model.model.parameters())


def test_slopes_and_patches_are_compared():
    found = compare_estimated_effects(np.array([1.0, -2.0, 0.0]), np.array([1.5, -2.0, 0.5]))
    assert found["heads"] == 3 and found["rank_correlation"] == 1
    assert found["mean_error"] == pytest.approx(1 / 3) and found["mean_size"] == pytest.approx(4 / 3)


def test_a_placebo_goes_as_far_the_same_way_each_time():
    patcher = pair(toy_bench()).patcher
    base, source = torch.zeros(64), torch.ones(64)
    first, again, other = (
        patcher.draw_placebo(ModelPart("mlp", 0), base, source, key) for key in ("a", "a", "b")
    )
    assert first.norm() == pytest.approx(8.0, abs=1e-4) and torch.equal(first, again)
    assert not torch.equal(first, other)


def test_own_tokens_are_what_the_defense_says():
    bench = toy_bench()
    one = pair(bench)
    for own, prompt, query in zip(
        one.find_defense_tokens(), one.render_prompts(REMINDER), ASKED, strict=True
    ):
        said = bench.chat_template.decode_tokens(
            [token for token, mine in zip(prompt.ids, own, strict=True) if mine]
        )
        left = bench.chat_template.decode_tokens(
            [token for token, mine in zip(prompt.ids, own, strict=True) if not mine]
        )
        assert "responsible" in said and "responsible" not in left
        assert query.text in left and query.text not in said and "<|im_start|>" not in said
    assert not any(map(any, pair(bench, NONE).find_defense_tokens()))
    # What an attack says is not the defense's: neither its turns nor the answer that it begins.
    for name in ("many_shot", "prefill", "system_override", "prefix_injection"):
        (attack,) = choose_attacks([name])
        under = replace(one, session=bench.with_attack(attack))
        assert not any(map(any, replace(under, defense=NONE).find_defense_tokens())), name
        for own, prompt in zip(under.find_defense_tokens(), under.render_prompts(REMINDER), strict=True):
            said = bench.chat_template.decode_tokens(
                [token for token, mine in zip(prompt.ids, own, strict=True) if mine]
            )
            assert "responsible" in said and len(said) < 350, (name, said)
    # Words that a defense has changed are still the user's.
    swapped = pair(bench, get_defense("character_swap"))
    assert not any(map(any, swapped.find_defense_tokens()))


def test_cut_attention_is_cut_and_nothing_else():
    bench = toy_bench()
    one = pair(bench, asked=ASKED[:2])
    before, after = (margins(bench, defense, one.encode_prompts(defense)) for defense in (NONE, REMINDER))
    cells, left = one.measure_knockouts(one.find_defense_tokens(), before)
    uncut = [place for place, (_, layers) in enumerate(cells) if not layers]
    assert left[:, uncut] == pytest.approx(np.stack([after - before] * 2, 1), abs=1e-4)
    others = [place for place in range(len(cells)) if place not in uncut]
    assert (np.abs(left[:, others] - (after - before)[:, None]) > 1e-4).all()
    # Blind at its end alone, a prompt still hears of them by way of its other tokens.
    whole = {reader: place for place, (reader, layers) in enumerate(cells) if layers == range(2)}
    assert (np.abs(left[:, whole["answer"]] - left[:, whole["everything"]]) > 1e-4).all()
    # Cut off in all layers, what the hidden tokens are makes no difference; their number does, by position.
    (ids, _), own = one.encode_prompts(REMINDER), one.find_defense_tokens()[0]
    other = [301 if mine else token for token, mine in zip(ids, own, strict=True)]
    read_ = [
        compute_knockout_margin(bench, prompt, own, range(2), "everything", READOUT)
        for prompt in (ids, tuple(other))
    ]
    assert read_[0] == pytest.approx(read_[1], abs=1e-5)
    assert margins(bench, NONE, [ids])[0] != pytest.approx(margins(bench, NONE, [other])[0], abs=1e-3)


def test_attention_that_cannot_be_cut_is_named():
    model = copy.deepcopy(tiny_model())
    model.config._attn_implementation = "eager"
    assert (
        describe_unsupported_attention(model)
        == "attention of this LlamaForCausalLM is eager, which cannot be cut"
    )
    assert not describe_unsupported_attention(tiny_model())


def test_weights_are_switched_on_where_they_are_wanted(tmp_path):
    bench = toy_bench()
    tuned = replace(get_defense("safety_tuning"), adapter=load_adapter(made_adapter(tmp_path / "a")))
    weights = find_changed_weights(bench.loaded_model.model, tuned)
    assert len(weights) == 4 and not find_changed_weights(bench.loaded_model.model, REMINDER)
    kept = {name: one.clone() for name, one in bench.loaded_model.model.state_dict().items()}
    one = pair(bench, tuned)
    before = margins(bench, NONE, one.encode_prompts(NONE))
    named, change = one.measure_weight_patches(weights, before)
    of = dict(zip(named, change.T, strict=True))
    whole = margins(bench, tuned, one.encode_prompts(tuned)) - before
    assert of["up to", 1, ""] == pytest.approx(whole, abs=1e-4)
    assert of["everything", None, ""] == pytest.approx(whole, abs=1e-4)
    assert of["up to", 0, ""] == pytest.approx(of["alone", 0, ""], abs=1e-6)
    assert of["nothing", None, ""] == pytest.approx(0, abs=1e-5)
    second = [name for name in weights if "layers.1." in name]
    model = bench.loaded_model.model
    with tuned.armed(model):
        armed = {name: (old, model.get_parameter(name).data) for name, (old, _) in weights.items()}
        with restore_original_weights(model, armed, second):
            alone = margins(bench, NONE, one.encode_prompts(tuned)) - before
        assert margins(bench, NONE, one.encode_prompts(tuned)) - before == pytest.approx(whole, abs=1e-5)
        assert of["alone", 0, ""] == pytest.approx(alone, abs=1e-4)
    assert {one for how, _, one in named if how == "module"} == {"q_proj", "v_proj"}
    assert all(torch.equal(kept[name], one) for name, one in bench.loaded_model.model.state_dict().items())


def test_several_prompts_for_one_query_are_not_patched():
    bench = toy_bench()
    assert pair(bench).reads_single_prompts()
    assert not pair(bench, get_defense("smooth_llm")).reads_single_prompts()
    assert not pair(bench, readout=replace(READOUT, questions=("Refuse {request}?",))).reads_single_prompts()


def test_directions_are_read_where_the_words_and_where_the_prompt_end():
    # A model of its own: transformers leaves hooks where hidden states were asked for.
    bench = ModelSession.from_model(LoadedModel("toy", fresh_model(), toy_tokenizer(), {"id": "toy"}))
    found = record_residual_states(bench, locate_components(bench.loaded_model.model), REMINDER, ASKED)
    for query, states in zip(ASKED, found, strict=True):
        (prompt,) = bench.render_query(REMINDER, query)
        text = prompt.text
        stop = text.index(query.text) + len(query.text)
        lengths = [
            len(bench.chat_template.decode_tokens(prompt.ids[:count])) for count in range(len(prompt.ids) + 1)
        ]
        word = next(place for place, end in enumerate(lengths) if end >= stop) - 1
        with torch.no_grad():
            whole = bench.loaded_model.model(
                torch.tensor([prompt.ids]), output_hidden_states=True
            ).hidden_states
        for layer in range(2):
            assert torch.allclose(states[0, layer], whole[layer][0, -1], atol=1e-4)
            assert torch.allclose(states[1, layer], whole[layer][0, word], atol=1e-4)


def test_a_direction_that_was_planted_is_found_in_its_layer():
    made = torch.Generator().manual_seed(0)
    is_harmful = torch.arange(60) % 2 == 0
    states = torch.randn(60, 2, 3, 16, generator=made)
    states[is_harmful, 0, 1, 5] += 8.0
    states[is_harmful, 1, 2, 3] += 8.0
    pairs = [f"p{number // 2}" for number in range(60)]
    found = ConceptDirections.from_states(states, is_harmful, pairs)
    assert found.best_layers == (1, 2)
    along = found.project_states(states)
    assert along[is_harmful, 0, 1].mean() == pytest.approx(0.5, abs=1e-4)
    assert along[~is_harmful, 0, 1].mean() == pytest.approx(-0.5, abs=1e-4)
    assert found.axes[0, 1].abs().argmax() == 5


# --- a circuit written by hand ----------------------------------------------------------------------------

ONE, TRIGGER, HARM, ARMED, REFUSAL = range(5)  # directions of the residual stream
SHIFTING, ARMING, TELLING = ModelPart("head", 0, 1), ModelPart("head", 0, 3), ModelPart("head", 1, 2)
WORDS = ("bake", "message", "letter", "friend", "answer", "steps")


@dataclass(frozen=True)
class Trigger(Defense):
    """Puts a word into the system turn that the planted circuit reads."""

    def rewrite(self, chat, rng):
        return prepend_system(chat, "You are a responsible assistant.")


def planted():
    """Return a model where one head turns the trigger into refusal, and one tells harm once it is armed."""
    tokenizer = toy_tokenizer()
    (trigger,), (harm,) = (tokenizer.encode(text) for text in (" responsible", " harm"))
    model = fresh_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
    embedding = model.model.embed_tokens.weight.data
    embedding[:, ONE] = 20.0  # so that norms scale nearly alike, whatever else is written
    embedding[trigger, TRIGGER] = embedding[harm, HARM] = 10.0
    size, last = 16, 7  # of a head; the slowest pair of its rotary dimensions, which hardly turns

    def write(layer, head, reads, writes, strength):
        """A head that copies a direction into another; keys and values are shared by two heads."""
        attention = model.model.layers[layer].self_attn
        place = 1 + head % 2  # of its own among the values of the group
        attention.v_proj.weight.data[size * (head // 2) + place, reads] = 1.0
        attention.o_proj.weight.data[writes, size * head + place] = strength

    write(SHIFTING.layer, SHIFTING.head, TRIGGER, REFUSAL, 20.0)
    write(ARMING.layer, ARMING.head, TRIGGER, ARMED, 20.0)
    write(TELLING.layer, TELLING.head, HARM, REFUSAL, 1.4)
    attention = model.model.layers[TELLING.layer].self_attn
    attention.q_proj.weight.data[size * TELLING.head + last, ARMED] = 3.7
    attention.k_proj.weight.data[size * (TELLING.head // 2) + last, HARM] = 3.7
    unembedding = model.get_output_embeddings().weight.data
    unembedding[300:302, REFUSAL], unembedding[302, REFUSAL] = 1.0, -1.0
    return ModelSession.from_model(LoadedModel("planted", model, tokenizer, {"id": "planted"}))


def asked_of_planted():
    made = []
    for number in range(12):
        words = [WORDS[(number + step) % len(WORDS)] for step in range(1 + number % 3)]
        for harmful in (True, False):
            text = f"How do I {' '.join(words)} {'harm' if harmful else 'message'} a friend?"
            made.append(
                Query(f"{number}-{harmful}", text, harmful, "c", f"p{number}", "test", "harmful", None)
            )
    return tuple(made)


@pytest.fixture(scope="module")
def circuit():
    bench, asked = planted(), asked_of_planted()
    one = pair(bench, Trigger(), asked)
    about = ContrastEstimator(
        pd.Series([query.pair for query in asked]), np.array([query.harmful for query in asked])
    )
    splitter = DirectLogitAttribution(one.components, READOUT)
    before, after = (splitter.attribute_margins(bench, defense, asked) for defense in (NONE, Trigger()))
    return one, about, before, after


def test_attribution_finds_the_planted_heads_and_no_other(circuit):
    _, about, before, after = circuit
    found = estimate_part_contrasts(about, before.parts, after.parts).set_index(["layer", "kind", "head"])
    whole = about.contrasts((after.margins - before.margins)[:, None]).iloc[0]
    assert whole["shift"] > 1 and whole["discrimination"] > 1
    assert found["shift"].sum() == pytest.approx(whole["shift"], abs=1e-3)
    assert found["discrimination"].sum() == pytest.approx(whole["discrimination"], abs=1e-3)
    telling, shifting = found.loc[(1, "head", 2)], found.loc[(0, "head", 1)]
    assert telling["discrimination"] == pytest.approx(whole["discrimination"], rel=0.2)
    assert abs(shifting["discrimination"]) < 0.2 * whole["discrimination"]
    # Harm found is refusal of the one class, so half of it is shift; the rest is the other head's.
    assert shifting["shift"] + telling["discrimination"] / 2 == pytest.approx(whole["shift"], rel=0.1)
    rest = found.drop([(1, "head", 2), (0, "head", 1)])
    assert rest[["shift", "discrimination"]].abs().max().max() < 1e-5


def test_the_lens_sees_shift_arise_before_discrimination(circuit):
    _, about, before, after = circuit
    found = estimate_layer_contrasts(about, before.by_layer, after.by_layer)
    assert found["shift"].abs()[0] < 1e-6 and found["shift"][1] > 0.5
    assert found["discrimination"].abs()[:2].max() < 0.05 * found["discrimination"][2]
    half = find_half_way_layers(about, before.by_layer, after.by_layer).set_index("contrast")["half"]
    assert half["discrimination"] == 2 and half["shift"] <= 2


def test_patching_finds_the_planted_heads_and_who_arms_them(circuit):
    one, about, *_ = circuit
    heads = [head for layer in (0, 1) for head in one.patcher.heads(layer)]
    change = one.patches(heads, {}, seed=0)
    found = dict(zip(heads, about.contrasts(change["undefended", "defense"]).to_dict("records"), strict=True))
    assert found[SHIFTING]["shift"] > 0.5 and abs(found[SHIFTING]["discrimination"]) < 0.3
    assert found[TELLING]["discrimination"] > 1
    assert found[ARMING]["discrimination"] > 1  # by way of the head that it arms
    others = set(heads) - {SHIFTING, ARMING, TELLING}
    assert max(abs(found[head][name]) for head in others for name in CONTRASTS) < 1e-5
    back = dict(zip(heads, about.contrasts(change["defended", "undefended"]).to_dict("records"), strict=True))
    assert back[ARMING]["discrimination"] > 1 and back[SHIFTING]["shift"] > 0.5
    guessed = dict(zip(heads, about.contrasts(one.slopes()[1]).to_dict("records"), strict=True))
    assert guessed[SHIFTING]["shift"] > 0.5 and guessed[TELLING]["discrimination"] > 1
    assert max(abs(guessed[head][name]) for head in others for name in CONTRASTS) < 1e-5


def test_cutting_finds_the_layer_that_reads_the_defense(circuit):
    one, _, before, after = circuit
    cells, left = one.cuts(one.own_tokens(), before.margins)
    found = dict(zip([(reader, tuple(layers)) for reader, layers in cells], left.T, strict=True))
    whole = after.margins - before.margins
    for reader in ATTENTION_READERS:
        assert found[reader, ()] == pytest.approx(whole, abs=1e-4)
        assert np.abs(found[reader, (0,)]).max() < 0.25 * np.abs(whole).min()  # neither refusal nor arming
        assert found[reader, (1,)] == pytest.approx(whole, rel=0.25)  # there only the user's words are read
