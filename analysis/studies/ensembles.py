"""Ensembles of defenses: score the members once, predict all ensembles, observe votes and selected stacks.

Every defense is scored on the calibration and on the test split. Votes are computed from these scores. Of the
stacks, random ones are run first. They show, on the calibration split, which prediction from the members is
best, and by that prediction the most promising of the other stacks are selected and run. The test split is
used for the report alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.attacks import DIRECT_ATTACK, check_not_adaptive
from analysis.progress import make_progress_bar
from analysis.report.folder import locate_record, read_record, read_run_table
from analysis.stats.additivity import (
    EnsembleDraws,
    draw_ensemble,
    estimate_ensemble_intervals,
    find_raised_distances,
    summarize_prediction_fit,
)
from analysis.stats.effects import summarize_scores
from analysis.stats.ensembles import (
    ALONE,
    REPORT_SPLIT,
    SELECTION_SPLIT,
    STACK,
    SplitScores,
    classify_mechanisms,
    classify_teams,
    evaluate_single_defenses,
    evaluate_stacks,
    evaluate_votes,
    list_teams,
    split_members,
)
from analysis.stats.pareto import build_candidates, list_member_conditions, summarize_predicted_rates
from analysis.stats.predictors import (
    DEFAULT_PREDICTOR,
    OverlapTable,
    build_overlap_table,
    choose_rate_predictor,
    compare_stack_predictors,
    compare_vote_predictors,
    predict_stack_rates,
)
from analysis.stats.risk_control import split_ordering_units
from analysis.stats.tables import UNDEFENDED, ScoreTable, Trust, iterate_rows
from analysis.studies.calibration import collect_trust
from analysis.studies.cost import cached_cost
from analysis.studies.manifest import RunTimer, describe_readout
from analysis.studies.run_spec import BOTH_SPLITS, RunSpec
from analysis.studies.setup import RunSetup, prepare_setup
from analysis.studies.sweep import ConditionKey, StudyResult, build_record, check_and_sweep
from defenses.contract import Defense
from defenses.errors import UserError
from defenses.stack import Stack, list_members

# Up to this number of rows, all have intervals; beyond it, single defenses, stacks and the Pareto front.
_MAX_ROWS_WITH_INTERVALS = 1000
_N_TIMED_QUERIES = 4  # queries on which costs are measured
# Order in a stack: first what changes the image and the user's words, then the text around them, then the
# model. A caption is then one of the changed image.
_STACKING_ORDER = (
    *("image_noise", "refactoring", "noise", "reminders"),
    *("backdoor", "tuning", "steering", "decoding"),
)

StackSelector = Callable[[pd.DataFrame, Callable[[str], float]], list[str]]
ScoreFrames = Mapping[ConditionKey, pd.DataFrame]


def evaluate_ensembles(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    max_size: int,
    n_stacks: int,
    console: Console,
    overlap: Path | None = None,
) -> StudyResult:
    """Predict and observe the effects of ensembles of defenses.

    Args:
        spec: options of the run.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        max_size: maximum number of members of an ensemble.
        n_stacks: number of most promising stacks to run, and of random ones.
        console: shows progress.
        overlap: output folder of `analyze mechanism`, or its `profiles.csv`: adds the predictor `overlap`.
    """
    timer = RunTimer()
    ensemble_run = score_ensembles(
        spec, defenses, settings, max_size, n_stacks, rank_promising_stacks, console, overlap
    )
    candidates = ensemble_run.list_candidates()
    tables, record = collect_ensemble_tables(ensemble_run, candidates, spec, console)
    return build_ensemble_result("ensembles", ensemble_run, tables, record | timer.describe_time())


@dataclass(frozen=True)
class EnsembleRun:
    """Scores, effects and costs of single defenses and ensembles.

    Attributes:
        setup: loaded and prepared.
        conditions: condition name → defense, for everything scored under all attacks, stacks included.
        scores: split → scores of its queries.
        split_scores: attack and split → scores arranged for ensembles.
        failures: what failed, and why.
        mechanisms: mechanism of each defense.
        effect_rows: a row per single defense or ensemble, attack and split.
        costs: cost of the conditions on this machine.
        predictor: the predictor of refusal rates by which the promising stacks were selected, and the number
            of stacks that decided for it.
        is_ordering: which calibration queries, in the order of `split_scores`, were used to select stacks;
            None if all were.
        overlaps: attack → overlap of the attribution profiles of the defenses; None if it is not given.
    """

    setup: RunSetup
    conditions: Mapping[str, Defense]
    scores: Mapping[str, ScoreTable]
    split_scores: Mapping[tuple[str, str], SplitScores]
    failures: Mapping[ConditionKey, str]
    mechanisms: pd.DataFrame
    effect_rows: pd.DataFrame
    costs: pd.DataFrame
    predictor: tuple[str, int] = (DEFAULT_PREDICTOR, 0)
    is_ordering: Any = None
    overlaps: Mapping[str, OverlapTable | None] = field(default_factory=dict)

    @property
    def calibration_scores(self) -> SplitScores:
        """Scores of the calibration split under the first attack: the weights of votes are fitted to them."""
        return self.split_scores[self.setup.attacks[0].name, SELECTION_SPLIT]

    def list_candidates(self) -> pd.DataFrame:
        """Return everything observed, with its cost and the trust in its readout; controls are left out."""
        ratios = _cost_ratios(self.costs)
        trust = {
            name: _least_trusted(
                self.scores[REPORT_SPLIT].get_trust(attack.name, name) for attack in self.setup.attacks
            )
            for name in self.conditions
        }
        controls = [
            name
            for name, defense in self.conditions.items()
            if any(member.family == "control" for member in list_members(defense))
        ]
        rows = self.effect_rows[~self.effect_rows["members"].isin(controls)]
        candidates = build_candidates(
            rows, lambda conditions: float(sum(ratios[name] for name in conditions))
        )
        conditions_by_row = map(list_member_conditions, candidates["members"], candidates["how"])
        return candidates.assign(
            trusted=[_least_trusted(trust[name] for name in conditions) for conditions in conditions_by_row]
        )


def score_ensembles(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    max_size: int,
    n_stacks: int,
    select_stacks: StackSelector,
    console: Console,
    overlap: Path | None = None,
    ordering_share: float | None = None,
) -> EnsembleRun:
    """Score single defenses, predict their ensembles, and run random stacks and the most promising ones.

    Args:
        spec: options of the run; queries are always scored without an attack as well.
        defenses: names of defenses, or defenses; stacks among them are always run.
        settings: settings of the named defenses, `key=value`.
        max_size: maximum number of members of an ensemble.
        n_stacks: number of random stacks to run, and of the most promising ones.
        select_stacks: maps the predicted rates of stacks on the calibration split, and a function from a
            stack to its cost, to the stacks to run, the best first.
        console: shows progress.
        overlap: output folder of `analyze mechanism`, or its `profiles.csv`, for the predictor `overlap`.
        ordering_share: share of the calibration queries by which stacks are selected, so that the others can
            be tested; None for all.
    """
    check_not_adaptive(
        spec.attacks,
        "an ensemble is predicted from its members' margins on one and the same chat: use analyze -d A+B",
    )
    overlap_frame = None if overlap is None else load_overlap(overlap)
    attacks = (DIRECT_ATTACK, *(attack for attack in spec.attacks if attack.name != DIRECT_ATTACK.name))

    def check_inputs(setup: RunSetup) -> None:
        if overlap is not None:
            _check_overlap_model(overlap, setup)

    spec_of_splits = replace(spec, split=BOTH_SPLITS, attacks=attacks)
    setup = prepare_setup(spec_of_splits, defenses, settings, console, check_inputs=check_inputs)
    overlaps = {
        attack.name: None if overlap_frame is None else build_overlap_table(overlap_frame, attack.name)
        for attack in setup.attacks
    }
    single, score_frames, failures = _score_single_defenses(setup, console)
    members = _list_stackable_members(single)
    costs = cached_cost(setup, single, spec.seed, console, _N_TIMED_QUERIES)
    named = _named_stacks(setup, single, failures)
    stacks = named | _composable_stacks(single, members, max_size)
    others = [name for name in stacks if name not in named]
    random_names = random.Random(f"{spec.seed}/stacks").sample(others, min(n_stacks, len(others)))
    first = named | {name: stacks[name] for name in random_names}
    conditions = dict(single)
    is_ordering, predictor = None, (DEFAULT_PREDICTOR, 0)

    def run_stacks(selected: Mapping[str, Stack]) -> None:
        nonlocal score_frames, failures, costs, conditions
        if not selected:
            return
        reference = {UNDEFENDED: single[UNDEFENDED]}
        stack_frames, stack_failures = _check_and_score(setup, reference | dict(selected), console)
        score_frames, failures = score_frames | stack_frames, failures | stack_failures
        scored_stacks = _select_scored_everywhere(selected, score_frames, setup)
        stack_costs = cached_cost(setup, reference | scored_stacks, spec.seed, console, _N_TIMED_QUERIES)
        costs = pd.concat([costs, stack_costs[stack_costs["defense"] != UNDEFENDED]], ignore_index=True)
        conditions |= scored_stacks

    run_stacks(first)
    if ordering_share is not None or n_stacks:
        readout_record = {
            "readout": describe_readout(setup.readout)
        }  # predictions need no more of the record
        tables = _score_tables(setup, conditions, score_frames, readout_record)
        calibrations = [
            half
            for (_, split), half in _scores_by_split(setup, tables, spec.seed).items()
            if split == SELECTION_SPLIT
        ]
        if ordering_share is not None:
            is_ordering = split_ordering_units(calibrations[0].units, ordering_share, spec.seed)
            calibrations = [half.select_queries(is_ordering) for half in calibrations]
            if not all(calibrations[0].class_sizes):
                raise UserError("too few calibration queries: it takes at least two of each class")
        if n_stacks:
            predictor, promising = _rank_stacks(
                calibrations, list(stacks), overlaps, select_stacks, _cost_ratios(costs), console
            )
            promising = [name for name in promising if name not in first][:n_stacks]
            run_stacks({name: stacks[name] for name in promising})
    record = build_record(setup, conditions, spec, failures)
    record["trusted"] = collect_trust(setup.session, setup.attacks, conditions, setup.readout, score_frames)
    record["stack_predictor"] = {"name": predictor[0], "measured_stacks": predictor[1]}
    scores = _score_tables(setup, conditions, score_frames, record)
    split_scores = _scores_by_split(setup, scores, spec.seed)
    teams = list(map(split_members, stacks))
    mechanisms, effect_rows = _ensemble_effects(
        split_scores, setup, single, members, max_size, teams, console
    )
    return EnsembleRun(
        setup,
        conditions,
        scores,
        split_scores,
        failures,
        mechanisms,
        effect_rows,
        costs,
        predictor,
        is_ordering,
        overlaps,
    )


def load_overlap(path: Path) -> pd.DataFrame:
    """Load the overlap of the attribution profiles of defenses from a run of `analyze mechanism`.

    Args:
        path: output folder of the run, or its `profiles.csv` or `overlap.csv`.
    """
    frame = read_run_table(path, "--overlap", "analyze mechanism", "profiles.csv", "overlap.csv")
    missing = {"defense", "other", "contrast", "cosine"} - set(frame)
    if missing:
        raise UserError(f"--overlap {path}: it lacks the columns {', '.join(sorted(missing))}")
    return frame


def _check_overlap_model(path: Path, setup: RunSetup) -> None:
    """Raise if the run of the profiles says that they are of another model or of test queries."""
    record_file = locate_record(path)
    if not record_file.is_file():
        return
    record = read_record(record_file)
    split = record["data"]["split"]
    if split != SELECTION_SPLIT:
        raise UserError(
            f"--overlap {path} was measured on the {split} split, on which predictions are evaluated; run "
            f"`analyze mechanism` with --split {SELECTION_SPLIT}"
        )
    model, origin = record["model"], setup.session.loaded_model.origin
    for key in ("sha256", "state_sha256", "weight_change"):
        if model.get(key) != origin.get(key):
            raise UserError(
                f"--overlap {path} was made with {model['name']}, another model than this run's; run "
                "`analyze mechanism` with the same -m"
            )


def _rank_stacks(
    calibrations: Sequence[SplitScores],
    stack_names: Sequence[str],
    overlaps: Mapping[str, OverlapTable | None],
    select_stacks: StackSelector,
    cost_ratios: Mapping[str, float],
    console: Console,
) -> tuple[tuple[str, int], list[str]]:
    """Return the best predictor with the number of stacks that decided, and the stacks that it favors."""
    with console.status("predicting"):
        predictor = choose_rate_predictor(calibrations, [overlaps[half.attack] for half in calibrations])
        teams = list(map(split_members, stack_names))
        predicted = pd.concat(
            [predict_stack_rates(half, teams, predictor[0], overlaps[half.attack]) for half in calibrations]
        )
        promising = select_stacks(predicted, lambda stack: _estimate_stack_cost(cost_ratios, stack))
    return predictor, promising


def rank_promising_stacks(predicted: pd.DataFrame, stack_cost: Callable[[str], float]) -> list[str]:
    """Return stacks by their predicted rate on harmful queries (mean over attacks) less that on benign ones.

    Args:
        predicted: table of `predict_stack_rates` of the calibration split under every attack.
        stack_cost: cost of a stack; not used.
    """
    rates = summarize_predicted_rates(predicted)
    return list((rates["harmful"] - rates["over_refusal"]).sort_values(ascending=False, kind="stable").index)


def collect_ensemble_tables(
    ensemble_run: EnsembleRun, candidates: pd.DataFrame, spec: RunSpec, console: Console
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Return the tables of a run, with intervals, and the entries of run.json without times.

    Args:
        ensemble_run: the scored ensembles.
        candidates: the result of `list_candidates`.
        spec: options of the run.
        console: shows progress.
    """
    effect_rows, calibration = ensemble_run.effect_rows, ensemble_run.calibration_scores
    intervals, draws = _estimate_intervals(ensemble_run, candidates, console)
    with console.status("comparing predictions with observations"):
        p_shift = dict(
            zip(ensemble_run.mechanisms["defense"], ensemble_run.mechanisms["p_shift"], strict=True)
        )
        raised_distances = [
            find_raised_distances(
                split_scores,
                effect_rows[(effect_rows["attack"] == attack) & (effect_rows["split"] == split)],
                p_shift,
                calibration,
            )
            for (attack, split), split_scores in ensemble_run.split_scores.items()
            if split == REPORT_SPLIT
        ]
        ensembles = effect_rows.join(pd.DataFrame.from_dict(intervals, orient="index"))
        predictors, pairs = _compare_predictors(ensemble_run, draws)
        tables = {
            "scores": pd.concat(
                [table.frame.assign(split=split) for split, table in ensemble_run.scores.items()]
            ),
            "summary": summarize_scores(ensemble_run.scores[REPORT_SPLIT], seed=spec.seed).frame,
            "mechanisms": ensemble_run.mechanisms,
            "ensembles": ensembles,
            "additivity": summarize_prediction_fit(ensembles, draws),
            "predictors": predictors,
            "interacting": pairs,
            "distance": pd.concat(raised_distances, ignore_index=True),
            "cost": ensemble_run.costs,
            "candidates": candidates,
        }
    record = ensemble_run.scores[REPORT_SPLIT].record | {
        "chosen_on": SELECTION_SPLIT,
        "reported_on": REPORT_SPLIT,
    }
    return {name: table for name, table in tables.items() if len(table.columns)}, record


