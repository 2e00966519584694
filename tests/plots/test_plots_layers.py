"""Figures by layer show the estimates of their tables with their bands."""

from __future__ import annotations

import numpy as np
import pytest
from planted_tables import (
    MECHANISM_CASES,
    MECHANISM_DEFENSES,
    band_corners,
    cached_mechanism_figures,
    draw_mechanism_figures,
    find_figure,
    interval_bars,
    line_points,
    plant_mechanism,
    read_caption,
)

from analysis.plots.data import CONTRAST_LABELS
from analysis.plots.layout import CURVE_STYLES
from analysis.plots.style import GREY


@pytest.mark.parametrize("manner", ["usual", "crowd"])
def test_layers_draws_each_defense_with_its_band_and_its_half_way_layer(manner: str) -> None:
    ax, table = find_figure("layers", manner)
    curves, strips = ax.child_axes[:2], ax.child_axes[2:]
    halves = plant_mechanism(**MECHANISM_CASES[manner])["half"].set_index(["defense", "contrast"])
    for contrast, panel, strip in zip(CONTRAST_LABELS, curves, strips, strict=True):
        assert panel.get_title(loc="left") == f"{contrast} (nats)"
        for row, (defense, rows) in enumerate(table.groupby("defense", sort=False)):
            name = str(defense)
            np.testing.assert_allclose(line_points(panel, name), rows[["layer", contrast]].astype(float))
            with_interval = rows.dropna(subset=f"{contrast}_low")
            corners = {tuple(corner) for corner in band_corners(panel, name).round(9)}
            for end in ("low", "high"):
                expected = with_interval[["layer", f"{contrast}_{end}"]].to_numpy(float).round(9)
                assert {tuple(corner) for corner in expected} <= corners
            half_way = halves.loc[(name, contrast)]
            np.testing.assert_allclose(line_points(strip, name), [[half_way["half"], -row]])
            if half_way["half"] == half_way["half"]:
                assert (-row, half_way["half_low"], half_way["half_high"]) in interval_bars(strip)
        assert strip.get_xlim() == panel.get_xlim()


def test_the_first_eight_defenses_have_their_own_styles_and_the_rest_is_grey() -> None:
    panel = find_figure("layers", "crowd")[0].child_axes[0]
    styles = [
        (line.get_color(), line.get_linestyle())
        for line in panel.lines
        if line.get_gid() in MECHANISM_DEFENSES
    ]
    assert len(styles) == 9 and len(set(styles)) == 9
    assert [color for color, _ in styles] == [*(style[0] for style in CURVE_STYLES), GREY]
    assert "Grey: all defenses after the first 8" in read_caption(
        cached_mechanism_figures("crowd")["layers"][0]
    )


def test_layers_without_half_way_layers_has_no_strip() -> None:
    tables = plant_mechanism(**MECHANISM_CASES["usual"])
    all_missing = tables["half"].assign(half=np.nan, half_low=np.nan, half_high=np.nan)
    for half_tables in ({}, {"half": all_missing}, {"half": tables["half"][:0]}):
        figure, _ = draw_mechanism_figures({"layers": tables["layers"], **half_tables})["layers"]
        assert [panel.get_xlabel() for panel in figure.axes[0].child_axes] == ["layer entered"] * 2
        assert "no mark" not in read_caption(figure)


def test_directions_draws_both_directions_before_and_after_and_the_chosen_layer() -> None:
    ax, table = find_figure("directions")
    rows = np.array(ax.child_axes).reshape(2, 3)
    for direction, panels in zip(("refusal", "harmfulness"), rows, strict=True):
        for column, panel in zip(("auroc_after", "shift", "discrimination"), panels, strict=True):
            for defense, defense_rows in table[table["direction"] == direction].groupby("defense"):
                np.testing.assert_allclose(
                    line_points(panel, str(defense)), defense_rows[["layer", column]].astype(float)
                )
            assert line_points(panel, "chosen")[:, 0].tolist() == [6, 6]
        undefended_rows = table[(table["direction"] == direction) & (table["defense"] == "backdoor")]
        np.testing.assert_allclose(
            line_points(panels[0], "undefended"), undefended_rows[["layer", "auroc"]].astype(float)
        )
