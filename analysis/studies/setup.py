"""Set-up of a run: load queries, model, defenses and readouts, and run the preflight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rich.console import Console

from analysis.attacks import Attack
from analysis.datasets.images import check_images, list_images
from analysis.datasets.queries import Query, QuerySet, sample_queries
from analysis.models.cache import make_json_cache_path, read_cached_json, write_cached_json
from analysis.models.cascade import OcrReader
from analysis.models.session import ModelSession
from analysis.progress import make_notifier, make_progress_bar, print_note, show_preliminary_work
from analysis.readouts.readout import Readout
from analysis.run import build_conditions
from analysis.served.address import is_address
from analysis.served.served_engine import WeightsNeededError
from analysis.stats.tables import UNDEFENDED
from analysis.studies.calibration import CANDIDATE_READOUTS, ReadoutCalibration, encode_opener
from analysis.studies.preflight import PreflightCheck, check_condition, describe_check, make_failed_check
from analysis.studies.run_spec import RunSpec, check_training_overlap
from defenses.catalog import choose_defenses
from defenses.contract import Defense, ModelInfo
from defenses.detection import Detector
from defenses.errors import UserError, describe_error
from defenses.images import get_last_image
from defenses.stack import list_members
from defenses.steering import SelectiveSteering, Steering
from defenses.tuned import TunedDefense
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
        session: the model; without weights while inputs are checked.
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
    check_inputs: Callable[[RunSetup], None] = lambda setup: None,
    check_setup: Callable[[RunSetup], None] | None = None,
) -> RunSetup:
    """Check all inputs first, then load the weights, then make the readouts, which may take many responses.

    Args:
        spec: options of the run.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        console: shows progress.
        with_threshold: whether readouts need their threshold, for which the model must generate responses.
        check_inputs: called before the weights are loaded, with a set-up without weights, readouts and the
            defenses whose preparation needs the model; raises if the study is impossible.
        check_setup: called before responses are generated, with readouts as far as they can be made without
            responses; raises if the study is impossible with this model.
    """
    chosen = choose_defenses(defenses, settings)
    query_set, split, calibration = spec.select_queries(make_notifier(console))
    _check_query_images([*query_set.queries, *calibration.queries], console)
    for attack in spec.attacks:
        attack.check_covers_queries(query_set.queries)
    chosen, left_out = _select_by_images(chosen, query_set.queries, spec.attacks, "all" in defenses)
    if is_address(spec.model):
        chosen, more = _select_without_weights(chosen, "all" in defenses)
        left_out += more
    opened = spec.open_model(console)
    readout_names = CANDIDATE_READOUTS if spec.readouts == ("all",) else spec.readouts
    for name in readout_names:
        encode_opener(name, opened.prompt_session.loaded_model.tokenizer)
    check_training_overlap(query_set, opened.trained_on, spec.model)
    _read_image_texts(opened.prompt_session, query_set.queries, spec.attacks, console)
    prepared = {
        row: _prepare_defense(defense, opened.model_info)
        for row, defense in enumerate(chosen)
        if not _may_run_model(defense)
    }
    is_served = is_address(spec.model)
    _missing_requirement_notices(list(prepared.values()), defenses, is_served)
    setup = RunSetup(
        opened.prompt_session,
        opened.model_info,
        list(prepared.values()),
        query_set,
        split,
        [],
        spec.attacks,
        [],
        tuple(defenses),
        tuple(settings),
    )
    for name, defense in setup.conditions.items():
        check_training_overlap(query_set, defense.trained_on(), name)
    _check_prompts(setup, has_all_defenses=len(prepared) == len(chosen))
    check_inputs(setup)
    session = opened.load_session()
    all_prepared = []
    for row, defense in enumerate(chosen):
        try:
            all_prepared.append(
                prepared[row] if row in prepared else _prepare_defense(defense, opened.model_info)
            )
        except WeightsNeededError as error:
            if "all" not in defenses:
                raise UserError(f"{defense.name}: {error}") from error
            left_out.append(f"{defense.name}: skipped: {error}")
    omissions = _missing_requirement_notices(all_prepared, defenses, is_served)
    setup = replace(setup, session=session, defenses=all_prepared)
    _check_adapters_fit(setup)
    for name, defense in setup.conditions.items():
        check_training_overlap(query_set, defense.trained_on(), name)
    readout_calibration = ReadoutCalibration(
        session, opened.model_info, setup.conditions[UNDEFENDED], calibration, console
    )
    if with_threshold:
        _check_before_responses(setup, readout_calibration, readout_names, console, check_setup)
    readouts: dict[str, Readout] = {}
    for name in readout_names:
        if not with_threshold:
            readout = readout_calibration.build_readout(name)
        elif name == "auto":
            readout = readout_calibration.select_best_readout(setup.conditions, spec.attacks)
        else:
            readout = readout_calibration.calibrate_readout(name)
        readouts[readout.name] = readout
    overlap = _calibration_overlap_notices(query_set, calibration)
    if with_threshold:
        left_out += _text_threshold_notices(query_set, calibration, spec.attacks)
    notices = [
        *session.loaded_model.notices,
        *session.chat_template.notices,
        *session.engine.notices,
        *left_out,
        *omissions,
        *overlap,
        *_detector_notices(setup.defenses),
        *_steering_notices(setup.defenses),
    ]
    for name, readout in readouts.items():
        notices += [f"readout {name}: {notice}" for notice in readout.notices]
    for notice in notices:
        print_note(console, notice)
    return replace(setup, readouts=list(readouts.values()), notices=notices)


def _check_query_images(queries: Sequence[Query], console: Console) -> None:
    """Decode every image once, so that a bad one is reported before the weights are loaded."""
    if not (images := list_images(queries)):
        return
    with make_progress_bar(console) as bar:
        task = bar.add_task("checking images", total=len(images))
        check_images(queries, lambda n_finished, _: bar.update(task, completed=n_finished))


def _read_image_texts(
    session: ModelSession, queries: Sequence[Query], attacks: Sequence[Attack], console: Console
) -> None:
    """Read the texts in all images first, if the model's name says so: each takes about a second."""
    reader = session.chat_template.image_reader
    if not isinstance(reader, OcrReader):
        return
    chats = [chat for attack in attacks for _, chat in attack.build_query_chats(queries)]
    images = {image.digest: image for chat in chats if (image := get_last_image(chat)) is not None}
    with make_progress_bar(console) as bar:
        task = bar.add_task("reading the text in images", total=len(images))
        for image in images.values():
            reader.read_text(image)
            bar.update(task, advance=1)


