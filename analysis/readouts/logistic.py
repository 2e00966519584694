"""The calibrated readout: what first-token logits say best of how an answer goes on.

The model answers the calibration split under several conditions; a judge says which answers refuse; an
L2-regularized logistic regression over the logits of the tokens that answers really open with learns to say
it before. It is linear in the logits, so its margin splits over the parts of a model as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.datasets.queries import Query
from analysis.judges.judge import Verdict, make_verdict_masks
from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from defenses.contract import Defense
from defenses.errors import UserError

CALIBRATION_CONDITIONS = ("none", "safety_prompt", "in_context_refusal", "safety_tuning", "backdoor")
_MAX_CANDIDATE_TOKENS, _TOP_TOKENS_PER_PROMPT = (
    48,
    32,
)  # tokens that are weighted; likeliest ones that are looked at per prompt
MIN_RESPONSES_PER_CLASS = 10  # answers of either kind, to learn from


class TooFewResponsesError(Exception):
    """The answers are nearly all of one kind, so there is nothing to learn.

    Args:
        refused: how many refuse.
        n: of how many.
    """

    def __init__(self, n_refused: int, n: int) -> None:
        super().__init__(f"{n_refused} of {n} answers refuse")


def fit_logistic_readout(
    session: ModelSession,
    words_readout: Readout,
    conditions: Mapping[str, Defense],
    queries: Sequence[Query],
    get_verdicts: Callable[[str, Defense], list[Verdict]],
) -> Readout:
    """Return the readout fitted on the model's own answers.

    Args:
        session: the model.
        words_readout: its `words` readout, whose answer prefix is kept and whose tokens are among the candidates.
        conditions: under which it answers, by name.
        queries: of the calibration split.
        get_verdicts: condition → the verdicts on its answers to the queries, by text.

    Raises:
        TooFew: if under ten answers refuse, or under ten do not.
    """
    mass: dict[int, float] = dict.fromkeys(words_readout.ids, np.inf)
    asked: list[tuple[Defense, list[tuple[int, ...]]]] = []
    said: list[Verdict] = []
    for name, defense in conditions.items():
        # Of several copies that a defense reads, the first: what is learned is what tokens mean.
        prompts = [
            first.append_prefix(words_readout.response_prefix)
            for first, *_ in session.render_queries(defense, queries)
        ]
        asked.append((defense, prompts))
        with defense.apply_to(session.loaded_model.model):
            seen = session.engine.read_first_token(prompts, _select_top_probabilities).double()
        for token, chance in zip(*(part.flatten().tolist() for part in seen.chunk(2, dim=1)), strict=True):
            mass[int(token)] = mass.get(int(token), 0.0) + chance
        said += get_verdicts(name, defense)
    judged, truth = make_verdict_masks(said)
    if min(truth.sum(), (~truth).sum()) < MIN_RESPONSES_PER_CLASS:
        raise TooFewResponsesError(int(truth.sum()), len(truth))
    ids = sorted(mass, key=lambda token: -mass[token])[: max(_MAX_CANDIDATE_TOKENS, len(words_readout.ids))]
    rows = []
    for defense, prompts in asked:
        with defense.apply_to(session.loaded_model.model):
            rows.append(
                session.engine.read_first_token(prompts, lambda logits: logits[:, ids]).double().numpy()
            )
    groups = np.array([query.pair or query.id for query in queries] * len(asked))
    weights, intercept, agrees = _fit_token_weights(np.concatenate(rows)[judged], truth, groups[judged])
    order = np.argsort(-weights)
    tokenizer = session.loaded_model.tokenizer
    return Readout(
        "calibrated",
        tuple(str(tokenizer.decode([ids[at]])) for at in order),
        tuple(ids[at] for at in order),
        tuple(float(weights[at]) for at in order),
        threshold=-intercept,
        response_prefix=words_readout.response_prefix,
        prefill=words_readout.prefill,
        threshold_source=f"by logistic regression to {len(truth)} answers under {len(conditions)} conditions",
        notices=(
            *words_readout.notices[1:],
            f"calibrated on {len(truth)} answers, {truth.sum()} of them refusals, under "
            f"{', '.join(conditions)}; cross-validated AUROC {agrees:.2f}",
        ),
    )


def _select_top_probabilities(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows values"]:
    """The likeliest tokens of each row, then their probabilities."""
    top = logits.softmax(1).topk(min(_TOP_TOKENS_PER_PROMPT, logits.shape[1]), dim=1)
    return torch.cat([top.indices.float(), top.values], dim=1)  # float32 holds ids up to 16 million


def _fit_token_weights(
    logits: Float[np.ndarray, "n tokens"], is_refusal: Bool[np.ndarray, " n"], groups: np.ndarray
) -> tuple[Float[np.ndarray, " tokens"], float, float]:
    """Weights that sum to zero, the intercept, and the AUROC on held-out pairs."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    # What all logits have in common says nothing, so it is taken out and the weights sum to zero.
    centered = logits - logits.mean(1, keepdims=True)
    folds = GroupKFold(5)
    best: tuple[float, float, np.ndarray] | None = None
    for strength in (1e-3, 1e-2, 1e-1, 1.0):
        model = LogisticRegression(C=strength, max_iter=5000)
        chance = cross_val_predict(
            model, centered, is_refusal, groups=groups, cv=folds, method="predict_proba"
        )[:, 1]
        loss = float(log_loss(is_refusal, chance, labels=[False, True]))
        if best is None or loss < best[0]:
            best = loss, strength, chance
    assert best is not None
    model = LogisticRegression(C=best[1], max_iter=5000).fit(centered, is_refusal)
    weights = model.coef_[0]
    if not np.isfinite(weights).all():
        raise UserError("the calibrated readout could not be fitted: the logits are not finite")
    return weights - weights.mean(), float(model.intercept_[0]), float(roc_auc_score(is_refusal, best[2]))
