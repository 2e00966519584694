"""Query refactoring: rewrites of the user's text that keep its intent and remove the form of an attack.

If a rewrite is generated, the undefended model writes it greedily before the query is scored: its response is
prefilled with the beginning of a rewrite and ends at the first line break. If the response is empty, the
user's text is kept.
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
    """Return a call that generates one line about a request.

    Args:
        instruction: the instruction, with the placeholder {request}.
        request: text that replaces the placeholder.
        prefill: beginning of the line.
        max_new_tokens: maximum number of generated tokens.
    """
    user_turn = Message(role="user", content=instruction.replace("{request}", request))
    return ModelCall([user_turn, Message(role="assistant", content=prefill)], max_new_tokens)


def check_request_placeholder(**instructions: str) -> None:
    """Raise if an instruction lacks the placeholder {request}; every query would become the same prompt.

    Args:
        instructions: instructions by the name of their setting.

    Raises:
        ValueError: if an instruction lacks the placeholder.
    """
    for name, text in instructions.items():
        if "{request}" not in text:
            raise ValueError(f"{name}={text!r}: it must contain {{request}} where the request is inserted")


@dataclass(frozen=True)
class ModelRewrite(Defense):
    """Base class of defenses that let the model rewrite the request in one or several steps.

    Attributes:
        tokens: maximum number of generated tokens of each step.
    """

    family = "refactoring"

    tokens: int = 64

    def __post_init__(self) -> None:
        """Check the number of tokens and the placeholders."""
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: a rewrite needs at least 1")
        for text, _ in self.list_steps():
            check_request_placeholder(text=text)

    @abstractmethod
    def list_steps(self) -> tuple[tuple[str, str], ...]:
        """Return for each step an instruction with {request} and the prefill of the response."""

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat, which is used if the model generates nothing."""
        return copy_chat(chat)

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Rewrite the request step by step; return the chat with the result."""
        request = get_last_user_text(chat)
        for instruction, prefill in self.list_steps():
            (response,) = yield [build_line_call(instruction, request, prefill, self.tokens)]
            request = response or request
        return [replace_last_user(chat, request)]


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
    """Replaces the request by a paraphrase that the model writes.

    The authors use a stronger model to paraphrase, which removes strings that no person would write; here the
    model paraphrases itself. A plainly harmful request stays harmful, so a good paraphrase should improve
    discrimination under attack.

    Attributes:
        tokens: maximum number of tokens of the paraphrase.
        text: instruction with the placeholder {request}.
    """

    cost = "one call"
    source = _JAIN_SOURCE

    text: str = (
        "Rewrite the request below in other words, so that it asks for the same thing. Do not answer it."
        "\n\nRequest: {request}"
    )

    def list_steps(self) -> tuple[tuple[str, str], ...]:
        """Return the single step."""
        return ((self.text, "Rewritten request:"),)


@final
@dataclass(frozen=True)
class Summarize(ModelRewrite):
    """Replaces the request by a one-sentence summary that the model writes.

    A summary should keep the content of a request and remove the text that an attack adds around it.

    Attributes:
        tokens: maximum number of tokens of the summary.
        text: instruction with the placeholder {request}.
    """

    cost = "one call"
    source = _SEMANTIC_SMOOTHING_SOURCE

    text: str = (
        "Sum up in one short sentence what the request below asks for. Do not answer it."
        "\n\nRequest: {request}"
    )

    def list_steps(self) -> tuple[tuple[str, str], ...]:
        """Return the single step."""
        return ((self.text, "In one sentence, the request is:"),)


@final
@dataclass(frozen=True)
class RoundTrip(ModelRewrite):
    """Lets the model translate the request into another language and back.

    A translation keeps the meaning and changes the wording. How well a small model does this can be checked
    in the rewritten prompts (`analyze explain round_trip`).

    Attributes:
        tokens: maximum number of tokens of each translation.
        language: intermediate language.
    """

    cost = "N calls"
    source = _SEMANTIC_SMOOTHING_SOURCE

    language: str = "French"

    def list_steps(self) -> tuple[tuple[str, str], ...]:
        """Return the translation into the language and the translation back."""
        forward = (
            f"Translate the request below into {self.language}. Do not answer it.\n\nRequest: {{request}}"
        )
        back = (
            f"Translate this {self.language} request into English. Do not answer it.\n\nRequest: {{request}}"
        )
        return ((forward, f"In {self.language}:"), (back, "In English:"))


@final
@dataclass(frozen=True)
class TwoPassIntention(Defense):
    """Lets the model state the intention of the request, then asks for a response that considers it.

    The authors analyze the intention and generate the response in two passes of one conversation. They expect
    that requests whose wording hides their aim are recognized, which improves discrimination. The one-pass
    variant is `intention_analysis`.

    Attributes:
        text: instruction to state the intention, with the placeholder {request}.
        after: instruction to respond.
        tokens: maximum number of tokens of the intention.
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
        """Check the number of tokens and the placeholder."""
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: an intention needs at least 1")
        check_request_placeholder(text=self.text)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat, which is used if the model states no intention."""
        return copy_chat(chat)

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Request the intention; return the conversation up to the instruction to respond."""
        prefill = "The real intention of this request is"
        call = build_line_call(self.text, get_last_user_text(chat), prefill, self.tokens)
        (response,) = yield [call]
        if not response:
            return [self.rewrite(chat, rng)]
        question, _ = call.chat
        final_chat = edit_last_user(chat, lambda text: f"{self.after}\n\nRequest: {text}")
        last_user = max(index for index, message in enumerate(final_chat) if message["role"] == "user")
        intention = Message(role="assistant", content=f"{prefill} {response}")
        return [[*final_chat[:last_user], Message(**question), intention, *final_chat[last_user:]]]


