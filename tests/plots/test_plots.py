"""Figures show what the tables say, all of it can be read, and drawing needs nothing but the tables."""

import io
import itertools
import subprocess
import sys
from functools import cache
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from conftest import pictures, readable
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text

from analysis.plots.captions import CaptionContext
from analysis.plots.data import (
    build_analysis_points,
    build_attack_cells,
    build_margin_curves,
    build_plane_points,
    build_roc_points,
)
from analysis.plots.figures import FIGURE_TITLES
from analysis.plots.heatmaps import caption_attack_grid, draw_attack_grid
from analysis.plots.layout import finish_figure, fit_text, measure_text_width, wrap_text
from analysis.plots.plane import caption_plane, draw_plane
from analysis.plots.scores import draw_margins, draw_roc
from analysis.plots.style import BLACK, GREY

THRESHOLD = -1.0
RUN = CaptionContext(
    "SmolLM2-135M-Instruct (float32)", "twins", "test", THRESHOLD, ("I", "Sorry"), ("Sure", "Here")
)
FAMILIES = ("reminders", "backdoor", "refactoring", "noise", "tuning", "steering", "control")
ESTIMATES = ("refusal_rate", "over_refusal_rate", "auroc", "delta_auroc", "shift", "discrimination")


def planted(defenses: int, manner: str = "usual", n: int = 24, attack: str = "direct") -> tuple[Any, Any]:
    """Return scores and a summary with known shifts; `manner` is usual, long (names) or same (points)."""
    generator = np.random.default_rng(defenses)
    plain = {True: generator.normal(-0.5, 1.5, n), False: generator.normal(-2.5, 1.5, n)}
    rows, summary = [], []
    for number in range(-1, defenses):
        family = "none" if number < 0 else FAMILIES[number % len(FAMILIES)]
        name = "none" if number < 0 else f"{family}-{number}"
        shift, gain = (0.0, 0.0) if number < 0 else (number % 5, (number % 3) - 0.5)
        if manner == "same" and number >= 0:
            shift, gain = 1.0, 0.5
        if manner == "long" and number >= 0:
            name = f"{name}+./somewhere/a_defense_with_a_very_long_name.py" + "(copies=10, $q$=0.1)" * 8
        margin = {c: plain[c] + shift + (gain / 2 if c else -gain / 2) for c in (True, False)}
        for harmful, index in itertools.product((True, False), range(n)):
            query = f"{'h' if harmful else 'b'}{index}"
            rows.append((query, f"p{index}", "any", harmful, attack, name, margin[harmful][index]))
        wins = margin[True][:, None] > margin[False]
        values = [(margin[True] > THRESHOLD).mean(), (margin[False] > THRESHOLD).mean(), wins.mean()]
        values += [wins.mean() - (plain[True][:, None] > plain[False]).mean(), shift, gain]
        about = {"attack": attack, "defense": name, "family": family, "n_harmful": n, "n_benign": n}
        for estimate, value in zip(ESTIMATES, values, strict=True):
            about |= {estimate: value, f"{estimate}_low": value - 0.1, f"{estimate}_high": value + 0.2}
        summary.append(about)
    columns = ["query", "pair", "category", "harmful", "attack", "defense", "margin"]
    return pd.DataFrame(rows, columns=columns), pd.DataFrame(summary)


def figures(scores: pd.DataFrame, summary: pd.DataFrame, run: CaptionContext = RUN) -> Any:
    return pictures(build_analysis_points(scores, summary, run.threshold), run)


@cache
def made(defenses: int, manner: str) -> dict[str, tuple[Figure, pd.DataFrame]]:
    return figures(*planted(defenses, manner))


def by_gid(ax: Axes) -> dict[str, Any]:
    return {str(line.get_gid()): line for line in ax.lines if line.get_gid()}


def points_of(ax: Axes) -> dict[str, Any]:
    """Return the offsets of each family's scatter."""
    return {
        str(c.get_label()): np.asarray(c.get_offsets())
        for c in ax.collections
        if len(c.get_offsets()) and not str(c.get_label()).startswith("_")
    }


