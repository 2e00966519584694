"""Tables behind the figures, computed from the tables of a run; never imports matplotlib."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.stats.ensembles import ALONE, REPORT_SPLIT, SELECTION_SPLIT, STACK
from analysis.stats.pareto import find_undominated
from analysis.stats.tables import (
    INTERVAL_SUFFIXES,
    READOUT_PART,
    UNDEFENDED,
    Basis,
    has_judged_rates,
    iterate_rows,
)

LINEAR_RANGE = 0.5  # SDs or nats; beyond it the axes of a stretched plane are logarithmic
# Unit of the plane → columns of shift and discrimination. SDs are free of scale, and the default.
PLANE_COLUMNS = {
    "SD": ("scaled_shift", "scaled_discrimination"),
    "nats": ("shift", "discrimination"),
}
RATE_NAMES = ("refusal_rate", "over_refusal_rate")
MAX_SHAPED_VOTES = 2000  # votes up to which each has a shape; more are drawn as specks
MAX_BARRED_STACKS = 40  # stacks up to which their intervals are drawn
MAX_NUMBERED_DEFENSES = 12  # defenses up to which a heat map of pairs has numbers in its cells
# Measure → label, factor, and whether it is a share, whose axes are the same in every run.
FORECAST_PANELS = {
    "shift": ("shift (nats)", 1, False),
    "discrimination": ("discrimination (nats)", 1, False),
    "delta_auroc": ("change of AUROC", 1, False),
    "refusal_rate": ("harmful queries refused (%)", 100, True),
    "over_refusal_rate": ("benign queries refused (%)", 100, True),
}
INTERACTION_PANELS = {
    "interaction_shift": ("interaction on shift (nats)", "refuses less", "refuses more"),
    "interaction_discrimination": (
        "interaction on discrimination (nats)",
        "separates worse",
        "separates better",
    ),
}
CONTRAST_LABELS = {"shift": "shift (nats)", "discrimination": "discrimination (nats)"}
MAX_NAMED_CANDIDATES = 15  # points of the front that have a number and a legend entry
BENIGN_COLUMN, HARMFUL_COLUMN, ATTACKED_COLUMN = (
    f"benign_{REPORT_SPLIT}",
    f"harmful_{REPORT_SPLIT}",
    f"attacked_{REPORT_SPLIT}",
)
FigureTables = dict[str, pd.DataFrame]
_MAX_ATTACKS_DRAWN = 4  # attacks up to which each has its own figures
_MAX_STEM_NAME_LENGTH = 80  # characters of a name in a file's stem
# Kind of figure → table that it is built from, and whether each defense has its own figure.
_MECHANISM_SOURCES = {
    "layers": ("layers", False),
    "parts": ("parts", True),
    "top": ("parts", True),
    "directions": ("directions", False),
    "patches": ("patches", True),
    "cuts": ("cuts", False),
    "weights": ("weights", True),
    "profiles": ("profiles", False),
}
# Corner of the 2 × 2 of tuned weights and secret prompt → label.
SQUARE_CORNERS = {
    "neither": "neither",
    "no_weights": "secret only",
    "no_secret": "weights only",
    "both": "weights and secret",
}
OTHER_RUN_SOURCES = ("defense", "undefended")  # activations of the other run, not of a control


def build_margin_curves(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return densities of the margin, all with the same bandwidth so that widths are comparable.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, True, False, False],
    ...                        "margin": [0.0, 1.0, -3.0, -2.0]})
    >>> curves = build_margin_curves(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=-1.0)
    >>> curves.groupby("harmful")["median"].first().to_dict()
    {False: -2.5, True: 0.5}

    Args:
        scores: `scores.csv`; rows whose margin is not finite are omitted.
        summary: `summary.csv`, for families and refusal rates; a defense without a row has neither.
        threshold: margin above which the readout says "refuse", nats.

    Returns:
        One row per attack, defense, class and point of the margin axis (nats). `density` is per nat,
        `readout_refused` is the share of the class whose margin exceeds the threshold, `bandwidth` the SD of
        the Gaussian kernel (nats).
    """
    frame = scores[np.isfinite(scores["margin"].astype(float))]
    groups = list(frame.groupby(["attack", "defense", "harmful"], sort=False)["margin"])
    # Silverman's rule. A common bandwidth is why this is not scipy.stats.gaussian_kde.
    widths = [0.9 * margin.std() * len(margin) ** -0.2 for _, margin in groups if len(margin) > 1]
    typical = float(np.median(widths)) if widths else 0.0
    bandwidth = typical if typical > 0 else 0.25  # all margins equal: any positive width is fine
    # In older summaries, the rates of the readout are the only ones.
    prefix = "readout_" if "readout_refusal_rate" in summary else ""
    curves = [pd.DataFrame(columns=["attack", "defense", "family", "harmful", "margin", "density"])]
    for (attack, defense, harmful), margin in groups:
        values = margin.to_numpy(float)
        grid = np.linspace(values.min() - 3 * bandwidth, values.max() + 3 * bandwidth, 121)
        kernels = np.exp(-0.5 * ((grid[:, None] - values) / bandwidth) ** 2)
        row = _find_summary_row(summary, attack, defense)
        rate = prefix + RATE_NAMES[not harmful]
        known = {
            "attack": attack,
            "defense": defense,
            "family": row["family"],
            "harmful": bool(harmful),
            "n": len(values),
            "median": float(np.median(values)),
            **{f"readout_refused{end}": row.get(f"{rate}{end}", np.nan) for end in INTERVAL_SUFFIXES},
            "threshold": threshold,
            "bandwidth": bandwidth,
        }
        density = kernels.mean(axis=1) / (bandwidth * np.sqrt(2 * np.pi))
        curves.append(pd.DataFrame({**known, "margin": grid, "density": density}))
    return pd.concat(curves[1:], ignore_index=True) if groups else curves[0]


