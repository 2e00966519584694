"""How public sets are written down: for each format, what a row of it says in the words of our own files.

Only what is asked is taken over. Columns with the opening of a harmful answer (`Target`, `target`) are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from defenses.errors import UserError

PublishedRow = Mapping[str, Any]
# A row as published, and the name of its file without the ending -> a row of ours.
RowParser = Callable[[PublishedRow, str], dict[str, Any]]

_MOSSBENCH_CATEGORIES = {"type 1": "exaggerated risk", "type 2": "negated harm", "type 3": "counterintuitive"}


def parse_advbench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Take the goal; the target is the opening of an answer."""
    return {"text": row["goal"], "harmful": True}


def parse_figstep(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Take the request in plain words, of which the image would show a version in letters."""
    number = f"{row['category_id']}-{row['task_id']}"
    return {"id": number, "text": row["question"], "harmful": True, "category": row["category_name"]}


def parse_harmbench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    r"""Take the behavior behind its context, joined as the publisher joins them.

    >>> row = {"BehaviorID": "a", "Behavior": "Sum it up.", "ContextString": "A tale."}
    >>> harmbench({**row, "SemanticCategory": "tales"}, "test")["text"]
    'A tale.\n\n---\n\nSum it up.'
    """
    text = "\n\n---\n\n".join(part for part in (row["ContextString"], row["Behavior"]) if part)
    return {"id": row["BehaviorID"], "text": text, "harmful": True, "category": row["SemanticCategory"]}


def parse_jailbreakbench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Take the goal; the file's name says the class, and equal indices are a pair."""
    harmful, index = "harmful" in file_stem, row["Index"]
    if harmful == ("benign" in file_stem):
        raise UserError(
            f"{file_stem}.csv: only their names tell the two files of jbb apart; call it harmful-behaviors.csv or "
            "benign-behaviors.csv"
        )
    one = {"id": f"{index}-{'h' if harmful else 'b'}", "pair": index, "text": row["Goal"]}
    return {**one, "category": row["Category"], **_class_columns(harmful)}


def parse_mm_safetybench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Take the question as it was before any of it was moved into an image; the file is the scenario."""
    return {"id": f"{file_stem}-{row['id']}", "text": row["Question"], "harmful": True, "category": file_stem}


def parse_mossbench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Take the question that goes with the image, and why models refuse it."""
    over = row["metadata"].get("over", "") if isinstance(row["metadata"], dict) else ""
    one = {"id": row["id"], "text": row["question"], "category": _MOSSBENCH_CATEGORIES.get(over, over)}
    return {**one, **_class_columns(harmful=False)}


def parse_or_bench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Take a prompt of the hard subset."""
    return {"text": row["prompt"], "category": row["category"], **_class_columns(harmful=False)}


def parse_sorry_bench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Take the only turn."""
    turns = row["turns"]
    text = turns[0] if isinstance(turns, list) and len(turns) == 1 else turns
    return {"id": row["question_id"], "text": text, "harmful": True, "category": row["category"]}


def parse_strongreject(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Take the forbidden prompt."""
    return {"text": row["forbidden_prompt"], "harmful": True, "category": row["category"]}


def parse_xstest(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Take the prompt and its label; the types with contrast_ in front are the unsafe ones."""
    one = {"id": row["id"], "text": row["prompt"], "category": row["type"]}
    label = row["label"]  # any other is left to be refused as what it is
    return {**one, **(_class_columns(label == "unsafe") if label in ("safe", "unsafe") else {"harmful": label})}


def _class_columns(harmful: bool) -> dict[str, Any]:
    """The class; benign rows of these sets were made to look harmful, so they are no plain ones."""
    return {"harmful": harmful, "kind": "harmful" if harmful else "twin"}
