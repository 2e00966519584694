"""Removal of the refusal direction from a model's weights (`-m MODEL:abliterated`).

The direction is the difference of the mean activations of harmful and benign training queries, at the last
token of the prompt (https://arxiv.org/abs/2406.11717). Every matrix that writes to the residual stream is
made orthogonal to it, so that no layer can write along the direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analysis.mechanism.components import locate_components
from analysis.mechanism.directions import record_last_token_states
from analysis.models.plain_passes import HALF_PRECISION
from defenses.contract import MeanActivations, Message
from defenses.errors import UserError
from defenses.steering import DirectionAblation

if TYPE_CHECKING:
    from analysis.models.session import ModelSession

DIRECTION_DEPTH = DirectionAblation.depth  # of the layer whose direction is removed
_CHECKED_REQUESTS = ("Hello", "What is the capital of France?", "Write a short poem about rain and wind.")
# Largest share of the residual stream along the direction that is left after the removal, as rounding leaves.
_MAX_LEFT, _MAX_LEFT_HALF_PRECISION = 1e-3, 2e-2


def remove_refusal_direction(session: ModelSession, activations: MeanActivations) -> None:
    """Make all weights that write to the residual stream orthogonal to the refusal direction, in place.

    Args:
        session: the model; its weights are changed.
        activations: mean activations of the unchanged model.

    Raises:
        UserError: if the architecture is unknown, or something else still writes along the direction.
    """
    model = session.loaded_model.model
    layer = int(DIRECTION_DEPTH * len(activations.harmful))
    difference = activations.harmful[layer] - activations.benign[layer]
    if not difference.norm() > 0:
        raise UserError("harmful and benign queries have equal activations, so no direction can be removed")
    direction = difference / difference.norm()
    with torch.no_grad():
        for module in _list_writing_modules(model):
            _remove_direction(module, direction)
    chats = [[Message(role="user", content=text)] for text in _CHECKED_REQUESTS]
    states = record_last_token_states(
        session, [session.chat_template.render_prompt(chat).ids for chat in chats]
    )
    left = (states @ direction).abs().mean(0) / states.norm(dim=-1).mean(0)
    limit = _MAX_LEFT_HALF_PRECISION if model.dtype in HALF_PRECISION else _MAX_LEFT
    if not bool((left < limit).all()):
        raise UserError(
            f"{type(model).__name__} writes along the refusal direction with more than its embeddings, "
            f"attention and MLP ({float(left.max()):.1%} of the stream is left), so :abliterated cannot "
            "remove it; use -d direction_ablation"
        )


def _list_writing_modules(model: Any) -> list[nn.Module]:
    """Return the embeddings and the last matrix of each attention and MLP; the output layer is untied."""
    components = locate_components(model)
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    if unembedding.weight is embedding.weight:
        unembedding.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    adapter = components.architecture_adapter
    modules: list[nn.Module] = [
        module  # of tokens, and of positions
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.embedding_dim == components.width
    ]
    for number, layer in enumerate(components.layers):
        try:
            modules += [layer.output_projection, adapter.get_component(model, f"blocks.{number}.mlp.out")]
        except (AttributeError, ValueError, KeyError) as error:
            raise UserError(
                f"the MLP of layer {number} of {type(model).__name__} has no single matrix that writes its "
                "output, so :abliterated cannot change it; use -d direction_ablation"
            ) from error
    return modules


def _remove_direction(module: Any, direction: Float[Tensor, " width"]) -> None:
    """Make the outputs of an embedding or a linear map orthogonal to a unit vector."""
    weight = module.weight
    unit = direction.to(weight.device)
    # One column per written dimension: rows of an embedding or of a Conv1D, columns of a transposed Linear.
    outputs = (weight.mT if isinstance(module, nn.Linear) else weight).float()
    changed = outputs - torch.outer(outputs @ unit, unit)
    weight.copy_(changed.mT if isinstance(module, nn.Linear) else changed)
    if (bias := getattr(module, "bias", None)) is not None:
        bias.copy_(bias.float() - (bias.float() @ unit) * unit)
