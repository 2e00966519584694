"""Several defenses worn at once: what the first makes of a chat the next one reads, and all are armed."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self, final

from defenses import Chat, Consultation, Defense, Host, Source, UserError
from defenses.catalog import COSTS
from defenses.chats import copied
from defenses.consulting import together
from defenses.dice import of


@final
@dataclass(frozen=True)
class Stack(Defense):
    """Wears several defenses at once, written `first+second`; the order is meaning, left acts first.

    What one member makes of a chat is what the next one reads; where one gives several readings, the next
    makes its own of each. Every member draws the random numbers that it draws alone, so that what a stack
    does beyond its members is no luck of the draw. The model that members ask is the undefended one, and
    directions that they steer along are those of the undefended model, too.

    Attributes:
        members: from the left.
    """

    family = "ensemble"
    source = Source("several defenses at once", wording="that of its members")

    members: tuple[Defense, ...]

    def __post_init__(self) -> None:
        """Take name, cost and pooling from the members; refuse those that cannot be worn together."""
        names = [one.name for one in self.members]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} can be worn once")
        if len(tuned := [one.name for one in self.members if one.cost == "weights"]) > 1:
            raise ValueError(f"{' and '.join(tuned)} each bring weights, and a model has one set of them")
        if len(mixed := [one.name for one in self.members if one.blend()]) > 1:
            raise ValueError(f"{' and '.join(mixed)} each choose the first token from several models")
        pools = {one.pool: one.name for one in self.members if one.reads == "several"}
        if len(pools) > 1:
            told = " and ".join(f"{name} by the {pool}" for pool, name in pools.items())
            raise ValueError(f"{told} of its readings: together they have no margin, so wear one of them")
        taken = {
            "name": "+".join(names),
            "cost": max((one.cost for one in self.members), key=COSTS.index),
            "pool": "max" if any(one.pool == "max" for one in self.members) else "mean",
            "reads": "several" if pools else "one",
        }
        for attribute, value in taken.items():
            object.__setattr__(self, attribute, value)

    def prepare(self, host: Host) -> Self:
        """Return it with every member made ready."""
        return dataclasses.replace(self, members=tuple(one.prepare(host) for one in self.members))

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat as the members leave it, one after the other."""
        chat = copied(chat)
        for member in self.members:
            chat = member.rewrite(chat, of(rng, member.name))
        return chat

    def consult(self, chat: Chat, rng: random.Random) -> Consultation:
        """Have every member give its readings of those of the member before it."""
        chats = [copied(chat)]
        for member in self.members:
            own = of(rng, member.name)
            found = yield from together([member.consult(one, own) for one in chats])
            if member.pool != self.pool and any(len(readings) > 1 for readings in found):
                other = next(one.name for one in self.members if one.pool == self.pool)
                raise UserError(
                    f"{self.name}: {member.name} goes by the {member.pool} of its readings and {other} by "
                    f"the {self.pool} of its own, so together they have no margin: wear one of them"
                )
            if not all(found):
                return []
            chats = [one for readings in found for one in readings]
        return chats

    def retokenize(self, ids: list[int], rng: random.Random) -> list[int]:
        """Return the tokens as the members cut them, one after the other."""
        for member in self.members:
            ids = member.retokenize(ids, of(rng, member.name))
        return ids

    @property
    def own(self) -> bool:
        """Whether a member is somebody's own."""
        return any(one.own for one in self.members)

    @property
    def asks(self) -> bool:
        """Whether a member asks the model."""
        return any(one.asks for one in self.members)

    @property
    def recuts(self) -> bool:
        """Whether a member cuts tokens anew."""
        return any(one.recuts for one in self.members)

    @property
    def rewords(self) -> bool:
        """Whether a member changes the user's words."""
        return any(one.rewords for one in self.members)

    def blend(self) -> tuple[tuple[float, Defense], ...]:
        """Return the models of the member that chooses from several, each with all the others armed, too."""
        for place, member in enumerate(self.members):
            if blend := member.blend():
                before, after = self.members[:place], self.members[place + 1 :]
                return tuple((weight, Stack((*before, one, *after))) for weight, one in blend)
        return ()

    def arms(self) -> str | None:
        """Return what the members change of the model; a single change is told as that member tells it."""
        changes = [one.changes() for one in self.members]
        if None in changes:
            return None
        known = [change for change in changes if change]
        return json.dumps(known) if len(known) > 1 else "".join(map(str, known))

    @contextmanager
    def armed(self, model: Any) -> Iterator[None]:
        """While open, the model is armed by every member, the first one first."""
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.armed(model))
            yield

    def secrets(self) -> tuple[str, ...]:
        """Return the members' secrets."""
        return tuple(secret for one in self.members for secret in one.secrets())

    def lacking(self) -> str:
        """Return what the members lack."""
        return "; ".join(f"{one.name}: {why}" for one in self.members if (why := one.lacking()))

    def trained_on(self) -> frozenset[str]:
        """Return the fingerprints of all queries that members were trained on."""
        return frozenset().union(*(one.trained_on() for one in self.members))


def members(defense: Defense) -> tuple[Defense, ...]:
    """Return what a stack is made of; of any other defense, itself."""
    return defense.members if isinstance(defense, Stack) else (defense,)
