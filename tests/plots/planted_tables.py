"""Tables with planted effects for the tests of figures, and helpers that read what a figure shows."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from conftest import draw_run_figures
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.plots.captions import CaptionContext
from analysis.plots.data import (
    CONTRAST_LABELS,
    build_analysis_points,
    build_ensemble_points,
    build_mechanism_points,
)
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
FAMILIES = ("reminders", "backdoor", "refactoring", "noise", "tuning", "steering", "control")
READOUT_RATES = ("readout_refusal_rate", "readout_over_refusal_rate")
SCALED = ("scaled_shift", "scaled_discrimination")
ESTIMATES = ("refusal_rate", "over_refusal_rate", *READOUT_RATES, "auroc", "delta_auroc")
ESTIMATES += ("shift", "discrimination", *SCALED)
SD = 1.5  # nats; of the planted margins within each class


def plant_scores(
    defenses: int, manner: str = "usual", n: int = 24, attack: str = "direct"
) -> tuple[Any, Any]:
    """Return scores and a summary with known shifts; `manner` is usual, long (names) or same (points).

    The rates of judged responses are 0.9 times those of the readout.
    """
    generator = np.random.default_rng(defenses)
    undefended = {True: generator.normal(-0.5, SD, n), False: generator.normal(-2.5, SD, n)}
    rows, summary = [], []
    for number in range(-1, defenses):
        family = "none" if number < 0 else FAMILIES[number % len(FAMILIES)]
        name = "none" if number < 0 else f"{family}-{number}"
        shift, gain = (0.0, 0.0) if number < 0 else (number % 5, (number % 3) - 0.5)
        if manner == "same" and number >= 0:
            shift, gain = 1.0, 0.5
        if manner == "long" and number >= 0:
            name = f"{name}+./somewhere/a_defense_with_a_very_long_name.py" + "(copies=10, $q$=0.1)" * 8
        margin = {c: undefended[c] + shift + (gain / 2 if c else -gain / 2) for c in (True, False)}
        for harmful, index in itertools.product((True, False), range(n)):
            query = f"{'h' if harmful else 'b'}{index}"
            rows.append((query, f"p{index}", "any", harmful, attack, name, margin[harmful][index]))
        wins = margin[True][:, None] > margin[False]
        rates = [(margin[True] > THRESHOLD).mean(), (margin[False] > THRESHOLD).mean()]
        values = [0.9 * rates[0], 0.9 * rates[1], *rates, wins.mean()]
        values += [wins.mean() - (undefended[True][:, None] > undefended[False]).mean(), shift, gain]
        values += [shift / SD, gain / SD]
        row = {"attack": attack, "defense": name, "family": family, "n_harmful": n, "n_benign": n}
        row |= {"based_on": "responses", "n_responses": 2 * n}
        for estimate, value in zip(ESTIMATES, values, strict=True):
            row |= {estimate: value, f"{estimate}_low": value - 0.1, f"{estimate}_high": value + 0.2}
        summary.append(row)
    columns = ["query", "pair", "category", "harmful", "attack", "defense", "margin"]
    return pd.DataFrame(rows, columns=columns), pd.DataFrame(summary)


def make_older(summary: pd.DataFrame) -> pd.DataFrame:
    """Return a summary as earlier versions wrote it, whose only rates are those of the readout."""
    new = ("based_on", "n_responses", *(f"{x}{end}" for x in SCALED for end in ("", "_low", "_high")))
    older = summary.drop(columns=[*new])
    for name in READOUT_RATES:
        for end in ("", "_low", "_high"):
            older[f"{name.removeprefix('readout_')}{end}"] = older.pop(f"{name}{end}")
    return older


def plant_kinds(
    defenses: int, kinds: tuple[str, ...], attack: str = "direct", based_on: str = "responses"
) -> pd.DataFrame:
    """Return over-refusal by kind of benign query; kind k of defense d is refused in (d + 2k) % 11 of 10."""
    rows = []
    for number, (place, kind) in itertools.product(range(defenses + 1), enumerate(kinds)):
        rate = (number + 2 * place) % 11 / 10
        row = {"attack": attack, "defense": f"defense-{number}" if number else "none", "family": "noise"}
        row |= {"kind": kind, "n": 10 * (place + 1), "n_harmful": 24, "based_on": based_on}
        row["n_responses"] = row["n"] if based_on == "responses" else 0
        ends = {"over_refusal_rate_low": 0.9 * rate, "over_refusal_rate_high": 0.1 + 0.9 * rate}
        rows.append(row | {"over_refusal_rate": rate} | ends)
    return pd.DataFrame(rows)


def draw_score_figures(scores: pd.DataFrame, summary: pd.DataFrame, run: CaptionContext = RUN) -> Any:
    return draw_run_figures(build_analysis_points(scores, summary, run.threshold), run)


@cache
def cached_score_figures(defenses: int, manner: str) -> dict[str, tuple[Figure, pd.DataFrame]]:
    return draw_score_figures(*plant_scores(defenses, manner))


def plant_attacked_scores(defenses: int, names: list[str], manner: str = "usual") -> tuple[Any, Any]:
    """Return scores and a summary under several attacks, the second of which moves all margins by a nat."""
    parts = [plant_scores(defenses, manner, attack=name) for name in names]
    scores, summary = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    scores.loc[scores["attack"] == names[1], "margin"] -= 1
    return scores, summary.assign(trusted="trusted")


ENSEMBLE_FAMILIES = ("reminders", "backdoor", "refactoring", "noise", "tuning")
ENSEMBLE_CASES = {
    "usual": {},
    "pair": {"defenses": 2, "n_stacks": 1},
    "one": {"defenses": 5, "n_stacks": 1},
    "votes": {"defenses": 3, "n_stacks": 0},
    "long": {"defenses": 6, "name": "/a_defense_with_a_very_long_name(copies=10,$q$=0.1,more=7)"},
    "attacked": {"defenses": 5, "n_stacks": 5, "attacks": ("direct", "base64", "./my attack.py")},
    "refusing": {"defenses": 5, "raised": 30.0},
    "several": {"defenses": 10, "n_stacks": 20},
    "many": {"defenses": 12, "n_stacks": 24},
}


@cache
def plant_split_scores(
    defenses: int = 8,
    n_stacks: int = 11,
    name: str = "",
    attacks: tuple[str, ...] = ("direct",),
    raised: float = 0.0,
    n: int = 24,
) -> tuple[list[SplitScores], list[str], list[tuple[str, ...]]]:
    """Return both splits under each attack, defenses and stacks; a stack shifts less than its sum."""
    generator = np.random.default_rng(defenses)
    names = [
        f"{ENSEMBLE_FAMILIES[number % len(ENSEMBLE_FAMILIES)]}-{number}{name}" for number in range(defenses)
    ]
    pairs = list_teams(names, 2)
    stacks = [pairs[place] for place in sorted(generator.permutation(len(pairs))[:n_stacks])]
    effects = generator.normal([1.0, 0.3], 1.0, (defenses, 2))
    is_harmful, split_scores = np.repeat([True, False], n), []
    for (number, attack), split in itertools.product(enumerate(attacks), ("calibration", "test")):
        undefended = generator.normal(np.where(is_harmful, 0.5 - number, -2.0) + raised, 1.6)
        noise = generator.normal(0, 0.6, (2 * n, defenses))
        side = np.where(is_harmful, 0.5, -0.5)[:, None]
        defended = undefended[:, None] + effects[:, 0] + side * effects[:, 1] + noise
        columns = [undefended, *defended.T]
        for team in stacks:
            first, second = (names.index(member) for member in team)
            lost = 0.4 * effects[first, 0] * effects[second, 0] + generator.normal(0, 0.4, 2 * n)
            columns.append(defended[:, first] + defended[:, second] - undefended - lost)
        margin_table = MarginTable(
            ("none", *names, *map("+".join, stacks)), np.stack(columns, axis=1), undefended, is_harmful
        )
        pair = pd.Series([f"p{place % n}" for place in range(2 * n)])
        split_scores.append(
            SplitScores(attack, split, margin_table, ResamplingUnits.from_pairs(pair, is_harmful))
        )
    return split_scores, names, stacks


@cache
def plant_ensembles(manner: str = "usual") -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """Return rows of ensembles, candidates and families."""
    all_scores, names, stacks = plant_split_scores(**ENSEMBLE_CASES[manner])
    teams, row_tables = list_teams(names, 3), []
    for split_scores in all_scores:
        fitted_to_key = split_scores.attack, "calibration"
        (fitted_to,) = (scores for scores in all_scores if (scores.attack, scores.split) == fitted_to_key)
        evaluations = (
            evaluate_single_defenses(split_scores, ["none", *names]),
            evaluate_votes(split_scores, teams, fitted_to),
            evaluate_stacks(split_scores, stacks, fitted_to),
        )
        row_tables.append(pd.concat([table for table in evaluations if len(table)], ignore_index=True))
    rows = pd.concat(row_tables, ignore_index=True)
    rows["kind"] = np.where(rows["members"].str.len() % 2, "intra", "inter")
    for name, half_width in (("shift", 0.3), ("discrimination", 0.2)):
        for side, sign in (("low", -1), ("high", 1)):
            stacked = rows["how"] == "stack"
            for measure in ("observed", "interaction"):
                value = (rows[f"{measure}_{name}"] + sign * half_width).where(stacked)
                rows[f"{measure}_{name}_{side}"] = value
    costs = {"none": 1.0, **{name: 1 + 0.5 * index for index, name in enumerate(names)}}
    candidates = build_candidates(
        rows, lambda conditions: sum(costs[member] for name in conditions for member in name.split("+"))
    )
    return rows, candidates, dict(zip(names, itertools.cycle(ENSEMBLE_FAMILIES), strict=False))


@cache
def cached_ensemble_figures(manner: str) -> dict[str, tuple[Figure, pd.DataFrame]]:
    rows, candidates, families = plant_ensembles(manner)
    return draw_run_figures(
        build_ensemble_points(rows, candidates, families),
        RUN,
        (24, 24),
        ENSEMBLE_CASES[manner].get("attacks", ("direct",)),
    )


MECHANISM_DEFENSES = (
    *("backdoor", "backdoor/no_weights", "self_reminder+backdoor", "smoothllm(copies=5)"),
    *("policy", "refusal_direction", "paraphrase", "in_context", "retokenize"),
)
LONG_NAME = "./somewhere/a_defense_with_a_very_long_name.py(copies=10,$q$=0.1)+"
MECHANISM_CASES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "heads": 4, "defenses": 1},
    "usual": {"layers": 12, "heads": 9, "defenses": 3, "token_groups": ("defense", "image")},
    "large": {"layers": 80, "heads": 64, "defenses": 8},
    "crowd": {"layers": 24, "heads": 16, "defenses": 9, "ranges": 12},
    "long": {"layers": 6, "heads": 4, "defenses": 2, "name": 3 * LONG_NAME},
    "attacked": {"layers": 4, "heads": 2, "defenses": 2, "attacks": ("direct", "./my attack.py")},
    "bare": {"layers": 4, "heads": 3, "defenses": 2, "with_interval": False},
}


def add_estimate(rows: pd.DataFrame, column: str, values: Any, with_interval: bool = True) -> None:
    """Add an estimate with its interval, which is missing in some rows, or in all."""
    half_width = np.where(np.arange(len(rows)) % 17 == 3, np.nan, 0.05 + 0.2 * np.abs(values))
    if not with_interval:
        half_width = np.full(len(rows), np.nan)
    rows[column] = values
    rows[f"{column}_low"] = values - half_width
    rows[f"{column}_high"] = values + 1.5 * half_width


def plant_mechanism(
    layers: int,
    heads: int,
    defenses: int,
    ranges: int = 4,
    name: str = "",
    attacks: tuple[str, ...] = ("direct",),
    with_interval: bool = True,
    token_groups: tuple[str, ...] = ("defense",),
) -> dict[str, pd.DataFrame]:
    """Return all tables of `analyze mechanism`."""
    generator = np.random.default_rng(layers)
    parts_by_table: dict[str, list[pd.DataFrame]] = {}
    for attack, (number, defense) in itertools.product(attacks, enumerate(MECHANISM_DEFENSES[:defenses])):
        condition = {"attack": attack, "defense": name + defense}
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
        layer_directions = itertools.product(range(layers + 1), ("refusal", "harmfulness"))
        tables["directions"] = pd.DataFrame(layer_directions, columns=["layer", "direction"])
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
            [
                (tokens, reader, *span)
                for tokens in token_groups
                for reader in ("answer", "everything")
                for span in spans
            ],
            columns=["tokens", "reader", "first", "last"],
        )
        weight_patches = [(how, layer, None) for how in ("alone", "up to") for layer in range(layers)]
        weight_patches += [("module", None, module) for module in ("q_proj", "k_proj", "v_proj", "down_proj")]
        tables["weights"] = pd.DataFrame(weight_patches, columns=["how", "layer", "module"])
        others = [
            (other, contrast)
            for other in MECHANISM_DEFENSES[number + 1 : defenses]
            for contrast in CONTRAST_LABELS
        ]
        tables["profiles"] = pd.DataFrame(others, columns=["other", "contrast"])
        tables["profiles"]["other"] = name + tables["profiles"]["other"]
        for kind, table in tables.items():
            if kind in ("parts", "patches", "weights") and number > (1 if defenses < 4 else 0):
                continue  # two defenses are enough for figures of a single one
            size = len(table)
            for contrast, largest in (("shift", 2.5), ("discrimination", -0.6)):
                if kind == "layers":
                    add_estimate(
                        table, contrast, largest * rise + generator.normal(0, 0.03, size), with_interval
                    )
                elif kind not in ("half", "profiles"):
                    noise = generator.normal(0, 0.05 if kind == "directions" else 0.1, size)
                    effect = np.where(table.get("source", table.index) == "placebo", 0.0, largest / 3)
                    add_estimate(table, contrast, noise + (0 if kind == "parts" else effect), with_interval)
            if kind == "half":
                table["half_low"], table["half_high"] = table["half"] - 1, table["half"] + 0.5
                add_estimate(table, "final", np.array([2.5, -0.6]), with_interval)
            elif kind == "directions":
                for column, base in (("auroc", 0.85), ("auroc_after", 0.7)):
                    add_estimate(
                        table,
                        column,
                        base
                        + generator.uniform(-0.02, 0.02, size)
                        + 0.05 * np.sin(np.arange(size) / size * 6),
                        with_interval,
                    )
            elif kind == "profiles":
                add_estimate(table, "cosine", generator.uniform(-1, 1, size), with_interval)
            if kind == "parts":
                mlp = table["kind"] == "mlp"
                for end in ("", "_low", "_high"):
                    table.loc[mlp, f"shift{end}"] *= 3
            parts_by_table.setdefault(kind, []).append(
                table.assign(**condition)[[*condition, *table.columns]]
            )
    return {
        kind: pd.concat([part for part in parts if len(part)] or parts)
        for kind, parts in parts_by_table.items()
    }


def draw_mechanism_figures(
    tables: dict[str, pd.DataFrame], trusted: pd.DataFrame | None = None, top: int = 10
) -> dict[str, tuple[Figure, pd.DataFrame]]:
    run_tables = {} if trusted is None else {"summary": trusted.assign(n_harmful=50, n_benign=40)}
    return draw_run_figures(build_mechanism_points(tables, top), RUN, (50, 40), **run_tables)


@cache
def cached_mechanism_figures(case: str) -> dict[str, tuple[Figure, pd.DataFrame]]:
    tables = plant_mechanism(**MECHANISM_CASES[case])
    if case == "crowd":  # only what shows several defenses
        tables = {name: tables[name] for name in ("layers", "half", "directions", "cuts", "profiles")}
    if case == "long":  # each kind once is enough
        for name in ("parts", "patches", "weights"):
            tables[name] = tables[name][tables[name]["defense"] == tables[name]["defense"].iloc[0]]
    return draw_mechanism_figures(tables)


def find_figure(kind: str, manner: str = "usual", defense: str = "backdoor") -> tuple[Axes, pd.DataFrame]:
    """Return the axes that contain the panels of a figure, and its table."""
    stem = f"{kind}-{defense}" if kind in ("parts", "top", "patches", "weights") else kind
    figures = cached_mechanism_figures(manner)
    figure, table = figures.get(stem) or figures[f"{stem}-direct"]
    return figure.axes[0], table


def collect_texts(figure: Figure) -> list[Text]:
    """Return every text that a reader sees."""
    host = figure.axes[0]
    legend = host.get_legend()
    texts = [*figure.texts, *([*legend.get_texts(), legend.get_title()] if legend else [])]
    for ax in (host, *host.child_axes):
        texts += [*ax.texts, ax.title, ax._left_title]  # type: ignore[attr-defined]
        if not ax.axison:
            continue
        texts += [ax.xaxis.label, ax.yaxis.label]
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            for tick, place in zip(axis.get_major_ticks(), axis.get_ticklocs(), strict=False):
                if low <= place <= high:
                    texts += [tick.label1, tick.label2]
    return [text for text in texts if text.get_text().strip() and text.get_visible()]


def describe_artists(host: Axes) -> tuple[list[str], Any]:
    """Return everything drawn on axes and the axes inside of them, as words and as numbers."""
    words, numbers = [], []
    legend = host.get_legend()
    words += [text.get_text() for text in legend.get_texts()] if legend else []
    for ax in (host, *host.child_axes):
        texts = [*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels()] if ax.axison else ax.texts
        words += [*(text.get_text() for text in texts), ax.get_xlabel(), ax.get_ylabel()]
        words += [str(line.get_color()) for line in ax.lines]
        numbers += [np.asarray(line.get_xydata(), dtype=float) for line in ax.lines]
        numbers += [path.vertices for collection in ax.collections for path in collection.get_paths()]
        numbers += [np.asarray(collection.get_offsets()) for collection in ax.collections]
        arrays = [collection.get_array() for collection in ax.collections]
        numbers += [np.ma.filled(array, 99) for array in arrays if array is not None]
        numbers += [np.asarray(text.get_position(), dtype=float) for text in ax.texts]
    return words, np.concatenate([np.ravel(part) for part in numbers])


def lines_by_gid(ax: Axes) -> dict[str, Any]:
    return {str(line.get_gid()): line for line in ax.lines if line.get_gid()}


def scatter_offsets(ax: Axes) -> dict[str, Any]:
    """Return the offsets of each family's scatter."""
    return {
        str(c.get_label()): np.asarray(c.get_offsets())
        for c in ax.collections
        if len(c.get_offsets()) and not str(c.get_label()).startswith("_")
    }


