"""The undefended model, the baseline of every comparison."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import final

from defenses.chats import copy_chat
from defenses.contract import Chat, Defense, Source


@final
@dataclass(frozen=True)
class Undefended(Defense):
    """Leaves the chat and the model unchanged."""

    name = "none"
    family = "none"
    source = Source("the undefended model", wording="no text of its own")

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat."""
        return copy_chat(chat)
