"""Ensembles: votes and stacks of planted margins come to what they must, and so do their predictions."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtr
from scipy.stats import spearmanr
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import r2_score, roc_auc_score

from analysis.stats.additivity import (
    _RAISED_DISTANCE_COLUMNS,
    draw_ensemble,
    estimate_ensemble_intervals,
    find_raised_distances,
    summarize_prediction_fit,
)
from analysis.stats.bootstrap import ResamplingUnits, ResamplingWeights
from analysis.stats.effects import compute_estimates
from analysis.stats.ensembles import (
    SplitScores,
    classify_mechanisms,
    classify_teams,
    evaluate_single_defenses,
    evaluate_stacks,
    evaluate_votes,
)
from analysis.stats.pareto import build_candidates, choose_best_single, find_undominated, rank_candidates
from analysis.stats.voting import (
    ENSEMBLE_COORDINATES,
    VOTE_RULES,
    MarginTable,
    TeamMoments,
    combine_margins,
    compute_class_metrics,
    compute_coordinates,
    compute_team_aurocs,
    fit_vote_weights,
    list_vote_rules,
    predict_vote_metrics,
)


def half(margins, is_harmful, attack="direct", split="test"):
    """Return a half with these margins by name, `none` among them; every query is a unit of its own."""
    names = tuple(margins)
    stacked = np.stack([np.asarray(margins[name], dtype=float) for name in names], axis=1)
    units = ResamplingUnits.from_pairs(pd.Series([None] * len(is_harmful)), is_harmful)
    return SplitScores(
        attack, split, MarginTable(names, stacked, stacked[:, names.index("none")], is_harmful), units
    )


def planted(seed=0, n=120, defenses=4, spread=1.0):
    """Return random margins of some defenses, named d0 …, and of the undefended model, and the classes."""
    rng = np.random.default_rng(seed)
    is_harmful = np.arange(n) % 2 == 0
    base = rng.normal(np.where(is_harmful, 0.5, -1.5), 1.0)
    margins = {"none": base}
    for number in range(defenses):
        moved = rng.normal(0.4 * number, 0.2) + rng.normal(0.5, 0.2) * is_harmful
        margins[f"d{number}"] = base + moved + rng.normal(0, 0.5 * spread, n)
    return margins, is_harmful


# --- many classifiers at once ---------------------------------------------------------------------------


def test_many_classifiers_at_once_are_read_as_each_one_by_itself():
    margins, is_harmful = planted(defenses=5)
    margins["d4"] = np.round(margins["d4"])  # ties
    after = np.stack([margins[f"d{number}"] for number in range(5)])
    found = compute_coordinates(
        compute_class_metrics(after[:, is_harmful], after[:, ~is_harmful]),
        compute_class_metrics(margins["none"][None, is_harmful], margins["none"][None, ~is_harmful]),
    )
    once = ResamplingWeights.from_observed(half(margins, is_harmful).units)
    for place, one in enumerate(after):
        wanted = compute_estimates(margins["none"], one, is_harmful, 0.0, once)
        for name in ENSEMBLE_COORDINATES:
            assert found[name][place] == pytest.approx(float(wanted[name][0]), abs=1e-12), name


def test_the_area_under_the_curve_is_that_of_another_library_ties_and_all():
    rng = np.random.default_rng(1)
    harmful, benign = np.round(rng.normal(1, 1, (6, 40)), 1), np.round(rng.normal(0, 1, (6, 70)), 1)
    truth = [1] * 40 + [0] * 70
    wanted = [roc_auc_score(truth, np.concatenate(sides)) for sides in zip(harmful, benign, strict=True)]
    assert compute_team_aurocs(harmful, benign) == pytest.approx(wanted, abs=1e-12)


# --- votes ------------------------------------------------------------------------------------------------


def test_a_vote_refuses_where_its_members_say_so():
    margins = np.random.default_rng(2).normal(size=(500, 3))
    refused = (margins > 0).sum(1)
    assert ((combine_margins(margins, "highest") > 0) == (refused > 0)).all()
    assert ((combine_margins(margins, "lowest") > 0) == (refused == 3)).all()
    assert ((combine_margins(margins, "majority") > 0) == (refused > 1)).all()
    assert combine_margins(margins, "mean") == pytest.approx(margins.mean(1))
    assert combine_margins(margins, "fitted", np.array([0.2, 0.8, 0.0])) == pytest.approx(
        margins @ [0.2, 0.8, 0]
    )
    assert list_vote_rules(3) == list(VOTE_RULES) and "majority" not in list_vote_rules(2)
    assert (combine_margins(margins[:, :2], "majority") == combine_margins(margins[:, :2], "mean")).all()


def test_fitted_weights_are_the_linear_discriminants_direction_and_never_negative():
    margins, is_harmful = planted(n=4000)
    board = half(margins, is_harmful).margin_table
    teams = np.array([[1, 2], [3, 4], [1, 4]])
    for team, weights in zip(teams, fit_vote_weights(board, teams), strict=True):
        known = LinearDiscriminantAnalysis(solver="lsqr").fit(board.margins[:, team], is_harmful).coef_[0]
        want = np.clip(known, 0, None) / np.clip(known, 0, None).sum()
        assert weights == pytest.approx(want, abs=5e-3)
    noise = np.random.default_rng(3).normal(size=4000)
    upside = half(
        {"none": margins["none"], "good": margins["d1"], "down": -margins["d2"], "noise": noise}, is_harmful
    )
    assert fit_vote_weights(upside.margin_table, np.array([[1, 2]]))[0] == pytest.approx([1, 0])
    assert fit_vote_weights(upside.margin_table, np.array([[1, 3]]))[0] == pytest.approx([1, 0], abs=0.05)
    # Both upside down, or twins of each other: no weights, or no matrix to invert.
    assert fit_vote_weights(upside.margin_table, np.array([[2, 2]]))[0] == pytest.approx([0.5, 0.5])
    assert fit_vote_weights(upside.margin_table, np.array([[1, 1]]))[0] == pytest.approx([0.5, 0.5])


# --- what members let expect of a vote ------------------------------------------------------------------


def moments(mean, covariance):
    """Return the moments of one team."""
    return TeamMoments(np.array([mean], dtype=float), np.array([covariance], dtype=float))


def test_the_prediction_of_a_mean_is_the_closed_form():
    mean, covariance = ([1.0, 0.5], [-1.0, -0.5]), [[1.0, 0.3], [0.3, 2.0]]
    found = predict_vote_metrics(
        moments(mean[0], covariance), moments(mean[1], covariance), "mean", None, (100, 100)
    )
    sd = np.sqrt(1 + 2 + 0.6) / 2
    assert found["harmful_mean"][0] == pytest.approx(0.75, abs=1e-9)
    assert found["benign_mean"][0] == pytest.approx(-0.75, abs=1e-9)
    assert found["auroc"][0] == pytest.approx(ndtr(1.5 / (sd * np.sqrt(2))), abs=0.005)
    assert found["refusal_rate"][0] == pytest.approx(ndtr(0.75 / sd), abs=0.01)


def test_the_prediction_of_the_highest_and_lowest_is_that_of_normal_variables():
    two, still = np.eye(2), [0.0, 0.0]
    for how, sign in (("highest", 1), ("lowest", -1)):
        found = predict_vote_metrics(moments(still, two), moments(still, two), how, None, (9, 9))
        # The highest of two standard normal variables: 1/sqrt(pi) on average, above 0 three times in four.
        assert found["harmful_mean"][0] == pytest.approx(sign / np.sqrt(np.pi), abs=0.01)
        assert found["refusal_rate"][0] == pytest.approx(0.5 + sign * 0.25, abs=0.01)
    agree = np.ones((2, 2))
    found = predict_vote_metrics(
        moments([1.0, 1.0], agree), moments([1.0, 1.0], agree), "highest", None, (9, 9)
    )
    assert found["harmful_mean"][0] == pytest.approx(1.0, abs=1e-3)


def test_normal_margins_come_out_as_predicted_and_members_that_err_together_gain_less():
    rng, n = np.random.default_rng(4), 40000
    is_harmful = np.arange(n) % 2 == 0
    gains = {}
    for together in (0.0, 0.9):
        errors = rng.multivariate_normal([0] * 3, np.full((3, 3), together) + (1 - together) * np.eye(3), n)
        margins = {f"d{k}": errors[:, k] + 1.5 * is_harmful - 0.5 for k in range(3)}
        found = evaluate_votes(
            one := half({"none": errors[:, 0] + is_harmful, **margins}, is_harmful), [("d0", "d1", "d2")], one
        ).set_index("how")
        assert set(found.index) == set(VOTE_RULES)
        for name, near in (
            ("delta_auroc", 0.01),
            ("refusal_rate", 0.01),
            ("shift", 0.02),
            ("discrimination", 0.02),
        ):
            assert found[f"interaction_{name}"].abs().max() < near, name
        gains[together] = found.loc["mean", "predicted_delta_auroc"]
    assert gains[0.0] > gains[0.9] + 0.05


# --- stacks -------------------------------------------------------------------------------------------------


def with_stack(extra=0.0, seed=0):
    """Return a half in which a stack does what its members do, and `extra` more on harmful queries."""
    margins, is_harmful = planted(seed)
    noise = np.random.default_rng(seed + 50).normal(0, 0.1, len(is_harmful))
    together = margins["d0"] + margins["d1"] - margins["none"] + extra * is_harmful + noise
    return half(margins | {"d0+d1": together}, is_harmful)


def test_a_stack_is_predicted_by_adding_what_its_members_change():
    one = with_stack(0.8)
    found = evaluate_stacks(one, [("d0", "d1"), ("d0", "d2"), ("d0", "d1", "d2")]).set_index("members")
    assert found.loc["d0+d1", "interaction_shift"] == pytest.approx(0.4, abs=0.03)
    assert found.loc["d0+d1", "interaction_discrimination"] == pytest.approx(0.8, abs=0.05)
    assert found["observed_shift"].notna().to_dict() == {"d0+d1": True, "d0+d2": False, "d0+d1+d2": False}
    alone = evaluate_single_defenses(one, ["d0", "d1", "d2"]).set_index("members")
    for name in ("shift", "discrimination"):
        summed = alone[f"observed_{name}"].sum()
        assert found.loc["d0+d1+d2", f"predicted_{name}"] == pytest.approx(summed, abs=1e-9)


def test_the_interval_of_an_interaction_holds_what_was_planted():
    covered = 0
    for seed in range(20):
        one = with_stack(0.5, seed)
        row = evaluate_stacks(one, [("d0", "d1")]).iloc[0].to_dict()
        cloud = draw_ensemble(one, ["d0", "d1"], "stack", one)
        ends = estimate_ensemble_intervals(one, row, one, cloud)
        covered += ends["interaction_shift_low"] <= 0.25 <= ends["interaction_shift_high"]
        assert ends["interaction_discrimination_low"] > 0
        assert (
            ends["observed_refusal_rate_low"]
            <= row["observed_refusal_rate"]
            <= ends["observed_refusal_rate_high"]
        )
    assert covered >= 16
    margins, is_harmful = planted()
    still = half(margins | {"d0+d1": margins["d0"] + margins["d1"] - margins["none"]}, is_harmful)
    cloud = draw_ensemble(still, ["d0", "d1"], "stack", still)
    assert np.abs(cloud.observed["shift"] - cloud.predicted["shift"]).max() < 1e-12


def test_margins_that_are_not_normal_are_no_interaction_of_a_vote_of_twins() -> None:
    rng = np.random.default_rng(11)
    is_harmful = np.arange(300) % 2 == 0
    base = rng.exponential(np.where(is_harmful, 2.0, 1.0)) - 1
    one = half({"none": base, "a": base + 1, "b": base + 1}, is_harmful)
    row = evaluate_votes(one, [("a", "b")], one).set_index("how").loc["mean"].to_dict()
    assert row["predicted_delta_auroc"] == pytest.approx(0, abs=1e-3) and row["observed_delta_auroc"] == 0
    cloud = draw_ensemble(one, ["a", "b"], "mean", one)
    ends = estimate_ensemble_intervals(one, row | {"members": "a+b", "how": "mean"}, one, cloud)
    assert abs(ends["interaction_delta_auroc_low"]) + abs(ends["interaction_delta_auroc_high"]) < 2e-3


def test_where_nothing_is_refused_there_is_no_interval_of_an_interaction() -> None:
    margins, is_harmful = planted()
    never = {name: np.asarray(values) - 50 for name, values in margins.items()}
    one = half(never | {"d0+d1": never["d0"] + 0.1}, is_harmful)
    row = evaluate_stacks(one, [("d0", "d1")]).iloc[0].to_dict()
    ends = estimate_ensemble_intervals(one, row, one, draw_ensemble(one, ["d0", "d1"], "stack", one))
    assert np.isnan(ends["interaction_refusal_rate_low"]) and ends["observed_refusal_rate_high"] > 0.01


def test_the_draws_of_a_vote_lie_around_its_values():
    one = with_stack()
    for how in ("mean", "highest", "fitted"):
        row = evaluate_votes(one, [("d0", "d2")], one).set_index("how").loc[how]
        cloud = draw_ensemble(one, ["d0", "d2"], how, one)
        for name in ("shift", "discrimination", "delta_auroc"):
            for side in ("predicted", "observed"):
                draws = getattr(cloud, side)[name]
                assert draws.mean() == pytest.approx(row[f"{side}_{name}"], abs=0.3 * draws.std() + 0.02)
    assert np.abs(cloud.predicted["shift"] - cloud.observed["shift"]).max() < 1e-9  # linear


# --- kinds ------------------------------------------------------------------------------------------------


def test_the_mechanism_is_the_larger_contrast_and_a_pair_of_both_is_inter():
    rng = np.random.default_rng(5)
    is_harmful = np.arange(200) % 2 == 0
    base = rng.normal(size=200)
    noise = lambda: rng.normal(0, 0.3, 200)  # noqa: E731
    one = half(
        {
            "none": base,
            "shifts": base + 1 + noise(),
            "shifts too": base - 2 + 0.3 * is_harmful + noise(),
            "separates": base + np.where(is_harmful, 1, -1) + noise(),
            "idle": base + noise(),
        },
        is_harmful,
    )
    families = {"shifts": "reminders", "shifts too": "tuning", "separates": "refactoring", "idle": "noise"}
    found = classify_mechanisms(one, families).set_index("defense")
    assert found["mechanism"].tolist()[:3] == ["shift", "shift", "discrimination"]
    assert found["p_shift"].tolist()[:3] == [1.0, 1.0, 0.0] and 0.05 < found.loc["idle", "p_shift"] < 0.95
    assert found["by_family"].tolist() == ["shift", "shift", "discrimination", ""]
    pairs = classify_teams(one, ["shifts+shifts too", "shifts+separates", "shifts+idle"], found.reset_index())
    pairs = pairs.set_index("members")
    assert pairs["kind"].tolist()[:2] == ["intra", "inter"]
    assert pairs["p_inter"].tolist()[:2] == [0.0, 1.0]
    assert pairs.loc["shifts+idle", "p_inter"] == pytest.approx(1 - found.loc["idle", "p_shift"])
    assert pairs["kind_by_family"].tolist() == ["intra", "inter", ""]


# --- how good the prediction is ---------------------------------------------------------------------------


def test_agreement_is_that_of_other_libraries_and_its_interval_holds_it():
    one, teams = with_stack(0.5), list(combinations(["d0", "d1", "d2", "d3"], 2))
    margins = {
        name: one.margin_table.margins[:, place]
        for place, name in enumerate(one.margin_table.condition_names)
    }
    rng = np.random.default_rng(6)
    for team in teams:
        together = margins[team[0]] + margins[team[1]] - margins["none"]
        margins["+".join(team)] = together + rng.normal(0.3, 0.3, len(together))
    one = half(margins, one.margin_table.is_harmful)
    rows = evaluate_stacks(one, teams).assign(kind="intra", kind_by_family=["inter", *[""] * 5])
    clouds = {
        index: draw_ensemble(one, row["members"].split("+"), "stack", one) for index, row in rows.iterrows()
    }
    ends = [
        estimate_ensemble_intervals(one, row.to_dict(), one, clouds[index]) for index, row in rows.iterrows()
    ]
    rows = rows.join(pd.DataFrame(ends))
    found = summarize_prediction_fit(rows, clouds).set_index(["kind", "coordinate"])
    for name in ENSEMBLE_COORDINATES:
        hoped, came = rows[f"predicted_{name}"], rows[f"observed_{name}"]
        row = found.loc["all", name]
        assert row["r2"] == pytest.approx(r2_score(came, hoped)) and row["n"] == 6
        assert row["rank_correlation"] == pytest.approx(spearmanr(hoped, came).statistic)
        assert row["mean_interaction"] == pytest.approx((came - hoped).mean())
        for measure in ("r2", "rank_correlation"):
            assert row[f"{measure}_low"] <= row[measure] <= row[f"{measure}_high"]
    assert found.loc[("all", "shift"), "beyond_zero"] == 6  # 0.3 nats were planted
    assert found.loc[("all", "discrimination"), "beyond_zero"] <= 2
    assert found.loc[("intra", "shift")].equals(found.loc[("all", "shift")])
    assert found["n"].groupby("kind").first().to_dict() == {"all": 6, "intra": 6, "inter by family": 1}
    without = summarize_prediction_fit(rows, {})
    assert without.loc[without["n"] > 2, "r2"].notna().all() and "r2_low" not in without
    votes = evaluate_votes(one, teams, one).assign(kind="intra", kind_by_family="")
    told = summarize_prediction_fit(votes, {}).set_index(["how", "coordinate"]).index
    assert ("highest", "shift") in told and ("mean", "shift") not in told and ("mean", "delta_auroc") in told


def test_a_raise_of_the_distance_by_shift_alone_is_the_scale_and_by_ranking_it_is_real():
    rng = np.random.default_rng(7)
    is_harmful = np.arange(400) % 2 == 0
    # The introduction's example: AUROC stays, and the distance on the probability scale grows with a shift.
    base = rng.normal(np.where(is_harmful, -1.5, -3.5), 1.5)
    shifts = {"a": base + 0.5, "b": base + 0.6, "a+b": base + 1.1}
    better = {"c": base + 0.4, "d": base + 0.5, "c+d": base + 0.9 + 1.0 * is_harmful}
    one = half({"none": base, **shifts, **better}, is_harmful)
    rows = evaluate_stacks(one, [("a", "b"), ("c", "d"), ("a", "c")])
    found = find_raised_distances(one, rows, dict.fromkeys("abcd", 0.9), one).set_index("members")
    assert found["raise"].to_dict() == {"a+b": "probability scale", "c+d": "real"}
    assert found.loc["a+b", "distance"] > found.loc["a+b", ["distance_first", "distance_second"]].max()
    assert found.loc["a+b", "gain_auroc"] == pytest.approx(0, abs=1e-12)
    assert found.loc["c+d", "gain_auroc_low"] > 0.02
    assert list(find_raised_distances(one, rows, {"a": 0.9, "b": 0.4}, one)) == _RAISED_DISTANCE_COLUMNS


# --- fronts -------------------------------------------------------------------------------------------------


def test_nothing_on_the_front_is_beaten_and_all_else_is():
    goods = np.round(np.random.default_rng(8).random((300, 3)), 1)
    kept = find_undominated(goods)
    for point, on_front in zip(goods, kept, strict=True):
        beaten = ((goods >= point).all(1) & (goods > point).any(1)).any()
        assert on_front == (not beaten)


def candidates():
    """Return the candidates of two attacks on both splits."""
    found = []
    for number, (attack, split) in enumerate(
        (a, s) for a in ("direct", "base64") for s in ("calibration", "test")
    ):
        margins, is_harmful = planted(number)
        one = half(margins, is_harmful, attack, split)
        found += [
            evaluate_single_defenses(one, one.margin_table.condition_names),
            evaluate_votes(one, [("d0", "d3")], one),
        ]
    rows = pd.concat(found, ignore_index=True)
    return rows, build_candidates(rows, lambda asked: float(len(asked)))


def test_candidates_have_their_rates_under_all_attacks_and_benign_ones_as_users_ask():
    rows, found = candidates()
    row = found.set_index(["members", "how"]).loc["d0+d3", "highest"]
    here = rows[(rows["members"] == "d0+d3") & (rows["how"] == "highest")].set_index(["attack", "split"])
    of = here["observed_refusal_rate"]
    assert row["harmful_test"] == pytest.approx((of["direct", "test"] + of["base64", "test"]) / 2)
    assert row["attacked_calibration"] == of["base64", "calibration"]
    assert row["benign_test"] == 1 - here.loc[("direct", "test"), "observed_over_refusal_rate"]
    assert row["cost"] == 2 and found.set_index("members").loc["d1", "cost"] == 1
    assert len(found) == 5 + 4


def test_the_pick_surely_keeps_to_the_limits_on_the_calibration_split_and_refuses_most_harm():
    _, found = candidates()
    n = 60
    limit = float(1 - found["benign_calibration"].median())
    ranked = rank_candidates(found, limit, None, n)
    assert 0 < len(ranked) < len(found)
    # Nine in ten of the rates that a candidate may really have keep to the limit, by a simulation of them.
    draws = np.random.default_rng(0)
    for row in found.itertuples():
        refused = round((1 - row.benign_calibration) * n)
        rates = draws.beta(refused + 0.5, n - refused + 0.5, 20000)
        if abs((rates <= limit).mean() - 0.9) > 0.02:
            assert ((rates <= limit).mean() > 0.9) == (row.Index in ranked.index)
    assert ranked.iloc[0]["harmful_calibration"] == ranked["harmful_calibration"].max()
    assert set(rank_candidates(found, limit, 1.0, n)["cost"]) == {1.0}
    alone = choose_best_single(rank_candidates(found, 1.0, None, n), ["none"])
    assert alone is not None and alone["how"] == "alone"
    assert choose_best_single(ranked[ranked["how"] != "alone"]) is None
    assert rank_candidates(found, 0.0, None, n).empty and len(rank_candidates(found, 1.0, None, n)) == len(
        found
    )


def test_all_triples_of_fifteen_defenses_are_evaluated():
    """The time for thirty defenses is measured by `make bench`."""
    margins, is_harmful = planted(n=60, defenses=15)
    one = half(margins, is_harmful)
    teams = list(combinations([name for name in margins if name != "none"], 3))
    found = evaluate_votes(one, teams, one)
    assert len(found) == 455 * 5 and found["observed_shift"].notna().all()
