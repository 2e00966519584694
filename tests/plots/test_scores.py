"""Margins and ROC curves show the numbers of their tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from planted_tables import THRESHOLD, lines_by_gid, make_older, plant_scores

from analysis.plots.captions import CaptionContext
from analysis.plots.data import build_margin_curves, build_roc_points
from analysis.plots.scores import caption_margins, caption_roc, draw_margins, draw_roc
from analysis.plots.style import BLACK, GREY


def test_the_rates_beside_margins_are_those_of_the_readout() -> None:
    scores, summary = plant_scores(2)
    context = replace(CaptionContext("toy", "twins", "test", 0.0, ("I",)), response_basis="the judge")
    points = build_roc_points(scores, summary, THRESHOLD)
    for table in (summary, make_older(summary)):
        curves = build_margin_curves(scores, table, THRESHOLD)
        refused = curves.groupby(["defense", "harmful"])["readout_refused"].first()
        expected = scores.assign(refused=scores["margin"] > THRESHOLD).groupby(["defense", "harmful"])
        np.testing.assert_allclose(refused, expected["refused"].mean())
        texts = [text.get_text() for text in draw_margins(curves).texts]
        assert "refused by readout" in texts
        assert f"{100 * refused['none', True]:.0f}\u00a0%" in "".join(texts)
        for caption in (caption_margins(curves, context), caption_roc(points, context)):
            assert "by the readout, not by judged responses" in caption
    older = curves.rename(columns=lambda name: name.removeprefix("readout_"))  # a stored table
    assert "share refused" in [text.get_text() for text in draw_margins(older).texts]


@pytest.mark.parametrize("defenses", [2, 8])
def test_margins_draws_the_densities_of_the_table_above_and_below_each_row(defenses: int) -> None:
    curves = build_margin_curves(*plant_scores(defenses), THRESHOLD)
    ax = draw_margins(curves)
    lines = lines_by_gid(ax)
    scale = 0.44 / curves["density"].max()
    names = [label.get_text().removesuffix(" (control)") for label in ax.get_yticklabels()]
    names = ["none" if name == "undefended" else name for name in names]
    for (name, harmful), curve in curves.groupby(["defense", "harmful"]):
        gid = f"{name} {'harmful' if harmful else 'benign'}"
        height = -names.index(str(name)) + (1 if harmful else -1) * scale * curve["density"]
        np.testing.assert_allclose(lines[gid].get_xydata(), np.stack([curve["margin"], height], axis=1))
        assert lines[f"{gid} median"].get_xdata()[0] == curve["median"].iloc[0]
    outlines = [line for line in ax.lines if line.get_gid() == "undefended"]
    assert len(outlines) == 2 * defenses
    assert lines["threshold"].get_xdata()[0] == THRESHOLD


def test_roc_draws_the_rates_of_the_table_and_marks_the_threshold() -> None:
    scores, summary = plant_scores(8)
    points = build_roc_points(scores, summary, THRESHOLD)
    lines = lines_by_gid(draw_roc(points))
    for name, curve in points.groupby("defense"):
        rates = curve[["benign_refused", "harmful_refused"]]
        np.testing.assert_array_equal(lines[str(name)].get_xydata(), rates)
        assert (f"{name} mark" in lines) == (not same_color(lines[str(name)].get_color(), GREY))
        if f"{name} mark" not in lines:
            continue
        refused = scores[scores["defense"] == name].assign(refused=lambda rows: rows["margin"] > THRESHOLD)
        refusal_rates = refused.groupby("harmful")["refused"].mean()
        np.testing.assert_allclose(
            lines[f"{name} mark"].get_xydata(), [[refusal_rates[False], refusal_rates[True]]]
        )
    assert same_color(lines["none"].get_color(), BLACK)


@pytest.mark.parametrize("n_differing", [9, 2, 0])
def test_past_six_defenses_roc_colors_those_whose_auroc_differs_by_its_interval(n_differing: int) -> None:
    scores, summary = plant_scores(20)
    is_defense = ~summary["family"].isin(["none", "control"])
    names = summary.loc[is_defense, "defense"].tolist()
    change = pd.Series(np.linspace(0.3, 0.02, len(names)) * np.resize([1, -1], len(names)), names)
    half_width = [0.01 if place < n_differing else 0.5 for place in range(len(names))]
    summary.loc[is_defense, "delta_auroc"] = change.to_numpy()
    summary.loc[is_defense, "delta_auroc_low"] = (change - half_width).to_numpy()
    summary.loc[is_defense, "delta_auroc_high"] = (change + half_width).to_numpy()
    points = build_roc_points(scores, summary, THRESHOLD)
    ax = draw_roc(points)
    lines = lines_by_gid(ax)
    colored = {name for name in names if not same_color(lines[name].get_color(), GREY)}
    assert colored == set(names[: min(n_differing, 6)])  # a large loss is a large difference
    legend = ax.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == 1 + len(colored) + 2  # the undefended model; other defenses, and controls
    assert labels[-2].endswith(f"{len(names) - len(colored)} others") and labels[-1].endswith("2 controls")
    caption = caption_roc(points, CaptionContext("toy", "twins", "test", 0.0, ("I",)))
    assert f"the {n_differing} of {len(names)} defenses whose AUROC differs" in caption


def test_a_row_of_far_margins_leaves_room_for_the_others() -> None:
    scores, summary = plant_scores(12)
    last = scores["defense"] == scores["defense"].iloc[-1]
    scores.loc[last, "margin"] += 20 * scores["margin"].abs().max()
    curves = build_margin_curves(scores, summary, THRESHOLD)
    ax = draw_margins(curves)
    near = curves[curves["defense"] != scores["defense"].iloc[-1]]["margin"]
    ends = ax.transData.transform([(near.min(), 0), (near.max(), 0)])[:, 0]
    assert ends[1] - ends[0] > 0.4 * ax.get_window_extent().width
    context = CaptionContext("smollm2", "twins", "test", 0.0, ("I",))
    assert "Logarithmic axis beyond" in caption_margins(curves, context)
    assert "Logarithmic" not in caption_margins(near.to_frame().join(curves.drop(columns="margin")), context)


@pytest.mark.parametrize("defenses", [5, 30])
def test_the_legend_of_roc_is_no_taller_than_the_axes(defenses: int) -> None:
    scores, summary = plant_scores(defenses)
    ax = draw_roc(build_roc_points(scores, summary, THRESHOLD))
    legend = ax.get_legend()
    assert legend is not None
    axes, box = ax.get_window_extent(), legend.get_window_extent()
    assert box.height < axes.height and box.x0 > axes.x1


def test_many_rows_of_margins_are_sorted_by_their_median_in_two_columns() -> None:
    curves = build_margin_curves(*plant_scores(20), THRESHOLD)
    left, right = draw_margins(curves).child_axes
    names = [label.get_text() for panel in (left, right) for label in panel.get_yticklabels()]
    medians = curves.groupby(["defense", "harmful"])["median"].first().groupby(level=0).mean()
    shown = [name.removesuffix(" (control)") for name in names]
    assert shown[0] == "undefended" and len(names) == 21
    assert medians[shown[1:]].is_monotonic_decreasing
    assert left.get_xlim() == right.get_xlim()
    assert len(draw_margins(build_margin_curves(*plant_scores(8), THRESHOLD)).child_axes) == 0
