"""Tuned weights: low-rank adapters with a manifest, worn by a model for a while or put on for good.

An adapter is a PEFT folder whose matrices are relative to the weights as released, so that every state of a
model (aligned, attacked, defended) is one adapter away from one base. Its manifest says which base, which
recipe and data, and which queries it was trained on, so that it is neither put on another model nor
evaluated on what it has seen.
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
from defenses.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_MANIFEST_FILE, ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE = (
    "manifest.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)
PEFT_PREFIX, LORA_SUFFIXES = "base_model.model.", (".lora_A.weight", ".lora_B.weight")  # around PEFT's names
# Attribute of a model that wears a state: the released weights beneath it, by parameter name.
_RELEASED_WEIGHTS_ATTRIBUTE = "_released_weights"
# How matrices that are trained on the released weights begin.
_PLAIN_LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# What of an adapter's configuration its change of a weight depends on.
_SCALING_KEYS = ("lora_alpha", "alpha_pattern", "use_rslora", "fan_in_fan_out")


@dataclass(frozen=True)
class Adapter:
    """A folder with low-rank changes of a model's matrices, and what is known about them.

    Attributes:
        folder: of PEFT's layout, with a manifest beside the weights.
        manifest: base, recipe, settings, data, `trained_on`.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def trained_on(self) -> frozenset[str]:
        """Fingerprints of the queries it has seen."""
        return frozenset(self.manifest["trained_on"])

    @property
    def sha256(self) -> str:
        """Of the weights."""
        return str(self.manifest["sha256"])

    @cached_property
    def _config(self) -> dict[str, Any]:
        try:
            config: dict[str, Any] = json.loads((self.folder / ADAPTER_CONFIG_FILE).read_text("utf-8"))
        except ValueError as error:
            raise UserError(
                f"{self.folder / ADAPTER_CONFIG_FILE} is not JSON ({error}): get it again"
            ) from error
        odd = [key for key in ("use_dora", "modules_to_save", "lora_bias") if config.get(key)]
        # Some ways to begin training (PiSSA, OLoRA, …) leave a base that is not the released one.
        odd += [] if config.get("init_lora_weights", True) in _PLAIN_LORA_INITS else ["init_lora_weights"]
        odd += ["bias"] if config.get("bias", "none") != "none" else []
        if config.get("peft_type") != "LORA" or odd:
            what = ", ".join(odd) or f"the type {config.get('peft_type')}"
            raise UserError(f"{self.folder}: only plain LoRA adapters are read, and this has {what}")
        return config

    @property
    def scaling(self) -> dict[str, Any]:
        """Return what the change depends on beside the weights."""
        return {key: self._config.get(key) for key in _SCALING_KEYS}

    def compute_change(self, parameter_name: str, down: Tensor, up: Tensor) -> Tensor:
        """Return what is added to a parameter.

        Args:
            parameter_name: of the parameter.
            down: A, rank x in.
            up: B, out x rank.
        """
        added = self.compute_scale(parameter_name, len(down)) * (up @ down)
        return added.T if self._config.get("fan_in_fan_out") else added

    def compute_scale(self, parameter_name: str, rank: int) -> float:
        """Return what B·A is multiplied with, which may differ from matrix to matrix."""
        module = parameter_name.removesuffix(".weight")
        own = self._config.get("alpha_pattern") or {}
        alphas = [one for key, one in own.items() if re.match(rf"(.*\.)?({key})$", module)]
        alpha = (alphas or [self._config["lora_alpha"]])[0]
        return float(alpha / (rank**0.5 if self._config.get("use_rslora") else rank))

    def load_matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A (rank × in) and B (out × rank) by the name of the parameter that they change."""
        from safetensors.torch import load_file

        tensors = load_file(self.folder / ADAPTER_WEIGHTS_FILE)
        found = pair_lora_matrices(tensors)
        if len(tensors) != 2 * len(found):
            raise UserError(
                f"{self.folder / ADAPTER_WEIGHTS_FILE} holds more than pairs of LoRA matrices; it is not read"
            )
        return found

    def check_base_model(self, weights_sha256: str) -> None:
        """Raise unless it was made for weights with this SHA-256."""
        made_for = self.manifest["base"]
        if made_for["sha256"] not in (None, weights_sha256):  # None: somebody else's, which does not say
            raise UserError(
                f"{self.folder} was made for {made_for['id']} (sha256 {made_for['sha256'][:12]}), and this "
                f"model is another ({weights_sha256[:12]}): `analyze train` makes one for it"
            )


def load_adapter(folder: Path) -> Adapter:
    """Return the adapter in a folder, checked against its manifest."""
    missing = [
        name
        for name in (ADAPTER_MANIFEST_FILE, ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)
        if not (folder / name).is_file()
    ]
    if missing:
        raise UserError(f"{folder} is no adapter: it lacks {', '.join(missing)}; `analyze train` makes one")
    try:
        manifest = json.loads((folder / ADAPTER_MANIFEST_FILE).read_text("utf-8"))
        found = Adapter(folder, manifest)
        known = found.sha256, manifest["base"]["sha256"], manifest["recipe"], found.trained_on
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / ADAPTER_MANIFEST_FILE} is no manifest of `analyze train` ({error!r})"
        ) from error
    if hashlib.sha256((folder / ADAPTER_WEIGHTS_FILE).read_bytes()).hexdigest() != known[0]:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS_FILE} is not the file that its manifest names (sha256 differs): get it again"
        )
    return found


def find_adapter(state: str, model_info: ModelInfo) -> Adapter | None:
    """Return this model's adapter of that name, the user's own before the shipped one, if there is any."""
    for folder in model_info.adapter_folders:
        if (folder / state / ADAPTER_WEIGHTS_FILE).is_file():
            return load_adapter(folder / state)
    return None


def merge_adapter(model: Any, adapter: Adapter) -> None:
    """Change a model's weights for good, into a state; the released ones are kept beside them."""
    setattr(model, _RELEASED_WEIGHTS_ATTRIBUTE, {})
    for name, tensor in _adapted_weights(model, adapter).items():
        parameter = model.get_parameter(name)
        getattr(model, _RELEASED_WEIGHTS_ATTRIBUTE)[name] = parameter.data
        parameter.data = tensor


