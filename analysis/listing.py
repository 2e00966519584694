"""What there is to choose from: defenses, models, data sets, attacks, readouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis import attacks, datasets
from analysis.asking import READOUT_DESCRIPTIONS
from analysis.known_models import MODEL_REGISTRY
from analysis.queries import SHIPPED_SETS, load_shipped_set
from defenses.catalog import find_defense_classes
from defenses.settings import get_settings

CatalogRows = list[dict[str, Any]]

_SHIPPED_SET_DESCRIPTIONS = {
    "contrast": "harmful requests, their benign twins, and plain benign requests",
    "twins": "harmful requests and their benign twins only: the hard comparison",
    "plain": "harmful requests and plain benign ones only: the easy comparison",
    "everyday": "the plain benign requests alone, for a set that has none: --data advbench+everyday",
}


def collect_catalog() -> dict[str, CatalogRows]:
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
                "settings": {key: _to_plain_value(value) for key, value in get_settings(cls).items()},
            }
            for name, cls in find_defense_classes().items()
        ],
        "models": [
            {"name": card.name, "id": card.repo, "gated": card.gated, "note": card.note}
            for card in MODEL_REGISTRY.values()
        ],
        "data": [*map(_describe_shipped_set, SHIPPED_SETS), *map(_describe_public_set, datasets.PUBLIC_DATASETS.values())],
        "attacks": [
            {"name": one.name, "what": one.description, "source": one.source, "url": one.url}
            for one in attacks.load_shipped_attacks().values()
        ],
        "readouts": [{"name": name, "what": what} for name, what in READOUT_DESCRIPTIONS.items()],
    }


def print_catalog(rows_by_kind: Mapping[str, CatalogRows]) -> None:
    """Print the rows as tables; names are never cut, and long texts go below each other."""
    console = Console()
    for title, rows in rows_by_kind.items():
        short = [key for key in ("name", "id", "gated") if key in rows[0]]
        table = Table(title=title, title_justify="left", show_header=False, show_edge=False, pad_edge=False)
        for _ in short:
            table.add_column(no_wrap=True)
        table.add_column()
        for row in rows:
            cells = [("gated" if row[key] else "") if key == "gated" else str(row[key]) for key in short]
            table.add_row(*map(Text, cells), _format_description(row))
        console.print(table)
        console.print()


def _describe_shipped_set(name: str) -> dict[str, Any]:
    """A set that is part of this program."""
    asked = load_shipped_set(name).queries
    harmful = sum(query.harmful for query in asked)
    counts = {"harmful": harmful, "benign": len(asked) - harmful}
    return {"name": name, "kinds": list(SHIPPED_SETS[name]), "what": _SHIPPED_SET_DESCRIPTIONS[name], **counts, "licence": "CC BY 4.0"}


def _describe_public_set(dataset: datasets.PublicDataset) -> dict[str, Any]:
    """A set that its publisher keeps; without a revision it is for the user to fetch."""
    return {
        "name": dataset.name,
        "what": dataset.description,
        "harmful": dataset.n_harmful,
        "benign": dataset.n_benign,
        "licence": dataset.license,
        "page": dataset.page,
        "revision": dataset.revision,
        "sha256": dict(dataset.files),
    }


def _format_description(row: Mapping[str, Any]) -> Text:
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
        settings = ", ".join(f"{key}={_shorten_value(value)}" for key, value in row["settings"].items())
        text.append(f"\n--set {settings}", style="dim")
    return text


def _to_plain_value(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _shorten_value(value: Any) -> str:
    text = str(value)
    return "…" if len(text) > 30 else text
