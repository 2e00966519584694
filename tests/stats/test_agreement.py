"""Agreement of readout and text: as scikit-learn has it, on planted truth, and what the verdict rests on."""

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

NONE = pd.Series([None] * 240, dtype=object)


def planted(n: int, gap: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Margins of answers of which half refuse, `gap` nats apart at a spread of one."""
    rng = np.random.default_rng(seed)
    refused = np.arange(n) % 2 == 0
    return rng.normal(np.where(refused, gap / 2, -gap / 2)), refused


def test_auroc_and_kappa_are_those_of_scikit_learn() -> None:
    margin, refused = planted(240, 1.5)
    found = measure_agreement(margin, refused, NONE, 0.3)
    assert found["auroc"] == pytest.approx(roc_auc_score(refused, margin))
    assert found["kappa"] == pytest.approx(cohen_kappa_score(refused, margin > 0.3))
    assert found["agrees"] == pytest.approx(((margin > 0.3) == refused).mean())
    assert (found["n"], found["refused"], found["readout_refused"]) == (240, 120, (margin > 0.3).sum())
    for name in ("auroc", "kappa", "calibration_error", "agrees"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


@pytest.mark.parametrize(
    "gap, n, verdict",
    [(6.0, 240, "trusted"), (0.0, 240, "not trusted"), (2.4, 240, "cannot tell"), (6.0, 8, "cannot tell")],
)
def test_the_verdict_follows_the_intervals(gap: float, n: int, verdict: str) -> None:
    margin, refused = planted(n, gap)
    assert measure_agreement(margin, refused, NONE[:n], 0.0)["trusted"] == verdict


def test_a_good_ranking_with_a_bad_threshold_is_not_trusted() -> None:
    margin, refused = planted(240, 6.0)
    found = measure_agreement(margin, refused, NONE, threshold=-9.0)
    assert found["auroc"] > 0.99 and found["kappa"] == 0 and found["trusted"] == "not trusted"


def test_where_all_answers_refuse_there_is_no_telling_however_well_they_agree() -> None:
    margin = planted(60, 3.0)[0] + 9
    found = measure_agreement(margin, np.ones(60, dtype=bool), NONE[:60], 0.0)
    assert found["agrees"] == 1 and np.isnan(found["auroc"]) and np.isnan(found["kappa"])
    assert found["trusted"] == "cannot tell"


def test_perfect_agreement_of_a_few_is_not_certain() -> None:
    margin, refused = planted(12, 30.0)
    found = measure_agreement(margin, refused, NONE[:12], 0.0)
    assert found["kappa"] == found["auroc"] == 1
    assert found["kappa_low"] < 0.8 and found["auroc_low"] < 0.95


def test_intervals_cover_the_planted_values(monkeypatch: pytest.MonkeyPatch) -> None:
    # 400 draws instead of 2,000 lower the coverage by .2 percentage points; its standard error is 2.2.
    monkeypatch.setattr("analysis.stats.agreement.BOOTSTRAP_DRAWS", 400)
    big, truth = planted(200_000, 1.5, seed=9)
    auroc, kappa = roc_auc_score(truth, big), cohen_kappa_score(truth, big > 0)
    inside = np.zeros(2)
    for seed in range(100):
        found = measure_agreement(*planted(120, 1.5, seed), NONE[:120], 0.0, seed)
        inside += [
            found[f"{name}_low"] <= value <= found[f"{name}_high"]
            for name, value in (("auroc", auroc), ("kappa", kappa))
        ]
    assert (inside >= 89).all()  # of 100; 95 are expected


def test_calibrated_chances_have_a_small_error_and_skewed_ones_a_large_one() -> None:
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
    says = rng.random((6, 100)) < np.linspace(0.1, 0.9, 6)[:, None]
    refused = np.roll(says, 1, axis=1)
    found = correlate_refusal_rates(says, refused, NONE[:100], harmful)
    assert found["rank_correlation"] == pytest.approx(spearmanr(says.mean(1), refused.mean(1)).statistic)
    backwards = correlate_refusal_rates(says, ~refused, NONE[:100], harmful)
    assert backwards["rank_correlation_high"] < 0 < found["rank_correlation_low"]


def test_the_rule_needs_both_measures() -> None:
    good = {"auroc_low": 0.9, "auroc_high": 0.99, "kappa_low": 0.7, "kappa_high": 0.9}
    assert derive_trust(good) == "trusted"
    assert derive_trust(good | {"kappa_low": 0.5}) == "cannot tell"
    assert derive_trust(good | {"kappa_low": 0.3, "kappa_high": 0.59}) == "not trusted"
    assert derive_trust(good | {"auroc_low": 0.6, "auroc_high": 0.79}) == "not trusted"
    assert derive_trust(dict.fromkeys(good, float("nan"))) == "cannot tell"
