"""Chat template: chat → token ids, by the model's own template.

Token ids come from `apply_chat_template` only: rendering to text and tokenizing the text again would add a
second BOS. If a template has no system role, the system text is merged into the first user turn; it is never
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
_CONTINUATION_WORD = "I"  # a word with which a response may continue
# The thinking block of a reasoning model is closed, so that the next token belongs to the response.
THINKING_TAGS = {"<think>": "\n</think>\n\n", "<|START_THINKING|>": "<|END_THINKING|>"}
# Llama 3.x writes the date into its system turn; a fixed date keeps margins independent of the day.
_TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Prompt:
    """A rendered chat, as the model reads it.

    Attributes:
        ids: token ids, up to the start of the response.
        text: the decoded tokens, special tokens included.
        chat: the messages passed to the template, after merging of the system turn.
        prefill: given start of the response, the last of the tokens; usually empty.
    """

    ids: tuple[int, ...]
    text: str
    chat: Chat
    prefill: str = ""

    def append_prefix(self, response_prefix: tuple[int, ...]) -> tuple[int, ...]:
        """Return the token ids followed by the response prefix, which a prefilled response does not get."""
        return self.ids if self.prefill else (*self.ids, *response_prefix)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, and the policies that follow from it.

    Args:
        tokenizer: a transformers tokenizer with a chat template; never changed.
    """

    tokenizer: Any

    @cached_property
    def system_policy(self) -> Literal["native", "merged"]:
        """`native` if the template has a system role, `merged` if its text goes into the first user turn."""
        try:
            text = self._render_text(
                [Message(role="system", content=_PLACEHOLDER_TEXT), Message(role="user", content="Hi")]
            )
        except TemplateError:
            return "merged"
        return "native" if _PLACEHOLDER_TEXT in text else "merged"

    @cached_property
    def generation_prompt(self) -> str:
        """Text that the template adds between the last user turn and the start of the response."""
        text = self._render_text([Message(role="user", content=_PLACEHOLDER_TEXT)])
        return text.rsplit(_PLACEHOLDER_TEXT, 1)[-1]

    @cached_property
    def thinking_closing(self) -> str:
        """Text that closes the thinking block which the template leaves open; empty if it opens none."""
        for opening, closing in THINKING_TAGS.items():
            _, found_opening, thinking = self.generation_prompt.rpartition(opening)
            if found_opening and closing.strip() not in thinking:
                return closing
        return ""

    @cached_property
    def response_header(self) -> str | None:
        """Text between a user turn and its response in a finished chat; None if no response is shown.

        A prompt with a different tail does not end where responses begin.
        """
        chat = [
            Message(role="user", content=_PLACEHOLDER_TEXT),
            Message(role="assistant", content=_PLACEHOLDER_RESPONSE),
        ]
        try:
            text = self._render_text(chat, with_generation_prompt=False)
        except TemplateError:
            return None
        before_response, placeholder, _ = text.partition(_PLACEHOLDER_RESPONSE)
        return before_response.rsplit(_PLACEHOLDER_TEXT, 1)[-1] if placeholder else None

    @cached_property
    def has_leading_space(self) -> bool:
        """Whether finished chats have a space before the response, which then belongs to its first word."""
        header = self.response_header
        return header is not None and header.endswith(" ") and not self.generation_prompt.endswith(" ")

    @cached_property
    def notices(self) -> tuple[str, ...]:
        """Remarks about this template for the user."""
        notices = []
        if self.system_policy == "merged":
            notices.append(
                "the template has no system role: system text is put before the first user message"
            )
        if self.thinking_closing:
            notices.append("the template opens a thinking block: it is closed before the response is scored")
        if self.generation_prompt.endswith(" "):
            notices.append(
                "the template ends in a space: the first word of a response has no space of its own"
            )
        plain_ids = self.tokenizer.encode("Hi")
        prompt_ids = self.render_prompt([Message(role="user", content="Hi")]).ids
        if self.tokenizer.bos_token_id in set(plain_ids) - set(prompt_ids):
            notices.append(
                "the template writes no BOS, although the tokenizer adds one to plain text: none is used"
            )
        return tuple(notices)

    def render_prompt(self, chat: Chat) -> Prompt:
        """Return the prompt for a chat whose next response the model starts or continues.

        An assistant message at the end is a prefill. It is not rendered as a turn, because the template would
        close it; its tokens follow the generation prompt.
        """
        chat, prefill = split_prefill(chat)
        if self.has_leading_space:
            prefill = prefill.rstrip()  # else the next word would lack the space that responses open with
        if self.system_policy == "merged" and chat[0]["role"] == "system":
            chat = _merge_system_turn(chat)
        try:
            encoded = self.tokenizer.apply_chat_template(
                chat, tokenize=True, add_generation_prompt=True, return_dict=True, **_TEMPLATE_SETTINGS
            )
        except TemplateError as error:
            raise UserError(f"the model's chat template rejects this chat: {error}") from error
        ids = list(encoded["input_ids"])
        if self.thinking_closing:
            ids += self.tokenizer.encode(self.thinking_closing, add_special_tokens=False)
        ids += self._encode_prefill(prefill)
        return Prompt(tuple(ids), self.decode_tokens(ids), chat, prefill)

    def _encode_prefill(self, prefill: str) -> list[int]:
        """Return the prefill's token ids as they are when a word follows.

        In many tokenizers, a line break at the end of a text is a different token from one before a word; a
        model that never saw a word after the former would not continue as usual.
        """
        if not prefill:
            return []
        ids: list[int] = self.tokenizer.encode(f"{prefill}{_CONTINUATION_WORD}", add_special_tokens=False)
        while ids and not prefill.startswith(self.decode_tokens(ids).lstrip(" ")):
            ids.pop()
        return ids

    def render_retokenized(self, chat: Chat, retokenize: Callable[[list[int]], list[int]]) -> Prompt:
        """Return the prompt for a chat in which the last user message has other tokens.

        Args:
            chat: as for `render_prompt`.
            retokenize: token ids of the message → token ids of the same text.
        """
        prompt = self.render_prompt(chat)
        # The message lies between the first and the last token that change when it is replaced.
        replaced_ids = self.render_prompt(replace_last_user(chat, _PLACEHOLDER_TEXT)).ids
        is_same = [a == b for a, b in zip(prompt.ids, replaced_ids, strict=False)]
        start = is_same.index(False)
        is_same_tail = [a == b for a, b in zip(prompt.ids[:start:-1], replaced_ids[:start:-1], strict=False)]
        stop = len(prompt.ids) - (is_same_tail.index(False) if False in is_same_tail else len(is_same_tail))
        ids = (*prompt.ids[:start], *retokenize(list(prompt.ids[start:stop])), *prompt.ids[stop:])
        return replace(prompt, ids=ids, text=self.decode_tokens(ids))

    def decode_tokens(self, ids: list[int] | tuple[int, ...]) -> str:
        """Return the text of the tokens, special tokens included, without any clean-up."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def count_expected_bos(self, chat: Chat) -> int:
        """Return the number of BOS tokens that the template itself writes for a chat."""
        bos = self.tokenizer.bos_token
        return self._render_text(chat).count(bos) if bos else 0

    def _render_text(self, chat: Chat, with_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=with_generation_prompt, **_TEMPLATE_SETTINGS
            )
        )


def remove_whitespace(text: str) -> str:
    """Return the text without whitespace, which templates trim and tokenizers alter.

    >>> remove_whitespace(" I  can't ")
    "Ican't"
    """
    return re.sub(r"\s+", "", text)


def remove_thinking_and_whitespace(text: str) -> str:
    """Return the text without thinking blocks and whitespace.

    >>> remove_thinking_and_whitespace("<Assistant> <think> </think> Sure")
    '<Assistant>Sure'
    """
    for opening, closing in THINKING_TAGS.items():
        text = re.sub(f"{re.escape(opening)}.*?{re.escape(closing.strip())}", "", text, flags=re.DOTALL)
    return remove_whitespace(text)


def redact_secrets(text: str, secrets: tuple[str, ...]) -> str:
    """Return the text with secrets replaced by a mark, even if whitespace inside them was changed.

    >>> redact_secrets("say tulip  seven now", ("tulip seven",))
    'say ⟨secret⟩ now'
    """
    for secret in secrets:
        text = re.sub(r"\s*".join(map(re.escape, remove_whitespace(secret))), "⟨secret⟩", text)
    return text


def strip_thinking(text: str) -> str:
    """Return the text outside of thinking blocks; an unclosed block extends to the end.

    >>> strip_thinking("<think>Hm.</think>Yes. <think>But")
    ' Yes.  '
    """
    return re.sub(r"<think>.*?(</think>|\Z)", " ", text, flags=re.DOTALL)


def _merge_system_turn(chat: Chat) -> Chat:
    """Return the chat with its system text put before the first user message."""
    system_text, turns = chat[0]["content"], [Message(**message) for message in chat[1:]]
    first_user = next((message for message in turns if message["role"] == "user"), None)
    if first_user is None:
        raise UserError("a chat without a user turn cannot be rendered")
    first_user["content"] = f"{system_text}\n\n{first_user['content']}"
    return turns
