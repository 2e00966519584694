"""What put into another run carries a defense's effect: activations that are patched, weights switched on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import (
    CONTRASTS_SENTENCE,
    CaptionContext,
    format_grey_note,
    format_interval_note,
    format_query_counts,
    format_run_sentences,
)
from analysis.plots.data import CONTRAST_LABELS, OTHER_RUN_SOURCES, check_one_attack, to_numbers
from analysis.plots.layout import (
    assign_curve_styles,
    draw_curve,
    draw_dots,
    fit_text,
    make_line_legend,
    place_legend_beside,
    set_layer_axis,
    set_panel_titles,
    set_row_axis,
    stack_panels,
)
from analysis.plots.style import BLACK, BLUE, DARK, GREY, ORANGE, RC_PARAMS, TEXT_SIZE, VERMILION

if TYPE_CHECKING:
    from analysis.plots.captions import QueryCounts

PATCH_SOURCE_STYLES: dict[str, tuple[tuple[str, Any, str], str]] = {
    "defense": ((BLUE, "-", "o"), "from the defended run"),
    "undefended": ((VERMILION, (0, (5, 1.5)), "v"), "from the undefended run"),
    "placebo": ((GREY, (0, (4, 1.5)), "s"), "random, same norm"),
    "neutral_prompt": ((ORANGE, (0, (6, 1.2, 1.2, 1.2)), "D"), "neutral prompt"),
}
WEIGHT_PATCH_STYLES: dict[str, tuple[tuple[str, Any, str], str]] = {
    "alone": ((BLUE, "-", "o"), "one layer alone"),
    "up to": ((VERMILION, (0, (5, 1.5)), "D"), "all layers up to it"),
}

_ACTIVATION_KINDS = {"residual": "residual stream", "attention": "attention", "mlp": "MLP", "head": "heads"}
_PATCH_PANEL_HEIGHT, _DOT_ROW_HEIGHT = 0.95, 0.2  # inches: a panel of curves, a row of dots


def draw_patches(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    r"""Draw what each patch does: a row per kind of activation and run patched, curves over layers or heads.

    >>> row = {"attack": "direct", "defense": "a", "into": "defended", "source": "placebo", "kind": "mlp"}
    >>> ax = draw_patches(pd.DataFrame([row | {"layer": 0, "head": None, "shift": 0.5, "discrimination": 0.0}]))
    >>> ax.child_axes[0].get_ylabel()
    'MLP\ninto defended'

    Args:
        points: what `patch_points` returned, of one attack and defense.
        ax: where to draw; it only lends its place to the panels.
    """
    pairs = check_one_attack(points)[["into", "kind"]].drop_duplicates().itertuples(index=False, name=None)
    blocks = sorted(
        pairs,
        key=lambda pair: (pair[1] == "head", pair[0] == "defended", [*_ACTIVATION_KINDS].index(pair[1])),
    )
    groups = [points[(points["into"] == into) & (points["kind"] == kind)] for into, kind in blocks]
    last = float(to_numbers(points["layer"]).max())
    sources = {name: look for name, look in PATCH_SOURCE_STYLES.items() if (points["source"] == name).any()}
    names = [
        _heads_by_effect(rows) if kind == "head" else []
        for (_, kind), rows in zip(blocks, groups, strict=True)
    ]
    heights = [
        max(_DOT_ROW_HEIGHT * len(heads), _PATCH_PANEL_HEIGHT) if heads else _PATCH_PANEL_HEIGHT
        for heads in names
    ]
    curves = [place for place, heads in enumerate(names) if not heads]
    with rc_context(RC_PARAMS):
        gaps = [
            0.5 if place == max(curves, default=-1) or heads else 0.14 for place, heads in enumerate(names)
        ]
        ax, panels = stack_panels(ax, heights, gaps[:-1])
        set_panel_titles(panels[0], CONTRAST_LABELS.values())
        for place, (rows, heads, row) in enumerate(zip(groups, names, panels, strict=True)):
            for name, panel in zip(CONTRAST_LABELS, row, strict=True):
                for number, (source, (look, _)) in enumerate(sources.items()):
                    of = rows[rows["source"] == source]
                    if heads:
                        at = [
                            -heads.index(head) - 0.22 * (number - (len(sources) - 1) / 2)
                            for head in _head_names(of)
                        ]
                        draw_dots(panel, of, name, at, look, source)
                    elif len(of):
                        draw_curve(panel, of, name, look, source)
                if heads:
                    set_row_axis(panel, heads, "nats", with_names=name == "shift")
                else:
                    set_layer_axis(panel, last, "layer patched" if place == curves[-1] else "")
                    panel.tick_params(labelbottom=place == curves[-1])
            into, kind = blocks[place]
            row[0].set_ylabel(f"{_ACTIVATION_KINDS[kind]}\ninto {into}", fontsize=8)
        words = {name: said for name, (_, said) in sources.items()}
        place_legend_beside(ax, make_line_legend({name: look for name, (look, _) in sources.items()}, words))
    return ax


def draw_weight_patches(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the effect of the tuned weights in single layers, in all up to a layer, and in kinds of modules.

    >>> row = {"attack": "direct", "defense": "a", "layer": None, "shift": 0.5, "discrimination": 0.0}
    >>> ax = draw_weight_patches(pd.DataFrame([row | {"how": "module", "module": "q_proj"}]))
    >>> [label.get_text() for label in ax.child_axes[0].get_yticklabels()]
    ['q_proj']

    Args:
        points: `weights.csv`, of one attack and defense.
        ax: where to draw; it only lends its place to the panels.
    """
    nothing = check_one_attack(points)[points["how"] == "nothing"]
    kinds = points[points["how"] == "module"]
    modules = [str(name) for name in kinds["module"]]
    ways = {name: look for name, look in WEIGHT_PATCH_STYLES.items() if (points["how"] == name).any()}
    last = float(to_numbers(points["layer"]).max())
    with rc_context(RC_PARAMS):
        tall = [1.7] * bool(ways) + [max(_DOT_ROW_HEIGHT * len(modules), 0.7)] * bool(modules)
        ax, rows = stack_panels(ax, tall, [0.55] * (len(tall) - 1))
        set_panel_titles(rows[0], CONTRAST_LABELS.values())
        for place, name in enumerate(CONTRAST_LABELS):
            for way, (look, _) in ways.items():
                draw_curve(rows[0][place], points[points["how"] == way], name, look, way)
            for value in nothing[name]:
                rows[0][place].axhline(value, color=GREY, linewidth=1.0, linestyle=(0, (1, 1)), gid="nothing")
            if ways:
                set_layer_axis(rows[0][place], last, "layer")
            if modules:
                at = [-float(row) for row in range(len(kinds))]
                draw_dots(rows[-1][place], kinds, name, at, (BLACK, "-", "o"), "module")
                set_row_axis(rows[-1][place], modules, "nats", with_names=place == 0)
        if ways:
            words = {name: said for name, (_, said) in ways.items()} | {"nothing": "prompt alone"}
            marks = {name: look for name, (look, _) in ways.items()}
            place_legend_beside(
                ax,
                make_line_legend(
                    marks | {"nothing": (GREY, (0, (1, 1)), "")} if len(nothing) else marks, words
                ),
            )
        if modules:
            rows[-1][0].set_ylabel("modules,\nall layers", fontsize=8)
    return ax


