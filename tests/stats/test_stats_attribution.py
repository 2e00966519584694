"""Contrasts of many columns equal those of each; half-way layers, cosines and overlaps by hand."""

import numpy as np
import pandas as pd
import pytest

from analysis.stats.attribution import (
    CONTRASTS,
    ContrastEstimator,
    compute_mantel_correlation,
    estimate_layer_contrasts,
    estimate_part_contrasts,
    estimate_profile_similarity,
    find_half_way_layers,
    join_stack_interactions,
)
from analysis.stats.bootstrap import ResamplingUnits, ResamplingWeights, bootstrap_interval
from analysis.stats.effects import compute_contrasts
from analysis.stats.tables import Decomposition, ModelPart

PAIRS = pd.Series([f"p{number // 2}" for number in range(20)] + [None] * 4, dtype=object)
HARMFUL = np.array([number % 2 == 0 for number in range(20)] + [False] * 4)


def make_estimator(draws: int = 300) -> ContrastEstimator:
    return ContrastEstimator(PAIRS, HARMFUL, seed=3, n_draws=draws)


def test_each_column_has_the_contrasts_that_it_has_alone() -> None:
    change = np.random.default_rng(0).normal(size=(24, 5)) + HARMFUL[:, None]
    contrasts = make_estimator().estimate_contrasts(change)
    units = ResamplingUnits.from_pairs(PAIRS, HARMFUL)
    observed, draws = ResamplingWeights.from_observed(units), ResamplingWeights.from_bootstrap(units, 300, 3)
    for column in range(5):
        point, resampled = (
            compute_contrasts(change[:, column], HARMFUL, weights) for weights in (observed, draws)
        )
        for name in CONTRASTS:
            assert contrasts.loc[column, name] == pytest.approx(point[name][0])
            low, high = bootstrap_interval(resampled[name], 10)
            assert contrasts.loc[column, f"{name}_low"] == pytest.approx(low)
            assert contrasts.loc[column, f"{name}_high"] == pytest.approx(high)


def test_the_parts_add_up_to_both_contrasts() -> None:
    rng = np.random.default_rng(1)
    parts = (
        ModelPart("embedding"),
        ModelPart("added", 0),
        ModelPart("head", 0, 0),
        ModelPart("mlp", 0),
        ModelPart("bias"),
    )
    before, after = rng.normal(size=(2, 24, 5))
    before[:, 1] = after[:, 1] = 0.0
    undefended, defended = (
        Decomposition(parts, contributions, contributions.sum(1)) for contributions in (before, after)
    )
    rows = estimate_part_contrasts(make_estimator(), undefended, defended)
    assert "added" not in set(rows["kind"]) and len(rows) == 4
    totals = make_estimator().estimate_contrasts((defended.margins - undefended.margins)[:, None]).iloc[0]
    for name in CONTRASTS:
        assert rows[name].sum() == pytest.approx(totals[name])
    assert pd.isna(rows.loc[0, "layer"]) and rows.loc[1, "head"] == 0


def test_the_half_way_layer_is_that_from_which_a_contrast_stays_above_half() -> None:
    fractions = np.array([0.0, 0.9, 0.2, 0.6, 1.0])  # over half once, but not for good
    noise = np.random.default_rng(2).normal(scale=0.02, size=(24, 5))
    after = np.where(HARMFUL[:, None], 2 * fractions, 0.0) + noise
    layers = find_half_way_layers(make_estimator(), np.zeros((24, 5)), after).set_index("contrast")
    assert layers.loc["discrimination", "half"] == 3 and layers.loc["shift", "half"] == 3
    assert layers.loc["shift", "half_low"] == layers.loc["shift", "half_high"] == 3
    assert layers.loc["discrimination", "final"] == pytest.approx(2, abs=0.05)
    undetermined = find_half_way_layers(make_estimator(), np.zeros((24, 5)), 50 * noise).set_index("contrast")
    assert undetermined["half"].isna().all()  # a contrast that may be 0 has no half-way layer


def test_contrasts_of_layers_are_given_with_the_means_that_they_derive_from() -> None:
    rng = np.random.default_rng(3)
    before, after = rng.normal(size=(2, 24, 3))
    layers = estimate_layer_contrasts(make_estimator(), before, after)
    change = (layers["harmful_defended"] - layers["harmful_undefended"]) - (
        layers["benign_defended"] - layers["benign_undefended"]
    )
    assert layers["discrimination"].to_numpy() == pytest.approx(change.to_numpy())
    assert layers["layer"].tolist() == [0, 1, 2]


