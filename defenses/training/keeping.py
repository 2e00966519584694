"""Trained weights as files: what PEFT has trained becomes an adapter of the released weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defenses.adapters import LORA, MANIFEST, WEIGHTS, WRAPPED, Adapter, pairs


def write(folder: Path, tuned: Any, under: Adapter | None, manifest: dict[str, Any]) -> None:
    """Write what PEFT has trained as an adapter of the released weights.

    Args:
        folder: where to.
        tuned: a PEFT model with one LoRA adapter.
        under: the state that training started from; its matrices and the new ones become one adapter.
        manifest: without `sha256`, which is added.
    """
    import torch
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    config = tuned.peft_config["default"]
    scale = config.lora_alpha / config.r
    stacks = {name: [pair] for name, pair in pairs(get_peft_model_state_dict(tuned)).items()}
    rank = config.r
    if under is not None:
        beneath = under.matrices()
        rank += next(iter(beneath.values()))[0].shape[0]
        for name, (down, up) in beneath.items():
            stacks.setdefault(name, []).insert(0, (down, up * (under.scale(name, len(down)) / scale)))
    tensors = {}
    for name, stack in stacks.items():
        down = torch.cat([pair[0] for pair in stack])
        up = torch.cat([pair[1] for pair in stack], dim=1)
        gap = rank - len(down)  # where only one of the two changes this matrix
        key = WRAPPED + name.removesuffix(".weight")
        # Half precision: 11 bits of a small change are enough, and the file is what defines the weights.
        tensors[key + LORA[0]] = torch.nn.functional.pad(down, (0, 0, 0, gap)).half().contiguous()
        tensors[key + LORA[1]] = torch.nn.functional.pad(up, (0, gap)).half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=sorted({name.split(".")[-2] for name in stacks}),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=manifest["base"]["id"],
    ).save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    write_manifest(folder, {**manifest, "sha256": digest})


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write what is known about trained weights into their folder."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
