"""Prediction-powered rates: exact values, the published formula, and coverage by simulation."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import binom, binomtest, norm

from analysis.stats.bootstrap import compute_wilson_intervals, make_rate_columns
from analysis.stats.prediction_powered import (
    MIN_RARE_LABELS,
    PredictionPoweredDifference,
    combine_class_changes,
    compute_paired_intervals,
    compute_prediction_powered_means,
    estimate_prediction_powered_difference,
    estimate_prediction_powered_rate,
)

DISTANCE = 2**0.5 * norm.ppf(0.95)  # distance of the classes for an AUROC of .95, standard deviations


def plant_scores(rng: np.random.Generator, labels: Any) -> Any:
    """Return scores with an AUROC of .95 against the labels: calibrated logits if half the labels are 1."""
    return DISTANCE * (rng.normal(size=labels.shape) + DISTANCE * labels) - DISTANCE**2 / 2


def plant_readouts(rng: np.random.Generator, labels: Any, rate: float) -> dict[str, Any]:
    """Return the predictions of a good, a useless, a reversed, and a constant readout."""
    good = expit(plant_scores(rng, labels) + logit(rate))
    return {
        "good": good,
        "useless": expit(2 * rng.normal(size=labels.shape)),
        "reversed": 1 - good,
        "constant": np.full(labels.shape, 0.5),
    }


def plant_rate(seed: int = 0, n: int = 240, n_labeled: int = 60, rate: float = 0.4) -> tuple[Any, Any, Any]:
    """Return labels, which queries are labeled, and the predictions of a good readout."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < rate) * 1.0
    is_labeled = rng.permutation(n) < n_labeled
    return np.where(is_labeled, labels, np.nan), is_labeled, expit(plant_scores(rng, labels))


def make_single_stratum(n: int) -> Any:
    """Return the codes of a single stratum."""
    return np.zeros(n, dtype=int)


# --- rates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 17, 59, 60])
def test_with_every_query_labeled_the_interval_is_wilsons(count):
    labels = (np.arange(60) < count) * 1.0
    estimate = estimate_prediction_powered_rate(
        labels, np.full(60, True), 0.2 + 0.6 * labels, ["a", "b"] * 30
    )
    wilson = make_rate_columns("rate", count, 60)
    assert (estimate.rate, estimate.low, estimate.high) == pytest.approx(
        (wilson["rate"], wilson["rate_low"], wilson["rate_high"])
    )
    assert estimate.responses_saved == pytest.approx(0)


@pytest.mark.parametrize("count", [0, MIN_RARE_LABELS - 1, 40 - MIN_RARE_LABELS + 1, 40])
def test_with_few_labels_of_one_class_the_interval_is_wilsons_of_the_labeled_queries(count):
    labels = (np.arange(200) % 40 < count) * 1.0
    predictions = np.where(np.arange(200) < 100, labels, 1 - labels)  # right on all labeled queries
    estimate = estimate_prediction_powered_rate(labels, np.arange(200) < 40, predictions)
    low, high = binomtest(count, 40).proportion_ci(method="wilson")
    assert (estimate.rate, estimate.low, estimate.high) == pytest.approx((count / 40, low, high))
    assert (estimate.weight, estimate.responses_saved) == (0, 0)


def test_the_estimate_is_that_of_the_published_formula_with_a_separate_unlabeled_set():
    """The formula of PPI++, section 6, as `ppi_py` 0.2.3 has it, which clips the weight to [0, 1]."""
    for seed in range(20):
        labels, is_labeled, predictions = plant_rate(seed, n_labeled=40 + 8 * seed)
        y, f, others = labels[is_labeled], predictions[is_labeled], predictions[~is_labeled]
        covariance = ((y - y.mean()) * (f - f.mean())).mean()
        weight = np.clip(covariance / ((1 + len(y) / len(others)) * predictions.var(ddof=1)), 0, 1)
        expected = y.mean() + weight * (others.mean() - f.mean())
        variance = (weight * others).var() / len(others) + (y - weight * f).var() / len(y)
        estimate = estimate_prediction_powered_rate(labels, is_labeled, predictions)
        assert estimate.rate == pytest.approx(expected)
        assert estimate.weight * (1 - is_labeled.mean()) == pytest.approx(weight)
        size = estimate.n_labeled + estimate.responses_saved
        assert y.var() / size == pytest.approx(variance, rel=0.25)  # with the ½, and σ²_Y over all queries


