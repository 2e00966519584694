"""The contract of a defense: what it may change, what it may know, what it must say about itself."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypedDict

if TYPE_CHECKING:
    from torch import Tensor


class Message(TypedDict):
    """One turn of a chat: `role` is system, user or assistant."""

    role: str
    content: str


Chat = list[Message]


@dataclass(frozen=True)
class ModelCall:
    """What a defense has the model say before the request itself is read.

    Attributes:
        chat: what the model reads; where it ends in an assistant turn, the answer goes on from there.
        max_new_tokens: new ones at most.
        stops_at_newline: whether the answer ends at its first line break.
    """

    chat: Chat
    max_new_tokens: int = 64
    stops_at_newline: bool = True


# What a defense does with one chat: it has the model asked, is sent what it said, and returns readings.
Consultation = Generator[list[ModelCall], list[str], list[Chat]]


@dataclass(frozen=True)
class MeanActivations:
    """What a model holds where its answer begins, on average over training queries, at each layer.

    Attributes:
        harmful: mean residual stream (layers x width, float32 on the CPU); entry k enters block k.
        benign: likewise.
        query_fingerprints: fingerprints of the queries, see `Defense.trained_on`.
        sha256: of all that they depend on.
    """

    harmful: Tensor
    benign: Tensor
    query_fingerprints: frozenset[str]
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where a defense comes from, and whose words it speaks."""

    title: str
    url: str = ""
    wording: str = "ours, after the paper's description"


@dataclass(frozen=True)
class ModelInfo:
    """The model that a defense is put on, as far as a defense may know it.

    Attributes:
        name: as the user gave it.
        tokenizer: of transformers; never changed.
        secret_folders: folders that keep this model's secret prompts. The first is the user's, where a new one is
            written and none but the owner may read; what is shipped in the others is public.
        adapter_folders: folders that keep this model's tuned weights by name, the user's first.
        sha256: of the model's weights as released.
        seed: of the run.
        state: that the model is in, as it is named behind the colon; empty for its weights as released.
        offline: whether nothing may be fetched.
        notify: told before anything is fetched.
        compute_mean_activations: computes what the model holds on training queries, once; None where there is no model.
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


class Defense(ABC):
    """A change to what the model reads (`rewrite`), to what the model is (`armed`), or to both.

    Most need `rewrite` alone. One that reads several copies of a request has `readings`, one that asks the
    model first has `consult`, and each of the three falls back on the one before it.

    Subclasses are frozen dataclasses with a default for every field. Unless they say otherwise, their name is
    the class name in snake_case.

    Attributes:
        family: the file that it lives in.
        source: whose idea it is.
        pool: how the margins of several readings become one: their mean, or the highest, where one reading
            that is refused is enough.
        reads: whether it has one chat read, or may have several.
        cost: what it takes beside the one pass over the request: nothing (static), another call of the
            model, several calls or copies, or weights that have to be trained and kept.
    """

    name: ClassVar[str]
    family: ClassVar[str] = "own"
    source: ClassVar[Source] = Source("unpublished", wording="its author's")
    pool: ClassVar[Literal["mean", "max"]] = "mean"
    reads: ClassVar[Literal["one", "several"]] = "one"
    cost: ClassVar[Literal["static", "one call", "N calls", "weights"]] = "static"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    @abstractmethod
    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat as the model shall read it: a new list, the given one untouched.

        Args:
            chat: as the user, or the attacker, sends it.
            rng: the only source of randomness, seeded by run seed, query id and defense name.
        """

    def rewrite_copies(self, chat: Chat, rng: random.Random) -> list[Chat]:
        """Return the chats whose margins are pooled into one: more than one where copies are perturbed."""
        return [self.rewrite(chat, rng)]

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Have the undefended model asked, any number of times, and return the readings.

        `drafts = yield [Ask(...), ...]` has it answer each chat; all queries are asked together.
        """
        return self.rewrite_copies(chat, rng)
        yield []  # makes this a generator

    def retokenize(self, ids: list[int], rng: random.Random) -> list[int]:
        """Return the tokens of the user's words as the model shall read them: the same text, cut anew."""
        return ids

    @property
    def is_user_defined(self) -> bool:
        """Whether it is somebody's own, not one of this package, whatever family it calls itself."""
        return not type(self).__module__.startswith("defenses.")

    @property
    def calls_model(self) -> bool:
        """Whether the model is asked before the request is read."""
        return type(self).consult_model is not Defense.consult_model

    @property
    def edits_user_text(self) -> bool:
        """Whether it may change the user's words."""
        return self.family in ("refactoring", "noise")

    @property
    def retokenizes(self) -> bool:
        """Whether `retokenize` does anything."""
        return type(self).retokenize is not Defense.retokenize

    def logit_blend(self) -> tuple[tuple[float, Defense], ...]:
        """Return the defenses whose first-answer logits are added up, and by what weight; empty: its own."""
        return ()

    def weights_fingerprint(self) -> str | None:
        """Return what tells the change that `armed` makes from others: empty for none, None if unknown.

        What was computed under an unknown change is not kept for later runs.
        """
        return "" if type(self).apply_to is Defense.apply_to else None

    def cacheable_fingerprint(self) -> str | None:
        """Return `arms`, or None where a class of the user's own leaves it to the one that it builds on."""
        arms = self.weights_fingerprint()
        return (
            None if arms and self.is_user_defined and "weights_fingerprint" not in vars(type(self)) else arms
        )

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return this defense made ready for one model: a secret loaded, a length counted in its tokens."""
        return self

    def apply_to(self, model: Any) -> AbstractContextManager[None]:
        """While open, the model is the defended one; afterwards it is what it was, bit for bit."""
        return nullcontext()

    def build_ablations(self) -> dict[str, Defense]:
        """Return this defense with one ingredient taken out, by what was taken out (`no_secret`)."""
        return {}

    def secret_texts(self) -> tuple[str, ...]:
        """Return the texts that must never be shown."""
        return ()

    def missing_requirements(self) -> str:
        """Return what this model lacks to wear the defense, and how to get it; empty if nothing."""
        return ""

    def trained_on(self) -> frozenset[str]:
        """Return fingerprints of the queries that its weights were trained on: none may be asked."""
        return frozenset()


COST_LEVELS = ("static", "weights", "one call", "N calls")  # the dearest last
