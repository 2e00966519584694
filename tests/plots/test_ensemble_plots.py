"""Figures of ensembles show what their tables say: predictions, interactions, and what can be had."""

import io
import itertools
from functools import cache
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from conftest import pictures, readable
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from scipy.stats import spearmanr
from sklearn.metrics import r2_score

from analysis.plots.captions import CaptionContext
from analysis.plots.data import (
    FORECAST_PANELS,
    MAX_NAMED_CANDIDATES,
    MAX_SHAPED_VOTES,
    build_ensemble_points,
    build_forecast_points,
    build_front_points,
    build_interaction_cells,
)
from analysis.plots.heatmaps import draw_interactions
from analysis.plots.predictions import ENSEMBLE_STYLES, draw_forecast
from analysis.plots.style import BLACK, FAMILY_STYLES
from analysis.plots.tradeoffs import draw_pareto_front
from analysis.stats.bootstrap import ResamplingUnits
from analysis.stats.ensembles import (
    SplitScores,
    evaluate_single_defenses,
    evaluate_stacks,
    evaluate_votes,
    list_teams,
)
from analysis.stats.pareto import build_candidates
from analysis.stats.voting import MarginTable

THRESHOLD = -1.0
RUN = CaptionContext(
    "SmolLM2-135M-Instruct (float32)", "twins", "test", THRESHOLD, ("I", "Sorry"), ("Sure", "Here")
)
OF = ("reminders", "backdoor", "refactoring", "noise", "tuning")
MANNERS = {
    "usual": {},
    "pair": {"defenses": 2, "ran": 1},
    "one": {"defenses": 5, "ran": 1},
    "votes": {"defenses": 3, "ran": 0},
    "long": {"defenses": 6, "name": "/a_defense_with_a_very_long_name(copies=10,$q$=0.1,more=7)"},
    "attacked": {"attacks": ("direct", "base64", "./my attack.py")},
    "refusing": {"defenses": 5, "up": 30.0},
    "many": {"defenses": 15, "ran": 30},
}


@cache
def halves(
    defenses: int = 8,
    ran: int = 11,
    name: str = "",
    attacks: tuple[str, ...] = ("direct",),
    up: float = 0.0,
    n: int = 24,
) -> tuple[list[SplitScores], list[str], list[tuple[str, ...]]]:
    """Return both halves under each attack, defenses and stacks; a stack has less shift than its sum."""
    generator = np.random.default_rng(defenses)
    names = [f"{OF[number % len(OF)]}-{number}{name}" for number in range(defenses)]
    pairs = list_teams(names, 2)
    chosen = [pairs[place] for place in sorted(generator.permutation(len(pairs))[:ran])]
    does = generator.normal([1.0, 0.3], 1.0, (defenses, 2))
    is_harmful, found = np.repeat([True, False], n), []
    for (number, attack), split in itertools.product(enumerate(attacks), ("calibration", "test")):
        before = generator.normal(np.where(is_harmful, 0.5 - number, -2.0) + up, 1.6)
        noise = generator.normal(0, 0.6, (2 * n, defenses))
        each = before[:, None] + does[:, 0] + np.where(is_harmful, 0.5, -0.5)[:, None] * does[:, 1] + noise
        columns = [before, *each.T]
        for team in chosen:
            one, two = (names.index(member) for member in team)
            less = 0.4 * does[one, 0] * does[two, 0] + generator.normal(0, 0.4, 2 * n)
            columns.append(each[:, one] + each[:, two] - before - less)
        board = MarginTable(
            ("none", *names, *map("+".join, chosen)), np.stack(columns, axis=1), before, is_harmful
        )
        pair = pd.Series([f"p{place % n}" for place in range(2 * n)])
        found.append(SplitScores(attack, split, board, ResamplingUnits.from_pairs(pair, is_harmful)))
    return found, names, chosen


