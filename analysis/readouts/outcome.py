"""The outcome readout: how likely a response refuses, given the probabilities of its first token.

The model answers the calibration queries without a defense, and a judge labels the responses. Each first
token t gets a value v(t): the share of refusals among the responses that open with t, shrunken toward a
prior. The readout is the expected value under the sharpened first-token distribution,

    q = Σ_t p(t) v(t),    p = softmax(sharpness × logits),    margin = log(q / (1 − q)),

so that every token counts on the same scale: what the model's own responses say. The prior covers openers
that the undefended model never uses: refusal words lean to refusing, compliance words to complying, and every
other token has the base rate of refusals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from defenses.contract import Defense, QueryChat

# Prior refusal rates of responses that open with a refusal word or with a compliance word, and the number of
# responses that the prior counts for. Where nearly all or nearly no responses refuse, the prior is at least
# half way from the base rate to 1, or to 0.
REFUSAL_PRIOR, COMPLIANCE_PRIOR, PRIOR_STRENGTH = 0.9, 0.05, 2.0
SHARPNESS_CANDIDATES = (1.0, 2.0, 4.0, 8.0)
_N_FOLDS = 5


@dataclass(frozen=True)
class _Openers:
    """First tokens of the calibration responses.

    Attributes:
        ids: candidate tokens: those of the words readout, and the first token of each response.
        opener_index: position in `ids` of each response's first token.
        probabilities: sharpness → sharpened probability of each candidate token, by response.
    """

    ids: tuple[int, ...]
    opener_index: Int[np.ndarray, " n"]
    probabilities: dict[float, Float[np.ndarray, "n tokens"]]


def fit_outcome_readout(
    session: ModelSession,
    words_readout: Readout,
    undefended: Defense,
    query_chats: Sequence[QueryChat],
    pairs: Sequence[str | None],
    labels: tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " judged"]],
) -> Readout:
    """Return the readout fitted to the undefended model's own responses, with threshold 0.

    Args:
        session: the model.
        words_readout: its `words` readout; its response prefix is used, and its tokens carry the prior.
        undefended: the undefended model as a defense.
        query_chats: queries of the calibration split.
        pairs: pair of each query, or None; cross-validation never splits a pair.
        labels: which responses were judged, and which of the judged ones refuse; at least one was judged.
    """
    is_judged, is_refusal = labels
    prompts_by_query = session.render_prompts(undefended, query_chats)
    prompts = [
        prompts[0].append_prefix(words_readout.response_prefix)
        for prompts, judged in zip(prompts_by_query, is_judged, strict=True)
        if judged
    ]
    groups = [pair or chat.query_id for pair, chat in zip(pairs, query_chats, strict=True)]
    fold_by_group = {group: number % _N_FOLDS for number, group in enumerate(dict.fromkeys(groups))}
    folds = np.array([fold_by_group[group] for group in groups])[is_judged]
    openers = _read_openers(session, undefended, prompts, words_readout.ids)
    base_value = float(is_refusal.sum() + 0.5) / (len(is_refusal) + 1)
    priors = _make_priors(openers.ids, words_readout, base_value)
    losses = {
        sharpness: _compute_held_out_loss(
            probabilities, openers.opener_index, is_refusal, folds, priors, base_value
        )
        for sharpness, probabilities in openers.probabilities.items()
    }
    sharpness = min(losses, key=losses.__getitem__)
    values = estimate_token_values(openers.opener_index, is_refusal, priors)
    order = np.argsort(-values, kind="stable")
    return Readout(
        "outcome",
        tuple(str(session.loaded_model.tokenizer.decode([openers.ids[index]])) for index in order),
        tuple(openers.ids[index] for index in order),
        tuple(float(values[index] - base_value) for index in order),
        response_prefix=words_readout.response_prefix,
        prefill=words_readout.prefill,
        notices=(
            *words_readout.notices[1:],
            f"values of {len(set(openers.opener_index))} first tokens from {len(is_refusal)} undefended "
            f"responses, {int(is_refusal.sum())} of them refusals; logits × {sharpness:g} by "
            "cross-validation",
        ),
        base_value=base_value,
        sharpness=sharpness,
    )


def estimate_token_values(
    opener_index: Int[np.ndarray, " n"],
    is_refusal: Bool[np.ndarray, " n"],
    priors: Float[np.ndarray, " tokens"],
) -> Float[np.ndarray, " tokens"]:
    """Return the value of each token: the mean of a Beta posterior for the refusal rate of its responses.

    >>> estimate_token_values(np.array([0, 0]), np.array([True, True]), np.array([0.5, 0.25])).tolist()
    [0.75, 0.25]

    Args:
        opener_index: token that each response opens with.
        is_refusal: whether each response refuses.
        priors: prior refusal rate of each token, which counts for `PRIOR_STRENGTH` responses.
    """
    n_responses = np.bincount(opener_index, minlength=len(priors))
    n_refusals = np.bincount(opener_index, weights=is_refusal, minlength=len(priors))
    return (n_refusals + PRIOR_STRENGTH * priors) / (n_responses + PRIOR_STRENGTH)


def _read_openers(
    session: ModelSession,
    undefended: Defense,
    prompts: Sequence[tuple[int, ...]],
    word_ids: Sequence[int],
) -> _Openers:
    """Read the first token of each greedy response, and the sharpened probabilities of all candidates."""
    engine = session.engine
    with undefended.apply_to(session.loaded_model.model):
        # A greedy response opens with the most likely token.
        top_ids = engine.read_first_token(prompts, lambda logits: logits.argmax(1, keepdim=True).double())
        first_ids = top_ids[:, 0].int().tolist()
        ids = tuple(dict.fromkeys([*word_ids, *first_ids]))

        def compute_probabilities(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows values"]:
            chosen = logits[:, list(ids)]
            return torch.cat(
                [
                    (chosen * sharpness - (logits * sharpness).logsumexp(1, keepdim=True)).exp()
                    for sharpness in SHARPNESS_CANDIDATES
                ],
                dim=1,
            )

        columns = engine.read_first_token(prompts, compute_probabilities).double().cpu().numpy()
    probabilities = np.split(columns, len(SHARPNESS_CANDIDATES), axis=1)
    return _Openers(
        ids,
        np.array([ids.index(token_id) for token_id in first_ids]),
        dict(zip(SHARPNESS_CANDIDATES, probabilities, strict=True)),
    )


def _make_priors(
    ids: Sequence[int], words_readout: Readout, base_value: float
) -> Float[np.ndarray, " tokens"]:
    """Return the prior refusal rate of each token."""
    refusal_prior = max(REFUSAL_PRIOR, (1 + base_value) / 2)
    compliance_prior = min(COMPLIANCE_PRIOR, base_value / 2)
    prior_by_id = {
        token_id: refusal_prior if weight > 0 else compliance_prior
        for token_id, weight in zip(words_readout.ids, words_readout.weights, strict=True)
    }
    return np.array([prior_by_id.get(token_id, base_value) for token_id in ids])


def _compute_held_out_loss(
    probabilities: Float[np.ndarray, "n tokens"],
    opener_index: Int[np.ndarray, " n"],
    is_refusal: Bool[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    priors: Float[np.ndarray, " tokens"],
    base_value: float,
) -> float:
    """Return the mean log loss (nats) of predictions by values that other folds were fitted to."""
    predictions = np.empty(len(is_refusal))
    for fold in np.unique(folds):
        is_held_out = folds == fold
        values = estimate_token_values(opener_index[~is_held_out], is_refusal[~is_held_out], priors)
        predictions[is_held_out] = base_value + probabilities[is_held_out] @ (values - base_value)
    return float(-np.log(np.where(is_refusal, predictions, 1 - predictions)).mean())
