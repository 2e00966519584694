"""Chat template: chat → token ids, by the model's own template.

Token ids come from `apply_chat_template` only: rendering to text and tokenizing the text again would add a
second BOS. If a template has no system role, the system text is merged into the first user turn; it is never
dropped. The source that is rendered is the tokenizer's, with a fixed date and with the text after which
responses begin; the tokenizer is never changed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError

from analysis.models.image_tokens import split_text_and_images
from analysis.models.response_start import FinishedTurns, ResponseStart, find_response_start
from analysis.models.template_source import (
    FIXED_DATE,
    TimeLimitError,
    append_text,
    fix_date,
    limit_time,
    template_error,
    uses_random_text,
)
from analysis.models.thinking_blocks import (
    RESPONSE_TAGS,
    THINKING_TAGS,
    cut_token_spans,
    find_thinking_tags,
)
from analysis.models.vision import ImageReader, MissingImageReader
from defenses.chats import copy_chat, replace_last_user, split_prefill
from defenses.contract import Chat, LearnedTokens, Message, label_learned_tokens
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.models.cascade import OcrReader
    from analysis.models.vision import PreparedImage

_PLACEHOLDER_TEXT, _PLACEHOLDER_RESPONSE = "zxqmarkqxz", "zxqanswerqxz"
_PLACEHOLDER_THOUGHT = "zxqthoughtqxz"
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")  # names that templates know thoughts by
_CONTINUATION_WORD = "I"  # a word with which a response may continue
# The switches by which templates close the thinking block themselves.
_NO_THINKING = {"enable_thinking": False, "thinking": False}
_MEMORY_ADDRESS = re.compile(r"<[\w. ]+ at 0x[0-9A-Fa-f]+>")  # as Python shows objects
_MAX_CHECK_SECONDS = 20  # for the check of a template, which takes less than one
_OTHER_DATE = date(2031, 11, 5)  # differs from `FIXED_DATE` in every part


@dataclass(frozen=True)
class Prompt:
    """A rendered chat, as the model reads it.

    Attributes:
        ids: token ids, up to the start of the response.
        text: the decoded tokens, special tokens included.
        chat: the messages passed to the template, after merging of the system turn.
        prefill: given start of the response, the last of the tokens; usually empty.
        images: the images in the prompt, as they are prepared for the model.
        members: if the logits of several prompts are blended, one prompt for each defense of the blend.
    """

    ids: tuple[int, ...]
    text: str
    chat: Chat
    prefill: str = ""
    images: tuple[PreparedImage, ...] = ()
    members: tuple[Prompt, ...] = ()

    def append_prefix(self, response_prefix: tuple[int, ...]) -> tuple[int, ...]:
        """Return the token ids followed by the response prefix, which a prefilled response does not get."""
        return self.ids if self.prefill else (*self.ids, *response_prefix)

    def list_member_ids(self, response_prefix: tuple[int, ...] = ()) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of each member's prompt, with the response prefix; empty without members."""
        return tuple(member.append_prefix(response_prefix) for member in self.members)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, and the policies that follow from it.

    Args:
        tokenizer: a transformers tokenizer with a chat template; never changed.
        answer_prefix: text between the generation prompt and the response; None finds it.
        image_reader: prepares the images of chats; None for a model that reads text only.
    """

    tokenizer: Any
    answer_prefix: str | None = None
    image_reader: ImageReader | OcrReader | MissingImageReader | None = None

    def check_usable(self) -> None:
        """Raise if the template cannot be used, or if it is not known where responses begin."""
        try:
            with limit_time(_MAX_CHECK_SECONDS):
                self._check_usable()
        except TimeLimitError as error:
            raise template_error(f"takes more than {_MAX_CHECK_SECONDS} seconds for a short chat") from error

    def _check_usable(self) -> None:
        chat = [Message(role="user", content=_PLACEHOLDER_TEXT)]
        try:
            text = self._render_text(chat)
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, TemplateSyntaxError):
                raise template_error(f"cannot be read: {cause.message} (line {cause.lineno})") from error
            raise template_error(f"fails on a single user message: {_describe_failure(cause)}") from error
        if _PLACEHOLDER_TEXT not in text:
            raise template_error("drops the user's text")
        if address := _MEMORY_ADDRESS.search(text):
            raise template_error(
                f"writes the place of an object in memory ({address[0]}), which is another one in every run"
            )
        # Chance that the source does not show, such as a filter named by a variable, shows in the renderings.
        if uses_random_text(self._own_source) or {self._render_text(chat) for _ in range(9)} != {text}:
            raise template_error(
                "writes random text (Jinja's random or lipsum), so that margins would change from run to run"
            )
        if self.response_start.problem:
            raise UserError(self.response_start.problem)

    @cached_property
    def source(self) -> str:
        """The Jinja source that is rendered: with the fixed date and the text after which responses begin."""
        return append_text(fix_date(self._own_source), self.response_start.opening)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What distinguishes the prompts of this template, in plain values, for run.json and cache keys.

        `date` is the date that is written instead of today's; None if the template writes none.
        """
        return {
            "sha256": hashlib.sha256(self._own_source.encode()).hexdigest(),
            "date": FIXED_DATE.isoformat() if self._writes_date else None,
            "answers_begin_after": self.response_start.opening,
            "content": "parts" if self._takes_parts else "text",
            **({"images": images} if self.image_reader and (images := self.image_reader.identity) else {}),
        }

    @cached_property
    def vocabulary_sha256(self) -> str:
        """SHA-256 of the tokenizer's vocabulary, for cache keys of results that depend on decoded texts."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    @cached_property
    def system_policy(self) -> Literal["native", "merged"]:
        """`native` if the template has a system role, `merged` if its text goes into the first user turn."""
        try:
            text = self._render_text(
                [Message(role="system", content=_PLACEHOLDER_TEXT), Message(role="user", content="Hi")]
            )
        except UserError:
            return "merged"
        return "native" if _PLACEHOLDER_TEXT in text else "merged"

    @cached_property
    def generation_prompt(self) -> str:
        """Text that the template adds between the last user turn and the start of the response."""
        text = self._render_text([Message(role="user", content=_PLACEHOLDER_TEXT)])
        return text.rsplit(_PLACEHOLDER_TEXT, 1)[-1]

    @cached_property
    def response_start(self) -> ResponseStart:
        """Where responses begin: the text between the generation prompt and the response."""
        if self.answer_prefix is None:
            return find_response_start(self.generation_prompt, self._finished_turns, self.thinking_tags)
        notice = f"every prompt is followed by {self.answer_prefix!r}, after which responses begin"
        return ResponseStart(self.answer_prefix, notice=f"--answer-prefix: {notice}")

    @cached_property
    def thinking_tags(self) -> dict[str, str]:
        """Opening tag of thinking blocks → text that ends the block, for this model."""
        added_tokens = [str(token) for token in self.tokenizer.get_added_vocab()]
        tags = {**THINKING_TAGS, **find_thinking_tags([self._own_source, *added_tokens])}
        turns = self._finished_turns
        if turns.before_thought is not None and turns.before_thought.startswith(self._plain_prompt):
            opening = turns.before_thought.removeprefix(self._plain_prompt).strip()
            if opening and turns.after_thought.strip():
                tags[opening] = turns.after_thought
        return tags

    @cached_property
    def opening_texts(self) -> dict[str, str] | None:
        """Text with which the model may open a response before its first word → text that ends that opening.

        None where `answer_prefix` says where responses begin.
        """
        if self.answer_prefix is not None:
            return None
        return {**self.thinking_tags, **dict.fromkeys(RESPONSE_TAGS, "")}

    @cached_property
    def has_leading_space(self) -> bool:
        """Whether finished chats have a space before the response, which then belongs to its first word."""
        header = self._finished_turns.header
        return header is not None and header.endswith(" ") and not self._prompt_end.endswith(" ")

    @cached_property
    def notices(self) -> tuple[str, ...]:
        """Remarks about this template for the user."""
        notices = []
        if self.system_policy == "merged":
            notices.append(
                "the template has no system role: system text is put before the first user message"
            )
        elif isinstance(self.image_reader, ImageReader) and not self._takes_system_beside_image:
            notices.append(
                "the template takes no system turn beside an image: there, system text is put before the "
                "first user message"
            )
        if self.response_start.notice:
            notices.append(self.response_start.notice)
        if self._writes_date:
            notices.append(
                f"the template writes the date: it is {FIXED_DATE} in every prompt, so that margins do not "
                "depend on the day"
            )
        if self._prompt_end.endswith(" "):
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
        if any("image" in message for message in chat):
            return self._render_images(chat)
        chat, prefill = self._split_chat(chat)
        if isinstance(self.image_reader, ImageReader):  # also where no message has an image
            chat = _escape_marks(chat, self.image_reader.reserved_texts)
        ids = self._add_bos(list(self._apply(chat, self.source, tokenize=True)["input_ids"]))
        ids += self._encode_prefill(prefill)
        return Prompt(tuple(ids), self.decode_tokens(ids), chat, prefill)

    def _render_images(self, chat: Chat) -> Prompt:
        """Return the prompt for a chat with images."""
        from analysis.models.cascade import OcrReader

        reader = self.image_reader
        if reader is None:
            raise UserError(
                "the queries have images, and this model reads text only: use a model that reads images, or "
                "-m MODEL+ocr, which reads the text in an image in its place (pip install "
                "'refusalscope[vision]')"
            )
        if isinstance(reader, MissingImageReader):
            raise UserError(reader.reason)
        if isinstance(reader, OcrReader):
            return self.render_prompt(reader.replace_images(chat))
        chat, prefill = self._split_chat(chat)
        prepared = [reader.prepare(message["image"]) for message in chat if "image" in message]
        shown = _escape_marks(chat, reader.reserved_texts)
        text = str(self._apply_with_images(shown, reader.image_mark))
        ids = self._add_bos(reader.encode_text(text, prepared)) + self._encode_prefill(prefill)
        return Prompt(tuple(ids), self.decode_tokens(ids, prepared), chat, prefill, tuple(prepared))

    def _split_chat(self, chat: Chat) -> tuple[Chat, str]:
        """Return the messages for the template, system text merged where it has no role, and the prefill."""
        chat, prefill = split_prefill(chat)
        if self.has_leading_space:
            prefill = prefill.rstrip()  # else the next word would lack the space that responses open with
        if chat[0]["role"] == "system":
            has_image = any("image" in message for message in chat)
            takes_system = self._takes_system_beside_image if has_image else self.system_policy == "native"
            chat = chat if takes_system else _merge_system_turn(chat)
        return chat, prefill

    def _add_bos(self, ids: list[int]) -> list[int]:
        """Return the prompt's tokens with the BOS that processors, unlike tokenizers, put before prompts."""
        bos = self.tokenizer.bos_token_id
        has_processor = isinstance(self.image_reader, ImageReader) and bos is not None
        if not has_processor or ids[:1] == [bos] or self.tokenizer.encode("Hi")[:1] != [bos]:
            return ids
        return [bos, *ids]

    def _apply_with_images(self, chat: Chat, image_mark: str) -> Any:
        """Return the text of a chat with the mark of an image where each image stands."""
        if self._shows_image_parts(image_mark):
            return self._call_tokenizer(_split_into_parts(chat), self.source)
        marked = [
            Message(
                role=message["role"],
                content=f"{image_mark}\n{message['content']}" if "image" in message else message["content"],
            )
            for message in chat
        ]
        return self._apply(marked, self.source)

    @cached_property
    def _takes_system_beside_image(self) -> bool:
        """Whether the template shows a system turn beside an image; Llama 3.2's first one refused it."""
        reader = self.image_reader
        if self.system_policy == "merged" or not isinstance(reader, ImageReader):
            return False
        chat: list[Any] = [
            Message(role="system", content=_PLACEHOLDER_TEXT),
            {"role": "user", "content": "Hi", "image": None},
        ]
        try:
            return _PLACEHOLDER_TEXT in str(self._apply_with_images(chat, reader.image_mark))
        except UserError:
            return False

    def _shows_image_parts(self, image_mark: str) -> bool:
        """Return whether the template writes the mark of an image for a part of type image."""
        parts = [{"type": "image"}, {"type": "text", "text": _PLACEHOLDER_TEXT}]
        try:
            text = str(self._call_tokenizer([{"role": "user", "content": parts}], self.source))
        except UserError:
            return False
        return image_mark in text and _PLACEHOLDER_TEXT in text

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
        return replace(prompt, ids=ids, text=self.decode_tokens(ids, prompt.images))

    def insert_learned_tokens(self, prompt: Prompt, tokens: LearnedTokens) -> Prompt:
        """Return a prompt with the ids of learned embeddings in the place of their placeholders."""
        ids, chat = tokens.insert_ids(prompt.ids), copy_chat(prompt.chat)
        message = next(message for message in chat if tokens.text in message["content"])
        label = label_learned_tokens(len(tokens.ids))
        message["content"] = message["content"].replace(tokens.text, label, 1)
        return replace(prompt, ids=ids, text=self.decode_tokens(ids, prompt.images), chat=chat)

    def decode_tokens(self, ids: list[int] | tuple[int, ...], images: Sequence[PreparedImage] = ()) -> str:
        """Return the text of the tokens, special tokens included, without any clean-up.

        Args:
            ids: of the tokens.
            images: in these tokens, to be described; other images are shown as the number of their tokens.
        """
        descriptions = {image.ids.start: image.describe() for image in images}
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        texts = []
        for kind, run in split_text_and_images(ids):
            if kind == "text":
                texts.append(str(self.tokenizer.decode(run, **options)))
            elif kind == "learned":
                texts.append(label_learned_tokens(len(run)))
            elif images:  # described once, although text may lie between its tiles
                texts.append(descriptions.get(run[0], ""))
            else:
                texts.append(f"[{len(run)} image tokens]")
        return "".join(texts)

    def decode_response(self, ids: Sequence[int]) -> str:
        """Return the text of a response without special tokens.

        Thinking blocks whose tags are special tokens are cut out: without these, nobody could tell the
        thoughts from the response.
        """
        for opening, closing in self._special_thinking_ids:
            ids = cut_token_spans(ids, opening, closing)
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def count_expected_bos(self, chat: Chat) -> int:
        """Return the number of BOS tokens that the template itself writes for a chat."""
        bos = self.tokenizer.bos_token
        if not bos:
            return 0
        text = str(self._apply(chat, self.source))
        n_added = 0 if text.startswith(bos) else len(self._add_bos([]))  # by a processor
        return text.count(bos) + n_added

    @cached_property
    def _own_source(self) -> str:
        """The Jinja source as the tokenizer has it."""
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:
            raise UserError(f"the tokenizer has no chat template to use: {error}") from error

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the contents of messages are lists of parts, as in templates of vision-language models.

        Such templates drop a plain text, or fail on it.
        """
        chat = [Message(role="user", content=_PLACEHOLDER_TEXT)]
        source = fix_date(self._own_source)
        shown = []
        for takes_parts in (False, True):
            try:
                text = str(self._call_tokenizer(_split_into_parts(chat) if takes_parts else chat, source))
            except UserError:
                text = ""
            shown.append(_PLACEHOLDER_TEXT in text)
        return shown == [False, True]

    @cached_property
    def _prompt_end(self) -> str:
        """Text between the last user turn and the response."""
        return self.generation_prompt + self.response_start.opening

    @cached_property
    def _plain_prompt(self) -> str:
        """The generation prompt where thinking is not switched off."""
        text = self._render_text([Message(role="user", content=_PLACEHOLDER_TEXT)], switches={})
        return text.rsplit(_PLACEHOLDER_TEXT, 1)[-1]

    @cached_property
    def _finished_turns(self) -> FinishedTurns:
        """How the template shows a finished response, with and without thoughts."""
        chat: list[Any] = [
            {"role": "user", "content": _PLACEHOLDER_TEXT},
            {"role": "assistant", "content": _PLACEHOLDER_RESPONSE},
        ]
        header = self._text_before_response(chat, _NO_THINKING)
        thoughts = dict.fromkeys(_THOUGHT_FIELDS, _PLACEHOLDER_THOUGHT)
        thinking_header = self._text_before_response([chat[0], chat[1] | thoughts], {})
        before, shows_thought, after = (thinking_header or "").partition(_PLACEHOLDER_THOUGHT)
        return FinishedTurns(header, before, after) if shows_thought else FinishedTurns(header)

    def _text_before_response(self, chat: list[Any], switches: Mapping[str, Any]) -> str | None:
        """Return the text between the user's text and the finished response; None if it is not shown."""
        try:
            text = self._render_text(chat, with_generation_prompt=False, switches=switches)
        except UserError:
            return None
        before_response, placeholder, _ = text.partition(_PLACEHOLDER_RESPONSE)
        return before_response.rsplit(_PLACEHOLDER_TEXT, 1)[-1] if placeholder else None

    @cached_property
    def _special_thinking_ids(self) -> list[tuple[list[int], list[int]]]:
        """Token ids of the thinking tags that contain special tokens."""
        special_ids = {
            token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        tag_ids = [
            [self._encode_tag(tag) for tag in (opening, closing.strip())]
            for opening, closing in self.thinking_tags.items()
        ]
        return [
            (opening, closing)
            for opening, closing in tag_ids
            if opening and special_ids & {*opening, *closing}
        ]

    def _encode_tag(self, tag: str) -> list[int]:
        """Return the token ids of a tag; encoded as a text, a single token may get a space before it."""
        token_id = self.tokenizer.get_added_vocab().get(tag)
        return self.tokenizer.encode(tag, add_special_tokens=False) if token_id is None else [token_id]

    @cached_property
    def _writes_date(self) -> bool:
        """Whether the template writes today's date, or the one that it is given."""
        chats = [[Message(role="user", content="Hi")]]
        if self.system_policy == "native":
            chats.append([Message(role="system", content="Hi"), *chats[0]])
        return any(self._render_text(chat) != self._render_text(chat, day=_OTHER_DATE) for chat in chats)

    def _render_text(
        self,
        chat: Chat,
        with_generation_prompt: bool = True,
        switches: Mapping[str, Any] = _NO_THINKING,
        day: date = FIXED_DATE,
    ) -> str:
        """Return the text of a chat without anything that is appended to the generation prompt."""
        return str(
            self._apply(
                chat,
                fix_date(self._own_source, day),
                switches=switches,
                add_generation_prompt=with_generation_prompt,
                date_string=_format_date_string(day),
            )
        )

    def _apply(self, chat: Chat, source: str, **options: Any) -> Any:
        """Render a chat as text or, with `tokenize=True`, as token ids."""
        return self._call_tokenizer(_split_into_parts(chat) if self._takes_parts else chat, source, **options)

    def _call_tokenizer(
        self, chat: Any, source: str, switches: Mapping[str, Any] = _NO_THINKING, **options: Any
    ) -> Any:
        """Call `apply_chat_template`; whatever a template raises becomes a UserError."""
        defaults: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        defaults["date_string"] = _format_date_string(FIXED_DATE)
        try:
            return self.tokenizer.apply_chat_template(
                chat, chat_template=source, return_dict=True, **{**defaults, **switches, **options}
            )
        except Exception as error:  # Python's own errors come through Jinja unchanged
            raise UserError(
                f"the model's chat template rejects this chat: {_describe_failure(error)}"
            ) from error


def remove_whitespace(text: str) -> str:
    """Return the text without whitespace, which templates trim and tokenizers alter.

    >>> remove_whitespace(" I  can't ")
    "Ican't"
    """
    return re.sub(r"\s+", "", text)


def redact_secrets(text: str, secrets: tuple[str, ...]) -> str:
    """Return the text with secrets replaced by a mark, even if whitespace inside them was changed.

    >>> redact_secrets("say tulip  seven now", ("tulip seven",))
    'say ⟨secret⟩ now'
    """
    for secret in secrets:
        text = re.sub(r"\s*".join(map(re.escape, remove_whitespace(secret))), "⟨secret⟩", text)
    return text


def _merge_system_turn(chat: Chat) -> Chat:
    """Return the chat with its system text put before the first user message."""
    system_text, turns = chat[0]["content"], [Message(**message) for message in chat[1:]]
    first_user = next((message for message in turns if message["role"] == "user"), None)
    if first_user is None:
        raise UserError("a chat without a user turn cannot be rendered")
    first_user["content"] = f"{system_text}\n\n{first_user['content']}"
    return turns


def _split_into_parts(chat: Chat) -> list[dict[str, Any]]:
    """Return the chat with each content as a list of parts: an image if there is one, and the text."""
    parts_by_message = []
    for message in chat:
        image_part = [{"type": "image"}] if "image" in message else []
        parts = [*image_part, {"type": "text", "text": message["content"]}]
        parts_by_message.append({**message, "content": parts})
        parts_by_message[-1].pop("image", None)
    return parts_by_message


def _escape_marks(chat: Chat, reserved_texts: Sequence[str]) -> Chat:
    """Return the chat with a space in every mark of an image that its texts contain.

    A text must not add an image, or take the place of one.

    >>> _escape_marks([{"role": "user", "content": "<image> a"}], ["<image>"])[0]["content"]
    '< image> a'
    """
    escaped = copy_chat(chat)
    for message in escaped:
        for mark in reserved_texts:
            message["content"] = message["content"].replace(mark, f"{mark[:1]} {mark[1:]}")
    return escaped


def _format_date_string(day: date) -> str:
    """Return a date as Llama 3.x writes it, which takes it as an argument."""
    return f"{day:%d %b %Y}"


def _describe_failure(error: BaseException | None) -> str:
    """Return what a template raised; the type only where it is no message of the template's own."""
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