def test_separation_compares_before_and_after() -> None:
    before, after = np.zeros(24), HARMFUL.astype(float)
    separation = make_estimator().estimate_separation(before, after)
    assert (separation["auroc"], separation["auroc_after"], separation["delta_auroc"]) == (0.5, 1.0, 0.5)
    assert separation["delta_auroc_low"] > 0.2
    unchanged = make_estimator().estimate_separation(after, after)
    assert unchanged["delta_auroc"] == 0


def test_similarity_is_the_cosine_of_the_profiles_of_two_defenses() -> None:
    profile = np.where(HARMFUL[:, None], [[2.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]])
    orthogonal = np.tile([[0.0, 5.0, 0.0]], (24, 1))
    similarities = estimate_profile_similarity(
        make_estimator(), {"a": profile, "b": 3 * profile, "c": orthogonal}
    )
    cosines = similarities.set_index(["defense", "other", "contrast"])["cosine"]
    assert cosines["a", "b", "shift"] == pytest.approx(1) and cosines["a", "c", "shift"] == pytest.approx(0)
    assert cosines["a", "b", "discrimination"] == pytest.approx(1)
    assert np.isnan(cosines["a", "c", "discrimination"])  # c does not discriminate
    assert estimate_profile_similarity(make_estimator(), {"a": profile}).empty


def test_a_stack_is_found_whichever_member_is_named_first() -> None:
    profiles = pd.DataFrame(
        {
            "attack": "direct",
            "defense": ["a", "a"],
            "other": ["b", "c"],
            "contrast": "shift",
            "cosine": [0.5, 0.1],
        }
    )
    stacks = pd.DataFrame(
        {
            "attack": "direct",
            "members": ["b+a"],
            "interaction_shift": [-1.5],
            "interaction_discrimination": 0.0,
        }
    )
    joined = join_stack_interactions(profiles, stacks)
    assert len(joined) == 1 and joined.loc[0, "interaction"] == -1.5 and joined.loc[0, "other"] == "b"


def test_shared_noise_does_not_make_two_defenses_similar() -> None:
    """They share the noise of the undefended run, so that a plain cosine would be positive."""
    rng, parts = np.random.default_rng(4), 60
    first = rng.normal(size=parts) * 0.1
    second = rng.normal(size=parts) * 0.1
    second -= first * (first @ second) / (first @ first)
    pairs = pd.Series([f"p{number // 2}" for number in range(64)], dtype=object)
    estimator = ContrastEstimator(pairs, np.arange(64) % 2 == 0)
    cosines, plain_cosines, n_covered = [], [], 0
    for _ in range(40):
        before = rng.normal(size=(64, parts)) * 0.3
        changes = {
            name: profile + rng.normal(size=(64, parts)) * 0.3 - before
            for name, profile in (("a", first), ("b", second))
        }
        row = estimate_profile_similarity(estimator, changes).iloc[0]
        means = [change.mean(0) for change in changes.values()]
        plain_cosines.append(means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1]))
        cosines.append(row["cosine"])
        n_covered += row["cosine_low"] <= 0 <= row["cosine_high"]
    assert np.mean(plain_cosines) > 0.08 and abs(np.mean(cosines)) < 0.05
    assert n_covered >= 34


def test_a_relation_is_tested_by_permuting_defenses() -> None:
    names = list("abcdef")
    rows = [
        {"defense": first, "other": second, "cosine": index / 15}
        for index, (first, second) in enumerate((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
    ]
    pairs = pd.DataFrame(rows)
    related = compute_mantel_correlation(pairs.assign(interaction=2 * pairs["cosine"]), n_permutations=199)
    assert related["pairs"] == 15 and related["rank_correlation"] == pytest.approx(1) and related["p"] < 0.02
    rng = np.random.default_rng(5)
    unrelated_p = [
        compute_mantel_correlation(pairs.assign(interaction=rng.normal(size=15)), n_permutations=99)["p"]
        for _ in range(20)
    ]
    assert 0.2 < np.mean(unrelated_p) < 0.8
    assert np.isnan(compute_mantel_correlation(pairs[:3].assign(interaction=1.0))["p"])
