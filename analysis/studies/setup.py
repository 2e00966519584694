"""Set-up of a run: load queries, model, defenses and readouts, and run the preflight."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console

from analysis.attacks import Attack
from analysis.datasets.queries import QuerySet, sample_queries
from analysis.models.session import ModelSession
from analysis.progress import make_defense_call_callback, make_notifier, make_progress_bar, print_note
from analysis.readouts.readout import Readout
from analysis.run import build_conditions
from analysis.stats.tables import UNDEFENDED
from analysis.studies.calibration import CANDIDATE_READOUTS, ReadoutCalibration
from analysis.studies.preflight import PreflightCheck, check_condition, make_failed_check
from analysis.studies.run_spec import RunSpec, check_training_overlap
from defenses.catalog import choose_defenses
from defenses.contract import Defense, ModelInfo
from defenses.errors import UserError
from defenses.stack import list_members
from defenses.tuning import AdapterWeights

_N_PREFLIGHT_QUERIES = 4
# Without its margins, the shift and discrimination of the other conditions are undefined.
NO_REFERENCE = "the undefended model was not scored"


class PreflightError(UserError):
    """No defense reaches the model, so nothing can be scored.

    Attributes:
        checks: the failed checks.
    """

    def __init__(self, checks: Sequence[PreflightCheck]) -> None:
        self.checks = checks
        first = checks[0]
        super().__init__(f"nothing was scored: {first.condition}: {first.name}: {first.observed}")


@dataclass(frozen=True)
class RunSetup:
    """Everything loaded and prepared for a run.

    Attributes:
        session: the model.
        model_info: what defenses may know about the model.
        defenses: the chosen defenses, prepared for the model; the undefended model first.
        query_set: the queries to score.
        split: name of their split.
        readouts: the readouts with their thresholds.
        attacks: attacks under which every condition is scored.
        notices: notes for the user, which run.json keeps.
        requested_defenses: the defenses as the user asked for them, names or objects.
        requested_settings: the settings as the user gave them, `key=value`.
    """

    session: ModelSession
    model_info: ModelInfo
    defenses: list[Defense]
    query_set: QuerySet
    split: str
    readouts: list[Readout]
    attacks: tuple[Attack, ...]
    notices: list[str]
    requested_defenses: tuple[str | Defense, ...] = ()
    requested_settings: tuple[str, ...] = ()

    @property
    def readout(self) -> Readout:
        """The readout of a run that uses exactly one."""
        (only,) = self.readouts
        return only

    @cached_property
    def conditions(self) -> dict[str, Defense]:
        """Condition name → defense: the defenses and their ablations."""
        return build_conditions(self.defenses)


def prepare_setup(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    console: Console,
    with_threshold: bool = True,
) -> RunSetup:
    """Check cheap inputs first, then load the model, then prepare the defenses and the readouts.

    Args:
        spec: options of the run.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        console: shows progress.
        with_threshold: whether readouts need their threshold, for which the model must generate responses.
    """
    chosen = choose_defenses(defenses, settings)
    query_set, split, calibration = spec.select_queries(make_notifier(console))
    for attack in spec.attacks:
        attack.check_covers_queries(query_set.queries)
    session, model_info = spec.open_session(console)
    prepared = [defense.prepare(model_info) for defense in chosen]
    for defense in prepared:
        if any(isinstance(member, AdapterWeights) for member in list_members(defense)):
            with defense.apply_to(session.loaded_model.model):
                pass  # an adapter of another model fails here, before responses are generated
    omissions = _missing_requirement_notices(prepared, defenses)
    check_training_overlap(query_set, session.loaded_model.trained_on, spec.model)
    conditions = build_conditions(prepared)
    for name, defense in conditions.items():
        check_training_overlap(query_set, defense.trained_on(), name)
    readout_calibration = ReadoutCalibration(
        session, model_info, conditions[UNDEFENDED], calibration, console
    )
    readouts: dict[str, Readout] = {}
    for name in CANDIDATE_READOUTS if spec.readouts == ("all",) else spec.readouts:
        if not with_threshold:
            readout = readout_calibration.build_readout(name)
        elif name == "auto":
            readout = readout_calibration.select_best_readout(conditions, spec.attacks)
        else:
            readout = readout_calibration.calibrate_readout(name)
        readouts[readout.name] = readout
    overlap = _calibration_overlap_notices(query_set, calibration)
    notices = [*session.chat_template.notices, *omissions, *overlap]
    for name, readout in readouts.items():
        notices += [f"readout {name}: {notice}" for notice in readout.notices]
    for notice in notices:
        print_note(console, notice)
    return RunSetup(
        session,
        model_info,
        prepared,
        query_set,
        split,
        list(readouts.values()),
        spec.attacks,
        notices,
        tuple(defenses),
        tuple(settings),
    )


def find_preflight_failures(
    setup: RunSetup, conditions: Mapping[str, Defense], console: Console
) -> dict[tuple[str, str], list[PreflightCheck]]:
    """Return the failed preflight checks by attack and condition, from a few queries.

    Prompts are checked in every condition. Margins are compared with plain forward passes for each defense
    under the first attack and for the undefended model under each attack: how margins are computed does not
    depend on the text of the prompt.

    Args:
        setup: loaded and prepared.
        conditions: condition name → defense.
        console: shows progress.
    """
    failed_checks = {}
    queries = sample_queries(setup.query_set.queries, _N_PREFLIGHT_QUERIES)
    description = "checking that defenses reach the model"
    with make_progress_bar(console) as bar:
        task = bar.add_task(description, total=len(conditions) * len(setup.attacks))
        setup.session.defense_calls.on_progress = make_defense_call_callback(bar, task)
        for attack in setup.attacks:
            for name, defense in conditions.items():
                with_margins = attack is setup.attacks[0] or name == UNDEFENDED
                try:
                    if defense.calls_model:
                        # All queries in one batch: a few take nearly as long, and scoring needs all of them.
                        query_chats = attack.build_query_chats(setup.query_set.queries)
                        setup.session.render_prompts(defense, query_chats)
                    checks = [
                        check
                        for readout in setup.readouts
                        for check in check_condition(
                            setup.session, name, defense, queries, readout, attack, with_margins
                        )
                    ]
                except Exception as error:
                    if len(conditions) * len(setup.attacks) <= 2:
                        raise
                    checks = [make_failed_check(attack, name, defense, error)]
                if failed := [check for check in checks if not check.passed]:
                    failed_checks[attack.name, name] = failed
                bar.update(task, advance=1, description=description)
    return failed_checks


def exclude_failed_conditions(
    failed_checks: Mapping[tuple[str, str], list[PreflightCheck]], condition_keys: Collection[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """Return why conditions cannot be scored: their own failed checks, or those of the undefended model.

    Args:
        failed_checks: the result of `find_preflight_failures`.
        condition_keys: attack and condition of everything that should be scored.

    Raises:
        PreflightError: if no defense is left to compare with the undefended model.
    """
    failures = describe_failed_checks(failed_checks)
    for attack, name in condition_keys:
        if (attack, UNDEFENDED) in failed_checks:
            failures.setdefault((attack, name), NO_REFERENCE)
    if failures and not any(key not in failures and key[1] != UNDEFENDED for key in condition_keys):
        raise PreflightError([check for checks in failed_checks.values() for check in checks])
    return failures


def describe_failed_checks(
    failed_checks: Mapping[tuple[str, str], list[PreflightCheck]],
) -> dict[tuple[str, str], str]:
    """Return why conditions cannot be scored, from their failed checks."""
    return {
        key: "; ".join(f"{check.name}: {check.observed}" for check in checks)
        for key, checks in failed_checks.items()
    }


def _calibration_overlap_notices(query_set: QuerySet, calibration: QuerySet) -> list[str]:
    """Return a notice if calibration queries are scored: the threshold is fitted to them."""
    n_shared = len(
        {query.text for query in query_set.queries} & {query.text for query in calibration.queries}
    )
    if not n_shared:
        return []
    return [
        f"{n_shared} of the {len(query_set.queries)} scored queries are calibration queries of the readout"
    ]


def _missing_requirement_notices(
    prepared: Sequence[Defense], requested: Sequence[str | Defense]
) -> list[str]:
    """Return a notice for each defense that lacks something in this model.

    Raises:
        UserError: if nothing of a defense that the user named can be scored.
    """
    notices = []
    for defense in prepared:
        if reason := defense.missing_requirements():
            ablations = list(build_conditions([defense]))
            if not ablations and "all" not in requested:
                raise UserError(f"{defense.name}: {reason}")
            scored = f"only {', '.join(ablations)} can be scored" if ablations else "skipped"
            notices.append(f"{defense.name}: {scored}: {reason}")
    return notices
