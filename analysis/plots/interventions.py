"""Effects of interventions: activation patching, weight patching and attention knockout."""

from __future__ import annotations

from typing import Any

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
from analysis.stats.tables import INTERVAL_SUFFIXES

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
_PATCHED_HEAD_HEIGHT = 0.26  # inches of a patched head, with a dot per source
_PATCH_SCALES = (("residual",), ("attention", "mlp"), ("head",))  # kinds of activations on one scale
KNOCKOUT_TOKENS = {"defense": "defense's tokens", "image": "tokens of images"}
KNOCKOUT_READERS = {"answer": "answer position", "everything": "every later token"}
# Inches: row of a dot, gap between two ranges, all ranges together.
_KNOCKOUT_DOT_HEIGHT, _KNOCKOUT_ROW_GAP, _KNOCKOUT_MAX_HEIGHT = 0.065, 0.1, 12.0
_KNOCKOUT_PANEL_GAP = 0.5  # inches, between the groups of tokens


def draw_patches(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    r"""Draw the effect of each patch: a row per kind of activation and patched run, over layers or heads.

    >>> row = {"attack": "direct", "defense": "a", "into": "defended", "source": "placebo", "kind": "mlp"}
    >>> row |= {"layer": 0, "head": None, "shift": 0.5, "discrimination": 0.0}
    >>> ax = draw_patches(pd.DataFrame([row]))
    >>> ax.child_axes[0].get_ylabel()
    'MLP\ninto defended'

    Args:
        points: table from `build_patch_points`, of one attack and one defense.
        ax: axes that the panels are placed in; by default new ones.
    """
    pairs = check_one_attack(points)[["into", "kind"]].drop_duplicates().itertuples(index=False, name=None)
    kinds = [*_ACTIVATION_KINDS]
    blocks = sorted(pairs, key=lambda pair: (pair[1] == "head", pair[0] == "defended", kinds.index(pair[1])))
    tables = [points[(points["into"] == into) & (points["kind"] == kind)] for into, kind in blocks]
    last_layer = float(to_numbers(points["layer"]).max())
    styles = {name: style for name, style in PATCH_SOURCE_STYLES.items() if (points["source"] == name).any()}
    heads_by_block = [
        _heads_by_effect(rows) if kind == "head" else []
        for (_, kind), rows in zip(blocks, tables, strict=True)
    ]
    heights = [max(_PATCHED_HEAD_HEIGHT * len(heads), _PATCH_PANEL_HEIGHT) for heads in heads_by_block]
    limits = {
        kind: _find_patch_limits(points[points["kind"].isin(kinds_alike)])
        for kinds_alike in _PATCH_SCALES
        for kind in kinds_alike
    }
    # Only the last block of curves has layer numbers below it.
    last_curves = max((place for place, heads in enumerate(heads_by_block) if not heads), default=-1)
    gaps = [0.5 if place == last_curves or heads else 0.14 for place, heads in enumerate(heads_by_block)]
    with rc_context(RC_PARAMS):
        ax, panel_rows = stack_panels(ax, heights, gaps[:-1])
        set_panel_titles(panel_rows[0], CONTRAST_LABELS.values())
        for place, (rows, heads, panels) in enumerate(zip(tables, heads_by_block, panel_rows, strict=True)):
            for contrast, panel in zip(CONTRAST_LABELS, panels, strict=True):
                if heads:
                    for row in range(0, len(heads), 2):
                        panel.axhspan(-row - 0.5, -row + 0.5, color=GREY, alpha=0.12, linewidth=0, zorder=0)
                    _draw_head_patches(panel, rows, contrast, heads, styles)
                    set_row_axis(panel, heads, "nats", with_names=panel is panels[0])
                    panel.set_xlim(limits["head"])
                    continue
                for source, (style, _) in styles.items():
                    if (rows["source"] == source).any():
                        draw_curve(panel, rows[rows["source"] == source], contrast, style, source)
                set_layer_axis(panel, last_layer, "layer patched" if place == last_curves else "")
                panel.tick_params(labelbottom=place == last_curves)
                panel.set_ylim(limits[blocks[place][1]])
            into, kind = blocks[place]
            panels[0].set_ylabel(f"{_ACTIVATION_KINDS[kind]}\ninto {into}", fontsize=8)
        labels = {source: label for source, (_, label) in styles.items()}
        lines = {source: style for source, (style, _) in styles.items()}
        place_legend_beside(ax, make_line_legend(lines, labels))
    return ax


def draw_weight_patches(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the effect of the weight change in single layers, in all up to a layer, and in kinds of modules.

    >>> row = {"attack": "direct", "defense": "a", "layer": None, "shift": 0.5, "discrimination": 0.0}
    >>> ax = draw_weight_patches(pd.DataFrame([row | {"how": "module", "module": "q_proj"}]))
    >>> [label.get_text() for label in ax.child_axes[0].get_yticklabels()]
    ['q_proj']

    Args:
        points: `weights.csv`, of one attack and one defense.
        ax: axes that the panels are placed in; by default new ones.
    """
    prompt_alone = check_one_attack(points)[points["how"] == "nothing"]
    module_rows = points[points["how"] == "module"]
    modules = [str(name) for name in module_rows["module"]]
    styles = {name: style for name, style in WEIGHT_PATCH_STYLES.items() if (points["how"] == name).any()}
    last_layer = float(to_numbers(points["layer"]).max())
    with rc_context(RC_PARAMS):
        heights = [1.7] * bool(styles) + [max(_DOT_ROW_HEIGHT * len(modules), 0.7)] * bool(modules)
        ax, panel_rows = stack_panels(ax, heights, [0.55] * (len(heights) - 1))
        set_panel_titles(panel_rows[0], CONTRAST_LABELS.values())
        for place, contrast in enumerate(CONTRAST_LABELS):
            top, bottom = panel_rows[0][place], panel_rows[-1][place]
            for how, (style, _) in styles.items():
                draw_curve(top, points[points["how"] == how], contrast, style, how)
            for value in prompt_alone[contrast]:
                top.axhline(value, color=GREY, linewidth=1.0, linestyle=(0, (1, 1)), gid="nothing")
            if styles:
                set_layer_axis(top, last_layer, "layer")
            if modules:
                rows = [-float(row) for row in range(len(modules))]
                draw_dots(bottom, module_rows, contrast, rows, (BLACK, "-", "o"), "module")
                set_row_axis(bottom, modules, "nats", with_names=place == 0)
        if styles:
            labels = {how: label for how, (_, label) in styles.items()} | {"nothing": "prompt alone"}
            lines = {how: style for how, (style, _) in styles.items()}
            lines |= {"nothing": (GREY, (0, (1, 1)), "")} if len(prompt_alone) else {}
            place_legend_beside(ax, make_line_legend(lines, labels))
        if modules:
            panel_rows[-1][0].set_ylabel("modules,\nall layers", fontsize=8)
    return ax


def draw_attention_knockouts(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the effect of each defense under attention knockout: panels per group of tokens, a row per layers.

    Filled: knocked out at the answer position only; hollow: at every later token.

    >>> row = {"attack": "direct", "defense": "a", "reader": "answer", "first": -1, "last": -1}
    >>> rows = pd.DataFrame([row, row | {"first": 0, "last": 3}]).assign(shift=1.0, discrimination=0.5)
    >>> [label.get_text() for label in draw_attention_knockouts(rows).child_axes[0].get_yticklabels()]
    ['no knockout', 'layers 0–3']

    Args:
        points: `cuts.csv`, of one attack; without `tokens`, all are those of the defense.
        ax: axes that the panels are placed in; by default new ones.
    """
    styles = assign_curve_styles(check_one_attack(points)["defense"])
    ranges = list(dict.fromkeys(zip(points["first"].astype(int), points["last"].astype(int), strict=True)))
    readers = [name for name in KNOCKOUT_READERS if (points["reader"] == name).any()]
    groups = {
        tokens: rows for tokens in KNOCKOUT_TOKENS if len(rows := _select_knockouts(points, tokens)) > 0
    }
    n_dots = len(styles) * len(readers)
    row_height = min(
        max(_KNOCKOUT_DOT_HEIGHT * n_dots + _KNOCKOUT_ROW_GAP, 0.22),
        max(_KNOCKOUT_MAX_HEIGHT / len(ranges), 0.16),
    )
    used_share = 1 - _KNOCKOUT_ROW_GAP / row_height / 2
    with rc_context(RC_PARAMS):
        heights = [max(row_height * len(ranges), 0.7)] * len(groups)
        ax, panel_rows = stack_panels(ax, heights, [_KNOCKOUT_PANEL_GAP] * (len(groups) - 1))
        set_panel_titles(panel_rows[0], CONTRAST_LABELS.values())
        labels = [_layer_range_label(*layers) for layers in ranges]
        for (tokens, rows), panels in zip(groups.items(), panel_rows, strict=True):
            for contrast, panel in zip(CONTRAST_LABELS, panels, strict=True):
                for place in range(1, len(ranges)):
                    panel.axhline(0.5 - place, color="#E0E0E0", linewidth=0.6, zorder=0.5)
                for number, (defense, style) in enumerate(styles.items()):
                    for side, reader in enumerate(readers):
                        of_reader = rows[(rows["defense"] == defense) & (rows["reader"] == reader)]
                        lowered = (number * len(readers) + side - (n_dots - 1) / 2) / n_dots * used_share
                        dot_heights = [
                            -ranges.index((int(first), int(last))) - lowered
                            for first, last in zip(of_reader["first"], of_reader["last"], strict=True)
                        ]
                        is_hollow = reader == "everything"
                        name = f"{defense} {reader}"
                        draw_dots(panel, of_reader, contrast, dot_heights, style, name, is_hollow)
                set_row_axis(panel, labels, "nats", with_names=panel is panels[0])
            if len(groups) > 1:
                panels[0].set_ylabel(f"knocked out:\n{KNOCKOUT_TOKENS[tokens]}", fontsize=8)
        dot: Any = {"linestyle": "", "markersize": 4.5}
        key = [
            Line2D([], [], color=color, marker=marker, label=fit_text(name, 140, TEXT_SIZE), **dot)
            for name, (color, _, marker) in styles.items()
        ]
        for reader in readers:
            fill = "white" if reader == "everything" else DARK
            label = f"knocked out at: {KNOCKOUT_READERS[reader]}"
            key.append(Line2D([], [], color=DARK, marker="o", mfc=fill, label=label, **dot))
        place_legend_beside(ax, key)
    return ax


def caption_patches(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_patches`."""
    run_sentences = {
        "undefended": "Into undefended: activations at the answer position are replaced by those of the "
        "defended run; the effect is the change from the undefended model. ",
        "defended": "Into defended: activations are replaced by those of the undefended run; the effect is "
        "the part that is lost. ",
    }
    control_sentences = {
        "placebo": "Random: a random direction of the same norm. ",
        "neutral_prompt": "Neutral prompt: activations under a control prompt of the same length. ",
    }
    details = "".join(text for run, text in run_sentences.items() if (points["into"] == run).any())
    details += "".join(text for name, text in control_sentences.items() if (points["source"] == name).any())
    heads = "Heads (layer.head): those with the largest effects. " if (points["kind"] == "head").any() else ""
    return (
        f"Activation patching {format_query_counts(points, context.query_counts)}. {details}"
        f"{CONTRASTS_SENTENCE}{heads}One scale for the residual stream, one for attention and MLPs, one for "
        f"heads. {format_interval_note(points, 'Bands and bars')}{format_run_sentences(points, context)}"
    )


def caption_attention_knockouts(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_attention_knockouts`."""
    groups = {"defense": "the defense's own tokens", "image": "the tokens of images, in both runs,"}
    shown = [text for tokens, text in groups.items() if len(_select_knockouts(points, tokens))]
    return (
        f"Effect that remains {format_query_counts(points, context.query_counts)} when attention to "
        f"{', or to '.join(shown)} is knocked out in a range of layers (both ends included): filled, at "
        f"the answer position only; hollow, at every later token. {CONTRASTS_SENTENCE}"
        f"{format_interval_note(points, 'Bars')}{format_grey_note(points)}"
        f"{format_run_sentences(points, context)}"
    )


def caption_weight_patches(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_weight_patches`."""
    modules = "Dots: in one kind of module, in all layers. " if (points["how"] == "module").any() else ""
    return (
        f"Effect {format_query_counts(points, context.query_counts)} when the weight change of the "
        "fine-tuning is applied in some places only, always with the defended prompt (dotted: that prompt "
        f"alone). Curves: in one layer alone, or in it and all layers before it. {modules}"
        f"{CONTRASTS_SENTENCE}{format_interval_note(points, 'Bands and bars')}"
        f"{format_run_sentences(points, context)}"
    )


def _find_patch_limits(points: pd.DataFrame) -> tuple[float, float]:
    """Return limits that contain the effects of all patches of some kinds, with their intervals, and 0."""
    columns = [f"{name}{end}" for name in CONTRAST_LABELS for end in INTERVAL_SUFFIXES]
    values = points.reindex(columns=columns).to_numpy(float)
    values = values[np.isfinite(values)]
    low, high = min(float(values.min(initial=0.0)), 0.0), max(float(values.max(initial=0.0)), 0.0)
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _draw_head_patches(
    ax: Axes,
    rows: pd.DataFrame,
    contrast: str,
    heads: list[str],
    styles: dict[str, tuple[tuple[str, Any, str], str]],
) -> None:
    """Draw a row of dots per head, one dot per source, each at its own height."""
    sources = [source for source in styles if (rows["source"] == source).any()]
    for number, source in enumerate(sources):
        of_source, (style, _) = rows[rows["source"] == source], styles[source]
        lowered = 0.22 * (number - (len(sources) - 1) / 2)
        heights = [-heads.index(head) - lowered for head in _head_names(of_source)]
        draw_dots(ax, of_source, contrast, heights, style, source)


def _head_names(rows: pd.DataFrame) -> list[str]:
    places = zip(to_numbers(rows["layer"]), to_numbers(rows["head"]), strict=True)
    return [f"{layer:.0f}.{head:.0f}" for layer, head in places]


def _heads_by_effect(rows: pd.DataFrame) -> list[str]:
    """Return the heads as layer.head, the one with the largest effect of the defense first."""
    size = rows[[*CONTRAST_LABELS]].abs().max(axis=1).where(rows["source"].isin(OTHER_RUN_SOURCES), -1)
    order = np.argsort(-size.to_numpy(float), kind="stable")
    return list(dict.fromkeys(_head_names(rows.iloc[order])))


def _select_knockouts(points: pd.DataFrame, tokens: str) -> pd.DataFrame:
    """Return the rows of a group of tokens; runs of earlier versions have those of the defense only."""
    if "tokens" not in points:
        return points if tokens == "defense" else points[:0]
    return points[points["tokens"] == tokens]


def _layer_range_label(first_layer: int, last_layer: int) -> str:
    if first_layer < 0:
        return "no knockout"
    return (
        f"layer {first_layer}"
        if first_layer == last_layer
        else f"layers {first_layer}\N{EN DASH}{last_layer}"
    )
