"""Decoding: neither the request nor the model is changed, but the answer's first token or its beginning."""

from __future__ import annotations

import dataclasses
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self, final

from defenses.chats import copy_chat, prefill_response
from defenses.contract import Chat, Defense, ModelInfo, Source
from defenses.none import Undefended
from defenses.tuned import TunedDefense
from defenses.tuning import SafetyTuning


@final
@dataclass(frozen=True)
class SafeDecoding(TunedDefense):
    """Takes the answer's first token from the model and a safety-tuned expert, their difference exaggerated.

    The authors contrast the probabilities of an expert that was tuned to refuse with those of the model for
    the first two tokens, on tokens that both find likely, and then go on without it. Here the logits are
    contrasted, for the first token, so that the margin stays linear: that of the model, plus `alpha` times
    what the expert's tuning does. The expert is `safety_tuning`, a change of the weights as released, so that
    a model in another state is not read.

    Attributes:
        alpha: weight of the expert's difference from the model; 1 is the expert alone.
    """

    family = "decoding"
    source = Source(
        "SafeDecoding: Defending against Jailbreak Attacks via Safety-Aware Decoding (Xu et al., ACL 2024)",
        "https://arxiv.org/abs/2402.08983",
        wording="data and refusals of the expert ours",
    )
    state, recipe = "aligned", "safety"

    alpha: float = 3.0

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat."""
        return copy_chat(chat)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return it with its expert, which is one of the released weights and so not of any state's."""
        return dataclasses.replace(self, adapter=None) if model_info.state else super().prepare(model_info)

    def missing_requirements(self) -> str:
        """Return what is missing."""
        if self.adapter is not None:
            return ""
        return "it needs the released weights, whose expert `analyze train safety -m MODEL` makes"

    def apply_to(self, model: Any) -> AbstractContextManager[None]:
        """While open, the model is as it was: the expert is asked beside it."""
        return nullcontext()

    def logit_blend(self) -> tuple[tuple[float, Defense], ...]:
        """Return the model as it is and the expert, with their weights."""
        return (1 - self.alpha, Undefended()), (self.alpha, SafetyTuning(adapter=self.adapter))


@final
@dataclass(frozen=True)
class SafetyPrefix(Defense):
    """Makes every answer begin with a check of the request.

    The authors set the first words of the output to the beginning of a refusal, chosen by how the model
    refuses, and have a classifier of its own decide whether the request was harmful after all. Here the words
    promise a check and leave open how it ends, and there is no classifier: harmless requests keep them. They
    stand in front of whatever an attacker made the answer begin with.

    Attributes:
        text: that answers begin with; what is read is the first token behind it.
    """

    family = "decoding"
    source = Source(
        "Prefix Guidance: A Steering Wheel for Large Language Models to Defend Against Jailbreak Attacks "
        "(Zhao et al., 2024)",
        "https://arxiv.org/abs/2408.08924",
    )

    text: str = (
        "First I check whether helping with this request could do harm. If it could, I decline; if not, I "
        "help."
    )

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with the check at the beginning of the answer."""
        # A paragraph of its own, so that the token behind it opens a sentence, as an answer's first one does.
        return prefill_response(chat, f"{self.text}\n\n")
