"""Rival predictions of planted stacks: the planted rule predicts best, from the calibration split alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from planted_margins import make_split_scores
from sklearn.metrics import mean_absolute_error, r2_score

from analysis.stats.additivity import draw_ensemble
from analysis.stats.ensembles import evaluate_stacks, evaluate_votes
from analysis.stats.predictors import (
    MEMBER_PREDICTORS,
    OUTCOMES,
    OVERLAP,
    SAME_ON_CALIBRATION,
    SATURATING,
    SUM_OF_EFFECTS,
    SUM_OF_MARGINS,
    build_overlap_table,
    choose_rate_predictor,
    compare_stack_predictors,
    compare_vote_predictors,
    compute_outcome_draws,
    predict_stack_outcomes,
)

NAMES = [f"d{number}" for number in range(6)]
PAIRS = list(combinations(NAMES, 2))
BOUND = -3.0  # nats


def plant_split(split, seed=0, combine=lambda a, b: a + b - a * b / BOUND, extra=None, n=160):
    """Return scores whose discrimination combines by a rule; all else is the same in every condition."""
    rng = np.random.default_rng([seed, split == "test"])
    is_harmful = np.arange(n) % 2 == 0
    undefended = rng.normal(np.where(is_harmful, 2.0, -1.0), 1.0)
    losses = dict(zip(NAMES, np.linspace(-0.4, -2.6, len(NAMES)), strict=True))
    # A loss of discrimination: harmful margins fall by half of it, benign ones rise by half of it.
    apply = lambda loss: undefended + np.where(is_harmful, loss, -loss) / 2 + rng.normal(0, 0.1, n)  # noqa: E731
    margins = {"none": undefended, **{name: apply(loss) for name, loss in losses.items()}}
    for pair in PAIRS:
        loss = combine(losses[pair[0]], losses[pair[1]]) + (extra or {}).get(pair, 0.0)
        margins["+".join(pair)] = apply(loss)
    return make_split_scores(margins, is_harmful, split=split)


@pytest.fixture(scope="module")
def compared():
    """Both splits of saturating stacks, one of which gains 1.5 nats that nothing predicts, and the tables."""
    extra = {("d1", "d3"): 1.5}
    calibration, report = plant_split("calibration"), plant_split("test", extra=extra)
    return calibration, report, *compare_stack_predictors(calibration, report)


def test_the_planted_bound_is_fitted_and_predicts_best(compared):
    _, _, fit, _ = compared
    best = fit[fit["is_best"]].groupby("outcome")["predictor"].first()
    assert best["discrimination"] == SATURATING
    row = fit[(fit["split"] == "calibration") & (fit["outcome"] == "discrimination")].set_index("predictor")
    assert row.loc[SATURATING, "parameter"] == pytest.approx(BOUND, abs=0.15)
    assert row.loc[SATURATING, "r2"] > 0.95 > row.loc["lower member", "r2"] > row.loc[SUM_OF_MARGINS, "r2"]
    assert OVERLAP not in set(fit["predictor"])  # no overlap was given


def test_statistics_are_those_of_other_libraries_and_lie_in_their_intervals(compared):
    calibration, report, fit, _ = compared
    observed = compute_outcome_draws(report, report.get_member_margins(["+".join(p) for p in PAIRS]))
    predicted = predict_stack_outcomes(calibration, PAIRS, with_draws=False).values
    rows = fit.set_index(["split", "predictor", "outcome"]).sort_index().loc["test"]
    for predictor, of_outcome in predicted.items():
        for outcome in OUTCOMES:
            row, values = rows.loc[predictor, outcome], (observed[outcome][0], of_outcome[outcome][0])
            assert row["r2"] == pytest.approx(r2_score(*values))
            assert row["mean_absolute_error"] == pytest.approx(mean_absolute_error(*values))
            for name in ("r2", "mean_absolute_error"):
                assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert rows.loc[SAME_ON_CALIBRATION, "r2"].notna().all()
    # The sum of margins is the prediction of ensembles.csv, and both see the calibration split only.
    stacks = evaluate_stacks(report, PAIRS, calibration)
    for outcome in OUTCOMES:
        np.testing.assert_allclose(
            stacks[f"predicted_{outcome}"], predicted[SUM_OF_MARGINS][outcome][0], atol=1e-9
        )
        np.testing.assert_allclose(stacks[f"observed_{outcome}"], observed[outcome][0], atol=1e-9)


def test_intervals_resample_the_defenses_as_well(compared):
    calibration, _, fit, _ = compared
    # Without any noise of the queries, only the defenses vary, and so does the error.
    row = (
        fit.set_index(["split", "predictor", "outcome"])
        .sort_index()
        .loc["calibration", SUM_OF_EFFECTS, "discrimination"]
    )
    predicted = predict_stack_outcomes(calibration, PAIRS)
    errors = np.abs(
        predicted.values[SUM_OF_EFFECTS]["discrimination"]
        - compute_outcome_draws(calibration, calibration.get_member_margins(["+".join(p) for p in PAIRS]))[
            "discrimination"
        ]
    )
    queries_only = np.ptp(np.quantile(errors[1:].mean(1), [0.025, 0.975]))
    assert row["mean_absolute_error_high"] - row["mean_absolute_error_low"] > 2 * queries_only
    assert (predicted.team_weights[0] == 1).all() and predicted.team_weights[1:].max() >= 4


def test_a_fitted_parameter_never_sees_a_stack_that_shares_a_defense():
    calibration = plant_split("calibration")
    base = predict_stack_outcomes(calibration, PAIRS, with_draws=False).values
    table = calibration.margin_table
    margins = table.margins.copy()
    changed = [index for index, name in enumerate(table.condition_names) if "+" in name and "d0" in name]
    margins[:, changed] += 5.0 * table.is_harmful[:, None]
    moved = replace(calibration, margin_table=replace(table, margins=margins))
    after = predict_stack_outcomes(moved, PAIRS, with_draws=False).values
    has_d0 = np.array(["d0" in pair for pair in PAIRS])
    change = np.abs(after[SATURATING]["discrimination"] - base[SATURATING]["discrimination"])[0]
    assert change[has_d0].max() < 1e-12 and change[~has_d0].max() > 0.05
    for predictor in (SUM_OF_MARGINS, SUM_OF_EFFECTS, *MEMBER_PREDICTORS):
        np.testing.assert_array_equal(after[predictor]["discrimination"], base[predictor]["discrimination"])


def test_triples_follow_the_same_rule_and_without_other_stacks_it_is_the_sum():
    calibration = plant_split("calibration")
    triple = ("d0", "d2", "d5")
    predictions = predict_stack_outcomes(calibration, [triple], with_draws=False)
    effects = [
        compute_outcome_draws(calibration, calibration.get_member_margins([name]), False)["discrimination"][
            0, 0
        ]
        for name in triple
    ]
    bound = predictions.parameters[SATURATING, "discrimination"]
    want = bound * (1 - np.prod([1 - effect / bound for effect in effects]))
    assert predictions.values[SATURATING]["discrimination"][0, 0] == pytest.approx(want)
    table = calibration.margin_table
    single = replace(
        calibration,
        margin_table=replace(table, condition_names=table.condition_names[:7], margins=table.margins[:, :7]),
    )
    values = predict_stack_outcomes(single, [triple], {}, with_draws=False).values
    for predictor in (SATURATING, OVERLAP):
        for outcome in OUTCOMES:
            assert values[predictor][outcome] == pytest.approx(values[SUM_OF_EFFECTS][outcome])
    assert choose_rate_predictor([single], [None]) == (SUM_OF_MARGINS, 0)


def test_effects_of_overlapping_defenses_are_attenuated_if_that_was_planted():
    rng = np.random.default_rng(3)
    cosine = {frozenset(pair): float(rng.uniform(0, 1)) for pair in PAIRS}
    rows = [
        {"defense": a, "other": b, "contrast": contrast, "cosine": cosine[frozenset((a, b))]}
        for a, b in PAIRS
        for contrast in ("shift", "discrimination")
    ]
    overlap = build_overlap_table(pd.DataFrame(rows), "direct")
    extra = {
        (a, b): -0.5 * cosine[frozenset((a, b))] * (x + y)
        for (a, x), (b, y) in combinations(zip(NAMES, np.linspace(-0.4, -2.6, 6), strict=True), 2)
    }
    calibration = plant_split("calibration", combine=lambda a, b: a + b, extra=extra)
    report = plant_split("test", combine=lambda a, b: a + b, extra=extra)
    fit, _ = compare_stack_predictors(calibration, report, overlap)
    row = fit.set_index(["split", "predictor", "outcome"]).sort_index().loc["test", OVERLAP, "discrimination"]
    assert row["is_best"] and row["parameter"] == pytest.approx(0.5, abs=0.05)


def test_the_pair_that_was_planted_to_interact_is_found_and_the_others_are_not(compared):
    *_, pairs = compared
    rows = pairs[pairs["outcome"] == "discrimination"].set_index("members")
    assert rows["predictor"].unique().tolist() == [SATURATING]
    assert rows.loc["d1+d3", "interacts"] == "above" and rows.loc["d1+d3", "p"] < 0.001
    assert rows.loc["d1+d3", "interaction_low"] > 0.5
    assert rows["interacts"].isin(["above", "below"]).sum() <= 2
    usual = rows["interaction"].abs().drop("d1+d3").quantile(0.9)
    assert rows.loc["d1+d3", "usual_error"] == pytest.approx(usual)


def test_votes_are_predicted_from_moments_or_from_one_member():
    calibration, report = plant_split("calibration"), plant_split("test")
    rows = evaluate_votes(report, PAIRS[:3], calibration)
    rows = rows[rows["how"] == "mean"].reset_index(drop=True)
    draws = {
        index: draw_ensemble(report, row["members"].split("+"), row["how"], calibration)
        for index, row in rows.iterrows()
    }
    fit = compare_vote_predictors(calibration, report, calibration, rows, draws)
    table = fit.set_index(["split", "how", "predictor", "outcome"]).sort_index()
    assert table.loc[("test", "mean", "moments", "discrimination"), "r2"] == pytest.approx(
        r2_score(rows["observed_discrimination"], rows["predicted_discrimination"])
    )
    assert table.loc[("calibration", "mean", "moments", "discrimination"), "r2"] == pytest.approx(1, abs=1e-6)
    assert set(fit["predictor"]) == {"moments", *MEMBER_PREDICTORS, SAME_ON_CALIBRATION}
    assert compare_vote_predictors(calibration, report, calibration, rows, {}).empty
