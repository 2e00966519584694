"""The outcome readout: how likely a response refuses, given the probabilities of its first tokens.

The model answers the calibration queries without a defense, and a judge labels the responses. Each first
token t gets a value v(t): the share of refusals among the responses that open with t, shrunken toward a
prior. The readout is the expected value under the sharpened first-token distribution,

    q = Σ_t p(t) v(t),    p = softmax(sharpness × logits),    margin = log(q / (1 − q)),

so that every token counts on the same scale: what the model's own responses say. The prior covers openers
that the undefended model never uses: refusal words lean to refusing, compliance words to complying, and every
other token has the base rate of refusals.

With a depth above 1, the readout also looks at the token after an opening that begins both refusals and other
responses ("I'm" before "sorry" and before "glad"). Its value v(t, u) is shrunken toward v(t), and

    q = Σ_t p(t) [v(t) + Σ_u p(u | t) (v(t, u) − v(t))],

and so on for longer openings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analysis.models.generation import generate_token_ids
from analysis.models.session import ModelSession
from analysis.readouts.readout import OpeningBranch, Readout
from defenses.contract import Defense, QueryChat

# Prior refusal rates of responses that open with a refusal word or with a compliance word, and the number of
# responses that the prior counts for. Where nearly all or nearly no responses refuse, the prior is at least
# half way from the base rate to 1, or to 0.
REFUSAL_PRIOR, COMPLIANCE_PRIOR, PRIOR_STRENGTH = 0.9, 0.05, 2.0
SHARPNESS_CANDIDATES = (1.0, 2.0, 4.0, 8.0)
# Responses of each kind, refusals and others, that an opening must begin for the token after it to count, and
# the maximum number of such openings, each of which costs some tokens per prompt.
MIN_MIXED_RESPONSES, MAX_BRANCHES = 2, 8
_N_FOLDS = 5
_Opening = tuple[int, ...]


@dataclass(frozen=True)
class _Node:
    """The tokens that follow one opening of the calibration responses; the first tokens follow the empty one.

    Attributes:
        opening: token ids.
        ids: candidate tokens.
        next_index: position in `ids` of the token with which each response continues the opening; -1 if the
            response opens otherwise.
        probabilities: sharpness → sharpened probability of each candidate token after the opening, for each
            response.
    """

    opening: _Opening
    ids: tuple[int, ...]
    next_index: Int[np.ndarray, " n"]
    probabilities: dict[float, Float[np.ndarray, "n tokens"]]


def fit_outcome_readout(
    session: ModelSession,
    words_readout: Readout,
    undefended: Defense,
    query_chats: Sequence[QueryChat],
    pairs: Sequence[str | None],
    labels: tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " judged"]],
    depth: int = 1,
) -> Readout:
    """Return the readout fitted to the undefended model's own responses, with threshold 0.

    Args:
        session: the model.
        words_readout: its `words` readout; its response prefix is used, and its tokens carry the prior.
        undefended: the undefended model as a defense.
        query_chats: queries of the calibration split.
        pairs: pair of each query, or None; cross-validation never splits a pair.
        labels: which responses were judged, and which of the judged ones refuse; at least one was judged.
        depth: number of tokens of a response that count.
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
    base_value = float(is_refusal.sum() + 0.5) / (len(is_refusal) + 1)
    openings = _generate_openings(session, undefended, prompts, depth)
    branch_openings = list_mixed_openings(openings, is_refusal, depth)
    nodes = [
        _read_node(session, undefended, prompts, openings, opening, () if opening else words_readout.ids)
        for opening in [(), *branch_openings]
    ]
    priors = _make_priors(nodes[0].ids, words_readout, base_value)
    n, n_refused = len(is_refusal), int(is_refusal.sum())
    if min(n_refused, n - n_refused) < _N_FOLDS:
        # Responses of one class alone fit the better, the sharper the probabilities are.
        sharpness, reason = 1.0, "because too few are of one class to choose a sharpness"
    else:
        losses = {
            sharpness: _compute_held_out_loss(nodes, sharpness, is_refusal, folds, priors, base_value)
            for sharpness in SHARPNESS_CANDIDATES
        }
        sharpness, reason = min(losses, key=losses.__getitem__), "by cross-validation"
    values = _estimate_node_values(nodes, is_refusal, np.ones(len(is_refusal), bool), priors)
    tokenizer = session.loaded_model.tokenizer
    root_values = values[()]
    order = np.argsort(-root_values, kind="stable")
    notices = [
        *words_readout.notices[1:],
        f"values of {len({opening[0] for opening in openings})} first tokens from {n} undefended responses, "
        f"{n_refused} of them refusals; logits × {sharpness:g} {reason}",
    ]
    if depth > 1:
        texts = ", ".join(repr(str(tokenizer.decode(list(opening)))) for opening in branch_openings)
        notices.append(
            f"the token after {texts} counts as well"
            if texts
            else "only the first token counts: no opening begins several refusals and several other responses"
        )
    return Readout(
        "outcome" if depth == 1 else f"outcome-{depth}",
        tuple(str(tokenizer.decode([nodes[0].ids[index]])) for index in order),
        tuple(nodes[0].ids[index] for index in order),
        tuple(float(root_values[index] - base_value) for index in order),
        response_prefix=words_readout.response_prefix,
        prefill=words_readout.prefill,
        notices=tuple(notices),
        base_value=base_value,
        sharpness=sharpness,
        branches=tuple(_make_branch(nodes, node, values) for node in nodes[1:]),
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


def list_mixed_openings(
    openings: Sequence[tuple[int, ...]], is_refusal: Bool[np.ndarray, " n"], depth: int
) -> list[tuple[int, ...]]:
    """Return the openings that begin both several refusals and several other responses, shorter ones first.

    >>> openings = [(1, 2, 3), (1, 2, 4), (1, 5, 6), (1, 5, 6), (7, 8, 9)]
    >>> list_mixed_openings(openings, np.array([True, True, False, False, False]), 3)
    [(1,)]

    Args:
        openings: first token ids of each response.
        is_refusal: whether each response refuses.
        depth: number of tokens of a response that count; the last of them needs no opening of its own.
    """
    mixed: list[tuple[int, ...]] = [()]
    for length in range(1, depth):
        counts: Counter[tuple[int, ...]] = Counter()
        refusals: Counter[tuple[int, ...]] = Counter()
        for opening, refuses in zip(openings, is_refusal, strict=True):
            if len(opening) > length and opening[: length - 1] in mixed:
                counts[opening[:length]] += 1
                refusals[opening[:length]] += bool(refuses)
        mixed += [
            opening
            for opening, count in counts.most_common()
            if min(refusals[opening], count - refusals[opening]) >= MIN_MIXED_RESPONSES
        ]
    return mixed[1 : 1 + MAX_BRANCHES]


def _generate_openings(
    session: ModelSession, undefended: Defense, prompts: Sequence[tuple[int, ...]], depth: int
) -> list[_Opening]:
    """Generate the first tokens of each greedy response; the end token counts as one."""
    eos_token_id = session.loaded_model.tokenizer.eos_token_id
    with undefended.apply_to(session.loaded_model.model):
        generated = generate_token_ids(session.engine, prompts, depth, session.loaded_model.end_token_ids)
    return [tuple([*token_ids, eos_token_id][:depth]) for token_ids in generated]


def _read_node(
    session: ModelSession,
    undefended: Defense,
    prompts: Sequence[tuple[int, ...]],
    openings: Sequence[_Opening],
    opening: _Opening,
    more_ids: Sequence[int],
) -> _Node:
    """Read the sharpened probabilities of the tokens that follow an opening of some responses.

    Args:
        session: the model.
        undefended: the undefended model as a defense.
        prompts: of the judged responses.
        openings: first tokens of these responses.
        opening: the opening.
        more_ids: candidate tokens besides those that follow it in the responses.
    """
    length = len(opening)
    next_ids = [
        tokens[length] if len(tokens) > length and tokens[:length] == opening else None for tokens in openings
    ]
    ids = tuple(dict.fromkeys([*more_ids, *(token_id for token_id in next_ids if token_id is not None)]))

    def compute_probabilities(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows values"]:
        chosen = logits[:, list(ids)]
        return torch.cat(
            [
                (chosen * sharpness - (logits * sharpness).logsumexp(1, keepdim=True)).exp()
                for sharpness in SHARPNESS_CANDIDATES
            ],
            dim=1,
        )

    with undefended.apply_to(session.loaded_model.model):
        sequences = [(*prompt, *opening) for prompt in prompts]
        columns = session.engine.read_first_token(sequences, compute_probabilities).double().cpu().numpy()
    probabilities = np.split(columns, len(SHARPNESS_CANDIDATES), axis=1)
    return _Node(
        opening,
        ids,
        np.array([-1 if token_id is None else ids.index(token_id) for token_id in next_ids]),
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


def _estimate_node_values(
    nodes: Sequence[_Node],
    is_refusal: Bool[np.ndarray, " n"],
    is_used: Bool[np.ndarray, " n"],
    root_priors: Float[np.ndarray, " tokens"],
) -> dict[_Opening, Float[np.ndarray, " tokens"]]:
    """Return the values of the tokens after each opening, from some of the responses.

    The prior of a token after an opening is the value of the opening.
    """
    values: dict[_Opening, Float[np.ndarray, " tokens"]] = {}
    for node in nodes:
        priors = root_priors
        if node.opening:
            parent, index = _find_opening(nodes, node.opening)
            priors = np.full(len(node.ids), values[parent.opening][index])
        is_counted = is_used & (node.next_index >= 0)
        values[node.opening] = estimate_token_values(
            node.next_index[is_counted], is_refusal[is_counted], priors
        )
    return values


def _predict_refusals(
    nodes: Sequence[_Node],
    values: dict[_Opening, Float[np.ndarray, " tokens"]],
    sharpness: float,
    base_value: float,
) -> Float[np.ndarray, " n"]:
    """Return the expected refusal of each response; nodes with shorter openings come first."""
    n = len(nodes[0].next_index)
    # Probability that the response starts with an opening.
    reach: dict[_Opening, Float[np.ndarray, " n"]] = {(): np.ones(n)}
    expected = np.full(n, base_value)
    for node in nodes:
        opening_value = base_value
        if node.opening:
            parent, index = _find_opening(nodes, node.opening)
            opening_value = values[parent.opening][index]
            reach[node.opening] = reach[parent.opening] * parent.probabilities[sharpness][:, index]
        corrections = node.probabilities[sharpness] @ (values[node.opening] - opening_value)
        expected = expected + reach[node.opening] * corrections
    return expected


def _find_opening(nodes: Sequence[_Node], opening: _Opening) -> tuple[_Node, int]:
    """Return the node in which an opening ends, and the position of its last token there."""
    parent = next(node for node in nodes if node.opening == opening[:-1])
    return parent, parent.ids.index(opening[-1])


def _make_branch(
    nodes: Sequence[_Node], node: _Node, values: dict[_Opening, Float[np.ndarray, " tokens"]]
) -> OpeningBranch:
    """Return the branch of the readout that a node with an opening stands for."""
    parent, index = _find_opening(nodes, node.opening)
    opening_value = values[parent.opening][index]
    weights = tuple(float(value - opening_value) for value in values[node.opening])
    return OpeningBranch(node.opening, node.ids, weights)


def _compute_held_out_loss(
    nodes: Sequence[_Node],
    sharpness: float,
    is_refusal: Bool[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    priors: Float[np.ndarray, " tokens"],
    base_value: float,
) -> float:
    """Return the mean log loss (nats) of predictions by values that other folds were fitted to."""
    predictions = np.empty(len(is_refusal))
    for fold in np.unique(folds):
        is_held_out = folds == fold
        values = _estimate_node_values(nodes, is_refusal, ~is_held_out, priors)
        predictions[is_held_out] = _predict_refusals(nodes, values, sharpness, base_value)[is_held_out]
    return float(-np.log(np.where(is_refusal, predictions, 1 - predictions)).mean())
