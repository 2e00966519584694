"""Queries, query sets, and the checks that every query set has to pass."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from analysis.datasets.images import find_image_path, open_image
from defenses.errors import UserError, check_unicode, unknown_name_error
from defenses.images import QueryImage

if TYPE_CHECKING:
    import pandas as pd

SPLIT_NAMES = ("train", "calibration", "test")
QUERY_COLUMNS = ("text", "harmful", "id", "pair", "category", "split", "kind", "image")
QUERY_FILE_FORMAT = (
    "it needs the columns text and harmful (true/false), and may have id, pair, category, split "
    f"({'/'.join(SPLIT_NAMES)}), kind, image (path of a file, relative to the folder of this one)"
)
HARMFUL_VALUES = {"true": True, "1": True, "1.0": True, "yes": True, "harmful": True}
HARMFUL_VALUES |= {"false": False, "0": False, "0.0": False, "no": False, "benign": False}


@dataclass(frozen=True)
class Query:
    """One user request.

    Attributes:
        id: unique within its set.
        text: the request.
        harmful: whether the model should refuse it.
        category: topic.
        pair: name shared by a harmful query and its benign twin; None for a query without a twin.
        split: train, calibration or test; None if the set has no splits.
        kind: harmful, or a kind of benign query: twin, sounds_unsafe, same_topic, plain, or the user's own.
        image: the image that belongs to the text; None for a query without one.
    """

    id: str
    text: str
    harmful: bool
    category: str = ""
    pair: str | None = None
    split: str | None = None
    kind: str = ""
    image: QueryImage | None = None

    @property
    def content(self) -> tuple[str, str | None]:
        """What the user sends: the text and the digest of the image."""
        return self.text, None if self.image is None else self.image.digest


@dataclass(frozen=True)
class QuerySet:
    """A named collection of queries.

    Attributes:
        name: as given by the user.
        queries: in the order of their files.
        sha256: digest of the source file, or of the digests of several files; without the images, which have
            digests of their own.
        sources: entries of run.json, one per source set: name and SHA-256; for a public set also its page,
            revision and license.
        has_calibration_split: whether a file or frame of the user has a calibration split.
    """

    name: str
    queries: tuple[Query, ...]
    sha256: str
    sources: tuple[Mapping[str, str], ...] = ()
    has_calibration_split: bool = False

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> QuerySet:
        """Build a query set from a data frame with the columns of a query file.

        >>> import pandas as pd
        >>> frame = pd.DataFrame({"text": ["How do I pick a lock?", "Hi"], "harmful": [True, False]})
        >>> QuerySet.from_frame(frame).name
        'a frame of 2 queries'

        Args:
            frame: one row per query; the columns `text` and `harmful` are required. Relative paths of
                images are relative to the current folder.

        Raises:
            UserError: if a column, a value or a class is missing or invalid.
        """
        if missing := [name for name in ("text", "harmful") if name not in frame]:
            raise UserError(f"the frame of queries lacks {' and '.join(missing)}; {QUERY_FILE_FORMAT}")
        name = f"a frame of {len(frame)} queries"
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        queries = [
            parse_query({str(column): value for column, value in row.items()}, number, name)
            for number, row in enumerate(rows, 1)
        ]
        check_queries(queries, name)
        if len({query.harmful for query in queries}) < 2:
            missing_class = "benign" if queries[0].harmful else "harmful"
            raise UserError(
                f"{name} holds no {missing_class} query, and a defense is evaluated on both classes; add "
                "some rows"
            )
        content = frame.to_csv(index=False).encode(errors="surrogatepass")
        digest = hashlib.sha256(content).hexdigest()
        query_set = cls(name, tuple(queries), digest, ({"name": name, "sha256": digest},))
        return replace(query_set, has_calibration_split="calibration" in query_set.split_names)

    @property
    def split_names(self) -> set[str]:
        """The splits that occur in the set."""
        return {query.split for query in self.queries if query.split}

    def select_split(self, split: str | None) -> QuerySet:
        """Return the queries of one split; None or "all" keeps every query.

        In a joined set, queries that come from a set without splits belong to every split.
        """
        if split is None or split == "all":
            return self
        if not self.split_names:
            raise UserError(
                f"--split {split}: {self.name} has no column split; leave --split out to use all queries"
            )
        if split not in self.split_names:
            raise unknown_name_error("split", split, {*self.split_names, "all"})
        return self._replace_queries(query for query in self.queries if query.split in (split, None))

    def select_calibration(self) -> QuerySet | None:
        """Return the user's own calibration split, for fitting a readout; None if there is none."""
        if not self.has_calibration_split:
            return None
        return self._replace_queries(query for query in self.queries if query.split == "calibration")

    def limit_queries(self, max_queries: int | None) -> QuerySet:
        """Return at most `max_queries` queries, with whole pairs and proportional kinds and categories.

        Args:
            max_queries: 2 or more; None keeps every query.
        """
        if max_queries is None:
            return self
        if max_queries < 2:
            raise UserError(
                f"--limit {max_queries}: at least 2 queries are needed, a harmful and a benign one"
            )
        by_category = rank_units(group_units(self.queries), lambda unit: unit[0].category)
        ranked = rank_units(by_category, lambda unit: "+".join(sorted(query.kind for query in unit)))
        # A pair, or else one query of each class, comes first, so that a small limit covers both classes.
        largest_first = sorted(ranked, key=len, reverse=True)
        first_units = [
            next((unit for unit in largest_first if any(query.harmful is harmful for query in unit)), [])
            for harmful in (True, False)
        ]
        kept_ids: set[str] = set()
        for unit in (*first_units, *ranked):
            new_ids = {query.id for query in unit} - kept_ids
            if len(kept_ids) + len(new_ids) <= max_queries:
                kept_ids |= new_ids
        return self._replace_queries(query for query in self.queries if query.id in kept_ids)

    def split_calibration_test(self, seed: int) -> QuerySet:
        """Return the queries on which ensembles are selected (calibration) and reported (test).

        A set that has both splits keeps them. Otherwise, all queries outside the training split are divided
        at random into two halves, stratified by category and class, with whole pairs. Queries without a
        split, from a set joined to one with splits, are divided in the same way.
        """
        usable = [query for query in self.queries if query.split != "train"]
        has_splits = {"calibration", "test"} <= self.split_names
        strata = defaultdict(list)
        for unit in group_units(query for query in usable if not (has_splits and query.split)):
            strata[tuple(sorted(query.harmful for query in unit))].append(unit)
        assigned: dict[str, str] = {}
        for classes, units in sorted(strata.items()):
            random.Random(f"{seed}/{classes}").shuffle(units)
            units.sort(key=lambda unit: unit[0].category)  # alternating then balances the categories
            for index, unit in enumerate(units):
                assigned |= {query.id: ("calibration", "test")[index % 2] for query in unit}
        return self._replace_queries(
            replace(query, split=assigned.get(query.id, query.split)) for query in usable
        )

    def check_both_classes(self) -> QuerySet:
        """Return the set itself, or raise if a class is missing."""
        for harmful, name, other in ((True, "harmful", "plain"), (False, "benign", "everyday")):
            if not any(query.harmful == harmful for query in self.queries):
                raise UserError(
                    f"{self.name} holds no {name} query, and a defense is evaluated on both classes; add "
                    f"some: --data {self.name}+{other}"
                )
        return self

    def _replace_queries(self, queries: Iterable[Query]) -> QuerySet:
        return replace(self, queries=tuple(queries))


