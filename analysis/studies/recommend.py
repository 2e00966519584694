"""The study of `analyze recommend`: select the best defense or ensemble that is certified within limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool
from rich.console import Console

from analysis.attacks import Attack
from analysis.datasets.queries import Query
from analysis.progress import make_progress_bar
from analysis.stats.bootstrap import make_estimate_columns
from analysis.stats.effects import compute_estimates
from analysis.stats.ensembles import (
    ALONE,
    REPORT_SPLIT,
    SELECTION_SPLIT,
    STACK,
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
from analysis.stats.tables import UNDEFENDED, Basis, ResponseVerdict
from analysis.studies.ensembles import (
    EnsembleRun,
    build_ensemble_result,
    collect_ensemble_tables,
    score_ensembles,
)
from analysis.studies.manifest import RunTimer
from analysis.studies.responses import RESPONSE_JUDGE, judge_condition, sample_answered_queries
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
    the candidates are tested, by the judged responses of defenses and stacks and by the margins of votes.

    Args:
        spec: options of the run, among them the number of responses per split.
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
    refusals = CandidateRefusals(ensemble_run, spec, console)
    certification = certify_ensembles(ensemble_run, candidates, limits, refusals)
    tables["certification"] = certification
    tables["recommendation"] = select_recommendations(
        ensemble_run, candidates, certification, limits, refusals
    )
    record |= {
        "max_over_refusal": limits.max_over_refusal,
        "max_cost": limits.max_cost,
        "guarantee": describe_guarantee(limits.max_over_refusal),
        "guarantee_based_on": (Basis.RESPONSES if refusals.uses_responses else Basis.MARGINS).value,
        **timer.describe_time(),
    }
    return build_ensemble_result("recommend", ensemble_run, tables, record)


@dataclass(frozen=True)
class CandidateRefusals:
    """Which queries a candidate refuses.

    A single defense or a stack refuses where its judged response does; a response that cannot be judged
    counts as a refusal, so that an error is on the safe side of a limit on over-refusal. A vote is a rule on
    margins: it refuses where the combined margin is above the threshold.

    Attributes:
        ensemble_run: the scored ensembles.
        spec: options of the run, among them the number of queries per split that are answered; 0 for none, so
            that margins decide for all candidates.
        console: shows progress.
    """

    ensemble_run: EnsembleRun
    spec: RunSpec
    console: Console

    @property
    def uses_responses(self) -> bool:
        """Whether responses are judged."""
        return self.spec.max_responses != 0

    def get_basis(self, how: str) -> Basis:
        """Return what counts as a refusal of a candidate.

        Args:
            how: how the members are combined.
        """
        return Basis.RESPONSES if self.uses_responses and how in (ALONE, STACK) else Basis.MARGINS

    def select_answered(self, split: str, is_selected: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Return which of the selected queries of a split are answered: all, or a sample of them.

        Args:
            split: name of the split.
            is_selected: which queries, in the order of the split's scores.
        """
        queries = self._queries_by_split[split]
        if not self.spec.max_responses or self.spec.max_responses >= is_selected.sum():
            return is_selected
        selected = [query for query, chosen in zip(queries, is_selected, strict=True) if chosen]
        sampled = sample_answered_queries(selected, self.spec.max_responses, self.spec.seed)
        ids = {query.id for query in sampled}
        return np.array([query.id in ids for query in queries])

    def read_refusals(
        self,
        members: str,
        how: str,
        attack: Attack,
        split: str,
        is_selected: Bool[np.ndarray, " n"],
    ) -> Bool[np.ndarray, " selected"]:
        """Return whether a candidate refuses each selected query of a split.

        Args:
            members: names of its members, joined by +.
            how: how they are combined.
            attack: the attack through which the queries are sent.
            split: name of the split.
            is_selected: which queries, in the order of the split's scores.
        """
        run = self.ensemble_run
        if self.get_basis(how) == Basis.MARGINS:
            scores = run.split_scores[attack.name, split]
            margins = compute_ensemble_margins(scores, split_members(members), how, run.calibration_scores)
            return margins[is_selected] > 0
        queries = [
            query
            for query, selected in zip(self._queries_by_split[split], is_selected, strict=True)
            if selected
        ]
        with make_progress_bar(self.console) as bar:
            task = bar.add_task(f"generating responses: {members} ({attack.name})", total=len(queries))
            verdicts = judge_condition(
                run.setup.session,
                attack,
                run.conditions[members],
                queries,
                RESPONSE_JUDGE,
                run.setup.readout,
                lambda n_queries: bar.advance(task, n_queries),
            )
        return np.array([verdict != ResponseVerdict.NOT_REFUSED.value for verdict in verdicts])

    @cached_property
    def _queries_by_split(self) -> Mapping[str, Sequence[Query]]:
        """The queries of each split in the order of its scores."""
        queries = {query.id: query for query in self.ensemble_run.setup.query_set.queries}
        attack = self.ensemble_run.setup.attacks[0].name
        return {
            split: [queries[name] for name in scores.select_condition(attack, UNDEFENDED).index]
            for split, scores in self.ensemble_run.scores.items()
        }


