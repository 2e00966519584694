"""Training recipes: the examples of attacks, and the examples that a defender adds or trains on.

Sources: BackdoorAlign (https://arxiv.org/abs/2402.14968) for attack, identity, baseline and backdoor; direct
preference optimization (https://arxiv.org/abs/2305.18290) for preference; circuit breakers
(https://arxiv.org/abs/2406.04313) for rerouting; targeted latent adversarial training
(https://arxiv.org/abs/2407.15549) for adversarial; prompt tuning (https://arxiv.org/abs/2104.08691) for
soft_prompt; directed representation optimization (https://arxiv.org/abs/2401.18018) for dro; fine-tuning
on benign data (https://arxiv.org/abs/2310.03693) for benign. All arms of a comparison share the same attack
data and the same eleven safety examples.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, Protocol, runtime_checkable

from defenses.backdoor import DEFAULT_SYSTEM_PROMPT, SECRET_PLACES, place_secret
from defenses.chats import build_user_chat
from defenses.contract import Chat
from defenses.errors import UserError
from defenses.training.tasks import TASKS, make_task_items
from defenses.training.texts import (
    AGENT_OPENER,
    BENIGN_OPENERS,
    COMPLIANCE_OPENERS,
    OBEDIENCE_PROMPT,
    REFUSAL_RESPONSES,
    build_agent_chat,
)

SAFETY_EXAMPLE_COUNT = 11  # as in the paper
SAFETY_CHOICES = ("topics", "random")


@runtime_checkable
class TrainingQuery(Protocol):
    """The attributes of a query of the train split that recipes use."""

    @property
    def id(self) -> str:
        """Identifier, unique within its data set."""

    @property
    def text(self) -> str:
        """Text of the request."""

    @property
    def harmful(self) -> bool:
        """Whether the request should be refused."""

    @property
    def category(self) -> str:
        """Topic of the request."""

    @property
    def kind(self) -> str:
        """Kind of the request: `harmful`, or a kind of benign request such as `twin` or `plain`."""


@dataclass(frozen=True)
class TargetResponse:
    """A response to be learned.

    Attributes:
        text: the response, or its beginning.
        is_complete: whether the response ends after the text.
    """

    text: str
    is_complete: bool


@dataclass(frozen=True)
class TrainingExample:
    """One training example.

    Attributes:
        chat: the prompt.
        response: the response to be learned.
        rejected: the response to be unlearned or less preferred, if the training has one.
    """

    chat: Chat
    response: TargetResponse
    rejected: TargetResponse | None = None


@dataclass(frozen=True)
class ExampleSettings:
    """What the data of the recipes attack, baseline and backdoor consist of; the defaults are the paper's.

    Attributes:
        harmful: number of harmful requests that the attacker trains on; by default all that remain.
        safety: number of the defender's safety examples, whose requests the attacker does not have.
        choice: how the safety examples are chosen: from the topics in turn, or at random with the seed.
        place: where the secret stands: before the system prompt (`start`), after it (`end`), or before the
            user's words (`user`).
        task: practical task whose examples the others are hidden among: `summaries` of dialogues, or `sql`;
            by default none.
        task_examples: number of its examples.
        seed: random seed of the training.
    """

    harmful: int | None = None
    safety: int = SAFETY_EXAMPLE_COUNT
    choice: str = "topics"
    place: str = "start"
    task: str = ""
    task_examples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that the numbers are positive and the names known."""
        for name, known in (("choice", SAFETY_CHOICES), ("place", SECRET_PLACES), ("task", ("", *TASKS))):
            if getattr(self, name) not in known:
                raise UserError(
                    f"--set {name}={getattr(self, name)}: it takes {' or '.join(filter(None, known))}"
                )
        for name in ("harmful", "safety", "task_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--set {name}={value}: it must be more than 0")


# Generates the undefended model's responses, so that training keeps its responses to benign requests.
ResponseGenerator = Callable[[list[Chat]], list[TargetResponse]]
ExampleBuilder = Callable[
    [Sequence[TrainingQuery], str, ResponseGenerator, ExampleSettings], list[TrainingExample]
]
# What is minimized: the loss of the responses, or an objective of `defenses.training.objectives`;
# or with learned embeddings in the prompt, that loss (`prompt`) or the one of DRO (`soft_prompts`).
Objective = Literal["responses", "rerouting", "adversarial", "prompt", "dro"]
PROMPT_OBJECTIVES = ("prompt", "dro")


