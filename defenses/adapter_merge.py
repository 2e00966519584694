"""Weights of a model with PEFT adapters merged in: which adapters are supported, and what PEFT makes of them.

PEFT replaces modules and writes into weights. It therefore works on a copy of the model's modules that shares
the model's weights, and every weight that it changes is copied first.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from defenses.activated_lora import LowRankChange
from defenses.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
# PEFT writes the tensors of a module as `PEFT_PREFIX + module name + "." + name of the tensor`.
PEFT_PREFIX = "base_model.model."
# Of a weight of the model, changed or not, that PEFT writes along with the adapter of its module.
_BASE_WEIGHT_SUFFIX = ".base_layer.weight"
# Types of adapters whose change PEFT can merge into the weights.
_MERGED_TYPES = (
    *("ADALORA", "BOFT", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT"),
    *("SHIRA", "TRAINABLE_TOKENS", "VERA"),
)
# Keys that name the base model or matter in training only, also those of older versions and of other
# programs; the last two matter only together with a key that is not supported.
_KEYS_WITHOUT_EFFECT = frozenset(
    (
        *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode"),
        *("base_model_name_or_path", "revision", "runtime_config", "lora_dropout", "merge_weights"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
        *("megatron_core", "qalora_group_size"),
    )
)
# Keys of LoraConfig that PEFT takes into account when it merges an adapter.
_MERGED_LORA_KEYS = frozenset(
    (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "use_bdlora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("target_parameters", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
        *("bias", "lora_bias", "init_lora_weights"),
    )
)
# Key of LoraConfig with the tokens from which on an adapter acts, and the keys that are supported with it.
INVOCATION_KEY = "alora_invocation_tokens"
_ACTIVATED_LORA_KEYS = frozenset(
    (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        INVOCATION_KEY,
    )
)
# Keys whose value zero or false counts, since PEFT's own default is another one.
_KEYS_WITH_DEFAULTS = frozenset(
    (
        *("r", "lora_alpha", "alpha", "scaling", "random_loc_seed", "save_projection"),
        *("boft_block_size", "boft_n_butterfly_factor", "oft_block_size", "use_cayley_neumann"),
    )
)
# Initializations after which the adapter is relative to the released weights; others change those as well.
_PLAIN_LORA_INITS = (True, "gaussian", "eva", "orthogonal", "mica")
# Initializations that subtract the first product of the matrices from the released weights, of which a
# decomposition gives the product again.
_SUBTRACTED_LORA_INITS = ("pissa", "olora")


class PeftAdapter(NamedTuple):
    """A folder written by PEFT, and its configuration."""

    folder: Path
    config: Mapping[str, Any]


def check_adapter_config(adapter: PeftAdapter) -> None:
    """Raise UserError unless an adapter with this configuration can be merged, or activated by its tokens."""
    folder, config = adapter
    peft_type = config.get("peft_type")
    if peft_type not in _MERGED_TYPES:
        raise UserError(
            f"{folder} is an adapter of type {peft_type}, which is not merged into weights; supported are "
            f"{', '.join(_MERGED_TYPES)}"
        )
    known_keys = _MERGED_LORA_KEYS if peft_type == "LORA" else _list_config_fields(peft_type)
    settings = describe_adapter_config(config)
    if peft_type == "LORA" and INVOCATION_KEY in settings:
        _check_activated_config(folder, settings)
        return
    unsupported = [key for key in settings if key not in known_keys]
    init = settings.get("init_lora_weights", True)
    if init not in (*_PLAIN_LORA_INITS, *_SUBTRACTED_LORA_INITS):
        raise UserError(
            f"{folder} has init_lora_weights={str(init)[:60]} in its {ADAPTER_CONFIG_FILE}: the released "
            "weights were changed at random or by data, which it does not hold; save it again with PEFT's "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    if unsupported:
        values = ", ".join(f"{key}={str(config[key])[:60]}" for key in unsupported)
        raise UserError(
            f"{folder} has {values} in its {ADAPTER_CONFIG_FILE}, which is unknown or cannot be merged into "
            "weights; if PEFT can, save the merged model with it, and use -d weights --set path=FOLDER"
        )


def _check_activated_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError unless an adapter with these settings can be activated by its tokens."""
    invocation = settings[INVOCATION_KEY]
    if not isinstance(invocation, list) or not all(type(token) is int and token >= 0 for token in invocation):
        raise UserError(
            f"{folder} has {INVOCATION_KEY}={str(invocation)[:60]} in its {ADAPTER_CONFIG_FILE}; it takes a "
            "list of token ids: obtain the adapter again"
        )
    unsupported = [key for key in settings if key not in _ACTIVATED_LORA_KEYS]
    if settings.get("init_lora_weights", True) not in _PLAIN_LORA_INITS:
        unsupported.append("init_lora_weights")
    if unsupported:
        raise UserError(
            f"{folder} is activated by tokens ({INVOCATION_KEY}), and its {ADAPTER_CONFIG_FILE} has "
            f"{unsupported[0]}={str(settings[unsupported[0]])[:60]}, which is not supported along with them: "
            "train it without that setting"
        )


