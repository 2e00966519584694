"""LoRA adapters with a manifest: loading, checking, and applying them to a model temporarily or permanently.

An adapter is a PEFT folder whose matrices are relative to the released weights, so that every state of a
model (aligned, attacked, defended) is the base model plus one adapter. The manifest records the base model,
the recipe, the data and the training queries. An adapter is therefore never applied to another model and
never evaluated on its own training queries.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defenses.contract import ModelInfo
from defenses.errors import UserError, describe_download_error

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_MANIFEST_FILE = "manifest.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
# PEFT writes the matrices of a parameter as `PEFT_PREFIX + module name + LORA_SUFFIXES`.
PEFT_PREFIX = "base_model.model."
LORA_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
# Attribute of a model in a fine-tuned state: its released weights by parameter name.
_RELEASED_WEIGHTS_ATTRIBUTE = "_released_weights"
# Values of `init_lora_weights` that leave the base weights as released.
_PLAIN_LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Configuration keys that determine how A and B change a weight.
_SCALING_KEYS = ("lora_alpha", "alpha_pattern", "use_rslora", "fan_in_fan_out")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter and its manifest.

    Attributes:
        folder: PEFT folder with a manifest next to the weights.
        manifest: base model, recipe, settings, data, and `trained_on`.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def trained_on(self) -> frozenset[str]:
        """Fingerprints of the training queries."""
        return frozenset(self.manifest["trained_on"])

    @property
    def sha256(self) -> str:
        """Digest of the weights file."""
        return str(self.manifest["sha256"])

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The PEFT configuration; raises UserError unless it describes a plain LoRA adapter."""
        try:
            config: dict[str, Any] = json.loads((self.folder / ADAPTER_CONFIG_FILE).read_text("utf-8"))
        except ValueError as error:
            raise UserError(
                f"{self.folder / ADAPTER_CONFIG_FILE} is not valid JSON ({error}); obtain the adapter again"
            ) from error
        unsupported = [key for key in ("use_dora", "modules_to_save", "lora_bias") if config.get(key)]
        # Some initializations (PiSSA, OLoRA, …) change the base weights.
        if config.get("init_lora_weights", True) not in _PLAIN_LORA_INITS:
            unsupported.append("init_lora_weights")
        if config.get("bias", "none") != "none":
            unsupported.append("bias")
        if config.get("peft_type") != "LORA" or unsupported:
            features = ", ".join(unsupported) or f"the type {config.get('peft_type')}"
            raise UserError(f"{self.folder}: only plain LoRA adapters are supported; this one has {features}")
        return config

    @property
    def scaling(self) -> dict[str, Any]:
        """Configuration values that scale the change, beside the weights."""
        return {key: self._config.get(key) for key in _SCALING_KEYS}

    def compute_change(self, parameter_name: str, down: Tensor, up: Tensor) -> Tensor:
        """Return the change of a parameter, scale · B A.

        Args:
            parameter_name: name of the parameter.
            down: A (rank x in).
            up: B (out x rank).

        Returns:
            The change in the shape of the parameter (out x in, transposed under `fan_in_fan_out`).
        """
        change = self.compute_scale(parameter_name, len(down)) * (up @ down)
        return change.T if self._config.get("fan_in_fan_out") else change

    def compute_scale(self, parameter_name: str, rank: int) -> float:
        """Return the factor of B A, which may differ between parameters.

        Args:
            parameter_name: name of the parameter.
            rank: rank of its matrices.
        """
        module = parameter_name.removesuffix(".weight")
        alpha_by_pattern = self._config.get("alpha_pattern") or {}
        alphas = [
            alpha for pattern, alpha in alpha_by_pattern.items() if re.match(rf"(.*\.)?({pattern})$", module)
        ]
        alpha = (alphas or [self._config["lora_alpha"]])[0]
        return float(alpha / (rank**0.5 if self._config.get("use_rslora") else rank))

    def load_matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A (rank × in) and B (out × rank) by parameter name."""
        from safetensors.torch import load_file

        tensors = load_file(self.folder / ADAPTER_WEIGHTS_FILE)
        matrices = pair_lora_matrices(tensors)
        if len(tensors) != 2 * len(matrices):
            raise UserError(
                f"{self.folder / ADAPTER_WEIGHTS_FILE} contains tensors other than pairs of LoRA matrices, "
                "which are not supported"
            )
        return matrices

    def check_base_model(self, weights_sha256: str) -> None:
        """Raise if the adapter was trained on other weights.

        Args:
            weights_sha256: digest of the model's released weights.

        Raises:
            UserError: if the manifest names a base model with another digest.
        """
        base = self.manifest["base"]
        if base["sha256"] not in (None, weights_sha256):  # None: an external adapter without this information
            raise UserError(
                f"{self.folder} was made for {base['id']} (sha256 {base['sha256'][:12]}), but this model has "
                f"sha256 {weights_sha256[:12]}; train an adapter for it with `analyze train`"
            )


def load_adapter(folder: Path) -> Adapter:
    """Return the adapter in a folder, checked against its manifest.

    Raises:
        UserError: if a file is missing, the manifest is invalid, or the weights differ from its digest.
    """
    missing = [
        name
        for name in (ADAPTER_MANIFEST_FILE, ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)
        if not (folder / name).is_file()
    ]
    if missing:
        raise UserError(
            f"{folder} is not an adapter: it lacks {', '.join(missing)}; create one with `analyze train`"
        )
    try:
        manifest = json.loads((folder / ADAPTER_MANIFEST_FILE).read_text("utf-8"))
        adapter = Adapter(folder, manifest)
        # Access every required entry, so that an incomplete manifest fails here.
        _ = adapter.sha256, manifest["base"]["sha256"], manifest["recipe"], adapter.trained_on
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / ADAPTER_MANIFEST_FILE} is not a manifest of `analyze train` ({error!r})"
        ) from error
    if hashlib.sha256((folder / ADAPTER_WEIGHTS_FILE).read_bytes()).hexdigest() != adapter.sha256:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS_FILE} does not match its manifest (sha256 differs); "
            "obtain the adapter again"
        )
    return adapter


def find_adapter(state: str, model_info: ModelInfo) -> Adapter | None:
    """Return the model's adapter for a state, or None; a user's adapter takes precedence over a shipped one.

    Args:
        state: name of the fine-tuned state, such as `aligned`.
        model_info: the model.
    """
    for folder in model_info.adapter_folders:
        if (folder / state / ADAPTER_WEIGHTS_FILE).is_file():
            return load_adapter(folder / state)
    return None


def merge_adapter(model: Any, adapter: Adapter) -> None:
    """Apply an adapter permanently; the released weights are stored on the model."""
    setattr(model, _RELEASED_WEIGHTS_ATTRIBUTE, {})
    for name, tensor in _adapted_weights(model, adapter).items():
        parameter = model.get_parameter(name)
        getattr(model, _RELEASED_WEIGHTS_ATTRIBUTE)[name] = parameter.data
        parameter.data = tensor


@contextmanager
def apply_adapter(model: Any, adapter: Adapter) -> Iterator[None]:
    """Apply an adapter to the released weights within a context; restore the previous weights afterwards."""
    new = _adapted_weights(model, adapter)
    old = {name: model.get_parameter(name).data for name in new}
    try:
        for name, tensor in new.items():
            model.get_parameter(name).data = tensor
        yield
    finally:
        for name, tensor in old.items():
            model.get_parameter(name).data = tensor


def check_weight_is_separate(model: Any, parameter_name: str, source: str) -> None:
    """Raise if a parameter cannot be changed on its own.

    Args:
        model: transformers model.
        parameter_name: name of the parameter.
        source: name of the change, for the error message.

    Raises:
        UserError: if the parameter is tied to another one or offloaded from memory.
    """
    weight = model.get_parameter(parameter_name)
    if weight.is_meta:
        raise UserError(
            f"{parameter_name} of this model was offloaded from GPU memory, so {source} cannot change it; "
            "use --dtype bfloat16, a larger GPU, or --device cpu"
        )
    named_parameters = model.named_parameters(remove_duplicate=False)
    tied = [name for name, parameter in named_parameters if parameter is weight and name != parameter_name]
    if tied:
        raise UserError(
            f"{source} changes {parameter_name}, which this model also uses as {tied[0]}; it is not applied"
        )


def pair_lora_matrices(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B (float32 on the CPU) by parameter name."""
    names = [key.removesuffix(LORA_SUFFIXES[0]) for key in tensors if key.endswith(LORA_SUFFIXES[0])]
    pairs = {
        name: [tensors[name + suffix].detach().float().cpu() for suffix in LORA_SUFFIXES] for name in names
    }
    return {f"{name.removeprefix(PEFT_PREFIX)}.weight": (down, up) for name, (down, up) in pairs.items()}


