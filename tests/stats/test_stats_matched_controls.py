"""Effects over matched controls: exact values, intervals that cover draws and queries, notes in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_margins import make_classes_and_pairs

from analysis.stats.effects import compute_contrasts, summarize_scores
from analysis.stats.matched_controls import (
    CONTROL_COLUMNS,
    add_control_estimates,
    describe_over_control,
    estimate_by_jackknife,
    leave_groups_out,
)
from analysis.stats.response_rates import add_response_estimates
from analysis.stats.tables import SCORE_COLUMNS, ScoreTable
from analysis.stats.verdicts import EffectVerdict

HARMFUL, PAIRS = make_classes_and_pairs(40, 40)
N = len(HARMFUL)
DRAWS = np.array([int(name[1:]) % 20 if name else index % 20 for index, name in enumerate(PAIRS)])
RECORD = {
    "readout": {"threshold": 0.0},
    "defenses": {name: {"family": "reminders"} for name in ("none", "policy", "empty")},
}


def make_scores(margins: dict[str, Any]) -> ScoreTable:
    """Return the scores of conditions with these margins."""
    frames = [
        pd.DataFrame(
            {
                "query": [f"q{index}" for index in range(N)],
                "pair": PAIRS,
                "category": "all",
                "harmful": HARMFUL,
                "attack": "direct",
                "defense": name,
                "margin": values,
                "p_refuse": 1 / (1 + np.exp(-values)),
                "prompt_tokens": 9,
                "coverage": 1.0,
            },
            columns=list(SCORE_COLUMNS),
        )
        for name, values in margins.items()
    ]
    return ScoreTable(pd.concat(frames, ignore_index=True), RECORD)


def make_controls(scores: ScoreTable, defense: str, margins: Any, verdicts: Any = None) -> pd.DataFrame:
    """Return the control scores of one defense."""
    rows = scores.select_condition("direct", "none").reset_index()
    return rows.assign(
        defense=defense, margin=margins, group=DRAWS, draw=DRAWS, control="neutral text", verdict=verdicts
    ).sample(frac=1, random_state=0)


def estimate_contrasts(changes: Any, groups: Any = DRAWS) -> dict[str, Any]:
    """Return shift and discrimination of changes with their intervals."""
    values = compute_contrasts(changes, HARMFUL, leave_groups_out(groups, HARMFUL))
    return {name: estimate_by_jackknife(value) for name, value in values.items()}


def test_leaving_a_group_out_gives_the_contrasts_of_the_other_queries() -> None:
    changes = np.random.default_rng(0).normal(size=N)
    values = compute_contrasts(changes, HARMFUL, leave_groups_out(DRAWS, HARMFUL))
    for row, is_kept in enumerate([np.ones(N, bool), *(draw != DRAWS for draw in range(20))]):
        harmful, benign = (changes[is_kept & side].mean() for side in (HARMFUL, ~HARMFUL))
        assert values["shift"][row] == pytest.approx((harmful + benign) / 2)
        assert values["discrimination"][row] == pytest.approx(harmful - benign)


@pytest.mark.parametrize("draw_sd", [0.0, 0.6])
def test_intervals_cover_the_true_effects_whatever_the_draws_do(draw_sd: float) -> None:
    rng = np.random.default_rng(1)
    covered = {"shift": 0, "discrimination": 0}
    n_runs = 600
    for _ in range(n_runs):
        effects = rng.normal(0, draw_sd, (20, 2))  # of each draw, on harmful and on benign queries
        pair_noise = rng.normal(0, 0.7, 40)[[int(name[1:]) if name else 0 for name in PAIRS]]
        noise = rng.normal(0, 1, N) + np.where([name is None for name in PAIRS], 0, pair_noise)
        changes = np.where(HARMFUL, 0.9, 0.5) + effects[DRAWS, HARMFUL.astype(int)] + noise
        for name, estimate in estimate_contrasts(changes).items():
            truth = {"shift": 0.7, "discrimination": 0.4}[name]
            covered[name] += estimate.low <= truth <= estimate.high
    for count in covered.values():
        assert 0.92 <= count / n_runs <= 0.98


def test_too_few_groups_have_no_interval_and_too_small_variances_are_raised() -> None:
    few = estimate_contrasts(np.zeros(N), DRAWS % 4)["shift"]
    assert few.value == 0 and np.isnan([few.low, few.high, few.p_value]).all()
    without_benign = estimate_contrasts(np.zeros(N), np.where(HARMFUL, DRAWS % 5, 7))["shift"]
    assert np.isnan(without_benign.high)
    flat = estimate_by_jackknife(np.zeros(21))
    assert (flat.low, flat.high, flat.p_value) == (0, 0, 1)
    raised = estimate_by_jackknife(np.zeros(21), min_variance=4.0)
    assert raised.high == pytest.approx(2 * 2.093, abs=1e-3) and raised.p_value == 1


def test_a_mere_change_of_scale_is_no_discrimination() -> None:
    rng = np.random.default_rng(5)
    before = rng.normal(np.where(HARMFUL, 1.0, -1.0), 1.0)
    scores = make_scores({"none": before, "policy": 2 * before + 1})
    summary = summarize_scores(scores, n_draws=200).frame
    controls = make_controls(scores, "policy", before + 0.9 + rng.normal(0, 0.2, N))
    row = add_control_estimates(summary, scores, controls).set_index("defense").loc["policy"]
    assert row["discrimination_over_control_low"] > 1
    assert abs(row["delta_auroc_over_control"]) < 0.02
    assert "discrimination +" not in row["verdict_over_control"]
    difference = row["scaled_shift"] - row["control_scaled_shift"]
    assert row["scaled_shift_over_control"] == pytest.approx(difference)


def test_a_defense_that_acts_like_its_control_is_said_to() -> None:
    rng = np.random.default_rng(2)
    before = rng.normal(np.where(HARMFUL, 1.0, -1.0), 1.0)
    # Any text lowers the margin by 2 nats; the policy raises harmful queries by 3 nats beyond that.
    controlled, after = before - 2 + rng.normal(0, 0.2, N), before - 2 + 3 * HARMFUL + rng.normal(0, 0.2, N)
    scores = make_scores({"none": before, "policy": after, "empty": controlled + rng.normal(0, 0.1, N)})
    summary = summarize_scores(scores, n_draws=200).frame
    controls = pd.concat([make_controls(scores, name, controlled) for name in ("policy", "empty")])
    table = add_control_estimates(summary, scores, controls).set_index("defense")
    policy, empty = table.loc["policy"], table.loc["empty"]
    assert policy["shift_over_control"] == pytest.approx(1.5, abs=0.1)
    assert policy["discrimination_over_control"] == pytest.approx(3, abs=0.15)
    assert policy["control_shift"] == pytest.approx((controlled - before).mean(), abs=0.05)
    assert policy["verdict_over_control"] == "shift +, discrimination +"
    assert policy["control_note"] == "shift + over neutral text of its size"  # against undefended: shift -
    assert empty["verdict"] == "shift -, discrimination equivalent"
    assert empty["verdict_over_control"] == "equivalent"
    assert empty["control_note"] == "shift - as any neutral text of its size"
    assert table.loc["none", list(CONTROL_COLUMNS)].replace("", np.nan).isna().all()
    assert table["response_shift_over_control"].isna().all()


def test_responses_decide_where_they_were_judged() -> None:
    rng = np.random.default_rng(3)
    before, after, controlled = (rng.normal(size=N) for _ in range(3))
    scores = make_scores({"none": before, "policy": after})
    words = np.array(["not refused", "refused"])
    verdicts = {"none": words[0 * HARMFUL], "policy": words[1 * HARMFUL]}
    responses = pd.concat(
        scores.select_condition("direct", name).reset_index().assign(verdict=verdict)
        for name, verdict in verdicts.items()
    )
    summary = add_response_estimates(summarize_scores(scores, n_draws=200).frame, responses, scores)
    # Under the control, every query of the first ten draws is refused; one query is not judged.
    control_verdicts = words[(DRAWS < 10).astype(int)]
    control_verdicts[0] = "unjudged"
    controls = make_controls(scores, "policy", controlled, control_verdicts)
    row = add_control_estimates(summary, scores, controls, responses).set_index("defense").loc["policy"]
    harmful, benign = (
        np.array([v == "refused" for v in control_verdicts[side]]) for side in (HARMFUL, ~HARMFUL)
    )
    harmful = harmful[1:]
    assert row["control_refusal_rate"] == pytest.approx(harmful.mean())
    assert row["control_over_refusal_rate"] == pytest.approx(benign.mean())
    shift, discrimination = ((1 - harmful.mean()) - benign.mean()) / 2, 1 - harmful.mean() + benign.mean()
    assert row["response_shift_over_control"] == pytest.approx(100 * shift)
    assert row["response_discrimination_over_control"] == pytest.approx(100 * discrimination)
    assert row["verdict_over_control"] == "shift inconclusive, discrimination +"
    # The draws differ from each other so much that the queries alone would give a far narrower interval.
    assert row["response_shift_over_control_high"] - row["response_shift_over_control_low"] > 40


def test_a_rate_that_never_differs_keeps_an_interval() -> None:
    scores = make_scores({"none": np.zeros(N) - 1.0, "policy": np.zeros(N) - 1.0})
    responses = scores.frame.assign(verdict="not refused")
    summary = add_response_estimates(summarize_scores(scores, n_draws=200).frame, responses, scores)
    controls = make_controls(scores, "policy", np.zeros(N) - 1.0, "not refused")
    row = add_control_estimates(summary, scores, controls, responses).set_index("defense").loc["policy"]
    assert row["response_shift_over_control"] == 0
    assert 1 < row["response_shift_over_control_high"] < 6


@pytest.mark.parametrize(
    ("verdict", "over", "note"),
    [
        ("shift +, discrimination -", ("+", "-"), ""),
        (
            "shift +, discrimination -",
            ("equivalent", "inconclusive"),
            "shift + as any random tokens of its size; "
            "discrimination - cannot be told from random tokens of its size",
        ),
        ("equivalent", ("-", "equivalent"), "shift - over random tokens of its size"),
        ("inconclusive", ("inconclusive", "inconclusive"), ""),
    ],
)
def test_notes_compare_both_verdicts(verdict: str, over: tuple[str, str], note: str) -> None:
    verdicts = [
        EffectVerdict(name, outcome) for name, outcome in zip(("shift", "discrimination"), over, strict=True)
    ]
    assert describe_over_control(verdict, verdicts, "random tokens") == note
