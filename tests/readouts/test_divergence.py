"""Divergences of the first token equal those of plain forward passes, for every way a defense acts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_adapter, make_toy_session, run_cli, save_model, set_home_folder
from torch import Tensor

from analysis.api import read
from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.models.cache import ScoreCache
from analysis.models.session import ModelSession, generate_responses
from analysis.readouts import divergence as divergence_module
from analysis.readouts.divergence import compute_divergence, iterate_divergences
from defenses.adapters import load_adapter
from defenses.catalog import get_defense
from defenses.contract import Chat, Defense, ModelInfo
from defenses.decoding import Coca, SafeDecoding, SafetyPrefix
from defenses.tuning import SafetyTuning

NONE = get_defense("none")
QUERIES = load_queries("contrast").select_split("test").queries[:5]


def raise_failure(name: str, error: Exception) -> None:
    raise error


def collect(
    session: ModelSession, conditions: dict[str, Defense], prefix: Any = (), attack: Any = None
) -> Any:
    """Return the divergences by condition, joined over the parts."""
    chats = (attack or DIRECT_ATTACK).build_query_chats(QUERIES)
    found: dict[str, Any] = {}
    for name, values in iterate_divergences(session, NONE, conditions, chats, prefix, raise_failure):
        found[name] = None if values is None else [*found.get(name, []), *values]
    return found


def read_plainly(session: ModelSession, defense: Defense, ids: tuple[int, ...]) -> Tensor:
    """Return the logits of one plain forward pass."""
    model = session.loaded_model.model
    with torch.no_grad(), defense.apply_to(model):
        logits: Tensor = model(torch.tensor([list(ids)])).logits[0, -1].double()
    return logits


def expect(
    session: ModelSession, defense: Defense, prefix: tuple[int, ...], attack: Any
) -> list[tuple[float, float]]:
    """Return the divergences from plain passes, token by token, by torch's own function."""
    chats = attack.build_query_chats(QUERIES)
    values = []
    for (reference,), prompts in zip(
        session.render_prompts(NONE, chats), session.render_prompts(defense, chats), strict=True
    ):
        response: tuple[int, ...] = ()
        by_token: list[float] = []
        while len(by_token) < 12:
            logits = read_plainly(session, NONE, (*reference.append_prefix(prefix), *response))
            copies = []
            for prompt in prompts:
                ids, members = prompt.append_prefix(prefix), prompt.list_member_ids(prefix)
                # A blend chooses the first token only.
                blend = (not response and defense.logit_blend()) or ((1.0, defense),)
                parts = [
                    weight
                    * read_plainly(
                        session, member, (*(members[number] if members and not response else ids), *response)
                    )
                    for number, (weight, member) in enumerate(blend)
                ]
                copies.append(torch.stack(parts).sum(0).softmax(0))
            mixture = torch.stack(copies).mean(0)
            by_token.append(
                float(torch.nn.functional.kl_div(mixture.log(), logits.softmax(0), reduction="sum"))
            )
            response = (*response, int(logits.argmax()))
            if response[-1] in session.loaded_model.end_token_ids:
                break
        values.append((by_token[0], sum(by_token) / len(by_token)))
    return values


def test_divergences_are_those_of_plain_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_module, "_MAX_HELD_QUERIES", 2)
    session = make_toy_session()
    adapter = load_adapter(make_adapter(tmp_path / "x", seed=3))
    info = ModelInfo("toy", session.loaded_model.tokenizer, ())
    conditions = {
        "prompt": get_defense("policy"),
        "weights": SafetyTuning(adapter=adapter),
        "blend": SafeDecoding(adapter=adapter),
        "prompts blended": Coca(alpha=2.0),
        "copies": get_defense("smooth_llm", {"copies": 3}).prepare(info),
        "nothing": Still(),
    }
    for attack, prefix in ((DIRECT_ATTACK, (40, 41)), (get_attack("prefill"), ())):
        found = collect(session, conditions, prefix, attack)
        for name, defense in conditions.items():
            expected = expect(session, defense, prefix, attack)
            assert np.array(found[name]) == pytest.approx(np.array(expected), rel=1e-4, abs=1e-5), name
        assert np.max(found["nothing"]) < 1e-9 < np.min(found["prompt"])


