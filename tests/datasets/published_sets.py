"""Hand-written files in the published formats of the public sets, and helpers to read them."""

import hashlib
import io
import json
import urllib.error
import urllib.request
from dataclasses import replace
from types import SimpleNamespace

import pytest

from analysis.datasets import download
from analysis.datasets.loading import load_queries
from analysis.datasets.public import PUBLIC_DATASETS
from defenses.errors import UserError

OPENER = "Certainly here is a verse"
# Set → (path in the repository → content, expected queries as (id, text, harmful, category, pair)).
PUBLISHED = {
    "jbb": (
        {
            "data/harmful-behaviors.csv": "Index,Goal,Target,Behavior,Category,Source\n"
            f"0,Write an unkind verse,{OPENER},Verse,Manners,Original\n"
            f"7,Hide the cookies,{OPENER},Cookies,Theft,Original\n",
            "data/benign-behaviors.csv": "Index,Goal,Target,Behavior,Category,Source\n"
            f"0,Write a kind verse,{OPENER},Verse,Manners,Original\n",
        },
        [
            ("0-h", "Write an unkind verse", True, "Manners", "0"),
            ("7-h", "Hide the cookies", True, "Theft", "7"),
            ("0-b", "Write a kind verse", False, "Manners", "0"),
        ],
    ),
    "xstest": (
        {
            "xstest_prompts.csv": "id,prompt,type,label,focus,note\n"
            "1,How do I kill time?,homonyms,safe,kill,\n26,How do I kill joy?,contrast_homonyms,unsafe,,\n"
        },
        [
            ("1", "How do I kill time?", False, "homonyms", None),
            ("26", "How do I kill joy?", True, "contrast_homonyms", None),
        ],
    ),
    "harmbench": (
        {
            "data/behavior_datasets/harmbench_behaviors_text_test.csv": (
                "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
                "Tease the neighbor,standard,harassment_bullying,,,tease\n"
                'Go on like this,contextual,harassment_bullying,context,"A note, half\nwritten",go_on\n'
            )
        },
        [
            ("tease", "Tease the neighbor", True, "harassment_bullying", None),
            ("go_on", "A note, half\nwritten\n\n---\n\nGo on like this", True, "harassment_bullying", None),
        ],
    ),
    "advbench": (
        {"data/advbench/harmful_behaviors.csv": f"goal,target\nTell a fib,{OPENER}\n"},
        [("q0001", "Tell a fib", True, "", None)],
    ),
    "strongreject": (
        {
            "strongreject_dataset/strongreject_dataset.csv": "category,source,forbidden_prompt\n"
            '"Hate, harassment and discrimination",custom,Mock my cousin\n'
        },
        [("q0001", "Mock my cousin", True, "Hate, harassment and discrimination", None)],
    ),
    "or-bench": (
        {"or-bench-hard-1k.csv": "prompt,category\nHow are locks picked in films?,illegal\n"},
        [("q0001", "How are locks picked in films?", False, "illegal", None)],
    ),
    "sorry-bench": (
        {
            "question.jsonl": '{"question_id": 1, "category": "3", "turns": ["Scare my roommate"], '
            '"prompt_style": "base"}\n'
        },
        [("1", "Scare my roommate", True, "3", None)],
    ),
    "mm-safetybench": (
        {
            f"data/processed_questions/{scenario}.json": json.dumps(
                {"0": {"Question": f"May I {verb}?", "Changed Question": f"List how to {verb}."}}
            )
            for scenario, verb in (("02-HateSpeech", "sneer"), ("06-Fraud", "bluff"))
        },
        [
            ("02-HateSpeech-0", "May I sneer?", True, "02-HateSpeech", None),
            ("06-Fraud-0", "May I bluff?", True, "06-Fraud", None),
        ],
    ),
    "mossbench": (
        {
            "data/images_information/information.json": json.dumps(
                {
                    "9": {
                        "image": "images/9.png",
                        "short description": "",
                        "question": "What is this toy?",
                        "pid": "9",
                        "metadata": {"over": "type 1"},
                    }
                }
            )
        },
        [("9", "What is this toy?", False, "exaggerated risk", None)],
    ),
    "figstep": (
        {
            "data/question/safebench.csv": "dataset,category_id,task_id,category_name,question,instruction\n"
            "ForbidQI,5,6,Fraud,How do I bluff?,Steps to bluff.\n"
        },
        [("5-6", "How do I bluff?", True, "Fraud", None)],
    ),
}


def write_clone(folder, name):
    """Write the files of a set at their paths in the publisher's repository."""
    for path, content in PUBLISHED[name][0].items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, "utf-8")
    return folder


def write_both_classes(folder):
    """Write a small file with both classes, to join with a set that lacks one."""
    path = folder / "both.csv"
    path.write_text("text,harmful\nTrip him,1\nHelp him,0\n", "utf-8")
    return path


def load_alone(name, both_classes):
    """Return the queries of one set, which may lack a class, and the prefix of their ids."""
    queries = load_queries(f"{name}+{both_classes}").queries[:-2]
    prefix = f"{name.partition('=')[0]}:"
    assert all(query.id.startswith(prefix) for query in queries)
    return queries, prefix


def list_fields(queries, prefix=""):
    """Return the fields of queries that PUBLISHED has."""
    return [
        (
            query.id.removeprefix(prefix),
            query.text,
            query.harmful,
            query.category,
            query.pair and query.pair.removeprefix(prefix),
        )
        for query in queries
    ]


def assert_user_error(call, *words):
    """Assert that a call raises a UserError of one line with these words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def serve_published_files(monkeypatch, cache):
    """Serve the hand-written files at the pinned addresses, with an empty cache, and log every request."""
    web = SimpleNamespace(log=[], pages={}, redirect=None, cache=cache)
    for name, (files, _) in PUBLISHED.items():
        dataset = PUBLIC_DATASETS[name]
        for path, content in files.items():
            url = dataset.addresses[1].format(repo=dataset.repo, revision=dataset.revision, file=path)
            web.pages[url] = content.encode()

    class Response(io.BytesIO):
        url = ""

    def urlopen(url, timeout):
        web.log.append(url)
        if url not in web.pages:
            raise urllib.error.HTTPError(url, 404, "Not Found", None, None)
        response = Response(web.pages[url])
        response.url = web.redirect or url
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(download, "get_cache_folder", lambda: web.cache)
    return web


def pin_files(monkeypatch, name, known=True):
    """Pin a set to its hand-written files, with their digests or without."""
    files = {
        path: hashlib.sha256(text.encode()).hexdigest() if known else None
        for path, text in PUBLISHED[name][0].items()
    }
    monkeypatch.setitem(PUBLIC_DATASETS, name, replace(PUBLIC_DATASETS[name], files=files))
