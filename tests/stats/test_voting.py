"""Votes of planted margins and their predicted metrics agree with closed forms and other libraries."""

import numpy as np
import pytest
from planted_margins import make_split_scores, plant_defense_margins
from scipy.special import ndtr
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from analysis.stats.bootstrap import ResamplingWeights
from analysis.stats.effects import compute_estimates
from analysis.stats.voting import (
    ENSEMBLE_COORDINATES,
    VOTE_RULES,
    TeamMoments,
    combine_margins,
    compute_class_metrics,
    compute_coordinates,
    compute_team_aurocs,
    fit_vote_weights,
    list_vote_rules,
    predict_vote_metrics,
)

# --- many classifiers at once ---------------------------------------------------------------------------


def test_coordinates_of_many_classifiers_at_once_equal_those_of_each_alone():
    margins, is_harmful = plant_defense_margins(defenses=5)
    margins["d4"] = np.round(margins["d4"])  # ties
    defended = np.stack([margins[f"d{number}"] for number in range(5)])
    coordinates = compute_coordinates(
        compute_class_metrics(defended[:, is_harmful], defended[:, ~is_harmful]),
        compute_class_metrics(margins["none"][None, is_harmful], margins["none"][None, ~is_harmful]),
    )
    weights = ResamplingWeights.from_observed(make_split_scores(margins, is_harmful).units)
    for index, row in enumerate(defended):
        estimates = compute_estimates(margins["none"], row, is_harmful, 0.0, weights)
        for name in ENSEMBLE_COORDINATES:
            assert coordinates[name][index] == pytest.approx(float(estimates[name][0]), abs=1e-12), name


def test_the_area_under_the_curve_is_that_of_scikit_learn_also_with_ties():
    rng = np.random.default_rng(1)
    harmful, benign = np.round(rng.normal(1, 1, (6, 40)), 1), np.round(rng.normal(0, 1, (6, 70)), 1)
    labels = [1] * 40 + [0] * 70
    expected = [roc_auc_score(labels, np.concatenate(sides)) for sides in zip(harmful, benign, strict=True)]
    assert compute_team_aurocs(harmful, benign) == pytest.approx(expected, abs=1e-12)


# --- votes ------------------------------------------------------------------------------------------------


def test_a_vote_refuses_where_its_rule_says_so():
    margins = np.random.default_rng(2).normal(size=(500, 3))
    n_refusing = (margins > 0).sum(1)
    assert ((combine_margins(margins, "highest") > 0) == (n_refusing > 0)).all()
    assert ((combine_margins(margins, "lowest") > 0) == (n_refusing == 3)).all()
    assert ((combine_margins(margins, "majority") > 0) == (n_refusing > 1)).all()
    assert combine_margins(margins, "mean") == pytest.approx(margins.mean(1))
    assert combine_margins(margins, "fitted", np.array([0.2, 0.8, 0.0])) == pytest.approx(
        margins @ [0.2, 0.8, 0]
    )
    assert list_vote_rules(3) == list(VOTE_RULES) and "majority" not in list_vote_rules(2)
    assert (combine_margins(margins[:, :2], "majority") == combine_margins(margins[:, :2], "mean")).all()


def test_fitted_weights_are_the_linear_discriminants_direction_and_never_negative():
    margins, is_harmful = plant_defense_margins(n=4000)
    margin_table = make_split_scores(margins, is_harmful).margin_table
    teams = np.array([[1, 2], [3, 4], [1, 4]])
    for team, weights in zip(teams, fit_vote_weights(margin_table, teams), strict=True):
        discriminant = LinearDiscriminantAnalysis(solver="lsqr")
        direction = discriminant.fit(margin_table.margins[:, team], is_harmful).coef_[0]
        expected = np.clip(direction, 0, None) / np.clip(direction, 0, None).sum()
        assert weights == pytest.approx(expected, abs=5e-3)
    noise = np.random.default_rng(3).normal(size=4000)
    mixed_margins = {"none": margins["none"], "good": margins["d1"], "down": -margins["d2"], "noise": noise}
    mixed = make_split_scores(mixed_margins, is_harmful).margin_table
    assert fit_vote_weights(mixed, np.array([[1, 2]]))[0] == pytest.approx([1, 0])
    assert fit_vote_weights(mixed, np.array([[1, 3]]))[0] == pytest.approx([1, 0], abs=0.05)
    # Both upside down, or identical to each other: no weights, or no matrix to invert.
    assert fit_vote_weights(mixed, np.array([[2, 2]]))[0] == pytest.approx([0.5, 0.5])
    assert fit_vote_weights(mixed, np.array([[1, 1]]))[0] == pytest.approx([0.5, 0.5])


# --- the predicted metrics of a vote ----------------------------------------------------------------------


def make_team_moments(mean, covariance):
    """Return the moments of one team."""
    return TeamMoments(np.array([mean], dtype=float), np.array([covariance], dtype=float))


def test_the_prediction_of_a_mean_is_the_closed_form():
    covariance = [[1.0, 0.3], [0.3, 2.0]]
    harmful = make_team_moments([1.0, 0.5], covariance)
    benign = make_team_moments([-1.0, -0.5], covariance)
    predicted = predict_vote_metrics(harmful, benign, "mean", None, (100, 100))
    sd = np.sqrt(1 + 2 + 0.6) / 2
    assert predicted["harmful_mean"][0] == pytest.approx(0.75, abs=1e-9)
    assert predicted["benign_mean"][0] == pytest.approx(-0.75, abs=1e-9)
    assert predicted["auroc"][0] == pytest.approx(ndtr(1.5 / (sd * np.sqrt(2))), abs=0.005)
    assert predicted["refusal_rate"][0] == pytest.approx(ndtr(0.75 / sd), abs=0.01)


def test_the_prediction_of_the_highest_and_lowest_is_that_of_normal_variables():
    independent = make_team_moments([0.0, 0.0], np.eye(2))
    for rule, sign in (("highest", 1), ("lowest", -1)):
        predicted = predict_vote_metrics(independent, independent, rule, None, (9, 9))
        # The highest of two standard normal variables: 1/sqrt(pi) on average, above 0 three times in four.
        assert predicted["harmful_mean"][0] == pytest.approx(sign / np.sqrt(np.pi), abs=0.01)
        assert predicted["refusal_rate"][0] == pytest.approx(0.5 + sign * 0.25, abs=0.01)
    identical = make_team_moments([1.0, 1.0], np.ones((2, 2)))
    predicted = predict_vote_metrics(identical, identical, "highest", None, (9, 9))
    assert predicted["harmful_mean"][0] == pytest.approx(1.0, abs=1e-3)
