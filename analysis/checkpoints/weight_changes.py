"""Changes of a model's weights that need no training: `-m MODEL:int4` and the like.

They are attacks on the weights, or what people do to them before they deploy a model: rounding
(`int8`, `int4`), and removal of the refusal direction (`abliterated`, in `analysis.mechanism.abliteration`,
because the direction follows from the model's activations).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from defenses.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

ABLITERATED = "abliterated"
_ROUNDED_BITS = {"int8": 8, "int4": 4}
WEIGHT_CHANGES = (ABLITERATED, *_ROUNDED_BITS)  # names, as in `-m MODEL:NAME`
GROUP_SIZE = 128  # weights of one output that share a scale, as is usual where models are quantized


def split_weight_change(name: str) -> tuple[str, str]:
    """Return a model's name without a change of its weights, and the change; empty if it has none.

    >>> split_weight_change("smollm2:aligned:int4"), split_weight_change("smollm2:aligned")
    (('smollm2:aligned', 'int4'), ('smollm2:aligned', ''))
    """
    root, colon, last = name.rpartition(":")
    return (root, last) if colon and root and last in WEIGHT_CHANGES else (name, "")


def round_weights(model: Any, change: str) -> None:
    """Round the matrices of a model's blocks in place, as a quantized model would compute with them.

    Every group of `GROUP_SIZE` weights of one output is rounded to the nearest of 2^bits values that are
    equally spaced between its smallest and its largest weight, zero included. Embeddings, norms, and the
    output layer stay as they are.

    Args:
        model: transformers model in a floating-point type; not quantized.
        change: `int8` or `int4`.

    Raises:
        UserError: if blocks hold weights that are no plain matrices, such as fused experts.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    matrices: dict[int, Any] = {}  # by the identity of their weight: lists of blocks may hold lists
    for list_name, blocks in model.get_decoder().named_modules():  # the language part
        if not isinstance(blocks, nn.ModuleList):
            continue
        for name, parameter in blocks.named_parameters(prefix=list_name):
            if parameter.ndim > 2:
                raise UserError(
                    f"{name} is no plain matrix, so that :{change} does not know which weights share a "
                    "scale; use a quantized checkpoint of this model"
                )
        matrices |= {
            id(part.weight): part for part in blocks.modules() if isinstance(part, (nn.Linear, Conv1D))
        }
    with torch.no_grad():
        for module in matrices.values():
            weight = module.weight.mT if isinstance(module, Conv1D) else module.weight
            weight.copy_(_round_groups(weight.float(), _ROUNDED_BITS[change]))


def _round_groups(weight: Float[Tensor, "outputs inputs"], bits: int) -> Float[Tensor, "outputs inputs"]:
    """Return a matrix with the weights of each output rounded in groups of inputs."""
    import torch

    rounded = []
    for group in weight.split(GROUP_SIZE, dim=1):
        low = group.amin(1, keepdim=True).clamp_max(0)
        high = group.amax(1, keepdim=True).clamp_min(0)
        step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(weight.dtype).tiny)
        zero = (-low / step).round()  # an integer, so that a weight of zero stays zero
        levels = ((group / step).round() + zero).clamp(0, 2**bits - 1)
        rounded.append((levels - zero) * step)
    return torch.cat(rounded, 1)
