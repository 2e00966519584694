"""Heat maps show the numbers of their tables as text and color."""

from __future__ import annotations

import itertools
from dataclasses import replace
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
    read_caption,
)

from analysis.plots.data import CONTRAST_LABELS, build_attack_cells, build_interaction_cells
from analysis.plots.heatmaps import caption_attack_grid, draw_attack_grid, draw_interactions
from analysis.plots.style import FAMILY_STYLES


def read_cells(panel: Axes, rows: list[str], columns: list[str]) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Return text and color of each cell of a heat map; a cell without a text has None."""
    (mesh,) = (collection for collection in panel.collections if isinstance(collection, QuadMesh))
    mesh.update_scalarmappable()
    colors = np.asarray(mesh.get_facecolors())[:, :3].reshape(len(rows), len(columns), 3)
    texts = {tuple(text.get_position()): text for text in panel.texts}
    return {
        (row, column): (texts.get((x + 0.5, y + 0.5)), colors[y, x])
        for (y, row), (x, column) in itertools.product(enumerate(rows), enumerate(columns))
    }


def read_row_names(panel: Axes) -> list[str]:
    labels = [label.get_text() for label in panel.get_yticklabels()]
    return [name.removesuffix(" (control)").replace("undefended", "none") for name in labels]


def read_grid_cells(ax: Axes, attacks: list[str]) -> dict[tuple[str, str, str], tuple[Any, Any]]:
    """Return text and color of each cell of the attack grid, by measure, defense and attack."""
    names = read_row_names(ax.child_axes[0])
    return {
        (measure, *condition): cell
        for measure, panel in zip(("margin", "refusal_rate", "over_refusal_rate"), ax.child_axes, strict=True)
        for condition, cell in read_cells(panel, names, attacks).items()
        if cell[0] is not None
    }


@pytest.mark.parametrize("based_on", ["responses", "margins"])
def test_the_grid_shows_the_numbers_of_its_table_as_text_and_color(based_on: str) -> None:
    attacks = ["direct", "base64"]
    scores, summary = plant_attacked_scores(3, attacks)
    untrusted = (summary["attack"] == "base64") & (summary["defense"] == "backdoor-1")
    summary = summary.assign(trusted=np.where(untrusted, "not trusted", ""), based_on=based_on)
    cells = build_attack_cells(scores, summary, THRESHOLD)
    drawn = read_grid_cells(draw_attack_grid(cells), attacks)
    assert len(drawn) == 3 * len(cells) == 24
    harmful = scores[scores["harmful"]].groupby(["attack", "defense"])["margin"].mean()
    for row in cells.to_dict("records"):
        condition = row["defense"], row["attack"]
        assert row["margin"] == pytest.approx(harmful[row["attack"], row["defense"]] - THRESHOLD)
        margin_text = drawn["margin", *condition][0].get_text()
        assert margin_text == f"{row['margin']:+.1f}".replace("-", "\N{MINUS SIGN}")
        for rate in ("refusal_rate", "over_refusal_rate"):
            assert float(drawn[rate, *condition][0].get_text()) == pytest.approx(100 * row[rate], abs=0.51)
    for (measure, *condition), (text, color) in drawn.items():
        # Rates of judged responses need no trust in the readout.
        if condition == ["backdoor-1", "base64"] and (measure == "margin" or based_on == "margins"):
            assert (color == 1).all() and text.get_style() == "italic"
        elif measure == "margin" and text.get_text() != "+0.0":
            blueness = color[2] - color[0]
            assert blueness > 0 if text.get_text().startswith("+") else blueness < 0
    rates = [
        (color.sum(), int(text.get_text()))
        for (measure, defense, _), (text, color) in drawn.items()
        if measure == "refusal_rate" and "backdoor" not in defense
    ]
    darkest_first = [rate for _, rate in sorted(rates)]
    assert darkest_first == sorted(darkest_first, reverse=True) and darkest_first[0] > darkest_first[-1]


def test_the_grid_groups_families_after_the_undefended_model_and_marks_missing_values() -> None:
    scores, summary = plant_attacked_scores(9, ["direct", "base64"])
    missing = (summary["attack"] == "base64") & (summary["defense"] == "noise-3")
    cells = build_attack_cells(scores, summary[~missing], THRESHOLD)
    cells.loc[1, "margin"] = np.nan
    shuffled = cells.sample(frac=1, random_state=0)
    ax = draw_attack_grid(shuffled)
    labels = [label.get_text() for label in ax.child_axes[0].get_yticklabels()]
    expected = ["undefended", "reminders-0", "reminders-7", "backdoor-1", "backdoor-8", "refactoring-2"]
    assert labels[0] == expected[0] and labels[-1] == "control-6 (control)"
    assert [*sorted(labels[1:3]), *sorted(labels[3:5]), labels[5]] == expected[1:]
    drawn = read_grid_cells(ax, list(dict.fromkeys(shuffled["attack"])))
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
    assert figure.get_size_inches()[0] < 11, "too wide for a page"
    caption = read_caption(figure)
    for word in ("24 harmful", "24 benign", RUN.model, "twins, test split", "no judge", "95 %", "Hollow"):
        assert word in caption


def test_the_caption_of_the_grid_says_what_the_rates_rest_on() -> None:
    cells = build_attack_cells(*plant_attacked_scores(2, ["direct", "base64"]), THRESHOLD)
    cells = cells.assign(trusted="not trusted")
    context = replace(RUN, response_basis="first 24 tokens of the responses, judged by learned")
    caption = caption_attack_grid(cells, context)
    assert "queries refused, by the first 24 tokens of the responses, judged by learned." in caption
    assert "the margin is not trusted, because generated text contradicts the readout" in caption
    older = caption_attack_grid(cells.drop(columns="based_on"), RUN)
    assert "whose margin exceeds the threshold. Hollow and in italics: generated text" in older


def test_a_pair_has_its_number_and_color_on_both_sides_of_the_diagonal_and_others_are_grey() -> None:
    rows, _, families = plant_ensembles()
    cells = build_interaction_cells(rows, families)
    cells.loc[0, ["interaction_shift", "interaction_shift_low", "interaction_shift_high"]] = [0.1, -0.1, 0.4]
    ax = draw_interactions(cells)
    names = read_row_names(ax.child_axes[0])
    assert set(names) == {*cells["first"], *cells["second"]}
    weights = []
    for column, panel in zip(
        ("interaction_shift", "interaction_discrimination"), ax.child_axes[::2], strict=True
    ):
        digits = 2 if cells[column].abs().max() < 1 else 1
        columns = ["first", "second", column, f"{column}_low", f"{column}_high"]
        pairs = {frozenset(row[:2]): row[2:] for row in cells[columns].to_numpy()}
        for cell, (text, color) in read_cells(panel, names, names).items():
            pair = frozenset(cell)
            if len(pair) == 1:
                assert text is None  # the diagonal
            elif pair not in pairs:
                assert text is None and color[0] == color[1] == color[2] < 1
            else:
                value, low, high = pairs[pair]
                number = text.get_text().replace("\N{MINUS SIGN}", "-")
                assert float(number) == pytest.approx(value, abs=0.51 * 10**-digits)
                assert (text.get_weight() == "bold") == (low > 0 or high < 0)
                assert (color[2] > color[0]) == (value > 0)
                weights.append(text.get_weight())
    assert len(weights) == 4 * len(cells) and set(weights) == {"bold", "normal"}


def test_colors_are_symmetric_about_no_interaction_in_either_panel() -> None:
    cell = {"attack": "direct", "family_first": "noise", "family_second": "tuning"}
    values = {("a", "b"): (-2.0, 0.0), ("a", "c"): (2.0, 0.5), ("b", "c"): (1.0, -0.25)}
    cells = pd.DataFrame(
        [
            {
                **cell,
                "first": first,
                "second": second,
                "interaction_shift": shift,
                "interaction_discrimination": discrimination,
            }
            for (first, second), (shift, discrimination) in values.items()
        ]
    )
    ax = draw_interactions(cells)
    names = read_row_names(ax.child_axes[0])
    shift_colors, discrimination_colors = (
        {pair: color for pair, (_, color) in read_cells(panel, names, names).items()}
        for panel in ax.child_axes[::2]
    )
    assert discrimination_colors["a", "b"].min() > 0.99  # white
    distance_from_white = {pair: np.abs(1 - color).sum() for pair, color in shift_colors.items()}
    assert distance_from_white["a", "c"] > distance_from_white["b", "c"] > 0.2
    # Each panel has its own scale.
    np.testing.assert_allclose(discrimination_colors["a", "c"], shift_colors["a", "c"])
    scale = [label.get_text() for label in ax.child_axes[1].get_xticklabels()]
    assert scale == ["\N{MINUS SIGN}2.0 refuses less", "0", "refuses more +2.0"]
    legend = ax.get_legend()
    assert legend is not None
    legend_texts = [text.get_text() for text in legend.get_texts()]
    assert legend_texts == ["noise (NI)", "tuning (MO)"]  # all pairs were run, so none is grey


@pytest.mark.sweep
def test_families_stand_together_in_the_palettes_order_with_a_strip_of_their_color() -> None:
    figure, cells = cached_ensemble_figures("many")["interactions"]
    families = plant_ensembles("many")[2]
    ax = draw_interactions(cells.sample(frac=1, random_state=1))
    panels = ax.child_axes[::2]
    names = read_row_names(panels[0])
    assert set(names) == {*cells["first"], *cells["second"]} and len(names) > 12
    family_ranks = [list(FAMILY_STYLES).index(families[name]) for name in names]
    assert family_ranks == sorted(family_ranks)
    for panel in panels:
        strips = [box for box in panel.patches if box.get_gid() == "family"]
        assert len(strips) == 2 * len(names)
        for row, name in enumerate(names):
            (strip,) = (box for box in strips if box.get_x() < 0 and box.get_y() == row)
            assert same_color(strip.get_facecolor(), FAMILY_STYLES[families[name]][0])
    dot_texts = [text for panel in panels for text in panel.texts if text.get_text() == "\N{BULLET}"]
    n_significant = sum(
        int(((cells[f"{name}_low"] > 0) | (cells[f"{name}_high"] < 0)).sum())
        for name in ("interaction_shift", "interaction_discrimination")
    )
    assert len(dot_texts) == 2 * n_significant > 0
    assert "Dot: the 95" in read_caption(figure)


def test_the_similarity_map_has_the_cosine_of_each_pair_on_both_sides() -> None:
    ax, table = find_figure("profiles")
    names = read_row_names(ax.child_axes[0])
    assert sorted(names) == sorted(MECHANISM_DEFENSES[:3])
    for contrast, panel in zip(CONTRAST_LABELS, ax.child_axes[:2], strict=True):
        (mesh,) = panel.collections
        assert (mesh.norm.vmin, mesh.norm.vmax) == (-1, 1)
        values = np.ma.filled(mesh.get_array(), np.nan).reshape(3, 3)
        assert np.isnan(np.diag(values)).all()
        drawn = read_cells(panel, names, names)
        for row in table[table["contrast"] == contrast].to_dict("records"):
            first, second = row["defense"], row["other"]
            for pair in ((first, second), (second, first)):
                text, _ = drawn[pair]
                assert values[names.index(pair[0]), names.index(pair[1])] == row["cosine"]
                number = float(text.get_text().replace("\N{MINUS SIGN}", "-"))
                assert number == pytest.approx(row["cosine"], abs=0.006)
                significant = row["cosine_low"] > 0 or row["cosine_high"] < 0
                assert (text.get_weight() == "bold") == significant
