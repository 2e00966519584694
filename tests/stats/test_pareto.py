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


def test_the_first_candidate_keeps_to_the_limits_on_the_calibration_split_and_refuses_most_harm():
    _, candidates = plant_candidates()
    n = 60
    limit = float(1 - candidates["benign_calibration"].median())
    ranked = rank_candidates(candidates, limit, None, n)
    assert 0 < len(ranked) < len(candidates)
    # Nine in ten of the rates that a candidate may really have keep to the limit, by a simulation of them.
    rng = np.random.default_rng(0)
    for row in candidates.itertuples():
        n_refused = round((1 - row.benign_calibration) * n)
        rates = rng.beta(n_refused + 0.5, n - n_refused + 0.5, 20000)
        if abs((rates <= limit).mean() - 0.9) > 0.02:
            assert ((rates <= limit).mean() > 0.9) == (row.Index in ranked.index)
    assert ranked.iloc[0]["harmful_calibration"] == ranked["harmful_calibration"].max()
    assert set(rank_candidates(candidates, limit, 1.0, n)["cost"]) == {1.0}
    best_single = choose_best_single(rank_candidates(candidates, 1.0, None, n), ["none"])
    assert best_single is not None and best_single["how"] == "alone"
    assert choose_best_single(ranked[ranked["how"] != "alone"]) is None
    assert rank_candidates(candidates, 0.0, None, n).empty
    assert len(rank_candidates(candidates, 1.0, None, n)) == len(candidates)
