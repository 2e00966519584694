"""Several defenses that vote: one margin from the margins of each member, without asking the model again.

All members count from the same threshold, and every way of voting below keeps it: a vote of margins is
positive exactly where the ensemble refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

VOTES: Mapping[str, str] = {
    "mean": "the mean of the members' margins",
    "highest": "the highest: refused where one member refuses",
    "lowest": "the lowest: refused where all members refuse",
    "majority": "the median: refused where most members refuse; the same as the mean for two",
    "fitted": "a weighted mean, its weights fitted to the calibration split (never below 0, adding up to 1)",
}
_RIDGE = 1e-3  # of the mean variance, so that members that always agree have weights at all


@dataclass(frozen=True)
class Board:
    """What the members of possible ensembles say of the same queries, nats above the threshold.

    Attributes:
        names: of the defenses.
        margins: queries × defenses.
        before: of the undefended model.
        is_harmful: class of each query.
    """

    names: tuple[str, ...]
    margins: Float[np.ndarray, "n defenses"]
    before: Float[np.ndarray, " n"]
    is_harmful: Bool[np.ndarray, " n"]


def ways(size: int) -> list[str]:
    """Return the votes that differ for so many members.

    >>> ways(2)
    ['mean', 'highest', 'lowest', 'fitted']
    """
    return [how for how in VOTES if how != "majority" or size > 2]


def vote(
    margins: Float[np.ndarray, "... size"], how: str, weights: Float[np.ndarray, "... size"] | None = None
) -> np.ndarray:
    """Return the margin of an ensemble, nats above the threshold.

    >>> [float(vote(np.array([1.0, -4.0, 0.5]), how)) for how in ("highest", "lowest", "majority")]
    [1.0, -4.0, 0.5]

    Args:
        margins: of the members, nats above the threshold.
        how: one of `VOTES`.
        weights: of the members, for `fitted`.
    """
    if how == "fitted":
        assert weights is not None, "fit() gives them"
        return np.asarray((margins * weights).sum(-1))
    pools: dict[str, Callable[..., Any]]
    pools = {"mean": np.mean, "highest": np.max, "lowest": np.min, "majority": np.median}
    return np.asarray(pools[how](margins, axis=-1))


def fit(board: Board, teams: Int[np.ndarray, "teams size"]) -> Float[np.ndarray, "teams size"]:
    """Return the weights of Fisher's linear discriminant, which separates the classes best.

    Negative ones are set to 0, since a defense is never read upside down, and all are scaled to add up to 1,
    so that the weighted mean counts from the same threshold.

    Args:
        board: of the calibration split.
        teams: places of the members among the board's defenses.
    """
    harmful, benign = board.margins[board.is_harmful], board.margins[~board.is_harmful]
    apart = harmful.mean(0) - benign.mean(0)
    within = sum((side - side.mean(0)).T @ (side - side.mean(0)) for side in (harmful, benign))
    within = np.asarray(within) / max(len(board.is_harmful) - 2, 1)
    of_team = within[teams[:, :, None], teams[:, None, :]]
    ridge = _RIDGE * np.trace(of_team, axis1=1, axis2=2) / teams.shape[1] + 1e-12
    solved = np.linalg.solve(of_team + ridge[:, None, None] * np.eye(teams.shape[1]), apart[teams][..., None])
    weights = np.clip(solved[..., 0], 0, None)
    total = weights.sum(1, keepdims=True)
    return np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / teams.shape[1])
