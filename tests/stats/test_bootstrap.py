"""Bootstrap draws, intervals and p-values: exact values in small cases, and coverage by simulation."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_margins import N_PAIRS, N_PLAIN, make_classes_and_pairs, plant_paired_margins
from scipy.special import expit, ndtr, ndtri
from scipy.stats import norm

from analysis.stats.bootstrap import (
    ResamplingUnits,
    ResamplingWeights,
    adjust_p_values,
    bootstrap_interval,
    compute_sign_flip_p_value,
    draw_sign_flips,
    estimate_crossed_rate,
)
from analysis.stats.effects import COUNTED_ESTIMATES, compute_estimates, compute_query_contributions
from analysis.stats.tables import ESTIMATE_NAMES

# --- draws and intervals ----------------------------------------------------------------------------------


def test_draws_keep_pairs_together_and_the_number_of_queries_of_each_kind():
    harmful, pair = make_classes_and_pairs(12, 7)
    weights = ResamplingWeights.from_bootstrap(
        ResamplingUnits.from_pairs(pd.Series(pair), harmful), 300, seed=1
    )
    assert (weights.harmful_weights == weights.benign_weights[:, :12]).all()
    assert (weights.harmful_weights.sum(1) == 12).all()
    assert (weights.benign_weights[:, 12:].sum(1) == 7).all()
    assert len(np.unique(weights.harmful_weights, axis=0)) > 250


def test_the_variance_of_a_draw_is_that_of_the_mean():
    before, harmful, pair = plant_paired_margins()
    weights = ResamplingWeights.from_bootstrap(
        ResamplingUnits.from_pairs(pd.Series(pair), harmful), 20000, seed=1
    )
    draws = weights.harmful_weights @ before[harmful] / harmful.sum()
    assert draws.std() == pytest.approx(before[harmful].std() / harmful.sum() ** 0.5, rel=0.03)


def test_an_interval_is_made_of_percentiles_moved_outward_by_the_t_quantile():
    draws = np.linspace(0, 1, 100001)
    low, high = bootstrap_interval(draws, 40)
    assert low == pytest.approx(norm.cdf(-2.0227 * (40 / 39) ** 0.5), abs=1e-4)
    assert low + high == pytest.approx(1)
    assert bootstrap_interval(draws, 10**6)[0] == pytest.approx(0.025, abs=1e-4)
    assert bootstrap_interval(draws, 40, from_counts=True)[0] == pytest.approx(0.025, abs=1e-4)
    assert np.isnan(bootstrap_interval(draws, 1)).all()


# --- p-values ---------------------------------------------------------------------------------------------


def test_with_pairs_only_the_p_value_is_the_exact_sign_flip_test():
    harmful, pair = make_classes_and_pairs(10, 0)
    units = ResamplingUnits.from_pairs(pd.Series(pair), harmful)
    change = np.random.default_rng(2).normal(0.3, 1, 20)
    pair_differences = change[:10] - change[10:]
    all_flips = (np.arange(1024)[:, None] >> np.arange(10)) % 2 * 2 - 1
    exact = (abs(all_flips @ pair_differences) >= abs(pair_differences.sum()) - 1e-12).mean()
    p_value = compute_sign_flip_p_value(
        compute_query_contributions(change, harmful)["discrimination"], units, draw_sign_flips(units, 0)
    )
    assert p_value == pytest.approx(exact, abs=0.02)


def test_holms_adjustment_multiplies_by_the_number_of_remaining_tests_and_is_monotone():
    p = pd.Series([0.04, 0.01, np.nan, 0.03, 0.5], index=list("abcde"))
    assert adjust_p_values(p).to_dict() == pytest.approx(
        {"a": 0.09, "b": 0.04, "c": np.nan, "d": 0.09, "e": 0.5}, nan_ok=True
    )
    assert adjust_p_values(pd.Series([0.6, 0.6])).tolist() == [1, 1]


# --- coverage of intervals and level of tests -------------------------------------------------------------

USUAL = {"h": 0.3, "b": -1.2, "p": -1.6, "k": 1.0, "shift": 0.0, "disc": 0.0}
SETTINGS = {
    "no effect": USUAL,
    "shift": USUAL | {"shift": 1.2},
    "discrimination": USUAL | {"disc": 1.2},
    "scale": USUAL | {"k": 1.6},
    "all three": USUAL | {"h": -0.6, "b": -1.6, "p": -2.2, "k": 0.8, "shift": 0.9, "disc": 0.7},
    "refuses most": USUAL | {"h": 1.6, "b": 0.8, "p": 0.2, "shift": -0.5, "disc": 0.4},
}
PAIR_SD, OWN_SD, NOISE_SD = 0.8, 1.2, 0.6


def simulate_margins(
    rng: np.random.Generator, setting: dict[str, float], pairs: int, plain: int
) -> tuple[Any, Any]:
    """Return margins before and after: paired queries with a pair effect, and plain benign ones."""
    effect = rng.normal(0, PAIR_SD, pairs)
    common = np.concatenate([effect, effect, rng.normal(0, PAIR_SD, plain)])
    means = np.repeat([setting["h"], setting["b"], setting["p"]], [pairs, pairs, plain])
    before = means + common + rng.normal(0, OWN_SD, len(means))
    side = np.where(np.arange(len(means)) < pairs, 0.5, -0.5)
    after = (
        setting["k"] * before
        + setting["shift"]
        + side * setting["disc"]
        + rng.normal(0, NOISE_SD, len(means))
    )
    return before, after


def compute_true_values(setting: dict[str, float], pairs: int, plain: int) -> dict[str, float]:
    """Return the true value of each estimate in closed form (mean probabilities by quadrature)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    share = np.array([pairs, plain]) / (pairs + plain)

    def measure(h: float, b: Any, sd: float) -> dict[str, float]:
        z = [ndtri(rate) for rate in (ndtr(h / sd), share @ ndtr(b / sd))]
        benign_mean = share @ b
        benign_variance = sd**2 + share @ (b - benign_mean) ** 2
        variance = (pairs * sd**2 + (pairs + plain) * benign_variance) / (2 * pairs + plain)
        p = [weights @ expit(mean + sd * nodes) / weights.sum() for mean in (h, *b)]
        return {
            "refusal_rate": float(ndtr(h / sd)),
            "over_refusal_rate": float(share @ ndtr(b / sd)),
            "auroc": float(share @ ndtr((h - b) / sd / 2**0.5)),
            "d_prime": z[0] - z[1],
            "criterion": -(z[0] + z[1]) / 2,
            "middle": (h + benign_mean) / 2,
            "gap": h - benign_mean,
            "sd": variance**0.5,
            "p_h": p[0],
            "p_b": share @ p[1:],
        }

    before, sd = np.array([setting["h"], setting["b"], setting["p"]]), float(np.hypot(PAIR_SD, OWN_SD))
    after = setting["k"] * before + setting["shift"] + setting["disc"] * np.array([0.5, -0.5, -0.5])
    old, new = (
        measure(before[0], before[1:], sd),
        measure(after[0], after[1:], float(np.hypot(setting["k"] * sd, NOISE_SD))),
    )
    p_h, p_b = new["p_h"] - old["p_h"], new["p_b"] - old["p_b"]
    return {name: new[name] for name in ESTIMATE_NAMES[:5]} | {
        "shift": new["middle"] - old["middle"],
        "discrimination": new["gap"] - old["gap"],
        "criterion_shift": old["criterion"] - new["criterion"],
        "delta_d_prime": new["d_prime"] - old["d_prime"],
        "delta_auroc": new["auroc"] - old["auroc"],
        "spread": new["sd"] / old["sd"],
        "mean_shift": (p_h + p_b) / 2,
        "distance_change": p_h - p_b,
        "scaled_shift": new["middle"] / new["sd"] - old["middle"] / old["sd"],
        "scaled_discrimination": new["gap"] / new["sd"] - old["gap"] / old["sd"],
    }


