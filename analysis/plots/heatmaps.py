"""How far stacks of two are from what their members add up to: a heat map over pairs of defenses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Patch, Rectangle

from analysis.plots.captions import (
    CONTRASTS_SENTENCE,
    CaptionContext,
    format_count_range,
    format_query_counts,
    format_run_sentences,
    format_shared_query_counts,
    keep_if_intervals,
    omit_interval_note,
)
from analysis.plots.data import INTERACTION_PANELS, MAX_NUMBERED_DEFENSES, check_one_attack
from analysis.plots.layout import (
    EFFECT_COLORS,
    LINE_HEIGHT,
    MISSING_COLOR,
    add_inset_axes,
    draw_color_scale,
    extract_estimates,
    fit_text,
    make_axes,
    measure_text_width,
    place_legend_beside,
    set_panel_titles,
    wrap_text,
)
from analysis.plots.style import (
    BLACK,
    BLUE,
    DARK,
    FAMILY_STYLES,
    GREY,
    OTHER_FAMILY_STYLE,
    RC_PARAMS,
    TEXT_SIZE,
    VERMILION,
)
from analysis.stats.tables import INTERVAL_SUFFIXES

if TYPE_CHECKING:
    from analysis.plots.captions import QueryCounts

_INTERACTION_COLORS = LinearSegmentedColormap.from_list("interaction", (VERMILION, "white", BLUE))
_NOT_RUN_COLOR = "#E4E4E4"  # told from the white of no interaction
_MIN_INTERACTION_PANEL, _INTERACTION_PANEL_GAP, _INTERACTION_FAMILY_GAP, _FAMILY_STRIP_WIDTH = (
    2.6,
    0.3,
    0.05,
    0.06,
)  # inches: a panel, between two, between families, a strip


def draw_interactions(cells: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw what each pair does beyond what its members add up to; blue is more than that, orange is less.

    >>> cell = {"attack": "direct", "first": "a", "second": "b", "family_first": "noise"}
    >>> cell |= {"family_second": "tuning", "interaction_shift": -1.25, "interaction_discrimination": 0.5}
    >>> [text.get_text() for text in draw_interactions(pd.DataFrame([cell])).texts if "a b" in str(text.get_gid())]
    ['−1.2', '+0.50']

    Args:
        cells: what `interaction_cells` returned, of one attack.
        ax: where to draw; its data units become inches, so that a new one is best.
    """
    check_one_attack(cells)
    of = _families_by_defense(cells)
    numbered = len(of) <= MAX_NUMBERED_DEFENSES
    cell = 0.36 if numbered else 0.15
    places, end = _interaction_offsets(of, cell)
    across = max(end, _MIN_INTERACTION_PANEL)
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(2 * across + _INTERACTION_PANEL_GAP, end)
        ax.set_axis_off()
        heads = {
            name: wrap_text(words, 72 * across, 8, "bold") for name, (words, *_) in INTERACTION_PANELS.items()
        }
        for number, name in enumerate(INTERACTION_PANELS):
            left = number * (across + _INTERACTION_PANEL_GAP)
            span = _draw_interaction_panel(ax, cells, name, places, cell, left)
            _draw_interaction_scale(ax, name, span, left)
            style: Any = {"va": "bottom", "size": 8, "weight": "bold"}
            ax.text(left, 0.47, "\n".join(heads[name]), linespacing=LINE_HEIGHT, **style)
            _label_interaction_axes(ax, of, places, cell, (left, end), with_row_names=number == 0)
        ax.set_xlim(0, 2 * across + _INTERACTION_PANEL_GAP)
        ax.set_ylim(-end, 0)
        key: list[Any] = [
            Patch(color=FAMILY_STYLES.get(family, OTHER_FAMILY_STYLE)[0], label=family)
            for family in dict.fromkeys(of.values())
        ]
        every = len(cells) == len(of) * (len(of) - 1) / 2
        key += [] if every else [Patch(color=_NOT_RUN_COLOR, label="pair was not run")]
        place_legend_beside(ax, key, title="family (strip)")
    return ax


