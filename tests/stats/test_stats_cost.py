"""Cost: ratios against the same query undefended, with intervals; and the clock's own table."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import make_toy_session

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.stats.cost import summarize_costs
from analysis.studies.cost import TIMING_COLUMNS, time_conditions
from defenses.catalog import get_defense

ASKED = sample_queries(load_queries("twins").queries, 4)


def planted(ratio: float, noise: float, n: int = 40, seed: int = 0) -> pd.DataFrame:
    """Measurements under which a defense takes `ratio` times as long, each with multiplicative noise."""
    rng = np.random.default_rng(seed)
    own = rng.uniform(0.1, 10, n)  # some queries are much longer than others
    frames = []
    for name, factor in (("none", 1.0), ("slow", ratio)):
        frame = pd.DataFrame({"query": [f"q{i}" for i in range(n)], "defense": name})
        frames.append(
            frame.assign(
                prompt_tokens=20 if name == "none" else 50,
                draft_tokens=0,
                calls=1 if name == "none" else 3,
                prefill_seconds=own * factor * np.exp(rng.normal(0, noise, n)),
                token_seconds=0.01,
                peak_bytes=0,
            )
        )
    return pd.concat(frames)


def test_a_planted_ratio_is_found_however_unlike_the_queries_are() -> None:
    found = summarize_costs(planted(2.5, 0.1)).set_index("defense")
    row = found.loc["slow"]
    assert row["prefill_ratio_low"] < 2.5 < row["prefill_ratio_high"]
    assert row["prefill_ratio_high"] - row["prefill_ratio_low"] < 0.3
    assert row["token_ratio"] == row["token_ratio_low"] == row["token_ratio_high"] == pytest.approx(1)
    assert (row["tokens_added"], row["calls"], row["n"]) == (30, 3, 40)
    assert np.isnan(row["peak_mib"]) and found.loc["none", "prefill_ratio"] == 1


def test_intervals_cover_the_planted_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    # 400 draws instead of 2,000 lower the coverage by .2 percentage points; its standard error is 1.5.
    monkeypatch.setattr("analysis.stats.cost.BOOTSTRAP_DRAWS", 400)
    inside = [
        row["prefill_ratio_low"] <= 1.5 <= row["prefill_ratio_high"]
        for seed in range(200)
        for row in summarize_costs(planted(1.5, 0.3, n=12, seed=seed)).to_dict("records")[1:]
    ]
    assert 0.91 <= np.mean(inside) <= 0.985


def test_each_query_is_timed_under_each_condition_and_leaves_the_model_as_it_was() -> None:
    bench, told = make_toy_session(), []
    before = {name: tensor.clone() for name, tensor in bench.loaded_model.model.state_dict().items()}
    every = {name: get_defense(name) for name in ("none", "policy", "paraphrase", "smooth_llm")}
    found = time_conditions(bench, every, ASKED, lambda: told.append(1))
    assert list(found.columns) == list(TIMING_COLUMNS) and len(found) == len(told) == 16
    assert (found[["prefill_seconds", "token_seconds"]] > 0).all(axis=None)
    calls = found.groupby("defense")["calls"].unique().map(list).to_dict()
    assert calls == {"none": [1], "policy": [1], "paraphrase": [2], "smooth_llm": [10]}
    drafted = found[found["draft_tokens"] > 0]
    assert set(drafted["defense"]) == {"paraphrase"} and len(drafted) == 4
    tokens = found.set_index(["query", "defense"])["prompt_tokens"]
    for query in ASKED:
        assert tokens[query.id, "none"] == len(bench.render_query(every["none"], query)[0].ids)
        assert tokens[query.id, "policy"] > tokens[query.id, "none"]
    assert all(
        (before[name] == tensor).all() for name, tensor in bench.loaded_model.model.state_dict().items()
    )
