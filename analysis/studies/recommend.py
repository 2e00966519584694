"""The study of `analyze recommend`: select the best defense or ensemble within limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.stats.bootstrap import make_estimate_columns
from analysis.stats.effects import compute_estimates
from analysis.stats.ensembles import ALONE, REPORT_SPLIT, compute_ensemble_margins
from analysis.stats.pareto import choose_best_single, rank_candidates, summarize_predicted_rates
from analysis.stats.tables import UNDEFENDED
from analysis.studies.ensembles import (
    EnsembleRun,
    build_ensemble_result,
    collect_ensemble_tables,
    score_ensembles,
)
from analysis.studies.manifest import RunTimer
from analysis.studies.run_spec import RunSpec
from analysis.studies.sweep import StudyResult
from defenses.contract import Defense


@dataclass(frozen=True)
class RecommendationLimits:
    """Limits of a recommendation.

    Attributes:
        max_over_refusal: maximum share of benign queries refused.
        max_cost: maximum time to first token, as a multiple of the undefended model's; None for no limit.
    """

    max_over_refusal: float
    max_cost: float | None = None

    def select_stacks(self, predicted: pd.DataFrame, stack_cost: Callable[[str], float]) -> list[str]:
        """Return the stacks that are predicted to stay within the limits, by harmful queries refused.

        The stacks are run; whether they stay within the limits is decided from the observed scores.

        Args:
            predicted: predicted rows of the calibration split.
            stack_cost: cost of a stack.
        """
        rates = summarize_predicted_rates(predicted)
        rates = rates[rates["over_refusal"] <= self.max_over_refusal]
        ranked = rates.sort_values("harmful", ascending=False, kind="stable").index
        return [stack for stack in ranked if self.max_cost is None or stack_cost(stack) <= self.max_cost]


def recommend_defense(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    max_size: int,
    n_stacks: int,
    limits: RecommendationLimits,
    console: Console,
) -> StudyResult:
    """Recommend the defense or ensemble that refuses the most harmful queries within the limits.

    Args:
        spec: options of the run.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        max_size: maximum number of members of an ensemble.
        n_stacks: number of most promising stacks to run, and of random ones.
        limits: limits of the recommendation.
        console: shows progress.
    """
    timer = RunTimer()
    ensemble_run = score_ensembles(
        spec, defenses, settings, max_size, n_stacks, limits.select_stacks, console
    )
    candidates = ensemble_run.list_candidates()
    tables, record = collect_ensemble_tables(ensemble_run, candidates, spec, console)
    tables["recommendation"] = select_recommendations(ensemble_run, candidates, limits)
    record |= {
        "max_over_refusal": limits.max_over_refusal,
        "max_cost": limits.max_cost,
        **timer.describe_time(),
    }
    return build_ensemble_result("recommend", ensemble_run, tables, record)


def select_recommendations(
    ensemble_run: EnsembleRun, candidates: pd.DataFrame, limits: RecommendationLimits
) -> pd.DataFrame:
    """Return the recommendation, the next best single defense, and the undefended model.

    If nothing stays within the limits, the candidate that comes closest on the calibration split is first.

    Args:
        ensemble_run: the scored ensembles.
        candidates: the result of `list_candidates`.
        limits: limits of the recommendation.

    Returns:
        A row per `role`: rates on the test split with 95 % intervals (`harmful`: share of harmful queries
        refused, mean over attacks; `over_refusal`: share of benign queries refused), `p_meets` (probability,
        given the test split, that the over-refusal rate is within the limit), and the candidates' columns.
    """
    _, n_benign = ensemble_run.calibration_scores.class_sizes
    allowed = rank_candidates(candidates, limits.max_over_refusal, limits.max_cost, n_benign)
    if len(allowed):
        role, best = "recommended", allowed.iloc[0]
    else:
        # The undefended model is always affordable, so there is a closest candidate.
        affordable = rank_candidates(candidates, 1.0, limits.max_cost, n_benign)
        by_benign = affordable.sort_values("benign_calibration", ascending=False, kind="stable")
        role, best = "closest", by_benign.iloc[0]
    rows: list[tuple[str, Any]] = [(role, best)]
    if (single := choose_best_single(allowed, [best["members"], UNDEFENDED])) is not None:
        single_role = "best single defense" if best["how"] != ALONE else "next best single defense"
        rows.append((single_role, single))
    if best["members"] != UNDEFENDED:
        is_undefended = (candidates["members"] == UNDEFENDED) & (candidates["how"] == ALONE)
        rows.append(("undefended", candidates[is_undefended].iloc[0]))
    return pd.DataFrame(
        [{"role": role, **row.to_dict(), **_candidate_rates(ensemble_run, row, limits)} for role, row in rows]
    )


def _candidate_rates(
    ensemble_run: EnsembleRun, candidate: Any, limits: RecommendationLimits
) -> dict[str, float]:
    """Return the rates of one candidate on the test split, and how likely it is within the limit."""
    members, how = candidate["members"].split("+"), candidate["how"]
    splits = [ensemble_run.split_scores[attack.name, REPORT_SPLIT] for attack in ensemble_run.setup.attacks]
    rates: list[dict[str, Any]] = []
    for weights in (splits[0].observed_weights, splits[0].bootstrap_weights):
        estimates = [
            compute_estimates(
                split.margin_table.undefended_margins,
                compute_ensemble_margins(split, members, how, ensemble_run.calibration_scores),
                split.margin_table.is_harmful,
                0.0,
                weights,
            )
            for split in splits
        ]
        rates.append(
            {
                "harmful": np.mean([estimate["refusal_rate"] for estimate in estimates], axis=0),
                "over_refusal": estimates[0]["over_refusal_rate"],
            }
        )
    observed, bootstrap = rates
    columns: dict[str, float] = {}
    for name in observed:
        columns |= make_estimate_columns(
            name, observed[name], bootstrap[name], min(splits[0].class_sizes), from_counts=True
        )
    return columns | {"p_meets": float((bootstrap["over_refusal"] <= limits.max_over_refusal).mean())}