def _families_by_defense(cells: pd.DataFrame) -> dict[str, str]:
    """The family of each defense, families together."""
    found = dict(zip(cells["first"], cells["family_first"], strict=True))
    found |= dict(zip(cells["second"], cells["family_second"], strict=True))
    order = [*FAMILY_STYLES, *sorted(set(found.values()) - set(FAMILY_STYLES))]
    return dict(sorted(found.items(), key=lambda item: (order.index(item[1]), item[0])))


def _interaction_offsets(families: Mapping[str, str], cell_width: float) -> tuple[dict[str, float], float]:
    """How far from the corner each defense begins, and where all end."""
    places, far, last = {}, 0.0, None
    for name, family in families.items():
        far += _INTERACTION_FAMILY_GAP * (last not in (None, family))
        places[name], far, last = far, far + cell_width, family
    return places, far


def _draw_interaction_panel(
    ax: Axes, cells: pd.DataFrame, column: str, offsets: Mapping[str, float], cell_width: float, left: float
) -> float:
    """Draw one interaction of all pairs; return the value of the darkest color."""
    ends = [f"{column}{end}" for end in INTERVAL_SUFFIXES]
    pairs = list(zip(cells["first"], cells["second"], strict=True))
    found: dict[Any, Any] = dict(zip(pairs, cells.reindex(columns=ends).to_numpy(float), strict=True))
    sizes = np.abs(cells[column].to_numpy(float))
    most = float(np.nanmax(sizes)) if np.isfinite(sizes).any() else 0.0
    most = most or 1.0
    digits = 2 if most < 1 else 1
    for row, down in offsets.items():
        for name, right in offsets.items():
            if row == name:
                continue
            ran = found.get((row, name), found.get((name, row)))
            value, low, high = (np.nan,) * 3 if ran is None else ran
            known = value == value
            color: Any = (
                _INTERACTION_COLORS(Normalize(-most, most)(value))
                if known
                else _NOT_RUN_COLOR
                if ran is None
                else "white"
            )
            box = Rectangle(
                (left + right, -down - cell_width), cell_width, cell_width, facecolor=color, edgecolor="white"
            )
            box.set_linewidth(0.6)
            box.set_gid(f"{column} {row} {name}")
            ax.add_patch(box)
            sure = low > 0 or high < 0
            words = "\N{BULLET}" if sure else ""
            if len(offsets) <= MAX_NUMBERED_DEFENSES:
                words = f"{round(value, digits) + 0.0:+.{digits}f}" if known else "\N{EN DASH}"
            if ran is None or not words:
                continue
            red, green, blue = color[:3] if known else (1, 1, 1)
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
            look: Any = {"color": "white" if dark else BLACK, "weight": "bold" if sure else "normal"}
            look |= {"size": TEXT_SIZE - 0.5, "ha": "center", "va": "center_baseline"}
            spot = left + right + cell_width / 2, -down - cell_width / 2
            words = words.replace("-", "\N{MINUS SIGN}")
            text = ax.text(*spot, words, gid=f"{column} {row} {name}", **look)
            text.set_in_layout(False)  # lies inside of the axes: nothing to measure
    return most


def _draw_interaction_scale(ax: Axes, column: str, max_value: float, left: float) -> None:
    """Draw the colors with their numbers above a panel."""
    _, less, more = INTERACTION_PANELS[column]
    edges = np.linspace(left, left + _MIN_INTERACTION_PANEL, 65)
    shades = np.linspace(-max_value, max_value, 64)[None]
    ax.pcolormesh(
        edges, [0.28, 0.38], shades, cmap=_INTERACTION_COLORS, vmin=-max_value, vmax=max_value, clip_on=False
    )
    frame: Any = {"fill": False, "edgecolor": GREY, "linewidth": 0.5, "clip_on": False, "gid": "scale"}
    ax.add_patch(Rectangle((left, 0.28), _MIN_INTERACTION_PANEL, 0.1, **frame))
    form = ".2f" if max_value < 1 else ".1f"
    for place, side, words in (
        (0.0, "left", f"\N{MINUS SIGN}{max_value:{form}} {less}"),
        (0.5, "center", "0"),
        (1.0, "right", f"{more} +{max_value:{form}}"),
    ):
        style: Any = {"ha": side, "va": "top", "size": TEXT_SIZE - 0.7, "color": DARK}
        ax.text(left + place * _MIN_INTERACTION_PANEL, 0.25, words, **style)