def test_the_effective_size_in_one_stratum_follows_from_the_unexplained_share():
    labels, is_labeled, predictions = plant_rate(3)
    y, f = labels[is_labeled], predictions[is_labeled]
    estimate = estimate_prediction_powered_rate(labels, is_labeled, predictions)
    residuals = y - estimate.weight * f
    unexplained = (residuals.var() * 60 + 0.5) / (y.var() * 60)
    assert estimate.n_labeled + estimate.responses_saved == pytest.approx(
        60 / (1 - (1 - unexplained) * (1 - 60 / 240))
    )
    assert 0.8 < estimate.weight < 1.2
    assert estimate.responses_saved > 40


def test_swapping_refused_and_not_mirrors_the_interval():
    labels, is_labeled, predictions = plant_rate(1)
    estimate = estimate_prediction_powered_rate(labels, is_labeled, predictions)
    mirrored = estimate_prediction_powered_rate(1 - labels, is_labeled, 1 - predictions)
    assert (mirrored.rate, mirrored.low, mirrored.high) == pytest.approx(
        (1 - estimate.rate, 1 - estimate.high, 1 - estimate.low)
    )


def test_many_draws_at_once_give_the_estimates_of_each():
    designs = [plant_rate(seed) for seed in range(5)]
    is_labeled = designs[0][1]
    labels = np.stack([np.nan_to_num(labels[np.argsort(~mask)]) for labels, mask, _ in designs])
    predictions = np.stack([values[np.argsort(~mask)] for _, mask, values in designs])
    is_labeled = np.sort(is_labeled)[::-1]
    codes = np.arange(240) % 3
    together = compute_prediction_powered_means(labels, is_labeled, predictions, codes)
    lows, _ = compute_wilson_intervals(together.means, together.effective_sizes)
    for index in range(5):
        alone = estimate_prediction_powered_rate(
            labels[index], is_labeled, predictions[index], pd.Series(codes).map({0: "x", 1: "y", 2: "z"})
        )
        assert (alone.rate, alone.low) == pytest.approx((together.means[index], lows[index]))


def test_strata_with_few_labeled_queries_are_merged():
    labels, is_labeled, predictions = plant_rate(2)
    no_strata = estimate_prediction_powered_rate(labels, is_labeled, predictions)
    one_query_each = [f"kind {index}" for index in range(9)] + ["plain"] * 231
    merged = estimate_prediction_powered_rate(labels, is_labeled, predictions, one_query_each)
    assert merged == no_strata


def test_strata_of_known_sizes_correct_an_uneven_choice_of_labeled_queries():
    """Three quarters of the queries are of a kind that refuses 20 %, but half the labeled ones."""
    strata = np.repeat(["plain", "twin"], [300, 100])
    is_labeled = np.concatenate([np.arange(300) < 40, np.arange(100) < 40])
    labels = np.concatenate([np.arange(300) % 5 == 0, np.arange(100) % 5 != 0]) * 1.0
    estimate = estimate_prediction_powered_rate(labels, is_labeled, np.full(400, 0.5), strata)
    assert estimate.rate == pytest.approx(0.75 * 0.2 + 0.25 * 0.8)
    within = 40 / 39 * 0.16 + 0.25 / 39  # the same in both strata
    variance = 0.35 * 0.65 / 400 + within * (0.75**2 * (1 / 40 - 1 / 300) + 0.25**2 * (1 / 40 - 1 / 100))
    size = estimate.n_labeled + estimate.responses_saved
    assert size == pytest.approx(0.35 * 0.65 / variance, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_labeled": np.full(4, False)}, "none of the 4 queries is labeled: judge"),
        ({"labels": np.array([1.0, 0.5, 0.0, np.nan])}, "label 0.5 of a labeled query: give 1"),
        ({"labels": np.full(4, np.nan)}, "label nan of a labeled query: give 1"),
        ({"predictions": np.array([1.0, 1.2, 0.0, 0.1])}, "prediction 1.2: give a probability"),
        ({"predictions": np.full(4, np.nan)}, "prediction nan: give a probability"),
        ({"strata": ["a"]}, "1 strata for 4 queries: give one"),
    ],
)
def test_an_invalid_input_is_an_error_that_says_what_to_give(change, message):
    arguments: dict[str, Any] = {
        "labels": np.array([1.0, 0.0, 0.0, np.nan]),
        "is_labeled": np.array([True, True, True, False]),
        "predictions": np.array([0.9, 0.2, 0.1, 0.1]),
    }
    with pytest.raises(ValueError, match=message):
        estimate_prediction_powered_rate(**(arguments | change))


