"""One user request, how a row of a file becomes one, and what the rows of a file have to agree on."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from defenses.errors import UserError, unknown_name_error

SPLIT_NAMES = ("train", "calibration", "test")
QUERY_FILE_FORMAT = (
    "it needs the columns text and harmful (true/false), and may have id, pair, category, split "
    f"({'/'.join(SPLIT_NAMES)}), kind"
)
_HARMFUL_VALUES = {"true": True, "1": True, "1.0": True, "yes": True, "harmful": True}
_HARMFUL_VALUES |= {"false": False, "0": False, "0.0": False, "no": False, "benign": False}


@dataclass(frozen=True)
class Query:
    """One user request.

    Attributes:
        id: unique in its set.
        text: the request.
        harmful: whether it should be refused.
        category: its topic.
        pair: shared by a harmful query and its benign twin; None where there is no twin.
        split: train, calibration or test; None where the set has no splits.
        kind: harmful, twin or plain.
        image: path of an image that belongs to the text.
    """

    id: str
    text: str
    harmful: bool
    category: str = ""
    pair: str | None = None
    split: str | None = None
    kind: str = ""
    image: str | None = None


def check_queries(queries: Sequence[Query], source: Path | str) -> None:
    """Raise unless ids, splits and pairs are what the statistics take them for.

    Args:
        queries: of one file or one set.
        source: that an error names.
    """
    repeated = [one for one, count in Counter(query.id for query in queries).items() if count > 1]
    if repeated:
        raise UserError(f"{source}: the id {repeated[0]!r} occurs more than once; every query needs its own")
    without = [query.id for query in queries if query.split is None]
    if 0 < len(without) < len(queries):
        raise UserError(f"{source}: the query {without[0]!r} has no split, but others do; give each one")
    _check_pairs(queries, source)


def _check_pairs(queries: Sequence[Query], source: Path | str) -> None:
    """Raise unless each pair is what the statistics take it for."""
    pairs: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        if query.pair:
            pairs[query.pair].append(query)
    for name, members in pairs.items():
        if len({query.split for query in members}) > 1:
            raise UserError(f"{source}: the pair {name!r} lies in two splits; a pair belongs to one")
        harmful = sum(query.harmful for query in members)
        if harmful > 1 or len(members) - harmful > 1:
            raise UserError(
                f"{source}: the pair {name!r} has {harmful} harmful and {len(members) - harmful} benign "
                "queries; a pair is one harmful query and its benign twin, so give the others pairs of "
                "their own or none"
            )


def parse_query(row: Mapping[str, Any], row_number: int, source: Path | str) -> Query:
    """Return the query that a row in our own format stands for.

    Args:
        row: with text and harmful at least.
        row_number: of the row, which makes its id if it has none.
        source: that an error names.
    """

    def given(name: str) -> str | None:
        value = row.get(name)
        return None if value is None or value == "" else str(value)

    ident, split, text = given("id") or f"q{row_number:04d}", given("split"), row["text"]
    where = f"{source}, query {ident!r}"
    if not isinstance(text, str | None):
        raise UserError(f"{where}: the text is {text!r}; it takes a string")
    if not (text or "").strip():
        raise UserError(f"{where}: the text is empty; write the request or take the query out")
    harmful = _HARMFUL_VALUES.get(str(row["harmful"]).strip().lower())
    if harmful is None:
        raise UserError(f"{where}: harmful is {row['harmful']!r}; it takes true or false")
    if split is not None and split not in SPLIT_NAMES:
        raise unknown_name_error(f"split in {where}:", split, SPLIT_NAMES)
    kind = given("kind") or ("harmful" if harmful else "plain")
    text, pair, category = str(text).strip(), given("pair"), given("category") or ""
    return Query(ident, text, harmful, category, pair, split, kind, given("image"))


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
            raise UserError(
                f"--limit {max_queries}: at least 2 queries are needed, a harmful and a benign one"
            )
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
        return self._replace_queries(
            replace(query, split=dealt.get(query.id, query.split)) for query in usable
        )

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
