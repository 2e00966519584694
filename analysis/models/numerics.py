"""Numerical soundness of a loaded model: whether its logits are finite numbers, and if not, why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession, check_token_ids
from defenses.errors import UserError, describe_library_error, is_out_of_memory


def check_short_prompt(session: ModelSession) -> None:
    """Check that the model reads a short text, in one plain forward pass, with finite weights and logits.

    Weights are checked apart from the logits, because attention on a CPU turns a row of NaN into zeros. Of a
    model without weights, only the tokens are checked.

    Args:
        session: the model.

    Raises:
        UserError: if a token has no embedding, the model needs more than text, or weights or logits are not
            finite.
    """
    loaded_model, model = session.loaded_model, session.loaded_model.model
    prompt = session.chat_template.render_prompt([{"role": "user", "content": "Hello"}])
    check_token_ids(loaded_model, [prompt.ids])
    if model.device.type == "meta":
        return
    ids = torch.tensor([list(prompt.ids)], device=model.device)
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{loaded_model.name} fails on a short prompt of text ({describe_library_error(error)}); a model "
            "that needs images or other inputs beside it cannot be evaluated"
        ) from error
    _check_weights_finite(loaded_model)
    check_finite(loaded_model, logits)


def check_finite(loaded_model: LoadedModel, values: Tensor) -> None:
    """Raise unless logits, or values computed from them, are numbers: neither NaN nor positive infinity.

    Minus infinity is allowed: some models exclude tokens with it.

    Args:
        loaded_model: the model that computed them.
        values: of any shape.

    Raises:
        UserError: with the likely cause.
    """
    if (values < torch.inf).all():  # NaN is not below infinity
        return
    _check_weights_finite(loaded_model)
    dtype = str(loaded_model.model.dtype).removeprefix("torch.")
    subject = f"{loaded_model.name} computes logits that are no numbers (NaN or infinite)"
    if _has_float16(loaded_model.model):
        raise UserError(
            f"{subject}: activations probably exceed the range of float16; use --dtype bfloat16 or float32"
        )
    raise UserError(
        f"{subject}, although all its weights are finite: activations probably exceed the range of {dtype}; "
        "use --dtype float32, or milder settings of the defense"
    )


def _check_weights_finite(loaded_model: LoadedModel) -> None:
    """Raise UserError if a weight holds NaN or infinite values, with the likely cause."""
    name, tensor = _find_nonfinite_weight(loaded_model.model) or ("", None)
    if tensor is None:
        return
    subject = f"{loaded_model.name} computes with values that are no numbers (NaN or infinite)"
    if _has_float16(loaded_model.model) and not tensor.isnan().any():
        raise UserError(
            f"{subject}: its weight {name} exceeds the range of float16; use --dtype bfloat16 or float32"
        )
    raise UserError(
        f"{subject}: its weight {name} holds such values, so the checkpoint (or an adapter) is damaged; "
        "save or download it again"
    )


def _has_float16(model: Any) -> bool:
    return torch.float16 in {parameter.dtype for parameter in model.parameters()}


def _find_nonfinite_weight(model: Any) -> tuple[str, Tensor] | None:
    """Return the first weight or buffer of a model that holds NaN or infinite values, with its name."""
    for named_tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named_tensors:
            # Masks and excluded tokens of some models are buffers with minus infinity.
            if tensor.is_floating_point() and not tensor.is_meta:
                values = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
                if values.sum(dtype=torch.float32).isfinite():  # one pass, and no copy
                    continue
                if not (values.abs() < torch.inf).all() and not (values == -torch.inf).any():
                    return name, values
    return None
