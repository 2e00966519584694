"""Heat maps write and color what their tables hold."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import assert_readable, draw_run_figures
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import same_color
from planted_tables import (
    MECHANISM_DEFENSES,
    RUN,
    THRESHOLD,
    cached_ensemble_figures,
    collect_texts,
    find_figure,
    plant_attacked_scores,
    plant_ensembles,
    unwrap_text,
)

from analysis.plots.data import CONTRAST_LABELS, build_attack_cells, build_interaction_cells
from analysis.plots.heatmaps import draw_attack_grid, draw_interactions
from analysis.plots.style import FAMILY_STYLES


def cells_of(panel: Axes, rows: list[str], columns: list[str]) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Return text and color of each cell of a heat map; a cell without a text has None."""
    (mesh,) = (drawn for drawn in panel.collections if isinstance(drawn, QuadMesh))
    mesh.update_scalarmappable()
    colors = np.asarray(mesh.get_facecolors())[:, :3].reshape(len(rows), len(columns), 3)
    texts = {tuple(text.get_position()): text for text in panel.texts}
    return {
        (row, column): (texts.get((x + 0.5, y + 0.5)), colors[y, x])
        for (y, row), (x, column) in itertools.product(enumerate(rows), enumerate(columns))
    }


def row_names(panel: Axes) -> list[str]:
    shown = [label.get_text() for label in panel.get_yticklabels()]
    return [name.removesuffix(" (control)").replace("undefended", "none") for name in shown]


def grid_cells(ax: Axes, attacks: list[str]) -> dict[tuple[str, str, str], tuple[Any, Any]]:
    """Return text and color of each cell of the attack grid, by measure, defense and attack."""
    names = row_names(ax.child_axes[0])
    return {
        (measure, *place): found
        for measure, panel in zip(("margin", "refusal_rate", "over_refusal_rate"), ax.child_axes, strict=True)
        for place, found in cells_of(panel, names, attacks).items()
        if found[0] is not None
    }


def test_the_grid_writes_and_colors_what_its_table_says() -> None:
    attacks = ["direct", "base64"]
    scores, summary = plant_attacked_scores(3, attacks)
    untrusted = (summary["attack"] == "base64") & (summary["defense"] == "backdoor-1")
    summary = summary.assign(trusted=np.where(untrusted, "not trusted", ""))
    cells = build_attack_cells(scores, summary, THRESHOLD)
    drawn = grid_cells(draw_attack_grid(cells), attacks)
    assert len(drawn) == 3 * len(cells) == 24
    harmful = scores[scores["harmful"]].groupby(["attack", "defense"])["margin"].mean()
    for row in cells.to_dict("records"):
        place = row["defense"], row["attack"]
        assert row["margin"] == pytest.approx(harmful[row["attack"], row["defense"]] - THRESHOLD)
        written = drawn["margin", *place][0].get_text()
        assert written == f"{row['margin']:+.1f}".replace("-", "\N{MINUS SIGN}")
        for rate in ("refusal_rate", "over_refusal_rate"):
            assert float(drawn[rate, *place][0].get_text()) == pytest.approx(100 * row[rate], abs=0.51)
    for (measure, *place), (text, color) in drawn.items():
        if place == ["backdoor-1", "base64"]:
            assert (color == 1).all() and text.get_style() == "italic"
        elif measure == "margin" and text.get_text() != "+0.0":
            bluer = color[2] - color[0]
            assert bluer > 0 if text.get_text().startswith("+") else bluer < 0
    rates = [
        (color.sum(), int(text.get_text()))
        for (measure, defense, _), (text, color) in drawn.items()
        if measure == "refusal_rate" and "backdoor" not in defense
    ]
    darkest_first = [rate for _, rate in sorted(rates)]
    assert darkest_first == sorted(darkest_first, reverse=True) and darkest_first[0] > darkest_first[-1]


