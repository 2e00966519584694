"""Which judge a user wants, and what `analyze judge` does: a verdict beside each answer in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.cli.validate import print_verdict_shares
from analysis.datasets.records import RECORD_SUFFIXES, read_records
from analysis.files import check_output_folder, write_text_file
from analysis.judges.judge import Judge
from analysis.judges.rules import RULE_JUDGES
from analysis.models.loading import silence_libraries
from analysis.studies.progress import make_notifier, make_progress_bar
from defenses.errors import UserError, unknown_name_error

VERDICT_COLUMNS = ("refusal", "evidence", "judge")


@dataclass(frozen=True)
class JudgeOptions:
    """The judge that a user wants.

    Attributes:
        name: patterns, keywords, or model.
        model: which model, see `model_judge`.
        budget: its calls at most.
        rubric: a file of the user's.
        grade: whether it also grades benign answers.
    """

    name: str = "patterns"
    model: str | None = None
    budget: int | None = None
    rubric: Path | None = None
    grade: bool = False

    def load_judge(self, offline: bool, notify: Any) -> Judge:
        """Return the judge, loaded.

        Args:
            offline: whether the network may not be used.
            notify: told what a user should know before anything is sent.
        """
        if self.name not in (*RULE_JUDGES, "model"):
            raise unknown_name_error("judge", self.name, (*RULE_JUDGES, "model"))
        if self.name in RULE_JUDGES:
            given = {"--judge-model": self.model, "--rubric": self.rubric, "--budget": self.budget}
            given |= {"--grade": self.grade or None}
            for option, value in given.items():
                if value is not None:
                    raise UserError(f"{option} is for --judge model; the judge is {self.name}")
            return RULE_JUDGES[self.name]
        if not self.model:
            raise UserError(
                "--judge model: which one? --judge-model ID, folder, .gguf file, or http://host/v1#NAME"
            )
        from analysis.judges.model_judges import ModelJudge, load_model_judge

        silence_libraries(offline)
        judge = load_model_judge(self.model, self.budget, self.rubric, offline, notify)
        if self.grade and not isinstance(judge, ModelJudge):
            raise UserError(f"--grade: {self.model} is a classifier; a chat model can grade")
        return judge

    def check_budget(self, n_responses: int) -> None:
        """Raise where a budget is smaller than what there is to judge, before anything is sent."""
        needed = n_responses * (2 if self.grade else 1)  # at most a grade beside each verdict
        if self.budget is not None and self.budget < needed:
            raise UserError(
                f"--budget {self.budget}: up to {needed:,} calls of the judge are needed; raise it, or take "
                "fewer queries (--limit) or conditions"
            )


def judge_file(
    path: Path,
    response_column: str,
    query_column: str | None,
    judge_options: JudgeOptions,
    out: Path | None,
    offline: bool = False,
) -> int:
    """Write the rows of a file again with each answer's verdict and its evidence; print the shares.

    Rows that a judge left without a verdict are written, too; judged again, that file gets only those judged.

    Args:
        path: a `.csv` or `.jsonl`.
        response_column: holds the answers.
        query_column: the column of what was asked, by which an answer to something else is noticed.
        judge_options: which judge.
        out: a new file of the same kind; by default beside the old one.
        offline: whether the network may not be used.

    Returns:
        The exit code: 1 where answers are left without a verdict.
    """
    if path.suffix not in RECORD_SUFFIXES:
        raise UserError(f"{path}: `analyze judge` takes a .csv or .jsonl file with a column of answers")
    out = out or path.with_suffix(f".judged{path.suffix}")
    if out.suffix != path.suffix:
        raise UserError(f"-o {out}: it is written as it is read, so give a {path.suffix} file")
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten: choose another -o")
    check_output_folder(out.parent)
    found, _ = read_records(path, [response_column], "it needs a column of answers (--column)")
    if query_column is not None and query_column not in found[0]:
        raise unknown_name_error(f"column of {path}:", query_column, found[0])
    tell = make_notifier(Console(stderr=True))
    judge = judge_options.load_judge(offline, tell)
    left = _unjudged_rows(path, found, judge.name)
    answers = [str(found[row][response_column] or "") for row in left]
    requests = [str(found[row][query_column] or "") if query_column else "" for row in left]
    with make_progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("judging", total=len(left))
        verdicts = judge.judge_responses(answers, requests, lambda count: bar.advance(task, count))
    if not any(verdict.is_judged for verdict in verdicts):
        raise UserError(f"the judge gave no verdict: {verdicts[0].evidence}")
    judged = [dict(row) for row in found]
    for row, verdict in zip(left, verdicts, strict=True):
        judged[row] |= dict(
            zip(VERDICT_COLUMNS, (verdict.refusal, verdict.evidence, judge.name), strict=True)
        )
    if path.suffix == ".csv":
        text = pd.DataFrame(judged).to_csv(index=False)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged)
    write_text_file(out, text)
    print_verdict_shares([str(row["refusal"]) for row in judged], judge.name)
    tell(f"The verdicts are in {out}")
    why = [verdict.evidence for verdict in verdicts if not verdict.is_judged]
    if why:
        tell(
            f"{len(why)} answers have no verdict, mostly: {max(set(why), key=why.count)}. `analyze judge "
            f"{out}` with the same options judges only those."
        )
    return 130 if "interrupted" in why else 1 if why else 0


def _unjudged_rows(path: Path, records: list[dict[str, Any]], judge_name: str) -> list[int]:
    """The rows without a verdict: all of a new file, the unjudged ones of one that this judge began."""
    there = {name for row in records for name in VERDICT_COLUMNS if name in row}
    if not there:
        return list(range(len(records)))
    left = [number for number, row in enumerate(records) if row.get("refusal") == "unjudged"]
    if there != set(VERDICT_COLUMNS) or not left:
        raise UserError(f"{path} has a column {min(there)!r} already; rename it")
    if others := sorted({str(row.get("judge")) for row in records} - {judge_name}):
        raise UserError(
            f"{path} was judged by {others[0]}, so {judge_name} cannot complete it: take the same judge"
        )
    return left
