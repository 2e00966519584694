"""Writes a trained PEFT model as an adapter of the released weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defenses.adapters import (
    ADAPTER_MANIFEST_FILE,
    ADAPTER_WEIGHTS_FILE,
    LORA_SUFFIXES,
    PEFT_PREFIX,
    Adapter,
    pair_lora_matrices,
)


def write_adapter(
    folder: Path, peft_model: Any, base_adapter: Adapter | None, manifest: dict[str, Any]
) -> None:
    """Write a trained PEFT model as an adapter of the released weights.

    Args:
        folder: output folder.
        peft_model: PEFT model with one LoRA adapter.
        base_adapter: adapter of the state from which training started. Its matrices and the new ones are
            concatenated into one adapter.
        manifest: manifest without `sha256`, which is added.
    """
    import torch
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    config = peft_model.peft_config["default"]
    scale = config.lora_alpha / config.r
    pairs_by_name = {
        name: [pair] for name, pair in pair_lora_matrices(get_peft_model_state_dict(peft_model)).items()
    }
    rank = config.r
    if base_adapter is not None:
        base_matrices = base_adapter.load_matrices()
        rank += next(iter(base_matrices.values()))[0].shape[0]
        for name, (down, up) in base_matrices.items():
            pairs_by_name.setdefault(name, []).insert(
                0, (down, up * (base_adapter.compute_scale(name, len(down)) / scale))
            )
    tensors = {}
    for name, pairs in pairs_by_name.items():
        down = torch.cat([pair[0] for pair in pairs])
        up = torch.cat([pair[1] for pair in pairs], dim=1)
        padding = rank - len(down)  # positive if only one of the two adapters changes this parameter
        key = PEFT_PREFIX + name.removesuffix(".weight")
        # Half precision: 11 bits suffice for a small change, and the file is the definition of the weights.
        tensors[key + LORA_SUFFIXES[0]] = (
            torch.nn.functional.pad(down, (0, 0, 0, padding)).half().contiguous()
        )
        tensors[key + LORA_SUFFIXES[1]] = torch.nn.functional.pad(up, (0, padding)).half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=sorted({name.split(".")[-2] for name in pairs_by_name}),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=manifest["base"]["id"],
    ).save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    digest = hashlib.sha256((folder / ADAPTER_WEIGHTS_FILE).read_bytes()).hexdigest()
    write_weights_manifest(folder, {**manifest, "sha256": digest})


def write_weights_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of trained weights into their folder."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / ADAPTER_MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