def artists(ax: Axes) -> tuple[list[str], Any]:
    """Return everything drawn, as words and as numbers."""
    legend = ax.get_legend()
    assert legend is not None
    texts = [*ax.texts, *legend.get_texts(), *ax.get_yticklabels()]
    words = [*(text.get_text() for text in texts), *(str(line.get_color()) for line in ax.lines)]
    numbers = [np.asarray(line.get_xydata()) for line in ax.lines]
    numbers += [path.vertices for c in ax.collections for path in c.get_paths()]
    numbers += [np.asarray(c.get_offsets()) for c in ax.collections]
    numbers += [np.array([text.get_position() for text in texts])]
    return words, np.concatenate([np.ravel(part) for part in numbers])


def written(figure: Figure) -> list[Text]:
    """Return every text that a reader sees."""
    (ax,) = figure.axes
    legend = ax.get_legend()
    key = [*legend.get_texts(), legend.get_title()] if legend is not None else []
    ticks = []
    for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
        labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        ticks += [label for place, label in labels if low <= place <= high and ax.axison]
    texts = [*figure.texts, *ax.texts, *key, ax.xaxis.label, ax.yaxis.label]
    return [text for text in [*texts, *ticks] if text.get_text().strip() and text.get_visible()]


def test_importing_plots_loads_no_model_library_and_no_pyplot() -> None:
    heavy = ("torch", "transformers", "transformer_lens", "defenses", "matplotlib.pyplot", "seaborn")
    code = f"import sys, analysis.plots; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("defenses", [2, 8])
def test_margins_draws_the_densities_of_the_table_above_and_below_each_row(defenses: int) -> None:
    curves = build_margin_curves(*planted(defenses), THRESHOLD)
    ax = draw_margins(curves)
    lines = by_gid(ax)
    scale = 0.44 / curves["density"].max()
    names = list(dict.fromkeys(curves["defense"]))
    for (name, harmful), half in curves.groupby(["defense", "harmful"]):
        gid = f"{name} {'harmful' if harmful else 'benign'}"
        height = -names.index(str(name)) + (1 if harmful else -1) * scale * half["density"]
        np.testing.assert_allclose(lines[gid].get_xydata(), np.stack([half["margin"], height], axis=1))
        assert lines[f"{gid} median"].get_xdata()[0] == half["median"].iloc[0]
    outlines = [line for line in ax.lines if line.get_gid() == "undefended"]
    assert len(outlines) == 2 * defenses
    assert lines["threshold"].get_xdata()[0] == THRESHOLD


def test_densities_hold_one_and_medians_move_by_the_planted_shift() -> None:
    curves = build_margin_curves(*planted(5), THRESHOLD)
    for _, half in curves.groupby(["defense", "harmful"]):
        assert np.trapezoid(half["density"], half["margin"]) == pytest.approx(1, abs=0.01)
    median = curves.groupby(["defense", "harmful"])["median"].first()
    # defense 3 is planted with shift 3 and discrimination -0.5
    assert median["noise-3", True] - median["none", True] == pytest.approx(2.75)
    assert median["noise-3", False] - median["none", False] == pytest.approx(3.25)


def test_plane_puts_each_defense_at_its_estimates_with_both_intervals() -> None:
    points = build_plane_points(planted(8)[1])
    ax = draw_plane(points)
    assert "none" not in set(points["defense"])
    for family, group in points.groupby("family"):
        np.testing.assert_allclose(points_of(ax)[str(family)], group[["shift", "discrimination"]])
    segments = {
        tuple(map(tuple, path.vertices)) for c in ax.collections for path in c.get_paths() if len(path) == 2
    }
    for row in points.to_dict("records"):
        x, y = row["shift"], row["discrimination"]
        assert ((row["shift_low"], y), (row["shift_high"], y)) in segments
        assert ((x, row["discrimination_low"]), (x, row["discrimination_high"])) in segments
    assert by_gid(ax)["undefended"].get_xydata().tolist() == [[0, 0]]


