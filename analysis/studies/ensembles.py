"""Defenses tried together: members are asked once, and most combinations are worked out from that.

Every defense is scored on the calibration and on the test split. Votes need no more than that. Stacks are
predicted from their members, and those that the calibration split promises most of are run, with as many
drawn by chance beside them, so that predictions are not judged by the most promising alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.attacks import DIRECT_ATTACK
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
)
from analysis.stats.pareto import build_candidates, list_member_conditions, summarize_predicted_rates
from analysis.stats.tables import UNDEFENDED, UNVALIDATED, ScoreTable, iterate_rows
from analysis.studies.calibration import collect_trust
from analysis.studies.cost import cached_cost
from analysis.studies.manifest import describe_attacks, describe_readout, describe_run
from analysis.studies.progress import make_progress_bar
from analysis.studies.run_spec import BOTH_SPLITS, RunSpec
from analysis.studies.setup import RunSetup, describe_failed_checks, find_preflight_failures, prepare_setup
from analysis.studies.sweep import ConditionKey, StudyResult, list_failures, sweep_conditions
from defenses.contract import Defense
from defenses.errors import UserError
from defenses.stack import Stack, list_members

_N_TIMED_QUERIES = 4  # queries on which costs are measured
# What acts first in a stack: what changes the user's words, then what is said around them, then the model.
_STACKING_ORDER = ("refactoring", "noise", "reminders", "backdoor", "tuning", "steering", "decoding")

StackSelector = Callable[[pd.DataFrame, Callable[[str], float]], list[str]]


@dataclass(frozen=True)
class EnsembleRun:
    """What came of trying defenses together.

    Attributes:
        setup: loaded and prepared.
        conditions: the conditions that were scored everywhere, stacks among them.
        scores: of the queries of each split.
        split_scores: by attack and split.
        failures: what failed, and why.
        mechanisms: of the defenses.
        effect_rows: of single defenses and ensembles on every half, with kinds.
        costs: of the conditions, on this machine.
    """

    setup: RunSetup
    conditions: Mapping[str, Defense]
    scores: Mapping[str, ScoreTable]
    split_scores: Mapping[tuple[str, str], SplitScores]
    failures: Mapping[ConditionKey, str]
    mechanisms: pd.DataFrame
    effect_rows: pd.DataFrame
    costs: pd.DataFrame

    @property
    def calibration_scores(self) -> SplitScores:
        """The half that weights are fitted to."""
        return self.split_scores[self.setup.attacks[0].name, SELECTION_SPLIT]

    def list_candidates(self) -> pd.DataFrame:
        """Return all that was observed, with its cost, and whether its readout is known to be right."""
        ratio = dict(zip(self.costs["defense"], self.costs["prefill_ratio"], strict=True))
        known = {
            name: _least_trusted(
                self.scores[REPORT_SPLIT].get_trust(attack.name, name) for attack in self.setup.attacks
            )
            for name in self.conditions
        }
        controls = {
            name
            for name, one in self.conditions.items()
            if any(x.family == "control" for x in list_members(one))
        }
        rows = self.effect_rows[
            ~self.effect_rows["members"].isin(controls)
        ]  # they are read, but nobody should wear them
        found = build_candidates(rows, lambda asked: float(sum(ratio[name] for name in asked)))
        rests_on = map(list_member_conditions, found["members"], found["how"])
        return found.assign(trusted=[_least_trusted(known[name] for name in asked) for asked in rests_on])


def _least_trusted(trust_values: Iterable[str]) -> str:
    """The least good of what is known of several readouts."""
    return min(trust_values, key=("not trusted", "cannot tell", UNVALIDATED, "trusted").index)


def score_ensembles(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    max_size: int,
    n_stacks: int,
    select_stacks: StackSelector,
    console: Console,
) -> EnsembleRun:
    """Score defenses, work out what they come to together, and run the most promising stacks.

    Args:
        spec: what the user asked for; how queries are sent by themselves is always measured, too.
        defenses: of the defenses, or defenses themselves; stacks among them are run in any case.
        settings: of those that are named.
        max_size: members of a team at most.
        n_stacks: how many stacks are run that promise most, and how many that are drawn by chance.
        select_stacks: predicted rows of the calibration split and the cost of a team's stack -> teams, the best first.
        console: for progress.
    """
    attacks = (DIRECT_ATTACK, *(one for one in spec.attacks if one.name != DIRECT_ATTACK.name))
    ready = prepare_setup(replace(spec, split=BOTH_SPLITS, attacks=attacks), defenses, settings, console)
    single = {
        part.name: part
        for one in ready.defenses
        for part in list_members(one)
        if not part.missing_requirements()
    }
    frames, lost = _check_and_sweep(ready, single, console)
    single = {name: one for name, one in single.items() if _is_scored_everywhere(name, frames, ready)}
    if UNDEFENDED not in single:
        why = next(why for (_, name), why in lost.items() if name == UNDEFENDED)
        raise UserError(f"the undefended model could not be scored: {why}")
    usual = [name for name, one in single.items() if name != UNDEFENDED and one.family != "control"]
    usual.sort(
        key=lambda name: (
            _STACKING_ORDER.index(single[name].family) if single[name].family in _STACKING_ORDER else 99
        )
    )
    if len(usual) < 2:
        raise UserError(f"{len(usual)} defenses are left to combine, and it takes 2: name more, or -d all")
    costs = cached_cost(ready, single, spec.seed, console, _N_TIMED_QUERIES)
    threshold = {"readout": describe_readout(ready.readout)}  # all that predictions need of the manifest
    halves = _scores_by_split(ready, _score_tables(ready, single, frames, threshold), spec.seed)
    named = {
        one.name: one for one in ready.defenses if isinstance(one, Stack) and not one.missing_requirements()
    }
    given = {
        name: one for name, one in named.items() if all(part.name in single for part in list_members(one))
    }
    lost |= {(DIRECT_ATTACK.name, name): "a member of it failed" for name in named.keys() - given.keys()}
    stacks = given | _composable_stacks(single, usual, max_size)
    teams = [tuple(name.split("+")) for name in stacks]
    with console.status("predicting"):
        hoped = pd.concat(
            [evaluate_stacks(half, teams) for (_, split), half in halves.items() if split == SELECTION_SPLIT]
        )
        ratio = dict(zip(costs["defense"], costs["prefill_ratio"], strict=True))
        best = select_stacks(hoped, lambda team: _estimate_stack_cost(ratio, team))[:n_stacks]
    others = [name for name in stacks if name not in best and name not in given]
    chance = random.Random(f"{spec.seed}/stacks").sample(others, min(n_stacks, len(others)))
    run = {name: stacks[name] for name in dict.fromkeys([*given, *best, *chance])}
    if run:
        base = {UNDEFENDED: single[UNDEFENDED]}
        more, failed = _check_and_sweep(ready, base | run, console)
        frames, lost = frames | more, lost | failed
        run = {name: one for name, one in run.items() if _is_scored_everywhere(name, frames, ready)}
        timed = cached_cost(ready, base | run, spec.seed, console, _N_TIMED_QUERIES)
        costs = pd.concat([costs, timed[timed["defense"] != UNDEFENDED]], ignore_index=True)
    every = single | run
    record = describe_run(ready.session, ready.readout, every, ready.query_set, ready.split, spec.limit)
    record |= describe_attacks(ready.attacks)
    record["trusted"] = collect_trust(ready.session, ready.attacks, every, ready.readout, frames)
    tables = _score_tables(ready, every, frames, record)
    halves = _scores_by_split(ready, tables, spec.seed)
    found, rows = _ensemble_effects(halves, ready, single, usual, max_size, teams, console)
    return EnsembleRun(ready, every, tables, halves, lost, found, rows, costs)


def rank_promising_stacks(predicted: pd.DataFrame, stack_cost: Callable[[str], float]) -> list[str]:
    """Return the stacks that promise most: harmful queries refused, over all attacks, less benign refused.

    Args:
        predicted: predicted rows of the calibration split.
        stack_cost: not looked at.
    """
    told = summarize_predicted_rates(predicted)
    return list((told["harmful"] - told["over_refusal"]).sort_values(ascending=False, kind="stable").index)


def _check_and_sweep(
    setup: RunSetup, conditions: Mapping[str, Defense], console: Console
) -> tuple[dict[ConditionKey, pd.DataFrame], dict[ConditionKey, str]]:
    """The scores of conditions under all attacks, and what failed; Ctrl-C ends it all: scores are kept."""
    lost = describe_failed_checks(find_preflight_failures(setup, conditions, console))
    swept = sweep_conditions(setup, conditions, lost, console)
    if swept.interrupted:
        raise KeyboardInterrupt
    return swept.score_frames, swept.failures


def _is_scored_everywhere(
    condition: str, score_frames: Mapping[ConditionKey, pd.DataFrame], setup: RunSetup
) -> bool:
    return all((attack.name, condition) in score_frames for attack in setup.attacks)


def _score_tables(
    setup: RunSetup,
    condition_names: Iterable[str],
    score_frames: Mapping[ConditionKey, pd.DataFrame],
    record: dict[str, Any],
) -> dict[str, ScoreTable]:
    """The scores of each split, in the order of the conditions."""
    split = {query.id: query.split for query in setup.query_set.queries}
    whole = pd.concat(
        [score_frames[attack.name, name] for attack in setup.attacks for name in condition_names],
        ignore_index=True,
    )
    parts = {
        name: whole[whole["query"].map(split) == name].reset_index(drop=True)
        for name in (SELECTION_SPLIT, REPORT_SPLIT)
    }
    return {name: ScoreTable(frame, record) for name, frame in parts.items()}


def _scores_by_split(
    setup: RunSetup, score_tables: Mapping[str, ScoreTable], seed: int
) -> dict[tuple[str, str], SplitScores]:
    return {
        (attack.name, split): SplitScores.from_scores(table, attack.name, split, seed)
        for attack in setup.attacks
        for split, table in score_tables.items()
    }


def _composable_stacks(
    single_defenses: Mapping[str, Defense], names: Sequence[str], max_size: int
) -> dict[str, Stack]:
    """The stacks of these defenses that can be worn."""
    found = {}
    for team in list_teams(names, max_size):
        try:
            stack = Stack(tuple(single_defenses[name] for name in team))
        except ValueError:  # two sets of weights, say
            continue
        found[stack.name] = stack
    return found


def _estimate_stack_cost(cost_ratios: Mapping[str, float], stack_name: str) -> float:
    """What a stack costs at least: what each member adds to the time of the undefended model."""
    return 1 + float(sum(cost_ratios[name] - 1 for name in stack_name.split("+")))


def _ensemble_effects(
    split_scores: Mapping[tuple[str, str], SplitScores],
    setup: RunSetup,
    single_defenses: Mapping[str, Defense],
    member_names: Sequence[str],
    max_size: int,
    stack_members: Sequence[tuple[str, ...]],
    console: Console,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The mechanism of each defense, and a row for each of them and each ensemble on every half."""
    first = setup.attacks[0].name
    fitted_to, reported = split_scores[first, SELECTION_SPLIT], split_scores[first, REPORT_SPLIT]
    teams = list_teams(member_names, max_size)
    parts = []
    with make_progress_bar(console) as bar:
        task = bar.add_task("combining", total=len(split_scores))
        for half in split_scores.values():
            parts += [evaluate_single_defenses(half, single_defenses), evaluate_stacks(half, stack_members)]
            parts.append(evaluate_votes(half, teams, fitted_to))
            bar.advance(task)
    rows = pd.concat(parts, ignore_index=True)
    families = {name: one.family for name, one in single_defenses.items() if name != UNDEFENDED}
    found = classify_mechanisms(reported, families)
    of_team = classify_teams(reported, dict.fromkeys(rows.loc[rows["how"] != ALONE, "members"]), found)
    return found, rows.merge(of_team, on="members", how="left")


