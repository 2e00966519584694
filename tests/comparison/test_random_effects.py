"""Random effects agree with a published example, and with a second computation of each number."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import t as student

from analysis.comparison.random_effects import estimate_between_variance, fit_random_effects

# Cases and non-cases of tuberculosis, vaccinated and not, in 13 trials of the BCG vaccine (Colditz et al.
# 1994). Log risk ratios by REML, as published for metafor: mean -0.7145, tau² 0.3132, I² 92.22 %.
TRIALS = np.array(
    [
        *((4, 119, 11, 128), (6, 300, 29, 274), (3, 228, 11, 209), (62, 13536, 248, 12619)),
        *((33, 5036, 47, 5761), (180, 1361, 372, 1079), (8, 2537, 10, 619), (505, 87886, 499, 87892)),
        *((29, 7470, 45, 7232), (17, 1699, 65, 1600), (186, 50448, 141, 27197), (5, 2493, 3, 2338)),
        (27, 16886, 29, 17825),
    ],
    dtype=float,
)


def log_risk_ratios() -> tuple[np.ndarray, np.ndarray]:
    """Return the log risk ratio of each trial and its variance."""
    a, b, c, d = TRIALS.T
    return np.log(a / (a + b) * (c + d) / c), 1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)


def test_the_published_example_comes_out() -> None:
    fitted = fit_random_effects(*log_risk_ratios())
    assert fitted.mean == pytest.approx(-0.7145, abs=5e-5)
    assert fitted.between_sd**2 == pytest.approx(0.3132, abs=5e-5)
    assert fitted.i_squared == pytest.approx(0.9222139, abs=5e-6)


def test_the_variance_between_models_maximizes_the_restricted_likelihood() -> None:
    rng = np.random.default_rng(1)
    for n in (2, 3, 5, 12):
        effects, variances = rng.normal(0, 2, n), rng.uniform(0.2, 3, n)

        def lose(between: float, y: np.ndarray = effects, v: np.ndarray = variances) -> float:
            weights = 1 / (v + between)
            mean = weights @ y / weights.sum()
            return float(np.log(v + between).sum() + np.log(weights.sum()) + weights @ (y - mean) ** 2)

        best = minimize_scalar(lose, bounds=(0, 100), method="bounded", options={"xatol": 1e-9}).x
        assert estimate_between_variance(effects, variances) == pytest.approx(best, abs=1e-4)


def test_the_intervals_are_those_of_a_weighted_regression() -> None:
    effects, variances = log_risk_ratios()
    fitted = fit_random_effects(effects, variances)
    root = 1 / np.sqrt(variances + fitted.between_sd**2)
    (mean,), (rest,), *_ = np.linalg.lstsq(root[:, None], root * effects, rcond=None)
    error = np.sqrt(rest / 12 / (root**2).sum())
    reach = student.ppf(0.975, 12) * error
    assert (fitted.mean_low, fitted.mean_high) == pytest.approx((mean - reach, mean + reach))
    predicted = student.ppf(0.975, 12) * np.sqrt(error**2 + fitted.between_sd**2)
    assert fitted.prediction_high == pytest.approx(mean + predicted)


def test_models_that_agree_better_than_their_errors_do_not_differ() -> None:
    fitted = fit_random_effects(np.array([1.0, 1.0, 1.0]), np.array([1.0, 1.0, 4.0]))
    assert (fitted.mean, fitted.between_sd, fitted.i_squared) == (1.0, 0.0, 0.0)
    # The interval is not narrower than that of the errors alone.
    assert fitted.mean_high - 1 == pytest.approx(student.ppf(0.975, 2) / np.sqrt(1 + 1 + 0.25))
    same = fit_random_effects(np.array([0.5, 0.5]), np.zeros(2))
    assert (same.mean_low, same.mean_high) == pytest.approx((0.5, 0.5), abs=1e-4)
    assert np.isnan(same.prediction_low)
    with pytest.raises(ValueError, match="at least two"):
        fit_random_effects(np.array([1.0]), np.array([1.0]))
