"""Ensembles of planted margins have the effects, predictions and mechanisms that were planted."""

from itertools import combinations

import numpy as np
import pytest
from planted_margins import make_split_scores, plant_defense_margins, plant_stack

from analysis.stats.ensembles import (
    classify_mechanisms,
    classify_teams,
    evaluate_single_defenses,
    evaluate_stacks,
    evaluate_votes,
)
from analysis.stats.voting import VOTE_RULES


def test_votes_of_normal_margins_are_as_predicted_and_gain_less_if_their_members_err_together():
    rng, n = np.random.default_rng(4), 40000
    is_harmful = np.arange(n) % 2 == 0
    gains = {}
    for correlation in (0.0, 0.9):
        covariance = np.full((3, 3), correlation) + (1 - correlation) * np.eye(3)
        errors = rng.multivariate_normal([0] * 3, covariance, n)
        margins = {f"d{k}": errors[:, k] + 1.5 * is_harmful - 0.5 for k in range(3)}
        scores = make_split_scores({"none": errors[:, 0] + is_harmful, **margins}, is_harmful)
        votes = evaluate_votes(scores, [("d0", "d1", "d2")], scores).set_index("how")
        assert set(votes.index) == set(VOTE_RULES)
        for name, tolerance in (
            ("delta_auroc", 0.01),
            ("refusal_rate", 0.01),
            ("shift", 0.02),
            ("discrimination", 0.02),
        ):
            assert votes[f"interaction_{name}"].abs().max() < tolerance, name
        gains[correlation] = votes.loc["mean", "predicted_delta_auroc"]
    assert gains[0.0] > gains[0.9] + 0.05


def test_a_stack_is_predicted_by_adding_the_changes_of_its_members():
    scores = plant_stack(0.8)
    stacks = evaluate_stacks(scores, [("d0", "d1"), ("d0", "d2"), ("d0", "d1", "d2")], scores).set_index(
        "members"
    )
    assert stacks.loc["d0+d1", "interaction_shift"] == pytest.approx(0.4, abs=0.03)
    assert stacks.loc["d0+d1", "interaction_discrimination"] == pytest.approx(0.8, abs=0.05)
    assert stacks["observed_shift"].notna().to_dict() == {"d0+d1": True, "d0+d2": False, "d0+d1+d2": False}
    singles = evaluate_single_defenses(scores, ["d0", "d1", "d2"]).set_index("members")
    for name in ("shift", "discrimination"):
        total = singles[f"observed_{name}"].sum()
        assert stacks.loc["d0+d1+d2", f"predicted_{name}"] == pytest.approx(total, abs=1e-9)


def test_the_mechanism_is_the_larger_contrast_and_a_pair_of_both_is_inter():
    rng = np.random.default_rng(5)
    is_harmful = np.arange(200) % 2 == 0
    undefended = rng.normal(size=200)
    draw_noise = lambda: rng.normal(0, 0.3, 200)  # noqa: E731
    scores = make_split_scores(
        {
            "none": undefended,
            "shifts": undefended + 1 + draw_noise(),
            "shifts too": undefended - 2 + 0.3 * is_harmful + draw_noise(),
            "separates": undefended + np.where(is_harmful, 1, -1) + draw_noise(),
            "idle": undefended + draw_noise(),
        },
        is_harmful,
    )
    families = {"shifts": "reminders", "shifts too": "tuning", "separates": "refactoring", "idle": "noise"}
    mechanisms = classify_mechanisms(scores, families).set_index("defense")
    assert mechanisms["mechanism"].tolist()[:3] == ["shift", "shift", "discrimination"]
    assert mechanisms["p_shift"].tolist()[:3] == [1.0, 1.0, 0.0]
    assert 0.05 < mechanisms.loc["idle", "p_shift"] < 0.95
    assert mechanisms["by_family"].tolist() == ["shift", "shift", "discrimination", ""]
    teams = ["shifts+shifts too", "shifts+separates", "shifts+idle"]
    pairs = classify_teams(scores, teams, mechanisms.reset_index()).set_index("members")
    assert pairs["kind"].tolist()[:2] == ["intra", "inter"]
    assert pairs["p_inter"].tolist()[:2] == [0.0, 1.0]
    assert pairs.loc["shifts+idle", "p_inter"] == pytest.approx(1 - mechanisms.loc["idle", "p_shift"])
    assert pairs["kind_by_family"].tolist() == ["intra", "inter", ""]


def test_all_triples_of_fifteen_defenses_are_evaluated():
    """The time for thirty defenses is measured by `make bench`."""
    margins, is_harmful = plant_defense_margins(n=60, defenses=15)
    scores = make_split_scores(margins, is_harmful)
    teams = list(combinations([name for name in margins if name != "none"], 3))
    votes = evaluate_votes(scores, teams, scores)
    assert len(votes) == 455 * 5 and votes["observed_shift"].notna().all()
