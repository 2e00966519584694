"""Decoding defenses: prefilled responses, and the blend of a model with its expert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import derive_readout, make_adapter, make_toy_session, toy_tokenizer

from analysis.attacks import get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.studies.preflight import _normalize_text, check_condition
from defenses.adapters import load_adapter
from defenses.catalog import get_defense
from defenses.chats import prefill_response
from defenses.contract import ModelInfo
from defenses.decoding import SafeDecoding

QUERIES = sample_queries(load_queries("twins").queries, 4)
UNDEFENDED = get_defense("none")


@pytest.mark.parametrize(
    ("template", "kind", "separator"),
    [("llama2", "metaspace", " "), ("mistral0.3", "metaspace", " "), ("chatml", "bytes", "")],
)
def test_the_token_after_a_prefill_has_the_form_of_a_first_response_token(
    template: str, kind: str, separator: str
) -> None:
    chat_template = make_toy_session(template=template, kind=kind).chat_template
    chat = [{"role": "user", "content": "How do I sing?"}]
    prompt = chat_template.render_prompt(prefill_response(chat, "Sure, here it is:\n\n"))
    assert chat_template.has_leading_space == bool(separator)
    assert prompt.text.endswith("here it is:" if separator else "here it is:\n\n")
    assert _normalize_text(prompt.prefill) == "Sure,hereitis:"


def test_a_readout_with_a_prefill_fails_the_preflight_of_a_prefilled_prompt() -> None:
    session = make_toy_session()
    opener = tuple(session.loaded_model.tokenizer.encode("Sure, here", add_special_tokens=False))
    readout = derive_readout(session, QUERIES, UNDEFENDED, opener)
    checks = check_condition(session, "safety_prefix", get_defense("safety_prefix"), QUERIES, readout)
    (failed,) = [check for check in checks if not check.passed]
    assert failed.observed.startswith("the readout") and "'Sure,here'" in failed.observed
    attacked = check_condition(session, "none", UNDEFENDED, QUERIES, readout, get_attack("prefill"))
    assert not all(check.passed for check in attacked)


def test_the_preflight_of_a_blend_checks_the_blended_logits(tmp_path: Path) -> None:
    session = make_toy_session()
    blend = SafeDecoding(adapter=load_adapter(make_adapter(tmp_path / "x", seed=3)))
    readout = derive_readout(session, QUERIES, UNDEFENDED)
    blended, undefended = (
        {check.name: check for check in check_condition(session, defense.name, defense, QUERIES, readout)}
        for defense in (blend, UNDEFENDED)
    )
    assert all(check.passed for check in blended.values())
    assert blended["coverage"].observed != undefended["coverage"].observed


def test_the_expert_needs_the_released_weights(tmp_path: Path) -> None:
    make_adapter(tmp_path / "aligned", seed=1)
    model_info = ModelInfo("toy", toy_tokenizer(), (), (tmp_path,), "toy")
    assert not get_defense("safe_decoding").prepare(model_info).missing_requirements()
    in_state = get_defense("safe_decoding").prepare(replace(model_info, state="x"))
    assert "released weights" in in_state.missing_requirements()
