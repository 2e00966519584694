"""How queries are sent: harmful and benign ones alike, by wordings of this project or the user's own."""

from __future__ import annotations

import base64
import codecs
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import FOUR, TEMPLATES, toy_bench, toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from analysis.attacks import (
    DIRECT_ATTACK,
    IGNORE_SUFFIX,
    QUERY_TRANSFORMS,
    Attack,
    choose_attacks,
    get_attack,
    load_shipped_attacks,
)
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.files import data_folder
from analysis.models.chat_template import ChatTemplate
from analysis.models.session import ModelSession, generate_responses
from analysis.readouts.first_token import REFUSAL_QUESTIONS
from analysis.readouts.readout import Readout
from analysis.studies.calibration import _validity_cache_path
from analysis.studies.manifest import describe_attacks
from analysis.studies.preflight import check_condition
from defenses.backdoor import Backdoor, Secret
from defenses.catalog import get_defense, list_defense_names
from defenses.chats import prefill_response, split_prefill
from defenses.contract import ModelInfo
from defenses.errors import UserError
from defenses.tokens import draw_random_text
from defenses.training.texts import OBEDIENCE_PROMPT

ROWS = [json.loads(line) for line in (data_folder() / "attacks.jsonl").read_text("utf-8").splitlines()]
EVERY = {attack.name: attack for attack in choose_attacks(["all", "all+ignore"])}
ASKED = sample_queries(load_queries("twins").queries, 2)
READOUT = Readout("words", ("I", "Sure"), (301, 302), (1.0, -1.0))
QUERY = Query("q", "How do I sing 'La Traviata' at 5?", True)


def last(attack: str, query: Query = QUERY) -> str:
    """Return the user's last words under an attack."""
    return split_prefill(get_attack(attack).build_chat(query))[0][-1]["content"]


# --- the shipped ones -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_a_row_has_a_wording_a_paper_and_nothing_that_is_not_read(row: dict[str, Any]) -> None:
    assert {"name", "what", "source", "url", "template"} <= set(row)
    assert set(row) <= {"name", "what", "source", "url", "template", "prefill", "shots", "transform"}
    assert row["template"].count("{request}") == 1
    assert row["url"].startswith("https://") and row["source"].endswith(")") and len(row["what"]) < 80
    assert row.get("transform", "base64") in QUERY_TRANSFORMS
    assert row.get("prefill", "\n\n").endswith("\n\n")


def test_there_are_more_than_twelve_kinds_and_all_takes_each_once() -> None:
    names = [attack.name for attack in choose_attacks(["all"])]
    assert (
        len(names) == len(set(names)) == len(ROWS) + 2 and names[0] == "direct" and IGNORE_SUFFIX not in names
    )
    assert [name + IGNORE_SUFFIX for name in names] == [
        attack.name for attack in choose_attacks(["all+ignore"])
    ]
    assert [attack.name for attack in choose_attacks(["base64", "direct", "base64"])] == ["base64", "direct"]


def test_shown_turns_hold_openers_alone_on_requests_that_are_not_scored() -> None:
    ((shots),) = [row["shots"] for row in ROWS if "shots" in row]
    scored = {query.text.lower() for query in load_queries("contrast").queries}
    assert len({request for request, _ in shots}) == len(shots) == 16
    for request, opener in shots:
        assert request.lower() not in scored
        assert opener.endswith(":") and len(opener) < 40


@pytest.mark.parametrize("name", EVERY)
def test_harmful_and_benign_are_sent_alike(name: str) -> None:
    benign = replace(QUERY, harmful=False, kind="twin", category="else", pair="p")
    assert EVERY[name].build_chat(QUERY) == EVERY[name].build_chat(benign)
    assert EVERY[name].build_chat(replace(QUERY, text="Hi?")) != EVERY[name].build_chat(QUERY)


@pytest.mark.parametrize("row", [None, *ROWS[:-1]], ids=lambda row: row["name"] if row else "direct")
def test_the_request_or_what_was_made_of_it_is_in_the_last_user_turn(row: dict[str, Any] | None) -> None:
    made = QUERY_TRANSFORMS[row["transform"]](QUERY.text) if row and "transform" in row else QUERY.text
    assert made in last(row["name"] if row else "direct")