@cache
def planted(manner: str = "usual") -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """Return rows of ensembles, candidates and families."""
    each, names, chosen = halves(**MANNERS[manner])
    wanted, found = list_teams(names, 3), []
    for half in each:
        (fitted_to,) = (one for one in each if (one.attack, one.split) == (half.attack, "calibration"))
        tables = (
            evaluate_single_defenses(half, ["none", *names]),
            evaluate_votes(half, wanted, fitted_to),
            evaluate_stacks(half, chosen),
        )
        found.append(pd.concat([table for table in tables if len(table)], ignore_index=True))
    rows = pd.concat(found, ignore_index=True)
    rows["kind"] = np.where(rows["members"].str.len() % 2, "intra", "inter")
    for name, wide in (("shift", 0.3), ("discrimination", 0.2)):
        for side, way in (("low", -1), ("high", 1)):
            stacked = rows["how"] == "stack"
            for read in ("observed", "interaction"):
                value = (rows[f"{read}_{name}"] + way * wide).where(stacked)
                rows[f"{read}_{name}_{side}"] = value
    costs = {"none": 1.0, **{name: 1 + 0.5 * place for place, name in enumerate(names)}}
    found_front = build_candidates(
        rows, lambda asked: sum(costs[one] for name in asked for one in name.split("+"))
    )
    return rows, found_front, dict(zip(names, itertools.cycle(OF), strict=False))


@cache
def made(manner: str) -> dict[str, tuple[Figure, pd.DataFrame]]:
    rows, found, families = planted(manner)
    return pictures(
        build_ensemble_points(rows, found, families),
        RUN,
        (24, 24),
        MANNERS[manner].get("attacks", ("direct",)),
    )


def panels(ax: Axes) -> list[Axes]:
    """Return the axes inside of others, less that of the color bar."""
    return [panel for panel in ax.child_axes if panel.get_gid() != "cost"]


def drawn(panel: Axes) -> dict[tuple[str, bool], Any]:
    """Return the points of each look, by label and whether they are hollow."""
    found: dict[tuple[str, bool], Any] = {}
    for dots in panel.collections:
        if len(at := np.asarray(dots.get_offsets())) and not str(dots.get_label()).startswith("_"):
            fill = dots.get_facecolor()
            hollow = len(fill) == 0 or same_color(fill[0], "white")
            found[str(dots.get_label()), hollow] = at
    return found


def written(figure: Figure) -> list[Text]:
    """Return every text that a reader sees."""
    (host,) = figure.axes[:1]
    legend = host.get_legend()
    assert legend is not None
    texts = [*figure.texts, *host.texts, *legend.get_texts(), legend.get_title()]
    for ax in host.child_axes:
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            texts += [label for place, label in labels if low <= place <= high]
        texts += [*ax.texts, ax.xaxis.label, ax.yaxis.label, ax.title, ax._left_title]  # type: ignore[attr-defined]
    return [text for text in texts if text.get_text().strip() and text.get_visible()]


@pytest.mark.parametrize("manner", MANNERS)
def test_no_text_hides_another_and_none_leaves_the_canvas(manner: str) -> None:
    for kind, (figure, _) in made(manner).items():
        readable(kind, figure, written, slack=0.6)


def test_which_figures_there_are() -> None:
    assert list(made("usual")) == ["forecast", "interactions", "front"]
    assert list(made("votes")) == ["forecast", "front"]
    with pytest.raises(ValueError, match="one attack"):
        draw_forecast(planted("attacked")[0])


@pytest.mark.parametrize("manner", ["usual", "pair", "votes", "attacked"])
def test_each_ensemble_is_drawn_where_it_was_predicted_and_observed(manner: str) -> None:
    points = made(manner)["forecast"][1]
    rows = planted(manner)[0]
    wanted = rows[(rows["attack"] == "direct") & (rows["split"] == "test") & (rows["how"] != "alone")]
    assert len(points) == len(wanted) > 0
    for panel, (name, (words, factor, _)) in zip(
        panels(draw_forecast(points)), FORECAST_PANELS.items(), strict=True
    ):
        assert panel.get_title(loc="left") == words
        looks = drawn(panel)
        assert sum(map(len, looks.values())) == len(wanted)
        for (how, hollow), at in looks.items():
            here = wanted[(wanted["how"] == how) & ((wanted["kind"] == "inter") == hollow)]
            np.testing.assert_allclose(at, factor * here[[f"predicted_{name}", f"observed_{name}"]])
        (diagonal,) = (line for line in panel.lines if line.get_gid() == "diagonal")
        assert diagonal.get_slope() == 1  # type: ignore[attr-defined]
        assert panel.get_xlim() == panel.get_ylim()