def parse_query(
    row: Mapping[str, Any], row_number: int, source: Path | str, image_folder: Path = Path()
) -> Query:
    """Build a query from a row in the project's own format.

    Args:
        row: column → value, with at least `text` and `harmful`.
        row_number: 1-based; makes the id of a row that has none.
        source: file or set, for error messages.
        image_folder: folder to which the path of an image is relative.

    Raises:
        UserError: if a value is invalid, or an image cannot be read.
    """
    query_id = _read_optional(row, "id", f"{source}, row {row_number}") or f"q{row_number:04d}"
    place = f"{source}, query {query_id!r}"
    split, text = _read_optional(row, "split", place), row["text"]
    if not isinstance(text, str | None):
        raise UserError(f"{place}: the text is {text!r}; it takes a string")
    if text is None or not text.strip():
        raise UserError(
            f"{place}: the text is empty; write the request, also beside an image, or remove the query"
        )
    check_unicode(text, f"{place}: the text")
    harmful = HARMFUL_VALUES.get(str(row["harmful"]).strip().lower())
    if harmful is None:
        raise UserError(f"{place}: harmful is {row['harmful']!r}; it takes true or false, or 1 or 0")
    kind = _read_optional(row, "kind", place) or ("harmful" if harmful else "plain")
    if kind == "harmful" and not harmful:
        raise UserError(f"{place}: a benign query has the kind harmful; give it another kind, or none")
    split = split and split.strip()
    if split and split not in SPLIT_NAMES:
        raise unknown_name_error(f"split in {place}:", split, SPLIT_NAMES)
    return Query(
        query_id,
        text.strip(),
        harmful,
        category=_read_optional(row, "category", place) or "",
        pair=_read_optional(row, "pair", place),
        split=split or None,
        kind=kind,
        image=_read_image(row, place, image_folder),
    )


