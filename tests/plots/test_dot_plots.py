"""Over-refusal by kind: each dot is its rate, and the rows can be read with many defenses and kinds."""

from __future__ import annotations

import pytest
from conftest import assert_readable, draw_run_figures
from planted_tables import (
    RUN,
    collect_texts,
    lines_by_gid,
    plant_kinds,
    plant_scores,
    read_caption,
)

from analysis.plots.data import build_analysis_points, build_kind_points
from analysis.plots.dot_plots import draw_kinds

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
