"""Adapters with a manifest: loading, checking, and applying them to a model temporarily or permanently.

An adapter is a PEFT folder whose change is relative to the released weights, so that every state of a
model (aligned, attacked, defended) is the base model plus one adapter. The manifest records the base model,
the recipe, the data and the training queries. An adapter is therefore never applied to another model and
never evaluated on its own training queries.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from defenses.activated_lora import Activation, attach_activation, replace_activation
from defenses.adapter_merge import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    INVOCATION_KEY,
    PeftAdapter,
    check_adapter_config,
    describe_adapter_config,
    load_low_rank_changes,
    merge_adapters,
    read_embedding_rows,
    read_tensor_shapes,
)
from defenses.contract import ModelInfo
from defenses.errors import UserError, describe_download_error

if TYPE_CHECKING:
    from torch.nn import Parameter

ADAPTER_MANIFEST_FILE = "manifest.json"
# Files of a tokenizer next to an adapter: the essential ones, and patterns of all.
_TOKENIZER_NAMES = ("tokenizer_config.json", "tokenizer.json")
_TOKENIZER_FILES = ("tokenizer*", "chat_template.jinja", "added_tokens.json", "special_tokens_map.json")
# Attributes of a model whose weights are changed: the released parameters that were replaced, by name (None
# for a bias that was added), and the adapters that are applied within contexts.
_RELEASED_PARAMETERS = "_released_parameters"
_APPLIED_ADAPTERS = "_applied_adapters"


@dataclass(frozen=True)
class Adapter:
    """An adapter and its manifest.

    Attributes:
        files: names of the files beside the manifest; the last one holds the weights.
        folder: PEFT folder with a manifest next to the weights.
        manifest: base model, recipe, settings, data, and `trained_on`.
    """

    files: ClassVar[tuple[str, ...]] = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)

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
    def peft_adapter(self) -> PeftAdapter:
        """The folder with its PEFT configuration; raises UserError unless PEFT can merge such an adapter."""
        path = self.folder / ADAPTER_CONFIG_FILE
        try:
            config = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); obtain the adapter again") from error
        if not isinstance(config, dict):
            raise UserError(f"{path} is not a configuration of PEFT; obtain the adapter again")
        peft_adapter = PeftAdapter(self.folder, config)
        check_adapter_config(peft_adapter)
        return peft_adapter

    @property
    def config(self) -> dict[str, Any]:
        """The part of its configuration that affects the change, beside the weights."""
        return describe_adapter_config(self.peft_adapter.config)

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens from which on an activated adapter acts; empty for an adapter that is merged."""
        return tuple(self.config.get(INVOCATION_KEY, ()))

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


AdapterKind = TypeVar("AdapterKind", bound=Adapter)


@overload
def load_adapter(folder: Path) -> Adapter: ...


@overload
def load_adapter(folder: Path, kind: type[AdapterKind]) -> AdapterKind: ...


def load_adapter(folder: Path, kind: type[Adapter] = Adapter) -> Adapter:
    """Return the adapter in a folder, checked against its manifest.

    Args:
        folder: its files and its manifest.
        kind: class of the adapter.

    Raises:
        UserError: if a file is missing, the manifest is invalid, or the weights differ from its digest.
    """
    weights_file = folder / kind.files[-1]
    missing = [name for name in (ADAPTER_MANIFEST_FILE, *kind.files) if not (folder / name).is_file()]
    if missing:
        noun = "an adapter" if kind is Adapter else "a soft prompt"
        raise UserError(
            f"{folder} is not {noun}: it lacks {', '.join(missing)}; create one with `analyze train`"
        )
    try:
        manifest = json.loads((folder / ADAPTER_MANIFEST_FILE).read_text("utf-8"))
        adapter = kind(folder, manifest)
        # Access every required entry, so that an incomplete manifest fails here.
        _ = adapter.sha256, manifest["base"]["sha256"], manifest["recipe"], adapter.trained_on
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / ADAPTER_MANIFEST_FILE} is not a manifest of `analyze train` ({error!r})"
        ) from error
    if hashlib.sha256(weights_file.read_bytes()).hexdigest() != adapter.sha256:
        raise UserError(
            f"{weights_file} does not match its manifest (sha256 differs); obtain the adapter again"
        )
    return adapter


