"""The 2 × 2 design: effects are estimated as planted, and equal differences of the summary."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.stats.effects import estimate_factorial_effects, summarize_scores
from analysis.stats.tables import ScoreTable

# Nats that each condition adds on harmful and on benign queries: the secret acts only with the weights.
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
    undefended = {True: rng.normal(0, 1, n), False: rng.normal(-1, 1, n)}
    rows = [
        {
            "query": f"{'h' if harmful else 'b'}{index}",
            "pair": f"p{index}",
            "category": "x",
            "harmful": harmful,
            "attack": "direct",
            "defense": name,
            "margin": undefended[harmful][index] + effect[0 if harmful else 1] + rng.normal(0, 0.1),
            "p_refuse": 0.5,
            "prompt_tokens": 9,
            "coverage": 0.5,
        }
        for name, effect in PLANTED.items()
        for harmful in (True, False)
        for index in range(n)
    ]
    record = {"readout": {"threshold": 0.0}, "defenses": {name: {"family": "backdoor"} for name in PLANTED}}
    return ScoreTable(pd.DataFrame(rows), record)


def test_planted_effects_are_estimated_with_intervals_that_contain_them(scores: ScoreTable) -> None:
    effects = estimate_factorial_effects(scores, "direct", "backdoor").set_index("effect")
    expected = {
        "secret, released weights": (0.25, 0.0),
        "secret, tuned weights": (5.0, 2.0),
        "weights, no secret": (-1.25, 0.0),
        "weights, with secret": (3.5, 2.0),
        "interaction": (4.75, 2.0),
    }
    for name, (shift, discrimination) in expected.items():
        row = effects.loc[name]
        assert row["shift"] == pytest.approx(shift, abs=0.1)
        assert row["shift_low"] < shift < row["shift_high"]
        assert row["discrimination"] == pytest.approx(discrimination, abs=0.15)
        assert row["discrimination_low"] < row["discrimination"] < row["discrimination_high"]


def test_the_effects_are_differences_of_the_summary(scores: ScoreTable) -> None:
    summary = summarize_scores(scores).frame.set_index("defense")
    effects = estimate_factorial_effects(scores, "direct", "backdoor").set_index("effect")
    for measure in ("shift", "discrimination"):
        whole, secret, weights, none = (
            summary.loc[name, measure]
            for name in ("backdoor", "backdoor/no_weights", "backdoor/no_secret", "backdoor/neither")
        )
        assert effects.loc["interaction", measure] == pytest.approx(whole - secret - weights + none)
        assert effects.loc["secret, tuned weights", measure] == pytest.approx(whole - weights)
