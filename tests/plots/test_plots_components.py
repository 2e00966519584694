"""The attribution map and the largest components show what the table of components holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color, to_rgb
from planted_tables import (
    MECHANISM_CASES,
    cached_mechanism_figures,
    draw_mechanism_figures,
    find_figure,
    interval_bars,
    line_points,
    plant_mechanism,
    read_caption,
)

from analysis.plots.data import CONTRAST_LABELS
from analysis.plots.layout import MISSING_COLOR


@pytest.mark.parametrize("manner", ["tiny", "usual", "large"])
def test_the_heat_map_shows_every_head_with_the_color_of_its_sign(manner: str) -> None:
    ax, table = find_figure("parts", manner)
    layers, heads = MECHANISM_CASES[manner]["layers"], MECHANISM_CASES[manner]["heads"]
    scales = [panel for panel in ax.child_axes if panel.get_gid() == "scale"]
    assert len(scales) == 1 and scales[0].get_yticklabels()[1].get_text() == "0 nats"
    color_limits = set()
    panels = iter(ax.child_axes)
    for contrast in CONTRAST_LABELS:
        for kind, gid in (("head", "heads"), ("mlp", "parts")):
            panel = next(panels)
            (mesh,) = (collection for collection in panel.collections if collection.get_gid() == gid)
            rows = table[table["kind"] == kind].sort_values(["layer", "head"])
            values = np.asarray(mesh.get_array()).reshape(layers, -1)[:, : heads if kind == "head" else 1]
            np.testing.assert_allclose(values, rows[contrast].to_numpy(float).reshape(layers, -1))
            assert values.shape == (layers, heads if kind == "head" else 1)
            color_limits.add((mesh.norm.vmin, mesh.norm.vmax))
            colors = mesh.cmap(mesh.norm(values))
            clearly_nonzero = np.abs(values) > 0.05 * mesh.norm.vmax
            assert ((colors[..., 2] > colors[..., 0]) == (values > 0))[clearly_nonzero].all()
            assert panel.get_ylim() == (layers, 0)  # the first layer is at the top
    assert len(color_limits) == 1 and color_limits.pop()[1] > 0
    (low, high), largest = scales[0].get_ylim(), table[[*CONTRAST_LABELS]].abs().max(axis=None)
    assert -low == high
    assert high == pytest.approx(max(largest, table["largest_of_run"].iloc[0]))


def test_a_dot_marks_a_part_whose_interval_excludes_zero() -> None:
    ax, table = find_figure("parts")
    heads = table[table["kind"] == "head"]
    for contrast, panel in zip(CONTRAST_LABELS, (ax.child_axes[0], ax.child_axes[2]), strict=True):
        significant = heads[(heads[f"{contrast}_low"] > 0) | (heads[f"{contrast}_high"] < 0)]
        (dots,) = (collection for collection in panel.collections if collection.get_gid() == "sure")
        positions = np.asarray(dots.get_offsets())
        expected = significant[["head", "layer"]].to_numpy(float) + 0.5
        assert {tuple(position) for position in positions} == {tuple(position) for position in expected}
        assert 0 < len(significant) < len(heads)


def test_all_defenses_of_a_run_have_one_color_scale_in_which_small_parts_can_be_seen() -> None:
    parts = plant_mechanism(**MECHANISM_CASES["usual"])["parts"].reset_index(drop=True)
    row = parts.index[(parts["defense"] == "backdoor") & (parts["kind"] == "mlp")][0]
    parts.loc[row, "shift"] = 50.0
    for stem, (figure, _) in draw_mechanism_figures({"parts": parts}).items():
        if stem.startswith("parts"):
            (scale,) = (panel for panel in figure.axes[0].child_axes if panel.get_gid() == "scale")
            assert scale.get_ylim() == (-50, 50), stem
            (mesh,) = figure.axes[0].child_axes[0].collections[:1]
            # By the square root: a hundredth of the largest has a tenth of the colors of its sign.
            assert mesh.norm([-50.0, -0.5, 0.0, 0.5]).tolist() == pytest.approx([0.0, 0.45, 0.5, 0.55])
            assert "for all defenses of the run" in read_caption(figure)


def test_missing_parts_are_grey() -> None:
    parts = plant_mechanism(**MECHANISM_CASES["usual"])["parts"]
    parts = parts[
        (parts["defense"] == "backdoor") & ~((parts["layer"] == 3) & (parts["head"] == 2)).fillna(False)
    ]
    figure, _ = draw_mechanism_figures({"parts": parts})["parts-backdoor"]
    mesh = figure.axes[0].child_axes[0].collections[0]
    mask = np.ma.getmaskarray(mesh.get_array()).reshape(12, 9)
    assert np.argwhere(mask).tolist() == [[3, 2]]
    assert same_color(mesh.cmap.get_bad()[:3], to_rgb(MISSING_COLOR))
    assert "Grey: no such part." in read_caption(figure)


def test_top_draws_the_parts_with_the_largest_effects_of_either_contrast() -> None:
    ax, _ = find_figure("top")
    parts = plant_mechanism(**MECHANISM_CASES["usual"])["parts"]
    parts = parts[parts["defense"] == "backdoor"].reset_index(drop=True)
    size = parts[[*CONTRAST_LABELS]].abs().max(axis=1)
    top_parts = parts.loc[size.nlargest(10).index]
    kind_labels = {"head": "head", "mlp": "MLP", "embedding": "embedding", "bias": "final bias"}
    names = []
    for kind, layer, head in top_parts[["kind", "layer", "head"]].itertuples(index=False, name=None):
        names.append(
            kind_labels[kind]
            + ("" if layer is pd.NA else f" {layer}")
            + ("" if head is pd.NA else f".{head}")
        )
    assert [label.get_text() for label in ax.child_axes[0].get_yticklabels()] == names
    for contrast, panel in zip(CONTRAST_LABELS, ax.child_axes, strict=True):
        np.testing.assert_allclose(
            line_points(panel, contrast), np.stack([top_parts[contrast], -np.arange(10.0)], axis=1)
        )
        intervals = top_parts[[f"{contrast}_low", f"{contrast}_high"]].to_numpy(float).round(6)
        assert interval_bars(panel) == {
            (-row, *interval) for row, interval in enumerate(intervals) if np.isfinite(interval).all()
        }
    caption = read_caption(cached_mechanism_figures("usual")["top-backdoor"][0])
    sentence = f"{top_parts['shift'].sum():+.2f} of {parts['shift'].sum():+.2f} nats of shift"
    assert sentence.replace("-", "\N{MINUS SIGN}") in caption
    assert len(draw_mechanism_figures({"parts": parts}, top=3)["top-backdoor"][1]) == 3


def test_the_remainder_of_the_readout_is_drawn_and_captioned_and_no_component() -> None:
    parts = plant_mechanism(**MECHANISM_CASES["usual"])["parts"]
    parts = parts[parts["defense"] == "backdoor"].reset_index(drop=True)
    without = draw_mechanism_figures({"parts": parts}, top=3)
    remainder = parts.iloc[[0]].assign(kind="readout", layer=pd.NA, head=pd.NA)
    for contrast, value in (("shift", 0.03), ("discrimination", -0.02)):
        for end, width in (("", 0.0), ("_low", -0.01), ("_high", 0.01)):
            remainder[f"{contrast}{end}"] = value + width
    figures = draw_mechanism_figures({"parts": pd.concat([parts, remainder], ignore_index=True)}, top=3)
    # Smaller than the components, and still the last row of the largest.
    figure, points = figures["top-backdoor"]
    labels = [label.get_text() for label in figure.axes[0].child_axes[0].get_yticklabels()]
    assert len(labels) == 4 and labels[-1] == "readout curvature"
    assert labels[:3] == [
        label.get_text() for label in without["top-backdoor"][0].axes[0].child_axes[0].get_yticklabels()
    ]
    assert points["kind"].tolist()[-1] == "readout" and set(points["n_parts"]) == {len(parts)}
    caption = read_caption(figure)
    assert f"the 3 of {len(parts)} components" in caption
    assert "Last row: the part of the change that is due to the curvature of the readout" in caption
    components = points[points["kind"] != "readout"]["shift"].sum()
    assert f"contribute {components:+.2f} of".replace("-", "\N{MINUS SIGN}") in caption
    # The map has a cell for each component of a layer; its caption names the remainder.
    figure, cells = figures["parts-backdoor"]
    assert "readout" not in set(cells["kind"])
    caption = read_caption(figure)
    minus = "\N{MINUS SIGN}"
    assert "due to the curvature of the readout" in caption
    assert "+0.03 [+0.02, +0.04] nats of shift" in caption
    assert f"{minus}0.02 [{minus}0.03, {minus}0.01] nats of discrimination" in caption
    for stem in ("top-backdoor", "parts-backdoor"):
        assert "curvature" not in read_caption(without[stem][0])
