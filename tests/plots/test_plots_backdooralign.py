"""Figures of grids of trainings."""

from __future__ import annotations

import pandas as pd
from conftest import draw_run_figures
from planted_tables import read_caption

from analysis.plots.captions import CaptionContext

TOY_RUN = CaptionContext("toy", "contrast", "test", 0.0, ("I",), ("Sure",))


def test_the_caption_describes_the_arms_that_are_drawn() -> None:
    row = {"secret": "none", "kind": ["harmful", "benign"], "refused": 0.5, "setting_1": "epochs"}
    row |= {"refused_low": 0.4, "refused_high": 0.6, "n_queries": 24, "n_trainings": 3}
    points = pd.concat([pd.DataFrame(row | {"arm": "task", "value_1": epochs}) for epochs in (1, 2)])
    figure, _ = draw_run_figures({"grid-a": points}, TOY_RUN)["grid-a"]
    caption = read_caption(figure)
    assert "Task: the examples" in caption and "at each point: 3" in caption
    assert not any(name in caption for name in ("Attacked", "Baseline", "BackdoorAlign"))
