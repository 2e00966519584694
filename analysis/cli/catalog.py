"""What there is to choose from: defenses, models, data sets, attacks, readouts."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.cli.app import app
from analysis.cli.options import (
    AttackOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    SeedOption,
    SettingsOption,
)
from defenses.errors import UserError, unknown_name_error

if TYPE_CHECKING:
    from analysis.datasets.queries import Query
    from analysis.models.session import ModelSession
    from analysis.report.results import Run
    from analysis.studies.run_spec import RunSpec
    from defenses.contract import Defense


if TYPE_CHECKING:
    from analysis.datasets.public import PublicDataset

CatalogRows = list[dict[str, Any]]

_SHIPPED_SET_DESCRIPTIONS = {
    "contrast": "harmful requests, their benign twins, and plain benign requests",
    "twins": "harmful requests and their benign twins only: the hard comparison",
    "plain": "harmful requests and plain benign ones only: the easy comparison",
    "everyday": "the plain benign requests alone, for a set that has none: --data advbench+everyday",
}


def collect_catalog() -> dict[str, CatalogRows]:
    """Return each kind of thing as rows of plain values."""
    from analysis.attacks import load_shipped_attacks
    from analysis.datasets.loading import SHIPPED_SETS
    from analysis.datasets.public import PUBLIC_DATASETS
    from analysis.models.registry import MODEL_REGISTRY
    from analysis.studies.run_spec import READOUT_DESCRIPTIONS
    from defenses.catalog import find_defense_classes
    from defenses.settings import get_settings

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
        "data": [
            *map(_describe_shipped_set, SHIPPED_SETS),
            *map(_describe_public_set, PUBLIC_DATASETS.values()),
        ],
        "attacks": [
            {"name": one.name, "what": one.description, "source": one.source, "url": one.url}
            for one in load_shipped_attacks().values()
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
    from analysis.datasets.loading import SHIPPED_SETS, load_shipped_set

    asked = load_shipped_set(name).queries
    harmful = sum(query.harmful for query in asked)
    counts = {"harmful": harmful, "benign": len(asked) - harmful}
    return {
        "name": name,
        "kinds": list(SHIPPED_SETS[name]),
        "what": _SHIPPED_SET_DESCRIPTIONS[name],
        **counts,
        "licence": "CC BY 4.0",
    }


def _describe_public_set(dataset: PublicDataset) -> dict[str, Any]:
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


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument(help="defenses, models, data, attacks or readouts")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what there is: defenses, models, data sets, attacks, readouts."""
    shelves = collect_catalog()
    if what is not None and what not in shelves:
        raise unknown_name_error("list", what, shelves)
    chosen = {what: shelves[what]} if what else shelves
    if as_json:
        typer.echo(json.dumps(chosen, indent=2, ensure_ascii=False))
    else:
        print_catalog(chosen)


@app.command()
def explain(
    defense: Annotated[str, typer.Argument(help="Name, or the path of a .py file.")],
    model: ModelOption = "smollm2",
    text: Annotated[
        str | None, typer.Option("--text", help="The request; by default a harmless one of the shipped.")
    ] = None,
    attack: AttackOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Print a defense's card, and what the model would read of one request under it.

    analyze explain smooth_llm --set copies=3
    """
    from analysis.studies.run_spec import build_run_spec

    request = build_run_spec(model, "contrast", "test", None, None, device, dtype, seed, offline, attack)

    raise typer.Exit(run_explain_command(request, defense, settings or [], text))


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what earlier runs have found out and later ones need not, by kind; or clear it.

    Scores and drafts; readouts with their thresholds; the verdicts they were made from; what `analyze
    validate` found; residual means; costs. Converted models and data sets that were fetched stay.
    """
    from analysis.models.cache import clear_cache, count_cached_rows, count_json_files, get_score_cache_path

    place = get_score_cache_path()
    held = count_cached_rows(place) if not clear else None
    kinds = count_json_files(place)
    if held is None:
        clear_cache(place)
        typer.echo(f"{place} is cleared, and so is what was kept beside it: {', '.join(kinds)}")
    elif as_json:
        typer.echo(json.dumps({"path": str(place), **held, "kept": kinds}))
    else:
        size = held["bytes"] / 2**20
        typer.echo(f"{place}: {held['scores']} scores and {held['drafts']} drafts, {size:.1f} MiB")
        for kind, found in kinds.items():
            typer.echo(f"{place.with_name(kind)}: {found['count']} files, {found['bytes']:,} bytes")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are also compared.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page, one file.")] = Path("report.html"),
) -> None:
    """Make one page of one or several runs, which can be asked: from a defense to its queries. No network.

    analyze report runs/a runs/b -o report.html
    """
    raise typer.Exit(write_report(runs, out))


