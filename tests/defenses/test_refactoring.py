"""Refactoring defenses: generated rewrites replace the request, and retokenization keeps its text."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conftest import make_toy_session, render_query, toy_tokenizer

from analysis.datasets.queries import Query
from analysis.readouts.first_token import REFUSAL_QUESTIONS
from defenses.catalog import get_defense
from defenses.contract import Chat, Defense, ModelCall, ModelInfo
from defenses.errors import UserError

SYSTEM = {"role": "system", "content": "You are a baker."}
REQUEST = "How do I bake a loaf of bread for my neighbor?"
CHAT = [SYSTEM, {"role": "user", "content": REQUEST}]


def consult(defense: Defense, *texts: str) -> tuple[list[ModelCall], list[Chat]]:
    """Return the calls of a defense that receives these responses in order, and its chats."""
    consultation, calls, remaining = defense.consult_model(CHAT, random.Random(0)), [], iter(texts)
    responses: Any = None
    while True:
        try:
            new_calls = consultation.send(responses)
        except StopIteration as stop:
            return calls, stop.value
        calls += new_calls
        responses = [next(remaining) for _ in new_calls]


@pytest.mark.parametrize(("name", "n_calls"), [("paraphrase", 1), ("summarize", 1), ("round_trip", 2)])
def test_the_last_response_replaces_the_request(name: str, n_calls: int) -> None:
    responses = ["Comment cuire du pain ?", "What makes bread?"][-n_calls:]
    calls, (chat,) = consult(get_defense(name), *responses)
    assert chat == [SYSTEM, {"role": "user", "content": responses[-1]}]
    assert len(calls) == n_calls and REQUEST in calls[0].chat[0]["content"]
    assert all(text in call.chat[0]["content"] for text, call in zip(responses, calls[1:], strict=False))
    # The response is prefilled, so that the model rewrites instead of answering.
    assert all(call.stops_at_newline and call.chat[-1]["role"] == "assistant" for call in calls)


def test_a_users_instruction_is_used() -> None:
    settings = {"text": "Say it as a pirate would: {request}", "tokens": "9"}
    (call,), _ = consult(get_defense("paraphrase", settings), "Arr.")
    assert call.chat[0]["content"] == f"Say it as a pirate would: {REQUEST}" and call.max_new_tokens == 9


@pytest.mark.parametrize("name", ["paraphrase", "summarize", "two_pass_intention", "back_translation"])
def test_an_instruction_without_the_placeholder_is_rejected(name: str) -> None:
    with pytest.raises(UserError, match=r"must contain \{request\}"):
        get_defense(name, {"text": "Rephrase the request."})


def test_the_intention_precedes_the_final_request() -> None:
    _, (chat,) = consult(get_defense("two_pass_intention"), "to bake bread.")
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "user"]
    assert REQUEST in chat[1]["content"] and chat[2]["content"].endswith("to bake bread.")


def test_a_question_readout_of_two_passes_contains_the_request() -> None:
    session = make_toy_session().with_questions(REFUSAL_QUESTIONS)
    query = Query("q", "How do I sing?", False)
    prompts = render_query(session, get_defense("two_pass_intention", {"tokens": "8"}), query)
    assert all(query.text in prompt.chat[-1]["content"] for prompt in prompts)


def test_back_translation_scores_the_request_and_the_one_inferred_from_the_response() -> None:
    defense = get_defense("back_translation")
    (first, second), chats = consult(defense, "Mix flour and water", "What is bread made of?")
    assert first.chat == CHAT and not first.stops_at_newline
    assert "Mix flour and water" in second.chat[0]["content"] and REQUEST not in second.chat[0]["content"]
    assert chats == [CHAT, [SYSTEM, {"role": "user", "content": "What is bread made of?"}]]
    assert defense.pool == "max" and consult(defense, "")[1] == [CHAT]


# --- retokenization ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("rate", ["0.4", "1"])
def test_retokenization_changes_the_tokens_of_the_request_but_not_its_text(kind: str, rate: str) -> None:
    session = make_toy_session(kind=kind)
    query = Query("q", "Please explain how a bakery bakes wonderful bread every morning, thank you.", False)
    model_info = ModelInfo("toy", toy_tokenizer(kind=kind), ())
    defense = get_defense("retokenization", {"rate": rate}).prepare(model_info)
    (plain,), (split,) = (render_query(session, each, query) for each in (get_defense("none"), defense))
    assert split.text == plain.text and len(split.ids) > len(plain.ids)
    # Nothing outside of the request changes: neither the template nor the system turn.
    start = next(index for index, (a, b) in enumerate(zip(plain.ids, split.ids, strict=False)) if a != b)
    head, tail = (
        session.chat_template.decode_tokens(plain.ids[:start]),
        session.chat_template.generation_prompt,
    )
    assert query.text not in head and session.chat_template.decode_tokens(split.ids).endswith(tail)
    n_tail = len(session.loaded_model.tokenizer.encode(tail, add_special_tokens=False))
    assert split.ids[-n_tail:] == plain.ids[-n_tail:]
    assert render_query(session, defense, query)[0].ids == split.ids


def test_a_tiny_rate_splits_nothing() -> None:
    session = make_toy_session()
    model_info = ModelInfo("toy", toy_tokenizer(), ())
    defense = get_defense("retokenization", {"rate": "0.000001"}).prepare(model_info)
    query = Query("q", REQUEST, False)
    assert render_query(session, defense, query) == render_query(session, get_defense("none"), query)
