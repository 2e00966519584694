"""What every command does before it asks: queries, model, defenses, readout; and the preflight."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from analysis.attacks import Attack
from analysis.datasets.queries import QuerySet, sample_queries
from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from analysis.run import build_conditions
from analysis.stats.tables import UNDEFENDED
from analysis.studies.calibration import CANDIDATE_READOUTS, ReadoutCalibration
from analysis.studies.preflight import PreflightCheck, check_condition, make_failed_check
from analysis.studies.progress import make_defense_call_callback, make_notifier, make_progress_bar, print_note
from analysis.studies.run_spec import RunSpec, check_training_overlap
from defenses.catalog import choose_defenses
from defenses.contract import Defense
from defenses.errors import UserError

_N_PREFLIGHT_QUERIES = 4  # queries that the preflight looks at
NO_REFERENCE = "the undefended model was not scored"  # so that the others cannot be compared with it


class PreflightError(UserError):
    """No defense reaches the model, so that there is nothing to score.

    Attributes:
        checks: that failed.
    """

    def __init__(self, checks: Sequence[PreflightCheck]) -> None:
        self.checks = checks
        first = checks[0]
        super().__init__(f"nothing was scored: {first.condition}: {first.name}: {first.observed}")


@dataclass(frozen=True)
class RunSetup:
    """Everything loaded and prepared for a run."""

    session: ModelSession
    defenses: list[Defense]
    query_set: QuerySet
    split: str
    readouts: list[Readout]
    attacks: tuple[Attack, ...]
    notices: list[str]

    @property
    def readout(self) -> Readout:
        """The readout, where there is one."""
        (only,) = self.readouts
        return only


def prepare_setup(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    console: Console,
    with_threshold: bool = True,
) -> RunSetup:
    """Load what is cheap to get wrong first, then the model, then make the defenses ready for it.

    Args:
        spec: what the user asked for.
        defenses: of the defenses, or defenses themselves.
        settings: of those that are named.
        console: for progress.
        with_threshold: whether readouts need their threshold, for which the model must answer.
    """
    chosen = choose_defenses(defenses, settings)
    data, split, calibration = spec.select_queries(make_notifier(console))
    for attack in spec.attacks:
        attack.check_covers_queries(data.queries)
    bench, host = spec.open_session(console)
    prepared = [defense.prepare(host) for defense in chosen]
    lacking = _missing_requirement_notices(prepared, defenses)
    check_training_overlap(data, bench.loaded_model.trained_on, spec.model)
    every = build_conditions(prepared)
    for name, defense in every.items():
        check_training_overlap(data, defense.trained_on(), name)
    maker = ReadoutCalibration(bench, host, every[UNDEFENDED], calibration, console)
    readouts: dict[str, Readout] = {}
    for name in CANDIDATE_READOUTS if spec.readouts == ("all",) else spec.readouts:
        if not with_threshold:
            readout = maker.build_readout(name)
        else:
            readout = (
                maker.select_best_readout(every, spec.attacks)
                if name == "auto"
                else maker.calibrate_readout(name)
            )
        readouts[readout.name] = readout
    notices = [*bench.chat_template.notices, *lacking, *_calibration_overlap_notices(data, calibration)]
    for name, readout in readouts.items():
        notices += [f"readout {name}: {one}" for one in readout.notices]
    for notice in notices:
        print_note(console, notice)
    return RunSetup(bench, prepared, data, split, list(readouts.values()), spec.attacks, notices)


def find_preflight_failures(
    setup: RunSetup, conditions: Mapping[str, Defense], console: Console
) -> dict[tuple[str, str], list[PreflightCheck]]:
    """Return the failed checks, by attack and condition: whether defenses reach the model, on a few queries.

    What is read is looked at everywhere. Margins are compared with plain passes for each defense under the
    first attack and for each attack undefended: how they are computed does not depend on what is read.

    Args:
        setup: loaded and prepared.
        conditions: the conditions.
        console: for progress.
    """
    found = {}
    looked_at = sample_queries(setup.query_set.queries, _N_PREFLIGHT_QUERIES)
    with make_progress_bar(console) as bar:
        task = bar.add_task(
            "checking that defenses reach the model", total=len(conditions) * len(setup.attacks)
        )

        setup.session.defense_calls.on_progress = make_defense_call_callback(bar, task)
        for attack in setup.attacks:
            bench = setup.session.with_attack(attack)
            for name, defense in conditions.items():
                margins = attack is setup.attacks[0] or name == UNDEFENDED
                try:
                    if defense.calls_model:
                        # All at once: a few by themselves take nearly as long, and scoring needs all.
                        bench.render_queries(defense, setup.query_set.queries)
                    checks = [
                        one
                        for readout in setup.readouts
                        for one in check_condition(bench, name, defense, looked_at, readout, margins)
                    ]
                except Exception as error:
                    if len(conditions) * len(setup.attacks) <= 2:
                        raise
                    checks = [make_failed_check(bench, name, defense, error)]
                if failed := [one for one in checks if not one.passed]:
                    found[attack.name, name] = failed
                bar.update(task, advance=1, description="checking that defenses reach the model")
    return found


def exclude_failed_conditions(
    failed: Mapping[tuple[str, str], list[PreflightCheck]], cells: Collection[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """Return in words why conditions are left out: failed checks of their own, or of the undefended model.

    Args:
        failed: what `unreached` returned.
        cells: attack and condition of all that is wanted.

    Raises:
        NotReached: if nothing is left to compare, or nothing to compare it with.
    """
    lost = describe_failed_checks(failed)
    for attack, name in cells:
        if (attack, UNDEFENDED) in failed:
            lost.setdefault((attack, name), NO_REFERENCE)
    if lost and not any(cell not in lost and cell[1] != UNDEFENDED for cell in cells):
        raise PreflightError([one for checks in failed.values() for one in checks])
    return lost


def describe_failed_checks(
    failed_checks: Mapping[tuple[str, str], list[PreflightCheck]],
) -> dict[tuple[str, str], str]:
    """Return in words why conditions cannot be scored, from their failed checks."""
    return {
        cell: "; ".join(f"{one.name}: {one.observed}" for one in checks)
        for cell, checks in failed_checks.items()
    }


def _calibration_overlap_notices(query_set: QuerySet, calibration: QuerySet) -> list[str]:
    """Say if queries are scored that the readout is made from: its threshold is fitted to them."""
    same = len({query.text for query in query_set.queries} & {query.text for query in calibration.queries})
    return (
        [f"the readout is made from {same} of the {len(query_set.queries)} queries that are scored"]
        if same
        else []
    )


def _missing_requirement_notices(
    prepared: Sequence[Defense], requested: Sequence[str | Defense]
) -> list[str]:
    """Say what is left out because this model lacks something for it; an error where nothing is left."""
    notices = []
    for defense in prepared:
        if why := defense.missing_requirements():
            parts = list(build_conditions([defense]))
            if not parts and "all" not in requested:
                raise UserError(f"{defense.name}: {why}")
            instead = f"only {', '.join(parts)} can be read" if parts else "it is left out"
            notices.append(f"{defense.name}: {instead}: {why}")
    return notices
