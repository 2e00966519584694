"""What a defended model goes on to say, and what a judge says of it; the answers themselves are not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from analysis.datasets.queries import Query
from analysis.models.chat_template import redact_secrets
from analysis.models.session import DEFAULT_MAX_NEW_TOKENS, ModelSession, generate_responses
from defenses.contract import Defense

if TYPE_CHECKING:
    from analysis.models.session import Response


def generate_verdicts(
    session: ModelSession,
    defense: Defense,
    queries: Sequence[Query],
    judge: Judge,
    response_prefix: tuple[int, ...] = (),
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    on_progress: Callable[[int], None] = lambda queries: None,
) -> list[Verdict]:
    """Return a judge's verdict on the greedy answer to each query; an answer ends once it surely refuses.

    So of these verdicts only whether they refuse is sure, not whether wholly or in part.

    Args:
        session: the model, and how queries are sent.
        defense: prepared for this model.
        queries: what is asked.
        judge: of the answers.
        response_prefix: token ids that every answer is made to begin with.
        max_new_tokens: new ones at most, of each answer.
        on_progress: told how many more prompts are answered.
    """
    said = generate_responses(
        session, defense, queries, response_prefix, max_new_tokens, judge.is_certain_refusal, on_progress
    )
    return judge_queries(judge, queries, said, defense)


def judge_queries(
    judge: Judge,
    queries: Sequence[Query],
    responses: Sequence[Sequence[Response]],
    defense: Defense,
    on_progress: Callable[[int], None] = lambda answers: None,
) -> list[Verdict]:
    """Return a judge's verdict for each query: where it has several answers, what the defense goes by.

    Args:
        judge: of the answers.
        queries: what was asked.
        responses: the answers to each.
        defense: under which it was said; an answer that repeats its secret is judged without it.
        on_progress: told how many more answers are judged.
    """
    texts = [
        redact_secrets(answer.text, defense.secret_texts()) for readings in responses for answer in readings
    ]
    requests = [query.text for query, readings in zip(queries, responses, strict=True) for _ in readings]
    left = iter(judge.judge_responses(texts, requests, on_progress))
    return [_pool_verdicts([next(left) for _ in readings], defense.pool) for readings in responses]


def _pool_verdicts(verdicts: list[Verdict], pool: str) -> Verdict:
    """The first verdict of the side that counts, with its place: that of most, or any that refuses.

    A tie is not refused.
    """
    known = [(place, verdict) for place, verdict in enumerate(verdicts) if verdict.is_judged]
    enough = 0 if pool == "max" else len(known) / 2
    refused = sum(verdict.is_refusal for _, verdict in known) > enough
    found = (replace(verdict, copy_index=place) for place, verdict in known if verdict.is_refusal == refused)
    return next(found, verdicts[0])


RefusalKind = Literal["full", "partial", "none", "unjudged"]
REFUSAL_KINDS: tuple[RefusalKind, ...] = ("full", "partial", "none")  # of verdicts that were given
JudgeProgress = Callable[[int], None]


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Attributes:
        refusal: full; partial (some of it is refused, or it is answered behind a refusal); none; unjudged
            where the judge gave no verdict, or there is no answer to judge.
        evidence: the words by which it was judged; empty where nothing was found; why there is no verdict.
        copy_index: which of several answers it is the verdict on.
    """

    refusal: RefusalKind
    evidence: str = ""
    copy_index: int = field(default=0, repr=False)

    @property
    def is_refusal(self) -> bool:
        """Whether at least a part was refused."""
        return self.refusal in ("full", "partial")

    @property
    def is_judged(self) -> bool:
        """Whether there is a verdict at all."""
        return self.refusal != "unjudged"


def make_verdict_masks(
    verdicts: Sequence[Verdict],
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " judged"]]:
    """Return which answers have a verdict, and which of those refuse.

    >>> make_verdict_masks([Verdict("full"), Verdict("unjudged"), Verdict("none")])
    (array([ True, False,  True]), array([ True, False]))
    """
    known = np.array([verdict.is_judged for verdict in verdicts])
    return known, np.array([verdict.is_refusal for verdict in verdicts])[known]


@runtime_checkable
class Judge(Protocol):
    """What says of answers whether they refuse.

    Attributes:
        name: as in `--judge`, a model's own name behind it.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def manifest_entry(self) -> dict[str, object]:
        """Return what a verdict depends on, for run.json."""
        ...

    def is_certain_refusal(self, partial_response: str) -> bool:
        """Return whether an answer that begins so refuses, however it goes on."""
        ...

    def judge_responses(
        self, responses: Sequence[str], queries: Sequence[str], on_progress: JudgeProgress
    ) -> list[Verdict]:
        """Return a verdict on each answer, told what was asked; `done` hears of each."""
        ...


@dataclass(frozen=True)
class RuleJudge:
    """A judge that needs no model and reads one answer at a time.

    Attributes:
        name: as in `--judge`.
        judge_response: answer, request → verdict.
        is_certain_refusal: see `Judge`.
    """

    name: str
    judge_response: Callable[[str, str], Verdict]
    is_certain_refusal: Callable[[str], bool]

    @property
    def manifest_entry(self) -> dict[str, object]:
        """What a verdict depends on, for run.json."""
        return {"name": self.name}

    def judge_responses(
        self,
        responses: Sequence[str],
        queries: Sequence[str],
        on_progress: JudgeProgress = lambda count: None,
    ) -> list[Verdict]:
        """Return a verdict on each answer."""
        found = [self.judge_response(*one) for one in zip(responses, queries, strict=True)]
        on_progress(len(found))
        return found
