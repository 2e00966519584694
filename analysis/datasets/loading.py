"""Load query sets: shipped and public sets, sets of the hub, the user's files, and sets joined with +."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.datasets.columns import ColumnChoice, choose_columns, split_column_choice
from analysis.datasets.download import load_public_records
from analysis.datasets.hub import HUB_PREFIX, load_hub_rows, parse_hub_name
from analysis.datasets.public import PUBLIC_DATASETS
from analysis.datasets.queries import (
    QUERY_COLUMNS,
    QUERY_FILE_FORMAT,
    Query,
    QuerySet,
    check_queries,
    find_repeated_queries,
    parse_query,
)
from analysis.datasets.records import (
    RECORD_FORMATS,
    expand_path,
    names_existing_file,
    names_record_file,
    read_records,
)
from analysis.files import Notifier, combine_digests, data_folder
from defenses.errors import UserError, unknown_name_error

BENIGN_KINDS = ("twin", "sounds_unsafe", "same_topic", "plain")


@dataclass(frozen=True)
class ShippedSet:
    """A query set that comes with the project.

    Attributes:
        description: what it contains, for `analyze data`.
        kinds: the kinds of queries that it takes from its file.
        file_name: its file in data/.
    """

    description: str
    kinds: tuple[str, ...]
    file_name: str = "contrast.jsonl"


SHIPPED_SETS = {
    "contrast": ShippedSet("harmful requests and four kinds of benign ones", ("harmful", *BENIGN_KINDS)),
    "twins": ShippedSet("harmful requests and their benign twins, alike in wording", ("harmful", "twin")),
    "sounds-unsafe": ShippedSet(
        "harmful requests, and benign ones with alarming words", ("harmful", "sounds_unsafe")
    ),
    "same-topic": ShippedSet(
        "harmful requests, and legitimate questions on their topics", ("harmful", "same_topic")
    ),
    "plain": ShippedSet("harmful requests and plain benign ones (the easy comparison)", ("harmful", "plain")),
    "everyday": ShippedSet(
        "plain benign requests only, to complete a set without any: --data advbench+everyday", ("plain",)
    ),
    "contrast-v1": ShippedSet(
        "the first version of contrast, for comparison with older runs",
        ("harmful", "twin", "plain"),
        "contrast-v1.jsonl",
    ),
}


def load_queries(name: str, offline: bool = False, notify: Notifier = lambda text: None) -> QuerySet:
    """Load a query set by name, from a file, or from several of these joined with +.

    >>> load_queries("twins").select_split("test").limit_queries(4).queries[0].harmful
    True

    Args:
        name: contrast or another of `SHIPPED_SETS`; a public set, or NAME=PATH for a local copy of it; a set
            of the Hugging Face hub, hf:OWNER/NAME; the path of a query file; or several of them joined with
            +. Names of sets may be written with _ instead of -. Behind a set of the hub or a file, ? and
            COLUMN=NAME, joined with &, say which columns are used.
        offline: whether downloads are forbidden.
        notify: prints a line before a download, and about repeated queries.

    Raises:
        UserError: if the set is unknown, cannot be read or downloaded, or lacks a class.
    """
    names = check_set_name(name)
    sets = [_load_single_set(part, offline, notify) for part in names]
    return (sets[0] if len(sets) == 1 else _join_query_sets(name, sets, notify)).check_both_classes()


def check_set_name(name: str) -> list[str]:
    """Return the names of the sets that a name joins with +; raise if one of them is not known.

    >>> check_set_name("twins+everyday")
    ['twins', 'everyday']

    Args:
        name: as for `load_queries`.
    """
    names = _split_set_names(name)
    for part in names:
        named, choice = _split_own_choice(part)
        if part.startswith(HUB_PREFIX):
            parse_hub_name(named)
            continue
        if choice is not None and not names_record_file(named):
            raise UserError(
                f"--data {part}: columns are chosen for a set of the hub or a file of your own, not {named!r}"
            )
        base = part.partition("=")[0] if choice is None else named
        is_file = names_record_file(named) and (base == named or names_existing_file(named))
        if not (part in SHIPPED_SETS or base in PUBLIC_DATASETS or is_file):
            hint = (
                " (or NAME=PATH for a copy of a public set, hf:OWNER/NAME for a set of the Hugging Face hub, "
                f"or the path of a {RECORD_FORMATS})"
            )
            raise unknown_name_error("data set", base, [*SHIPPED_SETS, *PUBLIC_DATASETS], hint)
    return names


def load_shipped_set(name: str) -> QuerySet:
    """Load a shipped set, without the check for both classes: everyday has only benign queries."""
    shipped = SHIPPED_SETS[name]
    file_set = _load_query_file(data_folder() / shipped.file_name)
    queries = tuple(query for query in file_set.queries if query.kind in shipped.kinds)
    return replace(file_set, name=name, queries=queries, sources=({"name": name, "sha256": file_set.sha256},))


def load_query_texts(name: str) -> tuple[dict[str, str], str]:
    """Load the texts of a query set by id, and the set's SHA-256, without the network.

    >>> texts, sha256 = load_query_texts("contrast")
    >>> len(texts), len(sha256)
    (1344, 64)

    Args:
        name: as for `load_queries`.

    Raises:
        UserError: if the set cannot be loaded without the network.
    """
    query_set = load_queries(name, offline=True)
    return {query.id: query.text for query in query_set.queries}, query_set.sha256


def _split_set_names(name: str) -> list[str]:
    """Names of the joined sets; an existing path may itself contain a +."""
    base, _, copy_path = _normalize_set_name(name).partition("=")
    if names_existing_file(name) or (base in PUBLIC_DATASETS and names_existing_file(copy_path)):
        return [_normalize_set_name(name)]
    return [_normalize_set_name(part) for part in name.split("+")]


def _split_own_choice(name: str) -> tuple[str, ColumnChoice | None]:
    """Return a set's name and the choice of columns behind it; the path of a file may contain a ?."""
    return (name, None) if names_existing_file(name) else split_column_choice(name)


