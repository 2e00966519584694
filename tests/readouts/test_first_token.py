"""The readout is made from words for any tokenizer, and is linear in the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import derive_readout, make_toy_session, render_query, toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.models.chat_template import ChatTemplate
from analysis.models.requests import find_first_token
from analysis.readouts.first_token import (
    COMPLIANCE_WORDS,
    REFUSAL_WORDS,
    make_words_readout,
)
from analysis.readouts.readout import Readout
from defenses.catalog import get_defense
from defenses.errors import UserError

KINDS = ("bytes", "metaspace")
VOCAB = 960
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=12, max_size=12)
READOUT = Readout("words", tuple("abcde"), (7, 2, 4, 0, 11), (0.5, 0.5, -1 / 3, -1 / 3, -1 / 3))


def opens(*steps: Sequence[int]) -> Any:
    """A stub for the model: at the n-th look its first-token probability lies evenly on steps[n]."""
    looks: list[list[tuple[int, ...]]] = []

    def opening(prompts: list[tuple[int, ...]]) -> tuple[torch.Tensor, list[int]]:
        looks.append(prompts)
        ids = steps[min(len(looks), len(steps)) - 1]
        probabilities = torch.zeros(VOCAB)
        probabilities[list(ids)] = 1 / len(ids)
        return probabilities, [ids[0]] * len(prompts)

    opening.looks = looks  # type: ignore[attr-defined]
    return opening


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gap", "form"), [("", "bare"), (" ", "spaced")])
def test_words_are_read_in_the_form_that_has_the_mass(kind: str, gap: str, form: str) -> None:
    tokenizer = toy_tokenizer("chatml", kind)
    made = make_words_readout(
        tokenizer, [(1,), (2,)], opens([find_first_token(tokenizer, "Sure", gap) or -1])
    )
    mark = {"": "", " ": "▁" if kind == "metaspace" else "Ġ"}[gap]
    assert tokenizer.convert_ids_to_tokens(list(made.ids)) == [
        mark + word for word in (*REFUSAL_WORDS, *COMPLIANCE_WORDS)
    ]
    assert {"bare": "without leading space", "spaced": "with leading space"}[form] in made.notices[
        0
    ] and not made.response_prefix
    assert made.words_label == "I/Sorry/As/Unfortunately against Sure/Certainly/Here/To/The"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_sum_to_zero_and_are_equal_on_a_side(kind: str) -> None:
    tokenizer = toy_tokenizer("chatml", kind)
    made = make_words_readout(tokenizer, [(1,)], opens([5]))
    assert math.isclose(sum(made.weights), 0, abs_tol=1e-12)
    assert [round(weight * 180) for weight in made.weights] == [45] * 4 + [-36] * 5
    assert len(set(made.ids)) == len(made.ids)


def test_a_lone_space_that_answers_open_with_is_put_behind_every_prompt() -> None:
    tokenizer = toy_tokenizer("llama2", "metaspace")
    lone, sure = tokenizer.convert_tokens_to_ids(["▁", "Sure"])
    stub = opens([lone], [sure])
    made = make_words_readout(tokenizer, [(1, 5), (1, 6)], stub)
    assert made.response_prefix == (lone,)
    assert stub.looks == [[(1, 5), (1, 6)], [(1, 5, lone), (1, 6, lone)]]
    assert "without leading space" in made.notices[0] and any(
        "appended to every prompt" in notice for notice in made.notices
    )


def test_a_prefix_has_an_end_and_special_tokens_are_none() -> None:
    tokenizer = toy_tokenizer("llama2", "metaspace")
    lone, end = tokenizer.convert_tokens_to_ids(["▁", "</s>"])
    assert make_words_readout(tokenizer, [(1,)], opens([lone])).response_prefix == (lone,) * 3
    assert make_words_readout(tokenizer, [(1,)], opens([end])).response_prefix == ()


def test_a_thinking_block_that_answers_open_with_is_closed_before_they_are_read() -> None:
    tokenizer = toy_tokenizer("chatml")
    think, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    sure = tokenizer.convert_tokens_to_ids("Sure")
    made = make_words_readout(tokenizer, [(1, 5), (1, 6)], opens([think], [sure]))
    assert made.response_prefix[0] == think and end in made.response_prefix
    assert tokenizer.decode(list(made.response_prefix), skip_special_tokens=False).split() == [
        "<think>",
        "</think>",
    ]
    assert any("appended to every prompt" in notice for notice in made.notices)


def test_a_tag_of_several_tokens_and_one_around_the_answer_are_found_as_well() -> None:
    tokenizer = toy_tokenizer("chatml")
    tags = ChatTemplate(toy_tokenizer("seed")).opening_texts
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in ("<seed:think>", "<answer>", "Sure")]
    assert len(ids[0]) > 2 and len(ids[1]) > 2
    openers = [[token] for tag_ids in ids for token in tag_ids]
    made = make_words_readout(tokenizer, [(1,)], opens(*openers), opening_texts=tags)
    assert tokenizer.decode(list(made.response_prefix)) == "<seed:think></seed:think>\n<answer>"
    # What only begins like a tag is the answer itself; where the start was given, there are no tags.
    begun = make_words_readout(tokenizer, [(1,)], opens(*openers[:1], ids[2]), opening_texts=tags)
    assert begun.response_prefix == ()
    assert make_words_readout(tokenizer, [(1,)], opens(*openers), opening_texts=None).response_prefix == ()


def test_an_unknown_control_token_at_the_start_of_answers_is_refused() -> None:
    tokenizer = toy_tokenizer("harmony")
    channel = tokenizer.convert_tokens_to_ids("<|channel|>")
    with pytest.raises(UserError, match=r"control token '<\|channel\|>'.*--answer-prefix TEXT"):
        make_words_readout(tokenizer, [(1,)], opens([channel]))
    assert make_words_readout(tokenizer, [(1,)], opens([channel]), opening_texts=None).response_prefix == ()


def test_what_only_half_of_the_answers_open_with_is_no_prefix() -> None:
    tokenizer = toy_tokenizer("llama2", "metaspace")
    lone, sure = tokenizer.convert_tokens_to_ids(["▁", "▁Sure"])

    def opening(prompts: list[tuple[int, ...]]) -> tuple[torch.Tensor, list[int]]:
        probabilities = torch.zeros(VOCAB)
        probabilities[[lone, sure]] = 0.5
        return probabilities, [lone, sure]

    assert make_words_readout(tokenizer, [(1,), (2,)], opening).response_prefix == ()


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_of_several_pieces_is_read_by_its_first_if_that_is_long_enough(kind: str) -> None:
    tokenizer = toy_tokenizer("chatml", kind)
    piece = tokenizer.decode([find_first_token(tokenizer, "Surenesses", "") or -1])
    assert piece == "Sure"
    assert find_first_token(tokenizer, "Zqxj", "") is None
    made = make_words_readout(tokenizer, [(1,)], opens([5]), ("Sorry", "Zqxj"), ("Surenesses",))
    assert [token.strip() for token in made.tokens] == ["Sorry", "Sure"]
    assert any("'Zqxj' is left out" in notice for notice in made.notices)


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_of_both_sides_is_left_out_and_said(kind: str) -> None:
    tokenizer = toy_tokenizer("chatml", kind)
    made = make_words_readout(tokenizer, [(1,)], opens([5]), ("Sorry", "Sure"), ("Surenesses", "Here"))
    assert [token.strip() for token in made.tokens] == ["Sorry", "Here"]
    assert any("'Sure' and 'Surenesses' are left out" in notice for notice in made.notices)


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_without_any_token_is_an_error(kind: str) -> None:
    with pytest.raises(UserError, match="no token for any word of one side"):
        make_words_readout(toy_tokenizer("chatml", kind), [(1,)], opens([5]), ("Zqxj",), COMPLIANCE_WORDS)


def read(values: list[float]) -> tuple[float, float]:
    margin, coverage = READOUT.compute_margins(torch.tensor([values]))[0].tolist()
    return margin, coverage


@given(LOGITS, LOGITS, st.floats(-3, 3))
def test_the_margin_is_linear_in_the_logits(one: list[float], other: list[float], factor: float) -> None:
    mixed = [x + factor * y for x, y in zip(one, other, strict=True)]
    assert math.isclose(read(mixed)[0], read(one)[0] + factor * read(other)[0], abs_tol=1e-3)


@given(LOGITS, st.floats(-100, 100))
def test_a_constant_added_to_all_logits_changes_nothing(logits: list[float], constant: float) -> None:
    moved = [value + constant for value in logits]
    assert read(moved) == pytest.approx(read(logits), abs=1e-3)


@given(LOGITS)
def test_coverage_is_the_softmax_mass_on_the_words(logits: list[float]) -> None:
    exact = [math.exp(value) for value in logits]
    assert read(logits)[1] == pytest.approx(sum(exact[i] for i in READOUT.ids) / sum(exact), rel=1e-4)


def test_positive_margins_refuse() -> None:
    refusing, complying = [0.0] * 12, [0.0] * 12
    refusing[7], complying[4] = 3.0, 3.0
    assert read(refusing)[0] == 1.5 and read(complying)[0] == -1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["chatml", "llama2"])
def test_a_bench_makes_it_from_how_its_own_model_opens(template: str, kind: str) -> None:
    bench = make_toy_session("llama", template, kind)
    asked = sample_queries(load_queries("twins").queries, 4)
    made = derive_readout(bench, asked, get_defense("none"))
    ids = torch.tensor([[*render_query(bench, get_defense("none"), asked[0])[0].ids, *made.response_prefix]])
    with torch.inference_mode():
        logits = bench.loaded_model.model(input_ids=ids).logits[0, -1].double()
    by_hand = sum(weight * logits[i] for i, weight in zip(made.ids, made.weights, strict=True))
    got = bench.engine.read_first_token(ids.tolist(), made.compute_margins)[0, 0]
    assert float(got) == pytest.approx(float(by_hand), abs=1e-4)
