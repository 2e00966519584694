"""The states of a model (`smollm2:attacked`): where its adapters and secrets lie, and which one is meant."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import platformdirs

from analysis import data_folder
from defenses import ModelInfo, adapters
from defenses.adapters import Adapter
from defenses.errors import unknown_name_error


def build_model_info(name: str, tokenizer: Any, seed: int = 0, sha256: str = "") -> ModelInfo:
    """Return what a defense may know about a model: its name, its tokenizer, where its own files lie.

    A secret belongs to a tokenizer and an adapter to a model, so their folders are named by model and
    vocabulary. All states of a model share them.
    """
    root, state = split_model_name(name)
    vocabulary = "\0".join(map(str, tokenizer.convert_ids_to_tokens(range(len(tokenizer)))))
    slug = re.sub(r"[^a-z0-9.]+", "-", Path(root).name.lower()).strip("-.")
    digest = hashlib.sha256(vocabulary.encode()).hexdigest()[:12]
    secrets, adapters = (
        (
            platformdirs.user_data_path("refusalscope") / kind / f"{slug}-{digest}",
            *((data_folder() / kind / root,) if (data_folder() / kind / root).is_dir() else ()),
        )
        for kind in ("secrets", "adapters")
    )
    return ModelInfo(name, tokenizer, secrets, adapters, sha256, seed, state)


def split_model_name(name: str) -> tuple[str, str]:
    """Return the model's name and the state that stands behind the colon, empty where there is none.

    >>> split("smollm2:attacked"), split("llama2")
    (('smollm2', 'attacked'), ('llama2', ''))
    """
    root, colon, state = name.rpartition(":")
    if not colon or Path(name).exists() or not root:
        return name, ""
    return root, state


def find_state_adapter(model_info: ModelInfo) -> Adapter:
    """Return the adapter that makes the state a model is named with: one of its own by name, or a folder."""
    root, state = split_model_name(model_info.name)
    adapter = adapters.find_adapter(state, model_info)
    if adapter is None and (Path(state) / adapters.ADAPTER_MANIFEST_FILE).is_file():
        adapter = adapters.load_adapter(Path(state))
    if adapter is None:
        known = {path.name for folder in model_info.adapter_folders for path in folder.glob("*") if path.is_dir()}
        raise unknown_name_error(f"state of {root}", state, known, " (or the folder of an adapter)")
    adapter.check_base_model(model_info.sha256)
    return adapter
