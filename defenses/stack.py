"""Several defenses worn at once: what the first makes of a chat the next one reads, and all are armed."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self, final

from defenses.chats import copy_chat
from defenses.consultations import run_consultations
from defenses.contract import COST_LEVELS, Chat, Consultation, Defense, ModelInfo, Source
from defenses.errors import UserError
from defenses.rng import select_member_rng


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
        if len(mixed := [one.name for one in self.members if one.logit_blend()]) > 1:
            raise ValueError(f"{' and '.join(mixed)} each choose the first token from several models")
        pools = {one.pool: one.name for one in self.members if one.reads == "several"}
        if len(pools) > 1:
            told = " and ".join(f"{name} by the {pool}" for pool, name in pools.items())
            raise ValueError(f"{told} of its readings: together they have no margin, so wear one of them")
        taken = {
            "name": "+".join(names),
            "cost": max((one.cost for one in self.members), key=COST_LEVELS.index),
            "pool": "max" if any(one.pool == "max" for one in self.members) else "mean",
            "reads": "several" if pools else "one",
        }
        for attribute, value in taken.items():
            object.__setattr__(self, attribute, value)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return it with every member made ready."""
        return dataclasses.replace(self, members=tuple(one.prepare(model_info) for one in self.members))

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat as the members leave it, one after the other."""
        chat = copy_chat(chat)
        for member in self.members:
            chat = member.rewrite(chat, select_member_rng(rng, member.name))
        return chat

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Have every member give its readings of those of the member before it."""
        chats = [copy_chat(chat)]
        for member in self.members:
            own = select_member_rng(rng, member.name)
            found = yield from run_consultations([member.consult_model(one, own) for one in chats])
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
            ids = member.retokenize(ids, select_member_rng(rng, member.name))
        return ids

    @property
    def is_user_defined(self) -> bool:
        """Whether a member is somebody's own."""
        return any(one.is_user_defined for one in self.members)

    @property
    def calls_model(self) -> bool:
        """Whether a member asks the model."""
        return any(one.calls_model for one in self.members)

    @property
    def retokenizes(self) -> bool:
        """Whether a member cuts tokens anew."""
        return any(one.retokenizes for one in self.members)

    @property
    def edits_user_text(self) -> bool:
        """Whether a member changes the user's words."""
        return any(one.edits_user_text for one in self.members)

    def logit_blend(self) -> tuple[tuple[float, Defense], ...]:
        """Return the models of the member that chooses from several, each with all the others armed, too."""
        for place, member in enumerate(self.members):
            if blend := member.logit_blend():
                before, after = self.members[:place], self.members[place + 1 :]
                return tuple((weight, Stack((*before, one, *after))) for weight, one in blend)
        return ()

    def weights_fingerprint(self) -> str | None:
        """Return what the members change of the model; a single change is told as that member tells it."""
        changes = [one.cacheable_fingerprint() for one in self.members]
        if None in changes:
            return None
        known = [change for change in changes if change]
        return json.dumps(known) if len(known) > 1 else "".join(map(str, known))

    @contextmanager
    def apply_to(self, model: Any) -> Iterator[None]:
        """While open, the model is armed by every member, the first one first."""
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.apply_to(model))
            yield

    def secret_texts(self) -> tuple[str, ...]:
        """Return the members' secrets."""
        return tuple(secret for one in self.members for secret in one.secret_texts())

    def missing_requirements(self) -> str:
        """Return what the members lack."""
        return "; ".join(f"{one.name}: {why}" for one in self.members if (why := one.missing_requirements()))

    def trained_on(self) -> frozenset[str]:
        """Return the fingerprints of all queries that members were trained on."""
        return frozenset().union(*(one.trained_on() for one in self.members))


def list_members(defense: Defense) -> tuple[Defense, ...]:
    """Return what a stack is made of; of any other defense, itself."""
    return defense.members if isinstance(defense, Stack) else (defense,)
