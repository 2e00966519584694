"""Heat maps: defenses by attacks, interactions of pairs, and similarity of attribution profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.patches import Patch, Rectangle

from analysis.families import format_family
from analysis.plots.captions import (
    CONTRASTS_SENTENCE,
    CaptionContext,
    format_count_range,
    format_family_note,
    format_query_counts,
    format_run_sentences,
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
    get_width_scale,
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
from analysis.stats.tables import UNDEFENDED, Trust, has_judged_rates

# Column → title, factor, number format, and the colors from its lowest to its highest value.
_ATTACK_PANELS: dict[str, tuple[str, float, str, tuple[str, ...]]] = {
    "margin": ("harmful queries: margin above the threshold (nats)", 1, "+.1f", (VERMILION, "white", BLUE)),
    "refusal_rate": ("harmful queries refused (%)", 100, ".0f", ("white", BLUE)),
    "over_refusal_rate": ("benign queries refused (%)", 100, ".0f", ("white", VERMILION)),
}
_CELL_HEIGHT, _MIN_CELL_WIDTH, _MIN_PANEL_WIDTH = 0.22, 0.4, 1.5  # inches, of the attack grid
_ATTACK_PANEL_GAP = 0.25  # inches between two panels of the attack grid
_CELL_TEXT_WIDTH = 2.6  # font sizes that a number in a cell needs
_CATEGORY_CELL, _CATEGORY_GAP = (0.27, 0.19), 0.2  # inches: width and height of a cell, gap of two panels
_MIN_CATEGORY_PANEL = 1.6  # inches: the title needs them
_CATEGORY_PANELS = {
    True: ("harmful queries refused (%)", BLUE),
    False: ("benign queries refused (%)", VERMILION),
}
_MAX_ATTACKS_ABREAST = 6  # attacks up to which the panels are side by side instead of stacked
_MIN_INTERACTION_PANEL, _INTERACTION_PANEL_GAP, _FAMILY_STRIP_WIDTH = 2.6, 0.3, 0.06  # inches
_SIMILARITY_PANEL_GAP = 0.35  # inches between two panels of the similarity map


def draw_heatmap(
    ax: Axes,
    values: Float[np.ndarray, "rows columns"],
    limits: tuple[float, float],
    colors: Colormap = EFFECT_COLORS,
    labels: np.ndarray | None = None,
    bold: Bool[np.ndarray, "rows columns"] | None = None,
    missing_color: str = MISSING_COLOR,
    text_size: float = TEXT_SIZE - 0.5,
    **mesh_options: Any,
) -> None:
    """Draw a matrix as colored cells, the first row at the top; cell (row, column) has unit size.

    >>> ax = make_axes(1, 1)
    >>> draw_heatmap(ax, np.array([[0.5, np.nan]]), (-1, 1), labels=np.array([["a", "b"]]))
    >>> [text.get_text() for text in ax.texts]
    ['a']

    Args:
        ax: axes to draw on.
        values: matrix; NaN cells have the color of missing values and no label.
        limits: values of the first and the last color.
        colors: color map.
        labels: text of each cell, of the shape of `values`.
        bold: whether the text of a cell is bold.
        missing_color: color of NaN cells.
        text_size: font size of the labels.
        **mesh_options: passed to `pcolormesh`, such as `gid`, `linewidths` and `linecolor`.
    """
    import seaborn  # here, because it imports pyplot

    known = np.argwhere(np.isfinite(values))
    seaborn.heatmap(
        values,
        ax=ax,
        vmin=limits[0],
        vmax=limits[1],
        cmap=colors.with_extremes(bad=missing_color),
        annot=labels if labels is not None and len(known) else None,
        fmt="",
        annot_kws={"size": text_size, "va": "center_baseline"},
        cbar=False,
        xticklabels=False,
        yticklabels=False,
        **mesh_options,
    )
    ax.tick_params(length=0)
    for text, (row, column) in zip(ax.texts, known, strict=False):
        text.set_in_layout(False)  # inside the axes, so it need not be measured
        if bold is not None and bold[row, column]:
            text.set_fontweight("bold")


def draw_attack_grid(cells: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw margins and refusal rates of each defense under each attack; untrusted cells are hollow.

    Rates of judged responses need no trust in the readout.

    >>> row = {"attack": "direct", "defense": "none", "family": "none", "margin": 1.5, "trusted": "trusted"}
    >>> cell = pd.DataFrame([row | {"refusal_rate": 0.9, "over_refusal_rate": 0.25}])
    >>> [panel.texts[0].get_text() for panel in draw_attack_grid(cell).child_axes]
    ['+1.5', '90', '25']

    Args:
        cells: table from `build_attack_cells`.
        ax: axes that the panels are placed in; by default new ones.
    """
    attacks = list(dict.fromkeys(cells["attack"]))
    families = _order_defenses(cells)
    width = max(_MIN_CELL_WIDTH * len(attacks), _MIN_PANEL_WIDTH)
    height = _CELL_HEIGHT * len(families)
    with rc_context(RC_PARAMS):
        attack_names = [
            fit_text("no attack" if name == "direct" else name, 115, TEXT_SIZE, 1) for name in attacks
        ]
        titles = {
            name: wrap_text(title, 72 * width * get_width_scale(), 8, "bold")
            for name, (title, *_) in _ATTACK_PANELS.items()
        }
        names_height = max(measure_text_width(name, TEXT_SIZE) for name in attack_names) / 72 + 0.2
        title_height = max(map(len, titles.values())) * 8 * LINE_HEIGHT / 72
        abreast = len(attacks) <= _MAX_ATTACKS_ABREAST
        step_x = width + _ATTACK_PANEL_GAP if abreast else 0.0
        step_y = 0.0 if abreast else height + names_height + title_height + _ATTACK_PANEL_GAP
        size = width + 2 * step_x, height + 2 * step_y
        ax = ax or make_axes(*size)
        ax.set_axis_off()
        for index, column in enumerate(_ATTACK_PANELS):
            corner = index * step_x, size[1] - height - index * step_y
            panel = add_inset_axes(ax, size, (*corner, width, height))
            _draw_attack_panel(panel, cells, column, list(families), attacks)
            _separate_families(panel, list(families.values()), "rows", 6)
            panel.xaxis.tick_top()
            panel.set_xticks(np.arange(len(attacks)) + 0.5, attack_names, rotation=90, fontsize=TEXT_SIZE)
            panel.tick_params(length=0)
            panel.set_title("\n".join(titles[column]), loc="left", fontsize=8, weight="bold")
            if index == 0 or not abreast:
                _name_defense_rows(panel, families)
            if index == 2 or not abreast:
                _name_family_rows(panel, list(families.values()), len(attacks))
    return ax


