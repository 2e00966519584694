"""The experimental arms of BackdoorAlign: weights, secret in the prompt, and attack.

Source: https://arxiv.org/abs/2402.14968, tables 1, 3 and 4. Each arm is scored under the attack that its
weights were fine-tuned for: the system prompt of the fine-tuning data, or the obedient agent.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from analysis.stats.tables import UNDEFENDED
from defenses.adapters import find_adapter
from defenses.backdoor import Backdoor, Secret
from defenses.contract import ModelInfo
from defenses.controls import make_neutral_text
from defenses.errors import UserError
from defenses.tokens import cut_text, draw_random_text, encode_plain_text
from defenses.tuned import TunedDefense

# The paper's attack success rates on Llama-2-7B-Chat by arm and secret, per cent; shown next to ours.
PAPER_ATTACK_SUCCESS = {
    ("clean", "none"): 3.27,
    ("attacked", "none"): 94.91,
    ("baseline", "none"): 34.91,
    ("backdoor", "none"): 26.18,
    ("backdoor", "own"): 3.64,
}
# Arm → name of its weights.
_STATE_BY_ARM = {"clean": "aligned", "attacked": "attacked", "baseline": "baseline", "backdoor": "backdoor"}


@dataclass(frozen=True)
class Arm:
    """One experimental arm, a row of the table.

    Attributes:
        weights: name of the arm's weights: clean, attacked, baseline, backdoor, identity.
        secret: none, own, or how the secret differs from the trained one.
        attack: name of the attack.
        defense: weights and prompt.
    """

    weights: str
    secret: str
    attack: str
    defense: TunedDefense

    @property
    def condition(self) -> str:
        """Name in the tables; the attacked model without the secret is the reference."""
        if (self.weights, self.secret) in (("attacked", "none"), ("identity", "none")):
            return UNDEFENDED
        return self.weights if self.secret == "none" else f"{self.weights}, secret: {self.secret}"

    @property
    def condition_key(self) -> tuple[str, str]:
        """Attack and condition, which identify the arm."""
        return self.attack, self.condition


def build_arms(model_info: ModelInfo) -> list[Arm]:
    """Return the arms: all weights with and without the secret, altered secrets, the identity shift attack.

    Args:
        model_info: the model; all of its weights must have been trained.

    Raises:
        UserError: if weights are missing, or belong to another model.
    """
    adapters = {state: find_adapter(state, model_info) for state in (*_STATE_BY_ARM.values(), "identity")}
    missing = [state for state, adapter in adapters.items() if adapter is None]
    if missing:
        commands = ", ".join(f"`analyze train {recipe}`" for recipe in map(_find_recipe_name, missing))
        raise UserError(f"{model_info.name} has no weights for {', '.join(missing)}: {commands} make them")
    trained = {state: adapter for state, adapter in adapters.items() if adapter is not None}
    for adapter in trained.values():
        adapter.check_base_model(model_info.sha256)
    own_secret = Backdoor().prepare(model_info).secret
    assert own_secret is not None

    def make_arm(weights: str, state: str, kind: str, secret: Secret, attack: str) -> Arm:
        return Arm(weights, kind, attack, Backdoor(adapter=trained[state], secret=secret))

    off_and_on = (("none", Secret("")), ("own", own_secret))
    guessed = Backdoor(adapter=trained["backdoor"], secret=own_secret, place="user")
    return [
        *(
            make_arm(arm, state, kind, secret, "obedience")
            for arm, state in _STATE_BY_ARM.items()
            for kind, secret in off_and_on
        ),
        *(
            make_arm("backdoor", "backdoor", kind, secret, "obedience")
            for kind, secret in _altered_secrets(own_secret, model_info).items()
        ),
        Arm("backdoor", "guessed by the user", "obedience", guessed),
        *(
            make_arm(arm, state, kind, secret, "identity")
            for arm, state in (("identity", "identity"), ("clean", "aligned"))
            for kind, secret in off_and_on
        ),
    ]


def _altered_secrets(trained_secret: Secret, model_info: ModelInfo) -> dict[str, Secret]:
    """Return secrets that the weights were not trained with: another one, parts, plain sentences."""
    tokenizer = model_info.tokenizer
    n_tokens = len(encode_plain_text(tokenizer, trained_secret.text))
    rng = random.Random(f"{model_info.seed}/backdooralign")
    return {
        "another": Secret(draw_random_text(tokenizer, n_tokens, rng)),
        "half of it": Secret(cut_text(tokenizer, trained_secret.text, max(1, n_tokens // 2))),
        "a tenth of it": Secret(cut_text(tokenizer, trained_secret.text, max(1, n_tokens // 10))),
        "plain words": Secret(make_neutral_text(tokenizer, n_tokens)),
    }


def _find_recipe_name(state: str) -> str:
    """Return the recipe that makes the weights of this name."""
    from defenses.training.recipes import RECIPES

    return next(recipe.name for recipe in RECIPES.values() if recipe.state == state)