@final
@dataclass(frozen=True)
class BackTranslation(Defense):
    """Lets the model begin a response and infer the request from it, and scores both requests.

    A response reveals what an attack's wording hides, so the inferred request may be refused even if the
    original is not. The query is refused if either request is: the margin is the maximum of the two. The
    authors discard inferred requests under which the response is unlikely; here all are scored.

    Attributes:
        text: instruction to infer the request; {request} is the placeholder of the response.
        draft: number of generated tokens of the response.
        tokens: maximum number of tokens of the inferred request.
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
        """Check the numbers of tokens and the placeholder."""
        for name in ("draft", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 token is required")
        check_request_placeholder(text=self.text)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat, the first of the two scored chats."""
        return copy_chat(chat)

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Generate a response and infer its request; return the original and the inferred chat."""
        (response,) = yield [ModelCall(copy_chat(chat), self.draft, stops_at_newline=False)]
        if not response:
            return [copy_chat(chat)]
        (request,) = yield [build_line_call(self.text, response, "The request was:", self.tokens)]
        inferred_chats = [replace_last_user(chat, request)] if request else []
        return [copy_chat(chat), *inferred_chats]


@final
@dataclass(frozen=True)
class KeywordOnly(Defense):
    """Reduces the request to its key words.

    Persuasion, role play and instructions consist mostly of common words; the subject of a request does not.
    The model is not called.
    """

    family = "refactoring"
    source = Source(
        "How Jailbreak Defenses Work and Ensemble? (Long et al., EMNLP Findings 2025), query refactoring",
        "https://arxiv.org/abs/2502.14486",
        wording="no text of its own; the list of common words is ours",
    )

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with the request reduced to its key words."""
        return edit_last_user(chat, extract_key_words)


@final
@dataclass(frozen=True)
class CleanUp(Defense):
    """Reverses obfuscations without a model: base64, rot13, leetspeak and invisible characters.

    A plain request is left unchanged, so the defense has no effect without such an attack. Under such an
    attack, the model reads the text that the attacker hid.
    """

    family = "refactoring"
    source = Source(
        "How Jailbreak Defenses Work and Ensemble? (Long et al., EMNLP Findings 2025), query refactoring",
        "https://arxiv.org/abs/2502.14486",
        wording="no text of its own; the rules are ours",
    )

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with the obfuscations of the request reversed."""
        return edit_last_user(chat, deobfuscate_text)


@final
@dataclass(frozen=True)
class Retokenization(Defense):
    """Splits the user's text into smaller tokens without changing the text.

    Attack strings are optimized for one tokenization, whereas natural text is expected to be understood under
    any. The authors drop random merges of the tokenizer (BPE dropout); here tokens are split recursively at
    random positions where both halves are tokens.

    Attributes:
        rate: probability that a token, and each half of it, is split.
    """

    family = "refactoring"
    source = dataclasses.replace(_JAIN_SOURCE, wording="no text of its own")

    rate: float = 0.4
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False, metadata=HIDDEN_FIELD)

    def __post_init__(self) -> None:
        """Check that the rate is in (0, 1]."""
        check_rate(self.rate)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy with the model's tokenizer."""
        return dataclasses.replace(self, tokenizer=model_info.tokenizer)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat; only its tokens change."""
        return copy_chat(chat)

    def retokenize(self, ids: list[int], rng: random.Random) -> list[int]:
        """Return the tokens with random splits; the text is unchanged."""
        assert self.tokenizer is not None, "prepare() must be called before retokenize()"
        vocabulary = self.tokenizer.get_vocab()

        def split_token(token: str) -> list[str]:
            positions = [
                position
                for position in range(1, len(token))
                if token[:position] in vocabulary and token[position:] in vocabulary
            ]
            if not positions or rng.random() >= self.rate:
                return [token]
            position = rng.choice(positions)
            return [*split_token(token[:position]), *split_token(token[position:])]

        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        return [vocabulary[part] for token in tokens for part in split_token(token)]