def test_the_grid_groups_families_after_the_undefended_and_marks_what_is_missing() -> None:
    scores, summary = plant_attacked_scores(9, ["direct", "base64"])
    lost = (summary["attack"] == "base64") & (summary["defense"] == "noise-3")
    cells = build_attack_cells(scores, summary[~lost], THRESHOLD)
    cells.loc[1, "margin"] = np.nan
    shuffled = cells.sample(frac=1, random_state=0)
    ax = draw_attack_grid(shuffled)
    found = [label.get_text() for label in ax.child_axes[0].get_yticklabels()]
    wanted = ["undefended", "reminders-0", "reminders-7", "backdoor-1", "backdoor-8", "refactoring-2"]
    assert found[0] == wanted[0] and found[-1] == "control-6 (control)"
    assert sorted(found[1:3]) == wanted[1:3] and sorted(found[3:5]) == wanted[3:5] and found[5] == wanted[5]
    drawn = grid_cells(ax, list(dict.fromkeys(shuffled["attack"])))
    assert ("margin", "noise-3", "base64") not in drawn and ("margin", "noise-3", "direct") in drawn
    assert drawn["margin", "reminders-0", "direct"][0].get_text() == "\N{EN DASH}"
    gaps = [line for line in ax.child_axes[0].lines if line.get_gid() == "gap"]
    assert len(gaps) == len({family for family in cells["family"]}) - 1


@pytest.mark.parametrize(
    ("defenses", "attacks", "manner"), [(1, 2, "long"), (8, 6, "usual"), (12, 8, "long"), (12, 8, "usual")]
)
def test_the_grid_can_be_read_at_any_size(defenses: int, attacks: int, manner: str) -> None:
    names = ["direct", *(f"attack_with_a_name_{number}+ignore" for number in range(1, attacks))]
    scores, summary = plant_attacked_scores(defenses, names, manner)
    summary.loc[0, "trusted"] = "not trusted"
    cells = build_attack_cells(scores, summary, THRESHOLD)
    figure, _ = draw_run_figures({"attacks": cells}, RUN)["attacks"]
    assert_readable("attacks", figure, collect_texts, dpis=(100,))
    assert figure.get_size_inches()[0] < 11, "a page takes it"
    caption = unwrap_text(figure.texts[1])
    for word in ("24 harmful", "24 benign", RUN.model, "twins, test split", "no judge", "95 %", "Hollow"):
        assert word in caption


def test_a_pair_has_its_number_and_color_on_both_sides_of_the_diagonal_and_others_are_grey() -> None:
    rows, _, families = plant_ensembles()
    cells = build_interaction_cells(rows, families)
    cells.loc[0, ["interaction_shift", "interaction_shift_low", "interaction_shift_high"]] = [0.1, -0.1, 0.4]
    ax = draw_interactions(cells)
    names = row_names(ax.child_axes[0])
    assert set(names) == {*cells["first"], *cells["second"]}
    weights = []
    for column, panel in zip(
        ("interaction_shift", "interaction_discrimination"), ax.child_axes[::2], strict=True
    ):
        digits = 2 if cells[column].abs().max() < 1 else 1
        columns = ["first", "second", column, f"{column}_low", f"{column}_high"]
        pairs = {frozenset(row[:2]): row[2:] for row in cells[columns].to_numpy()}
        for place, (text, color) in cells_of(panel, names, names).items():
            pair = frozenset(place)
            if len(pair) == 1:
                assert text is None  # the diagonal
            elif pair not in pairs:
                assert text is None and color[0] == color[1] == color[2] < 1
            else:
                value, low, high = pairs[pair]
                shown = text.get_text().replace("\N{MINUS SIGN}", "-")
                assert float(shown) == pytest.approx(value, abs=0.51 * 10**-digits)
                assert (text.get_weight() == "bold") == (low > 0 or high < 0)
                assert (color[2] > color[0]) == (value > 0)
                weights.append(text.get_weight())
    assert len(weights) == 4 * len(cells) and set(weights) == {"bold", "normal"}


