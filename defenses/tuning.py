"""Tuned weights as defenses: what training alone does, with nothing added to what the model reads."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import final

from defenses import Chat, Source
from defenses.adapters import Tuned
from defenses.chats import copied


def _as_it_is(self: Tuned, chat: Chat, rng: random.Random) -> Chat:
    """Return a copy of the chat."""
    return copied(chat)


@final
@dataclass(frozen=True)
class SafetyTuning(Tuned):
    """Fine-tunes the model to refuse harmful requests and to answer benign ones as it did.

    Supervised tuning on refusals is expected to teach which requests are harmful, and to make refusal more
    likely in general where benign requests look alike.
    """

    source = Source(
        "safety tuning (Bianchi et al., ICLR 2024)",
        "https://arxiv.org/abs/2309.07875",
        wording="data and refusals ours",
    )
    family = "tuning"
    rewrite = _as_it_is
    state, recipe = "aligned", "safety"


@final
@dataclass(frozen=True)
class PreferenceTuning(Tuned):
    """Tunes by preference: a refusal over a complying opener on harm, an answer over a refusal elsewhere.

    Direct preference optimization sees both answers of a pair, so it is expected to separate the classes
    rather than to shift both.
    """

    source = Source(
        "direct preference optimization (Rafailov et al., NeurIPS 2023)",
        "https://arxiv.org/abs/2305.18290",
        wording="data and refusals ours",
    )
    family = "tuning"
    rewrite = _as_it_is
    state = recipe = "preference"


@final
@dataclass(frozen=True)
class BaselineTuning(Tuned):
    """Mixes eleven plain refusals into an attacker's fine-tuning data: what BackdoorAlign is compared with.

    The authors find that so few examples bring back part of the refusals only.
    """

    source = Source(
        "baseline of BackdoorAlign (Wang et al., NeurIPS 2024)",
        "https://arxiv.org/abs/2402.14968",
        wording="data and refusals ours",
    )
    family = "tuning"
    rewrite = _as_it_is
    state = recipe = "baseline"
