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
from analysis.plots.data import build_plane_points
from analysis.plots.plane import caption_plane, draw_plane

TOY_RUN = CaptionContext("toy", "contrast", "test", 0.0, ("I",), ("Sure",))
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
    key = [text.get_text() for text in legend.get_texts()]
    named = {name for name in table["defense"] if name in texts}
    explained = {name for name in table["defense"] if any(text.endswith(f"  {name}") for text in key)}
    assert len(named) + len(numbers) == 20
    assert explained == set(table["defense"]) - named


def test_a_few_far_points_do_not_make_one_blot_of_the_others() -> None:
    rows = []
    for number in range(12):
        row = {"attack": "direct", "defense": f"d{number}", "family": "noise", "n_harmful": 9, "n_benign": 9}
        shift = 20.0 if number == 0 else 0.05 * number
        for name, value in (("shift", shift), ("discrimination", -0.03 * number)):
            row |= {f"{name}{end}": value + gap for end, gap in (("", 0), ("_low", -0.1), ("_high", 0.1))}
        rows.append(row)
    points = pd.DataFrame(rows)
    ax = draw_plane(points)
    assert ax.get_xscale() == "symlog" and ax.get_xlim()[1] > 20
    places = ax.transData.transform(points[["shift", "discrimination"]].to_numpy(float))[1:, 0]
    # The crowd, which is 0.55 of 20 nats wide, takes more than a tenth of the axis.
    assert places.max() - places.min() > 0.1 * ax.get_window_extent().width
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.5", "1", "2", "5", "10", "20"]
    context = CaptionContext("smollm2", "twins", "test", 0.0, ("I",))
    assert "logarithmic beyond ±0.5" in caption_plane(points, context)
    assert draw_plane(points[1:]).get_xscale() == "linear"
    assert "logarithmic" not in caption_plane(points[1:], context)


def test_a_defense_that_text_contradicts_is_hollow_on_the_plane() -> None:
    rows = []
    for name, trusted in (("one", "trusted"), ("two", "not trusted")):
        row = {"attack": "direct", "defense": name, "family": "noise", "trusted": trusted}
        row |= {f"{x}{end}": float(len(rows)) for x in ("shift", "discrimination") for end in ENDS}
        rows.append(row)
    points = scatter_collections(draw_plane(pd.DataFrame(rows)))
    faces = {tuple(one.get_offsets()[0]): tuple(one.get_facecolor()[0]) for one in points}
    assert faces[1, 1] == (1, 1, 1, 1) != faces[0, 0]