def _head_names(rows: pd.DataFrame) -> list[str]:
    places = zip(to_numbers(rows["layer"]), to_numbers(rows["head"]), strict=True)
    return [f"{layer:.0f}.{head:.0f}" for layer, head in places]


def _heads_by_effect(rows: pd.DataFrame) -> list[str]:
    """Return layer and head of each row of dots, the one with the largest effect of the defense first."""
    size = rows[[*CONTRAST_LABELS]].abs().max(axis=1).where(rows["source"].isin(OTHER_RUN_SOURCES), -1)
    order = np.argsort(-size.to_numpy(float), kind="stable")
    return list(dict.fromkeys(_head_names(rows.iloc[order])))


KNOCKOUT_READERS = {"answer": "answer position", "everything": "every later token"}
_KNOCKOUT_DOT_HEIGHT, _KNOCKOUT_ROW_GAP, _KNOCKOUT_MAX_HEIGHT = (
    0.065,
    0.1,
    12.0,
)  # inches: a dot's row, between two ranges, all of them


def draw_attention_knockouts(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw what is left of each defense, a row per range of layers; filled where only the answer is cut off.

    >>> row = {"attack": "direct", "defense": "a", "reader": "answer", "first": -1, "last": -1}
    >>> rows = pd.DataFrame([row, row | {"first": 0, "last": 3}]).assign(shift=1.0, discrimination=0.5)
    >>> [label.get_text() for label in draw_attention_knockouts(rows).child_axes[0].get_yticklabels()]
    ['nothing cut', 'layers 0–3']

    Args:
        points: `cuts.csv`, of one attack.
        ax: where to draw; it only lends its place to the panels.
    """
    of = assign_curve_styles(check_one_attack(points)["defense"])
    spans = list(dict.fromkeys(zip(points["first"].astype(int), points["last"].astype(int), strict=True)))
    readers = [name for name in KNOCKOUT_READERS if (points["reader"] == name).any()]
    count = len(of) * len(readers)
    tall = min(
        max(_KNOCKOUT_DOT_HEIGHT * count + _KNOCKOUT_ROW_GAP, 0.22),
        max(_KNOCKOUT_MAX_HEIGHT / len(spans), 0.16),
    )
    with rc_context(RC_PARAMS):
        ax, (row,) = stack_panels(ax, [max(tall * len(spans), 0.7)], [])
        set_panel_titles(row, CONTRAST_LABELS.values())
        for column, (name, panel) in enumerate(zip(CONTRAST_LABELS, row, strict=True)):
            for place in range(1, len(spans)):
                panel.axhline(0.5 - place, color="#E0E0E0", linewidth=0.6, zorder=0.5)
            for number, (defense, look) in enumerate(of.items()):
                for side, reader in enumerate(readers):
                    here = points[(points["defense"] == defense) & (points["reader"] == reader)]
                    rank = (
                        (number * len(readers) + side - (count - 1) / 2)
                        / count
                        * (1 - _KNOCKOUT_ROW_GAP / tall / 2)
                    )
                    at = [
                        -spans.index((int(first), int(last))) - rank
                        for first, last in zip(here["first"], here["last"], strict=True)
                    ]
                    draw_dots(panel, here, name, at, look, f"{defense} {reader}", reader == "everything")
            set_row_axis(
                panel, [_layer_range_label(*span) for span in spans], "nats left", with_names=column == 0
            )
        key = [
            Line2D(
                [],
                [],
                color=color,
                marker=mark,
                linestyle="",
                markersize=4.5,
                label=fit_text(name, 140, TEXT_SIZE),
            )
            for name, (color, _, mark) in of.items()
        ]
        for reader in readers:
            fill = "white" if reader == "everything" else DARK
            label = f"cut from: {KNOCKOUT_READERS[reader]}"
            key.append(
                Line2D([], [], color=DARK, marker="o", mfc=fill, linestyle="", markersize=4.5, label=label)
            )
        place_legend_beside(ax, key)
    return ax


def _layer_range_label(first_layer: int, last_layer: int) -> str:
    if first_layer < 0:
        return "nothing cut"
    return (
        f"layer {first_layer}"
        if first_layer == last_layer
        else f"layers {first_layer}\N{EN DASH}{last_layer}"
    )


def caption_patches(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `transplants.patches` draws from these points."""
    said = {
        "undefended": "Into the undefended: activations at the answer position are those of the defended "
        "run; drawn is the change from undefended. ",
        "defended": "Into the defended: those of the undefended run; drawn is what is lost. ",
    }
    against = {
        "placebo": "Random: a random direction of the same norm. ",
        "neutral_prompt": "Neutral prompt: activations under a control prompt of the same length. ",
    }
    words = "".join(text for into, text in said.items() if (points["into"] == into).any())
    words += "".join(text for source, text in against.items() if (points["source"] == source).any())
    single = points[points["kind"] == "head"]
    shown = "Heads (layer.head): those with the largest effects. " * bool(len(single))
    return (
        f"Activation patching {format_query_counts(points, counts)}. {words}{CONTRASTS_SENTENCE}{shown}"
        f"{format_interval_note(points, 'Bands and bars')}{format_run_sentences(points, context)}"
    )


def caption_attention_knockouts(
    points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None
) -> str:
    """Return the caption of the figure that `cuts.cuts` draws from these points."""
    return (
        f"What is left of the effect {format_query_counts(points, counts)} when attention to the defense's own tokens is "
        "cut in a range of layers (both ends included): filled, from the answer position only; hollow, from "
        f"every later token. {CONTRASTS_SENTENCE}{format_interval_note(points, 'Bars')}{format_grey_note(points)}{format_run_sentences(points, context)}"
    )


def caption_weight_patches(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `transplants.weights` draws from these points."""
    kinds = "Dots: in one kind of module, in all layers. " * bool((points["how"] == "module").any())
    return (
        f"The effect {format_query_counts(points, counts)} with the tuned weights' change switched on in some places and "
        "off in all others, the defended prompt always there (dotted: that prompt alone). "
        f"Curves: in one layer alone, or in it and all below. {kinds}{CONTRASTS_SENTENCE}"
        f"{format_interval_note(points, 'Bands and bars')}{format_run_sentences(points, context)}"
    )