def test_roc_draws_the_rates_of_the_table_and_marks_the_threshold() -> None:
    scores, summary = planted(8)
    points = build_roc_points(scores, summary, THRESHOLD)
    lines = by_gid(draw_roc(points))
    for name, curve in points.groupby("defense"):
        rates = curve[["benign_refused", "harmful_refused"]]
        np.testing.assert_array_equal(lines[str(name)].get_xydata(), rates)
        refused = scores[scores["defense"] == name].assign(refused=lambda rows: rows["margin"] > THRESHOLD)
        share = refused.groupby("harmful")["refused"].mean()
        np.testing.assert_allclose(lines[f"{name} mark"].get_xydata(), [[share[False], share[True]]])
    assert same_color(lines["none"].get_color(), BLACK)


def test_area_under_the_drawn_curve_is_the_auroc_also_with_ties() -> None:
    scores, summary = planted(2)
    scores["margin"] = scores["margin"].round()  # many ties
    for name, curve in build_roc_points(scores, summary, THRESHOLD).groupby("defense"):
        ends = curve[["benign_refused", "harmful_refused"]].iloc[[0, -1]]
        assert ends.to_numpy().tolist() == [[0, 0], [1, 1]]
        rows = scores[scores["defense"] == name]
        harmful, benign = (rows.loc[rows["harmful"] == c, "margin"].to_numpy() for c in (True, False))
        wins = (harmful[:, None] > benign).mean() + (harmful[:, None] == benign).mean() / 2
        assert np.trapezoid(curve["harmful_refused"], curve["benign_refused"]) == pytest.approx(wins)


@pytest.mark.parametrize("kind", ["margins", "plane", "roc"])
def test_a_figure_can_be_drawn_again_from_its_csv_alone(kind: str) -> None:
    table = made(8, "usual")[kind][1]
    draw = {"margins": draw_margins, "plane": draw_plane, "roc": draw_roc}[kind]
    again = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    (words, numbers), (words_again, numbers_again) = artists(draw(table)), artists(draw(again))
    assert words_again == words
    np.testing.assert_allclose(numbers_again, numbers, atol=1e-9)


def test_controls_are_grey_and_defenses_are_not() -> None:
    scores, summary = planted(7)
    ax = draw_plane(build_plane_points(summary))
    colors = {
        str(c.get_label()): c.get_facecolor()[0] for c in ax.collections if str(c.get_label()) in FAMILIES
    }
    assert {
        family for family, color in colors.items() if same_color(color, (*mpl.colors.to_rgb(GREY), 1))
    } == {"control"}
    lines = by_gid(draw_roc(build_roc_points(scores, summary, THRESHOLD)))
    grey = {name for name, line in lines.items() if same_color(line.get_color(), GREY)}
    assert grey == {"control-6", "control-6 mark", "chance"}
    labels = draw_margins(build_margin_curves(scores, summary, THRESHOLD)).get_yticklabels()
    assert [text.get_text() for text in labels if text.get_color() != BLACK] == ["control-6 (control)"]


def test_past_six_defenses_roc_colors_those_whose_auroc_differs_most() -> None:
    scores, summary = planted(20)
    summary.loc[
        summary["defense"] == "steering-5", "delta_auroc"
    ] = -0.9  # a great loss is a great difference
    lines = by_gid(draw_roc(build_roc_points(scores, summary, THRESHOLD)))
    colored = {n for n in summary["defense"] if not same_color(lines[n].get_color(), GREY)} - {"none"}
    change = summary[~summary["family"].isin(["none", "control"])].set_index("defense")["delta_auroc"].abs()
    assert len(colored) == 6
    assert change[list(colored)].min() >= change.drop(list(colored)).max()


