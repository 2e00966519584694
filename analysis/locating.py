"""What `analyze mechanism` does: score, split, intervene, draw; its tables are told in docs/mechanism.md."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from rich.console import Console

from analysis import findings, manifest, saving, showing, validity
from analysis.decompose import summarize_scores
from analysis.found import StudyResult
from analysis.looking import MechanismStudy, MechanismOptions
from analysis.overlaps import join_stack_interactions
from analysis.preparing import RunSetup, prepare_setup, find_preflight_failures, describe_failed_checks
from analysis.queries import sample_queries
from analysis.request import RunSpec, choose_run_folder
from analysis.run import build_conditions
from analysis.sweeping import list_failures, print_run_location, sweep_conditions
from analysis.tables import UNDEFENDED, ScoreTable
from defenses import Defense, UserError


def run_mechanism_command(
    spec: RunSpec, defenses: Sequence[str], settings: Sequence[str], options: MechanismOptions, out: Path | None
) -> int:
    """Say in which layers, heads and MLPs defenses act; save tables and figures, print the main ones."""
    out = saving.check_output_folder(out or choose_run_folder(spec.model, ["mechanism", *defenses], datetime.now(UTC)))
    console = Console(stderr=True)
    found = study_mechanism(spec, defenses, settings, options, console)
    saving.save_run(out, found.run, console)
    findings.print_mechanism(found.run.tables, found.run.record, options.n_top)
    showing.print_trust_warnings(found.run.tables["summary"], console)
    print_run_location(out, found.failures, console)
    return 1 if found.failures else 0


def study_mechanism(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    options: MechanismOptions,
    console: Console,
) -> StudyResult:
    """Find out in which layers, heads and MLPs defenses act.

    Args:
        spec: what the user asked for.
        defenses: of the defenses, or defenses themselves.
        settings: of those that are named.
        options: what is looked at.
        console: for progress.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    stacks = None if options.ensembles_folder is None else findings.load_stack_interactions(options.ensembles_folder)
    ready = prepare_setup(spec, defenses, settings, console)
    _check_linear_readout(ready)
    if options.ensembles_folder is not None:
        findings.check_same_model(options.ensembles_folder, ready)
    every = build_conditions(ready.defenses)
    if set(every) == {UNDEFENDED}:
        raise UserError("which defense? `none` is what others are compared with; see `analyze list defenses`")
    from analysis.mechanism.lens import locate_components
    from analysis.mechanism.splitting import DirectLogitAttribution

    with console.status("finding the model's parts"):
        parts = locate_components(ready.session.loaded_model.model)
        # What cannot be split is told before anything is scored.
        few = sample_queries(ready.query_set.queries, 2)
        DirectLogitAttribution(parts, ready.readout).attribute_margins(ready.session.with_attack(spec.attacks[0]), every[UNDEFENDED], few)
    lost = describe_failed_checks(find_preflight_failures(ready, every, console))
    swept = sweep_conditions(ready, every, lost, console)
    if swept.interrupted:
        raise KeyboardInterrupt
    if not any(name != UNDEFENDED for _, name in swept.score_frames):
        raise UserError(f"nothing could be scored: {next(iter(swept.failures.values()))}")
    record = {
        "created": started.isoformat(timespec="seconds"),
        **manifest.describe_run(
            ready.session, ready.readout, swept.select_finished(every), ready.query_set, ready.split, spec.limit
        ),
        **manifest.describe_attacks(spec.attacks),
        "notices": ready.notices,
        "trusted": validity.collect_trust(ready.session, spec.attacks, every, ready.readout, swept.score_frames),
    }
    scores = ScoreTable(pd.concat(list(swept.score_frames.values()), ignore_index=True), record)
    room = MechanismStudy(
        setup=ready,
        components=parts,
        conditions=every,
        scores=scores,
        options=options,
        seed=spec.seed,
        console=console,
        failures=dict(swept.failures),
    )
    for attack in spec.attacks:
        room.study_attack(attack)
    tables = room.tables | {"scores": scores.frame, "summary": summarize_scores(scores, seed=spec.seed).frame}
    if not any(name in tables for name in ("layers", "directions")):
        raise UserError(f"nothing could be split: {next(iter(room.failures.values()))}")
    if stacks is not None and len(tables.get("profiles", ())):
        tables["overlap"] = join_stack_interactions(tables["profiles"], stacks)
    record |= {
        "failed": list_failures(room.failures),
        "notices": [*ready.notices, *room.notices],
        "mechanism": {
            "sites": options.sites,
            "top": options.n_top,
            "patched": [query.id for query in room.intervention_queries],
            "neutral_prompts": room.neutral_prompts,
            "directions_learned_from": "contrast, train split, undefended and as they are",
            "slopes_against_patches": room.slope_agreement,
            "ensembles": None if options.ensembles_folder is None else options.ensembles_folder.name,
        },
        "wall_seconds": round(time.perf_counter() - clock, 1),
    }
    from analysis import points

    drawn = points.build_mechanism_points(tables, options.n_top)
    return StudyResult.from_tables("mechanism", record, tables, drawn, ready, room.failures)


def _check_linear_readout(setup: RunSetup) -> None:
    """Raise where margins do not split."""
    if setup.readout.is_log_odds:
        raise UserError(
            f"--readout {setup.readout.name} is not linear in the logits, so its margin does not split over "
            "parts: take words, calibrated, question or prefilled-K"
        )
