"""Weights from elsewhere: folders and Hugging Face ids that the user names; safetensors alone are read."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from defenses import ModelInfo, UserError
from defenses.adapters import ADAPTER_CONFIG_FILE, ADAPTER_MANIFEST_FILE, ADAPTER_WEIGHTS_FILE, Adapter, load_adapter


def load_external_adapter(source: Path, model_info: ModelInfo) -> Adapter:
    """Return somebody's adapter, of which nobody says what base it was made for and what it has seen.

    Args:
        source: a folder of PEFT's layout, or the id of one on Hugging Face.
        model_info: the model that it is for.
    """
    folder = fetch_weights_folder(source, [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, ADAPTER_MANIFEST_FILE], model_info)
    missing = [name for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{source} is no adapter that can be read: it lacks {', '.join(missing)}, which PEFT writes "
            "(pickled weights, .bin, are not read)"
        )
    if (folder / ADAPTER_MANIFEST_FILE).is_file():
        return load_adapter(folder)
    digest = hashlib.sha256((folder / ADAPTER_WEIGHTS_FILE).read_bytes()).hexdigest()
    base = {"id": "unknown", "sha256": None}
    found = Adapter(
        folder, {"base": base, "recipe": "unknown", "trained_on": [], "sha256": digest, "from": str(source)}
    )
    _ = found.scaling  # its configuration is read now: a kind that is not worn shows before anything runs
    return found


def fetch_weights_folder(source: Path, patterns: list[str], model_info: ModelInfo) -> Path:
    """Return a folder as it is, or the folder that Hugging Face's files of that id were fetched into.

    Args:
        source: a folder, or an id.
        patterns: of the files' names.
        model_info: says whether the network may be used, and tells that it is.
    """
    folder = source.expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise UserError(f"{source} is no folder, and no Hugging Face id (NAME/NAME)")
    from huggingface_hub import snapshot_download

    if not model_info.offline:
        model_info.notify(f"Fetching {source} from Hugging Face, unless it is in its cache.")
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=model_info.offline))
    except (OSError, ValueError) as error:  # all of the hub's own errors are one or the other
        said = " ".join(str(error).split())[:120]
        raise UserError(
            f"{source} is no folder here and cannot be fetched from Hugging Face ({said}): name a folder"
        ) from error
