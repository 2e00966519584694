"""Margin densities and ROC curves of a run, and the loss curve of a training run.

Each function draws a table of `plots/data.py` for one attack; that table is the CSV beside the PNG.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.plots.captions import CaptionContext, format_count_range
from analysis.plots.data import check_one_attack
from analysis.plots.layout import fit_text, make_axes, place_legend_below, place_legend_beside
from analysis.plots.style import (
    BLACK,
    BLUE,
    CLASS_STYLES,
    DARK,
    GREY,
    LINE_STYLES,
    RC_PARAMS,
    TEXT_SIZE,
    VERMILION,
)
from analysis.stats.tables import INTERVAL_SUFFIXES

_MAX_ROC_LEGEND_ROWS = 24  # curves up to which the legend is no taller than the axes
_LOG_MARGIN_TICKS = [sign * tick for sign in (-1, 1) for tick in (10, 20, 50, 100, 200, 500)]


def draw_margins(curves: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw margin densities, a row per defense: harmful above the line, benign below, undefended in grey.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> from analysis.plots.data import build_margin_curves
    >>> curves = build_margin_curves(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=0.5)
    >>> draw_margins(curves).get_xlabel()
    'margin (nats; right of the line = refuses)'

    Args:
        curves: table from `build_margin_curves`, of one attack.
        ax: axes to draw on; by default new ones with room for every row.
    """
    names = sorted(check_one_attack(curves)["defense"].unique(), key=lambda name: name != "none")
    is_older = "refused" in curves  # a table of a run whose only rates are those of the readout
    share_column, share_title = (
        ("refused", "share refused") if is_older else ("readout_refused", "refused by readout")
    )
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.0, max(len(names), 2) * (0.6 if len(names) <= 10 else 0.44))
        scale = 0.44 / curves["density"].max()  # the highest curve stays just clear of the next row
        aside: Any = {"transform": ax.get_yaxis_transform(), "fontsize": TEXT_SIZE, "va": "center"}
        for row, name in enumerate(names):
            ax.axhline(-row, color=GREY, linewidth=0.5, zorder=1)
            for harmful, class_name, color, side in CLASS_STYLES:
                of_class = curves[curves["harmful"] == harmful]
                curve, undefended = (of_class[of_class["defense"] == defense] for defense in (name, "none"))
                line = _draw_outline(ax, curve, -row, side * scale, f"{name} {class_name}", color, 1.1)
                ax.fill_between(curve["margin"], -row, line, color=color, alpha=0.5, linewidth=0, zorder=2)
                if name != "none":
                    _draw_outline(ax, undefended, -row, side * scale, "undefended", DARK, 0.8)
                share = _format_first_estimate(curve, share_column, "\u00a0%", 100, 0)
                ax.text(1.03, -row + 0.22 * side, share, color=color, **aside)
        above: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": TEXT_SIZE}
        ax.annotate(share_title, (1.03, 1), (0, 8), annotation_clip=False, **above)
        threshold_style: Any = {"color": BLACK, "linewidth": 1.0, "linestyle": (0, (4, 2))}
        ax.axvline(curves["threshold"].iloc[0], zorder=5, gid="threshold", **threshold_style)
        _stretch_margin_axis(ax, _find_linear_range(curves))
        ax.set_ylim(0.4 - len(names), 0.6)
        controls = set(curves.loc[curves["family"] == "control", "defense"])
        labels = [fit_text(_defense_label(name, name in controls), 110, 8) for name in names]
        ax.set_yticks(range(0, -len(names), -1), labels)
        for name, label in zip(names, ax.get_yticklabels(), strict=True):
            label.set_color(DARK if name in controls else BLACK)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("margin (nats; right of the line = refuses)")
        key: list[Any] = [Patch(color=VERMILION, alpha=0.5, label="harmful (above)")]
        key += [Patch(color=BLUE, alpha=0.5, label="benign (below)")]
        key += [Line2D([], [], color=DARK, linewidth=0.8, label="undefended")] * (len(names) > 1)
        key += [Line2D([], [], label="threshold", **threshold_style)]
        ax.legend(handles=key, loc="lower right", bbox_to_anchor=(1.02, 1), ncols=4, columnspacing=1.2)
    return ax


