"""Thinking blocks of reasoning models: the tags around them, and texts without them.

Which tags a model uses is read off its template and its added tokens; the lists here serve texts of unknown
origin, such as a file of responses, and models that show their tags nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

# Opening tag → text that ends the block, after which the response begins.
THINKING_TAGS = {
    "<think>": "\n</think>\n\n",
    "<thinking>": "\n</thinking>\n\n",
    "<thought>": "\n</thought>\n\n",
    "<reasoning>": "\n</reasoning>\n\n",
    "<seed:think>": "</seed:think>\n",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "◁think▷": "◁/think▷",
    "<|channel>thought": "\n<channel|>",
    "<|channel|>analysis<|message|>": "<|end|><|start|>assistant<|channel|>final<|message|>",
}
# Tags that some models put in front of their response proper.
RESPONSE_TAGS = ("<answer>", "<response>", "<|START_RESPONSE|>", "<|START_TEXT|>", "<|begin_of_solution|>")

_TAG = re.compile(
    r"(?:<[|｜]?|\[|◁)/?(?:[\w.-]*[_:.-])?(?:thinking|think|thoughts?|reasoning)"
    r"(?::[\w.-]+|_(?:start|begin|open|bos|end|close|eos))?(?:[|｜]?>|\]|▷)",
    re.IGNORECASE,
)
_START_WORDS = {"start": "end", "begin": "end", "open": "close", "bos": "eos"}
_RESPONSE_END_TAGS = ("</answer>", "</response>", "<|END_RESPONSE|>", "<|END_TEXT|>", "<|end_of_solution|>")


def find_thinking_tags(texts: Iterable[str]) -> dict[str, str]:
    """Return the tags that open and close thinking blocks among all tags in some texts.

    >>> find_thinking_tags(["[THINK]", "[/THINK]", "<|think|>", "<|im_end|>"])
    {'[THINK]': '[/THINK]'}

    Args:
        texts: a template's source, added tokens, or a response.

    Returns:
        Opening tag → text that ends the block; tags without a counterpart are left out.
    """
    tags = dict.fromkeys(tag for text in texts for tag in _TAG.findall(text))
    found = {}
    for opening in tags:
        closing = next((tag for tag in _closing_candidates(opening) if tag in tags), None)
        if closing is not None:
            # XML-like tags stand on lines of their own, control tokens do not.
            found[opening] = THINKING_TAGS.get(
                opening, f"\n{closing}\n\n" if re.match(r"<[^|｜]", opening) else closing
            )
    return found


def find_open_tag(text: str, tags: Mapping[str, str]) -> str:
    """Return the opening tag of the thinking block inside which a text ends; empty if it ends outside.

    >>> find_open_tag("<think>a</think>b", THINKING_TAGS), find_open_tag("b<think>", THINKING_TAGS)
    ('', '<think>')

    Args:
        text: a text.
        tags: opening tag → text that ends the block.
    """
    for opening, closing in tags.items():
        _, is_opened, thinking = text.rpartition(opening)
        if is_opened and closing.strip() not in thinking:
            return opening
    return ""


def remove_thinking(text: str, tags: Mapping[str, str] = THINKING_TAGS) -> str:
    """Return the text without finished thinking blocks, and without closing tags that lack an opening one.

    >>> remove_thinking("a<think> </think>b</think>c")
    'abc'

    Args:
        text: a text.
        tags: opening tag → text that ends the block.
    """
    for opening, closing in tags.items():
        end = closing.strip()
        text = re.sub(f"{re.escape(opening)}.*?{re.escape(end)}", "", text, flags=re.DOTALL).replace(end, "")
    return text


def strip_thinking(text: str) -> str:
    """Return a response without thinking blocks and without tags around the response proper.

    An unclosed block extends to the end. What stands before a closing tag without an opening one is thinking,
    too: the prompt has opened the block.

    >>> strip_thinking("<think>Hm.</think>Yes. <think>But")
    ' Yes.  '
    >>> strip_thinking("Hm.</think><answer>No.</answer>")
    ' No.'
    """
    tags = {**THINKING_TAGS, **find_thinking_tags([text])}
    for opening, closing in tags.items():
        end = closing.strip()
        if opening not in text and end not in text:
            continue
        first_opening, first_end = text.find(opening), text.find(end)
        if first_end >= 0 and not 0 <= first_opening < first_end:
            text = " " + text[first_end + len(end) :]
        text = re.sub(f"{re.escape(opening)}.*?({re.escape(end)}|\\Z)", " ", text, flags=re.DOTALL)
    for tag in RESPONSE_TAGS:
        text = re.sub(rf"\A\s*{re.escape(tag)}", " ", text)
    for tag in _RESPONSE_END_TAGS:
        text = re.sub(rf"{re.escape(tag)}\s*\Z", "", text)
    return text


def cut_token_spans(ids: Sequence[int], opening: Sequence[int], closing: Sequence[int]) -> list[int]:
    """Return token ids without the spans from an opening to its closing sequence, or to the end.

    >>> cut_token_spans([5, 1, 6, 2, 7, 1, 8], [1], [2])
    [5, 7]
    """
    kept: list[int] = []
    position = 0
    while position < len(ids):
        if list(ids[position : position + len(opening)]) != list(opening):
            kept.append(ids[position])
            position += 1
            continue
        position += len(opening)
        while position < len(ids) and list(ids[position : position + len(closing)]) != list(closing):
            position += 1
        position += len(closing)
    return kept


def _closing_candidates(opening: str) -> list[str]:
    """Return the tags that could close what a tag opens: with a slash, or with "end" in place of "start"."""
    bracket = re.match(r"<[|｜]?|\[|◁", opening)
    assert bracket is not None
    candidates = [f"{bracket[0]}/{opening[bracket.end() :]}"]
    for start, end in _START_WORDS.items():
        for old, new in ((start, end), (start.upper(), end.upper()), (start.title(), end.title())):
            if old in opening:
                candidates.append(opening.replace(old, new))
    return candidates
