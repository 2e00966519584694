"""Prompts of every defense with the embedded model, word for word, and their agreement with its attributes.

The embedded model reads no images, so defenses that act on images only are tested elsewhere.

`REWRITE=1 pytest tests/defenses/test_prompts.py` rewrites the file of prompts; check the difference before
you commit it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_training_requests, render_query

from analysis.datasets.queries import Query
from analysis.models.chat_template import redact_secrets
from analysis.models.loading import LoadedModel, build_model_info
from analysis.models.session import ModelSession
from analysis.run import build_conditions
from defenses.catalog import find_defense_classes, get_defense, list_defense_names
from defenses.contract import MeanActivations, ModelCall, ModelInfo
from defenses.settings import get_settings

PROMPTS_PATH = Path(__file__).with_name("prompts.json")
QUERY = Query("bread-01", "How do I bake a loaf of bread for my neighbor?", False)
DOCS_PATH = Path(__file__).parents[2] / "docs" / "defenses.md"
pytestmark = pytest.mark.embedded


class ScriptedCalls:
    """Gives the same response to every call, and records the calls."""

    def __init__(self) -> None:
        self.calls: list[ModelCall] = []

    def complete_calls(self, calls: Sequence[ModelCall]) -> list[str]:
        """Return the same response for each."""
        self.calls += calls
        return ["What is bread made of?" for _ in calls]


@pytest.fixture(scope="module")
def session(smollm2: LoadedModel) -> ModelSession:
    """A session with the embedded model."""
    return ModelSession.from_model(smollm2)


@pytest.fixture(scope="module")
def model_info(smollm2: LoadedModel) -> ModelInfo:
    """The properties of the embedded model, with arbitrary mean activations."""
    activations = MeanActivations(torch.zeros(30, 576), torch.ones(30, 576), frozenset(), "none")
    return replace(
        build_model_info("smollm2", smollm2.tokenizer, sha256=smollm2.origin["sha256"]),
        compute_mean_activations=lambda: activations,
        load_training_requests=make_training_requests,
    )


def render_defense(session: ModelSession, model_info: ModelInfo, name: str) -> dict[str, Any]:
    """Return the calls and prompts of a defense and its ablations, with redacted secrets."""
    rendered: dict[str, Any] = {}
    for condition, defense in build_conditions([get_defense(name).prepare(model_info)]).items():
        scripted = ScriptedCalls()
        object.__setattr__(session, "defense_calls", scripted)
        prompts = render_query(session, defense, QUERY)
        asked = [session.chat_template.render_prompt(call.chat).text for call in scripted.calls]
        reads = [redact_secrets(prompt.text, defense.secret_texts()) for prompt in prompts]
        tokens = {"tokens": [len(prompt.ids) for prompt in prompts]} if defense.retokenizes else {}
        rendered[condition] = {"asked": asked, "reads": reads, **tokens}
    return rendered


TEXT_DEFENSES = [name for name, cls in find_defense_classes().items() if not cls.needs_images]


@pytest.mark.parametrize("name", TEXT_DEFENSES)
def test_prompts_are_those_of_the_file_and_agree_with_settings_and_cost(
    session: ModelSession, model_info: ModelInfo, name: str
) -> None:
    rendered = render_defense(session, model_info, name)
    prompts = json.loads(PROMPTS_PATH.read_text("utf-8")) if PROMPTS_PATH.exists() else {}
    if os.environ.get("REWRITE"):
        prompts = {key: value for key, value in prompts.items() if key in TEXT_DEFENSES}
        prompts[name] = rendered
        text = json.dumps(dict(sorted(prompts.items())), indent=1, ensure_ascii=False)
        PROMPTS_PATH.write_text(text + "\n", "utf-8")
    assert prompts[name] == rendered

    defense = get_defense(name)
    if defense.detects:  # its own prompts are tested with what it reads
        return
    # Every setting that is a text appears in a prompt; an empty one stands for another text.
    everything = " ".join(json.dumps(rendered, ensure_ascii=False).split())
    for key, text in get_settings(defense).items():
        if isinstance(text, str) and key not in ("tone", "noise", "layers", "condition"):
            for part in text.split("{request}"):
                escaped = " ".join(json.dumps(part, ensure_ascii=False)[1:-1].split())
                assert escaped.strip() in everything, key

    if defense.cost != "weights":
        n_other_prompts = max(0, len(defense.logit_blend()) - 1)
        for condition in rendered.values():
            counts = len(condition["asked"]) + n_other_prompts, len(condition["reads"])
            assert defense.cost == {(0, 1): "static", (1, 1): "one call"}.get(counts, "N calls")


def test_every_defense_is_in_the_documentation_with_its_cost() -> None:
    text = DOCS_PATH.read_text("utf-8").partition("## Defenses of other toolkits")[0]
    table = [line for line in text.splitlines() if line.startswith("|")]
    for name in list_defense_names()[1:]:
        (row,) = [line for line in table if f"`{name}`" in line]
        assert row.rstrip(" |").rsplit("| ", 1)[1] == get_defense(name).cost, name
    documented = {name for line in table for name in re.findall(r"`(\w+)`", line)}
    assert documented == set(list_defense_names()) - {"none"}
    families = {get_defense(name).family for name in list_defense_names()}
    assert len(documented) >= 49 and len(families) == 11  # with none, control and backdoor
