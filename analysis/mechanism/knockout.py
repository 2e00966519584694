"""Causes: attention to a defense's own tokens is cut in some layers (attention knockout).

After https://arxiv.org/abs/2304.14767: what an edge of attention carries is seen by taking the edge away.
Which tokens are the defense's own shows in the chat: they are in its messages, and not in the user's words.
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

from defenses.chats import get_last_user_text
from defenses.contract import Chat

if TYPE_CHECKING:
    from analysis.models.chat_template import ChatTemplate, Prompt
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout

ATTENTION_READERS = ("answer", "everything")


def find_token_offsets(chat_template: ChatTemplate, prompt: Prompt) -> list[int]:
    """Return where each token begins in a prompt's text, and where the last one ends."""
    return [len(chat_template.decode_tokens(prompt.ids[:count])) for count in range(len(prompt.ids) + 1)]


def mask_user_tokens(chat_template: ChatTemplate, prompt: Prompt, chat: Chat) -> list[bool]:
    """Return which tokens are the user's words; where they were reworded, what stands in their place.

    Args:
        chat_template: that made the prompt.
        prompt: as the model reads it.
        chat: the chat as the user, or the attacker, sent it.
    """
    return _tokens_in_spans(find_token_offsets(chat_template, prompt), _user_text_spans(prompt, chat))


def mask_defense_tokens(chat_template: ChatTemplate, prompt: Prompt, chat: Chat) -> list[bool]:
    """Return which tokens are the defense's own: what its messages say beside the user's words.

    Args:
        chat_template: that made the prompt.
        prompt: as the model reads it.
        chat: the chat as the user, or the attacker, sent it.
    """
    sent = {message["content"].strip() for message in chat}
    texts = [*(message["content"].strip() for message in prompt.chat), prompt.prefill.strip()]
    spans, rest = [], prompt.text
    # The longest first, each where no other is: a template may put turns in another order.
    for text in sorted(filter(None, texts), key=len)[::-1]:
        if (begin := rest.find(text)) < 0:
            continue
        rest = rest[:begin] + "\0" * len(text) + rest[begin + len(text) :]
        if text not in sent:  # else an attacker's, or the user's
            spans.append((begin, begin + len(text)))
    bounds = find_token_offsets(chat_template, prompt)
    said, users = _tokens_in_spans(bounds, spans), _tokens_in_spans(bounds, _user_text_spans(prompt, chat))
    return [one and not other for one, other in zip(said, users, strict=True)]


def _user_text_spans(prompt: Prompt, chat: Chat) -> list[tuple[int, int]]:
    """Where in the prompt's text the user's words stand; nowhere if they cannot be found."""
    words, turn = get_last_user_text(chat).strip(), get_last_user_text(prompt.chat).strip()
    text = words if words in turn else turn
    begin = prompt.text.rfind(text)
    return [(begin, begin + len(text))] if begin >= 0 and text else []


def _tokens_in_spans(token_offsets: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token has text inside of one of the spans."""
    pairs = list(pairwise(token_offsets))
    return [any(begin < stop and end > start for start, stop in spans) for begin, end in pairs]


def compute_knockout_margin(
    session: ModelSession,
    prompt_ids: Sequence[int],
    hidden_tokens: Sequence[bool],
    layers: range,
    reader: str,
    readout: Readout,
) -> float:
    """Return the margin of a prompt with attention to some of its tokens cut.

    Args:
        session: the model, armed or not.
        prompt_ids: token ids.
        hidden_tokens: which tokens are not seen.
        layers: in which they are not seen.
        reader: by whom: the answer's position alone, or everything behind them.
        readout: how logits become a margin.
    """
    hidden = torch.tensor(hidden_tokens)[None].expand(len(prompt_ids), -1).clone()
    if reader == "answer":
        hidden[:-1] = False
    else:
        hidden[torch.tensor(hidden_tokens)] = False  # they still see each other
    hidden.fill_diagonal_(False)  # and each token itself
    with torch.inference_mode(), knock_out_attention(session.loaded_model.model, layers, hidden):
        ((_, logits),) = session.engine.iterate_logits([prompt_ids], [1], share_prefix=False)
    return float(readout.compute_margins(logits)[0, 0])


@contextmanager
def knock_out_attention(
    model: Any, layers: range, blocked_edges: Bool[Tensor, "tokens tokens"]
) -> Iterator[None]:
    """While open, some tokens of the one prompt that is read do not see some others.

    Args:
        model: of transformers, whose attention must go through its interface to PyTorch's kernel.
        layers: in which.
        blocked_edges: which token does not see which.
    """
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any,
        query: Float[Tensor, "1 heads tokens size"],
        key: Float[Tensor, "1 groups tokens size"],
        value: Float[Tensor, "1 groups tokens width"],
        attention_mask: Tensor | None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        if module.layer_idx in layers:
            seen = ~blocked_edges.to(query.device)
            if attention_mask is None:
                attention_mask = (seen & torch.ones_like(seen).tril())[None, None]
            elif attention_mask.dtype == torch.bool:
                attention_mask = attention_mask & seen
            else:
                attention_mask = attention_mask.masked_fill(~seen, torch.finfo(attention_mask.dtype).min)
        return usual(module, query, key, value, attention_mask, **more)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual


def describe_unsupported_attention(model: Any) -> str:
    """Return why attention of a model cannot be cut; empty where it can."""
    kind = model.config.get_text_config()._attn_implementation
    return (
        "" if kind == "sdpa" else f"attention of this {type(model).__name__} is {kind}, which cannot be cut"
    )
