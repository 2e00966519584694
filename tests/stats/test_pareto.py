"""Pareto fronts and recommendations follow from the rates of planted candidates."""

import numpy as np
import pandas as pd
import pytest
from planted_margins import make_split_scores, plant_defense_margins

from analysis.stats.ensembles import evaluate_single_defenses, evaluate_votes
from analysis.stats.pareto import build_candidates, choose_best_single, find_undominated, rank_candidates


def test_no_point_of_the_front_is_dominated_and_every_other_point_is():
    objectives = np.round(np.random.default_rng(8).random((300, 3)), 1)
    undominated = find_undominated(objectives)
    for point, on_front in zip(objectives, undominated, strict=True):
        dominated = ((objectives >= point).all(1) & (objectives > point).any(1)).any()
        assert on_front == (not dominated)


def plant_candidates():
    """Return the ensemble rows and the candidates of two attacks on both splits."""
    tables = []
    for number, (attack, split) in enumerate(
        (a, s) for a in ("direct", "base64") for s in ("calibration", "test")
    ):
        margins, is_harmful = plant_defense_margins(number)
        split_scores = make_split_scores(margins, is_harmful, attack, split)
        tables += [
            evaluate_single_defenses(split_scores, split_scores.margin_table.condition_names),
            evaluate_votes(split_scores, [("d0", "d3")], split_scores),
        ]
    rows = pd.concat(tables, ignore_index=True)
    return rows, build_candidates(rows, lambda conditions: float(len(conditions)))


def test_candidates_average_harmful_rates_over_attacks_and_take_benign_rates_without_attack():
    rows, candidates = plant_candidates()
    row = candidates.set_index(["members", "how"]).loc["d0+d3", "highest"]
    of_vote = rows[(rows["members"] == "d0+d3") & (rows["how"] == "highest")].set_index(["attack", "split"])
    rates = of_vote["observed_refusal_rate"]
    assert row["harmful_test"] == pytest.approx((rates["direct", "test"] + rates["base64", "test"]) / 2)
    assert row["attacked_calibration"] == rates["base64", "calibration"]
    assert row["benign_test"] == 1 - of_vote.loc[("direct", "test"), "observed_over_refusal_rate"]
    assert row["cost"] == 2 and candidates.set_index("members").loc["d1", "cost"] == 1
    assert len(candidates) == 5 + 4


def test_candidates_within_the_cost_are_ranked_by_the_harmful_queries_that_they_refuse():
    _, candidates = plant_candidates()
    ranked = rank_candidates(candidates, None)
    assert len(ranked) == len(candidates) and (np.diff(ranked["harmful_calibration"]) <= 0).all()
    tied = ranked.groupby("harmful_calibration", sort=False)["cost"]
    assert (tied.apply(lambda cost: cost.is_monotonic_increasing)).all()
    assert set(rank_candidates(candidates, 1.0)["cost"]) == {1.0}
    best_single = choose_best_single(ranked, ["none"])
    assert best_single is not None and best_single["how"] == "alone"
    assert choose_best_single(ranked[ranked["how"] != "alone"]) is None