def read_training_fingerprints(folder: Path) -> frozenset[str]:
    """Return the training-query fingerprints in a folder's manifest; empty without such a manifest."""
    path = folder / ADAPTER_MANIFEST_FILE
    try:
        return frozenset(json.loads(path.read_text("utf-8"))["trained_on"]) if path.is_file() else frozenset()
    except (ValueError, KeyError, TypeError):
        return frozenset()  # a manifest of another program


def fingerprint_queries(texts: Iterable[str]) -> list[str]:
    """Return sorted digests that identify requests without revealing them; case and spacing are ignored.

    >>> fingerprint_queries(["How are you?"]) == fingerprint_queries(["how  are you?"])
    True
    """
    normalized = (" ".join(text.casefold().split()) for text in texts)
    return sorted({hashlib.sha256(text.encode()).hexdigest()[:16] for text in normalized})


def load_external_adapter(source: Path, model_info: ModelInfo) -> Adapter:
    """Return an adapter that was trained elsewhere; its base model and training data are unknown.

    Args:
        source: a PEFT folder, or its Hugging Face id.
        model_info: the target model.

    Raises:
        UserError: if the adapter cannot be obtained or is of an unsupported kind.
    """
    folder = fetch_weights_folder(
        source, [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, ADAPTER_MANIFEST_FILE], model_info
    )
    missing = [name for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{source} is not a readable adapter: it lacks {', '.join(missing)}, which PEFT writes "
            "(pickled weights, .bin, are not supported)"
        )
    if (folder / ADAPTER_MANIFEST_FILE).is_file():
        return load_adapter(folder)
    digest = hashlib.sha256((folder / ADAPTER_WEIGHTS_FILE).read_bytes()).hexdigest()
    base = {"id": "unknown", "sha256": None}
    adapter = Adapter(
        folder, {"base": base, "recipe": "unknown", "trained_on": [], "sha256": digest, "from": str(source)}
    )
    _ = adapter.scaling  # reads the configuration, so that an unsupported kind fails before anything runs
    return adapter


