"""Activated LoRA equals PEFT's: in batches, behind earlier invocations, without one, and while responding."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import (
    USER_DEFENSE,
    assert_user_error,
    derive_readout,
    fresh_model,
    make_adapter,
    render_query,
    run_cli,
    save_model,
    tiny_model,
    toy_tokenizer,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from analysis.datasets.queries import Query
from analysis.models.batches import BatchForm, CacheUse
from analysis.models.engine import Engine
from analysis.models.generation import generate_token_ids
from analysis.models.loading import LoadedModel, load_model
from analysis.models.session import ModelSession
from analysis.studies.preflight import check_condition
from defenses.activated_lora import find_last_occurrence, get_activation
from defenses.adapter_merge import ADAPTER_CONFIG_FILE
from defenses.adapters import apply_adapter, load_adapter, load_external_adapter, merge_adapter
from defenses.catalog import get_defense
from defenses.contract import ModelInfo
from defenses.errors import UserError

MODEL_INFO = ModelInfo("toy", None, ())
INVOCATION = [7, 8, 7]
START = (20, 21, 22, 23)  # all prompts share it
PROMPTS = [
    (*START, *INVOCATION, 30, 31),
    (*START, *INVOCATION, 30, *INVOCATION, 32, 33, 34, 35),  # only the last counts
    (*START, 40, 41, 42, 43, 44, 45, 46, 47),  # none
    (*START, 40, *INVOCATION),  # at the end
    (*START, 7, 8),  # the start of one; the padding must not complete it
    (*START, 50, 7, 8, 7, 8, 7, 51),  # overlapping
    (*INVOCATION, *START),
]
FORMS = list(BatchForm)


def write_activated(folder: Path, model: Any, invocation: Sequence[int], **settings: Any) -> Path:
    """Write an activated adapter with PEFT, whose matrices are random."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        | settings,
        alora_invocation_tokens=list(invocation),
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    peft_model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An activated adapter of the tiny Llama; tests do not change it."""
    return write_activated(tmp_path_factory.mktemp("activated"), fresh_model(), INVOCATION)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """PEFT's model with the adapter."""
    return PeftModel.from_pretrained(fresh_model(), folder).eval()


