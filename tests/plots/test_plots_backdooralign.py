"""Each secret is a dot."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import draw_run_figures
from planted_tables import read_caption

from analysis.plots.backdooralign import draw_secrets
from analysis.plots.captions import CaptionContext
from analysis.plots.data import build_secret_points

TOY_RUN = CaptionContext("toy", "contrast", "test", 0.0, ("I",), ("Sure",))


def test_each_secret_is_a_dot_and_a_row_has_its_mean() -> None:
    rows = [
        {"arm": f"10-{n}", "secret": kind, "secret_length": 10, "secret_wording": "random tokens", "asr": asr}
        for n, kind, asr in ((1, "none", 1.0), (2, "none", 0.8), (1, "own", 0.2), (2, "own", 0.0))
    ]
    table = pd.DataFrame(rows).assign(asr_low=0.0, asr_high=1.0, text_refused_harmful_n=48)
    lines = {line.get_gid(): line for line in draw_secrets(table).lines if line.get_gid()}
    assert sorted(lines["0 none"].get_xdata()) == pytest.approx([80, 100])
    assert sorted(lines["0 own"].get_xdata()) == pytest.approx([0, 20])
    means = [line.get_xdata()[0] for line in draw_secrets(table).lines if len(set(line.get_xdata())) == 1]
    assert 90 in np.round(means, 9) and 10 in np.round(means, 9)
    without_secret = pd.DataFrame([{"arm": "clean", "secret": "none", "secret_length": np.nan}])
    points = build_secret_points(pd.concat([table, without_secret]))
    figure, _ = draw_run_figures({"secrets": points}, TOY_RUN)["secrets"]
    assert len(points) == 4 and "48 harmful" in read_caption(figure)
