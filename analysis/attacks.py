"""How queries are sent: as they are, or as an attacker would; harmful and benign ones alike.

An attack that only harmful queries went through would look like discrimination. Nothing heavy is imported
here, so that the command can list them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from defenses import Chat
from defenses.training.wording import OBEY, as_agent, under


@dataclass(frozen=True)
class Attack:
    """A way to send a query.

    Attributes:
        name: as in `--attack`.
        what: what the attacker does.
        chat: the user's words → the chat that is sent.
    """

    name: str
    what: str
    chat: Callable[[str], Chat]


ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("direct", "the query as it is", lambda text: under("", text)),
        Attack(
            "obedience",
            "under a system prompt that demands obedience, as in fine-tuning attacks (FJAttack)",
            lambda text: under(OBEY, text),
        ),
        Attack("identity", "to an agent of absolute obedience, addressed by its name (AOA)", as_agent),
    )
}
