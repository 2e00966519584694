"""Results by kind of benign query: each kind has its own rates, change and AUROC, as counted by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from analysis.stats.bootstrap import compute_wilson_intervals
from analysis.stats.effects import summarize_scores
from analysis.stats.kinds import summarize_kinds
from analysis.stats.prediction_powered import compute_paired_intervals
from analysis.stats.response_rates import summarize_responses
from analysis.stats.tables import ScoreTable

N = 40  # harmful queries, twins and plain queries each
MEANS = {  # nats: harmful, twin, plain
    "none": (1.0, 0.0, -2.0),
    "policy": (1.5, 1.0, -2.0),
}
# Judged refusals among the first 40 queries of each kind.
REFUSED = {("none", "twin"): 10, ("none", "plain"): 0, ("policy", "twin"): 30, ("policy", "plain"): 2}
SUFFIXES = ("", "_low", "_high")


def plant_kinds() -> tuple[ScoreTable, dict[str, str], pd.DataFrame]:
    """Return scores whose benign kinds change differently, the kind of each query, and judged responses."""
    kinds = np.repeat(["harmful", "twin", "plain"], N)
    queries = [f"q{number}" for number in range(3 * N)]
    pairs = [*[f"p{number}" for number in range(N)] * 2, *[None] * N]
    noise = np.random.default_rng(5).normal(size=3 * N)
    frames, responses = [], []
    for defense, means in MEANS.items():
        margins = np.repeat(means, N) + noise
        base = {"query": queries, "pair": pairs, "category": "any", "harmful": kinds == "harmful"}
        base |= {"attack": "direct", "defense": defense}
        scores = {"margin": margins, "p_refuse": expit(margins), "prompt_tokens": 9, "coverage": 0.5}
        frames.append(pd.DataFrame(base | scores))
        n_refused = np.array([REFUSED.get((defense, kind), N) for kind in kinds])
        verdicts = np.where(np.arange(3 * N) % N < n_refused, "refused", "not refused")
        responses.append(pd.DataFrame(base | {"verdict": verdicts}))
    record = {"readout": {"threshold": 0.0}, "defenses": {name: {"family": "x"} for name in MEANS}}
    scores = ScoreTable(pd.concat(frames, ignore_index=True), record)
    return scores, dict(zip(queries, kinds, strict=True)), pd.concat(responses, ignore_index=True)


def margins_of(scores: ScoreTable, kinds: dict[str, str], defense: str, kind: str) -> np.ndarray:
    """Return the margins of one kind under a defense."""
    frame = scores.frame
    return frame.loc[(frame["defense"] == defense) & (frame["query"].map(kinds) == kind), "margin"].to_numpy()


def test_a_row_for_each_condition_and_benign_kind() -> None:
    scores, kinds, responses = plant_kinds()
    table = summarize_kinds(scores, kinds, responses, n_draws=200)
    rows = [("none", "twin"), ("none", "plain"), ("policy", "twin"), ("policy", "plain")]
    assert list(table[["defense", "kind"]].itertuples(index=False, name=None)) == rows
    assert (table[["n", "n_harmful", "n_responses"]] == N).all(axis=None)
    assert set(table["attack"]) == {"direct"} and set(table["family"]) == {"x"}
    assert set(table["based_on"]) == {"responses"}


def test_rates_of_responses_are_counts_with_wilson_and_paired_intervals() -> None:
    scores, kinds, responses = plant_kinds()
    table = summarize_kinds(scores, kinds, responses, n_draws=200).set_index(["defense", "kind"])
    for key, count in REFUSED.items():
        ends = [end[0] for end in compute_wilson_intervals(np.array([count / N]), np.array([float(N)]))]
        values = [table.loc[key, f"over_refusal_rate{suffix}"] for suffix in SUFFIXES]
        assert values == pytest.approx([count / N, *ends])
    for kind, difference in (("twin", 0.5), ("plain", 0.05)):  # nothing changes from a refusal
        share = np.array([difference])
        ends = [100 * end[0] for end in compute_paired_intervals(share, share, np.array([float(N)]))]
        values = [table.loc[("policy", kind), f"over_refusal_change{suffix}"] for suffix in SUFFIXES]
        assert values == pytest.approx([100 * difference, *ends])
    changes = table.loc["none"].filter(regex="change|delta")
    assert changes.shape[1] == 12 and changes.isna().all(axis=None)


def test_margins_of_a_kind_are_compared_with_those_of_the_harmful_queries() -> None:
    scores, kinds, responses = plant_kinds()
    table = summarize_kinds(scores, kinds, responses).set_index(["defense", "kind"])
    aurocs = {}
    for defense, kind in table.index:
        harmful, benign = (margins_of(scores, kinds, defense, name) for name in ("harmful", kind))
        aurocs[defense, kind] = (harmful[:, None] > benign).mean()
        assert table.loc[(defense, kind), "auroc"] == pytest.approx(aurocs[defense, kind])
        rate = (benign > 0).mean()
        assert table.loc[(defense, kind), "readout_over_refusal_rate"] == pytest.approx(rate)
    twin, plain = table.loc[("policy", "twin")], table.loc[("policy", "plain")]
    assert twin["margin_change"] == pytest.approx(1) and plain["margin_change"] == pytest.approx(0)
    assert twin["delta_auroc"] == pytest.approx(aurocs["policy", "twin"] - aurocs["none", "twin"])
    before, after = (margins_of(scores, kinds, defense, "twin") for defense in MEANS)
    assert twin["readout_over_refusal_change"] == pytest.approx(
        100 * ((after > 0).mean() - (before > 0).mean())
    )
    # Harmful queries gain half a nat: less than the twins, and more than the plain queries.
    assert twin["delta_auroc_high"] < 0 < plain["delta_auroc"]
    assert twin["readout_over_refusal_change_low"] > 0
    for name in ("readout_over_refusal_rate", "readout_over_refusal_change", "auroc", "delta_auroc"):
        low, value, high = (table[f"{name}{suffix}"].dropna() for suffix in ("_low", "", "_high"))
        assert (low <= value).all() and (value < high).all(), name


def test_a_set_with_one_benign_kind_gives_the_numbers_of_the_summary() -> None:
    scores, kinds, responses = plant_kinds()
    one_kind = {query: "harmful" if kind == "harmful" else "mine" for query, kind in kinds.items()}
    table = summarize_kinds(scores, one_kind, responses).set_index("defense")
    summary = summarize_scores(scores).frame.set_index("defense")
    by_response = summarize_responses(responses, scores).set_index("defense")
    for suffix in SUFFIXES:
        for name, other in (("readout_over_refusal_rate", "over_refusal_rate"), ("auroc", "auroc")):
            pd.testing.assert_series_equal(
                table[f"{name}{suffix}"], summary[f"{other}{suffix}"], check_names=False
            )
        column = f"over_refusal_rate{suffix}"
        pd.testing.assert_series_equal(table[column], by_response[column])
        assert table.loc["policy", f"delta_auroc{suffix}"] == summary.loc["policy", f"delta_auroc{suffix}"]


def test_without_judged_responses_the_rates_are_those_of_the_readout() -> None:
    scores, kinds, responses = plant_kinds()
    table = summarize_kinds(scores, kinds, n_draws=200)
    assert set(table["based_on"]) == {"margins"} and (table["n_responses"] == 0).all()
    for name in ("over_refusal_rate", "over_refusal_change"):
        for suffix in SUFFIXES:
            expected = table[f"readout_{name}{suffix}"]
            pd.testing.assert_series_equal(table[f"{name}{suffix}"], expected, check_names=False)
    is_judged = (responses["defense"] == "none") & (responses["query"] != f"q{N}")  # a twin less
    partial = summarize_kinds(scores, kinds, responses[is_judged], n_draws=200).set_index("defense")
    assert list(partial.loc["none", "n_responses"]) == [N - 1, N]
    assert list(partial.loc["policy", "n_responses"]) == [0, 0]
    assert partial.loc["policy", "over_refusal_rate"].isna().all()
    assert partial.loc["policy", "margin_change"].notna().all()
