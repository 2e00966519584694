"""What put into another run carries a defense's effect: activations that are patched, weights switched on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis.curves import check_one_attack
from analysis.lettering import place_legend_beside
from analysis.palette import BLACK, BLUE, GREY, ORANGE, RC_PARAMS, VERMILION
from analysis.panels import CONTRAST_LABELS, draw_curve, draw_dots, set_panel_titles, set_row_axis, make_line_legend, to_numbers, set_layer_axis, stack_panels

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
OTHER_RUN_SOURCES = ("defense", "undefended")
_ACTIVATION_KINDS = {"residual": "residual stream", "attention": "attention", "mlp": "MLP", "head": "heads"}
_PATCH_PANEL_HEIGHT, _DOT_ROW_HEIGHT = 0.95, 0.2  # inches: a panel of curves, a row of dots


def build_patch_points(patches: pd.DataFrame, n_top: int = 10) -> pd.DataFrame:
    """Return what is drawn of one defense's patches: of single heads, those with the largest effects.

    >>> row = {"into": "defended", "kind": "head", "source": "defense", "layer": 0, "discrimination": 0.0}
    >>> rows = pd.DataFrame([row | {"head": head, "shift": head / 4} for head in range(3)])
    >>> patch_points(rows, top=2)["head"].tolist()
    [1, 2]

    Args:
        patches: `patches.csv`.
        n_top: heads of each run that is patched.
    """
    single = patches["kind"] == "head"
    kept = []
    for _, rows in patches[single].groupby("into", sort=False):
        mine = rows[rows["source"].isin(OTHER_RUN_SOURCES)]
        size = (mine if len(mine) else rows).set_index(["layer", "head"])[[*CONTRAST_LABELS]].abs().max(axis=1)
        wanted = size.groupby(level=[0, 1]).max().nlargest(n_top).index
        kept.append(rows[pd.MultiIndex.from_frame(rows[["layer", "head"]]).isin(wanted)])
    return pd.concat([patches[~single], *kept], ignore_index=True)


def draw_patches(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    r"""Draw what each patch does: a row per kind of activation and run patched, curves over layers or heads.

    >>> row = {"attack": "direct", "defense": "a", "into": "defended", "source": "placebo", "kind": "mlp"}
    >>> ax = patches(pd.DataFrame([row | {"layer": 0, "head": None, "shift": 0.5, "discrimination": 0.0}]))
    >>> ax.child_axes[0].get_ylabel()
    'MLP\ninto defended'

    Args:
        points: what `patch_points` returned, of one attack and defense.
        ax: where to draw; it only lends its place to the panels.
    """
    pairs = check_one_attack(points)[["into", "kind"]].drop_duplicates().itertuples(index=False, name=None)
    blocks = sorted(
        pairs, key=lambda pair: (pair[1] == "head", pair[0] == "defended", [*_ACTIVATION_KINDS].index(pair[1]))
    )
    groups = [points[(points["into"] == into) & (points["kind"] == kind)] for into, kind in blocks]
    last = float(to_numbers(points["layer"]).max())
    sources = {name: look for name, look in PATCH_SOURCE_STYLES.items() if (points["source"] == name).any()}
    names = [_heads_by_effect(rows) if kind == "head" else [] for (_, kind), rows in zip(blocks, groups, strict=True)]
    heights = [max(_DOT_ROW_HEIGHT * len(heads), _PATCH_PANEL_HEIGHT) if heads else _PATCH_PANEL_HEIGHT for heads in names]
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
    >>> ax = weights(pd.DataFrame([row | {"how": "module", "module": "q_proj"}]))
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
            place_legend_beside(ax, make_line_legend(marks | {"nothing": (GREY, (0, (1, 1)), "")} if len(nothing) else marks, words))
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