_MAX_ROWS_WITH_INTERVALS = (
    1000  # rows up to which all have intervals; of more, single defenses, stacks and the front
)


def evaluate_ensembles(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    max_size: int,
    n_stacks: int,
    console: Console,
) -> StudyResult:
    """Predict and observe what defenses come to together.

    Args:
        spec: what the user asked for.
        defenses: of the defenses, or defenses themselves.
        settings: of those that are named.
        max_size: members of a team at most.
        n_stacks: how many stacks are run that promise most, and how many that are drawn by chance.
        console: for progress.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    tried = score_ensembles(spec, defenses, settings, max_size, n_stacks, rank_promising_stacks, console)
    tables, record = collect_ensemble_tables(tried, tried.list_candidates(), spec, console)
    record |= {
        "created": started.isoformat(timespec="seconds"),
        "wall_seconds": round(time.perf_counter() - clock, 1),
    }
    return build_ensemble_result("ensembles", tried, tables, record)


def collect_ensemble_tables(
    ensemble_run: EnsembleRun, candidates: pd.DataFrame, spec: RunSpec, console: Console
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Return the tables of what was tried, intervals among them, and the beginning of run.json.

    Args:
        ensemble_run: what came of it.
        candidates: the candidates.
        spec: what the user asked for.
        console: for progress.
    """
    rows = ensemble_run.effect_rows
    front = pd.MultiIndex.from_frame(candidates.loc[candidates["on_front"], ["members", "how"]])
    told_of = rows["how"].isin((ALONE, STACK)) | pd.MultiIndex.from_frame(rows[["members", "how"]]).isin(
        front
    )
    known = (rows["split"] == REPORT_SPLIT) & rows["observed_shift"].notna()
    told_of |= known.sum() <= _MAX_ROWS_WITH_INTERVALS
    seen = rows[told_of & known]
    wanted = dict(zip(map(int, seen.index), iterate_rows(seen), strict=True))
    clouds: dict[int, EnsembleDraws] = {}
    ends: dict[int, dict[str, float]] = {}
    with make_progress_bar(console) as bar:
        task = bar.add_task("intervals", total=len(wanted))
        for index, row in wanted.items():
            half = ensemble_run.split_scores[row["attack"], REPORT_SPLIT]
            if row["how"] != ALONE:
                team = row["members"].split("+")
                clouds[index] = draw_ensemble(half, team, row["how"], ensemble_run.calibration_scores)
            ends[index] = estimate_ensemble_intervals(
                half, row, ensemble_run.calibration_scores, clouds.get(index)
            )
            bar.advance(task)
    with console.status("comparing"):
        shifting = dict(
            zip(ensemble_run.mechanisms["defense"], ensemble_run.mechanisms["p_shift"], strict=True)
        )
        raised = [
            find_raised_distances(
                half,
                rows[(rows["attack"] == attack) & (rows["split"] == split)],
                shifting,
                ensemble_run.calibration_scores,
            )
            for (attack, split), half in ensemble_run.split_scores.items()
            if split == REPORT_SPLIT
        ]
        whole = rows.join(pd.DataFrame.from_dict(ends, orient="index"))
        tables = {
            "scores": pd.concat(
                [table.frame.assign(split=name) for name, table in ensemble_run.scores.items()]
            ),
            "summary": summarize_scores(ensemble_run.scores[REPORT_SPLIT], seed=spec.seed).frame,
            "mechanisms": ensemble_run.mechanisms,
            "ensembles": whole,
            "additivity": summarize_prediction_fit(whole, clouds),
            "distance": pd.concat(raised, ignore_index=True),
            "cost": ensemble_run.costs,
            "candidates": candidates,
        }
    record = dict(ensemble_run.scores[REPORT_SPLIT].record) | {
        "notices": ensemble_run.setup.notices,
        "failed": list_failures(ensemble_run.failures),
        "chosen_on": SELECTION_SPLIT,
        "reported_on": REPORT_SPLIT,
    }
    return tables, record


def build_ensemble_result(
    name: str, ensemble_run: EnsembleRun, tables: dict[str, pd.DataFrame], record: dict[str, Any]
) -> StudyResult:
    """Return all of it, what figures are drawn from among it.

    Args:
        name: what was done.
        ensemble_run: what came of it.
        tables: by file stem.
        record: for run.json.
    """
    from analysis.plots.data import build_ensemble_points

    families = {name: one.family for name, one in ensemble_run.conditions.items()}
    drawn = build_ensemble_points(tables["ensembles"], tables["candidates"], families)
    return StudyResult.from_tables(name, record, tables, drawn, ensemble_run.setup, ensemble_run.failures)