def read_reference(reference: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return PEFT's logits of the first response token, one prompt at a time."""
    with torch.inference_mode():
        return torch.stack([reference(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts])


def respond_by_passes(reference: Any, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """Return the greedy response of PEFT's model by a plain pass for every token.

    Without a cache, PEFT's own generation moves the start of the adapter along with the response.
    """
    start, sequence = find_last_occurrence(prompt, INVOCATION), list(prompt)
    for _ in range(n_tokens):
        offsets = [None if start is None else len(sequence) - start]
        ids = torch.tensor([sequence])
        with torch.inference_mode(), reference.base_model._enable_peft_forward_hooks(alora_offsets=offsets):
            sequence.append(int(reference.base_model.model(ids, use_cache=False).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


def generate_reference(reference: Any, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """Return PEFT's greedy response, generated with its cache."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": n_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return output[0, len(prompt) :].tolist()


def read_logits(engine: Engine, prompts: Sequence[Sequence[int]] = PROMPTS) -> torch.Tensor:
    return engine.read_first_token(prompts, lambda logits: logits)


@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_peft_in_every_form_of_batch(folder: Path, reference: Any, form: BatchForm) -> None:
    model = fresh_model()
    engine, adapter = Engine(model, batch_form=form), load_external_adapter(folder, MODEL_INFO)
    expected, released = read_reference(reference, PROMPTS), read_logits(engine)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with apply_adapter(model, adapter):
        ours = read_logits(engine)
    assert torch.allclose(ours, expected, atol=1e-4)
    has_effect = (ours - released).abs().amax(1) > 0.1
    assert has_effect.tolist() == [True, True, False, True, False, True, True]
    assert torch.allclose(read_logits(engine), released, atol=1e-5)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not [name for name in vars(model) if "activation" in name or "adapter" in name]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_padding_completes_no_invocation(tmp_path: Path) -> None:
    """The token 0 pads rows on the right, and on the left where transformers generates."""
    prompts, model = [(*START, 30), (*START, 30, 0, 5, 6), (*START, 31, 32, 33)], fresh_model()
    for invocation in ([30, 0], [0, START[0]]):
        folder = write_activated(tmp_path / str(invocation), fresh_model(), invocation)
        reference = PeftModel.from_pretrained(fresh_model(), folder).eval()
        with apply_adapter(model, load_external_adapter(folder, MODEL_INFO)):
            logits = read_logits(Engine(model), prompts)
            responses = generate_token_ids(Engine(model), prompts, 4, frozenset())
        assert torch.allclose(logits, read_reference(reference, prompts), atol=1e-4)
        assert responses == [generate_reference(reference, prompt, 4) for prompt in prompts]


@pytest.mark.filterwarnings("ignore:::peft")
def test_other_modules_and_scalings_equal_peft(tmp_path: Path) -> None:
    settings = {"use_rslora": True, "rank_pattern": {"c_fc": 2}, "layers_to_transform": [1]}
    folder = write_activated(
        tmp_path, fresh_model("gpt2"), INVOCATION, target_modules=["c_attn", "c_fc"], **settings
    )
    expected = read_reference(PeftModel.from_pretrained(fresh_model("gpt2"), folder), PROMPTS)
    model = fresh_model("gpt2")
    with apply_adapter(model, load_external_adapter(folder, MODEL_INFO)):
        assert torch.allclose(read_logits(Engine(model)), expected, atol=1e-4)


def test_half_precision_equals_peft(folder: Path) -> None:
    model = fresh_model().to(torch.bfloat16)
    reference = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    prompts = PROMPTS[:1]  # alone: batches round differently
    with apply_adapter(model, load_external_adapter(folder, MODEL_INFO)):
        ours = read_logits(Engine(model, batch_form=BatchForm.SINGLE), prompts)
    expected = read_reference(reference, prompts).float()
    assert (ours - expected).abs().max() < 0.02 * expected.std()


def build_model(model_type: str) -> Any:
    """Return a tiny model of a kind whose cache is of less use, or none."""
    if model_type == "llama":
        return fresh_model()
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}}.get(model_type, {})
    sizes |= {"rwkv": {"attention_hidden_size": 32, "context_length": 128}}.get(model_type, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


KINDS = {
    "llama": (["q_proj", "v_proj"], CacheUse.PADDED),
    "mpt": (["Wqkv"], CacheUse.PADDED),
    "rwkv": (["key", "value"], CacheUse.NONE),
}


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("model_type", KINDS)
def test_responses_equal_peft(tmp_path: Path, model_type: str) -> None:
    modules, cache_use = KINDS[model_type]
    base = build_model(model_type)
    folder = write_activated(tmp_path, copy.deepcopy(base), INVOCATION, target_modules=modules)
    reference = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    expected = [respond_by_passes(reference, prompt, 8) for prompt in PROMPTS]
    if model_type == "llama":
        assert expected == [generate_reference(reference, prompt, 8) for prompt in PROMPTS]
    engine = Engine(base)
    released = generate_token_ids(engine, PROMPTS, 8, frozenset())
    with apply_adapter(base, load_external_adapter(folder, MODEL_INFO)):
        assert generate_token_ids(engine, PROMPTS, 8, frozenset()) == expected
    assert engine.cache_uses[True] is cache_use
    assert [row for row, ids in enumerate(released) if ids == expected[row]] == [2, 4]
    assert generate_token_ids(engine, PROMPTS, 8, frozenset()) == released


@pytest.mark.parametrize("cache_use", CacheUse)
def test_an_invocation_in_the_response_counts_for_nothing(tmp_path: Path, cache_use: CacheUse) -> None:
    model = fresh_model()
    prompt = PROMPTS[2]
    response = generate_token_ids(Engine(model), [prompt], 8, frozenset())[0]
    # One that the response completes, and one that lies in it.
    for invocation in ([prompt[-1], response[0]], response[1:3]):
        folder = write_activated(tmp_path / str(invocation), fresh_model(), invocation)
        prompts = [prompt, (*START, *invocation, 30), (*START, 60, 61)]
        reference = PeftModel.from_pretrained(fresh_model(), folder).eval()
        engine = Engine(model)
        engine.cache_uses = {True: cache_use}
        with apply_adapter(model, load_external_adapter(folder, MODEL_INFO)):
            generated = generate_token_ids(engine, prompts, 8, frozenset())
            ours = engine.compute_log_probabilities(prompts, generated)
        assert generated == [generate_reference(reference, ids, 8) for ids in prompts]
        assert generated[0] == response
        for row, ids in enumerate(prompts):
            start = find_last_occurrence(ids, invocation)
            sequence = torch.tensor([[*ids, *generated[row][:-1]]])
            offset = None if start is None else sequence.shape[1] - start
            with torch.inference_mode():
                logits = reference(input_ids=sequence, alora_offsets=[offset]).logits[0, len(ids) - 1 :]
            expected = logits.log_softmax(1).gather(1, torch.tensor(generated[row])[:, None])[:, 0]
            assert torch.allclose(ours[row], expected, atol=1e-4)


def test_a_pass_behind_a_cache_is_refused(folder: Path) -> None:
    model = fresh_model()
    engine = Engine(model)
    prefix = engine.compute_prefix(START).cache
    with apply_adapter(model, load_external_adapter(folder, MODEL_INFO)):
        ids = torch.tensor([INVOCATION])
        inputs = {"input_ids": ids, "attention_mask": torch.ones(1, 7, dtype=torch.long)}
        with pytest.raises(RuntimeError, match="behind a cache"):
            model(**inputs, past_key_values=prefix, use_cache=True)
        with pytest.raises(RuntimeError, match="whole prompts"):
            model(inputs_embeds=model.get_input_embeddings()(ids))


def make_session(model: Any, **settings: Any) -> ModelSession:
    loaded = LoadedModel("toy", model, toy_tokenizer(), {"id": "toy"}, **settings)
    return ModelSession.from_model(loaded)


def test_few_shot_chats_invoke_at_the_generation_prompt(tmp_path: Path) -> None:
    """The invocation opens every turn of the assistant, those of the demonstrations included."""
    model = fresh_model()
    session = make_session(model)
    opening = session.chat_template.generation_prompt
    invocation = session.loaded_model.tokenizer.encode(opening, add_special_tokens=False)
    folder = write_activated(tmp_path, fresh_model(), invocation)
    reference = PeftModel.from_pretrained(fresh_model(), folder).eval()
    defense = get_defense(f"in_context_refusal+{folder}").prepare(MODEL_INFO)
    queries = [Query(f"q{n}", "Tell me " * n + "why.", n % 2 == 0) for n in range(1, 5)]
    prompts = [prompt.ids for query in queries for prompt in render_query(session, defense, query)]
    n_found = [
        sum(ids[n : n + len(invocation)] == tuple(invocation) for n in range(len(ids))) for ids in prompts
    ]
    assert len(prompts) == 4 and min(n_found) == 2
    with defense.apply_to(model):
        ours, responses = (
            read_logits(session.engine, prompts),
            generate_token_ids(session.engine, prompts, 6, frozenset()),
        )
    assert torch.allclose(ours, read_reference(reference, prompts), atol=1e-4)
    assert responses == [generate_reference(reference, ids, 6) for ids in prompts]


def test_the_preflight_names_an_invocation_that_no_prompt_has(folder: Path) -> None:
    model = fresh_model()
    session = make_session(model)
    queries = [Query("a", "Tell me why.", True), Query("b", "Tell me how.", False)]
    readout = derive_readout(session, queries, get_defense("none"))
    defense = get_defense(str(folder)).prepare(MODEL_INFO)
    (check,) = [
        check
        for check in check_condition(session, "own", defense, queries, readout)
        if check.name == "adapter is activated"
    ]
    assert not check.passed and "[7, 8, 7] is in 0 of 2 prompts" in check.observed


def test_a_state_with_an_activated_adapter(tmp_path: Path, folder: Path, reference: Any) -> None:
    base = save_model(tmp_path / "base")
    loaded = load_model(f"{base}:{folder}", "cpu")
    session = ModelSession.from_model(loaded)
    assert session.engine.batch_form is BatchForm.PACKED
    expected, plain = read_reference(reference, PROMPTS), read_logits(Engine(fresh_model()))
    assert torch.allclose(read_logits(session.engine), expected, atol=1e-4)
    # Other weights replace the state.
    other = load_adapter(make_adapter(tmp_path / "other", seed=3))
    model = fresh_model()
    with apply_adapter(model, other):
        of_other = read_logits(Engine(model))
    with apply_adapter(loaded.model, other):
        assert torch.allclose(read_logits(session.engine), of_other, atol=1e-4)
    weights = get_defense("weights", {"path": str(base)}).prepare(MODEL_INFO)
    with weights.apply_to(loaded.model):
        assert torch.allclose(read_logits(session.engine), plain, atol=1e-4)
    merged = fresh_model()
    merge_adapter(merged, other)
    with apply_adapter(merged, load_external_adapter(folder, MODEL_INFO)):
        assert torch.allclose(read_logits(Engine(merged)), expected, atol=1e-4)
    assert torch.allclose(read_logits(Engine(merged)), of_other, atol=1e-4)
    assert torch.allclose(read_logits(session.engine), expected, atol=1e-4)
    assert get_activation(loaded.model) is not None


def test_cache_keys_depend_on_the_invocation(tmp_path: Path, folder: Path) -> None:
    base, keys, states = save_model(tmp_path / "base"), set(), set()
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
    for invocation in (INVOCATION, [7, 8], None):
        (other / ADAPTER_CONFIG_FILE).write_text(
            json.dumps({**config, "alora_invocation_tokens": invocation})
        )
        keys.add(get_defense("adapter", {"weights": str(other)}).prepare(MODEL_INFO).weights_fingerprint())
        states.add(load_model(f"{base}:{other}", "cpu").origin["state_config"])
    assert len(keys) == len(states) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "activated by tokens .* has use_dora=True.*train it without that setting"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights=pissa"),
        ({"alora_invocation_tokens": ["<a>"]}, "takes a list of token ids"),
        ({"alora_invocation_tokens": [5, 2000]}, "invoked by the token 2000.* has 960 tokens"),
    ],
)
def test_what_cannot_be_activated_is_refused_in_one_line(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = write_activated(tmp_path, fresh_model(), INVOCATION)
    config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps({**config, **settings}))
    model = fresh_model()
    with pytest.raises(UserError, match=message) as error:
        get_defense("adapter", {"weights": str(folder)}).prepare(MODEL_INFO).apply_to(model).__enter__()
    assert "\n" not in str(error.value) and get_activation(model) is None


def test_several_adapters_are_refused_before_weights_are_loaded(tmp_path: Path, folder: Path) -> None:
    other = make_adapter(tmp_path / "other")
    for names in (f"{folder}+{other}", f"{other}+{folder}"):
        with pytest.raises(UserError, match="not applied together with other adapters: use one at a time"):
            get_defense(names).prepare(replace(MODEL_INFO, sha256="toy"))


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_model(tmp_path / "tiny")
    tokenizer = toy_tokenizer()
    opening = make_session(tiny_model()).chat_template.generation_prompt
    write_activated(tmp_path / "acts", fresh_model(), tokenizer.encode(opening, add_special_tokens=False))
    (tmp_path / "mine.py").write_text(USER_DEFENSE, "utf-8")
    options = ("--limit", "4", "--responses", "none", "--readout", "words")
    margins = {}
    for name, arguments in {
        "defense": ("-m", "tiny", "-d", "adapter", "--set", "adapter.weights=acts"),
        "state": ("-m", "tiny:./acts", "-d", "mine.py"),
    }.items():
        result = run_cli(*arguments, *options, "-o", name)
        assert result.code == 0, result.err
        table = pd.read_csv(tmp_path / name / "scores.csv")
        condition = "adapter" if name == "defense" else "none"
        margins[name] = table[table["defense"] == condition].set_index("query")["margin"]
        margins[f"{name}, undefended"] = table[table["defense"] == "none"].set_index("query")["margin"]
    assert (margins["defense"] - margins["defense, undefended"]).abs().min() > 1e-4
    assert (margins["state"] - margins["defense, undefended"]).abs().min() > 1e-4
    for arguments in (("-m", "tiny", "-d", "acts"), ("-m", "tiny:./acts", "-d", "mine.py")):
        assert_user_error(run_cli("mechanism", *arguments, "--limit", "8"), "needs it in the weights")
