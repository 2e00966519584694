"""Public sets are described by the table, and read in their published formats."""

import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from published_sets import (
    OPENER,
    PUBLISHED,
    PUBLISHED_WITH_IMAGES,
    assert_user_error,
    list_fields,
    load_alone,
    write_both_classes,
    write_clone,
)

from analysis.cli.catalog import _format_description, collect_catalog
from analysis.datasets.loading import SHIPPED_SETS, load_queries
from analysis.datasets.public import PUBLIC_DATASETS

SHARED = Path(__file__).parents[3] / "shared" / "datasets"


@pytest.fixture
def both_classes(tmp_path):
    return write_both_classes(tmp_path)


def test_the_table_pins_every_download_and_states_the_size_of_each_set():
    assert set(PUBLIC_DATASETS) == {*PUBLISHED, *PUBLISHED_WITH_IMAGES}
    assert {name for name, dataset in PUBLIC_DATASETS.items() if dataset.image_folders} == set(
        PUBLISHED_WITH_IMAGES
    )
    for dataset in PUBLIC_DATASETS.values():
        assert dataset.page.startswith("https://") and dataset.addresses[1].startswith("https://")
        assert dataset.license and dataset.description and dataset.n_harmful + dataset.n_benign > 0
        assert all(
            sha256 is None or re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in dataset.files.values()
        )
        assert len({Path(name).name for name in dataset.files}) == len(dataset.files), (
            "the files share one folder"
        )
        if dataset.name == "sorry-bench" or dataset.image_folders:
            assert dataset.revision == ""
        else:
            assert re.fullmatch("[0-9a-f]{40}", dataset.revision) and dataset.kilobytes > 0
    images = {
        name for name, dataset in PUBLIC_DATASETS.items() if "images are left out" in dataset.description
    }
    assert images == {"mm-safetybench", "figstep"}
    assert all("local copies only" in PUBLIC_DATASETS[name].description for name in PUBLISHED_WITH_IMAGES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_clone_is_read_in_the_published_format(tmp_path, both_classes, name):
    queries, prefix = load_alone(f"{name}={write_clone(tmp_path, name)}", both_classes)
    assert list_fields(queries, prefix) == PUBLISHED[name][1]
    assert {query.split for query in queries} == {None}
    assert {query.kind for query in queries if not query.harmful} <= {"twin"}, "they are not plain requests"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_files_are_also_read_from_one_folder_and_one_by_one(tmp_path, both_classes, name):
    loose = tmp_path / "loose"
    loose.mkdir()
    files = [path for path in write_clone(tmp_path / "clone", name).rglob("*") if path.is_file()]
    for path in files:
        path.replace(loose / path.name)
    assert sorted(list_fields(*load_alone(f"{name}={loose}", both_classes))) == sorted(PUBLISHED[name][1])
    one_by_one = [
        query
        for path in loose.iterdir()
        for query in list_fields(*load_alone(f"{name}={path}", both_classes))
    ]
    if name not in ("advbench", "strongreject", "or-bench"):  # numbered where they have no ids
        assert sorted(one_by_one) == sorted(PUBLISHED[name][1])
    assert len(one_by_one) == len(PUBLISHED[name][1])


@pytest.mark.parametrize("name", PUBLISHED_WITH_IMAGES)
def test_a_clone_with_images_is_read_in_the_published_format(tmp_path, both_classes, name):
    files, expected, images = PUBLISHED_WITH_IMAGES[name]
    write_clone(tmp_path, name)
    copies = [tmp_path, *(tmp_path / file for file in files)] if len(files) == 1 else [tmp_path]
    for copy in copies:
        queries, prefix = load_alone(f"{name}={copy}", both_classes)
        assert list_fields(queries, prefix) == expected
        assert [query.image.name for query in queries] == [str(tmp_path / image) for image in images]
        assert {query.kind for query in queries if not query.harmful} <= {"twin"}
        assert OPENER not in str(queries)
        for query in queries:
            query.image.load()


def test_the_files_of_vlguard_are_its_splits(tmp_path):
    data = load_queries(f"vlguard={write_clone(tmp_path, 'vlguard')}")
    assert [query.id for query in data.select_split("test").queries] == ["B-h", "B-b", "C"]


def test_a_copy_of_mossbench_without_its_contrast_set_is_benign(tmp_path, both_classes):
    copy = write_clone(tmp_path, "mossbench")
    for path in (copy / "data", copy / "data" / "images_information" / "information.json"):
        queries, _ = load_alone(f"mossbench={path}", both_classes)
        assert [query.harmful for query in queries] == [False]
    queries, _ = load_alone(f"mossbench={copy / 'data_contrast'}", both_classes)
    assert [query.harmful for query in queries] == [True]


def test_queries_whose_image_a_copy_lacks_are_left_out_with_a_note(tmp_path, both_classes):
    notices = []
    name = f"mm-safetybench-sd={write_clone(tmp_path, 'mm-safetybench-sd')}"
    first, second = [tmp_path / path for path in PUBLISHED_WITH_IMAGES["mm-safetybench-sd"][2]]
    first.unlink()
    data = load_queries(f"{name}+{both_classes}", notify=notices.append)
    assert [query.image and query.image.name for query in data.queries] == [str(second), None, None]
    assert notices[0].startswith("note: 1 of 2 queries of mm-safetybench-sd are left out")
    second.unlink()
    page = PUBLIC_DATASETS["mm-safetybench-sd"].page
    assert_user_error(
        lambda: load_queries(name), "none of its 2 images", "data/imgs/02-HateSpeech/SD/0.jpg", page
    )


@pytest.mark.parametrize("name", PUBLISHED_WITH_IMAGES)
def test_a_set_with_images_is_never_downloaded(name):
    assert_user_error(
        lambda: load_queries(name), "never downloaded", PUBLIC_DATASETS[name].page, f"--data {name}=PATH"
    )


def test_names_of_sets_may_be_written_with_underscores(tmp_path, both_classes):
    copy = write_clone(tmp_path / "mm_safetybench", "mm-safetybench")
    data = load_queries(f"mm_safetybench={copy}+{both_classes}")
    assert [query.id for query in data.queries[:2]] == [
        "mm-safetybench:02-HateSpeech-0",
        "mm-safetybench:06-Fraud-0",
    ]
    assert load_queries("same_topic") == load_queries("same-topic")
    assert_user_error(lambda: load_queries("mm_safetybnch"), "'mm_safetybnch'", "'mm-safetybench'")


@pytest.mark.skipif(not SHARED.is_dir(), reason="samples of the published files are not here")
def test_samples_with_images_are_read(both_classes):
    queries, _ = load_alone(f"mossbench={SHARED / 'mossbench'}", both_classes)
    assert Counter(query.harmful for query in queries) == {True: 4, False: 4}
    twins = [query for query in queries if query.pair == "mossbench:87"]
    assert len(twins) == 2 and twins[0].image.digest == twins[1].image.digest
    assert {query.image.load().mode for query in queries} == {"RGB"}
    for name, folder in (("mm-safetybench-sd", "mm_safetybench"), ("figstep-image", "figstep")):
        assert_user_error(
            lambda copy=f"{name}={SHARED / folder}": load_queries(copy), "holds none of its 12 images"
        )


@pytest.mark.parametrize("name", ["jbb", "advbench"])
def test_openings_of_responses_are_not_read(tmp_path, both_classes, name):
    copy = write_clone(tmp_path, name)
    assert OPENER in "".join(path.read_text("utf-8") for path in copy.rglob("*.csv"))
    for query in load_queries(f"{name}={copy}+{both_classes}").queries:
        assert "Certainly" not in str(asdict(query))


def test_the_pairs_of_jbb_are_those_that_share_an_index(tmp_path):
    data = load_queries(f"jbb={write_clone(tmp_path, 'jbb')}")
    assert Counter(query.pair for query in data.queries) == {"0": 2, "7": 1}
    assert [query.kind for query in data.queries] == ["harmful", "harmful", "twin"]
    assert {query.id for query in data.limit_queries(2).queries} == {"0-h", "0-b"}


# Set → (number of queries, number of harmful queries, folder or file).
SAMPLES = {
    "jbb": (48, 24, "jbb"),
    "xstest": (30, 13, "xstest/xstest_prompts.csv"),
    "harmbench": (24, 24, "harmbench"),
    "advbench": (24, 24, "advbench"),
    "strongreject": (24, 24, "strongreject"),
    "mm-safetybench": (12, 12, "mm_safetybench"),
    "figstep": (12, 12, "figstep/safebench.csv"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="samples of the published files are not here")
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_the_published_files_are_read(both_classes, name):
    number, harmful, path = SAMPLES[name]
    queries, _ = load_alone(f"{name}={SHARED / path}", both_classes)
    assert (len(queries), sum(query.harmful for query in queries)) == (number, harmful)
    assert len({query.text for query in queries}) == number
    assert all(query.category for query in queries) or name == "advbench"
    if name == "jbb":
        assert set(Counter(query.pair for query in queries).values()) == {2}
    if name == "harmbench":
        assert sum("\n\n---\n\n" in query.text for query in queries) == 3, "the contextual ones"


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
    "class": (
        "jbb",
        "a.csv",
        "Index,Goal,Category\n0,Hi,t\n",
        ["known only from its name", "harmful-behaviors.csv"],
    ),
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
        '[{"question": "Hi", "image": "images/1.png"}]',
        ["lacks metadata (has image, question)", "question, metadata"],
    ),
    "split": (
        "vlguard",
        "a.json",
        PUBLISHED_WITH_IMAGES["vlguard"][0]["test.json"],
        ["rename it to train.json"],
    ),
    "scenarios": ("mm-safetybench", "a.json", '{"0": {"Question": "Hi"}}', ["lacks Changed Question"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_in_another_format_is_rejected_with_its_columns_and_the_expected_ones(tmp_path, case):
    name, file, content, words = BAD[case]
    (tmp_path / file).write_text(content, "utf-8")
    assert_user_error(lambda: load_queries(f"{name}={tmp_path / file}"), file, *words)


@pytest.mark.parametrize("copy", ["", "nowhere", "nowhere.csv"])
def test_a_missing_copy_is_reported(copy):
    assert_user_error(
        lambda: load_queries(f"xstest={copy}"),
        f"--data xstest={copy}",
        "no such file",
        "id, prompt, type, label",
    )


def test_a_folder_without_the_files_is_rejected(tmp_path):
    (tmp_path / "README.md").write_text("Nothing.", "utf-8")
    assert_user_error(lambda: load_queries(f"figstep={tmp_path}"), str(tmp_path), "no .csv file", "question")


def test_run_json_calls_a_copy_a_local_copy(tmp_path):
    (source,) = load_queries(f"xstest={write_clone(tmp_path, 'xstest')}").sources
    assert source["revision"] == "a local copy" and len(source["sha256"]) == 64


def test_the_list_shows_size_license_and_page_of_every_set():
    rows = {row["name"]: row for row in collect_catalog()["data"]}
    assert list(rows) == [*SHIPPED_SETS, *PUBLIC_DATASETS]
    assert (rows["contrast"]["harmful"], rows["contrast"]["benign"]) == (312, 1032)
    assert (rows["everyday"]["harmful"], rows["everyday"]["benign"]) == (0, 240)
    for name, dataset in PUBLIC_DATASETS.items():
        row = rows[name]
        assert (row["harmful"], row["benign"], row["licence"]) == (
            dataset.n_harmful,
            dataset.n_benign,
            dataset.license,
        )
        text = str(_format_description(row))
        for word in (dataset.description, f"{dataset.n_benign} benign", dataset.license, dataset.page):
            assert word in text
