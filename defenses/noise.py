"""Noise injection: random perturbations of the user's text, which break brittle attack strings.

Every perturbation is a function of the text and of a generator seeded by run seed, query id and defense name.
A query is therefore perturbed in the same way in every run with that seed.
"""

from __future__ import annotations

import dataclasses
import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, final

from defenses.chats import copy_chat, edit_last_user, get_last_user_text, replace_last_user
from defenses.contract import Chat, Consultation, Defense, ModelCall, ModelInfo, Source
from defenses.perturbations import PERTURBATIONS, check_rate
from defenses.refactoring import build_line_call
from defenses.settings import HIDDEN_FIELD
from defenses.tokens import encode_plain_text


@dataclass(frozen=True)
class Noise(Defense):
    """Base class of defenses that replace the request by one perturbed copy.

    Attributes:
        kind: key of the perturbation in `PERTURBATIONS`.
        rate: share of the characters or words that are perturbed.
    """

    family = "noise"
    kind: ClassVar[str]

    rate: float = 0.1

    def __post_init__(self) -> None:
        """Check that the rate is in (0, 1]."""
        check_rate(self.rate)


def _perturb_request(chat: Chat, kind: str, rate: float, rng: random.Random) -> Chat:
    """Return the chat with its last user turn perturbed; a turn without words is left unchanged."""
    return edit_last_user(chat, lambda text: PERTURBATIONS[kind](text, rate, rng) if text.split() else text)


def _rewrite_with_noise(self: Noise, chat: Chat, rng: random.Random) -> Chat:
    """Return the chat with the request perturbed."""
    return _perturb_request(chat, self.kind, self.rate, rng)


_SMOOTH_LLM_SOURCE = Source(
    "SmoothLLM: Defending LLMs Against Jailbreaking Attacks (Robey et al., 2023), one copy",
    "https://arxiv.org/abs/2310.03684",
    wording="no text of its own: random characters",
)