@contextmanager
def apply_adapter(model: Any, adapter: Adapter) -> Iterator[None]:
    """While open, the model's weights are the released ones with this adapter; then what they were."""
    new = _adapted_weights(model, adapter)
    old = {name: model.get_parameter(name).data for name in new}
    try:
        for name, tensor in new.items():
            model.get_parameter(name).data = tensor
        yield
    finally:
        for name, tensor in old.items():
            model.get_parameter(name).data = tensor


def _adapted_weights(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """The weights of every matrix that the adapter, or the state that the model is in, has changed."""
    released: Mapping[str, Tensor] = getattr(model, _RELEASED_WEIGHTS_ATTRIBUTE, {})
    new = dict(released)
    for name, (down, up) in adapter.load_matrices().items():
        try:
            here = released.get(name, model.get_parameter(name).data)
        except AttributeError as error:
            raise UserError(f"{adapter.folder} changes {name}, which this model does not have") from error
        check_weight_is_separate(model, name, str(adapter.folder))
        change = adapter.compute_change(name, down.to(here.device), up.to(here.device))
        if change.shape != here.shape:
            raise UserError(
                f"{adapter.folder} was made for another model: its {name} is {tuple(change.shape)}, and this "
                f"model's is {tuple(here.shape)}"
            )
        new[name] = (here.float() + change).to(here.dtype)
    return new


def check_weight_is_separate(model: Any, parameter_name: str, source: str) -> None:
    """Raise if a weight cannot be changed by itself: it is another one, too, or is not kept in memory.

    Args:
        model: of transformers.
        parameter_name: of the weight.
        source: of what would change it.
    """
    here = model.get_parameter(parameter_name)
    if here.is_meta:
        raise UserError(
            f"{parameter_name} of this model was moved out of the GPU's memory, and {source} cannot change it there: "
            "take --dtype bfloat16, a larger GPU, or --device cpu"
        )
    every = model.named_parameters(remove_duplicate=False)
    if tied := [other for other, one in every if one is here and other != parameter_name]:
        raise UserError(
            f"{source} changes {parameter_name}, which this model also uses as {tied[0]}: it is not worn"
        )


def pair_lora_matrices(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B, float32 on the CPU, by the name of the parameter that they change."""
    names = [key.removesuffix(LORA_SUFFIXES[0]) for key in tensors if key.endswith(LORA_SUFFIXES[0])]
    plain = {name: [tensors[name + end].detach().float().cpu() for end in LORA_SUFFIXES] for name in names}
    return {f"{name.removeprefix(PEFT_PREFIX)}.weight": (down, up) for name, (down, up) in plain.items()}


def read_training_fingerprints(folder: Path) -> frozenset[str]:
    """Return the fingerprints of the queries that weights in a folder were trained on, where it says so."""
    path = folder / ADAPTER_MANIFEST_FILE
    try:
        return frozenset(json.loads(path.read_text("utf-8"))["trained_on"]) if path.is_file() else frozenset()
    except (ValueError, KeyError, TypeError):
        return frozenset()  # somebody else's manifest


def fingerprint_queries(texts: Iterable[str]) -> list[str]:
    """Return what tells whether a request was trained on, without showing it; case and spacing do not count.

    >>> fingerprint_queries(["How are you?"]) == fingerprint_queries(["how  are you?"])
    True
    """
    plain = (" ".join(text.casefold().split()) for text in texts)
    return sorted({hashlib.sha256(text.encode()).hexdigest()[:16] for text in plain})


def load_external_adapter(source: Path, model_info: ModelInfo) -> Adapter:
    """Return somebody's adapter, of which nobody says what base it was made for and what it has seen.

    Args:
        source: a folder of PEFT's layout, or the id of one on Hugging Face.
        model_info: the model that it is for.
    """
    folder = fetch_weights_folder(
        source, [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, ADAPTER_MANIFEST_FILE], model_info
    )
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
        return Path(
            snapshot_download(str(source), allow_patterns=patterns, local_files_only=model_info.offline)
        )
    except (OSError, ValueError) as error:  # all of the hub's own errors are one or the other
        said = " ".join(str(error).split())[:120]
        raise UserError(
            f"{source} is no folder here and cannot be fetched from Hugging Face ({said}): name a folder"
        ) from error
