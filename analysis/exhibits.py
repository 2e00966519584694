"""The pictures of a run with what is said about each: a title, and a caption that serves as its alt text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.captions import (
    TITLES,
    of_attacks,
    of_cost,
    of_forecast,
    of_front,
    of_interactions,
    of_margins,
    of_plane,
    of_roc,
    of_secrets,
    of_square,
    of_trust,
)
from analysis.folder import Run
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


def _exhibit(run: Run, name: str) -> Exhibit:
    stem = name.removesuffix(".png")
    # Behind the kind: the readout, the defense or the attack that the picture is of.
    kind = next((one for one in ROOMS if re.match(rf"{one}(-|$)", stem)), stem)
    of = stem.removeprefix(kind).lstrip("-")
    table = f"{stem}.csv" if f"{stem}.csv" in run.files else ""
    points = run.tables.get(stem)
    if points is not None and "defense" in points and points["defense"].nunique() == 1 and kind in HEADLINES:
        of = str(points["defense"].iloc[0])  # the stem has its letters alone
    title = {**TITLES, **HEADLINES}.get(kind, stem.replace("-", " "))
    title = title.format(of or "the defense")
    title += f" ({of})" * bool(of and of not in title)
    caption = _caption(run, kind, points) if points is not None and len(points) else ""
    plain = f"Figure {name} of this run, as the command drew it"
    plain += "; its numbers are in the table beside it." * bool(table) or "."
    return Exhibit(name, kind, ROOMS.get(kind, "run"), title, caption or plain, table)


def _caption(run: Run, kind: str, points: pd.DataFrame) -> str:
    """The caption that the command drew, made again; empty where the table is not what it was made from."""
    judge = run.record.get("judge") or {}
    told: dict[str, Callable[[pd.DataFrame, Any], str]] = {
        "margins": of_margins,
        "plane": of_plane,
        "square": of_square,
        "roc": of_roc,
        "attacks": of_attacks,
        "forecast": of_forecast,
        "interactions": of_interactions,
        "front": lambda rows, about: of_front(rows, about, run.record["attacks"]),
        "cost": of_cost,
        "rates": lambda rows, about: of_trust(rows, about, judge["name"], judge["new_tokens"]),
        "calibration": lambda rows, about: of_trust(
            run.tables["validity"], about, judge["name"], judge["new_tokens"]
        ),
        "secrets": lambda rows, about: of_secrets(rows, about, judge["new_tokens"]),
    }
    if kind in CAPTIONS:
        counts = (int(run.record["data"]["n_harmful"]), int(run.record["data"]["n_benign"]))
        told[kind] = lambda rows, about: CAPTIONS[kind](rows, about, counts)
    context = run.context
    if "reported_on" in run.record:
        context = replace(context, split=str(run.record["reported_on"]))
    try:
        return told[kind](points, context)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        return ""
