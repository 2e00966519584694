"""Configuration of a model: the class of transformers that loads it, and how its weights are quantized."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from defenses.errors import UserError, describe_library_error, is_out_of_memory

# Libraries whose code computes with quantized weights, for run.json and cache keys.
_QUANTIZATION_LIBRARIES = {
    "bitsandbytes": ("bitsandbytes",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed-tensors",),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
    "quanto": ("optimum-quanto",),
    "auto-round": ("auto-round",),
}
# Types of models in which the tokens of a prompt read later ones, and which have no chat format.
_BIDIRECTIONAL_TYPES = {"paligemma"}
_KERNEL_LIBRARIES = ("kernels", "triton")


def read_config(folder: Path, name: str) -> Any:
    """Return the configuration in a folder, of a model that transformers can load as a language model.

    Args:
        folder: of the model.
        name: of the model, for errors.

    Raises:
        UserError: if it is damaged, or of a kind that cannot be evaluated.
    """
    from transformers import AutoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        quantization = get_quantization_config(config)
        # A method that transformers does not know, it would ignore, and read packed numbers as weights.
        is_known = quantization is None or AutoHfQuantizer.supports_quant_method(quantization)
    except Exception as error:  # a value of the wrong type, an unknown architecture, damaged JSON, …
        raise explain_loading_error(name, None, error) from error
    find_model_class(config, name)
    if quantization is not None and not is_known:
        raise UserError(
            f"{name} is quantized by the method {quantization.get('quant_method')!r}, which this version of "
            "transformers cannot read: update transformers, or use the model in another format"
        )
    return config


def find_model_class(config: Any, name: str) -> Any:
    """Return the automatic class of transformers that loads a language model with this configuration.

    A model that also reads images or sound is loaded as a whole; it reads text as its language part does.

    Args:
        config: of transformers.
        name: of the model, for errors.

    Raises:
        UserError: if there is none.
    """
    import transformers

    problem = f"transformers cannot load {name} as a causal language model: its type, {config.model_type}, is"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{problem} an encoder with a decoder; only decoders that read the prompt are evaluated"
        )
    if config.model_type in _BIDIRECTIONAL_TYPES:
        raise UserError(
            f"{name} ({config.model_type}) reads its prompt in both directions and has no chat format, which "
            "is not supported: use a chat model that reads images, such as smolvlm or llava"
        )
    # The classes for images come first: those for text would drop the weights that read images.
    for loader, mapping in (
        (transformers.AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (transformers.AutoModelForMultimodalLM, transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING),
        (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        if type(config) in mapping:
            return loader
    raise UserError(f"{problem} that of another kind of model")


def get_quantization_config(config: Any) -> dict[str, Any] | None:
    """Return the quantization in a configuration, of the whole model or of its language part."""
    for part in (config, config.get_text_config()):
        quantization = getattr(part, "quantization_config", None)
        if quantization is not None:
            return dict(quantization if isinstance(quantization, dict) else quantization.to_dict())
    return None


def describe_quantization(quantization: dict[str, Any] | None, model: Any) -> dict[str, Any] | None:
    """Return how stored weights are quantized, for run.json and cache keys; None if they are not.

    Args:
        quantization: from the configuration in the folder.
        model: the loaded model; `dequantized` says whether its weights were unpacked while it was loaded.
    """
    if quantization is None:
        return None
    method = _name_method(quantization)
    libraries = (*_QUANTIZATION_LIBRARIES.get(method, ()), *_KERNEL_LIBRARIES)
    return {
        "method": method,
        "settings": {key: value for key, value in quantization.items() if key != "quant_method"},
        "dequantized": getattr(model.config, "quantization_config", None) is None,
        "libraries": {library: version for library in libraries if (version := _find_version(library))},
    }


def explain_loading_error(name: str, quantization: dict[str, Any] | None, error: Exception) -> UserError:
    """Return the error for a model that transformers cannot load.

    Args:
        name: of the model.
        quantization: from its configuration.
        error: of transformers, of a library that it needs, or of safetensors.
    """
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        return UserError(
            f"memory ran out while {name} was loaded: use --dtype bfloat16, --device cpu, or a smaller model"
        )
    reason = describe_library_error(error)
    if quantization is not None:
        return UserError(
            f"{name} is quantized ({_name_method(quantization)}) and cannot be loaded here: {reason}"
        )
    return UserError(f"transformers cannot load {name} as a causal language model: {reason}")


def _name_method(quantization: dict[str, Any]) -> str:
    """Return the name of a method of quantization; old bitsandbytes configurations do not name it."""
    method = quantization.get("quant_method", "bitsandbytes")
    return str(getattr(method, "value", method))


def _find_version(package: str) -> str:
    """Return the version of an installed package; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
