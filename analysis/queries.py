"""What is asked: harmful and benign queries, shipped or the user's own, in splits that keep pairs whole."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from analysis import data_folder, rows
from defenses.errors import UserError, unknown

SPLITS = ("train", "calibration", "test")
# Shipped sets: the kinds of query that each takes from data/contrast.jsonl.
SHIPPED = {
    "contrast": ("harmful", "twin", "plain"),
    "twins": ("harmful", "twin"),
    "plain": ("harmful", "plain"),
}
_NEEDS = (
    "it needs the columns text and harmful (true/false), and may have id, pair, category, split "
    f"({'/'.join(SPLITS)}), kind"
)
_HARMFUL = {"true": True, "1": True, "1.0": True, "yes": True, "harmful": True}
_HARMFUL |= {"false": False, "0": False, "0.0": False, "no": False, "benign": False}


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


@dataclass(frozen=True)
class QuerySet:
    """Queries under a name, with the SHA-256 of the file that they came from."""

    name: str
    queries: tuple[Query, ...]
    sha256: str

    @property
    def splits(self) -> set[str]:
        """The splits that the set has."""
        return {query.split for query in self.queries if query.split}

    def split(self, name: str | None) -> QuerySet:
        """Return the queries of one split; None or "all" keeps them all."""
        if name is None or name == "all":
            return self
        if not self.splits:
            raise UserError(
                f"--split {name}: {self.name} has no column split; leave --split out to take all queries"
            )
        if name not in self.splits:
            raise unknown("split", name, {*self.splits, "all"})
        return self._with(query for query in self.queries if query.split == name)

    def limit(self, number: int | None) -> QuerySet:
        """Return at most so many queries, pairs kept whole and all categories in proportion."""
        if number is None:
            return self
        if number < 2:
            raise UserError(f"--limit {number}: at least 2 queries are needed, a harmful and a benign one")
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
            if len(kept) + len(more) <= number:
                kept |= more
        return self._with(query for query in self.queries if query.id in kept)

    def checked(self) -> QuerySet:
        """Return the set if it holds both classes."""
        for harmful, name in ((True, "harmful"), (False, "benign")):
            if not any(query.harmful == harmful for query in self.queries):
                raise UserError(f"{self.name} holds no {name} query here: a defense is read on both classes")
        return self

    def _with(self, queries: Any) -> QuerySet:
        return QuerySet(self.name, tuple(queries), self.sha256)


def load(name: str) -> QuerySet:
    """Return the query set of that name, or the one in that file.

    >>> load("twins").split("test").limit(4).queries[0].harmful
    True

    Args:
        name: contrast, twins or plain (shipped), or the path of a `.jsonl` or `.csv` file.
    """
    if name in SHIPPED:
        path = data_folder() / "contrast.jsonl"
    elif Path(name).suffix in rows.SUFFIXES:
        path = Path(name)
    else:
        raise unknown("data set", name, SHIPPED, " (or the path of a .jsonl or .csv file)")
    found, raw = rows.read(path, ("text", "harmful"), _NEEDS)
    queries = [_query(row, number, path) for number, row in enumerate(found, 1)]
    repeated = [one for one, count in Counter(query.id for query in queries).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: the id {repeated[0]!r} occurs more than once; every query needs its own")
    without = [query.id for query in queries if query.split is None]
    if 0 < len(without) < len(queries):
        raise UserError(f"{path}: the query {without[0]!r} has no split, but others do; give each one")
    _check_pairs(queries, path)
    if name in SHIPPED:
        queries = [query for query in queries if query.kind in SHIPPED[name]]
    return QuerySet(name, tuple(queries), hashlib.sha256(raw).hexdigest()).checked()


def _check_pairs(queries: Sequence[Query], path: Path) -> None:
    """Raise unless each pair is what the statistics take it for."""
    pairs: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        if query.pair:
            pairs[query.pair].append(query)
    for name, members in pairs.items():
        if len({query.split for query in members}) > 1:
            raise UserError(f"{path}: the pair {name!r} lies in two splits; a pair belongs to one")
        harmful = sum(query.harmful for query in members)
        if harmful > 1 or len(members) - harmful > 1:
            raise UserError(
                f"{path}: the pair {name!r} has {harmful} harmful and {len(members) - harmful} benign "
                "queries; a pair is one harmful query and its benign twin, so give the others pairs of "
                "their own or none"
            )


def default_split(data: QuerySet) -> Literal["test", "all"]:
    """Return the split to evaluate on: test where there is one, else all."""
    return "test" if "test" in data.splits else "all"


def sample(queries: Sequence[Query], number: int) -> list[Query]:
    """Return up to `number` queries, half of each class, evenly spaced over the list."""
    picked = []
    for harmful in (True, False):
        side = [query for query in queries if query.harmful == harmful]
        count = min(len(side), number // 2)
        picked += [side[i * len(side) // count] for i in range(count)]
    return picked


def _query(row: Mapping[str, Any], number: int, path: Path) -> Query:
    def given(name: str) -> str | None:
        value = row.get(name)
        return None if value is None or value == "" else str(value)

    ident, split, text = given("id") or f"q{number:04d}", given("split"), row["text"]
    where = f"{path}, query {ident!r}"
    if not isinstance(text, str | None):
        raise UserError(f"{where}: the text is {text!r}; it takes a string")
    if not (text or "").strip():
        raise UserError(f"{where}: the text is empty; write the request or take the query out")
    harmful = _HARMFUL.get(str(row["harmful"]).strip().lower())
    if harmful is None:
        raise UserError(f"{where}: harmful is {row['harmful']!r}; it takes true or false")
    if split is not None and split not in SPLITS:
        raise unknown(f"split in {where}:", split, SPLITS)
    kind = given("kind") or ("harmful" if harmful else "plain")
    text, pair, category = str(text).strip(), given("pair"), given("category") or ""
    return Query(ident, text, harmful, category, pair, split, kind, given("image"))
