"""Attention knockout: block attention to a defense's own tokens, or to those of images, in a range of layers.

After https://arxiv.org/abs/2304.14767: the effect of an attention edge is measured by removing it. A
defense's own tokens are those of its messages that are not the user's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout

# Positions from which attention is blocked: the response position only, or all positions after the tokens.
ATTENTION_READERS = ("answer", "everything")
# Tokens to which attention is blocked: the defense's own, or those of images.
TOKEN_GROUPS = ("defense", "image")


def compute_knockout_margin(
    session: ModelSession,
    prompt_ids: Sequence[int],
    hidden_tokens: Sequence[bool],
    layers: range,
    reader: str,
    readout: Readout,
) -> float:
    """Return the margin of a prompt with attention to some of its tokens blocked, in nats.

    Args:
        session: the model, with or without a defense applied.
        prompt_ids: token ids of the prompt.
        hidden_tokens: whether attention to each token is blocked.
        layers: layers in which attention is blocked.
        reader: positions from which attention is blocked, one of `ATTENTION_READERS`.
        readout: readout that defines the margin.
    """
    blocked_edges = torch.tensor(hidden_tokens)[None].expand(len(prompt_ids), -1).clone()
    if reader == "answer":
        blocked_edges[:-1] = False
    else:
        blocked_edges[torch.tensor(hidden_tokens)] = False  # hidden tokens still attend to each other
    blocked_edges.fill_diagonal_(False)  # every token attends to itself
    with torch.inference_mode(), knock_out_attention(session.loaded_model.model, layers, blocked_edges):
        ((_, logits),) = session.engine.iterate_logits([prompt_ids], [1], share_prefix=False)
    return float(readout.compute_margins(logits)[0, 0])


@contextmanager
def knock_out_attention(
    model: Any, layers: range, blocked_edges: Bool[Tensor, "tokens tokens"]
) -> Iterator[None]:
    """Block attention edges of a single prompt within a context.

    Args:
        model: with `sdpa` attention; the part that reads images is left as it is.
        layers: layers in which the edges are blocked.
        blocked_edges: whether the token of the row cannot attend to the token of the column.
    """
    original_attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    language_modules = set(model.get_decoder().modules())

    def attend(
        module: Any,
        query: Float[Tensor, "1 heads tokens size"],
        key: Float[Tensor, "1 groups tokens size"],
        value: Float[Tensor, "1 groups tokens width"],
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        is_self_attention = key.shape[2] == query.shape[2]  # not cross-attention to images
        if module in language_modules and is_self_attention and module.layer_idx in layers:
            allowed = ~blocked_edges.to(query.device)
            if attention_mask is None:
                attention_mask = (allowed & torch.ones_like(allowed).tril())[None, None]
            elif attention_mask.dtype == torch.bool:
                attention_mask = attention_mask & allowed
            else:
                attention_mask = attention_mask.masked_fill(~allowed, torch.finfo(attention_mask.dtype).min)
        return original_attention(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original_attention


def describe_unsupported_images(model: Any) -> str:
    """Return why attention to the tokens of images cannot be blocked; empty if it can."""
    if getattr(model.image_reader, "reads_by_cross_attention", False):
        return f"{type(model).__name__} reads images by cross-attention, not from tokens of the prompt"
    return ""


def describe_unsupported_attention(model: Any) -> str:
    """Return why attention of a model cannot be blocked; empty if it can."""
    kind = model.config.get_text_config()._attn_implementation
    if kind == "sdpa":
        return ""
    return f"{type(model).__name__} uses {kind} attention, and attention knockout needs sdpa"
