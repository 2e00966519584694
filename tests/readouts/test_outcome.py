"""The outcome readout: values of first tokens, and the margin that they give."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import derive_readout, make_toy_session

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.loading import load_queries
from analysis.readouts.outcome import (
    COMPLIANCE_PRIOR,
    MIN_MIXED_RESPONSES,
    PRIOR_STRENGTH,
    REFUSAL_PRIOR,
    SHARPNESS_CANDIDATES,
    _compute_held_out_loss,
    _Node,
    fit_outcome_readout,
    list_mixed_openings,
)
from analysis.readouts.prompt_scores import score_prompts
from analysis.readouts.readout import OpeningBranch, Readout
from analysis.run import score_condition
from defenses.catalog import get_defense

NONE = get_defense("none")
QUERIES = load_queries("contrast").select_split("calibration").limit_queries(60).queries
VOCAB = 960


def render_prompt_ids(session, words: Readout, query_chats) -> list[tuple[int, ...]]:
    """Return the token ids of the undefended prompts that a readout is fitted to."""
    return [
        prompts[0].append_prefix(words.response_prefix)
        for prompts in session.render_prompts(NONE, query_chats)
    ]


def expected_refusal(readout: Readout, logits: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Return Σ p(t) v(t) over the whole vocabulary, in plain terms."""
    values = torch.full((logits.shape[1],), readout.base_value, dtype=torch.float64)
    for token_id, weight in zip(readout.ids, readout.weights, strict=True):
        values[token_id] += weight
    return (logits.double() * sharpness).softmax(1) @ values


def test_the_margin_is_the_log_odds_of_the_expected_value_over_all_tokens() -> None:
    readout = Readout("outcome", ("a", "b"), (7, 2), (0.6, -0.15), base_value=0.2, sharpness=4.0)
    logits = 3 * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    margins = readout.compute_margins(logits)[:, 0]
    assert torch.allclose(margins, expected_refusal(readout, logits, 4.0).logit(), atol=1e-5)
    assert torch.allclose(margins, readout.compute_margins(logits + 5)[:, 0], atol=1e-4)
    assert not readout.is_linear
    # A first token that is certain has the log-odds of its own value.
    certain = torch.full((3, VOCAB), -50.0)
    for row, token_id in enumerate((7, 2, 500)):
        certain[row, token_id] = 50.0
    expected = torch.tensor([0.8, 0.05, 0.2], dtype=torch.float64).logit()
    assert torch.allclose(readout.compute_margins(certain)[:, 0], expected, atol=1e-6)


@pytest.fixture(scope="module")
def fitted() -> tuple[Readout, Readout, list[int], np.ndarray]:
    """The readout of a toy model, its words readout, and the planted responses: first tokens, refusals."""
    session = make_toy_session()
    words = derive_readout(session, QUERIES, NONE)
    query_chats = DIRECT_ATTACK.build_query_chats(QUERIES)
    prompts = render_prompt_ids(session, words, query_chats)
    first_tokens = session.engine.read_first_token(
        prompts, lambda logits: logits.argmax(1, keepdim=True).float()
    )
    first_tokens = first_tokens[:, 0].int().tolist()
    # Responses with the most frequent first token refuse, and three others.
    most_frequent = max(set(first_tokens), key=first_tokens.count)
    is_refusal = np.array([token == most_frequent for token in first_tokens])
    is_refusal[np.flatnonzero(~is_refusal)[:3]] = True
    is_judged = np.ones(len(QUERIES), bool)
    is_judged[5] = False
    labels = is_judged, is_refusal[is_judged]
    pairs = [query.pair for query in QUERIES]
    readout = fit_outcome_readout(session, words, NONE, query_chats, pairs, labels)
    return readout, words, [t for t, judged in zip(first_tokens, is_judged, strict=True) if judged], labels[1]


def test_values_are_shares_of_refusals_shrunken_toward_the_prior(fitted) -> None:
    readout, words, first_tokens, is_refusal = fitted
    n, n_refused = len(is_refusal), int(is_refusal.sum())
    assert readout.base_value == pytest.approx((n_refused + 0.5) / (n + 1))
    prior = {
        token_id: REFUSAL_PRIOR if weight > 0 else COMPLIANCE_PRIOR
        for token_id, weight in zip(words.ids, words.weights, strict=True)
    }
    assert set(readout.ids) == set(first_tokens) | set(words.ids)
    for token_id, weight in zip(readout.ids, readout.weights, strict=True):
        refusals = [
            refused for token, refused in zip(first_tokens, is_refusal, strict=True) if token == token_id
        ]
        prior_rate = prior.get(token_id, readout.base_value)
        value = (sum(refusals) + PRIOR_STRENGTH * prior_rate) / (len(refusals) + PRIOR_STRENGTH)
        assert readout.base_value + weight == pytest.approx(value)
    assert list(readout.weights) == sorted(readout.weights, reverse=True)
    assert readout.sharpness in SHARPNESS_CANDIDATES and readout.response_prefix == words.response_prefix