def test_each_way_has_its_color_and_stacks_lie_on_top() -> None:
    for panel in panels(draw_forecast(made("usual")["forecast"][1])):
        for dots in panel.collections:
            if (how := str(dots.get_label())) in ENSEMBLE_STYLES:
                edge, fill = dots.get_edgecolor()[0], dots.get_facecolor()
                colors = [color for color in (edge, *fill) if not same_color(color[:3], "white")]
                assert colors and all(same_color(c[:3], to_rgba(ENSEMBLE_STYLES[how][0])[:3]) for c in colors)
                assert (dots.get_zorder() > 3) == (how == "stack")


def test_stacks_have_the_bars_of_the_table_and_they_are_inside() -> None:
    points = made("usual")["forecast"][1]
    points = points.assign(observed_shift_high=points["observed_shift_high"] + 9)  # beyond all points
    panel = panels(draw_forecast(points))[0]
    bars = {tuple(map(tuple, p.vertices)) for c in panel.collections for p in c.get_paths() if len(p) == 2}
    stacked = points[points["how"] == "stack"]
    assert len(stacked) == 11
    for x, low, high in stacked[["predicted_shift", "observed_shift_low", "observed_shift_high"]].to_numpy():
        assert ((x, low), (x, high)) in bars
        assert panel.get_ylim()[0] < low and high < panel.get_ylim()[1]


@pytest.mark.parametrize("manner", ["usual", "refusing"])
def test_the_measures_above_a_panel_are_those_of_its_points(manner: str) -> None:
    points = made(manner)["forecast"][1]
    for panel, name in zip(panels(draw_forecast(points)), FORECAST_PANELS, strict=True):
        (told,) = (text.get_text() for text in panel.texts if text.get_gid() == "follows")
        lines = told.replace("\N{MINUS SIGN}", "-").split("\n")
        for line, word, group in zip(
            lines,
            ("stacks", "votes"),
            (points[points["how"] == "stack"], points[points["how"] != "stack"]),
            strict=True,
        ):
            if name in ("shift", "discrimination"):  # of a mean they are right by definition
                group = group[~group["how"].isin(["mean", "fitted"])]
            hoped, came = group[f"predicted_{name}"], group[f"observed_{name}"]
            if came.nunique() == 1:
                wanted = "R² \N{EN DASH}, ρ \N{EN DASH}"
            elif hoped.nunique() == 1:
                wanted = f"R² {r2_score(came, hoped):.2f}, ρ \N{EN DASH}"
            else:
                wanted = f"R² {r2_score(came, hoped):.2f}, ρ {spearmanr(hoped, came).statistic:.2f}"
            assert line == f"{len(group)} {word}: {wanted}"


def test_two_points_have_no_measure_and_a_missing_one_is_not_counted() -> None:
    points = made("usual")["forecast"][1]
    holed = points.assign(observed_delta_auroc=points["observed_delta_auroc"].where(points["how"] == "mean"))
    shift, _, auroc, *_ = panels(draw_forecast(holed))
    mean = int((points["how"] == "mean").sum())
    assert sum(map(len, drawn(shift).values())) == len(points)
    assert sum(map(len, drawn(auroc).values())) == mean
    assert [text.get_text().split(":")[0] for text in auroc.texts] == [f"{mean} votes"]
    few = panels(draw_forecast(points[points["how"] == "stack"][:2]))[0]
    assert few.texts[0].get_text() == "2 stacks: R² \N{EN DASH}, ρ \N{EN DASH}"


