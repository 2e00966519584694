"""Three figures of a run: margins, the shift-discrimination plane, ROC. Tables in, axes out; none is saved.

Each function draws a table of `curves` for one attack; that table is the CSV beside the PNG.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.captions import (
    TITLES,
    Context,
    of_attacks,
    of_cost,
    of_forecast,
    of_front,
    of_interactions,
    of_margins,
    of_plane,
    of_roc,
    of_secrets,
    of_square,
    of_trust,
)
from analysis.curves import ENDS, attack_cells, margin_curves, one_attack, plane_points, roc_points
from analysis.forecast import forecast, forecast_points
from analysis.grid import grid
from analysis.interactions import interaction_cells, interactions
from analysis.lettering import beside, blank, complete, fit
from analysis.palette import BLACK, BLUE, CLASSES, DARK, GREY, LINES, STYLE, VERMILION, WRITTEN
from analysis.pareto import front_points, pareto
from analysis.plane import plane
from analysis.price import price
from analysis.square import square, square_points
from analysis.strip import secret_points, secrets
from analysis.trust import calibration, rates

__all__ = ["Context", "figures", "margin_curves", "margins", "plane", "plane_points", "roc", "roc_points"]

_DRAWN_EACH = 4  # attacks at most that have figures of their own


def margins(curves: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw a row per defense: harmful queries above its line, benign ones below, the undefended in grey.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> curves = margin_curves(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=0.5)
    >>> margins(curves).get_xlabel()
    'margin (nats; right of the line = refuses)'

    Args:
        curves: what `margin_curves` returned, of one attack.
        ax: where to draw; by default a new figure with room for every row.
    """
    names = sorted(one_attack(curves)["defense"].unique(), key=lambda name: name != "none")
    with rc_context(STYLE):
        ax = ax or blank(4.0, max(len(names), 2) * (0.6 if len(names) <= 10 else 0.44))
        scale = 0.44 / curves["density"].max()  # the highest curve just keeps clear of the next row
        aside: Any = {"transform": ax.get_yaxis_transform(), "fontsize": WRITTEN, "va": "center"}
        for row, name in enumerate(names):
            ax.axhline(-row, color=GREY, linewidth=0.5, zorder=1)
            for harmful, word, color, side in CLASSES:
                of_class = curves[curves["harmful"] == harmful]
                half, ghost = (of_class[of_class["defense"] == wanted] for wanted in (name, "none"))
                line = _outline(ax, half, -row, side * scale, f"{name} {word}", color, 1.1)
                ax.fill_between(half["margin"], -row, line, color=color, alpha=0.5, linewidth=0, zorder=2)
                if name != "none":
                    _outline(ax, ghost, -row, side * scale, "undefended", DARK, 0.8)
                share = _estimate(half, "refused", "\u00a0%", 100, 0)
                ax.text(1.03, -row + 0.22 * side, share, color=color, **aside)
        above: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": WRITTEN}
        ax.annotate("share refused", (1.03, 1), (0, 8), annotation_clip=False, **above)
        limit: Any = {"color": BLACK, "linewidth": 1.0, "linestyle": (0, (4, 2))}
        ax.axvline(curves["threshold"].iloc[0], zorder=5, gid="threshold", **limit)
        ax.set_ylim(0.4 - len(names), 0.6)
        controls = set(curves.loc[curves["family"] == "control", "defense"])
        ax.set_yticks(range(0, -len(names), -1), [fit(_shown(n, n in controls), 110, 8) for n in names])
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


