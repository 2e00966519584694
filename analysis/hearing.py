"""One condition heard out: its margins by every readout, its answers, and what every judge says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.agreement import measure_agreement, compute_calibration_curve
from analysis.answering import Response, generate_responses, judge_queries
from analysis.bench import ModelSession
from analysis.judge import JudgeProgress, Judge, Verdict, make_verdict_masks
from analysis.model_judge import ModelJudge
from analysis.queries import Query
from analysis.readout import Readout
from analysis.run import score_condition
from analysis.worth import compare_responses, compute_judged_rates, summarize_quality
from defenses import Defense


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
    frames = {one.name: score_condition(session, condition, defense, queries, one, on_progress) for one in readouts}
    said, verdicts = {}, {}
    for begins in {one.prefill: None for one in readouts}:
        said[begins] = generate_responses(session, defense, queries, begins, max_new_tokens, on_progress=on_progress)
        verdicts[begins] = {
            key: judge_queries(judge, queries, said[begins], defense) for key, judge in judges.items()
        }
    return ConditionResponses(session.attack.name, condition, frames, said, verdicts)


def compute_validity_rows(condition_responses: ConditionResponses, readouts: Sequence[Readout], judge_name: str, seed: int) -> list[dict[str, Any]]:
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
        head = {"attack": condition_responses.attack, "defense": condition_responses.condition, "readout": readout.name}
        frame = condition_responses.score_frames[readout.name][known]
        row = measure_agreement(frame["margin"].to_numpy(float), refused, frame["pair"], readout.threshold, seed)
        rows.append(
            head | row | {"coverage": float(frame["coverage"].mean()), "unjudged": int((~known).sum())}
        )
    return rows


def build_calibration_curves(condition_responses: ConditionResponses, readouts: Sequence[Readout], judge_name: str) -> pd.DataFrame:
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
        head = {"attack": condition_responses.attack, "defense": condition_responses.condition, "readout": readout.name}
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
        kept = condition_responses.score_frames[here[0].name][["query", "pair", "category", "harmful", "attack", "defense"]]
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
        and all(_is_compliance(one.verdicts[prefix][judge_name][row]) for one in (condition_responses, undefended_responses))
        and all(_judged_response(one, prefix, judge_name, row).ids for one in (condition_responses, undefended_responses))
    ]
    new, old = ([_judged_response(one, prefix, judge_name, row) for row in both] for one in (condition_responses, undefended_responses))
    length, usual_length = (np.array([len(answer.ids) for answer in side], float) for side in (new, old))
    measures = compare_responses([one.generated_text for one in new], [one.generated_text for one in old], length, usual_length, max_new_tokens)
    if both and condition_responses is not undefended_responses:
        shown = session.render_queries(undefended, [queries[row] for row in both])
        prompts = [first.append_prefix(prefix) for first, *_ in shown]
        with undefended.apply_to(session.loaded_model.model):
            means = [
                np.array(
                    [float(one.mean()) for one in session.engine.compute_log_probabilities(prompts, [a.ids for a in side])]
                )
                for side in (new, old)
            ]
        measures = measures.assign(log_likelihood=means[0], log_likelihood_change=means[0] - means[1])
    if grader is not None and both:
        asked = [queries[row].text for row in both]
        grades = [np.array(grader.grade_responses([answer.generated_text for answer in side], asked)) for side in (new, old)]
        there = ~np.isnan(grades[0] + grades[1])
        graded = summarize_quality(
            pd.DataFrame({"grade": grades[0][there], "grade_change": (grades[0] - grades[1])[there]}), seed
        )
        head |= {"n_graded": graded.pop("n_complied")} | graded
    return head | counts | summarize_quality(measures, seed)


def _judged_response(condition_responses: ConditionResponses, prefix: tuple[int, ...], judge_name: str, row: int) -> Response:
    """The answer to a query that its verdict is on."""
    return condition_responses.responses[prefix][row][condition_responses.verdicts[prefix][judge_name][row].copy_index]


def _is_compliance(verdict: Verdict) -> bool:
    return verdict.is_judged and not verdict.is_refusal