def draw_roc(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the ROC curve of each defense with a mark at the run's threshold; the undefended model is black.

    Of more than six defenses, only the six whose AUROC differs most from the undefended model have a color.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> from analysis.plots.data import build_roc_points
    >>> summary = pd.DataFrame(columns=["attack", "defense"])
    >>> draw_roc(build_roc_points(scores, summary, threshold=0.5)).get_ylabel()
    'share of harmful queries refused'

    Args:
        points: table from `build_roc_points`, of one attack.
        ax: axes to draw on; by default new ones.
    """
    each = check_one_attack(points).drop_duplicates("defense").set_index("defense")
    change = each.loc[(each["family"] != "control") & (each.index != "none"), "delta_auroc"].abs()
    colored = set(change.sort_values(ascending=False, kind="stable").index[: len(LINE_STYLES)])
    styles = dict(zip([name for name in each.index if name in colored], LINE_STYLES, strict=False))
    styles = {"none": (BLACK, "-", "o"), **styles} if "none" in each.index else styles
    with rc_context(RC_PARAMS):
        is_long = len(each) > _MAX_ROC_LEGEND_ROWS
        ax = ax or (make_axes(4.9, 4.9) if is_long else make_axes(3.9, 3.9))
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", zorder=1, gid="chance")
        key = []
        for name in [*styles, *(name for name in each.index if name not in styles)]:
            is_control = each.loc[name, "family"] == "control"
            color, dash, marker = styles.get(name, (GREY, (0, (1, 1.2)) if is_control else "-", "."))
            line: Any = {"color": color, "linestyle": dash, "linewidth": 1.6 if name in styles else 0.9}
            mark: Any = {"color": color, "marker": marker, "markersize": 7.5, "mec": "white", "mew": 0.6}
            level = 2 + (name in styles) + (name == "none")
            curve = points[points["defense"] == name]
            ax.plot(curve["benign_refused"], curve["harmful_refused"], zorder=level, gid=name, **line)
            operating = curve.loc[curve["operating"], ["benign_refused", "harmful_refused"]]
            ax.plot(*operating.to_numpy().T, zorder=level + 3, gid=f"{name} mark", **mark)
            value = _format_first_estimate(curve, "auroc", "", 1, 2) or "no value"
            label = _defense_label(name, is_control)
            label = fit_text(label, 140, TEXT_SIZE, 1 if len(each) > 11 else 2)
            label = label.replace("\n", "\n" + " " * 30)  # below the name, not below its AUROC
            key.append(Line2D([], [], label=f"{value}  {label}", **line | mark))
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(-0.02, 1.02)
        ax.set_aspect("equal")
        ax.set_xlabel("share of benign queries refused")
        ax.set_ylabel("share of harmful queries refused")
        title = "AUROC [95\u00a0% interval]"
        if is_long:
            place_legend_below(ax, key, n_columns=2, gap=0.5, title=title)
        else:
            place_legend_beside(ax, key, title)
    return ax


def draw_loss(history: pd.DataFrame, title: str, ax: Axes | None = None) -> Axes:
    """Draw the loss of each training step and its running mean over a tenth of the steps.

    >>> draw_loss(pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}), "attack, smollm2").get_ylabel()
    'loss on the response (nats per token)'

    Args:
        history: columns `step` and `loss` (nats per token).
        title: recipe and model.
        ax: axes to draw on; by default new ones.
    """
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, 2.4)
        ax.plot(history["step"], history["loss"], color=GREY, linewidth=0.8, label="each step")
        mean = history["loss"].rolling(max(2, len(history) // 10), center=True, min_periods=1).mean()
        ax.plot(history["step"], mean, color=BLUE, linewidth=1.6, label="running mean")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("step")
        ax.set_ylabel("loss on the response (nats per token)")
        ax.set_title(title, loc="left", fontsize=9)
        ax.legend()
        return ax


def caption_margins(curves: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_margins`.

    >>> curves = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "n": [9, 8]})
    >>> curves = curves.assign(bandwidth=0.5)
    >>> caption_margins(curves, CaptionContext("smollm2", "twins", "test", 0.0, ("I",)))[:47]
    'First-token margins of 9 harmful queries (above'
    """
    harmful, benign = (
        format_count_range(curves.loc[curves["harmful"] == is_harmful, "n"]) for is_harmful in (True, False)
    )
    width = curves["bandwidth"].iloc[0]
    has_defenses = (curves["defense"] != "none").any()
    grey = "Grey: the undefended model on the same queries. " if has_defenses else ""
    linear_range = _find_linear_range(curves)
    scale = f" Logarithmic axis beyond ±{linear_range:.0f}\u00a0nats." if np.isfinite(linear_range) else ""
    return (
        f"First-token margins of {harmful} harmful queries (above each line) and {benign} benign queries "
        f"(below), a row per defense; ticks are medians. {grey}Dashed: the threshold; at the right, the "
        f"share of each class above it with its interval{_format_readout_note(context)}. Density: Gaussian "
        f"kernel of SD {width:.2f}\u00a0nats, one scale for all rows.{scale} "
        f"{context.format_sentences(curves['attack'].iloc[0])}"
    )


