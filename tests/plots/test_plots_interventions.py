"""Patches, weight patches and knockouts are drawn as their tables hold them."""

from __future__ import annotations

import numpy as np
import pytest
from planted_tables import MECHANISM_CASES, find_figure, interval_bars, line_points, plant_mechanism

from analysis.plots.data import CONTRAST_LABELS
from analysis.plots.figures import FIGURES


@pytest.mark.parametrize("manner", ["tiny", "usual"])
def test_patches_draws_every_source_over_layers_and_the_largest_heads_as_dots(manner: str) -> None:
    ax, table = find_figure("patches", manner)
    panels = np.array(ax.child_axes).reshape(-1, 2)
    blocks = [
        (into, kind) for into in ("undefended", "defended") for kind in ("residual", "attention", "mlp")
    ]
    for (into, kind), row in zip(blocks, panels[:-1], strict=True):
        here = table[(table["into"] == into) & (table["kind"] == kind)]
        assert row[0].get_ylabel().endswith(f"into {into}")
        for contrast, panel in zip(CONTRAST_LABELS, row, strict=True):
            for source, rows in here.groupby("source"):
                wanted = rows[["layer", contrast]].astype(float)
                np.testing.assert_allclose(line_points(panel, str(source)), wanted)
    every = plant_mechanism(**MECHANISM_CASES[manner])["patches"]
    mine = every[
        (every["defense"] == "backdoor") & (every["kind"] == "head") & (every["source"] == "defense")
    ]
    size = mine[[*CONTRAST_LABELS]].abs().max(axis=1)
    wanted = mine.assign(size=size).sort_values("size", ascending=False, kind="stable")[:10]
    names = [f"{layer:.0f}.{head:.0f}" for layer, head in zip(wanted["layer"], wanted["head"], strict=True)]
    assert [label.get_text() for label in panels[-1, 0].get_yticklabels()] == names
    for contrast, panel in zip(CONTRAST_LABELS, panels[-1], strict=True):
        at = line_points(panel, "defense")
        at = at[np.argsort(-at[:, 1])]
        np.testing.assert_allclose(at[:, 0], wanted[contrast])
        assert (np.abs(at[:, 1] + np.arange(len(at))) < 0.4).all()
        low, high = (wanted[f"{contrast}_{end}"] for end in ("low", "high"))
        ends = {pair for pair in zip(low.round(6), high.round(6), strict=True) if pair[0] == pair[0]}
        assert ends <= {interval[1:] for interval in interval_bars(panel)}


def test_weights_draws_both_ways_over_layers_and_modules_as_dots() -> None:
    ax, table = find_figure("weights")
    for contrast, above, below in zip(CONTRAST_LABELS, ax.child_axes[:2], ax.child_axes[2:], strict=True):
        for how in ("alone", "up to"):
            rows = table[table["how"] == how]
            np.testing.assert_allclose(line_points(above, how), rows[["layer", contrast]].astype(float))
        rows = table[table["how"] == "module"]
        np.testing.assert_allclose(
            line_points(below, "module"), np.stack([rows[contrast], [0, -1, -2, -3]], axis=1)
        )
    names = [label.get_text() for label in ax.child_axes[2].get_yticklabels()]
    assert names == ["q_proj", "k_proj", "v_proj", "down_proj"]
    for part in ("module", "alone"):
        only = table[table["how"] == part]
        assert len(FIGURES["weights"].draw(only).child_axes) == 2


def test_cuts_draws_a_row_per_range_filled_and_hollow() -> None:
    ax, table = find_figure("cuts")
    names = ["no knockout", *(f"layers {first}\N{EN DASH}{first + 2}" for first in (0, 3, 6, 9))]
    assert [label.get_text() for label in ax.child_axes[0].get_yticklabels()] == names
    for contrast, panel in zip(CONTRAST_LABELS, ax.child_axes, strict=True):
        for (defense, reader), rows in table.groupby(["defense", "reader"]):
            at = line_points(panel, f"{defense} {reader}")
            np.testing.assert_allclose(at[:, 0], rows[contrast])
            assert (-np.round(at[:, 1])).tolist() == [0, 1, 2, 3, 4]
            (found,) = (one for one in panel.lines if one.get_gid() == f"{defense} {reader}")
            assert (found.get_markerfacecolor() == "white") == (reader == "everything")
        heights = np.concatenate(
            [line_points(panel, str(one.get_gid()))[:, 1] for one in panel.lines if one.get_gid()]
        )
        assert len(set(heights.round(6))) == len(heights)  # no dot has the height of another
