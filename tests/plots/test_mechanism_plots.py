"""Figures of where a defense acts show what their tables say, all of it can be read, from 2 layers to 80."""

import io
import itertools
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import pictures, readable
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.plots.captions import CaptionContext
from analysis.plots.data import CONTRAST_LABELS, build_mechanism_points
from analysis.plots.figures import FIGURES
from analysis.plots.layout import CURVE_STYLES, MISSING_COLOR, draw_curve, make_axes
from analysis.plots.style import GREY

RUN = CaptionContext(
    "SmolLM2-135M-Instruct (float32)", "twins", "test", -1.0, ("I", "Sorry"), ("Sure", "Here")
)
NAMES = (
    *("backdoor", "backdoor/no_weights", "self_reminder+backdoor", "smoothllm(copies=5)"),
    *("policy", "refusal_direction", "paraphrase", "in_context", "retokenize"),
)
LONG = "./somewhere/a_defense_with_a_very_long_name.py(copies=10,$q$=0.1)+"
MANNERS: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "heads": 4, "defenses": 1},
    "usual": {"layers": 12, "heads": 9, "defenses": 3},
    "large": {"layers": 80, "heads": 64, "defenses": 8},
    "crowd": {"layers": 24, "heads": 16, "defenses": 9, "ranges": 12},
    "long": {"layers": 6, "heads": 4, "defenses": 2, "name": 3 * LONG},
    "attacked": {"layers": 4, "heads": 2, "defenses": 2, "attacks": ("direct", "./my attack.py")},
    "bare": {"layers": 4, "heads": 3, "defenses": 2, "sure": False},
}


def estimated(rows: pd.DataFrame, column: str, values: Any, sure: bool = True) -> None:
    """Add an estimate with its interval, which is missing in some rows, or in all."""
    wide = np.where(np.arange(len(rows)) % 17 == 3, np.nan, 0.05 + 0.2 * np.abs(values)) if sure else np.nan
    rows[column], rows[f"{column}_low"], rows[f"{column}_high"] = values, values - wide, values + 1.5 * wide


