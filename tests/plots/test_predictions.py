"""Predicted and observed effects of ensembles are drawn at the values of their table."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import same_color, to_rgba
from planted_tables import (
    cached_ensemble_figures,
    find_panels,
    plant_ensembles,
    read_caption,
    scatter_by_style,
)
from scipy.stats import spearmanr
from sklearn.metrics import r2_score

from analysis.plots.data import FORECAST_PANELS, MAX_SHAPED_VOTES
from analysis.plots.predictions import ENSEMBLE_STYLES, draw_forecast


@pytest.mark.parametrize("manner", ["usual", "pair", "votes", "attacked"])
def test_each_ensemble_is_drawn_where_it_was_predicted_and_observed(manner: str) -> None:
    points = cached_ensemble_figures(manner)["forecast"][1]
    rows = plant_ensembles(manner)[0]
    expected = rows[(rows["attack"] == "direct") & (rows["split"] == "test") & (rows["how"] != "alone")]
    assert len(points) == len(expected) > 0
    for panel, (name, (title, factor, _)) in zip(
        find_panels(draw_forecast(points)), FORECAST_PANELS.items(), strict=True
    ):
        assert panel.get_title(loc="left") == title
        offsets_by_style = scatter_by_style(panel)
        assert sum(map(len, offsets_by_style.values())) == len(expected)
        for (how, hollow), offsets in offsets_by_style.items():
            of_style = expected[(expected["how"] == how) & ((expected["kind"] == "inter") == hollow)]
            np.testing.assert_allclose(offsets, factor * of_style[[f"predicted_{name}", f"observed_{name}"]])
        (diagonal,) = (line for line in panel.lines if line.get_gid() == "diagonal")
        assert diagonal.get_slope() == 1  # type: ignore[attr-defined]
        assert panel.get_xlim() == panel.get_ylim()


def test_each_rule_has_its_color_and_stacks_lie_on_top() -> None:
    for panel in find_panels(draw_forecast(cached_ensemble_figures("usual")["forecast"][1])):
        for dots in panel.collections:
            if (how := str(dots.get_label())) in ENSEMBLE_STYLES:
                edge, fill = dots.get_edgecolor()[0], dots.get_facecolor()
                colors = [color for color in (edge, *fill) if not same_color(color[:3], "white")]
                assert colors and all(same_color(c[:3], to_rgba(ENSEMBLE_STYLES[how][0])[:3]) for c in colors)
                assert (dots.get_zorder() > 3) == (how == "stack")


def test_stacks_have_the_intervals_of_the_table_within_the_axes() -> None:
    points = cached_ensemble_figures("usual")["forecast"][1]
    points = points.assign(observed_shift_high=points["observed_shift_high"] + 9)  # beyond all points
    panel = find_panels(draw_forecast(points))[0]
    bars = {tuple(map(tuple, p.vertices)) for c in panel.collections for p in c.get_paths() if len(p) == 2}
    stacked = points[points["how"] == "stack"]
    assert len(stacked) == 11
    for x, low, high in stacked[["predicted_shift", "observed_shift_low", "observed_shift_high"]].to_numpy():
        assert ((x, low), (x, high)) in bars
        assert panel.get_ylim()[0] < low and high < panel.get_ylim()[1]


@pytest.mark.parametrize("manner", ["usual", "refusing"])
def test_the_measures_above_a_panel_are_those_of_its_points(manner: str) -> None:
    points = cached_ensemble_figures(manner)["forecast"][1]
    for panel, name in zip(find_panels(draw_forecast(points)), FORECAST_PANELS, strict=True):
        (text,) = (label.get_text() for label in panel.texts if label.get_gid() == "follows")
        lines = text.replace("\N{MINUS SIGN}", "-").split("\n")
        for line, word, group in zip(
            lines,
            ("stacks", "votes"),
            (points[points["how"] == "stack"], points[points["how"] != "stack"]),
            strict=True,
        ):
            predicted, observed = group[f"predicted_{name}"], group[f"observed_{name}"]
            if observed.nunique() == 1:
                expected = "R² \N{EN DASH}, ρ \N{EN DASH}"
            elif predicted.nunique() == 1:
                expected = f"R² {r2_score(observed, predicted):.2f}, ρ \N{EN DASH}"
            else:
                correlation = spearmanr(predicted, observed).statistic
                expected = f"R² {r2_score(observed, predicted):.2f}, ρ {correlation:.2f}"
            assert line == f"{len(group)} {word}: {expected}"


def test_two_points_have_no_measure_and_a_missing_point_is_not_counted() -> None:
    points = cached_ensemble_figures("usual")["forecast"][1]
    incomplete = points.assign(
        observed_delta_auroc=points["observed_delta_auroc"].where(points["how"] == "mean")
    )
    shift, _, auroc, *_ = find_panels(draw_forecast(incomplete))
    n_mean_votes = int((points["how"] == "mean").sum())
    assert sum(map(len, scatter_by_style(shift).values())) == len(points)
    assert sum(map(len, scatter_by_style(auroc).values())) == n_mean_votes
    assert [text.get_text().split(":")[0] for text in auroc.texts] == [f"{n_mean_votes} votes"]
    two_stacks = find_panels(draw_forecast(points[points["how"] == "stack"][:2]))[0]
    assert two_stacks.texts[0].get_text() == "2 stacks: R² \N{EN DASH}, ρ \N{EN DASH}"


@pytest.mark.sweep
def test_many_votes_are_all_drawn_as_small_dots_in_a_mixed_layer() -> None:
    figure, points = cached_ensemble_figures("many")["forecast"]
    n_votes = int((points["how"] != "stack").sum())
    assert n_votes > MAX_SHAPED_VOTES
    for panel, (name, (_, factor, _)) in zip(
        find_panels(figure.axes[0]), FORECAST_PANELS.items(), strict=True
    ):
        (dots,) = (c for c in panel.collections if c.get_label() == "votes")
        offsets, colors = np.asarray(dots.get_offsets()), dots.get_facecolor()
        assert len(offsets) == n_votes and dots.get_rasterized() and dots.get_sizes()[0] < 4
        for how in ("mean", "fitted"):
            of_rule = (colors[:, :3] == to_rgba(ENSEMBLE_STYLES[how][0])[:3]).all(axis=1)
            rows = points[points["how"] == how]
            expected = factor * rows[[f"predicted_{name}", f"observed_{name}"]].to_numpy(float)
            np.testing.assert_allclose(
                np.sort(offsets[of_rule], axis=0), np.sort(expected, axis=0), rtol=1e-6
            )
        color_changes = (colors[1:] != colors[:-1]).any(axis=1).mean()
        assert color_changes > 0.5
        assert sum(map(len, scatter_by_style(panel).values())) == len(points)
    assert "shown of stacks only" in read_caption(figure)
