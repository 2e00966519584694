"""One page of one or several runs that holds all it shows: charts, tables, pictures, queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.cells import Shown
from analysis.charted import charted, families
from analysis.embedded import as_json, as_picture, as_table, fitting, policy
from analysis.exhibits import REDRAWN, Exhibit, exhibits
from analysis.folder import Run
from analysis.palette import BLUE, FAMILIES, GREEN, ORANGE, PURPLE, SKY, VERMILION
from analysis.tabled import across, against_attacks, costs, ensembles, summaries, validity

LIMIT = 7_900_000  # bytes of a page: what a mail server takes, and a phone opens
RUN_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_SCRIPTS = ("look.js", "plane.js", "closer.js", "start.js")
_PLACE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class _Part:
    """A run, made ready for the template."""

    run: Run
    summaries: list[Shown]
    rooms: list[tuple[str, str, list[Shown], list[Exhibit]]]
    files: list[str]


def page(runs: Sequence[Run], limit: int = LIMIT) -> str:
    """Return the page as HTML.

    Args:
        runs: in the order of the page, no two with one name.
        limit: bytes; pictures, then tables, are left out where they would pass it, and the page says which.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from vl_convert import javascript_bundle

    maker = Environment(
        loader=FileSystemLoader(_PLACE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Nothing may come before the first byte or behind the last: the policy names scripts by their hashes.
    ours = "\n".join((_PLACE / one).read_text("utf-8") for one in _SCRIPTS)
    # Its own type hints ask for a snippet; without one it shows its libraries to the page.
    bundle: Any = javascript_bundle
    scripts = (bundle(), f'(() => {{\n"use strict";\n{ours}\n}})();')
    compared, dots = across(runs)
    data = {
        "runs": [charted(run) for run in runs],
        "across": dots,
        "colors": RUN_COLORS,
        "shapes": families(),
    }
    told: dict[str, Any] = {
        "parts": [_part(run) for run in runs],
        "compared": compared,
        "policy": policy(scripts),
        "scripts": [Markup(script) for script in scripts],
        "style": Markup((_PLACE / "report.css").read_text("utf-8")),
        "data": Markup(as_json(data)),
        "colors": {name: color for name, (color, _) in FAMILIES.items()},
    }
    template = maker.get_template("report.html")
    bare = template.render(told, held={}, left_out=[])
    held = {
        (run.name, name): as_table(name, file) if name.endswith(".csv") else (name, as_picture(file))
        for run in runs
        for name, file in run.files.items()
    }
    # Pictures first, then tables, the short ones first: so most of what there is finds room.
    order = sorted(held, key=lambda key: (key[1].endswith(".csv"), len(held[key][1])))
    room = limit - len(bare.encode()) - 20_000
    kept = fitting({key: len(held[key][1]) for key in order}, room)
    left = [f"{run}/{name}" for run, name in order if (run, name) not in kept]
    return template.render(told, held={key: held[key] for key in kept}, left_out=left)


def _part(run: Run) -> _Part:
    found = exhibits(run)
    tables = {
        "run": ("Pictures of the run", []),
        "attacks": ("Defenses × attacks", against_attacks(run)),
        "validity": ("Validity of the readout", validity(run)),
        "cost": ("Cost", costs(run)),
        "ensembles": ("Ensembles", ensembles(run)),
        "mechanism": ("Mechanism: where in the model", []),
    }
    drawn = "plane" if "summary" in run.tables else "", *(REDRAWN[1:] if "scores" in run.tables else ())
    folded = [one for one in found if one.kind in drawn]
    rooms = [
        (name, head, shown, pictures)
        for name, (head, shown) in tables.items()
        if (pictures := [one for one in found if one.room == name and one not in folded]) or shown
    ]
    if folded:
        rooms.append(("drawn", "The charts above, as the command drew them", [], folded))
    files = sorted(name for name in run.files if name.endswith(".csv"))
    return _Part(run, summaries(run) if "summary" in run.tables else [], rooms, files)
