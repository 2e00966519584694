"""Which figures a run has, by file stem, and the table that each is drawn from. Nothing is drawn here.

What comes after the kind in a stem tells figures of one kind apart: a defense, an attack or a readout.
"""

import re
from collections.abc import Iterator, Mapping

import pandas as pd

from analysis.curves import build_attack_cells, build_margin_curves, build_plane_points, build_roc_points
from analysis.depth import build_layer_points
from analysis.forecast import build_forecast_points
from analysis.heads import build_part_cells
from analysis.interactions import build_interaction_cells
from analysis.pareto import build_front_points
from analysis.parts import build_top_parts
from analysis.square import build_square_points
from analysis.tables import UNDEFENDED
from analysis.transplants import build_patch_points

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


def build_ensemble_points(rows: pd.DataFrame, candidates: pd.DataFrame, families: Mapping[str, str]) -> FigureTables:
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
    >>> list(of_mechanism({"parts": pd.DataFrame([row | {"shift": 1.0, "discrimination": 0.5}])}))
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
                _shorten_stem_name(name) for name in (kind, defense, attack if len(attacks) > 1 else "") if name
            )
            alike = sum(re.fullmatch(rf"{re.escape(stem)}(~\d+)?", name) is not None for name in made)
            made[f"{stem}~{alike + 1}" if alike else stem] = points  # two names may have one stem
    return made


def _iterate_mechanism_points(tables: Mapping[str, pd.DataFrame], n_top: int) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield what is drawn under one attack: kind, defense if it is of one alone, table."""
    for kind, (source, each) in _MECHANISM_SOURCES.items():
        table = tables.get(source, pd.DataFrame())
        for defense in dict.fromkeys(table["defense"]) if each and len(table) else [""]:
            rows = table[table["defense"] == defense] if each and len(table) else table
            if len(points := _build_mechanism_kind(kind, rows, tables.get("half"), n_top) if len(rows) else rows):
                yield kind, str(defense), points.reset_index(drop=True)


def _build_mechanism_kind(kind: str, rows: pd.DataFrame, half_layers: pd.DataFrame | None, n_top: int) -> pd.DataFrame:
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
