"""Margins and ROC curves of a run, and the loss of a training. Tables in, axes out; none is saved.

Each function draws a table of `curves` for one attack; that table is the CSV beside the PNG.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.plots.captions import format_count_range
from analysis.plots.data import check_one_attack
from analysis.plots.layout import fit_text, make_axes, place_legend_beside
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

if TYPE_CHECKING:
    from analysis.plots.captions import CaptionContext


def draw_margins(curves: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw a row per defense: harmful queries above its line, benign ones below, the undefended in grey.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> from analysis.plots.data import build_margin_curves
    >>> curves = build_margin_curves(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=0.5)
    >>> draw_margins(curves).get_xlabel()
    'margin (nats; right of the line = refuses)'

    Args:
        curves: what `margin_curves` returned, of one attack.
        ax: where to draw; by default a new figure with room for every row.
    """
    names = sorted(check_one_attack(curves)["defense"].unique(), key=lambda name: name != "none")
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.0, max(len(names), 2) * (0.6 if len(names) <= 10 else 0.44))
        scale = 0.44 / curves["density"].max()  # the highest curve just keeps clear of the next row
        aside: Any = {"transform": ax.get_yaxis_transform(), "fontsize": TEXT_SIZE, "va": "center"}
        for row, name in enumerate(names):
            ax.axhline(-row, color=GREY, linewidth=0.5, zorder=1)
            for harmful, word, color, side in CLASS_STYLES:
                of_class = curves[curves["harmful"] == harmful]
                half, ghost = (of_class[of_class["defense"] == wanted] for wanted in (name, "none"))
                line = _draw_outline(ax, half, -row, side * scale, f"{name} {word}", color, 1.1)
                ax.fill_between(half["margin"], -row, line, color=color, alpha=0.5, linewidth=0, zorder=2)
                if name != "none":
                    _draw_outline(ax, ghost, -row, side * scale, "undefended", DARK, 0.8)
                share = _format_first_estimate(half, "refused", "\u00a0%", 100, 0)
                ax.text(1.03, -row + 0.22 * side, share, color=color, **aside)
        above: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": TEXT_SIZE}
        ax.annotate("share refused", (1.03, 1), (0, 8), annotation_clip=False, **above)
        limit: Any = {"color": BLACK, "linewidth": 1.0, "linestyle": (0, (4, 2))}
        ax.axvline(curves["threshold"].iloc[0], zorder=5, gid="threshold", **limit)
        ax.set_ylim(0.4 - len(names), 0.6)
        controls = set(curves.loc[curves["family"] == "control", "defense"])
        ax.set_yticks(
            range(0, -len(names), -1), [fit_text(_defense_label(n, n in controls), 110, 8) for n in names]
        )
        for name, label in zip(names, ax.get_yticklabels(), strict=True):
            label.set_color(DARK if name in controls else BLACK)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("margin (nats; right of the line = refuses)")
        key: list[Any] = [Patch(color=VERMILION, alpha=0.5, label="harmful (above)")]
        key += [Patch(color=BLUE, alpha=0.5, label="benign (below)")]
        key += [Line2D([], [], color=DARK, linewidth=0.8, label="undefended")] * (len(names) > 1)
        key += [Line2D([], [], label="threshold", **limit)]
        ax.legend(handles=key, loc="lower right", bbox_to_anchor=(1.02, 1), ncols=4, columnspacing=1.2)
    return ax