def describe_adapter_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without keys that are not set, or that do not affect a trained adapter.

    >>> describe_adapter_config({"peft_type": "LORA", "r": 8, "lora_dropout": 0.1, "use_dora": False})
    {'r': 8}
    """
    return {
        key: value
        for key, value in sorted(config.items())
        if (value or (value is not None and key in _KEYS_WITH_DEFAULTS))
        and value != "none"
        and key not in _KEYS_WITHOUT_EFFECT
    }


def merge_adapters(
    model: Any, parameters: Mapping[str, Parameter], adapters: Sequence[PeftAdapter]
) -> dict[str, Parameter]:
    """Return the parameters of a model that differ while adapters are active, as new objects, by name.

    Sums are formed in float32 and rounded once. A bias that the model does not have may be among them.

    Args:
        model: transformers model; not changed.
        parameters: its released parameters by name, including every name of tied ones.
        adapters: the active adapters, whose changes add up.

    Raises:
        UserError: if PEFT cannot merge the adapters into this model.
    """
    with _convert_peft_errors(adapters):
        return _merge_with_peft(model, parameters, adapters)


def load_low_rank_changes(
    model: Any, parameters: Mapping[str, Parameter], adapter: PeftAdapter
) -> dict[str, LowRankChange]:
    """Return the changes of an activated adapter by name of the module.

    Args:
        model: as for `merge_adapters`.
        parameters: as for `merge_adapters`.
        adapter: activated by its tokens.

    Raises:
        UserError: if PEFT cannot apply the adapter to this model.
    """
    from peft.tuners.lora import Linear

    with _convert_peft_errors([adapter]):
        if others := [key for key in read_tensor_shapes(adapter.folder) if ".lora_" not in key]:
            raise UserError(
                f"{adapter.folder} is activated by tokens ({INVOCATION_KEY}), but holds other tensors than "
                f"matrices of LoRA ({others[0].removeprefix(PEFT_PREFIX)}): train it without them"
            )
        peft_model, names, _ = _build_peft_model(model, parameters, [adapter])
        changes = {}
        for module_name, layer in peft_model.named_modules():
            if names[0] in getattr(layer, "lora_A", {}):
                down, up = (matrices[names[0]].weight.detach() for matrices in (layer.lora_A, layer.lora_B))
                name = module_name.removeprefix(PEFT_PREFIX)
                if not isinstance(layer, Linear):
                    raise ValueError(f"{name} is no linear module, and only these can be activated by tokens")
                changes[name] = LowRankChange(down.float(), up.float(), float(layer.scaling[names[0]]))
        return changes


@contextmanager
def _convert_peft_errors(adapters: Sequence[PeftAdapter]) -> Iterator[None]:
    """Context manager: let PEFT read adapters; its errors become UserErrors."""
    import torch

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # everything that PEFT warns of is checked here
            yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:250] or type(error).__name__
        if len(adapters) > 1:
            folders = " and ".join(str(adapter.folder) for adapter in adapters)
            raise UserError(f"{folders} cannot be applied together: {reason}; use one at a time") from error
        raise UserError(
            f"{adapters[0].folder} cannot be applied to this model ({reason}); use the one it was made for"
        ) from error


def read_tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in an adapter's file by key; raise UserError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); obtain the adapter again") from error


def read_embedding_rows(model: Any, folder: Path) -> tuple[int | None, int | None]:
    """Return the numbers of rows of the whole input and output embeddings in an adapter's file.

    Args:
        model: the model that the adapter was made for.
        folder: the adapter.

    Returns:
        None for embeddings that the file does not hold.
    """
    shapes, rows = read_tensor_shapes(folder), []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        keys = [
            f"{PEFT_PREFIX}{name}.{wrapper}weight"
            for name, other in model.named_modules()
            for wrapper in ("", "base_layer.", "token_adapter.base_layer.")
            if other is module
        ]
        rows.append(next((shapes[key][0] for key in keys if key in shapes), None))
    return rows[0], rows[1]


def _merge_with_peft(
    model: Any, parameters: Mapping[str, Parameter], adapters: Sequence[PeftAdapter]
) -> dict[str, Parameter]:
    """Return the changed parameters as in `merge_adapters`; errors are those of PEFT."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from torch import nn

    peft_model, names, starts = _build_peft_model(model, parameters, adapters)
    peft_model.base_model.set_adapter(names)
    adapted: list[Any] = [
        module
        for module in peft_model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    if any(parameter.is_meta for module in adapted for parameter in module.parameters()):
        raise UserError(
            f"{adapters[0].folder} changes weights that were offloaded from GPU memory; use --dtype "
            "bfloat16, a larger GPU, or --device cpu"
        )
    for module in adapted:
        if isinstance(module, BaseTunerLayer):
            _merge_layer(module, starts)
    changed = {}
    for name, parameter in peft_model.unload().named_parameters(remove_duplicate=False):
        released = parameters.get(name)
        if released is None or parameter.data_ptr() != released.data_ptr():
            dtype = parameter.dtype if released is None else released.dtype
            requires_grad = released is None or released.requires_grad
            changed[name] = nn.Parameter(parameter.data.to(dtype), requires_grad)
    return changed


def _build_peft_model(
    model: Any, parameters: Mapping[str, Parameter], adapters: Sequence[PeftAdapter]
) -> tuple[Any, list[str], list[str]]:
    """Return a PEFT model with loaded adapters, their names, and the names of those that subtract starts."""
    from peft import PeftModel

    peft_model: Any = _copy_modules(model, parameters)
    names: list[str] = []
    starts: list[str] = []
    for number, adapter in enumerate(adapters):
        name, config = f"adapter_{number}", _build_peft_config(adapter)
        if not names:
            peft_model = PeftModel(peft_model, config, name)
        else:
            peft_model.add_adapter(name, config)
        _load_tensors(peft_model, name, adapter.folder)
        if adapter.config.get("init_lora_weights") in _SUBTRACTED_LORA_INITS:
            starts.append(f"{name}_start")
            _add_subtracted_start(peft_model, starts[-1], adapter)
        names.append(name)
    if starts and len(adapters) > 1 and any(map(_uses_base_weights, adapters)):
        raise ValueError("one needs the weights from which the start of the other is subtracted")
    return peft_model, names, starts


def _copy_modules(model: Any, parameters: Mapping[str, Parameter]) -> Any:
    """Return a copy of a model without hooks, which shares the given parameters."""
    import torch
    from torch import nn

    with torch.device("meta"):
        module_copy = type(model)(copy.deepcopy(model.config))
    # Quantized weights are integers or floats of 8 bits, are packed, or have other names.
    full_shapes = {
        name: parameter.shape for name, parameter in module_copy.named_parameters(remove_duplicate=False)
    }
    shapes = {
        name: parameter.shape
        for name, parameter in parameters.items()
        if parameter.is_floating_point() and parameter.element_size() > 1
    }
    if quantized := sorted({name for name, _ in full_shapes.items() ^ shapes.items()}):
        raise UserError(
            f"{quantized[0]} of this model is quantized, and adapters are merged into weights only in full "
            "precision; use the model without quantization"
        )
    shared: dict[int, Parameter] = {}  # tied parameters stay tied
    for name, parameter in parameters.items():
        module_name, _, parameter_name = name.rpartition(".")
        copied = shared.setdefault(id(parameter), nn.Parameter(parameter.data, requires_grad=False))
        setattr(module_copy.get_submodule(module_name), parameter_name, copied)
    return module_copy


def _list_config_fields(peft_type: str) -> frozenset[str]:
    """Return the keys that the installed version of PEFT knows for a type of adapter."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    configs: Mapping[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    return frozenset(field.name for field in dataclasses.fields(configs[peft_type]))


def _build_peft_config(adapter: PeftAdapter) -> Any:
    """Return PEFT's configuration object without what matters in training only."""
    from peft import __version__
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    peft_type, settings = adapter.config["peft_type"], describe_adapter_config(adapter.config)
    if unknown := sorted(settings.keys() - _list_config_fields(peft_type)):
        raise UserError(
            f"{adapter.folder} has {unknown[0]} in its {ADAPTER_CONFIG_FILE}, which PEFT {__version__} does "
            "not know; install a newer one: pip install -U peft"
        )
    if peft_type == "LORA":
        settings["init_lora_weights"] = True  # all matrices are read from the file
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**settings, inference_mode=True)


