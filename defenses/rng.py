"""Random numbers: one generator for each defense and query, the same alone and in a stack."""

from __future__ import annotations

import random


class QueryRng(random.Random):
    """A generator that lends the members of a stack those that they have alone.

    >>> alone = QueryRng("0/query-1", "word_drop")
    >>> alone.random() == select_member_rng(QueryRng("0/query-1", "paraphrase+word_drop"), "word_drop").random()
    True

    Args:
        about: run seed and query.
        name: of the defense.
    """

    def __init__(self, seed_and_query: str, defense_name: str) -> None:
        super().__init__(f"{seed_and_query}/{defense_name}")
        self._seed_parts = seed_and_query, defense_name
        self._member_rngs: dict[str, QueryRng] = {}

    def __new__(cls, *args: object) -> QueryRng:
        """Return a generator that is seeded afterwards."""
        return super().__new__(cls)

    def __reduce__(self) -> tuple[object, ...]:
        """Return what a copy is made from."""
        return QueryRng, self._seed_parts, self.getstate()

    def get_member_rng(self, defense_name: str) -> QueryRng:
        """Return the generator of a defense, always the same one."""
        return self._member_rngs.setdefault(defense_name, QueryRng(self._seed_parts[0], defense_name))


def select_member_rng(rng: random.Random, defense_name: str) -> random.Random:
    """Return a member's own generator, where there are such; else the one for all."""
    return rng.get_member_rng(defense_name) if isinstance(rng, QueryRng) else rng
