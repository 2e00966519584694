"""Writes a trained PEFT model as an adapter of the released weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defenses.adapter_merge import ADAPTER_WEIGHTS_FILE, PEFT_PREFIX, read_tensor_shapes
from defenses.adapters import ADAPTER_MANIFEST_FILE, Adapter
from defenses.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# PEFT writes the matrices A and B of a module as `module name + suffix`.
_LORA_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
# Settings of plain adapters: the change of each of their modules is alpha / rank times B A.
_PLAIN_SETTINGS = frozenset(
    (
        *("r", "lora_alpha", "init_lora_weights", "fan_in_fan_out"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    )
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
    from safetensors.torch import load_file, save_file

    config = peft_model.peft_config["default"]
    scale = config.lora_alpha / config.r
    matrices = _pair_lora_matrices(get_peft_model_state_dict(peft_model))
    pairs_by_name = {name: [pair] for name, pair in matrices.items()}
    rank = config.r
    if base_adapter is not None:
        check_can_continue(base_adapter)
        base_scale = base_adapter.config["lora_alpha"] / base_adapter.config["r"]
        rank += base_adapter.config["r"]
        base_tensors = load_file(base_adapter.folder / ADAPTER_WEIGHTS_FILE)
        for name, (down, up) in _pair_lora_matrices(base_tensors).items():
            pairs_by_name.setdefault(name, []).insert(0, (down, up * (base_scale / scale)))
    tensors = {}
    for name, pairs in pairs_by_name.items():
        down = torch.cat([pair[0] for pair in pairs])
        up = torch.cat([pair[1] for pair in pairs], dim=1)
        padding = rank - len(down)  # positive if only one of the two adapters changes this parameter
        # Half precision: 11 bits suffice for a small change, and the file is the definition of the weights.
        tensors[name + _LORA_SUFFIXES[0]] = (
            torch.nn.functional.pad(down, (0, 0, 0, padding)).half().contiguous()
        )
        tensors[name + _LORA_SUFFIXES[1]] = torch.nn.functional.pad(up, (0, padding)).half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    # Short names, unless they would also stand for modules that are not changed.
    targets = {name.split(".")[-1] for name in pairs_by_name}
    if any(
        name.split(".")[-1] in targets and name not in pairs_by_name for name, _ in peft_model.named_modules()
    ):
        targets = {name.removeprefix(PEFT_PREFIX) for name in pairs_by_name}
    LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=manifest["base"]["id"],
    ).save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    digest = hashlib.sha256((folder / ADAPTER_WEIGHTS_FILE).read_bytes()).hexdigest()
    write_weights_manifest(folder, {**manifest, "sha256": digest})


def check_can_continue(adapter: Adapter) -> None:
    """Raise UserError unless training can start from an adapter's state, for which it must be plain LoRA."""
    other_tensors = [key for key in read_tensor_shapes(adapter.folder) if not key.endswith(_LORA_SUFFIXES)]
    if others := sorted(adapter.config.keys() - _PLAIN_SETTINGS) + other_tensors:
        raise UserError(
            f"training can start from a plain LoRA adapter only, but {adapter.folder} has {others[0]}: save "
            "the merged model, and start from that"
        )


def write_weights_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of trained weights into their folder."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / ADAPTER_MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def _pair_lora_matrices(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (rank x in) and B (out x rank), float32 on the CPU, by PEFT's name of the module."""
    names = [key.removesuffix(_LORA_SUFFIXES[0]) for key in tensors if key.endswith(_LORA_SUFFIXES[0])]
    pairs = {
        name: [tensors[name + suffix].detach().float().cpu() for suffix in _LORA_SUFFIXES] for name in names
    }
    return {name: (down, up) for name, (down, up) in pairs.items()}