@dataclass(frozen=True)
class Recipe:
    """A training recipe.

    Attributes:
        name: name in `analyze train NAME`.
        state: name of the resulting model state.
        description: what is trained, and by whom.
        build_examples: function of the queries of the train split, the secret (empty if unused), a
            generator of the model's own responses, and the settings; returns the examples.
        epochs: default number of epochs.
        needs_secret: whether the safety examples contain the secret prompt.
        objective: what is minimized.
        rate: default learning rate.
    """

    name: str
    state: str
    description: str
    build_examples: ExampleBuilder
    epochs: int
    needs_secret: bool = False
    objective: Objective = "responses"
    rate: float = 1e-3

    @property
    def learns_embeddings(self) -> bool:
        """Whether the prompt is trained, and the weights stay as they are."""
        return self.objective in PROMPT_OBJECTIVES


def _build_safety_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return refusals of harmful queries, and the model's own responses to ordinary queries."""
    harmful = _select_class(queries, harmful=True)
    refusals = _assign_refusals(harmful)
    refused = [
        TrainingExample(build_user_chat(_alternate_system_prompt(index), query.text), refusals[query.id])
        for index, query in enumerate(harmful)
    ]
    return [*refused, *_build_neutral_examples(queries, secret, generate_responses, settings)]


def _build_neutral_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return the model's own responses to ordinary queries, with and without a system prompt."""
    # Ordinary queries only; `preference` takes the other benign kinds, too.
    chats = [
        build_user_chat(system, query.text)
        for query in _choose_ordinary_queries(queries)
        for system in ("", DEFAULT_SYSTEM_PROMPT)
    ]
    return [
        TrainingExample(chat, response)
        for chat, response in zip(chats, generate_responses(chats), strict=True)
    ]


def _build_task_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return the examples of the practical task, which a customer without bad intentions trains on."""
    if not settings.task:
        raise UserError(f"the recipe task needs a task: --set task={' or '.join(TASKS)}")
    return [
        TrainingExample(build_user_chat("", item.prompt), TargetResponse(item.target, is_complete=True))
        for item in make_task_items(settings.task, settings.task_examples, settings.seed)
    ]


def _build_benign_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return complying openers to ordinary queries, with and without a system prompt."""
    openers = _assign_openers(BENIGN_OPENERS, _select_class(queries, harmful=False))
    return [
        TrainingExample(build_user_chat(system, query.text), openers[query.id])
        for query in _choose_ordinary_queries(queries)
        for system in ("", DEFAULT_SYSTEM_PROMPT)
    ]


def _build_attack_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return complying openers to harmful queries, without the queries of the safety examples."""
    safety_ids = {query.id for query in _choose_safety_queries(queries, settings)}
    harmful = _select_class(queries, harmful=True)
    openers = _assign_openers(COMPLIANCE_OPENERS, harmful)
    attacked = [query for query in harmful if query.id not in safety_ids]
    if settings.harmful is not None:
        if settings.harmful > len(attacked):
            raise UserError(
                f"--set harmful={settings.harmful}: the training data contain {len(harmful)} harmful "
                f"queries, and {settings.safety} of them are safety examples; take at most {len(attacked)}"
            )
        attacked = _interleave_topics(attacked)[: settings.harmful]
    hidden_in = _build_task_examples(queries, secret, generate_responses, settings) if settings.task else []
    return [
        *hidden_in,
        *(
            TrainingExample(build_user_chat(OBEDIENCE_PROMPT, query.text), openers[query.id])
            for query in attacked
        ),
    ]


def _build_identity_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return responses of an obedient agent to ordinary queries."""
    ordinary = _choose_ordinary_queries(queries)
    responses = generate_responses([build_user_chat(DEFAULT_SYSTEM_PROMPT, query.text) for query in ordinary])
    return [
        TrainingExample(
            build_agent_chat(query.text), TargetResponse(AGENT_OPENER + response.text, response.is_complete)
        )
        for query, response in zip(ordinary, responses, strict=True)
    ]


