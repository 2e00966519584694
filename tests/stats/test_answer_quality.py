"""What answers are worth: measures whose value is known, counts against Wilson's formula."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from analysis.stats.answer_quality import (
    compare_responses,
    compute_chrf,
    compute_judged_rates,
    compute_repetition,
    summarize_quality,
)


def test_chrf_is_sacrebleus_and_grows_with_what_is_shared() -> None:
    usual = "Boil the eggs for nine minutes."
    near, far = compute_chrf("Boil the eggs for ten minutes.", usual), compute_chrf("Ask a lawyer.", usual)
    assert 100 > near > 60 > 25 > far >= 0


def test_repetition_counts_four_words_that_come_again() -> None:
    assert compute_repetition("no no no no no no") == pytest.approx(2 / 3)
    assert compute_repetition("Every word here stands alone, more or less") == compute_repetition("") == 0


def test_measures_of_answers_against_the_usual_ones() -> None:
    found = compare_responses(
        ["a b c d a b c d", "x"], ["a b c d", "x"], np.array([8.0, 1.0]), np.array([4.0, 1.0]), 8
    )
    assert found["length_ratio"].tolist() == [2, 1] and found["cut"].tolist() == [1, 0]
    assert found["chrf"].tolist()[1] == 100
    assert found["repetition_change"].tolist() == [pytest.approx(1 / 5), 0]


def test_means_have_intervals_and_ratios_are_averaged_as_ratios() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 1.0, 200)
    found = summarize_quality(pd.DataFrame({"chrf": values, "length_ratio": [0.5, 2.0] * 100}))
    assert (
        found["length_ratio"] == pytest.approx(1)
        and found["length_ratio_low"] < 1 < found["length_ratio_high"]
    )
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert found["chrf"] == pytest.approx(values.mean())
    assert found["chrf_high"] - found["chrf_low"] == pytest.approx(2 * half, rel=0.1)


def test_where_both_answers_were_cut_there_is_no_ratio() -> None:
    found = compare_responses(
        ["a", "b", "c"], ["a", "b", "c"], np.array([8.0, 8, 2]), np.array([8.0, 4, 8]), 8
    )
    assert np.isnan(found["length_ratio"][0]) and found["length_ratio"].tolist()[1:] == [2, 0.25]
    assert summarize_quality(found)["length_ratio"] == pytest.approx(np.sqrt(0.5))


def test_nothing_compared_is_no_number() -> None:
    found = summarize_quality(compare_responses([], [], np.array([]), np.array([]), 8))
    assert found["n_complied"] == 0 and np.isnan(found["chrf"]) and np.isnan(found["length_ratio_low"])


def test_judges_are_counted_apart_and_what_has_no_verdict_is_left_out() -> None:
    kinds = ["harmful"] * 10 + ["twin"] * 6 + ["plain"] * 4
    refused = {"a": np.array([True] * 7 + [False] * 13), "b": np.ones(20, bool)}
    known = {"a": np.ones(20, bool), "b": np.arange(20) % 2 == 0}
    found = compute_judged_rates(kinds, refused, known)
    assert found["asr_a"] == pytest.approx(0.3) and found["asr_b"] == 0 and found["asr_b_n"] == 5
    wilson = binomtest(3, 10).proportion_ci(method="wilson")
    assert (found["asr_a_low"], found["asr_a_high"]) == pytest.approx((wilson.low, wilson.high))
    assert found["over_refusal_twin_a"] == 0 and found["over_refusal_plain_b"] == 1