# --- coverage and width of the intervals of rates ---------------------------------------------------------

N_DRAWS = 2000
LABELED_SIZES = (30, 60, 120, 200)
RATES = (0.02, 0.1, 0.3, 0.5, 0.8, 0.98)


def compute_wilson_coverage(n: int, rate: float) -> float:
    """Return the exact coverage of Wilson's interval, percent."""
    lows, highs = compute_wilson_intervals(np.arange(n + 1) / n, np.full(n + 1, float(n)))
    return float(100 * binom.pmf(np.arange(n + 1), n, rate)[(lows <= rate) & (rate <= highs)].sum())


def measure_rates(labels: Any, readouts: dict[str, Any], n_labeled: int, rate: float) -> list[dict[str, Any]]:
    """Return coverage (percent) and width (relative to Wilson's) of the interval with each readout.

    The first queries are labeled, since the order of independent queries does not matter. The coverage of
    Wilson's interval in the same draws is known exactly, so its deviation is subtracted (a control variate).
    """
    n = labels.shape[1]
    is_labeled = np.arange(n) < n_labeled
    plain_low, plain_high = compute_wilson_intervals(
        labels[:, :n_labeled].mean(1), np.full(len(labels), float(n_labeled))
    )
    plain_covers = (plain_low <= rate) & (rate <= plain_high)
    exact = compute_wilson_coverage(n_labeled, rate)
    rows = []
    for readout, predictions in readouts.items():
        estimate = compute_prediction_powered_means(labels, is_labeled, predictions, make_single_stratum(n))
        low, high = compute_wilson_intervals(estimate.means, estimate.effective_sizes)
        covers = (low <= rate) & (rate <= high)
        rows.append(
            {"N": n, "n": n_labeled, "rate": rate, "readout": readout, "wilson": exact}
            | {"coverage": exact + 100 * (covers.mean() - plain_covers.mean())}
            | {"width": (high - low).mean() / (plain_high - plain_low).mean()}
            | {"error": estimate.means.std() / labels[:, :n_labeled].mean(1).std()}
        )
    return rows


@pytest.fixture(scope="module")
def simulated_rates() -> pd.DataFrame:
    """Coverage and width for every number of queries and labels, rate, and readout."""
    rng, rows = np.random.default_rng(1), []
    for n in (240, 400):
        for rate in RATES:
            labels = (rng.random((N_DRAWS, n)) < rate) * 1.0
            readouts = plant_readouts(rng, labels, rate)
            for n_labeled in LABELED_SIZES:
                rows += measure_rates(labels, readouts, n_labeled, rate)
    return pd.DataFrame(rows)


def test_intervals_of_rates_contain_the_true_rate_in_95_percent_of_2000_draws(simulated_rates):
    """The standard error of a coverage is .49 percentage points without the control variate.

    Counts are discrete, so that Wilson's interval itself has a coverage of 93.0 to 97.8 %. Where that is
    below 93 %, the limit is 92.5 %; where it is above 95.5 %, the limit is 1.5 percentage points above it.
    """
    table = simulated_rates
    low = np.where(table["wilson"] < 93, 92.5, 93)
    high = np.maximum(table["wilson"] + 1.5, 97)
    is_wrong = ~table["coverage"].between(low, high)
    assert not is_wrong.any(), table[is_wrong].to_string()
    assert 94.5 < table[table["readout"] == "good"]["coverage"].mean() < 97


