"""The figures that compare models show the numbers of their tables, and every text can be read."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from conftest import assert_readable, draw_run_figures
from matplotlib.collections import PathCollection
from planted_tables import FAMILIES, RUN, collect_texts, lines_by_gid

from analysis.plots.models import (
    caption_model_effects,
    caption_model_order,
    draw_model_effects,
    draw_model_order,
    draw_model_planes,
)


def plant_effects(
    n_models: int = 3, n_defenses: int = 5, name: str = "model", unit: str = "points"
) -> pd.DataFrame:
    """Return effects of defenses on models, and their means; with three models or more also predictions."""
    rng, rows = np.random.default_rng(n_models), []
    for defense, model in itertools.product(range(n_defenses), (*range(n_models), None)):
        family = FAMILIES[defense % len(FAMILIES)]
        row = {"model": None if model is None else f"{name}-{model}", "attack": "direct"}
        row |= {"defense": f"{family}-{defense}", "family": family, "unit": unit}
        row |= {"n_harmful": 60, "n_benign": 240}
        for effect in ("shift", "discrimination"):
            value = rng.normal(4 * defense, 5)
            row |= {effect: value, f"{effect}_low": value - 6, f"{effect}_high": value + 7}
            if model is None and n_models > 2:
                row |= {f"{effect}_prediction_low": value - 9, f"{effect}_prediction_high": value + 9}
        rows.append(row)
    return pd.DataFrame(rows)


def plant_order(n_models: int = 3, name: str = "model") -> pd.DataFrame:
    """Return Kendall's τ of each pair of models, and of three or more the mean."""
    rng, rows = np.random.default_rng(n_models), []
    pairs = [(f"{name}-{a}", f"{name}-{b}") for a, b in itertools.combinations(range(n_models), 2)]
    for measure, (first, second) in itertools.product(
        ("response_shift", "response_discrimination"), [*pairs, *[("all pairs", None)][: n_models - 2]]
    ):
        tau = rng.uniform(-0.5, 0.8)
        row = {"attack": "direct", "first": first, "second": second, "measure": measure, "n_defenses": 9}
        rows.append(row | {"tau": tau, "tau_low": tau - 0.3, "tau_high": tau + 0.1})
    return pd.DataFrame(rows)


def test_each_panel_has_the_points_of_its_model() -> None:
    points = plant_effects()
    by_model = points.dropna(subset="model")
    panels = draw_model_planes(by_model).child_axes
    assert [panel.get_title(loc="left") for panel in panels] == ["model-0", "model-1", "model-2"]
    for panel, (_, rows) in zip(panels, by_model.groupby("model"), strict=True):
        drawn = np.concatenate([c.get_offsets() for c in panel.collections if isinstance(c, PathCollection)])
        expected = rows[["shift", "discrimination"]].to_numpy()
        np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(expected, axis=0))
    assert len({panel.get_xlim() for panel in panels}) == 1


def test_dots_bars_and_predictions_are_those_of_the_table() -> None:
    points = plant_effects()
    ax = draw_model_effects(points)
    for panel, effect in zip(ax.child_axes, ("shift", "discrimination"), strict=True):
        lines = lines_by_gid(panel)
        for model, rows in points.groupby(points["model"].fillna("mean over models")):
            np.testing.assert_allclose(lines[model].get_xdata(), rows[effect])
        bars = {tuple(path.vertices[:, 0].round(9)) for c in panel.collections for path in c.get_paths()}
        means = points[points["model"].isna()]
        for low, high in (("_low", "_high"), ("_prediction_low", "_prediction_high")):
            ends = means[[f"{effect}{low}", f"{effect}{high}"]].to_numpy().round(9)
            assert all(tuple(pair) in bars for pair in ends)
    # Of two models, the mean has no interval in the figure.
    two = draw_model_effects(plant_effects(2)).child_axes[0]
    assert not [line for line in two.collections if line.get_zorder() == 2.5 and line.get_paths()]


def test_each_pair_has_its_tau() -> None:
    points = plant_order()
    for panel, (_, rows) in zip(
        draw_model_order(points).child_axes, points.groupby("measure", sort=False), strict=True
    ):
        lines = lines_by_gid(panel)
        np.testing.assert_allclose(lines["pairs"].get_xdata(), rows["tau"][:3])
        np.testing.assert_allclose(lines["mean"].get_xdata(), rows["tau"][3:])
        assert panel.get_xlim() == (-1.05, 1.05)


@pytest.mark.parametrize(
    ("n_models", "n_defenses", "name"),
    [(2, 3, "model"), (4, 12, "a/model_with_a_very_long_name:aligned:int8"), (3, 5, "$x$_^{")],
)
def test_every_text_can_be_read(n_models: int, n_defenses: int, name: str) -> None:
    points = plant_effects(n_models, n_defenses, name)
    tables = {
        "models_plane": points.dropna(subset="model"),
        "models_effects": points,
        "models_order": plant_order(n_models, name),
    }
    for stem, (figure, _) in draw_run_figures(tables, RUN, (60, 240)).items():
        assert_readable(stem, figure, collect_texts)


def test_captions_say_what_is_drawn() -> None:
    caption = caption_model_effects(plant_effects(), RUN)
    assert "60 harmful and 240 benign queries" in caption and "prediction interval" in caption
    assert "Models: SmolLM2" in caption and "percentage points" in caption
    two = caption_model_effects(plant_effects(2, unit="SD"), RUN)
    assert "within-class SDs" in two and "prediction" not in two and "not drawn" in two
    order = plant_order()
    assert "order of 9 defenses" in caption_model_order(order, RUN)
    assert "Without a dot" not in caption_model_order(order, RUN)
    assert "Without a dot" in caption_model_order(order.assign(tau=np.nan), RUN)