def test_a_crowd_of_votes_is_all_there_as_specks_in_one_mixed_layer() -> None:
    figure, points = made("many")["forecast"]
    many = int((points["how"] != "stack").sum())
    assert many > MAX_SHAPED_VOTES
    for panel, (name, (_, factor, _)) in zip(panels(figure.axes[0]), FORECAST_PANELS.items(), strict=True):
        (dots,) = (c for c in panel.collections if c.get_label() == "votes")
        at, colors = np.asarray(dots.get_offsets()), dots.get_facecolor()
        assert len(at) == many and dots.get_rasterized() and dots.get_sizes()[0] < 4
        for how in ("mean", "fitted"):
            here = (colors[:, :3] == to_rgba(ENSEMBLE_STYLES[how][0])[:3]).all(axis=1)
            rows = points[points["how"] == how]
            wanted = factor * rows[[f"predicted_{name}", f"observed_{name}"]].to_numpy(float)
            np.testing.assert_allclose(np.sort(at[here], axis=0), np.sort(wanted, axis=0), rtol=1e-6)
        changes = (colors[1:] != colors[:-1]).any(axis=1).mean()
        assert changes > 0.5
        assert sum(map(len, drawn(panel).values())) == len(points)
    assert "shown of stacks only" in figure.texts[1].get_text().replace("\n", " ")


def boxes_of(ax: Axes) -> dict[str, Any]:
    found = (box for box in ax.patches if isinstance(box, Rectangle))
    return {str(box.get_gid()): box for box in found if str(box.get_gid()).startswith("interaction")}


def test_cells_are_those_of_stacks_of_two_and_names_may_hold_a_slash() -> None:
    rows, _, families = planted()
    cells = build_interaction_cells(rows, families)
    assert len(cells) == 11
    both = [["a/b", "c"], ["c", "d"]]
    row = rows[(rows["how"] == "stack") & (rows["split"] == "test")].iloc[0]
    strange = pd.DataFrame([{**row, "members": "+".join(team)} for team in both])
    more = pd.DataFrame([{**row, "members": "a+b+c", "size": 3}, {**row, "observed_shift": np.nan}])
    found = build_interaction_cells(pd.concat([strange, more]), {"a/b": "noise"})
    assert found[["first", "second"]].to_numpy().tolist() == both
    assert found["family_first"].tolist() == ["noise", "other"]
    bare = build_interaction_cells(
        strange.drop(columns=[c for c in strange if c[-4:] in ("_low", "high")]), {}
    )
    assert bare["interaction_shift_low"].isna().all() and bare["interaction_shift"].notna().all()


def test_a_pair_has_its_number_and_color_on_both_sides_of_the_diagonal_and_others_are_empty() -> None:
    rows, _, families = planted()
    cells = build_interaction_cells(rows, families)
    cells.loc[0, ["interaction_shift", "interaction_shift_low", "interaction_shift_high"]] = [0.1, -0.1, 0.4]
    ax = draw_interactions(cells)
    names = {*cells["first"], *cells["second"]}
    boxes = boxes_of(ax)
    texts = {str(text.get_gid()): text for text in ax.texts if text.get_gid()}
    assert len(boxes) == 2 * len(names) * (len(names) - 1)  # two panels, no diagonal
    told = 0
    for column in ("interaction_shift", "interaction_discrimination"):
        digits = 2 if cells[column].abs().max() < 1 else 1
        ran = {frozenset(row[:2]): row[2] for row in cells[["first", "second", column]].to_numpy()}
        ends = {
            frozenset(row[:2]): tuple(row[2:])
            for row in cells[["first", "second", f"{column}_low", f"{column}_high"]].to_numpy()
        }
        for one, two in itertools.permutations(names, 2):
            gid = f"{column} {one} {two}"
            shade = np.array(boxes[gid].get_facecolor()[:3])
            if (value := ran.get(frozenset((one, two)))) is None:
                assert gid not in texts and shade[0] == shade[1] == shade[2] < 1
                continue
            low, high = ends[frozenset((one, two))]
            shown = texts[gid].get_text().replace("\N{MINUS SIGN}", "-")
            assert float(shown) == pytest.approx(value, abs=0.51 * 10**-digits)
            assert (texts[gid].get_weight() == "bold") == (low > 0 or high < 0)
            assert (shade[2] > shade[0]) == (value > 0)
            told += 1
    assert told == 4 * len(cells)
    weights = {texts[gid].get_weight() for gid in texts if gid.startswith("interaction")}
    assert weights == {"bold", "normal"}