def _compare_predictors(
    ensemble_run: EnsembleRun, draws: Mapping[int, EnsembleDraws]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return how well each predictor does, and which stacks interact, under every attack."""
    rows, fits, interacting = ensemble_run.effect_rows, [], []
    for attack in ensemble_run.setup.attacks:
        calibration, report = (
            ensemble_run.split_scores[attack.name, split] for split in (SELECTION_SPLIT, REPORT_SPLIT)
        )
        fit, pairs = compare_stack_predictors(calibration, report, ensemble_run.overlaps.get(attack.name))
        reported = rows[(rows["attack"] == attack.name) & (rows["split"] == REPORT_SPLIT)]
        votes = compare_vote_predictors(calibration, report, ensemble_run.calibration_scores, reported, draws)
        fits += [fit, votes]
        interacting.append(pairs)
    known = [table for table in fits if len(table)]
    return (pd.concat(known, ignore_index=True) if known else pd.DataFrame()), pd.concat(interacting)


def build_ensemble_result(
    name: str, ensemble_run: EnsembleRun, tables: dict[str, pd.DataFrame], record: dict[str, Any]
) -> StudyResult:
    """Return the result of a study of ensembles, with the tables of its figures.

    Args:
        name: name of the study.
        ensemble_run: the scored ensembles.
        tables: file stem → table.
        record: content of run.json.
    """
    from analysis.plots.data import build_ensemble_points

    families = {condition: defense.family for condition, defense in ensemble_run.conditions.items()}
    figure_tables = build_ensemble_points(tables["ensembles"], tables["candidates"], families)
    return StudyResult.from_tables(
        name, record, tables, figure_tables, ensemble_run.setup, ensemble_run.failures
    )


def _least_trusted(trust_values: Iterable[str]) -> str:
    """Return the lowest trust of several conditions."""
    return min(
        trust_values, key=(Trust.NOT_TRUSTED, Trust.CANNOT_TELL, Trust.NOT_VALIDATED, Trust.TRUSTED).index
    )


def _cost_ratios(costs: pd.DataFrame) -> dict[str, float]:
    """Return the time to first token of each condition as a multiple of the undefended model's."""
    return dict(zip(costs["defense"], costs["prefill_ratio"], strict=True))


def _score_single_defenses(
    setup: RunSetup, console: Console
) -> tuple[dict[str, Defense], dict[ConditionKey, pd.DataFrame], dict[ConditionKey, str]]:
    """Score defenses and members of stacks; return those scored under all attacks, scores, failures."""
    single = {
        member.name: member
        for defense in setup.defenses
        for member in list_members(defense)
        if not member.missing_requirements()
    }
    score_frames, failures = _check_and_score(setup, single, console)
    scored = _select_scored_everywhere(single, score_frames, setup)
    if UNDEFENDED not in scored:
        reason = next(reason for (_, name), reason in failures.items() if name == UNDEFENDED)
        raise UserError(f"the undefended model could not be scored: {reason}")
    return scored, score_frames, failures


def _check_and_score(
    setup: RunSetup, conditions: Mapping[str, Defense], console: Console
) -> tuple[dict[ConditionKey, pd.DataFrame], dict[ConditionKey, str]]:
    """Return the scores of conditions under all attacks, and failures; an interruption ends the study."""
    sweep_result = check_and_sweep(setup, conditions, console)
    if sweep_result.interrupted:
        raise KeyboardInterrupt
    return sweep_result.score_frames, sweep_result.failures


def _select_scored_everywhere(
    conditions: Mapping[str, Defense], score_frames: ScoreFrames, setup: RunSetup
) -> dict[str, Defense]:
    """Return the conditions that were scored under all attacks."""
    return {
        name: defense
        for name, defense in conditions.items()
        if all((attack.name, name) in score_frames for attack in setup.attacks)
    }


def _list_stackable_members(single_defenses: Mapping[str, Defense]) -> list[str]:
    """Return the names of the defenses to combine, in the order in which a stack applies them."""
    members = [
        name
        for name, defense in single_defenses.items()
        if name != UNDEFENDED and defense.family != "control"
    ]

    def position(name: str) -> int:
        family = single_defenses[name].family
        return _STACKING_ORDER.index(family) if family in _STACKING_ORDER else 99

    members.sort(key=position)
    if len(members) < 2:
        remaining = f"only {members[0]} is left" if members else "no defense is left"
        raise UserError(f"{remaining} to combine, and it takes 2: name more, or -d all")
    return members


def _named_stacks(
    setup: RunSetup, single_defenses: Mapping[str, Defense], failures: dict[ConditionKey, str]
) -> dict[str, Stack]:
    """Return the stacks that the user named; record those with a member that failed."""
    stacks = {
        defense.name: defense
        for defense in setup.defenses
        if isinstance(defense, Stack) and not defense.missing_requirements()
    }
    complete = {
        name: stack
        for name, stack in stacks.items()
        if all(member.name in single_defenses for member in list_members(stack))
    }
    for name in stacks:
        if name not in complete:
            failures[DIRECT_ATTACK.name, name] = "a member of it failed"
    return complete


def _composable_stacks(
    single_defenses: Mapping[str, Defense], names: Sequence[str], max_size: int
) -> dict[str, Stack]:
    """Return the stacks of these defenses that can be applied together."""
    stacks = {}
    for team in list_teams(names, max_size):
        try:
            stack = Stack(tuple(single_defenses[name] for name in team))
        except ValueError:  # for instance two sets of weights
            continue
        stacks[stack.name] = stack
    return stacks


def _estimate_stack_cost(cost_ratios: Mapping[str, float], stack_name: str) -> float:
    """Return the lowest possible cost of a stack: each member adds what it adds to the undefended model."""
    return 1 + float(sum(cost_ratios[name] - 1 for name in stack_name.split("+")))


def _score_tables(
    setup: RunSetup,
    condition_names: Iterable[str],
    score_frames: ScoreFrames,
    record: dict[str, Any],
) -> dict[str, ScoreTable]:
    """Return the scores of each split, in the order of the conditions."""
    split_by_query = {query.id: query.split for query in setup.query_set.queries}
    names = list(condition_names)
    whole = pd.concat(
        [score_frames[attack.name, name] for attack in setup.attacks for name in names], ignore_index=True
    )
    splits = whole["query"].map(split_by_query)
    return {
        split: ScoreTable(whole[splits == split].reset_index(drop=True), record)
        for split in (SELECTION_SPLIT, REPORT_SPLIT)
    }


def _scores_by_split(
    setup: RunSetup, score_tables: Mapping[str, ScoreTable], seed: int
) -> dict[tuple[str, str], SplitScores]:
    """Arrange scores for ensembles, by attack and split."""
    return {
        (attack.name, split): SplitScores.from_scores(table, attack.name, split, seed)
        for attack in setup.attacks
        for split, table in score_tables.items()
    }


def _ensemble_effects(
    split_scores: Mapping[tuple[str, str], SplitScores],
    setup: RunSetup,
    single_defenses: Mapping[str, Defense],
    member_names: Sequence[str],
    max_size: int,
    stack_members: Sequence[tuple[str, ...]],
    console: Console,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the mechanism of each defense, and the effect rows of single defenses, stacks and votes."""
    first_attack = setup.attacks[0].name
    calibration, reported = (
        split_scores[first_attack, SELECTION_SPLIT],
        split_scores[first_attack, REPORT_SPLIT],
    )
    teams = list_teams(member_names, max_size)
    parts = []
    with make_progress_bar(console) as bar:
        task = bar.add_task("combining", total=len(split_scores))
        for (attack, _), half in split_scores.items():
            predicting = split_scores[attack, SELECTION_SPLIT]
            parts += [
                evaluate_single_defenses(half, single_defenses),
                evaluate_stacks(half, stack_members, predicting),
                evaluate_votes(half, teams, calibration, predicting),
            ]
            bar.advance(task)
    rows = pd.concat(parts, ignore_index=True)
    families = {name: defense.family for name, defense in single_defenses.items() if name != UNDEFENDED}
    mechanisms = classify_mechanisms(reported, families)
    ensemble_names = dict.fromkeys(rows.loc[rows["how"] != ALONE, "members"])
    kinds = classify_teams(reported, ensemble_names, mechanisms)
    return mechanisms, rows.merge(kinds, on="members", how="left")


def _estimate_intervals(
    ensemble_run: EnsembleRun, candidates: pd.DataFrame, console: Console
) -> tuple[dict[int, dict[str, float]], dict[int, EnsembleDraws]]:
    """Return intervals and bootstrap draws by row, for the observed rows of the test split."""
    rows, calibration = ensemble_run.effect_rows, ensemble_run.calibration_scores
    front = pd.MultiIndex.from_frame(candidates.loc[candidates["on_front"], ["members", "how"]])
    is_observed = (rows["split"] == REPORT_SPLIT) & rows["observed_shift"].notna()
    is_selected = rows["how"].isin((ALONE, STACK))
    is_selected |= pd.MultiIndex.from_frame(rows[["members", "how"]]).isin(front)
    is_selected |= is_observed.sum() <= _MAX_ROWS_WITH_INTERVALS
    selected = rows[is_selected & is_observed]
    draws: dict[int, EnsembleDraws] = {}
    intervals: dict[int, dict[str, float]] = {}
    with make_progress_bar(console) as bar:
        task = bar.add_task("intervals", total=len(selected))
        for index, row in zip(map(int, selected.index), iterate_rows(selected), strict=True):
            split_scores = ensemble_run.split_scores[row["attack"], REPORT_SPLIT]
            if row["how"] != ALONE:
                members = row["members"].split("+")
                predicting = ensemble_run.split_scores[row["attack"], SELECTION_SPLIT]
                draws[index] = draw_ensemble(split_scores, members, row["how"], calibration, predicting)
            intervals[index] = estimate_ensemble_intervals(split_scores, row, calibration, draws.get(index))
            bar.advance(task)
    return intervals, draws
