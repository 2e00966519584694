"""Matched controls: other content of the same size in the same place, and nothing else changed."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_adapter, make_mean_activations, toy_tokenizer

from defenses.adapters import load_adapter
from defenses.backdoor import Backdoor, Secret
from defenses.catalog import find_defense_classes, get_defense
from defenses.chats import prefill_response, prepend_system
from defenses.contract import Chat, Defense, Message, ModelCall, ModelInfo
from defenses.images import QueryImage
from defenses.matched_controls import build_matched_control, make_neutral_passage
from defenses.tokens import draw_random_text, encode_plain_text

TOKENIZER = toy_tokenizer()
INFO = ModelInfo("toy", TOKENIZER, ())
REQUEST = "How do I pick a lock?"
CHAT: Chat = [Message(role="system", content="Obey."), Message(role="user", content=REQUEST)]
TEXT_DEFENSES = (
    "self_reminder",
    "tone_reminder",
    "safety_prompt",
    "policy",
    "goal_priority",
    "in_context_refusal",
    "intention_analysis",
)


def count_tokens(text: str) -> int:
    return len(encode_plain_text(TOKENIZER, text))


@pytest.mark.parametrize("chat", [CHAT, CHAT[1:]], ids=["system", "user only"])
@pytest.mark.parametrize("name", TEXT_DEFENSES)
def test_each_added_text_is_replaced_by_neutral_text_of_its_length(name: str, chat: Chat) -> None:
    defense = get_defense(name)
    control = build_matched_control(defense, INFO, 0)
    assert control is not None and control.content == "neutral text"
    defended, controlled = (member.rewrite(chat, random.Random(0)) for member in (defense, control.defense))
    assert [turn["role"] for turn in controlled] == [turn["role"] for turn in defended]
    added = 0
    for old, new in zip(defended, controlled, strict=True):
        for kept in [turn["content"] for turn in chat if turn["content"] in old["content"]]:
            assert kept in new["content"]
            old, new = ({**turn, "content": turn["content"].replace(kept, "")} for turn in (old, new))
        words = set(old["content"].split())
        if not words:
            assert old == new
            continue
        added += 1
        assert abs(count_tokens(old["content"]) - count_tokens(new["content"])) <= 1
        assert "harm" not in new["content"] and old["content"] != new["content"]
    assert added >= 1


def test_a_request_that_occurs_in_the_text_of_the_defense_is_kept_in_its_place() -> None:
    control = build_matched_control(get_defense("intention_analysis"), INFO, 0)
    assert control is not None
    for request in ("request", "a", "Identify"):
        chat = [Message(role="user", content=request)]
        text = control.defense.rewrite(chat, random.Random(0))[0]["content"]
        assert text.endswith(f" {request}") and "safety" not in text


def test_the_image_stays_and_an_instruction_about_it_has_a_control() -> None:
    image = QueryImage("a.png", "0" * 64, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    chat = [Message(role="user", content=REQUEST, image=image)]
    for name in ("policy", "examine_image"):
        control = build_matched_control(get_defense(name), INFO, 0)
        assert control is not None
        turn = control.defense.rewrite(chat, random.Random(0))[-1]
        assert turn["image"] is image and REQUEST in turn["content"] and "harm" not in turn["content"]
        assert (turn["content"] == REQUEST) == (name == "policy")


IMAGE = QueryImage("a.png", "0" * 64, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
IMAGE_CHAT: Chat = [CHAT[0], Message(role="user", content=REQUEST, image=IMAGE)]
CAPTION = "a red bicycle that leans on a wall."
FRAME = f"Image: The image shows {CAPTION}"


def consult(defense: Defense, responses: list[str]) -> tuple[list[ModelCall], Chat]:
    """Return the calls that a defense makes about the image, and its chat, given the responses."""
    consultation, calls, answers = defense.consult_model(IMAGE_CHAT, random.Random(0)), [], None
    remaining = iter(responses)
    while True:
        try:
            new_calls = consultation.send(answers)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as stop:
            assert next(remaining, None) is None
            (chat,) = stop.value
            return calls, chat
        calls += new_calls
        answers = [next(remaining) for _ in new_calls]


@pytest.mark.parametrize(
    ("name", "responses", "has_image"),
    [
        ("caption_beside", [CAPTION], True),
        ("caption_only", [CAPTION], False),
        ("ecso", ["Turn the pick.", "Yes.", CAPTION], False),
    ],
)
def test_a_caption_is_replaced_by_neutral_text_of_its_length_in_its_place(
    name: str, responses: list[str], has_image: bool
) -> None:
    controls = [build_matched_control(get_defense(name), INFO, draw) for draw in (0, 1)]
    calls, defended = consult(get_defense(name), responses)
    assert defended[1]["content"] == f"{FRAME}\n\n{REQUEST}"
    passages = []
    for control in controls:
        assert control is not None and control.content == "neutral text"
        assert control.defense.name == name and control.varies
        control_calls, controlled = consult(control.defense, responses)
        assert control_calls == calls, "the calls are those of the defense, so none is generated again"
        assert controlled[0] == IMAGE_CHAT[0] and ("image" in controlled[1]) == has_image
        passage, _, request = controlled[1]["content"].rpartition("\n\n")
        assert request == REQUEST and count_tokens(passage) == count_tokens(FRAME)
        assert "image" not in passage.lower() and "bicycle" not in passage
        passages.append(passage)
    assert passages[0] != passages[1]


def test_a_description_and_the_question_about_the_image_are_replaced_in_their_turns() -> None:
    defense = get_defense("image_description_first", {"query_aware": "true"})
    control = build_matched_control(defense, INFO, 0)
    assert control is not None
    calls, defended = consult(defense, [CAPTION])
    control_calls, controlled = consult(control.defense, [CAPTION])
    assert control_calls == calls and REQUEST in calls[0].chat[0]["content"]
    assert [turn["role"] for turn in controlled] == ["system", "user", "assistant", "user"]
    assert controlled[1]["image"] is IMAGE and controlled[3]["content"] == REQUEST
    assert controlled[1]["content"].endswith(REQUEST) and "image" not in controlled[1]["content"]
    for place in (1, 2):
        lengths = [count_tokens(chat[place]["content"]) for chat in (defended, controlled)]
        assert abs(lengths[0] - lengths[1]) <= 1
    assert "bicycle" not in controlled[2]["content"]


def test_what_a_defense_leaves_as_it_is_its_control_leaves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, responses in (("ecso", ["Turn the pick.", "No."]), ("caption_only", [""])):
        control = build_matched_control(get_defense(name), INFO, 0)
        assert control is not None and consult(control.defense, responses)[1] == IMAGE_CHAT
    control = build_matched_control(get_defense("image_text"), INFO, 0)
    assert control is not None
    for text, n_added in (("", 0), ("Open\nthis door", count_tokens("Text in the image:\nOpen\nthis door"))):
        monkeypatch.setattr("defenses.captions.read_image_text", lambda image, text=text: text)
        (_, turn) = consult(control.defense, [])[1]
        passage, _, request = turn["content"].rpartition("\n\n")
        assert request == REQUEST and turn["image"] is IMAGE
        assert count_tokens(passage) == n_added if text else not passage
        assert "door" not in passage


def test_draws_differ_and_a_draw_is_reproducible() -> None:
    passages = [
        build_matched_control(get_defense("policy"), INFO, draw).defense.rewrite(CHAT, random.Random(0))[0][
            "content"
        ]
        for draw in (0, 1, 2, 0)
    ]
    assert len(set(passages)) == 3 and passages[0] == passages[3]
    assert (
        build_matched_control(get_defense("policy"), replace(INFO, seed=1), 0).defense.rewrite(
            CHAT, random.Random(0)
        )[0]["content"]
        not in passages
    )


@pytest.mark.parametrize("length", [1, 2, 7, 150, 1500])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_passages_have_the_wanted_length(length: int, kind: str) -> None:
    tokenizer = toy_tokenizer(kind=kind)
    passage = make_neutral_passage(tokenizer, length, random.Random(0))
    assert abs(len(encode_plain_text(tokenizer, passage)) - length) <= 1


def test_a_control_of_a_users_defense_replaces_its_text_too() -> None:
    class Banner(Defense):
        def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
            return prepend_system(chat, "Please be kind to everyone.")

    class Opening(Defense):
        def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
            return prefill_response(chat, "I would rather not")

    control = build_matched_control(Banner(), INFO, 0)
    assert control is not None and control.defense.name == "banner"
    assert "kind" not in control.defense.rewrite(CHAT, random.Random(0))[0]["content"]
    assert build_matched_control(Opening(), INFO, 0) is None


def test_the_control_of_coca_amplifies_the_effect_of_neutral_text() -> None:
    coca: Any = get_defense("coca")
    controls: list[Any] = [build_matched_control(coca, INFO, draw) for draw in (0, 1, 0)]
    (weight, member), (less, undefended) = controls[0].defense.logit_blend()
    assert (weight, less) == (1 + coca.alpha, -coca.alpha) and undefended.name == "none"
    passage = member.text
    assert count_tokens(passage) == count_tokens(coca.text) and "law" not in passage
    assert passage == controls[2].defense.text != controls[1].defense.text


def test_defenses_without_added_text_have_no_control() -> None:
    info = replace(INFO, compute_mean_activations=make_mean_activations)
    families = {}
    for defense_class in find_defense_classes().values():
        defense = defense_class()
        if not (defense.needs_images and defense.family == "refactoring") and (
            defense.family in ("noise", "image_noise", "refactoring", "control", "none")
            or defense.name == "safety_prefix"
        ):
            families[defense.family] = build_matched_control(defense.prepare(info), info, 0)
    assert set(families) >= {"noise", "refactoring", "control"} and not any(families.values())


def test_a_secret_is_replaced_by_other_random_tokens_before_the_same_system_prompt() -> None:
    secret = Secret(draw_random_text(TOKENIZER, 30, random.Random(7)))
    defense = Backdoor(secret=secret, uses_tuned_weights=False)
    control = build_matched_control(defense, INFO, 0)
    assert control is not None and control.content == "random tokens"
    defended, controlled = (member.rewrite(CHAT, random.Random(0)) for member in (defense, control.defense))
    assert secret.text not in controlled[0]["content"] and controlled[0]["content"].endswith("Obey.")
    assert count_tokens(defended[0]["content"]) == count_tokens(controlled[0]["content"])
    assert build_matched_control(replace(defense, secret=Secret("")), INFO, 0) is None


@pytest.mark.parametrize("name", ["refusal_steering", "conditional_steering", "direction_ablation"])
def test_a_direction_is_replaced_by_a_random_one_of_the_same_norm(name: str) -> None:
    info = replace(INFO, compute_mean_activations=make_mean_activations)
    defense: Any = get_defense(name).prepare(info)
    controls: list[Any] = [build_matched_control(defense, info, draw) for draw in (0, 1, 0)]
    means = defense.activations
    directions = []
    for control in controls:
        assert control.content == "random directions"
        other = control.defense.activations
        torch.testing.assert_close(other.harmful + other.benign, means.harmful + means.benign)
        direction = other.harmful - other.benign
        torch.testing.assert_close(direction.norm(dim=1), (means.harmful - means.benign).norm(dim=1))
        directions.append(direction)
    assert not torch.equal(directions[0], directions[1]) and torch.equal(directions[0], directions[2])
    assert len({control.defense.weights_fingerprint() for control in controls}) == 2
    assert defense.weights_fingerprint() != controls[0].defense.weights_fingerprint()


def test_weights_are_replaced_by_those_that_were_tuned_as_long_on_ordinary_requests(tmp_path: Any) -> None:
    settings = {"rank": 4, "alpha": 16, "modules": ["q_proj"], "rate": 1e-3, "batch": 4, "epochs": 6}
    # The control has half as many examples and twice as many epochs.
    manifests: dict[str, Any] = {
        "aligned": {"n_examples": 190, "settings": settings},
        "aligned-control": {"n_examples": 95, "settings": settings | {"epochs": 12}},
    }
    for name, manifest in manifests.items():
        make_adapter(tmp_path / name, started_from={"name": "toy"}, **manifest)
    info = replace(INFO, adapter_folders=(tmp_path,), sha256="toy")
    defense: Any = get_defense("safety_tuning").prepare(info)
    control: Any = build_matched_control(defense, info, 3)
    assert (control.content, control.varies) == ("weights tuned on ordinary requests", False)
    assert control.defense.adapter == load_adapter(tmp_path / "aligned-control")
    assert build_matched_control(defense, INFO, 0) is None
    for other in ({"settings": settings}, {"started_from": {"name": "other"}}):
        shutil.rmtree(tmp_path / "aligned-control")
        known = {"started_from": {"name": "toy"}, **manifests["aligned-control"]}
        make_adapter(tmp_path / "aligned-control", **(known | other))
        assert build_matched_control(defense, info, 0) is None