def caption_roc(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_roc`.

    >>> points = pd.DataFrame({"attack": ["direct"], "n_harmful": [9], "n_benign": [8]})
    >>> points = points.assign(defense="none", family="none")
    >>> caption_roc(points, CaptionContext("smollm2", "twins", "test", 0.0, ("I",)))[:40]
    'Share refused of 9 harmful queries again'
    """
    each = points.drop_duplicates("defense")
    n_controls = int((each["family"] == "control").sum())
    many = len(each) - n_controls > 7
    grey = "; solid grey: AUROC changed less than for the six defenses in color" if many else ""
    grey += "; dotted grey: controls, which are not defenses" if n_controls else ""
    return (
        f"Share refused of {format_count_range(points['n_harmful'])} harmful queries against share refused "
        f"of {format_count_range(points['n_benign'])} benign queries, for all thresholds on the first-token "
        f"margin{_format_readout_note(context)}; marks: the threshold of this run; dotted diagonal: chance. "
        f"Color, dash and marker: defense{grey}. {context.format_sentences(points['attack'].iloc[0])}"
    )


def _format_readout_note(context: CaptionContext) -> str:
    """Return the note that tells the rates of the readout from those of judged responses, if both exist."""
    return " (refusals by the readout, not by judged responses)" if context.response_basis else ""


def _find_linear_range(curves: pd.DataFrame) -> float:
    """Return the margin beyond which the axis is logarithmic, infinite unless a few of many rows are far out.

    >>> curves = pd.DataFrame({"defense": range(12), "margin": [-3.5] * 11 + [30.0]})
    >>> _find_linear_range(curves), _find_linear_range(curves[:11])
    (4.0, inf)
    """
    if "margin" not in curves or curves["defense"].nunique() <= 10:
        return np.inf
    reach = curves["margin"].abs().groupby(curves["defense"]).max()
    usual = float(np.ceil(reach.quantile(0.9)))
    return usual if reach.max() > 2.5 * usual > 0 else np.inf


def _stretch_margin_axis(ax: Axes, linear_range: float) -> None:
    """Make the axis logarithmic beyond that margin, so that far rows leave room for the others."""
    if not np.isfinite(linear_range):
        return
    low, high = ax.get_xlim()
    ax.set_xscale("symlog", linthresh=linear_range, linscale=1)
    ax.set_xlim(low, high)
    ticks = [*MaxNLocator(5).tick_values(-linear_range, linear_range), *_LOG_MARGIN_TICKS]
    inner = [tick for tick in ticks if low <= tick <= high and (abs(tick) <= linear_range or abs(tick) >= 10)]
    labels = [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in inner]
    ax.set_xticks(inner, labels)
    ax.set_xticks([], minor=True)


def _defense_label(name: str, is_control: bool) -> str:
    return "undefended" if name == "none" else f"{name} (control)" if is_control else name


def _format_first_estimate(rows: pd.DataFrame, column: str, unit: str, scale: int, digits: int) -> str:
    """Return the estimate of the first row with its interval as text, empty if it is missing."""
    for value, low, high in scale * rows[[f"{column}{end}" for end in INTERVAL_SUFFIXES]].to_numpy(float)[:1]:
        interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if low <= high else ""
        return f"{value:.{digits}f}{unit}{interval}" if value == value else ""
    return ""


def _draw_outline(
    ax: Axes, rows: pd.DataFrame, base: float, scale: float, gid: str, color: str, line_width: float
) -> Any:
    """Draw the density of one class as a line with a tick at its median; return the heights of the line."""
    heights = base + scale * rows["density"]
    ax.plot(
        rows["margin"], heights, color=color, linewidth=line_width, zorder=3 + (gid == "undefended"), gid=gid
    )
    for median in rows["median"].iloc[:1]:
        tick: Any = {"color": color, "linewidth": 2 * line_width - 0.4, "zorder": 4}
        ax.plot([median] * 2, [base, base + 0.44 * (1 if scale > 0 else -1)], gid=f"{gid} median", **tick)
    return heights
