"""What was predicted of ensembles against what was observed: a panel per coordinate, a point per ensemble."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.curves import BARRED, CROWD, one_attack
from analysis.ensembles import ALONE, REPORTED_ON, STACK
from analysis.lettering import LINE, blank, inset
from analysis.outcomes import BY_MEAN, follows
from analysis.palette import BLACK, BLUE, GREEN, GREY, ORANGE, OTHER, PURPLE, STYLE, VERMILION, WRITTEN

# Coordinate → what it is, factor, and whether it is a share, whose axes are the same in every run.
PANELS = {
    "shift": ("shift (nats)", 1, False),
    "discrimination": ("discrimination (nats)", 1, False),
    "delta_auroc": ("change of AUROC", 1, False),
    "refusal_rate": ("harmful queries refused (%)", 100, True),
    "over_refusal_rate": ("benign queries refused (%)", 100, True),
}
LOOKS = {
    STACK: (BLACK, "D", "stack: all worn at once"),
    "mean": (BLUE, "o", "vote: mean"),
    "highest": (VERMILION, "^", "vote: highest"),
    "lowest": (GREEN, "v", "vote: lowest"),
    "majority": (PURPLE, "s", "vote: majority"),
    "fitted": (ORANGE, "P", "vote: fitted weights"),
}
_SIDE, _ACROSS, _UP, _EVERY = 1.75, 0.5, 0.86, 3  # inches: a panel, the gaps; panels in a row


def forecast_points(rows: pd.DataFrame, split: str = REPORTED_ON) -> pd.DataFrame:
    """Return the ensembles that were observed under the first attack, with the columns that the figure draws.

    >>> row = {"attack": "direct", "split": "test", "members": "a+b", "how": "mean", "kind": "intra"}
    >>> row |= {f"{side}_{x}": 0.5 for side in ("predicted", "observed") for x in PANELS}
    >>> forecast_points(pd.DataFrame([row, row | {"members": "a", "how": "alone"}]))["members"].tolist()
    ['a+b']

    Args:
        rows: `ensembles.csv`.
        split: whose queries.
    """
    here = rows[(rows["attack"] == rows["attack"].iloc[0]) & (rows["split"] == split)]
    here = here[(here["how"] != ALONE) & here["observed_shift"].notna()]
    sides = ("predicted_{}", "observed_{}", "observed_{}_low", "observed_{}_high")
    columns = ["attack", "split", "members", "how", "kind", *(s.format(x) for x in PANELS for s in sides)]
    return here[[name for name in columns if name in here]].reset_index(drop=True)


def forecast(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each ensemble at what was predicted and what came; on the diagonal the prediction came true.

    >>> row = {"attack": "direct", "members": "a+b", "how": "stack", "kind": "inter"}
    >>> row |= {f"{side}_{x}": 0.5 for side in ("predicted", "observed") for x in PANELS}
    >>> ax = forecast(pd.DataFrame([row]))
    >>> [panel.get_title(loc="left") for panel in ax.child_axes][:2]
    ['shift (nats)', 'discrimination (nats)']

    Args:
        points: what `forecast_points` returned, of one attack.
        ax: where to draw; it only lends its place to the panels.
    """
    one_attack(points)
    rows = -(-len(PANELS) // _EVERY)
    whole = _EVERY * (_SIDE + _ACROSS) - _ACROSS, rows * (_SIDE + _UP) - _UP
    stacked = points["how"] == STACK
    with rc_context(STYLE):
        ax = ax or blank(*whole)
        ax.set_axis_off()
        for number, name in enumerate(PANELS):
            row, column = divmod(number, _EVERY)
            corner = column * (_SIDE + _ACROSS), whole[1] - _SIDE - row * (_SIDE + _UP)
            panel = inset(ax, whole, (*corner, _SIDE, _SIDE))
            _panel(panel, points, name)
            if column == 0:
                panel.set_ylabel("observed")
            if number + _EVERY >= len(PANELS):
                panel.set_xlabel("predicted")
        free = len(PANELS) % _EVERY * (_SIDE + _ACROSS) / whole[0]
        place: Any = {"loc": "upper left", "bbox_to_anchor": (free - 0.04, _SIDE / whole[1])}
        ax.legend(handles=_key(points, bool(stacked.any())), borderaxespad=0.0, labelspacing=0.5, **place)
    return ax


def _panel(ax: Axes, points: pd.DataFrame, name: str) -> None:
    """Draw one coordinate of all ensembles."""
    words, factor, share = PANELS[name]
    sides = [f"{side}_{name}" for side in ("predicted", "observed")]
    known = points.dropna(subset=sides)
    at = factor * known[sides].to_numpy(float)
    stacked = (known["how"] == STACK).to_numpy(bool)
    # By definition, on the diagonal: that tells nothing of the prediction.
    sure = known["how"].isin(BY_MEAN).to_numpy(bool) & (name in ("shift", "discrimination"))
    bars = factor * _bars(known[stacked], name)
    reached = [*at.ravel(), *bars[np.isfinite(bars)]]
    low, high = (float(min(reached)), float(max(reached))) if reached else (0.0, 0.0)
    low, high = (0.0, 100.0) if share else (low, high)
    room = 0.07 * (high - low) or 1.0
    ax.axline((low, low), slope=1, color=GREY, linewidth=0.8, zorder=1, gid="diagonal")
    _votes(ax, known[~stacked], at[~stacked])
    _stacks(ax, known[stacked], at[stacked], bars)
    ax.set_xlim(low - room, high + room)
    ax.set_ylim(low - room, high + room)
    ax.locator_params(nbins=4)
    if share:
        ax.set_xticks([0, 50, 100])
        ax.set_yticks([0, 50, 100])
    ax.tick_params(labelsize=WRITTEN - 0.5)
    told = [
        f"{_counted(int(which.sum()), word)}: R² {_number(r2)}, ρ {_number(rank)}"
        for which, word in ((stacked, "stack"), (~stacked & ~sure, "vote"))
        if which.any()
        for r2, rank in [[float(value[0]) for value in follows(*at[which].T[:, None]).values()]]
    ]
    small = WRITTEN - 0.7
    ax.set_title(words, loc="left", fontsize=8, weight="bold", pad=6 + len(told) * small * LINE)
    above: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": small}
    ax.annotate("\n".join(told), (0, 1), (0, 4), va="bottom", annotation_clip=False, gid="follows", **above)


def _votes(ax: Axes, rows: pd.DataFrame, at: Any) -> None:
    if len(rows) > CROWD:
        # In one mixed order, so that no way of voting lies on top of all others.
        mixed = np.random.default_rng(0).permutation(len(rows))
        colors = rows["how"].map({how: look[0] for how, look in LOOKS.items()}).to_numpy()[mixed]
        speck: Any = {"s": 2.2, "linewidths": 0, "alpha": 0.4, "rasterized": True, "label": "votes"}
        ax.scatter(at[mixed, 0], at[mixed, 1], c=list(colors), zorder=2, **speck)
        return
    for how in dict.fromkeys(rows["how"]):
        color, marker, _ = LOOKS.get(how, (*OTHER, how))
        for hollow in (False, True):
            here = ((rows["how"] == how) & (_inter(rows) == hollow)).to_numpy(bool)
            look: Any = {"marker": marker, "edgecolors": color, "facecolors": "none" if hollow else color}
            if here.any():
                size = 15 if len(rows) < 300 else 8
                ax.scatter(
                    at[here, 0], at[here, 1], s=size, linewidths=0.7, alpha=0.75, zorder=2, label=how, **look
                )


def _bars(stacks: pd.DataFrame, name: str) -> Any:
    """The intervals that are drawn, which are missing where there are none or too many."""
    ends = [f"observed_{name}_low", f"observed_{name}_high"]
    found = stacks.reindex(columns=ends).to_numpy(float)
    return found if len(stacks) <= BARRED else np.full_like(found, np.nan)


def _stacks(ax: Axes, rows: pd.DataFrame, at: Any, bars: Any) -> None:
    color, marker, _ = LOOKS[STACK]
    ax.vlines(at[:, 0], *bars.T, color=color, linewidth=0.8, alpha=0.5, zorder=3)
    for hollow in (False, True):
        here = (_inter(rows) == hollow).to_numpy(bool)
        fill, edge = ("white", color) if hollow else (color, "white")
        look: Any = {"marker": marker, "facecolors": fill, "edgecolors": edge}
        if here.any():
            ax.scatter(
                at[here, 0],
                at[here, 1],
                s=30 if len(rows) <= BARRED else 18,
                linewidths=0.9 if hollow else 0.5,
                zorder=4,
                label=STACK,
                **look,
            )


def _key(points: pd.DataFrame, stacked: bool) -> list[Any]:
    crowd = int((points["how"] != STACK).sum()) > CROWD
    present = [how for how in LOOKS if (points["how"] == how).any()]
    present += sorted(set(points["how"]) - set(LOOKS))
    key = []
    for how in present:
        color, marker, words = LOOKS.get(how, (*OTHER, f"vote: {how}"))
        marker = "o" if crowd and how != STACK else marker
        look: Any = {"color": color, "marker": marker, "markersize": 5.5 if how == STACK else 4.5}
        key.append(Line2D([], [], linestyle="", label=words, **look))
    if "kind" in points and (stacked or not crowd):
        color, marker, _ = LOOKS[STACK] if stacked else LOOKS.get(present[0], (*OTHER, ""))
        for kind, fill, words in (("intra", color, "one mechanism"), ("inter", "white", "two mechanisms")):
            look = {"color": color, "marker": marker, "markerfacecolor": fill, "markersize": 5.5}
            word = f"{'filled' if kind == 'intra' else 'hollow'}: members of {words}"
            key += [Line2D([], [], linestyle="", label=word, **look)] * bool((points["kind"] == kind).any())
    return [*key, Line2D([], [], color=GREY, linewidth=0.8, label="prediction came true")]


def _inter(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which ensembles are drawn hollow."""
    return rows.get("kind", pd.Series("", rows.index)) == "inter"


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


def _number(value: float) -> str:
    if value != value:
        return "\N{EN DASH}"
    return (f"{value:.2f}" if value > -10 else f"{value:,.0f}").replace("-", "\N{MINUS SIGN}")
