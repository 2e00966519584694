"""What there is to choose from: defenses, models, data sets, attacks, readouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from analysis.models import TABLE
from analysis.queries import SHIPPED
from defenses.catalog import classes, settings_of

Shelf = list[dict[str, Any]]

_DATA = {
    "contrast": "harmful requests, their benign twins, and plain benign requests",
    "twins": "harmful requests and their benign twins only: the hard comparison",
    "plain": "harmful requests and plain benign ones only: the easy comparison",
}


def everything(attacks: Mapping[str, str], readouts: Mapping[str, str]) -> dict[str, Shelf]:
    """Return each kind of thing as rows of plain values."""
    return {
        "defenses": [
            {
                "name": name,
                "family": cls.family,
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
        "data": [
            {"name": name, "kinds": list(kinds), "what": _DATA[name]} for name, kinds in SHIPPED.items()
        ],
        "attacks": [{"name": name, "what": what} for name, what in attacks.items()],
        "readouts": [{"name": name, "what": what} for name, what in readouts.items()],
    }


def show(shelves: Mapping[str, Shelf]) -> None:
    """Print the rows as tables."""
    console = Console()
    for title, rows in shelves.items():
        wanted = [key for key in rows[0] if key not in ("url", "wording", "kinds")]
        table = Table(*wanted, title=title, title_justify="left", show_edge=False, pad_edge=False)
        for row in rows:
            table.add_row(*(_cell(row[key]) for key in wanted))
        console.print(table)
        console.print()


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(value)}" for key, value in value.items())
    return {True: "gated", False: ""}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _short(value: Any) -> str:
    text = str(value)
    return "…" if len(text) > 30 else text
