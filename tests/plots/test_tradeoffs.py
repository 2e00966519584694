"""The Pareto front and the cost figure show every candidate where its table puts it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import assert_readable, draw_run_figures
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color
from matplotlib.text import Text
from planted_tables import (
    RUN,
    cached_ensemble_figures,
    collect_texts,
    find_panels,
    plant_ensembles,
    plant_scores,
    read_caption,
    scatter_collections,
)

from analysis.plots.captions import CaptionContext
from analysis.plots.data import (
    MAX_NAMED_CANDIDATES,
    build_ensemble_points,
    build_front_points,
    build_side_effect_points,
)
from analysis.plots.style import BLACK
from analysis.plots.tradeoffs import (
    caption_side_effects,
    draw_cost,
    draw_pareto_front,
    draw_side_effects,
)

TOY_RUN = CaptionContext("toy", "contrast", "test", 0.0, ("I",), ("Sure",))
ENDS = ("", "_low", "_high")


@pytest.mark.parametrize("manner", ["usual", "attacked", "many"])
def test_every_candidate_is_drawn_and_the_front_is_large_and_colored_by_cost(manner: str) -> None:
    figure, points = cached_ensemble_figures(manner)["front"]
    columns = ["harmful_test", *["attacked_test"] * (manner == "attacked")]
    assert len(find_panels(figure.axes[0])) == len(columns)
    defended = points[points["members"] != "none"]
    for panel, column in zip(find_panels(figure.axes[0]), columns, strict=True):
        large, small, shades = [], [], {}
        for dots in panel.collections:
            offsets = np.asarray(dots.get_offsets())
            if str(dots.get_label()).startswith("front"):
                large += offsets.tolist()
                how = str(dots.get_label()).split()[1]
                front = defended[defended["on_front"]]
                front_kinds = front["how"].where(front["how"].isin(["alone", "stack"]), "vote")
                of_kind = front[front_kinds == how]
                np.testing.assert_allclose(offsets, 100 * of_kind[["benign_test", column]])
                if len(offsets):
                    shades |= dict(zip(of_kind["cost"], dots.get_facecolor(), strict=True))
            elif len(offsets):
                small += offsets.tolist()
        assert len(large) == int(defended["on_front"].sum()) > 0
        assert len(large) + len(small) == len(defended)
        brightness = [shades[cost][:3].sum() for cost in sorted(shades)]
        # The higher the cost, the darker the point.
        assert brightness == sorted(brightness, reverse=True) and brightness[0] > brightness[-1]
        (undefended,) = points.loc[points["members"] == "none", ["benign_test", column]].to_numpy()
        (line,) = (line for line in panel.lines if line.get_gid() == "none")
        np.testing.assert_allclose(line.get_xydata(), [100 * undefended])
        assert same_color(line.get_color(), BLACK)


@pytest.mark.parametrize("manner", ["usual", "attacked", "long"])
def test_numbers_of_the_front_are_at_their_points_and_in_the_key(manner: str) -> None:
    figure, points = cached_ensemble_figures(manner)["front"]
    candidates = plant_ensembles(manner)[1]
    named = points[points["number"] > 0].sort_values("number")
    assert set(named["members"]) <= set(candidates.loc[candidates["on_front"], "members"]) - {"none"}
    assert named["number"].tolist() == list(range(1, len(named) + 1))
    assert named["harmful_test"].is_monotonic_decreasing
    columns = ["harmful_test", *["attacked_test"] * (manner == "attacked")]
    for panel, column in zip(find_panels(figure.axes[0]), columns, strict=True):
        positions = {int(t.get_text()): t.xy for t in panel.texts}  # type: ignore[attr-defined]
        for row in named.to_dict("records"):
            np.testing.assert_allclose(
                positions[row["number"]], (100 * row["benign_test"], 100 * row[column])
            )
        assert len(positions) == len(named)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    key_lines = [text.get_text() for text in legend.get_texts()]
    for row in named.to_dict("records"):
        (line,) = (line for line in key_lines if line.startswith(f"{row['number']}  "))
        vote = row["how"] not in ("alone", "stack")
        assert line.split("  ")[1].startswith(f"{row['how']}: " if vote else row["members"][:9])
        if manner != "long":
            assert line.endswith(row["members"])


def test_no_number_covers_a_point_of_the_front_named_or_not() -> None:
    rates = np.random.default_rng(0).uniform(0.4, 0.6, (60, 2))
    candidates = {"members": [f"d{number}" for number in range(60)], "how": "alone", "on_front": True}
    points = pd.DataFrame({**candidates, "cost": 1.0, "attacked_test": np.nan})
    points = points.assign(
        benign_test=rates[:, 0], harmful_test=rates[:, 1], number=[*range(1, 16), *[0] * 45]
    )
    ax = draw_pareto_front(points)
    FigureCanvasAgg(ax.get_figure(root=True)).draw()  # type: ignore[arg-type]
    (panel,) = find_panels(ax)
    point_pixels = panel.transData.transform(100 * rates)
    assert len(panel.texts) == 15
    for text in panel.texts:
        box = Text.get_window_extent(text)
        assert not any(box.contains(*pixel) for pixel in point_pixels), f"{text.get_text()} covers a point"


def test_a_long_front_names_what_is_undominated_in_both_rates_and_the_caption_counts_the_rest() -> None:
    candidates = {"members": [f"d{number}" for number in range(30)], "how": "alone", "on_front": True}
    harmful = np.linspace(0.5, 0.9, 30)
    benign = 0.9 - harmful / 2
    benign[10:] -= 0.5  # d0 to d9 have better rates than these, which cost less
    harmful[10:] -= 0.4
    frame = pd.DataFrame({**candidates, "cost": np.linspace(3, 1, 30), "attacked_test": np.nan})
    for split in ("calibration", "test"):
        frame = frame.assign(**{f"harmful_{split}": harmful, f"benign_{split}": benign})
    points = build_front_points(frame)
    named = set(points.loc[points["number"] > 0, "members"])
    assert len(named) == MAX_NAMED_CANDIDATES == 15
    assert named == {f"d{number}" for number in (*range(10), *range(25, 30))}
    rows, _, families = plant_ensembles()
    points = build_ensemble_points(rows, frame, families)
    caption = read_caption(draw_run_figures(points, RUN)["front"][0])
    assert "15 of the front's 30 are not named" in caption
    assert "not named" not in read_caption(cached_ensemble_figures("long")["front"][0])


def test_a_cost_that_was_not_measured_is_white_and_one_cost_alone_is_drawn() -> None:
    _, candidates, _ = plant_ensembles("one")
    points = build_front_points(
        candidates.assign(cost=candidates["cost"].where(candidates["how"] == "alone"))
    )
    similar_costs = points.assign(cost=np.linspace(1, 1.01, len(points)))
    for case in (points, points.assign(cost=np.nan), points.assign(cost=2.0), similar_costs):
        ax = draw_pareto_front(case)
        FigureCanvasAgg(ax.get_figure(root=True)).draw()  # type: ignore[arg-type]
        has_cost = case.loc[case["on_front"], "cost"].notna()
        assert len(ax.child_axes) == 1 + bool(has_cost.any())
        for bar in (axes for axes in ax.child_axes if axes.get_gid() == "cost"):
            assert len({text.get_text() for text in bar.get_xticklabels()}) == 3
        front = case[case["on_front"] & (case["members"] != "none")]
        shades = [
            color
            for dots in find_panels(ax)[0].collections
            if str(dots.get_label()).startswith("front")
            for color in dots.get_facecolor()
        ]
        n_white = sum(same_color(color, "white") for color in shades)
        assert n_white == int(front["cost"].isna().sum())


def test_gain_is_drawn_over_cost() -> None:
    row = {"attack": "obedience", "defense": "word_drop", "family": "noise", "n": 8}
    row |= {f"prefill_ratio{end}": 2.0 for end in ENDS} | {f"delta_auroc{end}": 0.1 for end in ENDS}
    table = pd.DataFrame([row, row | {"defense": "none"}])
    (collection,) = scatter_collections(draw_cost(table))
    assert collection.get_offsets().tolist() == [[2.0, 0.1]]
    caption = read_caption(draw_run_figures({"cost": table}, TOY_RUN)["cost"][0])
    assert "8 queries" in caption and "Attack: obedience" in caption


def test_side_effects_are_drawn_at_shift_and_divergence_and_can_be_read() -> None:
    _, summary = plant_scores(6)
    estimates = {
        f"{name}{end}": value + 0.1 * np.arange(len(summary)) + room
        for name, value in (("kl_benign", 0.2), ("response_shift", 10.0))
        for end, room in (("", 0.0), ("_low", -0.05), ("_high", 0.05))
    }
    summary = summary.assign(**estimates)
    summary.loc[summary["defense"].isin(["none", "noise-3"]), "kl_benign"] = np.nan
    points = build_side_effect_points(summary)
    assert len(points) == len(summary) - 2 and "noise-3" not in set(points["defense"])
    ax = draw_side_effects(points)
    drawn = np.concatenate([dots.get_offsets() for dots in scatter_collections(ax)])
    np.testing.assert_allclose(drawn, points[["response_shift", "kl_benign"]])
    assert ax.get_xlabel() == "shift (points)"
    margins = build_side_effect_points(summary.assign(based_on="margins"))
    assert draw_side_effects(margins).get_xlabel() == "shift (nats)"
    caption = caption_side_effects(points, RUN)
    assert "on 24 benign queries" in caption and "Not drawn: defenses whose detector may answer" in caption
    ((figure, _),) = draw_run_figures({"side_effects": points}, RUN).values()
    assert_readable("side_effects", figure, collect_texts)
    assert not len(build_side_effect_points(summary.drop(columns="kl_benign")))
