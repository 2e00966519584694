"""The figures of validity, cost and secrets draw what their tables hold; doubt is drawn hollow."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import pictures
from matplotlib.collections import PathCollection

from analysis.plots.backdooralign import draw_secrets
from analysis.plots.captions import CaptionContext
from analysis.plots.data import build_secret_points
from analysis.plots.plane import draw_plane
from analysis.plots.tradeoffs import draw_cost
from analysis.plots.validity import draw_calibration, draw_refusal_rates

RUN = CaptionContext("toy", "contrast", "test", 0.0, ("I",), ("Sure",))
ENDS = ("", "_low", "_high")


def dots(ax) -> list[PathCollection]:
    """Points; the bars beside them are collections of another kind."""
    return [one for one in ax.collections if isinstance(one, PathCollection)]


def test_the_curve_and_the_rates_are_those_of_the_table() -> None:
    curve = pd.DataFrame(
        {"chance": [0.1, 0.8], "refused": [0.2, 0.7], "refused_low": 0.1, "refused_high": 0.9}
    )
    assert draw_calibration(curve).lines[1].get_xydata().tolist() == [[0.1, 0.2], [0.8, 0.7]]
    found = pd.DataFrame(
        {
            "attack": "direct",
            "defense": ["none", "policy"],
            "n": 20,
            "refused": [5, 10],
            "readout_refused": [20, 9],
            "trusted": ["not trusted", "trusted"],
        }
    )
    ax = draw_refusal_rates(found)
    drawn = dots(ax)
    assert [one.get_offsets()[0].tolist() for one in drawn] == [[25, 100], [50, 45]]
    assert drawn[0].get_facecolor()[0].tolist() == [1, 1, 1, 1] != drawn[1].get_facecolor()[0].tolist()
    read = [found.assign(readout=name) for name in ("words", "question")]
    figures = {"rates-words": read[0], "calibration-words": curve}
    made = pictures(figures, RUN, validity=pd.concat([*read, read[0].assign(n=0)]))
    for figure, _ in made.values():
        said = figure.texts[-1].get_text().replace("\n", " ")
        assert "under each of 2 conditions" in said and "judge: patterns" in said


def test_a_defense_that_text_contradicts_is_hollow_on_the_plane() -> None:
    rows = []
    for name, trusted in (("one", "trusted"), ("two", "not trusted")):
        row = {"attack": "direct", "defense": name, "family": "noise", "trusted": trusted}
        row |= {f"{x}{end}": float(len(rows)) for x in ("shift", "discrimination") for end in ENDS}
        rows.append(row)
    points = dots(draw_plane(pd.DataFrame(rows)))
    faces = {tuple(one.get_offsets()[0]): tuple(one.get_facecolor()[0]) for one in points}
    assert faces[1, 1] == (1, 1, 1, 1) != faces[0, 0]


def test_gain_is_drawn_over_cost() -> None:
    row = {"attack": "obedience", "defense": "one", "family": "noise", "n": 8}
    row |= {f"prefill_ratio{end}": 2.0 for end in ENDS} | {f"delta_auroc{end}": 0.1 for end in ENDS}
    table = pd.DataFrame([row, row | {"defense": "none"}])
    assert [one.get_offsets().tolist() for one in dots(draw_cost(table))] == [[[2.0, 0.1]]]
    said = pictures({"cost": table}, RUN)["cost"][0].texts[-1].get_text().replace("\n", " ")
    assert "8 queries" in said and "Attack: obedience" in said


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
    extra = pd.DataFrame([{"arm": "clean", "secret": "none", "secret_length": np.nan}])
    points = build_secret_points(pd.concat([table, extra]))
    figure, _ = pictures({"secrets": points}, RUN)["secrets"]
    assert len(points) == 4 and "48 harmful" in figure.texts[-1].get_text().replace("\n", " ")
