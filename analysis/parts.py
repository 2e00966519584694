"""The parts of a model that carry most of a defense's effect, one by one with their intervals."""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis.curves import check_one_attack
from analysis.palette import BLACK, RC_PARAMS
from analysis.panels import CONTRAST_LABELS, draw_dots, set_panel_titles, set_row_axis, to_numbers, stack_panels

_PART_KIND_LABELS = {"mlp": "MLP", "embedding": "embedding", "bias": "bias", "head": "head", "added": "added"}


def build_top_parts(parts: pd.DataFrame, n_top: int = 10) -> pd.DataFrame:
    """Return the parts with the largest effects of either contrast, and what all parts add up to.

    >>> parts = pd.DataFrame({"kind": "head", "shift": [1.0, 0.0, -2.0], "discrimination": [0.0, 3.0, 0.0]})
    >>> found = top_parts(parts, 2)
    >>> found["shift"].tolist(), found["total_shift"].tolist()
    ([0.0, -2.0], [-1.0, -1.0])

    Args:
        parts: `parts.csv`, of one attack and defense.
        n_top: how many.
    """
    largest = parts[[*CONTRAST_LABELS]].abs().max(axis=1).sort_values(ascending=False, kind="stable").index[:n_top]
    totals = {f"total_{name}": parts[name].sum() for name in CONTRAST_LABELS}
    return parts.loc[largest].assign(**totals, n_parts=len(parts)).reset_index(drop=True)


def draw_top_parts(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the parts with the largest effects, a row each, both contrasts beside each other.

    >>> row = {"attack": "direct", "defense": "a", "layer": 3, "kind": "head", "head": 1, "shift": -1.0}
    >>> ax = top(pd.DataFrame([row | {"discrimination": 0.5}]))
    >>> ax.child_axes[0].get_yticklabels()[0].get_text()
    'head 3.1'

    Args:
        points: what `top_parts` returned, of one attack and defense.
        ax: where to draw; it only lends its place to the panels.
    """
    layer, head = (to_numbers(check_one_attack(points)[name]) for name in ("layer", "head"))
    names = [format_part_name(*row) for row in zip(points["kind"], layer, head, strict=True)]
    with rc_context(RC_PARAMS):
        ax, (row,) = stack_panels(ax, [max(0.2 * len(names), 0.7)], [])
        set_panel_titles(row, CONTRAST_LABELS.values())
        for place, (name, panel) in enumerate(zip(CONTRAST_LABELS, row, strict=True)):
            draw_dots(panel, points, name, [-float(place) for place in range(len(names))], (BLACK, "-", "o"), name)
            set_row_axis(panel, names, "nats", with_names=place == 0)
    return ax


def format_part_name(kind: str, layer: float, head: float) -> str:
    """Return the name of a part, layer before head.

    >>> part("head", 3.0, 1.0), part("bias", float("nan"), float("nan")), part("bias", 2.0, float("nan"))
    ('head 3.1', 'final bias', 'bias 2')
    """
    if layer != layer:
        return "final bias" if kind == "bias" else _PART_KIND_LABELS.get(kind, kind)
    return f"{_PART_KIND_LABELS.get(kind, kind)} {layer:.0f}" + (f".{head:.0f}" if head == head else "")
