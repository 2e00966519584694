"""Cards against real prompts: what each defense has the embedded model read, word for word.

`REWRITE=1 pytest tests/defenses/test_cards.py` writes the file anew; look at the difference before it is committed.
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

from analysis.datasets.queries import Query
from analysis.models.chat_template import redact_secrets
from analysis.models.loading import LoadedModel, build_model_info
from analysis.models.session import ModelSession
from analysis.run import build_conditions
from defenses.catalog import get_defense, list_defense_names
from defenses.contract import MeanActivations, ModelCall
from defenses.settings import get_settings

KEPT = Path(__file__).with_name("prompts.json")
QUERY = Query("bread-01", "How do I bake a loaf of bread for my neighbor?", False)
DOCS = Path(__file__).parents[2] / "docs" / "defenses.md"
pytestmark = pytest.mark.embedded


class Scripted:
    """Drafts that nobody has to make: the same words whatever is asked, and what was asked."""

    def __init__(self) -> None:
        self.asked: list[ModelCall] = []

    def complete_calls(self, asks: Sequence[ModelCall]) -> list[str]:
        """Return the same words for each."""
        self.asked += asks
        return ["What is bread made of?" for _ in asks]


def shown(loaded: LoadedModel, name: str) -> dict[str, Any]:
    """Return what is asked first and what is read, under a defense and its parts; secrets as a mark."""
    torch = pytest.importorskip("torch")
    host = replace(
        build_model_info("smollm2", loaded.tokenizer, sha256=loaded.origin["sha256"]),
        compute_mean_activations=lambda: MeanActivations(
            torch.zeros(30, 576), torch.ones(30, 576), frozenset(), "none"
        ),
    )
    found: dict[str, Any] = {}
    for part, one in build_conditions([get_defense(name).prepare(host)]).items():
        bench, script = ModelSession.from_model(loaded), Scripted()
        object.__setattr__(bench, "defense_calls", script)
        prompts = bench.render_query(one, QUERY)
        asked = [bench.chat_template.render_prompt(ask.chat).text for ask in script.asked]
        tokens = {"tokens": [len(prompt.ids) for prompt in prompts]} if one.retokenizes else {}
        reads = [redact_secrets(prompt.text, one.secret_texts()) for prompt in prompts]
        found[part] = {"asked": asked, "reads": reads, **tokens}
    return found


@pytest.mark.parametrize("name", list_defense_names())
def test_what_is_read_is_what_was_looked_at(smollm2: LoadedModel, name: str) -> None:
    known = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}
    now = shown(smollm2, name)
    if os.environ.get("REWRITE"):
        known = {**{key: one for key, one in known.items() if key in list_defense_names()}, name: now}
        KEPT.write_text(json.dumps(dict(sorted(known.items())), indent=1, ensure_ascii=False) + "\n", "utf-8")
    assert known[name] == now


@pytest.mark.parametrize("name", list_defense_names())
def test_the_words_of_a_card_are_in_what_is_asked_or_read(smollm2: LoadedModel, name: str) -> None:
    """A setting that is a text has to arrive; one that is empty stands for another."""
    everything = " ".join(json.dumps(shown(smollm2, name), ensure_ascii=False).split())
    for key, text in get_settings(get_defense(name)).items():
        if isinstance(text, str) and key not in ("tone", "noise"):
            for piece in text.split("{request}"):
                said = " ".join(json.dumps(piece, ensure_ascii=False)[1:-1].split())
                assert said.strip() in everything, key


@pytest.mark.parametrize("name", list_defense_names())
def test_the_cost_that_a_card_names_is_what_it_takes(smollm2: LoadedModel, name: str) -> None:
    cost, parts = get_defense(name).cost, shown(smollm2, name)
    for part in parts.values() if cost != "weights" else ():
        calls, reads = len(part["asked"]), len(part["reads"])
        assert cost == {(0, 1): "static", (1, 1): "one call"}.get((calls, reads), "N calls")


def test_every_defense_is_on_the_page_under_its_cost() -> None:
    page = DOCS.read_text("utf-8")
    table = [line for line in page.splitlines() if line.startswith("|")]
    for name in list_defense_names()[1:]:
        (row,) = [line for line in table if f"`{name}`" in line]
        assert row.rstrip(" |").rsplit("| ", 1)[1] == get_defense(name).cost, name
    named = {one for line in table for one in re.findall(r"`(\w+)`", line)}
    assert named == set(list_defense_names()) - {"none"}
    families = {get_defense(name).family for name in list_defense_names()}
    assert len(named) >= 29 and len(families) == 9  # with none, control and backdoor
