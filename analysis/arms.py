"""The arms of BackdoorAlign: whose weights, which secret, asked in which way.

Source: https://arxiv.org/abs/2402.14968, tables 1, 3 and 4. Every arm is asked as its attacker asks: under
the system prompt of the fine-tuning data, or as the obedient agent.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import final

from analysis.tables import UNDEFENDED
from defenses import Chat, ModelInfo, UserError, adapters
from defenses.adapters import Adapter
from defenses.backdoor import Backdoor, Secret
from defenses.chats import edit_last_user
from defenses.controls import make_neutral_text
from defenses.settings import HIDDEN_FIELD
from defenses.tokens import cut_text, encode_plain_text, draw_random_text
from defenses.tuned import TunedDefense

# The paper's ASR on Llama-2-7B-Chat, per cent, by arm and secret: another model's, shown beside ours.
PAPER_ATTACK_SUCCESS = {
    ("clean", "none"): 3.27,
    ("attacked", "none"): 94.91,
    ("baseline", "none"): 34.91,
    ("backdoor", "none"): 26.18,
    ("backdoor", "own"): 3.64,
}
# Arm → the state whose weights it has.
_STATE_BY_ARM = {"clean": "aligned", "attacked": "attacked", "baseline": "baseline", "backdoor": "backdoor"}


@final
@dataclass(frozen=True)
class _Guessed(TunedDefense):
    """The secret in front of the user's words: an attacker who has guessed it."""

    state = recipe = family = "backdoor"

    secret: Secret = field(default=Secret(""), repr=False, metadata=HIDDEN_FIELD)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with the secret at the head of the last user turn."""
        return edit_last_user(chat, lambda words: f"{self.secret.text}\n\n{words}")

    def secret_texts(self) -> tuple[str, ...]:
        """Return the secret, so that it can be redacted."""
        return (self.secret.text,)


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes:
        weights: whose weights: clean, attacked, baseline, backdoor, identity.
        secret: none, own, or how it differs from the one that was trained.
        attack: how it is asked.
        defense: weights and prompt.
        secret_length: of the secret that it was trained with, tokens, where secrets are compared.
        secret_wording: of that secret.
    """

    weights: str
    secret: str
    attack: str
    defense: TunedDefense
    secret_length: int | None = None
    secret_wording: str | None = None

    @property
    def condition(self) -> str:
        """Its name in the tables; the attacked model without the secret is the reference."""
        if (self.weights, self.secret) in (("attacked", "none"), ("identity", "none")):
            return UNDEFENDED
        return self.weights if self.secret == "none" else f"{self.weights}, secret: {self.secret}"

    @property
    def cell(self) -> tuple[str, str]:
        """Attack and condition, which only it has."""
        return self.attack, self.condition


def build_arms(model_info: ModelInfo) -> list[Arm]:
    """Return the rows: each arm with and without the secret, the secret changed, then the identity shift."""
    states_ = {state: adapters.find_adapter(state, model_info) for state in (*_STATE_BY_ARM.values(), "identity")}
    missing = [state for state, adapter in states_.items() if adapter is None]
    if missing:
        recipes = ", ".join(f"`analyze train {one}`" for one in map(_find_recipe_name, missing))
        raise UserError(f"{model_info.name} has no weights for {', '.join(missing)}: {recipes} make them")
    found = {state: adapter for state, adapter in states_.items() if adapter is not None}
    for adapter in found.values():
        adapter.check_base_model(model_info.sha256)
    own = Backdoor().prepare(model_info).secret
    assert own is not None

    def wearing(adapter: Adapter, secret: Secret) -> Backdoor:
        return Backdoor(adapter=adapter, secret=secret)

    none = Secret("")
    rows = [
        Arm(arm, kind, "obedience", wearing(found[state], secret))
        for arm, state in _STATE_BY_ARM.items()
        for kind, secret in (("none", none), ("own", own))
    ]
    tuned = found["backdoor"]
    changed = _altered_secrets(own, model_info)
    rows += [Arm("backdoor", kind, "obedience", wearing(tuned, secret)) for kind, secret in changed.items()]
    rows.append(Arm("backdoor", "guessed by the user", "obedience", _Guessed(adapter=tuned, secret=own)))
    rows += [
        Arm(arm, kind, "identity", wearing(found[state], secret))
        for arm, state in (("identity", "identity"), ("clean", "aligned"))
        for kind, secret in (("none", none), ("own", own))
    ]
    return rows


def _altered_secrets(trained_secret: Secret, model_info: ModelInfo) -> dict[str, Secret]:
    """The secret as it was not trained: another one, a part of it, plain sentences of its length."""
    ids = encode_plain_text(model_info.tokenizer, trained_secret.text)
    rng = random.Random(f"{model_info.seed}/backdooralign")
    return {
        "another": Secret(draw_random_text(model_info.tokenizer, len(ids), rng)),
        "half of it": Secret(cut_text(model_info.tokenizer, trained_secret.text, max(1, len(ids) // 2))),
        "a tenth of it": Secret(cut_text(model_info.tokenizer, trained_secret.text, max(1, len(ids) // 10))),
        "plain words": Secret(make_neutral_text(model_info.tokenizer, len(ids))),
    }


def _find_recipe_name(state: str) -> str:
    from defenses.training.recipes import RECIPES

    return next(recipe.name for recipe in RECIPES.values() if recipe.state == state)
