"""Writes tiny models as GGUF files, as llama.cpp's converter does, for the tests of their conversion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import tiny_model, toy_tokenizer

# Families of the tests whose architecture llama.cpp calls otherwise.
_ARCHITECTURES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}


def write_gguf(
    path: Path,
    model: Any = None,
    tokenizer: Any = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    leave_out: str = "nothing",
    parts: int = 1,
    kinds: Mapping[str, int] | None = None,
) -> Path:
    """Write a model and a tokenizer, by default the tiny Llama and the toy tokenizer; return the first file.

    Args:
        path: of the file; of the parts, `name-00001-of-0000N.gguf` beside it.
        model: of transformers.
        tokenizer: byte-level, of transformers.
        metadata: key → value beside the usual ones, or instead of them; None leaves a key out.
        tensors: name → values beside the model's.
        leave_out: tensors whose name contains this are not written.
        parts: number of files.
        kinds: token → kind, where it is not special or normal.
    """
    import gguf

    model = tiny_model() if model is None else model
    tokenizer = toy_tokenizer() if tokenizer is None else tokenizer
    config = model.config
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    values = {**_describe_model(config, architecture), **_describe_tokenizer(config, tokenizer, kinds or {})}
    values |= metadata or {}
    arrays = [(name, array) for name, array in _name_tensors(model, architecture) if leave_out not in name]
    arrays += [(name, np.array(array, np.float32)) for name, array in (tensors or {}).items()]
    each = -(-len(arrays) // parts)
    files = [path] if parts == 1 else []
    files = files or [
        path.with_name(f"{path.stem}-{part + 1:05d}-of-{parts:05d}.gguf") for part in range(parts)
    ]
    for part, file in enumerate(files):
        writer = gguf.GGUFWriter(file, architecture)
        for key, value in values.items():
            if part == 0 and value is not None:
                _add_value(writer, key.replace("ARCH", architecture), value)
        if parts > 1:
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(arrays))
        for name, array in arrays[part * each : (part + 1) * each]:
            writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files[0]


def _describe_model(config: Any, architecture: str) -> dict[str, Any]:
    """Return the settings of a model under llama.cpp's names."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "rope.dimension_count": int(head_size * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    norm = getattr(config, "rms_norm_eps", None)
    values |= (
        {"attention.layer_norm_rms_epsilon": norm}
        if norm
        else {"attention.layer_norm_epsilon": config.norm_epsilon}
    )
    if architecture in ("gemma2", "gemma3", "phi3"):
        values["attention.sliding_window"] = config.sliding_window or 0
    if architecture == "gemma2":
        values["attn_logit_softcapping"] = config.attn_logit_softcapping
        values["final_logit_softcapping"] = config.final_logit_softcapping
    if architecture.endswith("moe"):
        values["expert_count"] = config.num_experts
        values["expert_used_count"] = config.num_experts_per_tok
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    if architecture == "qwen2moe":
        values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return {f"ARCH.{name}": value for name, value in values.items()}


def _describe_tokenizer(config: Any, tokenizer: Any, kinds: Mapping[str, int]) -> dict[str, Any]:
    """Return the vocabulary of a byte-level tokenizer under llama.cpp's names."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    special = set(tokenizer.get_added_vocab())
    default = {token: 3 if token in special or token.startswith("<unused") else 1 for token in tokens}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, default[token]) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def _name_tensors(model: Any, architecture: str) -> list[tuple[str, Any]]:
    """Return the weights of a model under llama.cpp's names and in its layout."""
    import gguf

    config = model.config
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    arrays = []
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            # llama.cpp turns pairs of neighboring dimensions, not halves
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if architecture.startswith("gemma") and "norm" in name:
            array = array + 1
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            half = array.shape[1] // 2
            for part, rows in (("gate_proj", array[:, :half]), ("up_proj", array[:, half:])):
                arrays.append((f"{names.get_name(f'{stem}.{part}')}.weight", rows))
            continue
        if name.endswith("experts.down_proj"):
            arrays.append((f"{names.get_name(name)}.weight", array))
            continue
        if "shared_expert_gate" in name:
            array = array[0]
        arrays.append((names.get_name(name, try_suffixes=(".weight", ".bias")), array))
    return arrays


def _add_value(writer: Any, key: str, value: Any) -> None:
    """Add one key with the type that its value has in Python; numbers of tokens are not negative."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, Sequence) and not isinstance(value, str):
        writer.add_array(key, list(value))
    else:
        add[type(value)](key, value)
