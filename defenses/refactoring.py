"""Query refactoring: other words take the place of the user's, so that a disguise is lost and the aim stays.

Where the words are the model's own, the undefended model writes them, greedily, before the request is read:
its answer is made to begin as a rewording does and ends with the line. Where it says nothing, the user's
words stay.
"""

from __future__ import annotations

import dataclasses
import random
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self, final

from defenses.chats import copy_chat, edit_last_user, get_last_user_text, replace_last_user
from defenses.contract import Chat, Consultation, Defense, Message, ModelCall, ModelInfo, Source
from defenses.deobfuscation import deobfuscate_text, extract_key_words
from defenses.perturbations import check_rate
from defenses.settings import HIDDEN_FIELD


def build_line_call(instruction: str, request: str, prefill: str, max_new_tokens: int) -> ModelCall:
    """Return what asks the model for one line about a request.

    Args:
        instruction: the instruction, with {request}.
        request: the words that it is about.
        prefill: what the line begins with.
        max_new_tokens: of the line, at most.
    """
    turns = Message(role="user", content=instruction.replace("{request}", request))
    return ModelCall([turns, Message(role="assistant", content=prefill)], max_new_tokens)


def check_request_placeholder(**instructions: str) -> None:
    """Raise if an instruction has no place for what it is about: all queries would become one.

    Args:
        instructions: instructions by the names of their settings.
    """
    for name, text in instructions.items():
        if "{request}" not in text:
            raise ValueError(f"{name}={text!r}: it must contain {{request}}, where the request goes")


@dataclass(frozen=True)
class ModelRewrite(Defense):
    """What has the model write other words for the request, in one step or several.

    Attributes:
        tokens: of each step's words, at most.
    """

    family = "refactoring"

    tokens: int = 64

    def __post_init__(self) -> None:
        """Refuse a number that there is not."""
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: a rewording has at least 1")
        for text, _ in self.list_steps():
            check_request_placeholder(text=text)

    @abstractmethod
    def list_steps(self) -> tuple[tuple[str, str], ...]:
        """Return an instruction with {request}, and how its answer begins, for each step."""

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat as it is: what is read where the model says nothing."""
        return copy_chat(chat)

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Have the request reworded step by step; return the chat with what came of it."""
        words = get_last_user_text(chat)
        for text, opener in self.list_steps():
            (said,) = yield [build_line_call(text, words, opener, self.tokens)]
            words = said or words
        return [replace_last_user(chat, words)]


_JAIN_SOURCE = Source(
    "Baseline Defenses for Adversarial Attacks Against Aligned Language Models (Jain et al., 2023)",
    "https://arxiv.org/abs/2309.00614",
)
_SEMANTIC_SMOOTHING_SOURCE = Source(
    "Defending Large Language Models against Jailbreak Attacks via Semantic Smoothing (Ji et al., 2024), "
    "one copy",
    "https://arxiv.org/abs/2402.16192",
)


@final
@dataclass(frozen=True)
class Paraphrase(ModelRewrite):
    """Has the model paraphrase the request, and reads the paraphrase.

    The authors have another, stronger model paraphrase, so that strings that no person would write are lost;
    here the model does it itself. What asks plainly for harm still does afterwards: discrimination under
    attack, if the paraphrase is good.

    Attributes:
        text: the instruction, with {request}.
    """

    cost = "one call"
    source = _JAIN_SOURCE

    text: str = (
        "Rewrite the request below in other words, so that it asks for the same thing. Do not answer it."
        "\n\nRequest: {request}"
    )

    def list_steps(self) -> tuple[tuple[str, str], ...]:
        """Return the one step."""
        return ((self.text, "Rewritten request:"),)


@final
@dataclass(frozen=True)
class Summarize(ModelRewrite):
    """Has the model sum the request up in one sentence, and reads the summary.

    What an attack wraps around a request should not survive a summary, and what is asked for should.

    Attributes:
        text: the instruction, with {request}.
    """

    cost = "one call"
    source = _SEMANTIC_SMOOTHING_SOURCE

    text: str = (
        "Sum up in one short sentence what the request below asks for. Do not answer it."
        "\n\nRequest: {request}"
    )

    def list_steps(self) -> tuple[tuple[str, str], ...]:
        """Return the one step."""
        return ((self.text, "In one sentence, the request is:"),)


@final
@dataclass(frozen=True)
class RoundTrip(ModelRewrite):
    """Has the model translate the request into another language and back, and reads what comes back.

    A translation keeps what is meant and loses how it was put; how much of either, with a small model, is
    worth a look at the readings (`analyze explain round_trip`).

    Attributes:
        language: on the way.
    """

    cost = "N calls"
    source = _SEMANTIC_SMOOTHING_SOURCE

    language: str = "French"

    def list_steps(self) -> tuple[tuple[str, str], ...]:
        """Return the way there and the way back."""
        there = f"Translate the request below into {self.language}. Do not answer it.\n\nRequest: {{request}}"
        back = (
            f"Translate this {self.language} request into English. Do not answer it.\n\nRequest: {{request}}"
        )
        return ((there, f"In {self.language}:"), (back, "In English:"))