def _check_adapters_fit(setup: RunSetup) -> None:
    """Apply every defense with an adapter once, so that one of another model fails before any response."""
    loaded_model = setup.session.loaded_model
    for defense in setup.defenses:
        if any(isinstance(member, AdapterWeights) for member in list_members(defense)):
            key = {"adapters": defense.cacheable_fingerprint()}
            path = make_json_cache_path("preflight", loaded_model, key)
            if read_cached_json(path, dict) is None:
                with defense.apply_to(loaded_model.model):
                    pass
                write_cached_json(path, {"passed": True})


def find_preflight_failures(
    setup: RunSetup, conditions: Mapping[str, Defense], console: Console
) -> dict[tuple[str, str], list[PreflightCheck]]:
    """Return the failed preflight checks by attack and condition, from a few queries.

    Prompts are checked in every condition, that of the longest query among them. Margins are compared with
    plain forward passes for each defense under the first attack and for the undefended model under each
    attack: how margins are computed does not depend on the text of the prompt.

    Args:
        setup: loaded and prepared.
        conditions: condition name → defense.
        console: shows progress.
    """
    failed_checks = {}
    description = "checking that defenses reach the model"
    with make_progress_bar(console) as bar:
        task = bar.add_task(description, total=len(conditions) * len(setup.attacks))
        show_preliminary_work(bar, task, setup.session)
        for attack in setup.attacks:
            queries = select_preflight_queries(setup, attack)
            for name, defense in conditions.items():
                n_notices = len(setup.session.engine.notices)
                with_margins = attack is setup.attacks[0] or name == UNDEFENDED
                try:
                    if defense.calls_model:
                        # All queries in one batch: a few take nearly as long, and scoring needs all of them.
                        query_chats = attack.build_query_chats(setup.query_set.queries)
                        setup.session.render_prompts(defense, query_chats)
                    checks = [
                        check
                        for readout in setup.readouts
                        for check in _check_once(
                            setup.session, name, defense, queries, readout, attack, with_margins
                        )
                    ]
                except Exception as error:
                    if len(conditions) * len(setup.attacks) <= 2:
                        if not defense.is_user_defined or isinstance(error, UserError):
                            raise
                        reason = f"{describe_error(error)} (--debug shows where)"
                        raise UserError(f"{defense.name!r} cannot be scored: {reason}") from error
                    checks = [make_failed_check(attack, name, defense, error)]
                if failed := [check for check in checks if not check.passed]:
                    failed_checks[attack.name, name] = failed
                for notice in setup.session.engine.notices[n_notices:]:
                    print_note(console, notice)
                    setup.notices.append(notice)
                bar.update(task, advance=1, description=description)
    return failed_checks