def roc(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the ROC curve of each defense with a mark at the run's threshold; the undefended is black.

    Past six defenses only the six whose AUROC differs most from the undefended have a color of their own.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> roc(roc_points(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=0.5)).get_ylabel()
    'share of harmful queries refused'

    Args:
        points: what `roc_points` returned, of one attack.
        ax: where to draw.
    """
    each = one_attack(points).drop_duplicates("defense").set_index("defense")
    change = each.loc[(each["family"] != "control") & (each.index != "none"), "delta_auroc"].abs()
    told = set(change.sort_values(ascending=False, kind="stable").index[: len(LINES)])
    looks = dict(zip([n for n in each.index if n in told], LINES, strict=False))
    looks = {"none": (BLACK, "-", "o"), **looks} if "none" in each.index else looks
    with rc_context(STYLE):
        ax = ax or blank(3.9, 3.9)
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
            value = _estimate(curve, "auroc", "", 1, 2) or "no value"
            named = fit(_shown(name, control), 140, WRITTEN, 1 if len(each) > 11 else 2).replace(
                "\n", "\n" + " " * 30
            )
            key.append(Line2D([], [], label=f"{value}  {named}", **line | mark))
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(-0.02, 1.02)
        ax.set_aspect("equal")
        ax.set_xlabel("share of benign queries refused")
        ax.set_ylabel("share of harmful queries refused")
        beside(ax, key, title="AUROC [95\u00a0% interval]")
    return ax


def loss(history: pd.DataFrame, title: str, ax: Axes | None = None) -> Axes:
    """Draw the loss of each training step, and its running mean over a tenth of the steps.

    >>> loss(pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}), "attack, smollm2").get_ylabel()
    'loss on the answer (nats a token)'

    Args:
        history: columns `step` and `loss`, nats a token.
        title: what was trained.
        ax: where to draw.
    """
    with rc_context(STYLE):
        ax = ax or blank(4.2, 2.4)
        ax.plot(history["step"], history["loss"], color=GREY, linewidth=0.8, label="each step")
        mean = history["loss"].rolling(max(2, len(history) // 10), center=True, min_periods=1).mean()
        ax.plot(history["step"], mean, color=BLUE, linewidth=1.6, label="running mean")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("step")
        ax.set_ylabel("loss on the answer (nats a token)")
        ax.set_title(title, loc="left", fontsize=9)
        ax.legend()
        return ax


def figures(
    scores: pd.DataFrame, summary: pd.DataFrame, context: Context
) -> dict[str, tuple[Figure, pd.DataFrame]]:
    """Return every figure of a run, complete with title and caption, and the table that it was drawn from.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> run = Context("smollm2", "twins", "test", threshold=0.5, refusing=("I", "Sorry"))
    >>> list(figures(scores, pd.DataFrame(columns=["attack", "defense"]), run))
    ['margins', 'roc']

    Args:
        scores: `scores.csv`.
        summary: `summary.csv`.
        context: what the captions say about the run.

    Returns:
        Figure and table by file stem: `margins`, `plane` (not where only the undefended was run), `square`
        (where a defense was run with all parts of its 2 × 2), `roc`, each
        followed by `-` and the attack where the run has several; then also `attacks`, over all of them. Of
        many attacks only the first has figures of its own.
    """
    made: dict[str, tuple[Figure, pd.DataFrame]] = {}
    attacks = list(scores["attack"].unique())
    for attack in attacks if len(attacks) <= _DRAWN_EACH else attacks[:1]:
        asked, found = scores[scores["attack"] == attack], summary[summary["attack"] == attack]
        tables = {"margins": margin_curves(asked, found, context.threshold)}
        if (found["defense"] != "none").any():
            tables["plane"] = plane_points(found)
            if len(corners := square_points(tables["plane"])):
                tables["square"] = corners
        tables["roc"] = roc_points(asked, found, context.threshold)
        suffix = f"-{re.sub(r'[^A-Za-z0-9.+_]+', '-', str(attack))}" if len(attacks) > 1 else ""
        for kind, table in tables.items():
            if len(table):
                draw, describe = DRAWN[kind]
                made[kind + suffix] = complete(draw(table), TITLES[kind], describe(table, context)), table
    if len(attacks) > 1:
        cells = attack_cells(scores, summary, context.threshold)
        made["attacks"] = complete(grid(cells), TITLES["attacks"], of_attacks(cells, context)), cells
    return made


def of_redrawn(arms: pd.DataFrame, context: Context, tokens: int) -> tuple[Figure, pd.DataFrame]:
    """Return the figure that compares secrets, and its table.

    Args:
        arms: `arms.csv` of `analyze backdooralign`.
        context: what the caption says about the run.
        tokens: of each answer that was judged.
    """
    points = secret_points(arms)
    return complete(secrets(points), TITLES["secrets"], of_secrets(points, context, tokens)), points


def of_price(points: pd.DataFrame, context: Context) -> tuple[Figure, pd.DataFrame]:
    """Return the figure of what is gained for what it costs, and its table.

    Args:
        points: `cost.csv`.
        context: what the caption says about the run.
    """
    return complete(price(points), TITLES["cost"], of_cost(points, context)), points


def of_validity(
    found: pd.DataFrame, curve: pd.DataFrame, context: Context, judge: str, tokens: int
) -> dict[str, tuple[Figure, pd.DataFrame]]:
    """Return the figures of `analyze validate` and their tables, by file stem.

    Args:
        found: `validity.csv`.
        curve: what `agreement.reliability` returned.
        context: what the captions say about the run.
        judge: of the text.
        tokens: of each answer.
    """
    caption = of_trust(found, context, judge, tokens)
    return {
        "calibration": (complete(calibration(curve), TITLES["calibration"], caption), curve),
        "rates": (complete(rates(found), TITLES["rates"], caption), found),
    }


def of_ensembles(
    rows: pd.DataFrame,
    candidates: pd.DataFrame,
    families: Mapping[str, str],
    context: Context,
    counts: tuple[int, int] | None = None,
) -> dict[str, tuple[Figure, pd.DataFrame]]:
    """Return the figures of ensembles of defenses, all on the test split, and their tables, by file stem.

    Args:
        rows: `ensembles.csv`.
        candidates: what `fronts.candidates` returned.
        families: of each defense.
        context: what the captions say about the run.
        counts: harmful and benign queries of the test split, for the captions.

    Returns:
        `forecast`, `interactions` (where a stack of two was run) and `front`.
    """
    made: dict[str, tuple[Figure, pd.DataFrame]] = {}
    if len(points := forecast_points(rows)):
        caption = of_forecast(points, context, counts)
        made["forecast"] = complete(forecast(points), TITLES["forecast"], caption), points
    if len(cells := interaction_cells(rows, families)):
        caption = of_interactions(cells, context, counts)
        made["interactions"] = complete(interactions(cells), TITLES["interactions"], caption), cells
    if len(found := front_points(candidates)):
        caption = of_front(found, context, list(dict.fromkeys(rows["attack"])), counts)
        made["front"] = complete(pareto(found), TITLES["front"], caption), found
    return made


DRAWN: dict[str, tuple[Callable[[pd.DataFrame], Axes], Callable[[pd.DataFrame, Context], str]]] = {
    "margins": (margins, of_margins),
    "plane": (plane, of_plane),
    "square": (square, of_square),
    "roc": (roc, of_roc),
}


def _shown(name: str, control: bool) -> str:
    return "undefended" if name == "none" else f"{name} (control)" if control else name


def _estimate(rows: pd.DataFrame, name: str, unit: str, scale: int, digits: int) -> str:
    """Return an estimate with its interval as text, empty where there is none."""
    for value, low, high in scale * rows[[f"{name}{end}" for end in ENDS]].to_numpy(float)[:1]:
        interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if low <= high else ""
        return f"{value:.{digits}f}{unit}{interval}" if value == value else ""
    return ""


def _outline(
    ax: Axes, rows: pd.DataFrame, base: float, scale: float, gid: str, color: str, wide: float
) -> Any:
    """Draw one class of one defense as a line with a tick at its median; return the heights of the line."""
    heights = base + scale * rows["density"]
    ax.plot(rows["margin"], heights, color=color, linewidth=wide, zorder=3 + (gid == "undefended"), gid=gid)
    for median in rows["median"].iloc[:1]:
        tick: Any = {"color": color, "linewidth": 2 * wide - 0.4, "zorder": 4}
        ax.plot([median] * 2, [base, base + 0.44 * (1 if scale > 0 else -1)], gid=f"{gid} median", **tick)
    return heights
