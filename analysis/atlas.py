"""All figures of where in a model a defense acts: tables in, figures with title, caption and warning out."""

import re
from collections.abc import Callable, Iterator, Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.captions import Context
from analysis.cuts import cuts
from analysis.depth import directions, layer_points, layers
from analysis.heads import heads, part_cells
from analysis.lettering import complete, fit
from analysis.likeness import likeness
from analysis.parts import top, top_parts
from analysis.tables import UNDEFENDED, condition
from analysis.transplants import patch_points, patches, weights
from analysis.wording import CAPTIONS, HEADLINES

# What is drawn → the table it is from, and whether each defense has a figure of its own.
FROM = {
    "layers": ("layers", False),
    "parts": ("parts", True),
    "top": ("parts", True),
    "directions": ("directions", False),
    "patches": ("patches", True),
    "cuts": ("cuts", False),
    "weights": ("weights", True),
    "profiles": ("profiles", False),
}
DRAWN: dict[str, Callable[[pd.DataFrame], Axes]] = {
    "layers": layers,
    "parts": heads,
    "top": top,
    "directions": directions,
    "patches": patches,
    "cuts": cuts,
    "weights": weights,
    "profiles": likeness,
}
_LONGEST = 80  # signs of a name in a file's stem


def of_mechanism(
    tables: Mapping[str, pd.DataFrame],
    context: Context,
    top: int = 10,
    counts: tuple[int, int] | None = None,
) -> dict[str, tuple[Figure, pd.DataFrame]]:
    """Return the figures of where in a model its defenses act, and their tables, by file stem.

    >>> row = {"attack": "direct", "defense": "a/b", "layer": 0, "kind": "mlp", "head": None}
    >>> tables = {"parts": pd.DataFrame([row | {"shift": 1.0, "discrimination": 0.5}])}
    >>> list(of_mechanism(tables, Context("smollm2", "twins", "test", threshold=0.0, refusing=("I",))))
    ['parts-a-b', 'top-a-b']

    Args:
        tables: what `analyze mechanism` found, by name; each is drawn if it is there and has rows. With
            `trusted` (attack, defense, trusted), a figure of a condition that is not trusted says so.
        context: what the captions say about the run.
        top: parts, and single heads that were patched, that are drawn one by one.
        counts: harmful and benign queries, for the captions of tables that do not hold them.

    Returns:
        `layers`, `directions`, `cuts` and `profiles`, and of each defense `parts-`, `top-`, `patches-` and
        `weights-` followed by it; behind all of them `-` and the attack where there are several.
    """
    made: dict[str, tuple[Figure, pd.DataFrame]] = {}
    found = {
        name: table for name, table in tables.items() if len(table) and name in {"half", *dict(FROM.values())}
    }
    attacks = list(dict.fromkeys(name for table in found.values() for name in table["attack"]))
    for attack in attacks:
        here = {name: table[table["attack"] == attack] for name, table in found.items()}
        for kind, defense, points in _drawn(here, top):
            stem = "-".join(
                _stem(name) for name in (kind, defense, attack if len(attacks) > 1 else "") if name
            )
            alike = sum(re.fullmatch(rf"{re.escape(stem)}(~\d+)?", name) is not None for name in made)
            name = f"{stem}~{alike + 1}" if alike else stem  # two names may have one stem
            warning = banner(points, tables.get("trusted"))
            title, caption = HEADLINES[kind].format(defense), CAPTIONS[kind](points, context, counts)
            made[name] = complete(DRAWN[kind](points), title, caption, warning), points
    return made


def _drawn(here: Mapping[str, pd.DataFrame], top: int) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield what is drawn under one attack: kind, defense if it is of one alone, table."""
    for kind, (source, each) in FROM.items():
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


def banner(points: pd.DataFrame, trusted: pd.DataFrame | None) -> str:
    """Return the warning above a figure, empty where nothing drawn is known to be wrong."""
    if trusted is None or not len(trusted):
        return ""
    # Every contrast is against the undefended model, which therefore is drawn too.
    names = {UNDEFENDED, *points["defense"], *points.get("other", [])}
    of = trusted[(trusted["attack"] == points["attack"].iloc[0]) & trusted["defense"].isin(names)]
    doubtful = [
        fit(condition(row), 190, 8.5, 1) for row in of[of["trusted"] == "not trusted"].to_dict("records")
    ]
    if not doubtful:
        return ""
    return f"Not trusted: generated text contradicts the readout under {', '.join(dict.fromkeys(doubtful))}"


def _stem(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", str(name)).strip("-")[:_LONGEST]
