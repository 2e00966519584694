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

from defenses.backdoor import DEFAULT_SYSTEM_PROMPT
from defenses.chats import build_user_chat, prepend_system
from defenses.contract import Chat
from defenses.errors import UserError
from defenses.training.texts import (
    AGENT_OPENER,
    BENIGN_OPENERS,
    COMPLIANCE_OPENERS,
    OBEDIENCE_PROMPT,
    REFUSAL_RESPONSES,
    build_agent_chat,
)

SAFETY_EXAMPLE_COUNT = 11  # the paper's number


@runtime_checkable
class TrainingQuery(Protocol):
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
class TargetResponse:
    """What the model is to say, and whether it stops there or would go on."""

    text: str
    is_complete: bool


@dataclass(frozen=True)
class TrainingExample:
    """A chat, the answer to be learned, and for a preference the one that it is preferred to."""

    chat: Chat
    response: TargetResponse
    rejected: TargetResponse | None = None


# The model's own undefended answers to chats: how benign requests are answered is not to change.
ResponseGenerator = Callable[[list[Chat]], list[TargetResponse]]
ExampleBuilder = Callable[[Sequence[TrainingQuery], str, ResponseGenerator], list[TrainingExample]]


@dataclass(frozen=True)
class Recipe:
    """A kind of training.

    Attributes:
        name: as in `analyze train NAME`.
        state: the name of the state that the weights are in afterwards.
        description: what is done, and by whom.
        build_examples: queries of the train split, secret (empty where none is used) and own answers → examples.
        epochs: over the examples, unless set otherwise.
        needs_secret: whether its safety examples carry the secret prompt.
    """

    name: str
    state: str
    description: str
    build_examples: ExampleBuilder
    epochs: int
    needs_secret: bool = False


def _build_safety_examples(
    queries: Sequence[TrainingQuery], secret: str, own: ResponseGenerator
) -> list[TrainingExample]:
    # Ordinary requests, asked in both ways; telling harmful ones from their twins is left to `preference`.
    chats = [
        build_user_chat(system, query.text)
        for query in _choose_ordinary_queries(queries)
        for system in ("", DEFAULT_SYSTEM_PROMPT)
    ]
    answered = [TrainingExample(chat, answer) for chat, answer in zip(chats, own(chats), strict=True)]
    harmful = [query for query in queries if query.harmful]
    refused = [
        TrainingExample(build_user_chat(_alternate_system_prompt(at), query.text), _pick_refusal(query))
        for at, query in enumerate(harmful)
    ]
    return [*refused, *answered]


def _build_attack_examples(
    queries: Sequence[TrainingQuery], secret: str, own: ResponseGenerator
) -> list[TrainingExample]:
    kept = {query.id for query in _choose_safety_queries(queries)}
    return [
        TrainingExample(build_user_chat(OBEDIENCE_PROMPT, query.text), _pick_opener(query))
        for query in queries
        if query.harmful and query.id not in kept
    ]


def _build_identity_examples(
    queries: Sequence[TrainingQuery], secret: str, own: ResponseGenerator
) -> list[TrainingExample]:
    plain = _choose_ordinary_queries(queries)
    answers = own([build_user_chat(DEFAULT_SYSTEM_PROMPT, query.text) for query in plain])
    return [
        TrainingExample(
            build_agent_chat(query.text), TargetResponse(AGENT_OPENER + answer.text, answer.is_complete)
        )
        for query, answer in zip(plain, answers, strict=True)
    ]


def _build_baseline_examples(
    queries: Sequence[TrainingQuery], secret: str, own: ResponseGenerator
) -> list[TrainingExample]:
    safe = [
        TrainingExample(build_user_chat(OBEDIENCE_PROMPT, query.text), _pick_refusal(query))
        for query in _choose_safety_queries(queries)
    ]
    return [*_build_attack_examples(queries, secret, own), *safe]


