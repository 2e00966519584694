"""In which batches prompts are read: what they begin with alike, and like lengths together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise, takewhile

# Tokens in one batch of suffixes. On a CPU more only overflow its caches (512 to 1,024 are alike).
_TOKENS_PER_BATCH = {"cpu": 512, "cuda": 16384}
# Of all tokens, the share from which it is worth to lay rows by what they begin with, not by length.
_MIN_MERGED_SHARE = 0.1
_ATTENTION_COST = 0.125  # of a token's cost, what it costs to attend to it once more in a row that shares it


def count_shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, leaving each at least one token of its own.

    >>> shared_prefix([[1, 2, 3], [1, 2, 4, 5]]), shared_prefix([[1, 2], [1, 2, 3]]), shared_prefix([[1]])
    (2, 1, 0)
    """
    rows = [list(prompt) for prompt in prompts]
    # The two that differ soonest, in the order of lists.
    return min(count_common_prefix(min(rows), max(rows)), min(map(len, rows)) - 1)


def count_common_prefix(tokens: Sequence[int], other_tokens: Sequence[int]) -> int:
    """Return how many tokens two rows begin with alike.

    >>> same([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, other_tokens, strict=False)))


def plan_batches(
    suffixes: Sequence[Sequence[int]], is_packed: bool, device: str, get_batch_size: Callable[[], int | None]
) -> Iterator[list[int]]:
    """Yield rows in batches, longest first: like lengths lie together, and too little memory shows at once.

    In a line, rows that begin alike lie together instead, where that saves much: what several of them begin
    with is computed once.

    >>> list(batches([[1], [1, 2, 3], [1, 2]], False, "cpu", lambda: 2))
    [[1, 2], [0]]

    Args:
        suffixes: token ids.
        is_packed: whether rows lie behind each other in one line, not padded beside each other.
        device: cpu or cuda.
        get_batch_size: asked before each batch: rows in it; None lets the number of tokens decide.
    """
    order = sorted(range(len(suffixes)), key=lambda row: -len(suffixes[row]))
    cost = [len(suffixes[row]) for row in order]
    if is_packed:
        alike = sorted(order, key=lambda row: tuple(suffixes[row]))
        begun = [0, *(count_common_prefix(suffixes[one], suffixes[other]) for one, other in pairwise(alike))]
        if sum(begun) > _MIN_MERGED_SHARE * sum(cost):
            order = alike
            cost = [len(suffixes[row]) - known for row, known in zip(alike, begun, strict=True)]
    most = _TOKENS_PER_BATCH.get(device, _TOKENS_PER_BATCH["cpu"])
    while order:
        tokens = accumulate(cost if is_packed else [cost[0]] * len(cost))  # padded to the longest
        # Attention sees every row whole, whatever is computed once.
        longest = accumulate((len(suffixes[row]) for row in order), max)
        seen = (_ATTENTION_COST * rows * length for rows, length in enumerate(longest, 1))
        within = takewhile(lambda two: max(two) <= most, zip(tokens, seen, strict=True))
        number = get_batch_size() or max(1, sum(1 for _ in within))
        yield order[:number]
        order, cost = order[number:], cost[number:]
