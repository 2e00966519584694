"""What `analyze validate` does: readouts against what the model goes on to say, and what that is worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis import manifest, queries, saving, showing, tallies, validity
from analysis.agreement import TRUST_RULE, correlate_refusal_rates, compute_calibration_curve
from analysis.folder import Run
from analysis.hearing import ConditionResponses, compute_validity_rows, build_calibration_curves, collect_responses, build_verdict_table, rate_response_quality
from analysis.judge import RULE_JUDGES, make_verdict_masks
from analysis.judging import JudgeOptions
from analysis.model_judge import ModelJudge
from analysis.preparing import NO_REFERENCE, PreflightError, RunSetup, exclude_failed_conditions, prepare_setup, find_preflight_failures
from analysis.rendering import redact_secrets
from analysis.request import RunSpec, choose_run_folder, make_notifier
from analysis.run import build_conditions
from analysis.sweeping import list_failures, print_failures
from analysis.tables import UNDEFENDED
from defenses.errors import UserError, describe_error


def validate_readouts(
    spec: RunSpec, defenses: Sequence[str], settings: Sequence[str], out: Path | None, judge_options: JudgeOptions, max_new_tokens: int
) -> int:
    """Score every condition, let it answer, and say which margins may be believed; no answer is kept."""
    started, clock = datetime.now(UTC), time.perf_counter()
    if max_new_tokens < 1:
        raise UserError(f"--tokens {max_new_tokens}: an answer that is judged has at least 1")
    out = saving.check_output_folder(out or choose_run_folder(spec.model, ["validate", *defenses], started))
    console = Console(stderr=True)
    judge = judge_options.load_judge(spec.offline, make_notifier(console))
    ready = prepare_setup(spec, defenses, settings, console)
    every = build_conditions(ready.defenses)
    cells = [(attack.name, name) for attack in spec.attacks for name in every]
    try:
        lost = exclude_failed_conditions(find_preflight_failures(ready, every, console), cells)
    except PreflightError as error:
        showing.print_failed_checks(error.checks)
        return 1
    left = [(attack, name) for attack in spec.attacks for name in every if (attack.name, name) not in lost]
    begun = len({one.prefill for one in ready.readouts})
    asked = ready.query_set.queries
    few = queries.sample_queries(asked, 4)
    read = [one for sent, name in left for one in ready.session.with_attack(sent).render_queries(every[name], few)]
    prompts = -(-len(asked) * sum(map(len, read)) // len(few))
    judge_options.check_budget(prompts * begun)
    judges = {**RULE_JUDGES, judge_options.name: judge}
    grader = judge if isinstance(judge, ModelJudge) and judge_options.grade else None
    heard: list[ConditionResponses] = []
    usual: dict[str, ConditionResponses] = {}
    rows, worth = [], []
    stopped: KeyboardInterrupt | UserError | None = None
    with showing.make_progress_bar(console) as bar:
        scored = len(left) * len(asked) * len(ready.readouts)
        task = bar.add_task("asking", total=scored + prompts * begun)

        def done(count: int) -> None:
            bar.advance(task, count)

        ready.session.defense_calls.on_progress = showing.make_defense_call_callback(bar, task)
        try:
            for attack, name in left:
                if (attack.name, name) in lost:
                    continue
                bench, defense, undefended = ready.session.with_attack(attack), every[name], every[UNDEFENDED]
                bar.update(task, description=f"asking {name} ({attack.name})")
                try:
                    one = collect_responses(bench, name, defense, asked, ready.readouts, judges, max_new_tokens, done)
                    base = usual.setdefault(attack.name, one)
                    here = compute_validity_rows(one, ready.readouts, judge_options.name, spec.seed)
                    value = rate_response_quality(
                        one, base, bench, undefended, asked, judge_options.name, grader, max_new_tokens, spec.seed
                    )
                except Exception as error:
                    lost[attack.name, name] = redact_secrets(describe_error(error), defense.secret_texts())
                    if name == UNDEFENDED:
                        for other in every:
                            lost.setdefault((attack.name, other), NO_REFERENCE)
                    continue
                worth.append(value)
                for readout, row in zip(ready.readouts, here, strict=True):
                    if row["n"]:
                        validity.save_validity(bench, defense, readout, judge.name, max_new_tokens, row)
                heard.append(one)
                rows += here
                if isinstance(judge, ModelJudge) and (why := judge.failure_reason):
                    if why == "interrupted":
                        raise KeyboardInterrupt
                    raise UserError(f"the judge gives no more verdicts: {why}")
        except (KeyboardInterrupt, UserError) as error:
            if not heard:
                raise
            stopped = error
    if not heard:
        raise UserError(f"nothing could be scored: {next(iter(lost.values()))}")
    reached = {name: one for name, one in every.items() if any((at, name) not in lost for at, _ in cells)}
    record = {
        "created": started.isoformat(timespec="seconds"),
        "interrupted": stopped is not None,
        "conditions_wanted": len(cells),
        "failed": list_failures(lost),
        **manifest.describe_run(ready.session, ready.readouts[0], reached, ready.query_set, ready.split, spec.limit),
        "readouts": [manifest.describe_readout(one) for one in ready.readouts],
        **manifest.describe_attacks(spec.attacks),
        "judge": {**judge.manifest_entry, "new_tokens": max_new_tokens},
        "rule": TRUST_RULE,
        "notices": ready.notices,
    }
    found = pd.DataFrame(rows)
    record["ranks"] = _rank_conditions(heard, ready, judge_options.name, spec.seed)
    tables = {
        "validity": found,
        "worth": pd.DataFrame(worth),
        "curves": pd.concat([build_calibration_curves(one, ready.readouts, judge_options.name) for one in heard], ignore_index=True),
        "answers": pd.concat([build_verdict_table(one, ready.readouts) for one in heard], ignore_index=True),
    }
    points = _validity_figure_tables(found, heard, ready, judge_options.name)
    record["wall_seconds"] = round(time.perf_counter() - clock, 1)
    saving.save_run(out, Run("validate", record, {**tables, **points}, figures=tuple(points)), console)
    tallies.print_validity(found, record)
    tallies.print_response_quality(tables["worth"], judge_options.name, max_new_tokens)
    tell = make_notifier(console)
    unjudged = print_unjudged(heard, judge_options.name, tell)
    tell(f"Tables, figures and run.json are in {out}; the answers themselves are not kept")
    print_failures(lost, console)
    if stopped is not None:
        tell(f"Interrupted: {len(heard)} of {record['conditions_wanted']} conditions were finished and kept.")
        if isinstance(stopped, UserError):
            raise stopped
        return 130
    return 1 if unjudged or lost else 0


def _rank_conditions(all_responses: Sequence[ConditionResponses], setup: RunSetup, judge_name: str, seed: int) -> list[dict[str, Any]]:
    """How the conditions rank by refusals, each readout against the text, for each attack."""
    found = []
    for attack in dict.fromkeys(one.attack for one in all_responses):
        here = [one for one in all_responses if one.attack == attack]
        for readout in setup.readouts:
            said = [one.verdicts[readout.prefill][judge_name] for one in here]
            known = np.array([[verdict.is_judged for verdict in one] for one in said]).all(0)
            if len(here) < 3 or not known.any():
                continue
            refused = np.array([[verdict.is_refusal for verdict in one] for one in said])[:, known]
            margins = np.stack([one.score_frames[readout.name]["margin"].to_numpy(float) for one in here])[:, known]
            first = here[0].score_frames[readout.name][known]
            is_harmful = first["harmful"].to_numpy(bool)
            says = margins > readout.threshold
            head = {"attack": attack, "readout": readout.name, "conditions": len(here)}
            found.append(head | correlate_refusal_rates(says, refused, first["pair"], is_harmful, seed))
    return found


def _validity_figure_tables(validity_table: pd.DataFrame, all_responses: Sequence[ConditionResponses], setup: RunSetup, judge_name: str) -> dict[str, pd.DataFrame]:
    """What the figures of each readout are drawn from."""
    drawn: dict[str, pd.DataFrame] = {}
    for readout in setup.readouts:
        said = [verdict for one in all_responses for verdict in one.verdicts[readout.prefill][judge_name]]
        known, refused = make_verdict_masks(said)
        chance = np.concatenate([one.score_frames[readout.name]["p_refuse"].to_numpy(float) for one in all_responses])
        if not known.any():
            continue
        suffix = f"-{readout.name}" if len(setup.readouts) > 1 else ""
        drawn[f"calibration{suffix}"] = compute_calibration_curve(chance[known], refused)
        drawn[f"rates{suffix}"] = validity_table[(validity_table["readout"] == readout.name) & (validity_table["n"] > 0)]
    return drawn


def print_unjudged(all_responses: Sequence[ConditionResponses], judge_name: str, notify: Any) -> bool:
    """Say how many answers have no verdict, and why; return whether any."""
    why = [
        verdict.evidence
        for one in all_responses
        for said in one.verdicts.values()
        for verdict in said[judge_name]
        if not verdict.is_judged
    ]
    if why:
        common = max(set(why), key=why.count)
        notify(f"{len(why)} answers have no verdict and count nowhere; mostly: {common}")
    return bool(why)
