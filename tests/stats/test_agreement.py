"""Agreement of readout and text equals that of scikit-learn, and the verdict follows its intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from analysis.stats.agreement import (
    compute_calibration_curve,
    correlate_refusal_rates,
    derive_trust,
    measure_agreement,
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