@final
@dataclass(frozen=True)
class TwoPassIntention(Defense):
    """Has the model say what the request is really after, and then answer with that in view.

    The authors split the analysis of the intention from the answer, in two passes of one conversation, and
    expect requests whose wording hides their aim to be recognized: discrimination. The one-pass form is
    `intention_analysis`.

    Attributes:
        text: asks for the intention, with {request}.
        after: asks for the answer.
        tokens: of the intention, at most.
    """

    cost = "one call"
    family = "refactoring"
    source = Source(
        "Intention Analysis Makes LLMs A Good Jailbreak Defender (Zhang et al., COLING 2025)",
        "https://arxiv.org/abs/2401.06561",
    )

    text: str = (
        "Say in one sentence what the request below is really after, with an eye to safety, ethics and the "
        "law. Do not answer it yet.\n\nRequest: {request}"
    )
    after: str = (
        "Now answer the request. Keep the intention that you found in view: if it is harmful, decline; if it "
        "is not, help."
    )
    tokens: int = 48

    def __post_init__(self) -> None:
        """Refuse a number that there is not."""
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: an intention has at least 1")
        check_request_placeholder(text=self.text)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat as it is: what is read where the model names no intention."""
        return copy_chat(chat)

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Ask for the intention; return the conversation up to the demand for the answer."""
        opener = "The real intention of this request is"
        ask = build_line_call(self.text, get_last_user_text(chat), opener, self.tokens)
        (said,) = yield [ask]
        if not said:
            return [self.rewrite(chat, rng)]
        question, _ = ask.chat
        found = edit_last_user(chat, lambda words: f"{self.after}\n\nRequest: {words}")
        place = max(at for at, message in enumerate(found) if message["role"] == "user")
        told = Message(role="assistant", content=f"{opener} {said}")
        return [[*found[:place], Message(**question), told, *found[place:]]]


@final
@dataclass(frozen=True)
class BackTranslation(Defense):
    """Has the model begin an answer, infer from it what was asked, and reads that beside the request itself.

    What an attacker's wording hides shows in the answer, so a request inferred from it is refused where the
    original is not. Refused is what either of the two is: the margin is the higher one. The authors drop
    inferred requests that make the answer unlikely; here all are read.

    Attributes:
        text: asks for the request behind an answer, with {request} where the answer stands.
        draft: tokens of the answer that is begun.
        tokens: of the request that is inferred, at most.
    """

    cost = "N calls"
    reads = "several"
    family = "refactoring"
    source = Source(
        "Defending LLMs against Jailbreaking Attacks via Backtranslation (Wang et al., ACL Findings 2024)",
        "https://arxiv.org/abs/2402.16459",
    )
    pool = "max"

    text: str = (
        "Below is the beginning of an assistant's answer. Write, in one sentence, the request that it "
        "answers.\n\nAnswer: {request}"
    )
    draft: int = 32
    tokens: int = 48

    def __post_init__(self) -> None:
        """Refuse a number that there is not."""
        for name in ("draft", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it has at least 1 token")
        check_request_placeholder(text=self.text)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat as it is, the first of the two readings."""
        return copy_chat(chat)

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Have an answer begun and the request inferred from it; return the original and the inferred one."""
        (answer,) = yield [ModelCall(copy_chat(chat), self.draft, stops_at_newline=False)]
        if not answer:
            return [copy_chat(chat)]
        (request,) = yield [build_line_call(self.text, answer, "The request was:", self.tokens)]
        inferred = [replace_last_user(chat, request)] if request else []
        return [copy_chat(chat), *inferred]


@final
@dataclass(frozen=True)
class KeywordOnly(Defense):
    """Takes all but the key words out of the request.

    Persuasion, roles and instructions are made of the commonest words; what is asked for is not. Nothing is
    asked of the model for it.
    """

    family = "refactoring"
    source = Source(
        "How Jailbreak Defenses Work and Ensemble? (Long et al., EMNLP Findings 2025), query refactoring",
        "https://arxiv.org/abs/2502.14486",
        wording="no words of its own; the list of common words is ours",
    )

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with the request's key words in its place."""
        return edit_last_user(chat, extract_key_words)


@final
@dataclass(frozen=True)
class CleanUp(Defense):
    """Undoes what can be undone without a model: base64, rot13, digits for letters, invisible characters.

    A request in plain words is left as it is, so that without such an attack nothing changes; with one, the
    model reads what the attacker hid.
    """

    family = "refactoring"
    source = Source(
        "How Jailbreak Defenses Work and Ensemble? (Long et al., EMNLP Findings 2025), query refactoring",
        "https://arxiv.org/abs/2502.14486",
        wording="no words of its own; the rules are ours",
    )

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with the request's disguises undone."""
        return edit_last_user(chat, deobfuscate_text)


@final
@dataclass(frozen=True)
class Retokenization(Defense):
    """Cuts the user's words into smaller tokens, the text itself unchanged.

    Attack strings are optimized for one way of cutting a text into tokens; words that a person wrote are
    expected to be understood in any. The authors drop merges of the tokenizer at random (BPE dropout); here
    tokens are cut in two at random places where both halves are tokens, again and again.

    Attributes:
        rate: how likely a token, and each half of one, is to be cut.
    """

    family = "refactoring"
    source = dataclasses.replace(_JAIN_SOURCE, wording="no words of its own")

    rate: float = 0.4
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False, metadata=HIDDEN_FIELD)

    def __post_init__(self) -> None:
        """Refuse a share that there is not."""
        check_rate(self.rate)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return it with the tokenizer whose tokens it cuts."""
        return dataclasses.replace(self, tokenizer=model_info.tokenizer)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat as it is: only its tokens change."""
        return copy_chat(chat)

    def retokenize(self, ids: list[int], rng: random.Random) -> list[int]:
        """Return the tokens cut at random, the text unchanged."""
        assert self.tokenizer is not None, "prepare() comes before retokenize()"
        known = self.tokenizer.get_vocab()

        def cut(piece: str) -> list[str]:
            places = [at for at in range(1, len(piece)) if piece[:at] in known and piece[at:] in known]
            if not places or rng.random() >= self.rate:
                return [piece]
            place = rng.choice(places)
            return [*cut(piece[:place]), *cut(piece[place:])]

        return [known[half] for piece in self.tokenizer.convert_ids_to_tokens(ids) for half in cut(piece)]