@final
@dataclass(frozen=True)
class CharacterSwap(Noise):
    """Replaces a share of the request's characters by random characters.

    Optimized suffixes are brittle, so the attack is expected to fail before the request becomes unreadable.
    """

    source = _SMOOTH_LLM_SOURCE
    kind = "swap"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class CharacterInsertion(Noise):
    """Inserts random characters into the request.

    This should break brittle attack strings and keep more words readable than a swap.
    """

    source = _SMOOTH_LLM_SOURCE
    kind = "insert"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class CharacterPatch(Noise):
    """Replaces one contiguous part of the request by random characters.

    This should break an attack string that overlaps this part; the rest of the request is unchanged.
    """

    source = _SMOOTH_LLM_SOURCE
    kind = "patch"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class CharacterDeletion(Noise):
    """Deletes a share of the request's characters.

    In contrast to the other character perturbations, no characters are added, so words stay close to their
    spelling.
    """

    source = Source(
        "JailGuard: A Universal Detection Framework for Prompt-based Attacks on LLM Systems "
        "(Zhang et al., 2023), its random deletion",
        "https://arxiv.org/abs/2312.10766",
        wording="no text of its own",
    )
    kind = "delete"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class WordMask(Noise):
    """Masks a share of the request's words.

    The authors mask words, let the model fill them in, and answer by majority vote, which smooths out small
    changes. Here one masked copy is scored directly.
    """

    source = Source(
        "Certified Robustness for Large Language Models with Self-Denoising (Zhang et al., 2023), its masks",
        "https://arxiv.org/abs/2307.07171",
        wording="ours: the mark [MASK]",
    )

    rate: float = 0.2
    kind = "mask"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class WordDrop(Noise):
    """Drops a share of the request's words.

    The authors drop random parts of the request several times and refuse if enough copies are refused, since
    an attack needs all of its words and a plainly harmful request does not. Here one copy is scored.
    """

    source = Source(
        "Defending Against Alignment-Breaking Attacks via Robustly Aligned LLM (Cao et al., ACL 2024), "
        "one copy",
        "https://arxiv.org/abs/2309.14348",
        wording="no text of its own",
    )

    rate: float = 0.3
    kind = "drop"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class WordShuffle(Noise):
    """Permutes a share of the request's words.

    All words of the request are kept, but not their order. Compared with dropping words, this shows how much
    the decision depends on single words.
    """

    source = Source(
        "How Jailbreak Defenses Work and Ensemble? (Long et al., EMNLP Findings 2025), noise injection",
        "https://arxiv.org/abs/2502.14486",
        wording="no text of its own; the perturbation is ours",
    )

    rate: float = 0.3
    kind = "shuffle"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class SmoothLlm(Defense):
    """Scores several perturbed copies of the request and decides by majority.

    The authors return a response in line with the majority of the copies, which defeats attack strings that
    noise breaks. Here the margin is the mean over the copies; the share of copies that refuse is reported as
    `vote`.

    Attributes:
        copies: number of copies.
        rate: share of the characters or words that are perturbed in each copy.
        noise: perturbation; the paper uses swap, insert and patch.
    """

    cost = "N calls"
    reads = "several"
    family = "noise"
    source = Source(
        "SmoothLLM: Defending LLMs Against Jailbreaking Attacks (Robey et al., 2023)",
        "https://arxiv.org/abs/2310.03684",
        wording="no text of its own: random characters",
    )

    copies: int = 10
    rate: float = 0.1
    noise: Literal["swap", "insert", "patch", "delete", "mask", "drop", "shuffle"] = "swap"

    def __post_init__(self) -> None:
        """Check the number of copies and the rate."""
        if self.copies < 1:
            raise ValueError(f"copies={self.copies}: at least 1 is required")
        check_rate(self.rate)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return one perturbed copy."""
        return _perturb_request(chat, self.noise, self.rate, rng)

    def rewrite_copies(self, chat: Chat, rng: random.Random) -> list[Chat]:
        """Return the perturbed copies."""
        return [self.rewrite(chat, rng) for _ in range(self.copies)]


_TRANSFORM_INSTRUCTIONS = (
    "Rewrite the request below in other words.",
    "Sum up the request below in one short sentence.",
    "Write the request below again with its spelling and punctuation put right.",
    "Rewrite the request below with synonyms for its most important words.",
    "Rewrite the request below in the past tense.",
    "Write the request below again as a plain, orderly question.",
    "Rewrite the request below in very simple words.",
)


@final
@dataclass(frozen=True)
class SemanticSmoothing(Defense):
    """Lets the model rewrite the request in several ways, scores every rewrite and decides by majority.

    The authors vote over copies that keep the meaning of a request but not the form of the attack, so that
    the decision depends on the harm of the request and not on its disguise. They learn a policy that selects
    a transformation for each request; here the instructions are drawn at random without replacement, and the
    model decodes greedily.

    Attributes:
        copies: number of rewrites, at most the number of instructions.
        tokens: maximum number of tokens of a rewrite.
    """

    cost = "N calls"
    reads = "several"
    family = "noise"
    source = Source(
        "Defending Large Language Models against Jailbreak Attacks via Semantic Smoothing (Ji et al., 2024)",
        "https://arxiv.org/abs/2402.16192",
    )

    copies: int = 3
    tokens: int = 64

    def __post_init__(self) -> None:
        """Check the number of copies and of tokens."""
        if not 1 <= self.copies <= len(_TRANSFORM_INSTRUCTIONS):
            raise ValueError(
                f"copies={self.copies}: it must be 1 to {len(_TRANSFORM_INSTRUCTIONS)} "
                "(number of instructions)"
            )
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: a rewrite needs at least 1")

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat, which takes the place of an empty rewrite."""
        return copy_chat(chat)

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Request several rewrites; return a chat for each."""
        request = get_last_user_text(chat)
        instructions = rng.sample(_TRANSFORM_INSTRUCTIONS, self.copies)
        calls: list[ModelCall] = [
            build_line_call(
                f"{instruction} Do not answer it.\n\nRequest: {{request}}",
                request,
                "Rewritten request:",
                self.tokens,
            )
            for instruction in instructions
        ]
        rewrites = yield calls
        return [replace_last_user(chat, rewrite or request) for rewrite in rewrites]


@final
@dataclass(frozen=True)
class EraseAndCheck(Defense):
    """Scores the request and its prefixes as tokens are erased from its end; the highest margin decides.

    The authors flag a prompt if any prefix is classified as harmful, so that no suffix of that length can
    hide a harmful request. They use a separate classifier; here the model itself classifies. The margin is
    the maximum over all prefixes, so a benign request is refused if any of its prefixes sounds harmful.

    Attributes:
        tokens: maximum number of tokens that are erased.
    """

    cost = "N calls"
    reads = "several"
    family = "noise"
    source = Source(
        "Certifying LLM Safety against Adversarial Prompting (Kumar et al., COLM 2024), suffix mode",
        "https://arxiv.org/abs/2309.02705",
        wording="no text of its own",
    )
    pool = "max"

    tokens: int = 20
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False, metadata=HIDDEN_FIELD)

    def __post_init__(self) -> None:
        """Check the number of tokens."""
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: at least 1 must be erased")

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy with the model's tokenizer."""
        return dataclasses.replace(self, tokenizer=model_info.tokenizer)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat without erasing tokens."""
        return copy_chat(chat)

    def rewrite_copies(self, chat: Chat, rng: random.Random) -> list[Chat]:
        """Return the chat, and copies without the last token of the request, the last two, and so on."""
        assert self.tokenizer is not None, "prepare() must be called before rewrite_copies()"
        ids = encode_plain_text(self.tokenizer, get_last_user_text(chat))
        ends = range(len(ids) - 1, max(0, len(ids) - 1 - self.tokens), -1)
        decoded = [str(self.tokenizer.decode(ids[:end])).strip() for end in ends]
        # A prefix may end within a character.
        prefixes = dict.fromkeys(re.sub("\N{REPLACEMENT CHARACTER}+$", "", text) for text in decoded)
        return [copy_chat(chat), *(replace_last_user(chat, prefix) for prefix in prefixes if prefix)]
