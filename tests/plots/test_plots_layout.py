"""Lines of text fit their width, and a curve shows every interval."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection

from analysis.plots.layout import CURVE_STYLES, draw_curve, fit_text, make_axes, measure_text_width, wrap_text


def test_wrapped_lines_fit_their_width_and_lose_no_character() -> None:
    text = "a_long/name-with+joints and " + "x" * 80 + " at \u22121.00\u00a0nats"
    lines = wrap_text(text, 100, 8)
    assert max(measure_text_width(line, 8) for line in lines) <= 100
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = fit_text("x" * 40 + "-end", 60, 8, max_lines=1)
    assert short.startswith("x")
    assert short.endswith("-end")
    assert measure_text_width(short, 8) <= 60


def test_a_layer_without_a_neighbor_has_its_interval_as_a_bar() -> None:
    rows = pd.DataFrame({"layer": [0, 1, 2, 5], "shift": 1.0, "shift_low": [0.5, np.nan, 0.2, 0.3]})
    ax = make_axes(1, 1)
    draw_curve(ax, rows.assign(shift_high=2.0), "shift", CURVE_STYLES[0], "a")
    (lines,) = (collection for collection in ax.collections if isinstance(collection, LineCollection))
    assert [path.vertices.tolist() for path in lines.get_paths()] == [[[0, 0.5], [0, 2]]]
