"""The plane shows each defense at its shift and discrimination, by name or by number."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import assert_readable, draw_run_figures
from planted_tables import (
    RUN,
    SCALED,
    cached_score_figures,
    collect_texts,
    lines_by_gid,
    make_older,
    plant_scores,
    read_caption,
    scatter_collections,
    scatter_offsets,
)

from analysis.plots.captions import CaptionContext
from analysis.plots.data import (
    build_analysis_points,
    build_plane_points,
    build_refusal_points,
    build_square_points,
)
from analysis.plots.figures import draw_figure
from analysis.plots.labels import LabelPlacer
from analysis.plots.plane import caption_plane, caption_refusals, draw_plane, draw_refusals, draw_square
from analysis.stats.effects import list_factorial_conditions

ENDS = ("", "_low", "_high")


def list_segments(ax: Any) -> set[Any]:
    """Return both ends of each interval bar."""
    return {
        tuple(map(tuple, path.vertices)) for c in ax.collections for path in c.get_paths() if len(path) == 2
    }


def test_each_matched_control_is_drawn_with_a_line_to_its_defense() -> None:
    points = build_plane_points(plant_scores(4)[1])
    assert not [c for c in draw_plane(points).collections if str(c.get_gid()).startswith("control")]
    controls = points[[*SCALED]] - 0.5
    controls.iloc[-1] = np.nan  # a defense without a control
    points = points.assign(**{f"control_{name}": controls[name] for name in SCALED})
    drawn = {c.get_gid(): c for c in draw_plane(points).collections}
    np.testing.assert_allclose(drawn["controls"].get_offsets(), controls.dropna())
    ends = [path.vertices for path in drawn["control lines"].get_paths()]
    defenses = points[[*SCALED]][:-1]
    np.testing.assert_allclose(ends, np.stack([controls[:-1], defenses], axis=1).astype(float))


@pytest.mark.parametrize(("unit", "columns"), [("SD", SCALED), ("nats", ("shift", "discrimination"))])
def test_plane_puts_each_defense_at_its_estimates_with_both_intervals(
    unit: str, columns: tuple[str, str]
) -> None:
    points = build_plane_points(plant_scores(8)[1])
    ax = draw_plane(points, unit=unit)
    assert "none" not in set(points["defense"])
    for family, group in points.groupby("family"):
        np.testing.assert_allclose(scatter_offsets(ax)[str(family)], group[[*columns]])
    segments = list_segments(ax)
    for row in points.to_dict("records"):
        x, y = (row[name] for name in columns)
        assert ((row[f"{columns[0]}_low"], y), (row[f"{columns[0]}_high"], y)) in segments
        assert ((x, row[f"{columns[1]}_low"]), (x, row[f"{columns[1]}_high"])) in segments
    assert lines_by_gid(ax)["undefended"].get_xydata().tolist() == [[0, 0]]
    assert f"({unit})" in ax.get_xlabel() and f"({unit})" in ax.get_ylabel()
    caption = caption_plane(points, RUN, unit)
    assert ("within-class SDs" in caption) == (unit == "SD")


def test_legend_and_caption_give_the_abbreviations_of_the_papers_families() -> None:
    points = build_plane_points(plant_scores(8)[1]).iloc[:2].assign(family=["reminders", "steering"])
    legend = draw_plane(points).get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()][1:] == ["reminders (SR)", "steering"]
    context = CaptionContext("smollm2", "twins", "test", 0.0, ("I",))
    sentence = "In parentheses: abbreviations of families in Long et al. (2025)."
    assert sentence in caption_plane(points, context)
    assert sentence not in caption_plane(points.iloc[1:], context)


def test_the_plane_is_in_sds_unless_nats_are_wanted_or_the_run_is_older() -> None:
    scores, summary = plant_scores(2)
    points = {"plane": build_plane_points(summary)}
    run = {"n_harmful": 24, "n_benign": 24}
    assert draw_plane(points["plane"]).get_xlabel() == "shift: change of the midpoint (SD)"
    older = build_plane_points(make_older(summary))
    assert draw_plane(older).get_xlabel() == "shift (nats)"
    assert not any("scaled" in name for name in older)
    assert "within-class SDs" not in caption_plane(older, RUN)
    assert "refusals" not in build_analysis_points(scores, make_older(summary), 0.0)
    with pytest.raises(ValueError, match="no unit 'points' of the plane; it is drawn in SD or nats"):
        draw_plane(points["plane"], unit="points")
    record = {
        "model": {"name": "toy"},
        "data": {"name": "twins", "split": "test", **run},
        "readout": {"name": "words", "threshold": 0.0},
    }
    for unit in (None, "SD", "nats"):
        figure = draw_figure(points, record, "plane", unit)
        assert figure.axes[0].get_xlabel() == draw_plane(points["plane"], unit=unit or "SD").get_xlabel()
        assert ("within-class SDs" in read_caption(figure)) == (unit != "nats")
    with pytest.raises(ValueError, match="'square' has no choice of units"):
        draw_figure({"square": points["plane"]}, record, "square", "nats")


def test_refusals_puts_each_condition_at_its_judged_rates_and_draws_lines_of_equal_discrimination() -> None:
    summary = plant_scores(8)[1]
    points = build_refusal_points(summary)
    assert points["refusal_rate"].tolist() == summary["refusal_rate"].tolist()
    ax = draw_refusals(points)
    for family, group in points[points["defense"] != "none"].groupby("family"):
        rates = 100 * group[["over_refusal_rate", "refusal_rate"]]
        np.testing.assert_allclose(scatter_offsets(ax)[str(family)], rates)
    ends = np.array([np.ravel(segment) for segment in list_segments(ax)])
    for row in points.to_dict("records"):
        x, y = 100 * row["over_refusal_rate"], 100 * row["refusal_rate"]
        left, right, low, high = (
            100 * row[f"{name}{end}"] for name in ("over_refusal_rate", "refusal_rate") for end in ENDS[1:]
        )
        for bar in ([left, y, right, y], [x, low, x, high]):
            assert np.isclose(ends, bar).all(axis=1).any()
    undefended = points[points["defense"] == "none"].iloc[0]
    ring = lines_by_gid(ax)["undefended"].get_xydata()
    expected = [[100 * undefended["over_refusal_rate"], 100 * undefended["refusal_rate"]]]
    np.testing.assert_allclose(ring, expected)
    contours = [line.get_xydata() for line in ax.lines if line.get_gid() == "equal discrimination"]
    differences = [np.diff(contour).ravel() for contour in contours]
    assert len(contours) > 8 and all(np.ptp(pair) < 1e-9 for pair in differences)
    steps = np.array(sorted(pair[0] for pair in differences)) - np.diff(ring).item()
    np.testing.assert_allclose(np.diff(steps), 20)
    assert np.abs(steps).min() < 1e-9  # one of them goes through the ring
    assert ax.get_xlim() == ax.get_ylim() and ax.get_xlim()[0] <= 0 and ax.get_xlim()[1] >= 100


def test_the_caption_of_refusals_says_what_was_judged_and_whether_it_was_a_sample() -> None:
    summary = plant_scores(2)[1]
    context = replace(RUN, response_basis="first 24 tokens of the responses, judged by learned")
    caption = caption_refusals(build_refusal_points(summary), context)
    assert "by the first 24 tokens of the responses, judged by learned: 48 responses" in caption
    assert "prediction-powered" not in caption and "threshold" not in caption
    sample = build_refusal_points(summary.assign(n_responses=20))
    assert "20 responses per condition, completed by the margins" in caption_refusals(sample, context)


def test_a_condition_without_judged_responses_is_only_in_the_legend_of_refusals() -> None:
    summary = plant_scores(3)[1]
    rates = [f"{x}{end}" for x in ("refusal_rate", "over_refusal_rate") for end in ENDS]
    summary.loc[2, rates] = np.nan
    legend = draw_refusals(build_refusal_points(summary)).get_legend()
    assert legend is not None
    assert "no value: backdoor-1" in [text.get_text() for text in legend.get_texts()]
    assert not len(build_refusal_points(summary.assign(based_on="margins")))
    assert not len(build_refusal_points(summary.assign(**dict.fromkeys(rates, np.nan))))


@pytest.mark.parametrize("manner", ["same", "usual"])
def test_forty_conditions_in_a_corner_have_names_or_numbers_that_do_not_overlap(manner: str) -> None:
    summary = plant_scores(40, manner)[1]
    rates = [f"{x}{end}" for x in ("refusal_rate", "over_refusal_rate") for end in ENDS]
    summary.loc[1:, rates] = np.minimum(summary.loc[1:, rates] + 0.6, 1.0)
    (figure, table), *_ = draw_run_figures({"refusals": build_refusal_points(summary)}, RUN).values()
    assert_readable("refusals", figure, collect_texts, dpis=(100,))
    (ax,) = figure.axes
    legend = ax.get_legend()
    assert legend is not None
    key = [text.get_text() for text in legend.get_texts()]
    texts = [text.get_text().replace("\n", "") for text in ax.texts]
    for name in table.loc[table["defense"] != "none", "defense"]:
        numbers = [entry.partition("  ")[0] for entry in key if re.fullmatch(rf"\d+  {name}", entry)]
        assert name in texts or (len(numbers) == 1 and numbers[0] in texts), name


@pytest.mark.parametrize("manner", ["same", "usual"])
def test_every_point_of_a_crowded_plane_has_its_name_or_a_number_that_the_key_explains(manner: str) -> None:
    figure, table = cached_score_figures(20, manner)["plane"]
    (ax,) = figure.axes
    texts = [text.get_text().replace("\n", "") for text in ax.texts]
    numbers = sorted(int(text) for text in texts if text.isdigit())
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) < 20
    legend = ax.get_legend()
    assert legend is not None
    key_texts = [text.get_text() for text in legend.get_texts()]
    named = {name for name in table["defense"] if name in texts}
    explained = {name for name in table["defense"] if any(text.endswith(f"  {name}") for text in key_texts)}
    assert len(named) + len(numbers) == 20
    assert explained == set(table["defense"]) - named


def test_a_few_far_points_do_not_crowd_the_others_together() -> None:
    rows = []
    for number in range(12):
        row = {"attack": "direct", "defense": f"d{number}", "family": "noise", "n_harmful": 9, "n_benign": 9}
        shift = 20.0 if number == 0 else 0.05 * number
        for name, value in (("shift", shift), ("discrimination", -0.03 * number)):
            row |= {
                f"{name}{end}": value + offset for end, offset in (("", 0), ("_low", -0.1), ("_high", 0.1))
            }
        rows.append(row)
    points = pd.DataFrame(rows)
    ax = draw_plane(points)
    assert ax.get_xscale() == "symlog" and ax.get_xlim()[1] > 20
    x_pixels = ax.transData.transform(points[["shift", "discrimination"]].to_numpy(float))[1:, 0]
    # The crowd, which is 0.55 of 20 nats wide, takes more than a tenth of the axis.
    assert x_pixels.max() - x_pixels.min() > 0.1 * ax.get_window_extent().width
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.5", "1", "2", "5", "10", "20"]
    context = CaptionContext("smollm2", "twins", "test", 0.0, ("I",))
    assert "logarithmic beyond ±0.5" in caption_plane(points, context)
    assert draw_plane(points[1:]).get_xscale() == "linear"
    assert "logarithmic" not in caption_plane(points[1:], context)


def test_a_defense_contradicted_by_generated_text_is_hollow_on_the_plane() -> None:
    rows = []
    for name, trusted in (("first", "trusted"), ("second", "not trusted")):
        row = {"attack": "direct", "defense": name, "family": "noise", "trusted": trusted}
        row |= {f"{x}{end}": float(len(rows)) for x in ("shift", "discrimination") for end in ENDS}
        rows.append(row)
    collections = scatter_collections(draw_plane(pd.DataFrame(rows)))
    faces = {
        tuple(collection.get_offsets()[0]): tuple(collection.get_facecolor()[0]) for collection in collections
    }
    assert faces[1, 1] == (1, 1, 1, 1) != faces[0, 0]


def test_the_square_has_four_corners_and_is_drawn_only_if_all_four_were_run() -> None:
    conditions = list_factorial_conditions("backdoor")
    scores, summary = plant_scores(len(conditions))
    names = dict(zip(summary["defense"], ["none", *conditions], strict=True))
    scores, summary = scores.replace({"defense": names}), summary.replace({"defense": names})
    points = build_square_points(build_plane_points(summary))
    assert sorted(points["corner"]) == ["both", "neither", "no_secret", "no_weights"]
    assert set(points["defense"]) == set(conditions)
    ax = draw_square(points)
    assert {text.get_text() for text in ax.texts} >= {"neither", "secret only", "weights only"}
    corners = points.set_index("corner")[["shift", "discrimination"]].astype(float)
    for start, end in (("neither", "no_weights"), ("no_secret", "both"), ("neither", "no_secret")):
        side = ax.transData.transform(np.linspace(corners.loc[start], corners.loc[end], 50))
        assert not any(text.get_window_extent().count_contains(side) for text in ax.texts if text.get_text())
    assert "square" in build_analysis_points(scores, summary, 0.0)
    incomplete = summary[summary["defense"] != "backdoor/neither"]
    remaining = scores[scores["defense"] != "backdoor/neither"]
    assert "square" not in build_analysis_points(remaining, incomplete, 0.0)


def test_a_label_is_not_beside_another_point_and_its_line_crosses_none() -> None:
    point, other = (50.0, 50.0), (33.0, 45.0)
    x, y, _ = LabelPlacer([point, other], (0, 0, 100, 100), [], []).place(point, "1", reach=60) or (0, 0, 0)
    assert np.hypot(x, y) < np.hypot(point[0] + x - other[0], point[1] + y - other[1])
    # In a corridor, the place behind the other point at the right is nearer than the place at the left.
    walls = [(0, 57, 120, 120), (0, 0, 120, 43), (28, 43, 46, 48), (28, 52, 46, 57)]
    placer = LabelPlacer([point, (62.0, 50.0)], (0, 0, 120, 120), walls, [])
    x, _, gap = placer.place(point, "1", reach=60) or (0, 0, 0)
    assert x < 0 < gap