def _label_interaction_axes(
    ax: Axes,
    families: Mapping[str, str],
    offsets: Mapping[str, float],
    cell_width: float,
    left_and_end: tuple[float, float],
    with_row_names: bool,
) -> None:
    """Draw the strips of the families, the names of the columns, and those of the rows where wanted."""
    left, end = left_and_end
    size = TEXT_SIZE if cell_width > 0.2 else TEXT_SIZE - 0.7
    for name, along in offsets.items():
        color = FAMILY_STYLES.get(families[name], OTHER_FAMILY_STYLE)[0]
        for corner, wide, tall in (
            ((left - _FAMILY_STRIP_WIDTH - 0.02, -along - cell_width), _FAMILY_STRIP_WIDTH, cell_width),
            ((left + along, -end - _FAMILY_STRIP_WIDTH - 0.02), cell_width, _FAMILY_STRIP_WIDTH),
        ):
            ax.add_patch(Rectangle(corner, wide, tall, color=color, linewidth=0, clip_on=False, gid="family"))
        shown = fit_text(name, 115, size, 1)
        below: Any = {"rotation": 90, "ha": "center", "va": "top", "size": size}
        ax.text(
            left + along + cell_width / 2, -end - _FAMILY_STRIP_WIDTH - 0.06, shown, gid="column", **below
        )
        beyond: Any = {"ha": "right", "va": "center_baseline", "size": size}
        if with_row_names:
            ax.text(left - _FAMILY_STRIP_WIDTH - 0.06, -along - cell_width / 2, shown, gid="row", **beyond)


