"""Interactions of planted ensembles: intervals, agreement with the prediction, and raised distances."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from planted_margins import make_split_scores, plant_defense_margins, plant_stack
from scipy.stats import spearmanr
from sklearn.metrics import r2_score

from analysis.stats.additivity import (
    _RAISED_DISTANCE_COLUMNS,
    draw_ensemble,
    estimate_ensemble_intervals,
    find_raised_distances,
    summarize_prediction_fit,
)
from analysis.stats.ensembles import evaluate_stacks, evaluate_votes
from analysis.stats.voting import ENSEMBLE_COORDINATES

# --- intervals ----------------------------------------------------------------------------------------------


def test_the_interval_of_an_interaction_covers_the_planted_one():
    n_covered = 0
    for seed in range(20):
        scores = plant_stack(0.5, seed)
        row = evaluate_stacks(scores, [("d0", "d1")], scores).iloc[0].to_dict()
        draws = draw_ensemble(scores, ["d0", "d1"], "stack", scores)
        intervals = estimate_ensemble_intervals(scores, row, scores, draws)
        n_covered += intervals["interaction_shift_low"] <= 0.25 <= intervals["interaction_shift_high"]
        assert intervals["interaction_discrimination_low"] > 0
        assert (
            intervals["observed_refusal_rate_low"]
            <= row["observed_refusal_rate"]
            <= intervals["observed_refusal_rate_high"]
        )
    assert n_covered >= 16
    margins, is_harmful = plant_defense_margins()
    additive_margins = margins["d0"] + margins["d1"] - margins["none"]
    additive = make_split_scores(margins | {"d0+d1": additive_margins}, is_harmful)
    draws = draw_ensemble(additive, ["d0", "d1"], "stack", additive)
    assert np.abs(draws.observed["shift"] - draws.predicted["shift"]).max() < 1e-12


def test_a_vote_of_two_identical_defenses_has_no_interaction_even_if_margins_are_not_normal() -> None:
    rng = np.random.default_rng(11)
    is_harmful = np.arange(300) % 2 == 0
    undefended = rng.exponential(np.where(is_harmful, 2.0, 1.0)) - 1
    scores = make_split_scores({"none": undefended, "a": undefended + 1, "b": undefended + 1}, is_harmful)
    row = evaluate_votes(scores, [("a", "b")], scores).set_index("how").loc["mean"].to_dict()
    assert row["predicted_delta_auroc"] == pytest.approx(0, abs=1e-3) and row["observed_delta_auroc"] == 0
    draws = draw_ensemble(scores, ["a", "b"], "mean", scores)
    intervals = estimate_ensemble_intervals(scores, row | {"members": "a+b", "how": "mean"}, scores, draws)
    low, high = (intervals[f"interaction_delta_auroc_{end}"] for end in ("low", "high"))
    assert abs(low) + abs(high) < 2e-3


def test_without_any_refusal_there_is_no_interval_of_an_interaction() -> None:
    margins, is_harmful = plant_defense_margins()
    never_refusing = {name: np.asarray(values) - 50 for name, values in margins.items()}
    scores = make_split_scores(never_refusing | {"d0+d1": never_refusing["d0"] + 0.1}, is_harmful)
    row = evaluate_stacks(scores, [("d0", "d1")], scores).iloc[0].to_dict()
    draws = draw_ensemble(scores, ["d0", "d1"], "stack", scores)
    intervals = estimate_ensemble_intervals(scores, row, scores, draws)
    assert np.isnan(intervals["interaction_refusal_rate_low"])
    assert intervals["observed_refusal_rate_high"] > 0.01


def test_the_draws_of_a_vote_lie_around_its_values():
    scores = plant_stack()
    for rule in ("mean", "highest", "fitted"):
        row = evaluate_votes(scores, [("d0", "d2")], scores).set_index("how").loc[rule]
        ensemble_draws = draw_ensemble(scores, ["d0", "d2"], rule, scores)
        for name in ("shift", "discrimination", "delta_auroc"):
            for side in ("predicted", "observed"):
                draws = getattr(ensemble_draws, side)[name]
                assert draws.mean() == pytest.approx(row[f"{side}_{name}"], abs=0.3 * draws.std() + 0.02)
    difference = ensemble_draws.predicted["shift"] - ensemble_draws.observed["shift"]
    assert np.abs(difference).max() < 1e-9  # linear


# --- how good the prediction is ---------------------------------------------------------------------------


def test_agreement_is_that_of_other_libraries_and_lies_in_its_interval():
    planted, teams = plant_stack(0.5), list(combinations(["d0", "d1", "d2", "d3"], 2))
    margins = {
        name: planted.margin_table.margins[:, index]
        for index, name in enumerate(planted.margin_table.condition_names)
    }
    rng = np.random.default_rng(6)
    for team in teams:
        stacked = margins[team[0]] + margins[team[1]] - margins["none"]
        margins["+".join(team)] = stacked + rng.normal(0.3, 0.3, len(stacked))
    scores = make_split_scores(margins, planted.margin_table.is_harmful)
    rows = evaluate_stacks(scores, teams, scores).assign(kind="intra", kind_by_family=["inter", *[""] * 5])
    draws = {
        index: draw_ensemble(scores, row["members"].split("+"), "stack", scores)
        for index, row in rows.iterrows()
    }
    intervals = [
        estimate_ensemble_intervals(scores, row.to_dict(), scores, draws[index])
        for index, row in rows.iterrows()
    ]
    rows = rows.join(pd.DataFrame(intervals))
    fit = summarize_prediction_fit(rows, draws).set_index(["kind", "coordinate"])
    for name in ENSEMBLE_COORDINATES:
        predicted, observed = rows[f"predicted_{name}"], rows[f"observed_{name}"]
        row = fit.loc["all", name]
        assert row["r2"] == pytest.approx(r2_score(observed, predicted)) and row["n"] == 6
        assert row["rank_correlation"] == pytest.approx(spearmanr(predicted, observed).statistic)
        assert row["mean_interaction"] == pytest.approx((observed - predicted).mean())
        for measure in ("r2", "rank_correlation"):
            assert row[f"{measure}_low"] <= row[measure] <= row[f"{measure}_high"]
    assert fit.loc[("all", "shift"), "beyond_zero"] == 6  # 0.3 nats were planted
    assert fit.loc[("all", "discrimination"), "beyond_zero"] <= 2
    assert fit.loc[("intra", "shift")].equals(fit.loc[("all", "shift")])
    assert fit["n"].groupby("kind").first().to_dict() == {"all": 6, "intra": 6, "inter by family": 1}
    without_draws = summarize_prediction_fit(rows, {})
    assert without_draws.loc[without_draws["n"] > 2, "r2"].notna().all() and "r2_low" not in without_draws
    votes = evaluate_votes(scores, teams, scores).assign(kind="intra", kind_by_family="")
    for split, is_exact in (("test", False), ("calibration", True)):  # predictions come from calibration
        keys = summarize_prediction_fit(votes.assign(split=split), {}).set_index(["how", "coordinate"]).index
        assert ("highest", "shift") in keys and ("mean", "delta_auroc") in keys
        assert (("mean", "shift") not in keys) == is_exact


def test_a_raised_distance_is_of_the_scale_if_only_shifted_and_real_if_the_ranking_improves():
    rng = np.random.default_rng(7)
    is_harmful = np.arange(400) % 2 == 0
    # The introduction's example: AUROC stays, and the distance on the probability scale grows with a shift.
    undefended = rng.normal(np.where(is_harmful, -1.5, -3.5), 1.5)
    shifting = {"a": undefended + 0.5, "b": undefended + 0.6, "a+b": undefended + 1.1}
    improving = {"c": undefended + 0.4, "d": undefended + 0.5, "c+d": undefended + 0.9 + 1.0 * is_harmful}
    scores = make_split_scores({"none": undefended, **shifting, **improving}, is_harmful)
    rows = evaluate_stacks(scores, [("a", "b"), ("c", "d"), ("a", "c")], scores)
    raised = find_raised_distances(scores, rows, dict.fromkeys("abcd", 0.9), scores).set_index("members")
    assert raised["raise"].to_dict() == {"a+b": "probability scale", "c+d": "real"}
    assert raised.loc["a+b", "distance"] > raised.loc["a+b", ["distance_first", "distance_second"]].max()
    assert raised.loc["a+b", "gain_auroc"] == pytest.approx(0, abs=1e-12)
    assert raised.loc["c+d", "gain_auroc_low"] > 0.02
    empty = find_raised_distances(scores, rows, {"a": 0.9, "b": 0.4}, scores)
    assert list(empty) == _RAISED_DISTANCE_COLUMNS
