"""The study of `analyze judge`: a verdict for each response in a file; and the user's choice of a judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from analysis.datasets.queries import Query
from analysis.datasets.records import (
    RECORD_FORMATS,
    RECORD_SUFFIXES,
    get_record_suffix,
    read_records,
)
from analysis.files import check_output_folder, write_text_file
from analysis.judges.judge import Judge
from analysis.judges.learned import LEARNED_JUDGE
from analysis.judges.rules import RULE_JUDGES
from analysis.models.chat_template import redact_secrets
from analysis.models.loading import silence_libraries
from analysis.progress import make_notifier, make_progress_bar
from analysis.stats.agreement import measure_grade_agreement
from analysis.stats.answer_quality import summarize_harmfulness
from analysis.stats.tables import format_table
from defenses.errors import UserError, unknown_name_error

if TYPE_CHECKING:
    from analysis.judges.model_judges import ModelJudge

VERDICT_COLUMNS = ("refusal", "evidence", "judge")
HARMFULNESS_COLUMN = "harmfulness"  # of the grades that `analyze judge --grade` writes


def list_shipped_judges() -> dict[str, Judge]:
    """Return the judges that need no model, by name."""
    return {**RULE_JUDGES, LEARNED_JUDGE.name: LEARNED_JUDGE}


@dataclass(frozen=True)
class SampleOptions:
    """How many responses are sampled.

    Attributes:
        n_samples: responses to each query.
        temperature: of the softmax that tokens are drawn from.
    """

    n_samples: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.n_samples < 1:
            raise UserError(f"--samples {self.n_samples}: it takes the number of responses to each query")
        if not 0 < self.temperature <= 10:
            raise UserError(
                f"--temperature {self.temperature:g}: it takes a number above 0, at most 10; the greedy "
                "response, as at 0, is judged in any case"
            )


@dataclass(frozen=True)
class JudgeOptions:
    """The user's choice of a judge.

    Attributes:
        name: learned, patterns, keywords, or model.
        model: the judge model: id, folder, `.gguf` file, or `http://host/v1#NAME`.
        budget: maximum number of calls to the judge model.
        rubric: file with the prompt of the judge model.
        grade: whether the judge model also grades responses: how harmful those to harmful queries are, and
            how helpful those to benign ones.
    """

    name: str = LEARNED_JUDGE.name
    model: str | None = None
    budget: int | None = None
    rubric: Path | None = None
    grade: bool = False

    def check_options(self) -> None:
        """Check the options without loading a model.

        Raises:
            UserError: if an option has no valid value, or does not belong to this judge.
        """
        shipped_judges = list_shipped_judges()
        if self.name not in (*shipped_judges, "model"):
            raise unknown_name_error("judge", self.name, (*shipped_judges, "model"))
        if self.name in shipped_judges:
            model_options = {
                "--judge-model": self.model,
                "--rubric": self.rubric,
                "--budget": self.budget,
                "--grade": self.grade or None,
            }
            for option, value in model_options.items():
                if value is not None:
                    raise UserError(f"{option} is for --judge model; the judge is {self.name}")
            return
        if not self.model:
            raise UserError(
                "--judge model: which one? --judge-model ID, folder, .gguf file, or http://host/v1#NAME"
            )
        from analysis.judges.model_judges import check_judge_inputs

        check_judge_inputs(self.budget, self.rubric)

    def load_judge(self, offline: bool, notify: Any) -> Judge:
        """Check the options and return the judge.

        Args:
            offline: whether the network may not be used.
            notify: prints a line that the user should read before anything is sent.

        Raises:
            UserError: if an option has no valid value, or the judge cannot be loaded.
        """
        self.check_options()
        if (shipped_judge := list_shipped_judges().get(self.name)) is not None:
            return shipped_judge
        from analysis.judges.model_judges import ModelJudge, load_model_judge

        assert self.model is not None  # `check_options` has checked it
        silence_libraries(offline)
        judge = load_model_judge(self.model, self.budget, self.rubric, offline, notify)
        if self.grade and not isinstance(judge, ModelJudge):
            raise UserError(f"--grade: {self.model} is a classifier; a chat model can grade")
        return judge

    def check_budget(self, n_responses: int) -> None:
        """Raise if the budget is smaller than the number of calls that may be needed.

        Args:
            n_responses: number of responses to judge.
        """
        needed = n_responses * (2 if self.grade else 1)  # a verdict, and at most one grade
        if self.budget is not None and self.budget < needed:
            raise UserError(
                f"--budget {self.budget}: up to {needed:,} calls of the judge are needed; raise it, or use "
                "fewer queries (--limit) or conditions"
            )


def grade_harmfulness(
    responses: Sequence[str], queries: Sequence[Query], grader: ModelJudge, secrets: Sequence[str], seed: int
) -> dict[str, Any]:
    """Have a judge model grade the responses to harmful queries; return the mean grade and the share of 5.

    Args:
        responses: text of the response to each query.
        queries: all queries; those that are not harmful are left out.
        grader: the judge model.
        secrets: of the defense; redacted before a response is graded.
        seed: random seed of the bootstrap.
    """
    rows = [row for row, query in enumerate(queries) if query.harmful]
    from analysis.judges.model_judges import GradingRubric

    grades = grader.grade_responses(
        [redact_secrets(responses[row], tuple(secrets)) for row in rows],
        [queries[row].text for row in rows],
        GradingRubric.load("harmfulness"),
    )
    return summarize_harmfulness(grades, seed)


@dataclass(frozen=True)
class JudgedResponses:
    """Records with verdicts.

    Attributes:
        records: the records, with the columns `VERDICT_COLUMNS`, and `HARMFULNESS_COLUMN` if it was graded.
        judge_name: name of the judge.
        unjudged_reasons: why responses have no verdict, one entry per response.
        harmfulness: summary of the grades, and their agreement with people's; empty without grades.
    """

    records: list[dict[str, Any]]
    judge_name: str
    unjudged_reasons: list[str]
    harmfulness: dict[str, Any] = field(default_factory=dict)

    def write_records(self, path: Path) -> None:
        """Write the records as `.csv` or `.jsonl`, as the suffix says."""
        if path.suffix == ".csv":
            text = format_table(pd.DataFrame(self.records))
        else:
            text = "".join(
                json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in self.records
            )
        write_text_file(path, text)


def choose_judged_path(path: Path, out: Path | None) -> Path:
    """Return the file to write; raise if it cannot be written, or the input is of another kind.

    Args:
        path: the file with the responses.
        out: the file that the user named, or None for the default beside the input.
    """
    suffix = get_record_suffix(path)
    if suffix not in RECORD_SUFFIXES:
        raise UserError(f"{path}: `analyze judge` takes a {RECORD_FORMATS} with a column of responses")
    judged_suffix = ".csv" if suffix in (".csv", ".tsv") else ".jsonl"
    out = out or path.with_name(f"{path.name[: path.name.lower().rindex(suffix)]}.judged{judged_suffix}")
    if out.suffix != judged_suffix:
        raise UserError(f"-o {out}: give a {judged_suffix} file, the format for the rows of {path.name}")
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten: choose another -o")
    check_output_folder(out.parent)
    return out


def judge_file(
    path: Path,
    response_column: str,
    query_column: str | None,
    judge_options: JudgeOptions,
    console: Console,
    offline: bool = False,
    label_column: str | None = None,
) -> JudgedResponses:
    """Judge each response in a file.

    Of a file that this judge has judged before, only the responses without a verdict are judged again.

    Args:
        path: a file with one response per row.
        response_column: column with the responses.
        query_column: column with the queries, with which off-topic responses are recognized.
        judge_options: the judge.
        console: shows progress.
        offline: whether the network may not be used.
        label_column: column with people's grades from 1 to 5, to compare the grades with.

    Raises:
        UserError: if the file has no such column, or the judge gives no verdict at all.
    """
    records, _ = read_records(path, [response_column], "it needs a column of responses (--column)")
    return judge_records(
        records, str(path), response_column, query_column, judge_options, console, offline, label_column
    )


def judge_records(
    records: Sequence[dict[str, Any]],
    source: str,
    response_column: str,
    query_column: str | None,
    judge_options: JudgeOptions,
    console: Console,
    offline: bool = False,
    label_column: str | None = None,
) -> JudgedResponses:
    """Judge the response in each record.

    Args:
        records: one per response.
        source: name of the records in errors.
        response_column: key of the responses.
        query_column: key of the queries, with which off-topic responses are recognized.
        judge_options: the judge.
        console: shows progress.
        offline: whether the network may not be used.
        label_column: key of people's grades from 1 to 5, to compare the grades with.

    Raises:
        UserError: if the records have no such key, or the judge gives no verdict at all.
    """
    for column in filter(None, (response_column, query_column, label_column)):
        if column not in records[0]:
            raise unknown_name_error(f"column of {source}:", column, records[0])
    if judge_options.grade and query_column is None:
        raise UserError("--grade needs the requests as well: name their column with --request")
    if label_column is not None and not judge_options.grade:
        raise UserError(f"--labels {label_column} is compared with grades: add --grade")
    labels = [_parse_label(record, label_column, source) for record in records] if label_column else None
    judge = judge_options.load_judge(offline, make_notifier(console))
    pending = _list_unjudged_rows(source, records, judge.name)
    responses = [_get_text(records[row], response_column) for row in pending]
    queries = [_get_text(records[row], query_column) if query_column else "" for row in pending]
    with make_progress_bar(console) as bar:
        task = bar.add_task("judging", total=len(pending))
        verdicts = judge.judge_responses(responses, queries, lambda count: bar.advance(task, count))
    if not any(verdict.is_judged for verdict in verdicts):
        raise UserError(f"the judge gave no verdict: {verdicts[0].evidence}")
    judged = [dict(record) for record in records]
    for row, verdict in zip(pending, verdicts, strict=True):
        values = verdict.refusal, verdict.evidence, judge.name
        judged[row] |= dict(zip(VERDICT_COLUMNS, values, strict=True))
    unjudged_reasons = [verdict.evidence for verdict in verdicts if not verdict.is_judged]
    harmfulness: dict[str, Any] = {}
    if judge_options.grade and query_column is not None:
        harmfulness = _grade_records(judged, judge, response_column, query_column, labels)
    return JudgedResponses(judged, judge.name, unjudged_reasons, harmfulness)


def _grade_records(
    records: Sequence[dict[str, Any]],
    judge: Judge,
    response_column: str,
    query_column: str,
    labels: Sequence[float] | None,
) -> dict[str, Any]:
    """Write a grade from 1 to 5 into each record without one; return their summary, and their agreement."""
    from analysis.judges.model_judges import GradingRubric, ModelJudge

    assert isinstance(judge, ModelJudge)  # `load_judge` has checked it
    pending = [record for record in records if not _get_text(record, HARMFULNESS_COLUMN)]
    new_grades = judge.grade_responses(
        [_get_text(record, response_column) for record in pending],
        [_get_text(record, query_column) for record in pending],
        GradingRubric.load("harmfulness"),
    )
    for record, grade in zip(pending, new_grades, strict=True):
        record[HARMFULNESS_COLUMN] = None if grade != grade else int(grade)
    grades = [float(_get_text(record, HARMFULNESS_COLUMN) or "nan") for record in records]
    agreement = measure_grade_agreement(grades, labels) if labels is not None else {}
    return summarize_harmfulness(grades) | agreement


def _parse_label(record: dict[str, Any], column: str, source: str) -> float:
    """Return a person's grade, NaN if there is none; raise if it is no number from 1 to 5."""
    text = _get_text(record, column).strip()
    if not text:
        return float("nan")
    try:
        label = float(text)
    except ValueError:
        label = 0.0
    if label not in (1, 2, 3, 4, 5):
        raise UserError(f"{source}: {column}={text}: people's grades are whole numbers from 1 to 5")
    return label


def _get_text(record: dict[str, Any], column: str) -> str:
    """Return a value as text; nothing for a missing value, which is no response named "nan"."""
    value = record.get(column)
    return "" if value is None or value != value else str(value)


def _list_unjudged_rows(source: str, records: Sequence[dict[str, Any]], judge_name: str) -> list[int]:
    """Return the rows without a verdict: all rows of new records, or what this judge left unjudged."""
    present = {column for record in records for column in VERDICT_COLUMNS if column in record}
    if not present:
        return list(range(len(records)))
    unjudged = [row for row, record in enumerate(records) if record.get("refusal") == "unjudged"]
    if present != set(VERDICT_COLUMNS) or not unjudged:
        raise UserError(f"{source} has a column {min(present)!r} already; rename it")
    if other_judges := sorted({str(record.get("judge")) for record in records} - {judge_name}):
        raise UserError(
            f"{source} was judged by {other_judges[0]}, so {judge_name} cannot complete it: use the "
            "same judge"
        )
    return unjudged
