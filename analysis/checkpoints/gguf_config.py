"""GGUF metadata → configuration of transformers, where transformers does not read it.

What is not understood is refused by name. The rules are those of llama.cpp
(https://github.com/ggml-org/llama.cpp, src/llama-model.cpp, and the rotation of ggml).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.checkpoints.gguf_files import GgufModel

# Tensors that become settings of the rotation instead of weights.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Key behind the architecture's name → attributes; the first that a configuration has is set.
_ATTRIBUTES = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}
# Key → the value without effect, where a configuration has no such setting.
_NEUTRAL_VALUES: dict[str, Any] = {
    "attention.causal": True,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "attention.output_scale": 1.0,
    "attention.temperature_scale": 1.0,
    "expert_weights_scale": 1.0,
    "expert_gating_func": 1,  # softmax
}
# Not part of the computation of a causal language model.
_DESCRIPTIVE_KEYS = {"tensor_data_layout", "pooling_type"}
# Architectures whose configuration transformers builds whole, and the keys that it reads.
_QWEN35_KEYS = (
    "context_length embedding_length attention.head_count attention.head_count_kv attention.key_length "
    "attention.layer_norm_rms_epsilon full_attention_interval ssm.conv_kernel ssm.state_size ssm.group_count "
    "ssm.time_step_rank ssm.inner_size nextn_predict_layers block_count feed_forward_length "
    "rope.dimension_sections rope.freq_base rope.dimension_count"
)
_LFM2_KEYS = (
    "context_length embedding_length feed_forward_length block_count attention.head_count "
    "attention.head_count_kv attention.layer_norm_rms_epsilon shortconv.l_cache rope.freq_base vocab_size"
)
_BUILT_BY_TRANSFORMERS = {
    "qwen35": frozenset(_QWEN35_KEYS.split()),
    "qwen35moe": frozenset(
        f"{_QWEN35_KEYS} expert_feed_forward_length expert_shared_feed_forward_length expert_count "
        "expert_used_count".split()
    ),
    "lfm2": frozenset(_LFM2_KEYS.split()),
}
# Architectures whose rotation is converted here; of some, transformers can turn only a part of each head.
_PARTLY_ROTATED = ("phi3", "stablelm", "nemotron")
_ROTATED = (
    *_PARTLY_ROTATED,
    *("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma2", "gemma3", "starcoder2", "falcon"),
)
_ROPE_KEYS = frozenset(
    f"rope.{name}"
    for name in (
        *("freq_base", "scale_linear", "scaling.factor", "scaling.attn_factor", "scaling.finetuned"),
        *("scaling.original_context_length", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow"),
    )
)
_SLIDING_ARCHITECTURES = ("phi3", "gemma2", "gemma3")
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")


@dataclass
class ConfigChanges:
    """What a GGUF says beyond the configuration that transformers reads from it.

    Attributes:
        values: attribute of the configuration → value.
        understood: metadata keys that the configuration now follows.
        ignored: metadata keys without influence on the computation.
    """

    values: dict[str, Any] = field(default_factory=dict)
    understood: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def read_config_changes(model: GgufModel, config: Any) -> ConfigChanges:
    """Return the settings of a GGUF that transformers' configuration of it lacks.

    Args:
        model: the file.
        config: as `AutoConfig.from_pretrained(gguf_file=...)` reads it.

    Raises:
        UserError: if a key that may change the computation is not understood.
    """
    changes = ConfigChanges()
    settings: dict[str, Any] = {}
    prefix = f"{model.architecture}."
    for key, value in model.metadata.items():
        if key.startswith(prefix):
            settings[key.removeprefix(prefix)] = _simplify_list(value)
        elif key == "general.architecture":
            changes.understood.append(key)
        elif not key.startswith(("tokenizer.", "GGUF.")):  # tokenizers have a module of their own
            changes.ignored.append(key)
    _check_required_keys(model, settings)
    for name, value in settings.items():
        _read_setting(model, config, settings, name, value, changes)
    if model.architecture not in _BUILT_BY_TRANSFORMERS:
        _add_derived_settings(model, config, settings, changes)
        if model.architecture in _ROTATED:
            _add_rope_parameters(model, config, settings, changes)
    changes.understood += [name for name in ROPE_TENSORS if name in model.tensors]
    return changes


def _check_required_keys(model: GgufModel, settings: dict[str, Any]) -> None:
    """Raise unless a file has the keys that llama.cpp insists on; transformers would use its own defaults."""
    required: list[tuple[str, ...]] = [("context_length",), ("embedding_length",), ("block_count",)]
    if model.architecture in _ROTATED:
        required += [("attention.head_count",), _EPSILONS]
    if settings.get("expert_count"):
        required.append(("expert_used_count",))
    for names in required:
        if not any(name in settings for name in names):
            raise UserError(
                f"{model.paths[0]} lacks {model.architecture}.{names[0]}, without which llama.cpp does not "
                "load it: download the file again, or use the model's folder or hub id"
            )


def find_corrections(model: GgufModel) -> dict[str, int]:
    """Return the metadata keys that transformers has to find in another form, with the number for each.

    A list that repeats one number says no more than the number. Without a number of key heads, transformers
    does not undo llama.cpp's order of the query and key weights.
    """
    if model.architecture not in _ROTATED:
        return {}
    prefix = f"{model.architecture}."
    settings = {key: value for key, value in model.metadata.items() if key.startswith(prefix)}
    corrections = {
        key: _simplify_list(value)
        for key, value in settings.items()
        if isinstance(value, list) and isinstance(_simplify_list(value), int)
    }
    n_heads, n_key_heads = f"{prefix}attention.head_count", f"{prefix}attention.head_count_kv"
    if n_heads in settings and n_key_heads not in settings:
        corrections[n_key_heads] = _simplify_list(settings[n_heads])
    return corrections


def apply_config_changes(config: Any, changes: ConfigChanges) -> Any:
    """Return a new configuration with the changes, checked by its own class."""
    values = config.to_dict()
    values.pop("quantization_config", None)
    return type(config).from_dict(values | changes.values) if changes.values else config


def _read_setting(
    model: GgufModel, config: Any, settings: dict[str, Any], name: str, value: Any, changes: ConfigChanges
) -> None:
    """Put one key of the architecture into the changes, or raise."""
    key = f"{model.architecture}.{name}"
    is_built = model.architecture in _BUILT_BY_TRANSFORMERS
    attribute = next((item for item in _ATTRIBUTES.get(name, ()) if hasattr(config, item)), None)
    if is_built and name in _BUILT_BY_TRANSFORMERS[model.architecture]:
        pass
    elif name.startswith("rope.") and model.architecture in _ROTATED:
        _check_rope_key(model, config, name, value)
    elif _is_default(model, config, settings, name, value):
        pass
    elif name == "attention.sliding_window" and model.architecture in _SLIDING_ARCHITECTURES:
        if value or model.architecture == "phi3":  # Gemma's layers say whether they have a window
            changes.values["sliding_window"] = value or None
    elif name == "attention.sliding_window_pattern" and getattr(config, "layer_types", None):
        changes.values["layer_types"] = _read_layer_types(value, config.num_hidden_layers)
    elif attribute and not isinstance(value, list) and not is_built:
        if getattr(config, attribute) != value:
            changes.values[attribute] = value
    elif not isinstance(value, list) and _is_read_by_transformers(model.architecture, name):
        pass
    elif (
        name in _DESCRIPTIVE_KEYS
        or value == _NEUTRAL_VALUES.get(name)
        or (not value and name != "attention.causal")  # zero, false and nothing mean "off"
    ):
        changes.ignored.append(key)
        return
    else:
        shown = f"{value:g}" if isinstance(value, float) else str(value)[:40]
        raise UserError(
            f"{model.paths[0]} says {key} = {shown}, which the conversion does not understand, so the model "
            "could compute something else than in llama.cpp: use the model's folder or hub id"
        )
    changes.understood.append(key)


def _is_default(model: GgufModel, config: Any, settings: dict[str, Any], name: str, value: Any) -> bool:
    """Whether a key says what holds without it."""
    head_size = _get_stated_head_size(model, config)
    return {
        "attention.key_length": value == _get_head_size(config),
        "attention.value_length": value in (_get_head_size(config), settings.get("attention.key_length")),
        "attention.scale": isinstance(value, float) and math.isclose(value, head_size**-0.5, rel_tol=1e-4),
        "attention.sliding_window": isinstance(value, int)
        and value >= settings.get("context_length", math.inf),
        "use_parallel_residual": value == getattr(config, "use_parallel_residual", None),
    }.get(name, False)


def _add_derived_settings(
    model: GgufModel, config: Any, settings: dict[str, Any], changes: ConfigChanges
) -> None:
    """Add settings that llama.cpp derives from other settings, or from which tensors there are."""
    architecture, values = model.architecture, changes.values
    # transformers takes Falcon and Bloom for tied even where the file holds an output matrix of its own.
    values["tie_word_embeddings"] = "output.weight" not in model.tensors
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        values[f"{role}_token_id"] = model.metadata.get(f"tokenizer.ggml.{name}_token_id")
    head_size = values.get("head_dim", _get_head_size(config))
    if architecture == "falcon" and settings.get("attention.head_count_kv") != 1:
        raise UserError(
            f"{model.paths[0]} is a Falcon with several groups of keys, whose order of weights transformers "
            "does not undo: use the model's folder or hub id"
        )
    if architecture in ("gemma2", "gemma3"):
        is_27b = settings.get("block_count") == {"gemma2": 46, "gemma3": 62}[architecture]
        n_heads = settings["attention.head_count"]
        values["query_pre_attn_scalar"] = settings["embedding_length"] // n_heads if is_27b else head_size
    if architecture == "gemma3" and not settings.get("attention.sliding_window"):
        values["layer_types"] = ["full_attention"] * config.num_hidden_layers
    if architecture == "llama":
        if settings.get("expert_count"):
            raise UserError(
                f"{model.paths[0]} is a mixture of experts of the architecture llama (Mixtral), which "
                "transformers does not read from a GGUF: use the model's folder or hub id"
            )
        values["attention_bias"] = "blk.0.attn_q.bias" in model.tensors
        values["mlp_bias"] = "blk.0.ffn_up.bias" in model.tensors
        # transformers takes a file of the name "mistral" for that class, with its default window.
        if hasattr(config, "sliding_window"):
            values.setdefault("sliding_window", None)
    if architecture == "qwen2moe" and "expert_feed_forward_length" not in settings:
        values["moe_intermediate_size"] = settings["feed_forward_length"] // settings["expert_used_count"]


def _add_rope_parameters(
    model: GgufModel, config: Any, settings: dict[str, Any], changes: ConfigChanges
) -> None:
    """Add the rotation of queries and keys by their position, as llama.cpp computes it."""
    head_size = changes.values.get("head_dim", _get_head_size(config))
    n_rotated = settings.get("rope.dimension_count", head_size)
    context = settings.get("context_length", config.max_position_embeddings)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": settings.get("rope.freq_base", 10000.0)}
    if model.architecture in _PARTLY_ROTATED:
        rope["partial_rotary_factor"] = n_rotated / head_size
    kind = settings.get("rope.scaling.type", "linear")  # llama.cpp's default; nothing without a factor
    factor = settings.get("rope.scaling.factor") or settings.get("rope.scale_linear") or 1.0
    factor = 1.0 if kind == "none" else float(factor)
    attention_factor = float(settings.get("rope.scaling.attn_factor", 1.0))
    original = settings.get("rope.scaling.original_context_length") or context
    n_factors = sum(f"rope_factors_{name}.weight" in model.tensors for name in ("long", "short"))
    if "rope_freqs.weight" in model.tensors:
        if kind in ("yarn", "longrope"):
            _refuse_rope(model, f"rope.scaling.type {kind} beside rope_freqs.weight")
        factors = [factor * value for value in model.read_tensor("rope_freqs.weight")]
        rope |= _scale_each_frequency(factors, attention_factor, context)
    elif kind == "longrope" or n_factors:
        if n_factors < 2 or factor != 1.0:
            _refuse_rope(model, "rope.scaling.type longrope, with another factor or without its two tensors")
        rope |= {
            "rope_type": "longrope",
            "short_factor": model.read_tensor("rope_factors_short.weight"),
            "long_factor": model.read_tensor("rope_factors_long.weight"),
            "attention_factor": attention_factor,
            "original_max_position_embeddings": original,
        }
    elif kind == "yarn" and factor != 1.0:
        if model.architecture == "phi3":
            _refuse_rope(model, "rope.scaling.type yarn")
        attention_factor *= 0.1 * math.log(max(factor, 1.0)) + 1.0
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": float(settings.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(settings.get("rope.scaling.yarn_beta_slow", 1.0)),
            "attention_factor": attention_factor,
        }
    elif attention_factor != 1.0:
        rope |= _scale_each_frequency([factor] * (n_rotated // 2), attention_factor, context)
    elif factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    if model.architecture == "gemma3":  # layers with a sliding window turn by a base of their own, unscaled
        local_base = settings.get("rope.freq_base_swa", 10000.0)
        local = {"rope_type": "default", "rope_theta": local_base}
        changes.values["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        return
    changes.values["rope_parameters"] = rope
    if hasattr(config, "original_max_position_embeddings"):  # Phi-3's configuration has it a second time
        changes.values["original_max_position_embeddings"] = rope.get(
            "original_max_position_embeddings", context
        )


def _scale_each_frequency(factors: list[float], attention_factor: float, context: int) -> dict[str, Any]:
    """Return the rotation with a divisor for each frequency, as "longrope" that never changes its list."""
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": attention_factor,
        "original_max_position_embeddings": context,
    }


def _check_rope_key(model: GgufModel, config: Any, name: str, value: Any) -> None:
    """Check that a key of the rotation is one that `_add_rope_parameters` follows, or without effect."""
    is_followed = (
        name in _ROPE_KEYS
        or (name == "rope.scaling.type" and value in ("none", "linear", "yarn", "longrope"))
        or (name == "rope.freq_base_swa" and model.architecture == "gemma3")
        or (name in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor") and value in (1, -1))
        or _is_read_by_transformers(model.architecture, name)
    )
    if name == "rope.dimension_count":
        is_followed = model.architecture in _PARTLY_ROTATED or value == _get_stated_head_size(model, config)
    if not (is_followed or not value):
        _refuse_rope(model, f"{name} = {value}")


def _refuse_rope(model: GgufModel, what: str) -> None:
    """Raise the error of a rotation that cannot be converted."""
    raise UserError(
        f"{model.paths[0]} turns positions by {what}, which the conversion does not understand: use the "
        "model's folder or hub id"
    )


def _get_head_size(config: Any) -> int:
    """Return the size of an attention head of a configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _get_stated_head_size(model: GgufModel, config: Any) -> int:
    """Return the size of an attention head as llama.cpp reads it."""
    stated = model.metadata.get(f"{model.architecture}.attention.key_length")
    return int(stated or config.hidden_size // config.num_attention_heads)


def _read_layer_types(pattern: Any, n_layers: int) -> list[str]:
    """Return the kind of each layer: every n-th has full attention, or a flag per layer says "sliding"."""
    is_sliding = (
        [bool(flag) for flag in pattern]
        if isinstance(pattern, list)
        else [bool((layer + 1) % pattern) for layer in range(n_layers)]
    )
    return ["sliding_attention" if flag else "full_attention" for flag in is_sliding]


def _is_read_by_transformers(architecture: str, name: str) -> bool:
    """Whether transformers' own table maps a key of this architecture to a setting."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    spellings = {
        "qwen2moe": "qwen2_moe",
        "qwen3moe": "qwen3_moe",
        "gpt-oss": "gpt_oss",
        "minimax-m2": "minimax_m2",
    }
    table: Any = GGUF_CONFIG_MAPPING
    return table.get(spellings.get(architecture, architecture), {}).get(name) is not None


def _simplify_list(value: Any) -> Any:
    """Return the one value of a list that repeats it, as for layers that are alike; else the value."""
    is_uniform = isinstance(value, list) and len(value) > 1 and all(item == value[0] for item in value)
    return value[0] if is_uniform else value
