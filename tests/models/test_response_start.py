"""Responses begin where the template's finished turns show them, in the known formats of today's models."""

from __future__ import annotations

from itertools import cycle

import pytest
from conftest import CHATML, TEMPLATES, THINKING_TEMPLATES, toy_tokenizer

from analysis.models.chat_template import ChatTemplate
from analysis.models.response_start import FinishedTurns, find_response_start
from defenses.contract import Chat
from defenses.errors import UserError

KINDS = ("bytes", "metaspace")
USER = "How do I bake bread?"
CHAT: Chat = [{"role": "user", "content": USER}]
SHOWN: Chat = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "First request"},
    {"role": "assistant", "content": "First answer"},
    *CHAT,
]
REMINDED = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '(Be kind.)<|im_start|>assistant\\n' }}")


@pytest.mark.parametrize(("name", "kind"), list(zip(THINKING_TEMPLATES, cycle(KINDS), strict=False)))
def test_a_prompt_ends_where_the_response_begins(name: str, kind: str) -> None:
    _, end = THINKING_TEMPLATES[name]
    template = ChatTemplate(toy_tokenizer(name, kind))
    template.check_usable()
    for chat in (CHAT, SHOWN):
        prompt = template.render_prompt(chat)
        assert prompt.text.endswith(USER + end)
        assert all(prompt.text.count(message["content"]) == 1 for message in chat)
        # The ids are those of the whole text: nothing is put together from pieces that merge differently.
        source = template.source
        text = template._apply(prompt.chat, source)
        assert list(prompt.ids) == template.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not template.response_start.problem
    opening = template.response_start.opening
    assert bool(opening.strip()) == any(
        "opens a thinking block" in notice or repr(opening) in notice for notice in template.notices
    )


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "r1"])
def test_nothing_is_appended_where_the_generation_prompt_is_whole(name: str) -> None:
    assert ChatTemplate(toy_tokenizer(name)).response_start.opening == ""


def test_what_a_generation_prompt_lacks_is_taken_from_finished_turns() -> None:
    template = ChatTemplate(toy_tokenizer(CHATML.split("{% if add_generation_prompt %}")[0]))
    assert template.response_start.opening == "<|im_start|>assistant\n"
    assert template.render_prompt(CHAT).ids == ChatTemplate(toy_tokenizer("chatml")).render_prompt(CHAT).ids


def test_an_unknown_start_is_refused_unless_it_is_given() -> None:
    tokenizer = toy_tokenizer(REMINDED)
    with pytest.raises(UserError, match=r"not known where responses begin: say so with --answer-prefix TEXT"):
        ChatTemplate(tokenizer).check_usable()
    for prefix in ("", "<|channel|>final\n"):
        given = ChatTemplate(tokenizer, prefix)
        given.check_usable()
        assert given.render_prompt(CHAT).text.endswith("(Be kind.)<|im_start|>assistant\n" + prefix)
        assert given.opening_texts is None
    assert ChatTemplate(toy_tokenizer("r1"), "\n</think>").render_prompt(CHAT).text.endswith("\n\n</think>")
    identities = [ChatTemplate(tokenizer, prefix).identity for prefix in ("a", "b")]
    assert identities[0] != identities[1]


def test_thoughts_in_a_message_of_another_name_are_found() -> None:
    for field in ("thinking", "reasoning", "reasoning_content"):
        source = THINKING_TEMPLATES["harmony"][0].replace("m.thinking", f"m.{field}")
        tags = ChatTemplate(toy_tokenizer(source)).thinking_tags
        closing = "<|end|><|start|>assistant<|channel|>final<|message|>"
        assert tags["<|channel|>analysis<|message|>"] == closing


def test_a_template_that_shows_no_responses_is_taken_at_its_word() -> None:
    assert find_response_start("<start>", FinishedTurns(None), {}).opening == ""
    tags = {"<think>": "</think>"}
    assert find_response_start("<start><think>", FinishedTurns(None), tags).opening == "</think>"
