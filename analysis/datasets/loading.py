"""What is asked: harmful and benign queries, shipped, public or the user's own, in splits that keep pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.datasets.download import load_public_records
from analysis.datasets.public import PUBLIC_DATASETS
from analysis.datasets.queries import QUERY_FILE_FORMAT, Query, QuerySet, check_queries, parse_query
from analysis.datasets.records import RECORD_SUFFIXES, read_records
from analysis.files import Notifier, combine_digests, data_folder
from defenses.errors import UserError, unknown_name_error

if TYPE_CHECKING:
    import pandas as pd

# Shipped sets: the kinds of query that each takes from data/contrast.jsonl.
SHIPPED_SETS = {
    "contrast": ("harmful", "twin", "plain"),
    "twins": ("harmful", "twin"),
    "plain": ("harmful", "plain"),
    "everyday": ("plain",),
}


def load_queries(name: str, offline: bool = False, notify: Notifier = lambda text: None) -> QuerySet:
    """Return the query set of that name, or the one in that file, or several together.

    >>> load_queries("twins").split("test").limit(4).queries[0].harmful
    True

    Args:
        name: contrast, twins, plain or everyday (shipped); a public set, or NAME=PATH for a copy of it; the
            path of a `.jsonl` or `.csv` file; or several of them, with + in between.
        offline: forbid the network.
        notify: told in words before anything is fetched, and what was left out.

    Raises:
        UserError: if there is no such set, it may not or cannot be read, or a class is missing.
    """
    names = _split_set_names(name)
    for one in names:
        public = one.partition("=")[0]
        if not (one in SHIPPED_SETS or public in PUBLIC_DATASETS or Path(one).suffix in RECORD_SUFFIXES):
            hint = " (or a public set's NAME=PATH, or the path of a .jsonl or .csv file)"
            raise unknown_name_error("data set", public, [*SHIPPED_SETS, *PUBLIC_DATASETS], hint)
    sets = [_load_single_set(one, offline, notify) for one in names]
    return (sets[0] if len(sets) == 1 else _join_query_sets(name, sets, notify)).check_both_classes()


def from_frame(frame: pd.DataFrame) -> QuerySet:
    """Return the queries of a frame with the columns of a file in our own format.

    >>> import pandas as pd
    >>> from_frame(pd.DataFrame({"text": ["How do I pick a lock?", "Hi"], "harmful": [True, False]})).name
    'a frame of 2 queries'
    """
    if missing := [name for name in ("text", "harmful") if name not in frame]:
        raise UserError(f"the frame of queries lacks {' and '.join(missing)}; {QUERY_FILE_FORMAT}")
    name = f"a frame of {len(frame)} queries"
    held = frame.astype(object).where(frame.notna(), None).to_dict("records")
    queries = [
        parse_query({str(key): one for key, one in row.items()}, at, name) for at, row in enumerate(held, 1)
    ]
    check_queries(queries, name)
    if len({query.harmful for query in queries}) < 2:
        lacks = "benign" if queries[0].harmful else "harmful"
        raise UserError(f"{name} holds no {lacks} query: a defense is read on both classes; add some rows")
    digest = hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()
    found = QuerySet(name, tuple(queries), digest, ({"name": name, "sha256": digest},))
    return replace(found, has_calibration_split="calibration" in found.split_names)


def load_shipped_set(name: str) -> QuerySet:
    """Return a shipped set; everyday has one class only."""
    whole = _load_query_file(data_folder() / "contrast.jsonl")
    kept = tuple(query for query in whole.queries if query.kind in SHIPPED_SETS[name])
    return replace(whole, name=name, queries=kept, sources=({"name": name, "sha256": whole.sha256},))


def _split_set_names(name: str) -> list[str]:
    """The sets that a name joins with +; a path that is there may hold one, too."""
    public, _, copy = name.partition("=")
    if Path(name).exists() or (public in PUBLIC_DATASETS and Path(copy).expanduser().exists()):
        return [name]
    return name.split("+")


def _load_single_set(name: str, offline: bool, notify: Notifier) -> QuerySet:
    """A single set, of whichever classes."""
    public, equals, copy = name.partition("=")
    if name in SHIPPED_SETS:
        return load_shipped_set(name)
    if public in PUBLIC_DATASETS:
        found, source = load_public_records(
            PUBLIC_DATASETS[public], copy if equals else None, offline, notify
        )
        queries = [parse_query(row, number, path) for number, (row, path) in enumerate(found, 1)]
        check_queries(queries, copy or public)
        return QuerySet(name, tuple(queries), source["sha256"], (source,))
    data = _load_query_file(Path(name))
    source = {"name": name, "sha256": data.sha256}
    return replace(
        data, name=name, sources=(source,), has_calibration_split="calibration" in data.split_names
    )


def _join_query_sets(name: str, query_sets: Sequence[QuerySet], notify: Notifier) -> QuerySet:
    """Several sets as one: ids say which set they are of, and what two sets hold is asked once."""
    short = [Path(data.name.partition("=")[0]).stem for data in query_sets]
    queries: list[Query] = []
    for place, data in enumerate(query_sets):
        own = short[place] if short.count(short[place]) == 1 else f"{short[place]}-{place + 1}"
        known = {query.text for query in queries}
        queries += [
            replace(query, id=f"{own}:{query.id}", pair=query.pair and f"{own}:{query.pair}")
            for query in data.queries
            if query.text not in known
        ]
    if repeated := sum(len(data.queries) for data in query_sets) - len(queries):
        notify(f"note: {repeated} queries of {name} are in more than one of its sets; each is asked once")
    sources = tuple(source for data in query_sets for source in data.sources)
    digest = combine_digests([data.sha256 for data in query_sets])
    return QuerySet(
        name, tuple(queries), digest, sources, any(data.has_calibration_split for data in query_sets)
    )


def _load_query_file(path: Path) -> QuerySet:
    """The queries of a file in our own format."""
    found, raw = read_records(path, ("text", "harmful"), QUERY_FILE_FORMAT)
    queries = [parse_query(row, number, path) for number, row in enumerate(found, 1)]
    check_queries(queries, path)
    return QuerySet(str(path), tuple(queries), hashlib.sha256(raw).hexdigest())
