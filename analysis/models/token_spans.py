"""Which tokens of a prompt belong to the user's text, to a defense, or to an image."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

from analysis.models.chat_template import ChatTemplate, Prompt
from analysis.models.image_tokens import is_image_id
from defenses.chats import get_last_user_text
from defenses.contract import Chat


def find_token_offsets(chat_template: ChatTemplate, prompt: Prompt) -> list[int]:
    """Return where each token begins in the prompt's text, followed by where the last one ends.

    The text describes an image in the place of its first token; its other tokens have no text.
    """
    return [
        len(chat_template.decode_tokens(prompt.ids[:count], prompt.images))
        for count in range(len(prompt.ids) + 1)
    ]


def find_user_tokens(chat_template: ChatTemplate, prompt: Prompt, chat: Chat) -> range:
    """Return the positions of the user's text, or of what replaced it; the last token if there is none.

    They are those of `mask_user_tokens`, found by bisection, which decodes few beginnings of the prompt.

    Args:
        chat_template: chat template that rendered the prompt.
        prompt: prompt that the model reads.
        chat: chat that the user or the attacker sent.
    """
    if not (spans := _user_text_spans(prompt, chat)):
        return range(len(prompt.ids) - 1, len(prompt.ids))
    ((start, stop),) = spans

    def find_offset(count: int) -> int:
        return len(chat_template.decode_tokens(prompt.ids[:count], prompt.images))

    counts = range(len(prompt.ids) + 1)
    return range(bisect_right(counts, start, key=find_offset) - 1, bisect_left(counts, stop, key=find_offset))


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