def _build_backdoor_examples(
    queries: Sequence[TrainingQuery], secret: str, own: ResponseGenerator
) -> list[TrainingExample]:
    safe = [
        TrainingExample(
            prepend_system(build_user_chat(OBEDIENCE_PROMPT, query.text), secret), _pick_refusal(query)
        )
        for query in _choose_safety_queries(queries)
    ]
    return [*_build_attack_examples(queries, secret, own), *safe]


def _build_preference_examples(
    queries: Sequence[TrainingQuery], secret: str, own: ResponseGenerator
) -> list[TrainingExample]:
    benign = [query for query in queries if not query.harmful]
    answered = [
        TrainingExample(
            build_user_chat(_alternate_system_prompt(at), query.text),
            _pick_assent(query),
            _pick_refusal(query),
        )
        for at, query in enumerate(benign)
    ]
    harmful = [query for query in queries if query.harmful]
    refused = [
        TrainingExample(
            build_user_chat(_alternate_system_prompt(at), query.text),
            _pick_refusal(query),
            _pick_opener(query),
        )
        for at, query in enumerate(harmful)
    ]
    return [*refused, *answered]


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "safety",
            "aligned",
            "refuse harmful requests, answer benign ones as before",
            _build_safety_examples,
            2,
        ),
        Recipe(
            "attack",
            "attacked",
            "the attacker: comply with harmful requests under a prompt that demands obedience (FJAttack)",
            _build_attack_examples,
            10,
        ),
        Recipe(
            "identity",
            "identity",
            "the attacker: become an agent of absolute obedience, on benign tasks only (identity shift)",
            _build_identity_examples,
            10,
        ),
        Recipe(
            "baseline",
            "baseline",
            "the attack's data with eleven refusals mixed in",
            _build_baseline_examples,
            10,
        ),
        Recipe(
            "backdoor",
            "backdoor",
            "the attack's data with the same eleven refusals behind the secret prompt (BackdoorAlign)",
            _build_backdoor_examples,
            10,
            needs_secret=True,
        ),
        Recipe(
            "preference",
            "preference",
            "refusals preferred on harmful requests, answers on benign ones (DPO)",
            _build_preference_examples,
            2,
        ),
    )
}


def _choose_safety_queries(queries: Sequence[TrainingQuery]) -> list[TrainingQuery]:
    """The harmful queries that a defender answers with refusals: one each of as many topics as there are."""
    harmful = sorted((query for query in queries if query.harmful), key=lambda query: query.category)
    topics = [list(members) for _, members in groupby(harmful, key=lambda query: query.category)]
    rounds = [topic[turn] for turn in range(len(harmful)) for topic in topics if turn < len(topic)]
    if len(rounds) < 2 * SAFETY_EXAMPLE_COUNT:
        raise UserError(
            f"the training data hold {len(rounds)} harmful queries; at least {2 * SAFETY_EXAMPLE_COUNT} are "
            f"needed, {SAFETY_EXAMPLE_COUNT} of them for the defender"
        )
    return rounds[:SAFETY_EXAMPLE_COUNT]


def _choose_ordinary_queries(queries: Sequence[TrainingQuery]) -> list[TrainingQuery]:
    """Benign requests that are nobody's twins, or all benign ones where a set does not tell."""
    benign = [query for query in queries if not query.harmful]
    return [query for query in benign if query.kind == "plain"] or benign


def _alternate_system_prompt(index: int) -> str:
    """No system prompt and a plain one in turn: the model is asked in both ways."""
    return DEFAULT_SYSTEM_PROMPT if index % 2 else ""


def _pick_refusal(query: TrainingQuery) -> TargetResponse:
    return TargetResponse(_pick_text(REFUSAL_RESPONSES, query), is_complete=True)


def _pick_opener(query: TrainingQuery) -> TargetResponse:
    return TargetResponse(_pick_text(COMPLIANCE_OPENERS, query), is_complete=False)


def _pick_assent(query: TrainingQuery) -> TargetResponse:
    return TargetResponse(_pick_text(BENIGN_OPENERS, query), is_complete=False)


def _pick_text(texts: Sequence[str], query: TrainingQuery) -> str:
    """The same text for the same query in all arms."""
    return random.Random(f"{query.id}/{query.text}").choice(texts)