@pytest.mark.parametrize("manner", ["usual", "long", "same"])
@pytest.mark.parametrize("defenses", [0, 2, 8, 20])
def test_no_text_hides_another_and_none_leaves_the_canvas(defenses: int, manner: str) -> None:
    for kind, (figure, table) in made(defenses, manner).items():
        readable(kind, figure, written)
        if kind == "plane":
            (ax,) = figure.axes
            spots = ax.transData.transform(np.array([[0, 0], *table[["shift", "discrimination"]].to_numpy()]))
            for text in written(figure):
                box = Text.get_window_extent(text)
                covered = isinstance(text, Annotation) and any(box.contains(*spot) for spot in spots)
                assert not covered, f"{text.get_text()!r} covers a point"


def test_every_point_of_a_crowded_plane_has_its_number_and_its_name_in_the_key() -> None:
    figure, table = made(20, "same")["plane"]
    (ax,) = figure.axes
    numbers = sorted(int(text.get_text()) for text in ax.texts if text.get_text().isdigit())
    assert numbers == list(range(1, 21))
    legend = ax.get_legend()
    assert legend is not None
    key = [text.get_text() for text in legend.get_texts()]
    for name in table["defense"]:
        assert any(text.endswith(f"  {name}") for text in key)


@pytest.mark.parametrize("kind", ["margins", "plane", "roc"])
def test_captions_name_n_model_data_readout_judge_attack_and_interval(kind: str) -> None:
    figure = made(8, "usual")[kind][0]
    caption = figure.texts[1].get_text().replace("\n", " ").replace("\u00a0", " ")
    for word in (
        "24 harmful", "24 benign", RUN.model, "twins, test split", "\u201cSorry\u201d", "\u201cSure\u201d",
        "no judge: first-token readout", "95 % paired bootstrap", "Attack: none", "threshold \u22121.00 nats",
    ):  # fmt: skip
        assert word in caption


def test_names_are_written_as_they_are_whatever_signs_they_hold() -> None:
    scores, summary = planted(2)
    strange = {"reminders-0": "pay $5$ or\n$9", "backdoor-1": "\u62b1\u6b49_^{x"}
    scores, summary = scores.replace({"defense": strange}), summary.replace({"defense": strange})
    run = CaptionContext("m" * 300, "data", "test", THRESHOLD, ("\u62b1\u6b49",))
    for figure, _ in figures(scores, summary, run).values():
        FigureCanvasAgg(figure).draw()  # a glyph that the font lacks would warn here
        shown = " ".join(text.get_text() for text in written(figure))
        assert "pay $5$" in shown
        assert not any(text.get_parse_math() for text in written(figure) if "$" in text.get_text())
        assert r"\u62b1" in shown


def test_one_class_one_value_and_missing_numbers_are_drawn_without_a_warning() -> None:
    scores, summary = planted(3)
    of_class = [f"{x}{end}" for x in ESTIMATES if x != "over_refusal_rate" for end in ("", "_low", "_high")]
    benign = scores[~scores["harmful"]], summary.assign(**dict.fromkeys(of_class, np.nan), n_harmful=0)
    flat = scores.assign(margin=0.25), summary
    holed = scores.assign(margin=scores["margin"].where(scores["defense"] != "backdoor-1")), summary
    bare = scores, summary.assign(**dict.fromkeys([c for c in summary if c[-4:] in ("_low", "high")], np.nan))
    single = planted(2, n=1)
    for case in (benign, flat, holed, bare, single):
        for figure, _ in figures(*case).values():
            FigureCanvasAgg(figure).draw()
    key = figures(*benign)["plane"][0].axes[0].get_legend()
    assert key is not None
    assert "no value: backdoor-1" in [text.get_text() for text in key.get_texts()]


