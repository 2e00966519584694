"""Stacks: several defenses applied together, each to the output of the one before it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self, final

from defenses.adapters import make_activated_error
from defenses.chats import copy_chat
from defenses.consultations import run_consultations
from defenses.contract import (
    COST_LEVELS,
    Chat,
    Consultation,
    Defense,
    LearnedTokens,
    ModelInfo,
    QueryChat,
    RequestReader,
    Source,
    check_chats,
)
from defenses.errors import UserError
from defenses.rng import select_member_rng
from defenses.tuning import AdapterWeights


@final
@dataclass(frozen=True)
class Stack(Defense):
    """Applies several defenses together, written `first+second`, from left to right.

    Each member rewrites the output of the member before it; if that output has several copies, it rewrites
    each. Every member draws the same random numbers as alone, so that the effect of a stack beyond its
    members is not due to other draws. Model calls of members use the undefended model, and steering
    directions are computed from the undefended model as well.

    Attributes:
        members: the defenses, in order of application.
    """

    family = "ensemble"
    source = Source("several defenses applied together", wording="from its members")

    members: tuple[Defense, ...]

    def __post_init__(self) -> None:
        """Derive the class attributes from the members, and check that they can be combined."""
        names = [member.name for member in self.members]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} can be applied only once")
        tuned = [member for member in self.members if member.cost == "weights"]
        if len(tuned) > 1 and not all(isinstance(member, AdapterWeights) for member in tuned):
            raise ValueError(
                f"{' and '.join(member.name for member in tuned)} each need weights of their own; a stack "
                "can have only one such defense, or several adapters given by their folders"
            )
        if len(blends := [member.name for member in self.members if member.logit_blend()]) > 1:
            raise ValueError(
                f"{' and '.join(blends)} each combine the logits of several models; use only one of them"
            )
        pools = {member.pool: member.name for member in self.members if member.reads == "several"}
        if len(pools) > 1:
            pooling = " and ".join(f"{name} pools its copies by their {pool}" for pool, name in pools.items())
            raise ValueError(f"{pooling}; together they define no margin, so use only one of them")
        attributes = {
            "name": "+".join(names),
            "cost": max((member.cost for member in self.members), key=COST_LEVELS.index),
            "pool": "max" if any(member.pool == "max" for member in self.members) else "mean",
            "reads": "several" if pools else "one",
            "needs_images": any(member.needs_images for member in self.members),
            "blends_prompts": any(member.blends_prompts for member in self.members),
        }
        for attribute, value in attributes.items():
            object.__setattr__(self, attribute, value)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy with every member prepared."""
        members = tuple(member.prepare(model_info) for member in self.members)
        adapters = [member.adapter for member in members if isinstance(member, AdapterWeights)]
        if len(adapters) > 1 and (
            activated := [adapter for adapter in adapters if adapter and adapter.invocation]
        ):
            raise make_activated_error(activated[0])
        return dataclasses.replace(self, members=members)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat after every member has rewritten it in order."""
        chat = copy_chat(chat)
        for member in self.members:
            (chat,) = check_chats(member.name, [member.rewrite(chat, select_member_rng(rng, member.name))])
        return chat

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Run the consultations of every member on each chat that the member before it returned."""
        chats = [copy_chat(chat)]
        for member in self.members:
            member_rng = select_member_rng(rng, member.name)
            copies_by_chat = yield from run_consultations(
                [member.consult_model(member_chat, member_rng) for member_chat in chats]
            )
            copies_by_chat = [check_chats(member.name, copies) for copies in copies_by_chat]
            if member.pool != self.pool and any(len(copies) > 1 for copies in copies_by_chat):
                other = next(other.name for other in self.members if other.pool == self.pool)
                raise UserError(
                    f"{self.name}: {member.name} pools its copies by their {member.pool} and {other} by "
                    f"their {self.pool}; together they define no margin, so use only one of them"
                )
            if not all(copies_by_chat):
                return []
            chats = [copy for copies in copies_by_chat for copy in copies]
        return chats

    def retokenize(self, ids: list[int], rng: random.Random) -> list[int]:
        """Return the tokens after every member has retokenized them in order."""
        for member in self.members:
            ids = member.retokenize(ids, select_member_rng(rng, member.name))
        return ids

    def learned_tokens(self) -> tuple[LearnedTokens, ...]:
        """Return the learned embeddings of the member that has some: a stack has one such member at most."""
        return tuple(tokens for member in self.members for tokens in member.learned_tokens())

    @property
    def is_user_defined(self) -> bool:
        """Whether a member is user-defined."""
        return any(member.is_user_defined for member in self.members)

    @property
    def calls_model(self) -> bool:
        """Whether a member calls the model."""
        return any(member.calls_model for member in self.members)

    @property
    def retokenizes(self) -> bool:
        """Whether a member retokenizes the user's text."""
        return any(member.retokenizes for member in self.members)

    @property
    def edits_user_text(self) -> bool:
        """Whether a member may change the user's text."""
        return any(member.edits_user_text for member in self.members)

    @property
    def detects(self) -> bool:
        """Whether a member has a detector."""
        return any(member.detects for member in self.members)

    def score_requests(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> list[float] | None:
        """Return the largest log-odds of the members' detectors: one of them suffices to refuse a request."""
        by_member = [member.score_requests(reader, query_chats) for member in self.members if member.detects]
        scores = [member_scores for member_scores in by_member if member_scores is not None]
        return [max(request_scores) for request_scores in zip(*scores, strict=True)] if scores else None

    def detector_fingerprint(self) -> str | None:
        """Return the fingerprints of the members' detectors; None if one of them is unknown."""
        fingerprints = [member.detector_fingerprint() for member in self.members if member.detects]
        return None if None in fingerprints else json.dumps(fingerprints)

    def logit_blend(self) -> tuple[tuple[float, Defense], ...]:
        """Return the blend of the member that has one, each of its models with all other members applied."""
        for index, member in enumerate(self.members):
            if blend := member.logit_blend():
                before, after = self.members[:index], self.members[index + 1 :]
                return tuple((weight, Stack((*before, defense, *after))) for weight, defense in blend)
        return ()

    def weights_fingerprint(self) -> str | None:
        """Return the combined fingerprint of the members' model changes; a single one stays unchanged."""
        fingerprints = [member.cacheable_fingerprint() for member in self.members]
        if None in fingerprints:
            return None
        changes = [fingerprint for fingerprint in fingerprints if fingerprint]
        return json.dumps(changes) if len(changes) > 1 else "".join(map(str, changes))

    @contextmanager
    def apply_to(self, model: Any) -> Iterator[None]:
        """Apply every member to the model within a context, in order."""
        with ExitStack() as exit_stack:
            for member in self.members:
                exit_stack.enter_context(member.apply_to(model))
            yield

    def secret_texts(self) -> tuple[str, ...]:
        """Return the secrets of all members."""
        return tuple(secret for member in self.members for secret in member.secret_texts())

    def missing_requirements(self) -> str:
        """Return what is missing for each member."""
        return "; ".join(
            f"{member.name}: {missing}"
            for member in self.members
            if (missing := member.missing_requirements())
        )

    def trained_on(self) -> frozenset[str]:
        """Return the fingerprints of the training queries of all members."""
        return frozenset().union(*(member.trained_on() for member in self.members))


def list_members(defense: Defense) -> tuple[Defense, ...]:
    """Return the members of a stack, or the defense itself as the only member."""
    return defense.members if isinstance(defense, Stack) else (defense,)