def test_a_response_that_ends_has_as_many_positions_as_tokens_and_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = make_toy_session()
    whole = collect(session, {"policy": get_defense("policy")})["policy"]
    (chat, *_) = DIRECT_ATTACK.build_query_chats(QUERIES)
    ((response,),) = generate_responses(session, NONE, [chat], max_new_tokens=4)
    ends = frozenset({response.ids[-1]})
    monkeypatch.setattr(type(session.loaded_model), "end_token_ids", property(lambda model: ends))
    found = collect(session, {"policy": get_defense("policy")})["policy"]
    expected = expect(session, get_defense("policy"), (), DIRECT_ATTACK)
    assert np.array(found) == pytest.approx(np.array(expected), rel=1e-4, abs=1e-5)
    assert found[0].response != pytest.approx(whole[0].response)


@dataclass(frozen=True)
class Still(Defense):
    """Changes nothing."""

    family = "reminders"

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return chat


@dataclass(frozen=True)
class Detecting(Still):
    """Has a detector."""

    def score_requests(self, reader: Any, query_chats: Any) -> list[float]:
        return [-1.0] * len(query_chats)


@dataclass(frozen=True)
class Scaled(Still):
    """Changes the model in a way that nothing is known about."""

    @contextmanager
    def apply_to(self, model: Any) -> Iterator[None]:
        handle = model.get_output_embeddings().register_forward_hook(lambda *parts: 2 * parts[2])
        try:
            yield
        finally:
            handle.remove()


def test_without_a_first_token_of_the_model_there_is_no_divergence() -> None:
    session = make_toy_session()
    conditions = {"detector": Detecting(), "prefix": SafetyPrefix(), "policy": get_defense("policy")}
    found = collect(session, conditions)
    assert found["detector"] is None and found["prefix"] is None and len(found["policy"]) == len(QUERIES)


def test_a_divergence_is_exact_far_from_the_reference_and_never_negative() -> None:
    reference = torch.tensor([0.0, -200.0, -float("inf")]).log_softmax(0)
    other = torch.tensor([-150.0, 0.0, 0.0]).log_softmax(0)
    assert compute_divergence(reference, other) == pytest.approx(150 + torch.log(torch.tensor(2.0)).item())
    assert compute_divergence(other, other) == 0.0


def test_known_divergences_are_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded_model = make_toy_session().loaded_model
    conditions = {"policy": get_defense("policy"), "scaled": Scaled()}
    session = ModelSession.from_model(loaded_model, score_cache=ScoreCache(tmp_path / "s"))
    first = collect(session, conditions)
    assert np.min(first["scaled"]) > 1e-4
    counter = session.engine.work_counter
    counter.reset_counts()
    again = collect(session, {"policy": conditions["policy"]})
    assert again["policy"] == first["policy"] and counter.computed_tokens == 0
    assert collect(session, conditions)["scaled"] == first["scaled"] and counter.computed_tokens > 0


def test_a_condition_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_module, "_MAX_HELD_QUERIES", 2)
    session, failures = make_toy_session(), []

    class Broken(Still):
        def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
            raise ValueError("no such flour")

    conditions = {"broken": Broken(), "policy": get_defense("policy")}
    chats = DIRECT_ATTACK.build_query_chats(QUERIES)
    found = list(
        iterate_divergences(
            session, NONE, conditions, chats, (), lambda name, error: failures.append((name, str(error)))
        )
    )
    assert [name for name, _ in found] == ["policy"] * 3
    ((name, reason),) = failures
    assert name == "broken" and "no such flour" in reason


def test_the_command_adds_columns_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_home_folder(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "tiny")
    options = ("-d", "policy", "-d", "safety_prefix", "-m", "tiny", "--limit", "12", "--readout", "words")
    options += ("--responses", "none", "--controls", "0", "--offline")
    result = run_cli(*options, "--side-effects", "-o", "out")
    assert result.code == 0, result.err
    assert "Side effects on benign queries" in result.out
    run = read(tmp_path / "out")
    summary, rows = run.tables["summary"].set_index("defense"), run.tables["divergences"]
    assert summary.loc["policy", "kl_benign"] == pytest.approx(rows["kl"].mean())
    assert summary.loc["policy", "kl_benign_low"] < summary.loc["policy", "kl_benign"]
    assert summary.loc["policy", "kl_12_benign"] == pytest.approx(rows["kl_12"].mean())
    assert summary.loc["policy", "kl_12_benign"] < summary.loc["policy", "kl_12_benign_high"]
    assert summary.loc[["none", "safety_prefix"], "kl_benign"].isna().all()
    assert "side_effects" in run.figures
    assert set(rows["defense"]) == {"policy", "safety_prefix"}
    assert "KL on benign queries (nats)" in run.format_summary()
    assert list(run.tables["side_effects"]["defense"]) == ["policy"]
