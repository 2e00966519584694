"""The study of `analyze recommend`: select the best defense or ensemble that is certified within limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.stats.bootstrap import make_estimate_columns
from analysis.stats.effects import compute_estimates
from analysis.stats.ensembles import (
    ALONE,
    REPORT_SPLIT,
    SELECTION_SPLIT,
    compute_ensemble_margins,
    split_members,
)
from analysis.stats.pareto import choose_best_single, rank_candidates, summarize_predicted_rates
from analysis.stats.risk_control import (
    ORDERING_SHARE,
    certify_candidates,
    count_queries_needed,
    describe_guarantee,
    estimate_smooth_rates,
    order_candidates,
)
from analysis.stats.tables import UNDEFENDED, Basis
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
            predicted: table of `predict_stack_rates` of the calibration split under every attack.
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
    overlap: Path | None = None,
) -> StudyResult:
    """Recommend the defense or ensemble that refuses the most harmful queries within the limits.

    A quarter of the calibration queries selects the stacks to run and the order of the tests; on the others,
    the candidates are tested.

    Args:
        spec: options of the run.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        max_size: maximum number of members of an ensemble.
        n_stacks: number of most promising stacks to run, and of random ones.
        limits: limits of the recommendation.
        console: shows progress.
        overlap: output folder of `analyze mechanism`, or its `profiles.csv`, for the predictor `overlap`.
    """
    timer = RunTimer()
    ensemble_run = score_ensembles(
        spec,
        defenses,
        settings,
        max_size,
        n_stacks,
        limits.select_stacks,
        console,
        overlap,
        ORDERING_SHARE,
    )
    candidates = ensemble_run.list_candidates()
    tables, record = collect_ensemble_tables(ensemble_run, candidates, spec, console)
    tables["certification"] = certify_ensembles(ensemble_run, candidates, limits)
    tables["recommendation"] = select_recommendations(
        ensemble_run, candidates, tables["certification"], limits
    )
    record |= {
        "max_over_refusal": limits.max_over_refusal,
        "max_cost": limits.max_cost,
        "guarantee": describe_guarantee(limits.max_over_refusal),
        "guarantee_based_on": Basis.MARGINS.value,
        **timer.describe_time(),
    }
    return build_ensemble_result("recommend", ensemble_run, tables, record)


def certify_ensembles(
    ensemble_run: EnsembleRun, candidates: pd.DataFrame, limits: RecommendationLimits
) -> pd.DataFrame:
    """Test which candidates keep to the limit on over-refusal, all with one guarantee.

    The order of the tests comes from the ordering queries: rising over-refusal, without the candidates that
    another one makes superfluous there. The benign queries among the others are tested. Votes with fitted
    weights are left out, because the weights were fitted to the queries of the test.

    Args:
        ensemble_run: the scored ensembles, with the ordering queries.
        candidates: the result of `list_candidates`.
        limits: limits of the recommendation.

    Returns:
        A row per candidate within the cost, in the order of the tests: `ordering_harmful` and
        `ordering_over_refusal` (rates on the ordering queries, if margins were normal), `n_refused` of
        `n_tested` benign queries, `p_value` where it was tested, `status` (`certified`, `failed`, `not
        tested` after a failure, `not needed`: another candidate promises no more over-refusal and no less
        refusal of harmful queries) and `based_on`, what counts as a refusal.
    """
    allowed = rank_candidates(candidates[candidates["how"] != "fitted"], limits.max_cost).reset_index(
        drop=True
    )
    calibrations = [
        ensemble_run.split_scores[attack.name, SELECTION_SPLIT] for attack in ensemble_run.setup.attacks
    ]
    is_ordering, is_harmful = ensemble_run.is_ordering, calibrations[0].margin_table.is_harmful
    margins = [
        np.stack(
            [
                compute_ensemble_margins(half, split_members(members), how, ensemble_run.calibration_scores)
                for members, how in zip(allowed["members"], allowed["how"], strict=True)
            ]
        )
        for half in calibrations
    ]
    over_refusal = estimate_smooth_rates(margins[0][:, is_ordering & ~is_harmful])
    harmful = np.mean(
        [estimate_smooth_rates(values[:, is_ordering & is_harmful]) for values in margins], axis=0
    )
    sequence = order_candidates(over_refusal, harmful)
    # Judged responses, once they exist for ensembles, can take the place of the signs of the margins.
    losses = margins[0][:, ~is_ordering & ~is_harmful] > 0
    certificate = certify_candidates(losses, [sequence], limits.max_over_refusal)
    rest = [index for index in range(len(allowed)) if index not in set(sequence)]
    status = np.full(len(allowed), "not needed", dtype=object)
    status[sequence] = "not tested"
    status[certificate.was_tested] = "failed"
    status[certificate.is_certified] = "certified"
    table = allowed[["members", "how"]].assign(
        ordering_harmful=harmful,
        ordering_over_refusal=over_refusal,
        n_refused=certificate.n_losses,
        n_tested=certificate.n_queries,
        p_value=np.where(certificate.was_tested, certificate.p_values, np.nan),
        status=status,
        based_on=Basis.MARGINS.value,
    )
    return table.iloc[[*sequence, *rest]].reset_index(drop=True)


def select_recommendations(
    ensemble_run: EnsembleRun,
    candidates: pd.DataFrame,
    certification: pd.DataFrame,
    limits: RecommendationLimits,
) -> pd.DataFrame:
    """Return the recommendation, the next best single defense, and the undefended model.

    The recommendation is the certified candidate that refuses the most harmful queries of the calibration
    split. If none is certified, the candidate with the lowest over-refusal on the calibration split is first.

    Args:
        ensemble_run: the scored ensembles.
        candidates: the result of `list_candidates`.
        certification: the result of `certify_ensembles`.
        limits: limits of the recommendation.

    Returns:
        A row per `role`: rates on the test split with 95 % intervals (`harmful`: share of harmful queries
        refused, mean over attacks; `over_refusal`: share of benign queries refused), `p_meets` (probability,
        given the test split, that the over-refusal rate is within the limit), `certified`,
        `n_benign_needed` (number of benign calibration queries with which the closest candidate would pass,
        if its rate stays the same; missing for others, or if none would do), and the candidates' columns.
    """
    keys = ["members", "how"]
    certified_keys = pd.MultiIndex.from_frame(certification.loc[certification["status"] == "certified", keys])
    is_certified = pd.MultiIndex.from_frame(candidates[keys]).isin(certified_keys)
    allowed = rank_candidates(candidates[is_certified], limits.max_cost)
    if len(allowed):
        role, best = "recommended", allowed.iloc[0]
    else:
        # The undefended model is always affordable, so there is a closest candidate.
        affordable = rank_candidates(candidates[candidates["how"] != "fitted"], limits.max_cost)
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
        [
            {
                "role": role,
                **row.to_dict(),
                **_candidate_rates(ensemble_run, row, limits),
                "certified": (row["members"], row["how"]) in certified_keys,
                "n_benign_needed": _count_benign_needed(ensemble_run, row, limits)
                if role == "closest"
                else np.nan,
            }
            for role, row in rows
        ]
    )


def _count_benign_needed(ensemble_run: EnsembleRun, candidate: Any, limits: RecommendationLimits) -> float:
    """Return the number of benign calibration queries with which a candidate would pass; NaN if none."""
    needed = count_queries_needed(1 - candidate["benign_calibration"], limits.max_over_refusal)
    is_benign = ~ensemble_run.calibration_scores.margin_table.is_harmful
    tested_share = float((~ensemble_run.is_ordering[is_benign]).mean())
    return np.nan if needed is None else float(np.ceil(needed / tested_share))


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
