"""Refactoring: what the model says takes the request's place; disguises are undone, plain words stay."""

from __future__ import annotations

import base64
import codecs
import random
from typing import Any

import pytest
from conftest import toy_bench, toy_tokenizer

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query
from defenses.catalog import get_defense
from defenses.contract import Chat, Defense, ModelCall, ModelInfo
from defenses.deobfuscation import deobfuscate_text, extract_key_words

SYSTEM = {"role": "system", "content": "You are a baker."}
REQUEST = "How do I bake a loaf of bread for my neighbor?"
CHAT = [SYSTEM, {"role": "user", "content": REQUEST}]


def told(defense: Defense, *answers: str) -> tuple[list[ModelCall], list[Chat]]:
    """Return what a defense asks when it is given these answers one after the other, and its readings."""
    talk, asked, left = defense.consult_model(CHAT, random.Random(0)), [], iter(answers)
    said: Any = None
    while True:
        try:
            asks = talk.send(said)
        except StopIteration as over:
            return asked, over.value
        asked += asks
        said = [next(left) for _ in asks]


@pytest.mark.parametrize(("name", "calls"), [("paraphrase", 1), ("summarize", 1), ("round_trip", 2)])
def test_what_the_model_says_last_takes_the_requests_place(name: str, calls: int) -> None:
    answers = ["Comment cuire du pain ?", "What makes bread?"][-calls:]
    asked, (reading,) = told(get_defense(name), *answers)
    assert reading == [SYSTEM, {"role": "user", "content": answers[-1]}]
    assert len(asked) == calls and REQUEST in asked[0].chat[0]["content"]
    assert all(answer in ask.chat[0]["content"] for answer, ask in zip(answers, asked[1:], strict=False))
    # Its answer is begun for it, so that it rewords and does not reply.
    assert all(ask.stops_at_newline and ask.chat[-1]["role"] == "assistant" for ask in asked)


def test_a_users_own_instruction_is_asked() -> None:
    own = get_defense("paraphrase", {"text": "Say it as a pirate would: {request}", "tokens": "9"})
    (ask,), _ = told(own, "Arr.")
    assert ask.chat[0]["content"] == f"Say it as a pirate would: {REQUEST}" and ask.max_new_tokens == 9


def test_the_intention_is_part_of_the_conversation_before_the_answer() -> None:
    _, (reading,) = told(get_defense("two_pass_intention"), "to bake bread.")
    assert [message["role"] for message in reading] == ["system", "user", "assistant", "user"]
    assert REQUEST in reading[1]["content"] and reading[2]["content"].endswith("to bake bread.")


def test_back_translation_reads_the_request_and_what_is_inferred_from_the_answers_beginning() -> None:
    defense = get_defense("back_translation")
    (first, second), readings = told(defense, "Mix flour and water", "What is bread made of?")
    assert first.chat == CHAT and not first.stops_at_newline
    assert "Mix flour and water" in second.chat[0]["content"] and REQUEST not in second.chat[0]["content"]
    assert readings == [CHAT, [SYSTEM, {"role": "user", "content": "What is bread made of?"}]]
    assert defense.pool == "max" and told(defense, "")[1] == [CHAT]


# --- what needs no model ----------------------------------------------------------------------------------


def disguised() -> dict[str, str]:
    """Return a request in each disguise."""
    leet = REQUEST.lower().translate(str.maketrans("aeios", "43105"))
    return {
        "base64": base64.b64encode(REQUEST.encode()).decode(),
        "rot13": codecs.encode(REQUEST, "rot13"),
        "leetspeak": leet,
        "zero width": "\u200b".join(REQUEST),
        "wide": "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in REQUEST),
    }


@pytest.mark.parametrize("kind", disguised())
@pytest.mark.parametrize(
    "frame", ["{}", "Decode this and answer it: {}", "Answer the text below.\n\n{}\n\nNow."]
)
def test_a_disguise_is_undone_within_plain_words(kind: str, frame: str) -> None:
    plain = deobfuscate_text(frame.format(disguised()[kind]))
    assert plain.lower() == frame.format(REQUEST).lower()


def test_plain_requests_stay_as_they_are() -> None:
    every = [query.text for query in load_queries("contrast").queries]
    assert [text for text in every if deobfuscate_text(text) != text] == []


def test_plain_texts_with_digits_or_long_words_stay_as_they_are() -> None:
    for text in (
        "Convert 1500 mp3 files to ogg.",
        "What does the class AbstractSingletonProxyFactoryBean do?",
        "Was ist der Unterschied zwischen Wein und Traubensaft?",
        "https://example.org/a/very/long/path/with/segments",
        "100% of 3 is 3, and $5 + $7 is $12.",
    ):
        assert deobfuscate_text(text) == text


def test_key_words_keep_their_order_and_are_never_nothing() -> None:
    assert extract_key_words(REQUEST) == "bake loaf bread neighbor"
    assert extract_key_words("What is it that you do?") == "What is it that you do?"


# --- other tokens, the same text --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("rate", ["0.4", "1"])
def test_retokenization_changes_the_tokens_of_the_request_and_no_letter(kind: str, rate: str) -> None:
    bench = toy_bench(kind=kind)
    query = Query("q", "Please explain how a bakery bakes wonderful bread every morning, thank you.", False)
    defense = get_defense("retokenization", {"rate": rate}).prepare(
        ModelInfo("toy", toy_tokenizer(kind=kind), ())
    )
    (plain,), (recut,) = (bench.render_query(one, query) for one in (get_defense("none"), defense))
    assert recut.text == plain.text and len(recut.ids) > len(plain.ids)
    # Nothing outside of the request changes: not the template, not the system turn.
    extra = len(recut.ids) - len(plain.ids)
    start = next(at for at, (a, b) in enumerate(zip(plain.ids, recut.ids, strict=False)) if a != b)
    head, tail = bench.chat_template.decode_tokens(plain.ids[:start]), bench.chat_template.generation_prompt
    assert query.text not in head and bench.chat_template.decode_tokens(recut.ids).endswith(tail)
    same = len(bench.loaded_model.tokenizer.encode(tail, add_special_tokens=False))
    assert recut.ids[-same:] == plain.ids[-same:] and extra > 0
    assert bench.render_query(defense, query)[0].ids == recut.ids


def test_at_a_tiny_rate_next_to_nothing_is_cut() -> None:
    bench = toy_bench()
    defense = get_defense("retokenization", {"rate": "0.000001"}).prepare(
        ModelInfo("toy", toy_tokenizer(), ())
    )
    query = Query("q", REQUEST, False)
    assert bench.render_query(defense, query) == bench.render_query(get_defense("none"), query)
