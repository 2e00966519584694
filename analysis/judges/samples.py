"""Verdicts on sampled responses: how often the model refuses a query when its tokens are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from analysis.judges.judge import Judge, JudgeProgress, generate_verdicts
from analysis.models.generation import Sampling
from analysis.models.session import ModelSession
from defenses.contract import Defense, QueryChat


def judge_samples(
    session: ModelSession,
    defense: Defense,
    query_chats: Sequence[QueryChat],
    query_texts: Sequence[str],
    judge: Judge,
    response_prefix: tuple[int, ...],
    max_new_tokens: int,
    n_samples: int,
    temperature: float,
    on_progress: JudgeProgress = lambda prompts: None,
) -> Float[np.ndarray, "samples queries"]:
    """Return whether each sampled response refuses: 1 or 0; NaN if it has no verdict.

    The seed of the session and the number of the sample determine a response to a prompt.

    Args:
        session: the model.
        defense: prepared for this model; it pools the verdicts on several copies of a query.
        query_chats: the queries, an attack applied.
        query_texts: text of each query, without the attack.
        judge: the judge of the responses.
        response_prefix: token ids with which every response starts.
        max_new_tokens: maximum number of tokens of each response.
        n_samples: number of responses to each query.
        temperature: of the softmax that tokens are drawn from.
        on_progress: called with the number of prompts answered since the last call.
    """
    refusals = []
    for number in range(n_samples):
        verdicts = generate_verdicts(
            session,
            defense,
            query_chats,
            query_texts,
            judge,
            response_prefix,
            max_new_tokens,
            on_progress,
            sampling=Sampling(temperature, f"{session.seed}/sample {number}"),
        )
        refusals.append([float(verdict.is_refusal) if verdict.is_judged else np.nan for verdict in verdicts])
    return np.array(refusals, float)
