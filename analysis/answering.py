"""What a defended model goes on to say, and what a judge says of it; the answers themselves are not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from analysis import generation
from analysis.judge import JUDGES, Verdict
from analysis.queries import Query
from analysis.run import Bench
from defenses import Defense

TOKENS = 48  # of each answer; a refusal shows in its first sentences


def verdicts(
    bench: Bench,
    defense: Defense,
    queries: Sequence[Query],
    judge: str,
    tokens: int = TOKENS,
    done: Callable[[int], None] = lambda queries: None,
) -> list[Verdict]:
    """Return a judge's verdict on the greedy answer to each query under a defense.

    Where a defense reads several copies of a query, most of the answers decide, as its authors do.

    Args:
        bench: the model, and how queries are sent.
        defense: prepared for this model.
        queries: what is asked.
        judge: of `JUDGES`.
        tokens: new tokens of each answer.
        done: told how many more prompts are answered.
    """
    tokenizer = bench.loaded.tokenizer
    prompts = [bench.prompts(defense, query) for query in queries]
    owner = [query for query, readings in zip(queries, prompts, strict=True) for _ in readings]
    flat = [prompt.ids for readings in prompts for prompt in readings]

    def settled(answer: list[int]) -> bool:
        # More words can turn what the patterns say; a string that was found stays found.
        return judge == "keywords" and judged(answer, "").refused

    def judged(answer: list[int], request: str) -> Verdict:
        return JUDGES[judge](tokenizer.decode(answer, skip_special_tokens=True), request)

    with defense.armed(bench.loaded.model):
        answers = generation.answers(bench.engine, flat, tokens, tokenizer.eos_token_id, settled, done)
    found: dict[str, list[Verdict]] = {query.id: [] for query in queries}
    for query, answer in zip(owner, answers, strict=True):
        found[query.id].append(judged(answer, query.text))
    return [_most(found[query.id]) for query in queries]


def _most(verdicts: list[Verdict]) -> Verdict:
    """The first verdict of the side that most are on; a tie is not refused."""
    refused = sum(verdict.refused for verdict in verdicts) > len(verdicts) / 2
    return next(verdict for verdict in verdicts if verdict.refused == refused)
