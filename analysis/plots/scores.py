"""Margin densities and ROC curves of a run, and the loss curve of a training run.

Each function draws a table of `plots/data.py` for one attack; that table is the CSV beside the PNG.
"""

from __future__ import annotations

from dataclasses import replace
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
from analysis.plots.layout import (
    add_inset_axes,
    extract_estimates,
    fit_text,
    get_width_scale,
    make_axes,
    place_legend_beside,
    set_panel_titles,
    stack_panels,
)
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

_MAX_MARGIN_ROWS = 14  # rows of margins up to which they are in one column
_MARGIN_WIDTH = {False: 4.0, True: 2.5}  # inches; the second is that of one of two columns
_MARGIN_COLUMN_GAP = 2.6  # inches between two columns of margins: rates of the first, names of the second
_THRESHOLD_STYLE: Any = {"color": BLACK, "linewidth": 1.0, "linestyle": (0, (4, 2))}
_LOG_MARGIN_TICKS = [sign * tick for sign in (-1, 1) for tick in (10, 20, 50, 100, 200, 500)]


def draw_margins(curves: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw margin densities, a row per defense: harmful above the line, benign below, undefended in grey.

    Rows are sorted by the median margin, the undefended model first; many rows are in two columns of panels.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> from analysis.plots.data import build_margin_curves
    >>> curves = build_margin_curves(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=0.5)
    >>> draw_margins(curves).get_xlabel()
    'margin (nats; right of the line = refuses)'

    Args:
        curves: table from `build_margin_curves`, of one attack.
        ax: axes to draw on, or to place two columns of panels in; by default new ones with room for all rows.
    """
    names = _sort_by_margin(check_one_attack(curves))
    has_two_columns = len(names) > _MAX_MARGIN_ROWS
    n_rows = -(-len(names) // 2) if has_two_columns else max(len(names), 2)
    row_height = 0.6 if len(names) <= 10 else 0.44 if not has_two_columns else 0.34
    width, height = _MARGIN_WIDTH[has_two_columns], n_rows * row_height
    with rc_context(RC_PARAMS):
        if not has_two_columns:
            ax = ax or make_axes(width, height)
            _draw_margin_rows(ax, curves, names, n_rows)
        else:
            size = 2 * width + _MARGIN_COLUMN_GAP, height
            gap = _MARGIN_COLUMN_GAP / get_width_scale()  # its texts keep their size
            width = (size[0] - gap) / 2
            ax = ax or make_axes(*size)
            ax.set_axis_off()
            for place, shown in enumerate((names[:n_rows], names[n_rows:])):
                box = place * (width + gap), 0, width, height
                _draw_margin_rows(add_inset_axes(ax, size, box), curves, shown, n_rows)
        key: list[Any] = [Patch(color=VERMILION, alpha=0.5, label="harmful (above)")]
        key += [Patch(color=BLUE, alpha=0.5, label="benign (below)")]
        key += [Line2D([], [], color=DARK, linewidth=0.8, label="undefended")] * (len(names) > 1)
        key += [Line2D([], [], label="threshold", **_THRESHOLD_STYLE)]
        at: Any = {"loc": "lower right", "bbox_to_anchor": (1.02, 1)}
        if has_two_columns:  # above the header of the rates
            at = {"loc": "lower left", "bbox_to_anchor": (0.0, 1 + 0.25 / height), "borderaxespad": 0.0}
        ax.legend(handles=key, ncols=4, columnspacing=1.2, **at)
    return ax


def _sort_by_margin(curves: pd.DataFrame) -> list[str]:
    """Return the defenses by the mean of the median margins of both classes, the undefended model first."""
    medians = curves.groupby(["defense", "harmful"], sort=False)["median"].first()
    means = medians.groupby(level=0, sort=False).mean().sort_values(ascending=False, kind="stable")
    return sorted(map(str, means.index), key=lambda name: name != "none")


def _draw_margin_rows(ax: Axes, curves: pd.DataFrame, names: list[str], n_rows: int) -> None:
    """Draw the densities of some defenses, a row each, in axes with room for `n_rows`."""
    is_older = "refused" in curves  # a table of a run whose only rates are those of the readout
    share_column, share_title = (
        ("refused", "share refused") if is_older else ("readout_refused", "refused by readout")
    )
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
    ax.axvline(curves["threshold"].iloc[0], zorder=5, gid="threshold", **_THRESHOLD_STYLE)
    reach = curves["margin"].agg(["min", "max"])
    room = 0.03 * (reach["max"] - reach["min"]) or 1.0
    ax.set_xlim(reach["min"] - room, reach["max"] + room)
    _stretch_margin_axis(ax, _find_linear_range(curves))
    ax.set_ylim(0.4 - n_rows, 0.6)
    controls = set(curves.loc[curves["family"] == "control", "defense"])
    labels = [fit_text(_defense_label(name, name in controls), 110, 8) for name in names]
    ax.set_yticks(range(0, -len(names), -1), labels)
    for name, label in zip(names, ax.get_yticklabels(), strict=True):
        label.set_color(DARK if name in controls else BLACK)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("margin (nats; right of the line = refuses)")


def draw_roc(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the ROC curve of each defense; the undefended model is black.

    Of more than six defenses, only those whose AUROC differs from the undefended model's by its interval have
    a color and a legend entry, the six with the largest change at most; the others are grey. Curves in color
    have a mark at the run's threshold.

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
    styles = dict(zip(_choose_colored_curves(each), LINE_STYLES, strict=False))
    styles = {"none": (BLACK, "-", "o"), **styles} if "none" in each.index else styles
    others = [name for name in each.index if name not in styles]
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(3.9, 3.9)
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", zorder=1, gid="chance")
        key = []
        for name in [*styles, *others]:
            is_control = each.loc[name, "family"] == "control"
            color, dash, marker = styles.get(name, (GREY, (0, (1, 1.2)) if is_control else "-", ""))
            line: Any = {"color": color, "linestyle": dash, "linewidth": 1.6 if name in styles else 0.7}
            mark: Any = {"color": color, "marker": marker, "markersize": 7.5, "mec": "white", "mew": 0.6}
            level = 2 + (name in styles) + (name == "none")
            curve = points[points["defense"] == name]
            ax.plot(curve["benign_refused"], curve["harmful_refused"], zorder=level, gid=name, **line)
            if name not in styles:
                continue
            operating = curve.loc[curve["operating"], ["benign_refused", "harmful_refused"]]
            ax.plot(*operating.to_numpy().T, zorder=level + 3, gid=f"{name} mark", **mark)
            value = _format_first_estimate(curve, "auroc", "", 1, 2) or "no value"
            label = fit_text(_defense_label(name, is_control), 140, TEXT_SIZE, 2)
            label = label.replace("\n", "\n" + " " * 30)  # below the name, not below its AUROC
            key.append(Line2D([], [], label=f"{value}  {label}", **line | mark))
        is_control = each.loc[others, "family"] == "control"
        for noun, chosen in (("other", ~is_control), ("control", is_control)):
            rows = each.loc[others][chosen]
            grey: Any = {"color": GREY, "linestyle": "-" if noun == "other" else (0, (1, 1.2))}
            key += [Line2D([], [], label=_describe_others(rows, noun), **grey)] * bool(len(rows))
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(-0.02, 1.02)
        ax.set_aspect("equal")
        ax.set_xlabel("share of benign queries refused")
        ax.set_ylabel("share of harmful queries refused")
        place_legend_beside(ax, key, "AUROC [95\u00a0% interval]")
    return ax


def _choose_colored_curves(each: pd.DataFrame) -> list[str]:
    """Return the defenses whose ROC curves have a color, the highest AUROC first.

    Args:
        each: a row per defense, which is the index.
    """
    defenses = each[(each["family"] != "control") & (each.index != "none")]
    if len(defenses) <= len(LINE_STYLES):
        return [str(name) for name in defenses.index]
    differs = defenses[(defenses["delta_auroc_low"] > 0) | (defenses["delta_auroc_high"] < 0)]
    largest = differs["delta_auroc"].abs().sort_values(ascending=False, kind="stable").index
    chosen = differs.loc[largest[: len(LINE_STYLES)]]
    return [str(name) for name in chosen.sort_values("auroc", ascending=False, kind="stable").index]


def _describe_others(rows: pd.DataFrame, noun: str) -> str:
    """Return the legend entry of the grey curves of some defenses."""
    known = rows["auroc"].dropna()
    text = f"{len(rows)} {noun}{'s' * (len(rows) != 1)}"
    if not len(known):
        return text
    low, high = f"{known.min():.2f}", f"{known.max():.2f}"
    return f"{low}  {text}" if low == high else f"{low} to {high}  {text}"


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


def draw_thresholds(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw shift and discrimination of the readout's refusal rates, by its threshold.

    Of more than six defenses, only the six whose discrimination is largest at any threshold have a color.

    >>> row = {"attack": "direct", "defense": "a", "family": "noise", "threshold": [0.0, 1.0]}
    >>> row |= {"shift": [0.0, 5.0], "discrimination": 0.0, "run_threshold": 0.5}
    >>> ax = draw_thresholds(pd.DataFrame(row))
    >>> [panel.lines[-1].get_ydata().tolist() for panel in ax.child_axes]
    [[0.0, 5.0], [0.0, 0.0]]

    Args:
        points: table from `build_threshold_points`, of one attack.
        ax: axes that the panels are placed in; by default new ones.
    """
    each = check_one_attack(points).drop_duplicates("defense").set_index("defense")
    is_defense = points["family"] != "control"
    change = points[is_defense].groupby("defense", sort=False)["discrimination"].agg(lambda x: x.abs().max())
    colored = set(change.sort_values(ascending=False, kind="stable").index[: len(LINE_STYLES)])
    styles = dict(zip([name for name in each.index if name in colored], LINE_STYLES, strict=False))
    with rc_context(RC_PARAMS):
        ax, (panels,) = stack_panels(ax, [2.4], [], 2, 2.6)
        set_panel_titles(panels, ["shift (points)", "discrimination (points)"])
        for column, panel in zip(("shift", "discrimination"), panels, strict=True):
            panel.axhline(0, color=GREY, linewidth=0.6, zorder=1)
            mark: Any = {"color": BLACK, "linewidth": 1.0, "linestyle": (0, (4, 2)), "zorder": 2.2}
            panel.axvline(points["run_threshold"].iloc[0], gid="threshold", **mark)
            for name in sorted(each.index, key=lambda name: name in styles):
                curve = points[points["defense"] == name].sort_values("threshold")
                color, dash, _ = styles.get(name, (GREY, "-", "."))
                line: Any = {"color": color, "linestyle": dash, "linewidth": 1.3 if name in styles else 0.6}
                if name in styles:
                    ends = extract_estimates(curve, column)
                    band: Any = {"color": color, "alpha": 0.10, "linewidth": 0, "zorder": 2}
                    panel.fill_between(curve["threshold"], ends[:, 1], ends[:, 2], **band)
                level = 3 if name in styles else 1.5
                panel.plot(curve["threshold"], curve[column], gid=str(name), zorder=level, **line)
            panel.set_xlabel("threshold (nats)", fontsize=8)
            panel.margins(x=0.01)
        key: list[Any] = [
            Line2D([], [], color=color, linestyle=dash, label=fit_text(str(name), 140, TEXT_SIZE))
            for name, (color, dash, _) in styles.items()
        ]
        n_others = len(each) - len(styles)
        key += [Line2D([], [], color=GREY, linewidth=0.6, label=f"{n_others} others")] * bool(n_others)
        key.append(Line2D([], [], label="threshold of the run", **mark))
        place_legend_beside(ax, key)
    return ax


def caption_thresholds(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_thresholds`."""
    n_defenses = points["defense"].nunique()
    many = (
        "In color: the six defenses whose discrimination is largest at any threshold. "
        if n_defenses > len(LINE_STYLES)
        else ""
    )
    exact = replace(context, interval="95\u00a0% Bonett\N{EN DASH}Price, combined over both classes")
    return (
        "Change of the refusal rates of the readout against the undefended model at the same threshold of "
        f"the first-token margin, on the same {format_count_range(points['n_harmful'])} harmful and "
        f"{format_count_range(points['n_benign'])} benign queries. Shift: mean of the changes of both "
        f"classes. Discrimination: change on harmful minus change on benign queries. {many}Bands: 95\u00a0% "
        "intervals at each threshold. Thresholds reach from the 2nd to the 98th percentile of the undefended "
        "margins. "
        f"{exact.format_sentences(points['attack'].iloc[0])}"
    )


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
        f"(below), a row per defense, sorted by the median; ticks are medians. {grey}Dashed: the "
        "threshold; at the right, the share of each class above it with its interval"
        f"{_format_readout_note(context)}. Density: Gaussian kernel of SD {width:.2f}\u00a0nats, one scale "
        f"for all rows.{scale} "
        f"{context.format_sentences(curves['attack'].iloc[0])}"
    )


def caption_roc(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_roc`.

    >>> points = pd.DataFrame({"attack": ["direct"], "n_harmful": [9], "n_benign": [8]})
    >>> points = points.assign(defense="none", family="none")
    >>> caption_roc(points, CaptionContext("smollm2", "twins", "test", 0.0, ("I",)))[:40]
    'Share refused of 9 harmful queries again'
    """
    each = points.drop_duplicates("defense").set_index("defense")
    n_defenses = int(((each["family"] != "control") & (each.index != "none")).sum())
    grey = ""
    if n_defenses > len(LINE_STYLES):
        differs = (each["delta_auroc_low"] > 0) | (each["delta_auroc_high"] < 0)
        n_differing = int((differs & (each["family"] != "control") & (each.index != "none")).sum())
        kept = f"the {len(LINE_STYLES)} with the largest change of " if n_differing > len(LINE_STYLES) else ""
        grey = (
            f"; in color, {kept}the {n_differing} of {n_defenses} defenses whose AUROC differs from the "
            "undefended model's (the 95\u00a0% interval of the change excludes 0, not corrected for the "
            "number of defenses); solid grey: the others"
        )
    grey += "; dotted grey: controls, which are not defenses" * bool((each["family"] == "control").any())
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
