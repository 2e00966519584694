"""The tables behind figures hold the planted numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted_tables import (
    MECHANISM_CASES,
    THRESHOLD,
    cached_mechanism_figures,
    draw_mechanism_figures,
    plant_ensembles,
    plant_mechanism,
    plant_scores,
)

from analysis.plots.data import build_interaction_cells, build_margin_curves, build_roc_points


def test_densities_integrate_to_one_and_medians_move_by_the_planted_shift() -> None:
    curves = build_margin_curves(*plant_scores(5), THRESHOLD)
    for _, curve in curves.groupby(["defense", "harmful"]):
        assert np.trapezoid(curve["density"], curve["margin"]) == pytest.approx(1, abs=0.01)
    median = curves.groupby(["defense", "harmful"])["median"].first()
    # defense 3 is planted with shift 3 and discrimination -0.5
    assert median["noise-3", True] - median["none", True] == pytest.approx(2.75)
    assert median["noise-3", False] - median["none", False] == pytest.approx(3.25)


def test_the_area_under_the_drawn_curve_is_the_auroc_also_with_ties() -> None:
    scores, summary = plant_scores(2)
    scores["margin"] = scores["margin"].round()  # many ties
    for name, curve in build_roc_points(scores, summary, THRESHOLD).groupby("defense"):
        ends = curve[["benign_refused", "harmful_refused"]].iloc[[0, -1]]
        assert ends.to_numpy().tolist() == [[0, 0], [1, 1]]
        rows = scores[scores["defense"] == name]
        harmful, benign = (rows.loc[rows["harmful"] == c, "margin"].to_numpy() for c in (True, False))
        wins = (harmful[:, None] > benign).mean() + (harmful[:, None] == benign).mean() / 2
        assert np.trapezoid(curve["harmful_refused"], curve["benign_refused"]) == pytest.approx(wins)


def test_cells_are_those_of_stacks_of_two_and_names_may_contain_a_slash() -> None:
    rows, _, families = plant_ensembles()
    cells = build_interaction_cells(rows, families)
    assert len(cells) == 11
    pairs = [["a/b", "c"], ["c", "d"]]
    row = rows[(rows["how"] == "stack") & (rows["split"] == "test")].iloc[0]
    with_slash = pd.DataFrame([{**row, "members": "+".join(pair)} for pair in pairs])
    excluded = pd.DataFrame([{**row, "members": "a+b+c", "size": 3}, {**row, "observed_shift": np.nan}])
    selected = build_interaction_cells(pd.concat([with_slash, excluded]), {"a/b": "noise"})
    assert selected[["first", "second"]].to_numpy().tolist() == pairs
    assert selected["family_first"].tolist() == ["noise", "other"]
    without_intervals = build_interaction_cells(
        with_slash.drop(columns=[c for c in with_slash if c[-4:] in ("_low", "high")]), {}
    )
    assert (
        without_intervals["interaction_shift_low"].isna().all()
        and without_intervals["interaction_shift"].notna().all()
    )


def test_names_with_the_same_stem_have_a_figure_each() -> None:
    weights = plant_mechanism(**MECHANISM_CASES["tiny"])["weights"]
    same_stem = pd.concat([weights.assign(defense=name) for name in ("a/b", "a b", "a-b")])
    figures = draw_mechanism_figures({"weights": same_stem})
    assert {stem: table["defense"].iloc[0] for stem, (_, table) in figures.items()} == {
        "weights-a-b": "a/b",
        "weights-a-b~2": "a b",
        "weights-a-b~3": "a-b",
    }
    assert all(len(stem) < 200 for stem in cached_mechanism_figures("long"))
