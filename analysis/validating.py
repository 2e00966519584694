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
from analysis.agreement import RULE, ranks, reliability
from analysis.folder import Run
from analysis.hearing import Heard, agreements, curves, hear, table, worths
from analysis.judge import READERS, judged_and_refused
from analysis.judging import Jury
from analysis.model_judge import ModelJudge
from analysis.preparing import NO_REFERENCE, NotReached, Ready, left_out, prepare, unreached
from analysis.rendering import redact
from analysis.request import Request, default_out, teller
from analysis.run import conditions
from analysis.sweeping import failed_cells, say_failed
from analysis.tables import UNDEFENDED
from defenses.errors import UserError, told


def validate(
    request: Request, names: Sequence[str], settings: Sequence[str], out: Path | None, jury: Jury, tokens: int
) -> int:
    """Score every condition, let it answer, and say which margins may be believed; no answer is kept."""
    started, clock = datetime.now(UTC), time.perf_counter()
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: an answer that is judged has at least 1")
    out = saving.usable(out or default_out(request.model, ["validate", *names], started))
    console = Console(stderr=True)
    judge = jury.judge(request.offline, teller(console))
    ready = prepare(request, names, settings, console)
    every = conditions(ready.defenses)
    cells = [(attack.name, name) for attack in request.attacks for name in every]
    try:
        lost = left_out(unreached(ready, every, console), cells)
    except NotReached as error:
        showing.failures(error.checks)
        return 1
    left = [(attack, name) for attack in request.attacks for name in every if (attack.name, name) not in lost]
    begun = len({one.begins for one in ready.readouts})
    asked = ready.data.queries
    few = queries.sample(asked, 4)
    read = [one for sent, name in left for one in ready.bench.under(sent).every_prompt(every[name], few)]
    prompts = -(-len(asked) * sum(map(len, read)) // len(few))
    jury.refuse_small_budget(prompts * begun)
    judges = {**READERS, jury.name: judge}
    grader = judge if isinstance(judge, ModelJudge) and jury.grade else None
    heard: list[Heard] = []
    usual: dict[str, Heard] = {}
    rows, worth = [], []
    stopped: KeyboardInterrupt | UserError | None = None
    with showing.progress(console) as bar:
        scored = len(left) * len(asked) * len(ready.readouts)
        task = bar.add_task("asking", total=scored + prompts * begun)

        def done(count: int) -> None:
            bar.advance(task, count)

        ready.bench.drafts.watch = showing.drafting(bar, task)
        try:
            for attack, name in left:
                if (attack.name, name) in lost:
                    continue
                bench, defense, undefended = ready.bench.under(attack), every[name], every[UNDEFENDED]
                bar.update(task, description=f"asking {name} ({attack.name})")
                try:
                    one = hear(bench, name, defense, asked, ready.readouts, judges, tokens, done)
                    base = usual.setdefault(attack.name, one)
                    here = agreements(one, ready.readouts, jury.name, request.seed)
                    value = worths(
                        one, base, bench, undefended, asked, jury.name, grader, tokens, request.seed
                    )
                except Exception as error:
                    lost[attack.name, name] = redact(told(error), defense.secrets())
                    if name == UNDEFENDED:
                        for other in every:
                            lost.setdefault((attack.name, other), NO_REFERENCE)
                    continue
                worth.append(value)
                for readout, row in zip(ready.readouts, here, strict=True):
                    if row["n"]:
                        validity.keep(bench, defense, readout, judge.name, tokens, row)
                heard.append(one)
                rows += here
                if isinstance(judge, ModelJudge) and (why := judge.down):
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
        "failed": failed_cells(lost),
        **manifest.of(ready.bench, ready.readouts[0], reached, ready.data, ready.split, request.limit),
        "readouts": [manifest.of_readout(one) for one in ready.readouts],
        **manifest.of_attacks(request.attacks),
        "judge": {**judge.about, "new_tokens": tokens},
        "rule": RULE,
        "notices": ready.notices,
    }
    found = pd.DataFrame(rows)
    record["ranks"] = _ranks(heard, ready, jury.name, request.seed)
    tables = {
        "validity": found,
        "worth": pd.DataFrame(worth),
        "curves": pd.concat([curves(one, ready.readouts, jury.name) for one in heard], ignore_index=True),
        "answers": pd.concat([table(one, ready.readouts) for one in heard], ignore_index=True),
    }
    points = _points(found, heard, ready, jury.name)
    record["wall_seconds"] = round(time.perf_counter() - clock, 1)
    saving.save(out, Run("validate", record, {**tables, **points}, figures=tuple(points)), console)
    tallies.validity(found, record)
    tallies.worth(tables["worth"], jury.name, tokens)
    tell = teller(console)
    unjudged = _say_unjudged(heard, jury.name, tell)
    tell(f"Tables, figures and run.json are in {out}; the answers themselves are not kept")
    say_failed(lost, console)
    if stopped is not None:
        tell(f"Interrupted: {len(heard)} of {record['conditions_wanted']} conditions were finished and kept.")
        if isinstance(stopped, UserError):
            raise stopped
        return 130
    return 1 if unjudged or lost else 0


def _ranks(heard: Sequence[Heard], ready: Ready, judge: str, seed: int) -> list[dict[str, Any]]:
    """How the conditions rank by refusals, each readout against the text, for each attack."""
    found = []
    for attack in dict.fromkeys(one.attack for one in heard):
        here = [one for one in heard if one.attack == attack]
        for readout in ready.readouts:
            said = [one.verdicts[readout.begins][judge] for one in here]
            known = np.array([[verdict.judged for verdict in one] for one in said]).all(0)
            if len(here) < 3 or not known.any():
                continue
            refused = np.array([[verdict.refused for verdict in one] for one in said])[:, known]
            margins = np.stack([one.frames[readout.name]["margin"].to_numpy(float) for one in here])[:, known]
            first = here[0].frames[readout.name][known]
            is_harmful = first["harmful"].to_numpy(bool)
            says = margins > readout.threshold
            head = {"attack": attack, "readout": readout.name, "conditions": len(here)}
            found.append(head | ranks(says, refused, first["pair"], is_harmful, seed))
    return found


def _points(found: pd.DataFrame, heard: Sequence[Heard], ready: Ready, judge: str) -> dict[str, pd.DataFrame]:
    """What the figures of each readout are drawn from."""
    drawn: dict[str, pd.DataFrame] = {}
    for readout in ready.readouts:
        said = [verdict for one in heard for verdict in one.verdicts[readout.begins][judge]]
        known, refused = judged_and_refused(said)
        chance = np.concatenate([one.frames[readout.name]["p_refuse"].to_numpy(float) for one in heard])
        if not known.any():
            continue
        suffix = f"-{readout.name}" if len(ready.readouts) > 1 else ""
        drawn[f"calibration{suffix}"] = reliability(chance[known], refused)
        drawn[f"rates{suffix}"] = found[(found["readout"] == readout.name) & (found["n"] > 0)]
    return drawn


def _say_unjudged(heard: Sequence[Heard], judge: str, tell: Any) -> bool:
    """Say how many answers have no verdict, and why; return whether any."""
    why = [
        verdict.evidence
        for one in heard
        for said in one.verdicts.values()
        for verdict in said[judge]
        if not verdict.judged
    ]
    if why:
        common = max(set(why), key=why.count)
        tell(f"{len(why)} answers have no verdict and count nowhere; mostly: {common}")
    return bool(why)
