"""The commands `list`, `explain`, `cache` and `report`; heavy libraries are imported inside the functions."""

from __future__ import annotations

import dataclasses
import errno
import functools
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
    DEFAULT_MODEL,
    AnswerPrefixOption,
    AttackOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    SeedOption,
    SettingsOption,
    TemplateOption,
)
from defenses.errors import UserError, check_unicode, unknown_name_error

if TYPE_CHECKING:
    from analysis.datasets.public_dataset import PublicDataset
    from analysis.models.session import ModelSession
    from analysis.report.results import Run
    from analysis.studies.run_spec import RunSpec
    from defenses.contract import Defense, QueryChat
    from defenses.images import QueryImage

CatalogRows = list[dict[str, Any]]


def collect_catalog() -> dict[str, CatalogRows]:
    """Return what `analyze list` shows: for each kind, a list of rows of plain values."""
    from analysis.attacks import load_shipped_attacks
    from analysis.checkpoints.registry import MODEL_REGISTRY
    from analysis.datasets.loading import SHIPPED_SETS
    from analysis.datasets.public import PUBLIC_DATASETS
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
            {
                "name": attack.name,
                "cost": attack.cost,
                "what": attack.description,
                "source": attack.source,
                "url": attack.url,
            }
            for attack in load_shipped_attacks().values()
        ],
        "readouts": [{"name": name, "what": what} for name, what in READOUT_DESCRIPTIONS.items()],
    }


def print_catalog(rows_by_kind: Mapping[str, CatalogRows]) -> None:
    """Print one table per kind; names are never truncated, long descriptions wrap."""
    console = Console()
    for title, rows in rows_by_kind.items():
        short_keys = [key for key in ("name", "id", "gated") if key in rows[0]]
        table = Table(title=title, title_justify="left", show_header=False, show_edge=False, pad_edge=False)
        for _ in short_keys:
            table.add_column(no_wrap=True)
        table.add_column()
        for row in rows:
            cells = [("gated" if row[key] else "") if key == "gated" else str(row[key]) for key in short_keys]
            table.add_row(*map(Text, cells), _format_description(row))
        console.print(table)
        console.print()


def _describe_shipped_set(name: str) -> dict[str, Any]:
    """Return the row of a query set that is shipped with the package."""
    from analysis.datasets.loading import SHIPPED_SETS, load_shipped_set

    queries = load_shipped_set(name).queries
    n_harmful = sum(query.harmful for query in queries)
    counts = {"harmful": n_harmful, "benign": len(queries) - n_harmful}
    return {
        "name": name,
        "kinds": list(SHIPPED_SETS[name].kinds),
        "what": SHIPPED_SETS[name].description,
        **counts,
        "licence": "CC BY 4.0",
    }


