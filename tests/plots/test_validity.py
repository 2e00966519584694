"""Calibration and refusal rates are those of their tables."""

from __future__ import annotations

import pandas as pd
from conftest import draw_run_figures
from planted_tables import scatter_collections

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
    collections = scatter_collections(ax)
    assert [collection.get_offsets()[0].tolist() for collection in collections] == [[25, 100], [50, 45]]
    first_color, second_color = (collection.get_facecolor()[0].tolist() for collection in collections)
    assert first_color == [1, 1, 1, 1] != second_color
    by_readout = [agreement.assign(readout=name) for name in ("words", "question")]
    figures = {"rates-words": by_readout[0], "calibration-words": curve}
    drawn_figures = draw_run_figures(
        figures, TOY_RUN, validity=pd.concat([*by_readout, by_readout[0].assign(n=0)])
    )
    for figure, _ in drawn_figures.values():
        caption = figure.texts[-1].get_text().replace("\n", " ")
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
    # The band within 5 points, the two conditions of the readout, the crosses.
    none, policy, crosses = [one for one in scatter_collections(ax) if len(one.get_offsets())][-3:]
    assert none.get_offsets().tolist() == [[25, 100]] and policy.get_offsets().tolist() == [[50, 45]]
    assert crosses.get_offsets().tolist() == [[25, 25], [50, 55]]
    assert none.get_facecolor()[0].tolist() == [1, 1, 1, 1]  # hollow: single queries are trusted, rates not
    (figure, _), *_ = draw_run_figures({"rates": agreement}, TOY_RUN, validity=agreement).values()
    caption = figure.texts[-1].get_text().replace("\n", " ")
    assert "under each of 2 conditions" in caption and "Crosses: " in caption and "5 points" in caption
    assert "Crosses" not in caption_refusal_rates(agreement[agreement["readout"] == "words"], TOY_RUN)
    assert "under each of 2 conditions" in caption_calibration(agreement, TOY_RUN)