def test_colors_are_symmetric_about_no_interaction_in_either_panel() -> None:
    cell = {"attack": "direct", "family_first": "noise", "family_second": "tuning"}
    values = {("a", "b"): (-2.0, 0.0), ("a", "c"): (2.0, 0.5), ("b", "c"): (1.0, -0.25)}
    cells = pd.DataFrame(
        [
            {**cell, "first": one, "second": two, "interaction_shift": x, "interaction_discrimination": y}
            for (one, two), (x, y) in values.items()
        ]
    )
    ax = draw_interactions(cells)
    names = row_names(ax.child_axes[0])
    shift, discrimination = (
        {place: color for place, (_, color) in cells_of(panel, names, names).items()}
        for panel in ax.child_axes[::2]
    )
    assert discrimination["a", "b"].min() > 0.99  # white
    away = {place: np.abs(1 - color).sum() for place, color in shift.items()}
    assert away["a", "c"] > away["b", "c"] > 0.2
    np.testing.assert_allclose(discrimination["a", "c"], shift["a", "c"])  # each its own scale
    scale = [label.get_text() for label in ax.child_axes[1].get_xticklabels()]
    assert scale == ["\N{MINUS SIGN}2.0 refuses less", "0", "refuses more +2.0"]
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["noise", "tuning"]  # all pairs were run


def test_families_stand_together_in_the_palettes_order_with_a_strip_of_their_color() -> None:
    figure, cells = cached_ensemble_figures("many")["interactions"]
    families = plant_ensembles("many")[2]
    ax = draw_interactions(cells.sample(frac=1, random_state=1))
    panels = ax.child_axes[::2]
    names = row_names(panels[0])
    assert set(names) == {*cells["first"], *cells["second"]} and len(names) > 12
    places = [list(FAMILY_STYLES).index(families[name]) for name in names]
    assert places == sorted(places)
    for panel in panels:
        strips = [box for box in panel.patches if box.get_gid() == "family"]
        assert len(strips) == 2 * len(names)
        for row, name in enumerate(names):
            (strip,) = (box for box in strips if box.get_x() < 0 and box.get_y() == row)
            assert same_color(strip.get_facecolor(), FAMILY_STYLES[families[name]][0])
    dots = [text for panel in panels for text in panel.texts if text.get_text() == "\N{BULLET}"]
    sure = sum(
        int(((cells[f"{name}_low"] > 0) | (cells[f"{name}_high"] < 0)).sum())
        for name in ("interaction_shift", "interaction_discrimination")
    )
    assert len(dots) == 2 * sure > 0
    assert "Dot: the 95" in unwrap_text(figure.texts[1])


def test_the_similarity_map_has_the_cosine_of_each_pair_on_both_sides() -> None:
    ax, table = find_figure("profiles")
    names = row_names(ax.child_axes[0])
    assert sorted(names) == sorted(MECHANISM_DEFENSES[:3])
    for contrast, panel in zip(CONTRAST_LABELS, ax.child_axes[:2], strict=True):
        (mesh,) = panel.collections
        assert (mesh.norm.vmin, mesh.norm.vmax) == (-1, 1)
        values = np.ma.filled(mesh.get_array(), np.nan).reshape(3, 3)
        assert np.isnan(np.diag(values)).all()
        drawn = cells_of(panel, names, names)
        for row in table[table["contrast"] == contrast].to_dict("records"):
            first, second = row["defense"], row["other"]
            for place in ((first, second), (second, first)):
                text, _ = drawn[place]
                assert values[names.index(place[0]), names.index(place[1])] == row["cosine"]
                shown = float(text.get_text().replace("\N{MINUS SIGN}", "-"))
                assert shown == pytest.approx(row["cosine"], abs=0.006)
                sure = row["cosine_low"] > 0 or row["cosine_high"] < 0
                assert (text.get_weight() == "bold") == sure
