"""In which words a model is asked: chat → token ids through the model's own template, checked on the way.

Token ids come from `apply_chat_template` alone: a template rendered to text and tokenized again would get a
second BOS. Where a template knows no system role, its text is merged into the first user turn; it is never
dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError

from defenses.chats import replace_last_user, split_prefill
from defenses.contract import Chat, Message
from defenses.errors import UserError

_PLACEHOLDER_TEXT, _PLACEHOLDER_RESPONSE = "zxqmarkqxz", "zxqanswerqxz"
_CONTINUATION_WORD = "I"  # how an answer may go on
# A model that thinks first gets its thinking closed, so that the next token belongs to the answer.
THINKING_TAGS = {"<think>": "\n</think>\n\n", "<|START_THINKING|>": "<|END_THINKING|>"}
# Llama 3.x writes the date into its system turn: its own default, so that no margin depends on the day.
_TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Prompt:
    """What a model reads.

    Attributes:
        ids: the tokens, up to where the answer begins.
        text: the tokens decoded, special ones included.
        chat: the messages as they went into the template, after any merging of the system turn.
        prefill: what the answer is made to begin with, the last of the tokens; mostly nothing.
    """

    ids: tuple[int, ...]
    text: str
    chat: Chat
    prefill: str = ""

    def append_prefix(self, response_prefix: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens with those behind them that answers begin with; the bare ones if it is begun."""
        return self.ids if self.prefill else (*self.ids, *response_prefix)


