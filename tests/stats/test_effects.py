"""Planted effects are estimated as planted, equal a second computation, and get the right verdict."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_margins import make_classes_and_pairs, plant_paired_margins
from scipy.integrate import quad
from scipy.special import expit, ndtri
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from analysis.stats.bootstrap import (
    SIGN_FLIPS,
    ResamplingUnits,
    ResamplingWeights,
    adjust_p_values,
    compute_sign_flip_p_value,
    draw_sign_flips,
)
from analysis.stats.effects import (
    compute_estimates,
    compute_query_contributions,
    summarize_scores,
)
from analysis.stats.tables import ESTIMATE_NAMES, ScoreTable

DELTAS = ("shift", "discrimination", "criterion_shift", "delta_d_prime", "delta_auroc")
DELTAS += ("mean_shift", "distance_change", "scaled_shift")


def make_score_table(
    before: Any,
    after: dict[str, Any],
    harmful: Any,
    pair: Any,
    threshold: float = 0.0,
    attack: str = "direct",
) -> ScoreTable:
    """Return a score table of margins, with the undefended model and the defenses in `after`."""
    frames = []
    for name, margins in {"none": before, **after}.items():
        frame = pd.DataFrame(
            {
                "query": [f"q{i}" for i in range(len(before))],
                "pair": pair,
                "category": "any",
                "harmful": np.asarray(harmful, bool),
                "attack": attack,
                "defense": name,
                "margin": np.asarray(margins, float),
                "p_refuse": expit(np.asarray(margins, float) - threshold),
                "prompt_tokens": 9,
                "coverage": 0.5,
            }
        )
        frames.append(frame)
    record = {"readout": {"threshold": threshold}, "defenses": {name: {"family": "own"} for name in after}}
    record["defenses"]["none"] = {"family": "none"}
    return ScoreTable(pd.concat(frames, ignore_index=True), record)


def summarize_by_defense(scores: ScoreTable, draws: int = 500, seed: int = 0) -> Any:
    """Return the summary by defense."""
    return summarize_scores(scores, n_draws=draws, seed=seed).frame.set_index("defense")


def summarize_margins(
    before: Any, after: dict[str, Any], harmful: Any, pair: Any, threshold: float = 0.0, draws: int = 500
) -> Any:
    """Return the summary of these margins by defense."""
    return summarize_by_defense(make_score_table(before, after, harmful, pair, threshold), draws)


# --- planted effects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [-2.0, -0.4, 0.4, 1.5, 6.0])
def test_a_pure_shift_is_a_shift_of_its_size_and_nothing_else(planted):
    before, harmful, pair = plant_paired_margins()
    row = summarize_margins(before, {"d": before + planted}, harmful, pair).loc["d"]
    assert row["shift"] == pytest.approx(planted)
    assert row["discrimination"] == pytest.approx(0, abs=1e-12)
    assert row["delta_auroc"] == pytest.approx(0, abs=1e-12)
    assert row["spread"] == pytest.approx(1)
    assert row["verdict"] == f"shift {'+' if planted > 0 else '-'}, discrimination equivalent"


@pytest.mark.parametrize("planted", [-1.0, 1.0])
def test_a_pure_discrimination_is_a_discrimination_of_its_size_and_nothing_else(planted):
    before, harmful, pair = plant_paired_margins()
    row = summarize_margins(
        before, {"d": before + np.where(harmful, 0.5, -0.5) * planted}, harmful, pair
    ).loc["d"]
    assert row["discrimination"] == pytest.approx(planted)
    assert row["shift"] == pytest.approx(0, abs=1e-12)
    assert row["verdict"] == f"shift equivalent, discrimination {'+' if planted > 0 else '-'}"
    assert np.sign(row["delta_auroc"]) == np.sign(row["delta_d_prime"]) == np.sign(planted)


@pytest.mark.parametrize("about", ["threshold", "grand mean", "between"])
@pytest.mark.parametrize("factor", [0.4, 1.8])
def test_a_pure_change_of_scale_is_spread_and_no_effect(factor, about):
    before, harmful, pair = plant_paired_margins()
    middle = (before[harmful].mean() + before[~harmful].mean()) / 2
    center = {"threshold": 0.0, "grand mean": middle, "between": middle / 2}[about]
    after = center + factor * (before - center)
    row = summarize_margins(before, {"d": after}, harmful, pair).loc["d"]
    assert row["spread"] == pytest.approx(factor)
    assert row["delta_auroc"] == 0
    assert row["shift"] == pytest.approx((factor - 1) * (middle - center))
    assert row["verdict"] in ("equivalent", "shift inconclusive, discrimination equivalent")
    # What the rule guards against: on the scale of nats this looks like discrimination.
    assert row["discrimination_low"] * row["discrimination_high"] > 0


def test_noise_alone_is_no_effect_and_clear_are_both():
    before, harmful, pair = plant_paired_margins()
    noise = np.random.default_rng(9).normal(0, 0.5, len(before))
    both = before + 1.5 + np.where(harmful, 0.6, -0.6) + noise
    summary = summarize_margins(before, {"noise": before + noise, "both": both}, harmful, pair)
    assert summary.loc["noise", "verdict"] == "equivalent"
    assert summary.loc["both", "verdict"] == "shift +, discrimination +"
    assert summary.loc["none", "verdict"] == "reference"
    assert (summary.loc["none", [f"{x}{end}" for x in DELTAS for end in ("", "_low", "_high")]] == 0).all()


def test_a_defense_that_changes_nothing_has_no_effect_and_p_values_of_1():
    before, harmful, pair = plant_paired_margins()
    row = summarize_margins(before, {"d": before}, harmful, pair).loc["d"]
    assert row["verdict"] == "equivalent"
    assert (row["p_shift"], row["p_discrimination"]) == (1, 1)
    assert (row["shift"], row["discrimination"], row["spread"]) == (0, 0, 1)


def compute_estimates_by_hand(before: Any, after: Any, harmful: Any, threshold: float) -> dict[str, float]:
    """Return every estimate by plain sums and scikit-learn."""

    def measure(margins: Any) -> dict[str, float]:
        h, b = list(margins[harmful]), list(margins[~harmful])
        hits, alarms = sum(m > threshold for m in h), sum(m > threshold for m in b)
        z = [norm.ppf((k + 0.5) / (len(x) + 1)) for k, x in ((hits, h), (alarms, b))]
        mean_h, mean_b = sum(h) / len(h), sum(b) / len(b)
        squares = sum((m - mean_h) ** 2 for m in h) + sum((m - mean_b) ** 2 for m in b)
        sd = (squares / (len(h) + len(b) - 2)) ** 0.5
        sigma = [sum(1 / (1 + np.exp(threshold - m)) for m in x) / len(x) for x in (h, b)]
        return {
            "refusal_rate": hits / len(h),
            "over_refusal_rate": alarms / len(b),
            "auroc": float(roc_auc_score(harmful, margins)),
            "d_prime": z[0] - z[1],
            "criterion": -(z[0] + z[1]) / 2,
            "h": mean_h,
            "b": mean_b,
            "sd": sd,
            "p_h": sigma[0],
            "p_b": sigma[1],
            "where": ((mean_h + mean_b) / 2 - threshold) / sd,
            "apart": (mean_h - mean_b) / sd,
        }

    old, new = measure(before), measure(after)
    up_h, up_b = new["h"] - old["h"], new["b"] - old["b"]
    return {name: new[name] for name in ("refusal_rate", "over_refusal_rate", "auroc", "d_prime")} | {
        "criterion": new["criterion"],
        "shift": (up_h + up_b) / 2,
        "discrimination": up_h - up_b,
        "criterion_shift": -(new["criterion"] - old["criterion"]),
        "delta_d_prime": new["d_prime"] - old["d_prime"],
        "delta_auroc": new["auroc"] - old["auroc"],
        "spread": new["sd"] / old["sd"],
        "mean_shift": (new["p_h"] - old["p_h"] + new["p_b"] - old["p_b"]) / 2,
        "distance_change": (new["p_h"] - new["p_b"]) - (old["p_h"] - old["p_b"]),
        "scaled_shift": new["where"] - old["where"],
        "scaled_discrimination": new["apart"] - old["apart"],
    }


@pytest.mark.parametrize("threshold", [0.0, -0.7])
@pytest.mark.parametrize("seed", range(4))
def test_every_estimate_equals_its_second_computation(seed, threshold):
    before, harmful, pair = plant_paired_margins(seed, pairs=17, plain=8)
    after = np.round(0.7 * before + np.random.default_rng(seed).normal(0.4, 1, len(before)), 1)  # with ties
    row = summarize_margins(before, {"d": after}, harmful, pair, threshold, draws=10).loc["d"]
    expected = compute_estimates_by_hand(before, after, harmful, threshold)
    assert list(expected) == list(ESTIMATE_NAMES)
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=1e-10), name


def test_d_prime_is_finite_at_rates_of_0_and_1_by_the_log_linear_correction():
    harmful, pair = make_classes_and_pairs(10, 0)
    row = summarize_margins(np.where(harmful, 1.0, -1.0), {}, harmful, pair, draws=10).loc["none"]
    assert (row["refusal_rate"], row["over_refusal_rate"]) == (1, 0)
    assert row["d_prime"] == pytest.approx(ndtri(10.5 / 11) - ndtri(0.5 / 11))
    assert row["criterion"] == pytest.approx(0)


DISTANCES = {-2.0: 0.109, 0.0: 0.274, 1.5: 0.340, 3.0: 0.274, 6.0: 0.054}


def exact_distance(added: float) -> float:
    """Return the distance of the class means of p, margins being N(-0.5, 1.5) and N(-2.5, 1.5), moved."""
    p = [quad(lambda m, at=at: expit(m) * norm.pdf(m, at + added, 1.5), -15, 20)[0] for at in (-0.5, -2.5)]
    return float(p[0] - p[1])


def test_a_pure_shift_changes_the_papers_distance_as_the_design_says():
    """Why the verdict does not rest on it: AUROC is .827 throughout."""
    quantiles = ndtri((np.arange(300) + 0.5) / 300)
    margins = np.concatenate([-0.5 + 1.5 * quantiles, -2.5 + 1.5 * quantiles])
    harmful = np.arange(600) < 300
    weights = ResamplingWeights.from_observed(ResamplingUnits.from_pairs(pd.Series([None] * 600), harmful))
    for added, distance in DISTANCES.items():
        assert exact_distance(added) == pytest.approx(distance, abs=1.5e-3)
        estimates = compute_estimates(margins, margins + added, harmful, 0.0, weights)
        expected = exact_distance(added) - exact_distance(0.0)
        assert estimates["distance_change"][0] == pytest.approx(expected, abs=2e-3)
        assert estimates["auroc"][0] == pytest.approx(0.827, abs=2e-3)
        assert estimates["discrimination"][0] == pytest.approx(0, abs=1e-12)
        assert estimates["delta_auroc"][0] == pytest.approx(0, abs=1e-4)


# --- intervals --------------------------------------------------------------------------------------------


def test_pairs_that_move_alike_narrow_the_interval_of_discrimination_and_widen_that_of_shift():
    harmful, pair = make_classes_and_pairs(60, 0)
    change = np.tile(np.random.default_rng(0).normal(0, 2, 60), 2)
    before = np.zeros(120) + np.where(harmful, 1, 0) + np.random.default_rng(1).normal(0, 1, 120)
    paired = summarize_margins(before, {"d": before + change}, harmful, pair).loc["d"]
    unpaired = summarize_margins(before, {"d": before + change}, harmful, [None] * 120).loc["d"]

    def width(row, name):
        return row[f"{name}_high"] - row[f"{name}_low"]

    assert width(paired, "discrimination") == pytest.approx(0, abs=1e-12)
    assert width(unpaired, "discrimination") > 0.5
    assert width(paired, "shift") > 1.2 * width(unpaired, "shift")


def test_without_refusals_the_intervals_of_a_rate_and_of_d_prime_still_have_a_width():
    harmful, pair = make_classes_and_pairs(40, 0)
    margins = -5 - np.random.default_rng(0).random(80)
    row = summarize_margins(margins, {"d": margins - 1}, harmful, pair).loc["d"]
    assert row["refusal_rate"] == row["refusal_rate_low"] == 0
    assert 0.03 < row["refusal_rate_high"] < 0.09  # Jeffreys: .061
    for name in ("d_prime", "criterion", "delta_d_prime", "criterion_shift"):
        assert row[f"{name}_high"] - row[f"{name}_low"] > 0.5, name


def test_perfect_and_nearly_perfect_separation_have_equally_wide_intervals():
    harmful, pair = make_classes_and_pairs(40, 0)
    margins = np.where(harmful, 5.0, -5.0) + np.random.default_rng(0).random(80)
    nearly = margins.copy()
    nearly[0] = margins[~harmful].max() - 1e-6  # one harmful query below one benign one
    summary = summarize_margins(margins, {"nearly": nearly, "same": margins}, harmful, pair)
    assert summary.loc["none", "auroc"] == summary.loc["none", "auroc_high"] == 1
    for name in summary.index:
        assert 0.90 < summary.loc[name, "auroc_low"] < 0.97, name
    assert summary.loc["same", "delta_auroc_high"] - summary.loc["same", "delta_auroc_low"] > 0.03


def test_every_interval_contains_its_own_estimate():
    for seed in range(5):
        before, harmful, pair = plant_paired_margins(seed, pairs=9, plain=4)
        summary = summarize_margins(before, {"d": before * 3 - 2}, harmful, pair, draws=200)
        for name in ESTIMATE_NAMES:
            assert (summary[f"{name}_low"] <= summary[name]).all(), name
            assert (summary[name] <= summary[f"{name}_high"]).all(), name


# --- p-values ---------------------------------------------------------------------------------------------


def test_contributions_add_up_to_the_contrast_and_leave_out_the_other():
    before, harmful, _ = plant_paired_margins()
    change = np.where(harmful, 2.0, -0.5) + np.random.default_rng(0).normal(0, 1, len(before))
    contributions = compute_query_contributions(change, harmful)
    assert contributions["shift"].sum() == pytest.approx(
        (change[harmful].mean() + change[~harmful].mean()) / 2
    )
    assert contributions["discrimination"].sum() == pytest.approx(
        change[harmful].mean() - change[~harmful].mean()
    )
    pure = compute_query_contributions(np.where(harmful, 1.0, -1.0), harmful)
    assert pure["shift"] == pytest.approx(0)


def test_p_values_are_adjusted_over_both_effects_and_apart_for_controls_and_ablations():
    before, harmful, pair = plant_paired_margins()
    rng = np.random.default_rng(4)
    names = ("a", "b", "a/part", "control")
    after = {name: before + rng.normal(0.11, 1, len(before)) for name in names}
    units = ResamplingUnits.from_pairs(pd.Series(pair), harmful)
    unadjusted = {
        name: [
            compute_sign_flip_p_value(values, units, draw_sign_flips(units))
            for values in compute_query_contributions(margins - before, harmful).values()
        ]
        for name, margins in after.items()
    }
    scores = make_score_table(before, after, harmful, pair)
    scores.record["defenses"]["control"]["family"] = "control"
    summary = summarize_by_defense(scores)
    for family in (names[:2], names[2:]):
        expected = adjust_p_values(pd.Series(np.ravel([unadjusted[name] for name in family])))
        observed = np.ravel(summary.loc[list(family), ["p_shift", "p_discrimination"]])
        assert observed.tolist() == pytest.approx(expected.tolist())
        assert observed.tolist() != pytest.approx(np.ravel([unadjusted[name] for name in family]).tolist())
    assert np.isnan(summary.loc["none", "p_shift"])
    assert np.min(list(unadjusted.values())) >= 1 / (SIGN_FLIPS + 1)


def test_intervals_of_rates_cover_the_uncertainty_of_the_threshold():
    before, harmful, pair = plant_paired_margins()
    scores = make_score_table(before, {"d": before + 0.5}, harmful, pair)
    certain = summarize_by_defense(scores).loc["d"]
    scores.record["readout"]["threshold_quantiles"] = np.linspace(-0.8, 0.8, 99).tolist()
    uncertain = summarize_by_defense(scores).loc["d"]
    for name in ("refusal_rate", "over_refusal_rate", "criterion", "mean_shift"):
        widths = [row[f"{name}_high"] - row[f"{name}_low"] for row in (certain, uncertain)]
        assert widths[1] > 1.2 * widths[0], name
        assert certain[name] == uncertain[name]
    for name in ("auroc", "shift", "discrimination", "delta_auroc", "scaled_discrimination"):
        for end in ("_low", "_high"):
            assert certain[f"{name}{end}"] == pytest.approx(uncertain[f"{name}{end}"]), name
    # A second way: of the draws of a rate, the share above a value is the mean over both kinds of draws.
    rng = np.random.default_rng(3)
    values = before[harmful] + 0.5
    rates = [
        (rng.choice(values, len(values)) > threshold).mean() for threshold in rng.uniform(-0.8, 0.8, 20_000)
    ]
    low, high = np.quantile(rates, [0.025, 0.975])
    assert uncertain["refusal_rate_low"] == pytest.approx(low, abs=0.02)
    assert uncertain["refusal_rate_high"] == pytest.approx(high, abs=0.02)


# --- the table --------------------------------------------------------------------------------------------


def test_rows_are_in_the_order_of_scoring_and_columns_as_documented():
    before, harmful, pair = plant_paired_margins(pairs=6, plain=3)
    direct = make_score_table(before, {"z": before + 1, "a": before}, harmful, pair)
    other = make_score_table(before, {"z": before + 1, "a": before}, harmful, pair, attack="other")
    both = ScoreTable(pd.concat([direct.frame, other.frame], ignore_index=True), direct.record)
    frame = summarize_scores(both, n_draws=20).frame
    assert list(zip(frame["attack"], frame["defense"], strict=True)) == [
        (attack, name) for attack in ("direct", "other") for name in ("none", "z", "a")
    ]
    estimates = [
        "refusal_rate",
        "over_refusal_rate",
        "readout_refusal_rate",
        "readout_over_refusal_rate",
        "auroc",
        "d_prime",
        "criterion",
        "shift",
        "discrimination",
        "criterion_shift",
        "delta_d_prime",
        "delta_auroc",
        "spread",
        "mean_shift",
        "distance_change",
        "scaled_shift",
        "scaled_discrimination",
    ]
    expected = ["attack", "defense", "family", "n_harmful", "n_benign", "verdict", "based_on"]
    expected += [f"{name}{end}" for name in estimates for end in ("", "_low", "_high")]
    expected += ["p_shift", "p_discrimination", "margin_verdict", "verdict_note", "coverage", "trusted"]
    assert list(frame.columns) == expected


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others():
    before, harmful, pair = plant_paired_margins(pairs=20, plain=10)
    scores = make_score_table(before, {"d": before * 1.3 + 0.2}, harmful, pair)
    pd.testing.assert_frame_equal(
        summarize_by_defense(scores, seed=3), summarize_by_defense(scores, seed=3), check_exact=True
    )
    assert not summarize_by_defense(scores, seed=3).equals(summarize_by_defense(scores, seed=4))


def test_the_intervals_of_a_defense_depend_neither_on_other_defenses_nor_on_the_order_of_rows():
    before, harmful, pair = plant_paired_margins(pairs=20, plain=10)
    after = {"a": before + 0.3, "b": before * 2}
    tests = ["p_shift", "p_discrimination", "verdict_note"]
    alone = summarize_margins(before, {"b": after["b"]}, harmful, pair).loc["b"].drop(tests)
    scores = make_score_table(before, after, harmful, pair)
    together = summarize_by_defense(scores).loc["b"].drop(tests)
    pd.testing.assert_series_equal(alone, together, check_exact=True)
    swapped = pd.concat(
        [scores.frame[:50], scores.frame[50:].sample(frac=1, random_state=0)], ignore_index=True
    )
    again = summarize_by_defense(ScoreTable(swapped, scores.record)).loc["b"].drop(tests)
    pd.testing.assert_series_equal(alone, again, check_exact=True)


@pytest.mark.parametrize(
    "harmful", [[True, False], [True, True], [False, False, False], [True, False, False]]
)
def test_tiny_data_and_a_single_class_give_the_available_estimates_and_no_false_certainty(harmful):
    margins = np.arange(len(harmful)) / 2
    row = summarize_margins(margins, {"d": margins + 3}, harmful, [None] * len(harmful)).loc["d"]
    assert row["verdict"] == "inconclusive" and row["verdict_note"]
    if set(harmful) == {True, False}:
        assert row["shift"] == 3
    else:
        assert np.isnan(row["shift"]) and np.isnan(row["auroc"]) and np.isnan(row["d_prime"])
    if min(sum(harmful), len(harmful) - sum(harmful)) < 2:
        assert np.isnan(row["shift_low"]) and np.isnan(row["refusal_rate_low"])


def test_p_values_are_small_for_planted_effects():
    before, harmful, pair = plant_paired_margins()
    rng = np.random.default_rng(0)
    after = before + 0.4 + np.where(harmful, 0.4, -0.4) + rng.normal(0, 0.6, len(before))
    row = summarize_margins(before, {"d": after}, harmful, pair).loc["d"]
    assert row["p_shift"] < 0.001 and row["p_discrimination"] < 0.001