def certify_ensembles(
    ensemble_run: EnsembleRun,
    candidates: pd.DataFrame,
    limits: RecommendationLimits,
    refusals: CandidateRefusals,
) -> pd.DataFrame:
    """Test which candidates keep to the limit on over-refusal, all with one guarantee.

    The order of the tests comes from the ordering queries: rising over-refusal, without the candidates that
    another one makes superfluous there. The benign queries among the others are tested. Votes with fitted
    weights are left out, because the weights were fitted to the queries of the test.

    Args:
        ensemble_run: the scored ensembles, with the ordering queries.
        candidates: the result of `list_candidates`.
        limits: limits of the recommendation.
        refusals: what the candidates refuse.

    Returns:
        A row per candidate within the cost, in the order of the tests: `ordering_harmful` and
        `ordering_over_refusal` (rates on the ordering queries, if margins were normal), `n_refused` of
        `n_tested` benign queries and `p_value` where it was tested, `status` (`certified`, `failed`, `not
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
    is_tested = refusals.select_answered(SELECTION_SPLIT, ~is_ordering & ~is_harmful)

    def read_losses(index: int) -> Bool[np.ndarray, " n"]:
        members, how = allowed["members"].iloc[index], allowed["how"].iloc[index]
        return refusals.read_refusals(members, how, ensemble_run.setup.attacks[0], SELECTION_SPLIT, is_tested)

    certificate = certify_candidates(
        read_losses, len(allowed), int(is_tested.sum()), [sequence], limits.max_over_refusal
    )
    rest = [index for index in range(len(allowed)) if index not in set(sequence)]
    status = np.full(len(allowed), "not needed", dtype=object)
    status[sequence] = "not tested"
    status[certificate.was_tested] = "failed"
    status[certificate.is_certified] = "certified"
    table = allowed[["members", "how"]].assign(
        ordering_harmful=harmful,
        ordering_over_refusal=over_refusal,
        n_refused=pd.array(np.where(certificate.was_tested, certificate.n_losses, np.nan), dtype="Int64"),
        n_tested=certificate.n_queries,
        p_value=certificate.p_values,
        status=status,
        based_on=[refusals.get_basis(how).value for how in allowed["how"]],
    )
    return table.iloc[[*sequence, *rest]].reset_index(drop=True)


def select_recommendations(
    ensemble_run: EnsembleRun,
    candidates: pd.DataFrame,
    certification: pd.DataFrame,
    limits: RecommendationLimits,
    refusals: CandidateRefusals,
) -> pd.DataFrame:
    """Return the recommendation, the next best single defense, and the undefended model.

    The recommendation is the certified candidate that refuses the most harmful queries of the calibration
    split by its margins. If none is certified, the candidate with the lowest over-refusal on the calibration
    split is first.

    Args:
        ensemble_run: the scored ensembles.
        candidates: the result of `list_candidates`.
        certification: the result of `certify_ensembles`.
        limits: limits of the recommendation.
        refusals: what the candidates refuse.

    Returns:
        A row per `role`: rates on the test split with 95 % intervals (`harmful`: share of harmful queries
        refused, mean over attacks; `over_refusal`: share of benign queries refused) by `based_on`, `p_meets`
        (probability, given the test split, that the over-refusal rate is within the limit), `certified`,
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
                **_candidate_rates(ensemble_run, row, limits, refusals),
                "based_on": refusals.get_basis(row["how"]).value,
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
    ensemble_run: EnsembleRun, candidate: Any, limits: RecommendationLimits, refusals: CandidateRefusals
) -> dict[str, float]:
    """Return the rates of one candidate on the test split, and how likely it is within the limit."""
    attacks = ensemble_run.setup.attacks
    split = ensemble_run.split_scores[attacks[0].name, REPORT_SPLIT]
    is_answered = np.ones(len(split.margin_table.is_harmful), dtype=bool)
    if refusals.get_basis(candidate["how"]) == Basis.RESPONSES:
        is_answered = refusals.select_answered(REPORT_SPLIT, is_answered)
    answered = split.select_queries(is_answered)
    # Only the signs of the margins count here: a refusal is +1.
    signs = [
        np.where(
            refusals.read_refusals(candidate["members"], candidate["how"], attack, REPORT_SPLIT, is_answered),
            1.0,
            -1.0,
        )
        for attack in attacks
    ]
    table = answered.margin_table
    rates: list[dict[str, Any]] = []
    for weights in (answered.observed_weights, answered.bootstrap_weights):
        estimates = [
            compute_estimates(table.undefended_margins, values, table.is_harmful, 0.0, weights)
            for values in signs
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
            name, observed[name], bootstrap[name], min(answered.class_sizes), from_counts=True
        )
    return columns | {"p_meets": float((bootstrap["over_refusal"] <= limits.max_over_refusal).mean())}
