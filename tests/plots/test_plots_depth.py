"""Figures of prefilled responses: each marker is its estimate, and every text can be read."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest
from conftest import assert_readable, draw_run_figures
from planted_tables import RUN, collect_texts, lines_by_gid

from analysis.plots.data import build_depth_points
from analysis.plots.depth import (
    caption_depth_effects,
    caption_depth_rates,
    draw_depth_effects,
    draw_depth_rates,
)

LENGTHS = (0, 1, 5, 20)


def plant_depth(n_defenses: int, name: str = "defense", attack: str = "direct") -> pd.DataFrame:
    """Return a table in which every estimate differs."""
    rows = []
    defenses = ["none", *(f"{name}-{number}" for number in range(n_defenses))]
    for place, (defense, prefix, tokens) in enumerate(
        itertools.product(defenses, ("complying", "refusing"), LENGTHS)
    ):
        row = {"attack": attack, "defense": defense, "prefix": prefix, "tokens": tokens}
        row |= {"n_harmful": 12, "n_benign": 48}
        rate = (place * 7 % 101) / 100
        values = {"refusal_rate": rate, "over_refusal_rate": 1 - rate}
        known = 1.0 if defense != "none" else float("nan")
        values |= {"response_shift": known * (100 * rate - 30)}
        values |= {"response_discrimination": known * (20 - 50 * rate)}
        for column, value in values.items():
            row |= {column: value, f"{column}_low": value - 0.05, f"{column}_high": value + 0.1}
        rows.append(row)
    return pd.DataFrame(rows)


def test_each_marker_is_the_effect_after_its_tokens() -> None:
    points = build_depth_points(plant_depth(3))["depth_effects"]
    ax = draw_depth_effects(points)
    panels = iter(ax.child_axes)
    for prefix in ("complying", "refusing"):
        for column in ("response_shift", "response_discrimination"):
            panel = next(panels)
            assert [label.get_text() for label in panel.get_xticklabels()] == list(map(str, LENGTHS))
            for number, defense in enumerate(("defense-0", "defense-1", "defense-2")):
                rows = points[(points["prefix"] == prefix) & (points["defense"] == defense)]
                x, y = lines_by_gid(panel)[defense].get_xydata().T
                assert y.tolist() == pytest.approx(rows[column].tolist())
                assert x.round().tolist() == [0, 1, 2, 3]
                assert (x - x.round()).tolist() == pytest.approx([0.25 * (number - 1)] * 4)
            bars = sum(len(part.get_segments()) for part in panel.collections)  # type: ignore[attr-defined]
            assert bars == 3 * len(LENGTHS)


def test_each_row_of_rates_is_a_condition_beside_the_undefended_model() -> None:
    points = build_depth_points(plant_depth(2))["depth_rates"]
    panels = iter(draw_depth_rates(points).child_axes)
    for condition in ("none", "defense-0", "defense-1"):
        for prefix in ("complying", "refusing"):
            panel = next(panels)
            rows = points[(points["prefix"] == prefix) & (points["defense"] == condition)]
            drawn = [line.get_ydata().tolist() for line in panel.lines if line.get_gid() == condition]
            expected = [(100 * rows[name]).tolist() for name in ("refusal_rate", "over_refusal_rate")]
            assert drawn == [pytest.approx(values) for values in expected]
            reference = points[(points["prefix"] == prefix) & (points["defense"] == "none")]
            dotted = [line.get_ydata().tolist() for line in panel.lines if line.get_gid() == "undefended"]
            names = () if condition == "none" else ("refusal_rate", "over_refusal_rate")
            assert dotted == [pytest.approx((100 * reference[name]).tolist()) for name in names]


@pytest.mark.parametrize(
    ("n_defenses", "name"), [(0, ""), (1, "a"), (9, "a_defense_with_a_very_long_name" * 3)]
)
def test_every_text_can_be_read(n_defenses: int, name: str) -> None:
    for stem, (figure, _) in draw_run_figures(build_depth_points(plant_depth(n_defenses, name)), RUN).items():
        assert_readable(stem, figure, collect_texts)


def test_captions_say_what_is_judged_and_there_is_a_figure_per_attack() -> None:
    points = build_depth_points(plant_depth(9))
    effects = caption_depth_effects(points["depth_effects"], RUN)
    rates = caption_depth_rates(points["depth_rates"], RUN)
    for caption in (effects, rates):
        assert "12 harmful and 48 benign queries, divided among the openers of each kind" in caption
        assert "Complying openers: the continuation alone is judged" in caption
        assert "Refusing openers: opener and continuation are judged together" in caption
    assert "Grey: all defenses after the first 8" in effects
    assert "Dotted: the undefended model" in rates and "Wilson" in rates
    undefended = plant_depth(0)
    assert list(build_depth_points(undefended)) == ["depth_rates"]
    both = pd.concat([plant_depth(1), plant_depth(1, attack="base64")])
    names = [
        f"{kind}-{attack}" for attack in ("direct", "base64") for kind in ("depth_effects", "depth_rates")
    ]
    assert list(build_depth_points(both)) == names
    with pytest.raises(ValueError, match="one figure shows one attack"):
        draw_depth_rates(both)