def _check_once(
    session: ModelSession,
    name: str,
    defense: Defense,
    queries: Sequence[Query],
    readout: Readout,
    attack: Attack,
    with_margins: bool,
) -> list[PreflightCheck]:
    """Return what `check_condition` returns; no checks if all of them passed in an earlier run.

    Checks that passed only after the form of batches was changed are repeated, so that it changes again.
    """
    path = None
    if session.score_cache is not None and not session.engine.has_changed_form:
        key = {"check": describe_check(session, defense, queries, readout, attack, with_margins)}
        path = make_json_cache_path("preflight", session.loaded_model, key)
        if read_cached_json(path, dict) is not None:
            return []
    checks = check_condition(session, name, defense, queries, readout, attack, with_margins)
    if all(check.passed for check in checks) and not session.engine.has_changed_form:
        write_cached_json(path, {"passed": True})
    return checks


def select_preflight_queries(
    setup: RunSetup, attack: Attack, n_queries: int = _N_PREFLIGHT_QUERIES
) -> list[Query]:
    """Return a few queries of each class, and the longest query of the run if it is not among them.

    Args:
        setup: loaded and prepared.
        attack: the attack through which the queries are sent, which determines their lengths.
        n_queries: number of queries without the longest.
    """
    queries = setup.query_set.queries
    lengths = [
        len(setup.session.chat_template.render_prompt(chat).ids)
        for _, chat in attack.build_query_chats(queries)
    ]
    longest = queries[lengths.index(max(lengths))]
    sample = sample_queries(queries, n_queries)
    return sample if longest in sample else [*sample, longest]


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


def _may_run_model(defense: Defense) -> bool:
    """Return whether the preparation of a defense may run the model, which needs its weights."""
    return any(
        isinstance(member, Steering | Detector)
        or (member.is_user_defined and type(member).prepare is not Defense.prepare)
        for member in list_members(defense)
    )


def _check_prompts(setup: RunSetup, has_all_defenses: bool) -> None:
    """Raise if the prompt of the longest query cannot be read without a defense, or under any of them.

    Prompts of defenses that call the model are not known yet.
    """
    longest = max(setup.query_set.queries, key=lambda query: len(query.text))
    conditions = {name: defense for name, defense in setup.conditions.items() if not defense.calls_model}
    for attack in setup.attacks:
        query_chats = attack.build_query_chats([longest])
        errors: list[UserError] = []
        for name, defense in conditions.items():
            try:
                setup.session.render_prompts(defense, query_chats)
            except Exception as error:
                if not isinstance(error, UserError):
                    continue  # the preflight reports it with the condition
                if name == UNDEFENDED:
                    raise
                errors.append(error)
        if errors and has_all_defenses and len(errors) == len(setup.conditions) - 1:
            raise errors[0]