@overload
def find_adapter(state: str, model_info: ModelInfo) -> Adapter | None: ...


@overload
def find_adapter(state: str, model_info: ModelInfo, kind: type[AdapterKind]) -> AdapterKind | None: ...


def find_adapter(state: str, model_info: ModelInfo, kind: type[Adapter] = Adapter) -> Adapter | None:
    """Return the model's adapter for a state, or None; a user's adapter takes precedence over a shipped one.

    Args:
        state: name of the fine-tuned state, such as `aligned`.
        model_info: the model.
        kind: class of the adapter.
    """
    for folder in model_info.adapter_folders:
        if (folder / state / kind.files[-1]).is_file():
            return load_adapter(folder / state, kind)
    return None


def extend_embeddings(model: Any, adapter: Adapter) -> bool:
    """Give a model as many token embeddings as an adapter holds; return whether their number changed.

    Raises:
        UserError: if the adapter holds the added rows of one of two embeddings only.
    """
    n_rows = model.get_input_embeddings().weight.shape[0]
    input_rows, output_rows = read_embedding_rows(model, adapter.folder)
    extended = input_rows or output_rows or n_rows
    if extended == n_rows:
        return False
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if input_rows is None or (output_rows is None and not is_tied):
        raise UserError(
            f"{adapter.folder} holds {extended} token embeddings for a model with {n_rows}, but only for "
            "the input or the output; save it with PEFT's save_embedding_layers=True"
        )
    model.resize_token_embeddings(extended, mean_resizing=False)
    return True


def merge_adapter(model: Any, adapter: Adapter) -> None:
    """Apply an adapter permanently; the released parameters are stored on the model.

    If the adapter extends the vocabulary, the model's embeddings are extended first. An activated adapter is
    attached to the model, whose weights stay as they are.
    """
    if adapter.invocation:
        attach_activation(model, _load_activation(model, adapter))
        return
    is_extended = extend_embeddings(model, adapter)
    changed, released = _compute_parameters(model, (adapter,))
    _set_parameters(model, changed)
    # No other adapter fits the extended embeddings, and the released ones do not fit the tokens.
    setattr(model, _RELEASED_PARAMETERS, None if is_extended else released)


@contextmanager
def apply_adapter(model: Any, adapter: Adapter) -> Iterator[None]:
    """Apply an adapter to the released weights within a context; restore the previous weights afterwards.

    The changes of adapters in nested contexts add up, unless one of them is activated by tokens.
    """
    adapters = (*getattr(model, _APPLIED_ADAPTERS, ()), adapter)
    activated = [other for other in adapters if other.invocation]
    if activated and len(adapters) > 1:
        raise make_activated_error(activated[0])
    changed, released = _compute_parameters(model, adapters)
    previous = {name: _get_parameter(model, name) for name in released}
    attributes = {name: getattr(model, name, None) for name in (_RELEASED_PARAMETERS, _APPLIED_ADAPTERS)}
    try:
        _set_parameters(model, {**released, **changed})
        setattr(model, _RELEASED_PARAMETERS, released)
        setattr(model, _APPLIED_ADAPTERS, adapters)
        activation = _load_activation(model, adapter) if activated else None
        with replace_activation(model, activation):
            yield
    finally:
        _set_parameters(model, previous)
        for name, value in attributes.items():
            if value is None:
                vars(model).pop(name, None)
            else:
                setattr(model, name, value)


def make_activated_error(adapter: Adapter) -> UserError:
    """Return the error for an activated adapter that is to be applied together with others."""
    return UserError(
        f"{adapter.folder} acts from its invocation on ({INVOCATION_KEY}), and is not applied together with "
        "other adapters: use one at a time"
    )


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
    files = [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, ADAPTER_MANIFEST_FILE, *_TOKENIZER_FILES]
    folder = fetch_weights_folder(source, files, model_info)
    missing = [name for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{source} is not a readable adapter: it lacks {', '.join(missing)}, which PEFT writes "
            "(pickled weights, .bin, are not supported)"
        )
    if (folder / ADAPTER_MANIFEST_FILE).is_file():
        return load_adapter(folder)
    digest = hashlib.sha256((folder / ADAPTER_WEIGHTS_FILE).read_bytes()).hexdigest()
    manifest = {"recipe": "unknown", "trained_on": [], "sha256": digest, "from": str(source)}
    # A damaged file, and with the configuration an unsupported kind, fail before anything runs.
    read_tensor_shapes(folder)
    base_name = Adapter(folder, manifest).peft_adapter.config.get("base_model_name_or_path")
    return Adapter(folder, {**manifest, "base": {"id": base_name or "unknown", "sha256": None}})


