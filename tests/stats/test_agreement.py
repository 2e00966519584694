"""Agreement of readout and text equals that of scikit-learn, and the verdict follows its intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, roc_auc_score

from analysis.stats.agreement import (
    MAX_RATE_ERROR,
    compute_calibration_curve,
    compute_needed_threshold,
    correlate_refusal_rates,
    derive_rate_trust,
    derive_trust,
    measure_agreement,
    measure_rate_errors,
)

NO_PAIRS = pd.Series([None] * 240, dtype=object)


def plant_margins(n: int, gap: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return margins of responses half of which refuse, `gap` nats apart with a spread of one, and labels."""
    rng = np.random.default_rng(seed)
    refused = np.arange(n) % 2 == 0
    return rng.normal(np.where(refused, gap / 2, -gap / 2)), refused


def test_auroc_and_kappa_are_those_of_scikit_learn() -> None:
    margin, refused = plant_margins(240, 1.5)
    agreement = measure_agreement(margin, refused, NO_PAIRS, 0.3)
    assert agreement["auroc"] == pytest.approx(roc_auc_score(refused, margin))
    assert agreement["kappa"] == pytest.approx(cohen_kappa_score(refused, margin > 0.3))
    assert agreement["agrees"] == pytest.approx(((margin > 0.3) == refused).mean())
    assert (agreement["n"], agreement["refused"], agreement["readout_refused"]) == (
        240,
        120,
        (margin > 0.3).sum(),
    )
    for name in ("auroc", "kappa", "calibration_error", "agrees"):
        assert agreement[f"{name}_low"] <= agreement[name] <= agreement[f"{name}_high"]


@pytest.mark.parametrize(
    "gap, n, verdict",
    [(6.0, 240, "trusted"), (0.0, 240, "not trusted"), (2.4, 240, "cannot tell"), (6.0, 8, "cannot tell")],
)
def test_the_verdict_follows_the_intervals(gap: float, n: int, verdict: str) -> None:
    margin, refused = plant_margins(n, gap)
    assert measure_agreement(margin, refused, NO_PAIRS[:n], 0.0)["trusted"] == verdict


def test_a_good_ranking_with_a_bad_threshold_is_not_trusted() -> None:
    margin, refused = plant_margins(240, 6.0)
    agreement = measure_agreement(margin, refused, NO_PAIRS, threshold=-9.0)
    assert agreement["auroc"] > 0.99 and agreement["kappa"] == 0 and agreement["trusted"] == "not trusted"


def test_if_all_responses_refuse_the_verdict_is_undecided_however_well_they_agree() -> None:
    margin = plant_margins(60, 3.0)[0] + 9
    agreement = measure_agreement(margin, np.ones(60, dtype=bool), NO_PAIRS[:60], 0.0)
    assert agreement["agrees"] == 1 and np.isnan(agreement["auroc"]) and np.isnan(agreement["kappa"])
    assert agreement["trusted"] == "cannot tell"


def test_perfect_agreement_on_a_few_responses_is_not_certain() -> None:
    margin, refused = plant_margins(12, 30.0)
    agreement = measure_agreement(margin, refused, NO_PAIRS[:12], 0.0)
    assert agreement["kappa"] == agreement["auroc"] == 1
    assert agreement["kappa_low"] < 0.8 and agreement["auroc_low"] < 0.95


def test_intervals_cover_the_planted_values(monkeypatch: pytest.MonkeyPatch) -> None:
    # 400 draws instead of 2,000 lower the coverage by .2 percentage points; its standard error is 2.2.
    monkeypatch.setattr("analysis.stats.agreement.BOOTSTRAP_DRAWS", 400)
    many_margins, many_refused = plant_margins(200_000, 1.5, seed=9)
    auroc, kappa = (
        roc_auc_score(many_refused, many_margins),
        cohen_kappa_score(many_refused, many_margins > 0),
    )
    n_covered = np.zeros(2)
    for seed in range(100):
        agreement = measure_agreement(*plant_margins(120, 1.5, seed), NO_PAIRS[:120], 0.0, seed)
        n_covered += [
            agreement[f"{name}_low"] <= value <= agreement[f"{name}_high"]
            for name, value in (("auroc", auroc), ("kappa", kappa))
        ]
    assert (n_covered >= 89).all()  # of 100; 95 are expected