def test_several_attacks_give_a_figure_each_and_one_axes_takes_one() -> None:
    parts = planted(2), planted(2, attack="./my attack.py")
    scores, summary = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    drawn = figures(scores, summary)
    stems = [
        f"{kind}-{attack}" for attack in ("direct", ".-my-attack.py") for kind in ("margins", "plane", "roc")
    ]
    assert list(drawn) == [*stems, "attacks"]
    assert set(drawn["plane-.-my-attack.py"][1]["attack"]) == {"./my attack.py"}
    for draw, table in ((draw_margins, build_margin_curves(scores, summary, 0)), (draw_plane, summary)):
        with pytest.raises(ValueError, match=r"one attack, got 'direct', '\./my attack\.py'"):
            draw(table)


def attacked(defenses: int, names: list[str], manner: str = "usual") -> tuple[Any, Any]:
    """Return scores and a summary under several attacks, the second of which moves all margins by a nat."""
    parts = [planted(defenses, manner, attack=name) for name in names]
    scores, summary = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    scores.loc[scores["attack"] == names[1], "margin"] -= 1
    return scores, summary.assign(trusted="trusted")


def cells_of(ax: Axes) -> dict[str, str]:
    return {str(text.get_gid()): text.get_text() for text in ax.texts if text.get_gid()}


def test_the_grid_writes_and_colors_what_its_table_says() -> None:
    scores, summary = attacked(3, ["direct", "base64"])
    doubtful = (summary["attack"] == "base64") & (summary["defense"] == "backdoor-1")
    cells = build_attack_cells(
        scores, summary.assign(trusted=np.where(doubtful, "not trusted", "")), THRESHOLD
    )
    ax = draw_attack_grid(cells)
    written_in = cells_of(ax)
    assert len(written_in) == 3 * len(cells) == 24
    harmful = scores[scores["harmful"]].groupby(["attack", "defense"])["margin"].mean()
    for row in cells.to_dict("records"):
        place = f"{row['defense']} {row['attack']}"
        assert row["margin"] == pytest.approx(harmful[row["attack"], row["defense"]] - THRESHOLD)
        assert written_in[f"margin {place}"] == f"{row['margin']:+.1f}".replace("-", "\u2212")
        for rate in ("refusal_rate", "over_refusal_rate"):
            assert float(written_in[f"{rate} {place}"]) == pytest.approx(100 * row[rate], abs=0.51)
    boxes = [box for box in ax.patches if isinstance(box, Rectangle)]
    shades = dict(zip(written_in, (np.array(box.get_facecolor()[:3]) for box in boxes), strict=True))
    for gid, shade in shades.items():
        if gid.endswith("backdoor-1 base64"):
            assert (shade == 1).all()
        elif gid.startswith("margin") and written_in[gid] != "+0.0":
            bluer = shade[2] - shade[0]
            assert bluer > 0 if written_in[gid].startswith("+") else bluer < 0
    per_rate = [gid for gid in shades if gid.startswith("refusal_rate") and "backdoor" not in gid]
    darkest_first = sorted(per_rate, key=lambda gid: shades[gid].sum())
    rates = [int(written_in[gid]) for gid in darkest_first]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]


def test_the_grid_groups_families_behind_the_undefended_and_marks_what_is_missing() -> None:
    scores, summary = attacked(9, ["direct", "base64"])
    lost = (summary["attack"] == "base64") & (summary["defense"] == "noise-3")
    cells = build_attack_cells(scores, summary[~lost], THRESHOLD)
    cells.loc[1, "margin"] = np.nan
    ax = draw_attack_grid(cells.sample(frac=1, random_state=0))
    names = sorted((t for t in ax.texts if t.get_ha() == "right"), key=lambda text: -text.get_position()[1])
    wanted = ["undefended", "reminders-0", "reminders-7", "backdoor-1", "backdoor-8", "refactoring-2"]
    found = [text.get_text() for text in names]
    assert found[0] == wanted[0] and found[-1] == "control-6 (control)"
    assert sorted(found[1:3]) == wanted[1:3] and sorted(found[3:5]) == wanted[3:5] and found[5] == wanted[5]
    written_in = cells_of(ax)
    assert "margin noise-3 base64" not in written_in and "margin noise-3 direct" in written_in
    assert written_in["margin reminders-0 direct"] == "\N{EN DASH}"


