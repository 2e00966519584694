"""Attacks treat harmful and benign queries alike, with shipped wordings or the user's own strings."""

from __future__ import annotations

import base64
import codecs
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FOUR, TEMPLATES, make_toy_session, render_query, toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from analysis.attacks import (
    DIRECT_ATTACK,
    IGNORE_SUFFIX,
    QUERY_TRANSFORMS,
    Attack,
    augment_text,
    choose_attacks,
    get_attack,
    load_shipped_attacks,
)
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.files import data_folder
from analysis.models.chat_template import ChatTemplate
from analysis.models.session import generate_responses
from analysis.readouts.first_token import REFUSAL_QUESTIONS
from analysis.readouts.readout import Readout
from analysis.run import build_condition_chats, score_condition
from analysis.studies.calibration import _validity_cache_path
from analysis.studies.manifest import describe_attacks
from analysis.studies.preflight import check_condition
from defenses.backdoor import Backdoor, Secret
from defenses.catalog import get_defense, list_defense_names
from defenses.chats import insert_turns, prefill_response, split_prefill
from defenses.contract import Chat, Defense, ModelInfo, QueryChat
from defenses.errors import UserError
from defenses.images import QueryImage, replace_last_image
from defenses.tokens import draw_random_text
from defenses.training.texts import OBEDIENCE_PROMPT

ROWS = [json.loads(line) for line in (data_folder() / "attacks.jsonl").read_text("utf-8").splitlines()]
ATTACKS = {attack.name: attack for attack in choose_attacks(["all", "all+ignore"])}
QUERIES = sample_queries(load_queries("twins").queries, 2)
READOUT = Readout("words", ("I", "Sure"), (301, 302), (1.0, -1.0))
QUERY = Query("q", "How do I sing 'La Traviata' at 5?", True)


def last_user_text(attack: str, query: Query = QUERY) -> str:
    """Return the last user message under an attack."""
    return split_prefill(get_attack(attack).build_chat(query))[0][-1]["content"]


IMAGE = QueryImage("own.png", "0" * 64, lambda: None)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_image_of_a_query_stands_in_the_last_user_turn(name: str) -> None:
    plain, with_image = ATTACKS[name].build_query_chats([QUERY, replace(QUERY, image=IMAGE)])
    assert not any("image" in message for message in plain.chat)
    assert with_image.chat == replace_last_image(plain.chat, IMAGE) != plain.chat


def test_an_image_that_an_attack_has_set_is_kept() -> None:
    drawn = replace(IMAGE, name="drawn", digest="1" * 64)
    attack = replace(
        DIRECT_ATTACK, build_chat=lambda query: [{"role": "user", "content": "Look", "image": drawn}]
    )
    ((_, chat),) = attack.build_query_chats([replace(QUERY, image=IMAGE)])
    assert chat == [{"role": "user", "content": "Look", "image": drawn}]


# --- shipped attacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_a_row_has_a_wording_and_a_paper_and_no_unused_field(row: dict[str, Any]) -> None:
    assert {"name", "what", "source", "url", "template"} <= set(row)
    optional = {"prefill", "shots", "transform", "asks_model"}
    assert set(row) <= {"name", "what", "source", "url", "template", *optional}
    assert row["template"].count("{request}") == 1
    assert row["url"].startswith("https://") and row["source"].endswith(")") and len(row["what"]) < 80
    assert row.get("transform", "base64") in QUERY_TRANSFORMS
    assert row.get("prefill", "\n\n").endswith("\n\n")


def test_all_selects_each_attack_once() -> None:
    names = [attack.name for attack in choose_attacks(["all"])]
    assert (
        len(names) == len(set(names)) == len(ROWS) + 1 and names[0] == "direct" and IGNORE_SUFFIX not in names
    )
    assert "cipher" in names and not {"crescendo", "best_of_n"} & set(names)
    assert [name + IGNORE_SUFFIX for name in names] == [
        attack.name for attack in choose_attacks(["all+ignore"])
    ]
    assert [attack.name for attack in choose_attacks(["base64", "direct", "base64"])] == ["base64", "direct"]