def test_sharpness_is_the_best_on_held_out_responses(fitted) -> None:
    # The planted responses follow from the greedy first token alone, so the sharpest distribution is best.
    readout, *_, is_refusal = fitted
    assert readout.sharpness == max(SHARPNESS_CANDIDATES)
    assert f"{len(is_refusal)} undefended responses" in readout.notices[-1]


def test_responses_of_one_class_choose_no_sharpness() -> None:
    session, n = make_toy_session(), len(QUERIES)
    labels = np.ones(n, bool), np.arange(n) < 4
    readout = fit_outcome_readout(
        session,
        derive_readout(session, QUERIES, NONE),
        NONE,
        DIRECT_ATTACK.build_query_chats(QUERIES),
        [None] * n,
        labels,
    )
    assert readout.sharpness == 1 and "too few are of one class" in readout.notices[-1]


def test_the_loss_of_a_response_does_not_depend_on_its_own_label() -> None:
    # Each response has a first token of its own, so that values fitted on all responses know the labels.
    n = 20
    rng = np.random.default_rng(0)
    is_refusal, openers, folds = rng.random(n) < 0.5, np.arange(n), np.arange(n) % 5
    priors, probabilities = np.full(n, 0.3), np.eye(n)
    node = _Node((), tuple(range(n)), openers, {1.0: probabilities})
    loss = _compute_held_out_loss([node], 1.0, is_refusal, folds, priors, 0.3)
    expected = -np.log(np.where(is_refusal, 0.3, 0.7)).mean()
    assert loss == pytest.approx(expected)


@pytest.mark.parametrize("n_refused", [0, 1, 6, 60, 114, 119, 120])
def test_words_keep_their_side_whatever_the_base_rate_is(n_refused: int) -> None:
    session = make_toy_session()
    words = derive_readout(session, QUERIES, NONE)
    queries = [replace(query, id=f"{query.id}/{copy}") for query in QUERIES for copy in range(2)]
    is_refusal = np.arange(120) < n_refused
    query_chats = DIRECT_ATTACK.build_query_chats(queries)
    labels = np.ones(120, bool), is_refusal
    readout = fit_outcome_readout(session, words, NONE, query_chats, [None] * 120, labels)
    weights = dict(zip(readout.ids, readout.weights, strict=True))
    openers = session.engine.read_first_token(
        render_prompt_ids(session, words, query_chats),
        lambda logits: logits.argmax(1, keepdim=True).float(),
    )
    for token_id, weight in zip(words.ids, words.weights, strict=True):
        if token_id not in openers[:, 0].int().tolist():
            assert weights[token_id] * weight > 0


def plain_logits(session, prompt: tuple[int, ...]) -> torch.Tensor:
    """Return the next-token logits of one prompt, computed without the engine."""
    with torch.inference_mode():
        return session.loaded_model.model(torch.tensor([prompt])).logits[0, -1].double()


def test_branches_correct_the_value_of_their_opening_by_what_follows_it() -> None:
    """Against the sum over all pairs and triples of tokens, written out."""
    session = make_toy_session()
    readout = Readout(
        "outcome-3",
        ("a", "b"),
        (7, 2),
        (0.6, -0.15),
        base_value=0.2,
        sharpness=2.0,
        branches=(
            OpeningBranch((7,), (3, 4), (-0.5, 0.1)),
            OpeningBranch((9,), (3,), (0.3,)),
            OpeningBranch((7, 3), (5,), (0.4,)),
        ),
    )
    values = {(7,): 0.8, (2,): 0.05, (7, 3): 0.3, (7, 4): 0.9, (9, 3): 0.5, (7, 3, 5): 0.7}

    def find_value(tokens: tuple[int, ...]) -> float:
        """Return the value of the longest opening of these tokens that has one."""
        openings = (tokens[:length] for length in (3, 2, 1))
        return next((values[opening] for opening in openings if opening in values), 0.2)

    prompts = [(5, 6, 7), (5, 6, 8, 9), (5, 300, 2)]
    expected = []
    for prompt in prompts:
        total = 0.0
        first = (2 * plain_logits(session, prompt)).softmax(0)
        for token, probability in enumerate(first.tolist()):
            if token not in (7, 9):
                total += probability * find_value((token,))
                continue
            second = (2 * plain_logits(session, (*prompt, token))).softmax(0)
            for next_token, next_probability in enumerate(second.tolist()):
                if (token, next_token) != (7, 3):
                    total += probability * next_probability * find_value((token, next_token))
                    continue
                third = (2 * plain_logits(session, (*prompt, 7, 3))).softmax(0)
                total += (
                    probability
                    * next_probability
                    * sum(p * find_value((7, 3, last)) for last, p in enumerate(third.tolist()))
                )
        expected.append(total)
    for batch_size in (None, 1, 2):
        session.engine.batch_size = batch_size  # the rows of a prompt may be in different batches
        scores = score_prompts(session.loaded_model, session.engine, NONE, prompts, readout)
        assert scores[:, 0].tolist() == pytest.approx(
            np.log(expected) - np.log1p(-np.array(expected)), abs=1e-4
        )


