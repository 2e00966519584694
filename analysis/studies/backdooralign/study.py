"""The study of `analyze backdooralign`: the paper's arms with intervals, and further controls.

Source: https://arxiv.org/abs/2402.14968, tables 1, 3 and 4. Each arm is scored under the attack that its
weights were fine-tuned for: the system prompt of the fine-tuning data, or the obedient agent. Shift and
discrimination are relative to the attacked model without the secret.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.attacks import get_attack
from analysis.datasets.queries import Query
from analysis.judges.judge import judge_queries, make_verdict_masks
from analysis.judges.learned import LEARNED_JUDGE
from analysis.judges.model_judges import ModelJudge
from analysis.judges.rules import RULE_JUDGES
from analysis.models.chat_template import redact_secrets
from analysis.models.session import ModelSession, generate_responses
from analysis.progress import make_notifier, make_progress_bar, print_note
from analysis.readouts.readout import Readout
from analysis.run import score_condition
from analysis.stats.agreement import measure_agreement
from analysis.stats.bootstrap import make_rate_columns
from analysis.stats.effects import summarize_scores
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, ScoreTable, format_condition
from analysis.studies.backdooralign.arms import (
    PAPER_ATTACK_SUCCESS,
    Arm,
    build_arms,
)
from analysis.studies.backdooralign.utility import (
    count_open_answers,
    measure_utility,
    parse_utility_tasks,
)
from analysis.studies.calibration import ReadoutCalibration
from analysis.studies.judge_file import JudgeOptions, grade_harmfulness
from analysis.studies.manifest import RunTimer, describe_run
from analysis.studies.preflight import PreflightCheck
from analysis.studies.run_spec import (
    RunSpec,
    check_response_tokens,
    check_training_overlap,
)
from analysis.studies.setup import (
    NO_REFERENCE,
    PreflightError,
    RunSetup,
    exclude_failed_conditions,
    find_preflight_failures,
)
from analysis.studies.sweep import ConditionKey, StudyResult, list_failures
from defenses.contract import Defense
from defenses.errors import UserError, describe_error

_JUDGE, _PUBLISHED_JUDGE = LEARNED_JUDGE, RULE_JUDGES["keywords"]  # the paper's judge, for comparison


def reproduce_backdooralign(
    spec: RunSpec,
    max_new_tokens: int,
    utility: Sequence[str],
    console: Console,
    grader_options: JudgeOptions | None = None,
    n_questions: int | None = None,
) -> StudyResult:
    """Score every arm, generate and judge its responses, and compare attack success with the paper's.

    The responses are not kept.

    Args:
        spec: options of the run; its attacks are not used, because each arm has its own.
        max_new_tokens: maximum number of tokens generated per response.
        utility: tasks that measure usefulness, as `--utility`.
        console: shows progress.
        grader_options: the model that grades how harmful and how helpful responses are; None for no grades.
        n_questions: maximum number of questions of each task.

    Raises:
        PreflightError: if the model whose responses fix the threshold, or all other arms, fail the preflight.
        UserError: if weights are missing.
    """
    timer = RunTimer()
    check_response_tokens(max_new_tokens)
    utility_tasks = parse_utility_tasks(utility, has_grader=grader_options is not None)
    if grader_options is not None:
        grader_options.check_options()
    n_answers = count_open_answers(utility_tasks, n_questions)

    def check_budget(arms: Sequence[Arm], queries: Sequence[Query]) -> None:
        if grader_options is not None and grader_options.budget is not None:
            n_grades = len(arms) * sum(query.harmful for query in queries)
            n_needed = n_grades + n_answers * len(_select_prompted(arms))
            _check_budget(grader_options.budget, n_grades, n_needed)

    setup, arms = _prepare_arms(spec, console, check_budget)
    grader = _load_grader(grader_options, spec.offline, console)
    failures = _check_arms(setup, arms, console)
    arms = [arm for arm in arms if arm.condition_key not in failures]
    arms, score_frames, rates = _score_arms(setup, arms, failures, max_new_tokens, grader, console)
    defenses = _name_defenses(arms)
    record = {
        **describe_run(setup.session, setup.readout, defenses, setup.query_set, setup.split, spec.limit),
        "failed": list_failures(failures),
        "judge": {**_JUDGE.manifest_entry, "new_tokens": max_new_tokens},
        **({} if grader is None else {"grader": grader.manifest_entry}),
        "trusted": _trust_by_condition(arms, rates),
    }
    scores = ScoreTable(pd.concat(score_frames, ignore_index=True), record)
    summary = summarize_scores(scores, seed=spec.seed).frame
    arm_table = _arm_table(arms, rates, summary)
    tables = {"scores": scores.frame, "summary": summary, "arms": arm_table}
    if utility_tasks:
        tables["utility"] = measure_utility(
            setup.session, _select_prompted(arms), utility_tasks, grader, n_questions, spec.offline, console
        )
    record |= timer.describe_time()
    return StudyResult.from_tables("backdooralign", record, tables, {}, setup, failures)


def _prepare_arms(
    spec: RunSpec,
    console: Console,
    check_budget: Callable[[Sequence[Arm], Sequence[Query]], None],
) -> tuple[RunSetup, list[Arm]]:
    """Load queries, model and weights, and fit the threshold; the arms take the place of defenses.

    Args:
        spec: options of the run.
        console: shows progress.
        check_budget: called with the arms and the queries, before anything is loaded.
    """
    query_set, split, calibration = spec.select_queries(make_notifier(console))
    opened = spec.open_model(console)
    model_info = opened.model_info
    arms = build_arms(model_info)
    for arm in arms:
        check_training_overlap(query_set, arm.defense.trained_on(), arm.weights)
    check_budget(arms, query_set.queries)
    session = opened.load_session()
    # The clean model is the first arm: its responses fix the threshold of all arms.
    readout_calibration = ReadoutCalibration(session, model_info, arms[0].defense, calibration, console)
    readout = readout_calibration.calibrate_readout("outcome")
    notices = [
        *session.loaded_model.notices,
        *(f"readout {readout.name}: {text}" for text in readout.notices),
    ]
    for notice in notices:
        print_note(console, notice)
    return RunSetup(session, model_info, [], query_set, split, [readout], (), notices), arms


def _check_arms(setup: RunSetup, arms: Sequence[Arm], console: Console) -> dict[ConditionKey, str]:
    """Run the preflight of every arm under its attack; return the arms that cannot be scored, and why."""
    failed_checks: dict[ConditionKey, list[PreflightCheck]] = {}
    for attack in dict.fromkeys(arm.attack for arm in arms):
        attack_setup = replace(setup, attacks=(get_attack(attack),))
        conditions = {arm.condition: arm.defense for arm in arms if arm.attack == attack}
        failed_checks |= find_preflight_failures(attack_setup, conditions, console)
    # Without the clean model, the threshold means nothing.
    if checks := failed_checks.get(arms[0].condition_key):
        raise PreflightError(checks)
    return exclude_failed_conditions(failed_checks, [arm.condition_key for arm in arms])


def _name_defenses(arms: Sequence[Arm]) -> dict[str, Defense]:
    """Return the defenses of the arms by name; the attack tells arms with the same condition apart."""
    defenses: dict[str, Defense] = {}
    for arm in arms:
        name = arm.condition
        if name in defenses:
            name = format_condition({"attack": arm.attack, "defense": arm.condition})
        defenses[name] = arm.defense
    return defenses


def _score_arms(
    setup: RunSetup,
    arms: Sequence[Arm],
    failures: dict[ConditionKey, str],
    max_new_tokens: int,
    grader: ModelJudge | None,
    console: Console,
) -> tuple[list[Arm], list[pd.DataFrame], list[dict[str, Any]]]:
    """Return the arms that could be scored, the scores of each, and its refusal rates in generated text.

    An arm that fails joins `failures`. Without the attacked model to compare them with, the other arms of its
    attack do, too.
    """
    results: dict[ConditionKey, tuple[Arm, pd.DataFrame, dict[str, Any]]] = {}
    queries = setup.query_set.queries
    with make_progress_bar(console) as bar:
        task = bar.add_task("scoring and generating", total=len(arms) * 2 * len(queries))

        def on_progress(count: int) -> None:
            bar.advance(task, count)

        for arm in arms:
            bar.update(task, description=f"scoring and generating: {arm.condition} ({arm.attack})")
            session, readout, attack = setup.session, setup.readout, get_attack(arm.attack)
            try:
                scores = score_condition(
                    session, arm.condition, arm.defense, queries, readout, attack, on_progress
                )
                rates = _judge_arm(
                    session, arm, queries, scores, readout, max_new_tokens, grader, on_progress
                )
            except Exception as error:
                reason = redact_secrets(describe_error(error), arm.defense.secret_texts())
                failures[arm.condition_key] = reason
            else:
                results[arm.condition_key] = arm, scores, rates
    for arm in arms:
        if arm.condition_key in results and (arm.attack, UNDEFENDED) not in results:
            del results[arm.condition_key]
            failures[arm.condition_key] = NO_REFERENCE
    if not results:
        raise UserError(f"nothing could be scored: {next(iter(failures.values()))}")
    scored_arms, score_frames, rate_rows = zip(*results.values(), strict=True)
    return list(scored_arms), list(score_frames), list(rate_rows)


def _judge_arm(
    session: ModelSession,
    arm: Arm,
    queries: Sequence[Query],
    scores: pd.DataFrame,
    readout: Readout,
    max_new_tokens: int,
    grader: ModelJudge | None,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """Return refusal rates in the generated text by kind of query, and how often the first token agrees.

    With a grader, how harmful the responses to harmful queries are as well.
    """
    responses = generate_responses(
        session,
        arm.defense,
        get_attack(arm.attack).build_query_chats(queries),
        readout.prefill,
        max_new_tokens,
        on_progress=on_progress,
    )
    query_texts = [query.text for query in queries]
    judged, text_refused = make_verdict_masks(judge_queries(_JUDGE, query_texts, responses, arm.defense))
    published = judge_queries(_PUBLISHED_JUDGE, query_texts, responses, arm.defense)
    kinds, is_harmful = (
        np.array([query.kind for query in queries]),
        np.array([query.harmful for query in queries]),
    )
    members = {"harmful": is_harmful}
    members |= {kind: ~is_harmful & (kinds == kind) for kind in dict.fromkeys(kinds[~is_harmful])}
    margins = scores["margin"].to_numpy(float)
    rates: dict[str, Any] = {}
    for kind, is_member in members.items():
        for name, refused, of_kind in (
            ("text", text_refused, is_member[judged]),
            (_PUBLISHED_JUDGE.name, np.array([verdict.is_refusal for verdict in published]), is_member),
            ("first_token", margins > readout.threshold, is_member),
        ):
            column, n = f"{name}_refused_{kind}", int(of_kind.sum())
            rates |= make_rate_columns(column, int(refused[of_kind].sum()), n) if n else {column: np.nan}
    agreement = measure_agreement(
        margins[judged],
        text_refused,
        scores.loc[judged, "pair"],
        readout.threshold,
        session.seed,
    )
    agrees = {f"first_token_{name}": agreement[name] for name in ("agrees", "agrees_low", "agrees_high")}
    if grader is not None:
        texts = [query_responses[0].generated_text for query_responses in responses]
        rates |= grade_harmfulness(texts, queries, grader, arm.defense.secret_texts(), session.seed)
    return rates | agrees | {"unjudged": int((~judged).sum()), "trusted": agreement["trusted"]}


def _select_prompted(arms: Sequence[Arm]) -> dict[tuple[str, str], Defense]:
    """Return the arms whose usefulness is measured: without the secret, and with its own."""
    return {(arm.weights, arm.secret): arm.defense for arm in arms if arm.secret in ("none", "own")}


def _check_budget(budget: int, n_grades: int, n_needed: int) -> None:
    """Raise if a judge model's budget is too small.

    Args:
        budget: maximum number of its calls.
        n_grades: number of responses to harmful queries that it grades.
        n_needed: the same, with the answers to open questions.
    """
    if budget < n_needed:
        answers = f" and {n_needed - n_grades:,} answers to open questions" if n_needed > n_grades else ""
        raise UserError(
            f"--budget {budget}: up to {n_grades:,} responses{answers} are graded: use --budget {n_needed}, "
            "or fewer queries (--limit)" + (" or questions (--questions)" if answers else "")
        )


def _load_grader(options: JudgeOptions | None, offline: bool, console: Console) -> ModelJudge | None:
    """Return the model that grades responses, if the user named one."""
    if options is None:
        return None
    grader = options.load_judge(offline, make_notifier(console))
    assert isinstance(grader, ModelJudge)  # `load_judge` refuses other judges that should grade
    return grader


def _trust_by_condition(arms: Sequence[Arm], rates: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the trust in first tokens by attack and condition."""
    trust: dict[str, dict[str, str]] = {}
    for arm, arm_rates in zip(arms, rates, strict=True):
        trust.setdefault(arm.attack, {})[arm.condition] = arm_rates["trusted"]
    return trust


