"""Quality of responses: measures of known value, and rates with Wilson's interval."""

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


def test_chrf_grows_with_the_shared_text() -> None:
    reference = "Boil the eggs for nine minutes."
    near, far = (
        compute_chrf("Boil the eggs for ten minutes.", reference),
        compute_chrf("Ask a lawyer.", reference),
    )
    assert 100 > near > 60 > 25 > far >= 0


def test_repetition_counts_repeated_sequences_of_four_words() -> None:
    assert compute_repetition("no no no no no no") == pytest.approx(2 / 3)
    assert compute_repetition("Every word here stands alone, more or less") == compute_repetition("") == 0


def test_responses_are_measured_against_reference_responses() -> None:
    measures = compare_responses(
        ["a b c d a b c d", "x"], ["a b c d", "x"], np.array([8.0, 1.0]), np.array([4.0, 1.0]), 8
    )
    assert measures["length_ratio"].tolist() == [2, 1] and measures["cut"].tolist() == [1, 0]
    assert measures["chrf"].tolist()[1] == 100
    assert measures["repetition_change"].tolist() == [pytest.approx(1 / 5), 0]


def test_means_have_intervals_and_ratios_are_averaged_as_ratios() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 1.0, 200)
    summary = summarize_quality(pd.DataFrame({"chrf": values, "length_ratio": [0.5, 2.0] * 100}))
    assert (
        summary["length_ratio"] == pytest.approx(1)
        and summary["length_ratio_low"] < 1 < summary["length_ratio_high"]
    )
    half_width = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert summary["chrf"] == pytest.approx(values.mean())
    assert summary["chrf_high"] - summary["chrf_low"] == pytest.approx(2 * half_width, rel=0.1)


def test_two_truncated_responses_have_no_length_ratio() -> None:
    measures = compare_responses(
        ["a", "b", "c"], ["a", "b", "c"], np.array([8.0, 8, 2]), np.array([8.0, 4, 8]), 8
    )
    assert np.isnan(measures["length_ratio"][0]) and measures["length_ratio"].tolist()[1:] == [2, 0.25]
    assert summarize_quality(measures)["length_ratio"] == pytest.approx(np.sqrt(0.5))


def test_without_responses_there_is_no_estimate() -> None:
    summary = summarize_quality(compare_responses([], [], np.array([]), np.array([]), 8))
    assert summary["n_complied"] == 0 and np.isnan(summary["chrf"]) and np.isnan(summary["length_ratio_low"])


def test_judges_are_counted_separately_and_responses_without_a_verdict_are_left_out() -> None:
    kinds = ["harmful"] * 10 + ["twin"] * 6 + ["plain"] * 4
    refused = {"a": np.array([True] * 7 + [False] * 13), "b": np.ones(20, bool)}
    has_verdict = {"a": np.ones(20, bool), "b": np.arange(20) % 2 == 0}
    is_harmful = np.arange(20) < 10
    rates = compute_judged_rates(kinds, is_harmful, refused, has_verdict)
    assert rates["asr_a"] == pytest.approx(0.3) and rates["asr_b"] == 0 and rates["asr_b_n"] == 5
    interval = binomtest(3, 10).proportion_ci(method="wilson")
    assert (rates["asr_a_low"], rates["asr_a_high"]) == pytest.approx((interval.low, interval.high))
    assert rates["over_refusal_twin_a"] == 0 and rates["over_refusal_plain_b"] == 1
    assert rates["over_refusal_twin_b_n"] == 3 and rates["over_refusal_plain_a_n"] == 4


def test_every_kind_that_occurs_has_a_rate_also_those_of_the_users_own() -> None:
    kinds, is_harmful = (
        ["weapons", "drugs", "mine", "sounds_unsafe", "mine"],
        np.array([True, True, *[False] * 3]),
    )
    refused, judged = {"a": np.array([True, False, True, False, False])}, {"a": np.ones(5, bool)}
    rates = compute_judged_rates(kinds, is_harmful, refused, judged)
    estimates = {name: value for name, value in rates.items() if name.endswith("_a")}
    assert estimates == {"asr_a": 0.5, "over_refusal_mine_a": 0.5, "over_refusal_sounds_unsafe_a": 0}