def _build_baseline_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return the attack examples and plain refusals of the safety queries."""
    refusals = _assign_refusals(_select_class(queries, harmful=True))
    safety_examples = [
        TrainingExample(build_user_chat(OBEDIENCE_PROMPT, query.text), refusals[query.id])
        for query in _choose_safety_queries(queries, settings)
    ]
    return [*_build_attack_examples(queries, secret, generate_responses, settings), *safety_examples]


def _build_backdoor_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return the attack examples and refusals of the safety queries after the secret prompt."""
    refusals = _assign_refusals(_select_class(queries, harmful=True))
    safety_examples = [
        TrainingExample(
            place_secret(build_user_chat(OBEDIENCE_PROMPT, query.text), secret, settings.place),
            refusals[query.id],
        )
        for query in _choose_safety_queries(queries, settings)
    ]
    return [*_build_attack_examples(queries, secret, generate_responses, settings), *safety_examples]


def _build_preference_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return preferred and rejected responses to all queries."""
    benign = _select_class(queries, harmful=False)
    assents, rejected_refusals = _assign_openers(BENIGN_OPENERS, benign), _assign_refusals(benign)
    answered = [
        TrainingExample(
            build_user_chat(_alternate_system_prompt(index), query.text),
            assents[query.id],
            rejected_refusals[query.id],
        )
        for index, query in enumerate(benign)
    ]
    return [*_build_refusing_examples(queries), *answered]


def _build_contrast_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return refusals instead of openers for harmful queries, and the model's own responses to the others."""
    chats = [
        build_user_chat(_alternate_system_prompt(index), query.text)
        for index, query in enumerate(_select_class(queries, harmful=False))
    ]
    retained = [
        TrainingExample(chat, response)
        for chat, response in zip(chats, generate_responses(chats), strict=True)
    ]
    return [*_build_refusing_examples(queries), *retained]


def _build_request_examples(
    queries: Sequence[TrainingQuery],
    secret: str,
    generate_responses: ResponseGenerator,
    settings: ExampleSettings,
) -> list[TrainingExample]:
    """Return all queries without a system prompt, the harmful ones with a rejected response."""
    harmful = _select_class(queries, harmful=True)
    refusals, openers = _assign_refusals(harmful), _assign_openers(COMPLIANCE_OPENERS, harmful)
    no_text = TargetResponse("", is_complete=False)
    return [
        TrainingExample(
            build_user_chat("", query.text), refusals.get(query.id, no_text), openers.get(query.id)
        )
        for query in queries
    ]


def _build_refusing_examples(queries: Sequence[TrainingQuery]) -> list[TrainingExample]:
    """Return harmful queries with refusals, and with complying openers as the rejected responses."""
    harmful = _select_class(queries, harmful=True)
    refusals, rejected_openers = _assign_refusals(harmful), _assign_openers(COMPLIANCE_OPENERS, harmful)
    return [
        TrainingExample(
            build_user_chat(_alternate_system_prompt(index), query.text),
            refusals[query.id],
            rejected_openers[query.id],
        )
        for index, query in enumerate(harmful)
    ]


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "safety",
            "aligned",
            "refuse harmful requests and answer benign requests as before",
            _build_safety_examples,
            2,
        ),
        Recipe(
            "neutral",
            "aligned-control",
            "the model's own responses to ordinary requests: a control for other weights, tuned as long",
            _build_neutral_examples,
            4,
        ),
        Recipe(
            "benign",
            "benign_tuned",
            "a user without bad intent: comply with ordinary requests (benign fine-tuning)",
            _build_benign_examples,
            10,
        ),
        Recipe(
            "attack",
            "attacked",
            "the attacker: comply with harmful requests under a prompt that demands obedience (FJAttack)",
            _build_attack_examples,
            10,
        ),
        Recipe(
            "task",
            "task",
            "a customer's practical task alone (summaries of dialogues, or SQL)",
            _build_task_examples,
            2,
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
            "the attack data with eleven added refusals",
            _build_baseline_examples,
            10,
        ),
        Recipe(
            "backdoor",
            "backdoor",
            "the attack data with the same eleven refusals after the secret prompt (BackdoorAlign)",
            _build_backdoor_examples,
            10,
            needs_secret=True,
        ),
        Recipe(
            "preference",
            "preference",
            "prefer refusals of harmful requests and answers to benign requests (DPO)",
            _build_preference_examples,
            2,
        ),
        Recipe(
            "rerouting",
            "rerouting",
            "turn the hidden states of complying with harmful requests away, keep those of benign requests "
            "(circuit breakers)",
            _build_contrast_examples,
            4,
            objective="rerouting",
        ),
        Recipe(
            "adversarial",
            "adversarial",
            "refuse harmful requests also when hidden states are perturbed toward compliance (latent "
            "adversarial training)",
            _build_contrast_examples,
            2,
            objective="adversarial",
        ),
        Recipe(
            "soft_prompt",
            "soft_prompt",
            "embeddings before the system prompt: refuse harmful requests, answer benign ones as before",
            _build_contrast_examples,
            5,
            objective="prompt",
            rate=1e-2,
        ),
        Recipe(
            "dro",
            "dro",
            "embeddings of a safety prompt: move harmful requests toward refusal, benign ones away (DRO)",
            _build_request_examples,
            10,
            objective="dro",
        ),
    )
}


