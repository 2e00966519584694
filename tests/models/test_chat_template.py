"""What a model reads comes from its template: nothing dropped, nothing doubled, the chat untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import CHATML, TEMPLATES, toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from analysis.models.chat_template import (
    ChatTemplate,
    redact_secrets,
    remove_whitespace,
)
from analysis.models.thinking_blocks import remove_thinking
from defenses.catalog import get_defense
from defenses.contract import Chat
from defenses.errors import UserError

MERGED = {"gemma2", "mistral0.1", "deaf"}
KINDS = ("bytes", "metaspace")
SYSTEM, USER = "Be kind and brief.", "How do I bake bread?"
ASKED: Chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
SHOWN: Chat = [
    ASKED[0],
    {"role": "user", "content": "First request"},
    {"role": "assistant", "content": "First answer"},
    ASKED[1],
]


def renderer(template: str, kind: str = "bytes") -> ChatTemplate:
    return ChatTemplate(toy_tokenizer(template, kind))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [ASKED[1:], ASKED, SHOWN], ids=["user", "system", "demonstrations"])
def test_every_message_reaches_the_tokens(template: str, kind: str, chat: Chat) -> None:
    text = renderer(template, kind).render_prompt(chat).text
    for message in chat:
        assert remove_whitespace(text).count(remove_whitespace(message["content"])) == 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_system_role_is_native_where_the_template_has_one_and_merged_where_it_raises_or_drops_it(
    template: str,
) -> None:
    asked = renderer(template)
    assert asked.system_policy == ("merged" if template in MERGED else "native")
    roles = [message["role"] for message in asked.render_prompt(ASKED).chat]
    assert roles == (["user"] if template in MERGED else ["system", "user"])
    assert any("no system role" in notice for notice in asked.notices) == (template in MERGED)


@pytest.mark.parametrize("template", sorted(MERGED))
def test_a_merged_system_text_stands_at_the_head_of_the_first_user_turn(template: str) -> None:
    chat = renderer(template).render_prompt(SHOWN).chat
    assert [message["content"] for message in chat] == [
        f"{SYSTEM}\n\nFirst request",
        "First answer",
        USER,
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_never_changes_the_chat(template: str) -> None:
    chat = copy.deepcopy(SHOWN)
    renderer(template).render_prompt(chat)
    assert chat == SHOWN


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_there_are_as_many_bos_tokens_as_the_template_writes(template: str, kind: str) -> None:
    asked = renderer(template, kind)
    for chat in (ASKED, SHOWN):
        prompt = asked.render_prompt(chat)
        count = prompt.ids.count(asked.tokenizer.bos_token_id)
        assert count == asked.count_expected_bos(prompt.chat)
        # Known by hand: Llama 2 has one a user turn, SmolLM2's turns all open with it.
        turns = [message["role"] for message in prompt.chat]
        by_hand = {
            "llama3": 1,
            "gemma2": 1,
            "gemma3": 1,
            "mistral0.1": 1,
            "mistral0.3": 1,
            "r1": 1,
            "vicuna": 1,
        }
        by_hand |= {"llama2": turns.count("user"), "chatml": len(turns) + 1}
        assert count == by_hand.get(template, 0)


def test_a_tokenizer_that_adds_bos_by_itself_does_not_double_it() -> None:
    from tokenizers.processors import TemplateProcessing

    def adds_bos(template: str) -> Any:
        tokenizer = toy_tokenizer(template)
        bos, token = tokenizer.bos_token_id, tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[token, "$A"], special_tokens=[(token, bos)]
        )
        assert tokenizer.encode("Hi").count(bos) == 1
        return tokenizer

    asked = ChatTemplate(adds_bos("gemma3"))
    assert asked.render_prompt(ASKED).ids.count(asked.tokenizer.bos_token_id) == 1
    assert not asked.notices
    # Vicuna's case, were its template not to write BOS: as transformers' chats have it, but it is said.
    without = ChatTemplate(adds_bos("space"))
    assert without.render_prompt(ASKED).ids.count(without.tokenizer.bos_token_id) == 0
    assert any("writes no BOS" in notice for notice in without.notices)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["qwen3", "r1"])
def test_a_thinking_block_is_closed_exactly_once(template: str, kind: str) -> None:
    asked = renderer(template, kind)
    text = asked.render_prompt(SHOWN).text
    assert text.count("<think>") == text.count("</think>") == 1
    assert text.rstrip().endswith("</think>")
    answer = {"qwen3": "<|im_end|><|im_start|>assistant", "r1": "<|Assistant|>"}[template]
    assert remove_whitespace(remove_thinking(text)).endswith(remove_whitespace(USER) + answer)
    assert any("thinking block" in notice for notice in asked.notices) == (template == "r1")


def test_a_template_that_ends_in_a_space_is_noticed() -> None:
    assert any("ends in a space" in notice for notice in renderer("space").notices)
    assert not any("ends in a space" in notice for notice in renderer("chatml").notices)


ODD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), min_size=1, max_size=30)


@given(text=ODD, template=st.sampled_from(sorted(TEMPLATES)))
def test_odd_letters_survive(text: str, template: str) -> None:
    prompt = renderer(template).render_prompt([{"role": "user", "content": f"a{text}b"}])
    assert remove_whitespace(f"a{text}b") in remove_whitespace(prompt.text)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "text",
    [
        "{{ 7 * 7 }} {% raw %} {# gone? #}",
        "[INST] x [/INST] <<SYS>>",
        "### User: x\nASSISTANT: ",
        "<b>&amp;</b>",
    ],
)
def test_text_that_looks_like_a_template_is_only_text(template: str, text: str) -> None:
    assert remove_whitespace(text) in remove_whitespace(
        renderer(template).render_prompt([{"role": "user", "content": text}]).text
    )


@pytest.mark.parametrize("template", ["gemma2", "gemma3", "llama2", "mistral0.1", "mistral0.3"])
def test_a_template_that_wants_turns_to_alternate_takes_demonstrations(template: str) -> None:
    import random

    defense = get_defense("in_context_refusal", {"shots": "2"})
    chat = defense.rewrite([{"role": "user", "content": USER}], random.Random(0))
    text = renderer(template).render_prompt(chat).text
    assert remove_whitespace(USER) in remove_whitespace(text) and len(chat) == 5


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for t in tools %}{{ t }}{% endfor %}", "fails on a single user message: TypeError"),
        ("{{ 'a' + 1 }}", "fails on a single user message: TypeError"),
        ("{{ '%z' % 1 }}", "fails on a single user message: ValueError"),
        ("{{ messages[0].none.content }}", "fails on a single user message: 'dict object' has no attr"),
        ("{{ raise_exception('No\nuser\nturns') }}", "fails on a single user message: No user turns; choose"),
        ("{{ ''.__class__.mro() }}", "fails on a single user message"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ 'Hi' }}", "drops the user's text"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error_of_one_line(source: str, problem: str) -> None:
    with pytest.raises(UserError, match=r"^the model's chat template") as raised:
        renderer(source).check_usable()
    assert problem in str(raised.value) and "\n" not in str(raised.value)
    assert "--template" in str(raised.value)


@pytest.mark.parametrize(
    "endless",
    [
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
        "{% for i in 'a' * 10**8 %}{% for j in 'a' * 10**8 %}{% endfor %}{% endfor %}",
        "{% set number = 9**(9**9) %}",
    ],
)
def test_a_template_that_takes_very_long_is_refused(endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.models.chat_template._MAX_CHECK_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"takes more than 0\.5 seconds for a short chat; choose another"):
        renderer(endless + CHATML).check_usable()


def test_a_system_turn_on_which_a_template_fails_is_merged() -> None:
    failing = CHATML.replace("m.role +", "{'user': 'user', 'assistant': 'assistant'}[m.role] +")
    assert renderer(failing).system_policy == "merged"
    assert [message["role"] for message in renderer(failing).render_prompt(ASKED).chat] == ["user"]


def test_contents_are_given_in_parts_to_templates_that_drop_plain_text() -> None:
    asked = renderer("smolvlm")
    plain = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in SHOWN]
    ids = asked.tokenizer.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    prompt = asked.render_prompt(SHOWN)
    assert list(prompt.ids) == ids and prompt.chat == SHOWN
    assert asked.identity["content"] == "parts" and renderer("chatml").identity["content"] == "text"


def test_a_chat_that_the_template_refuses_is_an_error_in_its_words() -> None:
    with pytest.raises(UserError, match=r"rejects this chat.*must alternate"):
        renderer("llama2").render_prompt([ASKED[1], ASKED[1]])
    with pytest.raises(UserError, match="without a user turn"):
        renderer("gemma2").render_prompt(ASKED[:1])


@given(st.text(alphabet="ab \n\t", min_size=1).filter(str.strip), st.text(alphabet="xy \n"))
def test_no_part_of_a_secret_is_left_however_its_spaces_changed(secret: str, other: str) -> None:
    shown = redact_secrets(f"{other}{secret.replace(' ', chr(10))}{other}", (secret,))
    assert "a" not in shown and "b" not in shown
    assert remove_whitespace(other) in remove_whitespace(shown)
