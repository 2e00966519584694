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

from defenses import Chat
from defenses.chats import last_user

if TYPE_CHECKING:
    from analysis.bench import Bench
    from analysis.readout import Readout
    from analysis.rendering import Prompt, Renderer

READERS = ("answer", "everything")


def starts(renderer: Renderer, prompt: Prompt) -> list[int]:
    """Return where each token begins in a prompt's text, and where the last one ends."""
    return [len(renderer.decode(prompt.ids[:count])) for count in range(len(prompt.ids) + 1)]


def of_user(renderer: Renderer, prompt: Prompt, asked: Chat) -> list[bool]:
    """Return which tokens are the user's words; where they were reworded, what stands in their place.

    Args:
        renderer: that made the prompt.
        prompt: as the model reads it.
        asked: the chat as the user, or the attacker, sent it.
    """
    return _within(starts(renderer, prompt), _words(prompt, asked))


def of_defense(renderer: Renderer, prompt: Prompt, asked: Chat) -> list[bool]:
    """Return which tokens are the defense's own: what its messages say beside the user's words.

    Args:
        renderer: that made the prompt.
        prompt: as the model reads it.
        asked: the chat as the user, or the attacker, sent it.
    """
    sent = {message["content"].strip() for message in asked}
    texts = [*(message["content"].strip() for message in prompt.chat), prompt.begun.strip()]
    spans, rest = [], prompt.text
    # The longest first, each where no other is: a template may put turns in another order.
    for text in sorted(filter(None, texts), key=len)[::-1]:
        if (begin := rest.find(text)) < 0:
            continue
        rest = rest[:begin] + "\0" * len(text) + rest[begin + len(text) :]
        if text not in sent:  # else an attacker's, or the user's
            spans.append((begin, begin + len(text)))
    bounds = starts(renderer, prompt)
    said, users = _within(bounds, spans), _within(bounds, _words(prompt, asked))
    return [one and not other for one, other in zip(said, users, strict=True)]


def _words(prompt: Prompt, asked: Chat) -> list[tuple[int, int]]:
    """Where in the prompt's text the user's words stand; nowhere if they cannot be found."""
    words, turn = last_user(asked).strip(), last_user(prompt.chat).strip()
    text = words if words in turn else turn
    begin = prompt.text.rfind(text)
    return [(begin, begin + len(text))] if begin >= 0 and text else []


def _within(bounds: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token has text inside of one of the spans."""
    pairs = list(pairwise(bounds))
    return [any(begin < stop and end > start for start, stop in spans) for begin, end in pairs]


def margin(
    bench: Bench, prompt: Sequence[int], own: Sequence[bool], layers: range, reader: str, readout: Readout
) -> float:
    """Return the margin of a prompt with attention to some of its tokens cut.

    Args:
        bench: the model, armed or not.
        prompt: token ids.
        own: which tokens are not seen.
        layers: in which they are not seen.
        reader: by whom: the answer's position alone, or everything behind them.
        readout: how logits become a margin.
    """
    hidden = torch.tensor(own)[None].expand(len(prompt), -1).clone()
    if reader == "answer":
        hidden[:-1] = False
    else:
        hidden[torch.tensor(own)] = False  # they still see each other
    hidden.fill_diagonal_(False)  # and each token itself
    with torch.inference_mode(), cut(bench.loaded.model, layers, hidden):
        ((_, logits),) = bench.engine.sweep([prompt], [1], share=False)
    return float(readout.read(logits)[0, 0])


@contextmanager
def cut(model: Any, layers: range, hidden: Bool[Tensor, "tokens tokens"]) -> Iterator[None]:
    """While open, some tokens of the one prompt that is read do not see some others.

    Args:
        model: of transformers, whose attention must go through its interface to PyTorch's kernel.
        layers: in which.
        hidden: which token does not see which.
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
            seen = ~hidden.to(query.device)
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


def uncut(model: Any) -> str:
    """Return why attention of a model cannot be cut; empty where it can."""
    kind = model.config.get_text_config()._attn_implementation
    return (
        "" if kind == "sdpa" else f"attention of this {type(model).__name__} is {kind}, which cannot be cut"
    )
