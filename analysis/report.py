"""One page of one or several runs that holds all it shows: charts, tables, pictures, queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.cells import HtmlTable
from analysis.charted import build_chart_data, map_family_shapes
from analysis.embedded import dump_script_json, encode_picture, encode_table, choose_fitting, build_content_policy
from analysis.exhibits import INTERACTIVE_KINDS, ReportFigure, list_report_figures
from analysis.folder import Run
from analysis.palette import BLUE, FAMILY_STYLES, GREEN, ORANGE, PURPLE, SKY, VERMILION
from analysis.tabled import compare_runs, build_attack_tables, build_cost_tables, build_ensemble_tables, build_summary_tables, build_validity_tables

MAX_PAGE_BYTES = 7_900_000  # bytes of a page: what a mail server takes, and a phone opens
RUN_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_SCRIPT_FILES = ("look.js", "plane.js", "closer.js", "start.js")
_PAGE_FOLDER = Path(__file__).parent / "page"


@dataclass(frozen=True)
class _RunSection:
    """A run, made ready for the template."""

    run: Run
    summaries: list[HtmlTable]
    sections: list[tuple[str, str, list[HtmlTable], list[ReportFigure]]]
    files: list[str]


def render_page(runs: Sequence[Run], max_bytes: int = MAX_PAGE_BYTES) -> str:
    """Return the page as HTML.

    Args:
        runs: in the order of the page, no two with one name.
        max_bytes: bytes; pictures, then tables, are left out where they would pass it, and the page says which.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from vl_convert import javascript_bundle

    maker = Environment(
        loader=FileSystemLoader(_PAGE_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Nothing may come before the first byte or behind the last: the policy names scripts by their hashes.
    ours = "\n".join((_PAGE_FOLDER / one).read_text("utf-8") for one in _SCRIPT_FILES)
    # Its own type hints ask for a snippet; without one it shows its libraries to the page.
    bundle: Any = javascript_bundle
    scripts = (bundle(), f'(() => {{\n"use strict";\n{ours}\n}})();')
    compared, dots = compare_runs(runs)
    data = {
        "runs": [build_chart_data(run) for run in runs],
        "across": dots,
        "colors": RUN_COLORS,
        "shapes": map_family_shapes(),
    }
    told: dict[str, Any] = {
        "parts": [_build_run_section(run) for run in runs],
        "compared": compared,
        "policy": build_content_policy(scripts),
        "scripts": [Markup(script) for script in scripts],
        "style": Markup((_PAGE_FOLDER / "report.css").read_text("utf-8")),
        "data": Markup(dump_script_json(data)),
        "colors": {name: color for name, (color, _) in FAMILY_STYLES.items()},
    }
    template = maker.get_template("report.html")
    bare = template.render(told, held={}, left_out=[])
    held = {
        (run.name, name): encode_table(name, file) if name.endswith(".csv") else (name, encode_picture(file))
        for run in runs
        for name, file in run.files.items()
    }
    # Pictures first, then tables, the short ones first: so most of what there is finds room.
    order = sorted(held, key=lambda key: (key[1].endswith(".csv"), len(held[key][1])))
    room = max_bytes - len(bare.encode()) - 20_000
    kept = choose_fitting({key: len(held[key][1]) for key in order}, room)
    left = [f"{run}/{name}" for run, name in order if (run, name) not in kept]
    return template.render(told, held={key: held[key] for key in kept}, left_out=left)


def _build_run_section(run: Run) -> _RunSection:
    found = list_report_figures(run)
    tables = {
        "run": ("Pictures of the run", []),
        "attacks": ("Defenses × attacks", build_attack_tables(run)),
        "validity": ("Validity of the readout", build_validity_tables(run)),
        "cost": ("Cost", build_cost_tables(run)),
        "ensembles": ("Ensembles", build_ensemble_tables(run)),
        "mechanism": ("Mechanism: where in the model", []),
    }
    drawn = "plane" if "summary" in run.tables else "", *(INTERACTIVE_KINDS[1:] if "scores" in run.tables else ())
    folded = [one for one in found if one.kind in drawn]
    rooms = [
        (name, head, shown, pictures)
        for name, (head, shown) in tables.items()
        if (pictures := [one for one in found if one.section == name and one not in folded]) or shown
    ]
    if folded:
        rooms.append(("drawn", "The charts above, as the command drew them", [], folded))
    files = sorted(name for name in run.files if name.endswith(".csv"))
    return _RunSection(run, build_summary_tables(run) if "summary" in run.tables else [], rooms, files)
