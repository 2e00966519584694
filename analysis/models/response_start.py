"""Where responses begin: the text that has to stand between a template's generation prompt and a response.

It is read off the template: a finished assistant turn without thinking shows what stands in front of its
content. What the generation prompt lacks of that (a channel, a header, an empty thinking block) is appended;
a thinking block that the generation prompt opens is closed, as finished turns with thinking close it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from analysis.models.thinking_blocks import find_open_tag, remove_thinking

_CLOSED_NOTICE = "the template opens a thinking block: it is closed before the response is scored"


@dataclass(frozen=True)
class ResponseStart:
    """Where responses begin behind the generation prompt.

    Attributes:
        opening: text to append to the generation prompt; usually empty.
        problem: why it is not known where responses begin; empty if it is known.
        notice: remark for the user; empty if nothing is appended.
    """

    opening: str
    problem: str = ""
    notice: str = ""


@dataclass(frozen=True)
class FinishedTurns:
    """How a template shows assistant turns.

    Attributes:
        header: text between the user's text and the content of a turn without thinking; None if the template
            shows no such turn.
        before_thought: text between the user's text and the thoughts of a turn with thinking; None if the
            template shows no thoughts.
        after_thought: text between its thoughts and its content.
    """

    header: str | None
    before_thought: str | None = None
    after_thought: str = ""


def find_response_start(
    generation_prompt: str, turns: FinishedTurns, tags: Mapping[str, str]
) -> ResponseStart:
    """Find the text that has to follow the generation prompt, so that the next token belongs to the response.

    >>> find_response_start("<start>", FinishedTurns("<start><final>"), {}).opening
    '<final>'

    Args:
        generation_prompt: text between the user's text and the end of the prompt.
        turns: how the template shows finished turns.
        tags: opening tag of thinking blocks → text that ends the block.
    """
    header = turns.header
    if header is not None and find_open_tag(header, tags):
        header = None  # the template opens a block in finished turns as well, so they show no response
    if header is not None and header.startswith(generation_prompt):
        # Spaces belong to the first word of the response.
        opening = header.removeprefix(generation_prompt).rstrip(" ")
        return ResponseStart(opening, notice=_describe_opening(opening, generation_prompt, tags))
    open_tag = find_open_tag(generation_prompt, tags)
    if not open_tag and header is not None:
        rest = _text_after(remove_thinking(header, tags), remove_thinking(generation_prompt, tags))
        if rest is not None:
            opening = rest.rstrip(" ")
            return ResponseStart(opening, notice=_describe_opening(opening, generation_prompt, tags))
    if turns.before_thought is not None and _text_after(generation_prompt, turns.before_thought) is not None:
        # The generation prompt begins the thoughts.
        return ResponseStart(turns.after_thought.rstrip(" "), notice=_CLOSED_NOTICE)
    if open_tag:
        closing = tags[open_tag]
        if header is None:
            return ResponseStart(closing, notice=_CLOSED_NOTICE)
        closed = remove_thinking(generation_prompt + closing, tags)
        rest = _text_after(remove_thinking(header, tags), closed)
        if rest is not None:
            return ResponseStart(closing + rest.rstrip(" "), notice=_CLOSED_NOTICE)
    if header is None:
        return ResponseStart("")
    return ResponseStart(
        "",
        problem=f"prompts end in {generation_prompt!r}, but the template puts responses after {header!r}, so "
        "it is not known where responses begin: say so with --answer-prefix TEXT, the text between the "
        "prompt and the response",
    )


def _describe_opening(opening: str, generation_prompt: str, tags: Mapping[str, str]) -> str:
    """Return the notice about an opening that the template shows in finished turns."""
    if not opening.strip():
        return ""
    if find_open_tag(generation_prompt, tags):
        return _CLOSED_NOTICE
    return f"every prompt is followed by {opening!r}, after which the template shows responses"


def _text_after(text: str, start: str) -> str | None:
    """Return what follows the start of a text; None if the text does not begin so, spaces aside.

    >>> _text_after("a b <final>", "ab"), _text_after("a b <final>", "ab "), _text_after("ab", "abc")
    (' <final>', '<final>', None)
    """
    position = 0
    for character in re.sub(r"\s", "", start):
        while position < len(text) and text[position].isspace():
            position += 1
        if position == len(text) or text[position] != character:
            return None
        position += 1
    rest = text[position:]
    return rest.lstrip() if start[-1:].isspace() or not rest.strip() else rest
