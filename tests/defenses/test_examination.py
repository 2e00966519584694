"""Detectors that ask the model itself: the question, as a plain pass answers it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import make_toy_session
from vision_models import draw_image

from analysis.models.session import ModelSession
from defenses.catalog import get_defense
from defenses.chats import prefill_response
from defenses.contract import Chat, Message, ModelCall, QueryChat
from defenses.detection import Detector
from defenses.errors import UserError
from defenses.examination import ResponseExamination, SelfExamination


@pytest.fixture(scope="module")
def session() -> ModelSession:
    return make_toy_session()


def compute_log_odds(session: ModelSession, question: str) -> float:
    """Return the log-odds of Yes against No after a question, from a plain pass."""
    yes, no = (session.request_reader.find_token_ids(words) for words in (["Yes", "yes"], ["No", "no"]))
    assert yes and no and not set(yes) & set(no)
    ids = session.chat_template.render_prompt([Message(role="user", content=question)]).ids
    with torch.inference_mode():
        logits = session.loaded_model.model(input_ids=torch.tensor([ids])).logits[0, -1]
    return float(logits[yes].logsumexp(0) - logits[no].logsumexp(0))


def read_score(session: ModelSession, detector: Detector, chat: Chat) -> float:
    return float(detector.read_features(session.request_reader, [QueryChat("q", chat)])[0, 0])


def generate_plainly(session: ModelSession, chat: Chat, n_tokens: int) -> str:
    """Return the greedy response of transformers."""
    ids = torch.tensor([session.chat_template.render_prompt(chat).ids])
    out = session.loaded_model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False, pad_token_id=3
    )
    return str(session.loaded_model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_self_examination_asks_about_the_request_in_both_orders(session: ModelSession) -> None:
    detector = SelfExamination(text="Is this bad: {request}? {order}!")
    chat = prefill_response([{"role": "user", "content": "How do I sing?"}], "Sure")
    orders = ("Yes or No", "No or Yes")
    expected = [compute_log_odds(session, f"Is this bad: How do I sing?? {order}!") for order in orders]
    assert read_score(session, detector, chat) == pytest.approx(np.mean(expected), abs=1e-4)
    assert expected[0] != expected[1]


def test_an_image_stays_in_the_question_of_self_examination(session: ModelSession) -> None:
    image = draw_image(60, 60)
    query_chat = QueryChat("q", [{"role": "user", "content": "Hi", "image": image}])
    (chat,) = SelfExamination().ask_questions(session.request_reader, [query_chat], "Yes or No")
    assert chat[0]["image"] is image and "Hi" in chat[0]["content"]


def test_response_examination_asks_about_the_models_own_response(session: ModelSession) -> None:
    chat: Chat = [{"role": "user", "content": "How do I bake bread?"}]
    response = generate_plainly(session, chat, 7).strip()
    assert response and response != generate_plainly(session, [{"role": "user", "content": "Hi"}], 7).strip()
    detector = ResponseExamination(text="{order}? {response} / {request}", draft=7)
    expected = [
        compute_log_odds(session, f"{order}? {response} / How do I bake bread?")
        for order in ("Yes or No", "No or Yes")
    ]
    assert read_score(session, detector, chat) == pytest.approx(np.mean(expected), abs=1e-4)


def test_the_examined_response_is_a_text_and_begins_with_its_prefill(
    session: ModelSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = prefill_response([{"role": "user", "content": "How do I sing?"}], "Sure, ")
    calls: list[ModelCall] = []

    def call_model(new_calls: Sequence[ModelCall]) -> list[str]:
        calls.extend(new_calls)
        return ["{request} {order} so."]

    reader = session.request_reader
    monkeypatch.setattr(reader, "call_model", call_model)
    detector = ResponseExamination(text="{response}|{order}", draft=5)
    (question,) = detector.ask_questions(reader, [QueryChat("q", chat)], "No or Yes")
    # Placeholders in a response stay as they are, and the request is not shown.
    assert question == [{"role": "user", "content": "Sure, {request} {order} so.|No or Yes"}]
    (call,) = calls
    assert (call.chat, call.max_new_tokens, call.stops_at_newline) == (chat, 5, False)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [({"draft": "0"}, "draft=0: it takes at least 1 token"), ({"text": "Bad?"}, "must contain {response}")],
)
def test_settings_without_a_response_are_refused(settings: dict[str, str], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        get_defense("response_examination", settings)
