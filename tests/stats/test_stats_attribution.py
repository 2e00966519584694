"""Many contrasts at once are each what one contrast is; half-way layers, cosines and overlaps by hand."""

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


def asked(draws: int = 300) -> ContrastEstimator:
    return ContrastEstimator(PAIRS, HARMFUL, seed=3, n_draws=draws)


def test_each_column_is_what_it_is_alone() -> None:
    change = np.random.default_rng(0).normal(size=(24, 5)) + HARMFUL[:, None]
    found = asked().estimate_contrasts(change)
    units = ResamplingUnits.from_pairs(PAIRS, HARMFUL)
    once, draws = ResamplingWeights.from_observed(units), ResamplingWeights.from_bootstrap(units, 300, 3)
    for column in range(5):
        point, cloud = (compute_contrasts(change[:, column], HARMFUL, sample) for sample in (once, draws))
        for name in CONTRASTS:
            assert found.loc[column, name] == pytest.approx(point[name][0])
            low, high = bootstrap_interval(cloud[name], 10)
            assert found.loc[column, f"{name}_low"] == pytest.approx(low)
            assert found.loc[column, f"{name}_high"] == pytest.approx(high)


def test_rows_add_up_to_both_contrasts() -> None:
    made = np.random.default_rng(1)
    parts = (
        ModelPart("embedding"),
        ModelPart("added", 0),
        ModelPart("head", 0, 0),
        ModelPart("mlp", 0),
        ModelPart("bias"),
    )
    before, after = made.normal(size=(2, 24, 5))
    before[:, 1] = after[:, 1] = 0.0
    one, other = (Decomposition(parts, shares, shares.sum(1)) for shares in (before, after))
    found = estimate_part_contrasts(asked(), one, other)
    assert "added" not in set(found["kind"]) and len(found) == 4
    whole = asked().estimate_contrasts((other.margins - one.margins)[:, None]).iloc[0]
    for name in CONTRASTS:
        assert found[name].sum() == pytest.approx(whole[name])
    assert pd.isna(found.loc[0, "layer"]) and found.loc[1, "head"] == 0


def test_a_contrast_is_half_there_from_the_layer_on_which_it_stays_there() -> None:
    steps = np.array([0.0, 0.9, 0.2, 0.6, 1.0])  # over half once, but not for good
    noise = np.random.default_rng(2).normal(scale=0.02, size=(24, 5))
    after = np.where(HARMFUL[:, None], 2 * steps, 0.0) + noise
    found = find_half_way_layers(asked(), np.zeros((24, 5)), after).set_index("contrast")
    assert found.loc["discrimination", "half"] == 3 and found.loc["shift", "half"] == 3
    assert found.loc["shift", "half_low"] == found.loc["shift", "half_high"] == 3
    assert found.loc["discrimination", "final"] == pytest.approx(2, abs=0.05)
    nothing = find_half_way_layers(asked(), np.zeros((24, 5)), 50 * noise).set_index("contrast")
    assert nothing["half"].isna().all()  # nothing is half of what may be 0


def test_layers_are_told_with_the_means_that_they_come_from() -> None:
    made = np.random.default_rng(3)
    before, after = made.normal(size=(2, 24, 3))
    found = estimate_layer_contrasts(asked(), before, after)
    change = (found["harmful_defended"] - found["harmful_undefended"]) - (
        found["benign_defended"] - found["benign_undefended"]
    )
    assert found["discrimination"].to_numpy() == pytest.approx(change.to_numpy())
    assert found["layer"].tolist() == [0, 1, 2]


def test_separation_is_that_of_before_and_after() -> None:
    before, after = np.zeros(24), HARMFUL.astype(float)
    found = asked().estimate_separation(before, after)
    assert (found["auroc"], found["auroc_after"], found["delta_auroc"]) == (0.5, 1.0, 0.5)
    assert found["delta_auroc_low"] > 0.2
    same = asked().estimate_separation(after, after)
    assert same["delta_auroc"] == 0


def test_likeness_is_the_cosine_of_what_defenses_do_to_parts() -> None:
    by_class = np.where(HARMFUL[:, None], [[2.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]])
    other = np.tile([[0.0, 5.0, 0.0]], (24, 1))
    found = estimate_profile_similarity(asked(), {"a": by_class, "b": 3 * by_class, "c": other})
    values = found.set_index(["defense", "other", "contrast"])["cosine"]
    assert values["a", "b", "shift"] == pytest.approx(1) and values["a", "c", "shift"] == pytest.approx(0)
    assert values["a", "b", "discrimination"] == pytest.approx(1)
    assert np.isnan(values["a", "c", "discrimination"])  # c tells nothing apart
    assert estimate_profile_similarity(asked(), {"a": by_class}).empty


def test_overlap_finds_the_stack_whichever_member_is_named_first() -> None:
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
    found = join_stack_interactions(profiles, stacks)
    assert len(found) == 1 and found.loc[0, "interaction"] == -1.5 and found.loc[0, "other"] == "b"


def test_what_chance_does_to_both_makes_no_two_defenses_alike() -> None:
    """They share the undefended run, so its noise is in both: a plain cosine would find them alike."""
    made, parts = np.random.default_rng(4), 60
    one = made.normal(size=parts) * 0.1
    other = made.normal(size=parts) * 0.1
    other -= one * (one @ other) / (one @ one)
    pairs = pd.Series([f"p{number // 2}" for number in range(64)], dtype=object)
    about = ContrastEstimator(pairs, np.arange(64) % 2 == 0)
    found, plain, covered = [], [], 0
    for _ in range(40):
        before = made.normal(size=(64, parts)) * 0.3
        changes = {
            name: true + made.normal(size=(64, parts)) * 0.3 - before
            for name, true in (("a", one), ("b", other))
        }
        row = estimate_profile_similarity(about, changes).iloc[0]
        means = [change.mean(0) for change in changes.values()]
        plain.append(means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1]))
        found.append(row["cosine"])
        covered += row["cosine_low"] <= 0 <= row["cosine_high"]
    assert np.mean(plain) > 0.08 and abs(np.mean(found)) < 0.05
    assert covered >= 34


def test_relation_is_tested_by_exchanging_defenses() -> None:
    names = list("abcdef")
    rows = [
        {"defense": one, "other": other, "cosine": place / 15}
        for place, (one, other) in enumerate((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
    ]
    pairs = pd.DataFrame(rows)
    strong = compute_mantel_correlation(pairs.assign(interaction=2 * pairs["cosine"]), n_permutations=199)
    assert strong["pairs"] == 15 and strong["rank_correlation"] == pytest.approx(1) and strong["p"] < 0.02
    made = np.random.default_rng(5)
    weak = [
        compute_mantel_correlation(pairs.assign(interaction=made.normal(size=15)), n_permutations=99)["p"]
        for _ in range(20)
    ]
    assert 0.2 < np.mean(weak) < 0.8
    assert np.isnan(compute_mantel_correlation(pairs[:3].assign(interaction=1.0))["p"])