@dataclass(frozen=True)
class ChatTemplate:
    """The template of one tokenizer, with what had to be decided about it.

    Args:
        tokenizer: of transformers, with a chat template; never changed.
    """

    tokenizer: Any

    @cached_property
    def system_policy(self) -> Literal["native", "merged"]:
        """Whether the template has a system role, or its text goes into the first user turn."""
        try:
            text = self._render_text(
                [Message(role="system", content=_PLACEHOLDER_TEXT), Message(role="user", content="Hi")]
            )
        except TemplateError:
            return "merged"
        return "native" if _PLACEHOLDER_TEXT in text else "merged"

    @cached_property
    def generation_prompt(self) -> str:
        """What the template writes behind the last user turn, up to where the answer begins."""
        return self._render_text([Message(role="user", content=_PLACEHOLDER_TEXT)]).rsplit(
            _PLACEHOLDER_TEXT, 1
        )[-1]

    @cached_property
    def thinking_closing(self) -> str:
        """What closes the thinking block that the template leaves open; empty where it opens none."""
        for opening, closing in THINKING_TAGS.items():
            if (
                opening in self.generation_prompt
                and closing.strip() not in self.generation_prompt[self.generation_prompt.rindex(opening) :]
            ):
                return closing
        return ""

    @cached_property
    def response_header(self) -> str | None:
        """What stands between the last user turn and its answer in a finished chat; None where none is shown.

        A prompt whose tail is anything else does not end where answers begin.
        """
        chat = [
            Message(role="user", content=_PLACEHOLDER_TEXT),
            Message(role="assistant", content=_PLACEHOLDER_RESPONSE),
        ]
        try:
            text = self._render_text(chat, with_generation_prompt=False)
        except TemplateError:
            return None
        return (
            text.split(_PLACEHOLDER_RESPONSE, 1)[0].rsplit(_PLACEHOLDER_TEXT, 1)[-1]
            if _PLACEHOLDER_RESPONSE in text
            else None
        )

    @cached_property
    def has_leading_space(self) -> bool:
        """Whether the template puts a space in front of answers, which is part of their first word then."""
        head = self.response_header
        return head is not None and head.endswith(" ") and not self.generation_prompt.endswith(" ")

    @cached_property
    def notices(self) -> tuple[str, ...]:
        """What a user should know about how this model is asked."""
        found = []
        if self.system_policy == "merged":
            found.append(
                "the template has no system role: system text goes to the head of the first user turn"
            )
        if self.thinking_closing:
            found.append("the template opens a thinking block: it is closed before the answer is read")
        if self.generation_prompt.endswith(" "):
            found.append("the template ends in a space: the answer's first word has none of its own")
        plain, asked = (
            self.tokenizer.encode("Hi"),
            self.render_prompt([Message(role="user", content="Hi")]).ids,
        )
        if self.tokenizer.bos_token_id in set(plain) - set(asked):
            found.append("the template writes no BOS, though the tokenizer puts one before plain text: none")
        return tuple(found)

    def render_prompt(self, chat: Chat) -> Prompt:
        """Return what the model reads for a chat whose answer it is to begin, or to go on with.

        An assistant message at the end is no turn of the template, which would close it: its tokens stand
        where the answer's stand.
        """
        chat, begun = split_prefill(chat)
        if self.has_leading_space:
            begun = begun.rstrip()  # else the next word would not have the form that answers open with
        if self.system_policy == "merged" and chat[0]["role"] == "system":
            chat = _merge_system_turn(chat)
        try:
            encoded = self.tokenizer.apply_chat_template(
                chat, tokenize=True, add_generation_prompt=True, return_dict=True, **_TEMPLATE_SETTINGS
            )
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses this chat: {error}") from error
        ids = list(encoded["input_ids"])
        if self.thinking_closing:
            ids += self.tokenizer.encode(self.thinking_closing, add_special_tokens=False)
        ids += self._encode_prefill(begun)
        return Prompt(tuple(ids), self.decode_tokens(ids), chat, begun)

    def _encode_prefill(self, prefill: str) -> list[int]:
        """The tokens of what an answer begins with, as they are where a word follows.

        A line break that ends a text is another token than one in front of a word, with many tokenizers; a
        model that has never seen a word behind that token would go on with anything else.
        """
        if not prefill:
            return []
        ids: list[int] = self.tokenizer.encode(f"{prefill}{_CONTINUATION_WORD}", add_special_tokens=False)
        while ids and not prefill.startswith(self.decode_tokens(ids).lstrip(" ")):
            ids.pop()
        return ids

    def render_retokenized(self, chat: Chat, retokenize: Callable[[list[int]], list[int]]) -> Prompt:
        """Return what the model reads for a chat, with the last user's words in other tokens.

        Args:
            chat: as for `render`.
            retokenize: the tokens of the words → tokens of the same text.
        """
        prompt = self.render_prompt(chat)
        # Where the words stand shows by what stays when others take their place.
        other = self.render_prompt(replace_last_user(chat, _PLACEHOLDER_TEXT)).ids
        same = [a == b for a, b in zip(prompt.ids, other, strict=False)]
        start = same.index(False)
        behind = [a == b for a, b in zip(prompt.ids[:start:-1], other[:start:-1], strict=False)]
        stop = len(prompt.ids) - (behind.index(False) if False in behind else len(behind))
        ids = (*prompt.ids[:start], *retokenize(list(prompt.ids[start:stop])), *prompt.ids[stop:])
        return replace(prompt, ids=ids, text=self.decode_tokens(ids))

    def decode_tokens(self, ids: list[int] | tuple[int, ...]) -> str:
        """Return the tokens as text, special ones included and nothing tidied."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def count_expected_bos(self, chat: Chat) -> int:
        """Return how many BOS tokens the template itself writes for a chat."""
        bos = self.tokenizer.bos_token
        return self._render_text(chat).count(bos) if bos else 0

    def _render_text(self, chat: Chat, with_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=with_generation_prompt, **_TEMPLATE_SETTINGS
            )
        )


def remove_whitespace(text: str) -> str:
    """Return the text without white space, which templates trim and tokenizers bend.

    >>> remove_whitespace(" I  can't ")
    "Ican't"
    """
    return re.sub(r"\s+", "", text)


def remove_thinking_and_whitespace(text: str) -> str:
    """Return the text less any thinking blocks and less white space.

    >>> remove_thinking_and_whitespace("<Assistant> <think> </think> Sure")
    '<Assistant>Sure'
    """
    for opening, closing in THINKING_TAGS.items():
        text = re.sub(f"{re.escape(opening)}.*?{re.escape(closing.strip())}", "", text, flags=re.DOTALL)
    return remove_whitespace(text)


def redact_secrets(text: str, secrets: tuple[str, ...]) -> str:
    """Return the text with secrets replaced by a mark, even where white space was changed inside them.

    >>> redact_secrets("say tulip  seven now", ("tulip seven",))
    'say ⟨secret⟩ now'
    """
    for secret in secrets:
        text = re.sub(r"\s*".join(map(re.escape, remove_whitespace(secret))), "⟨secret⟩", text)
    return text


def _merge_system_turn(chat: Chat) -> Chat:
    """The chat with its system turn at the head of the first user turn."""
    system, rest = chat[0]["content"], [Message(**message) for message in chat[1:]]
    first = next((m for m in rest if m["role"] == "user"), None)
    if first is None:
        raise UserError("a chat without a user turn cannot be asked")
    first["content"] = f"{system}\n\n{first['content']}"
    return rest


def strip_thinking(text: str) -> str:
    """Return what is said outside of thinking blocks, one that never closes included.

    >>> strip_thinking("<think>Hm.</think>Yes. <think>But")
    ' Yes.  '
    """
    return re.sub(r"<think>.*?(</think>|\Z)", " ", text, flags=re.DOTALL)
