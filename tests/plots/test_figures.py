"""Every figure can be read, stands on its own, and is drawn again from its CSV alone."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from conftest import assert_readable, draw_run_figures, save_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image
from planted_tables import (
    ESTIMATES,
    FAMILIES,
    MECHANISM_CASES,
    MECHANISM_DEFENSES,
    RUN,
    SCALED,
    THRESHOLD,
    cached_ensemble_figures,
    cached_mechanism_figures,
    cached_score_figures,
    collect_texts,
    describe_artists,
    draw_mechanism_figures,
    draw_score_figures,
    find_figure,
    lines_by_gid,
    make_older,
    plant_attacked_scores,
    plant_ensembles,
    plant_kinds,
    plant_mechanism,
    plant_scores,
    read_caption,
    unwrap_text,
)
from rich.console import Console

from analysis.api import analyze, read, save_figures
from analysis.plots.captions import CaptionContext
from analysis.plots.data import (
    build_analysis_points,
    build_attack_cells,
    build_ensemble_points,
    build_margin_curves,
    build_mechanism_points,
    build_plane_points,
    build_roc_points,
)
from analysis.plots.figures import FIGURES, PAPER_WIDTHS, find_figure_kind, select_defenses
from analysis.plots.layout import FigureError
from analysis.plots.plane import draw_plane
from analysis.plots.predictions import draw_forecast
from analysis.plots.scores import draw_margins, draw_roc
from analysis.plots.style import BLACK, GREY
from analysis.report.folder import save_run
from defenses.catalog import get_defense
from defenses.errors import UserError

ROOT = Path(__file__).resolve().parents[2] / "figures"
SHIPPED = [(path.parent.name, path.stem) for path in sorted(ROOT.glob("*/*.png"))]
# The smallest picture of each kind: sorted by falling size, the last of a kind stays.
SMALLEST = {
    find_figure_kind(stem): (folder, stem)
    for folder, stem in sorted(
        SHIPPED, key=lambda picture: -(ROOT / picture[0] / f"{picture[1]}.png").stat().st_size
    )
    if folder != "ensembles-qwen"
}


def read_pixels(picture: Any) -> Any:
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


def render_pixels(figure: Figure) -> Any:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return read_pixels(buffer)


def count_different_pixels(first: Any, second: Any) -> Any:
    return (np.abs(first - second).max(axis=2) > 8).sum()


def test_every_picture_has_its_csv_and_a_record_beside_it():
    assert len(SHIPPED) > 30
    for folder, stem in SHIPPED:
        assert (ROOT / folder / f"{stem}.csv").is_file(), (folder, stem)
        assert json.loads((ROOT / folder / "run.json").read_text("utf-8"))["model"]["name"]


def test_a_changed_number_changes_the_picture(tmp_path):
    folder = shutil.copytree(ROOT / "backdooralign", tmp_path / "copy")
    text = (folder / "square.csv").read_text("utf-8")
    run = read(folder)
    before = render_pixels(run.draw_figure("square"))
    value = str(run.tables["square"]["shift"].max())
    assert text.count(value) == 1
    (folder / "square.csv").write_text(text.replace(value, str(float(value) - 0.1)), "utf-8")
    record = json.loads((folder / "run.json").read_text("utf-8"))
    del record["files"]  # so that the folder is read as it is
    (folder / "run.json").write_text(json.dumps(record), "utf-8")
    after = render_pixels(read(folder).draw_figure("square"))
    assert before.shape != after.shape or count_different_pixels(before, after) > 40


def test_a_new_run_draws_the_figures_that_the_command_saves(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_model(tmp_path / "tiny")
    run = analyze(["policy", get_defense("self_reminder")], str(tmp_path / "tiny"), limit=20, offline=True)
    assert run.figures == ("refusals", "margins", "plane", "forest", "roc", "kinds")
    save_run(tmp_path / "run", run, Console(quiet=True))
    again = read(tmp_path / "run")
    assert sorted(again.figures) == sorted(run.figures)
    assert list(again.format_summary().index) == list(run.format_summary().index)
    for name in run.figures:
        saved = read_pixels(tmp_path / "run" / f"{name}.png")
        assert count_different_pixels(render_pixels(run.draw_figure(name)), saved) == 0
    assert run.further_figures == ("dumbbell", "categories", "pairs", "thresholds")
    with pytest.raises(UserError, match=r"'plan': did you mean 'plane'.*categories, dumbbell, forest"):
        run.draw_figure("plan")


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("arms", r"the attacked model answers 100 % \[86, 100\].*with it, it answers 17 % \[7, 36\]"),
        ("validity", r"words is trusted for single queries in 0 of 12 conditions \(contradicted in 10\)"),
        ("smollm2", r"^Results for 34 defenses on smollm2"),
    ],
)
def test_the_text_of_a_stored_run_begins_with_its_headline(folder, words):
    assert re.search(words, str(read(ROOT / folder)).splitlines()[0])


def test_controls_are_grey_and_defenses_are_not() -> None:
    scores, summary = plant_scores(7)
    ax = draw_plane(build_plane_points(summary))
    colors = {
        str(c.get_label()): c.get_facecolor()[0] for c in ax.collections if str(c.get_label()) in FAMILIES
    }
    assert {
        family for family, color in colors.items() if same_color(color, (*mpl.colors.to_rgb(GREY), 1))
    } == {"control"}
    lines = lines_by_gid(draw_roc(build_roc_points(scores, summary, THRESHOLD)))
    grey = {name for name, line in lines.items() if same_color(line.get_color(), GREY)}
    assert grey == {"control-6", "chance"}
    labels = draw_margins(build_margin_curves(scores, summary, THRESHOLD)).get_yticklabels()
    assert [text.get_text() for text in labels if text.get_color() != BLACK] == ["control-6 (control)"]


def test_names_are_written_literally_whatever_characters_they_contain() -> None:
    scores, summary = plant_scores(2)
    new_names = {"reminders-0": "pay $5$ or\n$9", "backdoor-1": "\u62b1\u6b49_^{x"}
    scores, summary = scores.replace({"defense": new_names}), summary.replace({"defense": new_names})
    run = CaptionContext("m" * 300, "data", "test", THRESHOLD, ("\u62b1\u6b49",))
    for figure, _ in draw_score_figures(scores, summary, run).values():
        FigureCanvasAgg(figure).draw()  # a glyph that the font lacks would warn here
        text = " ".join(text.get_text() for text in collect_texts(figure))
        assert "pay $5$" in text
        assert not any(text.get_parse_math() for text in collect_texts(figure) if "$" in text.get_text())
        assert r"\u62b1" in text


def test_one_class_one_value_and_missing_numbers_are_drawn_without_a_warning() -> None:
    scores, summary = plant_scores(3)
    harmful_columns = [
        f"{x}{end}" for x in ESTIMATES if "over_refusal" not in x for end in ("", "_low", "_high")
    ]
    benign = scores[~scores["harmful"]], summary.assign(**dict.fromkeys(harmful_columns, np.nan), n_harmful=0)
    flat = scores.assign(margin=0.25), summary
    incomplete = scores.assign(margin=scores["margin"].where(scores["defense"] != "backdoor-1")), summary
    without_intervals = (
        scores,
        summary.assign(**dict.fromkeys([c for c in summary if c[-4:] in ("_low", "high")], np.nan)),
    )
    single = plant_scores(2, n=1)
    for case in (benign, flat, incomplete, without_intervals, single):
        for figure, _ in draw_score_figures(*case).values():
            FigureCanvasAgg(figure).draw()
    figures = draw_score_figures(benign[0], make_older(benign[1]))
    legend = figures["plane"][0].axes[0].get_legend()
    assert legend is not None
    assert "no value: backdoor-1" in [text.get_text() for text in legend.get_texts()]


def test_several_attacks_give_a_figure_each_and_axes_take_only_one_attack() -> None:
    parts = plant_scores(2), plant_scores(2, attack="./my attack.py")
    scores, summary = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    drawn = draw_score_figures(scores, summary)
    kinds = ("refusals", "margins", "plane", "forest", "roc")
    stems = [f"{kind}-{attack}" for attack in ("direct", ".-my-attack.py") for kind in kinds]
    assert list(drawn) == [*stems, "attacks"]
    assert set(drawn["plane-.-my-attack.py"][1]["attack"]) == {"./my attack.py"}
    for draw, table in ((draw_margins, build_margin_curves(scores, summary, 0)), (draw_plane, summary)):
        with pytest.raises(ValueError, match=r"one attack, got 'direct', '\./my attack\.py'"):
            draw(table)


def test_a_banner_is_above_figures_contradicted_by_generated_text() -> None:
    tables = plant_mechanism(**(MECHANISM_CASES["usual"] | {"layers": 4, "heads": 2}))
    verdicts = {
        "none": "trusted",
        MECHANISM_DEFENSES[0]: "trusted",
        MECHANISM_DEFENSES[1]: "not trusted",
        MECHANISM_DEFENSES[2]: "cannot tell",
    }
    trusted = pd.DataFrame({"attack": "direct", "defense": [*verdicts], "trusted": verdicts.values()})
    other_attack = trusted.assign(attack="prefix", trusted="not trusted")
    banners = {}
    for stem, (figure, _) in draw_mechanism_figures(tables, pd.concat([trusted, other_attack])).items():
        banner = [text for text in figure.texts if text.get_gid() == "banner"]
        banners[stem] = unwrap_text(banner[0]) if banner else ""
        if stem == "profiles":
            assert_readable(stem, figure, collect_texts, slack=0.6)
        for text in banner:
            assert text.get_window_extent().y0 > figure.texts[0].get_window_extent().y1
    warning = "Not trusted: generated text contradicts the readout under backdoor/no_weights"
    for stem, banner_words in banners.items():
        assert banner_words == ("" if stem.endswith("-backdoor") else warning), stem
    # The undefended model is the reference of every comparison.
    undefended_contradicted = trusted.assign(trusted=["not trusted", *["trusted"] * 3])
    some_tables = {name: tables[name] for name in ("layers", "profiles")}
    for figure, _ in draw_mechanism_figures(some_tables, undefended_contradicted).values():
        assert figure.texts[-1].get_text().endswith("under none")
    attacked = plant_mechanism(**MECHANISM_CASES["attacked"])
    contradicted = pd.DataFrame(
        {"attack": ["./my attack.py"], "defense": ["backdoor"], "trusted": ["not trusted"]}
    )
    some_tables = {name: attacked[name] for name in ("parts", "weights")}
    for stem, (figure, _) in draw_mechanism_figures(some_tables, contradicted).items():
        expected = stem.endswith("my-attack.py") and "no_weights" not in stem
        assert any("backdoor (./my attack.py)" in unwrap_text(text) for text in figure.texts[2:]) == expected


def test_each_figure_of_one_defense_names_it() -> None:
    for stem, (figure, table) in cached_mechanism_figures("usual").items():
        if "-" in stem:
            assert table["defense"].nunique() == 1
            assert table["defense"].iloc[0] in figure.texts[0].get_text().replace("\n", "")


def test_importing_plots_loads_no_model_library_and_no_pyplot() -> None:
    heavy = ("torch", "transformers", "transformer_lens", "defenses", "matplotlib.pyplot", "seaborn")
    code = f"import sys, analysis.plots.figures; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_kind_is_registered_under_its_name_and_nearly_all_are_among_the_shipped() -> None:
    assert all(kind == figure.kind and figure.table in FIGURES for kind, figure in FIGURES.items())
    assert set(SMALLEST) <= set(FIGURES) and set(FIGURES) - set(SMALLEST) <= {
        *("agreement", "cost", "kinds", "refusals", "side_effects"),
        *("dumbbell", "pairs", "categories", "thresholds"),
        *("models_plane", "models_effects", "models_order"),
    }


def test_titles_describe_and_claim_nothing() -> None:
    for figure in FIGURES.values():
        assert not re.search(r"\b(more|better|worse|less|beyond|does|near|believed)\b", figure.title), (
            figure.title
        )


@pytest.mark.parametrize("kind", sorted(SMALLEST))
def test_a_shipped_figure_is_drawn_again_from_its_csv(kind: str) -> None:
    folder, stem = SMALLEST[kind]
    shipped, again = (
        read_pixels(ROOT / folder / f"{stem}.png"),
        render_pixels(read(ROOT / folder).draw_figure(stem)),
    )
    assert shipped.shape == again.shape
    # Seven digits in the CSV change an edge by a shade or two.
    assert count_different_pixels(shipped, again) <= 20


@pytest.mark.parametrize(
    ("defenses", "manner"),
    [(0, "usual"), (2, "long"), (8, "usual"), (8, "same"), (20, "long"), (20, "same"), (20, "usual")],
)
def test_no_text_of_a_run_hides_another_and_none_leaves_the_canvas(defenses: int, manner: str) -> None:
    dpis = (100, 150) if (defenses, manner) == (20, "usual") else (100,)
    for kind, (figure, table) in cached_score_figures(defenses, manner).items():
        assert_readable(kind, figure, collect_texts, dpis=dpis)
        if kind == "plane":
            (ax,) = figure.axes
            point_pixels = ax.transData.transform(np.array([[0, 0], *table[[*SCALED]].to_numpy()]))
            for text in collect_texts(figure):
                box = Text.get_window_extent(text)
                covers_point = isinstance(text, Annotation) and any(
                    box.contains(*pixel) for pixel in point_pixels
                )
                assert not covers_point, f"{text.get_text()!r} covers a point"


@pytest.mark.parametrize("case", ["pair", "votes", "long", "attacked", "refusing", "several"])
def test_no_text_of_ensembles_hides_another_and_none_leaves_the_canvas(case: str) -> None:
    for kind, (figure, _) in cached_ensemble_figures(case).items():
        assert_readable(kind, figure, collect_texts, slack=0.6, dpis=(100, 150) if case == "pair" else (100,))


@pytest.mark.parametrize("case", ["tiny", "usual", "large", "crowd", "long"])
def test_no_text_of_a_mechanism_hides_another_and_none_leaves_the_canvas(case: str) -> None:
    figures = {stem.partition("-")[0]: figure for stem, (figure, _) in cached_mechanism_figures(case).items()}
    assert len(figures) == {"tiny": 7, "crowd": 4}.get(case, 8)
    for kind, figure in figures.items():
        assert_readable(kind, figure, collect_texts, slack=0.6, dpis=(100,))


def test_figures_follow_from_the_tables_that_a_run_has() -> None:
    assert list(cached_ensemble_figures("usual")) == ["forecast", "interactions", "front"]
    assert list(cached_ensemble_figures("votes")) == ["forecast", "front"]
    with pytest.raises(ValueError, match="one attack"):
        draw_forecast(plant_ensembles("attacked")[0])
    stems = ["layers", "parts-{}", "top-{}", "directions", "patches-{}", "cuts", "weights-{}", "profiles"]
    names = ["backdoor", "backdoor-no_weights"]
    expected = [stem.format(name) for stem in stems for name in (names if "{}" in stem else [""])]
    assert list(cached_mechanism_figures("usual")) == expected
    of_one_defense = [stem.format("backdoor") for stem in stems[:-1]]  # one defense has no other
    assert list(cached_mechanism_figures("tiny")) == of_one_defense
    with_attack = [f"{stem}-{attack}" for attack in ("direct", ".-my-attack.py") for stem in expected]
    assert list(build_mechanism_points(plant_mechanism(**MECHANISM_CASES["attacked"]))) == with_attack
    tables = plant_mechanism(**MECHANISM_CASES["usual"])
    some_tables = {"cuts": tables["cuts"], "half": tables["half"], "layers": tables["layers"][:0]}
    assert list(build_mechanism_points(some_tables)) == ["cuts"]
    assert build_mechanism_points({}) == {}


@pytest.mark.parametrize("kind", ["layers", "parts", "top", "patches", "cuts", "weights", "profiles"])
def test_a_figure_of_several_attacks_is_rejected(kind: str) -> None:
    table = find_figure(kind)[1]
    with pytest.raises(ValueError, match="one attack"):
        FIGURES[kind].draw(pd.concat([table, table.assign(attack="prefix")]))


def figures_of_all_kinds() -> dict[str, tuple[Figure, pd.DataFrame]]:
    attack_cells = build_attack_cells(*plant_attacked_scores(3, ["direct", "base64"]), THRESHOLD)
    return (
        cached_score_figures(8, "usual")
        | draw_run_figures({"attacks": attack_cells, "kinds": plant_kinds(8, ("twin", "plain"))}, RUN)
        | cached_ensemble_figures("pair")
        | cached_ensemble_figures("attacked")
        | cached_mechanism_figures("usual")
    )


def test_a_figure_can_be_drawn_again_from_its_csv_alone() -> None:
    drawn = figures_of_all_kinds()
    assert len({find_figure_kind(stem) for stem in drawn}) == 18
    for stem, (figure, table) in drawn.items():
        again = FIGURES[find_figure_kind(stem)].draw(pd.read_csv(io.StringIO(table.to_csv(index=False))))
        (words, numbers), (words_again, numbers_again) = map(describe_artists, (figure.axes[0], again))
        assert words_again == words, stem
        np.testing.assert_allclose(numbers_again, numbers, atol=1e-9)


def test_drawing_leaves_settings_and_tables_alone_and_uses_the_given_axes() -> None:
    settings = dict(mpl.rcParams)
    for stem, (_, table) in figures_of_all_kinds().items():
        original = table.copy()
        (axes,) = Figure(figsize=(9, 6)).subplots(1, 1, squeeze=False).flat
        assert FIGURES[find_figure_kind(stem)].draw(table, axes) is axes, stem  # type: ignore[call-arg]
        pd.testing.assert_frame_equal(table, original)
    assert dict(mpl.rcParams) == settings
    scores, summary = plant_scores(4)
    originals = [scores.copy(), summary.copy()]
    build_analysis_points(scores, summary, THRESHOLD)
    rows, candidates, families = plant_ensembles()
    originals += [rows.copy(), candidates.copy()]
    build_ensemble_points(rows, candidates, families)
    for table, original in zip((scores, summary, rows, candidates), originals, strict=True):
        pd.testing.assert_frame_equal(table, original)


def test_captions_name_n_model_data_readout_attack_and_interval() -> None:
    required = (
        RUN.model,
        "twins, test split",
        "\u201cSorry\u201d",
        "\u201cSure\u201d",
        "threshold \u22121.00 nats",
    )
    required += ("no judge: first-token readout", "Intervals: ")
    for stem, (figure, _) in figures_of_all_kinds().items():
        caption = read_caption(figure)
        if stem == "refusals":  # the readout has no bearing on it
            assert "24 harmful" in caption and "24 benign" in caption and "Wilson" in caption
            continue
        if stem == "forest":
            assert "24 harmful and 24 benign" in caption and "first-token margin" in caption
            continue
        if stem == "kinds":
            assert "(10 twin, 20 plain)" in caption and "Wilson" in caption
            continue
        counts = ("24 harmful", "24 benign")
        if FIGURES[find_figure_kind(stem)].section == "mechanism":
            counts = (
                ("24 harmful", "20 benign") if stem.startswith("patches") else ("50 harmful", "40 benign")
            )
        for word in (*required, *counts, "Attack: by column" if stem == "attacks" else "Attack: none"):
            assert word.replace(" ", "") in caption.replace(" ", ""), (stem, word)
    interval_words = {"forecast": "Bars on stacks", "interactions": "Bold", "front": "Intervals: not drawn"}
    for kind, words in interval_words.items():
        assert words in read_caption(cached_ensemble_figures("usual")[kind][0])
    attacked_caption = read_caption(cached_ensemble_figures("attacked")["front"][0])
    for words in ("mean over 3 attacks", "Attack: none, base64, ./my attack.py"):
        assert words in attacked_caption
    for stem, (figure, _) in cached_mechanism_figures("bare").items():
        caption = read_caption(figure)
        assert ("Intervals: none known" in caption) == (stem != "layers"), stem
        assert ("95 % interval" in caption) == (stem == "layers"), stem  # its half-way layers have some


def draw_options(name: str, **options: Any) -> Figure:
    """Return a figure of a shipped run, drawn with options."""
    return read_detection().draw_figure(name, **options)


@cache
def read_detection() -> Any:
    return read(ROOT / "detection")


def test_a_figure_is_drawn_into_given_axes_if_it_has_one_panel() -> None:
    own = draw_options("dumbbell")
    left, right = Figure(figsize=(9, 4)).subplots(1, 2)
    figure = draw_options("dumbbell", ax=right, title=False)
    assert figure is right.figure and not left.lines and not figure.texts and not right.get_title(loc="left")
    (words, numbers), (words_again, numbers_again) = map(describe_artists, (own.axes[0], right))
    assert words == words_again
    np.testing.assert_allclose(numbers, numbers_again)
    draw_options("dumbbell", ax=left)
    assert "Refusal rates of harmful" in left.get_title(loc="left").replace("\n", " ")
    with pytest.raises(UserError, match=r"forest has several panels.*with one panel: refusals, plane"):
        draw_options("forest", ax=left)
    with pytest.raises(UserError, match="given axes keep their size"):
        draw_options("dumbbell", ax=left, width=3)


def test_a_figure_shows_the_chosen_defenses_and_the_undefended_model() -> None:
    figure = draw_options("dumbbell", defenses=["harm_probe"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["harm_probe", "undefended"]
    kinds = draw_options("kinds", defenses=["harm_probe"]).axes[0]
    assert [label.get_text() for label in kinds.get_yticklabels()] == ["undefended", "harm_probe"]
    with pytest.raises(UserError, match=r"dumbbell does not show 'harm_prob'; it shows .*harm_probe"):
        draw_options("dumbbell", defenses=["harm_prob"])
    table = pd.DataFrame({"members": ["none", "a", "a+b", "b+c"]})
    assert select_defenses(table, "front", ["a", "b"])["members"].tolist() == ["none", "a", "a+b"]
    pairs = pd.DataFrame({"first": ["a", "a"], "second": ["b", "c"]})
    assert select_defenses(pairs, "interactions", ["a", "c"])["second"].tolist() == ["c"]
    with pytest.raises(FigureError, match="square shows no defenses to choose from"):
        select_defenses(pd.DataFrame({"defense": ["a"], "corner": ["both"]}), "square", ["a"])


@pytest.mark.parametrize("name", ["dumbbell", "refusals", "forest"])
def test_on_paper_a_figure_has_the_width_of_a_column_and_small_texts_alone(name: str) -> None:
    figure = draw_options(name, style="paper")
    assert figure.get_size_inches()[0] in PAPER_WIDTHS and not figure.texts
    sizes = {text.get_fontsize() for text in collect_texts(figure)}
    assert max(sizes) == 8 and min(sizes) >= 6.5
    assert_readable(name, figure, collect_texts, slack=0.6, dpis=(100,))
    wider = draw_options(name, style="paper", width=6.9, caption=True)
    assert wider.get_size_inches()[0] == 6.9 and [text.get_gid() for text in wider.texts] == [
        "caption",
        "setting",
    ]


def test_a_figure_takes_any_width_that_its_texts_leave_room_in() -> None:
    for width in (5.0, 9.5):
        figure = draw_options("forest", width=width)
        assert figure.get_size_inches()[0] == width
        assert_readable("forest", figure, collect_texts, slack=0.6, dpis=(100,))
    with pytest.raises(UserError, match=r"forest at a width of 1.5 inches: .* at least [2-4]\.\d inches"):
        draw_options("forest", width=1.5)
    for options, words in (
        ({"width": 0.1}, "from 1 to 100"),
        ({"style": "poster"}, "there are screen and paper"),
        ({"unit": "nats"}, "only the plane"),
    ):
        with pytest.raises(UserError, match=words):
            draw_options("forest", **options)


def test_saved_figures_have_fonts_and_texts_and_are_equal_each_time(tmp_path: Path) -> None:
    run = read_detection()
    for file_format, here, absent in (("pdf", b"/FontFile2", b"/Type3"), ("svg", b"<text", b"<dc:date>")):
        (path,) = save_figures(run, "dumbbell", format=file_format, style="paper", out=tmp_path / "first")
        content = path.read_bytes()
        assert path.name == f"dumbbell.{file_format}" and here in content and absent not in content
        assert b"CreationDate" not in content
        (again,) = save_figures(
            ROOT / "detection", ["dumbbell"], format=file_format, style="paper", out=tmp_path
        )
        assert again.read_bytes() == content
    # Its table is written beside a figure that the run has not saved, and beside no other.
    assert pd.read_csv(tmp_path / "dumbbell.csv")["defense"].iloc[0] == "none"
    save_figures(run, "kinds", format="png", only="harm_probe", out=tmp_path / "png")
    assert [path.name for path in (tmp_path / "png").iterdir()] == ["kinds.png"]
    for options, words in (
        ({"names": ["plan"]}, "unknown figure of this run 'plan': .*dumbbell"),
        ({"format": "jpg"}, "unknown format 'jpg'"),
        ({"only": ["nothing"]}, "no figure of detection shows nothing"),
    ):
        with pytest.raises(UserError, match=words):
            save_figures(run, **{"out": tmp_path / "none", **options})
    assert not (tmp_path / "none").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="the folder of a run"):
        save_figures(run, out=tmp_path / "run")
