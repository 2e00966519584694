"""The shipped query set: its fields, pairs, splits, checksum, and small surface leak.

The file is read by its path relative to this test, so these tests need no installed package and no network.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

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
PAIRS_PER_CATEGORY = {"train": 8, "calibration": 4, "test": 8}
PLAIN = {"train": 48, "calibration": 24, "test": 48}
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


def leak_features(name):
    """Return a new vectorizer, so that no fit is shared between tests."""
    if name == "words":
        return TfidfVectorizer(lowercase=True, ngram_range=(1, 2))
    return TfidfVectorizer(lowercase=True, analyzer="char_wb", ngram_range=(2, 5))


def leak_auroc(name, train, test):
    """Return the AUROC on `test` of a bag-of-words classifier that was fitted on `train`."""
    model = make_pipeline(leak_features(name), LogisticRegression(max_iter=1000))
    model.fit([row["text"] for row in train], [row["harmful"] for row in train])
    scores = model.decision_function([row["text"] for row in test])
    return roc_auc_score([row["harmful"] for row in test], scores)


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


def test_there_are_240_pairs_in_12_categories_and_120_plain_requests():
    """The README and every table of results state these counts."""
    assert Counter(row["kind"] for row in ROWS) == {"harmful": 240, "twin": 240, "plain": 120}
    paired = Counter(row["category"] for row in ROWS if row["kind"] != "plain")
    assert paired == dict.fromkeys(CATEGORIES, 40)
    assert len(PAIRS) == 240


def test_ids_are_unique_and_name_the_pair_and_the_class():
    """Scores are joined on the id and grouped by the pair."""
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        if row["kind"] == "plain":
            assert re.fullmatch(r"plain-\d{3}", row["id"])
        else:
            assert re.fullmatch(re.escape(row["category"]) + r"-\d{2}", row["pair"])
            assert row["id"] == f"{row['pair']}-{'h' if row['harmful'] else 'b'}"


def test_harmful_is_true_for_exactly_the_harmful_kind():
    """The class is stored twice; both values must agree."""
    assert all(row["harmful"] == (row["kind"] == "harmful") for row in ROWS)


def test_plain_requests_have_no_pair_and_the_category_plain():
    """A plain request has no twin."""
    for row in ROWS:
        plain = row["kind"] == "plain"
        assert (row["pair"] is None) == plain
        assert (row["category"] == "plain") == plain


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


def test_every_category_is_split_8_4_8_and_plain_48_24_48():
    """Every split has the same categories."""
    for category in CATEGORIES:
        splits = Counter(
            members[0]["split"] for members in PAIRS.values() if members[0]["category"] == category
        )
        assert splits == PAIRS_PER_CATEGORY, category
    assert Counter(row["split"] for row in ROWS if row["kind"] == "plain") == PLAIN


def test_splits_do_not_follow_the_order_of_writing():
    """Requests written early may differ from those written late."""
    for category in CATEGORIES:
        order = [PAIRS[f"{category}-{number:02d}"][0]["split"] for number in range(1, 21)]
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
    similarity = (vectors @ vectors.T).toarray()
    close = [
        (ROWS[i]["id"], ROWS[j]["id"], round(float(similarity[i, j]), 2))
        for i, j in combinations(range(len(ROWS)), 2)
        if ROWS[i]["split"] != ROWS[j]["split"] and similarity[i, j] > 0.6
    ]
    assert close == []


def test_no_text_has_sexual_content():
    """The set excludes this topic on purpose."""
    assert [row["id"] for row in ROWS if SEXUAL.search(row["text"])] == []


@pytest.mark.parametrize("name", ["words", "characters"])
def test_surface_features_barely_separate_harmful_requests_from_twins(name):
    """A list of words must not suffice for a high score."""
    paired = [row for row in ROWS if row["kind"] != "plain"]
    train = [row for row in paired if row["split"] == "train"]
    test = [row for row in paired if row["split"] == "test"]
    assert leak_auroc(name, train, test) < 0.75


@pytest.mark.parametrize("name", ["words", "characters"])
def test_the_leak_is_small_for_other_splits_too(name):
    """The small leak must not depend on one assignment of pairs."""
    names = sorted(PAIRS)
    aurocs = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(names))
        train = [row for i in order[:96] for row in PAIRS[names[i]]]
        test = [row for i in order[144:] for row in PAIRS[names[i]]]
        aurocs.append(leak_auroc(name, train, test))
    assert max(aurocs) < 0.75, aurocs


def test_length_does_not_separate_harmful_requests_from_twins():
    """Neither class may be longer in general."""
    paired = [row for row in ROWS if row["kind"] != "plain"]
    auroc = roc_auc_score([row["harmful"] for row in paired], [len(row["text"]) for row in paired])
    assert 0.45 <= auroc <= 0.55


def test_the_readme_states_the_checksum_of_the_file():
    """A change of the data must be documented."""
    stated = re.findall(
        r"contrast\.jsonl\s+sha256 ([0-9a-f]{64})", (DATA / "README.md").read_text(encoding="utf-8")
    )
    assert stated == [hashlib.sha256(FILE.read_bytes()).hexdigest()]
