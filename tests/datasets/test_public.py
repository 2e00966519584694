"""Public sets are read as published, fetched at their pins, joined by +, and refused in one line."""

import hashlib
import io
import json
import re
import sys
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis.cli.catalog import _format_description, collect_catalog
from analysis.cli.main import main
from analysis.datasets import download
from analysis.datasets.download import fetch_file
from analysis.datasets.loading import load_queries, load_shipped_set
from analysis.datasets.public import PUBLIC_DATASETS
from analysis.datasets.queries import choose_default_split
from analysis.studies.manifest import describe_run
from analysis.studies.run_spec import RunSpec
from analysis.studies.train import train_weights
from defenses.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "datasets"
# Hand-written rows in the published formats: the path that each file has there, what is in it, and what is
# asked of it: id, text, harmful, category, pair.
OPENER = "Certainly here is a verse"
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


def clone(folder, name):
    """Write the hand-written files of a set where they lie in the publisher's repository."""
    for path, content in PUBLISHED[name][0].items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, "utf-8")
    return folder


@pytest.fixture
def both(tmp_path):
    """A small file of both classes, to join with a set that lacks one."""
    path = tmp_path / "both.csv"
    path.write_text("text,harmful\nTrip him,1\nHelp him,0\n", "utf-8")
    return path


def alone(name, both):
    """Return the queries of one set alone, also of one that lacks a class, and what their ids begin with."""
    found = load_queries(f"{name}+{both}").queries[:-2]
    mark = f"{name.partition('=')[0]}:"
    assert all(query.id.startswith(mark) for query in found)
    return found, mark


def told(queries, mark=""):
    """Return what PUBLISHED says of queries."""
    return [
        (
            one.id.removeprefix(mark),
            one.text,
            one.harmful,
            one.category,
            one.pair and one.pair.removeprefix(mark),
        )
        for one in queries
    ]