COVERAGE_DRAWS = 400  # fewer than in a run: see `measure_coverage`


def measure_coverage(setting: dict[str, float], n_sets: int, pairs: int, plain: int, seed: int) -> Any:
    """Return the percentage of data sets in which the interval of each estimate contains the true value.

    With B bootstrap draws, the variance of the 2.5 % quantile is .025 · .975 / (B φ(1.96)²), in units of the
    squared standard error. For B = 400, that is .018 and lowers the coverage by .2 percentage points, far
    less than the tolerances of the tests; for the 2,000 draws of a run, it is .04 points.
    """
    rng, true_values = np.random.default_rng(seed), compute_true_values(setting, pairs, plain)
    harmful, pair = make_classes_and_pairs(pairs, plain)
    units = ResamplingUnits.from_pairs(pd.Series(pair), harmful)
    draws = ResamplingWeights.from_bootstrap(units, COVERAGE_DRAWS, seed)
    n_covered = dict.fromkeys(ESTIMATE_NAMES, 0)
    for _ in range(n_sets):
        before, after = simulate_margins(rng, setting, pairs, plain)
        for name, values in compute_estimates(before, after, harmful, 0.0, draws).items():
            low, high = bootstrap_interval(values, pairs, name in COUNTED_ESTIMATES)
            n_covered[name] += low <= true_values[name] <= high
    return pd.Series(n_covered) * 100 / n_sets


