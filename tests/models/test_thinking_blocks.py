"""Thinking is told from the response by its tags, as texts and as tokens."""

from __future__ import annotations

import pytest
from conftest import toy_tokenizer

from analysis.judges.rules import judge_by_patterns
from analysis.models.chat_template import ChatTemplate
from analysis.models.thinking_blocks import find_open_tag, find_thinking_tags, strip_thinking

THOUGHT, RESPONSE = "They want a lock opened. I can't tell why.", "Sure, here is how to do it."
PAIRS = [
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    ("<think:opensource>", "</think:opensource>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|my_thinking_start|>", "<|my_thinking_end|>"),
    ("<|channel>thought\n", "\n<channel|>"),
]


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_a_response_is_judged_without_its_thoughts(opening: str, closing: str) -> None:
    text = f"{opening}{THOUGHT}{closing}{RESPONSE}"
    assert strip_thinking(text).strip() == RESPONSE
    assert not judge_by_patterns(text).is_refusal
    refusal = f"{opening}{RESPONSE}{closing}\n\nI can't help with that."
    assert judge_by_patterns(refusal).is_refusal


def test_an_unfinished_block_and_one_that_the_prompt_opened_are_thinking() -> None:
    assert strip_thinking(f"[THINK]{THOUGHT}").strip() == ""
    assert strip_thinking(f"{THOUGHT}</think>\n\n{RESPONSE}").strip() == RESPONSE
    assert strip_thinking(f"{THOUGHT}</think><answer>\n{RESPONSE}\n</answer>").strip() == RESPONSE
    assert strip_thinking(f"<response>{RESPONSE}</response>").strip() == RESPONSE


@pytest.mark.parametrize("text", ["<b>I think</b> so.", "Use <reason>x</reason>.", "[I think] so, <thinker>"])
def test_other_tags_are_part_of_the_response(text: str) -> None:
    assert strip_thinking(text) == text and find_thinking_tags([text]) == {}


def test_a_switch_that_asks_for_thinking_is_no_block() -> None:
    assert find_thinking_tags(["<|think|>", "<|turn>", "<start_think>"]) == {}
    assert find_open_tag("<|think|>a", find_thinking_tags(["<|think|>"])) == ""


def test_thoughts_between_control_tokens_are_cut_before_these_vanish() -> None:
    for name, opening, closing in (
        ("magistral", "[THINK]", "[/THINK]"),
        ("harmony", "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ):
        template = ChatTemplate(toy_tokenizer(name))
        encode = template.tokenizer.encode
        ids = encode(f"{opening}{THOUGHT}{closing}{RESPONSE}</s>", add_special_tokens=False)
        assert template.decode_response(ids) == RESPONSE
        assert template.decode_response(ids[:9]) == ""
        plain = encode(RESPONSE, add_special_tokens=False)
        assert template.decode_response(plain) == template.tokenizer.decode(plain)