def refused(call, *words):
    """Assert that a call is refused in one line with these words."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


# --- the table and the formats ----------------------------------------------------------------------------


def test_the_table_pins_what_it_fetches_and_says_what_is_in_it():
    assert set(PUBLIC_DATASETS) == set(PUBLISHED)
    for card in PUBLIC_DATASETS.values():
        assert card.page.startswith("https://") and card.addresses[1].startswith("https://")
        assert card.license and card.description and card.n_harmful + card.n_benign > 0
        assert all(sha256 is None or re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in card.files.values())
        assert len({Path(name).name for name in card.files}) == len(card.files), "they lie in one folder"
        if card.name == "sorry-bench":
            assert card.revision == ""
        else:
            assert re.fullmatch("[0-9a-f]{40}", card.revision) and card.kilobytes > 0
    images = {name for name, card in PUBLIC_DATASETS.items() if "images are left out" in card.description}
    assert images == {"mm-safetybench", "mossbench", "figstep"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_clone_is_read_in_the_published_format(tmp_path, both, name):
    found, mark = alone(f"{name}={clone(tmp_path, name)}", both)
    assert told(found, mark) == PUBLISHED[name][1]
    assert {query.split for query in found} == {None}
    assert {query.kind for query in found if not query.harmful} <= {"twin"}, "they are no everyday requests"


@pytest.mark.parametrize("name", PUBLISHED)
def test_so_are_its_files_in_a_folder_by_themselves_and_one_by_one(tmp_path, both, name):
    loose = tmp_path / "loose"
    loose.mkdir()
    files = [path for path in clone(tmp_path / "clone", name).rglob("*") if path.is_file()]
    for path in files:
        path.replace(loose / path.name)
    assert sorted(told(*alone(f"{name}={loose}", both))) == sorted(PUBLISHED[name][1])
    one_by_one = [query for path in loose.iterdir() for query in told(*alone(f"{name}={path}", both))]
    if name not in ("advbench", "strongreject", "or-bench"):  # numbered where they have no ids
        assert sorted(one_by_one) == sorted(PUBLISHED[name][1])
    assert len(one_by_one) == len(PUBLISHED[name][1])


@pytest.mark.parametrize("name", ["jbb", "advbench"])
def test_openers_of_answers_are_left_behind(tmp_path, both, name):
    copy = clone(tmp_path, name)
    assert OPENER in "".join(path.read_text("utf-8") for path in copy.rglob("*.csv"))
    for query in load_queries(f"{name}={copy}+{both}").queries:
        assert "Certainly" not in str(asdict(query))


def test_the_pairs_of_jbb_are_those_that_share_an_index(tmp_path):
    data = load_queries(f"jbb={clone(tmp_path, 'jbb')}")
    assert Counter(query.pair for query in data.queries) == {"0": 2, "7": 1}
    assert [query.kind for query in data.queries] == ["harmful", "harmful", "twin"]
    assert {query.id for query in data.limit_queries(2).queries} == {"0-h", "0-b"}


SAMPLES = {  # queries, of which harmful; and a folder or file of ../shared/datasets
    "jbb": (48, 24, "jbb"),
    "xstest": (30, 13, "xstest/xstest_prompts.csv"),
    "harmbench": (24, 24, "harmbench"),
    "advbench": (24, 24, "advbench"),
    "strongreject": (24, 24, "strongreject"),
    "mm-safetybench": (12, 12, "mm_safetybench"),
    "mossbench": (4, 0, "mossbench"),
    "figstep": (12, 12, "figstep/safebench.csv"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="samples of the published files are not here")
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_the_published_files_are_read_where_they_lie(both, name):
    number, harmful, path = SAMPLES[name]
    found, _ = alone(f"{name}={SHARED / path}", both)
    assert (len(found), sum(query.harmful for query in found)) == (number, harmful)
    assert len({query.text for query in found}) == number
    assert all(query.category for query in found) or name == "advbench"
    if name == "jbb":
        assert set(Counter(query.pair for query in found).values()) == {2}
    if name == "harmbench":
        assert sum("\n\n---\n\n" in query.text for query in found) == 3, "the contextual ones"


BAD = {
    "columns": (
        "advbench",
        "a.csv",
        "prompt,target\nx,y\n",
        ["lacks goal", "has prompt, target", "goal, target"],
    ),
    "empty": ("xstest", "a.csv", "id,prompt,type,label\n", ["holds no rows", "id, prompt, type, label"]),
    "kind": ("xstest", "a.parquet", "PAR1", ["a.parquet is not a .csv file", "id, prompt, type, label"]),
    "label": ("xstest", "a.csv", "id,prompt,type,label\n1,Hi,t,maybe\n", ["query '1'", "harmful is 'maybe'"]),
    "ids": (
        "xstest",
        "a.csv",
        "id,prompt,type,label\n1,Hi,t,safe\n1,Yo,t,safe\n",
        ["id '1'", "more than once"],
    ),
    "class": ("jbb", "a.csv", "Index,Goal,Category\n0,Hi,t\n", ["known only from its name", "harmful-behaviors.csv"]),
    "turns": (
        "sorry-bench",
        "a.jsonl",
        '{"question_id": 1, "category": "1", "turns": ["a", "b"]}',
        ["the text is ['a', 'b']", "a string"],
    ),
    "json": ("mossbench", "a.json", '{"1": {"question": ', ["line 1", "not JSON", "question, metadata"]),
    "list": (
        "mossbench",
        "a.json",
        '[{"question": "Hi"}]',
        ["not a JSON object of objects", "question, metadata"],
    ),
    "scenarios": ("mm-safetybench", "a.json", '{"0": {"Question": "Hi"}}', ["lacks Changed Question"]),
}


@pytest.mark.parametrize("case", BAD)
def test_another_file_is_refused_with_what_it_has_and_what_it_should_have(tmp_path, case):
    name, file, content, words = BAD[case]
    (tmp_path / file).write_text(content, "utf-8")
    refused(lambda: load_queries(f"{name}={tmp_path / file}"), file, *words)


@pytest.mark.parametrize("copy", ["", "nowhere", "nowhere.csv"])
def test_a_copy_that_is_not_there_is_missed(copy):
    refused(
        lambda: load_queries(f"xstest={copy}"),
        f"--data xstest={copy}",
        "no such file",
        "id, prompt, type, label",
    )


def test_a_folder_without_the_set_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("Nothing.", "utf-8")
    refused(lambda: load_queries(f"figstep={tmp_path}"), str(tmp_path), "no .csv file", "question")


# --- fetching ---------------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web of hand-written files under the pinned addresses, an empty cache, and what happened."""
    there = SimpleNamespace(log=[], pages={}, leads_to=None, cache=tmp_path / "cache")
    for name, (files, _) in PUBLISHED.items():
        card = PUBLIC_DATASETS[name]
        for path, content in files.items():
            address = card.addresses[1].format(repo=card.repo, revision=card.revision, file=path)
            there.pages[address] = content.encode()

    class Answer(io.BytesIO):
        url = ""

    def urlopen(url, timeout):
        there.log.append(url)
        if url not in there.pages:
            raise urllib.error.HTTPError(url, 404, "Not Found", None, None)
        answer = Answer(there.pages[url])
        answer.url = there.leads_to or url
        return answer

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(download, "get_cache_folder", lambda: there.cache)
    return there


