"""The outcome readout: values of first tokens, and the margin that they give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import derive_readout, make_toy_session

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.loading import load_queries
from analysis.readouts.outcome import (
    COMPLIANCE_PRIOR,
    PRIOR_STRENGTH,
    REFUSAL_PRIOR,
    SHARPNESS_CANDIDATES,
    _compute_held_out_loss,
    fit_outcome_readout,
)
from analysis.readouts.readout import Readout
from defenses.catalog import get_defense

NONE = get_defense("none")
QUERIES = load_queries("contrast").select_split("calibration").limit_queries(60).queries
VOCAB = 960


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
    prompts = [
        prompts[0].append_prefix(words.response_prefix)
        for prompts in session.render_prompts(NONE, query_chats)
    ]
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


def test_the_loss_of_a_response_does_not_depend_on_its_own_label() -> None:
    # Each response has a first token of its own, so that values fitted on all responses know the labels.
    n = 20
    rng = np.random.default_rng(0)
    is_refusal, openers, folds = rng.random(n) < 0.5, np.arange(n), np.arange(n) % 5
    priors, probabilities = np.full(n, 0.3), np.eye(n)
    loss = _compute_held_out_loss(probabilities, openers, is_refusal, folds, priors, 0.3)
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
        [
            prompts[0].append_prefix(words.response_prefix)
            for prompts in session.render_prompts(NONE, query_chats)
        ],
        lambda logits: logits.argmax(1, keepdim=True).float(),
    )
    for token_id, weight in zip(words.ids, words.weights, strict=True):
        if token_id not in openers[:, 0].int().tolist():
            assert weights[token_id] * weight > 0
