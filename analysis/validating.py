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
from analysis.preparing import Ready, prepare, unreached
from analysis.request import Request, default_out, teller
from analysis.run import conditions
from analysis.tables import UNDEFENDED
from defenses.errors import UserError


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
    begun = len({one.begins for one in ready.readouts})
    few = queries.sample(ready.data.queries, 4)
    read = [one for defense in every.values() for one in ready.bench.every_prompt(defense, few)]
    prompts = -(-len(ready.data.queries) * sum(map(len, read)) // len(few))
    jury.refuse_small_budget(len(request.attacks) * prompts * begun)
    if failed := unreached(ready, every, console):
        showing.failures([one for checks in failed.values() for one in checks])
        return 1
    judges = {**READERS, jury.name: judge}
    grader = judge if isinstance(judge, ModelJudge) and jury.grade else None
    heard: list[Heard] = []
    rows, worth = [], []
    stopped: KeyboardInterrupt | UserError | None = None
    with showing.progress(console) as bar:
        scored = len(every) * len(ready.data.queries) * len(ready.readouts)
        task = bar.add_task("asking", total=len(request.attacks) * (scored + prompts * begun))

        def done(count: int) -> None:
            bar.advance(task, count)

        ready.bench.drafts.watch = showing.drafting(bar, task)
        try:
            for attack in request.attacks:
                bench, usual = ready.bench.under(attack), None
                for name, defense in every.items():
                    bar.update(task, description=f"asking {name} ({attack.name})")
                    asked = ready.data.queries
                    one = hear(bench, name, defense, asked, ready.readouts, judges, tokens, done)
                    usual = usual or one
                    here = agreements(one, ready.readouts, jury.name, request.seed)
                    undefended = every[UNDEFENDED]
                    worth.append(
                        worths(one, usual, bench, undefended, asked, jury.name, grader, tokens, request.seed)
                    )
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
    record = {
        "created": started.isoformat(timespec="seconds"),
        "interrupted": stopped is not None,
        "conditions_wanted": len(request.attacks) * len(every),
        **manifest.of(ready.bench, ready.readouts[0], every, ready.data, ready.split, request.limit),
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
    if stopped is not None:
        tell(f"Interrupted: {len(heard)} of {record['conditions_wanted']} conditions were finished and kept.")
        if isinstance(stopped, UserError):
            raise stopped
        return 130
    return 1 if unjudged else 0


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