def test_the_true_values_in_closed_form_are_those_of_very_large_samples():
    for setting in SETTINGS.values():
        harmful, pair = make_classes_and_pairs(2000, 1000)
        before, after = simulate_margins(np.random.default_rng(0), setting, 2000, 1000)
        weights = ResamplingWeights.from_observed(ResamplingUnits.from_pairs(pd.Series(pair), harmful))
        estimates = {
            name: value[0] for name, value in compute_estimates(before, after, harmful, 0.0, weights).items()
        }
        assert estimates == pytest.approx(compute_true_values(setting, 2000, 1000), abs=0.12)


@pytest.mark.slow
@pytest.mark.sweep
def test_intervals_contain_the_true_value_in_95_percent_of_500_data_sets():
    """Test the coverage of each estimate in each setting, and of each estimate over all six settings.

    The number of data sets, of 500, whose interval contains the true value is binomial: at 95 %, the
    standard error of its share is √(.95 · .05 / 500) = .97 percentage points. With 84 comparisons, four
    standard errors are allowed for each, 95 ± 3.9. The mean over six settings (3,000 data sets) has a
    standard error of .4; it may deviate by 2, five standard errors.
    """
    coverage = pd.DataFrame(
        {
            name: measure_coverage(setting, 500, N_PAIRS, N_PLAIN, seed)
            for seed, (name, setting) in enumerate(SETTINGS.items(), start=1)
        }
    )
    assert coverage.mean(axis=1).between(93, 97).all(), coverage.round(1).to_string()
    assert coverage.stack().between(91.1, 98.9).all(), coverage.round(1).to_string()


@pytest.mark.slow
def test_intervals_contain_the_true_value_in_small_data_sets_too():
    """Allow three standard errors (.97 percentage points) below 95 %, and slightly conservative intervals."""
    coverage = pd.DataFrame(
        {n: measure_coverage(SETTINGS["all three"], 500, n, n // 2, seed=n) for n in (20, 40)}
    )
    assert coverage.stack().between(92, 98.5).all(), coverage.round(1).to_string()


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "plain"), [(N_PAIRS, N_PLAIN), (40, 0), (12, 6)])
def test_p_values_reject_5_percent_where_there_is_no_effect(pairs, plain):
    """Also where the other effect is large, and where plain benign queries move unlike twins."""
    harmful, pair = make_classes_and_pairs(pairs, plain)
    units = ResamplingUnits.from_pairs(pd.Series(pair), harmful)
    flips = draw_sign_flips(units, 1)[:1999]
    other_effects = {"shift": {"disc": 2.0}, "discrimination": {"shift": 2.0}}
    for tested, other in other_effects.items():
        for plain_change in (0.0, 1.0) if plain else (0.0,):
            rng, n_rejected = np.random.default_rng(7), 0
            for _ in range(1500):
                before, after = simulate_margins(rng, USUAL | other, pairs, plain)
                after[2 * pairs :] += plain_change
                after[pairs : 2 * pairs] -= plain_change * plain / pairs  # the benign mean stays
                n_rejected += (
                    compute_sign_flip_p_value(
                        compute_query_contributions(after - before, harmful)[tested], units, flips
                    )
                    < 0.05
                )
            assert 3 < n_rejected / 15 < 7, (tested, plain_change, n_rejected / 15)


# --- rates over queries and trainings -----------------------------------------------------------------------


@pytest.mark.parametrize(("repeat_sd", "lowest"), [(0.0, 0.93), (0.5, 0.9), (1.5, 0.85)])
def test_a_rate_over_queries_and_repeats_covers_that_of_the_population(
    repeat_sd: float, lowest: float
) -> None:
    rng = np.random.default_rng(3)

    def draw(n_repeats: int, n_queries: int) -> np.ndarray:
        repeats = repeat_sd * rng.normal(size=(n_repeats, 1))
        return expit(1 + repeats + 1.5 * rng.normal(size=(1, n_queries)))

    rate = draw(2000, 2000).mean()
    covered = []
    for _ in range(400):
        probabilities = draw(4, 40)
        _, low, high = estimate_crossed_rate((rng.random(probabilities.shape) < probabilities).astype(float))
        covered.append(low <= rate <= high)
    assert lowest < np.mean(covered) < 0.99


def test_a_rate_of_one_repeat_has_wilsons_interval_and_unknown_outcomes_do_not_count() -> None:
    outcomes = np.array([[1.0] * 9 + [0.0, np.nan]])
    assert estimate_crossed_rate(outcomes) == pytest.approx((0.9, 0.596, 0.982), abs=1e-3)
    assert np.isnan(estimate_crossed_rate(np.full((2, 3), np.nan))).all()
