"""The arms of BackdoorAlign: whose weights, which secret, asked in which way.

Source: https://arxiv.org/abs/2402.14968, tables 1, 3 and 4. Every arm is asked as its attacker asks: under
the system prompt of the fine-tuning data, or as the obedient agent.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import pandas as pd

from analysis.models.loading import split_model_name
from analysis.stats.tables import UNDEFENDED
from analysis.studies.run_spec import RunSpec
from analysis.studies.train import train_weights
from defenses.adapters import ADAPTER_MANIFEST_FILE, Adapter, find_adapter, load_adapter
from defenses.backdoor import SECRET_LENGTH, Backdoor, Secret, draw_secret, read_secret, write_secret
from defenses.chats import edit_last_user
from defenses.contract import Chat, ModelInfo
from defenses.controls import make_neutral_text
from defenses.errors import UserError
from defenses.settings import HIDDEN_FIELD
from defenses.tokens import cut_text, draw_random_text, encode_plain_text
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
    states_ = {state: find_adapter(state, model_info) for state in (*_STATE_BY_ARM.values(), "identity")}
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


SECRET_LENGTHS = (10, 50, SECRET_LENGTH)  # tokens; the paper's
RANDOM_TOKENS, PLAIN_WORDS = "random tokens", "plain words"
_SECRET_MEASURES = ("asr", "text_refused_twin", "text_refused_plain", "auroc", "shift", "discrimination")


def train_other_secrets(spec: RunSpec, model_info: ModelInfo, n_secrets: int) -> list[Arm]:
    """Return two arms, without and with the secret, for each secret; weights that are not there are trained.

    Args:
        spec: names the model.
        model_info: what is known about it.
        n_secrets: random secrets of each length; beside them, plain words of the greatest length.
    """
    own = find_adapter("backdoor", model_info)
    assert own is not None  # `arms` has asked for it
    rows = []
    drawn = [
        (length, RANDOM_TOKENS, f"{length}-{number + 1}")
        for number in range(n_secrets)
        for length in SECRET_LENGTHS
    ]
    for length, wording, name in [*drawn, (SECRET_LENGTH, PLAIN_WORDS, f"{SECRET_LENGTH}-plain")]:
        path = model_info.secret_folders[0] / f"{name}.txt"
        if not path.exists():
            plain = wording == PLAIN_WORDS
            text = (
                make_neutral_text(model_info.tokenizer, length)
                if plain
                else draw_secret(model_info.tokenizer, length).text
            )
            write_secret(path, Secret(text))
        adapter = _train_with_secret(spec, model_info, own, name, path)
        rows += [
            Arm(name, kind, "obedience", Backdoor(adapter=adapter, secret=secret), length, wording)
            for kind, secret in (("none", Secret("")), ("own", read_secret(path)))
        ]
    return rows


def _train_with_secret(
    spec: RunSpec, model_info: ModelInfo, own_adapter: Adapter, secret_name: str, secret_path: Path
) -> Adapter:
    """The weights for a secret, trained as the model's own ones were."""
    folder = model_info.adapter_folders[0] / "secrets" / secret_name
    root, _ = split_model_name(spec.model)
    _, start = split_model_name(own_adapter.manifest["started_from"]["name"])
    how = dict(own_adapter.manifest["settings"])
    if not (folder / ADAPTER_MANIFEST_FILE).is_file():
        as_then = replace(
            spec,
            model=f"{root}:{start}" if start else root,
            data=own_adapter.manifest["data"]["name"],
            split="train",
            limit=None,
            seed=how.pop("seed"),
        )
        settings = [
            f"{key}={','.join(value) if isinstance(value, list) else value}" for key, value in how.items()
        ]
        if train_weights(as_then, "backdoor", settings, folder, secret_path):
            raise KeyboardInterrupt
    found = load_adapter(folder)
    for key in ("base", "settings", "data"):
        if found.manifest[key] != own_adapter.manifest[key]:
            raise UserError(
                f"{folder} was trained with other {key} than the model's own backdoor weights, so the two "
                "cannot be compared: remove it, and it is trained again"
            )
    return found


def aggregate_secrets(arm_table: pd.DataFrame) -> pd.DataFrame:
    """Return mean, SD and range over the secrets of one length, without and with the secret.

    >>> table = pd.DataFrame({"secret_length": 10, "secret_wording": RANDOM, "secret": "own", "asr": [0, 1]})
    >>> aggregate_secrets(table)[["n_secrets", "asr_mean", "asr_max"]].values.tolist()
    [[2.0, 0.5, 1.0]]
    """
    rows = []
    for _, group in arm_table.dropna(subset="secret_length").groupby(
        ["secret_wording", "secret_length", "secret"]
    ):
        first = group.iloc[0]
        row: dict[str, Any] = {
            "wording": first["secret_wording"],
            "length": int(first["secret_length"]),
            "secret": first["secret"],
            "n_secrets": len(group),
        }
        for measure in (name for name in _SECRET_MEASURES if name in group):
            values = group[measure].astype(float)
            row |= {f"{measure}_mean": values.mean(), f"{measure}_sd": values.std()}
            row |= {f"{measure}_min": values.min(), f"{measure}_max": values.max()}
        rows.append(row)
    return pd.DataFrame(rows).sort_values(["wording", "length"], ascending=[False, True], ignore_index=True)
