"""Defenses tried together: members are asked once, and most combinations are worked out from that.

Every defense is scored on the calibration and on the test split. Votes need no more than that. Stacks are
predicted from their members, and those that the calibration split promises most of are run, with as many
drawn by chance beside them, so that predictions are not judged by the most promising alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from rich.console import Console

from analysis import (
    ensembles,
    fronts,
    kinds,
    manifest,
    pricing,
    showing,
    validity,
)
from analysis.attacks import AS_IS
from analysis.ensembles import ALONE, CHOSEN_ON, REPORTED_ON, Half
from analysis.preparing import Ready, prepare, unreached, why_lost
from analysis.request import HALVES, Request
from analysis.sweeping import Cell, sweep
from analysis.tables import UNDEFENDED, UNVALIDATED, ScoreTable
from defenses import Defense, UserError
from defenses.ensemble import Stack, members

_TIMED = 4  # queries on which costs are measured
# What acts first in a stack: what changes the user's words, then what is said around them, then the model.
_ORDER = ("refactoring", "noise", "reminders", "backdoor", "tuning", "steering", "decoding")

Pick = Callable[[pd.DataFrame, Callable[[str], float]], list[str]]


@dataclass(frozen=True)
class Tried:
    """What came of trying defenses together.

    Attributes:
        ready: loaded and prepared.
        every: the conditions that were scored everywhere, stacks among them.
        scores: of the queries of each split.
        halves: by attack and split.
        lost: what failed, and why.
        mechanisms: of the defenses.
        rows: of single defenses and ensembles on every half, with kinds.
        costs: of the conditions, on this machine.
    """

    ready: Ready
    every: Mapping[str, Defense]
    scores: Mapping[str, ScoreTable]
    halves: Mapping[tuple[str, str], Half]
    lost: Mapping[Cell, str]
    mechanisms: pd.DataFrame
    rows: pd.DataFrame
    costs: pd.DataFrame

    @property
    def fitted_to(self) -> Half:
        """The half that weights are fitted to."""
        return self.halves[self.ready.attacks[0].name, CHOSEN_ON]

    def candidates(self) -> pd.DataFrame:
        """Return all that was observed, with its cost, and whether its readout is known to be right."""
        ratio = dict(zip(self.costs["defense"], self.costs["prefill_ratio"], strict=True))
        known = {
            name: _least(self.scores[REPORTED_ON].trusted(attack.name, name) for attack in self.ready.attacks)
            for name in self.every
        }
        controls = {
            name for name, one in self.every.items() if any(x.family == "control" for x in members(one))
        }
        rows = self.rows[~self.rows["members"].isin(controls)]  # they are read, but nobody should wear them
        found = fronts.candidates(rows, lambda asked: float(sum(ratio[name] for name in asked)))
        rests_on = map(fronts.conditions, found["members"], found["how"])
        return found.assign(trusted=[_least(known[name] for name in asked) for asked in rests_on])


def _least(known: Iterable[str]) -> str:
    """The least good of what is known of several readouts."""
    return min(known, key=("not trusted", "cannot tell", UNVALIDATED, "trusted").index)


def combine(
    request: Request,
    names: Sequence[str | Defense],
    settings: Sequence[str],
    size: int,
    runs: int,
    pick: Pick,
    console: Console,
) -> Tried:
    """Score defenses, work out what they come to together, and run the most promising stacks.

    Args:
        request: what the user asked for; how queries are sent by themselves is always measured, too.
        names: of the defenses, or defenses themselves; stacks among them are run in any case.
        settings: of those that are named.
        size: members of a team at most.
        runs: how many stacks are run that promise most, and how many that are drawn by chance.
        pick: predicted rows of the calibration split and the cost of a team's stack -> teams, the best first.
        console: for progress.
    """
    attacks = (AS_IS, *(one for one in request.attacks if one.name != AS_IS.name))
    ready = prepare(replace(request, split=HALVES, attacks=attacks), names, settings, console)
    single = {part.name: part for one in ready.defenses for part in members(one) if not part.lacking()}
    frames, lost = _scored(ready, single, console)
    single = {name: one for name, one in single.items() if _everywhere(name, frames, ready)}
    if UNDEFENDED not in single:
        why = next(why for (_, name), why in lost.items() if name == UNDEFENDED)
        raise UserError(f"the undefended model could not be scored: {why}")
    usual = [name for name, one in single.items() if name != UNDEFENDED and one.family != "control"]
    usual.sort(key=lambda name: _ORDER.index(single[name].family) if single[name].family in _ORDER else 99)
    if len(usual) < 2:
        raise UserError(f"{len(usual)} defenses are left to combine, and it takes 2: name more, or -d all")
    costs = pricing.once(ready, single, request.seed, console, _TIMED)
    threshold = {"readout": manifest.of_readout(ready.readout)}  # all that predictions need of the manifest
    halves = _halves(ready, _tables(ready, single, frames, threshold), request.seed)
    named = {one.name: one for one in ready.defenses if isinstance(one, Stack) and not one.lacking()}
    given = {name: one for name, one in named.items() if all(part.name in single for part in members(one))}
    lost |= {(AS_IS.name, name): "a member of it failed" for name in named.keys() - given.keys()}
    stacks = given | _wearable(single, usual, size)
    teams = [tuple(name.split("+")) for name in stacks]
    with console.status("predicting"):
        hoped = pd.concat(
            [ensembles.stacks(half, teams) for (_, split), half in halves.items() if split == CHOSEN_ON]
        )
        ratio = dict(zip(costs["defense"], costs["prefill_ratio"], strict=True))
        best = pick(hoped, lambda team: _stack_cost(ratio, team))[:runs]
    others = [name for name in stacks if name not in best and name not in given]
    chance = random.Random(f"{request.seed}/stacks").sample(others, min(runs, len(others)))
    run = {name: stacks[name] for name in dict.fromkeys([*given, *best, *chance])}
    if run:
        base = {UNDEFENDED: single[UNDEFENDED]}
        more, failed = _scored(ready, base | run, console)
        frames, lost = frames | more, lost | failed
        run = {name: one for name, one in run.items() if _everywhere(name, frames, ready)}
        timed = pricing.once(ready, base | run, request.seed, console, _TIMED)
        costs = pd.concat([costs, timed[timed["defense"] != UNDEFENDED]], ignore_index=True)
    every = single | run
    record = manifest.of(ready.bench, ready.readout, every, ready.data, ready.split, request.limit)
    record |= manifest.of_attacks(ready.attacks)
    record["trusted"] = validity.of_run(ready.bench, ready.attacks, every, ready.readout, frames)
    tables = _tables(ready, every, frames, record)
    halves = _halves(ready, tables, request.seed)
    found, rows = _combined(halves, ready, single, usual, size, teams, console)
    return Tried(ready, every, tables, halves, lost, found, rows, costs)


def promising(hoped: pd.DataFrame, cost: Callable[[str], float]) -> list[str]:
    """Return the stacks that promise most: harmful queries refused, over all attacks, less benign refused.

    Args:
        hoped: predicted rows of the calibration split.
        cost: not looked at.
    """
    told = fronts.promised(hoped)
    return list((told["harmful"] - told["over_refusal"]).sort_values(ascending=False, kind="stable").index)


def _scored(
    ready: Ready, every: Mapping[str, Defense], console: Console
) -> tuple[dict[Cell, pd.DataFrame], dict[Cell, str]]:
    """The scores of conditions under all attacks, and what failed; Ctrl-C ends it all: scores are kept."""
    lost = why_lost(unreached(ready, every, console))
    swept = sweep(ready, every, lost, console)
    if swept.interrupted:
        raise KeyboardInterrupt
    return swept.frames, swept.lost


def _everywhere(name: str, frames: Mapping[Cell, pd.DataFrame], ready: Ready) -> bool:
    return all((attack.name, name) in frames for attack in ready.attacks)


def _tables(
    ready: Ready, every: Iterable[str], frames: Mapping[Cell, pd.DataFrame], record: dict[str, Any]
) -> dict[str, ScoreTable]:
    """The scores of each split, in the order of the conditions."""
    split = {query.id: query.split for query in ready.data.queries}
    whole = pd.concat(
        [frames[attack.name, name] for attack in ready.attacks for name in every], ignore_index=True
    )
    parts = {
        name: whole[whole["query"].map(split) == name].reset_index(drop=True)
        for name in (CHOSEN_ON, REPORTED_ON)
    }
    return {name: ScoreTable(frame, record) for name, frame in parts.items()}


def _halves(ready: Ready, tables: Mapping[str, ScoreTable], seed: int) -> dict[tuple[str, str], Half]:
    return {
        (attack.name, split): Half.of(table, attack.name, split, seed)
        for attack in ready.attacks
        for split, table in tables.items()
    }


def _wearable(single: Mapping[str, Defense], names: Sequence[str], size: int) -> dict[str, Stack]:
    """The stacks of these defenses that can be worn."""
    found = {}
    for team in ensembles.teams(names, size):
        try:
            stack = Stack(tuple(single[name] for name in team))
        except ValueError:  # two sets of weights, say
            continue
        found[stack.name] = stack
    return found


def _stack_cost(ratio: Mapping[str, float], team: str) -> float:
    """What a stack costs at least: what each member adds to the time of the undefended model."""
    return 1 + float(sum(ratio[name] - 1 for name in team.split("+")))


def _combined(
    halves: Mapping[tuple[str, str], Half],
    ready: Ready,
    single: Mapping[str, Defense],
    usual: Sequence[str],
    size: int,
    worn: Sequence[tuple[str, ...]],
    console: Console,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The mechanism of each defense, and a row for each of them and each ensemble on every half."""
    first = ready.attacks[0].name
    fitted_to, reported = halves[first, CHOSEN_ON], halves[first, REPORTED_ON]
    teams = ensembles.teams(usual, size)
    parts = []
    with showing.progress(console) as bar:
        task = bar.add_task("combining", total=len(halves))
        for half in halves.values():
            parts += [ensembles.singles(half, single), ensembles.stacks(half, worn)]
            parts.append(ensembles.votes(half, teams, fitted_to))
            bar.advance(task)
    rows = pd.concat(parts, ignore_index=True)
    families = {name: one.family for name, one in single.items() if name != UNDEFENDED}
    found = kinds.mechanisms(reported, families)
    of_team = kinds.kinds(reported, dict.fromkeys(rows.loc[rows["how"] != ALONE, "members"]), found)
    return found, rows.merge(of_team, on="members", how="left")