def test_useless_readouts_do_not_widen_the_intervals_of_rates_and_good_ones_shorten_them(simulated_rates):
    table = simulated_rates
    assert table["width"].max() < 1.005
    assert table[table["readout"] != "good"]["error"].max() < 1.05
    middle = table[(table["readout"] == "good") & table["rate"].between(0.1, 0.9)]
    assert middle["width"].max() < 0.96
    assert middle[middle["rate"].between(0.3, 0.8) & (middle["n"] < 200)]["width"].max() < 0.87
    assert middle[middle["n"] < 200]["width"].mean() < 0.80


def test_a_readout_whose_rare_errors_are_all_of_one_kind_does_not_seem_perfect():
    """A few labeled queries often show none of the errors, although all errors bias the predictions alike."""
    rng, rows = np.random.default_rng(2), []
    for rate in (0.3, 0.5, 0.8):
        labels = (rng.random((N_DRAWS, 400)) < rate) * 1.0
        readouts = {
            f"misses {share:.0%}": labels * (rng.random(labels.shape) > share) for share in (0.02, 0.05, 0.1)
        }
        readouts["invents 5%"] = np.maximum(labels, rng.random(labels.shape) < 0.05)
        readouts["perfect"] = labels
        for n_labeled in LABELED_SIZES:
            rows += measure_rates(labels, readouts, n_labeled, rate)
    table = pd.DataFrame(rows)
    assert table["coverage"].min() > 93, table[table["coverage"] <= 93].to_string()


@pytest.mark.parametrize(
    ("sizes", "labeled_sizes"),
    [
        ((200, 120, 80), (40, 24, 16)),
        ((200, 120, 80), (25, 20, 35)),
        ((200, 120, 80), (60, 8, 12)),
        ((200, 120, 80), (80, 5, 15)),
        ((200, 120, 80), (200, 120, 80)),
        ((200, 120, 70, 10), (40, 24, 14, 2)),
        ((200, 120, 76, 4), (40, 24, 16, 0)),
    ],
)
def test_intervals_contain_the_true_rate_with_strata_of_fixed_sizes(sizes, labeled_sizes):
    """Kinds of queries with rates of 60, 30, 5, and 50 %; the fourth is so small that it is merged.

    Strata of fixed sizes vary less than the interval assumes, here by 17 % of the variance of the labels.
    """
    rng, rates = np.random.default_rng(4), np.array([0.6, 0.3, 0.05, 0.5])
    codes = np.repeat(np.arange(len(sizes)), sizes)
    is_labeled = np.concatenate(
        [np.arange(size) < labeled for size, labeled in zip(sizes, labeled_sizes, strict=True)]
    )
    labels = (rng.random((N_DRAWS, 400)) < rates[codes]) * 1.0
    true_rate = rates[codes].mean()
    for readout, predictions in plant_readouts(rng, labels, 0.4).items():
        estimate = compute_prediction_powered_means(labels, is_labeled, predictions, codes)
        assert abs(estimate.means.mean() - true_rate) < 0.3 * estimate.means.std()  # λ is fitted
        low, high = compute_wilson_intervals(estimate.means, estimate.effective_sizes)
        coverage = 100 * ((low <= true_rate) & (true_rate <= high)).mean()
        assert 93.5 < coverage < 98.5, (readout, coverage)


# --- differences of rates ---------------------------------------------------------------------------------


def plant_conditions(
    rng: np.random.Generator, shape: tuple[int, ...], cell_shares: tuple[float, float, float, float]
) -> tuple[Any, Any]:
    """Return undefended and defended labels; the shares are those of (0, 0), (0, 1), (1, 0), and (1, 1)."""
    cells = rng.choice(4, size=shape, p=cell_shares)
    return (cells >= 2) * 1.0, (cells % 2) * 1.0


def plant_change(seed: int, n: int = 240, n_labeled: int = 80, **options: Any) -> PredictionPoweredDifference:
    """Return the estimated change of planted responses with a good readout."""
    rng = np.random.default_rng(seed)
    before, after = plant_conditions(rng, (n,), (0.4, 0.3, 0.1, 0.2))
    return estimate_prediction_powered_difference(
        before,
        after,
        np.arange(n) < n_labeled,
        expit(plant_scores(rng, before)),
        expit(plant_scores(rng, after)),
        **options,
    )


