"""Query sets keep pairs whole, and a file with a mistake is reported in one line."""

import csv
import gzip
import hashlib
import json
from collections import Counter

import pandas as pd
import pytest

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import SPLIT_NAMES, Query, QuerySet, choose_default_split, sample_queries
from analysis.files import data_folder
from defenses.errors import UserError

CONTRAST = load_queries("contrast")


def write_file(folder, name, content):
    """Write a file and return its path as text."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_the_shipped_sets_are_views_of_one_file():
    kinds = {
        "contrast": {"harmful", "twin", "sounds_unsafe", "same_topic", "plain"},
        "twins": {"harmful", "twin"},
        "sounds-unsafe": {"harmful", "sounds_unsafe"},
        "same-topic": {"harmful", "same_topic"},
        "plain": {"harmful", "plain"},
    }
    assert {name: {query.kind for query in load_queries(name).queries} for name in kinds} == kinds
    assert len(CONTRAST.queries) == 1344
    digest = hashlib.sha256((data_folder() / "contrast.jsonl").read_bytes()).hexdigest()
    assert {load_queries(name).sha256 for name in kinds} == {digest}


def test_the_first_version_of_the_shipped_set_can_still_be_loaded():
    first = load_queries("contrast-v1")
    assert Counter(query.kind for query in first.queries) == {"harmful": 240, "twin": 240, "plain": 120}
    assert first.sha256 == hashlib.sha256((data_folder() / "contrast-v1.jsonl").read_bytes()).hexdigest()
    splits = {query.pair: query.split for query in CONTRAST.queries if query.pair}
    assert all(splits[query.pair] == query.split for query in first.queries if query.pair)


def split_sets_are_disjoint_and_leave_nothing_out():
    ids = [query.id for name in SPLIT_NAMES for query in CONTRAST.select_split(name).queries]
    assert sorted(ids) == sorted(query.id for query in CONTRAST.queries)
    assert CONTRAST.select_split("all") == CONTRAST.select_split(None) == CONTRAST
    assert choose_default_split(CONTRAST) == "test"


@pytest.fixture(scope="module")
def split_sets():
    return {name: load_queries(name).select_split("test") for name in ("contrast", "twins", "plain")}


@pytest.mark.parametrize("number", [2, 3, 24, 61, 240, 1000])
@pytest.mark.parametrize("name", ["contrast", "twins", "plain"])
def test_a_limit_keeps_pairs_whole_and_the_order_of_the_file(split_sets, name, number):
    data = split_sets[name]
    kept = data.limit_queries(number)
    assert number - 1 <= len(kept.queries) <= number or kept == data
    assert kept.limit_queries(number) == kept
    kept_ids = {query.id for query in kept.queries}
    assert kept.queries == tuple(query for query in data.queries if query.id in kept_ids)
    pair_sizes = Counter(query.pair for query in data.queries if query.pair)
    for pair, count in Counter(query.pair for query in kept.queries if query.pair).items():
        assert count == pair_sizes[pair]
    assert {query.harmful for query in kept.queries} == {True, False}


def test_a_limit_takes_kinds_and_categories_in_proportion():
    kept = CONTRAST.select_split("test").limit_queries(120).queries
    assert set(Counter(query.kind for query in kept).values()) == {24}
    categories = Counter(query.category for query in kept)
    assert categories.pop("plain") == 24 and set(categories.values()) == {8} and len(categories) == 12
    few = CONTRAST.select_split("test").limit_queries(20).queries
    assert {query.kind for query in few} == {query.kind for query in CONTRAST.queries}


def test_a_pair_and_a_query_may_have_the_same_name():
    queries = (Query("a", "x", True), Query("b", "y", True, pair="a"), Query("c", "z", False, pair="a"))
    assert [query.id for query in QuerySet("own", queries, "").limit_queries(2).queries] == ["b", "c"]


@pytest.mark.parametrize("number", [1, 0, -3])
def test_a_limit_below_two_is_rejected_with_the_value_and_the_rule(number):
    with pytest.raises(UserError, match=rf"--limit {number}: at least 2"):
        CONTRAST.limit_queries(number)


def test_a_limit_that_leaves_one_class_is_rejected():
    data = QuerySet("own", tuple(q for q in CONTRAST.queries if q.harmful), "")
    with pytest.raises(UserError, match="no benign query"):
        data.limit_queries(4).check_both_classes()


def test_a_sample_has_both_classes_in_equal_number_from_the_whole_list():
    sample = sample_queries(CONTRAST.queries, 16)
    assert Counter(query.harmful for query in sample) == {True: 8, False: 8}
    assert len({query.id for query in sample}) == 16
    assert len({query.category for query in sample}) > 5
    assert sample_queries(CONTRAST.queries[:1], 16) == [CONTRAST.queries[0]]


CSV = "text,harmful\n{}\n"
VALID_FILES = {
    "plain.csv": CSV.format("Hi,true\nYo,false"),
    "crlf.csv": CSV.format("Hi,TRUE\nYo,No").replace("\n", "\r\n"),
    "bom.csv": b"\xef\xbb\xbf" + CSV.format("Hi,1\nYo,0").encode(),
    "floats.csv": CSV.format("Hi,1.0\nYo,0.0"),
    "quoted.csv": CSV.format('"Hi",harmful\n" Yo ",benign'),
    "lines.jsonl": '{"text": "Hi", "harmful": true}\n\n{"text": "Yo", "harmful": false}\n',
    "bom.jsonl": b'\xef\xbb\xbf{"text": "Hi", "harmful": 1}\r\n{"text": "Yo", "harmful": 0}',
    "more.jsonl": '{"text": "Hi", "harmful": "yes", "mine": [1]}\n{"text": "Yo", "harmful": "no"}\n',
    "capitals.CSV": CSV.format("Hi,1\nYo,0"),
    "tabs.tsv": "text\tharmful\nHi\t1\nYo\t0\n",
    "packed.csv.gz": gzip.compress(CSV.format("Hi,1\nYo,0").encode()),
    "packed.jsonl.gz": gzip.compress(b'{"text": "Hi", "harmful": 1}\n{"text": "Yo", "harmful": 0}'),
    "unpacked.csv.gz": CSV.format("Hi,1\nYo,0"),
    "array.json": '[{"text": "Hi", "harmful": true}, {"text": "Yo", "harmful": false}]',
    "array.jsonl": '[{"text": "Hi", "harmful": true},\n {"text": "Yo", "harmful": false}]',
    "wrapped.json": '{"queries": [{"text": "Hi", "harmful": true}, {"text": "Yo", "harmful": false}]}',
    "lines.json": '{"text": "Hi", "harmful": true}\n{"text": "Yo", "harmful": false}\n',
    "table.parquet": pd.DataFrame({"text": ["Hi", "Yo"], "harmful": [True, False]}).to_parquet(),
    "spaces.csv": 'text , harmful\n"Hi", true\nYo , false\n',
    "semicolons.csv": "text;harmful\nHi;1\nYo;0\n",
    "declared.csv": "sep=|\r\ntext|harmful\r\nHi|1\r\nYo|0\r\n",
    "spreadsheet.csv": "text;harmful;;\nHi;1;;\nYo;0;;\n",
    "names.csv": "Text,HARMFUL\nHi,1\nYo,0\n",
    "number.csv": "#,text,harmful\n7,Hi,1\n8,Yo,0\n",
    "hash.csv": "# two queries, of mine\n#text,harmful\nHi,1\nYo,0\n",
    "comment.csv": "# text,harmful\ntext,harmful\nHi,1\nYo,0\n",
    "blank.csv": "\r\n" + CSV.format("Hi,1\nYo,0"),
    "mac.csv": CSV.format("Hi,1\nYo,0").replace("\n", "\r"),
}


@pytest.mark.parametrize("name", VALID_FILES)
def test_files_are_read_in_the_variants_that_programs_write(tmp_path, name):
    data = load_queries(write_file(tmp_path, name, VALID_FILES[name]))
    assert [(q.id, q.text, q.harmful, q.pair, q.split) for q in data.queries] == [
        ("q0001", "Hi", True, None, None),
        ("q0002", "Yo", False, None, None),
    ]
    assert choose_default_split(data) == "all"


def test_ids_and_pairs_may_be_numbers_including_zero(tmp_path):
    rows = '{"text": "a", "harmful": true, "id": 0, "pair": 0}\n'
    rows += '{"text": "b", "harmful": false, "id": 1, "pair": 0}'
    assert [(q.id, q.pair) for q in load_queries(write_file(tmp_path, "x.jsonl", rows)).queries] == [
        ("0", "0"),
        ("1", "0"),
    ]


def test_a_text_may_contain_commas_quotes_and_line_breaks(tmp_path):
    data = load_queries(write_file(tmp_path, "x.csv", CSV.format('"a, ""b""\r\nc",1\nd,0')))
    assert data.queries[0].text == 'a, "b"\r\nc'


def test_a_cell_may_be_longer_than_python_reads_by_default(tmp_path):
    limit = csv.field_size_limit()
    data = load_queries(write_file(tmp_path, "x.csv", CSV.format("word " * 40_000 + ",1\nYo,0")))
    assert len(data.queries[0].text) == 199_999 and csv.field_size_limit() == limit


def test_repeated_texts_are_noted_and_a_whole_character_may_be_escaped(tmp_path):
    notices = []
    rows = '{"text": "\\ud83d\\ude00", "harmful": 1}\n' * 2 + '{"text": "b", "harmful": 0}'
    data = load_queries(write_file(tmp_path, "x.jsonl", rows), notify=notices.append)
    assert [query.text for query in data.queries] == ["😀", "😀", "b"]
    assert "repeats texts (1 of 3 queries)" in notices[0]


IDS = [
    "NA",
    "nan",
    "None",
    "null",
    "001",
    "1",
    "1e5",
    "True",
    "1_000",
    " a ",
    "a,b",
    'q"x',
    "a\nb",
    "=1+1",
    "#c",
]


def test_ids_pairs_and_kinds_are_texts(tmp_path):
    rows = [
        {"id": i, "text": f"t {i}", "harmful": n < 1, "pair": "None", "kind": ""} for n, i in enumerate(IDS)
    ]
    rows = [row | ({} if n < 2 else {"pair": "", "kind": "NA"}) for n, row in enumerate(rows)]
    table = pd.DataFrame(rows)
    written = {
        "x.csv": table.to_csv(index=False),
        "x.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "x.parquet": table.to_parquet(),
    }
    for name, content in written.items():
        queries = load_queries(write_file(tmp_path, name, content)).queries
        assert [query.id for query in queries] == IDS, name
        assert {query.pair for query in queries[:2]} == {"None"} and {q.pair for q in queries[2:]} == {None}
        assert [query.kind for query in queries] == ["harmful", "plain", *["NA"] * (len(IDS) - 2)]


FORMAT_HINT = "needs the columns text and harmful"
INVALID_FILES = {
    "no_column.csv": ("text,label\nHi,1\n", ["lacks harmful", "has label, text", FORMAT_HINT]),
    "other_names.csv": ("request;label\nHi;1\n", ["lacks text and harmful", "label, request", FORMAT_HINT]),
    "empty.csv": ("", ["holds no rows", FORMAT_HINT]),
    "empty.jsonl": ("\n \n", ["holds no rows", FORMAT_HINT]),
    "header_only.csv": ("text,harmful\n", ["holds no rows", FORMAT_HINT]),
    "lines.csv": ('{"text": "a", "harmful": true}\n', ["holds JSON, not CSV", "rename it to lines.jsonl"]),
    "array.csv": ('[\n {"text": "a", "harmful": true}]', ["holds JSON, not CSV", "rename it"]),
    "twice.csv": ("text,harmful,harmful\na,1,0\nb,0,1\n", ["two columns of the same name", "rename"]),
    "comma.csv": (CSV.format("Hi,1,you\nYo,0"), ["row 1", "more values", "double quotes"]),
    "short.csv": (CSV.format("Hi,1\nYo"), ["'q0002'", "harmful is None", "true or false"]),
    "latin.csv": (CSV.format("Héllo,1").encode("latin-1"), ["line 2", "not UTF-8", "save it as UTF-8"]),
    "open_quote.csv": (CSV.format('"Hi,1\nYo,0\nHey,1'), ["never closed", "'\"Hi,1'"]),
    "no_gzip.csv.gz": (gzip.compress(b"text,harmful\n" * 99)[:40], ["damaged gzip", "again"]),
    "pointer.csv": (
        "version https://git-lfs.github.com/spec/v1\n",
        ["placeholder of Git LFS", "git lfs pull"],
    ),
    "no.parquet": ("PAR1", ["not a readable Parquet file"]),
    "note.txt": (CSV.format("Hi,1\nYo,0"), ["no known format", ".jsonl or .csv"]),
    "surrogate.jsonl": (
        '{"id": "s", "text": "\\ud83d", "harmful": true}',
        ["line 1 (id 's')", "'text' holds '\\ud83d'", "half of a character", "remove it"],
    ),
    "deep.jsonl": ("[" * 100_000, ["nested too deeply"]),
    "deeper.jsonl": (
        '{"text": "a", "harmful": true}\n{"b":' + "[" * 100_000,
        ["line 2", "nested too deeply"],
    ),
    "key_twice.jsonl": ('{"text": "a", "text": "b", "harmful": 1}', ["line 1", "'text' twice"]),
    "digits.jsonl": ('{"id": ' + "1" * 5000 + "}", ["line 1", "5000 digits", "in quotes"]),
    "nan.jsonl": ('{"text": "a", "harmful": NaN}', ["'q0001'", "harmful is nan", "true or false"]),
    "nested.jsonl": ('{"id": [1], "text": "a", "harmful": 1}', ["row 1", "id is [1]", "takes a text"]),
    "both.csv": (CSV.format("Hi,1\nHi,0\nYo,0"), ["'q0001' and 'q0002'", "same text", "remove one"]),
    "utf16.csv": (CSV.format("Hi,1").encode("utf-16"), ["not UTF-8", "save it as UTF-8"]),
    "blank.csv": (CSV.format("  ,1\nYo,0"), ["'q0001'", "the text is empty"]),
    "null.jsonl": ('{"text": null, "harmful": true}', ["'q0001'", "the text is empty"]),
    "number.jsonl": ('{"text": 3, "harmful": true}', ["the text is 3", "a string"]),
    "list.jsonl": ('{"text": ["Hi"], "harmful": true}', ["the text is ['Hi']", "a string"]),
    "maybe.csv": (CSV.format("Hi,maybe\nYo,0"), ["harmful is 'maybe'", "true or false"]),
    "ids.jsonl": (
        '{"id": 1, "text": "a", "harmful": true}\n{"id": "1", "text": "b", "harmful": false}',
        ["id '1' occurs more than once"],
    ),
    "split.csv": ("text,harmful,split\na,1,tset\n", ["split", "'tset'", "'test'"]),
    "some_split.csv": ("text,harmful,split\na,1,test\nb,0,\n", ["'q0002' has no split"]),
    "two_splits.csv": ("text,harmful,pair,split\na,1,p,test\nb,0,p,train\n", ["pair 'p'", "two splits"]),
    "three.csv": ("text,harmful,pair\na,1,p\nb,0,p\nc,0,p\n", ["pair 'p'", "1 harmful and 2 benign"]),
    "same_class.csv": ("text,harmful,pair\na,1,p\nb,1,p\nc,0,\n", ["pair 'p'", "2 harmful and 0 benign"]),
    "all_harmful.csv": (CSV.format("Hi,1\nYo,1"), ["no benign query"]),
    "all_benign.csv": (CSV.format("Hi,0\nYo,0"), ["no harmful query"]),
    "half.jsonl": (
        '{"text": "a", "harmful": true}\n{"text": "b"\n',
        ["line 2", "not JSON", "one object per line"],
    ),
    "numbers.jsonl": ("[1]", ["not a JSON array of objects", FORMAT_HINT]),
    "key.jsonl": ('{"text": "a", "harmful": true}\n{"harmful": false}', ["row 2 lacks text", FORMAT_HINT]),
}


@pytest.mark.parametrize("name", INVALID_FILES)
def test_a_mistake_in_a_file_is_reported_in_one_line_with_file_value_and_rule(tmp_path, name):
    content, words = INVALID_FILES[name]
    with pytest.raises(UserError) as caught:
        load_queries(write_file(tmp_path, name, content))
    text = str(caught.value)
    assert "\n" not in text
    for word in (name, *words):
        assert word in text, text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("twin", ["unknown data set 'twin'", "'twins'", ".jsonl or .csv"]),
        ("mine.txt", ["unknown data set", ".jsonl or .csv"]),
        ("nowhere.csv", ["cannot read nowhere.csv", "No such file", "the columns text"]),
        ("./nowhere", ["cannot read nowhere", "No such file"]),
        ("/", ["/ is a folder", "give a file in it"]),
        ("x" * 5000, ["unknown data set"]),
    ],
)
def test_an_unknown_set_is_answered_with_the_known_ones(name, words):
    with pytest.raises(UserError) as caught:
        load_queries(name)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_unknown_split_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"unknown split 'tets': did you mean 'test'"):
        CONTRAST.select_split("tets")
    data = load_queries(write_file(tmp_path, "x.csv", CSV.format("Hi,1\nYo,0")))
    with pytest.raises(UserError, match="has no column split; leave --split out"):
        data.select_split("test")
