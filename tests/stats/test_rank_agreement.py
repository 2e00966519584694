"""Planted orders of defenses are found; intervals and ceilings account for the sampling of queries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_margins import make_classes_and_pairs
from scipy.stats import kendalltau, spearmanr

from analysis.stats.bootstrap import ResamplingUnits
from analysis.stats.rank_agreement import (
    RANKED_MEASURES,
    EffectSamples,
    average_effects,
    compare_effect_orders,
    compare_effect_ranks,
    compute_kendall_taus,
    compute_rank_correlations,
    sample_effects,
    split_into_halves,
)
from analysis.stats.tables import ScoreTable

K = 8


def plant_run(
    effects: Any, seed: int, noise: float = 0.5, pairs: int = 40, control: bool = False
) -> tuple[ScoreTable, pd.DataFrame]:
    """Return scores and responses in which defense d shifts all margins and separates by `effects[d]`."""
    rng = np.random.default_rng(seed)
    harmful, names = make_classes_and_pairs(pairs, 20)
    before = rng.normal(np.where(harmful, 0.0, -1.0), 1.0)
    conditions = {"none": before}
    for number, effect in enumerate(effects):
        change = effect * np.where(harmful, 1.5, 0.5)
        conditions[f"d{number}"] = before + change + rng.normal(0, noise, len(harmful))
    if control:
        conditions["random_tokens"] = before + 99.0
    families = {name: "control" if name == "random_tokens" else "own" for name in conditions}
    queries = [f"q{index}" for index in range(len(harmful))]
    frames = [
        pd.DataFrame(
            {"query": queries, "pair": names, "category": "", "harmful": harmful, "attack": "direct"}
            | {"defense": name, "margin": margin, "p_refuse": 0.5, "prompt_tokens": 9, "coverage": 1.0}
        )
        for name, margin in conditions.items()
    ]
    frame = pd.concat(frames, ignore_index=True)
    record = {
        "readout": {"threshold": 0.0},
        "defenses": {name: {"family": family} for name, family in families.items()},
    }
    responses = frame[["query", "pair", "harmful", "attack", "defense"]].assign(
        verdict=np.where(frame["margin"] > 0, "refused", "not refused")
    )
    return ScoreTable(frame, record), responses


def sample_planted(effects: Any, seed: int, **options: Any) -> dict[str, EffectSamples]:
    return sample_effects(*plant_run(effects, seed, **options), "direct", seed, n_draws=300)


def test_the_effects_are_those_of_their_definitions() -> None:
    scores, responses = plant_run([0.2, 1.0, 2.0, 0.5], 0, control=True)
    samples = sample_effects(scores, responses, "direct", n_draws=50)
    assert list(samples) == list(RANKED_MEASURES)
    assert samples["shift"].defenses == ("d0", "d1", "d2", "d3")  # without the control
    wide = scores.frame.pivot(index="query", columns="defense", values="margin")
    harmful = scores.select_condition("direct", "none")["harmful"].reindex(wide.index)
    change = wide["d2"] - wide["none"]
    refuses = (wide[["none", "d2"]] > 0).astype(float)
    refusal_change = refuses["d2"] - refuses["none"]
    wins = {
        name: (wide.loc[harmful, name].to_numpy()[:, None] > wide.loc[~harmful, name].to_numpy()).mean()
        for name in ("none", "d2")
    }
    expected = {
        "shift": (change[harmful].mean() + change[~harmful].mean()) / 2,
        "discrimination": change[harmful].mean() - change[~harmful].mean(),
        "delta_auroc": wins["d2"] - wins["none"],
        "refusal_change": refusal_change[harmful].mean(),
        "over_refusal_change": refusal_change[~harmful].mean(),
    }
    expected["response_discrimination"] = expected["refusal_change"] - expected["over_refusal_change"]
    assert {name: value.observed[2] for name, value in samples.items()} == pytest.approx(expected)


def test_responses_without_a_verdict_count_nowhere() -> None:
    scores, responses = plant_run([0.2, 1.0, 2.0, 0.5], 0)
    lost = (responses["defense"] == "d1") & responses["query"].isin([f"q{n}" for n in range(30)])
    responses.loc[lost, "verdict"] = "unjudged"
    samples = sample_effects(scores, responses[responses["defense"] != "d3"], "direct", n_draws=20)
    assert samples["refusal_change"].known_defenses == {"d0", "d1", "d2"}
    labels = (responses["verdict"] == "refused").astype(float).where(~lost)
    wide = responses.assign(label=labels).pivot(index="query", columns="defense", values="label")
    of_class = responses.drop_duplicates("query").set_index("query")["harmful"].reindex(wide.index)
    expected = (wide["d1"] - wide["none"])[of_class].mean()
    assert samples["refusal_change"].observed[1] == pytest.approx(expected)


def test_rank_correlations_are_spearmans() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, (20, 9)).astype(float), rng.normal(size=(20, 9))
    expected = [spearmanr(*pair).statistic for pair in zip(first, second, strict=True)]
    np.testing.assert_allclose(compute_rank_correlations(first, second), expected)
    first[0] = 1.0
    second[1, 0] = np.nan
    assert np.isnan(compute_rank_correlations(first, second)[:2]).all()


def test_halves_keep_pairs_whole_and_share_nothing() -> None:
    harmful, names = make_classes_and_pairs(5, 3)
    units = ResamplingUnits.from_pairs(pd.Series(names), harmful)
    first, second = split_into_halves(units, 200)
    for weights in (first, second):
        np.testing.assert_allclose(weights.harmful_weights.sum(1), 5)
        np.testing.assert_allclose(weights.benign_weights.sum(1), 8)
        # A harmful query and its twin are in the same half.
        np.testing.assert_array_equal(weights.harmful_weights > 0, weights.benign_weights[:, :5] > 0)
    assert not ((first.harmful_weights > 0) & (second.harmful_weights > 0)).any()
    assert ((first.benign_weights > 0) | (second.benign_weights > 0)).all()
    assert set((first.harmful_weights > 0).sum(1)) == {2, 3}  # of an odd number, sometimes one more


def test_the_same_clear_order_is_found_and_the_opposite_one_too() -> None:
    effects = np.linspace(0, 4, K)
    first, second = sample_planted(effects, 1), sample_planted(effects, 2)
    opposite = sample_planted(effects[::-1], 3)
    for measure in ("shift", "discrimination"):
        row = compare_effect_ranks(first[measure], second[measure])
        assert row["rank_correlation"] == row["corrected"] == 1 and row["ceiling"] > 0.98
        assert row["without_one_low"] == row["without_one_high"] == 1 and row["n_defenses"] == K
        row = compare_effect_ranks(first[measure], opposite[measure])
        assert row["rank_correlation"] == row["corrected"] == -1 and row["ceiling"] > 0.98


def test_unrelated_orders_are_compatible_with_no_correlation() -> None:
    effects = 0.25 * np.arange(K)
    shuffled = effects[[2, 6, 1, 5, 7, 0, 4, 3]]
    truth = spearmanr(effects, shuffled).statistic
    assert abs(truth) < 0.05
    row = compare_effect_ranks(sample_planted(effects, 4)["shift"], sample_planted(shuffled, 5)["shift"])
    assert row["rank_correlation_low"] < 0 < row["rank_correlation_high"]
    assert row["corrected_low"] < 0 < row["corrected_high"]


def test_sets_that_order_alike_agree_as_much_as_their_ceiling_says() -> None:
    """Effects of the size of their errors: sampling alone lowers the correlation, by as much as expected."""
    effects = np.linspace(0, 1.2, 12)
    rows = []
    for seed in range(20):
        first, second = (sample_planted(effects, 2 * seed + side, noise=1.0) for side in (0, 1))
        rows.append(compare_effect_ranks(first["discrimination"], second["discrimination"]))
    table = pd.DataFrame(rows)
    observed, ceiling = table["rank_correlation"].mean(), table["ceiling"].mean()
    assert 0.6 < observed < 0.92 and abs(observed - ceiling) < 0.08
    assert (table["corrected_high"] == 1).mean() >= 0.9  # the true order is the same


def test_intervals_contain_the_true_correlation_in_most_samples() -> None:
    rng = np.random.default_rng(0)
    is_covered, is_expected_covered, observed = [], [], []
    effects = np.linspace(0, 0.8, K)
    other = effects[[1, 0, 4, 2, 3, 7, 5, 6]]
    truth = spearmanr(effects, other).statistic
    rows = []
    for _ in range(40):
        seeds = rng.integers(0, 2**31, 2)
        first, second = (
            sample_planted(values, int(seed), noise=1.0)["shift"]
            for values, seed in zip((effects, other), seeds, strict=True)
        )
        rows.append(compare_effect_ranks(first, second))
    for row in rows:
        observed.append(row["rank_correlation"])
        is_covered.append(row["corrected_low"] <= truth <= row["corrected_high"])
    for row in rows:
        is_expected_covered.append(
            row["rank_correlation_low"] <= np.mean(observed) <= row["rank_correlation_high"]
        )
    assert np.mean(is_covered) >= 0.85 and np.mean(is_expected_covered) >= 0.85


def test_one_decisive_defense_is_named() -> None:
    rng = np.random.default_rng(3)
    first = np.array([0.0, 0.1, 0.2, 0.3, 9.0])
    second = np.array([0.3, 0.2, 0.1, 0.0, 9.0])  # the others in the opposite order
    samples = [
        EffectSamples(
            ("a", "b", "c", "d", "e"), values, *(values + rng.normal(0, 1e-3, (9, 5)) for _ in "123")
        )
        for values in (first, second)
    ]
    row = compare_effect_ranks(*samples)
    assert row["most_influential"] == "e" and row["without_one_low"] == -1


def test_a_set_without_an_order_has_no_corrected_correlation() -> None:
    effects = np.arange(4.0)
    draws = np.tile(effects, (9, 1))
    steady = EffectSamples(("a", "b", "c", "d"), effects, draws, draws, draws)
    reversed_halves = EffectSamples(("a", "b", "c", "d"), effects, draws, draws, -draws)
    row = compare_effect_ranks(steady, reversed_halves)
    assert row["rank_correlation"] == 1 and (row["within_first"], row["within_second"]) == (1, 0)
    assert np.isnan([row["ceiling"], row["corrected"], row["corrected_low"]]).all()
    equal = EffectSamples(("a", "b", "c", "d"), 0 * effects, 0 * draws, 0 * draws, 0 * draws)
    row = compare_effect_ranks(steady, equal)
    assert np.isnan([row["rank_correlation"], row["corrected"], row["without_one_low"]]).all()
    with pytest.raises(ValueError, match="at least 4"):
        compare_effect_ranks(steady.select_defenses(["a", "b", "c"]), equal.select_defenses(["a", "b", "c"]))


def test_taus_are_those_of_scipy_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(9, K)).round(0), rng.normal(size=(9, K)).round(1)
    expected = [kendalltau(one, other).statistic for one, other in zip(first, second, strict=True)]
    np.testing.assert_allclose(compute_kendall_taus(first, second), expected)
    flat = compute_kendall_taus(np.ones((1, K)), second[:1])
    missing = compute_kendall_taus(np.full((1, K), np.nan), second[:1])
    assert np.isnan(flat).all() and np.isnan(missing).all()


def test_models_with_the_same_order_agree_and_share_the_error_of_the_queries() -> None:
    effects = np.linspace(0, 4, K)
    # The same queries with the same noise: a second model that only has other margins.
    tables = {"a": plant_run(effects, 0), "b": plant_run(effects, 0), "c": plant_run(effects[::-1], 1)}
    samples = {
        name: sample_effects(scores, responses, "direct", seed=3)["shift"]
        for name, (scores, responses) in tables.items()
    }
    rows = {(row["first"], row["second"]): row for row in compare_effect_orders(samples)}
    assert list(rows) == [("a", "b"), ("a", "c"), ("b", "c"), ("all pairs", "")]
    same, reverse, mean = rows["a", "b"], rows["a", "c"], rows["all pairs", ""]
    # Every draw of queries moves both alike, so that nothing is uncertain about their agreement.
    assert (same["tau"], same["tau_low"], same["tau_high"]) == (1.0, 1.0, 1.0)
    expected = kendalltau(samples["a"].observed, samples["c"].observed).statistic
    assert reverse["tau"] == pytest.approx(expected) and expected < -0.9
    assert reverse["tau_low"] <= reverse["tau"] <= reverse["tau_high"]
    assert mean["tau"] == pytest.approx((1 + 2 * reverse["tau"]) / 3)
    left_out = [
        kendalltau(np.delete(samples["a"].observed, d), np.delete(samples["c"].observed, d)).statistic
        for d in range(K)
    ]
    ends = reverse["without_one_low"], reverse["without_one_high"]
    assert ends == pytest.approx((min(left_out), max(left_out)))
    with pytest.raises(ValueError, match="at least 4"):
        few = ["d0", "d1", "d2"]
        compare_effect_orders({name: effects.select_defenses(few) for name, effects in samples.items()})


def test_the_shift_of_the_rates_is_the_mean_of_their_changes() -> None:
    measures = sample_planted(np.linspace(-1, 1, K), 0)
    shift = average_effects(measures["refusal_change"], measures["over_refusal_change"])
    halves = [measures[name].observed for name in ("refusal_change", "over_refusal_change")]
    np.testing.assert_allclose(shift.observed, np.mean(halves, axis=0))
    difference = measures["response_discrimination"].draws
    np.testing.assert_allclose(shift.draws + difference / 2, measures["refusal_change"].draws)