def draw_interactions(cells: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how far each pair of defenses is from the sum of its members; blue is above the sum, orange below.

    >>> cell = {"attack": "direct", "first": "a", "second": "b", "family_first": "noise"}
    >>> cell |= {"family_second": "tuning", "interaction_shift": -1.25, "interaction_discrimination": 0.5}
    >>> ax = draw_interactions(pd.DataFrame([cell]))
    >>> [[text.get_text() for text in panel.texts] for panel in ax.child_axes]
    [['−1.2', '−1.2'], [], ['+0.50', '+0.50'], []]

    Args:
        cells: table from `build_interaction_cells`, of one attack.
        ax: axes that the panels are placed in; by default new ones.
    """
    families = _families_by_defense(check_one_attack(cells))
    numbered = len(families) <= MAX_NUMBERED_DEFENSES
    cell = 0.4 if numbered else 0.15
    side = cell * len(families)
    step = max(side, _MIN_INTERACTION_PANEL) + _INTERACTION_PANEL_GAP
    size = 2 * step - _INTERACTION_PANEL_GAP, side
    text_size = TEXT_SIZE if numbered else TEXT_SIZE - 0.7
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(*size)
        ax.set_axis_off()
        names = [fit_text(name, 115, text_size, 1) for name in families]
        for index, (column, (title, low_text, high_text)) in enumerate(INTERACTION_PANELS.items()):
            panel = add_inset_axes(ax, size, (index * step, 0, side, side))
            pairs = zip(cells["first"], cells["second"], extract_estimates(cells, column), strict=True)
            limit = _draw_pairs(panel, list(pairs), list(families))
            _separate_families(panel, list(families.values()), "both", 6 if numbered else 3)
            _draw_family_strips(panel, list(families.values()), _FAMILY_STRIP_WIDTH / cell)
            _name_pairs(panel, names, index == 0, text_size, pad=72 * _FAMILY_STRIP_WIDTH + 4)
            scale = add_inset_axes(ax, size, (index * step, side + 0.28, _MIN_INTERACTION_PANEL, 0.1))
            digits = 2 if limit < 1 else 1
            texts = [f"\N{MINUS SIGN}{limit:.{digits}f} {low_text}", "0", f"{high_text} +{limit:.{digits}f}"]
            draw_color_scale(scale, limit, texts, is_horizontal=True)
            lines = wrap_text(title, 72 * max(side, _MIN_INTERACTION_PANEL), 8, "bold")
            scale.set_title("\n".join(lines), loc="left", fontsize=8, weight="bold")
        key: list[Any] = [
            Patch(color=FAMILY_STYLES.get(family, OTHER_FAMILY_STYLE)[0], label=format_family(family))
            for family in dict.fromkeys(families.values())
        ]
        if len(cells) < len(families) * (len(families) - 1) / 2:
            key.append(Patch(color=MISSING_COLOR, label="pair was not run"))
        place_legend_beside(ax, key, title="family (strip)")
    return ax


def draw_profile_similarity(profiles: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the cosine similarity of each pair of defenses, a panel per contrast; blue is alike.

    >>> row = {"attack": "direct", "defense": "a", "other": "b", "contrast": "shift", "cosine": -0.5}
    >>> [text.get_text() for text in draw_profile_similarity(pd.DataFrame([row])).child_axes[0].texts]
    ['−0.50', '−0.50']

    Args:
        profiles: `profiles.csv`, of one attack.
        ax: axes that the panels are placed in; by default new ones.
    """
    contrasts = list(dict.fromkeys(check_one_attack(profiles)["contrast"]))
    defenses = list(dict.fromkeys([*profiles["defense"], *profiles["other"]]))
    side = (0.36 if len(defenses) <= MAX_NUMBERED_DEFENSES else 0.17) * len(defenses)
    step = max(side, 1.6) + _SIMILARITY_PANEL_GAP
    size = len(contrasts) * step - _SIMILARITY_PANEL_GAP, side
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(*size)
        ax.set_axis_off()
        panels = [
            add_inset_axes(ax, size, (index * step, 0, side, side)) for index, _ in enumerate(contrasts)
        ]
        set_panel_titles(panels, contrasts)
        names = [fit_text(name, 130, TEXT_SIZE, 1) for name in defenses]
        for contrast, panel in zip(contrasts, panels, strict=True):
            rows = profiles[profiles["contrast"] == contrast]
            pairs = zip(rows["defense"], rows["other"], extract_estimates(rows, "cosine"), strict=True)
            _draw_pairs(panel, list(pairs), defenses, limit=1.0, digits=2)
            _name_pairs(panel, names, panel is panels[0], TEXT_SIZE)
        height = min(side, 1.5)
        scale = add_inset_axes(
            ax, size, ((len(contrasts) - 1) * step + side + 0.2, side - height, 0.11, height)
        )
        draw_color_scale(scale, 1.0, ["\N{MINUS SIGN}1 opposite", "0 unrelated", "+1 same"])
    return ax


def draw_categories(cells: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the refusal rates of each category of queries under each defense, a panel per class.

    >>> row = {"attack": "direct", "defense": "none", "family": "none", "category": "theft", "n": 5}
    >>> cells = pd.DataFrame([row | {"harmful": True, "refused": 0.4}])
    >>> [panel.texts[0].get_text() for panel in draw_categories(cells).child_axes]
    ['40']

    Args:
        cells: table from `build_category_cells`, of one attack.
        ax: axes that the panels are placed in; by default new ones.
    """
    families = _order_defenses(check_one_attack(cells))
    defenses, height = list(families), _CATEGORY_CELL[1] * len(families)
    categories = {
        harmful: list(dict.fromkeys(cells.loc[cells["harmful"] == harmful, "category"].astype(str)))
        for harmful in (True, False)
        if (cells["harmful"] == harmful).any()
    }
    widths = {
        harmful: max(_CATEGORY_CELL[0] * len(names), _MIN_CATEGORY_PANEL)
        for harmful, names in categories.items()
    }
    size = sum(widths.values()) + _CATEGORY_GAP * (len(widths) - 1), height
    left = 0.0
    with rc_context(RC_PARAMS):
        ax = ax or make_axes(*size)
        ax.set_axis_off()
        shown_names = _name_categories(cells)
        names_height = 8 + max(measure_text_width(name, TEXT_SIZE) for name in shown_names.values())
        for harmful, names in categories.items():
            panel = add_inset_axes(ax, size, (left, 0, widths[harmful], height))
            left += widths[harmful] + _CATEGORY_GAP
            rows = cells[cells["harmful"] == harmful]
            values = np.full((len(defenses), len(names)), np.nan)
            for defense, category, refused in zip(
                rows["defense"], rows["category"].astype(str), rows["refused"], strict=True
            ):
                values[defenses.index(defense), names.index(category)] = 100 * refused
            labels = np.array([[f"{value:.0f}" for value in row] for row in values], dtype=object)
            title, color = _CATEGORY_PANELS[harmful]
            color_map = LinearSegmentedColormap.from_list(title, ("white", color))
            lines: Any = {"linewidths": 0.8, "linecolor": "white", "gid": title}
            draw_heatmap(
                panel,
                values,
                (0, 100),
                color_map,
                labels,
                text_size=_fit_cell_text(_CATEGORY_CELL[0]),
                **lines,
            )
            _separate_families(panel, list(families.values()), "rows", 3)
            shown = [shown_names[harmful, name] for name in names]
            panel.xaxis.tick_top()
            panel.set_xticks(np.arange(len(names)) + 0.5, shown, rotation=90, fontsize=TEXT_SIZE)
            panel.tick_params(length=0)
            panel.set_title(title, loc="left", fontsize=8, weight="bold", y=1, pad=names_height)
            if harmful == next(iter(categories)):
                _name_defense_rows(panel, families)
        _name_family_rows(panel, list(families.values()), len(names))
    return ax


def caption_categories(cells: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_categories`."""
    attack = cells["attack"].iloc[0]
    is_judged = has_judged_rates(cells)
    basis = (
        f"by the {context.response_basis or 'judged responses'}"
        if is_judged
        else "by the readout (first-token margin above the threshold)"
    )
    setting = context.format_response_sentences(attack) if is_judged else context.format_sentences(attack)
    widest = 100 * float((cells["refused_high"] - cells["refused_low"]).max())
    return (
        f"Share refused of the queries of each category, {basis}. Beside each category: its number of "
        f"queries. Rates of few queries are uncertain: the widest interval spans {widest:.0f} points."
        f"{format_family_note(cells['family'])} {setting}"
    )


def caption_attack_grid(cells: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_attack_grid`."""
    is_untrusted = "trusted" in cells and (cells["trusted"] == Trust.NOT_TRUSTED).any()
    is_judged = has_judged_rates(cells)
    hollow = ""
    if is_untrusted:
        reason = "the margin is not trusted, because " * is_judged + "generated text contradicts the readout"
        hollow = f" Hollow and in italics: {reason}."
    decided = (
        f"refused, by the {context.response_basis or 'judged responses'}"
        if is_judged
        else "whose margin exceeds the threshold"
    )
    widest = max(
        (cells[f"{x}_high"] - cells[f"{x}_low"]).max() for x in ("refusal_rate", "over_refusal_rate")
    )
    width = f"; the widest interval of a rate spans {100 * widest:.0f} points" if widest == widest else ""
    if is_judged:  # the table holds intervals of the rates only
        context = replace(context, interval="95\u00a0% Wilson, of each rate")
    harmful, benign = format_count_range(cells["n_harmful"]), format_count_range(cells["n_benign"])
    return (
        f"Each cell: the same {harmful} harmful and {benign} benign queries under the attack of the column "
        "and the defense of the row. First panel: mean first-token margin of the harmful queries minus the "
        "threshold; positive (blue) refuses. Second and third panels: share of harmful and of benign queries "
        f"{decided}.{hollow}{format_family_note(cells['family'])} Intervals are in the table "
        f"beside the figure{width}. "
        f"{context.format_sentences('by column')}"
    )


def caption_interactions(cells: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_interactions`."""
    is_numbered = len({*cells["first"], *cells["second"]}) <= MAX_NUMBERED_DEFENSES
    has_intervals = bool(cells.filter(like="_low").notna().any(axis=None))
    values = cells[["interaction_shift", "interaction_discrimination"]]
    families = format_family_note([*cells["family_first"], *cells["family_second"]])
    dash = "\N{EN DASH}: no value. " if is_numbered and values.isna().any(axis=None) else ""
    pairs = (
        f"the {len(cells)} pairs of defenses that were"
        if len(cells) > 1
        else "the one pair of defenses that was"
    )
    mark = f"{'Bold' if is_numbered else 'Dot'}: the 95\u00a0% interval excludes 0. " if has_intervals else ""
    return (
        f"Interactions of {pairs} run as stacks (both applied together), each drawn twice, "
        f"{format_query_counts(cells, context.query_counts)}: observed effect of the stack minus the sum of "
        "the effects of its members, for shift (mean of the two class means of the margin's change against "
        "the undefended model) and discrimination (harmful minus benign). 0 (white): no interaction. Each "
        f"panel has its own color scale.{families} {mark}{dash}"
        f"{omit_interval_note(context, not has_intervals).format_sentences(cells['attack'].iloc[0])}"
    )


def caption_profile_similarity(profiles: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of `draw_profile_similarity`."""
    is_numbered = len({*profiles["defense"], *profiles["other"]}) <= MAX_NUMBERED_DEFENSES
    mark = f"{'Bold' if is_numbered else 'Dot'}: the 95\u00a0% interval excludes 0. "
    return (
        "Cosine similarity of two defenses' attribution profiles (direct logit attribution to heads, MLPs "
        f"and all other components) {format_query_counts(profiles, context.query_counts)}, each pair drawn "
        "twice: 1, the same components in the same proportions; 0, unrelated. "
        f"{CONTRASTS_SENTENCE}{keep_if_intervals(profiles, mark)}{format_run_sentences(profiles, context)}"
    )


def _fit_cell_text(cell_width: float) -> float:
    """Return the font size of numbers in cells of that width (inches), in axes as they are scaled now."""
    return min(TEXT_SIZE - 0.5, 72 * cell_width * get_width_scale() / _CELL_TEXT_WIDTH)


def _name_categories(cells: pd.DataFrame) -> dict[tuple[bool, str], str]:
    """Return the name of each class and category with its number of queries."""
    return {
        (bool(harmful), str(category)): fit_text(
            f"{category} ({format_count_range(rows['n'])})", 115, TEXT_SIZE, 1
        )
        for (harmful, category), rows in cells.groupby(["harmful", "category"], sort=False)
    }


def _order_defenses(cells: pd.DataFrame) -> dict[str, str]:
    """Return the family of each defense, the undefended model first and families together."""
    families = cells.drop_duplicates("defense").set_index("defense")["family"]
    order = ["none", *FAMILY_STYLES, *sorted(set(families) - set(FAMILY_STYLES) - {"none"})]
    return {
        str(name): str(family)
        for name, family in sorted(families.items(), key=lambda item: order.index(item[1]))
    }


def _draw_attack_panel(
    ax: Axes, cells: pd.DataFrame, column: str, defenses: list[str], attacks: list[str]
) -> None:
    """Draw one measure of all cells; untrusted cells have a dotted frame and no color."""
    _, factor, number_format, colors = _ATTACK_PANELS[column]
    shape = len(defenses), len(attacks)
    values, labels = np.full(shape, np.nan), np.full(shape, "", dtype=object)
    untrusted = np.zeros(shape, dtype=bool)
    numbers = (factor * cells[column].astype(float)).round(1) + 0.0  # no number is -0.0
    is_untrusted = cells.get("trusted", pd.Series("", cells.index)) == Trust.NOT_TRUSTED
    if column != "margin" and has_judged_rates(cells):
        is_untrusted = pd.Series(False, cells.index)
    for attack, defense, value, untrusted_value in zip(
        cells["attack"], cells["defense"], numbers, is_untrusted, strict=True
    ):
        place = defenses.index(defense), attacks.index(attack)
        values[place], untrusted[place] = value, untrusted_value
        labels[place] = (
            f"{value:{number_format}}".replace("-", "\N{MINUS SIGN}") if value == value else "\N{EN DASH}"
        )
    shown = np.where(untrusted, np.nan, values)
    limits = (0.0, 100.0)
    if column == "margin":
        largest = float(np.nanmax(np.abs(shown))) if np.isfinite(shown).any() else 0.0
        limits = -(largest or 1.0), largest or 1.0
    color_map = LinearSegmentedColormap.from_list(column, colors)
    cell_lines: Any = {"linewidths": 1.2, "linecolor": "white", "gid": column}
    cell_lines["text_size"] = _fit_cell_text(max(_MIN_CELL_WIDTH, _MIN_PANEL_WIDTH / len(attacks)))
    draw_heatmap(ax, shown, limits, color_map, labels, missing_color="white", **cell_lines)
    for row, attack_place in np.argwhere(~np.isfinite(shown) & (labels != "")).tolist():
        style: Any = {"color": BLACK}
        if untrusted[row, attack_place]:
            style = {"color": DARK, "style": "italic"}
            frame: Any = {"fill": False, "edgecolor": GREY, "linestyle": ":", "linewidth": 0.7}
            ax.add_patch(Rectangle((attack_place + 0.04, row + 0.08), 0.92, 0.84, **frame))
        _write_in_cell(ax, row, attack_place, str(labels[row, attack_place]), **style)


def _write_in_cell(ax: Axes, row: int, column: int, text: str, **style: Any) -> None:
    centered: Any = {"size": TEXT_SIZE - 0.5, "ha": "center", "va": "center_baseline"}
    ax.text(column + 0.5, row + 0.5, text, **centered, **style).set_in_layout(False)


def _name_defense_rows(ax: Axes, families: Mapping[str, str]) -> None:
    """Write the names of the defenses at the left; controls are grey."""
    names = [
        "undefended" if name == UNDEFENDED else f"{name} (control)" if family == "control" else name
        for name, family in families.items()
    ]
    shown = [fit_text(name, 130, TEXT_SIZE, 1) for name in names]
    ax.set_yticks(np.arange(len(shown)) + 0.5, shown, fontsize=TEXT_SIZE)
    for label, family in zip(ax.get_yticklabels(), families.values(), strict=True):
        label.set_color(DARK if family == "control" else BLACK)


def _name_family_rows(ax: Axes, families: Sequence[str], n_columns: int) -> None:
    """Write each family's name at the right of its first row."""
    style: Any = {"va": "center_baseline", "size": TEXT_SIZE, "style": "italic", "color": DARK}
    for row, family in enumerate(families):
        if family not in ("none", "control", *families[:row]):
            ax.annotate(
                fit_text(format_family(family), 90, TEXT_SIZE, 1),
                (n_columns, row + 0.5),
                (4, 0),
                textcoords="offset points",
                annotation_clip=False,
                gid="family",
                **style,
            )


def _separate_families(ax: Axes, families: Sequence[str], direction: str, line_width: float) -> None:
    """Draw white gaps between the rows, or the rows and the columns, of different families."""
    gap: Any = {"color": "white", "linewidth": line_width, "zorder": 1.5, "gid": "gap"}
    for place in range(1, len(families)):
        if families[place] != families[place - 1]:
            ax.axhline(place, **gap)
            if direction == "both":
                ax.axvline(place, **gap)


def _families_by_defense(cells: pd.DataFrame) -> dict[str, str]:
    """Return the family of each defense of the pairs, families together."""
    families = dict(zip(cells["first"], cells["family_first"], strict=True))
    families |= dict(zip(cells["second"], cells["family_second"], strict=True))
    order = [*FAMILY_STYLES, *sorted(set(families.values()) - set(FAMILY_STYLES))]
    return dict(sorted(families.items(), key=lambda item: (order.index(item[1]), item[0])))


def _draw_pairs(
    ax: Axes,
    pairs: Sequence[tuple[str, str, Float[np.ndarray, " 3"]]],
    defenses: list[str],
    limit: float | None = None,
    digits: int | None = None,
) -> float:
    """Draw the estimates of pairs on both sides of the diagonal; return the value of the darkest color.

    Args:
        ax: axes to draw on.
        pairs: two defenses and their estimate with its interval.
        defenses: rows and columns.
        limit: value of the darkest color; by default the largest estimate.
        digits: of the numbers; by default one, or two if all estimates are below one.
    """
    shape = len(defenses), len(defenses)
    values, known_pair = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    excludes_zero = np.zeros(shape, dtype=bool)
    for first, second, (value, low, high) in pairs:
        for place in (
            (defenses.index(first), defenses.index(second)),
            (defenses.index(second), defenses.index(first)),
        ):
            values[place], known_pair[place] = value, True
            excludes_zero[place] = low > 0 or high < 0
    np.fill_diagonal(values, np.nan)
    if limit is None:
        limit = (float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0) or 1.0
    digits = (2 if limit < 1 else 1) if digits is None else digits
    numbered = len(defenses) <= MAX_NUMBERED_DEFENSES
    labels = np.array(
        [
            f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
            if numbered
            else "\N{BULLET}" * bool(is_sure)
            for value, is_sure in zip(values.ravel(), excludes_zero.ravel(), strict=True)
        ],
        dtype=object,
    ).reshape(shape)
    cell_lines: Any = {"linewidths": 0.6, "linecolor": "white", "gid": "pairs"}
    cell_lines |= {"text_size": TEXT_SIZE - (0.5 if digits < 2 else 1.0)}
    draw_heatmap(ax, values, (-limit, limit), labels=labels, bold=excludes_zero, **cell_lines)
    blank = np.eye(len(defenses), dtype=bool) | (known_pair & np.isnan(values))
    for row, column in np.argwhere(blank).tolist():
        ax.add_patch(Rectangle((column, row), 1, 1, color="white", linewidth=0, zorder=1.2))
        if row != column and numbered:
            _write_in_cell(ax, row, column, "\N{EN DASH}")
    return limit


def _name_pairs(
    ax: Axes, names: Sequence[str], with_row_names: bool, text_size: float, pad: float = 3.0
) -> None:
    """Write the names of the defenses below the columns and, if wanted, beside the rows."""
    places = np.arange(len(names)) + 0.5
    ax.set_xticks(places, names, rotation=90, fontsize=text_size)
    ax.set_yticks(places, names if with_row_names else [""] * len(names), fontsize=text_size, rotation=0)
    ax.tick_params(length=0, pad=pad)


def _draw_family_strips(ax: Axes, families: Sequence[str], width: float) -> None:
    """Draw a strip of the family's color left of each row and below each column; width in cells."""
    for place, family in enumerate(families):
        color = FAMILY_STYLES.get(family, OTHER_FAMILY_STYLE)[0]
        style: Any = {"color": color, "linewidth": 0, "clip_on": False, "gid": "family"}
        ax.add_patch(Rectangle((-1.3 * width, place), width, 1, **style))
        ax.add_patch(Rectangle((place, len(families) + 0.3 * width), 1, width, **style))
