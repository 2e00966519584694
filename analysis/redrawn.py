"""BackdoorAlign trained anew with other secrets: is it length, luck or randomness that counts?

Everything but the secret is that of the model's own `backdoor` weights: data, seed, settings, starting point.
Each secret's weights are kept beside the model's other ones, so that they are trained once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import states, training
from analysis.arms import Arm
from analysis.request import RunSpec
from defenses import ModelInfo, UserError, adapters
from defenses.adapters import Adapter
from defenses.backdoor import SECRET_LENGTH, Backdoor, Secret, draw_secret, read_secret, write_secret
from defenses.controls import make_neutral_text

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
    own = adapters.find_adapter("backdoor", model_info)
    assert own is not None  # `arms` has asked for it
    rows = []
    drawn = [(length, RANDOM_TOKENS, f"{length}-{number + 1}") for number in range(n_secrets) for length in SECRET_LENGTHS]
    for length, wording, name in [*drawn, (SECRET_LENGTH, PLAIN_WORDS, f"{SECRET_LENGTH}-plain")]:
        path = model_info.secret_folders[0] / f"{name}.txt"
        if not path.exists():
            plain = wording == PLAIN_WORDS
            text = make_neutral_text(model_info.tokenizer, length) if plain else draw_secret(model_info.tokenizer, length).text
            write_secret(path, Secret(text))
        adapter = _train_with_secret(spec, model_info, own, name, path)
        rows += [
            Arm(name, kind, "obedience", Backdoor(adapter=adapter, secret=secret), length, wording)
            for kind, secret in (("none", Secret("")), ("own", read_secret(path)))
        ]
    return rows


def _train_with_secret(spec: RunSpec, model_info: ModelInfo, own_adapter: Adapter, secret_name: str, secret_path: Path) -> Adapter:
    """The weights for a secret, trained as the model's own ones were."""
    folder = model_info.adapter_folders[0] / "secrets" / secret_name
    root, _ = states.split_model_name(spec.model)
    _, start = states.split_model_name(own_adapter.manifest["started_from"]["name"])
    how = dict(own_adapter.manifest["settings"])
    if not (folder / adapters.ADAPTER_MANIFEST_FILE).is_file():
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
        if training.train_weights(as_then, "backdoor", settings, folder, secret_path):
            raise KeyboardInterrupt
    found = adapters.load_adapter(folder)
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
    >>> over_secrets(table)[["n_secrets", "asr_mean", "asr_max"]].values.tolist()
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
