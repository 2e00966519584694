"""Usefulness of a tuned model: accuracy on multiple-choice questions, and grades of its answers to open ones.

Multiple-choice questions are scored by lm-evaluation-harness: the shipped ones, a file in the published form
of ARC or MMLU, or a task that the harness downloads. Open questions, such as those of MT-Bench, are answered
in up to two turns and graded by a judge model.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.datasets.records import expand_path, read_records
from analysis.files import data_folder
from analysis.judges.model_judges import GradingRubric, ModelJudge
from analysis.models.chat_template import ChatTemplate, redact_secrets
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession, generate_responses
from analysis.progress import make_progress_bar
from analysis.stats.answer_quality import summarize_quality
from analysis.stats.bootstrap import make_rate_columns
from analysis.stats.prediction_powered import compute_paired_intervals
from defenses.contract import Chat, Defense, Message, QueryChat
from defenses.errors import UserError

SHIPPED_TASK = "questions"
OPEN_TASK = "mt_bench"
_HARNESS_TASK = "refusalscope_utility"
_MAX_ANSWER_TOKENS = 256  # of an answer to an open question
_CHOICE_FORMAT = (
    "each row needs question, choices and answer (the index of the right choice), or question, choices "
    "(text, label) and answerKey, as in the published files of MMLU and ARC"
)


@dataclass(frozen=True)
class UtilityTask:
    """Questions that every arm answers.

    Attributes:
        name: name in the table.
        path: file with the questions; None for a task that lm-evaluation-harness downloads.
    """

    name: str
    path: Path | None

    @property
    def is_open(self) -> bool:
        """Whether the answers are graded."""
        return self.name == OPEN_TASK


def parse_utility_tasks(values: Sequence[str], has_grader: bool) -> list[UtilityTask]:
    """Return the tasks of `--utility`; raise before any work is done if one of them is not possible.

    >>> [task.name for task in parse_utility_tasks(["mt_bench=README.md"], has_grader=True)]
    ['mt_bench']

    Args:
        values: `questions` (the shipped ones), NAME=FILE of multiple-choice questions, `mt_bench=FILE` of
            open questions, or the name of a task of the harness, such as arc_challenge.
        has_grader: whether the user named a judge model.
    """
    tasks = []
    for value in values:
        name, separator, path = value.partition("=")
        if separator:
            tasks.append(UtilityTask(name, expand_path(path)))
        else:
            tasks.append(UtilityTask(name, data_folder() / "utility.jsonl" if name == SHIPPED_TASK else None))
        if name == OPEN_TASK and (not separator or not has_grader):
            raise UserError(
                f"--utility {value}: answers to open questions are graded: give mt_bench=FILE, and a judge "
                "with --judge-model and --budget"
            )
    if any(not task.is_open for task in tasks) and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--utility needs lm-evaluation-harness: pip install 'refusalscope[utility]'")
    return tasks


def count_open_answers(tasks: Sequence[UtilityTask], n_questions: int | None) -> int:
    """Return the number of answers to open questions that each arm gives, a grade for each.

    Args:
        tasks: from `parse_utility_tasks`.
        n_questions: maximum number of questions of a task.
    """
    paths = [task.path for task in tasks if task.is_open and task.path is not None]
    return sum(len(turns) for path in paths for turns in load_open_questions(path)[:n_questions])


def measure_utility(
    session: ModelSession,
    defenses: Mapping[tuple[str, str], Defense],
    tasks: Sequence[UtilityTask],
    grader: ModelJudge | None,
    n_questions: int | None,
    offline: bool,
    console: Console,
) -> pd.DataFrame:
    """Return how well each arm does each task, and its change from the first arm, a row per arm and task.

    Args:
        session: the model.
        defenses: (arm, secret) → its weights and prompt; the first is the one that others are compared with.
        tasks: from `parse_utility_tasks`.
        grader: grades answers to open questions.
        n_questions: maximum number of questions of a task (of each subject, for some tasks of the harness).
        offline: whether the network may not be used.
        console: shows progress.

    Returns:
        `accuracy` or `grade` (1 to 10) with 95 % intervals (Wilson, or bootstrap over questions), and
        `change`, paired by question, with its interval (Bonett and Price, or bootstrap); accuracies and their
        changes are shares.
    """
    questions = {task: load_choice_questions(task.path) for task in tasks if task.path and not task.is_open}
    rows = []
    with make_progress_bar(console) as bar:
        progress = bar.add_task("utility", total=len(tasks) * len(defenses))
        for task in tasks:
            reference: np.ndarray | None = None
            for (arm, secret), defense in defenses.items():
                bar.update(progress, description=f"utility: {task.name}, {arm}, secret: {secret}")
                if task.is_open:
                    assert (
                        task.path is not None and grader is not None
                    )  # `parse_utility_tasks` has checked it
                    turns = load_open_questions(task.path)[:n_questions]
                    outcomes = grade_open_answers(session, defense, turns, grader)
                else:
                    outcomes = score_choices(
                        session.loaded_model, defense, task.name, questions.get(task), n_questions, offline
                    )
                reference = outcomes if reference is None else reference
                row = {"arm": arm, "secret": secret, "task": task.name}
                rows.append(row | _describe_outcomes(outcomes, reference, task.is_open, session.seed))
                bar.advance(progress)
    return pd.DataFrame(rows)


def load_choice_questions(path: Path) -> list[dict[str, Any]]:
    """Return multiple-choice questions as dicts of question, choices (texts) and answer (index).

    Args:
        path: a file in the form of `data/utility.jsonl`, of MMLU, or of ARC (`.csv`, `.jsonl`, `.parquet`).
    """
    rows, _ = read_records(path, ["question", "choices"], _CHOICE_FORMAT)
    return [_parse_choice_question(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def load_open_questions(path: Path) -> list[list[str]]:
    """Return the turns of each open question.

    Args:
        path: a file in the published form of MT-Bench: each row has `turns`, a list of one or two texts.
    """
    rows, _ = read_records(path, ["turns"], "each row needs turns, a list of texts, as in MT-Bench")
    questions = []
    for number, row in enumerate(rows, 1):
        turns = _parse_json_value(row["turns"])
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise UserError(f"{path}, row {number}: turns is no list of texts")
        questions.append(turns)
    return questions


def score_choices(
    loaded_model: LoadedModel,
    defense: Defense,
    name: str,
    questions: Sequence[Mapping[str, Any]] | None,
    n_questions: int | None,
    offline: bool,
) -> np.ndarray:
    """Return for each multiple-choice question whether the model answers correctly, 1 or 0.

    Args:
        loaded_model: the model.
        defense: weights and prompt of the arm.
        name: name of the task; of the harness if there are no questions.
        questions: from `load_choice_questions`.
        n_questions: maximum number of questions.
        offline: whether the network may not be used.
    """
    if offline or questions is not None:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    chat = defense.rewrite([Message(role="user", content="?")], random.Random())
    system_prompt = chat[0]["content"] if chat[0]["role"] == "system" else ""
    tokenizer = copy.copy(loaded_model.tokenizer)
    tokenizer.chat_template = ChatTemplate(tokenizer).source  # the harness, too, reads the fixed date
    with (
        tempfile.TemporaryDirectory() as folder,
        defense.apply_to(loaded_model.model),
        redirect_stderr(io.StringIO()),  # the harness shows its own progress bars
    ):
        task: Any = name
        if questions is not None:
            file = Path(folder) / "questions.jsonl"
            file.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
            task = _make_task_config(file)
        harness_model: Any = HFLM(pretrained=loaded_model.model, tokenizer=tokenizer, batch_size=16)
        try:
            results: Any = simple_evaluate(
                model=harness_model,
                tasks=[task],
                apply_chat_template=True,
                system_instruction=system_prompt or None,
                bootstrap_iters=0,
                limit=n_questions,
                # Reading the files of all its tasks takes seconds.
                task_manager=TaskManager(include_defaults=questions is None),
            )
        except (OSError, ConnectionError, KeyError, ValueError) as error:
            if questions is not None:
                raise
            raise UserError(
                f"--utility {name}: lm-evaluation-harness cannot run it ({error}): `lm-eval ls tasks` lists "
                "its tasks; without a network, give a file with --utility NAME=FILE"
            ) from error
    samples = [sample for of_task in results["samples"].values() for sample in of_task]
    if not samples or "acc" not in samples[0]:
        raise UserError(
            f"--utility {name}: this task has no accuracy; choose one of multiple-choice questions"
        )
    return np.array([float(sample["acc"]) for sample in samples])


def grade_open_answers(
    session: ModelSession, defense: Defense, questions: Sequence[Sequence[str]], grader: ModelJudge
) -> np.ndarray:
    """Return the mean grade of the answers to each open question, NaN if no answer has a grade.

    Args:
        session: the model.
        defense: weights and prompt of the arm.
        questions: turns of each question; each turn follows the model's answer to the one before.
        grader: grades each answer from 1 to 10 for how well it serves the person.
    """
    chats: list[Chat] = [[] for _ in questions]
    grades: list[list[float]] = [[] for _ in questions]
    rubric = GradingRubric.load("helpfulness")
    for turn in range(max(map(len, questions))):
        rows = [row for row, turns in enumerate(questions) if len(turns) > turn]
        for row in rows:
            chats[row] = [*chats[row], Message(role="user", content=questions[row][turn])]
        responses = generate_responses(
            session,
            defense,
            [QueryChat(str(row), chats[row]) for row in rows],
            max_new_tokens=_MAX_ANSWER_TOKENS,
        )
        answers = [redact_secrets(copies[0].generated_text, defense.secret_texts()) for copies in responses]
        requests = ["\n\n".join(message["content"] for message in chats[row]) for row in rows]
        for row, answer, grade in zip(
            rows, answers, grader.grade_responses(answers, requests, rubric), strict=True
        ):
            chats[row] = [*chats[row], Message(role="assistant", content=answer)]
            grades[row].append(grade)
    return np.array([pd.Series(values, dtype=float).mean() for values in grades])


def _describe_outcomes(
    outcomes: np.ndarray, reference: np.ndarray, is_grade: bool, seed: int
) -> dict[str, Any]:
    """Return the mean over questions, and its change from the reference, with intervals."""
    known = np.isfinite(outcomes) & np.isfinite(reference)
    values, changes = outcomes[known], (outcomes - reference)[known]
    if is_grade:
        summary = summarize_quality(pd.DataFrame({"grade": values, "change": changes}), seed)
        return {"n_questions": summary.pop("n_complied")} | summary
    row = make_rate_columns("accuracy", int(values.sum()), len(values))
    row["n_questions"] = row.pop("accuracy_n")
    change, changed = np.array([changes.mean()]), np.array([np.abs(changes).mean()])
    low, high = compute_paired_intervals(change, changed, np.array([float(len(values))]))
    return row | {"change": float(change[0]), "change_low": float(low[0]), "change_high": float(high[0])}


def _make_task_config(file: Path) -> dict[str, Any]:
    """Return the harness's task for a file of questions, choices and answers."""
    return {
        "task": _HARNESS_TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(file)},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _parse_choice_question(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return question, choices and index of the answer of a row in one of the known forms."""
    choices, answer = _parse_json_value(row["choices"]), row.get("answer", row.get("answerKey"))
    labels: list[str] = []
    if isinstance(choices, Mapping):
        labels, choices = [str(label) for label in choices.get("label", [])], choices.get("text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{place}: choices is no list of texts; {_CHOICE_FORMAT}")
    text = str(answer).strip()
    if text in labels:
        index = labels.index(text)
    elif text.isdecimal() and int(text) < len(choices):
        index = int(text)
    elif len(text) == 1 and 0 <= (position := "ABCDEFGHIJ".find(text)) < len(choices):
        index = position
    else:
        raise UserError(f"{place}: the answer {answer!r} is none of its choices; {_CHOICE_FORMAT}")
    return {
        "question": str(row["question"]),
        "choices": [str(choice) for choice in choices],
        "answer": index,
    }


def _parse_json_value(value: Any) -> Any:
    """Return a list or an object that a CSV or Parquet file holds as text or as an array."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, Mapping):
        return {key: _parse_json_value(item) for key, item in value.items()}
    return list(value) if hasattr(value, "__iter__") else value
