"""Batches of prompts: which rows run in one forward pass, and in which form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from itertools import pairwise, takewhile

# Tokens per batch of suffixes. On a CPU, more only overflow its caches; 512 to 1,024 are equally fast.
_TOKENS_PER_BATCH = {"cpu": 512, "cuda": 16384}
# Minimum share of tokens saved for which rows are ordered by their first tokens instead of by length.
_MIN_MERGED_SHARE = 0.1
# Cost of attending to a merged token from one more row, as a share of the cost of computing a token.
_ATTENTION_COST = 0.125


class BatchForm(StrEnum):
    """How the rows of a batch lie in a forward pass, the fastest form first; all give the same logits."""

    PACKED = "packed"  # one sequence of tokens, which attends to one shared prefix
    REPEATED = "repeated"  # padded to one length, behind a shared prefix that is repeated for each row
    PADDED = "padded"  # whole prompts, padded to one length
    EQUAL = "equal"  # whole prompts of equal length
    SINGLE = (
        "single"  # one whole prompt: some quantized models round with a scale that the whole batch decides
    )


class CacheUse(StrEnum):
    """How transformers generates with its own cache, the fastest way first; all give the same responses."""

    PADDED = "batches of padded prompts"
    EQUAL = "batches of prompts of equal length"
    NONE = "a whole forward pass for every token"


def count_shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens with which all prompts start, leaving at least one token of each prompt.

    >>> count_shared_prefix([[1, 2, 3], [1, 2, 4, 5]])
    2
    >>> count_shared_prefix([[1, 2], [1, 2, 3]]), count_shared_prefix([[1]])
    (1, 0)
    """
    rows = [list(prompt) for prompt in prompts]
    # In lexicographic order, the first and the last row have the shortest common prefix.
    return min(count_common_prefix(min(rows), max(rows)), min(map(len, rows)) - 1)


def count_common_prefix(tokens: Sequence[int], other_tokens: Sequence[int]) -> int:
    """Return the number of tokens with which both rows start.

    >>> count_common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, other_tokens, strict=False)))


def plan_batches(
    suffixes: Sequence[Sequence[int]], is_packed: bool, device: str, get_batch_size: Callable[[], int | None]
) -> Iterator[list[int]]:
    """Yield batches of row indices.

    Rows are ordered by length, longest first: a batch has rows of similar length, and an out-of-memory error
    shows at once. Packed rows are ordered by their tokens instead if that saves many: tokens with which
    several rows of a batch start are computed once.

    >>> list(plan_batches([[1], [1, 2, 3], [1, 2]], False, "cpu", lambda: 2))
    [[1, 2], [0]]

    Args:
        suffixes: token ids.
        is_packed: whether rows are packed into one sequence, not padded to one length.
        device: cpu or cuda.
        get_batch_size: called before each batch; returns its number of rows, or None to let the number of
            tokens decide.
    """
    order, costs = order_rows(suffixes, is_packed)
    lengths = [len(suffixes[row]) for row in order]
    max_tokens = _TOKENS_PER_BATCH.get(device, _TOKENS_PER_BATCH["cpu"])
    start = 0
    while start < len(order):
        size = get_batch_size() or _count_fitting_rows(costs[start:], lengths[start:], is_packed, max_tokens)
        yield order[start : start + size]
        start += size


def order_rows(suffixes: Sequence[Sequence[int]], is_packed: bool) -> tuple[list[int], list[int]]:
    """Return the order in which rows are batched, and the number of tokens that each adds to those before it.

    Args:
        suffixes: token ids.
        is_packed: whether tokens with which several rows of a batch start are computed once.
    """
    by_length = sorted(range(len(suffixes)), key=lambda row: -len(suffixes[row]))
    lengths = [len(suffixes[row]) for row in by_length]
    if is_packed:
        by_tokens = sorted(by_length, key=lambda row: tuple(suffixes[row]))
        merged = [0, *(count_common_prefix(suffixes[a], suffixes[b]) for a, b in pairwise(by_tokens))]
        if sum(merged) > _MIN_MERGED_SHARE * sum(lengths):
            return by_tokens, [len(suffixes[row]) - n for row, n in zip(by_tokens, merged, strict=True)]
    return by_length, lengths


def _count_fitting_rows(
    costs: Sequence[int], lengths: Sequence[int], is_packed: bool, max_tokens: int
) -> int:
    """Return the number of first rows that fit into a batch of that many tokens, at least one.

    Two sums are bounded: computed tokens, where padded rows all count as long as the longest; and attention,
    in which every row has its full length, also where its tokens are merged with those of other rows.
    """
    n_rows = computed_tokens = longest = 0
    for cost, length in zip(costs, lengths, strict=True):
        computed_tokens += cost if is_packed else costs[0]
        longest = max(longest, length)
        if max(computed_tokens, _ATTENTION_COST * (n_rows + 1) * longest) > max_tokens:
            break
        n_rows += 1
    return max(1, n_rows)
