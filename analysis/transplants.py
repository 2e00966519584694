"""What put into another run carries a defense's effect: activations that are patched, weights switched on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis.curves import one_attack
from analysis.lettering import beside
from analysis.palette import BLACK, BLUE, GREY, ORANGE, STYLE, VERMILION
from analysis.panels import CONTRASTS, curve, dots, headed, in_rows, key, numbers, over_layers, stacked

SOURCES: dict[str, tuple[tuple[str, Any, str], str]] = {
    "defense": ((BLUE, "-", "o"), "from the defended run"),
    "undefended": ((VERMILION, (0, (5, 1.5)), "v"), "from the undefended run"),
    "placebo": ((GREY, (0, (4, 1.5)), "s"), "random, same norm"),
    "neutral_prompt": ((ORANGE, (0, (6, 1.2, 1.2, 1.2)), "D"), "neutral prompt"),
}
WAYS: dict[str, tuple[tuple[str, Any, str], str]] = {
    "alone": ((BLUE, "-", "o"), "one layer alone"),
    "up to": ((VERMILION, (0, (5, 1.5)), "D"), "all layers up to it"),
}
_OTHER_RUN = ("defense", "undefended")
_KINDS = {"residual": "residual stream", "attention": "attention", "mlp": "MLP", "head": "heads"}
_TALL, _ROW = 0.95, 0.2  # inches: a panel of curves, a row of dots


def patch_points(patches: pd.DataFrame, top: int = 10) -> pd.DataFrame:
    """Return what is drawn of one defense's patches: of single heads, those with the largest effects.

    >>> row = {"into": "defended", "kind": "head", "source": "defense", "layer": 0, "discrimination": 0.0}
    >>> rows = pd.DataFrame([row | {"head": head, "shift": head / 4} for head in range(3)])
    >>> patch_points(rows, top=2)["head"].tolist()
    [1, 2]

    Args:
        patches: `patches.csv`.
        top: heads of each run that is patched.
    """
    single = patches["kind"] == "head"
    kept = []
    for _, rows in patches[single].groupby("into", sort=False):
        mine = rows[rows["source"].isin(_OTHER_RUN)]
        size = (mine if len(mine) else rows).set_index(["layer", "head"])[[*CONTRASTS]].abs().max(axis=1)
        wanted = size.groupby(level=[0, 1]).max().nlargest(top).index
        kept.append(rows[pd.MultiIndex.from_frame(rows[["layer", "head"]]).isin(wanted)])
    return pd.concat([patches[~single], *kept], ignore_index=True)


def patches(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    r"""Draw what each patch does: a row per kind of activation and run patched, curves over layers or heads.

    >>> row = {"attack": "direct", "defense": "a", "into": "defended", "source": "placebo", "kind": "mlp"}
    >>> ax = patches(pd.DataFrame([row | {"layer": 0, "head": None, "shift": 0.5, "discrimination": 0.0}]))
    >>> ax.child_axes[0].get_ylabel()
    'MLP\ninto defended'

    Args:
        points: what `patch_points` returned, of one attack and defense.
        ax: where to draw; it only lends its place to the panels.
    """
    pairs = one_attack(points)[["into", "kind"]].drop_duplicates().itertuples(index=False, name=None)
    blocks = sorted(
        pairs, key=lambda pair: (pair[1] == "head", pair[0] == "defended", [*_KINDS].index(pair[1]))
    )
    groups = [points[(points["into"] == into) & (points["kind"] == kind)] for into, kind in blocks]
    last = float(numbers(points["layer"]).max())
    sources = {name: look for name, look in SOURCES.items() if (points["source"] == name).any()}
    names = [_heads(rows) if kind == "head" else [] for (_, kind), rows in zip(blocks, groups, strict=True)]
    heights = [max(_ROW * len(heads), _TALL) if heads else _TALL for heads in names]
    curves = [place for place, heads in enumerate(names) if not heads]
    with rc_context(STYLE):
        gaps = [
            0.5 if place == max(curves, default=-1) or heads else 0.14 for place, heads in enumerate(names)
        ]
        ax, panels = stacked(ax, heights, gaps[:-1])
        headed(panels[0], CONTRASTS.values())
        for place, (rows, heads, row) in enumerate(zip(groups, names, panels, strict=True)):
            for name, panel in zip(CONTRASTS, row, strict=True):
                for number, (source, (look, _)) in enumerate(sources.items()):
                    of = rows[rows["source"] == source]
                    if heads:
                        at = [
                            -heads.index(head) - 0.22 * (number - (len(sources) - 1) / 2)
                            for head in _each(of)
                        ]
                        dots(panel, of, name, at, look, source)
                    elif len(of):
                        curve(panel, of, name, look, source)
                if heads:
                    in_rows(panel, heads, "nats", written=name == "shift")
                else:
                    over_layers(panel, last, "layer patched" if place == curves[-1] else "")
                    panel.tick_params(labelbottom=place == curves[-1])
            into, kind = blocks[place]
            row[0].set_ylabel(f"{_KINDS[kind]}\ninto {into}", fontsize=8)
        words = {name: said for name, (_, said) in sources.items()}
        beside(ax, key({name: look for name, (look, _) in sources.items()}, words))
    return ax


def weights(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the effect of the tuned weights in single layers, in all up to a layer, and in kinds of modules.

    >>> row = {"attack": "direct", "defense": "a", "layer": None, "shift": 0.5, "discrimination": 0.0}
    >>> ax = weights(pd.DataFrame([row | {"how": "module", "module": "q_proj"}]))
    >>> [label.get_text() for label in ax.child_axes[0].get_yticklabels()]
    ['q_proj']

    Args:
        points: `weights.csv`, of one attack and defense.
        ax: where to draw; it only lends its place to the panels.
    """
    nothing = one_attack(points)[points["how"] == "nothing"]
    kinds = points[points["how"] == "module"]
    modules = [str(name) for name in kinds["module"]]
    ways = {name: look for name, look in WAYS.items() if (points["how"] == name).any()}
    last = float(numbers(points["layer"]).max())
    with rc_context(STYLE):
        tall = [1.7] * bool(ways) + [max(_ROW * len(modules), 0.7)] * bool(modules)
        ax, rows = stacked(ax, tall, [0.55] * (len(tall) - 1))
        headed(rows[0], CONTRASTS.values())
        for place, name in enumerate(CONTRASTS):
            for way, (look, _) in ways.items():
                curve(rows[0][place], points[points["how"] == way], name, look, way)
            for value in nothing[name]:
                rows[0][place].axhline(value, color=GREY, linewidth=1.0, linestyle=(0, (1, 1)), gid="nothing")
            if ways:
                over_layers(rows[0][place], last, "layer")
            if modules:
                at = [-float(row) for row in range(len(kinds))]
                dots(rows[-1][place], kinds, name, at, (BLACK, "-", "o"), "module")
                in_rows(rows[-1][place], modules, "nats", written=place == 0)
        if ways:
            words = {name: said for name, (_, said) in ways.items()} | {"nothing": "prompt alone"}
            marks = {name: look for name, (look, _) in ways.items()}
            beside(ax, key(marks | {"nothing": (GREY, (0, (1, 1)), "")} if len(nothing) else marks, words))
        if modules:
            rows[-1][0].set_ylabel("modules,\nall layers", fontsize=8)
    return ax


def _each(rows: pd.DataFrame) -> list[str]:
    places = zip(numbers(rows["layer"]), numbers(rows["head"]), strict=True)
    return [f"{layer:.0f}.{head:.0f}" for layer, head in places]


def _heads(rows: pd.DataFrame) -> list[str]:
    """Return layer and head of each row of dots, the one with the largest effect of the defense first."""
    size = rows[[*CONTRASTS]].abs().max(axis=1).where(rows["source"].isin(_OTHER_RUN), -1)
    order = np.argsort(-size.to_numpy(float), kind="stable")
    return list(dict.fromkeys(_each(rows.iloc[order])))
