"""What is asked: harmful and benign queries, shipped, public or the user's own, in splits that keep pairs."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from analysis import copies, data_folder, rows
from analysis.checkpoints import Notifier
from analysis.datasets import PUBLIC_DATASETS
from analysis.query import QUERY_FILE_FORMAT, check_queries, parse_query
from analysis.query import SPLIT_NAMES as SPLIT_NAMES
from analysis.query import Query as Query
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


@dataclass(frozen=True)
class QuerySet:
    """Queries under a name.

    Attributes:
        name: as the user gave it.
        queries: in the order of their files.
        sha256: of the file that they came from, or one for several.
        sources: what run.json says of each set that they came from: its name and SHA-256; of a public one
            also where it is published, its revision and its licence.
        has_calibration_split: whether the user's own part of it has a calibration split.
    """

    name: str
    queries: tuple[Query, ...]
    sha256: str
    sources: tuple[Mapping[str, str], ...] = ()
    has_calibration_split: bool = False

    @property
    def split_names(self) -> set[str]:
        """The splits that the set has."""
        return {query.split for query in self.queries if query.split}

    def select_split(self, split: str | None) -> QuerySet:
        """Return the queries of one split; None or "all" keeps them all.

        Where only some of several sets have splits, the queries of the others belong to every one.
        """
        if split is None or split == "all":
            return self
        if not self.split_names:
            raise UserError(
                f"--split {split}: {self.name} has no column split; leave --split out to take all queries"
            )
        if split not in self.split_names:
            raise unknown_name_error("split", split, {*self.split_names, "all"})
        return self._replace_queries(query for query in self.queries if query.split in (split, None))

    def select_calibration(self) -> QuerySet | None:
        """Return the user's own calibration split, which a readout is made from; None where there is none."""
        if not self.has_calibration_split:
            return None
        return self._replace_queries(query for query in self.queries if query.split == "calibration")

    def limit_queries(self, max_queries: int | None) -> QuerySet:
        """Return at most so many queries, pairs kept whole and all categories in proportion."""
        if max_queries is None:
            return self
        if max_queries < 2:
            raise UserError(f"--limit {max_queries}: at least 2 queries are needed, a harmful and a benign one")
        units = defaultdict(list)
        for query in self.queries:
            units["pair" if query.pair else "alone", query.pair or query.id].append(query)
        sizes = Counter(unit[0].category for unit in units.values())
        seen: Counter[str] = Counter()
        ranked = []
        for unit in units.values():
            category = unit[0].category
            ranked.append(((seen[category] + 0.5) / sizes[category], unit))
            seen[category] += 1
        ranked.sort(key=lambda item: item[0])
        # However few are taken, both classes are among them: a pair, or one query of each, goes first.
        largest = sorted((unit for _, unit in ranked), key=len, reverse=True)
        lead = [next((u for u in largest if any(q.harmful is side for q in u)), []) for side in (True, False)]
        kept: set[str] = set()
        for unit in (*lead, *(unit for _, unit in ranked)):
            more = {query.id for query in unit} - kept
            if len(kept) + len(more) <= max_queries:
                kept |= more
        return self._replace_queries(query for query in self.queries if query.id in kept)

    def split_calibration_test(self, seed: int) -> QuerySet:
        """Return the queries that ensembles are chosen on and reported on, each with its split.

        Those are the calibration and the test split. Where there are no such two, what is not for training is
        parted by chance into two halves, pairs kept whole; so are queries without a split that another set
        has been joined to.
        """
        usable = [query for query in self.queries if query.split != "train"]
        both = {"calibration", "test"} <= self.split_names
        units = defaultdict(list)
        for query in usable:
            if not (both and query.split):
                units["pair" if query.pair else "alone", query.pair or query.id].append(query)
        alike = defaultdict(list)
        for unit in units.values():
            alike[tuple(sorted(query.harmful for query in unit))].append(unit)
        dealt: dict[str, str] = {}
        for makeup, group in sorted(alike.items()):
            random.Random(f"{seed}/{makeup}").shuffle(group)
            group.sort(key=lambda unit: unit[0].category)  # as many of each category, and of each class
            for place, unit in enumerate(group):
                dealt |= {query.id: ("calibration", "test")[place % 2] for query in unit}
        return self._replace_queries(replace(query, split=dealt.get(query.id, query.split)) for query in usable)

    def check_both_classes(self) -> QuerySet:
        """Return the set if it holds both classes."""
        for harmful, name, other in ((True, "harmful", "plain"), (False, "benign", "everyday")):
            if not any(query.harmful == harmful for query in self.queries):
                raise UserError(
                    f"{self.name} holds no {name} query here: a defense is read on both classes; add some: "
                    f"--data {self.name}+{other}"
                )
        return self

    def _replace_queries(self, queries: Any) -> QuerySet:
        return replace(self, queries=tuple(queries))


def load_queries(name: str, offline: bool = False, notify: Notifier = lambda text: None) -> QuerySet:
    """Return the query set of that name, or the one in that file, or several together.

    >>> load("twins").split("test").limit(4).queries[0].harmful
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
        if not (one in SHIPPED_SETS or public in PUBLIC_DATASETS or Path(one).suffix in rows.RECORD_SUFFIXES):
            hint = " (or a public set's NAME=PATH, or the path of a .jsonl or .csv file)"
            raise unknown_name_error("data set", public, [*SHIPPED_SETS, *PUBLIC_DATASETS], hint)
    sets = [_load_single_set(one, offline, notify) for one in names]
    return (sets[0] if len(sets) == 1 else _join_query_sets(name, sets, notify)).check_both_classes()


def from_frame(frame: pd.DataFrame) -> QuerySet:
    """Return the queries of a frame with the columns of a file in our own format.

    >>> import pandas as pd
    >>> framed(pd.DataFrame({"text": ["How do I pick a lock?", "Hi"], "harmful": [True, False]})).name
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
        found, source = copies.load_public_records(PUBLIC_DATASETS[public], copy if equals else None, offline, notify)
        queries = [parse_query(row, number, path) for number, (row, path) in enumerate(found, 1)]
        check_queries(queries, copy or public)
        return QuerySet(name, tuple(queries), source["sha256"], (source,))
    data = _load_query_file(Path(name))
    source = {"name": name, "sha256": data.sha256}
    return replace(data, name=name, sources=(source,), has_calibration_split="calibration" in data.split_names)


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
    digest = rows.combine_digests([data.sha256 for data in query_sets])
    return QuerySet(name, tuple(queries), digest, sources, any(data.has_calibration_split for data in query_sets))


def choose_default_split(query_set: QuerySet) -> Literal["test", "all"]:
    """Return the split to evaluate on: test where there is one, else all."""
    return "test" if "test" in query_set.split_names else "all"


def sample_queries(queries: Sequence[Query], max_queries: int) -> list[Query]:
    """Return up to `number` queries, half of each class, evenly spaced over the list."""
    picked = []
    for harmful in (True, False):
        side = [query for query in queries if query.harmful == harmful]
        count = min(len(side), max_queries // 2)
        picked += [side[i * len(side) // count] for i in range(count)]
    return picked


def _load_query_file(path: Path) -> QuerySet:
    """The queries of a file in our own format."""
    found, raw = rows.read_records(path, ("text", "harmful"), QUERY_FILE_FORMAT)
    queries = [parse_query(row, number, path) for number, row in enumerate(found, 1)]
    check_queries(queries, path)
    return QuerySet(str(path), tuple(queries), hashlib.sha256(raw).hexdigest())