def test_with_every_query_labeled_the_paired_interval_is_that_of_bonett_and_price():
    change = plant_change(0, n=100, n_labeled=100)
    before, after = plant_conditions(np.random.default_rng(0), (100,), (0.4, 0.3, 0.1, 0.2))
    gained, lost = (((after > before).sum() + 1) / 102, ((after < before).sum() + 1) / 102)
    half_width = norm.ppf(0.975) * ((gained + lost - (gained - lost) ** 2) / 102) ** 0.5
    assert change.difference == pytest.approx((after - before).mean())
    assert change.low == pytest.approx(gained - lost - half_width)
    assert change.high == pytest.approx(gained - lost + half_width)
    assert change.responses_saved == pytest.approx(0)


def test_the_contributions_of_the_queries_add_up_to_the_variance_of_a_difference():
    change = plant_change(1, strata=["twin", "plain"] * 120)
    assert change.contributions.sum() == pytest.approx(0, abs=1e-12)
    half_width = (change.high - change.low) / 2 / norm.ppf(0.975)
    assert np.linalg.norm(change.contributions) == pytest.approx(half_width, rel=0.05)
    labeled_only = plant_change(1, n=80, n_labeled=80)
    assert np.linalg.norm(labeled_only.contributions) < np.linalg.norm(
        plant_change(1, n=40, n_labeled=40).contributions
    )


def test_a_change_is_minus_the_change_back():
    rng = np.random.default_rng(3)
    before, after = plant_conditions(rng, (200,), (0.4, 0.3, 0.1, 0.2))
    is_labeled = rng.permutation(200) < 70
    predictions = expit(plant_scores(rng, before)), expit(plant_scores(rng, after))
    there = estimate_prediction_powered_difference(before, after, is_labeled, *predictions)
    back = estimate_prediction_powered_difference(after, before, is_labeled, *predictions[::-1])
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-there.difference, -there.high, -there.low)
    )


def test_paired_intervals_contain_the_true_difference():
    """With few changed responses, the interval is wide by construction; it is never too narrow."""
    rng, rows = np.random.default_rng(5), []
    for name, shares in {
        "no change": (0.45, 0.05, 0.05, 0.45),
        "many more refusals": (0.1, 0.82, 0.02, 0.06),
        "some more refusals": (0.5, 0.32, 0.02, 0.16),
        "fewer refusals": (0.55, 0.02, 0.22, 0.21),
        "both directions": (0.3, 0.3, 0.2, 0.2),
        "few changes": (0.88, 0.1, 0.0, 0.02),
    }.items():
        before, after = plant_conditions(rng, (N_DRAWS, 240), shares)
        readouts_before = plant_readouts(rng, before, shares[2] + shares[3])
        readouts_after = plant_readouts(rng, after, shares[1] + shares[3])
        true_difference = shares[1] - shares[2]
        for n_labeled in (30, 60, 120):
            is_labeled = np.arange(240) < n_labeled
            plain = compute_paired_intervals(
                (after - before)[:, :n_labeled].mean(1),
                np.abs(after - before)[:, :n_labeled].mean(1),
                np.full(N_DRAWS, float(n_labeled)),
            )
            for readout, predictions in readouts_after.items():
                estimate = compute_prediction_powered_means(
                    after - before,
                    is_labeled,
                    predictions - readouts_before[readout],
                    make_single_stratum(240),
                )
                low, high = compute_paired_intervals(
                    estimate.means, estimate.mean_squares, estimate.effective_sizes
                )
                rows.append(
                    {"change": name, "n": n_labeled, "readout": readout}
                    | {"coverage": 100 * ((low <= true_difference) & (true_difference <= high)).mean()}
                    | {"width": (high - low).mean() / (plain[1] - plain[0]).mean()}
                )
    table = pd.DataFrame(rows)
    assert table["coverage"].min() > 93, table[table["coverage"] <= 93].to_string()
    frequent = table[table["change"].isin(["some more refusals", "fewer refusals", "both directions"])]
    assert frequent["coverage"].max() < 97.5, frequent.to_string()
    assert table["width"].max() < 1.005
    assert frequent[frequent["readout"] == "good"]["width"].max() < 0.92


