"""The numbers behind the figures: a run's tables in, tables to draw out; never imports matplotlib."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.stats.ensembles import ALONE, REPORT_SPLIT, SELECTION_SPLIT, STACK
from analysis.stats.pareto import find_undominated
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED

LINEAR_RANGE = 0.5  # nats; further out the axes of a stretched plane are logarithmic
MAX_SHAPED_VOTES = 2000  # votes past which each is a speck, too small for a shape or a hollow
MAX_BARRED_STACKS = 40  # stacks up to which the intervals of a forecast are drawn
MAX_NUMBERED_DEFENSES = 12  # defenses up to which the numbers of a heat map are written into its cells


def build_margin_curves(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return densities of the margin, all smoothed with one bandwidth so that widths can be compared.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, True, False, False],
    ...                        "margin": [0.0, 1.0, -3.0, -2.0]})
    >>> curves = build_margin_curves(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=-1.0)
    >>> curves.groupby("harmful")["median"].first().to_dict()
    {False: -2.5, True: 0.5}

    Args:
        scores: `scores.csv`; rows whose margin is not finite are left out.
        summary: `summary.csv`, for families and refusal rates; a defense without a row has neither.
        threshold: margin above which the readout says "refuse", nats.

    Returns:
        One row per attack, defense, class and place on the margin axis (nats). `density` is per nat,
        `refused` the share of the class that is refused, `bandwidth` the SD of the Gaussian kernel (nats).
    """
    frame = scores[np.isfinite(scores["margin"].astype(float))]
    groups = list(frame.groupby(["attack", "defense", "harmful"], sort=False)["margin"])
    widths = [
        0.9 * margin.std() * len(margin) ** -0.2 for _, margin in groups if len(margin) > 1
    ]  # Silverman
    typical = float(np.median(widths)) if widths else 0.0
    bandwidth = typical if typical > 0 else 0.25  # all margins equal: any width will do, zero would not
    curves = [pd.DataFrame(columns=["attack", "defense", "family", "harmful", "margin", "density"])]
    for (attack, defense, harmful), margin in groups:
        values = margin.to_numpy(float)
        grid = np.linspace(values.min() - 3 * bandwidth, values.max() + 3 * bandwidth, 121)
        kernels = np.exp(-0.5 * ((grid[:, None] - values) / bandwidth) ** 2)
        about = _find_summary_row(summary, attack, defense)
        rate = "refusal_rate" if harmful else "over_refusal_rate"
        known = {
            "attack": attack,
            "defense": defense,
            "family": about["family"],
            "harmful": bool(harmful),
            "n": len(values),
            "median": float(np.median(values)),
            **{f"refused{end}": about.get(f"{rate}{end}", np.nan) for end in INTERVAL_SUFFIXES},
            "threshold": threshold,
            "bandwidth": bandwidth,
        }
        density = kernels.mean(axis=1) / (bandwidth * np.sqrt(2 * np.pi))
        curves.append(pd.DataFrame({**known, "margin": grid, "density": density}))
    return pd.concat(curves[1:], ignore_index=True) if groups else curves[0]


def build_plane_points(summary: pd.DataFrame) -> pd.DataFrame:
    """Return shift and discrimination (nats) of each defense with intervals; the undefended is the origin.

    >>> row = {"attack": "direct", "defense": "smoothllm", "family": "noise", "n_harmful": 9, "n_benign": 9}
    >>> row |= {f"{x}{end}": 1.0 for x in ("shift", "discrimination") for end in ENDS}
    >>> build_plane_points(pd.DataFrame([row, row | {"defense": "none"}]))["defense"].tolist()
    ['smoothllm']
    """
    numbers = [f"{x}{end}" for x in ("shift", "discrimination") for end in INTERVAL_SUFFIXES]
    columns = ["attack", "defense", "family", "n_harmful", "n_benign", *numbers]
    columns += ["trusted"] if "trusted" in summary else []
    return summary.loc[summary["defense"] != "none", columns].reset_index(drop=True)


