"""The surface leak is 1 where a word tells the classes apart, .5 where nothing does, and checks its input."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from analysis.datasets.queries import Query
from analysis.datasets.surface_leak import SURFACE_FEATURES, measure_surface_leak, score_pairs
from defenses.errors import UserError

WORDS = ["bread", "garden", "letter", "river", "music", "window", "train", "paper", "winter", "coffee"]


def make_pairs(harmful_word, n_pairs, n_train):
    """Return pairs of random words, of which the harmful ones end in a given word."""
    rng = np.random.default_rng(0)
    queries = []
    for number in range(n_pairs):
        split = "train" if number < n_train else "test"
        for harmful in (True, False):
            text = " ".join([*rng.choice(WORDS, 6), harmful_word if harmful else "today"])
            queries.append(Query(f"{number}{harmful}", text, harmful, pair=str(number), split=split))
    return queries


@pytest.mark.parametrize("features", SURFACE_FEATURES)
def test_a_word_of_one_class_is_found_and_chance_is_near_one_half(features):
    planted = measure_surface_leak(make_pairs("poison", 120, 60), features, repeats=1)
    assert planted["n_pairs"].tolist() == [60, 120]
    assert (planted[["paired_leak", "paired_leak_high", "auroc", "auroc_high"]] > 0.98).all(axis=None)
    chance = measure_surface_leak(make_pairs("today", 200, 100), features, repeats=1)
    for name in ("paired_leak", "auroc"):
        assert chance[name].between(0.38, 0.62).all()
        assert (chance[f"{name}_low"] < chance[name]).all() and (chance[name] < chance[f"{name}_high"]).all()


def test_the_figures_are_those_of_their_definitions_with_a_tie_counted_half():
    queries = make_pairs("today", 60, 30)
    queries[-1] = Query("tie", queries[-2].text, False, pair="59", split="test")
    leak = measure_surface_leak(queries, "words", repeats=1).iloc[0]
    texts = np.array([query.text for query in queries], dtype=object).reshape(-1, 2)
    harmful, twin = score_pairs(texts, np.arange(60) < 30, "words")[30:].T
    assert leak["paired_leak"] == pytest.approx(((harmful > twin).sum() + 0.5 * (harmful == twin).sum()) / 30)
    assert (harmful == twin).any()
    assert leak["auroc"] == pytest.approx(roc_auc_score([1] * 30 + [0] * 30, [*harmful, *twin]))


@pytest.mark.parametrize("queries", [make_pairs("today", 24, 5), [Query("a", "Hi", True, split="train")]])
def test_a_set_without_enough_pairs_is_an_error_with_their_number(queries):
    with pytest.raises(UserError, match=r"[05] train and (0|19) test pairs: at least 10"):
        measure_surface_leak(queries, "words")
