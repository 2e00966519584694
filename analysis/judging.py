"""What `analyze judge` does: a verdict beside each answer in a user's own file."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis import rows, saving, showing
from analysis.judge import JUDGES
from analysis.request import teller
from analysis.resampling import rate
from defenses.errors import UserError, unknown

ADDED = ("refusal", "evidence")


def judge_file(path: Path, column: str, request: str | None, name: str, out: Path | None) -> None:
    """Write the rows of a file again with each answer's verdict and its evidence; print the shares.

    Args:
        path: a `.csv` or `.jsonl`.
        column: holds the answers.
        request: the column of what was asked, by which an answer to something else is noticed.
        name: of the judge.
        out: a new file of the same kind; by default beside the old one.
    """
    if path.suffix not in rows.SUFFIXES:
        raise UserError(f"{path}: `analyze judge` takes a .csv or .jsonl file with a column of answers")
    if name not in JUDGES:
        raise unknown("judge", name, JUDGES)
    out = out or path.with_suffix(f".judged{path.suffix}")
    if out.suffix != path.suffix:
        raise UserError(f"-o {out}: it is written as it is read, so give a {path.suffix} file")
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten: choose another -o")
    saving.usable(out.parent)
    found, _ = rows.read(path, [column], "it needs a column of answers (--column)")
    if request is not None and request not in found[0]:
        raise unknown(f"column of {path}:", request, found[0])
    if taken := sorted(set(ADDED) & set(found[0])):
        raise UserError(f"{path} has a column {taken[0]!r} already; rename it")
    judge = JUDGES[name]
    verdicts = [judge(str(row[column] or ""), str(row[request] or "") if request else "") for row in found]
    judged = [
        row | dict(zip(ADDED, (verdict.refusal, verdict.evidence), strict=True))
        for row, verdict in zip(found, verdicts, strict=True)
    ]
    if path.suffix == ".csv":
        text = pd.DataFrame(judged).to_csv(index=False)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged)
    saving.write(out, text)
    shown = Table(title=f"{len(judged)} answers, judge {name}", title_justify="left", show_edge=False)
    for head in ("refusal", "answers", "share (%)"):
        shown.add_column(head, justify="left" if head == "refusal" else "right")
    for kind in ("full", "partial", "none"):
        count = sum(verdict.refusal == kind for verdict in verdicts)
        share = showing.interval(rate("share", count, len(judged)), "share", ".1f", 100)
        shown.add_row(kind, str(count), share)
    console = showing.stdout()
    console.print(shown)
    console.print(Text("Wilson 95 % intervals.", style="dim"))
    teller(Console(stderr=True))(f"The verdicts are in {out}")