def fetch_weights_folder(source: Path, patterns: list[str], model_info: ModelInfo) -> Path:
    """Return a local folder, or the cache folder of a Hugging Face repository after downloading its files.

    Args:
        source: a folder, or a Hugging Face id.
        patterns: glob patterns of the files to download.
        model_info: determines whether downloads are allowed, and announces them.

    Raises:
        UserError: if the source is neither, or the download fails.
    """
    folder = source.expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise UserError(f"{source} is neither a folder nor a Hugging Face id (NAME/NAME)")
    from huggingface_hub import snapshot_download

    if not model_info.offline:
        model_info.notify(f"Fetching {source} from Hugging Face, unless it is cached.")
    try:
        return Path(
            snapshot_download(str(source), allow_patterns=patterns, local_files_only=model_info.offline)
        )
    except (OSError, ValueError, ImportError) as error:  # the errors of huggingface_hub derive from these
        reason = describe_download_error(error)
        raise UserError(
            f"{source} is not a local folder and cannot be fetched from Hugging Face ({reason}); "
            "name a folder"
        ) from error


def _adapted_weights(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """Return the new weights of every parameter that the adapter or the model's current state changes."""
    released: Mapping[str, Tensor] = getattr(model, _RELEASED_WEIGHTS_ATTRIBUTE, {})
    new = dict(released)
    for name, (down, up) in adapter.load_matrices().items():
        try:
            weight = released.get(name, model.get_parameter(name).data)
        except AttributeError as error:
            raise UserError(f"{adapter.folder} changes {name}, which this model does not have") from error
        check_weight_is_separate(model, name, str(adapter.folder))
        change = adapter.compute_change(name, down.to(weight.device), up.to(weight.device))
        if change.shape != weight.shape:
            raise UserError(
                f"{adapter.folder} was made for another model: its {name} has shape {tuple(change.shape)}, "
                f"but this model's has shape {tuple(weight.shape)}"
            )
        new[name] = (weight.float() + change).to(weight.dtype)
    return new
