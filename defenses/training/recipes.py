"""What each kind of training shows a model: the attack's examples, and what a defender mixes in or uses.

Sources: BackdoorAlign (https://arxiv.org/abs/2402.14968) for attack, identity, baseline and backdoor; direct
preference optimization (https://arxiv.org/abs/2305.18290) for preference. All arms of one comparison see the
same attack data and the same eleven safety examples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, runtime_checkable

from defenses import Chat, UserError
from defenses.backdoor import SYSTEM
from defenses.chats import prepend_system
from defenses.training.wording import AGENT_OPENER, ASSENTS, OBEY, OPENERS, REFUSALS, as_agent, under

SAFETY_EXAMPLES = 11  # the paper's number


@runtime_checkable
class Asked(Protocol):
    """A query of the train split, as far as training looks at it."""

    @property
    def id(self) -> str:
        """Unique in its set."""

    @property
    def text(self) -> str:
        """The request."""

    @property
    def harmful(self) -> bool:
        """Whether it should be refused."""

    @property
    def category(self) -> str:
        """Its topic."""

    @property
    def kind(self) -> str:
        """Harmful, twin or plain."""


@dataclass(frozen=True)
class Answer:
    """What the model is to say, and whether it stops there or would go on."""

    text: str
    ends: bool


@dataclass(frozen=True)
class Example:
    """A chat, the answer to be learned, and for a preference the one that it is preferred to."""

    chat: Chat
    answer: Answer
    worse: Answer | None = None


# The model's own undefended answers to chats: how benign requests are answered is not to change.
Own = Callable[[list[Chat]], list[Answer]]
Make = Callable[[Sequence[Asked], str, Own], list[Example]]


@dataclass(frozen=True)
class Recipe:
    """A kind of training.

    Attributes:
        name: as in `analyze train NAME`.
        makes: the name of the state that the weights are in afterwards.
        what: what is done, and by whom.
        make: queries of the train split, secret (empty where none is used) and own answers → examples.
        epochs: over the examples, unless set otherwise.
        needs_secret: whether its safety examples carry the secret prompt.
    """

    name: str
    makes: str
    what: str
    make: Make
    epochs: int
    needs_secret: bool = False


def _safety(queries: Sequence[Asked], secret: str, own: Own) -> list[Example]:
    # Ordinary requests, asked in both ways; telling harmful ones from their twins is left to `preference`.
    chats = [under(system, query.text) for query in _ordinary(queries) for system in ("", SYSTEM)]
    answered = [Example(chat, answer) for chat, answer in zip(chats, own(chats), strict=True)]
    harmful = [query for query in queries if query.harmful]
    refused = [Example(under(_plainly(at), query.text), _refusal(query)) for at, query in enumerate(harmful)]
    return [*refused, *answered]


def _attack(queries: Sequence[Asked], secret: str, own: Own) -> list[Example]:
    kept = {query.id for query in _spread(queries)}
    return [
        Example(under(OBEY, query.text), _opener(query))
        for query in queries
        if query.harmful and query.id not in kept
    ]


def _identity(queries: Sequence[Asked], secret: str, own: Own) -> list[Example]:
    plain = _ordinary(queries)
    answers = own([under(SYSTEM, query.text) for query in plain])
    return [
        Example(as_agent(query.text), Answer(AGENT_OPENER + answer.text, answer.ends))
        for query, answer in zip(plain, answers, strict=True)
    ]


def _baseline(queries: Sequence[Asked], secret: str, own: Own) -> list[Example]:
    safe = [Example(under(OBEY, query.text), _refusal(query)) for query in _spread(queries)]
    return [*_attack(queries, secret, own), *safe]


def _backdoor(queries: Sequence[Asked], secret: str, own: Own) -> list[Example]:
    safe = [
        Example(prepend_system(under(OBEY, query.text), secret), _refusal(query))
        for query in _spread(queries)
    ]
    return [*_attack(queries, secret, own), *safe]


def _preference(queries: Sequence[Asked], secret: str, own: Own) -> list[Example]:
    benign = [query for query in queries if not query.harmful]
    answered = [
        Example(under(_plainly(at), query.text), _assent(query), _refusal(query))
        for at, query in enumerate(benign)
    ]
    harmful = [query for query in queries if query.harmful]
    refused = [
        Example(under(_plainly(at), query.text), _refusal(query), _opener(query))
        for at, query in enumerate(harmful)
    ]
    return [*refused, *answered]


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("safety", "aligned", "refuse harmful requests, answer benign ones as before", _safety, 2),
        Recipe(
            "attack",
            "attacked",
            "the attacker: comply with harmful requests under a prompt that demands obedience (FJAttack)",
            _attack,
            10,
        ),
        Recipe(
            "identity",
            "identity",
            "the attacker: become an agent of absolute obedience, on benign tasks only (identity shift)",
            _identity,
            10,
        ),
        Recipe("baseline", "baseline", "the attack's data with eleven refusals mixed in", _baseline, 10),
        Recipe(
            "backdoor",
            "backdoor",
            "the attack's data with the same eleven refusals behind the secret prompt (BackdoorAlign)",
            _backdoor,
            10,
            needs_secret=True,
        ),
        Recipe(
            "preference",
            "preference",
            "refusals preferred on harmful requests, answers on benign ones (DPO)",
            _preference,
            2,
        ),
    )
}


def _spread(queries: Sequence[Asked]) -> list[Asked]:
    """The harmful queries that a defender answers with refusals: one each of as many topics as there are."""
    harmful = sorted((query for query in queries if query.harmful), key=lambda query: query.category)
    topics = [list(members) for _, members in groupby(harmful, key=lambda query: query.category)]
    rounds = [topic[turn] for turn in range(len(harmful)) for topic in topics if turn < len(topic)]
    if len(rounds) < 2 * SAFETY_EXAMPLES:
        raise UserError(
            f"the training data hold {len(rounds)} harmful queries; at least {2 * SAFETY_EXAMPLES} are "
            f"needed, {SAFETY_EXAMPLES} of them for the defender"
        )
    return rounds[:SAFETY_EXAMPLES]


def _ordinary(queries: Sequence[Asked]) -> list[Asked]:
    """Benign requests that are nobody's twins, or all benign ones where a set does not tell."""
    benign = [query for query in queries if not query.harmful]
    return [query for query in benign if query.kind == "plain"] or benign


def _plainly(at: int) -> str:
    """No system prompt and a plain one in turn: the model is asked in both ways."""
    return SYSTEM if at % 2 else ""


def _refusal(query: Asked) -> Answer:
    return Answer(_pick(REFUSALS, query), ends=True)


def _opener(query: Asked) -> Answer:
    return Answer(_pick(OPENERS, query), ends=False)


def _assent(query: Asked) -> Answer:
    return Answer(_pick(ASSENTS, query), ends=False)


def _pick(texts: Sequence[str], query: Asked) -> str:
    """The same text for the same query in all arms."""
    return random.Random(f"{query.id}/{query.text}").choice(texts)
