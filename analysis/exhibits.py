"""The pictures of a run with what is said about each: a title, and a caption that serves as its alt text."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.captions import (
    FIGURE_TITLES,
    caption_attack_grid,
    caption_cost,
    caption_margins,
    caption_plane,
    caption_roc,
    caption_secrets,
    caption_square,
    caption_validity,
)
from analysis.ensemble_captions import caption_forecast, caption_pareto_front, caption_interactions
from analysis.folder import Run, make_caption_context
from analysis.wording import MECHANISM_CAPTIONS, MECHANISM_TITLES

# Pictures that the page draws anew, so that they can be asked; they are kept behind a fold.
INTERACTIVE_KINDS = ("plane", "roc", "margins", "attacks")
FIGURE_SECTIONS = {
    "plane": "run",
    "roc": "run",
    "margins": "run",
    "square": "run",
    "secrets": "run",
    "attacks": "attacks",
    "cost": "cost",
    "calibration": "validity",
    "rates": "validity",
    "forecast": "ensembles",
    "interactions": "ensembles",
    "front": "ensembles",
    **dict.fromkeys(MECHANISM_TITLES, "mechanism"),
}


@dataclass(frozen=True)
class ReportFigure:
    """A picture of a run.

    Attributes:
        name: of its file.
        kind: what is drawn, such as `plane`.
        section: the part of the page that it belongs to.
        title: a line above it.
        caption: what stands in it, for those who cannot see it.
        table: name of the file that it was drawn from; empty where there is none.
    """

    name: str
    kind: str
    section: str
    title: str
    caption: str
    table: str


def list_report_figures(run: Run) -> list[ReportFigure]:
    """Return the pictures of a run, in the order of the page."""
    found = [_describe_report_figure(run, name) for name in run.files if name.endswith(".png")]
    rank = list(FIGURE_SECTIONS)
    return sorted(found, key=lambda one: (rank.index(one.kind) if one.kind in FIGURE_SECTIONS else len(rank), one.name))


def find_figure_kind(stem: str) -> str:
    """Return what a picture of that name shows; behind it stands a readout, a defense or an attack.

    >>> kind_of("parts-backdoor"), kind_of("plane-base64"), kind_of("mine")
    ('parts', 'plane', 'mine')
    """
    return next((one for one in FIGURE_SECTIONS if re.match(rf"{one}(-|$)", stem)), stem)


def format_figure_title(kind: str, points: pd.DataFrame) -> str:
    """Return the title that the command puts above a picture."""
    return {**FIGURE_TITLES, **MECHANISM_TITLES}[kind].format(find_single_defense(kind, points) or "the defense")


def find_single_defense(kind: str, points: pd.DataFrame) -> str:
    """The defense that a picture of a mechanism is of, empty where there are several."""
    alone = kind in MECHANISM_TITLES and "defense" in points and points["defense"].nunique() == 1
    return str(points["defense"].iloc[0]) if alone else ""


def _describe_report_figure(run: Run, name: str) -> ReportFigure:
    stem = name.removesuffix(".png")
    kind = find_figure_kind(stem)
    table = f"{stem}.csv" if f"{stem}.csv" in run.files else ""
    points = run.tables.get(stem, pd.DataFrame())
    title = format_figure_title(kind, points) if kind in FIGURE_SECTIONS else stem.replace("-", " ")
    of = find_single_defense(kind, points) or stem.removeprefix(kind).lstrip("-")
    title += f" ({of})" * bool(of and of not in title)
    caption = ""
    if len(points):
        # A table of another version may lack what its caption says.
        with suppress(KeyError, ValueError, TypeError, IndexError, AttributeError):
            caption = format_figure_caption(run, stem)
    plain = f"Figure {name} of this run, as the command drew it"
    plain += "; its numbers are in the table beside it." * bool(table) or "."
    return ReportFigure(name, kind, FIGURE_SECTIONS.get(kind, "run"), title, caption or plain, table)


def format_figure_caption(run: Run, stem: str) -> str:
    """Return the caption that the command puts below a picture, made from the table of that name."""
    kind, points = find_figure_kind(stem), run.tables[stem]
    judge = run.record.get("judge") or {}
    told: dict[str, Callable[[pd.DataFrame, Any], str]] = {
        "margins": caption_margins,
        "plane": caption_plane,
        "square": caption_square,
        "roc": caption_roc,
        "attacks": caption_attack_grid,
        "forecast": lambda rows, about: caption_forecast(rows, about, _count_drawn_queries(run)),
        "interactions": lambda rows, about: caption_interactions(rows, about, _count_drawn_queries(run)),
        "front": lambda rows, about: caption_pareto_front(rows, about, run.record["attacks"], _count_drawn_queries(run)),
        "cost": caption_cost,
        "rates": lambda rows, about: caption_validity(rows, about, judge["name"], judge["new_tokens"]),
        "calibration": lambda rows, about: caption_validity(
            run.tables[stem.replace("calibration", "rates", 1)], about, judge["name"], judge["new_tokens"]
        ),
        "secrets": lambda rows, about: caption_secrets(rows, about, judge["new_tokens"]),
    }
    if kind in MECHANISM_CAPTIONS:
        told[kind] = lambda rows, about: MECHANISM_CAPTIONS[kind](rows, about, _count_drawn_queries(run))
    return told[kind](points, make_caption_context(run.record, stem.removeprefix(f"{kind}-")))


def _count_drawn_queries(run: Run) -> tuple[int, int] | None:
    """How many harmful and benign queries figures are of; None where one half is drawn and not counted."""
    named = ("n_harmful", "n_benign")
    if "reported_on" not in run.record:
        harmful, benign = (int(run.record["data"][name]) for name in named)
        return harmful, benign
    if "summary" not in run.tables:
        return None
    harmful, benign = (int(run.tables["summary"][name].iloc[0]) for name in named)
    return harmful, benign