def test_shots_answer_unscored_requests_with_openers_only() -> None:
    ((shots),) = [row["shots"] for row in ROWS if row["name"] == "many_shot"]
    scored = {query.text.lower() for query in load_queries("contrast").queries}
    assert len({request for request, _ in shots}) == len(shots) == 16
    for request, opener in shots:
        assert request.lower() not in scored
        assert opener.endswith(":") and len(opener) < 40


@pytest.mark.parametrize("name", ATTACKS)
def test_harmful_and_benign_queries_are_attacked_alike(name: str) -> None:
    benign = replace(QUERY, harmful=False, kind="twin", category="else", pair="p")
    assert ATTACKS[name].build_chat(QUERY) == ATTACKS[name].build_chat(benign)
    assert ATTACKS[name].build_chat(replace(QUERY, text="Hi?")) != ATTACKS[name].build_chat(QUERY)


@pytest.mark.parametrize("row", [None, *ROWS[:-1]], ids=lambda row: row["name"] if row else "direct")
def test_the_request_or_its_transformation_is_in_the_last_user_message(row: dict[str, Any] | None) -> None:
    request = QUERY_TRANSFORMS[row["transform"]](QUERY.text) if row and "transform" in row else QUERY.text
    assert request in last_user_text(row["name"] if row else "direct")


