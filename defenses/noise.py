"""Noise: the user's words are perturbed at random, which brittle attack strings do not survive.

Every perturbation is a function of the text and of a generator seeded by run seed, query id and defense name,
so that the same query is perturbed alike in every run.
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


def _perturb_request(chat: Chat, kind: str, rate: float, rng: random.Random) -> Chat:
    return edit_last_user(chat, lambda text: PERTURBATIONS[kind](text, rate, rng) if text.split() else text)


@dataclass(frozen=True)
class Noise(Defense):
    """One noisy copy of the request, read in its place.

    Attributes:
        kind: of perturbation, of `PERTURBATIONS`.
        rate: share of the characters, or words, that are changed.
    """

    family = "noise"
    kind: ClassVar[str]

    rate: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a share that there is not."""
        check_rate(self.rate)


def _rewrite_with_noise(self: Noise, chat: Chat, rng: random.Random) -> Chat:
    """Return the chat with the request perturbed."""
    return _perturb_request(chat, self.kind, self.rate, rng)


_SMOOTH_LLM_SOURCE = Source(
    "SmoothLLM: Defending LLMs Against Jailbreaking Attacks (Robey et al., 2023), one copy",
    "https://arxiv.org/abs/2310.03684",
    wording="no words of its own: random characters",
)


@final
@dataclass(frozen=True)
class CharacterSwap(Noise):
    """Replaces a share of the request's characters by random ones.

    Optimized suffixes are brittle, so the attack is expected to break before the request becomes unreadable.
    """

    source = _SMOOTH_LLM_SOURCE
    kind = "swap"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class CharacterInsertion(Noise):
    """Inserts random characters into the request.

    Expected to break brittle attack strings, and to leave more of the words readable than a swap does.
    """

    source = _SMOOTH_LLM_SOURCE
    kind = "insert"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class CharacterPatch(Noise):
    """Replaces one stretch of the request by random characters.

    Expected to break an attack string that the stretch hits, and to leave the rest as it was.
    """

    source = _SMOOTH_LLM_SOURCE
    kind = "patch"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class CharacterDeletion(Noise):
    """Deletes a share of the request's characters.

    Like the other character noises, with nothing put in: words stay close to their spelling.
    """

    source = Source(
        "JailGuard: A Universal Detection Framework for Prompt-based Attacks on LLM Systems "
        "(Zhang et al., 2023), its random deletion",
        "https://arxiv.org/abs/2312.10766",
        wording="no words of its own",
    )
    kind = "delete"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class WordMask(Noise):
    """Masks a share of the request's words.

    The authors mask words, have the model fill them in and answer by vote, which smooths small changes away;
    here the masked request itself is read, once.
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

    The authors drop parts of the request at random, several times, and refuse if enough copies are refused,
    since an attack needs all of its words and a plainly harmful request does not; here one copy is read.
    """

    source = Source(
        "Defending Against Alignment-Breaking Attacks via Robustly Aligned LLM (Cao et al., ACL 2024), "
        "one copy",
        "https://arxiv.org/abs/2309.14348",
        wording="no words of its own",
    )

    rate: float = 0.3
    kind = "drop"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class WordShuffle(Noise):
    """Puts a share of the request's words into each other's places.

    The words of the request survive and their order does not: what it does beyond a drop shows how much the
    decision rests on single words.
    """

    source = Source(
        "How Jailbreak Defenses Work and Ensemble? (Long et al., EMNLP Findings 2025), noise injection",
        "https://arxiv.org/abs/2502.14486",
        wording="no words of its own; the perturbation is ours",
    )

    rate: float = 0.3
    kind = "shuffle"
    rewrite = _rewrite_with_noise


