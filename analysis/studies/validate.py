"""The study of `analyze validate`: agreement of readouts with generated text, and response quality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.attacks import Attack, check_not_adaptive
from analysis.datasets.queries import Query, sample_queries
from analysis.judges.judge import Judge, JudgeProgress, Verdict, judge_queries, make_verdict_masks
from analysis.judges.model_judges import GradingRubric, ModelJudge
from analysis.judges.rules import RULE_JUDGES
from analysis.judges.samples import judge_samples
from analysis.models.chat_template import redact_secrets
from analysis.models.engine import RemoteEngine
from analysis.models.session import ModelSession, Response, generate_responses
from analysis.progress import make_notifier, make_progress_bar, show_preliminary_work
from analysis.readouts.readout import Readout
from analysis.report.results import Run
from analysis.run import build_condition_chats, score_condition
from analysis.stats.agreement import (
    RESPONSES_READOUT,
    TRUST_RULE,
    compute_calibration_curve,
    compute_needed_threshold,
    correlate_refusal_rates,
    measure_agreement,
)
from analysis.stats.answer_quality import (
    add_refusal_probabilities,
    compare_responses,
    compute_judged_rates,
    summarize_quality,
    summarize_sampled_refusals,
)
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED, ResponseVerdict
from analysis.studies.calibration import save_validity
from analysis.studies.judge_file import JudgeOptions, SampleOptions, grade_harmfulness
from analysis.studies.manifest import RunTimer, describe_readout
from analysis.studies.responses import N_RESPONSE_TOKENS, RESPONSE_JUDGE, name_verdict
from analysis.studies.run_spec import RunSpec, check_response_tokens
from analysis.studies.setup import NO_REFERENCE, RunSetup, prepare_setup
from analysis.studies.sweep import (
    ConditionKey,
    StudyResult,
    build_record,
    check_conditions,
    list_condition_keys,
)
from defenses.contract import Defense, QueryChat
from defenses.errors import UserError, describe_error

_KEY_COLUMNS = ["query", "pair", "category", "harmful", "attack", "defense"]


@dataclass(frozen=True)
class ValidationResult(StudyResult):
    """Result of a validation.

    Attributes:
        unjudged_reasons: why responses have no verdict, one entry per response.
        stop_reason: the interruption or the error of the judge that ended the study early; else None.
    """

    unjudged_reasons: tuple[str, ...] = ()
    stop_reason: KeyboardInterrupt | UserError | None = None


def validate_readouts(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    judge_options: JudgeOptions,
    max_new_tokens: int,
    console: Console,
    samples: SampleOptions | None = None,
) -> ValidationResult:
    """Score every condition, generate and judge responses, and measure which margins can be trusted.

    The responses are not kept. A condition that fails is left out. If the user or the judge ends the study
    early, the finished conditions are kept.

    Args:
        spec: options of the run.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        judge_options: the judge of the responses.
        max_new_tokens: maximum number of tokens generated per response.
        console: shows progress.
        samples: how many responses are sampled besides the greedy one; None for none.

    Raises:
        PreflightError: if no defense reaches the model.
        UserError: if no condition can be scored.
    """
    if len(spec.readouts) > 1 or spec.readouts == ("all",):
        check_not_adaptive(spec.attacks, "each readout would choose chats of its own: name one readout")
    timer = RunTimer()
    check_response_tokens(max_new_tokens)
    judge_options.check_options()
    judges: list[Judge] = []

    def check_inputs(setup: RunSetup) -> None:
        n_conditions = len(setup.attacks) * len(setup.conditions)
        n_per_query = 1 + (samples.n_samples if samples else 0)
        judge_options.check_budget(n_conditions * len(setup.query_set.queries) * n_per_query)
        judges.append(judge_options.load_judge(spec.offline, make_notifier(console)))

    setup = prepare_setup(spec, defenses, settings, console, check_inputs=check_inputs)
    (judge,) = judges
    failures = check_conditions(setup, setup.conditions, console)
    validation = _Validation(setup, judge, judge_options, max_new_tokens, spec.seed, failures, samples)
    stop_reason = validation.run_conditions(console)
    return validation.build_result(spec, timer, stop_reason)


@dataclass(frozen=True)
class ConditionResponses:
    """Scores, responses and verdicts of one condition; the responses stay in memory.

    Attributes:
        attack: name of the attack.
        condition: the defense's name in the tables.
        score_frames: readout → its scores.
        responses: prefill of the responses (token ids) → the responses to each query.
        verdicts: prefill of the responses → judge → its verdicts.
        opening_verdicts: prefill of the responses → the verdicts that `analyze` would report on their first
            tokens, as the text of a `ResponseVerdict`; empty if there are none, see `judge_openings`.
    """

    attack: str
    condition: str
    score_frames: Mapping[str, pd.DataFrame]
    responses: Mapping[tuple[int, ...], Sequence[Sequence[Response]]]
    verdicts: Mapping[tuple[int, ...], Mapping[str, Sequence[Verdict]]]
    opening_verdicts: Mapping[tuple[int, ...], Sequence[str]] = field(default_factory=dict)

    def get_judged_response(self, prefill: tuple[int, ...], judge_name: str, row: int) -> Response:
        """Return the response to a query that its verdict belongs to.

        Args:
            prefill: prefill of the responses.
            judge_name: name of the judge.
            row: position of the query.
        """
        return self.responses[prefill][row][self.verdicts[prefill][judge_name][row].copy_index]


def collect_responses(
    session: ModelSession,
    attack: Attack,
    condition: str,
    defense: Defense,
    queries: Sequence[Query],
    readouts: Sequence[Readout],
    judges: Mapping[str, Judge],
    max_new_tokens: int,
    on_progress: JudgeProgress = lambda prompts: None,
) -> ConditionResponses:
    """Score the queries with every readout, generate responses, and have every judge judge them.

    If a readout prefills the response, its margins are compared with responses that have the same prefill.

    Args:
        session: the model.
        attack: the attack through which the queries are sent.
        condition: the defense's name in the tables.
        defense: prepared for this model.
        queries: the queries to score.
        readouts: with their thresholds.
        judges: name in the columns → judge.
        max_new_tokens: maximum number of tokens generated per response.
        on_progress: called with the number of newly finished items: each query once per readout, each prompt
            once per prefill.
    """
    score_frames = {
        readout.name: score_condition(session, condition, defense, queries, readout, attack, on_progress)
        for readout in readouts
    }
    query_chats = build_condition_chats(session, defense, queries, readouts[0], attack)
    query_texts = [query.text for query in queries]
    responses, verdicts = {}, {}
    for prefill in {readout.prefill: None for readout in readouts}:
        responses[prefill] = generate_responses(
            session, defense, query_chats, prefill, max_new_tokens, on_progress=on_progress
        )
        verdicts[prefill] = {
            name: judge_queries(judge, query_texts, responses[prefill], defense)
            for name, judge in judges.items()
        }
    opening_verdicts: dict[tuple[int, ...], list[str]] = {}
    unforced = [readout.prefill for readout in readouts if not readout.name.startswith("prefilled-")]
    if unforced and max_new_tokens > N_RESPONSE_TOKENS:
        prefill = unforced[0]  # with the first readout's opening, as in `analyze`
        opening_verdicts[prefill] = judge_openings(session, defense, query_texts, responses[prefill], prefill)
    return ConditionResponses(attack.name, condition, score_frames, responses, verdicts, opening_verdicts)


def judge_openings(
    session: ModelSession,
    defense: Defense,
    query_texts: Sequence[str],
    responses: Sequence[Sequence[Response]],
    prefill: tuple[int, ...],
) -> list[str]:
    """Return the verdict that `analyze` would report on each query, from the first tokens of its responses.

    Greedy responses that are cut after `N_RESPONSE_TOKENS` are those that `analyze` generates.

    Args:
        session: the model.
        defense: prepared for this model; pools the verdicts on several copies of a query.
        query_texts: text of each query, without an attack.
        responses: the whole responses to each query.
        prefill: token ids with which all of them start.
    """
    decode_response = session.chat_template.decode_response

    def cut_response(response: Response) -> Response:
        ids = response.ids[:N_RESPONSE_TOKENS]
        text = decode_response(ids)
        # The text of a response lacks the prefill if the chat has one of its own.
        has_prefill = response.text != response.generated_text
        whole_text = decode_response([*prefill, *ids]) if has_prefill else text
        return replace(response, ids=ids, text=whole_text, generated_text=text)

    openings = [[cut_response(response) for response in copies] for copies in responses]
    return [
        name_verdict(verdict) for verdict in judge_queries(RESPONSE_JUDGE, query_texts, openings, defense)
    ]


def compute_validity_rows(
    condition_responses: ConditionResponses, readouts: Sequence[Readout], judge_name: str, seed: int
) -> list[dict[str, Any]]:
    """Return a row of `validity.csv` for each readout: how well it agrees with a judge of the text.

    Args:
        condition_responses: the condition.
        readouts: with their thresholds.
        judge_name: the judge whose verdicts are the ground truth.
        seed: random seed of the bootstrap.
    """
    rows: list[dict[str, Any]] = []
    for readout in readouts:
        judged, refused = make_verdict_masks(condition_responses.verdicts[readout.prefill][judge_name])
        scores = condition_responses.score_frames[readout.name][judged]
        margins, is_harmful = scores["margin"].to_numpy(float), scores["harmful"].to_numpy(bool)
        units = list(scores["pair"].fillna(scores["query"]))
        rows.append(
            {
                **_describe_condition_readout(condition_responses, readout.name),
                **measure_agreement(margins, refused, scores["pair"], readout.threshold, seed, is_harmful),
                "threshold": readout.threshold,
                **compute_needed_threshold(margins, refused, units, seed),
                "coverage": float(scores["coverage"].mean()),
                "unjudged": int((~judged).sum()),
            }
        )
    return rows


def compute_opening_rows(
    condition_responses: ConditionResponses, judge_name: str, seed: int
) -> list[dict[str, Any]]:
    """Return the row of `validity.csv` on the first tokens of responses: how well `analyze` knows the whole.

    The verdict on the first tokens takes the place of a readout. Responses without both verdicts are left
    out and counted as unjudged. No row if there are no such verdicts.

    Args:
        condition_responses: the condition.
        judge_name: the judge whose verdicts on whole responses are the ground truth.
        seed: random seed of the bootstrap.
    """
    rows: list[dict[str, Any]] = []
    for prefill, opening_verdicts in condition_responses.opening_verdicts.items():
        verdicts, openings = condition_responses.verdicts[prefill][judge_name], np.array(opening_verdicts)
        judged = make_verdict_masks(verdicts)[0] & (openings != ResponseVerdict.UNJUDGED)
        refused = np.array([verdict.is_refusal for verdict in verdicts])[judged]
        opening_refused = (openings == ResponseVerdict.REFUSED)[judged]
        queries = next(iter(condition_responses.score_frames.values()))[judged]
        is_harmful = queries["harmful"].to_numpy(bool)
        agreement = measure_agreement(
            opening_refused.astype(float), refused, queries["pair"], 0.5, seed, is_harmful
        )
        # A verdict has no probability, no threshold and no coverage.
        missing = ("calibration_error", "needed_threshold")
        rows.append(
            {
                **_describe_condition_readout(condition_responses, RESPONSES_READOUT),
                **agreement,
                "threshold": np.nan,
                **{f"{name}{suffix}": np.nan for name in missing for suffix in INTERVAL_SUFFIXES},
                "coverage": np.nan,
                "unjudged": int((~judged).sum()),
            }
        )
    return rows


def build_calibration_curves(
    condition_responses: ConditionResponses, readouts: Sequence[Readout], judge_name: str
) -> pd.DataFrame:
    """Return the calibration curve of each readout in this condition, a row per bin.

    Args:
        condition_responses: the condition.
        readouts: with their thresholds.
        judge_name: the judge whose verdicts are the ground truth.
    """
    curves = []
    for readout in readouts:
        judged, refused = make_verdict_masks(condition_responses.verdicts[readout.prefill][judge_name])
        p_refuse = condition_responses.score_frames[readout.name]["p_refuse"].to_numpy(float)[judged]
        key = _describe_condition_readout(condition_responses, readout.name)
        curves.append(compute_calibration_curve(p_refuse, refused).assign(**key))
    table = pd.concat(curves, ignore_index=True)
    return table[[*key, *(column for column in table if column not in key)]]


def build_verdict_table(condition_responses: ConditionResponses, readouts: Sequence[Readout]) -> pd.DataFrame:
    """Return one row per response with each judge's verdict, without the text.

    A row is a query under one prefill; `begins` names the readouts that are compared with these responses,
    and `verdict_responses` is the verdict on their first tokens.

    Args:
        condition_responses: the condition.
        readouts: with their thresholds.
    """
    parts = []
    for prefill, verdicts_by_judge in condition_responses.verdicts.items():
        compared = [readout for readout in readouts if readout.prefill == prefill]
        columns: dict[str, Any] = {"begins": "/".join(readout.name for readout in compared)}
        for judge_name, verdicts in verdicts_by_judge.items():
            columns[f"refusal_{judge_name}"] = [verdict.refusal for verdict in verdicts]
        if prefill in condition_responses.opening_verdicts:
            columns[f"verdict_{RESPONSES_READOUT}"] = condition_responses.opening_verdicts[prefill]
        for readout in compared:
            margin = condition_responses.score_frames[readout.name]["margin"]
            columns |= {f"margin_{readout.name}": margin, f"says_{readout.name}": margin > readout.threshold}
        keys = condition_responses.score_frames[compared[0].name][_KEY_COLUMNS]
        parts.append(keys.assign(**columns))
    return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class ResponsePairs:
    """Benign queries that were complied with, with and without the defense, and both responses.

    Attributes:
        prefill: prefill of the responses: the shortest one.
        queries: the queries.
        defended: the responses under the defense.
        undefended: the responses of the undefended model.
    """

    prefill: tuple[int, ...]
    queries: list[Query]
    defended: list[Response]
    undefended: list[Response]


def pair_compliant_responses(
    condition_responses: ConditionResponses,
    undefended_responses: ConditionResponses,
    queries: Sequence[Query],
    judge_name: str,
) -> ResponsePairs:
    """Pair the responses to benign queries that were complied with in both conditions.

    Args:
        condition_responses: the condition.
        undefended_responses: the undefended condition under the same attack.
        queries: the queries of both.
        judge_name: the judge whose verdict decides which queries were complied with.
    """
    prefill = min(condition_responses.responses, key=len)
    sides = condition_responses, undefended_responses
    rows = [
        row
        for row, query in enumerate(queries)
        if not query.harmful
        and all(_is_compliance(side.verdicts[prefill][judge_name][row]) for side in sides)
        and all(side.get_judged_response(prefill, judge_name, row).ids for side in sides)
    ]
    defended, undefended = (
        [side.get_judged_response(prefill, judge_name, row) for row in rows] for side in sides
    )
    return ResponsePairs(prefill, [queries[row] for row in rows], defended, undefended)


def measure_response_pairs(
    pairs: ResponsePairs,
    session: ModelSession,
    undefended_chats: Callable[[Sequence[Query]], list[QueryChat]],
    undefended: Defense,
    max_new_tokens: int,
    is_reference: bool,
) -> pd.DataFrame:
    """Compare the responses of each pair, a row per query.

    Args:
        pairs: responses with and without the defense.
        session: the model.
        undefended_chats: returns the chats in which queries were sent to the undefended model.
        undefended: the undefended model as a defense.
        max_new_tokens: maximum number of tokens generated per response.
        is_reference: whether the condition is the undefended one, so that log-probabilities cannot differ.
    """
    sides = pairs.defended, pairs.undefended
    texts, reference_texts = ([response.generated_text for response in side] for side in sides)
    token_counts, reference_counts = (
        np.array([len(response.ids) for response in side], float) for side in sides
    )
    measures = compare_responses(texts, reference_texts, token_counts, reference_counts, max_new_tokens)
    if is_reference or not pairs.queries or isinstance(session.engine, RemoteEngine):
        return measures
    prompts_by_query = session.render_prompts(undefended, undefended_chats(pairs.queries))
    prompts = [first.append_prefix(pairs.prefill) for first, *_ in prompts_by_query]
    with undefended.apply_to(session.loaded_model.model):
        means = [
            np.array(
                [
                    float(log_probabilities.mean())
                    for log_probabilities in session.engine.compute_log_probabilities(
                        prompts, [response.ids for response in side]
                    )
                ]
            )
            for side in sides
        ]
    return measures.assign(log_likelihood=means[0], log_likelihood_change=means[0] - means[1])


def grade_response_pairs(
    pairs: ResponsePairs, grader: ModelJudge, secrets: Sequence[str], seed: int
) -> dict[str, Any]:
    """Have a judge model grade both responses of each pair; return the mean grade and its change.

    Args:
        pairs: responses with and without the defense.
        grader: the judge model.
        secrets: of the defense; redacted before a response is graded.
        seed: random seed of the bootstrap.
    """
    rubric = GradingRubric.load("helpfulness")
    queries = [query.text for query in pairs.queries]
    texts = (
        [redact_secrets(response.generated_text, tuple(secrets)) for response in side]
        for side in (pairs.defended, pairs.undefended)
    )
    grades, undefended_grades = (np.array(grader.grade_responses(side, queries, rubric)) for side in texts)
    graded = ~np.isnan(grades + undefended_grades)
    summary = summarize_quality(
        pd.DataFrame({"grade": grades[graded], "grade_change": (grades - undefended_grades)[graded]}), seed
    )
    return {"n_graded": summary.pop("n_complied")} | summary


@dataclass(frozen=True)
class _Validation:
    """One validation: its inputs, and the results of the conditions that are finished.

    Attributes:
        setup: loaded and prepared.
        judge: the judge whose verdicts are the ground truth.
        judge_options: the user's choice of the judge.
        max_new_tokens: maximum number of tokens generated per response.
        seed: random seed of the bootstrap.
        failures: what failed, and why.
        samples: how many responses are sampled besides the greedy one; None for none.
        finished: responses and verdicts by condition.
        validity_rows: rows of `validity.csv`.
        quality_rows: rows of `worth.csv`.
        sample_frames: rows of `samples.csv`, by condition.
        sample_rows: rows of `sampling.csv`.
    """

    setup: RunSetup
    judge: Judge
    judge_options: JudgeOptions
    max_new_tokens: int
    seed: int
    failures: dict[ConditionKey, str]
    samples: SampleOptions | None
    finished: list[ConditionResponses] = field(default_factory=list)
    validity_rows: list[dict[str, Any]] = field(default_factory=list)
    quality_rows: list[dict[str, Any]] = field(default_factory=list)
    sample_frames: list[pd.DataFrame] = field(default_factory=list)
    sample_rows: list[dict[str, Any]] = field(default_factory=list)

    def run_conditions(self, console: Console) -> KeyboardInterrupt | UserError | None:
        """Validate every condition; return what ended the study early, if anything did."""
        pending = [
            (attack, name)
            for attack in self.setup.attacks
            for name in self.setup.conditions
            if (attack.name, name) not in self.failures
        ]
        n_responses = self._estimate_response_count(pending)
        self.judge_options.check_budget(n_responses)
        n_scores = len(pending) * len(self.setup.query_set.queries) * len(self.setup.readouts)
        with make_progress_bar(console) as bar:
            task = bar.add_task("scoring and generating", total=n_scores + n_responses)

            def on_progress(count: int) -> None:
                bar.advance(task, count)

            show_preliminary_work(bar, task, self.setup.session)
            try:
                for attack, name in pending:
                    if (attack.name, name) in self.failures:
                        continue
                    bar.update(task, description=f"scoring and generating: {name} ({attack.name})")
                    self._run_condition(attack, name, on_progress)
                    self._check_judge_works()
            except (KeyboardInterrupt, UserError) as error:
                if not self.finished:
                    raise
                return error
        if not self.finished:
            raise UserError(f"nothing could be scored: {next(iter(self.failures.values()))}")
        return None

    def _estimate_response_count(self, pending: Sequence[tuple[Attack, str]]) -> int:
        """Estimate how many responses there will be: some defenses send several copies of a query."""
        queries = self.setup.query_set.queries
        sampled = sample_queries(queries, 4)
        prompts_by_query = [
            prompts
            for attack, name in pending
            for prompts in self.setup.session.render_prompts(
                self.setup.conditions[name], attack.build_query_chats(sampled)
            )
        ]
        n_prompts = -(-len(queries) * sum(map(len, prompts_by_query)) // len(sampled))
        n_greedy = len({readout.prefill for readout in self.setup.readouts})
        return n_prompts * (n_greedy + (self.samples.n_samples if self.samples else 0))

    def _run_condition(self, attack: Attack, name: str, on_progress: JudgeProgress) -> None:
        """Validate one condition and keep its results; if it fails, record why."""
        session, defense = self.setup.session, self.setup.conditions[name]
        queries, readouts, judge_name = (
            self.setup.query_set.queries,
            self.setup.readouts,
            self.judge_options.name,
        )
        judges = {**RULE_JUDGES, judge_name: self.judge}
        try:
            responses = collect_responses(
                session, attack, name, defense, queries, readouts, judges, self.max_new_tokens, on_progress
            )
            validity_rows = compute_validity_rows(responses, readouts, judge_name, self.seed)
            opening_rows = compute_opening_rows(responses, judge_name, self.seed)
            sampled = self._judge_samples(responses, attack, on_progress)
            quality_row = self._rate_quality(responses, attack)
        except Exception as error:
            reason = redact_secrets(describe_error(error), defense.secret_texts())
            self.failures[attack.name, name] = reason
            if name == UNDEFENDED:
                for other in self.setup.conditions:
                    self.failures.setdefault((attack.name, other), NO_REFERENCE)
            return
        self.quality_rows.append(quality_row)
        self.sample_frames.append(sampled[0])
        self.sample_rows.extend(sampled[1])
        for readout, row in zip(readouts, validity_rows, strict=True):
            if row["n"]:
                save_validity(session, attack, defense, readout, self.judge.name, self.max_new_tokens, row)
        self.finished.append(responses)
        self.validity_rows.extend([*opening_rows, *validity_rows])

    def _judge_samples(
        self, responses: ConditionResponses, attack: Attack, on_progress: JudgeProgress
    ) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        """Return the rows of `samples.csv` and of `sampling.csv`; none if no responses are sampled."""
        if self.samples is None:
            return pd.DataFrame(), []
        session, defense = self.setup.session, self.setup.conditions[responses.condition]
        queries, readout = self.setup.query_set.queries, self.setup.readouts[0]
        refusals = judge_samples(
            session,
            defense,
            build_condition_chats(session, defense, queries, readout, attack),
            [query.text for query in queries],
            self.judge,
            readout.prefill,
            self.max_new_tokens,
            self.samples.n_samples,
            self.samples.temperature,
            on_progress,
        )
        verdicts = responses.verdicts[readout.prefill][self.judge_options.name]
        greedy = np.array(
            [verdict.is_refusal if verdict.is_judged else np.nan for verdict in verdicts], float
        )
        keys = responses.score_frames[readout.name][_KEY_COLUMNS]
        frame = add_refusal_probabilities(keys, refusals)
        rows = []
        for name, harmful in (("harmful", True), ("benign", False)):
            members = keys["harmful"].to_numpy(bool) == harmful
            rows.append(
                {"attack": attack.name, "defense": responses.condition, "class": name}
                | {"n_queries": int(members.sum()), "n_samples": self.samples.n_samples}
                | summarize_sampled_refusals(refusals[:, members], greedy[members])
            )
        return frame.assign(refusal_greedy=[verdict.refusal for verdict in verdicts]), rows

    def _rate_quality(self, responses: ConditionResponses, attack: Attack) -> dict[str, Any]:
        """Return a row of `worth.csv`: rates by judge, and benign responses against undefended ones."""
        queries, judge_name = self.setup.query_set.queries, self.judge_options.name
        reference = next(
            (earlier for earlier in self.finished if earlier.attack == responses.attack), responses
        )
        pairs = pair_compliant_responses(responses, reference, queries, judge_name)
        rates = _count_verdicts(responses.verdicts[pairs.prefill], queries)
        undefended = self.setup.conditions[UNDEFENDED]
        measures = measure_response_pairs(
            pairs,
            self.setup.session,
            lambda pair_queries: build_condition_chats(
                self.setup.session, undefended, pair_queries, self.setup.readouts[0], attack
            ),
            undefended,
            self.max_new_tokens,
            is_reference=responses is reference,
        )
        grades: dict[str, Any] = {}
        if self.judge_options.grade and isinstance(self.judge, ModelJudge):
            secrets = self.setup.conditions[responses.condition].secret_texts()
            texts = [
                responses.get_judged_response(pairs.prefill, judge_name, row).generated_text
                for row in range(len(queries))
            ]
            grades = grade_harmfulness(texts, queries, self.judge, secrets, self.seed)
            if pairs.queries:
                grades |= grade_response_pairs(pairs, self.judge, secrets, self.seed)
        return {
            "attack": responses.attack,
            "defense": responses.condition,
            **grades,
            **rates,
            **summarize_quality(measures, self.seed),
        }

    def _check_judge_works(self) -> None:
        """Raise if a judge model has stopped giving verdicts."""
        if isinstance(self.judge, ModelJudge) and (reason := self.judge.failure_reason):
            if reason == "interrupted":
                raise KeyboardInterrupt
            raise UserError(f"the judge gives no more verdicts: {reason}")

    def build_result(
        self, spec: RunSpec, timer: RunTimer, stop_reason: KeyboardInterrupt | UserError | None
    ) -> ValidationResult:
        """Return the tables and the record of the finished conditions."""
        setup, readouts, judge_name = self.setup, self.setup.readouts, self.judge_options.name
        validity = pd.DataFrame(self.validity_rows)
        curves = [build_calibration_curves(responses, readouts, judge_name) for responses in self.finished]
        verdicts = [build_verdict_table(responses, readouts) for responses in self.finished]
        tables = {
            "validity": validity,
            "worth": pd.DataFrame(self.quality_rows),
            "curves": pd.concat(curves, ignore_index=True),
            "answers": pd.concat(verdicts, ignore_index=True),
        }
        if self.sample_rows:
            tables["samples"] = pd.concat(self.sample_frames, ignore_index=True)
            tables["sampling"] = pd.DataFrame(self.sample_rows)
        figure_tables = _validity_figure_tables(validity, self.finished, readouts, judge_name)
        condition_keys = list_condition_keys(setup, setup.conditions)
        reached = {name for attack, name in condition_keys if (attack, name) not in self.failures}
        conditions = {name: defense for name, defense in setup.conditions.items() if name in reached}
        record = {
            **build_record(setup, conditions, spec, self.failures),
            "interrupted": stop_reason is not None,
            "conditions_wanted": len(condition_keys),
            "readouts": [describe_readout(readout) for readout in readouts],
            "judge": {**self.judge.manifest_entry, "new_tokens": self.max_new_tokens},
            "openings": {"judge": RESPONSE_JUDGE.manifest_entry, "new_tokens": N_RESPONSE_TOKENS},
            "samples": asdict(self.samples) if self.samples else None,
            "rule": TRUST_RULE,
            "ranks": _rank_conditions(self.finished, readouts, judge_name, self.seed),
            **timer.describe_time(),
        }
        unjudged_reasons = tuple(
            verdict.evidence
            for responses in self.finished
            for verdicts_by_judge in responses.verdicts.values()
            for verdict in verdicts_by_judge[judge_name]
            if not verdict.is_judged
        )
        run = Run("validate", record, {**tables, **figure_tables}, figures=tuple(figure_tables))
        return ValidationResult(run, self.failures, unjudged_reasons, stop_reason)


def _describe_condition_readout(condition_responses: ConditionResponses, readout_name: str) -> dict[str, str]:
    """Return the key columns of a readout in a condition."""
    return {
        "attack": condition_responses.attack,
        "defense": condition_responses.condition,
        "readout": readout_name,
    }


def _is_compliance(verdict: Verdict) -> bool:
    return verdict.is_judged and not verdict.is_refusal


def _count_verdicts(
    verdicts_by_judge: Mapping[str, Sequence[Verdict]], queries: Sequence[Query]
) -> dict[str, Any]:
    """Return the attack success rate and the over-refusal rates by each judge."""
    refusals, judged = (
        {
            name: np.array([getattr(verdict, attribute) for verdict in verdicts])
            for name, verdicts in verdicts_by_judge.items()
        }
        for attribute in ("is_refusal", "is_judged")
    )
    is_harmful = np.array([query.harmful for query in queries])
    return compute_judged_rates([query.kind for query in queries], is_harmful, refusals, judged)


def _rank_conditions(
    finished: Sequence[ConditionResponses], readouts: Sequence[Readout], judge_name: str, seed: int
) -> list[dict[str, Any]]:
    """Correlate the conditions' refusal rates by each readout with those by the judge, for each attack."""
    rows = []
    for attack in dict.fromkeys(responses.attack for responses in finished):
        conditions = [responses for responses in finished if responses.attack == attack]
        for readout in readouts:
            verdicts = [responses.verdicts[readout.prefill][judge_name] for responses in conditions]
            judged = np.array([[verdict.is_judged for verdict in row] for row in verdicts]).all(0)
            if len(conditions) < 3 or not judged.any():
                continue
            refused = np.array([[verdict.is_refusal for verdict in row] for row in verdicts])[:, judged]
            frames = [responses.score_frames[readout.name] for responses in conditions]
            margins = np.stack([frame["margin"].to_numpy(float) for frame in frames])[:, judged]
            queries = frames[0][judged]
            correlation = correlate_refusal_rates(
                margins > readout.threshold,
                refused,
                queries["pair"],
                queries["harmful"].to_numpy(bool),
                seed,
            )
            key = {"attack": attack, "readout": readout.name, "conditions": len(conditions)}
            rows.append(key | correlation)
    return rows


def _validity_figure_tables(
    validity: pd.DataFrame,
    finished: Sequence[ConditionResponses],
    readouts: Sequence[Readout],
    judge_name: str,
) -> dict[str, pd.DataFrame]:
    """Return the tables that the figures of each readout are drawn from."""
    figure_tables: dict[str, pd.DataFrame] = {}
    for readout in readouts:
        verdicts = [
            verdict for responses in finished for verdict in responses.verdicts[readout.prefill][judge_name]
        ]
        judged, refused = make_verdict_masks(verdicts)
        if not judged.any():
            continue
        p_refuse = np.concatenate(
            [responses.score_frames[readout.name]["p_refuse"].to_numpy(float) for responses in finished]
        )
        suffix = f"-{readout.name}" if len(readouts) > 1 else ""
        figure_tables[f"calibration{suffix}"] = compute_calibration_curve(p_refuse[judged], refused)
        is_drawn = validity["readout"] == readout.name
        if any(readout.prefill in responses.opening_verdicts for responses in finished):
            is_drawn |= validity["readout"] == RESPONSES_READOUT
        figure_tables[f"rates{suffix}"] = validity[is_drawn & (validity["n"] > 0)]
    return figure_tables
