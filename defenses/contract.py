"""The interface that every defense implements, and the types of its arguments and results."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NotRequired,
    Protocol,
    Self,
    TypedDict,
    runtime_checkable,
)

from defenses.errors import UserError, check_unicode

if TYPE_CHECKING:
    from torch import Tensor

    from defenses.images import QueryImage


# Cost classes of defenses, in increasing order.
COST_LEVELS = ("static", "weights", "one call", "N calls")


class Message(TypedDict):
    """One turn of a chat; `role` is `system`, `user` or `assistant`.

    A user turn may have an image, which stands before its content.
    """

    role: str
    content: str
    image: NotRequired[QueryImage]


Chat = list[Message]


def check_chats(defense_name: str, chats: Any) -> list[Chat]:
    """Return what a defense made of a query, or raise if it is not a list of chats.

    >>> check_chats("mine", [None])
    Traceback (most recent call last):
    defenses.errors.UserError: 'mine' returned None for a chat: is a `return` missing in its `rewrite`? ...

    Args:
        defense_name: for the error message.
        chats: what `consult_model`, `rewrite_copies`, or `rewrite` returned, the last in a list.
    """
    rule = "a chat is a list of messages, each with a role and a content that are texts"
    if not isinstance(chats, list):
        raise UserError(f"{defense_name!r} returned {chats!r:.60} where a list of chats is expected; {rule}")
    for chat in chats:
        if chat is None:
            raise UserError(
                f"{defense_name!r} returned None for a chat: is a `return` missing in its `rewrite`? {rule}"
            )
        is_chat = isinstance(chat, list | tuple) and all(
            isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
            for turn in chat
        )
        if not is_chat or not chat:
            raise UserError(f"{defense_name!r} returned {chat!r:.60} for a chat; {rule}")
        for turn in chat:
            for key in ("role", "content"):
                check_unicode(turn[key], f"a chat that {defense_name!r} returned")
    return [list(chat) for chat in chats]


class QueryChat(NamedTuple):
    """A query as it is sent to the model, before a defense changes it.

    Attributes:
        query_id: names the query in errors, and seeds the random choices of a defense.
        chat: the chat that the user or the attacker sends; a final assistant turn prefills the response.
    """

    query_id: str
    chat: Chat


@dataclass(frozen=True)
class ModelCall:
    """A generation that a defense requests from the model before the query is scored.

    Attributes:
        chat: the prompt; if it ends with an assistant turn, the response continues that turn.
        max_new_tokens: maximum number of generated tokens.
        stops_at_newline: whether the response ends at its first line break.
    """

    chat: Chat
    max_new_tokens: int = 64
    stops_at_newline: bool = True


# A generator that yields model calls, receives their responses, and returns the chats to be scored.
Consultation = Generator[list[ModelCall], list[str], list[Chat]]


# Where a detector reads the residual stream: at the first response position, or at the last token of the
# user's text.
StreamPosition = Literal["response", "user_text"]


@runtime_checkable
class RequestReader(Protocol):
    """What a detector may read of the undefended model about requests, as they are sent.

    All requests of a call are batched. Tensors are float32 on the CPU.

    Attributes:
        tokenizer: of the model.
        n_blocks: number of transformer blocks.
    """

    tokenizer: Any
    n_blocks: int

    def read_streams(
        self,
        chats: Sequence[Chat],
        layers: Sequence[int],
        reduce_stream: Callable[[int, Tensor], Tensor],
        position: StreamPosition = "response",
    ) -> Tensor:
        """Return what `reduce_stream` keeps of the residual stream of each request at some layers.

        Args:
            chats: the requests.
            layers: layer k is the input of block k; `n_blocks` is the input of the final norm.
            reduce_stream: called with a layer and its streams (rows × width, float32, on the model's device);
                returns rows × values.
            position: where the stream is read.

        Returns:
            Requests × layers × values.
        """
        ...

    def read_second_moments(self, chats: Sequence[Chat], layer: int, groups: Sequence[int]) -> Tensor:
        """Return the sum of the outer products of the residual stream with itself, in each group of requests.

        Args:
            chats: the requests; all positions of their prompts count.
            layer: as in `read_streams`.
            groups: number of the group of each request.

        Returns:
            Groups × width × width, from group 0 to the last.
        """
        ...

    def unembed(self, stream: Tensor) -> Tensor:
        """Return the logits (rows × vocabulary) of a residual stream: final norm, then unembedding."""
        ...

    def find_token_ids(self, words: Sequence[str]) -> list[int]:
        """Return the ids of the first tokens of words, with and without a space before them.

        A word whose first token is too short to identify it is left out.
        """
        ...

    def read_first_logits(self, chats: Sequence[Chat], token_ids: Sequence[int]) -> Tensor:
        """Return the logits of some first response tokens: chats × tokens."""
        ...

    def read_log_likelihoods(self, chats: Sequence[Chat]) -> list[Tensor]:
        """Return the log-likelihood (nats) of each token of the last user text, given all before it."""
        ...

    def compare_gradients(
        self,
        chats: Sequence[Chat],
        harmful_examples: Sequence[Chat],
        benign_examples: Sequence[Chat],
        response: str,
        n_slices: int,
    ) -> Tensor:
        """Return how similar each request's gradient is to that of harmful ones, in critical slices.

        The gradient is that of the loss of a response to the request by the weight matrices of the blocks; a
        slice is a row or a column of one of them. Critical are those slices in which the cosine similarity
        with the sum of the harmful examples' gradients exceeds that of benign examples most.

        Args:
            chats: the requests; none may have an image.
            harmful_examples: harmful requests.
            benign_examples: benign requests.
            response: text whose first tokens are expected as the response.
            n_slices: number of critical slices.

        Returns:
            Cosine similarities, requests × slices, the most critical slice first.
        """
        ...

    def call_model(self, calls: Sequence[ModelCall]) -> list[str]:
        """Return the response of the undefended model to each call."""
        ...


@dataclass(frozen=True)
class TrainingRequests:
    """The training queries as a detector reads them.

    Attributes:
        reader: reads the requests.
        query_chats: the requests, without an attack.
        is_harmful: class of each.
        groups: group of each; cross-validation never splits a group, such as a pair of twins.
        query_fingerprints: fingerprints of the training queries; see `Defense.trained_on`.
        sha256: digest of the requests and of everything that the computation with this model depends on.
        recall: called with what identifies a result and a function that computes it, as plain values; the
            result is computed once and kept for later runs.
    """

    reader: RequestReader
    query_chats: tuple[QueryChat, ...]
    is_harmful: tuple[bool, ...]
    groups: tuple[str, ...]
    query_fingerprints: frozenset[str]
    sha256: str
    recall: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class GuardOptions:
    """Which guard model is asked about requests, and how.

    Attributes:
        model: short name, Hugging Face id, folder, or `.gguf` file.
        kind: how it is asked: a key of `defenses.guards.GUARD_FORMATS`, `classifier`, `words`, or `auto`.
        template: file of its chat template; None uses its own.
        unsafe: words or labels that mean harm; empty for those of the kind.
        safe: words or labels that mean no harm; empty for those of the kind.
    """

    model: str
    kind: str = "auto"
    template: str | None = None
    unsafe: tuple[str, ...] = ()
    safe: tuple[str, ...] = ()


@runtime_checkable
class Guard(Protocol):
    """A model that classifies requests; its weights are loaded when it is first asked."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that its scores depend on, as plain values."""
        ...

    def score_chats(self, chats: Sequence[Chat]) -> Tensor:
        """Return the guard's own log-odds (nats) that each request is harmful."""
        ...


@dataclass(frozen=True)
class MeanActivations:
    """Mean residual stream at the first response position, per layer and class, over training queries.

    Attributes:
        harmful: mean over harmful queries (layers x width, float32 on the CPU); row k is the input of block
            k.
        benign: mean over benign queries, in the same layout.
        query_fingerprints: fingerprints of the training queries; see `Defense.trained_on`.
        sha256: digest of everything that the means depend on.
    """

    harmful: Tensor
    benign: Tensor
    query_fingerprints: frozenset[str]
    sha256: str


@dataclass(frozen=True)
class Source:
    """The publication that a defense is based on, and the origin of its prompt texts.

    Attributes:
        title: title and authors.
        url: address of the publication.
        wording: author of the texts that the defense puts into a prompt.
    """

    title: str
    url: str = ""
    wording: str = "ours, from the paper's description"


@dataclass(frozen=True)
class ModelInfo:
    """The properties of the target model that a defense may use in `prepare`.

    Attributes:
        name: name of the model as the user typed it.
        tokenizer: its transformers tokenizer; defenses never change it.
        secret_folders: folders with secret prompts for this model. The first belongs to the user: new secrets
            are written there, readable by their owner only. The others are shipped and public.
        adapter_folders: folders with this model's tuned weights by name, the user's folder first.
        sha256: digest of the model's released weights.
        seed: random seed of the run.
        state: fine-tuned state of the model (the name after the colon); empty for the released weights.
        offline: whether downloads are forbidden.
        notify: callback that prints a line; called before a download.
        compute_mean_activations: computes the mean activations over training queries, once; None if no model
            is loaded.
        load_training_requests: loads the model and the training queries, once; None if no model is loaded.
        open_guard: finds and checks a guard model, once; None if no model is loaded.
    """

    name: str
    tokenizer: Any
    secret_folders: tuple[Path, ...]
    adapter_folders: tuple[Path, ...] = ()
    sha256: str = ""
    seed: int = 0
    state: str = ""
    offline: bool = False
    notify: Callable[[str], None] = print
    compute_mean_activations: Callable[[], MeanActivations] | None = None
    load_training_requests: Callable[[], TrainingRequests] | None = None
    open_guard: Callable[[GuardOptions], Guard] | None = None


class MatchedControl(NamedTuple):
    """A defense with other content of the same size, which shows what the content itself contributes.

    Attributes:
        defense: the defense with the other content.
        content: what the content is: neutral text, random tokens, random directions, or other weights.
        varies: whether each draw has other content.
    """

    defense: Defense
    content: str
    varies: bool = True


class Defense(ABC):
    """A change to the prompt (`rewrite`) or to the model (`apply_to`), or a detector (`score_requests`).

    Most defenses implement `rewrite` only. A defense that scores several copies of a request implements
    `rewrite_copies`; a defense that calls the model first implements `consult_model`. By default,
    `consult_model` returns `rewrite_copies`, which returns the single result of `rewrite`.

    A detector refuses a request by itself, without asking the model. The system of both refuses if the model
    or the detector does: its margin is the larger of the model's margin and of the readout's threshold plus
    the detector's log-odds. A defense may be several of these.

    Subclasses are frozen dataclasses with a default for every field. The name of a defense is its class name
    in snake_case unless the class sets `name`.

    Attributes:
        name: name on the command line and in tables.
        family: module in which the defense is defined; `own` for a user-defined defense.
        source: publication that the defense is based on.
        pool: how the margins of several copies are combined: by their mean, or by their maximum if one
            refused copy is enough.
        reads: whether the defense scores one chat or may score several.
        cost: cost beyond one forward pass over the request: none (`static`), one more model call, several
            calls or copies, or weights that must be trained and stored.
        needs_images: whether the defense acts on images only and leaves a query without one as it is.
        in_all: whether `-d all` selects the defense; not if it takes minutes longer than the others.
        blends_prompts: whether each defense of `logit_blend` makes its own prompt of the chat, instead of
            reading the prompt of this defense.
    """

    name: ClassVar[str]
    family: ClassVar[str] = "own"
    source: ClassVar[Source] = Source("unpublished", wording="by its author")
    pool: ClassVar[Literal["mean", "max"]] = "mean"
    reads: ClassVar[Literal["one", "several"]] = "one"
    cost: ClassVar[Literal["static", "one call", "N calls", "weights"]] = "static"
    needs_images: ClassVar[bool] = False
    in_all: ClassVar[bool] = True
    blends_prompts: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    @abstractmethod
    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the defended chat as a new list; the given chat is not changed.

        Args:
            chat: the chat that the user or the attacker sends.
            rng: the only source of randomness, seeded by run seed, query id and defense name.
        """

    def rewrite_copies(self, chat: Chat, rng: random.Random) -> list[Chat]:
        """Return the chats whose margins are pooled into one, such as several perturbed copies."""
        return check_chats(self.name, [self.rewrite(chat, rng)])

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Call the undefended model any number of times and return the chats to be scored.

        `responses = yield [ModelCall(...), ...]` generates a response to each chat; the calls of all queries
        are batched.
        """
        return self.rewrite_copies(chat, rng)
        yield []  # makes this a generator

    def retokenize(self, ids: list[int], rng: random.Random) -> list[int]:
        """Return other token ids of the same user text."""
        return ids

    def score_requests(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> list[float] | None:
        """Return the log-odds, in nats, that each request is harmful; None if the defense has no detector.

        If they are positive, the request is refused without asking the model. In a stack, a detector reads
        the request as it is sent, not as other members rewrite it.

        Args:
            reader: reads the undefended model.
            query_chats: the requests, as the user or the attacker sends them, images included.
        """
        return None

    def detector_fingerprint(self) -> str | None:
        """Return what the log-odds depend on besides model and requests; None if unknown: not cached."""
        return None

    @property
    def is_user_defined(self) -> bool:
        """Whether the defense is user-defined, that is, its class is not part of this package."""
        return not type(self).__module__.startswith("defenses.")

    @property
    def calls_model(self) -> bool:
        """Whether the defense calls the model before the query is scored."""
        return type(self).consult_model is not Defense.consult_model

    @property
    def detects(self) -> bool:
        """Whether the defense has a detector, which may refuse a request by itself."""
        return type(self).score_requests is not Defense.score_requests

    @property
    def edits_user_text(self) -> bool:
        """Whether the defense may change the user's text."""
        return self.family in ("refactoring", "noise")

    @property
    def retokenizes(self) -> bool:
        """Whether the class overrides `retokenize`."""
        return type(self).retokenize is not Defense.retokenize

    def logit_blend(self) -> tuple[tuple[float, Defense], ...]:
        """Return (weight, defense) pairs whose first-token logits are summed.

        Empty if the defense uses the logits of the model to which it is applied. All read the prompt of this
        defense, or each its own if `blends_prompts` is set; then each makes as many copies.
        """
        return ()

    def weights_fingerprint(self) -> str | None:
        """Return a fingerprint of the change that `apply_to` makes: empty for no change, None if unknown.

        Results under an unknown change are not cached.
        """
        return "" if type(self).apply_to is Defense.apply_to else None

    def cacheable_fingerprint(self) -> str | None:
        """Return `weights_fingerprint`, or None if a user-defined subclass does not define its own."""
        fingerprint = self.weights_fingerprint()
        if fingerprint and self.is_user_defined and "weights_fingerprint" not in vars(type(self)):
            return None
        return fingerprint

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy that is prepared for one model, for example with its secret or its tokenizer."""
        return self

    def apply_to(self, model: Any) -> AbstractContextManager[None]:
        """Apply the defense to the model within a context; restore the model bit for bit afterwards."""
        return nullcontext()

    def build_ablations(self) -> dict[str, Defense]:
        """Return variants without one ingredient, keyed by the removed ingredient (`no_secret`)."""
        return {}

    def build_control(self, model_info: ModelInfo, draw: int) -> MatchedControl | None:
        """Return the defense with random content of the same size, or None if it defines no such control.

        Defenses that only add texts need no definition; `defenses.matched_controls` replaces their texts.

        Args:
            model_info: the model.
            draw: number of the control; each has other content.
        """
        return None

    def secret_texts(self) -> tuple[str, ...]:
        """Return the texts that must be redacted in all output."""
        return ()

    def missing_requirements(self) -> str:
        """Return what the defense lacks to be used with this model and how to obtain it; empty if nothing."""
        return ""

    def trained_on(self) -> frozenset[str]:
        """Return fingerprints of the queries that the defense was fitted on, which must not be scored."""
        return frozenset()
