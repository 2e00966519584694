"""Matched controls of a run: every query is sent under one draw of the control of each defense."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.attacks import Attack
from analysis.datasets.queries import Query, group_units
from analysis.models.chat_template import redact_secrets
from analysis.progress import make_progress_bar, print_note, show_preliminary_work
from analysis.run import score_condition
from analysis.stats.matched_controls import MIN_CONTROL_DRAWS
from analysis.studies.responses import RESPONSE_JUDGE, judge_condition, sample_answered_queries
from analysis.studies.run_spec import RunSpec
from analysis.studies.setup import RunSetup
from analysis.studies.sweep import ConditionFrames, ConditionKey, list_failures, print_cache_notes
from defenses.contract import MatchedControl
from defenses.errors import describe_error
from defenses.matched_controls import build_matched_control

CONTROL_SCORE_COLUMNS = (
    "query",
    "pair",
    "category",
    "harmful",
    "attack",
    "defense",
    "control",
    "group",
    "draw",
    "margin",
    "coverage",
    "prompt_tokens",
    "verdict",
)


class MatchedControlScores(ConditionFrames):
    """Scores of the matched controls of a run; `defense` is the defense that the control belongs to."""

    columns = CONTROL_SCORE_COLUMNS

    def describe(self) -> dict[str, Any]:
        """Return the entry of run.json on controls."""
        table = self.table
        return {
            "draws": int(table["draw"].nunique()),
            "conditions": len(self.frames),
            "interrupted": self.interrupted,
            "wall_seconds": round(self.wall_seconds, 1),
            "failed": list_failures(self.failures),
        }


def score_controls(
    setup: RunSetup, condition_keys: Collection[ConditionKey], n_draws: int, spec: RunSpec, console: Console
) -> MatchedControlScores:
    """Score the control of every condition that has one, and judge its responses.

    A control that fails is left out. If the user interrupts, the finished controls are kept.

    Args:
        setup: loaded and prepared.
        condition_keys: attack and defense of the scored conditions.
        n_draws: number of draws of each control; fewer if a draw would lack queries of a class.
        spec: options of the run, among them the number of responses.
        console: shows progress.
    """
    result, started = MatchedControlScores(), time.perf_counter()
    queries = setup.query_set.queries
    n_smaller_class = min(sum(query.harmful == harmful for query in queries) for harmful in (True, False))
    n_draws = min(n_draws, n_smaller_class)
    names = list(dict.fromkeys(name for _, name in condition_keys))
    try:
        with console.status("preparing matched controls"):
            controls, failures = _build_controls(setup, names, n_draws)
    except KeyboardInterrupt:
        result.interrupted = True
        return result
    result.failures = {(attack, name): failures[name] for attack, name in condition_keys if name in failures}
    keys = [(attack, name) for attack, name in condition_keys if name in controls]
    if not keys:
        return result
    if n_draws < MIN_CONTROL_DRAWS:
        print_note(
            console,
            f"no matched controls: at least {MIN_CONTROL_DRAWS} queries of each class are needed; raise "
            "--limit",
        )
        return result
    attacks = {attack.name: attack for attack in setup.attacks}
    groups = deal_queries(queries, n_draws, spec.seed)
    answered: set[str] = set()
    if spec.max_responses != 0:
        answered = {query.id for query in sample_answered_queries(queries, spec.max_responses, spec.seed)}
    with make_progress_bar(console) as bar:
        task = bar.add_task("controls", total=len(keys) * len(queries))
        show_preliminary_work(bar, task, setup.session)
        for number, (attack, name) in enumerate(keys, 1):
            bar.update(task, description=f"control of {name} ({attack})")
            try:
                frames = []
                for group, (control, members) in enumerate(zip(controls[name], groups, strict=True)):
                    frame = _score_group(setup, attacks[attack], name, control, members, answered)
                    frames.append(frame.assign(group=group, draw=group if control.varies else 0))
                    bar.advance(task, len(members))
            except KeyboardInterrupt:
                result.interrupted = True
                break
            except Exception as error:
                result.failures[attack, name] = _describe_failure(setup, name, error)
            else:
                table = pd.concat(frames, ignore_index=True)
                result.frames[attack, name] = table[list(CONTROL_SCORE_COLUMNS)]
            bar.update(task, completed=number * len(queries))
    result.wall_seconds = time.perf_counter() - started
    print_cache_notes(setup.session, console)
    return result


def deal_queries(queries: Sequence[Query], n_groups: int, seed: int) -> list[list[Query]]:
    """Deal queries to groups so that each has its share of every kind and class; pairs stay together.

    Args:
        queries: all queries.
        n_groups: number of groups; at most the number of queries of the smaller class.
        seed: of the run.
    """
    units = group_units(queries)
    random.Random(f"{seed}/controls").shuffle(units)
    # Pairs first, because they are of both classes.
    units.sort(key=lambda unit: (-len(unit), [(query.harmful, query.kind) for query in unit]))
    groups: list[list[Query]] = [[] for _ in range(n_groups)]
    n_of_kinds = [Counter[str]() for _ in groups]
    n_of_class = [Counter[bool]() for _ in groups]
    for unit in units:
        kinds = "+".join(f"{query.harmful}/{query.kind}" for query in unit)
        chosen = min(
            range(n_groups),
            key=lambda group: (
                n_of_kinds[group][kinds],
                sum(n_of_class[group][query.harmful] for query in unit),
                group,
            ),
        )
        groups[chosen] += unit
        n_of_kinds[chosen][kinds] += 1
        n_of_class[chosen].update(query.harmful for query in unit)
    return groups


def _build_controls(
    setup: RunSetup, names: Sequence[str], n_draws: int
) -> tuple[dict[str, list[MatchedControl]], dict[str, str]]:
    """Return the draws of each condition that has a control, and why others failed."""
    controls: dict[str, list[MatchedControl]] = {}
    failures: dict[str, str] = {}
    for name in names:
        try:
            draws = []
            for draw in range(n_draws):
                control = build_matched_control(setup.conditions[name], setup.model_info, draw)
                if control is None:
                    break
                draws.append(control)
        except Exception as error:
            failures[name] = _describe_failure(setup, name, error)
        else:
            if draws:
                controls[name] = draws
    return controls, failures


def _describe_failure(setup: RunSetup, name: str, error: Exception) -> str:
    """Return why a control failed, without secrets."""
    return redact_secrets(describe_error(error), setup.conditions[name].secret_texts())


def _score_group(
    setup: RunSetup,
    attack: Attack,
    name: str,
    control: MatchedControl,
    queries: Sequence[Query],
    answered_ids: Collection[str],
) -> pd.DataFrame:
    """Return the scores of one group; responses are judged first, so that their first logits are scored."""
    answered = [query for query in queries if query.id in answered_ids]
    verdicts = (
        judge_condition(setup.session, attack, control.defense, answered, RESPONSE_JUDGE, setup.readout)
        if answered
        else []
    )
    verdict_by_id = dict(zip([query.id for query in answered], verdicts, strict=True))
    scores = score_condition(setup.session, name, control.defense, queries, setup.readout, attack)
    return scores.assign(control=control.content, verdict=scores["query"].map(verdict_by_id))