def find_panels(ax: Axes) -> list[Axes]:
    """Return the axes inside of others, except that of the color bar."""
    return [panel for panel in ax.child_axes if panel.get_gid() != "cost"]


def scatter_by_style(panel: Axes) -> dict[tuple[str, bool], Any]:
    """Return the points of each style, by label and whether they are hollow."""
    offsets_by_style: dict[tuple[str, bool], Any] = {}
    for dots in panel.collections:
        if len(offsets := np.asarray(dots.get_offsets())) and not str(dots.get_label()).startswith("_"):
            face_colors = dots.get_facecolor()
            hollow = len(face_colors) == 0 or same_color(face_colors[0], "white")
            offsets_by_style[str(dots.get_label()), hollow] = offsets
    return offsets_by_style


def line_points(panel: Axes, gid: str) -> Any:
    """Return the points of the only line of that name."""
    (line,) = (drawn for drawn in panel.lines if drawn.get_gid() == gid)
    return np.asarray(line.get_xydata(), dtype=float)


def band_corners(panel: Axes, gid: str) -> Any:
    """Return the corners of a band."""
    (band,) = (drawn for drawn in panel.collections if drawn.get_gid() == f"{gid} band")
    return np.concatenate([path.vertices for path in band.get_paths()])


def interval_bars(panel: Axes) -> set[tuple[float, float, float]]:
    """Return height, left and right end of each interval of a row of dots."""
    paths = [
        path.vertices for collection in panel.collections for path in collection.get_paths() if len(path) == 2
    ]
    return {(round(a[1], 6), round(a[0], 6), round(b[0], 6)) for a, b in paths if np.isfinite([a, b]).all()}


def unwrap_text(text: Text) -> str:
    """Return a text as if it had one line."""
    return text.get_text().replace("-\n", "-").replace("\n", " ").replace("\u00a0", " ")


def read_caption(figure: Figure) -> str:
    """Return the caption of a figure with the sentences in small print below it, as if on one line."""
    blocks = [text for text in figure.texts if text.get_gid() in ("caption", "setting")]
    return " ".join(map(unwrap_text, blocks))


def scatter_collections(ax: Any) -> list[PathCollection]:
    """Return the points; the bars beside them are collections of another kind."""
    return [collection for collection in ax.collections if isinstance(collection, PathCollection)]