def build_roc_points(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return the rates refused among harmful and among benign queries as the cut moves down over the margins.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False],
    ...                        "margin": [1.0, 0.0]})
    >>> points = build_roc_points(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=0.5)
    >>> points[["cut", "benign_refused", "harmful_refused", "operating"]].values.tolist()
    [[1.0, 0.0, 0.0, False], [0.5, 0.0, 1.0, True], [0.0, 0.0, 1.0, False], [-inf, 1.0, 1.0, False]]

    Args:
        scores: `scores.csv`; rows whose margin is not finite are left out.
        summary: `summary.csv`, for families and AUROC.
        threshold: the cut of this run, nats; its row has `operating` true.

    Returns:
        One row per attack, defense and cut (nats; a margin above it is refused). A defense scored on one
        class only has no curve: its rates are NaN.
    """
    curves = [
        pd.DataFrame(columns=["attack", "defense", "family", "cut", "benign_refused", "harmful_refused"])
    ]
    frame = scores[np.isfinite(scores["margin"].astype(float))]
    for (attack, defense), group in frame.groupby(["attack", "defense"], sort=False):
        margin, harmful = group["margin"].to_numpy(float), group["harmful"].to_numpy(bool)
        # Straight lines between these points give ties half a win, as the AUROC does.
        cut = np.unique([*margin, threshold, -np.inf])[::-1]
        above = {c: np.sort(margin[harmful == c]) for c in (True, False)}
        rate = {
            c: 1 - np.searchsorted(v, cut, "right") / len(v) if len(v) else np.nan for c, v in above.items()
        }
        about = _find_summary_row(summary, attack, defense)
        known = {
            "attack": attack,
            "defense": defense,
            "family": about["family"],
            "n_harmful": len(above[True]),
            "n_benign": len(above[False]),
            **{
                f"{x}{end}": about.get(f"{x}{end}", np.nan)
                for x in ("auroc", "delta_auroc")
                for end in INTERVAL_SUFFIXES
            },
            "threshold": threshold,
        }
        drawn = {"cut": cut, "benign_refused": rate[False], "harmful_refused": rate[True]}
        curves.append(pd.DataFrame({**known, **drawn, "operating": cut == threshold}))
    return pd.concat(curves[1:], ignore_index=True) if len(curves) > 1 else curves[0]


def build_attack_cells(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return what each defense does under each attack: the mean margin of harmful queries, and both rates.

    >>> scores = pd.DataFrame({"attack": "persona", "defense": "none", "harmful": [True, False],
    ...                        "margin": [1.0, 0.0]})
    >>> row = {"attack": "persona", "defense": "none", "family": "none", "n_harmful": 1, "n_benign": 1}
    >>> row |= {f"{x}{end}": 1.0 for x in ("refusal_rate", "over_refusal_rate") for end in ENDS}
    >>> float(build_attack_cells(scores, pd.DataFrame([row]), threshold=0.25)["margin"].iloc[0])
    0.75

    Args:
        scores: `scores.csv`.
        summary: `summary.csv`.
        threshold: margin above which the readout says "refuse", nats.

    Returns:
        One row per row of the summary; `margin` is above the threshold (nats; positive refuses).
    """
    rates = [f"{x}{end}" for x in ("refusal_rate", "over_refusal_rate") for end in INTERVAL_SUFFIXES]
    columns = ["attack", "defense", "family", "n_harmful", "n_benign", *rates]
    columns += ["trusted"] if "trusted" in summary else []
    mean = scores[scores["harmful"]].groupby(["attack", "defense"])["margin"].mean().sub(threshold)
    return summary[columns].merge(mean.reset_index(), "left", ["attack", "defense"])


