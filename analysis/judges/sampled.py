"""Verdicts on sampled responses: how often the model refuses a query when its tokens are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.datasets.queries import Query
from analysis.judges.judge import Judge, JudgeProgress, Verdict, generate_verdicts
from analysis.models.generation import Sampling
from analysis.models.session import ModelSession
from analysis.stats.bootstrap import compute_wilson_intervals, estimate_crossed_rate
from defenses.contract import Defense, QueryChat
from defenses.errors import UserError


@dataclass(frozen=True)
class SampleOptions:
    """How many responses are sampled.

    Attributes:
        n_samples: responses to each query.
        temperature: of the softmax that tokens are drawn from.
    """

    n_samples: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.n_samples < 1:
            raise UserError(f"--samples {self.n_samples}: it takes the number of responses to each query")
        if not 0 < self.temperature <= 10:
            raise UserError(
                f"--temperature {self.temperature:g}: it takes a number above 0, at most 10; the greedy "
                "response, as at 0, is judged in any case"
            )


def judge_samples(
    session: ModelSession,
    defense: Defense,
    query_chats: Sequence[QueryChat],
    query_texts: Sequence[str],
    judge: Judge,
    response_prefix: tuple[int, ...],
    max_new_tokens: int,
    options: SampleOptions,
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
        options: the number of samples and the temperature.
        on_progress: called with the number of prompts answered since the last call.
    """
    refusals = []
    for number in range(options.n_samples):
        verdicts = generate_verdicts(
            session,
            defense,
            query_chats,
            query_texts,
            judge,
            response_prefix,
            max_new_tokens,
            on_progress,
            sampling=Sampling(options.temperature, f"{session.seed}/sample {number}"),
        )
        refusals.append([float(verdict.is_refusal) if verdict.is_judged else np.nan for verdict in verdicts])
    return np.array(refusals, float)


def build_sample_table(
    refusals: Float[np.ndarray, "samples queries"],
    queries: Sequence[Query],
    greedy: Sequence[Verdict],
    attack: str,
    defense: str,
) -> pd.DataFrame:
    """Return a row for each query: its refusal probability with a Wilson interval, and the greedy verdict.

    Args:
        refusals: from `judge_samples`.
        queries: the queries.
        greedy: the verdict on the greedy response to each query.
        attack: name of the attack.
        defense: the defense's name in the tables.
    """
    n_judged = np.isfinite(refusals).sum(0)
    n_refused = np.nansum(refusals, 0)
    rates = n_refused / np.maximum(n_judged, 1)
    lows, highs = compute_wilson_intervals(rates, np.maximum(n_judged, 1).astype(float))
    is_known = n_judged > 0
    return pd.DataFrame(
        {
            "query": [query.id for query in queries],
            "pair": [query.pair for query in queries],
            "category": [query.category for query in queries],
            "harmful": [query.harmful for query in queries],
            "kind": [query.kind for query in queries],
            "attack": attack,
            "defense": defense,
            "n_judged": n_judged,
            "n_refused": n_refused.astype(int),
            "refusal_probability": np.where(is_known, rates, np.nan),
            "refusal_probability_low": np.where(is_known, np.minimum(lows, rates), np.nan),
            "refusal_probability_high": np.where(is_known, np.maximum(highs, rates), np.nan),
            "refusal_greedy": [verdict.refusal for verdict in greedy],
        }
    )


def summarize_samples(
    refusals: Float[np.ndarray, "samples queries"],
    queries: Sequence[Query],
    greedy: Sequence[Verdict],
    attack: str,
    defense: str,
) -> list[dict[str, Any]]:
    """Return a row for each class: the refusal rate of sampled and of greedy responses, and how they differ.

    The interval of the sampled rate covers the draw of the queries and of the responses, that of the greedy
    rate the draw of the queries (Wilson). `varies` is the share of queries some of whose samples refuse and
    some do not, `greedy_differs` the share whose greedy verdict is not that of most samples.

    Args:
        refusals: from `judge_samples`.
        queries: the queries.
        greedy: as for `build_sample_table`.
        attack: name of the attack.
        defense: the defense's name in the tables.
    """
    is_harmful = np.array([query.harmful for query in queries])
    greedy_refusals = np.array(
        [float(verdict.is_refusal) if verdict.is_judged else np.nan for verdict in greedy]
    )
    rows = []
    for label, members in (("harmful", is_harmful), ("benign", ~is_harmful)):
        sampled, single = refusals[:, members], greedy_refusals[members]
        means = np.array([np.nanmean(column) for column in sampled.T if np.isfinite(column).any()])
        rate, low, high = estimate_crossed_rate(sampled)
        greedy_rate, greedy_low, greedy_high = estimate_crossed_rate(single[None])
        known = np.isfinite(sampled).any(0) & np.isfinite(single)
        majority = np.array([np.nanmean(column) for column in sampled[:, known].T])
        rows.append(
            {"attack": attack, "defense": defense, "class": label, "n_queries": int(members.sum())}
            | {"n_samples": len(refusals), "n_unjudged": int(np.isnan(sampled).sum())}
            | {"sampled": rate, "sampled_low": low, "sampled_high": high}
            | {"greedy": greedy_rate, "greedy_low": greedy_low, "greedy_high": greedy_high}
            | {"varies": float(((means > 0) & (means < 1)).mean()) if len(means) else np.nan}
            | {
                "greedy_differs": float(((majority > 0.5) != (single[known] > 0.5))[majority != 0.5].mean())
                if (majority != 0.5).any()
                else np.nan
            }
        )
    return rows
