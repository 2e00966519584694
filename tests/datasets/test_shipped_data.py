"""The shipped query sets: their fields, pairs, splits, checksums, and small surface leak.

The files are read by their path relative to this test, and no test needs the network.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score

from analysis.datasets.loading import load_queries
from analysis.datasets.surface_leak import SURFACE_FEATURES, measure_surface_leak

DATA = Path(__file__).resolve().parents[2] / "data"
FILE = DATA / "contrast.jsonl"
FIELDS = ["id", "pair", "text", "harmful", "category", "split", "kind"]
CATEGORIES = [
    "violence",
    "weapons",
    "drugs",
    "malware",
    "fraud",
    "privacy",
    "hate",
    "self-harm",
    "disinformation",
    "theft",
    "extremism",
    "hazards",
]
PAIRS_PER_CATEGORY = {"train": 8, "calibration": 5, "test": 13}
OTHERS_PER_CATEGORY = {"train": 4, "calibration": 3, "test": 13}  # of each kind without pairs but plain
PLAIN = {"train": 48, "calibration": 36, "test": 156}
ID_PREFIXES = {"sounds_unsafe": "sounds-", "same_topic": "topic-"}
SEXUAL = re.compile(
    r"\b(sex\w*|porn\w*|nude\w*|naked|erotic\w*|genital\w*|orgasm\w*|rape\w*|rapist\w*|molest\w*|fetish\w*|"
    r"masturbat\w*|prostitut\w*|incest\w*|pedophil\w*|strip(per|tease)\w*|hooker\w*|escort\w*|upskirt\w*|lingerie)\b",
    re.IGNORECASE,
)

ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
PAIRS = defaultdict(list)
for _row in ROWS:
    if _row["pair"] is not None:
        PAIRS[_row["pair"]].append(_row)


def normalize(text):
    """Return the text in lower case with only letters, digits and single spaces."""
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower().replace("'", "")).split())


def test_every_row_has_the_same_fields_in_the_same_order_and_of_the_right_type():
    """A loader may rely on the fields without a check."""
    for row in ROWS:
        assert list(row) == FIELDS
        assert isinstance(row["harmful"], bool)
        assert row["pair"] is None or isinstance(row["pair"], str)
        assert all(isinstance(row[name], str) for name in ("id", "text", "category", "split", "kind"))


def test_the_file_ends_with_one_newline_and_has_no_blank_line():
    """So that the checksum is the same on every system."""
    raw = FILE.read_bytes()
    assert raw.endswith(b"}\n")
    assert b"\n\n" not in raw
    assert b"\r" not in raw


def test_there_are_312_pairs_in_12_categories_and_240_requests_of_each_other_kind():
    """The README and every table of results state these counts."""
    kinds = Counter(row["kind"] for row in ROWS)
    assert kinds == {"harmful": 312, "twin": 312, "sounds_unsafe": 240, "same_topic": 240, "plain": 240}
    categories = Counter(row["category"] for row in ROWS if row["kind"] != "plain")
    assert categories == dict.fromkeys(CATEGORIES, 2 * 26 + 2 * 20)
    assert len(PAIRS) == 312


def test_ids_are_unique_and_name_the_pair_and_the_class():
    """Scores are joined on the id and grouped by the pair."""
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        if row["kind"] == "plain":
            assert re.fullmatch(r"plain-\d{3}", row["id"])
        elif row["kind"] in ID_PREFIXES:
            assert re.fullmatch(ID_PREFIXES[row["kind"]] + re.escape(row["category"]) + r"-\d{2}", row["id"])
        else:
            assert re.fullmatch(re.escape(row["category"]) + r"-\d{2}", row["pair"])
            assert row["id"] == f"{row['pair']}-{'h' if row['harmful'] else 'b'}"


def test_harmful_is_true_for_exactly_the_harmful_kind():
    """The class is stored twice; both values must agree."""
    assert all(row["harmful"] == (row["kind"] == "harmful") for row in ROWS)


def test_only_harmful_requests_and_twins_have_pairs_and_only_plain_ones_the_category_plain():
    """The kinds without pairs have no twin."""
    for row in ROWS:
        assert (row["pair"] is not None) == (row["kind"] in ("harmful", "twin"))
        assert (row["category"] == "plain") == (row["kind"] == "plain")


def test_every_pair_is_one_harmful_request_and_one_twin_of_the_same_category_and_split():
    """A fit must not use one member of a test pair."""
    for pair, members in PAIRS.items():
        assert sorted(row["kind"] for row in members) == ["harmful", "twin"], pair
        assert len({(row["category"], row["split"]) for row in members}) == 1, pair


@pytest.mark.parametrize("unit", ["characters", "words"])
def test_the_members_of_a_pair_differ_in_length_by_at_most_30_percent(unit):
    """Otherwise length alone could separate the classes."""
    for pair, members in PAIRS.items():
        lengths = [len(row["text"]) if unit == "characters" else len(row["text"].split()) for row in members]
        assert max(lengths) <= 1.3 * min(lengths), (pair, lengths)


def test_every_split_has_the_same_share_of_every_category():
    """A result on one split must not depend on its topics."""
    counts = defaultdict(Counter)
    for row in ROWS:
        counts[row["kind"], row["category"]][row["split"]] += 1
    assert counts.pop(("plain", "plain")) == PLAIN
    for (kind, category), splits in counts.items():
        expected = OTHERS_PER_CATEGORY if kind in ID_PREFIXES else PAIRS_PER_CATEGORY
        assert splits == expected, (kind, category)


def test_splits_do_not_follow_the_order_of_writing():
    """Requests written early may differ from those written late."""
    for category in CATEGORIES:
        order = [PAIRS[f"{category}-{number:02d}"][0]["split"] for number in range(1, 27)]
        changes = sum(left != right for left, right in pairwise(order))
        assert changes > 4, (category, order)


def test_texts_are_5_to_30_words_of_at_most_300_characters_on_one_line_with_clean_spacing():
    """Requests are short and have no superfluous spaces."""
    for row in ROWS:
        text = row["text"]
        assert 5 <= len(text.split()) <= 30, row["id"]
        assert len(text) <= 300, row["id"]
        assert " ".join(text.split()) == text, row["id"]


def test_no_text_occurs_twice_regardless_of_case_and_punctuation():
    """A repeated text would make intervals too narrow."""
    repeated = [text for text, count in Counter(normalize(row["text"]) for row in ROWS).items() if count > 1]
    assert repeated == []


def test_no_two_texts_of_different_splits_are_near_duplicates():
    """Tuning on one split must not leak into another."""
    vectors = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit_transform([row["text"] for row in ROWS])
    splits = np.array([row["split"] for row in ROWS])
    similarity = np.triu((vectors @ vectors.T).toarray() * (splits[:, None] != splits))
    close = [(ROWS[i]["id"], ROWS[j]["id"]) for i, j in np.argwhere(similarity > 0.6)]
    assert close == []


def test_no_text_has_sexual_content():
    """The set excludes this topic on purpose."""
    assert [row["id"] for row in ROWS if SEXUAL.search(row["text"])] == []


@pytest.mark.parametrize("features", SURFACE_FEATURES)
def test_surface_features_barely_separate_harmful_requests_from_twins(features):
    """A list of words must not suffice for a high score."""
    leak = measure_surface_leak(load_queries("twins").queries, features, repeats=1).set_index("fit")
    assert leak["n_pairs"].to_dict() == {"train to test": 156, "all pairs, 10 folds": 312}
    assert leak.loc["train to test", "paired_leak"] <= 0.55
    assert leak.loc["all pairs, 10 folds", "paired_leak"] <= 0.60  # the leak depends little on the split


def test_length_does_not_separate_harmful_requests_from_twins():
    """Neither class may be longer in general."""
    paired = [row for row in ROWS if row["pair"] is not None]
    auroc = roc_auc_score([row["harmful"] for row in paired], [len(row["text"]) for row in paired])
    assert 0.45 <= auroc <= 0.55


def test_the_readme_states_the_checksums_of_the_files():
    """A change of the data must be documented."""
    stated = re.findall(
        r"(contrast\S*\.jsonl)\s+sha256 ([0-9a-f]{64})", (DATA / "README.md").read_text(encoding="utf-8")
    )
    assert sorted(stated) == sorted(
        (path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in DATA.glob("contrast*.jsonl")
    )