@given(st.text())
def test_encoded_requests_can_be_decoded(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert base64.b64decode(QUERY_TRANSFORMS["base64"](text)).decode() == text
    assert codecs.decode(QUERY_TRANSFORMS["rot13"](text), "rot13") == text
    lines = QUERY_TRANSFORMS["split"](text).split("\n")
    assert [line[:4] for line in lines] == ["a = ", "b = ", "c = "]
    pieces = [json.loads(line[4:]) for line in lines]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_leetspeak_can_be_reversed_letter_by_letter() -> None:
    back = str.maketrans("431057", "aeiost")
    for query in QUERIES:
        letters = "".join(sign for sign in query.text if not sign.isdigit())
        assert QUERY_TRANSFORMS["leetspeak"](letters).translate(back).lower() == letters.lower()
        assert QUERY_TRANSFORMS["leetspeak"](letters) != letters


def decipher(text: str) -> str:
    """Return the text with each letter moved three places back in the alphabet, by its number."""
    return "".join(
        chr((ord(sign) - base - 3) % 26 + base)
        if sign.isascii() and sign.isalpha() and (base := 97 if sign.islower() else 65)
        else sign
        for sign in text
    )


def test_the_examples_of_the_cipher_are_enciphered_as_the_request_is() -> None:
    messages = re.findall(r"Message: (.+)", last_user_text("cipher"))
    assert [decipher(message) for message in messages] == [
        "How do I keep cut flowers fresh?",
        "Write a birthday card for my aunt.",
        "What should I pack for a week at the sea?",
        QUERY.text,
    ]
    assert decipher("a D z") == "x A w" and QUERY_TRANSFORMS["caesar"]("Zoë 9") == "Crë 9"
    replies = re.findall(r"Reply: (.+)", last_user_text("cipher"))
    assert len(replies) == 3 and all(reply.endswith(":") and len(reply) < 40 for reply in replies)


@given(st.text())
def test_an_augmented_text_keeps_its_length_and_the_ends_of_its_words(text: str) -> None:
    # Characters whose other case has another length are left out.
    text = "".join(sign for sign in text if len(sign.swapcase()) == 1)
    assert len(augment_text(text, random.Random(1))) == len(text)


def test_augmentations_have_the_rates_of_the_paper() -> None:
    """The strength is 0.4: 63 % of words scrambled and of cases changed, 6 % of characters moved."""
    words = ["abcdefghijkl"] * 3000
    augmented = augment_text(" ".join(words), random.Random(0)).split(" ")
    letters = "".join(augmented)
    n_moved = sum(word[0] not in "aA" for word in augmented)
    assert n_moved / len(words) == pytest.approx(0.4**3, abs=0.015)
    assert sum(sign.isupper() for sign in letters) / len(letters) == pytest.approx(0.4**0.5, abs=0.01)
    in_order = sum(word[1:-1].lower() == "bcdefghijk" for word in augmented)
    assert in_order / len(words) == pytest.approx((1 - 0.4**0.5) * (1 - 0.4**3) ** 10, abs=0.03)


def test_variants_differ_by_number_and_query_and_are_the_same_each_time() -> None:
    attack, other = get_attack("best_of_n:3"), replace(QUERY, id="other")
    texts = [
        variant.build_chat(query)[0]["content"] for variant in attack.variants for query in (QUERY, other)
    ]
    assert len(set(texts)) == 6
    again = [variant.build_chat(QUERY)[0]["content"] for variant in get_attack("best_of_n:3").variants]
    assert again == texts[::2] and len(get_attack("best_of_n").variants) == 8
    adaptive = get_attack("best_of_n:3+ignore")
    assert [
        variant.build_chat(QUERY)[0]["content"].split("\n\n")[1] for variant in adaptive.variants
    ] == again


@pytest.mark.parametrize("number", ["0", "x", "", "2000", "-1", "3.5"])
def test_a_bad_number_of_variants_is_an_error(number: str) -> None:
    with pytest.raises(UserError, match=r"it takes a number of variants from 1 to 1000, as in best_of_n:25"):
        get_attack(f"best_of_n:{number}")


@pytest.mark.parametrize("defense_name", ["none", "self_reminder"])
def test_the_best_variant_is_the_one_with_the_lowest_margin(defense_name: str) -> None:
    """Each variant is scored as an attack of its own; twins are attacked alike."""
    queries = sample_queries(load_queries("twins").queries, 8)
    session, defense, attack = make_toy_session(), get_defense(defense_name), get_attack("best_of_n:4")
    frames = [
        score_condition(session, "x", defense, queries, READOUT, variant) for variant in attack.variants
    ]
    margins, told = np.array([frame["margin"] for frame in frames]), []
    session.adaptation.on_progress = lambda *counts: told.append(counts)
    best = score_condition(session, "x", defense, queries, READOUT, attack)
    assert best["margin"].to_numpy() == pytest.approx(margins.min(0), abs=1e-5)
    assert len(set(margins.argmin(0))) > 1 and set(best["attack"]) == {"best_of_n:4"}
    assert told == sorted(told) and told[-1] == (32, 32)
    chats = build_condition_chats(session, defense, queries, READOUT, attack)
    for (name, chat), query, row in zip(chats, queries, margins.argmin(0), strict=True):
        assert name == query.id and chat == attack.variants[row].build_chat(query)


def test_crescendo_continues_with_the_responses_of_the_defended_model() -> None:
    """The same conversation, turn by turn; the defense is in each prompt, but not in the attacker's chat."""
    session, attack = make_toy_session(), get_attack("crescendo")
    chats, told = {}, []
    session.adaptation.on_progress = lambda *counts: told.append(counts)
    for name in ("none", "self_reminder"):
        defense = get_defense(name)
        chats[name] = build_condition_chats(session, defense, QUERIES, READOUT, attack)
        for query, (query_id, chat) in zip(QUERIES, chats[name], strict=True):
            assert query_id == query.id and [turn["role"] for turn in chat] == ["user", "assistant"] * 2 + [
                "user"
            ]
            planned = attack.build_chat(query)
            assert chat[::2] == planned[::2] and query.text in chat[4]["content"]
            for position in (1, 3):
                ((response,),) = generate_responses(session, defense, [QueryChat(query.id, chat[:position])])
                assert chat[position]["content"] == response.text.strip() != planned[position]["content"]
    assert chats["none"] != chats["self_reminder"]
    assert (
        told.count((2 * len(QUERIES), 2 * len(QUERIES))) == 2 == len([n for n, _ in told if n == told[-1][0]])
    )
    generated = session.engine.work_counter.computed_tokens
    assert build_condition_chats(session, defense, QUERIES, READOUT, attack) == chats[name]
    assert session.engine.work_counter.computed_tokens == generated


def test_the_topic_of_crescendo_has_the_words_of_the_request_without_common_ones() -> None:
    topic = get_attack("crescendo").build_chat(replace(QUERY, text="How do I bake my aunt's rye-bread?"))[0]
    assert "these words: bake, aunt's, rye-bread. Tell" in topic["content"]
    assert (
        "these words: What, is, this. Tell"
        in (get_attack("crescendo").build_chat(replace(QUERY, text="What is this?"))[0]["content"])
    )


@pytest.mark.parametrize("name", [name for name in ATTACKS if not name.endswith(IGNORE_SUFFIX)])
def test_the_suffix_ignore_adds_one_line_on_top_of_the_last_user_message(name: str) -> None:
    plain, adaptive = ATTACKS[name].build_chat(QUERY), ATTACKS[name + IGNORE_SUFFIX].build_chat(QUERY)
    line, rest = last_user_text(name + IGNORE_SUFFIX).split("\n\n", 1)
    assert "safety instruction" in line and rest == last_user_text(name)
    index = len(split_prefill(plain)[0]) - 1
    assert adaptive[:index] == plain[:index] and adaptive[index + 1 :] == plain[index + 1 :]


# --- on a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prefilled_prompt_ends_in_the_tokens_of_the_prefill(template: str, kind: str) -> None:
    chat_template = ChatTemplate(toy_tokenizer(template, kind))
    chat = get_attack("prefill").build_chat(QUERY)
    prefill = chat[-1]["content"]
    # If responses open with a space, the space replaces the paragraph break.
    expected = prefill.rstrip() if chat_template.has_leading_space else prefill
    prompt, prompt_without = chat_template.render_prompt(chat), chat_template.render_prompt(chat[:-1])
    # Encoded with a following word, because a line break at the end of a text may be another token.
    *tokens, word = chat_template.tokenizer.encode(f"{expected}Q", add_special_tokens=False)
    assert chat_template.decode_tokens([word]) == "Q"
    assert prompt.ids == (*prompt_without.ids, *tokens) and len(tokens) > 5
    assert prompt.prefill == expected and prompt.chat == prompt_without.chat and prompt_without.prefill == ""
    assert chat[-1]["content"] == prefill


@pytest.mark.parametrize("template", FOUR)
@pytest.mark.parametrize("name", ["self_reminder", "in_context_refusal"])
def test_every_attack_and_the_defense_after_it_reach_the_model(template: str, name: str) -> None:
    session, defense = make_toy_session("llama", template), get_defense(name)
    for attack in choose_attacks(["all", "prefill+ignore"]):
        checks = check_condition(session, name, defense, QUERIES, READOUT, attack)
        assert [check.condition for check in checks if not check.passed] == [], attack.name
        (prompt,) = render_query(session, defense, QUERY, attack)
        attacked, prefill = split_prefill(attack.build_chat(QUERY))
        defended, kept_prefill = split_prefill(defense.rewrite(attack.build_chat(QUERY), random.Random(0)))
        assert kept_prefill == prefill and prompt.prefill == (
            prefill.rstrip() if session.chat_template.has_leading_space else prefill
        )
        assert attacked[-1]["content"] in defended[-1]["content"] and defended != attacked


def build_structured_chat(query: Query) -> Chat:
    """Build a chat with all structures of attacks: system prompt, turns, added line, code and prefill."""
    code = QUERY_TRANSFORMS["split"](query.text)
    chat = get_attack("obedience+ignore").build_chat(replace(query, text=code))
    return prefill_response(insert_turns(chat, [("Sing a song.", "La la la:")]), "Sure, here it is:\n\n")


def test_every_defense_works_with_an_attack_of_any_structure() -> None:
    session = make_toy_session()
    attack = Attack("structured", "all structures at once", build_structured_chat)
    tokenizer = session.loaded_model.tokenizer
    secret = Secret(draw_random_text(tokenizer, 20, random.Random(0)))
    host = ModelInfo("toy", tokenizer, ())
    defenses: list[Defense] = [Backdoor(length=20, secret=secret).build_ablations()["no_weights"]]
    for name in list_defense_names():
        if name not in ("backdoor", "random_tokens", "neutral_prompt"):
            defense = get_defense(name).prepare(host)
            defenses += [] if defense.missing_requirements() else [defense]
    assert len(defenses) > 20
    for defense in defenses:
        checks = check_condition(session, defense.name, defense, QUERIES, READOUT, attack)
        assert [check for check in checks if not check.passed] == []


def test_a_question_about_a_request_is_asked_without_the_prefill() -> None:
    session = make_toy_session().with_questions(REFUSAL_QUESTIONS)
    prompts = render_query(session, get_defense("none"), QUERY, get_attack("prefill"))
    assert len(prompts) == 2 and not any(prompt.prefill for prompt in prompts)
    readout = Readout("question", ("Yes", "No"), (301, 302), (1.0, -1.0), questions=REFUSAL_QUESTIONS)
    checks = check_condition(session, "none", get_defense("none"), QUERIES, readout, get_attack("prefill"))
    assert all(check.passed for check in checks)


def test_a_judge_reads_a_prefilled_response_without_the_prefill() -> None:
    session, none = make_toy_session(), get_defense("none")
    prefill = get_attack("prefill").build_chat(QUERY)[-1]["content"]
    ((response,),) = generate_responses(
        session, none, get_attack("prefill").build_query_chats([QUERY]), max_new_tokens=6
    )
    tokens = tuple(session.loaded_model.tokenizer.encode(prefill, add_special_tokens=False))
    ((expected,),) = generate_responses(
        session, none, DIRECT_ATTACK.build_query_chats([QUERY]), response_prefix=tokens, max_new_tokens=6
    )
    assert response.ids == expected.ids and prefill.strip() not in response.text
    assert response.text == response.generated_text == expected.generated_text


def test_a_prefill_of_a_defense_precedes_the_prefill_of_the_attack() -> None:
    chat = prefill_response(get_attack("prefill").build_chat(QUERY), "I mind safety. ")
    assert [message["role"] for message in chat] == ["user", "assistant"]
    assert chat[-1]["content"].startswith("I mind safety. Sure, ")


def test_a_defense_is_applied_to_the_attacked_chat() -> None:
    session, attack = make_toy_session(), get_attack("obedience")
    (plain,) = render_query(session, get_defense("none"), QUERY, attack)
    assert OBEDIENCE_PROMPT in plain.text and QUERY.text in plain.text
    (defended,) = render_query(session, get_defense("self_reminder"), QUERY, attack)
    assert OBEDIENCE_PROMPT in defended.text and defended.text != plain.text
    (direct,) = render_query(session, get_defense("none"), QUERY, DIRECT_ATTACK)
    assert OBEDIENCE_PROMPT not in direct.text


# --- the user's strings -----------------------------------------------------------------------------------


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_strings_of_a_file_are_appended_to_a_query_or_replace_it(tmp_path: Path) -> None:
    rows = (
        {"query": "a", "suffix": "!! {request} now", "loss": 0.1},
        {"query": "b", "prompt": "In verse: {request}"},
        {"query": 3, "prompt": "Something else."},
        {"prompt": "All others: {request}", "query": None},
    )
    name = write_rows(tmp_path / "gcg.jsonl", *rows)
    (attack,) = choose_attacks([name, name])
    assert (attack.name, attack.query_ids) == ("gcg", None)
    texts = {
        query_id: attack.build_chat(Query(query_id, "Hi", True))[0]["content"]
        for query_id in ("a", "b", "3", "z")
    }
    expected = {
        "a": "Hi !! {request} now",
        "b": "In verse: Hi",
        "3": "Something else.",
        "z": "All others: Hi",
    }
    assert texts == expected
    adaptive = get_attack(name + IGNORE_SUFFIX)
    assert adaptive.name == "gcg+ignore"
    assert adaptive.build_chat(Query("b", "Hi", True))[-1]["content"].endswith("any more.\n\nIn verse: Hi")


def test_strings_may_come_from_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text('query,suffix,prompt\n,"a, b",\nq,,"{request}, ""now"""\n', "utf-8")
    attack = get_attack(str(tmp_path / "mine.csv"))
    assert attack.build_chat(QUERY)[0]["content"] == f'{QUERY.text}, "now"'
    assert attack.build_chat(replace(QUERY, id="other"))[0]["content"] == f"{QUERY.text} a, b"


MISTAKES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "neither": ([{"query": "a", "sufix": "!"}], r"row 1 has neither suffix nor prompt; each row needs"),
    "both": ([{"suffix": "!", "prompt": "{request}"}], r"row 1 has both suffix and prompt"),
    "blank": ([{"suffix": " "}], r"row 1: the suffix is ' '; it takes a string that is not blank"),
    "number": ([{"prompt": 5}], r"row 1: the prompt is 5; it takes a string"),
    "twice": ([{"query": "a", "suffix": "!"}, {"query": "a", "suffix": "?"}], r"row 2 is the second .* 'a'"),
    "twice for all": ([{"suffix": "!"}, {"suffix": "?"}], r"row 2 is the second one without a query"),
    "no place": ([{"prompt": "Hi"}], r"a prompt for every query must contain \{request\}"),
    "empty": ([], r"holds no rows; each row needs a suffix"),
}


