"""The pictures of a run with what is said about each: a title, and a caption that serves as its alt text."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.captions import (
    TITLES,
    of_attacks,
    of_cost,
    of_margins,
    of_plane,
    of_roc,
    of_secrets,
    of_square,
    of_trust,
)
from analysis.ensemble_captions import of_forecast, of_front, of_interactions
from analysis.folder import Run, context
from analysis.wording import CAPTIONS, HEADLINES

# Pictures that the page draws anew, so that they can be asked; they are kept behind a fold.
REDRAWN = ("plane", "roc", "margins", "attacks")
ROOMS = {
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
    **dict.fromkeys(HEADLINES, "mechanism"),
}


@dataclass(frozen=True)
class Exhibit:
    """A picture of a run.

    Attributes:
        name: of its file.
        kind: what is drawn, such as `plane`.
        room: the part of the page that it belongs to.
        title: a line above it.
        caption: what stands in it, for those who cannot see it.
        table: name of the file that it was drawn from; empty where there is none.
    """

    name: str
    kind: str
    room: str
    title: str
    caption: str
    table: str


def exhibits(run: Run) -> list[Exhibit]:
    """Return the pictures of a run, in the order of the page."""
    found = [_exhibit(run, name) for name in run.files if name.endswith(".png")]
    rank = list(ROOMS)
    return sorted(found, key=lambda one: (rank.index(one.kind) if one.kind in ROOMS else len(rank), one.name))


def kind_of(stem: str) -> str:
    """Return what a picture of that name shows; behind it stands a readout, a defense or an attack.

    >>> kind_of("parts-backdoor"), kind_of("plane-base64"), kind_of("mine")
    ('parts', 'plane', 'mine')
    """
    return next((one for one in ROOMS if re.match(rf"{one}(-|$)", stem)), stem)


def title_of(kind: str, points: pd.DataFrame) -> str:
    """Return the title that the command puts above a picture."""
    return {**TITLES, **HEADLINES}[kind].format(_only_defense(kind, points) or "the defense")


def _only_defense(kind: str, points: pd.DataFrame) -> str:
    """The defense that a picture of a mechanism is of, empty where there are several."""
    alone = kind in HEADLINES and "defense" in points and points["defense"].nunique() == 1
    return str(points["defense"].iloc[0]) if alone else ""


def _exhibit(run: Run, name: str) -> Exhibit:
    stem = name.removesuffix(".png")
    kind = kind_of(stem)
    table = f"{stem}.csv" if f"{stem}.csv" in run.files else ""
    points = run.tables.get(stem, pd.DataFrame())
    title = title_of(kind, points) if kind in ROOMS else stem.replace("-", " ")
    of = _only_defense(kind, points) or stem.removeprefix(kind).lstrip("-")
    title += f" ({of})" * bool(of and of not in title)
    caption = ""
    if len(points):
        # A table of another version may lack what its caption says.
        with suppress(KeyError, ValueError, TypeError, IndexError, AttributeError):
            caption = caption_of(run, stem)
    plain = f"Figure {name} of this run, as the command drew it"
    plain += "; its numbers are in the table beside it." * bool(table) or "."
    return Exhibit(name, kind, ROOMS.get(kind, "run"), title, caption or plain, table)


def caption_of(run: Run, stem: str) -> str:
    """Return the caption that the command puts below a picture, made from the table of that name."""
    kind, points = kind_of(stem), run.tables[stem]
    judge = run.record.get("judge") or {}
    told: dict[str, Callable[[pd.DataFrame, Any], str]] = {
        "margins": of_margins,
        "plane": of_plane,
        "square": of_square,
        "roc": of_roc,
        "attacks": of_attacks,
        "forecast": lambda rows, about: of_forecast(rows, about, _counts(run)),
        "interactions": lambda rows, about: of_interactions(rows, about, _counts(run)),
        "front": lambda rows, about: of_front(rows, about, run.record["attacks"], _counts(run)),
        "cost": of_cost,
        "rates": lambda rows, about: of_trust(rows, about, judge["name"], judge["new_tokens"]),
        "calibration": lambda rows, about: of_trust(
            run.tables[stem.replace("calibration", "rates", 1)], about, judge["name"], judge["new_tokens"]
        ),
        "secrets": lambda rows, about: of_secrets(rows, about, judge["new_tokens"]),
    }
    if kind in CAPTIONS:
        told[kind] = lambda rows, about: CAPTIONS[kind](rows, about, _counts(run))
    return told[kind](points, context(run.record, stem.removeprefix(f"{kind}-")))


def _counts(run: Run) -> tuple[int, int] | None:
    """How many harmful and benign queries figures are of; None where one half is drawn and not counted."""
    named = ("n_harmful", "n_benign")
    if "reported_on" not in run.record:
        harmful, benign = (int(run.record["data"][name]) for name in named)
        return harmful, benign
    if "summary" not in run.tables:
        return None
    harmful, benign = (int(run.tables["summary"][name].iloc[0]) for name in named)
    return harmful, benign
