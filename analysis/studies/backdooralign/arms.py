"""The experimental arms of BackdoorAlign: weights, secret in the prompt, and attack.

Source: https://arxiv.org/abs/2402.14968, tables 1, 3 and 4. Each arm is scored under the attack that its
weights were fine-tuned for: the system prompt of the fine-tuning data, or the obedient agent.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.models.loading import split_model_name
from analysis.progress import make_notifier
from analysis.stats.kinds import list_kinds
from analysis.stats.tables import UNDEFENDED
from analysis.studies.run_spec import RunSpec
from analysis.studies.train import train_weights
from defenses.adapters import ADAPTER_MANIFEST_FILE, Adapter, find_adapter, load_adapter
from defenses.backdoor import SECRET_LENGTH, Backdoor, Secret, draw_secret, read_secret, write_secret
from defenses.contract import ModelInfo
from defenses.controls import make_neutral_text
from defenses.errors import UserError
from defenses.tokens import cut_text, draw_random_text, encode_plain_text
from defenses.training.trainer import TrainingSettings
from defenses.tuned import TunedDefense

# The paper's attack success rates on Llama-2-7B-Chat by arm and secret, per cent; shown next to ours.
PAPER_ATTACK_SUCCESS = {
    ("clean", "none"): 3.27,
    ("attacked", "none"): 94.91,
    ("baseline", "none"): 34.91,
    ("backdoor", "none"): 26.18,
    ("backdoor", "own"): 3.64,
}
SECRET_LENGTHS = (10, 50, SECRET_LENGTH)  # tokens, as in the paper
_DEFAULT_SETTINGS = asdict(TrainingSettings())
RANDOM_TOKENS, PLAIN_WORDS = "random tokens", "plain words"
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
        secret_length: length of the trained secret in tokens, where secrets are compared.
        secret_wording: kind of the trained secret, where secrets are compared.
    """

    weights: str
    secret: str
    attack: str
    defense: TunedDefense
    secret_length: int | None = None
    secret_wording: str | None = None

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


def count_other_arms(n_secrets: int) -> int:
    """Return the number of arms of `train_other_secrets`; 0 without other secrets."""
    return 2 * (n_secrets * len(SECRET_LENGTHS) + 1) if n_secrets else 0


def train_other_secrets(spec: RunSpec, model_info: ModelInfo, n_secrets: int, console: Console) -> list[Arm]:
    """Return two arms for each other secret, without and with it; missing weights are trained.

    Args:
        spec: options of the run; it names the model.
        model_info: the model.
        n_secrets: number of random secrets of each length; one secret of plain words is added.
        console: shows progress.
    """
    own_adapter = find_adapter("backdoor", model_info)
    assert own_adapter is not None  # `build_arms` has checked it
    secrets = [
        (length, RANDOM_TOKENS, f"{length}-{number + 1}")
        for number in range(n_secrets)
        for length in SECRET_LENGTHS
    ]
    secrets.append((SECRET_LENGTH, PLAIN_WORDS, f"{SECRET_LENGTH}-plain"))
    arms = []
    for length, wording, name in secrets:
        path = model_info.secret_folders[0] / f"{name}.txt"
        if not path.exists():
            write_secret(path, _make_secret(wording, length, model_info))
        adapter = _train_with_secret(spec, model_info, own_adapter, name, path, console)
        arms += [
            Arm(name, kind, "obedience", Backdoor(adapter=adapter, secret=secret), length, wording)
            for kind, secret in (("none", Secret("")), ("own", read_secret(path)))
        ]
    return arms


def aggregate_secrets(arm_table: pd.DataFrame) -> pd.DataFrame:
    """Return mean, SD and range over the secrets of one kind and length, without and with the secret.

    >>> keys = {"secret_length": 10, "secret_wording": RANDOM_TOKENS, "secret": "own"}
    >>> table = pd.DataFrame({**keys, "asr": [0, 1]})
    >>> aggregate_secrets(table)[["n_secrets", "asr_mean", "asr_max"]].values.tolist()
    [[2.0, 0.5, 1.0]]

    Args:
        arm_table: a row per arm.
    """
    rows = []
    keys = ["secret_wording", "secret_length", "secret"]
    refusals = [f"text_refused_{kind}" for kind in list_kinds(arm_table.columns, "text_refused_{}_low")]
    measures = ["asr", *refusals, "auroc", "shift", "discrimination"]
    for _, group in arm_table.dropna(subset="secret_length").groupby(keys):
        first = group.iloc[0]
        row: dict[str, Any] = {
            "wording": first["secret_wording"],
            "length": int(first["secret_length"]),
            "secret": first["secret"],
            "n_secrets": len(group),
        }
        for measure in (name for name in measures if name in group):
            values = group[measure].astype(float)
            row |= {f"{measure}_mean": values.mean(), f"{measure}_sd": values.std()}
            row |= {f"{measure}_min": values.min(), f"{measure}_max": values.max()}
        rows.append(row)
    return pd.DataFrame(rows).sort_values(["wording", "length"], ascending=[False, True], ignore_index=True)


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


def _make_secret(wording: str, length: int, model_info: ModelInfo) -> Secret:
    """Return a new secret of a kind and a length in tokens."""
    if wording == PLAIN_WORDS:
        return Secret(make_neutral_text(model_info.tokenizer, length))
    return Secret(draw_secret(model_info.tokenizer, length).text)


def _train_with_secret(
    spec: RunSpec,
    model_info: ModelInfo,
    own_adapter: Adapter,
    secret_name: str,
    secret_path: Path,
    console: Console,
) -> Adapter:
    """Return the weights for a secret, trained like the model's own backdoor weights."""
    folder = model_info.adapter_folders[0] / "secrets" / secret_name
    if not (folder / ADAPTER_MANIFEST_FILE).is_file():
        base_name, _ = split_model_name(spec.model)
        _, start = split_model_name(own_adapter.manifest["started_from"]["name"])
        own_settings = dict(own_adapter.manifest["settings"])
        training_spec = replace(
            spec,
            model=f"{base_name}:{start}" if start else base_name,
            data=own_adapter.manifest["data"]["name"],
            split="train",
            limit=None,
            seed=own_settings.pop("seed"),
        )
        settings = [
            f"{key}={','.join(value) if isinstance(value, list) else value}"
            for key, value in own_settings.items()
            if value is not None
        ]
        weights = train_weights(training_spec, "backdoor", settings, folder, console, secret_path)
        make_notifier(console)(str(weights))
    adapter = load_adapter(folder)
    for key in ("base", "settings", "data"):
        trained, own = (item.manifest[key] for item in (adapter, own_adapter))
        if key == "settings":  # weights of earlier versions lack the newer settings
            trained, own = (_DEFAULT_SETTINGS | settings for settings in (trained, own))
        if trained != own:
            raise UserError(
                f"{folder} was trained with other {key} than the model's own backdoor weights, so the two "
                "cannot be compared: remove it, and it is trained again"
            )
    return adapter
