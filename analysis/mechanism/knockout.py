"""Attention knockout: block attention to a defense's own tokens, or to those of images, in a range of layers.

After https://arxiv.org/abs/2304.14767: the effect of an attention edge is measured by removing it. A
defense's own tokens are those of its messages that are not the user's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from analysis.models.image_tokens import is_image_id
from defenses.chats import get_last_user_text
from defenses.contract import Chat

if TYPE_CHECKING:
    from analysis.models.chat_template import ChatTemplate, Prompt
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout

# Positions from which attention is blocked: the response position only, or all positions after the tokens.
ATTENTION_READERS = ("answer", "everything")
# Tokens to which attention is blocked: the defense's own, or those of images.
TOKEN_GROUPS = ("defense", "image")


def find_token_offsets(chat_template: ChatTemplate, prompt: Prompt) -> list[int]:
    """Return where each token begins in the prompt's text, followed by where the last one ends.

    The text describes an image in the place of its first token; its other tokens have no text.
    """
    return [
        len(chat_template.decode_tokens(prompt.ids[:count], prompt.images))
        for count in range(len(prompt.ids) + 1)
    ]


def mask_user_tokens(chat_template: ChatTemplate, prompt: Prompt, chat: Chat) -> list[bool]:
    """Return which tokens belong to the user's text, or to the text that replaced it.

    Args:
        chat_template: chat template that rendered the prompt.
        prompt: prompt that the model reads.
        chat: chat that the user or the attacker sent.
    """
    return _tokens_in_spans(find_token_offsets(chat_template, prompt), _user_text_spans(prompt, chat))


def mask_defense_tokens(chat_template: ChatTemplate, prompt: Prompt, chat: Chat) -> list[bool]:
    """Return which tokens the defense added: those of its messages that are not the user's text.

    Args:
        chat_template: chat template that rendered the prompt.
        prompt: prompt that the model reads.
        chat: chat that the user or the attacker sent.
    """
    sent_texts = {message["content"].strip() for message in chat}
    texts = [*(message["content"].strip() for message in prompt.chat), prompt.prefill.strip()]
    defense_spans, unassigned_text = [], prompt.text
    # Longest first, each text in a place of its own, because a template may change the order of the turns.
    for text in sorted(filter(None, texts), key=len)[::-1]:
        if (start := unassigned_text.find(text)) < 0:
            continue
        stop = start + len(text)
        unassigned_text = unassigned_text[:start] + "\0" * len(text) + unassigned_text[stop:]
        if text not in sent_texts:  # texts in the chat are the user's or the attacker's
            defense_spans.append((start, stop))
    offsets = find_token_offsets(chat_template, prompt)
    defense_mask = _tokens_in_spans(offsets, defense_spans)
    user_mask = _tokens_in_spans(offsets, _user_text_spans(prompt, chat))
    return [in_defense and not in_user for in_defense, in_user in zip(defense_mask, user_mask, strict=True)]


def mask_image_tokens(prompt_ids: Sequence[int]) -> list[bool]:
    """Return which tokens of a prompt are those of images."""
    return [is_image_id(token_id) for token_id in prompt_ids]


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


def _user_text_spans(prompt: Prompt, chat: Chat) -> list[tuple[int, int]]:
    """The span of the user's text in the prompt's text; empty if it is not in there."""
    sent_text, read_text = get_last_user_text(chat).strip(), get_last_user_text(prompt.chat).strip()
    text = sent_text if sent_text in read_text else read_text
    start = prompt.text.rfind(text)
    return [(start, start + len(text))] if start >= 0 and text else []


def _tokens_in_spans(token_offsets: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token overlaps one of the spans."""
    return [
        any(begin < stop and end > start for start, stop in spans) for begin, end in pairwise(token_offsets)
    ]