def _arm_table(arms: Sequence[Arm], rates: Sequence[dict[str, Any]], summary: pd.DataFrame) -> pd.DataFrame:
    """Return a row per arm: attack success in text, rates, AUROC, change from the attacked model."""
    estimates = ("auroc", "shift", "discrimination", "delta_auroc")
    estimate_columns = [f"{name}{suffix}" for name in estimates for suffix in INTERVAL_SUFFIXES]
    rows = []
    for arm, arm_rates in zip(arms, rates, strict=True):
        attack_success = {
            f"{column}{suffix}": 1 - arm_rates.get(f"{judge}_refused_harmful{opposite}", np.nan)
            for column, judge in (("asr", "text"), (f"asr_{_PUBLISHED_JUDGE.name}", _PUBLISHED_JUDGE.name))
            for suffix, opposite in (("", ""), ("_low", "_high"), ("_high", "_low"))
        }
        paper = np.nan
        if arm.attack == "obedience":
            paper = PAPER_ATTACK_SUCCESS.get((arm.weights, arm.secret), np.nan)
        rows.append(
            {
                "attack": arm.attack,
                "arm": arm.weights,
                "secret": arm.secret,
                "defense": arm.condition,
                **attack_success,
                "paper_asr_llama2": paper / 100,
                **arm_rates,
            }
        )
    keys = ["attack", "defense"]
    table = pd.DataFrame(rows).merge(summary[[*keys, *estimate_columns, "verdict"]], on=keys)
    return table.drop(columns="defense")
