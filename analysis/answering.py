"""What a defended model goes on to say, and what a judge says of it; the answers themselves are not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from analysis import generation, scoring
from analysis.bench import ModelSession
from analysis.judge import Judge, Verdict
from analysis.queries import Query
from analysis.rendering import redact_secrets
from defenses import Defense

DEFAULT_MAX_NEW_TOKENS = 48  # of each answer; a refusal shows in its first sentences


@dataclass(frozen=True)
class Response:
    """What a model said.

    Attributes:
        ids: its tokens, the prefix that it was made to begin with not among them.
        text: as a reader sees it, the prefix included.
        generated_text: the text without the prefix.
    """

    ids: tuple[int, ...]
    text: str
    generated_text: str


def generate_responses(
    session: ModelSession,
    defense: Defense,
    queries: Sequence[Query],
    response_prefix: tuple[int, ...] = (),
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    should_stop: Callable[[str], bool] | None = None,
    on_progress: Callable[[int], None] = lambda queries: None,
) -> list[list[Response]]:
    """Return the greedy answers to each query under a defense, one for each of its readings.

    Args:
        session: the model, and how queries are sent.
        defense: prepared for this model.
        queries: what is asked.
        response_prefix: token ids that every answer is made to begin with.
        max_new_tokens: new ones at most, of each answer.
        should_stop: told an answer so far, says whether the rest no longer matters.
        on_progress: told how many more prompts are answered.
    """
    tokenizer = session.loaded_model.tokenizer
    prompts = session.render_queries(defense, queries)
    flat = [prompt.append_prefix(response_prefix) for readings in prompts for prompt in readings]
    begun = [bool(prompt.prefill) for readings in prompts for prompt in readings]

    def text(answer: Sequence[int], begun: bool) -> str:
        # Of an answer that is begun only what the model itself says is heard.
        return str(tokenizer.decode([*(() if begun else response_prefix), *answer], skip_special_tokens=True))

    over = (lambda answer: should_stop(text(answer, any(begun)))) if should_stop is not None else lambda answer: False
    if defense.logit_blend():
        said = _generate_blended(session, defense, flat, max_new_tokens, on_progress)
    else:
        with defense.apply_to(session.loaded_model.model):
            said = generation.generate_token_ids(session.engine, flat, max_new_tokens, tokenizer.eos_token_id, over, on_progress)
    left = iter(
        Response(tuple(ids), text(ids, by_others), str(tokenizer.decode(ids, skip_special_tokens=True)))
        for ids, by_others in zip(said, begun, strict=True)
    )
    return [[next(left) for _ in readings] for readings in prompts]


def _generate_blended(
    session: ModelSession,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    on_progress: Callable[[int], None],
) -> list[list[int]]:
    """Answers whose first token all models of a blend choose together, as it is read; the rest is one's."""
    stop = session.loaded_model.tokenizer.eos_token_id
    chosen = scoring.iterate_defended_logits(session.engine, session.loaded_model, defense, prompts, _select_top_token)
    first = [int(token) for _, tokens in chosen for token in tokens]
    going = [row for row, token in enumerate(first) if token != stop] if max_new_tokens > 1 else []
    longer = [(*prompts[row], first[row]) for row in going]
    on_progress(len(prompts) - len(going))
    with defense.apply_to(session.loaded_model.model):
        rest = generation.generate_token_ids(session.engine, longer, max_new_tokens - 1, stop, on_progress=on_progress) if longer else []
    behind = dict(zip(going, rest, strict=True))
    return [[] if token == stop else [token, *behind.get(row, [])] for row, token in enumerate(first)]


def _select_top_token(logits: Float[Tensor, "rows vocab"]) -> Int[Tensor, "rows 1"]:
    return logits.argmax(1, keepdim=True)


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
    said = generate_responses(session, defense, queries, response_prefix, max_new_tokens, judge.is_certain_refusal, on_progress)
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
    texts = [redact_secrets(answer.text, defense.secret_texts()) for readings in responses for answer in readings]
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
