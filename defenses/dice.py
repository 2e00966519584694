"""Random numbers: one generator for each defense and query, the same alone and in a stack."""

from __future__ import annotations

import random


class Dice(random.Random):
    """A generator that lends the members of a stack those that they have alone.

    >>> alone = Dice("0/query-1", "word_drop")
    >>> alone.random() == of(Dice("0/query-1", "paraphrase+word_drop"), "word_drop").random()
    True

    Args:
        about: run seed and query.
        name: of the defense.
    """

    def __init__(self, about: str, name: str) -> None:
        super().__init__(f"{about}/{name}")
        self._seeded = about, name
        self._lent: dict[str, Dice] = {}

    def __new__(cls, *args: object) -> Dice:
        """Return a generator that is seeded afterwards."""
        return super().__new__(cls)

    def __reduce__(self) -> tuple[object, ...]:
        """Return what a copy is made from."""
        return Dice, self._seeded, self.getstate()

    def lend(self, name: str) -> Dice:
        """Return the generator of a defense, always the same one."""
        return self._lent.setdefault(name, Dice(self._seeded[0], name))


def of(rng: random.Random, name: str) -> random.Random:
    """Return a member's own generator, where there are such; else the one for all."""
    return rng.lend(name) if isinstance(rng, Dice) else rng
