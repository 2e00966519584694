"""What `analyze validate` does: readouts against what the model goes on to say, and what that is worth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.cli.console import print_failed_checks, print_failures
from analysis.cli.validate import print_response_quality, print_unjudged, print_validity
from analysis.datasets.queries import Query, sample_queries
from analysis.files import check_output_folder
from analysis.judges.judge import Judge, JudgeProgress, Verdict, judge_queries, make_verdict_masks
from analysis.judges.model_judges import ModelJudge
from analysis.judges.rules import RULE_JUDGES
from analysis.models.chat_template import redact_secrets
from analysis.models.session import ModelSession, Response, generate_responses
from analysis.readouts.readout import Readout
from analysis.report.folder import save_run
from analysis.report.results import Run
from analysis.run import build_conditions, score_condition
from analysis.stats.agreement import (
    TRUST_RULE,
    compute_calibration_curve,
    correlate_refusal_rates,
    measure_agreement,
)
from analysis.stats.answer_quality import compare_responses, compute_judged_rates, summarize_quality
from analysis.stats.tables import UNDEFENDED
from analysis.studies.calibration import save_validity
from analysis.studies.judge_file import JudgeOptions
from analysis.studies.manifest import describe_attacks, describe_readout, describe_run
from analysis.studies.progress import make_defense_call_callback, make_notifier, make_progress_bar
from analysis.studies.run_spec import RunSpec, choose_run_folder
from analysis.studies.setup import (
    NO_REFERENCE,
    PreflightError,
    RunSetup,
    exclude_failed_conditions,
    find_preflight_failures,
    prepare_setup,
)
from analysis.studies.sweep import list_failures
from defenses.contract import Defense
from defenses.errors import UserError, describe_error


def validate_readouts(
    spec: RunSpec,
    defenses: Sequence[str],
    settings: Sequence[str],
    out: Path | None,
    judge_options: JudgeOptions,
    max_new_tokens: int,
) -> int:
    """Score every condition, let it answer, and say which margins may be believed; no answer is kept."""
    started, clock = datetime.now(UTC), time.perf_counter()
    if max_new_tokens < 1:
        raise UserError(f"--tokens {max_new_tokens}: an answer that is judged has at least 1")
    out = check_output_folder(out or choose_run_folder(spec.model, ["validate", *defenses], started))
    console = Console(stderr=True)
    judge = judge_options.load_judge(spec.offline, make_notifier(console))
    ready = prepare_setup(spec, defenses, settings, console)
    every = build_conditions(ready.defenses)
    cells = [(attack.name, name) for attack in spec.attacks for name in every]
    try:
        lost = exclude_failed_conditions(find_preflight_failures(ready, every, console), cells)
    except PreflightError as error:
        print_failed_checks(error.checks)
        return 1
    left = [(attack, name) for attack in spec.attacks for name in every if (attack.name, name) not in lost]
    begun = len({one.prefill for one in ready.readouts})
    asked = ready.query_set.queries
    few = sample_queries(asked, 4)
    read = [
        one for sent, name in left for one in ready.session.with_attack(sent).render_queries(every[name], few)
    ]
    prompts = -(-len(asked) * sum(map(len, read)) // len(few))
    judge_options.check_budget(prompts * begun)
    judges = {**RULE_JUDGES, judge_options.name: judge}
    grader = judge if isinstance(judge, ModelJudge) and judge_options.grade else None
    heard: list[ConditionResponses] = []
    usual: dict[str, ConditionResponses] = {}
    rows, worth = [], []
    stopped: KeyboardInterrupt | UserError | None = None
    with make_progress_bar(console) as bar:
        scored = len(left) * len(asked) * len(ready.readouts)
        task = bar.add_task("asking", total=scored + prompts * begun)

        def done(count: int) -> None:
            bar.advance(task, count)

        ready.session.defense_calls.on_progress = make_defense_call_callback(bar, task)
        try:
            for attack, name in left:
                if (attack.name, name) in lost:
                    continue
                bench, defense, undefended = ready.session.with_attack(attack), every[name], every[UNDEFENDED]
                bar.update(task, description=f"asking {name} ({attack.name})")
                try:
                    one = collect_responses(
                        bench, name, defense, asked, ready.readouts, judges, max_new_tokens, done
                    )
                    base = usual.setdefault(attack.name, one)
                    here = compute_validity_rows(one, ready.readouts, judge_options.name, spec.seed)
                    value = rate_response_quality(
                        one,
                        base,
                        bench,
                        undefended,
                        asked,
                        judge_options.name,
                        grader,
                        max_new_tokens,
                        spec.seed,
                    )
                except Exception as error:
                    lost[attack.name, name] = redact_secrets(describe_error(error), defense.secret_texts())
                    if name == UNDEFENDED:
                        for other in every:
                            lost.setdefault((attack.name, other), NO_REFERENCE)
                    continue
                worth.append(value)
                for readout, row in zip(ready.readouts, here, strict=True):
                    if row["n"]:
                        save_validity(bench, defense, readout, judge.name, max_new_tokens, row)
                heard.append(one)
                rows += here
                if isinstance(judge, ModelJudge) and (why := judge.failure_reason):
                    if why == "interrupted":
                        raise KeyboardInterrupt
                    raise UserError(f"the judge gives no more verdicts: {why}")
        except (KeyboardInterrupt, UserError) as error:
            if not heard:
                raise
            stopped = error
    if not heard:
        raise UserError(f"nothing could be scored: {next(iter(lost.values()))}")
    reached = {name: one for name, one in every.items() if any((at, name) not in lost for at, _ in cells)}
    record = {
        "created": started.isoformat(timespec="seconds"),
        "interrupted": stopped is not None,
        "conditions_wanted": len(cells),
        "failed": list_failures(lost),
        **describe_run(ready.session, ready.readouts[0], reached, ready.query_set, ready.split, spec.limit),
        "readouts": [describe_readout(one) for one in ready.readouts],
        **describe_attacks(spec.attacks),
        "judge": {**judge.manifest_entry, "new_tokens": max_new_tokens},
        "rule": TRUST_RULE,
        "notices": ready.notices,
    }
    found = pd.DataFrame(rows)
    record["ranks"] = _rank_conditions(heard, ready, judge_options.name, spec.seed)
    tables = {
        "validity": found,
        "worth": pd.DataFrame(worth),
        "curves": pd.concat(
            [build_calibration_curves(one, ready.readouts, judge_options.name) for one in heard],
            ignore_index=True,
        ),
        "answers": pd.concat([build_verdict_table(one, ready.readouts) for one in heard], ignore_index=True),
    }
    points = _validity_figure_tables(found, heard, ready, judge_options.name)
    record["wall_seconds"] = round(time.perf_counter() - clock, 1)
    save_run(out, Run("validate", record, {**tables, **points}, figures=tuple(points)), console)
    print_validity(found, record)
    print_response_quality(tables["worth"], judge_options.name, max_new_tokens)
    tell = make_notifier(console)
    unjudged = print_unjudged(heard, judge_options.name, tell)
    tell(f"Tables, figures and run.json are in {out}; the answers themselves are not kept")
    print_failures(lost, console)
    if stopped is not None:
        tell(f"Interrupted: {len(heard)} of {record['conditions_wanted']} conditions were finished and kept.")
        if isinstance(stopped, UserError):
            raise stopped
        return 130
    return 1 if unjudged or lost else 0


def _rank_conditions(
    all_responses: Sequence[ConditionResponses], setup: RunSetup, judge_name: str, seed: int
) -> list[dict[str, Any]]:
    """How the conditions rank by refusals, each readout against the text, for each attack."""
    found = []
    for attack in dict.fromkeys(one.attack for one in all_responses):
        here = [one for one in all_responses if one.attack == attack]
        for readout in setup.readouts:
            said = [one.verdicts[readout.prefill][judge_name] for one in here]
            known = np.array([[verdict.is_judged for verdict in one] for one in said]).all(0)
            if len(here) < 3 or not known.any():
                continue
            refused = np.array([[verdict.is_refusal for verdict in one] for one in said])[:, known]
            margins = np.stack([one.score_frames[readout.name]["margin"].to_numpy(float) for one in here])[
                :, known
            ]
            first = here[0].score_frames[readout.name][known]
            is_harmful = first["harmful"].to_numpy(bool)
            says = margins > readout.threshold
            head = {"attack": attack, "readout": readout.name, "conditions": len(here)}
            found.append(head | correlate_refusal_rates(says, refused, first["pair"], is_harmful, seed))
    return found


def _validity_figure_tables(
    validity_table: pd.DataFrame,
    all_responses: Sequence[ConditionResponses],
    setup: RunSetup,
    judge_name: str,
) -> dict[str, pd.DataFrame]:
    """What the figures of each readout are drawn from."""
    drawn: dict[str, pd.DataFrame] = {}
    for readout in setup.readouts:
        said = [verdict for one in all_responses for verdict in one.verdicts[readout.prefill][judge_name]]
        known, refused = make_verdict_masks(said)
        chance = np.concatenate(
            [one.score_frames[readout.name]["p_refuse"].to_numpy(float) for one in all_responses]
        )
        if not known.any():
            continue
        suffix = f"-{readout.name}" if len(setup.readouts) > 1 else ""
        drawn[f"calibration{suffix}"] = compute_calibration_curve(chance[known], refused)
        drawn[f"rates{suffix}"] = validity_table[
            (validity_table["readout"] == readout.name) & (validity_table["n"] > 0)
        ]
    return drawn


@dataclass(frozen=True)
class ConditionResponses:
    """What came of asking all queries under one attack and defense; the answers stay in memory.

    Attributes:
        attack: how they were asked.
        condition: the defense's name in the tables.
        score_frames: readout → its scores.
        responses: the tokens that answers were made to begin with → the answers to each query.
        verdicts: those tokens → judge → its verdicts.
    """

    attack: str
    condition: str
    score_frames: Mapping[str, pd.DataFrame]
    responses: Mapping[tuple[int, ...], Sequence[Sequence[Response]]]
    verdicts: Mapping[tuple[int, ...], Mapping[str, Sequence[Verdict]]]


def collect_responses(
    session: ModelSession,
    condition: str,
    defense: Defense,
    queries: Sequence[Query],
    readouts: Sequence[Readout],
    judges: Mapping[str, Judge],
    max_new_tokens: int,
    on_progress: JudgeProgress = lambda prompts: None,
) -> ConditionResponses:
    """Score the queries by every readout, let the model answer, and have every judge judge.

    Where a readout puts an opener behind prompts, the answers that it is compared with begin with it, too.

    Args:
        session: the model, under an attack.
        condition: of the condition.
        defense: prepared for this model.
        queries: what is asked.
        readouts: with their thresholds.
        judges: by the names of their columns.
        max_new_tokens: new ones of each answer.
        on_progress: told how many more are finished: each query once for every readout, each prompt once for every
            beginning of answers.
    """
    frames = {
        one.name: score_condition(session, condition, defense, queries, one, on_progress) for one in readouts
    }
    said, verdicts = {}, {}
    for begins in {one.prefill: None for one in readouts}:
        said[begins] = generate_responses(
            session, defense, queries, begins, max_new_tokens, on_progress=on_progress
        )
        verdicts[begins] = {
            key: judge_queries(judge, queries, said[begins], defense) for key, judge in judges.items()
        }
    return ConditionResponses(session.attack.name, condition, frames, said, verdicts)


def compute_validity_rows(
    condition_responses: ConditionResponses, readouts: Sequence[Readout], judge_name: str, seed: int
) -> list[dict[str, Any]]:
    """Return a row of `validity.csv` for each readout: how well it agrees with a judge of the text.

    Args:
        condition_responses: the condition.
        readouts: with their thresholds.
        judge_name: whose word is taken for the text's.
        seed: of the bootstrap.
    """
    rows = []
    for readout in readouts:
        known, refused = make_verdict_masks(condition_responses.verdicts[readout.prefill][judge_name])
        head = {
            "attack": condition_responses.attack,
            "defense": condition_responses.condition,
            "readout": readout.name,
        }
        frame = condition_responses.score_frames[readout.name][known]
        row = measure_agreement(
            frame["margin"].to_numpy(float), refused, frame["pair"], readout.threshold, seed
        )
        rows.append(
            head | row | {"coverage": float(frame["coverage"].mean()), "unjudged": int((~known).sum())}
        )
    return rows


def build_calibration_curves(
    condition_responses: ConditionResponses, readouts: Sequence[Readout], judge_name: str
) -> pd.DataFrame:
    """Return the calibration curve of each readout in this condition, a row per bin.

    Args:
        condition_responses: the condition.
        readouts: with their thresholds.
        judge_name: whose word is taken for the text's.
    """
    parts = []
    for readout in readouts:
        known, refused = make_verdict_masks(condition_responses.verdicts[readout.prefill][judge_name])
        chance = condition_responses.score_frames[readout.name]["p_refuse"].to_numpy(float)[known]
        head = {
            "attack": condition_responses.attack,
            "defense": condition_responses.condition,
            "readout": readout.name,
        }
        parts.append(compute_calibration_curve(chance, refused).assign(**head))
    found = pd.concat(parts, ignore_index=True)
    return found[[*head, *(name for name in found if name not in head)]]


def build_verdict_table(condition_responses: ConditionResponses, readouts: Sequence[Readout]) -> pd.DataFrame:
    """Return what is kept of each answer: by whose word it refused, never what it said.

    A row is a query with one beginning of answers, `begins`: the readouts that are compared with those.
    """
    parts = []
    for begins, judges in condition_responses.verdicts.items():
        here = [one for one in readouts if one.prefill == begins]
        kept = condition_responses.score_frames[here[0].name][
            ["query", "pair", "category", "harmful", "attack", "defense"]
        ]
        columns: dict[str, Any] = {"begins": "/".join(one.name for one in here)}
        columns |= {f"refusal_{key}": [one.refusal for one in said] for key, said in judges.items()}
        for readout in here:
            margin = condition_responses.score_frames[readout.name]["margin"]
            columns |= {f"margin_{readout.name}": margin, f"says_{readout.name}": margin > readout.threshold}
        parts.append(kept.assign(**columns))
    return pd.concat(parts, ignore_index=True)


def rate_response_quality(
    condition_responses: ConditionResponses,
    undefended_responses: ConditionResponses,
    session: ModelSession,
    undefended: Defense,
    queries: Sequence[Query],
    judge_name: str,
    grader: ModelJudge | None,
    max_new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Return a row of `worth.csv`: what judges count, and the benign answers against the undefended ones.

    Answers that begin with the fewest words put into the model's mouth are taken.

    Args:
        condition_responses: the condition.
        undefended_responses: the undefended one under the same attack.
        session: the model, under that attack.
        undefended: as a defense.
        queries: what was asked.
        judge_name: whose word decides which queries were complied with.
        grader: grades the answers, if given.
        max_new_tokens: that answers were cut at.
        seed: of the bootstrap.
    """
    prefix = min(condition_responses.responses, key=len)
    counts = compute_judged_rates(
        [query.kind for query in queries],
        *(
            {
                key: np.array([getattr(verdict, what) for verdict in said])
                for key, said in condition_responses.verdicts[prefix].items()
            }
            for what in ("is_refusal", "is_judged")
        ),
    )
    head: dict[str, Any] = {"attack": condition_responses.attack, "defense": condition_responses.condition}
    both = [
        row
        for row, query in enumerate(queries)
        if not query.harmful
        and all(
            _is_compliance(one.verdicts[prefix][judge_name][row])
            for one in (condition_responses, undefended_responses)
        )
        and all(
            _judged_response(one, prefix, judge_name, row).ids
            for one in (condition_responses, undefended_responses)
        )
    ]
    new, old = (
        [_judged_response(one, prefix, judge_name, row) for row in both]
        for one in (condition_responses, undefended_responses)
    )
    length, usual_length = (np.array([len(answer.ids) for answer in side], float) for side in (new, old))
    measures = compare_responses(
        [one.generated_text for one in new],
        [one.generated_text for one in old],
        length,
        usual_length,
        max_new_tokens,
    )
    if both and condition_responses is not undefended_responses:
        shown = session.render_queries(undefended, [queries[row] for row in both])
        prompts = [first.append_prefix(prefix) for first, *_ in shown]
        with undefended.apply_to(session.loaded_model.model):
            means = [
                np.array(
                    [
                        float(one.mean())
                        for one in session.engine.compute_log_probabilities(prompts, [a.ids for a in side])
                    ]
                )
                for side in (new, old)
            ]
        measures = measures.assign(log_likelihood=means[0], log_likelihood_change=means[0] - means[1])
    if grader is not None and both:
        asked = [queries[row].text for row in both]
        grades = [
            np.array(grader.grade_responses([answer.generated_text for answer in side], asked))
            for side in (new, old)
        ]
        there = ~np.isnan(grades[0] + grades[1])
        graded = summarize_quality(
            pd.DataFrame({"grade": grades[0][there], "grade_change": (grades[0] - grades[1])[there]}), seed
        )
        head |= {"n_graded": graded.pop("n_complied")} | graded
    return head | counts | summarize_quality(measures, seed)


def _judged_response(
    condition_responses: ConditionResponses, prefix: tuple[int, ...], judge_name: str, row: int
) -> Response:
    """The answer to a query that its verdict is on."""
    return condition_responses.responses[prefix][row][
        condition_responses.verdicts[prefix][judge_name][row].copy_index
    ]


def _is_compliance(verdict: Verdict) -> bool:
    return verdict.is_judged and not verdict.is_refusal
