"""What `analyze recommend` does: of all defenses and ensembles within the limits, which to use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import make_estimate_columns
from analysis.stats.effects import compute_estimates
from analysis.stats.ensembles import ALONE, REPORT_SPLIT, compute_ensemble_margins
from analysis.stats.pareto import choose_best_single, rank_candidates, summarize_predicted_rates
from analysis.stats.tables import UNDEFENDED
from analysis.studies.ensembles import EnsembleRun


@dataclass(frozen=True)
class RecommendationLimits:
    """What a recommendation keeps to.

    Attributes:
        max_over_refusal: share of benign queries refused, at most.
        max_cost: time until the first token, times undefended, at most; None for any.
    """

    max_over_refusal: float
    max_cost: float | None = None

    def select_stacks(self, predicted: pd.DataFrame, stack_cost: Callable[[str], float]) -> list[str]:
        """Return the stacks that should keep to the limits, the one that refuses most harm first.

        They are only run here; whether they surely keep to them is asked of what is observed.

        Args:
            predicted: predicted rows of the calibration split.
            stack_cost: of a team's stack.
        """
        promised = summarize_predicted_rates(predicted)
        promised = promised[promised["over_refusal"] <= self.max_over_refusal]
        ordered = promised.sort_values("harmful", ascending=False, kind="stable").index
        return [team for team in ordered if self.max_cost is None or stack_cost(team) <= self.max_cost]


def select_recommendations(
    ensemble_run: EnsembleRun, candidates: pd.DataFrame, limits: RecommendationLimits
) -> pd.DataFrame:
    """Return the recommendation, the next best single defense, and the undefended model.

    Where nothing keeps to the limits, what comes closest on the calibration split takes the first place.

    Args:
        ensemble_run: what was scored.
        candidates: the candidates.
        limits: what is kept to.

    Returns:
        By `role`: the rates on the test split with 95 % intervals (harmful refused, the mean over attacks;
        benign refused), `p_meets` (how probable it is, given the test split, that no more of the benign
        queries are refused than the limit says), and the columns of the candidates.
    """
    _, benign = ensemble_run.calibration_scores.class_sizes
    allowed = rank_candidates(candidates, limits.max_over_refusal, limits.max_cost, benign)
    usual = candidates[(candidates["members"] == UNDEFENDED) & (candidates["how"] == ALONE)].iloc[0]
    roles: list[tuple[str, Any]] = []
    if len(allowed):
        roles.append(("recommended", allowed.iloc[0]))
    else:
        affordable = rank_candidates(
            candidates, 1.0, limits.max_cost, benign
        )  # the undefended model is among them
        nearest = affordable.sort_values("benign_calibration", ascending=False, kind="stable").iloc[0]
        roles.append(("closest", nearest))
    if (alone := choose_best_single(allowed, [roles[0][1]["members"], UNDEFENDED])) is not None:
        roles.append(
            ("best single defense" if roles[0][1]["how"] != ALONE else "next best single defense", alone)
        )
    if roles[0][1]["members"] != UNDEFENDED:
        roles.append(("undefended", usual))
    return pd.DataFrame(
        [
            {"role": role, **row.to_dict(), **_candidate_rates(ensemble_run, row, limits)}
            for role, row in roles
        ]
    )


def _candidate_rates(
    ensemble_run: EnsembleRun, candidate: Any, limits: RecommendationLimits
) -> dict[str, float]:
    """The rates of one candidate on the test split, and how likely it meets the limit."""
    team, how = candidate["members"].split("+"), candidate["how"]
    halves = [ensemble_run.split_scores[attack.name, REPORT_SPLIT] for attack in ensemble_run.setup.attacks]
    rates: list[dict[str, Any]] = []
    for sample in (halves[0].observed_weights, halves[0].bootstrap_weights):
        read = [
            compute_estimates(
                half.margin_table.undefended_margins,
                compute_ensemble_margins(half, team, how, ensemble_run.calibration_scores),
                half.margin_table.is_harmful,
                0.0,
                sample,
            )
            for half in halves
        ]
        rates.append(
            {
                "harmful": np.mean([one["refusal_rate"] for one in read], axis=0),
                "over_refusal": read[0]["over_refusal_rate"],
            }
        )
    point, cloud = rates
    found: dict[str, float] = {}
    for name in point:
        found |= make_estimate_columns(
            name, point[name], cloud[name], min(halves[0].class_sizes), from_counts=True
        )
    return found | {"p_meets": float((cloud["over_refusal"] <= limits.max_over_refusal).mean())}