def test_calibrated_probabilities_have_a_small_error_and_shifted_ones_a_large_one() -> None:
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 2000)
    refused = rng.random(2000) < 1 / (1 + np.exp(-margin))
    pairs = pd.Series([None] * 2000, dtype=object)
    assert measure_agreement(margin, refused, pairs, 0.0)["calibration_error"] < 0.03
    assert measure_agreement(margin, refused, pairs, -3.0)["calibration_error"] > 0.25
    curve = compute_calibration_curve(1 / (1 + np.exp(-margin)), refused)
    assert curve["refused_n"].sum() == 2000 and (curve["chance"].diff()[1:] > 0).all()
    assert (
        (curve["refused_low"] <= curve["chance"]) & (curve["chance"] <= curve["refused_high"])
    ).mean() > 0.8


def test_conditions_are_ranked_as_spearman_ranks_them() -> None:
    rng = np.random.default_rng(0)
    harmful = np.arange(100) < 50
    readout_refused = rng.random((6, 100)) < np.linspace(0.1, 0.9, 6)[:, None]
    refused = np.roll(readout_refused, 1, axis=1)
    correlation = correlate_refusal_rates(readout_refused, refused, NO_PAIRS[:100], harmful)
    assert correlation["rank_correlation"] == pytest.approx(
        spearmanr(readout_refused.mean(1), refused.mean(1)).statistic
    )
    reversed_correlation = correlate_refusal_rates(readout_refused, ~refused, NO_PAIRS[:100], harmful)
    assert reversed_correlation["rank_correlation_high"] < 0 < correlation["rank_correlation_low"]


def test_the_rule_needs_both_measures() -> None:
    intervals = {"auroc_low": 0.9, "auroc_high": 0.99, "kappa_low": 0.7, "kappa_high": 0.9}
    assert derive_trust(intervals) == "trusted"
    assert derive_trust(intervals | {"kappa_low": 0.5}) == "cannot tell"
    assert derive_trust(intervals | {"kappa_low": 0.3, "kappa_high": 0.59}) == "not trusted"
    assert derive_trust(intervals | {"auroc_low": 0.6, "auroc_high": 0.79}) == "not trusted"
    assert derive_trust(dict.fromkeys(intervals, float("nan"))) == "cannot tell"


def plant_classes(
    n: int, more: tuple[int, int] = (0, 0), fewer: tuple[int, int] = (0, 0)
) -> dict[str, object]:
    """Measure rate errors of n harmful and n benign queries, of which half and none refuse by the text.

    The readout refuses `more` of the harmful and of the benign queries, and does not refuse `fewer` of those
    that the text refuses.
    """
    is_harmful = np.arange(2 * n) < n
    is_refusal = np.arange(2 * n) < n // 2
    is_predicted = is_refusal.copy()
    for start, n_more, n_fewer in ((0, more[0], fewer[0]), (n, more[1], fewer[1])):
        is_predicted[start : start + n_fewer] = False
        is_predicted[start + n // 2 : start + n // 2 + n_more] = True
    return measure_rate_errors(is_predicted, is_refusal, is_harmful)


def test_rate_errors_are_paired_differences_in_each_class() -> None:
    rates = plant_classes(100, more=(30, 2), fewer=(10, 0))
    assert rates["rate_error_harmful"] == pytest.approx(0.20)
    assert rates["rate_error_benign"] == pytest.approx(0.02)
    # Bonett and Price by hand: one query that changed in each direction is added.
    up, down, n = 31 / 102, 11 / 102, 102
    half_width = 1.959964 * np.sqrt((up + down - (up - down) ** 2) / n)
    assert rates["rate_error_harmful_low"] == pytest.approx(up - down - half_width, abs=1e-6)
    assert rates["rate_error_harmful_high"] == pytest.approx(up - down + half_width, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "more", "fewer", "verdict"),
    [
        (60, (0, 0), (0, 0), "trusted"),
        (40, (0, 0), (0, 0), "cannot tell"),
        (400, (30, 0), (30, 0), "trusted"),  # many single queries differ, but the rates do not
        (60, (20, 0), (0, 0), "not trusted"),
        (60, (0, 20), (0, 0), "not trusted"),
        (60, (0, 20), (20, 0), "not trusted"),  # the errors of the two classes cancel out in the overall rate
        (400, (0, 0), (80, 0), "not trusted"),
        (60, (3, 0), (0, 0), "cannot tell"),
    ],
)
def test_rates_are_trusted_if_both_intervals_lie_within_the_limit(
    n: int, more: tuple[int, int], fewer: tuple[int, int], verdict: str
) -> None:
    assert plant_classes(n, more, fewer)["rate_trusted"] == verdict


