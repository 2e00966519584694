"""What there is to choose from: defenses, models, data sets, attacks, readouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis import attacks, datasets
from analysis.asking import READOUTS
from analysis.known_models import TABLE
from analysis.queries import SHIPPED, shipped
from defenses.catalog import classes
from defenses.settings import settings_of

Shelf = list[dict[str, Any]]

_DATA = {
    "contrast": "harmful requests, their benign twins, and plain benign requests",
    "twins": "harmful requests and their benign twins only: the hard comparison",
    "plain": "harmful requests and plain benign ones only: the easy comparison",
    "everyday": "the plain benign requests alone, for a set that has none: --data advbench+everyday",
}


def everything() -> dict[str, Shelf]:
    """Return each kind of thing as rows of plain values."""
    return {
        "defenses": [
            {
                "name": name,
                "family": cls.family,
                "cost": cls.cost,
                "what": (cls.__doc__ or "").strip().splitlines()[0],
                "source": cls.source.title,
                "url": cls.source.url,
                "wording": cls.source.wording,
                "settings": {key: _plain(value) for key, value in settings_of(cls).items()},
            }
            for name, cls in classes().items()
        ],
        "models": [
            {"name": card.name, "id": card.repo, "gated": card.gated, "note": card.note}
            for card in TABLE.values()
        ],
        "data": [*map(_shipped, SHIPPED), *map(_public, datasets.TABLE.values())],
        "attacks": [
            {"name": one.name, "what": one.what, "source": one.source, "url": one.url}
            for one in attacks.shipped().values()
        ],
        "readouts": [{"name": name, "what": what} for name, what in READOUTS.items()],
    }


def show(shelves: Mapping[str, Shelf]) -> None:
    """Print the rows as tables; names are never cut, and long texts go below each other."""
    console = Console()
    for title, rows in shelves.items():
        short = [key for key in ("name", "id", "gated") if key in rows[0]]
        table = Table(title=title, title_justify="left", show_header=False, show_edge=False, pad_edge=False)
        for _ in short:
            table.add_column(no_wrap=True)
        table.add_column()
        for row in rows:
            cells = [("gated" if row[key] else "") if key == "gated" else str(row[key]) for key in short]
            table.add_row(*map(Text, cells), _described(row))
        console.print(table)
        console.print()


def _shipped(name: str) -> dict[str, Any]:
    """A set that is part of this program."""
    asked = shipped(name).queries
    harmful = sum(query.harmful for query in asked)
    counts = {"harmful": harmful, "benign": len(asked) - harmful}
    return {"name": name, "kinds": list(SHIPPED[name]), "what": _DATA[name], **counts, "licence": "CC BY 4.0"}


def _public(card: datasets.Card) -> dict[str, Any]:
    """A set that its publisher keeps; without a revision it is for the user to fetch."""
    return {
        "name": card.name,
        "what": card.what,
        "harmful": card.harmful,
        "benign": card.benign,
        "licence": card.licence,
        "page": card.page,
        "revision": card.revision,
        "sha256": dict(card.files),
    }


def _described(row: Mapping[str, Any]) -> Text:
    """What a thing is; of a defense also whose it is and what may be set, of data their rows and licence."""
    text = Text(row.get("what", row.get("note", "")))
    if "licence" in row:
        counts = f"{row['harmful']} harmful, {row['benign']} benign"
        text.append(f"\n{' · '.join((counts, row['licence'], row.get('page', 'shipped')))}", style="dim")
    if "cost" in row:
        text.append(f"\n{row['family']} · {row['cost']}", style="dim")
    if row.get("source"):
        text.append(f"\n{row['source']}", style="dim")
    if row.get("settings"):
        settings = ", ".join(f"{key}={_short(value)}" for key, value in row["settings"].items())
        text.append(f"\n--set {settings}", style="dim")
    return text


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _short(value: Any) -> str:
    text = str(value)
    return "…" if len(text) > 30 else text
