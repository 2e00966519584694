"""Greedy answers equal those of transformers, one prompt at a time; sampled ones follow the probabilities."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import FAMILIES, VOCAB, WINDOW, fresh_model, tiny_model

from analysis.models.engine import Engine
from analysis.models.generation import Sampling, choose_tokens, generate_token_ids

STOP = 2


def alone(model: torch.nn.Module, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=STOP,
            pad_token_id=STOP,
        )
    answer = out[0, ids.shape[1] :].tolist()
    return answer[: answer.index(STOP)] if STOP in answer else answer


def draw(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(10, VOCAB) for _ in range(length)]


SHARED = draw(2 * WINDOW, 0)
SETS = {
    "a shared prefix": [SHARED + draw(length, length) for length in (1, 7, 3, 12, 3)],
    "nothing shared": [draw(length, length) for length in (4, 11, 6)],
    "a single prompt": [SHARED],
    "all the same": [SHARED, SHARED],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", SETS.values(), ids=SETS)
def test_batched_answers_are_those_of_one_prompt_at_a_time(family: str, prompts: list[list[int]]) -> None:
    model = tiny_model(family)
    done: list[int] = []
    found = generate_token_ids(Engine(model), prompts, 9, frozenset({STOP}), on_progress=done.append)
    assert found == [alone(model, prompt, 9) for prompt in prompts]
    assert sum(done) == len(prompts)


def test_settings_of_the_model_change_no_greedy_response(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = fresh_model(), SETS["a shared prefix"]
    plain = generate_token_ids(Engine(model), prompts, 9, frozenset({STOP}))
    model.generation_config.repetition_penalty = 8.0
    model.generation_config.suppress_tokens = [response[0] for response in plain]
    assert generate_token_ids(Engine(model), prompts, 9, frozenset({STOP})) == plain
    # Off the packed path, transformers generates the rest.
    monkeypatch.setattr("analysis.models.generation.can_split_attention", lambda *args: False)
    assert generate_token_ids(Engine(model), prompts, 9, frozenset({STOP})) == plain
    assert model.generation_config.repetition_penalty == 8.0


@pytest.mark.parametrize("family", ["llama", "mamba"])  # packed rows, and rows that transformers generates
def test_an_answer_ends_before_the_first_of_its_end_tokens(family: str) -> None:
    model, prompt = tiny_model(family), draw(9, 5)
    whole = alone(model, prompt, 9)
    ends = frozenset(whole[index] for index in (4, 6))
    first = min(map(whole.index, ends))
    assert generate_token_ids(Engine(model), [prompt], 9, ends) == [whole[:first]]


def test_an_answer_ends_where_the_rest_no_longer_matters_and_no_other_answer_changes() -> None:
    model = tiny_model()
    prompts = SETS["a shared prefix"]
    whole = generate_token_ids(Engine(model), prompts, 9, frozenset({STOP}))
    enough = whole[0][3]
    found = generate_token_ids(Engine(model), prompts, 9, frozenset({STOP}), lambda answer: enough in answer)
    ends = [answer.index(enough) + 1 if enough in answer else None for answer in whole]
    assert found == [answer[:end] for answer, end in zip(whole, ends, strict=True)]
    assert ends[0] is not None


@pytest.mark.parametrize("family", ["llama", "mamba"])  # packed rows, and rows that transformers generates
def test_a_sampled_answer_is_the_same_in_every_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model(family), SETS["a shared prefix"]

    def sample(rows: list[list[int]], seed: str = "0", temperature: float = 1.5) -> list[list[int]]:
        return generate_token_ids(
            Engine(model), rows, 9, frozenset({STOP}), sampling=Sampling(temperature, seed)
        )

    found = sample(prompts)
    assert found == [sample([prompt])[0] for prompt in prompts]
    monkeypatch.setattr("analysis.models.generation.can_split_attention", lambda *args: False)
    assert sample(prompts) == found
    assert sample(prompts, seed="1") != found
    assert sample(prompts, temperature=1e-4) == [alone(model, prompt, 9) for prompt in prompts]


def test_tokens_are_drawn_from_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    n, temperature = 8000, 0.7
    sampling = Sampling(temperature, "0")
    drawn = choose_tokens(logits.expand(n, -1), [[number] for number in range(n)], sampling)
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / n
    expected = (logits / temperature).softmax(0)
    # Five standard errors of each share.
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
