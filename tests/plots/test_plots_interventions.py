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
        in_block = table[(table["into"] == into) & (table["kind"] == kind)]
        assert row[0].get_ylabel().endswith(f"into {into}")
        for contrast, panel in zip(CONTRAST_LABELS, row, strict=True):
            for source, rows in in_block.groupby("source"):
                expected = rows[["layer", contrast]].astype(float)
                np.testing.assert_allclose(line_points(panel, str(source)), expected)
    patches = plant_mechanism(**MECHANISM_CASES[manner])["patches"]
    head_patches = patches[
        (patches["defense"] == "backdoor") & (patches["kind"] == "head") & (patches["source"] == "defense")
    ]
    size = head_patches[[*CONTRAST_LABELS]].abs().max(axis=1)
    expected = head_patches.assign(size=size).sort_values("size", ascending=False, kind="stable")[:10]
    names = [
        f"{layer:.0f}.{head:.0f}" for layer, head in zip(expected["layer"], expected["head"], strict=True)
    ]
    assert [label.get_text() for label in panels[-1, 0].get_yticklabels()] == names
    for contrast, panel in zip(CONTRAST_LABELS, panels[-1], strict=True):
        points = line_points(panel, "defense")
        points = points[np.argsort(-points[:, 1])]
        np.testing.assert_allclose(points[:, 0], expected[contrast])
        assert (np.abs(points[:, 1] + np.arange(len(points))) < 0.4).all()
        low, high = (expected[f"{contrast}_{end}"] for end in ("low", "high"))
        intervals = {
            interval
            for interval in zip(low.round(6), high.round(6), strict=True)
            if interval[0] == interval[0]
        }
        assert intervals <= {interval[1:] for interval in interval_bars(panel)}


def test_the_dots_of_a_head_are_centered_on_its_name_and_nearer_to_each_other_than_to_the_next_head() -> None:
    ax, _ = find_figure("patches", "usual")
    panel = ax.child_axes[-1]
    heights = np.stack([np.sort(-line.get_ydata()) for line in panel.lines if line.get_gid()])
    np.testing.assert_allclose(heights.mean(axis=0), np.arange(heights.shape[1]), atol=1e-9)
    assert np.ptp(heights, axis=0).max() < 0.5


def test_weights_draws_single_and_cumulative_patches_over_layers_and_modules_as_dots() -> None:
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
        of_part = table[table["how"] == part]
        assert len(FIGURES["weights"].draw(of_part).child_axes) == 2


def test_cuts_draws_a_row_per_range_filled_and_hollow_for_each_group_of_tokens() -> None:
    ax, table = find_figure("cuts")
    names = ["no knockout", *(f"layers {first}\N{EN DASH}{first + 2}" for first in (0, 3, 6, 9))]
    panel_rows = np.array(ax.child_axes).reshape(2, 2)
    for tokens, panels in zip(("defense", "image"), panel_rows, strict=True):
        assert [label.get_text() for label in panels[0].get_yticklabels()] == names
        assert tokens in panels[0].get_ylabel()
        of_tokens = table[table["tokens"] == tokens]
        for contrast, panel in zip(CONTRAST_LABELS, panels, strict=True):
            for (defense, reader), rows in of_tokens.groupby(["defense", "reader"]):
                points = line_points(panel, f"{defense} {reader}")
                np.testing.assert_allclose(points[:, 0], rows[contrast])
                assert (-np.round(points[:, 1])).tolist() == [0, 1, 2, 3, 4]
                (line,) = (drawn for drawn in panel.lines if drawn.get_gid() == f"{defense} {reader}")
                assert (line.get_markerfacecolor() == "white") == (reader == "everything")
            heights = np.concatenate(
                [line_points(panel, str(drawn.get_gid()))[:, 1] for drawn in panel.lines if drawn.get_gid()]
            )
            assert len(set(heights.round(6))) == len(heights)  # no dot has the height of another
    stored = table[table["tokens"] == "defense"].drop(columns="tokens")  # of an earlier version
    assert len(FIGURES["cuts"].draw(stored).child_axes) == 2
