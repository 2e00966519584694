"""Public sets are downloaded once, at their pins, over https; failures are reported in one line."""

import hashlib
import json
import sys
import urllib.error
import urllib.request

import pytest
from conftest import make_toy_session
from published_sets import (
    PUBLISHED,
    assert_user_error,
    list_fields,
    pin_files,
    serve_published_files,
    write_both_classes,
)

from analysis.cli.main import main
from analysis.datasets.download import fetch_file
from analysis.datasets.loading import load_queries
from analysis.datasets.public import PUBLIC_DATASETS
from analysis.studies.manifest import describe_run


@pytest.fixture
def both_classes(tmp_path):
    return write_both_classes(tmp_path)


@pytest.fixture
def web(tmp_path, monkeypatch):
    return serve_published_files(monkeypatch, tmp_path / "cache")


DOWNLOADED = [name for name in PUBLISHED if name != "sorry-bench"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_set_is_downloaded_once_from_its_pinned_address_after_a_notice_with_its_license(
    web, monkeypatch, both_classes, name, known
):
    pin_files(monkeypatch, name, known)
    dataset = PUBLIC_DATASETS[name]
    first = load_queries(f"{name}+{both_classes}", notify=web.log.append)
    notice, *urls = web.log[: 1 + len(dataset.files)]
    assert notice.startswith(
        f"Fetching {name}, license {dataset.license}: about {dataset.kilobytes} kB from {dataset.page}"
    )
    assert urls == [url for url in web.pages if dataset.repo in url] and dataset.revision in urls[0]
    notes = web.log[1 + len(dataset.files) :]
    assert len(notes) == (not known) and all("no sha256" in note and "trusted" in note for note in notes)
    web.log.clear()
    web.pages.clear()
    assert (
        load_queries(f"{name}+{both_classes}", offline=True, notify=web.log.append) == first and web.log == []
    )
    assert (
        list_fields([query for query in first.queries if query.id.startswith(name)], f"{name}:")
        == PUBLISHED[name][1]
    )
    assert not list(web.cache.rglob("*.part*"))


def test_another_file_than_the_pinned_one_is_rejected_and_not_kept(web, monkeypatch):
    pin_files(monkeypatch, "xstest")
    for url in web.pages:
        web.pages[url] += b"2,Another?,homonyms,safe,,\n"
    assert_user_error(
        lambda: load_queries("xstest"),
        "xstest_prompts.csv",
        "sha256",
        "nothing was kept",
        "--data xstest=PATH",
    )
    assert not web.cache.exists()


@pytest.mark.parametrize("known", [True, False])
def test_a_file_that_changed_in_the_cache_is_rejected(web, monkeypatch, known):
    pin_files(monkeypatch, "xstest", known)
    load_queries("xstest")
    (path,) = web.cache.rglob("*.csv")
    path.write_text(path.read_text("utf-8") + "2,Another?,homonyms,safe,,\n", "utf-8")
    assert_user_error(lambda: load_queries("xstest"), str(path), "sha256 differs", "remove it")
    path.unlink()
    assert len(load_queries("xstest").queries) == 2


def test_a_trusted_file_without_its_stored_digest_is_rejected(web, monkeypatch):
    pin_files(monkeypatch, "xstest", known=False)
    load_queries("xstest")
    (digest_path,) = web.cache.rglob("*.sha256")
    digest_path.unlink()
    assert_user_error(lambda: load_queries("xstest"), "sha256 differs")


def test_offline_suggests_a_local_copy(web):
    assert_user_error(
        lambda: load_queries("xstest", offline=True),
        "xstest is not in the local cache",
        "--offline",
        "--data xstest=PATH",
    )
    assert web.log == []


def test_a_set_that_requires_consent_is_left_to_the_user(web):
    page = PUBLIC_DATASETS["sorry-bench"].page
    assert_user_error(
        lambda: load_queries("sorry-bench"), "license", page, "question.jsonl", "--data sorry-bench=PATH"
    )
    assert web.log == []


def test_only_https_is_accepted(web, monkeypatch):
    pin_files(monkeypatch, "xstest")
    web.redirect = "http://elsewhere.org/xstest_prompts.csv"
    assert_user_error(
        lambda: load_queries("xstest"), "http://elsewhere.org", "not https", "--data xstest=PATH"
    )
    with pytest.raises(ValueError, match="only https"):
        fetch_file("http://elsewhere.org/x.csv", web.cache / "x.csv", None)
    assert not web.cache.exists()


def test_a_file_that_is_too_large_is_not_kept(web, monkeypatch):
    pin_files(monkeypatch, "xstest")
    monkeypatch.setattr("analysis.datasets.download._MAX_DOWNLOAD_BYTES", 20)
    assert_user_error(lambda: load_queries("xstest"), "larger than 0 MiB")


def test_a_failed_download_is_reported(web, monkeypatch):
    web.pages.clear()
    assert_user_error(
        lambda: load_queries("xstest"), "cannot download https://raw", "404 Not Found", "--data xstest=PATH"
    )

    def urlopen(url, timeout):
        raise urllib.error.URLError(OSError("Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert_user_error(
        lambda: load_queries("xstest"),
        "Name or service not known",
        "is there a network?",
        "--data xstest=PATH",
    )
    assert not web.cache.exists()


def test_run_json_has_the_source_of_each_set(web, monkeypatch):
    pin_files(monkeypatch, "xstest")
    monkeypatch.setattr("analysis.studies.manifest.describe_readout", lambda readout: {})
    data = load_queries("xstest+everyday")
    record = describe_run.__wrapped__(make_toy_session(), None, {}, data, "all", None)["data"]
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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jbbb", ["unknown data set 'jbbb'", "'jbb'"]),
        ("jbb", ["jbb is not in the local cache", "--offline", "--data jbb=PATH"]),
        ("jbb=nowhere", ["no such file or folder", "Index, Goal, Category"]),
    ],
)
def test_the_command_rejects_a_set_in_one_line_with_exit_code_2(web, monkeypatch, capsys, name, words):
    monkeypatch.setattr(sys, "argv", ["analyze", "-d", "policy", "-m", "tiny", "--offline", "--data", name])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.startswith("analyze: ") and err.count("\n") == 1
    for word in words:
        assert word in err