def _load_tensors(peft_model: Any, name: str, folder: Path) -> None:
    """Load the tensors of an adapter; raise unless they are just those that its configuration calls for."""
    from peft import set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from safetensors.torch import load_file

    tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
    if damaged := sorted(key for key, tensor in tensors.items() if not tensor.isfinite().all()):
        raise UserError(
            f"{folder} holds values that are no numbers (NaN or infinite), in "
            f"{damaged[0].removeprefix(PEFT_PREFIX)}: it is damaged; save or obtain it again"
        )
    parameters = dict(peft_model.named_parameters(remove_duplicate=False))
    for key in tensors.keys() & parameters.keys():  # a whole weight; PEFT writes it into the model's own
        parameters[key].data = parameters[key].data.clone()
    try:
        result: Any = set_peft_model_state_dict(peft_model, tensors, adapter_name=name)
    except KeyError as error:  # a whole module that its configuration names is missing
        raise _incomplete_adapter_error(folder, [str(error.args[0])]) from error
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[peft_model.peft_config[name].peft_type]
    missing = [key for key in result.missing_keys if prefix in key and name in key.split(".")]
    if missing:
        raise _incomplete_adapter_error(folder, [key.replace(f".{name}", "") for key in missing])
    if unexpected := sorted(key for key in result.unexpected_keys if not _is_copy(key, tensors)):
        raise UserError(
            f"{folder} holds {len(unexpected)} tensors for which its {ADAPTER_CONFIG_FILE} or this model has "
            f"no place ({unexpected[0].removeprefix(PEFT_PREFIX)}); use the model that it was made for"
        )


