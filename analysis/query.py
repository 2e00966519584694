"""One user request, how a row of a file becomes one, and what the rows of a file have to agree on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
