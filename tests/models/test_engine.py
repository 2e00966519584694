"""The engine gives what one prompt at a time gives, whatever prompts share, and leaves the model alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import FAMILIES, OTHERS, RECURRENT, VOCAB, WINDOW, fresh_model, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from analysis.models.batches import _TOKENS_PER_BATCH, count_shared_prefix
from analysis.models.engine import Engine
from defenses.errors import UserError

NATS = 1e-4  # what a float32 margin may differ by
Ids = list[int]


def whole(logits: Tensor) -> Tensor:
    return logits


def plain(model: Any, prompts: list[Ids]) -> Tensor:
    """Logits the slow way: one prompt, no cache, no padding."""
    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            rows.append(out.logits[0, -1].float())
    return torch.stack(rows)


def apart(family: str, prompts: list[Ids], batch_size: int | None = None) -> float:
    model = tiny_model(family)
    read = Engine(model, batch_size).read_first_token(prompts, whole)
    return float((read - plain(model, prompts)).abs().max())


def draw(length: int, seed: int) -> Ids:
    generator = random.Random(seed)
    return [generator.randrange(10, VOCAB) for _ in range(length)]


TOKENS = st.integers(4, VOCAB - 1)
PREFIXES = st.lists(TOKENS, max_size=3 * WINDOW)
SUFFIXES = st.lists(st.lists(TOKENS, min_size=1, max_size=2 * WINDOW), min_size=1, max_size=6)


@pytest.mark.parametrize("family", FAMILIES)
@given(prefix=PREFIXES, suffixes=SUFFIXES, batch_size=st.sampled_from([None, 1, 2, 3]))
def test_the_engine_equals_one_prompt_at_a_time(
    family: str, prefix: Ids, suffixes: list[Ids], batch_size: int | None
) -> None:
    assert apart(family, [prefix + suffix for suffix in suffixes], batch_size) < NATS


SHARED = draw(3 * WINDOW, 0)
SETS = {
    "share nothing": [draw(9, 1), draw(4, 2), draw(17, 3)],
    "one is a prefix of another": [SHARED, SHARED + draw(5, 1), SHARED[:-3]],
    "all the same": [SHARED] * 3,
    "a single prompt": [SHARED],
    "a single token": [[11]],
    "single tokens": [[11], [12], [11]],
    "a single token among long ones": [[11], [11, *SHARED], [11, 12]],
    "a shared prefix longer than the window": [SHARED + draw(3 * WINDOW, 1), SHARED + draw(2, 2)],
    "longer than the window, nothing shared": [draw(40, 1), draw(30, 2)],
    "copies of two queries, each a little shorter": [
        [*SHARED, *draw(20, query)[:end], 9, 8] for end in range(20, 12, -1) for query in (1, 2)
    ],
    "one within another behind a prefix": [[*SHARED, *draw(9, 4)[:end]] for end in (1, 9, 4, 9)],
}


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
@pytest.mark.parametrize("prompts", SETS.values(), ids=SETS)
def test_it_does_so_at_the_edges_and_for_other_kinds_of_models(family: str, prompts: list[Ids]) -> None:
    model = tiny_model(family)
    expected = plain(model, prompts)
    for batch_size in (None, 1, 2):
        logits = Engine(model, batch_size).read_first_token(prompts, whole)
        assert (logits - expected).abs().max() < NATS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_models_notice_a_wrong_position_or_a_leaking_pad(family: str) -> None:
    # What the tests above stand on: a mistake moves these models' logits by far more than is allowed.
    model, ids = tiny_model(family), torch.tensor([draw(12, 1)])
    with torch.inference_mode():
        right = model(input_ids=ids, position_ids=torch.arange(12)[None]).logits[0, -1]
        moved = model(input_ids=ids, position_ids=torch.arange(12)[None] ** 2).logits[0, -1]
        longer = model(input_ids=torch.cat([torch.zeros_like(ids[:, :1]), ids], 1)).logits[0, -1]
    assert (moved - right).abs().max() > 100 * NATS
    assert (longer - right).abs().max() > 100 * NATS


ORDERED = [SHARED + draw(length, length) for length in (1, 5, 3, 9, 2, 7)]


@pytest.fixture(scope="module")
def ordered_logits() -> Tensor:
    return Engine(tiny_model("gemma3"), 2).read_first_token(ORDERED, whole)


@given(order=st.permutations(range(6)))
def test_the_order_of_the_prompts_does_not_matter(ordered_logits: Tensor, order: list[int]) -> None:
    logits = Engine(tiny_model("gemma3"), 2).read_first_token([ORDERED[row] for row in order], whole)
    assert torch.allclose(logits, ordered_logits[order], atol=NATS, rtol=0)


def test_no_prompts_and_empty_prompts_are_refused() -> None:
    for prompts in ([], [[11], []]):
        with pytest.raises(ValueError, match="no prompts"):
            Engine(tiny_model()).read_first_token(prompts, whole)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=5))
def test_the_shared_prefix_is_the_longest_that_leaves_each_prompt_a_token(prompts: list[Ids]) -> None:
    shared = count_shared_prefix(prompts)
    assert all(len(prompt) > shared and prompt[:shared] == prompts[0][:shared] for prompt in prompts)
    longer = [prompt[: shared + 1] for prompt in prompts]
    assert any(len(prompt) == shared + 1 for prompt in prompts) or any(one != longer[0] for one in longer)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_the_model_is_left_as_it_was_also_after_an_exception(family: str) -> None:
    model = fresh_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fails(logits: Tensor) -> Tensor:
        raise KeyError("from inside")

    with pytest.raises(KeyError, match="from inside"):
        Engine(model).read_first_token(SETS["share nothing"], fails)
    with breaking(model, KeyError("in the model"), 0), pytest.raises(KeyError, match="in the model"):
        Engine(model).read_first_token(SETS["share nothing"], whole)
    Engine(model).read_first_token(SETS["share nothing"], whole)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_a_second_reading_is_bit_equal_to_the_first() -> None:
    engine, prompts = Engine(tiny_model("mistral")), [SHARED + draw(n, n) for n in (3, 5, 4)]
    assert torch.equal(engine.read_first_token(prompts, whole), engine.read_first_token(prompts, whole))


@contextmanager
def breaking(model: Any, error: Exception, most: int) -> Iterator[list[int]]:
    """While open, the model raises on batches of more than `most` rows; what it accepted is noted."""
    seen: list[int] = []

    def guard(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        at = kwargs["position_ids"]
        rows = int((at == at.min()).sum())  # whether they are padded or lie behind each other
        if rows > most:
            raise error
        seen.append(rows)

    handle = model.register_forward_pre_hook(guard, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory."),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_where_memory_runs_out_smaller_batches_give_the_same(error: Exception) -> None:
    model, prompts = tiny_model(), [SHARED + draw(1 + n % 4, n) for n in range(11)]
    engine, told = Engine(model), list[int]()
    with breaking(model, error, 3) as seen:
        read = engine.read_first_token(prompts, whole, told.append)
    assert (read - plain(model, prompts)).abs().max() < NATS
    assert sum(told) == len(prompts) and seen[0] == 1 and sum(seen[1:]) == len(prompts)
    assert max(seen) == 3
    with breaking(model, AssertionError("what did not fit was tried again"), 3):
        engine.read_first_token(prompts, whole)


def test_one_prompt_too_many_for_the_memory_is_an_error_that_says_what_to_do() -> None:
    model = tiny_model()
    with breaking(model, OUT_OF_MEMORY["cuda"], 0), pytest.raises(UserError, match="--dtype bfloat16"):
        Engine(model).read_first_token([[11, 12], [13]], whole)


def test_other_errors_of_the_model_come_through() -> None:
    model = tiny_model()
    with (
        breaking(model, RuntimeError("shapes differ"), 1),
        pytest.raises(RuntimeError, match="shapes differ"),
    ):
        Engine(model).read_first_token([[11, 12], [13]], whole)


def test_a_batch_has_rows_of_like_length_and_no_more_tokens_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = tiny_model(), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setitem(_TOKENS_PER_BATCH, "cpu", 50)
    lengths = [3, 90, 10, 11, 12, 4, 2, 40, 9]
    try:
        Engine(model).read_first_token([draw(length, length) for length in lengths], whole)
    finally:
        handle.remove()
    assert shapes == [(1, 90), (1, 40), (4, 12), (3, 4)]


def test_work_counts_what_was_computed_and_what_was_saved() -> None:
    engine, told = Engine(tiny_model(), batch_size=2), list[int]()
    engine.read_first_token([[*SHARED, 1], [*SHARED, 2, 3], [*SHARED, 4, 5, 6]], whole, told.append)
    # The prefix once; 3 and 2 tokens without padding; 1 alone.
    assert engine.work_counter.computed_tokens == len(SHARED) + 3 + 2 + 1
    assert engine.work_counter.saved_tokens == 2 * len(SHARED)
    assert sum(told) == 3
    engine.work_counter.reset_counts()
    assert (engine.work_counter.computed_tokens, engine.work_counter.saved_tokens) == (0, 0)


def test_what_some_rows_begin_with_is_computed_once_a_batch() -> None:
    engine = Engine(tiny_model())
    queries = draw(20, 1), draw(20, 2)
    prompts = [[*SHARED, *query[:end], 9, 8] for end in range(20, 10, -1) for query in queries]
    engine.read_first_token(prompts, whole)
    # Of each query its words once, and behind each of its ten copies two tokens.
    assert engine.work_counter.computed_tokens == len(SHARED) + 2 * (20 + 10 * 2)
    assert engine.work_counter.computed_tokens + engine.work_counter.saved_tokens == sum(map(len, prompts))


def test_the_log_probability_of_an_answer_is_that_of_its_prompt_where_prompts_begin_alike() -> None:
    model = tiny_model()
    prompts = [[*SHARED, *draw(12, 3)[:end], 5] for end in (12, 9, 12, 5)]
    answers = [draw(3, 7), draw(2, 8), draw(3, 9), draw(1, 9)]
    together = Engine(model).compute_log_probabilities(prompts, answers)
    for prompt, answer, said in zip(prompts, answers, together, strict=True):
        (alone,) = Engine(model).compute_log_probabilities([prompt], [answer])
        assert torch.allclose(said, alone, atol=NATS)


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_memory_is_not_shared(family: str) -> None:
    engine = Engine(tiny_model(family))
    engine.read_first_token([[*SHARED, 1], [*SHARED, 2]], whole)
    assert engine.work_counter.saved_tokens == 0 and engine.work_counter.computed_tokens == 2 * (
        len(SHARED) + 1
    )


def test_the_unembedding_sees_one_position_of_each_row() -> None:
    model, shapes = tiny_model("gemma2"), []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    try:
        Engine(model, 2).read_first_token([SHARED + draw(n, n) for n in (3, 5, 4)], whole)
    finally:
        handle.remove()
    assert shapes == [(1, 1, VOCAB), (2, 1, VOCAB), (1, 1, VOCAB)]  # the prefix, two batches


def test_a_model_that_goes_round_its_unembedding_module_is_read_right_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, prompts = tiny_model(), SETS["one is a prefix of another"]
    want = plain(model, prompts)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert (Engine(model).read_first_token(prompts, whole) - want).abs().max() < NATS


def test_nothing_of_a_batch_stays_in_the_shared_prefix() -> None:
    engine = Engine(tiny_model("mistral"))
    with torch.inference_mode():
        prefix = engine.compute_prefix(SHARED)
        lengths = [layer.keys.shape for layer in prefix.cache.layers]
        for _ in range(2):
            engine._compute_suffix_logits([[5, 6], [7]], [1, 1], len(SHARED), prefix)
    assert [layer.keys.shape for layer in prefix.cache.layers] == lengths
    assert prefix.cache.get_seq_length() == len(SHARED)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("shared", [0, 16])
def test_likelihoods_of_answers_are_those_of_plain_passes(family: str, shared: int) -> None:
    model = tiny_model(family)
    generator = random.Random(shared)
    head = [generator.randrange(10, VOCAB) for _ in range(shared)]
    prompts = [[*head, *(generator.randrange(10, VOCAB) for _ in range(length))] for length in (1, 7, 3)]
    answers = [[generator.randrange(10, VOCAB) for _ in range(length)] for length in (4, 1, 9)]
    done: list[int] = []
    found = Engine(model).compute_log_probabilities(prompts, answers, done.append)
    for prompt, answer, chances in zip(prompts, answers, found, strict=True):
        with torch.inference_mode():
            plain = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        want = torch.stack([plain[len(prompt) - 1 + place, token] for place, token in enumerate(answer)])
        assert torch.allclose(chances, want, atol=1e-4)
    assert sum(done) == 3


def test_raw_logits_reach_the_reduction_in_float32() -> None:
    model = fresh_model().bfloat16()
    kinds: list[torch.dtype] = []

    def look(logits: Tensor) -> Tensor:
        kinds.append(logits.dtype)
        return logits[:, :1]

    Engine(model).read_first_token([[11, 12], [13]], look)
    assert set(kinds) == {torch.float32}


def test_shape_hints_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeCheckError):
        Engine(tiny_model()).read_first_token([[11], [12]], lambda logits: logits[:, 0])
    with pytest.raises(TypeCheckError):
        count_shared_prefix(7)  # type: ignore[arg-type]