def test_colors_are_symmetric_about_no_interaction_in_either_panel() -> None:
    cell = {"attack": "direct", "family_first": "noise", "family_second": "tuning"}
    values = {("a", "b"): (-2.0, 0.0), ("a", "c"): (2.0, 0.5), ("b", "c"): (1.0, -0.25)}
    cells = pd.DataFrame(
        [
            {**cell, "first": one, "second": two, "interaction_shift": x, "interaction_discrimination": y}
            for (one, two), (x, y) in values.items()
        ]
    )
    ax = draw_interactions(cells)
    boxes = {gid: np.array(box.get_facecolor()[:3]) for gid, box in boxes_of(ax).items()}
    assert boxes["interaction_discrimination a b"].min() > 0.99  # white
    away = {gid: np.abs(1 - shade).sum() for gid, shade in boxes.items()}
    assert away["interaction_shift a c"] > away["interaction_shift b c"] > 0.2
    np.testing.assert_allclose(
        boxes["interaction_discrimination a c"], boxes["interaction_shift a c"]
    )  # each its own scale
    scales = [text.get_text() for text in ax.texts if "fuses" in text.get_text()]
    assert scales == ["\N{MINUS SIGN}2.0 refuses less", "refuses more +2.0"]
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["noise", "tuning"]  # all pairs were run


def test_families_stand_together_in_the_palettes_order_with_a_strip_of_their_color() -> None:
    figure, cells = made("many")["interactions"]
    families = planted("many")[2]
    ax = draw_interactions(cells.sample(frac=1, random_state=1))
    shown = sorted((t for t in ax.texts if t.get_gid() == "row"), key=lambda t: -t.get_position()[1])
    names = [text.get_text() for text in shown]
    assert set(names) == {*cells["first"], *cells["second"]} and len(names) > 12
    places = [list(FAMILY_STYLES).index(families[name]) for name in names]
    assert places == sorted(places)
    strips = [box for box in ax.patches if isinstance(box, Rectangle) and box.get_gid() == "family"]
    assert len(strips) == 4 * len(names)
    for text in shown:
        (strip,) = (
            box
            for box in strips
            if box.get_x() < 0 and box.get_y() < text.get_position()[1] < box.get_y() + box.get_height()
        )
        assert same_color(strip.get_facecolor(), FAMILY_STYLES[families[text.get_text()]][0])
    dots = [t for t in figure.axes[0].texts if t.get_text() == "\N{BULLET}"]
    sure = sum(
        int(((cells[f"{name}_low"] > 0) | (cells[f"{name}_high"] < 0)).sum())
        for name in ("interaction_shift", "interaction_discrimination")
    )
    assert len(dots) == 2 * sure > 0
    assert "Dot: the 95" in figure.texts[1].get_text()


@pytest.mark.parametrize("manner", ["usual", "attacked", "many"])
def test_every_candidate_is_drawn_and_the_front_is_large_and_colored_by_cost(manner: str) -> None:
    figure, points = made(manner)["front"]
    columns = ["harmful_test", *["attacked_test"] * (manner == "attacked")]
    assert len(panels(figure.axes[0])) == len(columns)
    defended = points[points["members"] != "none"]
    for panel, column in zip(panels(figure.axes[0]), columns, strict=True):
        large, small, shades = [], [], {}
        for dots in panel.collections:
            at = np.asarray(dots.get_offsets())
            if str(dots.get_label()).startswith("front"):
                large += at.tolist()
                how = str(dots.get_label()).split()[1]
                front = defended[defended["on_front"]]
                kinds = front["how"].where(front["how"].isin(["alone", "stack"]), "vote")
                of_kind = front[kinds == how]
                np.testing.assert_allclose(at, 100 * of_kind[["benign_test", column]])
                shades |= dict(zip(of_kind["cost"], dots.get_facecolor(), strict=True)) if len(at) else {}
            elif len(at):
                small += at.tolist()
        assert len(large) == int(defended["on_front"].sum()) > 0
        assert len(large) + len(small) == len(defended)
        light = [shades[cost][:3].sum() for cost in sorted(shades)]
        assert light == sorted(light, reverse=True) and light[0] > light[-1]  # darker, the more it costs
        (none,) = points.loc[points["members"] == "none", ["benign_test", column]].to_numpy()
        (line,) = (line for line in panel.lines if line.get_gid() == "none")
        np.testing.assert_allclose(line.get_xydata(), [100 * none])
        assert same_color(line.get_color(), BLACK)