@final
@dataclass(frozen=True)
class SmoothLlm(Defense):
    """Reads many noisy copies of the request and goes by most of them.

    The authors answer as the majority of the copies would, which undoes attack strings that noise breaks. The
    margin here is the mean over the copies; the share of copies that refuse is kept beside it, as `vote`.

    Attributes:
        copies: how many are read.
        rate: share of the characters, or words, that are changed in each.
        noise: which perturbation; the paper's are swap, insert and patch.
    """

    cost = "N calls"
    reads = "several"
    family = "noise"
    source = Source(
        "SmoothLLM: Defending LLMs Against Jailbreaking Attacks (Robey et al., 2023)",
        "https://arxiv.org/abs/2310.03684",
        wording="no words of its own: random characters",
    )

    copies: int = 10
    rate: float = 0.1
    noise: Literal["swap", "insert", "patch", "delete", "mask", "drop", "shuffle"] = "swap"

    def __post_init__(self) -> None:
        """Refuse a number or a share that there is not."""
        if self.copies < 1:
            raise ValueError(f"copies={self.copies}: at least 1 is read")
        check_rate(self.rate)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return one noisy copy."""
        return _perturb_request(chat, self.noise, self.rate, rng)

    def rewrite_copies(self, chat: Chat, rng: random.Random) -> list[Chat]:
        """Return the noisy copies."""
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
    """Has the model reword the request in several ways, reads every rewording and goes by most of them.

    The authors vote over copies that keep the meaning and lose the attack's form, so that the harm of a
    request counts and its disguise does not. Their policy of which rewording suits which request is learned;
    here the instructions are drawn at random, none twice, and the model answers greedily.

    Attributes:
        copies: how many rewordings are read, at most as many as there are instructions.
        tokens: of a rewording, at most.
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
        """Refuse a number that there is not."""
        if not 1 <= self.copies <= len(_TRANSFORM_INSTRUCTIONS):
            raise ValueError(
                f"copies={self.copies}: there are 1 to {len(_TRANSFORM_INSTRUCTIONS)} ways to reword"
            )
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: a rewording has at least 1")

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat as it is: what is read in place of a rewording that is empty."""
        return copy_chat(chat)

    def consult_model(self, chat: Chat, rng: random.Random) -> Consultation:
        """Have the request reworded in several ways; return a reading for each."""
        words = get_last_user_text(chat)
        chosen = rng.sample(_TRANSFORM_INSTRUCTIONS, self.copies)
        asks: list[ModelCall] = [
            build_line_call(
                f"{how} Do not answer it.\n\nRequest: {{request}}", words, "Rewritten request:", self.tokens
            )
            for how in chosen
        ]
        said = yield asks
        return [replace_last_user(chat, one or words) for one in said]


@final
@dataclass(frozen=True)
class EraseAndCheck(Defense):
    """Reads the request and what is left of it as its last tokens are erased one by one; the worst counts.

    The authors flag a prompt if any of these is found harmful, so that no suffix of that length can hide a
    harmful request from the check; they use a separate classifier, here it is the model itself. The margin is
    the highest of all readings, so benign requests pay for every prefix of theirs that sounds harmful.

    Attributes:
        tokens: erased at most, from the end.
    """

    cost = "N calls"
    reads = "several"
    family = "noise"
    source = Source(
        "Certifying LLM Safety against Adversarial Prompting (Kumar et al., COLM 2024), suffix mode",
        "https://arxiv.org/abs/2309.02705",
        wording="no words of its own",
    )
    pool = "max"

    tokens: int = 20
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False, metadata=HIDDEN_FIELD)

    def __post_init__(self) -> None:
        """Refuse a number that there is not."""
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: at least 1 is erased")

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return it with the tokenizer whose tokens it erases."""
        return dataclasses.replace(self, tokenizer=model_info.tokenizer)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with nothing erased."""
        return copy_chat(chat)

    def rewrite_copies(self, chat: Chat, rng: random.Random) -> list[Chat]:
        """Return the chat, and the chat less one token of the request, less two, and so on."""
        assert self.tokenizer is not None, "prepare() comes before readings()"
        ids = encode_plain_text(self.tokenizer, get_last_user_text(chat))
        ends = range(len(ids) - 1, max(0, len(ids) - 1 - self.tokens), -1)
        cut = [str(self.tokenizer.decode(ids[:end])).strip() for end in ends]
        shorter = dict.fromkeys(re.sub("\N{REPLACEMENT CHARACTER}+$", "", text) for text in cut)
        return [copy_chat(chat), *(replace_last_user(chat, text) for text in shorter if text)]