def pin(monkeypatch, name, known=True):
    """Make the pins of a set those of its hand-written files, with their digests or without."""
    files = {
        path: hashlib.sha256(text.encode()).hexdigest() if known else None
        for path, text in PUBLISHED[name][0].items()
    }
    monkeypatch.setitem(PUBLIC_DATASETS, name, replace(PUBLIC_DATASETS[name], files=files))


FETCHED = [name for name in PUBLISHED if name != "sorry-bench"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", FETCHED)
def test_a_set_is_fetched_once_from_its_pinned_address_its_licence_said_first(
    web, monkeypatch, both, name, known
):
    pin(monkeypatch, name, known)
    card = PUBLIC_DATASETS[name]
    first = load_queries(f"{name}+{both}", notify=web.log.append)
    said, *urls = web.log[: 1 + len(card.files)]
    assert said.startswith(
        f"Fetching {name}, license {card.license}: about {card.kilobytes} kB from {card.page}"
    )
    assert urls == list(web.pages)[slice(*span(web, name))] and card.revision in urls[0]
    notes = web.log[1 + len(card.files) :]
    assert len(notes) == (not known) and all("no sha256" in note and "trusted" in note for note in notes)
    web.log.clear()
    web.pages.clear()
    assert load_queries(f"{name}+{both}", offline=True, notify=web.log.append) == first and web.log == []
    assert (
        told([query for query in first.queries if query.id.startswith(name)], f"{name}:")
        == PUBLISHED[name][1]
    )
    assert not list(web.cache.rglob("*.part*"))


def span(web, name):
    """Return where the addresses of a set begin and end."""
    mine = [place for place, url in enumerate(web.pages) if PUBLIC_DATASETS[name].repo in url]
    return mine[0], mine[-1] + 1


def test_what_is_not_the_pinned_file_is_refused_and_not_kept(web, monkeypatch):
    pin(monkeypatch, "xstest")
    for url in web.pages:
        web.pages[url] += b"2,Another?,homonyms,safe,,\n"
    refused(
        lambda: load_queries("xstest"),
        "xstest_prompts.csv",
        "sha256",
        "nothing was kept",
        "--data xstest=PATH",
    )
    assert not web.cache.exists()


@pytest.mark.parametrize("known", [True, False])
def test_what_changed_in_the_cache_is_refused(web, monkeypatch, known):
    pin(monkeypatch, "xstest", known)
    load_queries("xstest")
    (path,) = web.cache.rglob("*.csv")
    path.write_text(path.read_text("utf-8") + "2,Another?,homonyms,safe,,\n", "utf-8")
    refused(lambda: load_queries("xstest"), str(path), "sha256 differs", "remove it")
    path.unlink()
    assert len(load_queries("xstest").queries) == 2


def test_a_trusted_file_whose_digest_is_gone_is_trusted_no_more(web, monkeypatch):
    pin(monkeypatch, "xstest", known=False)
    load_queries("xstest")
    (note,) = web.cache.rglob("*.sha256")
    note.unlink()
    refused(lambda: load_queries("xstest"), "sha256 differs")


def test_offline_says_how_a_copy_is_read(web):
    refused(
        lambda: load_queries("xstest", offline=True),
        "xstest is not in the local cache",
        "--offline",
        "--data xstest=PATH",
    )
    assert web.log == []


def test_a_set_behind_a_consent_is_left_to_the_user(web):
    page = PUBLIC_DATASETS["sorry-bench"].page
    refused(lambda: load_queries("sorry-bench"), "license", page, "question.jsonl", "--data sorry-bench=PATH")
    assert web.log == []


def test_only_https_is_believed(web, monkeypatch):
    pin(monkeypatch, "xstest")
    web.leads_to = "http://elsewhere.org/xstest_prompts.csv"
    refused(lambda: load_queries("xstest"), "http://elsewhere.org", "not https", "--data xstest=PATH")
    with pytest.raises(ValueError, match="only https"):
        fetch_file("http://elsewhere.org/x.csv", web.cache / "x.csv", None)
    assert not web.cache.exists()


def test_a_file_that_is_too_large_is_dropped(web, monkeypatch):
    pin(monkeypatch, "xstest")
    monkeypatch.setattr("analysis.datasets.download._MAX_DOWNLOAD_BYTES", 20)
    refused(lambda: load_queries("xstest"), "larger than 0 MiB")


def test_a_web_that_does_not_answer_is_said(web, monkeypatch):
    web.pages.clear()
    refused(lambda: load_queries("xstest"), "cannot download https://raw", "404 Not Found", "--data xstest=PATH")

    def urlopen(url, timeout):
        raise urllib.error.URLError(OSError("Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    refused(
        lambda: load_queries("xstest"),
        "Name or service not known",
        "is there a network?",
        "--data xstest=PATH",
    )
    assert not web.cache.exists()


# --- several sets together --------------------------------------------------------------------------------


def test_sets_joined_are_one_set_with_ids_that_say_where_each_query_is_from(tmp_path):
    parts = {name: f"{name}={clone(tmp_path / name, name)}" for name in ("jbb", "advbench", "or-bench")}
    name = "+".join(parts.values())
    data = load_queries(name)
    assert data.name == name and choose_default_split(data) == "all"
    assert [query.id for query in data.queries] == [
        *("jbb:0-h", "jbb:7-h", "jbb:0-b"),
        *("advbench:q0001", "or-bench:q0001"),
    ]
    assert Counter(query.pair for query in data.queries) == {"jbb:0": 2, "jbb:7": 1, None: 2}
    digests = [source["sha256"] for source in data.sources]
    files = [hashlib.sha256(text.encode()).hexdigest() for text in PUBLISHED["jbb"][0].values()]
    assert digests[0] == hashlib.sha256("".join(files).encode()).hexdigest()
    assert digests[1] == hashlib.sha256(next(iter(PUBLISHED["advbench"][0].values())).encode()).hexdigest()
    assert data.sha256 == hashlib.sha256("".join(digests).encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "lacking", "other"),
    [("advbench", "benign", "everyday"), ("or-bench", "harmful", "plain"), ("figstep", "benign", "everyday")],
)
def test_both_classes_are_asked_for_after_joining_and_the_error_says_what_to_add(
    tmp_path, name, lacking, other
):
    copy = f"{name}={clone(tmp_path, name)}"
    refused(lambda: load_queries(copy), f"holds no {lacking} query", f"--data {copy}+{other}")
    added = load_queries(f"{copy}+{other}")
    assert {query.harmful for query in added.queries} == {True, False}


def test_the_everyday_requests_are_the_plain_benign_ones():
    refused(lambda: load_queries("everyday"), "everyday holds no harmful query", "--data everyday+plain")
    everyday = [query for query in load_queries("plain").queries if not query.harmful]
    assert load_shipped_set("everyday").queries == tuple(everyday) and len(everyday) == 120


def test_what_two_sets_hold_is_asked_once_and_that_is_said():
    said = []
    data = load_queries("twins+plain", notify=said.append)
    assert len(data.queries) == 600 == len({query.text for query in data.queries})
    assert said == ["note: 240 queries of twins+plain occur in more than one of its sets; each is used once"]


def test_a_split_is_taken_of_the_sets_that_have_splits_and_the_others_are_taken_whole(tmp_path):
    data = load_queries(f"jbb={clone(tmp_path, 'jbb')}+everyday")
    assert choose_default_split(data) == "test"
    counts = Counter(query.split for query in data.select_split("test").queries)
    assert counts == {None: 3, "test": 48}, "and none of the training split"
    assert len(data.select_split("all").queries) == 3 + 120
    refused(lambda: data.select_split("tets"), "'test'")


OWN = "id,text,harmful,split\na,Trip him,1,{}\nb,Help him,0,{}\n"


def asked(data):
    """Return a request for data."""
    return RunSpec("tiny", data, None, None, None, "cpu", "float32", 0, True)


def test_a_readout_is_made_from_the_shipped_calibration_split_unless_the_users_file_has_one(tmp_path):
    shipped = load_queries("contrast").select_split("calibration").queries
    jbb = f"jbb={clone(tmp_path, 'jbb')}"
    for name in (jbb, f"{jbb}+contrast", f"{jbb}+everyday"):
        assert asked(name).select_queries()[2].queries == shipped
    (tmp_path / "own.csv").write_text(
        OWN.format("calibration", "calibration") + "c,x,1,test\nd,y,0,test\n", "utf-8"
    )
    for name in (f"{tmp_path / 'own.csv'}+{jbb}", str(tmp_path / "own.csv")):
        data, split, calibration = asked(name).select_queries()
        assert [query.text for query in calibration.queries] == ["Trip him", "Help him"], "and not all of jbb"
        assert split == "test" and not {"Trip him", "Help him"} & {query.text for query in data.queries}


def test_files_of_ones_own_may_be_joined_even_if_they_are_namesakes_or_have_a_plus_in_their_name(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a+b.csv").write_text(f"text,harmful\n{folder},1\nnot {folder},0\n", "utf-8")
        (tmp_path / folder / "x.csv").write_text(f"text,harmful\n{folder},1\nnot {folder},0\n", "utf-8")
    assert [query.id for query in load_queries(str(tmp_path / "one" / "a+b.csv")).queries] == [
        "q0001",
        "q0002",
    ]
    both = load_queries(f"{tmp_path / 'one' / 'x.csv'}+{tmp_path / 'two' / 'x.csv'}")
    assert [query.id for query in both.queries] == ["x-1:q0001", "x-1:q0002", "x-2:q0001", "x-2:q0002"]
    copy = clone(tmp_path / "c+d", "xstest")
    assert len(load_queries(f"xstest={copy}").queries) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("xtest", ["unknown data set 'xtest'", "'xstest'", "NAME=PATH"]),
        ("xtest=there", ["unknown data set 'xtest'", "'xstest'"]),
        ("harmbnch+everyday", ["unknown data set 'harmbnch'", "'harmbench'"]),
        ("advbench+evryday", ["unknown data set 'evryday'", "'everyday'"]),
        ("advbench+", ["unknown data set ''"]),
    ],
)
def test_an_unknown_member_is_answered_with_the_nearest_before_anything_is_fetched(web, name, words):
    refused(lambda: load_queries(name), *words)
    assert web.log == []


