"""Cost: ratios to the same query undefended, with intervals, are those that were planted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.stats.cost import summarize_costs


def plant_timings(ratio: float, noise: float, n: int = 40, seed: int = 0) -> pd.DataFrame:
    """Return timings under which a defense takes `ratio` times as long, each with multiplicative noise."""
    rng = np.random.default_rng(seed)
    query_seconds = rng.uniform(0.1, 10, n)  # some queries are much longer than others
    frames = []
    for name, factor in (("none", 1.0), ("slow", ratio)):
        frame = pd.DataFrame({"query": [f"q{i}" for i in range(n)], "defense": name})
        frames.append(
            frame.assign(
                prompt_tokens=20 if name == "none" else 50,
                draft_tokens=0,
                calls=1 if name == "none" else 3,
                prefill_seconds=query_seconds * factor * np.exp(rng.normal(0, noise, n)),
                token_seconds=0.01,
                peak_bytes=0,
            )
        )
    return pd.concat(frames)


def test_a_planted_ratio_is_estimated_however_different_the_queries_are() -> None:
    costs = summarize_costs(plant_timings(2.5, 0.1)).set_index("defense")
    row = costs.loc["slow"]
    assert row["prefill_ratio_low"] < 2.5 < row["prefill_ratio_high"]
    assert row["prefill_ratio_high"] - row["prefill_ratio_low"] < 0.3
    assert row["token_ratio"] == row["token_ratio_low"] == row["token_ratio_high"] == pytest.approx(1)
    assert (row["tokens_added"], row["calls"], row["n"]) == (30, 3, 40)
    assert np.isnan(row["peak_mib"]) and costs.loc["none", "prefill_ratio"] == 1


def test_intervals_cover_the_planted_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    # 400 draws instead of 2,000 lower the coverage by .2 percentage points; its standard error is 1.5.
    monkeypatch.setattr("analysis.stats.cost.BOOTSTRAP_DRAWS", 400)
    is_covered = [
        row["prefill_ratio_low"] <= 1.5 <= row["prefill_ratio_high"]
        for seed in range(200)
        for row in summarize_costs(plant_timings(1.5, 0.3, n=12, seed=seed)).to_dict("records")[1:]
    ]
    assert 0.91 <= np.mean(is_covered) <= 0.985