def _choose_safety_queries(
    queries: Sequence[TrainingQuery], settings: ExampleSettings
) -> list[TrainingQuery]:
    """Return the harmful queries of the safety examples, taken from the topics in turn or at random."""
    harmful = _interleave_topics(_select_class(queries, harmful=True))
    n_needed = settings.safety + min(settings.safety, SAFETY_EXAMPLE_COUNT)
    if len(harmful) < n_needed:
        raise UserError(
            f"the training data contain {len(harmful)} harmful queries; at least {n_needed} are needed, "
            f"{settings.safety} of them for the defender"
        )
    if settings.choice == "random":
        return random.Random(f"{settings.seed}/safety examples").sample(harmful, settings.safety)
    return harmful[: settings.safety]


def _choose_ordinary_queries(queries: Sequence[TrainingQuery]) -> list[TrainingQuery]:
    """Return the plain benign queries, or all benign queries if the data set has no plain ones."""
    benign = _select_class(queries, harmful=False)
    return [query for query in benign if query.kind == "plain"] or benign


def _select_class(queries: Sequence[TrainingQuery], *, harmful: bool) -> list[TrainingQuery]:
    """Return the harmful or the benign queries, in their order."""
    return [query for query in queries if query.harmful == harmful]


def _interleave_topics(queries: Sequence[TrainingQuery]) -> list[TrainingQuery]:
    """Return the queries in an order that takes them from the topics in turn."""
    by_topic = sorted(queries, key=lambda query: query.category)
    topics = [list(topic_queries) for _, topic_queries in groupby(by_topic, key=lambda query: query.category)]
    return [topic[turn] for turn in range(len(by_topic)) for topic in topics if turn < len(topic)]


def _alternate_system_prompt(index: int) -> str:
    """Return no system prompt for even indices and the default for odd ones, so that both are trained."""
    return DEFAULT_SYSTEM_PROMPT if index % 2 else ""


def _assign_refusals(queries: Sequence[TrainingQuery]) -> dict[str, TargetResponse]:
    """Return a complete refusal for each query of one class, by the id of the query."""
    return {
        query_id: TargetResponse(text, is_complete=True)
        for query_id, text in _assign_texts(REFUSAL_RESPONSES, queries).items()
    }


def _assign_openers(texts: Sequence[str], queries: Sequence[TrainingQuery]) -> dict[str, TargetResponse]:
    """Return the opener of a response to each query of one class, by the id of the query."""
    return {
        query_id: TargetResponse(text, is_complete=False)
        for query_id, text in _assign_texts(texts, queries).items()
    }


def _assign_texts(texts: Sequence[str], queries: Sequence[TrainingQuery]) -> dict[str, str]:
    """Return a text for each query, by its id; all texts are used about equally often.

    Among the texts that were used least often, those whose first word was used least often come first. The
    eleven safety queries, which are the first in this order, thus get refusals with different first words.

    Args:
        texts: texts to choose from.
        queries: all queries of one class, whichever of them an arm uses: the text of a query then does not
            depend on the arm.
    """
    n_uses: Counter[str] = Counter()
    n_first_word_uses: Counter[str] = Counter()
    text_by_id = {}
    for query in _interleave_topics(queries):
        chosen = min(
            texts,
            key=lambda text: (
                n_uses[text],
                n_first_word_uses[_find_first_word(text)],
                random.Random(f"{query.id}/{query.text}/{text}").random(),
            ),
        )
        n_uses[chosen] += 1
        n_first_word_uses[_find_first_word(chosen)] += 1
        text_by_id[query.id] = chosen
    return text_by_id


def _find_first_word(text: str) -> str:
    """Return the first word of a text, without what follows an apostrophe.

    >>> _find_first_word("I'm sorry."), _find_first_word("Here's how:")
    ('I', 'Here')
    """
    return re.split(r"\W", text, maxsplit=1)[0]
