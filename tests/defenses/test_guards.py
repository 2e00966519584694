"""Guard models as detectors: fitted or by their own decision, in stacks, and on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import assert_user_error, make_toy_session, run_cli, save_model, tiny_model, toy_tokenizer

from analysis.judges.rules import RULE_JUDGES
from analysis.models.requests import load_training_requests
from analysis.models.session import ModelSession
from defenses.catalog import get_defense
from defenses.contract import Chat, GuardOptions, ModelInfo, QueryChat
from defenses.errors import UserError
from defenses.guards import GUARD_FORMATS, GuardModel
from defenses.stack import Stack

TEXTS = [f"Request {number // 2}: {('kick', 'sing')[number % 2]}" for number in range(60)]
IS_HARMFUL = [number % 2 == 0 for number in range(60)]


@dataclass
class PlantedGuard:
    """A guard that knows the answer, and records how often it is asked."""

    identity: dict[str, Any]
    n_chats: list[int] = field(default_factory=list)

    def score_chats(self, chats: list[Chat]) -> torch.Tensor:
        self.n_chats.append(len(chats))
        return torch.tensor([3.0 if "kick" in chat[-1]["content"] else 1.0 for chat in chats])


@pytest.fixture(scope="module")
def session() -> ModelSession:
    return make_toy_session()


def prepare(session: ModelSession, guard: Any, **settings: str) -> Any:
    options: list[GuardOptions] = []

    def open_guard(asked: GuardOptions) -> Any:
        options.append(asked)
        return guard

    requests = load_training_requests(session, TEXTS, IS_HARMFUL, [None] * len(TEXTS))
    model_info = ModelInfo("toy", None, (), load_training_requests=lambda: requests, open_guard=open_guard)
    prepared = get_defense("guard_model", {"model": "some/guard", **settings}).prepare(model_info)
    return prepared, options


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


QUERY_CHATS = [QueryChat(text, [{"role": "user", "content": text}]) for text in ("Now kick", "Now sing")]


def test_the_threshold_of_a_guard_is_fitted_or_its_own(session: ModelSession) -> None:
    guard = PlantedGuard({"sha256": "a"})
    fitted, (options,) = prepare(session, guard, unsafe="Yes, Sure", safe="No", kind="words")
    assert options == GuardOptions("some/guard", "words", None, ("Yes", "Sure"), ("No",))
    assert fitted.fit.auroc == 1.0
    harmful, benign = fitted.score_requests(session.request_reader, QUERY_CHATS)
    assert harmful > 0 >= benign
    own, _ = prepare(session, guard, decision="own")
    # By its own decision, it calls both harmful.
    assert own.score_requests(session.request_reader, QUERY_CHATS) == [3.0, 1.0]
    assert own.fit.auroc == 1.0 and own.describe_fit()["guard"] == {"sha256": "a"}


def test_scores_are_kept_for_the_weights_of_the_guard(session: ModelSession) -> None:
    guard = PlantedGuard({"sha256": "a"})
    first, _ = prepare(session, guard)
    again, _ = prepare(session, guard)
    assert guard.n_chats == [60] and again.fit == first.fit
    other_guard = PlantedGuard({"sha256": "b"})
    other, _ = prepare(session, other_guard)
    assert other_guard.n_chats == [60]
    fingerprints = {defense.detector_fingerprint() for defense in (first, again, other)}
    assert len(fingerprints) == 2 and None not in fingerprints
    assert Stack((get_defense("policy"), first)).detector_fingerprint()


def test_without_a_model_the_guard_is_left_out_with_the_next_step(session: ModelSession) -> None:
    unprepared = GuardModel()
    model_info = ModelInfo("toy", None, (), open_guard=lambda options: pytest.fail("nothing to open"))
    assert unprepared.prepare(model_info) is unprepared
    assert "--set guard_model.model=FOLDER" in unprepared.missing_requirements()
    with pytest.raises(UserError, match="set the words of its verdicts as well"):
        get_defense("guard_model", {"kind": "words", "unsafe": "Yes"})


def test_every_kind_is_a_setting_and_has_words() -> None:
    for kind, known in GUARD_FORMATS.items():
        assert get_defense("guard_model", {"kind": kind}).kind == kind
        assert known.unsafe and known.safe and known.variants
        assert known.marks or known.template


def save_planted_classifier(folder: Path) -> Path:
    """Write a classifier that knows whether a text ends in kick or in sing."""
    from transformers import LlamaForSequenceClassification

    config = tiny_model().config.to_dict() | {"id2label": {0: "safe", 1: "unsafe"}, "num_labels": 2}
    model = LlamaForSequenceClassification(type(tiny_model().config)(**config)).eval()
    model.model.load_state_dict(tiny_model().model.state_dict())
    tokenizer = toy_tokenizer(None)
    with torch.no_grad():
        kick, sing = (
            torch.stack(
                [model.model(torch.tensor([tokenizer.encode(text)]))[0][0, -1] for text in texts]
            ).mean(0)
            for texts in (TEXTS[0:20:2], TEXTS[1:20:2])
        )
        model.score.weight.copy_(torch.stack([sing - kick, kick - sing]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("no_figures")
def test_a_run_with_a_guard_refuses_what_the_guard_calls_harmful(
    cli_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.studies.responses.RESPONSE_JUDGE", RULE_JUDGES["keywords"])
    folder = save_planted_classifier(tmp_path / "guard")
    rows = [
        {"text": f"Please {number}: {('kick', 'sing')[number % 2]}", "harmful": number % 2 == 0}
        for number in range(12)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "queries.csv", index=False)
    words = "-d guard_model -d policy+guard_model -m tiny --controls 0 --readout words"
    options = words.split()
    settings = ["--set", f"guard_model.model={folder}", "--set", "guard_model.decision=own"]
    loads: list[str] = []
    from analysis.judges import guard_models

    load = guard_models.load_sequence_classifier
    monkeypatch.setattr(
        guard_models,
        "load_sequence_classifier",
        lambda *args, **kwargs: (loads.append("once"), load(*args, **kwargs))[1],
    )
    result = run_cli(*options, *settings, "--data", tmp_path / "queries.csv", "-o", tmp_path / "run")
    assert result.code == 0, result.err
    assert loads == ["once"]  # for both conditions
    scores = pd.read_csv(tmp_path / "run" / "scores.csv")
    for name in ("guard_model", "policy+guard_model"):
        condition = scores[scores["defense"] == name]
        assert ((condition["detector"] > 0) == condition["harmful"]).all()
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    described = record["defenses"]["guard_model"]["detector"]
    assert described["guard"]["unsafe"] == ["unsafe"] and len(described["guard"]["sha256"]) == 64
    assert described["threshold"] == 0
    assert "requests with the label unsafe count as harmful" in " ".join(result.err.split())


def test_a_guard_that_cannot_be_used_ends_the_command_with_one_line(cli_home: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "plain")
    words = "-d guard_model -m tiny --limit 6 --controls 0 --readout words --offline"
    options = words.split()
    unknown = run_cli(*options, "--set", f"guard_model.model={tmp_path / 'plain'}")
    assert_user_error(unknown, "it is not known how this guard is asked: set guard_model.kind=")
    assert_user_error(run_cli(*options), "guard_model: specify the guard with --set guard_model.model=")
    absent = run_cli(*options, "--set", "guard_model.model=nobody/no-guard")
    assert_user_error(absent, "nobody/no-guard is neither a folder here nor in the local cache")