# --- where else they are told of --------------------------------------------------------------------------


def test_run_json_says_where_each_set_is_from(web, monkeypatch):
    pin(monkeypatch, "xstest")
    monkeypatch.setattr("analysis.studies.manifest.describe_readout", lambda readout: {})
    data = load_queries("xstest+everyday")
    model = SimpleNamespace(device="cpu", dtype="torch.float32")
    bench = SimpleNamespace(
        loaded_model=SimpleNamespace(name="tiny", origin={}, model=model),
        chat_template=SimpleNamespace(system_policy="native"),
        seed=0,
    )
    record = describe_run.__wrapped__(bench, None, {}, data, "all", None)["data"]
    (path,) = web.cache.rglob("*.csv")
    assert json.loads(json.dumps(record))["sources"] == [
        {
            "name": "xstest",
            "source": "https://github.com/paul-rottger/xstest",
            "revision": PUBLIC_DATASETS["xstest"].revision,
            "licence": "CC BY 4.0",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
        {"name": "everyday", "sha256": load_queries("contrast").sha256},
    ]
    assert record["sha256"] == data.sha256


def test_of_a_copy_it_says_that_it_is_one(tmp_path):
    (source,) = load_queries(f"xstest={clone(tmp_path, 'xstest')}").sources
    assert source["revision"] == "a local copy" and len(source["sha256"]) == 64


def test_the_list_shows_rows_licence_and_page_of_every_set():
    rows = {row["name"]: row for row in collect_catalog()["data"]}
    assert list(rows)[:4] == ["contrast", "twins", "plain", "everyday"] and set(PUBLIC_DATASETS) < set(rows)
    assert (rows["everyday"]["harmful"], rows["everyday"]["benign"]) == (0, 120)
    for name, card in PUBLIC_DATASETS.items():
        row = rows[name]
        assert (row["harmful"], row["benign"], row["licence"]) == (
            card.n_harmful,
            card.n_benign,
            card.license,
        )
        text = str(_format_description(row))
        for word in (card.description, f"{card.n_benign} benign", card.license, card.page):
            assert word in text


def test_what_may_only_be_tested_on_is_not_trained_on(tmp_path):
    name = f"mossbench={clone(tmp_path, 'mossbench')}+contrast"
    refused(
        lambda: train_weights(asked(name), "safety", [], None), "mossbench may not be trained on", "CC BY-SA"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jbbb", ["unknown data set 'jbbb'", "'jbb'"]),
        ("jbb", ["jbb is not in the local cache", "--offline", "--data jbb=PATH"]),
        ("jbb=nowhere", ["no such file or folder", "Index, Goal, Category"]),
    ],
)
def test_the_command_refuses_in_one_line_with_exit_code_2(web, monkeypatch, capsys, name, words):
    monkeypatch.setattr(sys, "argv", ["analyze", "-d", "policy", "-m", "tiny", "--offline", "--data", name])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == "" and err.startswith("analyze: ") and err.count("\n") == 1
    for word in words:
        assert word in err
