"""Calibration and refusal rates are those of their tables."""

from __future__ import annotations

import pandas as pd
from conftest import draw_run_figures
from planted_tables import read_caption, scatter_collections

from analysis.plots.captions import CaptionContext
from analysis.plots.validity import (
    caption_calibration,
    caption_refusal_rates,
    draw_calibration,
    draw_refusal_rates,
)

TOY_RUN = CaptionContext("toy", "contrast", "test", 0.0, ("I",), ("Sure",))


def test_the_curve_and_the_rates_are_those_of_the_table() -> None:
    curve = pd.DataFrame(
        {"chance": [0.1, 0.8], "refused": [0.2, 0.7], "refused_low": 0.1, "refused_high": 0.9}
    )
    assert draw_calibration(curve).lines[1].get_xydata().tolist() == [[0.1, 0.2], [0.8, 0.7]]
    agreement = pd.DataFrame(
        {
            "attack": "direct",
            "defense": ["none", "policy"],
            "n": 20,
            "refused": [5, 10],
            "readout_refused": [20, 9],
            "trusted": ["not trusted", "trusted"],
        }
    )
    ax = draw_refusal_rates(agreement)
    text, policy, none = scatter_collections(ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["policy", "undefended"]
    assert text.get_offsets().tolist() == [[50, 0], [25, -1]]
    assert policy.get_offsets().tolist() == [[45, 0]] and none.get_offsets().tolist() == [[100, -1]]
    assert none.get_facecolor()[0].tolist() == [1, 1, 1, 1] != policy.get_facecolor()[0].tolist()
    by_readout = [agreement.assign(readout=name) for name in ("words", "question")]
    figures = {"rates-words": by_readout[0], "calibration-words": curve}
    drawn_figures = draw_run_figures(
        figures, TOY_RUN, validity=pd.concat([*by_readout, by_readout[0].assign(n=0)])
    )
    for figure, _ in drawn_figures.values():
        caption = read_caption(figure)
        assert "under each of 2 conditions" in caption and "judge: patterns" in caption


def test_the_rates_show_their_own_trust_and_the_first_tokens_as_crosses() -> None:
    agreement = pd.DataFrame(
        {
            "attack": "direct",
            "defense": ["none", "none", "policy", "policy"],
            "readout": ["responses", "words"] * 2,
            "n": 20,
            "refused": [5, 5, 10, 10],
            "readout_refused": [5, 20, 11, 9],
            "trusted": "trusted",
            "rate_trusted": ["trusted", "not trusted", "cannot tell", "trusted"],
        }
    )
    ax = draw_refusal_rates(agreement)
    _, policy, none, crosses = scatter_collections(ax)
    assert policy.get_offsets().tolist() == [[45, 0]] and none.get_offsets().tolist() == [[100, -1]]
    assert crosses.get_offsets().tolist() == [[25, -1], [55, 0]]
    (band,) = (lines for lines in ax.collections if lines.get_gid() == "band")
    assert [path.vertices[:, 0].tolist() for path in band.get_paths()] == [[45, 55], [20, 30]]
    assert none.get_facecolor()[0].tolist() == [1, 1, 1, 1]  # hollow: single queries are trusted, rates not
    (figure, _), *_ = draw_run_figures({"rates": agreement}, TOY_RUN, validity=agreement).values()
    caption = read_caption(figure)
    assert "under each of 2 conditions" in caption and "Crosses: " in caption and "5 points" in caption
    assert "Crosses" not in caption_refusal_rates(agreement[agreement["readout"] == "words"], TOY_RUN)
    assert "under each of 2 conditions" in caption_calibration(agreement, TOY_RUN)
