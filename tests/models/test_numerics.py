"""Logits that are no numbers are never written, and the line says which cause is likely."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TOY_READOUT, fresh_model, toy_tokenizer

from analysis.models.loading import LoadedModel
from analysis.models.numerics import check_short_prompt
from analysis.models.session import ModelSession
from analysis.readouts.prompt_scores import score_prompts
from defenses.catalog import get_defense
from defenses.errors import UserError


def make_session(model: torch.nn.Module) -> ModelSession:
    return ModelSession.from_model(LoadedModel("toy", model, toy_tokenizer(), {"id": "toy"}))


def refuse_model(model: torch.nn.Module, match: str) -> None:
    session = make_session(model)
    with pytest.raises(UserError, match=match):
        check_short_prompt(session)
    with pytest.raises(UserError, match=match):
        score_prompts(session.loaded_model, session.engine, get_defense("none"), [(5, 300, 310)], TOY_READOUT)


def test_finite_logits_pass() -> None:
    check_short_prompt(make_session(fresh_model()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_weight_is_named(value: float) -> None:
    model = fresh_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    refuse_model(model, r"its weight model\.layers\.1\.mlp\.up_proj\.weight holds such values.*damaged")


def test_a_damaged_weight_is_named_where_attention_hides_it() -> None:
    model = fresh_model()
    model.model.layers[0].self_attn.q_proj.weight.data[3, 4] = torch.nan
    ids = torch.tensor([[5, 300, 310]])
    assert model(ids, use_cache=False).logits.isfinite().all()  # else this test shows nothing
    with pytest.raises(UserError, match=r"its weight model\.layers\.0\.self_attn\.q_proj\.weight holds such"):
        check_short_prompt(make_session(model))


def test_an_overflow_in_float16_says_which_precision_to_use() -> None:
    model = fresh_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6  # infinite in float16
    refuse_model(
        model.half(), r"its weight .*up_proj.weight exceeds the range of float16; use --dtype bfloat16"
    )
    model = fresh_model()
    for name in ("up_proj", "gate_proj", "down_proj"):
        getattr(model.model.layers[0].mlp, name).weight.data.mul_(2000)
    refuse_model(model.half(), r"activations probably exceed the range of float16; use --dtype bfloat16")


def test_tokens_excluded_by_minus_infinity_are_allowed() -> None:
    model = fresh_model()
    bias = torch.zeros(960)
    bias[7] = -torch.inf
    model.lm_head.bias = torch.nn.Parameter(bias)
    check_short_prompt(make_session(model))


def test_tokens_that_the_embedding_lacks_are_refused(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{number}|>" for number in range(500)]})
    unused = ModelSession.from_model(LoadedModel("toy", fresh_model(), tokenizer, {"id": "toy"}))
    check_short_prompt(unused)  # surplus tokens alone are harmless
    token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", token)
    session = ModelSession.from_model(LoadedModel("toy", fresh_model(), tokenizer, {"id": "toy"}))
    with pytest.raises(UserError, match=rf"gives '<.499.>' the id {len(tokenizer) - 1}, .* 0 to 959 only"):
        check_short_prompt(session)
