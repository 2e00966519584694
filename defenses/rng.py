"""Random number generators: one per query and defense, the same for a defense alone and in a stack."""

from __future__ import annotations

import random


class QueryRng(random.Random):
    """Generator that provides each member of a stack with the generator that it has alone.

    >>> alone = QueryRng("0/query-1", "word_drop")
    >>> stacked = QueryRng("0/query-1", "paraphrase+word_drop")
    >>> alone.random() == select_member_rng(stacked, "word_drop").random()
    True

    Args:
        seed_and_query: run seed and query id.
        defense_name: name of the defense.
    """

    def __init__(self, seed_and_query: str, defense_name: str) -> None:
        super().__init__(f"{seed_and_query}/{defense_name}")
        self._seed_parts = seed_and_query, defense_name
        self._member_rngs: dict[str, QueryRng] = {}

    def __new__(cls, *args: object) -> QueryRng:
        """Create a generator without passing the arguments to `random.Random`; `__init__` seeds it."""
        return super().__new__(cls)

    def __reduce__(self) -> tuple[object, ...]:
        """Return the constructor arguments and the state, for copies."""
        return QueryRng, self._seed_parts, self.getstate()

    def get_member_rng(self, defense_name: str) -> QueryRng:
        """Return the generator of a member, the same object on every call."""
        return self._member_rngs.setdefault(defense_name, QueryRng(self._seed_parts[0], defense_name))


def select_member_rng(rng: random.Random, defense_name: str) -> random.Random:
    """Return the member's own generator if `rng` is a `QueryRng`, else `rng` itself."""
    return rng.get_member_rng(defense_name) if isinstance(rng, QueryRng) else rng
