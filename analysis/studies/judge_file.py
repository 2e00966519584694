"""The study of `analyze judge`: a verdict for each response in a file; and the user's choice of a judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

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
from analysis.models.loading import silence_libraries
from analysis.progress import make_notifier, make_progress_bar
from analysis.stats.tables import format_table
from defenses.errors import UserError, unknown_name_error

VERDICT_COLUMNS = ("refusal", "evidence", "judge")


def list_shipped_judges() -> dict[str, Judge]:
    """Return the judges that need no model, by name."""
    return {**RULE_JUDGES, LEARNED_JUDGE.name: LEARNED_JUDGE}


@dataclass(frozen=True)
class JudgeOptions:
    """The user's choice of a judge.

    Attributes:
        name: learned, patterns, keywords, or model.
        model: the judge model: id, folder, `.gguf` file, or `http://host/v1#NAME`.
        budget: maximum number of calls to the judge model.
        rubric: file with the prompt of the judge model.
        grade: whether the judge model also grades responses to benign queries.
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


@dataclass(frozen=True)
class JudgedResponses:
    """Records with verdicts.

    Attributes:
        records: the records, with the columns `VERDICT_COLUMNS`.
        judge_name: name of the judge.
        unjudged_reasons: why responses have no verdict, one entry per response.
    """

    records: list[dict[str, Any]]
    judge_name: str
    unjudged_reasons: list[str]

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

    Raises:
        UserError: if the file has no such column, or the judge gives no verdict at all.
    """
    records, _ = read_records(path, [response_column], "it needs a column of responses (--column)")
    return judge_records(records, str(path), response_column, query_column, judge_options, console, offline)


def judge_records(
    records: Sequence[dict[str, Any]],
    source: str,
    response_column: str,
    query_column: str | None,
    judge_options: JudgeOptions,
    console: Console,
    offline: bool = False,
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

    Raises:
        UserError: if the records have no such key, or the judge gives no verdict at all.
    """
    for column in filter(None, (response_column, query_column)):
        if column not in records[0]:
            raise unknown_name_error(f"column of {source}:", column, records[0])
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
    return JudgedResponses(judged, judge.name, unjudged_reasons)


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
