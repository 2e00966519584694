"""One condition heard out: its margins by every readout, its answers, and what every judge says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.agreement import agreement, reliability
from analysis.answering import Answer, answers, judged
from analysis.bench import Bench
from analysis.judge import Done, Judge, Verdict, judged_and_refused
from analysis.model_judge import ModelJudge
from analysis.queries import Query
from analysis.readout import Readout
from analysis.run import score
from analysis.worth import against, counted, worth
from defenses import Defense


@dataclass(frozen=True)
class Heard:
    """What came of asking all queries under one attack and defense; the answers stay in memory.

    Attributes:
        attack: how they were asked.
        condition: the defense's name in the tables.
        frames: readout → its scores.
        said: the tokens that answers were made to begin with → the answers to each query.
        verdicts: those tokens → judge → its verdicts.
    """

    attack: str
    condition: str
    frames: Mapping[str, pd.DataFrame]
    said: Mapping[tuple[int, ...], Sequence[Sequence[Answer]]]
    verdicts: Mapping[tuple[int, ...], Mapping[str, Sequence[Verdict]]]


def hear(
    bench: Bench,
    name: str,
    defense: Defense,
    queries: Sequence[Query],
    readouts: Sequence[Readout],
    judges: Mapping[str, Judge],
    tokens: int,
    done: Done = lambda prompts: None,
) -> Heard:
    """Score the queries by every readout, let the model answer, and have every judge judge.

    Where a readout puts an opener behind prompts, the answers that it is compared with begin with it, too.

    Args:
        bench: the model, under an attack.
        name: of the condition.
        defense: prepared for this model.
        queries: what is asked.
        readouts: with their thresholds.
        judges: by the names of their columns.
        tokens: new ones of each answer.
        done: told how many more are finished: each query once for every readout, each prompt once for every
            beginning of answers.
    """
    frames = {one.name: score(bench, name, defense, queries, one, done) for one in readouts}
    said, verdicts = {}, {}
    for begins in {one.begins: None for one in readouts}:
        said[begins] = answers(bench, defense, queries, begins, tokens, done=done)
        verdicts[begins] = {
            key: judged(judge, queries, said[begins], defense) for key, judge in judges.items()
        }
    return Heard(bench.attack.name, name, frames, said, verdicts)


def agreements(heard: Heard, readouts: Sequence[Readout], judge: str, seed: int) -> list[dict[str, Any]]:
    """Return a row of `validity.csv` for each readout: how well it agrees with a judge of the text.

    Args:
        heard: the condition.
        readouts: with their thresholds.
        judge: whose word is taken for the text's.
        seed: of the bootstrap.
    """
    rows = []
    for readout in readouts:
        known, refused = judged_and_refused(heard.verdicts[readout.begins][judge])
        head = {"attack": heard.attack, "defense": heard.condition, "readout": readout.name}
        frame = heard.frames[readout.name][known]
        row = agreement(frame["margin"].to_numpy(float), refused, frame["pair"], readout.threshold, seed)
        rows.append(
            head | row | {"coverage": float(frame["coverage"].mean()), "unjudged": int((~known).sum())}
        )
    return rows


def curves(heard: Heard, readouts: Sequence[Readout], judge: str) -> pd.DataFrame:
    """Return the calibration curve of each readout in this condition, a row per bin.

    Args:
        heard: the condition.
        readouts: with their thresholds.
        judge: whose word is taken for the text's.
    """
    parts = []
    for readout in readouts:
        known, refused = judged_and_refused(heard.verdicts[readout.begins][judge])
        chance = heard.frames[readout.name]["p_refuse"].to_numpy(float)[known]
        head = {"attack": heard.attack, "defense": heard.condition, "readout": readout.name}
        parts.append(reliability(chance, refused).assign(**head))
    found = pd.concat(parts, ignore_index=True)
    return found[[*head, *(name for name in found if name not in head)]]


def table(heard: Heard, readouts: Sequence[Readout]) -> pd.DataFrame:
    """Return what is kept of each answer: by whose word it refused, never what it said.

    A row is a query with one beginning of answers, `begins`: the readouts that are compared with those.
    """
    parts = []
    for begins, judges in heard.verdicts.items():
        here = [one for one in readouts if one.begins == begins]
        kept = heard.frames[here[0].name][["query", "pair", "category", "harmful", "attack", "defense"]]
        columns: dict[str, Any] = {"begins": "/".join(one.name for one in here)}
        columns |= {f"refusal_{key}": [one.refusal for one in said] for key, said in judges.items()}
        for readout in here:
            margin = heard.frames[readout.name]["margin"]
            columns |= {f"margin_{readout.name}": margin, f"says_{readout.name}": margin > readout.threshold}
        parts.append(kept.assign(**columns))
    return pd.concat(parts, ignore_index=True)


def worths(
    heard: Heard,
    usual: Heard,
    bench: Bench,
    undefended: Defense,
    queries: Sequence[Query],
    judge: str,
    grader: ModelJudge | None,
    tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Return a row of `worth.csv`: what judges count, and the benign answers against the undefended ones.

    Answers that begin with the fewest words put into the model's mouth are taken.

    Args:
        heard: the condition.
        usual: the undefended one under the same attack.
        bench: the model, under that attack.
        undefended: as a defense.
        queries: what was asked.
        judge: whose word decides which queries were complied with.
        grader: grades the answers, if given.
        tokens: that answers were cut at.
        seed: of the bootstrap.
    """
    prefix = min(heard.said, key=len)
    counts = counted(
        [query.kind for query in queries],
        *(
            {
                key: np.array([getattr(verdict, what) for verdict in said])
                for key, said in heard.verdicts[prefix].items()
            }
            for what in ("refused", "judged")
        ),
    )
    head: dict[str, Any] = {"attack": heard.attack, "defense": heard.condition}
    both = [
        row
        for row, query in enumerate(queries)
        if not query.harmful
        and all(_complied(one.verdicts[prefix][judge][row]) for one in (heard, usual))
        and all(_said(one, prefix, judge, row).ids for one in (heard, usual))
    ]
    new, old = ([_said(one, prefix, judge, row) for row in both] for one in (heard, usual))
    length, usual_length = (np.array([len(answer.ids) for answer in side], float) for side in (new, old))
    measures = against([one.own for one in new], [one.own for one in old], length, usual_length, tokens)
    if both and heard is not usual:
        shown = bench.every_prompt(undefended, [queries[row] for row in both])
        prompts = [first.followed(prefix) for first, *_ in shown]
        with undefended.armed(bench.loaded.model):
            means = [
                np.array(
                    [float(one.mean()) for one in bench.engine.likelihoods(prompts, [a.ids for a in side])]
                )
                for side in (new, old)
            ]
        measures = measures.assign(log_likelihood=means[0], log_likelihood_change=means[0] - means[1])
    if grader is not None and both:
        asked = [queries[row].text for row in both]
        grades = [np.array(grader.graded([answer.own for answer in side], asked)) for side in (new, old)]
        there = ~np.isnan(grades[0] + grades[1])
        graded = worth(
            pd.DataFrame({"grade": grades[0][there], "grade_change": (grades[0] - grades[1])[there]}), seed
        )
        head |= {"n_graded": graded.pop("n_complied")} | graded
    return head | counts | worth(measures, seed)


def _said(heard: Heard, prefix: tuple[int, ...], judge: str, row: int) -> Answer:
    """The answer to a query that its verdict is on."""
    return heard.said[prefix][row][heard.verdicts[prefix][judge][row].reading]


def _complied(verdict: Verdict) -> bool:
    return verdict.judged and not verdict.refused
