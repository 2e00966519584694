"""Rows of dots: each dot and bar is the number of its table, and the rows can be read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import assert_readable, draw_run_figures
from planted_tables import (
    RUN,
    collect_texts,
    interval_bars,
    lines_by_gid,
    plant_kinds,
    plant_scores,
    read_caption,
)

from analysis.plots.data import build_analysis_points, build_kind_points
from analysis.plots.dot_plots import draw_dumbbell, draw_forest, draw_kinds, draw_pairs
from analysis.plots.further_data import build_further_points, list_further_figures
from analysis.plots.heatmaps import draw_categories
from analysis.plots.scores import draw_thresholds
from analysis.report.results import Run
from analysis.stats.tables import INTERVAL_SUFFIXES

FOUR_KINDS = ("twin", "sounds_unsafe", "same_topic", "plain")


def test_each_dot_is_the_rate_of_its_kind_in_the_row_of_its_defense() -> None:
    points = plant_kinds(5, FOUR_KINDS)
    ax = draw_kinds(points)
    dots = lines_by_gid(ax)
    assert list(dots) == [*FOUR_KINDS]
    bars = {tuple(map(tuple, path)) for part in ax.collections for path in part.get_segments()}  # type: ignore[attr-defined]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["undefended", *(f"defense-{number}" for number in range(1, 6))]
    for kind in FOUR_KINDS:
        rows = points[points["kind"] == kind]
        rates, heights = dots[kind].get_xydata().T
        assert rates.tolist() == pytest.approx((100 * rows["over_refusal_rate"]).tolist())
        assert (-heights).round().tolist() == [0, 1, 2, 3, 4, 5]
        ends = zip(100 * rows["over_refusal_rate_low"], 100 * rows["over_refusal_rate_high"], strict=True)
        for (low, high), height in zip(ends, heights, strict=True):
            assert ((low, height), (high, height)) in bars
    # Within a row, the kinds have the order of the legend.
    assert dots["twin"].get_ydata()[0] > dots["sounds_unsafe"].get_ydata()[0] > dots["plain"].get_ydata()[0]
    assert len({(line.get_color(), line.get_marker()) for line in dots.values()}) == 4


@pytest.mark.parametrize(
    ("defenses", "kinds"),
    [
        (1, ("twin", "plain")),
        (24, FOUR_KINDS),
        (3, tuple(f"a kind with a long name {n}" * 3 for n in range(10))),
    ],
)
def test_every_text_can_be_read(defenses: int, kinds: tuple[str, ...]) -> None:
    ((figure, _),) = draw_run_figures({"kinds": plant_kinds(defenses, kinds)}, RUN).values()
    assert_readable("kinds", figure, collect_texts)


def test_the_caption_says_what_is_counted() -> None:
    points = plant_kinds(2, ("twin", "plain"))
    sample = points.assign(n_responses=5)
    margins = plant_kinds(2, ("twin", "plain"), based_on="margins")
    captions = [
        read_caption(draw_run_figures({"kinds": table}, RUN)["kinds"][0])
        for table in (points, sample, margins)
    ]
    judged, sampled, by_readout = captions
    assert "each kind (10 twin, 20 plain), by the judged responses: 10–20 responses per" in judged
    assert "prediction-powered" not in judged and "5 responses per kind and condition" in sampled
    assert "by the readout: the margin of the first token exceeds the threshold" in by_readout
    assert "threshold" not in judged


def test_there_is_a_figure_per_attack_and_none_of_a_single_kind() -> None:
    scores, summary = plant_scores(2)
    kinds = plant_kinds(2, ("twin", "plain"))
    assert "kinds" not in build_analysis_points(scores, summary, 0.0)
    assert "kinds" not in build_analysis_points(scores, summary, 0.0, kinds[kinds["kind"] == "twin"])
    points = build_analysis_points(scores, summary, 0.0, kinds)["kinds"]
    assert points.equals(kinds), "the table of the run is the one that is drawn"
    assert not len(build_kind_points(kinds.assign(over_refusal_rate=float("nan"))))
    with pytest.raises(ValueError, match="one figure shows one attack"):
        draw_kinds(plant_kinds(1, FOUR_KINDS).assign(attack=["direct", "base64"] * 4))


def plant_refusals() -> dict[str, pd.DataFrame]:
    """Return scores, judged responses and a summary of 4 pairs: a refuses 3 of 4 harmful queries, 1 twin."""
    refused = {
        "none": ("h0",),
        "a": ("h0", "h1", "h2", "b2"),
        "b": ("b0", "b1"),
    }
    rows = [
        {
            "query": f"{side}{pair}",
            "pair": f"p{pair}",
            "category": ("theft", "fraud")[pair % 2],
            "harmful": side == "h",
            "attack": "direct",
            "defense": defense,
            "margin": float(pair + 2 * (defense == "a") - (side == "b")),
            "verdict": "refused" if f"{side}{pair}" in refused[defense] else "not refused",
        }
        for defense in refused
        for side in "hb"
        for pair in range(4)
    ]
    responses = pd.DataFrame(rows)
    numbers = ("refusal_rate", "over_refusal_rate", "response_shift", "response_discrimination")
    summary = pd.DataFrame({"attack": "direct", "defense": [*refused], "based_on": "responses"})
    summary = summary.assign(family=["none", "noise", "control"], n_harmful=4, n_benign=4, n_responses=8)
    values = {"refusal_rate": [0.25, 0.75, 0.0], "over_refusal_rate": [0.0, 0.25, 0.5]}
    values |= {"response_shift": [np.nan, 37.5, 12.5], "response_discrimination": [np.nan, 25.0, -75.0]}
    for name in numbers:
        for end, added in zip(INTERVAL_SUFFIXES, (0, -10, 10), strict=True):
            factor = 0.01 if name.endswith("rate") else 1
            summary[f"{name}{end}"] = np.array(values[name]) + added * factor
    scores = responses.drop(columns="verdict")
    return {"scores": scores, "responses": responses.drop(columns="margin"), "summary": summary}


RECORD = {
    "model": {"name": "toy"},
    "data": {"name": "contrast", "split": "test", "n_harmful": 4, "n_benign": 4},
    "readout": {"name": "words", "threshold": 1.5, "refuse": ["I"], "comply": ["Sure"]},
    "responses": {"new_tokens": 32, "judge": {"name": "learned"}},
}


def test_the_figures_on_demand_follow_from_the_tables_of_a_run() -> None:
    tables = plant_refusals()
    all_kinds = ("forest", "dumbbell", "categories", "pairs", "thresholds")
    assert list_further_figures(tables) == all_kinds
    assert list_further_figures({"summary": tables["summary"]}) == ("forest", "dumbbell")
    assert list_further_figures({"summary": tables["summary"][:1]}) == ()  # no defense
    alone = tables["scores"].assign(pair=None)
    assert "pairs" not in list_further_figures({**tables, "scores": alone})
    both = {
        name: pd.concat([table, table.assign(attack="a b")], ignore_index=True)
        for name, table in tables.items()
    }
    assert list_further_figures(both)[:2] == ("forest-direct", "forest-a-b")
    assert set(build_further_points(both, RECORD, "pairs-a-b")["attack"]) == {"a b"}
    run = Run("toy", RECORD, tables)
    for name in all_kinds:
        figure = run.draw_figure(name)
        assert_readable(name, figure, collect_texts, slack=0.6, dpis=(100,))
        caption = read_caption(figure)
        assert "Model: toy" in caption
        assert ("judged by learned" in caption) == (name != "thresholds"), name


def test_the_forest_draws_effects_sorted_by_shift_and_fills_those_beyond_zero() -> None:
    points = build_further_points(plant_refusals(), RECORD, "forest")
    assert points[["response_shift", "response_discrimination"]].to_numpy().tolist() == [
        [37.5, 25],
        [12.5, -75],
    ]
    shift, discrimination = draw_forest(points.assign(response_discrimination_low=-1.0)).child_axes
    assert [label.get_text() for label in shift.get_yticklabels()] == ["a", "b (control)"]
    assert [lines_by_gid(shift)[name].get_xydata().tolist() for name in "ab"] == [[[37.5, 0]], [[12.5, -1]]]
    assert interval_bars(shift) == {(0, 27.5, 47.5), (-1, 2.5, 22.5)}
    dots = lines_by_gid(discrimination)
    assert dots["a"].get_xdata()[0] == 25 and dots["a"].get_markerfacecolor() == "white"
    assert lines_by_gid(shift)["a"].get_markerfacecolor() != "white"
    assert shift.get_xlim() == discrimination.get_xlim()


def test_the_dumbbell_joins_the_rates_of_both_classes() -> None:
    ax = draw_dumbbell(build_further_points(plant_refusals(), RECORD, "dumbbell"))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "undefended", "b (control)"]
    lines = lines_by_gid(ax)
    assert lines["harmful"].get_xdata().tolist() == [75, 25, 0]
    assert lines["benign"].get_xdata().tolist() == [25, 0, 50]
    (connectors,) = (part for part in ax.collections if part.get_gid() == "connectors")
    ends = [path.vertices[:, 0].tolist() for path in connectors.get_paths()]
    assert ends == [[25, 75], [0, 25], [50, 0]]
    assert lines["undefended harmful"].get_xdata()[0] == 25


def test_pairs_are_compared_with_their_twins() -> None:
    points = build_further_points(plant_refusals(), RECORD, "pairs").set_index("defense")
    # Of 4 pairs: a refuses 2 harmful queries whose twin it answers, and both of one pair; b 2 twins.
    assert points.loc["a", ["only_harmful", "only_benign", "both"]].tolist() == [0.5, 0.0, 0.25]
    assert points.loc["b", ["only_harmful", "only_benign", "both"]].tolist() == [0.0, 0.5, 0.0]
    assert points["difference"].to_dict() == {"none": 25.0, "a": 50.0, "b": -50.0}
    # Bonett and Price by hand: (2 + 1) / 6 and (0 + 1) / 6, difference 1/3.
    half_width = 1.959964 * np.sqrt((3 / 6 + 1 / 6 - (1 / 3) ** 2) / 6)
    assert points.loc["a", "difference_high"] == pytest.approx(100 * (1 / 3 + half_width), abs=0.01)
    ax = draw_pairs(points.reset_index())
    widths = {str(bar.get_gid()): bar.get_width() for bar in ax.patches if bar.get_gid()}
    assert widths["a only_harmful"] == 50 and widths["b only_benign"] == -50
    assert lines_by_gid(ax)["difference"].get_xdata().tolist() == [50, 25, -50]
    unjudged = plant_refusals()
    unjudged["responses"].loc[0, "verdict"] = "unjudged"  # of the undefended model
    assert build_further_points(unjudged, RECORD, "pairs").set_index("defense")["n_pairs"].to_dict() == {
        "none": 3,
        "a": 4,
        "b": 4,
    }


def test_categories_have_their_rates_in_cells() -> None:
    cells = build_further_points(plant_refusals(), RECORD, "categories")
    harmful, benign = draw_categories(cells).child_axes
    assert [label.get_text() for label in harmful.get_xticklabels()] == ["theft (2)", "fraud (2)"]
    # Rows: undefended, a, b. Of theft (pairs 0 and 2) a refuses both harmful queries and one twin.
    assert [text.get_text() for text in harmful.texts if not text.get_gid()] == [
        "50",
        "0",
        "100",
        "50",
        "0",
        "0",
    ]
    shown = [text.get_text() for text in benign.texts if text.get_gid() != "family"]
    assert shown == ["0", "0", "50", "0", "50", "50"]
    by_readout = {name: table for name, table in plant_refusals().items() if name != "responses"}
    by_readout["summary"] = by_readout["summary"].assign(based_on="margins")
    cells = build_further_points(by_readout, RECORD, "categories").set_index(
        ["defense", "category", "harmful"]
    )
    assert cells.loc[("none", "theft", True), "refused"] == 0.5  # margins 0 and 2, threshold 1.5
    assert cells.loc[("a", "fraud", False), "refused"] == 1.0  # margins 2 and 4
    assert set(cells["based_on"]) == {"margins"}


def test_thresholds_move_the_rates_of_the_readout() -> None:
    points = build_further_points(plant_refusals(), RECORD, "thresholds")
    assert set(points["defense"]) == {"a", "b"} and (points["run_threshold"] == 1.5).all()
    rows = points[points["defense"] == "a"]
    margins = plant_refusals()["scores"].pivot_table(
        index=["harmful", "query"], columns="defense", values="margin"
    )
    for row in rows.to_dict("records"):
        rates = (margins > row["threshold"]).groupby(level=0).mean()
        change = 100 * (rates["a"] - rates["none"])
        assert row["shift"] == pytest.approx(change.mean())
        assert row["discrimination"] == pytest.approx(change[True] - change[False])
        assert row["refusal_rate"] == rates.loc[True, "a"]
        assert row["shift_low"] <= row["shift"] <= row["shift_high"]
    assert rows["shift"].nunique() > 2
    shift, discrimination = draw_thresholds(points).child_axes
    np.testing.assert_allclose(lines_by_gid(shift)["a"].get_xydata(), rows[["threshold", "shift"]])
    np.testing.assert_allclose(lines_by_gid(discrimination)["a"].get_ydata(), rows["discrimination"])
    assert (points.loc[points["defense"] == "b", ["shift", "discrimination"]] == 0).all(axis=None)
