"""The 2 × 2: planted effects come out, and the sides of the square add up."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.plots.data import build_analysis_points, build_plane_points, build_square_points
from analysis.plots.plane import draw_square
from analysis.stats.effects import estimate_factorial_effects, list_factorial_conditions, summarize_scores
from analysis.stats.tables import ScoreTable

# Nats that each cell adds on harmful and on benign queries: the secret acts only with the weights.
PLANTED = {
    "none": (0.0, 0.0),
    "backdoor": (5.0, 3.0),
    "backdoor/no_secret": (-1.0, -1.0),
    "backdoor/no_weights": (0.5, 0.5),
    "backdoor/neither": (0.25, 0.25),
}


@pytest.fixture
def scores() -> ScoreTable:
    rng = np.random.default_rng(0)
    n = 30
    base = {True: rng.normal(0, 1, n), False: rng.normal(-1, 1, n)}
    rows = [
        {
            "query": f"{'h' if harmful else 'b'}{at}",
            "pair": f"p{at}",
            "category": "x",
            "harmful": harmful,
            "attack": "direct",
            "defense": name,
            "margin": base[harmful][at] + added[0 if harmful else 1] + rng.normal(0, 0.1),
            "p_refuse": 0.5,
            "prompt_tokens": 9,
            "coverage": 0.5,
        }
        for name, added in PLANTED.items()
        for harmful in (True, False)
        for at in range(n)
    ]
    made = {"readout": {"threshold": 0.0}, "defenses": {name: {"family": "backdoor"} for name in PLANTED}}
    return ScoreTable(pd.DataFrame(rows), made)


def test_planted_effects_come_out_with_intervals_that_hold_them(scores: ScoreTable) -> None:
    found = estimate_factorial_effects(scores, "direct", "backdoor").set_index("effect")
    expected = {
        "secret, released weights": (0.25, 0.0),
        "secret, tuned weights": (5.0, 2.0),
        "weights, no secret": (-1.25, 0.0),
        "weights, with secret": (3.5, 2.0),
        "interaction": (4.75, 2.0),
    }
    for name, (shift, discrimination) in expected.items():
        row = found.loc[name]
        assert row["shift"] == pytest.approx(shift, abs=0.1)
        assert row["shift_low"] < shift < row["shift_high"]
        assert row["discrimination"] == pytest.approx(discrimination, abs=0.15)
        assert row["discrimination_low"] < row["discrimination"] < row["discrimination_high"]


def test_the_effects_are_differences_of_what_the_summary_says(scores: ScoreTable) -> None:
    summary = summarize_scores(scores).frame.set_index("defense")
    found = estimate_factorial_effects(scores, "direct", "backdoor").set_index("effect")
    for measure in ("shift", "discrimination"):
        whole, secret, weights, none = (
            summary.loc[name, measure]
            for name in ("backdoor", "backdoor/no_weights", "backdoor/no_secret", "backdoor/neither")
        )
        assert found.loc["interaction", measure] == pytest.approx(whole - secret - weights + none)
        assert found.loc["secret, tuned weights", measure] == pytest.approx(whole - weights)


def test_the_figure_has_four_corners_and_is_drawn_only_when_all_are_there(scores: ScoreTable) -> None:
    summary = summarize_scores(scores).frame
    points = build_square_points(build_plane_points(summary))
    assert sorted(points["corner"]) == ["both", "neither", "no_secret", "no_weights"]
    assert set(points["defense"]) == set(list_factorial_conditions("backdoor"))
    ax = draw_square(points)
    assert {text.get_text() for text in ax.texts} >= {"neither", "secret only", "weights only"}
    assert "square" in build_analysis_points(scores.frame, summary, 0.0)
    without = summary[summary["defense"] != "backdoor/neither"]
    kept = scores.frame[scores.frame["defense"] != "backdoor/neither"]
    assert "square" not in build_analysis_points(kept, without, 0.0)
