"""Which figures a run has, by file stem, and the table that each is drawn from. Nothing is drawn here.

What comes after the kind in a stem tells figures of one kind apart: a defense, an attack or a readout.
"""

import re
from collections.abc import Iterator, Mapping

import pandas as pd

from analysis.curves import attack_cells, margin_curves, plane_points, roc_points
from analysis.depth import layer_points
from analysis.forecast import forecast_points
from analysis.heads import part_cells
from analysis.interactions import interaction_cells
from analysis.pareto import front_points
from analysis.parts import top_parts
from analysis.square import square_points
from analysis.tables import UNDEFENDED
from analysis.transplants import patch_points

Points = dict[str, pd.DataFrame]

_DRAWN_EACH = 4  # attacks at most that have figures of their own
_LONGEST = 80  # signs of a name in a file's stem
# What is drawn of a mechanism → the table it is from, and whether each defense has a figure of its own.
_FROM = {
    "layers": ("layers", False),
    "parts": ("parts", True),
    "top": ("parts", True),
    "directions": ("directions", False),
    "patches": ("patches", True),
    "cuts": ("cuts", False),
    "weights": ("weights", True),
    "profiles": ("profiles", False),
}


def of_analysis(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> Points:
    """Return the points of `margins`, `plane`, `square` and `roc`, and of `attacks` where there are several.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "margin": 0})
    >>> list(of_analysis(scores, pd.DataFrame(columns=["attack", "defense"]), 0.5))
    ['margins', 'roc']

    Args:
        scores: `scores.csv`.
        summary: `summary.csv`.
        threshold: margin above which the readout says "refuse", nats.

    Returns:
        No plane where only the undefended was run; a square where a defense was run with all parts of its
        2 × 2. Of many attacks only the first has figures of its own.
    """
    made: Points = {}
    attacks = list(scores["attack"].unique())
    for attack in attacks if len(attacks) <= _DRAWN_EACH else attacks[:1]:
        asked, found = scores[scores["attack"] == attack], summary[summary["attack"] == attack]
        tables = {"margins": margin_curves(asked, found, threshold)}
        if (found["defense"] != UNDEFENDED).any():
            tables["plane"] = plane_points(found)
            tables["square"] = square_points(tables["plane"])
        tables["roc"] = roc_points(asked, found, threshold)
        suffix = f"-{_plain(attack)}" if len(attacks) > 1 else ""
        made |= {kind + suffix: table for kind, table in tables.items() if len(table)}
    if len(attacks) > 1:
        made["attacks"] = attack_cells(scores, summary, threshold)
    return made


def of_ensembles(rows: pd.DataFrame, candidates: pd.DataFrame, families: Mapping[str, str]) -> Points:
    """Return the points of `forecast`, `interactions` (where a stack of two was run) and `front`.

    Args:
        rows: `ensembles.csv`; its test split is drawn.
        candidates: what `fronts.candidates` returned.
        families: of each defense.
    """
    tables = {
        "forecast": forecast_points(rows),
        "interactions": interaction_cells(rows, families),
        "front": front_points(candidates),
    }
    return {kind: table for kind, table in tables.items() if len(table)}


def of_mechanism(tables: Mapping[str, pd.DataFrame], top: int = 10) -> Points:
    """Return the points of the figures of where in a model its defenses act.

    >>> row = {"attack": "direct", "defense": "a/b", "layer": 0, "kind": "mlp", "head": None}
    >>> list(of_mechanism({"parts": pd.DataFrame([row | {"shift": 1.0, "discrimination": 0.5}])}))
    ['parts-a-b', 'top-a-b']

    Args:
        tables: what `analyze mechanism` found, by name; each is drawn if it is there and has rows.
        top: parts, and single heads that were patched, that are drawn one by one.

    Returns:
        `layers`, `directions`, `cuts` and `profiles`, and of each defense `parts-`, `top-`, `patches-` and
        `weights-` followed by it; behind all of them `-` and the attack where there are several.
    """
    made: Points = {}
    wanted = {"half", *dict(_FROM.values())}
    found = {name: table for name, table in tables.items() if len(table) and name in wanted}
    attacks = list(dict.fromkeys(name for table in found.values() for name in table["attack"]))
    for attack in attacks:
        here = {name: table[table["attack"] == attack] for name, table in found.items()}
        for kind, defense, points in _inside(here, top):
            stem = "-".join(
                _stem(name) for name in (kind, defense, attack if len(attacks) > 1 else "") if name
            )
            alike = sum(re.fullmatch(rf"{re.escape(stem)}(~\d+)?", name) is not None for name in made)
            made[f"{stem}~{alike + 1}" if alike else stem] = points  # two names may have one stem
    return made


def _inside(here: Mapping[str, pd.DataFrame], top: int) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield what is drawn under one attack: kind, defense if it is of one alone, table."""
    for kind, (source, each) in _FROM.items():
        table = here.get(source, pd.DataFrame())
        for defense in dict.fromkeys(table["defense"]) if each and len(table) else [""]:
            rows = table[table["defense"] == defense] if each and len(table) else table
            if len(points := _points(kind, rows, here.get("half"), top) if len(rows) else rows):
                yield kind, str(defense), points.reset_index(drop=True)


def _points(kind: str, rows: pd.DataFrame, half: pd.DataFrame | None, top: int) -> pd.DataFrame:
    if kind == "layers":
        return layer_points(rows, half)
    if kind == "parts":
        return part_cells(rows)
    if kind == "top":
        return top_parts(rows, top)
    return patch_points(rows, top) if kind == "patches" else rows


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", str(name))


def _stem(name: str) -> str:
    return _plain(name).strip("-")[:_LONGEST]