def caption_attack_grid(cells: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `grid.grid` draws from these cells."""
    doubtful = "trusted" in cells and (cells["trusted"] == "not trusted").any()
    hollow = " Hollow and in italics: generated text contradicts the readout there." if doubtful else ""
    wide = max((cells[f"{x}_high"] - cells[f"{x}_low"]).max() for x in ("refusal_rate", "over_refusal_rate"))
    widest = f"; the widest of a rate spans {100 * wide:.0f} points" if wide == wide else ""
    harmful, benign = format_count_range(cells["n_harmful"]), format_count_range(cells["n_benign"])
    return (
        f"The same {harmful} harmful and {benign} benign queries, all sent through the attack of the column "
        "to the model under the defense of the row. First panel: mean over the harmful queries of the "
        "first-answer-token margin, less the threshold; positive (blue) refuses. Then the share of each "
        f"class whose margin exceeds the threshold.{hollow} Intervals are in the table beside the "
        f"figure{widest}. {context.format_sentences('by column')}"
    )


def caption_interactions(
    cells: pd.DataFrame, context: CaptionContext, counts: tuple[int, int] | None = None
) -> str:
    """Return the caption of the figure that `interactions.interactions` draws from these cells.

    Args:
        cells: what was drawn.
        context: what is said about the run.
        counts: harmful and benign queries of the split, where they are known.
    """
    few = len({*cells["first"], *cells["second"]}) <= MAX_NUMBERED_DEFENSES
    sure = bool(cells.filter(like="_low").notna().any(axis=None))
    values = cells[["interaction_shift", "interaction_discrimination"]]
    dash = "\N{EN DASH}: no value. " * bool(few and values.isna().any(axis=None))
    pairs = f"{len(cells)} pairs of defenses that were" if len(cells) > 1 else "one pair of defenses that was"
    mark = f"{'Bold' if few else 'Dot'}: the 95\u00a0% interval excludes 0. " if sure else ""
    return (
        f"The {pairs} run as stacks (both worn at once), each drawn twice, {format_shared_query_counts(counts)}: what was "
        "observed less what both members add up to, each by itself, of shift (mean of the two class means "
        "of the margin's change against the undefended model) and of discrimination (harmful minus benign). "
        f"0 (white): the two do not interact. {mark}{dash}"
        f"{omit_interval_note(context, not sure).format_sentences(cells['attack'].iloc[0])}"
    )


# Column → what it is, factor, form, and the colors from its lowest to its highest value.
_ATTACK_PANELS: dict[str, tuple[str, float, str, tuple[str, ...]]] = {
    "margin": ("harmful queries: margin above the threshold (nats)", 1, "+.1f", (VERMILION, "white", BLUE)),
    "refusal_rate": ("harmful queries refused (%)", 100, ".0f", ("white", BLUE)),
    "over_refusal_rate": ("benign queries refused (%)", 100, ".0f", ("white", VERMILION)),
}
_CELL_HEIGHT, _MIN_CELL_WIDTH, _MIN_PANEL_WIDTH = (
    0.2,
    0.4,
    1.5,
)  # inches: a cell, and the least width of a panel
_ATTACK_PANEL_GAP, _ATTACK_FAMILY_GAP = 0.25, 0.06  # inches between panels, and between families
_MAX_ATTACKS_ABREAST = (
    6  # attacks up to which the panels stand side by side; more, and each stands below the last
)


def draw_attack_grid(cells: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw what is left of each defense under each attack; cells that generated text contradicts are hollow.

    >>> row = {"attack": "direct", "defense": "none", "family": "none", "margin": 1.5, "trusted": "trusted"}
    >>> cell = pd.DataFrame([row | {"refusal_rate": 0.9, "over_refusal_rate": 0.25}])
    >>> [text.get_text() for text in draw_attack_grid(cell).texts if text.get_gid()]
    ['+1.5', '90', '25']

    Args:
        cells: what `attack_cells` returned.
        ax: where to draw; its data units become inches, so that a new one is best.
    """
    attacks = list(dict.fromkeys(cells["attack"]))
    places, tall = _attack_row_offsets(cells)
    wide = max(_MIN_CELL_WIDTH, _MIN_PANEL_WIDTH / len(attacks))
    across = wide * len(attacks)
    with rc_context(RC_PARAMS):
        columns = [fit_text(_attack_label(name), 115, TEXT_SIZE, 1) for name in attacks]
        lettered = max(measure_text_width(name, TEXT_SIZE) for name in columns) / 72 + 0.08
        heads = {
            name: wrap_text(words, 72 * across, 8, "bold") for name, (words, *_) in _ATTACK_PANELS.items()
        }
        above = lettered + max(map(len, heads.values())) * 8 * LINE_HEIGHT / 72 + 0.06
        abreast = len(attacks) <= _MAX_ATTACKS_ABREAST
        step = (across + _ATTACK_PANEL_GAP, 0.0) if abreast else (0.0, -(tall + above + _ATTACK_PANEL_GAP))
        ax = ax or make_axes(across + 2 * step[0], tall + 2 * -step[1])
        ax.set_axis_off()
        for number, column in enumerate(_ATTACK_PANELS):
            left, top = number * step[0], number * step[1]
            _draw_attack_panel(ax, cells, column, places, attacks, (left, top, wide))
            for place, name in enumerate(columns):
                spot: Any = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": TEXT_SIZE}
                ax.text(left + (place + 0.5) * wide, top + 0.05, name, **spot)
            ax.text(left, top + lettered, "\n".join(heads[column]), va="bottom", size=8, weight="bold")
            if number == 0 or not abreast:
                _write_defense_names(ax, cells, places, left, top)
            if number == 2 or not abreast:
                _write_family_names(ax, cells, places, left + across, top)
        ax.set_xlim(0, across + 2 * step[0])
        ax.set_ylim(2 * step[1] - tall, 0)
    return ax


def _attack_row_offsets(cells: pd.DataFrame) -> tuple[dict[str, float], float]:
    """How far below the top each row begins, the undefended first, families together; and where all end."""
    first = cells.drop_duplicates("defense").set_index("defense")["family"]
    order = ["none", *FAMILY_STYLES, *sorted(set(first) - set(FAMILY_STYLES) - {"none"})]
    places, below, last = {}, 0.0, None
    for name, family in sorted(first.items(), key=lambda item: order.index(item[1])):
        below += _ATTACK_FAMILY_GAP * (last not in (None, family))
        places[str(name)], below, last = below, below + _CELL_HEIGHT, family
    return places, below


def _draw_attack_panel(
    ax: Axes,
    cells: pd.DataFrame,
    column: str,
    row_offsets: dict[str, float],
    attacks: list[str],
    corner_and_width: tuple[float, float, float],
) -> None:
    """Draw one measure of all cells, from a corner on, in columns of a width."""
    _, factor, form, colors = _ATTACK_PANELS[column]
    left, top, wide = corner_and_width
    values = (factor * cells[column].astype(float)).round(1) + 0.0  # no number is -0.0
    doubt = cells.get("trusted", pd.Series("", cells.index)) == "not trusted"
    margin = column == "margin"
    most = float(values[~doubt].abs().max()) if margin else 100.0
    span = Normalize(-most if margin else 0, most) if most > 0 else Normalize(-1, 1)
    shades = LinearSegmentedColormap.from_list(column, colors)
    for attack, defense, value, hollow in zip(cells["attack"], cells["defense"], values, doubt, strict=True):
        x, y = left + attacks.index(attack) * wide, top - row_offsets[defense] - _CELL_HEIGHT
        known = value == value
        red, green, blue, _ = shades(span(value)) if known and not hollow else (1, 1, 1, 1)
        edge: Any = {"edgecolor": GREY, "linestyle": ":"} if hollow else {"edgecolor": "white"}
        box = Rectangle((x + 0.01, y + 0.01), wide - 0.02, _CELL_HEIGHT - 0.02, linewidth=0.7, **edge)
        box.set_facecolor((red, green, blue))
        ax.add_patch(box)
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
        look: Any = {"color": "white" if dark else DARK if hollow else BLACK, "size": TEXT_SIZE - 0.5}
        look |= {"style": "italic"} if hollow else {}
        words = f"{value:{form}}".replace("-", "\N{MINUS SIGN}") if known else "\N{EN DASH}"
        gid = f"{column} {defense} {attack}"
        text = ax.text(
            x + wide / 2, y + _CELL_HEIGHT / 2, words, ha="center", va="center_baseline", gid=gid, **look
        )
        text.set_in_layout(False)  # lies inside of the axes: nothing to measure


def _write_defense_names(
    ax: Axes, cells: pd.DataFrame, row_offsets: dict[str, float], left: float, top: float
) -> None:
    controls = set(cells.loc[cells["family"] == "control", "defense"])
    for name, below in row_offsets.items():
        words = "undefended" if name == "none" else f"{name} (control)" if name in controls else name
        style: Any = {"ha": "right", "va": "center_baseline", "size": TEXT_SIZE}
        style |= {"color": DARK if name in controls else BLACK}
        ax.text(left - 0.06, top - below - _CELL_HEIGHT / 2, fit_text(words, 130, TEXT_SIZE, 1), **style)


def _write_family_names(
    ax: Axes, cells: pd.DataFrame, row_offsets: dict[str, float], right: float, top: float
) -> None:
    family = cells.drop_duplicates("defense").set_index("defense")["family"]
    told = {"none", "control"}
    for name, below in row_offsets.items():
        if family[name] not in told:
            told.add(family[name])
            style: Any = {"va": "center_baseline", "size": TEXT_SIZE, "style": "italic", "color": DARK}
            ax.text(
                right + 0.06,
                top - below - _CELL_HEIGHT / 2,
                fit_text(family[name], 90, TEXT_SIZE, 1),
                **style,
            )


def _attack_label(attack: str) -> str:
    return "no attack" if attack == "direct" else attack


_SIMILARITY_PANEL_GAP = 0.35  # inches between the panels


def draw_profile_similarity(profiles: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the cosine of each two defenses, a panel per contrast; blue is alike, orange is opposite.

    >>> row = {"attack": "direct", "defense": "a", "other": "b", "contrast": "shift", "cosine": -0.5}
    >>> [text.get_text() for text in draw_profile_similarity(pd.DataFrame([row])).child_axes[0].texts]
    ['−0.50', '−0.50']

    Args:
        profiles: `profiles.csv`, of one attack.
        ax: where to draw; it only lends its place to the panels.
    """
    check_one_attack(profiles)
    kinds = list(dict.fromkeys(profiles["contrast"]))
    names = list(dict.fromkeys([*profiles["defense"], *profiles["other"]]))
    cell = 0.36 if len(names) <= MAX_NUMBERED_DEFENSES else 0.17
    side = cell * len(names)
    step = max(side, 1.6) + _SIMILARITY_PANEL_GAP
    whole = len(kinds) * step - _SIMILARITY_PANEL_GAP, side
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(*whole)
        ax.set_axis_off()
        panels = [add_inset_axes(ax, whole, (number * step, 0, side, side)) for number in range(len(kinds))]
        set_panel_titles(panels, kinds)
        shown = [fit_text(name, 130, TEXT_SIZE, 1) for name in names]
        for number, (kind, panel) in enumerate(zip(kinds, panels, strict=True)):
            _draw_similarity_panel(panel, profiles[profiles["contrast"] == kind], names)
            panel.set_xticks(range(len(names)), shown, rotation=90, fontsize=TEXT_SIZE)
            panel.set_yticks(
                range(len(names)), shown if number == 0 else [""] * len(names), fontsize=TEXT_SIZE
            )
        bar = add_inset_axes(
            ax, whole, ((len(kinds) - 1) * step + side + 0.2, side - min(side, 1.5), 0.11, min(side, 1.5))
        )
        draw_color_scale(bar, 1.0, ["\N{MINUS SIGN}1 opposite", "0 unlike", "+1 same"])
    return ax


def _draw_similarity_panel(ax: Axes, rows: pd.DataFrame, defenses: list[str]) -> None:
    """Draw one contrast of all pairs on both sides of the diagonal."""
    values, sure = np.full((len(defenses),) * 2, np.nan), np.zeros((len(defenses),) * 2, dtype=bool)
    pairs = zip(rows["defense"], rows["other"], extract_estimates(rows, "cosine"), strict=True)
    for one, two, (value, low, high) in pairs:
        for row, column in ((one, two), (two, one)):
            if row != column:
                values[defenses.index(row), defenses.index(column)] = value
                sure[defenses.index(row), defenses.index(column)] = low > 0 or high < 0
    edges = np.arange(len(defenses) + 1) - 0.5
    look: Any = {
        "cmap": EFFECT_COLORS.with_extremes(bad=MISSING_COLOR),
        "norm": Normalize(-1, 1),
        "edgecolors": "white",
    }
    ax.pcolormesh(edges, edges, np.ma.masked_invalid(values), linewidth=0.6, gid="cosine", **look)
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value, certain = values[row, column], sure[row, column]
        words = (
            f"{round(value, 2) + 0.0:+.2f}"
            if len(defenses) <= MAX_NUMBERED_DEFENSES
            else "\N{BULLET}" * bool(certain)
        )
        style: Any = {"weight": "bold" if certain else "normal", "size": TEXT_SIZE - 1.0, "gid": "cosine"}
        style |= {"color": "white" if abs(value) > 0.7 else BLACK, "ha": "center", "va": "center_baseline"}
        ax.text(column, row, words.replace("-", "\N{MINUS SIGN}"), **style)
    ax.set_ylim(len(defenses) - 0.5, -0.5)
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)


def caption_profile_similarity(
    profiles: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None
) -> str:
    """Return the caption of the figure that `likeness.likeness` draws from these profiles."""
    few = len({*profiles["defense"], *profiles["other"]}) <= MAX_NUMBERED_DEFENSES
    sure = keep_if_intervals(profiles, f"{'Bold' if few else 'Dot'}: the 95\u00a0% interval excludes 0. ")
    return (
        "Cosine of what two defenses' parts (heads, MLPs and all others) write by direct logit attribution "
        f"{format_query_counts(profiles, counts)}, each pair drawn twice: 1, the same parts in the same proportions; 0, "
        f"unrelated. {CONTRASTS_SENTENCE}{sure}"
        f"{format_run_sentences(profiles, context)}"
    )