def _describe_public_set(dataset: PublicDataset) -> dict[str, Any]:
    """Return the row of a public query set; without a revision, the user has to download it."""
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
    """Return a row's description; for data also size and license, for a defense source, cost and settings."""
    from analysis.families import format_family

    text = Text(row.get("what", row.get("note", "")))
    if "licence" in row:
        counts = f"{row['harmful']} harmful, {row['benign']} benign"
        text.append(f"\n{' · '.join((counts, row['licence'], row.get('page', 'shipped')))}", style="dim")
    if "family" in row:
        text.append(f"\n{format_family(row['family'])} · {row['cost']}", style="dim")
    elif row.get("cost", "static") != "static":
        text.append(f"\nadapts to the model and its defense · {row['cost']} per query", style="dim")
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
    what: Annotated[
        str | None, typer.Argument(help="defenses, models, data, attacks or readouts. Default: all.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the available defenses, models, data sets, attacks and readouts."""
    rows_by_kind = collect_catalog()
    if what is not None and what not in rows_by_kind:
        raise unknown_name_error("list", what, rows_by_kind)
    chosen = {what: rows_by_kind[what]} if what else rows_by_kind
    if as_json:
        typer.echo(json.dumps(chosen, indent=2, ensure_ascii=False))
    else:
        print_catalog(chosen)


@app.command()
def explain(
    defense: Annotated[str, typer.Argument(help="Defense name or path of a .py file.")],
    model: ModelOption = DEFAULT_MODEL,
    text: Annotated[
        str | None, typer.Option("--text", help="The query. Default: a shipped benign query.")
    ] = None,
    attack: AttackOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    template: TemplateOption = None,
    answer_prefix: AnswerPrefixOption = None,
    settings: SettingsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Describe a defense and show the prompt that the model reads for one query under it.

    analyze explain smooth_llm --set copies=3
    """
    from analysis.studies.run_spec import build_run_spec

    spec = build_run_spec(
        model,
        "contrast",
        "test",
        None,
        None,
        device,
        dtype,
        seed,
        offline,
        attack,
        template=template,
        answer_prefix=answer_prefix,
    )
    raise typer.Exit(run_explain_command(spec, defense, settings or [], text))


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything in the cache.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show or clear the cache of earlier results.

    It holds scores, drafts (generations that defenses request), verdicts on responses, readouts with their
    thresholds, validity results, mean activations, fitted detectors and costs. Converted models and
    downloaded data sets are kept.
    """
    from analysis.models.cache import clear_cache, count_cached_rows, count_json_files, get_score_cache_path

    path = get_score_cache_path()
    row_counts = count_cached_rows(path) if not clear else None
    kinds = count_json_files(path)
    if row_counts is None:
        clear_cache(path)
        typer.echo(f"Cleared {path} and the folders beside it: {', '.join(kinds)}")
    elif as_json:
        typer.echo(json.dumps({"path": str(path), **row_counts, "kept": kinds}))
    else:
        size = row_counts["bytes"] / 2**20
        counts = ", ".join(
            f"{row_counts[name]} {label}"
            for name, label in (
                ("scores", "scores"),
                ("drafts", "drafts"),
                ("responses", "judged responses"),
            )
        )
        typer.echo(f"{path}: {counts}, {size:.1f} MiB")
        for kind, files in kinds.items():
            typer.echo(f"{path.with_name(kind)}: {files['count']} files, {files['bytes']:,} bytes")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several runs are also compared.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The HTML file to write.")] = Path("report.html"),
    images: Annotated[
        bool,
        typer.Option(
            "--images/--no-images",
            help="Show thumbnails of the queries' images, if the run's data set is still there, unchanged.",
        ),
    ] = True,
) -> None:
    """Build one self-contained, interactive HTML report from one or more runs.

    analyze report runs/a runs/b -o report.html
    """
    raise typer.Exit(write_report(runs, out, images))


def run_explain_command(
    spec: RunSpec, defense_name: str, settings: Sequence[str], query_text: str | None
) -> int:
    """Describe a defense and, if the model meets its requirements, print the prompts that the model reads.

    Args:
        spec: model, attacks and seed.
        defense_name: name of the defense, or path of its .py file.
        settings: `key=value` settings of the defense.
        query_text: text of the query; None takes a shipped benign query.

    Returns:
        The exit code, 0.
    """
    from analysis.datasets.loading import load_queries
    from analysis.datasets.queries import Query
    from analysis.run import build_conditions
    from analysis.stats.tables import format_condition
    from defenses.catalog import choose_defenses
    from defenses.images import get_last_image
    from defenses.stack import list_members

    *_, chosen = choose_defenses([defense_name], settings)
    console = Console()
    for member in list_members(chosen):
        _print_defense_card(console, member)
    if query_text:
        check_unicode(query_text, "the text of the query")
        query = Query("own", query_text, harmful=False)
    else:
        test_split = load_queries("contrast").select_split("test")
        query = next(query for query in test_split.queries if not query.harmful)
    for attack in spec.attacks:
        attack.check_covers_queries([query])
    opened = spec.open_model(Console(stderr=True))
    prepared = chosen.prepare(opened.model_info)
    if missing := prepared.missing_requirements():
        console.print(Text(f"\n{spec.model}: {missing}", style="yellow"))
    conditions = build_conditions([prepared])
    calls_model = any(defense.calls_model or defense.detects for defense in conditions.values())
    session = opened.load_session() if calls_model else opened.prompt_session
    for attack in spec.attacks:
        query_chats = attack.build_query_chats([query])
        if chosen.needs_images and get_last_image(query_chats[0].chat) is None:
            note = f"\nThe query has no image for {chosen.name} to change; use an attack that draws one, "
            note += "such as --attack typographic."
            console.print(Text(note, style="yellow"))
        for name, defense in conditions.items():
            console.print()
            console.rule(Text(format_condition({"attack": attack.name, "defense": name})), align="left")
            _print_prompts(console, session, defense, query_chats)
    return 0


def _print_defense_card(console: Console, defense: Defense) -> None:
    """Print a defense's name, family, cost, description, source and settings."""
    from analysis.families import format_family
    from defenses.settings import get_settings

    source, family = defense.source, format_family(defense.family)
    console.print(Text(defense.name, style="bold"), Text(f"{family}, {defense.cost}", style="dim"))
    description, _, attributes = (inspect.getdoc(type(defense)) or "").partition("\n\nAttributes:\n")
    for paragraph in description.split("\n\n"):
        console.print(Text(" ".join(paragraph.split())))
    if defense.detects:
        console.print(
            Text(
                "The system refuses if the model or the detector does: its margin is the larger of the "
                "model's margin and of the readout's threshold plus the detector's log-odds. The detector "
                "reads the request as it is sent."
            )
        )
    console.print(Text(f"\n{attributes}" if attributes else ""))
    console.print(Text(f"Source: {source.title} {source.url}\nWording: {source.wording}", style="dim"))
    if settings := get_settings(defense):
        lines = "\n".join(f"  --set {key}={value}" for key, value in settings.items())
        console.print(Text(lines, style="dim"))


def _print_prompts(
    console: Console, session: ModelSession, defense: Defense, query_chats: Sequence[QueryChat]
) -> None:
    """Print a defense's own calls of the model, then the prompts for a query; secrets are redacted."""
    from analysis.models.chat_template import redact_secrets

    session = dataclasses.replace(session, defense_calls=session.defense_calls.copy_uncached())
    (prompts,) = session.render_prompts(defense, query_chats)
    secrets = defense.secret_texts()
    for call_ids, response in session.defense_calls.transcript:
        text = redact_secrets(session.chat_template.decode_tokens(call_ids), secrets)
        console.print(Text("preliminary prompt:", style="bold"), Text(text, style="magenta"))
        console.print(Text("response:", style="bold"), Text(redact_secrets(response, secrets), style="green"))
    for number, prompt in enumerate(prompts, 1):
        title = f"prompt ({number} of {len(prompts)}):" if len(prompts) > 1 else "prompt:"
        console.print(Text(title, style="bold"))
        console.print(Text(redact_secrets(prompt.text, secrets), style="cyan"))
    if log_odds := session.score_requests(defense, query_chats):
        decision = "refused before the model reads it" if log_odds[0] > 0 else "passed on to the model"
        console.print(Text(f"Detector: log-odds {log_odds[0]:+.2f} nats, so the request is {decision}."))
    if len(prompts) > 1:
        pooling = "maximum" if defense.pool == "max" else "mean"
        console.print(Text(f"The margin is the {pooling} over these prompts."))
    if defense.retokenizes and not secrets:
        tokens = (session.chat_template.decode_tokens([token]) for token in prompts[0].ids)
        console.print(Text("tokens:", style="bold"), Text("|".join(tokens), style="cyan"))
    if defense.weights_fingerprint() != "" or defense.logit_blend():
        blend = " and ".join(f"{weight:+g} x {member.name}" for weight, member in defense.logit_blend())
        prompts_note = ", each after its own prompt" if defense.blends_prompts else ""
        console.print(
            Text(f"Logits: {blend}{prompts_note}." if blend else "The defense changes the model itself.")
        )


def write_report(folders: Sequence[Path], out: Path, with_images: bool = True) -> int:
    """Write the report of these runs; print its path and what it does not contain.

    Args:
        folders: run folders, in the order of the report.
        out: the HTML file; an existing file is replaced.
        with_images: whether the report shows the images of queries.

    Returns:
        The exit code, 0.
    """
    from analysis.datasets.loading import load_queries
    from analysis.files import check_output_folder, write_text_file
    from analysis.report.folder import read_run
    from analysis.report.html import render_page

    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file in it, such as {out / 'report.html'}")
    if out.suffix.lower() not in (".html", ".htm"):  # so that no file of a run is replaced by mistake
        raise UserError(f"--out {out}: the report is an HTML file; use {out.with_suffix('.html')}")
    check_output_folder(out.parent)
    # Cached, because it reads every image of the set.
    load_set = functools.cache(functools.partial(load_queries, offline=True))

    def load_texts(name: str) -> tuple[dict[str, str], str]:
        query_set = load_set(name)
        return {query.id: query.text for query in query_set.queries}, query_set.sha256

    def load_images(name: str) -> dict[str, QueryImage]:
        return {query.id: query.image for query in load_set(name).queries if query.image}

    runs: list[Run] = []
    for folder in folders:
        taken_names = {run.name for run in runs}
        run = read_run(folder, load_texts, taken_names, load_images if with_images else None)
        runs += run.list_page_runs()
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
    console.print(Text(f"{out}: {len(text.encode()) / 1e6:.1f} MB, self-contained"), soft_wrap=True)
    return 0
