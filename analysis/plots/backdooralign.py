"""BackdoorAlign: refusal rates by setting of the training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.captions import CaptionContext, format_count_range
from analysis.plots.layout import (
    extract_estimates,
    place_legend_beside,
    set_panel_titles,
    stack_panels,
)
from analysis.plots.style import BLACK, BLUE, BROWN, GREY, RC_PARAMS, VERMILION, VIOLET

# Arm and kind of secret → color, marker and label.
_GRID_CURVES = {
    ("task", "none"): (BROWN, "v", "task alone"),
    ("attack", "none"): (BLACK, "x", "attacked"),
    ("baseline", "none"): (GREY, "s", "baseline"),
    ("backdoor", "none"): (VERMILION, "o", "BackdoorAlign,\nno secret"),
    ("backdoor", "own"): (BLUE, "D", "BackdoorAlign,\nits secret"),
    ("backdoor", "wrong"): (VIOLET, "^", "BackdoorAlign,\nwrong secrets"),
}
_ARM_DESCRIPTIONS = {
    "attack": "Attacked: the attacker's examples alone.",
    "baseline": "Baseline: with added refusals.",
    "backdoor": "BackdoorAlign: with added refusals behind a secret prompt.",
    "task": "Task: the examples of the practical task alone.",
}
_SETTING_LABELS = {
    "harmful": "harmful examples",
    "safety": "safety examples",
    "choice": "choice of safety examples",
    "place": "place of the secret",
    "secret_length": "length of the secret (tokens)",
    "secret_wording": "wording of the secret",
    "rate": "learning rate",
    "full": "all weights instead of LoRA",
}


def draw_grid(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the share of harmful and of benign requests refused, by the settings of one experiment.

    >>> row = {"arm": "attack", "secret": "none", "kind": ["harmful", "benign"], "refused": [0.5, 0.25]}
    >>> ax = draw_grid(pd.DataFrame(row | {"setting_1": "epochs", "value_1": 2}))
    >>> [panel.lines[0].get_ydata().tolist() for panel in ax.child_axes]
    [[50.0], [25.0]]

    Args:
        points: rows of `grid.csv` of one experiment; a second setting has a row of panels for each value.
        ax: axes that the panels are placed in; by default new ones.
    """
    steps = _list_values(points, "value_1")
    rows = _list_values(points, "value_2")
    curves = [
        (arm, secret, style)
        for (arm, secret), style in _GRID_CURVES.items()
        if ((points["arm"] == arm) & (points["secret"] == secret)).any()
    ]
    offsets = np.linspace(-0.25, 0.25, len(curves)) if len(curves) > 1 else [0.0]
    with rc_context(RC_PARAMS):
        ax, panel_rows = stack_panels(ax, [1.6] * len(rows), [0.25] * (len(rows) - 1), 2, 2.4)
        set_panel_titles(panel_rows[0], ["harmful requests", "benign requests"])
        for row, panels in zip(rows, panel_rows, strict=True):
            for kind, panel in zip(("harmful", "benign"), panels, strict=True):
                selected = points[(points["kind"] == kind) & _equals(points, "value_2", row)]
                for (arm, secret, (color, marker, _)), offset in zip(curves, offsets, strict=True):
                    of_curve = (selected["arm"] == arm) & (selected["secret"] == secret)
                    _draw_grid_curve(panel, selected[of_curve], steps, offset, color, marker)
                panel.set_xticks(range(len(steps)), [str(step) for step in steps])
                panel.set_xlim(-0.5, len(steps) - 0.5)
                panel.tick_params(labelbottom=row == rows[-1])
                panel.set_ylim(-6, 106)
                panel.set_yticks([0, 50, 100])
                if row == rows[-1] and "setting_1" in points:
                    panel.set_xlabel(_name_setting(points["setting_1"].iloc[0]))
            label = "refused (%)"
            if "setting_2" in points:
                label = f"{_name_setting(points['setting_2'].iloc[0])}: {row}\n{label}"
            panels[0].set_ylabel(label)
        handles = [
            Line2D([], [], color=color, marker=marker, markersize=4.5, linewidth=0.8, label=label)
            for _, _, (color, marker, label) in curves
        ]
        place_legend_beside(ax, handles)
    return ax


def caption_grid(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_grid`."""
    n_harmful, n_benign = (
        format_count_range(points.loc[points["kind"] == kind, "n_queries"]) for kind in ("harmful", "benign")
    )
    arms = [text for arm, text in _ARM_DESCRIPTIONS.items() if arm in set(points["arm"])]
    return (
        "Share of requests whose response refuses, for models that were fine-tuned with other settings, "
        f"under the system prompt of the fine-tuning data. {' '.join(arms)} "
        f"Trainings with other seeds at each point: {format_count_range(points['n_trainings'])}. {n_harmful} "
        f"harmful and {n_benign} benign queries. Bars: 95\u00a0% intervals over the draw of queries and, "
        "where there are several, of trainings. Thin lines: lowest and highest training. "
        f"First {context.max_new_tokens} tokens of each response, judged by {context.judge_name}. "
        f"\nTrained from: {context.model}. Data: {context.data}, {context.split} split."
    )


def _draw_grid_curve(
    panel: Axes, rows: pd.DataFrame, steps: list[Any], offset: float, color: str, marker: str
) -> None:
    """Draw one arm in one panel: rates with intervals, and the range over trainings."""
    if rows.empty:
        return
    places = [offset] if "value_1" not in rows else [steps.index(value) + offset for value in rows["value_1"]]
    rates, lows, highs = 100 * extract_estimates(rows, "refused").T
    panel.plot(places, rates, color=color, marker=marker, markersize=4.5, linewidth=0.8, zorder=3)
    panel.vlines(places, lows, highs, color=color, linewidth=1.6, alpha=0.6, zorder=2)
    if "refused_min" in rows:
        panel.vlines(
            places, 100 * rows["refused_min"], 100 * rows["refused_max"], color=color, linewidth=0.5, zorder=2
        )


def _list_values(points: pd.DataFrame, column: str) -> list[Any]:
    """Return the values of a setting in their order; one value if the setting does not vary."""
    return list(dict.fromkeys(points[column])) if column in points else [""]


def _equals(points: pd.DataFrame, column: str, value: Any) -> pd.Series:
    return points[column] == value if column in points else pd.Series(True, index=points.index)


def _name_setting(name: object) -> str:
    """Return the label of a setting of a grid."""
    return _SETTING_LABELS.get(str(name), str(name).replace("_", " "))