def _check_before_responses(
    setup: RunSetup,
    readout_calibration: ReadoutCalibration,
    readout_names: Sequence[str],
    console: Console,
    check_setup: Callable[[RunSetup], None] | None,
) -> None:
    """Run the study's own check, and the preflight of the undefended model if responses will be generated."""
    is_cached = all(
        readout_calibration.load_readout("words" if name == "auto" else name) for name in readout_names
    )
    if check_setup is None and is_cached:
        return
    drafts = [
        readout_calibration.draft_readout(name, setup.conditions, setup.attacks) for name in readout_names
    ]
    draft_setup = replace(setup, readouts=drafts)
    if check_setup is not None:
        check_setup(draft_setup)
    if not is_cached:
        undefended = {UNDEFENDED: setup.conditions[UNDEFENDED]}
        if failed_checks := find_preflight_failures(draft_setup, undefended, console):
            raise PreflightError([check for checks in failed_checks.values() for check in checks])


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


def _text_threshold_notices(
    query_set: QuerySet, calibration: QuerySet, attacks: Sequence[Attack]
) -> list[str]:
    """Return a notice if the scored chats have images, but the threshold is fitted to requests in words."""
    has_images = any(attack.needs_images for attack in attacks) or any(
        query.image is not None for query in query_set.queries
    )
    if not has_images or any(query.image is not None for query in calibration.queries):
        return []
    return [
        "the readout and its threshold are fitted to requests in words; behind images, the rates of judged "
        "responses count"
    ]


def _prepare_defense(defense: Defense, model_info: ModelInfo) -> Defense:
    """Return a defense prepared for the model; mistakes of a user-defined class become UserErrors."""
    try:
        prepared = defense.prepare(model_info)
    except Exception as error:
        if not defense.is_user_defined or isinstance(error, UserError):
            raise
        raise UserError(f"`prepare` of {defense.name!r} raised {describe_error(error)}") from error
    if not isinstance(prepared, Defense):
        raise UserError(f"`prepare` of {defense.name!r} returned {prepared!r:.60}; it returns a defense")
    for member in list_members(prepared):
        if member.is_user_defined:
            _check_described(member)
    return prepared


def _check_described(defense: Defense) -> None:
    """Raise if a user-defined defense describes its secrets or ablations in another form than it should."""
    described: dict[str, Any] = {}
    for method in ("secret_texts", "build_ablations"):
        try:
            described[method] = getattr(defense, method)()
        except Exception as error:
            raise UserError(f"`{method}` of {defense.name!r} raised {describe_error(error)}") from error
    secrets, ablations = described["secret_texts"], described["build_ablations"]
    if not isinstance(secrets, tuple) or not all(isinstance(text, str) and text for text in secrets):
        raise UserError(
            f"`secret_texts` of {defense.name!r} returned a {type(secrets).__name__}; it returns a tuple of "
            "texts, such as (self.secret,)"
        )
    if not isinstance(ablations, dict) or not all(
        isinstance(name, str) and isinstance(part, Defense) for name, part in ablations.items()
    ):
        raise UserError(
            f"`build_ablations` of {defense.name!r} returned {ablations!r:.60}; it returns a dict from names "
            "to defenses"
        )


def _missing_requirement_notices(
    prepared: Sequence[Defense], requested: Sequence[str | Defense], is_served: bool
) -> list[str]:
    """Return a notice for each defense that lacks something in this model, which may be a served one.

    Raises:
        UserError: if nothing of a defense that the user named can be scored.
    """
    notices = []
    for defense in prepared:
        if reason := defense.missing_requirements():
            if is_served and any(isinstance(member, TunedDefense) for member in list_members(defense)):
                reason = "a served model takes no tuned weights"
            ablations = list(build_conditions([defense]))
            if not ablations and "all" not in requested:
                raise UserError(f"{defense.name}: {reason}")
            scored = f"only {', '.join(ablations)} can be scored" if ablations else "skipped"
            notices.append(f"{defense.name}: {scored}: {reason}")
    return notices


