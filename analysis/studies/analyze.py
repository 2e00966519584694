"""The study of `analyze`: score every defense and the undefended model, and estimate the effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from rich.console import Console

from analysis.attacks import check_not_adaptive
from analysis.datasets.queries import sample_queries
from analysis.models.chat_template import redact_secrets
from analysis.progress import make_notifier, print_note
from analysis.run import build_condition_chats
from analysis.served.address import is_address
from analysis.stats.cost import add_divergence_estimates
from analysis.stats.effects import estimate_factorial_effects, list_factorial_conditions, summarize_scores
from analysis.stats.kinds import summarize_kinds
from analysis.stats.matched_controls import add_control_estimates
from analysis.stats.response_rates import add_factorial_response_effects, add_response_estimates
from analysis.stats.tables import ScoreTable, format_condition
from analysis.studies.cost import ResponseDivergences, check_lists_all, measure_cost, measure_divergences
from analysis.studies.manifest import RunTimer
from analysis.studies.matched_controls import MatchedControlScores, score_controls
from analysis.studies.responses import ResponseVerdicts, judge_conditions
from analysis.studies.run_spec import RunSpec
from analysis.studies.setup import RunSetup
from analysis.studies.sweep import ConditionKey, ScoredConditions, StudyResult, score_conditions
from defenses.contract import Defense
from defenses.errors import UserError


def analyze_defenses(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    console: Console,
    with_cost: bool = False,
    n_control_draws: int = 0,
    with_training: bool = False,
    with_side_effects: bool = False,
) -> StudyResult:
    """Score every defense and the undefended model, and estimate what each defense changes.

    Args:
        spec: options of the run.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        console: shows progress.
        with_cost: whether to measure what each defense costs.
        n_control_draws: draws of each defense's matched control; 0 for no controls.
        with_training: whether to train the weights that defenses lack first.
        with_side_effects: whether to measure how far the first tokens move on benign queries.

    Raises:
        PreflightError: if no defense reaches the model.
        TrainingInterrupted: if the user interrupts a training.
    """
    if with_side_effects:
        check_not_adaptive(
            spec.attacks, "side effects compare the first tokens behind one and the same chat: omit them"
        )
    if is_address(spec.model) and (with_cost or with_training):
        option = "--cost" if with_cost else "--train"
        raise UserError(f"{option}: it needs the model's weights, and {spec.model} is served")
    if with_training:
        from analysis.studies.train import train_missing_weights

        for weights in train_missing_weights(spec, defenses, settings, console):
            make_notifier(console)(str(weights))
    timer = RunTimer()
    responses: ResponseVerdicts | None = None

    def judge_responses(setup: RunSetup, condition_keys: list[ConditionKey]) -> list[ConditionKey]:
        nonlocal responses
        if spec.max_responses == 0:
            return condition_keys
        responses = judge_conditions(setup, condition_keys, spec, console)
        if not responses.interrupted:
            return condition_keys
        if len(responses.frames) < 2:  # the undefended model alone says nothing about a defense
            raise KeyboardInterrupt
        return [key for key in condition_keys if key in responses.frames or key in responses.failures]

    def check_inputs(setup: RunSetup) -> None:
        if with_side_effects:
            check_lists_all(setup.session.engine, "--side-effects")

    scored = score_conditions(
        spec, defenses, settings, console, check_inputs, keep_interrupted=True, before_scoring=judge_responses
    )
    scores = settle_undecided(scored.scores, responses is not None and bool(responses.frames), console)
    work = _describe_work(scored)
    if responses is not None:
        responses.drop_unscored(scored.sweep_result.score_frames)
        work["responses"] = responses.describe()
        work["interrupted"] = responses.interrupted or scored.sweep_result.interrupted
    controls = None
    if n_control_draws and not work["interrupted"]:
        keys = list(scored.sweep_result.score_frames)
        controls = score_controls(scored.setup, keys, n_control_draws, spec, console)
        work["controls"] = controls.describe()
        work["interrupted"] = controls.interrupted
    divergences = None
    if with_side_effects and not work["interrupted"]:
        divergences = measure_divergences(scored.setup, list(scored.sweep_result.score_frames), console)
        work["interrupted"] = divergences.interrupted
    costs = _measure_first_attack_cost(scored, spec.seed, console) if with_cost else None
    scored.record.update(timer.describe_time(), **work)
    with console.status("computing intervals"):
        summary = _summarize(scores, responses, controls, divergences, spec.seed)
        kinds = _summarize_query_kinds(scored, scores, responses, spec.seed)
        from analysis.plots.data import build_analysis_points

        figure_tables = build_analysis_points(scores.frame, summary, scores.threshold, kinds)
        if costs is not None:
            figure_tables["cost"] = _join_gains(costs, summary, spec.attacks[0].name)
    tables = {
        **_factorial_tables(scores, responses, spec.seed),
        "prompts": _example_prompts(scored.setup, list(scored.sweep_result.score_frames), scored.finished),
        "scores": scored.scores.frame,
        "summary": summary,
        "kinds": kinds,
    }
    failures = dict(scored.sweep_result.failures)
    if responses is not None:
        # A condition that could not be scored either has failed for the same reason.
        failures = {key: f"responses: {reason}" for key, reason in responses.failures.items()} | failures
        tables["responses"] = responses.table
    if controls is not None:
        failures |= {key: f"control: {reason}" for key, reason in controls.failures.items()}
        if controls.frames:
            tables["controls"] = controls.table
    if divergences is not None:
        failures |= {key: f"side effects: {reason}" for key, reason in divergences.failures.items()}
        if divergences.frames:
            tables["divergences"] = divergences.table
    return StudyResult.from_tables("analyze", scored.record, tables, figure_tables, scored.setup, failures)


def settle_undecided(scores: ScoreTable, has_responses: bool, console: Console) -> ScoreTable:
    """Record how many margins leave the verdict open; return the scores that estimates are made from.

    Rates of judged responses rest on no verdict by margin. Without responses, a query that is undecided in
    one condition is left out of all of them.

    Args:
        scores: of all conditions; their record gets the counts and a notice.
        has_responses: whether responses were judged.
        console: prints the notice.

    Raises:
        UserError: if a class has no query left.
    """
    frame = scores.frame
    if "margin_low" not in frame:
        return scores
    half_width = (frame["margin_high"] - frame["margin_low"]) / 2
    counts = {
        (str(attack), str(defense)): int(rows.sum())
        for (attack, defense), rows in scores.is_undecided.groupby(
            [frame["attack"], frame["defense"]], sort=False
        )
    }
    n_undecided = sum(counts.values())
    notice = (
        f"margins are known within {half_width.max():.2g} nats (median {half_width.median():.2g}): "
        f"{n_undecided} of {len(frame)} verdicts by margin are undecided"
    )
    decided = scores
    if n_undecided:
        attack, defense = max(counts, key=counts.__getitem__)
        condition = format_condition({"attack": attack, "defense": defense})
        notice += f", most of them ({counts[attack, defense]}) under {condition}"
        if not has_responses:
            decided = scores.drop_undecided()
            notice += "; estimates leave out queries that are undecided in one of the conditions"
            classes = decided.frame.groupby("attack")["harmful"].nunique()
            if len(classes) < frame["attack"].nunique() or classes.min() < 2:
                raise UserError(f"{notice}, and a class has none left: judge responses (no --responses none)")
    print_note(console, notice)
    scores.record["notices"].append(notice)
    scores.record["undecided"] = {
        format_condition({"attack": attack, "defense": defense}): n for (attack, defense), n in counts.items()
    }
    return decided


def _summarize(
    scores: ScoreTable,
    responses: ResponseVerdicts | None,
    controls: MatchedControlScores | None,
    divergences: ResponseDivergences | None,
    seed: int,
) -> pd.DataFrame:
    """Return the summary of a run, from its margins and, where there are any, its other results."""
    summary = summarize_scores(scores, seed=seed).frame
    verdicts = responses.table if responses is not None and responses.frames else None
    if verdicts is not None:
        summary = add_response_estimates(summary, verdicts, scores, seed)
    if controls is not None and controls.frames:
        summary = add_control_estimates(summary, scores, controls.table, verdicts)
    if divergences is not None and divergences.frames:
        summary = add_divergence_estimates(summary, divergences.table, seed)
    return summary


def _summarize_query_kinds(
    scored: ScoredConditions, scores: ScoreTable, responses: ResponseVerdicts | None, seed: int
) -> pd.DataFrame:
    """Estimate the effects of each defense on each kind of benign query."""
    query_kinds = {query.id: query.kind for query in scored.setup.query_set.queries}
    table = responses.table if responses is not None and responses.frames else None
    return summarize_kinds(scores, query_kinds, table, seed)


def _measure_first_attack_cost(scored: ScoredConditions, seed: int, console: Console) -> pd.DataFrame:
    """Measure the cost of the conditions that were scored under the first attack."""
    first = scored.setup.attacks[0].name
    timed = {
        name: defense
        for name, defense in scored.finished.items()
        if (first, name) in scored.sweep_result.score_frames
    }
    return measure_cost(scored.setup, timed, seed, console)


def _describe_work(scored: ScoredConditions) -> dict[str, object]:
    """Return the entries of run.json on completeness and on computation saved."""
    session = scored.setup.session
    return {
        "interrupted": scored.sweep_result.interrupted,
        "conditions_wanted": scored.sweep_result.n_conditions,
        "tokens": {
            "computed": session.engine.work_counter.computed_tokens,
            "saved": session.engine.work_counter.saved_tokens,
        },
        "scores_found_in_cache": session.score_cache.n_hits if session.score_cache is not None else 0,
    }


def _join_gains(costs: pd.DataFrame, summary: pd.DataFrame, attack: str) -> pd.DataFrame:
    """Add what each defense achieves under an attack to what it costs."""
    columns = ["defense", "family", "refusal_rate", "over_refusal_rate"]
    columns += [f"delta_auroc{end}" for end in ("", "_low", "_high")]
    return costs.merge(summary.loc[summary["attack"] == attack, columns], on="defense")


def _example_prompts(
    setup: RunSetup, condition_keys: Sequence[ConditionKey], conditions: Mapping[str, Defense]
) -> pd.DataFrame:
    """Return the prompts of a harmful and of a benign query in each condition, secrets redacted."""
    secrets = tuple(text for defense in conditions.values() for text in defense.secret_texts())
    queries = sample_queries(setup.query_set.queries, 2)
    attacks = {attack.name: attack for attack in setup.attacks}
    rows = []
    for attack, name in condition_keys:
        # The model's own responses to an attacker are not kept: a placeholder stands for each.
        query_chats = (
            attacks[attack].build_query_chats(queries)
            if attacks[attack].asks_model
            else build_condition_chats(
                setup.session, conditions[name], queries, setup.readout, attacks[attack]
            )
        )
        prompts_by_query = setup.session.render_prompts(conditions[name], query_chats)
        rows += [
            {
                "attack": attack,
                "defense": name,
                "query": query.id,
                "readings": len(prompts),
                "read": redact_secrets(prompts[0].text, secrets),
            }
            for query, prompts in zip(queries, prompts_by_query, strict=True)
        ]
    return pd.DataFrame(rows)


def _factorial_tables(
    scores: ScoreTable, responses: ResponseVerdicts | None, seed: int
) -> dict[str, pd.DataFrame]:
    """Estimate the effects of each complete 2 × 2 design."""
    scored_keys = set(scores.condition_keys)
    effects = [
        estimate_factorial_effects(scores, attack, defense, seed)
        for attack, defense in scores.condition_keys
        if all((attack, condition) in scored_keys for condition in list_factorial_conditions(defense))
    ]
    if responses is not None:
        effects = [add_factorial_response_effects(table, responses.table, scores) for table in effects]
    return {"effects": pd.concat(effects, ignore_index=True)} if effects else {}
