"""Effects over models: means of the summaries, and whether findings hold, in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.comparison.effects import (
    build_effect_points,
    choose_effect_unit,
    classify_outcomes,
    describe_findings,
    pool_effects,
)
from analysis.comparison.random_effects import fit_random_effects
from analysis.plots.data import build_model_points
from analysis.stats.bootstrap import NORMAL_QUANTILE

MODELS = ("a", "b", "c")
VERDICTS = {
    "policy": ("shift +", "shift +", "shift +"),
    "reminder": ("shift +", "shift -", "shift equivalent"),
    "word_drop": ("shift -", "shift equivalent", "shift inconclusive"),
    "paraphrase": ("equivalent", "equivalent", "equivalent"),
    "secret": ("inconclusive", "inconclusive", "inconclusive"),
    "random_tokens": ("shift +", "shift +", "shift +"),
}


def plant_summary(judged: bool = True, models: tuple[str, ...] = MODELS) -> pd.DataFrame:
    """Return the summary of several models; the effects of a defense differ by 10 points or 1 SD."""
    rows = []
    for (number, model), defense in ((m, d) for m in enumerate(models) for d in ("none", *VERDICTS)):
        verdict = "reference" if defense == "none" else VERDICTS[defense][number]
        if " " in verdict:
            verdict += ", discrimination inconclusive"
        row: dict[str, Any] = {"model": model, "attack": "direct", "defense": defense, "verdict": verdict}
        row |= {"family": "control" if defense == "random_tokens" else "own", "n_harmful": 9, "n_benign": 8}
        row |= {"based_on": "responses" if judged else "margins"}
        columns = {"scaled_shift": number + 1.0, "scaled_discrimination": -number - 1.0}
        if judged:
            row["n_responses"] = 17
            columns |= {"response_shift": 10.0 * number, "response_discrimination": 5.0}
        for name, value in columns.items():
            width = 1.0 + number
            row |= {name: value, f"{name}_low": value - width, f"{name}_high": value + width}
        rows.append(row)
    return pd.DataFrame(rows)


def test_means_over_models_are_the_random_effects_of_the_summaries() -> None:
    pooled = pool_effects(plant_summary())
    row = pooled.set_index(["defense", "effect", "unit"]).loc[("policy", "shift", "points")]
    variances = (np.array([1.0, 2.0, 3.0]) / NORMAL_QUANTILE) ** 2
    fitted = fit_random_effects(np.array([0.0, 10.0, 20.0]), variances)
    for name, value in vars(fitted).items():
        assert row[name] == pytest.approx(value), name
    assert row["n_models"] == 3 and len(pooled) == 6 * 4 and "none" not in set(pooled["defense"])


def test_a_model_without_an_effect_is_left_out_and_points_stay_possible() -> None:
    summary = plant_summary()
    missing = (summary["model"] == "a") & (summary["defense"] == "policy")
    summary.loc[missing, ["response_shift", "response_shift_low", "response_shift_high"]] = np.nan
    pooled = pool_effects(summary).set_index(["defense", "effect", "unit"])
    row = pooled.loc[("policy", "shift", "points")]
    assert row["n_models"] == 2 and np.isnan(row["prediction_low"])
    fitted = fit_random_effects(np.array([10.0, 20.0]), (np.array([2.0, 3.0]) / NORMAL_QUANTILE) ** 2)
    assert row["mean"] == pytest.approx(fitted.mean) and row["mean_low"] == pytest.approx(fitted.mean_low)
    # Student's t with one degree of freedom reaches beyond what rates can change by; the table does not.
    wide = summary.assign(response_shift_high=summary["response_shift_high"] + 80)
    wide_row = pool_effects(wide).set_index(["defense", "effect", "unit"]).loc[("policy", "shift", "points")]
    assert (wide_row["mean_low"], wide_row["mean_high"]) == (-100, 100)


def test_findings_are_told_in_one_sentence_each() -> None:
    summary = plant_summary()
    findings = describe_findings(summary, pool_effects(summary)).set_index("defense")
    assert list(findings.index) == ["policy", "reminder", "word_drop", "paraphrase", "secret"]
    assert dict(findings["shift"]) == {
        **{"policy": "holds", "reminder": "opposite signs", "word_drop": "some models"},
        **{"paraphrase": "equivalent", "secret": "shown on none"},
    }
    texts = findings["finding"]
    assert texts["policy"].startswith(
        "policy: its shift toward refusal is shown on all 3 models (prediction for another model: +10 ["
    )
    assert "opposite signs (+ on a; - on b; equivalent on c)" in texts["reminder"]
    assert "shift away from refusal depends on the model (- on a; equivalent on b" in texts["word_drop"]
    assert "its shift is equivalent to none on all 3 models" in texts["paraphrase"]
    assert "no shift is shown (inconclusive on all 3 models)" in texts["secret"]
    two = plant_summary(models=("a", "b"))
    text = describe_findings(two, pool_effects(two)).set_index("defense")["finding"]["policy"]
    assert text == (
        "policy: its shift toward refusal is shown on both models; no change of the separation is shown "
        "(inconclusive on both models)."
    )


def test_a_finding_that_some_models_leave_open_does_not_hold() -> None:
    assert classify_outcomes(["+", "+", "inconclusive"]) == "shown on some"
    assert classify_outcomes(["+", "+", "not judged"]) == "shown on some"
    assert classify_outcomes(["-", "-"]) == "holds"
    assert classify_outcomes(["equivalent", "inconclusive"]) == "shown on none"


def test_figures_draw_points_where_responses_were_judged_and_sds_elsewhere() -> None:
    order = pd.DataFrame(
        {
            "attack": "direct",
            "first": "a",
            "second": "b",
            "measure": ["shift", "response_shift", "response_discrimination", "delta_auroc"],
            "tau": 0.5,
        }
    )
    for judged, unit, n_measures in ((True, "points", 2), (False, "SD", 1)):
        summary = plant_summary(judged)
        assert choose_effect_unit(summary) == unit
        points = build_effect_points(summary, pool_effects(summary))
        tables = build_model_points(points, order)
        assert set(points["unit"]) == {unit} and "random_tokens" not in set(points["defense"])
        assert len(tables["models_plane"]) == 15 and len(tables["models_effects"]) == 20
        assert len(tables["models_order"]) == n_measures
        mean = points[points["model"].isna()].set_index("defense").loc["policy"]
        pooled = pool_effects(summary).set_index(["defense", "effect", "unit"])
        assert mean["shift"] == pooled.loc[("policy", "shift", unit), "mean"]