def build_plane_points(summary: pd.DataFrame) -> pd.DataFrame:
    """Return shift and discrimination of each defense with intervals; undefended is the origin.

    Both are in nats, and in within-class SDs if the summary has them; so are the positions of matched
    controls (`control_shift`, …) if there are any.

    >>> row = {"attack": "direct", "defense": "smoothllm", "family": "noise", "n_harmful": 9, "n_benign": 9}
    >>> row |= {f"{x}{end}": 1.0 for x in ("shift", "discrimination") for end in INTERVAL_SUFFIXES}
    >>> build_plane_points(pd.DataFrame([row, row | {"defense": "none"}]))["defense"].tolist()
    ['smoothllm']
    """
    units = [PLANE_COLUMNS[unit] for unit in ("SD", "nats") if set(PLANE_COLUMNS[unit]) <= set(summary)]
    numbers = [f"{x}{end}" for columns in units for x in columns for end in INTERVAL_SUFFIXES]
    names = ["attack", "defense", "family", "n_harmful", "n_benign", *numbers]
    controls = [f"control_{x}" for columns in units for x in columns]
    names += [name for name in ("trusted", *controls) if name in summary]
    return summary.loc[summary["defense"] != UNDEFENDED, names].reset_index(drop=True)


def choose_plane_unit(points: pd.DataFrame, unit: str = "SD") -> str:
    """Return the unit of the plane's axes: the wanted one, or nats for a table of an older run.

    >>> choose_plane_unit(pd.DataFrame(columns=["shift", "discrimination"]))
    'nats'

    Args:
        points: table from `build_plane_points`.
        unit: SD or nats.

    Raises:
        ValueError: if there is no such unit.
    """
    if unit not in PLANE_COLUMNS:
        raise ValueError(f"no unit {unit!r} of the plane; it is drawn in {' or '.join(PLANE_COLUMNS)}")
    return unit if set(PLANE_COLUMNS[unit]) <= set(points) else "nats"


