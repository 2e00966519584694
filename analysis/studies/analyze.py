"""What `analyze` computes: every defense and the undefended model, scored and summed up, not printed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import pandas as pd
from rich.console import Console

from analysis.datasets.queries import sample_queries
from analysis.models.chat_template import redact_secrets
from analysis.run import build_conditions
from analysis.stats.effects import estimate_factorial_effects, list_factorial_conditions, summarize_scores
from analysis.stats.tables import ScoreTable
from analysis.studies.calibration import collect_trust
from analysis.studies.cost import measure_cost
from analysis.studies.manifest import describe_attacks, describe_run
from analysis.studies.run_spec import RunSpec
from analysis.studies.setup import RunSetup, exclude_failed_conditions, find_preflight_failures, prepare_setup
from analysis.studies.sweep import ConditionKey, StudyResult, list_failures, sweep_conditions
from defenses.contract import Defense
from defenses.errors import UserError


def analyze_defenses(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    console: Console,
    with_cost: bool = False,
) -> StudyResult:
    """Score every defense and the undefended model, and say what each does.

    Args:
        spec: what the user asked for.
        defenses: of the defenses, or defenses themselves.
        settings: of those that are named.
        console: for progress.
        with_cost: whether it is also measured what each defense costs.

    Raises:
        NotReached: if no defense reaches the model.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    ready = prepare_setup(spec, defenses, settings, console)
    bench = ready.session
    every = build_conditions(ready.defenses)
    cells = [(attack.name, name) for attack in spec.attacks for name in every]
    lost = exclude_failed_conditions(find_preflight_failures(ready, every, console), cells)
    bench.engine.work_counter.reset_counts()
    swept = sweep_conditions(ready, every, lost, console)
    frames, finished = swept.score_frames, swept.select_finished(every)
    if not frames or (swept.interrupted and len(frames) < 2):
        # An attack's undefended condition alone says nothing of a defense.
        if swept.interrupted:
            raise KeyboardInterrupt
        raise UserError(f"nothing could be scored: {next(iter(swept.failures.values()))}")
    timed = {name: one for name, one in finished.items() if (spec.attacks[0].name, name) in frames}
    spent = measure_cost(ready, timed, spec.seed, console) if with_cost else None
    record = {
        "created": started.isoformat(timespec="seconds"),
        "interrupted": swept.interrupted,
        "conditions_wanted": swept.n_conditions,
        "failed": list_failures(swept.failures),
        **describe_run(bench, ready.readout, finished, ready.query_set, ready.split, spec.limit),
        "notices": ready.notices,
        "wall_seconds": round(time.perf_counter() - clock, 1),
        "tokens": {
            "computed": bench.engine.work_counter.computed_tokens,
            "saved": bench.engine.work_counter.saved_tokens,
        },
        "scores_found_in_cache": bench.score_cache.n_hits if bench.score_cache is not None else 0,
    }
    record |= describe_attacks(spec.attacks)
    record["trusted"] = collect_trust(bench, spec.attacks, finished, ready.readout, frames)
    scores = ScoreTable(pd.concat(list(frames.values()), ignore_index=True), record)
    with console.status("intervals"):
        summary = summarize_scores(scores, seed=spec.seed)
        from analysis.plots.data import build_analysis_points

        drawn = build_analysis_points(scores.frame, summary.frame, scores.threshold)
        if spent is not None:
            gained = ["defense", "family", "refusal_rate", "over_refusal_rate"]
            gained += [f"delta_auroc{end}" for end in ("", "_low", "_high")]
            first = summary.frame["attack"] == spec.attacks[0].name
            drawn["cost"] = spent.merge(summary.frame.loc[first, gained], on="defense")
    tables = {
        **_factorial_tables(scores, spec.seed),
        "prompts": _example_prompts(ready, list(frames), finished),
        "scores": scores.frame,
        "summary": summary.frame,
    }
    return StudyResult.from_tables("analyze", record, tables, drawn, ready, swept.failures)


def _example_prompts(
    setup: RunSetup, condition_keys: Sequence[ConditionKey], conditions: Mapping[str, Defense]
) -> pd.DataFrame:
    """What the model reads of a harmful and of a benign query under each condition, secrets as a mark."""
    secrets = tuple(one for defense in conditions.values() for one in defense.secret_texts())
    asked = sample_queries(setup.query_set.queries, 2)
    rows = []
    for attack, name in condition_keys:
        (sent,) = [one for one in setup.attacks if one.name == attack]
        prompts = setup.session.with_attack(sent).render_queries(conditions[name], asked)
        rows += [
            {
                "attack": attack,
                "defense": name,
                "query": query.id,
                "readings": len(readings),
                "read": redact_secrets(readings[0].text, secrets),
            }
            for query, readings in zip(asked, prompts, strict=True)
        ]
    return pd.DataFrame(rows)


def _factorial_tables(scores: ScoreTable, seed: int) -> dict[str, pd.DataFrame]:
    """The effects of each 2 × 2 that was run whole."""
    there = set(scores.condition_keys)
    found = [
        estimate_factorial_effects(scores, attack, defense, seed)
        for attack, defense in scores.condition_keys
        if all((attack, cell) in there for cell in list_factorial_conditions(defense))
    ]
    return {"effects": pd.concat(found, ignore_index=True)} if found else {}