@pytest.mark.parametrize("manner", ["usual", "long"])
@pytest.mark.parametrize(("defenses", "attacks"), [(1, 2), (8, 6), (12, 8)])
def test_the_grid_can_be_read_at_any_size_and_drawn_from_its_csv(
    defenses: int, attacks: int, manner: str
) -> None:
    names = ["direct", *(f"attack_with_a_name_{number}+ignore" for number in range(1, attacks))]
    scores, summary = attacked(defenses, names, manner)
    summary.loc[0, "trusted"] = "not trusted"
    cells = build_attack_cells(scores, summary, THRESHOLD)
    figure = finish_figure(draw_attack_grid(cells), FIGURE_TITLES["attacks"], caption_attack_grid(cells, RUN))
    readable("attacks", figure, written)
    width = figure.get_size_inches()[0]
    assert width < 11, "a page takes it"
    text = io.StringIO(cells.to_csv(index=False, float_format="%.7g"))
    again = draw_attack_grid(pd.read_csv(text))
    (ax,) = figure.axes
    assert cells_of(again) == cells_of(ax)
    caption = figure.texts[1].get_text().replace("\n", " ").replace("\u00a0", " ")
    for word in ("24 harmful", "24 benign", RUN.model, "twins, test split", "no judge", "95 %", "Hollow"):
        assert word in caption


def test_drawing_leaves_settings_and_tables_alone_and_uses_the_given_axes() -> None:
    scores, summary = planted(4)
    settings, kept = dict(mpl.rcParams), (scores.copy(), summary.copy())
    axes = Figure(figsize=(15, 5)).subplots(1, 3)
    drawn = figures(scores, summary)
    for ax, draw, kind in zip(
        axes, (draw_margins, draw_plane, draw_roc), ("margins", "plane", "roc"), strict=True
    ):
        assert draw(drawn[kind][1], ax) is ax
    assert dict(mpl.rcParams) == settings
    pd.testing.assert_frame_equal(scores, kept[0])
    pd.testing.assert_frame_equal(summary, kept[1])


def test_wrapped_lines_fit_their_width_and_lose_no_sign() -> None:
    text = "a_long/name-with+joints and " + "x" * 80 + " at \u22121.00\u00a0nats"
    lines = wrap_text(text, 100, 8)
    assert max(measure_text_width(line, 8) for line in lines) <= 100
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = fit_text("x" * 40 + "-end", 60, 8, max_lines=1)
    assert short.startswith("x")
    assert short.endswith("-end")
    assert measure_text_width(short, 8) <= 60


def test_a_few_far_points_do_not_make_one_blot_of_the_others() -> None:
    rows = []
    for number in range(12):
        row = {"attack": "direct", "defense": f"d{number}", "family": "noise", "n_harmful": 9, "n_benign": 9}
        shift = 20.0 if number == 0 else 0.05 * number
        for name, value in (("shift", shift), ("discrimination", -0.03 * number)):
            row |= {f"{name}{end}": value + gap for end, gap in (("", 0), ("_low", -0.1), ("_high", 0.1))}
        rows.append(row)
    points = pd.DataFrame(rows)
    ax = draw_plane(points)
    assert ax.get_xscale() == "symlog" and ax.get_xlim()[1] > 20
    places = ax.transData.transform(points[["shift", "discrimination"]].to_numpy(float))[1:, 0]
    # The crowd, which is 0.55 of 20 nats wide, takes more than a tenth of the axis.
    assert places.max() - places.min() > 0.1 * ax.get_window_extent().width
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.5", "1", "2", "5", "10", "20"]
    context = CaptionContext("smollm2", "twins", "test", 0.0, ("I",))
    assert "logarithmic beyond ±0.5" in caption_plane(points, context)
    assert draw_plane(points[1:]).get_xscale() == "linear"
    assert "logarithmic" not in caption_plane(points[1:], context)