def planted(
    layers: int,
    heads: int,
    defenses: int,
    ranges: int = 4,
    name: str = "",
    attacks: tuple[str, ...] = ("direct",),
    sure: bool = True,
) -> dict[str, pd.DataFrame]:
    """Return all tables of `analyze mechanism`."""
    generator = np.random.default_rng(layers)
    made: dict[str, list[pd.DataFrame]] = {}
    for attack, (number, defense) in itertools.product(attacks, enumerate(NAMES[:defenses])):
        about = {"attack": attack, "defense": name + defense}
        rise = 1 / (1 + np.exp(-(np.arange(layers + 1) - layers * (0.3 + 0.05 * number)) / (layers / 12)))
        tables = {
            "layers": pd.DataFrame({"layer": range(layers + 1)}),
            "half": pd.DataFrame(
                {"contrast": [*CONTRAST_LABELS], "half": [layers // 2, np.nan if number else 1]}
            ),
        }
        kinds = [(None, "embedding", None), (None, "bias", None)]
        for layer in range(layers):
            kinds += [(layer, "head", head) for head in range(heads)] + [(layer, "mlp", None)]
        kinds += [(layers // 2, "added", None)] * (number % 2 or defenses > 3)
        tables["parts"] = pd.DataFrame(kinds, columns=["layer", "kind", "head"]).astype(
            {"layer": "Int64", "head": "Int64"}
        )
        both = itertools.product(range(layers + 1), ("refusal", "harmfulness"))
        tables["directions"] = pd.DataFrame(both, columns=["layer", "direction"])
        tables["directions"]["chosen"] = tables["directions"]["layer"] == layers // 2
        sources = ("defense", "placebo", "neutral_prompt")
        cells = [
            (into, source, kind, layer, None)
            for into in ("undefended", "defended")
            for source in sources
            for kind in ("residual", "attention", "mlp")
            for layer in range(layers)
        ]
        cells += [
            ("undefended", source, "head", layer, layer % heads)
            for source in sources[:2]
            for layer in range(layers)
        ]
        tables["patches"] = pd.DataFrame(cells, columns=["into", "source", "kind", "layer", "head"])
        tables["patches"] = tables["patches"].assign(n_harmful=24, n_benign=20)
        edges = np.unique(np.linspace(0, layers, ranges + 1).astype(int))
        spans = [(-1, -1), *zip(edges[:-1], edges[1:] - 1, strict=True)]
        tables["cuts"] = pd.DataFrame(
            [(reader, *span) for reader in ("answer", "everything") for span in spans],
            columns=["reader", "first", "last"],
        )
        ways = [(how, layer, None) for how in ("alone", "up to") for layer in range(layers)]
        ways += [("module", None, module) for module in ("q_proj", "k_proj", "v_proj", "down_proj")]
        tables["weights"] = pd.DataFrame(ways, columns=["how", "layer", "module"])
        others = [(other, contrast) for other in NAMES[number + 1 : defenses] for contrast in CONTRAST_LABELS]
        tables["profiles"] = pd.DataFrame(others, columns=["other", "contrast"])
        tables["profiles"]["other"] = name + tables["profiles"]["other"]
        for kind, table in tables.items():
            if kind in ("parts", "patches", "weights") and number > (1 if defenses < 4 else 0):
                continue  # so many figures of one defense are enough
            size = len(table)
            for contrast, most in (("shift", 2.5), ("discrimination", -0.6)):
                if kind == "layers":
                    estimated(table, contrast, most * rise + generator.normal(0, 0.03, size), sure)
                elif kind not in ("half", "profiles"):
                    noise = generator.normal(0, 0.05 if kind == "directions" else 0.1, size)
                    up = np.where(table.get("source", table.index) == "placebo", 0.0, most / 3)
                    estimated(table, contrast, noise + (0 if kind == "parts" else up), sure)
            if kind == "half":
                table["half_low"], table["half_high"] = table["half"] - 1, table["half"] + 0.5
                estimated(table, "final", np.array([2.5, -0.6]), sure)
            elif kind == "directions":
                for column, base in (("auroc", 0.85), ("auroc_after", 0.7)):
                    estimated(
                        table,
                        column,
                        base
                        + generator.uniform(-0.02, 0.02, size)
                        + 0.05 * np.sin(np.arange(size) / size * 6),
                        sure,
                    )
            elif kind == "profiles":
                estimated(table, "cosine", generator.uniform(-1, 1, size), sure)
            if kind == "parts":
                mlp = table["kind"] == "mlp"
                for end in ("", "_low", "_high"):
                    table.loc[mlp, f"shift{end}"] *= 3
            made.setdefault(kind, []).append(table.assign(**about)[[*about, *table.columns]])
    return {kind: pd.concat([part for part in parts if len(part)] or parts) for kind, parts in made.items()}


def of_mechanism(
    tables: dict[str, pd.DataFrame], trusted: pd.DataFrame | None = None, top: int = 10
) -> dict[str, tuple[Figure, pd.DataFrame]]:
    known = {} if trusted is None else {"summary": trusted.assign(n_harmful=50, n_benign=40)}
    return pictures(build_mechanism_points(tables, top), RUN, (50, 40), **known)


@cache
def made(manner: str) -> dict[str, tuple[Figure, pd.DataFrame]]:
    return of_mechanism(planted(**MANNERS[manner]))


def drawn(kind: str, manner: str = "usual", defense: str = "backdoor") -> tuple[Axes, pd.DataFrame]:
    """Return the host of one figure, and its table."""
    stem = f"{kind}-{defense}" if kind in ("parts", "top", "patches", "weights") else kind
    figures = made(manner)
    figure, table = figures.get(stem) or figures[f"{stem}-direct"]
    return figure.axes[0], table


def line(panel: Axes, gid: str) -> Any:
    """Return the places of the one line of that name."""
    (found,) = (one for one in panel.lines if one.get_gid() == gid)
    return np.asarray(found.get_xydata(), dtype=float)


def band(panel: Axes, gid: str) -> Any:
    """Return the corners of a band."""
    (found,) = (one for one in panel.collections if one.get_gid() == f"{gid} band")
    return np.concatenate([path.vertices for path in found.get_paths()])


def bars(panel: Axes) -> set[tuple[float, float, float]]:
    """Return height, left and right end of each interval of a row of dots."""
    paths = [path.vertices for one in panel.collections for path in one.get_paths() if len(path) == 2]
    return {(round(a[1], 6), round(a[0], 6), round(b[0], 6)) for a, b in paths if np.isfinite([a, b]).all()}


def written(figure: Figure) -> list[Text]:
    """Return every text that a reader sees."""
    (host,) = figure.axes[:1]
    legend = host.get_legend()
    texts = [*figure.texts, *host.texts, *(legend.get_texts() if legend else [])]
    for ax in host.child_axes:
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            for tick, place in zip(axis.get_major_ticks(), axis.get_ticklocs(), strict=False):
                if low <= place <= high:
                    texts += [tick.label1, tick.label2]
        texts += [*ax.texts, ax.xaxis.label, ax.yaxis.label, ax._left_title]  # type: ignore[attr-defined]
    return [text for text in texts if text.get_text().strip() and text.get_visible()]


def said(text: Text) -> str:
    """Return a text as if it had one line."""
    return text.get_text().replace("-\n", "-").replace("\n", " ").replace("\u00a0", " ")


def artists(ax: Axes) -> tuple[list[str], Any]:
    """Return everything drawn, as words and as numbers."""
    words, parts = [], []
    for panel in ax.child_axes:
        words += [
            text.get_text() for text in (*panel.texts, *panel.get_yticklabels(), *panel.get_xticklabels())
        ]
        words += [str(one.get_color()) for one in panel.lines] + [panel.get_ylabel(), panel.get_xlabel()]
        parts += [np.asarray(one.get_xydata(), dtype=float) for one in panel.lines]
        parts += [path.vertices for one in panel.collections for path in one.get_paths()]
        parts += [
            np.ma.filled(one.get_array(), 99) for one in panel.collections if one.get_array() is not None
        ]
        parts += [np.asarray(one.get_offsets()) for one in panel.collections]
    return words, np.concatenate([np.ravel(part) for part in parts])


@pytest.mark.parametrize("manner", MANNERS)
def test_no_text_hides_another_and_none_leaves_the_canvas(manner: str) -> None:
    each = {stem.partition("-")[0]: figure for stem, (figure, _) in made(manner).items()}
    assert len(each) == 8 - (manner == "tiny")
    for kind, figure in each.items():
        readable(kind, figure, written, slack=0.6, dpis=(100,))


def test_which_figures_there_are() -> None:
    every = ["layers", "parts-{}", "top-{}", "directions", "patches-{}", "cuts", "weights-{}", "profiles"]
    names = ["backdoor", "backdoor-no_weights"]
    wanted = [stem.format(name) for stem in every for name in (names if "{}" in stem else [""])]
    assert list(made("usual")) == wanted
    assert list(made("tiny")) == [stem.format("backdoor") for stem in every[:-1]]  # one has no other
    named = [f"{stem}-{attack}" for attack in ("direct", ".-my-attack.py") for stem in wanted]
    assert list(made("attacked")) == named
    tables = planted(**MANNERS["usual"])
    few = {"cuts": tables["cuts"], "half": tables["half"], "layers": tables["layers"][:0]}
    assert list(of_mechanism(few)) == ["cuts"]
    assert of_mechanism({}) == {}


def test_names_that_give_one_stem_have_a_figure_each() -> None:
    weights = planted(**MANNERS["tiny"])["weights"]
    alike = pd.concat([weights.assign(defense=name) for name in ("a/b", "a b", "a-b")])
    found = of_mechanism({"weights": alike})
    assert {stem: table["defense"].iloc[0] for stem, (_, table) in found.items()} == {
        "weights-a-b": "a/b",
        "weights-a-b~2": "a b",
        "weights-a-b~3": "a-b",
    }
    assert all(len(stem) < 200 for stem in made("long"))


@pytest.mark.parametrize("kind", ["layers", "parts", "top", "patches", "cuts", "weights", "profiles"])
def test_one_figure_shows_one_attack(kind: str) -> None:
    table = drawn(kind, "attacked")[1]
    with pytest.raises(ValueError, match="one attack"):
        FIGURES[kind](pd.concat([table, table.assign(attack="prefix")]))


@pytest.mark.parametrize("manner", ["usual", "crowd"])
def test_layers_draws_each_defense_with_its_band_and_where_half_is_there(manner: str) -> None:
    ax, table = drawn("layers", manner)
    curves, strips = ax.child_axes[:2], ax.child_axes[2:]
    halves = planted(**MANNERS[manner])["half"].set_index(["defense", "contrast"])
    for contrast, panel, strip in zip(CONTRAST_LABELS, curves, strips, strict=True):
        assert panel.get_title(loc="left") == f"{contrast} (nats)"
        for row, (defense, rows) in enumerate(table.groupby("defense", sort=False)):
            name = str(defense)
            np.testing.assert_allclose(line(panel, name), rows[["layer", contrast]].astype(float))
            ends = rows.dropna(subset=f"{contrast}_low")
            corners = {tuple(at) for at in band(panel, name).round(9)}
            for end in ("low", "high"):
                wanted = ends[["layer", f"{contrast}_{end}"]].to_numpy(float).round(9)
                assert {tuple(at) for at in wanted} <= corners
            half = halves.loc[(name, contrast)]
            np.testing.assert_allclose(line(strip, name), [[half["half"], -row]])
            if half["half"] == half["half"]:
                assert (-row, half["half_low"], half["half_high"]) in bars(strip)
        assert strip.get_xlim() == panel.get_xlim()


def test_the_first_eight_have_looks_of_their_own_and_the_rest_is_grey() -> None:
    panel = drawn("layers", "crowd")[0].child_axes[0]
    looks = [(one.get_color(), one.get_linestyle()) for one in panel.lines if one.get_gid() in NAMES]
    assert len(looks) == 9 and len(set(looks)) == 9
    assert [color for color, _ in looks] == [*(look[0] for look in CURVE_STYLES), GREY]
    assert "Grey: all past the first 8" in said(made("crowd")["layers"][0].texts[1])


def test_layers_without_halves_has_no_strip() -> None:
    tables = planted(**MANNERS["usual"])
    none = tables["half"].assign(half=np.nan, half_low=np.nan, half_high=np.nan)
    for given in ({}, {"half": none}, {"half": tables["half"][:0]}):
        figure, _ = of_mechanism({"layers": tables["layers"], **given})["layers"]
        assert [panel.get_xlabel() for panel in figure.axes[0].child_axes] == ["layer entered"] * 2
        assert "no mark" not in figure.texts[1].get_text()


def test_a_layer_without_a_neighbor_has_its_interval_as_a_bar() -> None:
    rows = pd.DataFrame({"layer": [0, 1, 2, 5], "shift": 1.0, "shift_low": [0.5, np.nan, 0.2, 0.3]})
    ax = make_axes(1, 1)
    draw_curve(ax, rows.assign(shift_high=2.0), "shift", CURVE_STYLES[0], "a")
    (lines,) = (one for one in ax.collections if isinstance(one, LineCollection))
    assert [path.vertices.tolist() for path in lines.get_paths()] == [[[0, 0.5], [0, 2]]]


def test_directions_draws_both_directions_after_and_before_and_the_layer_chosen() -> None:
    ax, table = drawn("directions")
    rows = np.array(ax.child_axes).reshape(2, 3)
    for direction, panels in zip(("refusal", "harmfulness"), rows, strict=True):
        for column, panel in zip(("auroc_after", "shift", "discrimination"), panels, strict=True):
            for defense, of in table[table["direction"] == direction].groupby("defense"):
                np.testing.assert_allclose(line(panel, str(defense)), of[["layer", column]].astype(float))
            assert line(panel, "chosen")[:, 0].tolist() == [6, 6]
        first = table[(table["direction"] == direction) & (table["defense"] == "backdoor")]
        np.testing.assert_allclose(line(panels[0], "undefended"), first[["layer", "auroc"]].astype(float))


@pytest.mark.parametrize("manner", ["tiny", "usual"])
def test_patches_draws_every_source_over_layers_and_the_largest_heads_as_dots(manner: str) -> None:
    ax, table = drawn("patches", manner)
    panels = np.array(ax.child_axes).reshape(-1, 2)
    blocks = [
        (into, kind) for into in ("undefended", "defended") for kind in ("residual", "attention", "mlp")
    ]
    for (into, kind), row in zip(blocks, panels[:-1], strict=True):
        here = table[(table["into"] == into) & (table["kind"] == kind)]
        assert row[0].get_ylabel().endswith(f"into {into}")
        for contrast, panel in zip(CONTRAST_LABELS, row, strict=True):
            for source, rows in here.groupby("source"):
                wanted = rows[["layer", contrast]].astype(float)
                np.testing.assert_allclose(line(panel, str(source)), wanted)
    every = planted(**MANNERS[manner])["patches"]
    mine = every[
        (every["defense"] == "backdoor") & (every["kind"] == "head") & (every["source"] == "defense")
    ]
    size = mine[[*CONTRAST_LABELS]].abs().max(axis=1)
    wanted = mine.assign(size=size).sort_values("size", ascending=False, kind="stable")[:10]
    names = [f"{layer:.0f}.{head:.0f}" for layer, head in zip(wanted["layer"], wanted["head"], strict=True)]
    assert [label.get_text() for label in panels[-1, 0].get_yticklabels()] == names
    for contrast, panel in zip(CONTRAST_LABELS, panels[-1], strict=True):
        at = line(panel, "defense")
        at = at[np.argsort(-at[:, 1])]
        np.testing.assert_allclose(at[:, 0], wanted[contrast])
        assert (np.abs(at[:, 1] + np.arange(len(at))) < 0.4).all()
        low, high = (wanted[f"{contrast}_{end}"] for end in ("low", "high"))
        ends = {pair for pair in zip(low.round(6), high.round(6), strict=True) if pair[0] == pair[0]}
        assert ends <= {interval[1:] for interval in bars(panel)}


def test_weights_draws_both_ways_over_layers_and_modules_as_dots() -> None:
    ax, table = drawn("weights")
    for contrast, above, below in zip(CONTRAST_LABELS, ax.child_axes[:2], ax.child_axes[2:], strict=True):
        for how in ("alone", "up to"):
            rows = table[table["how"] == how]
            np.testing.assert_allclose(line(above, how), rows[["layer", contrast]].astype(float))
        rows = table[table["how"] == "module"]
        np.testing.assert_allclose(line(below, "module"), np.stack([rows[contrast], [0, -1, -2, -3]], axis=1))
    names = [label.get_text() for label in ax.child_axes[2].get_yticklabels()]
    assert names == ["q_proj", "k_proj", "v_proj", "down_proj"]
    for part in ("module", "alone"):
        only = table[table["how"] == part]
        assert len(FIGURES["weights"](only).child_axes) == 2


def test_cuts_draws_a_row_per_range_filled_and_hollow() -> None:
    ax, table = drawn("cuts")
    names = ["nothing cut", *(f"layers {first}\N{EN DASH}{first + 2}" for first in (0, 3, 6, 9))]
    assert [label.get_text() for label in ax.child_axes[0].get_yticklabels()] == names
    for contrast, panel in zip(CONTRAST_LABELS, ax.child_axes, strict=True):
        for (defense, reader), rows in table.groupby(["defense", "reader"]):
            at = line(panel, f"{defense} {reader}")
            np.testing.assert_allclose(at[:, 0], rows[contrast])
            assert (-np.round(at[:, 1])).tolist() == [0, 1, 2, 3, 4]
            (found,) = (one for one in panel.lines if one.get_gid() == f"{defense} {reader}")
            assert (found.get_markerfacecolor() == "white") == (reader == "everything")
        heights = np.concatenate(
            [line(panel, str(one.get_gid()))[:, 1] for one in panel.lines if one.get_gid()]
        )
        assert len(set(heights.round(6))) == len(heights)  # no dot has the height of another


@pytest.mark.parametrize("manner", ["tiny", "usual", "large"])
def test_the_heat_map_holds_every_head_and_its_color_is_its_sign(manner: str) -> None:
    ax, table = drawn("parts", manner)
    layers, heads = MANNERS[manner]["layers"], MANNERS[manner]["heads"]
    scales = [panel for panel in ax.child_axes if panel.get_gid() == "scale"]
    assert len(scales) == 1 and scales[0].get_yticklabels()[1].get_text() == "0 nats"
    spans = set()
    for contrast, panel in zip(CONTRAST_LABELS, ax.child_axes[:2], strict=True):
        meshes = {str(one.get_gid()): one for one in panel.collections}
        for kind in ("head", "mlp"):
            mesh = meshes["heads" if kind == "head" else "mlp"]
            rows = table[table["kind"] == kind].sort_values(["layer", "head"])
            values = np.asarray(mesh.get_array()).reshape(layers, -1)
            np.testing.assert_allclose(values, rows[contrast].to_numpy(float).reshape(layers, -1))
            assert values.shape == (layers, heads if kind == "head" else 1)
            spans.add((mesh.norm.vmin, mesh.norm.vmax))
            colors = mesh.cmap(mesh.norm(values))
            far = np.abs(values) > 0.05 * mesh.norm.vmax
            assert ((colors[..., 2] > colors[..., 0]) == (values > 0))[far].all()
        assert panel.get_ylim() == (layers, 0)  # the first layer is at the top
    assert len(spans) == 1 and spans.pop()[1] > 0
    (low, high), most = scales[0].get_ylim(), table[[*CONTRAST_LABELS]].abs().max(axis=None)
    assert -low == high
    bounded = "\N{GREATER-THAN OR EQUAL TO}" in scales[0].get_yticklabels()[2].get_text()
    assert high < most if bounded else high == most
    assert bounded == (manner == "large")  # its MLPs write more than all but some heads


def test_a_dot_marks_a_part_whose_interval_excludes_zero() -> None:
    ax, table = drawn("parts")
    heads = table[table["kind"] == "head"]
    for contrast, panel in zip(CONTRAST_LABELS, ax.child_axes[:2], strict=True):
        sure = heads[(heads[f"{contrast}_low"] > 0) | (heads[f"{contrast}_high"] < 0)]
        (dots,) = (one for one in panel.collections if one.get_gid() == "sure")
        at = np.asarray(dots.get_offsets())
        wanted = sure[["head", "layer"]].to_numpy(float) + 0.5
        assert {tuple(spot) for spot in at if spot[0] < 9} == {tuple(spot) for spot in wanted}
        assert 0 < len(sure) < len(heads)


def test_a_part_far_beyond_all_others_does_not_make_them_white_and_the_scale_says_so() -> None:
    parts = planted(**MANNERS["usual"])["parts"]
    parts = parts[parts["defense"] == "backdoor"].reset_index(drop=True)
    parts.loc[5, "shift"] = 50.0
    figure, _ = of_mechanism({"parts": parts})["parts-backdoor"]
    scale = figure.axes[0].child_axes[2]
    assert scale.get_ylim()[1] < 2
    assert scale.get_yticklabels()[2].get_text().startswith("\N{GREATER-THAN OR EQUAL TO}+")
    assert "beyond the ends of the scale" in said(figure.texts[1])


def test_parts_that_are_missing_are_grey() -> None:
    parts = planted(**MANNERS["usual"])["parts"]
    parts = parts[
        (parts["defense"] == "backdoor") & ~((parts["layer"] == 3) & (parts["head"] == 2)).fillna(False)
    ]
    figure, _ = of_mechanism({"parts": parts})["parts-backdoor"]
    mesh = figure.axes[0].child_axes[0].collections[0]
    mask = np.ma.getmaskarray(mesh.get_array()).reshape(12, 9)
    assert np.argwhere(mask).tolist() == [[3, 2]]
    assert same_color(mesh.cmap.get_bad()[:3], to_rgb(MISSING_COLOR))
    assert "Grey: no such part." in said(figure.texts[1])


def test_top_draws_the_parts_with_the_largest_effects_of_either_contrast() -> None:
    ax, _ = drawn("top")
    parts = planted(**MANNERS["usual"])["parts"]
    parts = parts[parts["defense"] == "backdoor"].reset_index(drop=True)
    size = parts[[*CONTRAST_LABELS]].abs().max(axis=1)
    wanted = parts.loc[size.nlargest(10).index]
    words = {"head": "head", "mlp": "MLP", "embedding": "embedding", "bias": "final bias"}
    names = []
    for kind, layer, head in wanted[["kind", "layer", "head"]].itertuples(index=False, name=None):
        names.append(
            words[kind] + ("" if layer is pd.NA else f" {layer}") + ("" if head is pd.NA else f".{head}")
        )
    assert [label.get_text() for label in ax.child_axes[0].get_yticklabels()] == names
    for contrast, panel in zip(CONTRAST_LABELS, ax.child_axes, strict=True):
        np.testing.assert_allclose(
            line(panel, contrast), np.stack([wanted[contrast], -np.arange(10.0)], axis=1)
        )
        ends = wanted[[f"{contrast}_low", f"{contrast}_high"]].to_numpy(float).round(6)
        assert bars(panel) == {(-row, *end) for row, end in enumerate(ends) if np.isfinite(end).all()}
    caption = said(made("usual")["top-backdoor"][0].texts[1])
    told = f"{wanted['shift'].sum():+.2f} of {parts['shift'].sum():+.2f} nats of shift"
    assert told.replace("-", "\N{MINUS SIGN}") in caption
    assert len(of_mechanism({"parts": parts}, top=3)["top-backdoor"][1]) == 3


def test_likeness_has_the_cosine_of_each_pair_on_both_sides() -> None:
    ax, table = drawn("profiles")
    names = [label.get_text() for label in ax.child_axes[0].get_yticklabels()]
    assert sorted(names) == sorted(NAMES[:3])
    for contrast, panel in zip(CONTRAST_LABELS, ax.child_axes[:2], strict=True):
        (mesh,) = panel.collections
        assert (mesh.norm.vmin, mesh.norm.vmax) == (-1, 1)
        values = np.ma.filled(mesh.get_array(), np.nan).reshape(3, 3)
        assert np.isnan(np.diag(values)).all()
        for one, two, kind, cosine, low, high in table[
            ["defense", "other", "contrast", "cosine", "cosine_low", "cosine_high"]
        ].itertuples(index=False, name=None):
            row, column = names.index(one), names.index(two)
            if kind == contrast:
                assert values[row, column] == values[column, row] == cosine
                shown = [text for text in panel.texts if text.get_position() == (column, row)]
                assert float(shown[0].get_text().replace("\N{MINUS SIGN}", "-")) == pytest.approx(
                    cosine, abs=0.006
                )
                assert (shown[0].get_weight() == "bold") == (low > 0 or high < 0)


@pytest.mark.parametrize("manner", ["tiny", "usual", "attacked"])
def test_a_figure_can_be_drawn_again_from_its_csv_alone(manner: str) -> None:
    for stem, (figure, table) in made(manner).items():
        again = pd.read_csv(io.StringIO(table.to_csv(index=False)))
        (words, numbers), (words_again, numbers_again) = map(
            artists, (figure.axes[0], FIGURES[stem.partition("-")[0]](again))
        )
        assert words_again == words, stem
        np.testing.assert_allclose(numbers_again, numbers, atol=1e-9)


def test_a_banner_stands_above_what_text_contradicts() -> None:
    tables = planted(**MANNERS["usual"])
    verdicts = {"none": "trusted", NAMES[0]: "trusted", NAMES[1]: "not trusted", NAMES[2]: "cannot tell"}
    trusted = pd.DataFrame({"attack": "direct", "defense": [*verdicts], "trusted": verdicts.values()})
    other = trusted.assign(attack="prefix", trusted="not trusted")
    banners = {}
    for stem, (figure, _) in of_mechanism(tables, pd.concat([trusted, other])).items():
        banner = [text for text in figure.texts if text.get_gid() == "banner"]
        banners[stem] = said(banner[0]) if banner else ""
        if stem == "profiles":
            readable(stem, figure, written, slack=0.6)
        for text in banner:
            assert text.get_window_extent().y0 > figure.texts[0].get_window_extent().y1
    words = "Not trusted: generated text contradicts the readout under backdoor/no_weights"
    for stem, banner_words in banners.items():
        assert banner_words == ("" if stem.endswith("-backdoor") else words), stem
    base = trusted.assign(trusted=["not trusted", *["trusted"] * 3])  # what all is compared with
    few = {name: tables[name] for name in ("layers", "profiles")}
    for figure, _ in of_mechanism(few, base).values():
        assert figure.texts[-1].get_text().endswith("under none")
    attacked = planted(**MANNERS["attacked"])
    doubt = pd.DataFrame({"attack": ["./my attack.py"], "defense": ["backdoor"], "trusted": ["not trusted"]})
    few = {name: attacked[name] for name in ("parts", "weights")}
    for stem, (figure, _) in of_mechanism(few, doubt).items():
        wanted = stem.endswith("my-attack.py") and "no_weights" not in stem
        assert any("backdoor (./my attack.py)" in said(text) for text in figure.texts[2:]) == wanted


def test_captions_name_n_model_data_readout_attack_and_interval() -> None:
    for stem, (figure, _) in made("usual").items():
        caption = said(figure.texts[1])
        n = ("24 harmful", "20 benign") if stem.startswith("patches") else ("50 harmful", "40 benign")
        for word in (*n, RUN.model, "twins, test split", "\u201cSorry\u201d", "95 %", "Attack: none"):
            assert word in caption, (stem, word)
    for stem, (figure, _) in made("bare").items():
        caption = said(figure.texts[1])
        assert ("Intervals: none known" in caption) == (stem != "layers"), stem
        assert ("95 % interval" in caption) == (stem == "layers"), stem  # its half-way layers have some


def test_each_figure_of_one_defense_names_it() -> None:
    for stem, (figure, table) in made("usual").items():
        if "-" in stem:
            assert table["defense"].nunique() == 1
            assert table["defense"].iloc[0] in figure.texts[0].get_text().replace("\n", "")
