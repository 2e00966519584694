"""Weight patching applies a weight change to the selected matrices only, and restores the model."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_adapter, make_toy_session, pair_runs, read_plain_margins, tiny_model
from peft import LoraConfig, get_peft_model

from analysis.datasets.loading import load_queries
from analysis.mechanism.weight_patching import find_changed_weights, restore_original_weights
from defenses.adapters import load_adapter
from defenses.catalog import get_defense
from defenses.contract import ModelInfo

QUERIES = load_queries("contrast").select_split("test").limit_queries(4).queries
NONE, REMINDER = get_defense("none"), get_defense("self_reminder")


def test_each_weight_patch_changes_the_selected_weights_only(tmp_path):
    session = make_toy_session()
    model = session.loaded_model.model
    tuned = replace(get_defense("safety_tuning"), adapter=load_adapter(make_adapter(tmp_path / "a")))
    weight_changes = find_changed_weights(model, tuned)
    assert len(weight_changes) == 4 and not find_changed_weights(model, REMINDER)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paired_runs = pair_runs(session, tuned, QUERIES)
    before = read_plain_margins(session, NONE, paired_runs.encode_prompts(NONE))
    defended_ids = paired_runs.encode_prompts(tuned)
    patches, effects = paired_runs.measure_weight_patches(weight_changes, before)
    effect_of = dict(zip(patches, effects.T, strict=True))
    whole_effect = read_plain_margins(session, tuned, defended_ids) - before
    assert effect_of["up to", 1, ""] == pytest.approx(whole_effect, abs=1e-4)
    assert effect_of["everything", None, ""] == pytest.approx(whole_effect, abs=1e-4)
    assert effect_of["up to", 0, ""] == pytest.approx(effect_of["alone", 0, ""], abs=1e-6)
    assert effect_of["nothing", None, ""] == pytest.approx(0, abs=1e-5)
    in_layer_1 = [name for name in weight_changes if "layers.1." in name]
    with tuned.apply_to(model):
        applied = {
            name: (tensor, model.get_parameter(name).data) for name, (tensor, _) in weight_changes.items()
        }
        with restore_original_weights(model, applied, in_layer_1):
            layer_0_only = read_plain_margins(session, NONE, defended_ids) - before
        assert read_plain_margins(session, NONE, defended_ids) - before == pytest.approx(
            whole_effect, abs=1e-5
        )
        assert effect_of["alone", 0, ""] == pytest.approx(layer_0_only, abs=1e-4)
    assert {module for kind, _, module in patches if kind == "module"} == {"q_proj", "v_proj"}
    assert all(torch.equal(original[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:::peft")
def test_one_of_two_tied_weights_and_a_new_bias_are_changed_alone(tmp_path):
    model = tiny_model("qwen3")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], lora_bias=True)
    peft_model = get_peft_model(copy.deepcopy(model), config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = get_defense("adapter", {"weights": tmp_path}).prepare(ModelInfo("toy", None, ()))
    weight_changes = find_changed_weights(model, adapter)
    in_layers = {f"model.layers.{n}.self_attn.q_proj.{kind}" for n in (0, 1) for kind in ("weight", "bias")}
    assert weight_changes.keys() == {"model.embed_tokens.weight", *in_layers}
    assert torch.equal(weight_changes["model.embed_tokens.weight"][0], model.lm_head.weight)
    assert not weight_changes["model.layers.0.self_attn.q_proj.bias"][0].any()
    assert model.lm_head.weight is model.model.embed_tokens.weight
