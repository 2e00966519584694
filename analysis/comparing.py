"""What `analyze ensembles` does: predict, observe, compare, draw; the tables are shared with `recommend`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis import additivity, saving, showing, standings
from analysis.additivity import EnsembleDraws
from analysis.combining import EnsembleRun, score_ensembles, rank_promising_stacks
from analysis.decompose import summarize_scores
from analysis.ensembles import ALONE, SELECTION_SPLIT, REPORT_SPLIT, STACK
from analysis.found import StudyResult
from analysis.request import RunSpec, choose_run_folder
from analysis.sweeping import list_failures, print_run_location
from defenses import Defense

_MAX_ROWS_WITH_INTERVALS = 1000  # rows up to which all have intervals; of more, single defenses, stacks and the front


def run_ensembles_command(
    spec: RunSpec,
    defenses: Sequence[str],
    settings: Sequence[str],
    max_size: int,
    n_stacks: int,
    out: Path | None,
) -> int:
    """Predict and observe what defenses come to together; save tables and figures, print the front."""
    out = saving.check_output_folder(out or choose_run_folder(spec.model, ["ensembles", *defenses], datetime.now(UTC)))
    console = Console(stderr=True)
    found = evaluate_ensembles(spec, defenses, settings, max_size, n_stacks, console)
    saving.save_run(out, found.run, console)
    tables = found.run.tables
    standings.print_front(tables["candidates"], found.run.record)
    standings.print_prediction_fit(tables["additivity"])
    standings.print_raised_distances(tables["distance"])
    print_run_location(out, found.failures, console)
    return 1 if found.failures else 0


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
    wanted = dict(zip(map(int, seen.index), showing.iterate_rows(seen), strict=True))
    clouds: dict[int, EnsembleDraws] = {}
    ends: dict[int, dict[str, float]] = {}
    with showing.make_progress_bar(console) as bar:
        task = bar.add_task("intervals", total=len(wanted))
        for index, row in wanted.items():
            half = ensemble_run.split_scores[row["attack"], REPORT_SPLIT]
            if row["how"] != ALONE:
                team = row["members"].split("+")
                clouds[index] = additivity.draw_ensemble(half, team, row["how"], ensemble_run.calibration_scores)
            ends[index] = additivity.estimate_ensemble_intervals(half, row, ensemble_run.calibration_scores, clouds.get(index))
            bar.advance(task)
    with console.status("comparing"):
        shifting = dict(zip(ensemble_run.mechanisms["defense"], ensemble_run.mechanisms["p_shift"], strict=True))
        raised = [
            additivity.find_raised_distances(
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
            "scores": pd.concat([table.frame.assign(split=name) for name, table in ensemble_run.scores.items()]),
            "summary": summarize_scores(ensemble_run.scores[REPORT_SPLIT], seed=spec.seed).frame,
            "mechanisms": ensemble_run.mechanisms,
            "ensembles": whole,
            "additivity": additivity.summarize_prediction_fit(whole, clouds),
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


def build_ensemble_result(name: str, ensemble_run: EnsembleRun, tables: dict[str, pd.DataFrame], record: dict[str, Any]) -> StudyResult:
    """Return all of it, what figures are drawn from among it.

    Args:
        name: what was done.
        ensemble_run: what came of it.
        tables: by file stem.
        record: for run.json.
    """
    from analysis import points

    families = {name: one.family for name, one in ensemble_run.conditions.items()}
    drawn = points.build_ensemble_points(tables["ensembles"], tables["candidates"], families)
    return StudyResult.from_tables(name, record, tables, drawn, ensemble_run.setup, ensemble_run.failures)