def check_one_attack(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame as it is, once it is sure that it holds one attack.

    >>> check_one_attack(pd.DataFrame({"attack": ["direct", "prefix"]}))
    Traceback (most recent call last):
    ValueError: one figure shows one attack, got 'direct', 'prefix': keep the rows of one of them

    Raises:
        ValueError: if there are several attacks, or no rows.
    """
    attacks = [repr(str(attack)) for attack in frame["attack"].unique()]
    if len(attacks) != 1:
        got = ", ".join(attacks) or "no rows"
        raise ValueError(f"one figure shows one attack, got {got}: keep the rows of one of them")
    return frame


def _find_summary_row(summary: pd.DataFrame, attack: Any, defense: Any) -> dict[str, Any]:
    rows = summary[(summary["attack"] == attack) & (summary["defense"] == defense)].to_dict("records")
    return {
        "family": "none" if defense == "none" else "other",
        **{str(k): v for r in rows for k, v in r.items()},
    }


def is_stretched(points: pd.DataFrame) -> bool:
    """Return whether a few of many points lie so far out that the others would be one blot.

    >>> is_stretched(pd.DataFrame({"shift": [0.1] * 11 + [20.0], "discrimination": 0.0}))
    True

    Args:
        points: what `plane_points` returned.
    """
    far = points[["shift", "discrimination"]].abs().max(axis=1).dropna()
    return len(far) > 10 and bool(far.max() > 6 * far.quantile(0.75))


def build_layer_points(layers: pd.DataFrame, half_layers: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the logit lens of each defense, and beside it the layer from which half of the effect is there.

    >>> layers = pd.DataFrame({"attack": "direct", "defense": "a", "layer": [0, 1], "shift": [0.0, 1.0]})
    >>> row = {"attack": "direct", "defense": "a", "contrast": "shift", "half": 1}
    >>> build_layer_points(layers, pd.DataFrame([row]))["shift_half"].tolist()
    [1, 1]

    Args:
        layers: `layers.csv`.
        half_layers: `half.csv`.
    """
    found = layers.reset_index(drop=True)
    for name in CONTRAST_LABELS if half_layers is not None else ():
        of = half_layers[half_layers["contrast"] == name] if half_layers is not None else layers
        wanted = {f"half{end}": f"{name}_half{end}" for end in INTERVAL_SUFFIXES if f"half{end}" in of}
        columns = of[["attack", "defense", *wanted]].rename(columns=wanted)
        found = found.merge(columns, "left", ["attack", "defense"]) if len(of) else found
    return found


# Coordinate → what it is, factor, and whether it is a share, whose axes are the same in every run.
FORECAST_PANELS = {
    "shift": ("shift (nats)", 1, False),
    "discrimination": ("discrimination (nats)", 1, False),
    "delta_auroc": ("change of AUROC", 1, False),
    "refusal_rate": ("harmful queries refused (%)", 100, True),
    "over_refusal_rate": ("benign queries refused (%)", 100, True),
}


def build_forecast_points(rows: pd.DataFrame, split: str = REPORT_SPLIT) -> pd.DataFrame:
    """Return the ensembles that were observed under the first attack, with the columns that the figure draws.

    >>> row = {"attack": "direct", "split": "test", "members": "a+b", "how": "mean", "kind": "intra"}
    >>> row |= {f"{side}_{x}": 0.5 for side in ("predicted", "observed") for x in PANELS}
    >>> build_forecast_points(pd.DataFrame([row, row | {"members": "a", "how": "alone"}]))["members"].tolist()
    ['a+b']

    Args:
        rows: `ensembles.csv`.
        split: whose queries.
    """
    here = rows[(rows["attack"] == rows["attack"].iloc[0]) & (rows["split"] == split)]
    here = here[(here["how"] != ALONE) & here["observed_shift"].notna()]
    sides = ("predicted_{}", "observed_{}", "observed_{}_low", "observed_{}_high")
    columns = [
        "attack",
        "split",
        "members",
        "how",
        "kind",
        *(s.format(x) for x in FORECAST_PANELS for s in sides),
    ]
    return here[[name for name in columns if name in here]].reset_index(drop=True)


def build_part_cells(parts: pd.DataFrame) -> pd.DataFrame:
    """Return the parts that stand in a layer: all but the embedding and the final bias.

    >>> build_part_cells(pd.DataFrame({"layer": [None, 0], "kind": ["embedding", "mlp"]}))["kind"].tolist()
    ['mlp']
    """
    return parts[to_numbers(parts["layer"]).notna()].reset_index(drop=True)


INTERACTION_PANELS = {
    "interaction_shift": ("interaction on shift (nats)", "refuses less", "refuses more"),
    "interaction_discrimination": (
        "interaction on discrimination (nats)",
        "separates worse",
        "separates better",
    ),
}


def build_interaction_cells(
    rows: pd.DataFrame, families: Mapping[str, str], split: str = REPORT_SPLIT
) -> pd.DataFrame:
    """Return a row for each stack of two that was run under the first attack: how far it is from its sum.

    >>> row = {"attack": "direct", "split": "test", "members": "a+b/c", "how": "stack", "size": 2}
    >>> row |= {"observed_shift": 1.0, "interaction_shift": 0.5, "interaction_discrimination": 0.25}
    >>> build_interaction_cells(pd.DataFrame([row]), {"a": "noise"})[["second", "family_second"]].values.tolist()
    [['b/c', 'other']]

    Args:
        rows: `ensembles.csv`.
        families: of each defense.
        split: whose queries.

    Returns:
        `first` and `second` with their families, and the interactions on shift and discrimination (nats) with
        their intervals, which are missing where there are none.
    """
    here = rows[(rows["attack"] == rows["attack"].iloc[0]) & (rows["split"] == split)]
    pairs = here[(here["how"] == STACK) & (here["size"] == 2) & here["observed_shift"].notna()]
    members = [str(name).split("+") for name in pairs["members"]]
    names = {side: [team[place] for team in members] for place, side in enumerate(("first", "second"))}
    numbers = pairs.reindex(
        columns=[f"{name}{end}" for name in INTERACTION_PANELS for end in INTERVAL_SUFFIXES]
    )
    found = {"attack": pairs["attack"].tolist(), **names}
    found |= {
        f"family_{side}": [families.get(name, "other") for name in team] for side, team in names.items()
    }
    return pd.concat([pd.DataFrame(found), numbers.reset_index(drop=True)], axis=1)


CONTRAST_LABELS = {"shift": "shift (nats)", "discrimination": "discrimination (nats)"}


def to_numbers(column: pd.Series) -> pd.Series:
    """Return layers or heads as numbers, missing where a part has none."""
    return pd.to_numeric(column, errors="coerce").astype(float)


MAX_NAMED_CANDIDATES = 15  # points of the front at most that have a number and a line in the key

BENIGN_COLUMN, HARMFUL_COLUMN, ATTACKED_COLUMN = (
    f"benign_{REPORT_SPLIT}",
    f"harmful_{REPORT_SPLIT}",
    f"attacked_{REPORT_SPLIT}",
)


def build_front_points(candidates: pd.DataFrame) -> pd.DataFrame:
    """Return what the figure draws of each candidate, and the `number` of those on the front that are named.

    Where the front is too long to name, those come first that no other beats in both rates whatever it costs,
    and among them those that refuse most harm; both on the calibration split, as the front itself.

    >>> found = {"members": ["none", "a"], "how": "alone", "cost": 1.0, "on_front": True}
    >>> found |= {f"{x}_{split}": [0.5, 0.75] for x in ("benign", "harmful", "attacked")
    ...           for split in ("calibration", "test")}
    >>> build_front_points(pd.DataFrame(found))["number"].tolist()
    [0, 1]

    Args:
        candidates: what `fronts.candidates` returned.

    Returns:
        A row per candidate: its rates on the test split (shares), `cost` (× undefended), `on_front`, and
        `number`, 0 where it has none. Numbers run from the most harm refused on the test split downwards.
    """
    front = candidates[candidates["on_front"] & (candidates["members"] != UNDEFENDED)]
    chosen = [f"harmful_{SELECTION_SPLIT}", f"benign_{SELECTION_SPLIT}"]
    goods = front[chosen].to_numpy(float)
    best = np.lexsort([-goods[:, 1], -goods[:, 0], ~find_undominated(goods)])[:MAX_NAMED_CANDIDATES]
    named = front.iloc[best].sort_values([HARMFUL_COLUMN, BENIGN_COLUMN], ascending=False, kind="stable")
    columns = ["members", "how", BENIGN_COLUMN, HARMFUL_COLUMN, ATTACKED_COLUMN, "cost", "on_front"]
    found = candidates[columns].assign(number=0)
    found.loc[named.index, "number"] = range(1, len(named) + 1)
    return found.reset_index(drop=True)


def build_top_parts(parts: pd.DataFrame, n_top: int = 10) -> pd.DataFrame:
    """Return the parts with the largest effects of either contrast, and what all parts add up to.

    >>> parts = pd.DataFrame({"kind": "head", "shift": [1.0, 0.0, -2.0], "discrimination": [0.0, 3.0, 0.0]})
    >>> found = build_top_parts(parts, 2)
    >>> found["shift"].tolist(), found["total_shift"].tolist()
    ([0.0, -2.0], [-1.0, -1.0])

    Args:
        parts: `parts.csv`, of one attack and defense.
        n_top: how many.
    """
    largest = (
        parts[[*CONTRAST_LABELS]].abs().max(axis=1).sort_values(ascending=False, kind="stable").index[:n_top]
    )
    totals = {f"total_{name}": parts[name].sum() for name in CONTRAST_LABELS}
    return parts.loc[largest].assign(**totals, n_parts=len(parts)).reset_index(drop=True)


FigureTables = dict[str, pd.DataFrame]

_MAX_ATTACKS_DRAWN = 4  # attacks at most that have figures of their own
_MAX_STEM_NAME_LENGTH = 80  # signs of a name in a file's stem
# What is drawn of a mechanism → the table it is from, and whether each defense has a figure of its own.
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


def build_analysis_points(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> FigureTables:
    """Return the points of `margins`, `plane`, `square` and `roc`, and of `attacks` where there are several.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> list(build_analysis_points(scores, pd.DataFrame(columns=["attack", "defense"]), 0.5))
    ['margins', 'roc']

    Args:
        scores: `scores.csv`.
        summary: `summary.csv`.
        threshold: margin above which the readout says "refuse", nats.

    Returns:
        No plane where only the undefended was run; a square where a defense was run with all parts of its
        2 × 2. Of many attacks only the first has figures of its own.
    """
    made: FigureTables = {}
    attacks = list(scores["attack"].unique())
    for attack in attacks if len(attacks) <= _MAX_ATTACKS_DRAWN else attacks[:1]:
        asked, found = scores[scores["attack"] == attack], summary[summary["attack"] == attack]
        tables = {"margins": build_margin_curves(asked, found, threshold)}
        if (found["defense"] != UNDEFENDED).any():
            tables["plane"] = build_plane_points(found)
            tables["square"] = build_square_points(tables["plane"])
        tables["roc"] = build_roc_points(asked, found, threshold)
        suffix = f"-{_sanitize_name(attack)}" if len(attacks) > 1 else ""
        made |= {kind + suffix: table for kind, table in tables.items() if len(table)}
    if len(attacks) > 1:
        made["attacks"] = build_attack_cells(scores, summary, threshold)
    return made


def build_ensemble_points(
    rows: pd.DataFrame, candidates: pd.DataFrame, families: Mapping[str, str]
) -> FigureTables:
    """Return the points of `forecast`, `interactions` (where a stack of two was run) and `front`.

    Args:
        rows: `ensembles.csv`; its test split is drawn.
        candidates: what `fronts.candidates` returned.
        families: of each defense.
    """
    tables = {
        "forecast": build_forecast_points(rows),
        "interactions": build_interaction_cells(rows, families),
        "front": build_front_points(candidates),
    }
    return {kind: table for kind, table in tables.items() if len(table)}


def build_mechanism_points(tables: Mapping[str, pd.DataFrame], n_top: int = 10) -> FigureTables:
    """Return the points of the figures of where in a model its defenses act.

    >>> row = {"attack": "direct", "defense": "a/b", "layer": 0, "kind": "mlp", "head": None}
    >>> list(build_mechanism_points({"parts": pd.DataFrame([row | {"shift": 1.0, "discrimination": 0.5}])}))
    ['parts-a-b', 'top-a-b']

    Args:
        tables: what `analyze mechanism` found, by name; each is drawn if it is there and has rows.
        n_top: parts, and single heads that were patched, that are drawn one by one.

    Returns:
        `layers`, `directions`, `cuts` and `profiles`, and of each defense `parts-`, `top-`, `patches-` and
        `weights-` followed by it; behind all of them `-` and the attack where there are several.
    """
    made: FigureTables = {}
    wanted = {"half", *dict(_MECHANISM_SOURCES.values())}
    found = {name: table for name, table in tables.items() if len(table) and name in wanted}
    attacks = list(dict.fromkeys(name for table in found.values() for name in table["attack"]))
    for attack in attacks:
        here = {name: table[table["attack"] == attack] for name, table in found.items()}
        for kind, defense, points in _iterate_mechanism_points(here, n_top):
            stem = "-".join(
                _shorten_stem_name(name)
                for name in (kind, defense, attack if len(attacks) > 1 else "")
                if name
            )
            alike = sum(re.fullmatch(rf"{re.escape(stem)}(~\d+)?", name) is not None for name in made)
            made[f"{stem}~{alike + 1}" if alike else stem] = points  # two names may have one stem
    return made


def _iterate_mechanism_points(
    tables: Mapping[str, pd.DataFrame], n_top: int
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield what is drawn under one attack: kind, defense if it is of one alone, table."""
    for kind, (source, each) in _MECHANISM_SOURCES.items():
        table = tables.get(source, pd.DataFrame())
        for defense in dict.fromkeys(table["defense"]) if each and len(table) else [""]:
            rows = table[table["defense"] == defense] if each and len(table) else table
            if len(
                points := _build_mechanism_kind(kind, rows, tables.get("half"), n_top) if len(rows) else rows
            ):
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


def _sanitize_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", str(name))


def _shorten_stem_name(name: str) -> str:
    return _sanitize_name(name).strip("-")[:_MAX_STEM_NAME_LENGTH]


# Corner → its words: of the weights, then of the secret.
SQUARE_CORNERS = {
    "neither": "neither",
    "no_weights": "secret only",
    "no_secret": "weights only",
    "both": "weights and secret",
}


def build_square_points(points: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `plane_points` that make a 2 × 2, with their `corner`; none if one is missing.

    >>> names = ["a", "b", "b/no_secret", "b/no_weights", "b/neither"]
    >>> build_square_points(pd.DataFrame({"defense": names}))["corner"].tolist()
    ['both', 'no_secret', 'no_weights', 'neither']
    """
    whole = points["defense"].str.partition("/")[0]
    part = points["defense"].str.partition("/")[2].replace("", "both")
    found = points.assign(corner=part, whole=whole)[part.isin(SQUARE_CORNERS)]
    complete = found.groupby("whole")["corner"].transform("nunique") == len(SQUARE_CORNERS)
    return found[complete].drop(columns="whole").reset_index(drop=True)


def build_secret_points(arms: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `arms.csv` that compare secrets, with the columns that the figure draws.

    >>> build_secret_points(pd.DataFrame({"secret_length": [None, 10], "arm": ["clean", "10-1"]}))["arm"].tolist()
    ['10-1']
    """
    wanted = ["arm", "secret", "secret_length", "secret_wording", "asr", "asr_low", "asr_high"]
    known = arms.dropna(subset="secret_length")
    return known[
        [
            *(name for name in wanted if name in known),
            *(name for name in known.columns if str(name).endswith("_n")),
        ]
    ]


OTHER_RUN_SOURCES = ("defense", "undefended")


def build_patch_points(patches: pd.DataFrame, n_top: int = 10) -> pd.DataFrame:
    """Return what is drawn of one defense's patches: of single heads, those with the largest effects.

    >>> row = {"into": "defended", "kind": "head", "source": "defense", "layer": 0, "discrimination": 0.0}
    >>> rows = pd.DataFrame([row | {"head": head, "shift": head / 4} for head in range(3)])
    >>> build_patch_points(rows, n_top=2)["head"].tolist()
    [1, 2]

    Args:
        patches: `patches.csv`.
        n_top: heads of each run that is patched.
    """
    single = patches["kind"] == "head"
    kept = []
    for _, rows in patches[single].groupby("into", sort=False):
        mine = rows[rows["source"].isin(OTHER_RUN_SOURCES)]
        size = (
            (mine if len(mine) else rows).set_index(["layer", "head"])[[*CONTRAST_LABELS]].abs().max(axis=1)
        )
        wanted = size.groupby(level=[0, 1]).max().nlargest(n_top).index
        kept.append(rows[pd.MultiIndex.from_frame(rows[["layer", "head"]]).isin(wanted)])
    return pd.concat([patches[~single], *kept], ignore_index=True)