@given(st.text())
def test_what_is_encoded_can_be_decoded(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert base64.b64decode(QUERY_TRANSFORMS["base64"](text)).decode() == text
    assert codecs.decode(QUERY_TRANSFORMS["rot13"](text), "rot13") == text
    lines = QUERY_TRANSFORMS["split"](text).split("\n")
    assert [line[:4] for line in lines] == ["a = ", "b = ", "c = "]
    pieces = [json.loads(line[4:]) for line in lines]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_leetspeak_is_read_back_letter_by_letter() -> None:
    back = str.maketrans("431057", "aeiost")
    for query in ASKED:
        letters = "".join(sign for sign in query.text if not sign.isdigit())
        assert QUERY_TRANSFORMS["leetspeak"](letters).translate(back).lower() == letters.lower()
        assert QUERY_TRANSFORMS["leetspeak"](letters) != letters


@pytest.mark.parametrize("name", [name for name in EVERY if not name.endswith(IGNORE_SUFFIX)])
def test_the_adaptive_check_puts_one_line_on_top_of_the_last_user_turn(name: str) -> None:
    plain, adaptive = EVERY[name].build_chat(QUERY), EVERY[name + IGNORE_SUFFIX].build_chat(QUERY)
    (line, rest) = last(name + IGNORE_SUFFIX).split("\n\n", 1)
    assert "safety instruction" in line and rest == last(name)
    place = len(split_prefill(plain)[0]) - 1
    assert adaptive[:place] == plain[:place] and adaptive[place + 1 :] == plain[place + 1 :]


# --- on a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prefilled_prompt_ends_in_the_tokens_of_the_prefill(template: str, kind: str) -> None:
    asked = ChatTemplate(toy_tokenizer(template, kind))
    chat = get_attack("prefill").build_chat(QUERY)
    given = chat[-1]["content"]
    # Where answers open with a space, the paragraph break gives way to it.
    begun = given.rstrip() if asked.has_leading_space else given
    with_it, without = asked.render_prompt(chat), asked.render_prompt(chat[:-1])
    # As they are with a word behind them: a line break at the end of a text may be another token.
    *tokens, word = asked.tokenizer.encode(f"{begun}Q", add_special_tokens=False)
    assert asked.decode_tokens([word]) == "Q"
    assert with_it.ids == (*without.ids, *tokens) and len(tokens) > 5
    assert with_it.prefill == begun and with_it.chat == without.chat and without.prefill == ""
    assert chat[-1]["content"] == given


@pytest.mark.parametrize("template", FOUR)
@pytest.mark.parametrize("name", ["self_reminder", "in_context_refusal"])
def test_every_attack_and_the_defense_behind_it_reach_the_model(template: str, name: str) -> None:
    bench, defense = toy_bench("llama", template), get_defense(name)
    for attack in choose_attacks(["all", "prefill+ignore"]):
        checks = check_condition(bench.with_attack(attack), name, defense, ASKED, READOUT)
        assert [one.condition for one in checks if not one.passed] == [], attack.name
        (prompt,) = bench.with_attack(attack).render_query(defense, QUERY)
        sent, begun = split_prefill(attack.build_chat(QUERY))
        made, kept = split_prefill(defense.rewrite(attack.build_chat(QUERY), random.Random(0)))
        assert kept == begun and prompt.prefill == (
            begun.rstrip() if bench.chat_template.has_leading_space else begun
        )
        assert sent[-1]["content"] in made[-1]["content"] and made != sent


@pytest.mark.parametrize("name", ["prefill", "many_shot", "obedience+ignore", "payload_splitting"])
def test_every_defense_stands_with_an_attack_that_has_turns_of_its_own(name: str) -> None:
    bench = toy_bench()
    secret = Secret(draw_random_text(bench.loaded_model.tokenizer, 20, random.Random(0)))
    ready = [Backdoor(length=20, secret=secret).build_ablations()["no_weights"]]
    others = [
        one for one in list_defense_names() if one not in ("backdoor", "random_tokens", "neutral_prompt")
    ]
    host = ModelInfo("toy", bench.loaded_model.tokenizer, ())
    ready += [
        one for one in (get_defense(name).prepare(host) for name in others) if not one.missing_requirements()
    ]
    for defense in ready:
        checks = check_condition(bench.with_attack(get_attack(name)), defense.name, defense, ASKED, READOUT)
        assert [one for one in checks if not one.passed] == []


def test_a_question_about_a_request_has_an_answer_of_its_own() -> None:
    bench = toy_bench().with_attack(get_attack("prefill")).with_questions(REFUSAL_QUESTIONS)
    prompts = bench.render_query(get_defense("none"), QUERY)
    assert len(prompts) == 2 and not any(prompt.prefill for prompt in prompts)
    asked = Readout("question", ("Yes", "No"), (301, 302), (1.0, -1.0), questions=REFUSAL_QUESTIONS)
    checks = check_condition(bench, "none", get_defense("none"), ASKED, asked)
    assert all(one.passed for one in checks)


def test_what_a_judge_hears_of_a_prefilled_answer_is_the_models_own() -> None:
    bench, none = toy_bench(), get_defense("none")
    begun = get_attack("prefill").build_chat(QUERY)[-1]["content"]
    ((answer,),) = generate_responses(
        bench.with_attack(get_attack("prefill")), none, [QUERY], max_new_tokens=6
    )
    tokens = tuple(bench.loaded_model.tokenizer.encode(begun, add_special_tokens=False))
    ((same,),) = generate_responses(bench, none, [QUERY], response_prefix=tokens, max_new_tokens=6)
    assert answer.ids == same.ids and begun.strip() not in answer.text
    assert answer.text == answer.generated_text == same.generated_text


def test_an_answer_prefix_of_a_defense_stands_in_front_of_the_attackers() -> None:
    chat = prefill_response(get_attack("prefill").build_chat(QUERY), "I mind safety. ")
    assert [message["role"] for message in chat] == ["user", "assistant"]
    assert chat[-1]["content"].startswith("I mind safety. Sure, ")


def test_the_model_reads_the_attack_and_a_defense_comes_after_it() -> None:
    bench = toy_bench().with_attack(get_attack("obedience"))
    (plain,) = bench.render_query(get_defense("none"), QUERY)
    assert OBEDIENCE_PROMPT in plain.text and QUERY.text in plain.text
    (defended,) = bench.render_query(get_defense("self_reminder"), QUERY)
    assert OBEDIENCE_PROMPT in defended.text and defended.text != plain.text
    (direct,) = bench.with_attack(DIRECT_ATTACK).render_query(get_defense("none"), QUERY)
    assert OBEDIENCE_PROMPT not in direct.text


# --- the user's own ---------------------------------------------------------------------------------------


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_own_strings_go_behind_a_query_or_in_its_place(tmp_path: Path) -> None:
    rows = (
        {"query": "a", "suffix": "!! {request} now", "loss": 0.1},
        {"query": "b", "prompt": "In verse: {request}"},
        {"query": 3, "prompt": "Something else."},
        {"prompt": "All others: {request}", "query": None},
    )
    name = written(tmp_path / "gcg.jsonl", *rows)
    (attack,) = choose_attacks([name, name])
    assert (attack.name, attack.query_ids) == ("gcg", None)
    sent = {
        ident: attack.build_chat(Query(ident, "Hi", True))[0]["content"] for ident in ("a", "b", "3", "z")
    }
    wanted = {"a": "Hi !! {request} now", "b": "In verse: Hi", "3": "Something else.", "z": "All others: Hi"}
    assert sent == wanted
    adaptive = get_attack(name + IGNORE_SUFFIX)
    assert adaptive.name == "gcg+ignore"
    assert adaptive.build_chat(Query("b", "Hi", True))[-1]["content"].endswith("any more.\n\nIn verse: Hi")


def test_own_strings_may_lie_in_a_csv(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("rows", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file_is_said_with_its_place(
    tmp_path: Path, rows: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        get_attack(written(tmp_path / "own.jsonl", *rows))
    assert "own.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_not_known_or_taken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"unknown attack 'persna\+ignore': did you mean 'persona'\?.*\+ignore"
    ):
        get_attack("persna+ignore")
    for name in ("", IGNORE_SUFFIX, "all+Ignore", "persona+ignore+ignore"):
        with pytest.raises(UserError, match="unknown attack"):
            choose_attacks([name])
    with pytest.raises(UserError, match="'persona' is taken by a shipped attack; rename the file"):
        get_attack(written(tmp_path / "persona.jsonl", {"suffix": "!"}))
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.csv"):
        get_attack("nowhere.csv")
    (tmp_path / "other").mkdir()
    two = [written(tmp_path / place, {"suffix": place}) for place in ("own.jsonl", "other/own.jsonl")]
    with pytest.raises(UserError, match="another attack is also called 'own'"):
        choose_attacks(two)


def test_queries_without_strings_are_counted_and_the_first_one_named(tmp_path: Path) -> None:
    attack = get_attack(written(tmp_path / "own.jsonl", {"query": ASKED[0].id, "suffix": "!"}))
    attack.check_covers_queries(ASKED[:1])
    DIRECT_ATTACK.check_covers_queries(ASKED)
    with pytest.raises(
        UserError, match=f"no row for 1 of 2 queries .'{ASKED[1].id}', .*one row without query"
    ):
        attack.check_covers_queries(ASKED)


def test_a_run_knows_by_which_words_it_attacked(tmp_path: Path) -> None:
    def place(attack: Attack) -> Path:
        bench: ModelSession = toy_bench()
        return _validity_cache_path(bench.with_attack(attack), get_defense("none"), READOUT)

    own = tmp_path / "own.jsonl"
    before, after = get_attack(written(own, {"suffix": "!"})), get_attack(written(own, {"suffix": "?"}))
    assert (
        len(
            {
                place(one)
                for one in (
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