def check_queries(queries: Sequence[Query], source: Path | str) -> None:
    """Raise unless ids, splits and pairs are what the statistics assume.

    Args:
        queries: of one file or one set.
        source: file or set, for error messages.

    Raises:
        UserError: if an id repeats, a text with its image is both harmful and benign, only some queries have
            a split, or a pair is no harmful-benign pair within one split.
    """
    counts = Counter(query.id for query in queries)
    repeated = [query_id for query_id, count in counts.items() if count > 1]
    if repeated:
        raise UserError(f"{source}: the id {repeated[0]!r} occurs more than once; ids have to be unique")
    in_both = set.intersection(
        *({query.text for query in queries if query.harmful == harmful} for harmful in (True, False))
    )
    for query, other in find_repeated_queries(query for query in queries if query.text in in_both):
        if other.harmful != query.harmful:
            what = "text with the same image" if query.image else "text"
            raise UserError(
                f"{source}: {other.id!r} and {query.id!r} are the same {what}, once harmful and once benign; "
                "remove one of them"
            )
    without_split = [query.id for query in queries if query.split is None]
    if 0 < len(without_split) < len(queries):
        raise UserError(
            f"{source}: the query {without_split[0]!r} has no split, but others do; give each query one"
        )
    _check_pairs(queries, source)


def find_repeated_queries(queries: Iterable[Query]) -> list[tuple[Query, Query]]:
    """Return each query whose text and image occur earlier, with the first query that has them.

    Images are opened only where a text repeats.
    """
    by_text: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        by_text[query.text].append(query)
    repeated = []
    for members in by_text.values():
        first: dict[tuple[str, str | None], Query] = {}
        if len(members) > 1:
            pairs = [(query, first.setdefault(query.content, query)) for query in members]
            repeated += [(query, other) for query, other in pairs if other is not query]
    return repeated


def choose_default_split(query_set: QuerySet) -> Literal["test", "all"]:
    """Return the split to evaluate on: test if the set has one, else all."""
    return "test" if "test" in query_set.split_names else "all"


def sample_queries(queries: Sequence[Query], max_queries: int) -> list[Query]:
    """Return up to `max_queries` queries, half of each class, evenly spaced over the list."""
    sample = []
    for harmful in (True, False):
        members = [query for query in queries if query.harmful == harmful]
        count = min(len(members), max_queries // 2)
        sample += [members[index * len(members) // count] for index in range(count)]
    return sample


def _read_optional(row: Mapping[str, Any], column: str, place: str) -> str | None:
    """Value of a column as text; None if it is missing, empty or NaN."""
    value: Any = row.get(column)
    if isinstance(value, dict | list) or getattr(value, "shape", None):
        raise UserError(f"{place}: {column} is {value!r}; it takes a text")
    if value is None or value == "" or value != value:
        return None
    check_unicode(str(value), f"{place}: {column}")
    return str(value)


def _read_image(row: Mapping[str, Any], place: str, folder: Path) -> QueryImage | None:
    """Image whose path a row holds; None if the cell is missing, blank or NaN."""
    value = row.get("image")
    is_blank = isinstance(value, str) and not value.strip()
    if value is None or is_blank or (isinstance(value, float) and math.isnan(value)):
        return None
    return open_image(find_image_path(value, folder, place), place)


def _check_pairs(queries: Sequence[Query], source: Path | str) -> None:
    pairs: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        if query.pair:
            pairs[query.pair].append(query)
    for name, members in pairs.items():
        if len({query.split for query in members}) > 1:
            raise UserError(f"{source}: the pair {name!r} is in two splits; put both queries into one split")
        n_harmful = sum(query.harmful for query in members)
        n_benign = len(members) - n_harmful
        if n_harmful > 1 or n_benign > 1:
            raise UserError(
                f"{source}: the pair {name!r} has {n_harmful} harmful and {n_benign} benign queries; a pair "
                "is one harmful query and its benign twin, so give the other queries other pair names or none"
            )


def group_units(queries: Iterable[Query]) -> list[list[Query]]:
    """Group queries into pairs and single queries, in the order of their first query."""
    units = defaultdict(list)
    for query in queries:
        # A query's id may equal the name of a pair.
        units["pair" if query.pair else "single", query.pair or query.id].append(query)
    return list(units.values())


def rank_units(units: Sequence[list[Query]], get_group: Callable[[list[Query]], str]) -> list[list[Query]]:
    """Order units so that every leading part holds the groups in proportion; a group keeps its order."""
    groups = [get_group(unit) for unit in units]
    sizes = Counter(groups)
    counts: Counter[str] = Counter()
    positions = []
    for group in groups:
        positions.append((counts[group] + 0.5) / sizes[group])
        counts[group] += 1
    order = sorted(range(len(units)), key=positions.__getitem__)
    return [units[index] for index in order]
