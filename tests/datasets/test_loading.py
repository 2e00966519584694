"""Shipped, public and own sets are loaded by name, and joined with +."""

import hashlib
from collections import Counter

import pytest
from published_sets import PUBLISHED, assert_user_error, serve_published_files, write_clone
from rich.console import Console

from analysis.datasets.loading import load_queries, load_shipped_set
from analysis.datasets.queries import choose_default_split
from analysis.studies.run_spec import RunSpec
from analysis.studies.train import train_weights


@pytest.fixture
def web(tmp_path, monkeypatch):
    return serve_published_files(monkeypatch, tmp_path / "cache")


def test_joined_sets_are_one_set_whose_ids_name_the_set_of_each_query(tmp_path):
    parts = {name: f"{name}={write_clone(tmp_path / name, name)}" for name in ("jbb", "advbench", "or-bench")}
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
def test_both_classes_are_required_after_joining_and_the_error_suggests_a_set(tmp_path, name, lacking, other):
    copy = f"{name}={write_clone(tmp_path, name)}"
    assert_user_error(lambda: load_queries(copy), f"holds no {lacking} query", f"--data {copy}+{other}")
    added = load_queries(f"{copy}+{other}")
    assert {query.harmful for query in added.queries} == {True, False}


def test_the_everyday_set_holds_the_plain_benign_requests():
    assert_user_error(
        lambda: load_queries("everyday"), "everyday holds no harmful query", "--data everyday+plain"
    )
    everyday = [query for query in load_queries("plain").queries if not query.harmful]
    assert load_shipped_set("everyday").queries == tuple(everyday) and len(everyday) == 240


def test_queries_of_two_sets_are_used_once_with_a_notice():
    notices = []
    data = load_queries("twins+plain", notify=notices.append)
    assert len(data.queries) == 864 == len({query.text for query in data.queries})
    assert notices == [
        "note: 312 queries of twins+plain occur in more than one of its sets; each is used once"
    ]


def test_a_split_selects_from_sets_with_splits_and_keeps_the_others_whole(tmp_path):
    data = load_queries(f"jbb={write_clone(tmp_path, 'jbb')}+everyday")
    assert choose_default_split(data) == "test"
    counts = Counter(query.split for query in data.select_split("test").queries)
    assert counts == {None: 3, "test": 156}, "none of the training split"
    assert len(data.select_split("all").queries) == 3 + 240
    assert_user_error(lambda: data.select_split("tets"), "'test'")


QUERY_FILE = "id,text,harmful,split\na,Trip him,1,{}\nb,Help him,0,{}\n"


def make_spec(data):
    return RunSpec("tiny", data, None, None, None, "cpu", "float32", 0, True)


def test_a_readout_uses_the_shipped_calibration_split_unless_a_users_file_has_one(tmp_path):
    shipped = load_queries("contrast").select_split("calibration").queries
    jbb = f"jbb={write_clone(tmp_path, 'jbb')}"
    for name in (jbb, f"{jbb}+contrast", f"{jbb}+everyday"):
        assert make_spec(name).select_queries()[2].queries == shipped
    (tmp_path / "own.csv").write_text(
        QUERY_FILE.format("calibration", "calibration") + "c,x,1,test\nd,y,0,test\n", "utf-8"
    )
    for name in (f"{tmp_path / 'own.csv'}+{jbb}", str(tmp_path / "own.csv")):
        data, split, calibration = make_spec(name).select_queries()
        assert [query.text for query in calibration.queries] == ["Trip him", "Help him"], "not all of jbb"
        assert split == "test" and not {"Trip him", "Help him"} & {query.text for query in data.queries}


def test_files_with_equal_names_or_a_plus_in_their_path_can_be_used(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a+b.csv").write_text(f"text,harmful\n{folder},1\nnot {folder},0\n", "utf-8")
        (tmp_path / folder / "x.csv").write_text(f"text,harmful\n{folder},1\nnot {folder},0\n", "utf-8")
    assert [query.id for query in load_queries(str(tmp_path / "one" / "a+b.csv")).queries] == [
        "q0001",
        "q0002",
    ]
    joined = load_queries(f"{tmp_path / 'one' / 'x.csv'}+{tmp_path / 'two' / 'x.csv'}")
    assert [query.id for query in joined.queries] == ["x-1:q0001", "x-1:q0002", "x-2:q0001", "x-2:q0002"]
    copy = write_clone(tmp_path / "c+d", "xstest")
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
def test_an_unknown_set_suggests_the_nearest_before_any_download(web, name, words):
    assert_user_error(lambda: load_queries(name), *words)
    assert web.log == []


def test_a_set_for_testing_only_is_not_trained_on(tmp_path):
    name = f"mossbench={write_clone(tmp_path, 'mossbench')}+contrast"
    assert_user_error(
        lambda: train_weights(make_spec(name), "safety", [], None, Console(quiet=True)),
        "mossbench may not be trained on",
        "CC BY-SA",
    )


def test_a_copy_of_another_size_than_the_published_set_is_read_with_a_notice(tmp_path):
    notices = []
    data = load_queries(f"jbb={write_clone(tmp_path / 'jbb', 'jbb')}", notify=notices.append)
    assert len(data.queries) == 3
    assert notices == [
        "note: this copy of jbb holds 2 harmful and 1 benign queries; the published set has 100 and 100"
    ]