# --- shift and discrimination -----------------------------------------------------------------------------


def test_shift_and_discrimination_are_half_the_sum_and_the_difference_in_percentage_points():
    harmful, benign = plant_change(1), plant_change(2, n=300, n_labeled=60)
    contrasts = combine_class_changes(harmful, benign)
    h, b = harmful.difference, benign.difference
    assert contrasts.shift.value == pytest.approx(50 * (h + b))
    assert contrasts.discrimination.value == pytest.approx(100 * (h - b))
    down = ((h - harmful.low) ** 2 + (benign.high - b) ** 2) ** 0.5
    assert contrasts.discrimination.low == pytest.approx(100 * (h - b - down))
    assert contrasts.correlation == 0


def test_the_contrasts_of_swapped_classes_mirror_the_discrimination_and_keep_the_shift():
    harmful, benign = plant_change(1), plant_change(2)
    pairs = pd.Series(range(240)).astype(str)
    contrasts = combine_class_changes(harmful, benign, pairs, pairs)
    swapped = combine_class_changes(benign, harmful, pairs, pairs)
    assert swapped.shift == contrasts.shift
    assert swapped.discrimination.low == pytest.approx(-contrasts.discrimination.high)


def test_twins_that_respond_alike_widen_the_shift_and_leave_no_doubt_about_discrimination():
    change, pairs = plant_change(1), pd.Series(range(240))
    alike = combine_class_changes(change, change, pairs, pairs)
    assert alike.correlation == pytest.approx(1)
    assert (alike.shift.low, alike.shift.high) == pytest.approx((100 * change.low, 100 * change.high))
    width = alike.discrimination.high - alike.discrimination.low
    assert width < 0.1 * 100 * (change.high - change.low)
    shuffled = combine_class_changes(change, change, pairs, pairs.sample(frac=1, random_state=0))
    assert abs(shuffled.correlation) < 0.2


def test_queries_without_a_pair_do_not_count_as_paired():
    change = plant_change(1)
    no_pairs = pd.Series([None] * 240, dtype=object)
    assert combine_class_changes(change, change, no_pairs, no_pairs).correlation == 0


def test_pairs_must_be_those_of_both_classes_and_of_all_queries():
    change, pairs = plant_change(1), pd.Series(range(240))
    with pytest.raises(ValueError, match="the pairs of only one class are given: give"):
        combine_class_changes(change, change, pairs)
    with pytest.raises(ValueError, match="3 pairs for 240 benign queries: give"):
        combine_class_changes(change, change, pairs, pairs[:3])


def test_intervals_of_shift_and_discrimination_contain_the_true_values_with_dependent_twins():
    """Half the responses of a twin are those of its harmful query; pairs are labeled together or not."""
    rng, n_draws, n = np.random.default_rng(6), 1000, 160
    shares = (0.4, 0.3, 0.1, 0.2)
    pairs = pd.Series(np.arange(n))
    covers = {"shift": 0, "discrimination": 0}
    for draw in range(n_draws):
        harmful, own = plant_conditions(rng, (n,), shares), plant_conditions(rng, (n,), shares)
        is_alike = rng.random(n) < 0.5
        benign = tuple(np.where(is_alike, *values) for values in zip(harmful, own, strict=True))
        is_labeled = rng.permutation(n) < 60
        changes = [
            estimate_prediction_powered_difference(
                before,
                after,
                labeled,
                expit(plant_scores(rng, before)),
                expit(plant_scores(rng, after)),
            )
            for (before, after), labeled in (
                (harmful, is_labeled),
                (benign, is_labeled if draw % 2 else rng.permutation(is_labeled)),
            )
        ]
        contrasts = combine_class_changes(*changes, pairs, pairs)
        covers["shift"] += contrasts.shift.low <= 20 <= contrasts.shift.high
        covers["discrimination"] += contrasts.discrimination.low <= 0 <= contrasts.discrimination.high
    for contrast, count in covers.items():
        assert 93 < 100 * count / n_draws < 97, (contrast, 100 * count / n_draws)