@pytest.mark.parametrize("manner", ["usual", "attacked", "long"])
def test_numbers_of_the_front_stand_at_their_points_and_in_the_key(manner: str) -> None:
    figure, points = made(manner)["front"]
    found = planted(manner)[1]
    named = points[points["number"] > 0].sort_values("number")
    assert set(named["members"]) <= set(found.loc[found["on_front"], "members"]) - {"none"}
    assert named["number"].tolist() == list(range(1, len(named) + 1))
    assert named["harmful_test"].is_monotonic_decreasing
    columns = ["harmful_test", *["attacked_test"] * (manner == "attacked")]
    for panel, column in zip(panels(figure.axes[0]), columns, strict=True):
        at = {int(t.get_text()): t.xy for t in panel.texts}  # type: ignore[attr-defined]
        for row in named.to_dict("records"):
            np.testing.assert_allclose(at[row["number"]], (100 * row["benign_test"], 100 * row[column]))
        assert len(at) == len(named)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    key = [text.get_text() for text in legend.get_texts()]
    for row in named.to_dict("records"):
        (line,) = (line for line in key if line.startswith(f"{row['number']}  "))
        vote = row["how"] not in ("alone", "stack")
        assert line.split("  ")[1].startswith(f"{row['how']}: " if vote else row["members"][:9])
        if manner != "long":
            assert line.endswith(row["members"])


def test_no_number_covers_a_point_of_the_front_named_or_not() -> None:
    at = np.random.default_rng(0).uniform(0.4, 0.6, (60, 2))
    found = {"members": [f"d{number}" for number in range(60)], "how": "alone", "on_front": True}
    points = pd.DataFrame({**found, "cost": 1.0, "attacked_test": np.nan})
    points = points.assign(benign_test=at[:, 0], harmful_test=at[:, 1], number=[*range(1, 16), *[0] * 45])
    ax = draw_pareto_front(points)
    FigureCanvasAgg(ax.get_figure(root=True)).draw()  # type: ignore[arg-type]
    (panel,) = panels(ax)
    spots = panel.transData.transform(100 * at)
    assert len(panel.texts) == 15
    for text in panel.texts:
        box = Text.get_window_extent(text)
        assert not any(box.contains(*spot) for spot in spots), f"{text.get_text()} covers a point"


def test_of_a_long_front_those_are_named_that_none_beats_in_both_rates_and_the_caption_counts_the_rest() -> (
    None
):
    found = {"members": [f"d{number}" for number in range(30)], "how": "alone", "on_front": True}
    harmful = np.linspace(0.5, 0.9, 30)
    benign = 0.9 - harmful / 2
    benign[10:] -= 0.5  # these are beaten at any cost by d0 to d9, but refuse more
    harmful[10:] -= 0.4
    frame = pd.DataFrame({**found, "cost": np.linspace(3, 1, 30), "attacked_test": np.nan})
    for split in ("calibration", "test"):
        frame = frame.assign(**{f"harmful_{split}": harmful, f"benign_{split}": benign})
    points = build_front_points(frame)
    named = set(points.loc[points["number"] > 0, "members"])
    assert len(named) == MAX_NAMED_CANDIDATES == 15
    assert named == {f"d{number}" for number in (*range(10), *range(25, 30))}
    rows, _, families = planted()
    points = build_ensemble_points(rows, frame, families)
    caption = pictures(points, RUN)["front"][0].texts[1].get_text().replace("\n", " ")
    assert "15 of the front's 30 are not named" in caption
    assert "not named" not in made("long")["front"][0].texts[1].get_text()


