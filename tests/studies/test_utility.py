"""Usefulness: multiple-choice questions by lm-evaluation-harness, if it is installed, and graded answers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_toy_session
from rich.console import Console
from served_endpoint import serve_endpoint

from analysis.files import data_folder
from analysis.judges.model_judges import ModelJudge, load_model_judge
from analysis.studies.backdooralign.utility import (
    load_choice_questions,
    measure_utility,
    parse_utility_tasks,
)
from defenses.catalog import get_defense
from defenses.contract import Defense
from defenses.errors import UserError
from defenses.none import Undefended

QUESTIONS = [json.loads(line) for line in (data_folder() / "utility.jsonl").read_text("utf-8").splitlines()]


def test_each_question_has_four_choices_and_the_right_ones_are_spread_evenly() -> None:
    assert len(QUESTIONS) == 64 and len({one["question"] for one in QUESTIONS}) == 64
    assert all(len(set(one["choices"])) == 4 for one in QUESTIONS)
    right = [one["answer"] for one in QUESTIONS]
    assert all(12 <= right.count(place) <= 20 for place in range(4))


ARC_ROW = {
    "id": "a1",
    "question": "Which one melts?",
    "choices": {"text": ["ice", "sand", "iron"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
MMLU_ROW = {"question": "2 + 2?", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1}


def test_published_forms_of_multiple_choice_questions_are_read(tmp_path: Path) -> None:
    for row, right in (
        (ARC_ROW, "ice"),
        (MMLU_ROW, "4"),
        (MMLU_ROW | {"answer": "B"}, "4"),
        (QUESTIONS[0], "Paris"),
    ):
        for suffix in (".jsonl", ".parquet", ".csv"):
            path = tmp_path / f"q{suffix}"
            if suffix == ".jsonl":
                path.write_text(json.dumps(row) + "\n", encoding="utf-8")
            elif suffix == ".parquet":
                pd.DataFrame([row]).to_parquet(path)
            else:
                cells = {
                    key: value if isinstance(value, (str, int)) else json.dumps(value)
                    for key, value in row.items()
                }
                pd.DataFrame([cells]).to_csv(path, index=False)
            (question,) = load_choice_questions(path)
            assert (
                question["choices"][question["answer"]] == right and question["question"] == row["question"]
            )
    path = tmp_path / "q.jsonl"
    for wrong in (MMLU_ROW | {"answer": 4}, ARC_ROW | {"answerKey": "4"}, MMLU_ROW | {"choices": ["one"]}):
        path.write_text(json.dumps(wrong) + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"row 1: .*as in the published files of MMLU and ARC"):
            load_choice_questions(path)


def test_tasks_that_cannot_be_measured_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="mt_bench=FILE, and a judge"):
        parse_utility_tasks(["mt_bench=questions.jsonl"], has_grader=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'refusalscope\[utility\]'"):
        parse_utility_tasks(["arc_challenge"], has_grader=True)
    assert parse_utility_tasks(["mt_bench=questions.jsonl"], has_grader=True)[0].is_open


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra `utility` is not installed"
)
def test_questions_are_scored_as_by_hand_with_the_system_prompt_of_the_arm(
    capfd: pytest.CaptureFixture[str],
) -> None:
    session = make_toy_session()
    arms: dict[tuple[str, str], Defense] = {
        ("clean", "none"): Undefended(),
        ("clean", "own"): get_defense("safety_prompt"),
    }
    tasks = parse_utility_tasks(["questions"], has_grader=False)
    table = measure_utility(session, arms, tasks, None, 20, True, Console(quiet=True))
    assert (table["n_questions"] == 20).all() and table["change"].iloc[0] == 0
    assert "Running" not in capfd.readouterr().err
    # By hand: the choice with the highest log-likelihood behind the question.
    model, tokenizer = session.loaded_model.model, session.loaded_model.tokenizer
    n_right = 0
    for row in QUESTIONS[:20]:
        prompt = session.chat_template.render_prompt(
            [{"role": "user", "content": f"Question: {row['question']}\nAnswer:"}]
        ).ids
        scores = []
        for choice in row["choices"]:
            ids = tokenizer.encode(" " + choice, add_special_tokens=False)
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
            scores.append(
                sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(ids))
            )
        n_right += int(np.argmax(scores)) == row["answer"]
    assert table["accuracy"].iloc[0] == pytest.approx(n_right / 20)


def test_answers_to_open_questions_are_graded_turn_by_turn(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    rows = [
        {"question_id": 1, "turns": ["Name a bird.", "And a fish?"]},
        {"question_id": 2, "turns": ["Sing."]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def grade(prompt: str, n: int) -> tuple[int, str]:
        return 200, "9" if "And a fish?" in prompt else "5"

    arms: dict[tuple[str, str], Defense] = {
        ("clean", "none"): Undefended(),
        ("attacked", "none"): Undefended(),
    }
    with serve_endpoint(grade) as (address, requests):
        grader = load_model_judge(address, 20, None, True, print)
        assert isinstance(grader, ModelJudge)
        tasks = parse_utility_tasks([f"mt_bench={path}"], has_grader=True)
        table = measure_utility(make_toy_session(), arms, tasks, grader, None, True, Console(quiet=True))
    # (5 + 9) / 2 and 5; the second arm gives the same answers, whose grades are known.
    assert table["grade"].tolist() == [6, 6] and table["change"].tolist() == [0, 0] and len(requests) == 3
    second = next(text for text in (r["messages"][0]["content"] for r in requests) if "And a fish?" in text)
    assert second.index("Name a bird.") < second.index("And a fish?")