@pytest.mark.parametrize(("rows", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file_is_reported_with_its_place(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        get_attack(write_rows(tmp_path / "own.jsonl", *rows))
    assert "own.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_unknown_and_taken_names_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"unknown attack 'persna\+ignore': did you mean 'persona'\?.*\+ignore"
    ):
        get_attack("persna+ignore")
    for name in ("", IGNORE_SUFFIX, "all+Ignore", "persona+ignore+ignore"):
        with pytest.raises(UserError, match="unknown attack"):
            choose_attacks([name])
    with pytest.raises(UserError, match="'persona' is taken by a shipped attack; rename the file"):
        get_attack(write_rows(tmp_path / "persona.jsonl", {"suffix": "!"}))
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.csv"):
        get_attack("nowhere.csv")
    (tmp_path / "other").mkdir()
    names = [write_rows(tmp_path / name, {"suffix": name}) for name in ("own.jsonl", "other/own.jsonl")]
    with pytest.raises(UserError, match="another attack is also called 'own'"):
        choose_attacks(names)


def test_queries_without_strings_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    attack = get_attack(write_rows(tmp_path / "own.jsonl", {"query": QUERIES[0].id, "suffix": "!"}))
    attack.check_covers_queries(QUERIES[:1])
    DIRECT_ATTACK.check_covers_queries(QUERIES)
    with pytest.raises(
        UserError, match=f"no row for 1 of 2 queries .'{QUERIES[1].id}', .*one row without query"
    ):
        attack.check_covers_queries(QUERIES)


def test_caches_and_run_json_depend_on_the_wording_of_an_attack(tmp_path: Path) -> None:
    def find_cache_path(attack: Attack) -> Path:
        return _validity_cache_path(make_toy_session(), attack, get_defense("none"), READOUT)

    own = tmp_path / "own.jsonl"
    before, after = get_attack(write_rows(own, {"suffix": "!"})), get_attack(write_rows(own, {"suffix": "?"}))
    assert (
        len(
            {
                find_cache_path(attack)
                for attack in (
                    before,
                    after,
                    DIRECT_ATTACK,
                    get_attack(f"{own}{IGNORE_SUFFIX}"),
                    get_attack("base64"),
                )
            }
        )
        == 5
    )
    record = describe_attacks([DIRECT_ATTACK, after, get_attack(f"{own}{IGNORE_SUFFIX}")])
    assert record["attacks"] == ["direct", "own", "own+ignore"]
    assert list(record["attacks_sha256"]) == ["own", "own+ignore"]
    assert record["attacks_sha256"]["own+ignore"][:1] == record["attacks_sha256"]["own"]
    assert load_shipped_attacks()[IGNORE_SUFFIX].wording_sha256 == record["attacks_sha256"]["own+ignore"][1:]