def test_a_cost_that_was_not_measured_is_white_and_one_cost_alone_is_drawn() -> None:
    _, found, _ = planted("one")
    points = build_front_points(found.assign(cost=found["cost"].where(found["how"] == "alone")))
    near = points.assign(cost=np.linspace(1, 1.01, len(points)))
    for case in (points, points.assign(cost=np.nan), points.assign(cost=2.0), near):
        ax = draw_pareto_front(case)
        FigureCanvasAgg(ax.get_figure(root=True)).draw()  # type: ignore[arg-type]
        known = case.loc[case["on_front"], "cost"].notna()
        assert len(ax.child_axes) == 1 + bool(known.any())
        for bar in (axes for axes in ax.child_axes if axes.get_gid() == "cost"):
            assert len({text.get_text() for text in bar.get_xticklabels()}) == 3
        front = case[case["on_front"] & (case["members"] != "none")]
        shades = [
            color
            for dots in panels(ax)[0].collections
            if str(dots.get_label()).startswith("front")
            for color in dots.get_facecolor()
        ]
        white = sum(same_color(color, "white") for color in shades)
        assert white == int(front["cost"].isna().sum())


@pytest.mark.parametrize("manner", ["usual", "attacked", "one"])
def test_a_figure_can_be_drawn_again_from_its_csv_alone(manner: str) -> None:
    draw = {"forecast": draw_forecast, "interactions": draw_interactions, "front": draw_pareto_front}
    for kind, (_, table) in made(manner).items():
        again = draw[kind](pd.read_csv(io.StringIO(table.to_csv(index=False))))
        first = draw[kind](table)
        for one, two in zip([first, *first.child_axes], [again, *again.child_axes], strict=True):
            assert [text.get_text() for text in one.texts] == [text.get_text() for text in two.texts]
            for a, b in zip(one.collections, two.collections, strict=True):
                np.testing.assert_allclose(a.get_offsets(), b.get_offsets(), atol=1e-9)


@pytest.mark.parametrize("kind", ["forecast", "interactions", "front"])
def test_captions_stand_on_their_own(kind: str) -> None:
    caption = made("usual")[kind][0].texts[1].get_text().replace("\n", " ").replace("\u00a0", " ")
    for word in (
        "24 harmful", "24 benign", RUN.model, "twins, test split", "\u201cSorry\u201d", "\u201cSure\u201d",
        "no judge: first-token readout", "Attack: none", "threshold \u22121.00 nats", "Intervals: ",
    ):  # fmt: skip
        assert word.replace(" ", "") in caption.replace(" ", "")  # a line may end inside of a name
    drawn = {"forecast": "Bars on stacks", "interactions": "Bold", "front": "Intervals: not drawn"}
    assert drawn[kind] in caption
    several = made("attacked")["front"][0].texts[1].get_text().replace("\n", " ")
    assert "mean over 3 ways" in several and "Attack: none, base64, ./my attack.py" in several


def test_drawing_leaves_settings_and_tables_alone_and_uses_the_given_axes() -> None:
    rows, found, families = planted()
    settings, kept = dict(mpl.rcParams), (rows.copy(), found.copy())
    axes = Figure(figsize=(24, 6)).subplots(1, 3)
    tables = build_forecast_points(rows), build_interaction_cells(rows, families), build_front_points(found)
    for ax, draw, table in zip(
        axes, (draw_forecast, draw_interactions, draw_pareto_front), tables, strict=True
    ):
        before = table.copy()
        assert draw(table, ax) is ax
        pd.testing.assert_frame_equal(table, before)
    build_ensemble_points(rows, found, families)
    assert dict(mpl.rcParams) == settings
    pd.testing.assert_frame_equal(rows, kept[0])
    pd.testing.assert_frame_equal(found, kept[1])
