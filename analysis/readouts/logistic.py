"""The calibrated readout: a logistic regression from first-token logits to the judged response.

The model answers the calibration split under several conditions, and a judge labels the responses. An
L2-regularized logistic regression predicts the label from the logits of the tokens with which responses
start. The readout is linear in the logits, so that its margin decomposes over the components of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from defenses.contract import Defense, QueryChat
from defenses.errors import UserError

CALIBRATION_CONDITIONS = ("none", "safety_prompt", "in_context_refusal", "safety_tuning", "backdoor")
# Which responses were judged, and which of the judged ones refuse.
ResponseLabels = tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " judged"]]
MIN_RESPONSES_PER_CLASS = 10  # minimum number of refusals, and of other responses, in the training data
_MAX_CANDIDATE_TOKENS = 48  # tokens with a weight
_TOP_TOKENS_PER_PROMPT = 32  # most likely first tokens of each prompt that become candidates


class TooFewResponsesError(Exception):
    """Nearly all responses belong to one class, so that a readout cannot be fitted.

    Args:
        n_refused: number of responses that refuse.
        n: number of responses.
    """

    def __init__(self, n_refused: int, n: int) -> None:
        super().__init__(f"{n_refused} of {n} responses refuse")


def fit_logistic_readout(
    session: ModelSession,
    words_readout: Readout,
    conditions: Mapping[str, Defense],
    query_chats: Sequence[QueryChat],
    pairs: Sequence[str | None],
    label_responses: Callable[[str, Defense], ResponseLabels],
) -> Readout:
    """Return the readout fitted to the model's own responses.

    Args:
        session: the model.
        words_readout: its `words` readout; its response prefix is used, and its tokens are candidates.
        conditions: defenses by condition name, under which the model responds.
        query_chats: queries of the calibration split.
        pairs: pair of each query, or None; cross-validation never splits a pair.
        label_responses: condition name and defense → labels of the responses to the queries.

    Raises:
        TooFewResponsesError: if fewer than `MIN_RESPONSES_PER_CLASS` responses refuse, or do not refuse.
    """
    tokenizer, engine = session.loaded_model.tokenizer, session.engine
    mass_by_id: dict[int, float] = dict.fromkeys(words_readout.ids, np.inf)
    prompts_by_condition: dict[str, list[tuple[int, ...]]] = {}
    labels: list[ResponseLabels] = []
    for condition, defense in conditions.items():
        # Of several copies, only the first is used: the regression learns the meaning of tokens.
        prompts_by_condition[condition] = [
            prompts[0].append_prefix(words_readout.response_prefix)
            for prompts in session.render_prompts(defense, query_chats)
        ]
        with defense.apply_to(session.loaded_model.model):
            top = engine.read_first_token(prompts_by_condition[condition], _select_top_probabilities).double()
        top_ids, top_probabilities = (half.flatten().tolist() for half in top.chunk(2, dim=1))
        for token_id, probability in zip(top_ids, top_probabilities, strict=True):
            mass_by_id[int(token_id)] = mass_by_id.get(int(token_id), 0.0) + probability
        labels.append(label_responses(condition, defense))
    is_judged = np.concatenate([judged for judged, _ in labels])
    is_refusal = np.concatenate([refusal for _, refusal in labels])
    n, n_refused = len(is_refusal), int(is_refusal.sum())
    if min(n_refused, n - n_refused) < MIN_RESPONSES_PER_CLASS:
        raise TooFewResponsesError(n_refused, n)
    n_candidates = max(_MAX_CANDIDATE_TOKENS, len(words_readout.ids))
    ids = sorted(mass_by_id, key=lambda token_id: -mass_by_id[token_id])[:n_candidates]
    logit_rows = []
    for condition, defense in conditions.items():
        with defense.apply_to(session.loaded_model.model):
            rows = engine.read_token_logits(prompts_by_condition[condition], ids)
        logit_rows.append(rows.double().numpy())
    groups = np.array(
        [pair or query_id for pair, (query_id, _) in zip(pairs, query_chats, strict=True)] * len(conditions)
    )
    weights, intercept, auroc = _fit_token_weights(
        np.concatenate(logit_rows)[is_judged], is_refusal, groups[is_judged]
    )
    order = np.argsort(-weights)
    return Readout(
        "calibrated",
        tuple(str(tokenizer.decode([ids[index]])) for index in order),
        tuple(ids[index] for index in order),
        tuple(float(weights[index]) for index in order),
        threshold=-intercept,
        response_prefix=words_readout.response_prefix,
        prefill=words_readout.prefill,
        threshold_source=f"by logistic regression to {n} responses under {len(conditions)} conditions",
        notices=(
            *words_readout.notices[1:],
            f"calibrated on {n} responses, {n_refused} of them refusals, under {', '.join(conditions)}; "
            f"cross-validated AUROC {auroc:.2f}",
        ),
    )


def _select_top_probabilities(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows values"]:
    """Return the ids of each row's most likely tokens, followed by their probabilities."""
    top = logits.softmax(1).topk(min(_TOP_TOKENS_PER_PROMPT, logits.shape[1]), dim=1)
    return torch.cat([top.indices.float(), top.values], dim=1)  # float32 holds ids up to 16 million


def _fit_token_weights(
    logits: Float[np.ndarray, "n tokens"], is_refusal: Bool[np.ndarray, " n"], groups: np.ndarray
) -> tuple[Float[np.ndarray, " tokens"], float, float]:
    """Return weights that sum to zero, the intercept, and the cross-validated AUROC over held-out pairs."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    # A constant added to all logits has no meaning, so their mean is removed and the weights sum to zero.
    centered = logits - logits.mean(1, keepdims=True)
    folds = GroupKFold(5)
    fits: list[tuple[float, float, np.ndarray]] = []
    for strength in (1e-3, 1e-2, 1e-1, 1.0):
        model = LogisticRegression(C=strength, max_iter=5000)
        probabilities = cross_val_predict(
            model, centered, is_refusal, groups=groups, cv=folds, method="predict_proba"
        )[:, 1]
        fits.append(
            (float(log_loss(is_refusal, probabilities, labels=[False, True])), strength, probabilities)
        )
    _, best_strength, best_probabilities = min(fits, key=lambda fit: fit[0])
    model = LogisticRegression(C=best_strength, max_iter=5000).fit(centered, is_refusal)
    weights = model.coef_[0]
    if not np.isfinite(weights).all():
        raise UserError("the calibrated readout could not be fitted: the logits are not finite")
    return (
        weights - weights.mean(),
        float(model.intercept_[0]),
        float(roc_auc_score(is_refusal, best_probabilities)),
    )
