"""The pipeline that all studies share: set-up, preflight, scoring, record and score table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
from rich.console import Console

from analysis.models.chat_template import redact_secrets
from analysis.models.session import ModelSession
from analysis.models.vision import ImageReader
from analysis.progress import make_progress_bar, print_note, show_preliminary_work
from analysis.report.results import Run
from analysis.run import iterate_condition_scores
from analysis.stats.tables import UNDEFENDED, ScoreTable
from analysis.studies.calibration import collect_trust
from analysis.studies.manifest import describe_attacks, describe_options, describe_run
from analysis.studies.run_spec import RunSpec
from analysis.studies.setup import (
    NO_REFERENCE,
    RunSetup,
    describe_failed_checks,
    exclude_failed_conditions,
    find_preflight_failures,
    prepare_setup,
)
from defenses.contract import Defense
from defenses.errors import UserError, describe_error

ConditionKey = tuple[str, str]  # attack and condition
# Called with the set-up and the conditions that can be scored; returns those to score.
ConditionSelector = Callable[[RunSetup, list[ConditionKey]], list[ConditionKey]]


@dataclass
class ConditionFrames:
    """Tables of finished conditions; a subclass says what they hold.

    Attributes:
        columns: columns of each table.
        frames: table of each finished condition.
        failures: why other conditions have none.
        interrupted: whether the user interrupted the work.
        wall_seconds: time that it took.
    """

    columns: ClassVar[tuple[str, ...]]
    frames: dict[ConditionKey, pd.DataFrame] = field(default_factory=dict)
    failures: dict[ConditionKey, str] = field(default_factory=dict)
    interrupted: bool = False
    wall_seconds: float = 0.0

    @property
    def table(self) -> pd.DataFrame:
        """The rows of all finished conditions."""
        if not self.frames:
            return pd.DataFrame(columns=list(self.columns))
        return pd.concat(list(self.frames.values()), ignore_index=True)


@dataclass
class SweepResult:
    """Scores of a sweep over attacks and conditions.

    Attributes:
        n_conditions: number of conditions, summed over attacks.
        score_frames: scores of the finished conditions.
        failures: why the other conditions failed.
        interrupted: whether the user interrupted the sweep.
    """

    n_conditions: int
    score_frames: dict[ConditionKey, pd.DataFrame] = field(default_factory=dict)
    failures: dict[ConditionKey, str] = field(default_factory=dict)
    interrupted: bool = False

    def select_finished(self, conditions: Mapping[str, Defense]) -> dict[str, Defense]:
        """Return the conditions that are finished under at least one attack."""
        finished = {name for _, name in self.score_frames}
        return {name: defense for name, defense in conditions.items() if name in finished}


@dataclass(frozen=True)
class ScoredConditions:
    """Result of the shared pipeline.

    Attributes:
        setup: what was loaded and prepared.
        sweep_result: scores by condition, and failures.
        finished: condition name → defense, for the conditions with scores.
        record: the entries of run.json that every run has.
        scores: scores of all finished conditions, with the record.
    """

    setup: RunSetup
    sweep_result: SweepResult
    finished: Mapping[str, Defense]
    record: dict[str, Any]
    scores: ScoreTable


def score_conditions(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    console: Console,
    check_inputs: Callable[[RunSetup], None] = lambda setup: None,
    check_setup: Callable[[RunSetup], None] | None = None,
    keep_interrupted: bool = False,
    before_scoring: ConditionSelector = lambda setup, condition_keys: condition_keys,
) -> ScoredConditions:
    """Set up a run, check that the defenses reach the model, score every condition, and collect the record.

    Args:
        spec: options of the run.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        console: shows progress.
        check_inputs: as for `prepare_setup`.
        check_setup: as for `prepare_setup`.
        keep_interrupted: whether to return the finished conditions if the user interrupts the sweep.
        before_scoring: called between preflight and scoring.

    Raises:
        PreflightError: if no defense reaches the model.
        UserError: if no condition can be scored.
        KeyboardInterrupt: if the user interrupts the sweep and nothing is kept.
    """
    setup = prepare_setup(
        spec, defenses, settings, console, check_inputs=check_inputs, check_setup=check_setup
    )
    sweep_result = check_and_sweep(setup, setup.conditions, console, True, before_scoring)
    score_frames = sweep_result.score_frames
    # The undefended model alone says nothing about a defense.
    if sweep_result.interrupted and (not keep_interrupted or len(score_frames) < 2):
        raise KeyboardInterrupt
    if not score_frames:
        raise UserError(f"nothing could be scored: {next(iter(sweep_result.failures.values()))}")
    finished = sweep_result.select_finished(setup.conditions)
    record = build_record(setup, finished, spec, sweep_result.failures)
    record["trusted"] = collect_trust(setup.session, setup.attacks, finished, setup.readout, score_frames)
    scores = ScoreTable(pd.concat(list(score_frames.values()), ignore_index=True), record)
    return ScoredConditions(setup, sweep_result, finished, record, scores)


def check_and_sweep(
    setup: RunSetup,
    conditions: Mapping[str, Defense],
    console: Console,
    needs_defense: bool = False,
    before_scoring: ConditionSelector = lambda setup, condition_keys: condition_keys,
) -> SweepResult:
    """Run the preflight, then score every condition that passes it under every attack.

    Args:
        setup: loaded and prepared.
        conditions: condition name → defense, the undefended model first.
        console: shows progress.
        needs_defense: whether to raise if no defense passes the preflight.
        before_scoring: called between preflight and scoring.

    Raises:
        PreflightError: if no defense passes the preflight and `needs_defense` is set.
    """
    failures = (
        check_conditions(setup, conditions, console)
        if needs_defense
        else describe_failed_checks(find_preflight_failures(setup, conditions, console))
    )
    setup.session.engine.work_counter.reset_counts()
    condition_keys = [
        (attack, name)
        for attack, name in list_condition_keys(setup, conditions)
        if (attack, name) not in failures and (attack, UNDEFENDED) not in failures
    ]
    condition_keys = before_scoring(setup, condition_keys)
    result = sweep_conditions(setup, conditions, condition_keys, failures, console)
    print_cache_notes(setup.session, console)
    return result


def print_cache_notes(session: ModelSession, console: Console) -> None:
    """Print what was found in the cache, and whether later runs will find the results of this one."""
    if session.score_cache is None:
        return
    if reused := session.score_cache.describe_reuse():
        print_note(console, f"reused from earlier runs: {reused}")
    if problem := session.score_cache.describe_problem():
        print_note(console, f"{problem}: later runs will compute some results of this run again")


def check_conditions(
    setup: RunSetup, conditions: Mapping[str, Defense], console: Console
) -> dict[ConditionKey, str]:
    """Run the preflight; return the conditions that cannot be scored, and why.

    Args:
        setup: loaded and prepared.
        conditions: condition name → defense, the undefended model first.
        console: shows progress.

    Raises:
        PreflightError: if no defense is left to compare with the undefended model.
    """
    failed_checks = find_preflight_failures(setup, conditions, console)
    return exclude_failed_conditions(failed_checks, list_condition_keys(setup, conditions))


def list_condition_keys(setup: RunSetup, conditions: Collection[str]) -> list[ConditionKey]:
    """Return every attack with every condition."""
    return [(attack.name, name) for attack in setup.attacks for name in conditions]


def sweep_conditions(
    setup: RunSetup,
    conditions: Mapping[str, Defense],
    condition_keys: Sequence[ConditionKey],
    failures: Mapping[ConditionKey, str],
    console: Console,
) -> SweepResult:
    """Score conditions under every attack, with one progress bar for all of them.

    Args:
        setup: loaded and prepared.
        conditions: condition name → defense, the undefended model first.
        condition_keys: the conditions to score.
        failures: conditions that are known to fail, and why.
        console: shows progress.
    """
    queries = setup.query_set.queries
    result = SweepResult(len(setup.attacks) * len(conditions), failures=dict(failures))
    with make_progress_bar(console) as bar:
        task = bar.add_task("scoring", total=len(condition_keys) * len(queries))
        show_preliminary_work(bar, task, setup.session)
        for attack in setup.attacks:
            runnable = {
                name: defense for name, defense in conditions.items() if (attack.name, name) in condition_keys
            }

            def on_progress(name: str, n_queries: int) -> None:
                bar.update(task, description=f"scoring {name}", advance=n_queries)

            def on_failure(name: str, error: Exception, attack_name: str = attack.name) -> None:
                result.failures[attack_name, name] = redact_secrets(
                    describe_error(error), conditions[name].secret_texts()
                )

            try:
                for name, frame in iterate_condition_scores(
                    setup.session, runnable, queries, setup.readout, attack, on_progress, on_failure
                ):
                    result.score_frames[attack.name, name] = frame
            except KeyboardInterrupt:
                result.interrupted = True
                break
            if (attack.name, UNDEFENDED) not in result.score_frames:
                for name in conditions:
                    result.failures.setdefault((attack.name, name), NO_REFERENCE)
    reader = setup.session.loaded_model.image_reader
    if isinstance(reader, ImageReader) and (notice := reader.describe_losses()):
        print_note(console, notice)
        setup.notices.append(notice)
    return result


def build_record(
    setup: RunSetup,
    conditions: Mapping[str, Defense],
    spec: RunSpec,
    failures: Mapping[ConditionKey, str],
) -> dict[str, Any]:
    """Return the entries of run.json that every run has, except its times.

    Args:
        setup: what was loaded and prepared; its first readout is described.
        conditions: condition name → defense, for the conditions with results.
        spec: options of the run.
        failures: what failed, and why.
    """
    readout = setup.readouts[0]
    prepared = (*setup.defenses, *setup.conditions.values())
    secrets = tuple(dict.fromkeys(text for defense in prepared for text in defense.secret_texts()))
    return {
        "options": describe_options(spec, setup.requested_defenses, setup.requested_settings, secrets),
        **describe_run(setup.session, readout, conditions, setup.query_set, setup.split, spec.limit),
        **describe_attacks(setup.attacks),
        "notices": list(dict.fromkeys([*setup.notices, *setup.session.engine.notices])),
        "failed": list_failures(failures),
    }


def list_failures(failures: Mapping[ConditionKey, str]) -> list[dict[str, str]]:
    """Return the entries of run.json for the conditions that failed."""
    return [
        {"attack": attack, "defense": condition, "why": reason}
        for (attack, condition), reason in failures.items()
    ]


@dataclass(frozen=True)
class StudyResult:
    """Result of a study.

    Attributes:
        run: its record, tables, and figures.
        failures: what failed, and why.
    """

    run: Run
    failures: Mapping[ConditionKey, str]

    @classmethod
    def from_tables(
        cls,
        name: str,
        record: Mapping[str, Any],
        tables: Mapping[str, pd.DataFrame],
        figure_tables: Mapping[str, pd.DataFrame],
        setup: RunSetup,
        failures: Mapping[ConditionKey, str],
    ) -> StudyResult:
        """Return the result of a study from its tables; those of the figures join the others.

        Args:
            name: name of the study.
            record: content of run.json.
            tables: file stem → table.
            figure_tables: file stem → table that a figure is drawn from.
            setup: what was loaded and prepared.
            failures: what failed, and why.
        """
        texts = {query.id: query.text for query in setup.query_set.queries}
        figures = tuple(figure_tables)
        return cls(Run(name, record, {**tables, **figure_tables}, texts=texts, figures=figures), failures)


@dataclass(kw_only=True)
class TableCollector:
    """Collects the rows of several tables, condition by condition.

    Attributes:
        console: shows progress.
        failures: what failed, and why.
        tables: file stem → table.
        notices: what was left out, and why.
    """

    console: Console
    failures: dict[ConditionKey, str]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def add_condition_tables(self, attack: str, condition: str, **tables: pd.DataFrame) -> None:
        """Append a condition's rows to the collected tables.

        Args:
            attack: name of the attack.
            condition: name of the condition.
            tables: file stem → rows.
        """
        for stem, table in tables.items():
            key_columns = pd.DataFrame({"attack": attack, "defense": condition}, index=table.index)
            self.append_rows(stem, pd.concat([key_columns, table], axis=1))

    def append_rows(self, stem: str, table: pd.DataFrame) -> None:
        """Append rows to a table.

        Args:
            stem: file stem of the table.
            table: the rows.
        """
        earlier = [self.tables[stem]] if stem in self.tables else []
        self.tables[stem] = pd.concat([*earlier, table], ignore_index=True)

    def add_notice(self, text: str) -> None:
        """Record and print a notice, once."""
        if text not in self.notices:
            self.notices.append(text)
            print_note(self.console, text)

    @contextmanager
    def show_progress(self, label: str, n_steps: int) -> Iterator[Callable[[], None]]:
        """Context manager: show a progress bar; yield a callback that advances it.

        Args:
            label: description beside the bar.
            n_steps: number of steps.
        """
        with make_progress_bar(self.console) as bar:
            task = bar.add_task(label, total=n_steps)
            yield lambda: bar.advance(task)

    @contextmanager
    def record_failures(self, attack: str, condition: str, defense: Defense) -> Iterator[None]:
        """Context manager: record a failure, keep earlier results, continue.

        Args:
            attack: name of the attack.
            condition: name of the condition.
            defense: its secrets are redacted.
        """
        try:
            yield
        except Exception as error:
            key = attack, condition
            earlier = f"{self.failures[key]}; " if key in self.failures else ""
            self.failures[key] = earlier + redact_secrets(describe_error(error), defense.secret_texts())