def _normalize_set_name(name: str) -> str:
    """Return the name of a set with hyphens, as in the tables; the path of a file stays as it is.

    >>> _normalize_set_name("mm_safetybench=my_copy"), _normalize_set_name("my_file.csv")
    ('mm-safetybench=my_copy', 'my_file.csv')
    """
    base, equals, copy_path = name.partition("=")
    known = base.replace("_", "-")
    return f"{known}{equals}{copy_path}" if known in {*SHIPPED_SETS, *PUBLIC_DATASETS} else name


def _load_single_set(name: str, offline: bool, notify: Notifier) -> QuerySet:
    """Load one set, which may lack a class."""
    base, equals, copy_path = name.partition("=")
    if name in SHIPPED_SETS:
        return load_shipped_set(name)
    if base in PUBLIC_DATASETS:
        rows, source = load_public_records(
            PUBLIC_DATASETS[base], copy_path if equals else None, offline, notify
        )
        queries = [parse_query(row, number, path) for number, (row, path) in enumerate(rows, 1)]
        check_queries(queries, copy_path or base)
        return QuerySet(name, tuple(queries), source["sha256"], (source,))
    named, choice = _split_own_choice(name)
    if name.startswith(HUB_PREFIX):
        return _load_hub_set(name, named, choice or ColumnChoice(), offline, notify)
    query_set = _load_query_file(expand_path(named), choice, notify)
    if n_repeated := len(find_repeated_queries(query_set.queries)):
        n = len(query_set.queries)
        notify(f"note: {name} repeats texts ({n_repeated} of {n} queries); each counts as a query of its own")
    return replace(
        query_set,
        name=name,
        sources=({"name": name, "sha256": query_set.sha256},),
        has_calibration_split="calibration" in query_set.split_names,
    )


def _join_query_sets(name: str, query_sets: Sequence[QuerySet], notify: Notifier) -> QuerySet:
    """Join sets: prefix ids and pairs with the set's short name, and drop the queries of earlier sets."""
    stems = [_get_short_name(query_set.name) for query_set in query_sets]
    queries: list[Query] = []
    for number, (stem, query_set) in enumerate(zip(stems, query_sets, strict=True), 1):
        prefix = stem if stems.count(stem) == 1 else f"{stem}-{number}"
        shared = {query.text for query in query_set.queries} & {query.text for query in queries}
        earlier = {query.content for query in queries if query.text in shared}
        queries += [
            replace(query, id=f"{prefix}:{query.id}", pair=query.pair and f"{prefix}:{query.pair}")
            for query in query_set.queries
            if query.text not in shared or query.content not in earlier
        ]
    if n_repeated := sum(len(query_set.queries) for query_set in query_sets) - len(queries):
        notify(f"note: {n_repeated} queries of {name} occur in more than one of its sets; each is used once")
    return QuerySet(
        name,
        tuple(queries),
        combine_digests([query_set.sha256 for query_set in query_sets]),
        tuple(source for query_set in query_sets for source in query_set.sources),
        any(query_set.has_calibration_split for query_set in query_sets),
    )


def _get_short_name(name: str) -> str:
    """Return the name of a set, of a repository without its owner, or of a file without folder and suffix.

    >>> [_get_short_name(name) for name in ("hf:owner/name@v1:test?text=goal", "./mine.csv", "jbb=copy")]
    ['name', 'mine', 'jbb']
    """
    base = _split_own_choice(name)[0].partition("=")[0]
    return Path(parse_hub_name(base).repo).name if base.startswith(HUB_PREFIX) else Path(base).stem


def _load_hub_set(name: str, named: str, choice: ColumnChoice, offline: bool, notify: Notifier) -> QuerySet:
    """Load a set of the hub."""
    rows, folder, source = load_hub_rows(parse_hub_name(named), offline, notify)
    if not rows:
        raise UserError(f"{named} holds no rows; choose another split")
    rows, chosen = choose_columns(rows, choice, named)
    queries = [parse_query(row, number, named, folder) for number, row in enumerate(rows, 1)]
    check_queries(queries, named)
    n_harmful = sum(query.harmful for query in queries)
    notify(f"note: {named}: {chosen}; {n_harmful} harmful and {len(queries) - n_harmful} benign queries")
    return QuerySet(name, tuple(queries), source["sha256"], (source,))


def _load_query_file(
    path: Path, choice: ColumnChoice | None = None, notify: Notifier = lambda text: None
) -> QuerySet:
    """Load a file in the project's own format, or with the columns that the user chose."""
    required = ("text", "harmful") if choice is None else ()
    rows, content = read_records(path, required, QUERY_FILE_FORMAT, QUERY_COLUMNS)
    if choice is not None:
        rows, chosen = choose_columns(rows, choice, str(path))
        notify(f"note: {path}: {chosen}")
    queries = [parse_query(row, number, path, path.parent) for number, row in enumerate(rows, 1)]
    check_queries(queries, path)
    return QuerySet(str(path), tuple(queries), hashlib.sha256(content).hexdigest())