def draw_roc(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the ROC curve of each defense with a mark at the run's threshold; the undefended is black.

    Past six defenses only the six whose AUROC differs most from the undefended have a color of their own.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> from analysis.plots.data import build_roc_points
    >>> draw_roc(build_roc_points(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=0.5)).get_ylabel()
    'share of harmful queries refused'

    Args:
        points: what `roc_points` returned, of one attack.
        ax: where to draw.
    """
    each = check_one_attack(points).drop_duplicates("defense").set_index("defense")
    change = each.loc[(each["family"] != "control") & (each.index != "none"), "delta_auroc"].abs()
    told = set(change.sort_values(ascending=False, kind="stable").index[: len(LINE_STYLES)])
    looks = dict(zip([n for n in each.index if n in told], LINE_STYLES, strict=False))
    looks = {"none": (BLACK, "-", "o"), **looks} if "none" in each.index else looks
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(3.9, 3.9)
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", zorder=1, gid="chance")
        key = []
        for name in [*looks, *(n for n in each.index if n not in looks)]:
            control = each.loc[name, "family"] == "control"
            color, dash, shape = looks.get(name, (GREY, (0, (1, 1.2)) if control else "-", "."))
            line: Any = {"color": color, "linestyle": dash, "linewidth": 1.6 if name in looks else 0.9}
            mark: Any = {"color": color, "marker": shape, "markersize": 7.5, "mec": "white", "mew": 0.6}
            level = 2 + (name in looks) + (name == "none")
            curve = points[points["defense"] == name]
            here = curve[curve["operating"]]
            ax.plot(curve["benign_refused"], curve["harmful_refused"], zorder=level, gid=name, **line)
            ax.plot(
                here["benign_refused"], here["harmful_refused"], zorder=level + 3, gid=f"{name} mark", **mark
            )
            value = _format_first_estimate(curve, "auroc", "", 1, 2) or "no value"
            named = fit_text(
                _defense_label(name, control), 140, TEXT_SIZE, 1 if len(each) > 11 else 2
            ).replace("\n", "\n" + " " * 30)
            key.append(Line2D([], [], label=f"{value}  {named}", **line | mark))
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(-0.02, 1.02)
        ax.set_aspect("equal")
        ax.set_xlabel("share of benign queries refused")
        ax.set_ylabel("share of harmful queries refused")
        place_legend_beside(ax, key, title="AUROC [95\u00a0% interval]")
    return ax


def draw_loss(history: pd.DataFrame, title: str, ax: Axes | None = None) -> Axes:
    """Draw the loss of each training step, and its running mean over a tenth of the steps.

    >>> draw_loss(pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}), "attack, smollm2").get_ylabel()
    'loss on the answer (nats a token)'

    Args:
        history: columns `step` and `loss`, nats a token.
        title: what was trained.
        ax: where to draw.
    """
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(4.2, 2.4)
        ax.plot(history["step"], history["loss"], color=GREY, linewidth=0.8, label="each step")
        mean = history["loss"].rolling(max(2, len(history) // 10), center=True, min_periods=1).mean()
        ax.plot(history["step"], mean, color=BLUE, linewidth=1.6, label="running mean")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("step")
        ax.set_ylabel("loss on the answer (nats a token)")
        ax.set_title(title, loc="left", fontsize=9)
        ax.legend()
        return ax


def _defense_label(name: str, is_control: bool) -> str:
    return "undefended" if name == "none" else f"{name} (control)" if is_control else name


def _format_first_estimate(rows: pd.DataFrame, column: str, unit: str, scale: int, digits: int) -> str:
    """Return an estimate with its interval as text, empty where there is none."""
    for value, low, high in scale * rows[[f"{column}{end}" for end in INTERVAL_SUFFIXES]].to_numpy(float)[:1]:
        interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if low <= high else ""
        return f"{value:.{digits}f}{unit}{interval}" if value == value else ""
    return ""


def _draw_outline(
    ax: Axes, rows: pd.DataFrame, base: float, scale: float, gid: str, color: str, line_width: float
) -> Any:
    """Draw one class of one defense as a line with a tick at its median; return the heights of the line."""
    heights = base + scale * rows["density"]
    ax.plot(
        rows["margin"], heights, color=color, linewidth=line_width, zorder=3 + (gid == "undefended"), gid=gid
    )
    for median in rows["median"].iloc[:1]:
        tick: Any = {"color": color, "linewidth": 2 * line_width - 0.4, "zorder": 4}
        ax.plot([median] * 2, [base, base + 0.44 * (1 if scale > 0 else -1)], gid=f"{gid} median", **tick)
    return heights


def caption_margins(curves: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `plots.margins` draws from these curves.

    >>> curves = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "n": [9, 8]})
    >>> curves = curves.assign(bandwidth=0.5)
    >>> caption_margins(curves, Context("smollm2", "twins", "test", 0.0, ("I",)))[:54]
    'First-answer-token margins of 9 harmful queries (above'
    """
    harmful, benign = (format_count_range(curves.loc[curves["harmful"] == c, "n"]) for c in (True, False))
    width = curves["bandwidth"].iloc[0]
    several = (curves["defense"] != "none").any()
    grey = "Grey repeats the undefended model on the same queries. " if several else ""
    return (
        f"First-answer-token margins of {harmful} harmful queries (above each line) and {benign} benign "
        f"ones (below), a row per defense; ticks are medians. {grey}Dashed: the "
        "threshold; at the right, the share of each class beyond it with its interval. "
        f"Density: Gaussian kernel of SD {width:.2f}\u00a0nats, one scale for all rows. "
        f"{context.format_sentences(curves['attack'].iloc[0])}"
    )


def caption_roc(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `plots.roc` draws from these points.

    >>> points = pd.DataFrame({"attack": ["direct"], "n_harmful": [9], "n_benign": [8]})
    >>> points = points.assign(defense="none", family="none")
    >>> caption_roc(points, Context("smollm2", "twins", "test", 0.0, ("I",)))[:43]
    'Share refused among 9 harmful queries again'
    """
    of = points.drop_duplicates("defense")
    controls = int((of["family"] == "control").sum())
    grey = "; solid grey: AUROC changed less than in the six in color" * (len(of) - controls > 7)
    grey += "; dotted grey: controls, which are not defenses" * bool(controls)
    return (
        f"Share refused among {format_count_range(points['n_harmful'])} harmful queries against share refused among "
        f"{format_count_range(points['n_benign'])} benign ones as the cut moves over the first-answer-token "
        "margin; marks: the threshold of this run; dotted diagonal: chance. Color, dash and mark name the "
        f"defense{grey}. {context.format_sentences(points['attack'].iloc[0])}"
    )
