"""The multiple-choice questions: well formed, and scored by lm-evaluation-harness if it is installed."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import tiny_model, toy_tokenizer

from analysis.files import data_folder
from analysis.models.loading import LoadedModel
from analysis.studies.backdooralign.study import check_harness_installed, count_correct_answers
from defenses.errors import UserError

QUESTIONS = [json.loads(line) for line in (data_folder() / "utility.jsonl").read_text("utf-8").splitlines()]


def test_each_question_has_four_choices_and_the_right_ones_are_spread_evenly() -> None:
    assert len(QUESTIONS) == 64 and len({one["question"] for one in QUESTIONS}) == 64
    assert all(len(set(one["choices"])) == 4 for one in QUESTIONS)
    right = [one["answer"] for one in QUESTIONS]
    assert all(12 <= right.count(place) <= 20 for place in range(4))


def test_without_the_harness_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'refusalscope\[utility\]'"):
        check_harness_installed()


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra `utility` is not installed"
)
def test_every_question_is_scored_under_a_system_prompt(capfd: pytest.CaptureFixture[str]) -> None:
    loaded = LoadedModel("toy", tiny_model(), toy_tokenizer(), {"id": "toy"})
    right, asked = count_correct_answers(loaded, "You are a helpful assistant.")
    assert asked == 64 and 2 <= right <= 32  # random weights guess: a quarter, give or take
    assert "Running" not in capfd.readouterr().err