def run_explain_command(
    spec: RunSpec, defense_name: str, settings: Sequence[str], query_text: str | None
) -> int:
    """Print the card of a defense and, if this model can wear it, what the model reads; 0 in the end.

    Args:
        spec: model, attacks and seed.
        defense_name: of the defense.
        settings: of it.
        query_text: the request; None takes a shipped one.
    """
    from analysis.datasets.loading import load_queries
    from analysis.datasets.queries import Query
    from analysis.run import build_conditions
    from analysis.stats.tables import format_condition
    from defenses.catalog import choose_defenses
    from defenses.stack import list_members

    *_, chosen = choose_defenses([defense_name], settings)
    console = Console()
    for one in list_members(chosen):
        _print_defense_card(console, one)
    own = Query("own", query_text, harmful=False) if query_text else None
    asked = own or next(
        one for one in load_queries("contrast").select_split("test").queries if not one.harmful
    )
    for attack in spec.attacks:
        attack.check_covers_queries([asked])
    bench, host = spec.open_session(Console(stderr=True))
    ready = chosen.prepare(host)
    if why := ready.missing_requirements():
        console.print(Text(f"\n{spec.model}: {why}", style="yellow"))
    for attack in spec.attacks:
        for part, one in build_conditions([ready]).items():
            console.print()
            console.rule(Text(format_condition({"attack": attack.name, "defense": part})), align="left")
            _print_prompts(console, bench.with_attack(attack), one, asked)
    return 0


def _print_defense_card(console: Console, defense: Defense) -> None:
    """Family, cost, source, what it does, settings."""
    from defenses.settings import get_settings

    source = defense.source
    console.print(Text(defense.name, style="bold"), Text(f"{defense.family}, {defense.cost}", style="dim"))
    told, _, about = (inspect.getdoc(type(defense)) or "").partition("\n\nAttributes:\n")
    for paragraph in told.split("\n\n"):
        console.print(Text(" ".join(paragraph.split())))
    console.print(Text(f"\n{about}" if about else ""))
    console.print(Text(f"Source: {source.title} {source.url}\nWording: {source.wording}", style="dim"))
    if set_to := get_settings(defense):
        told = "\n".join(f"  --set {key}={value}" for key, value in set_to.items())
        console.print(Text(told, style="dim"))


def _print_prompts(console: Console, session: ModelSession, defense: Defense, query: Query) -> None:
    """What the model is asked first, and the prompts; secrets as a mark."""
    from analysis.models.chat_template import redact_secrets

    session = dataclasses.replace(session, defense_calls=session.defense_calls.copy_uncached())
    prompts = session.render_query(defense, query)
    secrets = defense.secret_texts()
    for asked, said in session.defense_calls.transcript:
        text = redact_secrets(session.chat_template.decode_tokens(asked), secrets)
        console.print(Text("asked first:", style="bold"), Text(text, style="magenta"))
        console.print(Text("it says:", style="bold"), Text(redact_secrets(said, secrets), style="green"))
    for number, prompt in enumerate(prompts, 1):
        title = f"reads ({number} of {len(prompts)}):" if len(prompts) > 1 else "reads:"
        console.print(Text(title, style="bold"))
        console.print(Text(redact_secrets(prompt.text, secrets), style="cyan"))
    if len(prompts) > 1:
        console.print(Text(f"The margin is the {'highest' if defense.pool == 'max' else 'mean'} of these."))
    if defense.retokenizes and not secrets:
        tokens = (session.chat_template.decode_tokens([token]) for token in prompts[0].ids)
        console.print(Text("in tokens:", style="bold"), Text("|".join(tokens), style="cyan"))
    if defense.weights_fingerprint() != "" or defense.logit_blend():
        weights = " and ".join(f"{weight:+g} x {one.name}" for weight, one in defense.logit_blend())
        console.print(Text(f"Logits: {weights}." if weights else "The model itself is changed meanwhile."))


def write_report(folders: Sequence[Path], out: Path) -> int:
    """Write the page of these runs, and say where it is and what it lacks.

    Args:
        folders: of runs, in the order of the page.
        out: the page; a file of that name is replaced.
    """
    from analysis.files import check_output_folder, write_text_file
    from analysis.report.folder import read_run
    from analysis.report.html import render_page

    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it, such as {out / 'report.html'}")
    if out.suffix.lower() not in (".html", ".htm"):  # nor is a run's own file replaced by mistake
        raise UserError(f"--out {out}: the page is HTML; name it {out.with_suffix('.html')}")
    check_output_folder(out.parent)
    runs: list[Run] = []
    for folder in folders:
        runs.append(read_run(folder, {run.name for run in runs}))
    text = render_page(runs)
    try:
        write_text_file(out, text)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--out {out} cannot be written ({error.strerror}); choose another file") from error
    console = Console(stderr=True)
    for run in runs:
        if run.missing_texts_reason and "scores" in run.tables:
            console.print(Text(f"note: {run.name}: {run.missing_texts_reason}"), soft_wrap=True)
    console.print(
        Text(f"{out}: {len(text.encode()) / 1e6:.1f} MB, one file that holds all it shows"), soft_wrap=True
    )
    return 0