def has_tokenizer(folder: Path) -> bool:
    """Return whether an adapter's folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_NAMES)


def find_tokenizer_differences(folder: Path, tokenizer: Any) -> list[str]:
    """Return what the tokenizer in an adapter's folder has that the model's tokenizer has not; often nothing.

    Args:
        folder: the adapter.
        tokenizer: tokenizer of the model.
    """
    template_path = folder / "chat_template.jinja"
    try:
        config, vocabulary = (
            json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}
            for name in _TOKENIZER_NAMES
        )
        template = (
            template_path.read_text("utf-8") if template_path.is_file() else config.get("chat_template")
        )
        added_tokens = [*config.get("added_tokens_decoder", {}).values(), *vocabulary.get("added_tokens", ())]
        new_tokens = {token["content"] for token in added_tokens} - tokenizer.get_vocab().keys()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return ["files that cannot be read"]
    differences = [f"the tokens {', '.join(sorted(new_tokens))[:80]}"] if new_tokens else []
    if isinstance(template, str) and template.strip() != str(tokenizer.chat_template or "").strip():
        differences.append("another chat template")
    return differences


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hugging Face id.

    >>> is_hub_id("owner/name"), is_hub_id("./folder"), is_hub_id("name")
    (True, False, False)
    """
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


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
    if not is_hub_id(str(source)):
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


def _compute_parameters(
    model: Any, adapters: Sequence[Adapter]
) -> tuple[dict[str, Parameter], dict[str, Parameter | None]]:
    """Return the parameters that adapters change, and the released ones of all that are changed so far.

    Args:
        model: transformers model, perhaps in a fine-tuned state, or with adapters applied.
        adapters: applied together to the released weights.
    """
    released: dict[str, Parameter | None] | None = getattr(model, _RELEASED_PARAMETERS, {})
    if released is None:
        raise UserError(
            f"{adapters[-1].folder} cannot be applied, because the vocabulary of this state of the model was "
            "extended; apply it to the released model"
        )
    n_rows = model.get_input_embeddings().weight.shape[0]
    for adapter in adapters:
        if other_sizes := set(read_embedding_rows(model, adapter.folder)) - {None, n_rows}:
            raise UserError(
                f"{adapter.folder} holds {other_sizes.pop()} token embeddings, and this model has {n_rows}: "
                f"if the adapter extends its vocabulary, load both with -m MODEL:{adapter.folder}"
            )
    if any(adapter.invocation for adapter in adapters):
        return {}, released
    parameters = dict(model.named_parameters(remove_duplicate=False)) | released
    changed = merge_adapters(
        model,
        {name: parameter for name, parameter in parameters.items() if parameter is not None},
        [adapter.peft_adapter for adapter in adapters],
    )
    return changed, {**released, **{name: parameters.get(name) for name in changed}}


def _load_activation(model: Any, adapter: Adapter) -> Activation:
    """Return what applies an activated adapter to a model with released weights."""
    n_rows = model.get_input_embeddings().weight.shape[0]
    if max(adapter.invocation) >= n_rows:
        raise UserError(
            f"{adapter.folder} is invoked by the token {max(adapter.invocation)} ({INVOCATION_KEY}), and "
            f"this model has {n_rows} tokens: use the model that the adapter was made for"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return Activation(adapter.invocation, load_low_rank_changes(model, parameters, adapter.peft_adapter))


def _get_parameter(model: Any, name: str) -> Parameter | None:
    """Return a parameter, or None if the module has none of that name."""
    module_name, _, parameter_name = name.rpartition(".")
    parameter: Parameter | None = getattr(model.get_submodule(module_name), parameter_name)
    return parameter


def _set_parameters(model: Any, parameters: Mapping[str, Parameter | None]) -> None:
    """Replace parameters by name; tied ones under each of their names."""
    for name, parameter in parameters.items():
        module_name, _, parameter_name = name.rpartition(".")
        setattr(model.get_submodule(module_name), parameter_name, parameter)