def _detector_notices(defenses: Sequence[Defense]) -> list[str]:
    """Return how well each detector separates the classes of its training queries."""
    return [
        f"{name}: AUROC {fit.auroc:.2f} in cross-validation on {fit.n_harmful} harmful and {fit.n_benign} "
        "benign training queries"
        for name, fit in _collect_fits(defenses, Detector).items()
    ]


def _steering_notices(defenses: Sequence[Defense]) -> list[str]:
    """Return how well each defense that steers selectively separates the classes of its training queries."""
    return [
        f"{name}: adds {fit.harmful_gain:.0%} of its direction to {fit.n_harmful} harmful and "
        f"{fit.benign_gain:.0%} to {fit.n_benign} benign training queries (mean in cross-validation)"
        for name, fit in _collect_fits(defenses, SelectiveSteering).items()
    ]


def _collect_fits(
    defenses: Sequence[Defense], kind: type[Detector] | type[SelectiveSteering]
) -> dict[str, Any]:
    """Return what the members of a kind have learned from the training queries, by name."""
    return {
        member.name: member.fit
        for defense in defenses
        for member in list_members(defense)
        if isinstance(member, kind) and member.fit is not None
    }


def _select_without_weights(chosen: list[Defense], leave_out: bool) -> tuple[list[Defense], list[str]]:
    """Return the defenses that a served model can have, and notices on the others.

    Of a defense with tuned weights, the prompt alone can be scored if it is one of its ablations.

    Args:
        chosen: the chosen defenses.
        leave_out: whether to leave the others out, instead of raising.

    Raises:
        UserError: if a defense changes or reads the inside of the model.
    """
    kept, notices = [], []
    for defense in chosen:
        changes = [
            member.name
            for member in list_members(defense)
            if type(member).apply_to is not Defense.apply_to
            or type(member).logit_blend is not Defense.logit_blend
            or (isinstance(member, Detector) and member.needs_weights)
        ]
        if not changes or build_conditions([defense]).keys() - {defense.name}:
            kept.append(defense)
            continue
        reason = "it changes or reads weights, hidden states, gradients or all logits, which are not served"
        if not leave_out:
            raise UserError(f"{', '.join(changes)}: {reason}")
        notices.append(f"{defense.name}: skipped: {reason}")
    return kept, notices


def _select_by_images(
    chosen: list[Defense], queries: Sequence[Query], attacks: Sequence[Attack], leave_out: bool
) -> tuple[list[Defense], list[str]]:
    """Return the defenses that can act on the queries, and notices on those that act on images only.

    Args:
        chosen: the chosen defenses.
        queries: the queries to score.
        attacks: the attacks through which they are sent.
        leave_out: whether to leave such a defense out if there are no images at all, instead of raising.

    Raises:
        UserError: if a defense acts on images only, and no query has one under any attack.
    """
    image_defenses = [defense.name for defense in chosen if defense.needs_images]
    if not image_defenses:
        return chosen, []
    names = ", ".join(image_defenses)
    n_without = {
        attack.name: sum(get_last_image(chat) is None for _, chat in attack.build_query_chats(queries))
        for attack in attacks
    }
    if any(n < len(queries) for n in n_without.values()):
        return chosen, [
            f"{attack}: {n} of {len(queries)} queries have no image for these defenses to change: {names}"
            for attack, n in n_without.items()
            if n
        ]
    remedy = "choose queries with images, or an attack that draws them, such as --attack typographic"
    if not leave_out:
        raise UserError(f"{names}: no query has an image to change: {remedy}")
    return [defense for defense in chosen if not defense.needs_images], [
        f"{len(image_defenses)} defenses are left out, because no query has an image to change: {remedy}"
    ]