def test_only_openings_of_several_refusals_and_several_others_are_mixed() -> None:
    openings = [
        (1, 2, 3),
        (1, 2, 4),
        (1, 2, 5),
        (1, 2, 5),
        (1, 6, 7),
        (1, 6, 7),
        (8, 9, 9),
        (8, 9, 9),
        (1, 0),
    ]
    is_refusal = np.array([True, True, False, False, True, True, False, False, False])
    assert list_mixed_openings(openings, is_refusal, 3) == [(1,), (1, 2)]
    assert list_mixed_openings(openings, is_refusal, 2) == [(1,)]
    assert list_mixed_openings(openings, is_refusal, 1) == []
    assert list_mixed_openings(openings, ~is_refusal, 3) == [(1,), (1, 2)]
    # What follows an opening that is not mixed does not matter.
    assert list_mixed_openings([(1, 2, 3)] * 4, np.array([True, True, True, False]), 3) == []


def test_the_deeper_readout_tells_responses_with_the_same_first_token_apart() -> None:
    session = make_toy_session()
    words = derive_readout(session, QUERIES, NONE)
    openings = []
    for prompt in render_prompt_ids(session, words, DIRECT_ATTACK.build_query_chats(QUERIES)):
        first = int(plain_logits(session, prompt).argmax())
        openings.append((first, int(plain_logits(session, (*prompt, first)).argmax())))
    # A random model rarely opens two responses alike, so two queries with one first token are repeated.
    shared_first = Counter(first for first, _ in openings).most_common(1)[0][0]
    refused, answered = [index for index, opening in enumerate(openings) if opening[0] == shared_first][:2]
    asked = [*range(len(QUERIES)), *[refused] * 4, *[answered] * 3]
    queries = [replace(QUERIES[index], id=str(number), pair=None) for number, index in enumerate(asked)]
    query_chats = DIRECT_ATTACK.build_query_chats(queries)
    refusing, openings = openings[refused], [openings[index] for index in asked]
    is_refusal = np.array([opening == refusing for opening in openings])
    is_other = np.array([opening[0] == refusing[0] for opening in openings]) & ~is_refusal
    assert min(is_refusal.sum(), is_other.sum()) >= MIN_MIXED_RESPONSES
    labels = np.ones(len(queries), bool), is_refusal
    pairs = [query.pair for query in queries]
    shallow, deep = (
        fit_outcome_readout(session, words, NONE, query_chats, pairs, labels, depth) for depth in (1, 3)
    )
    assert (shallow.ids, shallow.weights, shallow.branches) == (deep.ids, deep.weights, ())
    (branch,) = deep.branches
    assert branch.opening == refusing[:1] and deep.name == "outcome-3"
    assert set(branch.ids) == {second for first, second in openings if first == refusing[0]}
    # Shrunken toward the value of the opening, which is the prior of every token after it.
    opening_value = deep.base_value + deep.weights[deep.ids.index(refusing[0])]
    n = int(is_refusal.sum())
    expected = (n + PRIOR_STRENGTH * opening_value) / (n + PRIOR_STRENGTH) - opening_value
    assert branch.weights[branch.ids.index(refusing[1])] == pytest.approx(expected)
    gaps = []
    for readout in (shallow, deep):
        margins = score_condition(session, "none", NONE, queries, readout)["margin"].to_numpy()
        gaps.append(margins[is_refusal].min() - margins[is_other].max())
    assert gaps[1] > 0.4 > 0.1 > gaps[0]
