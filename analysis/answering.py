"""What a defended model goes on to say, and what a judge says of it; the answers themselves are not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from analysis import generation, scoring
from analysis.bench import Bench
from analysis.judge import Judge, Verdict
from analysis.queries import Query
from analysis.rendering import redact
from defenses import Defense

TOKENS = 48  # of each answer; a refusal shows in its first sentences


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        ids: its tokens, the prefix that it was made to begin with not among them.
        text: as a reader sees it, the prefix included.
        own: the text without the prefix.
    """

    ids: tuple[int, ...]
    text: str
    own: str


def answers(
    bench: Bench,
    defense: Defense,
    queries: Sequence[Query],
    prefix: tuple[int, ...] = (),
    tokens: int = TOKENS,
    settled: Callable[[str], bool] | None = None,
    done: Callable[[int], None] = lambda queries: None,
) -> list[list[Answer]]:
    """Return the greedy answers to each query under a defense, one for each of its readings.

    Args:
        bench: the model, and how queries are sent.
        defense: prepared for this model.
        queries: what is asked.
        prefix: token ids that every answer is made to begin with.
        tokens: new ones at most, of each answer.
        settled: told an answer so far, says whether the rest no longer matters.
        done: told how many more prompts are answered.
    """
    tokenizer = bench.loaded.tokenizer
    prompts = bench.every_prompt(defense, queries)
    flat = [prompt.followed(prefix) for readings in prompts for prompt in readings]
    begun = [bool(prompt.begun) for readings in prompts for prompt in readings]

    def text(answer: Sequence[int], begun: bool) -> str:
        # Of an answer that is begun only what the model itself says is heard.
        return str(tokenizer.decode([*(() if begun else prefix), *answer], skip_special_tokens=True))

    over = (lambda answer: settled(text(answer, any(begun)))) if settled is not None else lambda answer: False
    if defense.blend():
        said = _blended(bench, defense, flat, tokens, done)
    else:
        with defense.armed(bench.loaded.model):
            said = generation.answers(bench.engine, flat, tokens, tokenizer.eos_token_id, over, done)
    left = iter(
        Answer(tuple(ids), text(ids, by_others), str(tokenizer.decode(ids, skip_special_tokens=True)))
        for ids, by_others in zip(said, begun, strict=True)
    )
    return [[next(left) for _ in readings] for readings in prompts]


def _blended(
    bench: Bench,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    done: Callable[[int], None],
) -> list[list[int]]:
    """Answers whose first token all models of a blend choose together, as it is read; the rest is one's."""
    stop = bench.loaded.tokenizer.eos_token_id
    chosen = scoring.batches(bench.engine, bench.loaded, defense, prompts, _likeliest)
    first = [int(token) for _, tokens in chosen for token in tokens]
    going = [row for row, token in enumerate(first) if token != stop] if tokens > 1 else []
    longer = [(*prompts[row], first[row]) for row in going]
    done(len(prompts) - len(going))
    with defense.armed(bench.loaded.model):
        rest = generation.answers(bench.engine, longer, tokens - 1, stop, done=done) if longer else []
    behind = dict(zip(going, rest, strict=True))
    return [[] if token == stop else [token, *behind.get(row, [])] for row, token in enumerate(first)]


def _likeliest(logits: Float[Tensor, "rows vocab"]) -> Int[Tensor, "rows 1"]:
    return logits.argmax(1, keepdim=True)


def verdicts(
    bench: Bench,
    defense: Defense,
    queries: Sequence[Query],
    judge: Judge,
    prefix: tuple[int, ...] = (),
    tokens: int = TOKENS,
    done: Callable[[int], None] = lambda queries: None,
) -> list[Verdict]:
    """Return a judge's verdict on the greedy answer to each query; an answer ends once it surely refuses.

    So of these verdicts only whether they refuse is sure, not whether wholly or in part.

    Args:
        bench: the model, and how queries are sent.
        defense: prepared for this model.
        queries: what is asked.
        judge: of the answers.
        prefix: token ids that every answer is made to begin with.
        tokens: new ones at most, of each answer.
        done: told how many more prompts are answered.
    """
    said = answers(bench, defense, queries, prefix, tokens, judge.settled, done)
    return judged(judge, queries, said, defense)


def judged(
    judge: Judge,
    queries: Sequence[Query],
    said: Sequence[Sequence[Answer]],
    defense: Defense,
    done: Callable[[int], None] = lambda answers: None,
) -> list[Verdict]:
    """Return a judge's verdict for each query: where it has several answers, what the defense goes by.

    Args:
        judge: of the answers.
        queries: what was asked.
        said: the answers to each.
        defense: under which it was said; an answer that repeats its secret is judged without it.
        done: told how many more answers are judged.
    """
    texts = [redact(answer.text, defense.secrets()) for readings in said for answer in readings]
    requests = [query.text for query, readings in zip(queries, said, strict=True) for _ in readings]
    left = iter(judge.verdicts(texts, requests, done))
    return [_pooled([next(left) for _ in readings], defense.pool) for readings in said]


def _pooled(verdicts: list[Verdict], pool: str) -> Verdict:
    """The first verdict of the side that counts, with its place: that of most, or any that refuses.

    A tie is not refused.
    """
    known = [(place, verdict) for place, verdict in enumerate(verdicts) if verdict.judged]
    enough = 0 if pool == "max" else len(known) / 2
    refused = sum(verdict.refused for _, verdict in known) > enough
    found = (replace(verdict, reading=place) for place, verdict in known if verdict.refused == refused)
    return next(found, verdicts[0])
