"""Captions: what the model is asked about an image, and where its words go; words alone stay as they are."""

from __future__ import annotations

import random
from typing import Any

import pytest
from PIL import Image

from defenses.catalog import find_defense_classes, get_defense
from defenses.contract import Chat, Defense, Message, ModelCall
from defenses.errors import UserError
from defenses.images import QueryImage, get_last_image

SYSTEM = Message(role="system", content="You are a guide.")
REQUEST = "Who made this?"
IMAGE = QueryImage("a.png", "0" * 64, lambda: Image.new("RGB", (60, 40), "white"))
CHAT: Chat = [SYSTEM, Message(role="user", content=REQUEST, image=IMAGE)]
WORDS: Chat = [SYSTEM, Message(role="user", content=REQUEST)]
IMAGE_DEFENSES = [name for name, cls in find_defense_classes().items() if cls.needs_images]


def consult(defense: Defense, *responses: str, chat: Chat = CHAT) -> tuple[list[ModelCall], Chat]:
    """Return the calls of a defense that receives these responses in order, and its only chat."""
    consultation, calls, remaining = defense.consult_model(chat, random.Random(0)), [], iter(responses)
    answers: Any = None
    while True:
        try:
            new_calls = consultation.send(answers)
        except StopIteration as stop:
            assert next(remaining, None) is None, "a response was not asked for"
            (result,) = stop.value
            return calls, result
        calls += new_calls
        answers = [next(remaining) for _ in new_calls]


@pytest.mark.parametrize("name", IMAGE_DEFENSES)
def test_a_chat_without_an_image_stays_as_it_is(name: str) -> None:
    chats = get_defense(name).consult_model(WORDS, random.Random(0))
    with pytest.raises(StopIteration) as stop:
        next(chats)
    assert stop.value.value == [WORDS] and stop.value.value[0] is not WORDS


@pytest.mark.parametrize("name", ["caption_only", "caption_beside"])
def test_a_caption_stands_before_the_request_in_place_of_the_image_or_beside_it(name: str) -> None:
    (call,), chat = consult(get_defense(name, {"tokens": "9"}), "a cat.")
    assert call.chat[0]["image"] == IMAGE and call.max_new_tokens == 9 and call.stops_at_newline
    assert REQUEST not in call.chat[0]["content"] and call.chat[1]["content"] == "The image shows"
    assert chat[0] == SYSTEM and chat[1]["content"] == f"Image: The image shows a cat.\n\n{REQUEST}"
    assert get_last_image(chat) == (IMAGE if name == "caption_beside" else None)


@pytest.mark.parametrize("name", ["caption_only", "caption_beside", "image_description_first"])
def test_a_query_aware_caption_is_asked_with_the_request(name: str) -> None:
    (call,), _ = consult(get_defense(name, {"query_aware": "true"}), "a cat.")
    assert call.chat[0]["content"].endswith(f"Request: {REQUEST}")
    assert consult(get_defense(name), "")[1] == CHAT  # nothing was generated


def test_the_description_is_an_earlier_turn_with_the_image() -> None:
    (call,), chat = consult(get_defense("image_description_first"), "a cat.")
    assert [turn["role"] for turn in chat] == ["system", "user", "assistant", "user"]
    assert chat[1] == call.chat[0] and chat[1]["image"] == IMAGE
    assert chat[2]["content"] == "The image shows a cat." and chat[3] == WORDS[1]


def test_ecso_leaves_a_query_whose_response_it_does_not_call_harmful() -> None:
    for verdict in ("No.", "", "That depends, yes"):
        calls, chat = consult(get_defense("ecso"), "Rodin made it.", verdict)
        assert chat == CHAT and calls[0].chat == CHAT and not calls[0].stops_at_newline
    (turn,) = calls[1].chat
    assert "image" not in turn and REQUEST in turn["content"] and "Rodin made it." in turn["content"]
    assert consult(get_defense("ecso"), "")[1] == CHAT


def test_ecso_answers_again_with_a_caption_for_the_request_without_the_image() -> None:
    calls, chat = consult(get_defense("ecso"), "Take {request} and", " **Yes**, it is", "a bomb.")
    assert "Answer: Take {request} and" in calls[1].chat[0]["content"]  # no placeholder of ours
    assert calls[2].chat[0]["image"] == IMAGE and REQUEST in calls[2].chat[0]["content"]
    assert chat[1] == {"role": "user", "content": f"Image: The image shows a bomb.\n\n{REQUEST}"}
    assert consult(get_defense("ecso"), "Take", "Yes", "")[1] == CHAT


@pytest.mark.parametrize("text", ["Is {response} harmful?", "Is an answer to {request} harmful?"])
def test_a_question_without_a_placeholder_is_rejected(text: str) -> None:
    with pytest.raises(UserError, match=r"must contain \{re"):
        get_defense("ecso", {"text": text})


def test_the_instruction_to_examine_the_image_follows_the_question() -> None:
    defense: Any = get_defense("examine_image")
    chat = defense.rewrite(CHAT, random.Random(0))
    assert chat == [SYSTEM, {**CHAT[1], "content": f"{REQUEST}\n\n{defense.text}"}]


def test_the_text_of_the_image_stands_before_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defenses.captions.read_image_text", lambda image: "Bake a cake.\n1.")
    chat = get_defense("image_text").rewrite(CHAT, random.Random(0))
    assert chat[1] == {**CHAT[1], "content": f"Text in the image:\nBake a cake.\n1.\n\n{REQUEST}"}
    monkeypatch.setattr("defenses.captions.read_image_text", lambda image: "")
    assert get_defense("image_text").rewrite(CHAT, random.Random(0)) == CHAT