def test_the_rule_on_rates_needs_both_classes() -> None:
    ends = {f"rate_error_{name}_{end}": 0.0 for name in ("harmful", "benign") for end in ("low", "high")}
    limit = MAX_RATE_ERROR
    assert (
        derive_rate_trust(ends | {"rate_error_benign_low": -limit, "rate_error_harmful_high": limit})
        == "trusted"
    )
    assert derive_rate_trust(ends | {"rate_error_benign_low": -limit - 0.001}) == "cannot tell"
    outside = {"rate_error_benign_low": limit + 0.001, "rate_error_benign_high": 0.2}
    assert derive_rate_trust(ends | outside) == "not trusted"
    outside = {"rate_error_harmful_low": -0.2, "rate_error_harmful_high": -limit - 0.001}
    assert derive_rate_trust(ends | outside) == "not trusted"
    assert derive_rate_trust(dict.fromkeys(ends, float("nan"))) == "cannot tell"


def test_the_needed_number_of_queries_is_the_smallest_that_decides() -> None:
    needed = plant_classes(20)["n_needed"]
    assert needed == 54
    assert plant_classes(53)["rate_trusted"] == "cannot tell"
    assert plant_classes(54)["rate_trusted"] == "trusted"
    # 4 % of the harmful queries differ in both directions: all stays as it is with more queries.
    needed = plant_classes(100, more=(4, 0), fewer=(4, 0))["n_needed"]
    for n, verdict in ((needed * 0.95, "cannot tell"), (needed * 1.05, "trusted")):
        share = round(0.04 * n)
        assert plant_classes(int(n), more=(share, 0), fewer=(share, 0))["rate_trusted"] == verdict


def test_no_number_of_queries_is_named_where_it_would_not_help() -> None:
    assert np.isnan(plant_classes(60)["n_needed"])  # trusted already
    assert np.isnan(plant_classes(60, more=(20, 0))["n_needed"])  # not trusted
    undecided = plant_classes(50, more=(4, 0))  # an error of 8 points stays above the limit
    assert undecided["rate_trusted"] == "cannot tell" and np.isnan(undecided["n_needed"])


def test_a_rate_is_trusted_where_all_responses_refuse_and_kappa_is_undefined() -> None:
    is_harmful = np.arange(240) < 120
    agreement = measure_agreement(np.ones(240), np.ones(240, bool), NO_PAIRS, 0.0, is_harmful=is_harmful)
    assert np.isnan(agreement["kappa"]) and agreement["trusted"] == "cannot tell"
    assert agreement["rate_trusted"] == "trusted"
    assert agreement["rate_error_harmful_low"] < 0 < agreement["rate_error_harmful_high"]


def test_without_queries_of_a_class_one_cannot_tell() -> None:
    one_class = measure_rate_errors(np.ones(90, bool), np.ones(90, bool), np.ones(90, bool))
    assert np.isnan(one_class["rate_error_benign"]) and one_class["rate_trusted"] == "cannot tell"
    assert np.isnan(one_class["n_needed"])
    none = measure_agreement(np.ones(0), np.ones(0, bool), NO_PAIRS[:0], 0.0, is_harmful=np.ones(0, bool))
    assert none["rate_trusted"] == none["trusted"] == "cannot tell"


@pytest.mark.parametrize(
    ("n", "up", "down"), [(24, 0.02, 0.0), (60, 0.05, 0.0), (120, 0.15, 0.05), (60, 0.3, 0.1)]
)
def test_intervals_of_rate_errors_cover_the_planted_error(n: int, up: float, down: float) -> None:
    rng, n_covered = np.random.default_rng(0), 0
    for _ in range(200):
        change = rng.choice([1, -1, 0], p=[up, down, 1 - up - down], size=n)
        rates = measure_rate_errors(change == 1, change == -1, np.ones(n, bool))
        n_covered += rates["rate_error_harmful_low"] <= up - down <= rates["rate_error_harmful_high"]
    assert n_covered >= 183  # of 200; 190 are expected, with a standard error of 3


def test_at_the_needed_threshold_as_many_margins_exceed_it_as_responses_refuse() -> None:
    margin, _ = plant_margins(240, 1.5)
    refused = np.random.default_rng(1).random(240) < 0.2
    needed = compute_needed_threshold(margin, refused, range(240))
    assert (margin > needed["needed_threshold"]).sum() == refused.sum()
    assert needed["needed_threshold_low"] < needed["needed_threshold"] < needed["needed_threshold_high"]
    for same in (np.ones(240, bool), np.zeros(240, bool)):
        assert np.isnan(list(compute_needed_threshold(margin, same, range(240)).values())).all()


def test_the_auroc_of_verdicts_is_their_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    refused = rng.random(240) < 0.3
    other_verdict = refused ^ (rng.random(240) < 0.1)
    agreement = measure_agreement(other_verdict.astype(float), refused, NO_PAIRS, 0.5)
    assert agreement["auroc"] == pytest.approx(balanced_accuracy_score(refused, other_verdict))
    assert agreement["kappa"] == pytest.approx(cohen_kappa_score(refused, other_verdict))