def build_refusal_points(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the refusal rates of each condition by judged responses; no rows if none were judged.

    >>> row = {"attack": "direct", "defense": "none", "family": "none", "based_on": "responses"}
    >>> row |= {"n_harmful": 9, "n_benign": 9, "n_responses": 18}
    >>> row |= {f"{x}{end}": 0.5 for x in RATE_NAMES for end in INTERVAL_SUFFIXES}
    >>> [len(build_refusal_points(pd.DataFrame(rows, columns=[*row]))) for rows in ([row], [])]
    [1, 0]

    Args:
        summary: `summary.csv`.

    Returns:
        Rates of harmful (`refusal_rate`) and of benign queries (`over_refusal_rate`) with their intervals,
        0 to 1; NaN in a condition without judged responses.
    """
    if "based_on" not in summary or "n_responses" not in summary:
        return pd.DataFrame(columns=["attack", "defense", "family"])
    rates = [f"{x}{end}" for x in RATE_NAMES for end in INTERVAL_SUFFIXES]
    columns = ["attack", "defense", "family", "n_harmful", "n_benign", "n_responses", *rates]
    columns += [f"control_{x}" for x in RATE_NAMES if f"control_{x}" in summary]
    rows = summary.loc[summary["based_on"] == Basis.RESPONSES, columns].reset_index(drop=True)
    return rows if rows["refusal_rate"].notna().any() else rows[:0]


def build_roc_points(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return the refusal rates of harmful and of benign queries for every cut, from the highest margin down.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False],
    ...                        "margin": [1.0, 0.0]})
    >>> points = build_roc_points(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=0.5)
    >>> points[["cut", "benign_refused", "harmful_refused", "operating"]].values.tolist()
    [[1.0, 0.0, 0.0, False], [0.5, 0.0, 1.0, True], [0.0, 0.0, 1.0, False], [-inf, 1.0, 1.0, False]]

    Args:
        scores: `scores.csv`; rows whose margin is not finite are omitted.
        summary: `summary.csv`, for families and AUROC.
        threshold: threshold of the run, nats; in its row `operating` is true.

    Returns:
        One row per attack, defense and cut (nats; a margin above it counts as refusal). A defense scored on
        one class only has no curve: the rates of the other class are NaN.
    """
    curves = [
        pd.DataFrame(columns=["attack", "defense", "family", "cut", "benign_refused", "harmful_refused"])
    ]
    frame = scores[np.isfinite(scores["margin"].astype(float))]
    for (attack, defense), group in frame.groupby(["attack", "defense"], sort=False):
        margin, harmful = group["margin"].to_numpy(float), group["harmful"].to_numpy(bool)
        # Straight lines between these points count ties as half a win, as the AUROC does. Not
        # sklearn.metrics.roc_curve, which has no point at the threshold and needs both classes.
        cut = np.unique([*margin, threshold, -np.inf])[::-1]
        margins = {is_harmful: np.sort(margin[harmful == is_harmful]) for is_harmful in (True, False)}
        rate = {
            is_harmful: 1 - np.searchsorted(values, cut, "right") / len(values) if len(values) else np.nan
            for is_harmful, values in margins.items()
        }
        row = _find_summary_row(summary, attack, defense)
        known = {
            "attack": attack,
            "defense": defense,
            "family": row["family"],
            "n_harmful": len(margins[True]),
            "n_benign": len(margins[False]),
            **{
                f"{x}{end}": row.get(f"{x}{end}", np.nan)
                for x in ("auroc", "delta_auroc")
                for end in INTERVAL_SUFFIXES
            },
            "threshold": threshold,
        }
        drawn = {"cut": cut, "benign_refused": rate[False], "harmful_refused": rate[True]}
        curves.append(pd.DataFrame({**known, **drawn, "operating": cut == threshold}))
    return pd.concat(curves[1:], ignore_index=True) if len(curves) > 1 else curves[0]


def build_attack_cells(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return mean harmful margin and both refusal rates of each defense under each attack.

    >>> scores = pd.DataFrame({"attack": "persona", "defense": "none", "harmful": [True, False],
    ...                        "margin": [1.0, 0.0]})
    >>> row = {"attack": "persona", "defense": "none", "family": "none", "n_harmful": 1, "n_benign": 1}
    >>> row |= {f"{x}{end}": 1.0 for x in ("refusal_rate", "over_refusal_rate") for end in INTERVAL_SUFFIXES}
    >>> float(build_attack_cells(scores, pd.DataFrame([row]), threshold=0.25)["margin"].iloc[0])
    0.75

    Args:
        scores: `scores.csv`.
        summary: `summary.csv`.
        threshold: margin above which the readout says "refuse", nats.

    Returns:
        One row per row of the summary; `margin` is relative to the threshold (nats; positive refuses).
    """
    rates = [f"{x}{end}" for x in RATE_NAMES for end in INTERVAL_SUFFIXES]
    columns = ["attack", "defense", "family", "n_harmful", "n_benign", *rates]
    columns += [name for name in ("based_on", "trusted") if name in summary]
    mean = scores[scores["harmful"]].groupby(["attack", "defense"])["margin"].mean().sub(threshold)
    return summary[columns].merge(mean.reset_index(), "left", ["attack", "defense"])


def check_one_attack(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame unchanged after checking that it holds exactly one attack.

    >>> check_one_attack(pd.DataFrame({"attack": ["direct", "prefix"]}))
    Traceback (most recent call last):
    ValueError: one figure shows one attack, got 'direct', 'prefix': keep the rows of one of them

    Raises:
        ValueError: if it holds several attacks or no rows.
    """
    attacks = [repr(str(attack)) for attack in frame["attack"].unique()]
    if len(attacks) != 1:
        got = ", ".join(attacks) or "no rows"
        raise ValueError(f"one figure shows one attack, got {got}: keep the rows of one of them")
    return frame


def is_stretched(points: pd.DataFrame, unit: str = "nats", column: str | None = None) -> bool:
    """Return whether a few of many points are so far out that the others would be indistinguishable.

    >>> is_stretched(pd.DataFrame({"shift": [0.1] * 11 + [20.0], "discrimination": 0.0}))
    True

    Args:
        points: table from `build_plane_points`.
        unit: unit of the axes: SD or nats.
        column: the only axis to look at; by default both.
    """
    columns = PLANE_COLUMNS[unit] if column is None else [column]
    far = points[[*columns]].abs().max(axis=1).dropna()
    return len(far) > 10 and bool(far.max() > 6 * far.quantile(0.75))


def build_layer_points(layers: pd.DataFrame, half_layers: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the logit lens of each defense with the layer from which half of the effect is reached.

    >>> layers = pd.DataFrame({"attack": "direct", "defense": "a", "layer": [0, 1], "shift": [0.0, 1.0]})
    >>> row = {"attack": "direct", "defense": "a", "contrast": "shift", "half": 1}
    >>> build_layer_points(layers, pd.DataFrame([row]))["shift_half"].tolist()
    [1, 1]

    Args:
        layers: `layers.csv`.
        half_layers: `half.csv`.
    """
    points = layers.reset_index(drop=True)
    if half_layers is None:
        return points
    for contrast in CONTRAST_LABELS:
        rows = half_layers[half_layers["contrast"] == contrast]
        renamed = {f"half{end}": f"{contrast}_half{end}" for end in INTERVAL_SUFFIXES if f"half{end}" in rows}
        columns = rows[["attack", "defense", *renamed]].rename(columns=renamed)
        points = points.merge(columns, "left", ["attack", "defense"]) if len(rows) else points
    return points


def build_forecast_points(rows: pd.DataFrame, split: str = REPORT_SPLIT) -> pd.DataFrame:
    """Return the observed ensembles under the first attack, with the columns that the figure draws.

    >>> row = {"attack": "direct", "split": "test", "members": "a+b", "how": "mean", "kind": "intra"}
    >>> row |= {f"{side}_{x}": 0.5 for side in ("predicted", "observed") for x in FORECAST_PANELS}
    >>> rows = pd.DataFrame([row, row | {"members": "a", "how": "alone"}])
    >>> build_forecast_points(rows)["members"].tolist()
    ['a+b']

    Args:
        rows: `ensembles.csv`.
        split: split of the queries.
    """
    observed = rows[(rows["attack"] == rows["attack"].iloc[0]) & (rows["split"] == split)]
    observed = observed[(observed["how"] != ALONE) & observed["observed_shift"].notna()]
    sides = ("predicted_{}", "observed_{}", "observed_{}_low", "observed_{}_high")
    columns = [
        "attack",
        "split",
        "members",
        "how",
        "kind",
        "predicted_on",
        *(side.format(measure) for measure in FORECAST_PANELS for side in sides),
    ]
    return observed[[name for name in columns if name in observed]].reset_index(drop=True)


def build_part_cells(parts: pd.DataFrame) -> pd.DataFrame:
    """Return the components that belong to a layer: all but the embedding and the final bias.

    The remainder of a readout that is not linear becomes columns, `readout_shift` and so on.

    >>> build_part_cells(pd.DataFrame({"layer": [None, 0], "kind": ["embedding", "mlp"]}))["kind"].tolist()
    ['mlp']
    """
    cells = parts[to_numbers(parts["layer"]).notna()].reset_index(drop=True)
    for remainder in iterate_rows(parts[parts["kind"] == READOUT_PART]):
        columns = [f"{name}{end}" for name in CONTRAST_LABELS for end in INTERVAL_SUFFIXES]
        cells = cells.assign(**{f"readout_{name}": remainder[name] for name in columns if name in remainder})
    return cells


def build_interaction_cells(
    rows: pd.DataFrame, families: Mapping[str, str], split: str = REPORT_SPLIT
) -> pd.DataFrame:
    """Return the interaction of each pair run as a stack under the first attack: observed minus the sum.

    >>> row = {"attack": "direct", "split": "test", "members": "a+b/c", "how": "stack", "size": 2}
    >>> row |= {"observed_shift": 1.0, "interaction_shift": 0.5, "interaction_discrimination": 0.25}
    >>> cells = build_interaction_cells(pd.DataFrame([row]), {"a": "noise"})
    >>> cells[["second", "family_second"]].values.tolist()
    [['b/c', 'other']]

    Args:
        rows: `ensembles.csv`.
        families: family of each defense.
        split: split of the queries.

    Returns:
        `first` and `second` with their families, and the interactions on shift and discrimination (nats) with
        their intervals, NaN if they are missing.
    """
    rows = rows[(rows["attack"] == rows["attack"].iloc[0]) & (rows["split"] == split)]
    pairs = rows[(rows["how"] == STACK) & (rows["size"] == 2) & rows["observed_shift"].notna()]
    members = [str(name).split("+") for name in pairs["members"]]
    names = {side: [team[place] for team in members] for place, side in enumerate(("first", "second"))}
    numbers = pairs.reindex(
        columns=[f"{name}{end}" for name in INTERACTION_PANELS for end in INTERVAL_SUFFIXES]
    )
    cells = {"attack": pairs["attack"].tolist(), **names}
    cells |= {
        f"family_{side}": [families.get(name, "other") for name in team] for side, team in names.items()
    }
    return pd.concat([pd.DataFrame(cells), numbers.reset_index(drop=True)], axis=1)


def to_numbers(column: pd.Series) -> pd.Series:
    """Return layers or heads as numbers, NaN for components that have none."""
    return pd.to_numeric(column, errors="coerce").astype(float)


def build_front_points(candidates: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that the figure draws, and the `number` of the points of the front that are named.

    If the front is too long to name all, those come first that no other beats in both rates at any cost, and
    among them those that refuse most harmful queries; both on the calibration split, like the front itself.

    >>> candidates = {"members": ["none", "a"], "how": "alone", "cost": 1.0, "on_front": True}
    >>> candidates |= {f"{x}_{split}": [0.5, 0.75] for x in ("benign", "harmful", "attacked")
    ...           for split in ("calibration", "test")}
    >>> build_front_points(pd.DataFrame(candidates))["number"].tolist()
    [0, 1]

    Args:
        candidates: table from `build_candidates`.

    Returns:
        A row per candidate: its rates on the test split (shares), `cost` (× undefended), `on_front`, and
        `number`, 0 for none. Numbers run from the highest harmful refusal rate on the test split downwards.
    """
    front = candidates[candidates["on_front"] & (candidates["members"] != UNDEFENDED)]
    rates = front[[f"harmful_{SELECTION_SPLIT}", f"benign_{SELECTION_SPLIT}"]].to_numpy(float)
    best = np.lexsort([-rates[:, 1], -rates[:, 0], ~find_undominated(rates)])[:MAX_NAMED_CANDIDATES]
    named = front.iloc[best].sort_values([HARMFUL_COLUMN, BENIGN_COLUMN], ascending=False, kind="stable")
    columns = ["members", "how", BENIGN_COLUMN, HARMFUL_COLUMN, ATTACKED_COLUMN, "cost", "on_front"]
    points = candidates[columns].assign(number=0)
    points.loc[named.index, "number"] = range(1, len(named) + 1)
    return points.reset_index(drop=True)


def build_top_parts(parts: pd.DataFrame, n_top: int = 10) -> pd.DataFrame:
    """Return the components with the largest effects of either contrast, and the sums of all parts.

    The remainder of a readout that is not linear is the last row, whatever its size.

    >>> parts = pd.DataFrame({"kind": "head", "shift": [1.0, 0.0, -2.0], "discrimination": [0.0, 3.0, 0.0]})
    >>> top = build_top_parts(parts, 2)
    >>> top["shift"].tolist(), top["total_shift"].tolist()
    ([0.0, -2.0], [-1.0, -1.0])

    Args:
        parts: `parts.csv`, of one attack and one defense.
        n_top: number of components.
    """
    is_remainder = parts["kind"] == READOUT_PART
    sizes = parts.loc[~is_remainder, [*CONTRAST_LABELS]].abs().max(axis=1)
    largest = sizes.sort_values(ascending=False, kind="stable").index[:n_top]
    totals = {f"total_{name}": parts[name].sum() for name in CONTRAST_LABELS}
    rows = parts.loc[[*largest, *parts.index[is_remainder]]]
    return rows.assign(**totals, n_parts=len(sizes)).reset_index(drop=True)


def build_kind_points(kinds: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `kinds.csv` as they are; no rows if there is only one kind, or no known rate.

    >>> rows = pd.DataFrame({"kind": ["twin", "plain"], "over_refusal_rate": [0.5, 0.25]})
    >>> len(build_kind_points(rows)), len(build_kind_points(rows[:1]))
    (2, 0)

    Args:
        kinds: `kinds.csv`, of one attack.
    """
    has_several = kinds["kind"].nunique() > 1 and kinds["over_refusal_rate"].notna().any()
    return (kinds if has_several else kinds[:0]).reset_index(drop=True)


def build_analysis_points(
    scores: pd.DataFrame, summary: pd.DataFrame, threshold: float, kinds: pd.DataFrame | None = None
) -> FigureTables:
    """Return the tables of the figures of `analyze`, `attacks` included if there are several attacks.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> list(build_analysis_points(scores, pd.DataFrame(columns=["attack", "defense"]), 0.5))
    ['margins', 'roc']

    Args:
        scores: `scores.csv`.
        summary: `summary.csv`.
        threshold: margin above which the readout says "refuse", nats.
        kinds: `kinds.csv`.

    Returns:
        Tables by name of the figure. `refusals` needs judged responses, it and `plane` at least one defense,
        `square` a defense with all four combinations of its ablation, `kinds` two kinds of benign queries.
        Of many attacks only the first has its own figures.
    """
    figures: FigureTables = {}
    attacks = list(scores["attack"].unique())
    for attack in attacks if len(attacks) <= _MAX_ATTACKS_DRAWN else attacks[:1]:
        rows, estimates = scores[scores["attack"] == attack], summary[summary["attack"] == attack]
        has_defenses = (estimates["defense"] != UNDEFENDED).any()
        tables = {"refusals": build_refusal_points(estimates)} if has_defenses else {}
        tables["margins"] = build_margin_curves(rows, estimates, threshold)
        if has_defenses:
            tables["plane"] = build_plane_points(estimates)
            tables["forest"] = build_forest_points(estimates)
            tables["square"] = build_square_points(tables["plane"])
            tables["side_effects"] = build_side_effect_points(estimates)
        tables["roc"] = build_roc_points(rows, estimates, threshold)
        if kinds is not None:
            tables["kinds"] = build_kind_points(kinds[kinds["attack"] == attack])
        suffix = f"-{sanitize_name(attack)}" if len(attacks) > 1 else ""
        figures |= {kind + suffix: table for kind, table in tables.items() if len(table)}
    if len(attacks) > 1:
        figures["attacks"] = build_attack_cells(scores, summary, threshold)
    return figures


def build_forest_points(summary: pd.DataFrame) -> pd.DataFrame:
    """Return shift and discrimination of each defense, of the responses if they were judged.

    >>> row = {"attack": "direct", "defense": "a", "family": "noise", "n_harmful": 9, "n_benign": 9}
    >>> row |= {f"{x}{end}": 1.0 for x in ("shift", "discrimination") for end in INTERVAL_SUFFIXES}
    >>> build_forest_points(pd.DataFrame([row, row | {"defense": "none"}]))["shift"].tolist()
    [1.0]

    Args:
        summary: `summary.csv`.

    Returns:
        `shift` and `discrimination` (margins, nats), or `response_shift` and `response_discrimination`
        (percentage points), each with its interval.
    """
    is_judged = has_judged_rates(summary) and "response_shift" in summary
    columns = ("response_shift", "response_discrimination") if is_judged else ("shift", "discrimination")
    numbers = [f"{name}{end}" for name in columns for end in INTERVAL_SUFFIXES]
    names = ["attack", "defense", "family", "n_harmful", "n_benign"]
    names += [name for name in ("n_responses",) if is_judged and name in summary]
    rows = summary.loc[summary["defense"] != UNDEFENDED, [*names, *numbers]]
    return rows.dropna(subset=[*columns]).reset_index(drop=True)


def build_side_effect_points(summary: pd.DataFrame) -> pd.DataFrame:
    """Return shift and divergence of each defense whose first token can be compared; none if not measured.

    >>> row = {"attack": "direct", "defense": "a", "family": "noise", "shift": 1.0, "kl_benign": 0.5}
    >>> build_side_effect_points(pd.DataFrame([row])).columns.tolist()
    ['attack', 'defense', 'family', 'shift', 'kl_benign']

    Args:
        summary: `summary.csv`, of one attack; the shift is that of the responses if they were judged.
    """
    if "kl_benign" not in summary:
        return summary.iloc[:0]
    known = summary[summary["kl_benign"].notna()]
    shift = "response_shift" if has_judged_rates(known) else "shift"
    names = [f"{name}{end}" for name in (shift, "kl_benign") for end in INTERVAL_SUFFIXES]
    columns = ["attack", "defense", "family", "n_benign", *names]
    return known[[name for name in columns if name in known]].dropna(subset=shift).reset_index(drop=True)


def build_agreement_points(agreement: pd.DataFrame) -> FigureTables:
    """Return the tables of the figures of `analyze agreement`: one, or one per attack if there are several.

    >>> list(build_agreement_points(pd.DataFrame({"attack": ["direct", "base64"]})))
    ['agreement-direct', 'agreement-base64']

    Args:
        agreement: `agreement.csv`.
    """
    attacks = list(agreement["attack"].unique())
    suffixes = {attack: f"-{sanitize_name(attack)}" if len(attacks) > 1 else "" for attack in attacks}
    return {
        f"agreement{suffix}": agreement[agreement["attack"] == attack].reset_index(drop=True)
        for attack, suffix in suffixes.items()
    }


def build_model_points(effects: pd.DataFrame, order: pd.DataFrame) -> FigureTables:
    """Return the tables of the figures that compare models; those of each attack if there are several.

    >>> row = {"model": ["a", "b", None], "attack": "direct", "defense": "policy", "unit": "SD"}
    >>> tables = build_model_points(pd.DataFrame(row), pd.DataFrame(columns=["attack", "measure"]))
    >>> {stem: len(table) for stem, table in tables.items()}
    {'models_plane': 2, 'models_effects': 3}

    Args:
        effects: effects of each defense on each model, and their means, which have no model.
        order: `order.csv`.
    """
    figures: FigureTables = {}
    attacks = list(effects["attack"].unique())
    for attack in attacks if len(attacks) <= _MAX_ATTACKS_DRAWN else attacks[:1]:
        rows = effects[effects["attack"] == attack]
        prefix = "response_" if rows["unit"].iloc[0] == "points" else ""
        is_drawn = order["measure"].isin([f"{prefix}{effect}" for effect in ("shift", "discrimination")])
        tables = {
            "models_plane": rows[rows["model"].notna()],
            "models_effects": rows,
            "models_order": order[(order["attack"] == attack) & is_drawn],
        }
        if tables["models_order"].get("tau", pd.Series(dtype=float)).isna().all():
            del tables["models_order"]
        suffix = f"-{sanitize_name(attack)}" if len(attacks) > 1 else ""
        figures |= {
            kind + suffix: table.dropna(axis=1, how="all").reset_index(drop=True)
            for kind, table in tables.items()
            if len(table)
        }
    return figures


def build_depth_points(depth: pd.DataFrame) -> FigureTables:
    """Return the tables of the figures of `analyze depth`; those of each attack if there are several.

    >>> depth = pd.DataFrame({"attack": "direct", "defense": ["none", "a"], "response_shift": [None, 9.0]})
    >>> {stem: len(table) for stem, table in build_depth_points(depth).items()}
    {'depth_effects': 1, 'depth_rates': 2}

    Args:
        depth: `depth.csv`.
    """
    figures: FigureTables = {}
    keys = ["attack", "defense", "prefix", "tokens", "n_harmful", "n_benign"]
    columns = {
        "depth_effects": ("response_shift", "response_discrimination"),
        "depth_rates": RATE_NAMES,
    }
    attacks = list(depth["attack"].unique())
    for attack in attacks:
        suffix = f"-{sanitize_name(attack)}" if len(attacks) > 1 else ""
        for kind, names in columns.items():
            drawn = [*keys, *(f"{name}{end}" for name in names for end in INTERVAL_SUFFIXES)]
            rows = depth.loc[depth["attack"] == attack, [name for name in drawn if name in depth]]
            rows = rows.dropna(subset=[name for name in names[:1] if name in rows])
            if len(rows):
                figures[kind + suffix] = rows.reset_index(drop=True)
    return figures


def build_ensemble_points(
    rows: pd.DataFrame, candidates: pd.DataFrame, families: Mapping[str, str]
) -> FigureTables:
    """Return the tables of `forecast`, `interactions` (if a stack of two was run) and `front`.

    Args:
        rows: `ensembles.csv`, of which the test split is drawn.
        candidates: table from `build_candidates`.
        families: family of each defense.
    """
    tables = {
        "forecast": build_forecast_points(rows),
        "interactions": build_interaction_cells(rows, families),
        "front": build_front_points(candidates),
    }
    return {kind: table for kind, table in tables.items() if len(table)}


def build_mechanism_points(tables: Mapping[str, pd.DataFrame], n_top: int = 10) -> FigureTables:
    """Return the tables of the figures of `analyze mechanism`.

    >>> row = {"attack": "direct", "defense": "a/b", "layer": 0, "kind": "mlp", "head": None}
    >>> list(build_mechanism_points({"parts": pd.DataFrame([row | {"shift": 1.0, "discrimination": 0.5}])}))
    ['parts-a-b', 'top-a-b']

    Args:
        tables: tables of the run by name; a missing or empty table has no figure.
        n_top: number of components, and of patched heads, that are drawn one by one.

    Returns:
        Tables by name of the figure: `layers`, `directions`, `cuts` and `profiles`, and for each defense
        `parts-`, `top-`, `patches-` and `weights-` with its name; with several attacks, `-` and the attack
        follow.
    """
    figures: FigureTables = {}
    sources = {"half", *dict(_MECHANISM_SOURCES.values())}
    known = {name: table for name, table in tables.items() if len(table) and name in sources}
    attacks = list(dict.fromkeys(attack for table in known.values() for attack in table["attack"]))
    for attack in attacks:
        of_attack = {name: table[table["attack"] == attack] for name, table in known.items()}
        suffix = attack if len(attacks) > 1 else ""
        for kind, defense, points in _iterate_mechanism_points(of_attack, n_top):
            stem = "-".join(_shorten_stem_name(name) for name in (kind, defense, suffix) if name)
            n_alike = sum(re.fullmatch(rf"{re.escape(stem)}(~\d+)?", name) is not None for name in figures)
            figures[f"{stem}~{n_alike + 1}" if n_alike else stem] = points  # two names may have one stem
    return figures


def build_square_points(points: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `build_plane_points` that make a 2 × 2, with their `corner`; none if one is missing.

    >>> names = ["a", "b", "b/no_secret", "b/no_weights", "b/neither"]
    >>> build_square_points(pd.DataFrame({"defense": names}))["corner"].tolist()
    ['both', 'no_secret', 'no_weights', 'neither']
    """
    points = points.drop(columns=points.filter(like="scaled_").columns)  # the square is drawn in nats
    whole = points["defense"].str.partition("/")[0]
    part = points["defense"].str.partition("/")[2].replace("", "both")
    corners = points.assign(corner=part, whole=whole)[part.isin(SQUARE_CORNERS)]
    is_complete = corners.groupby("whole")["corner"].transform("nunique") == len(SQUARE_CORNERS)
    return corners[is_complete].drop(columns="whole").reset_index(drop=True)


def build_patch_points(patches: pd.DataFrame, n_top: int = 10) -> pd.DataFrame:
    """Return the patches of one defense; of single heads, only those with the largest effects.

    >>> row = {"into": "defended", "kind": "head", "source": "defense", "layer": 0, "discrimination": 0.0}
    >>> rows = pd.DataFrame([row | {"head": head, "shift": head / 4} for head in range(3)])
    >>> build_patch_points(rows, n_top=2)["head"].tolist()
    [1, 2]

    Args:
        patches: `patches.csv`.
        n_top: number of heads per patched run.
    """
    is_head = patches["kind"] == "head"
    kept = []
    for _, rows in patches[is_head].groupby("into", sort=False):
        of_defense = rows[rows["source"].isin(OTHER_RUN_SOURCES)]
        ranked = of_defense if len(of_defense) else rows
        sizes = ranked.set_index(["layer", "head"])[[*CONTRAST_LABELS]].abs().max(axis=1)
        largest = sizes.groupby(level=[0, 1]).max().nlargest(n_top).index
        kept.append(rows[pd.MultiIndex.from_frame(rows[["layer", "head"]]).isin(largest)])
    return pd.concat([patches[~is_head], *kept], ignore_index=True)


def _find_summary_row(summary: pd.DataFrame, attack: Any, defense: Any) -> dict[str, Any]:
    """Return the summary row of a condition; only a family if there is none."""
    rows = summary[(summary["attack"] == attack) & (summary["defense"] == defense)].to_dict("records")
    values = {str(column): value for row in rows for column, value in row.items()}
    return {"family": "none" if defense == "none" else "other", **values}


def _iterate_mechanism_points(
    tables: Mapping[str, pd.DataFrame], n_top: int
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield kind, defense (empty if the figure shows all) and table of each figure of one attack."""
    for kind, (source, is_per_defense) in _MECHANISM_SOURCES.items():
        table = tables.get(source, pd.DataFrame())
        if not len(table):
            continue
        for defense in dict.fromkeys(table["defense"]) if is_per_defense else [""]:
            rows = table[table["defense"] == defense] if is_per_defense else table
            points = _build_mechanism_kind(kind, rows, tables.get("half"), n_top)
            if kind == "parts" and len(points):  # one color scale, so that the defenses can be compared
                sizes = build_part_cells(table)[[*CONTRAST_LABELS]].abs()
                points = points.assign(largest_of_run=float(np.nanmax(sizes.to_numpy(float))))
            if len(points):
                yield kind, str(defense), points.reset_index(drop=True)


def _build_mechanism_kind(
    kind: str, rows: pd.DataFrame, half_layers: pd.DataFrame | None, n_top: int
) -> pd.DataFrame:
    if kind == "layers":
        return build_layer_points(rows, half_layers)
    if kind == "parts":
        return build_part_cells(rows)
    if kind == "top":
        return build_top_parts(rows, n_top)
    return build_patch_points(rows, n_top) if kind == "patches" else rows


def sanitize_name(name: str) -> str:
    """Return a name as it is written in the name of a file."""
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", str(name))


def _shorten_stem_name(name: str) -> str:
    return sanitize_name(name).strip("-")[:_MAX_STEM_NAME_LENGTH]
