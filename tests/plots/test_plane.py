"""The plane shows each defense at its shift and discrimination, by name or by number."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted_tables import (
    cached_score_figures,
    lines_by_gid,
    plant_scores,
    scatter_collections,
    scatter_offsets,
)

from analysis.plots.captions import CaptionContext
from analysis.plots.data import build_analysis_points, build_plane_points, build_square_points
from analysis.plots.labels import LabelPlacer
from analysis.plots.plane import caption_plane, draw_plane, draw_square
from analysis.stats.effects import list_factorial_conditions

ENDS = ("", "_low", "_high")


def test_plane_puts_each_defense_at_its_estimates_with_both_intervals() -> None:
    points = build_plane_points(plant_scores(8)[1])
    ax = draw_plane(points)
    assert "none" not in set(points["defense"])
    for family, group in points.groupby("family"):
        np.testing.assert_allclose(scatter_offsets(ax)[str(family)], group[["shift", "discrimination"]])
    segments = {
        tuple(map(tuple, path.vertices)) for c in ax.collections for path in c.get_paths() if len(path) == 2
    }
    for row in points.to_dict("records"):
        x, y = row["shift"], row["discrimination"]
        assert ((row["shift_low"], y), (row["shift_high"], y)) in segments
        assert ((x, row["discrimination_low"]), (x, row["discrimination_high"])) in segments
    assert lines_by_gid(ax)["undefended"].get_xydata().tolist() == [[0, 0]]


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