def _uses_base_weights(adapter: PeftAdapter) -> bool:
    """Return whether an adapter scales the weights that it is added to, or its file holds some of them."""
    keys = read_tensor_shapes(adapter.folder)
    return bool(adapter.config.get("use_dora")) or any(key.endswith(_BASE_WEIGHT_SUFFIX) for key in keys)


def _add_subtracted_start(peft_model: Any, name: str, adapter: PeftAdapter) -> None:
    """Add an adapter that subtracts the product of the matrices with which the training of another began.

    PEFT writes the difference into the weights, rounded to their precision; here it is merged in float32.

    Args:
        peft_model: whose weights are those of the released model.
        name: of the new adapter.
        adapter: the other one.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    config, init = _build_peft_config(adapter), adapter.config["init_lora_weights"]
    config.bias, config.modules_to_save, config.trainable_token_indices = "none", None, None
    config.use_dora, config.use_bdlora, config.lora_bias = False, None, False
    peft_model.add_adapter(name, config)
    owners = Counter(id(parameter) for _, parameter in peft_model.named_parameters(remove_duplicate=False))
    stored = read_tensor_shapes(adapter.folder)  # PEFT stores the rest of an unembedding with the adapter
    layers: list[Any] = [
        layer
        for module_name, layer in peft_model.named_modules()
        if isinstance(layer, LoraLayer)
        and name in layer.lora_A
        and module_name + _BASE_WEIGHT_SUFFIX not in stored
    ]
    for layer in layers:
        weight = layer.get_base_layer().weight
        if owners[id(weight)] > 1:
            raise UserError(
                f"{adapter.folder} subtracts its start ({init}) from a weight that two modules of this model "
                "share: save the merged model with PEFT, and use -d weights --set path=FOLDER"
            )
        released = weight.data
        weight.data = released.clone()  # changed by PEFT
        if init == "pissa":
            layer.pissa_init(name, init)
        else:
            layer.olora_init(name)
        weight.data = released
        with torch.no_grad():
            layer.lora_B[name].weight.neg_()


def _is_copy(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor of a replaced module or token is in the file twice, as PEFT writes some."""
    import torch

    return (".modules_to_save." in key or ".token_adapter." in key) and any(
        other != key and torch.equal(tensors[other], tensors[key]) for other in tensors
    )


def _incomplete_adapter_error(folder: Path, keys: Sequence[str]) -> UserError:
    """Return the error for an adapter that lacks tensors."""
    return UserError(
        f"{folder} lacks {len(keys)} tensors that its {ADAPTER_CONFIG_FILE} calls for in this model "
        f"({keys[0].removeprefix(PEFT_PREFIX)}); use the model that it was made for, or obtain it again"
    )


def _merge_layer(layer: Any, starts: Sequence[str]) -> None:
    """Merge starts and the active adapters into copies of a layer's own weights, in float32."""
    import torch
    from torch import nn

    module = layer.get_base_layer()
    shared = dict(module.named_parameters(recurse=False))
    for name, parameter in shared.items():
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        setattr(module, name, nn.Parameter(parameter.data.to(dtype, copy=True), requires_grad=False))
    if any(getattr(layer, "lora_bias", {}).values()) and module.bias is None:
        shared["bias"] = nn.Parameter(torch.zeros_like(shared["weight"][:, 0]), requires_grad=False)
        module.bias = nn.Parameter(torch.zeros_like(module.weight[:, 0]), requires_grad=False)
    if starts:
        layer.merge(adapter_names=starts)
        layer.merged_adapters.clear()  # DoRA's norm is that of the weights without the start
    layer.merge()
    for name, parameter in shared.items():
        merged: Tensor = getattr(module, name).data.to(parameter.dtype)
        is_changed = not torch.equal(merged, parameter.data)
        setattr(module, name, nn.Parameter(merged, requires_grad=False) if is_changed else parameter)
