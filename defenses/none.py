"""The undefended model: what every defense is read against."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import final

from defenses.chats import copy_chat
from defenses.contract import Chat, Defense, Source


@final
@dataclass(frozen=True)
class Undefended(Defense):
    """Changes nothing: the model's template and the chat as they are."""

    name = "none"
    family = "none"
    source = Source("the undefended model", wording="no words of its own")

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat."""
        return copy_chat(chat)
