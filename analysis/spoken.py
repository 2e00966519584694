"""What an answer says: its sentences, without marks of type, quotations and thinking; and on which topic."""

from __future__ import annotations

import re
import unicodedata

_MIN_SENTENCE_LENGTH = 10  # characters


def normalize_response(response: str) -> str:
    """Return the answer with one kind of quotes and spaces, without marks of type, labels and thinking.

    >>> plain("<think>Hm.</think>**Bot:**  I can\u2019t\u00a0do  that.")
    "I can't do that."
    """
    text = unicodedata.normalize("NFKC", strip_thinking(response)).translate(_QUOTE_TABLE)
    text = re.sub(r"[*_#`~]+", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"^(\[[^\]]{1,20}\]|\(?[A-Z][\w ]{1,18}\)?:)\s+(?=[A-Z])", "", text)


def strip_thinking(text: str) -> str:
    """Return what is said outside of thinking blocks, one that never closes included.

    >>> aloud("<think>Hm.</think>Yes. <think>But")
    ' Yes.  '
    """
    return re.sub(r"<think>.*?(</think>|\Z)", " ", text, flags=re.DOTALL)


_QUOTE_TABLE = str.maketrans(
    {**dict.fromkeys("\u2018\u2019\u02bc\u00b4", "'"), **dict.fromkeys("\u201c\u201d\u201e", '"')}
)


def split_sentences(text: str) -> list[str]:
    """Return the sentences, a greeting or another few letters put to the one behind."""
    found: list[str] = []
    for one in re.split(r"(?<=[.!?:])\s+(?=\S)", text):
        if found and len(found[-1]) < _MIN_SENTENCE_LENGTH:
            found[-1] += f" {one}"
        else:
            found.append(one)
    return [one for one in found if one]


def remove_quotations(text: str) -> str:
    """Return the text less what is in quotation marks: somebody else's word; if that is all, it is kept."""
    bare = re.sub(r'(?<!\w)"[^"]{2,400}"', " ", text)
    return bare if len(bare.strip()) > 20 else text


def is_off_topic(text: str, query: str) -> bool:
    """Return whether an answer of some length has no word of the request: it speaks of something else."""
    asked = _extract_topic_stems(query)
    # A request of one such word ("a can of coke") is often answered in others.
    return len(text) > 200 and len(asked) > 1 and not asked & _extract_topic_stems(text)


def _extract_topic_stems(text: str) -> frozenset[str]:
    words = re.findall(r"[a-z]{4,}", text.casefold())
    return frozenset(word[:5] for word in words if word not in _NON_TOPIC_WORDS)


# Too common in requests and answers of all kinds to tell one topic from another.
_NON_TOPIC_WORDS = frozenset(
    """
    about also another answer anything away been being best better between could create describe
    develop does doing down each easy effective even every example explain find first fun generate
    give good great have help here how idea ideas important instructions into just kind know like
    list make many more most much need only other over people please provide really simple some
    something step suggest tell than that their them then there these they thing things this those
    tips tool using very want ways well were what when where which while will with without work
    would write your yourself
    """.split()  # noqa: SIM905 - a word a line would be ninety lines
)
