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

VOTE_RULES: Mapping[str, str] = {
    "mean": "the mean of the members' margins",
    "highest": "the highest: refused where one member refuses",
    "lowest": "the lowest: refused where all members refuse",
    "majority": "the median: refused where most members refuse; the same as the mean for two",
    "fitted": "a weighted mean, its weights fitted to the calibration split (never below 0, adding up to 1)",
}
_RIDGE_FACTOR = 1e-3  # of the mean variance, so that members that always agree have weights at all


@dataclass(frozen=True)
class MarginTable:
    """What the members of possible ensembles say of the same queries, nats above the threshold.

    Attributes:
        condition_names: of the defenses.
        margins: queries × defenses.
        undefended_margins: of the undefended model.
        is_harmful: class of each query.
    """

    condition_names: tuple[str, ...]
    margins: Float[np.ndarray, "n defenses"]
    undefended_margins: Float[np.ndarray, " n"]
    is_harmful: Bool[np.ndarray, " n"]


def list_vote_rules(team_size: int) -> list[str]:
    """Return the votes that differ for so many members.

    >>> ways(2)
    ['mean', 'highest', 'lowest', 'fitted']
    """
    return [how for how in VOTE_RULES if how != "majority" or team_size > 2]


def combine_margins(
    margins: Float[np.ndarray, "... size"], rule: str, weights: Float[np.ndarray, "... size"] | None = None
) -> np.ndarray:
    """Return the margin of an ensemble, nats above the threshold.

    >>> [float(vote(np.array([1.0, -4.0, 0.5]), how)) for how in ("highest", "lowest", "majority")]
    [1.0, -4.0, 0.5]

    Args:
        margins: of the members, nats above the threshold.
        rule: one of `VOTES`.
        weights: of the members, for `fitted`.
    """
    if rule == "fitted":
        assert weights is not None, "fit() gives them"
        return np.asarray((margins * weights).sum(-1))
    pools: dict[str, Callable[..., Any]]
    pools = {"mean": np.mean, "highest": np.max, "lowest": np.min, "majority": np.median}
    return np.asarray(pools[rule](margins, axis=-1))


def fit_vote_weights(margin_table: MarginTable, team_indices: Int[np.ndarray, "teams size"]) -> Float[np.ndarray, "teams size"]:
    """Return the weights of Fisher's linear discriminant, which separates the classes best.

    Negative ones are set to 0, since a defense is never read upside down, and all are scaled to add up to 1,
    so that the weighted mean counts from the same threshold.

    Args:
        margin_table: of the calibration split.
        team_indices: places of the members among the board's defenses.
    """
    harmful, benign = margin_table.margins[margin_table.is_harmful], margin_table.margins[~margin_table.is_harmful]
    apart = harmful.mean(0) - benign.mean(0)
    within = sum((side - side.mean(0)).T @ (side - side.mean(0)) for side in (harmful, benign))
    within = np.asarray(within) / max(len(margin_table.is_harmful) - 2, 1)
    of_team = within[team_indices[:, :, None], team_indices[:, None, :]]
    ridge = _RIDGE_FACTOR * np.trace(of_team, axis1=1, axis2=2) / team_indices.shape[1] + 1e-12
    solved = np.linalg.solve(of_team + ridge[:, None, None] * np.eye(team_indices.shape[1]), apart[team_indices][..., None])
    weights = np.clip(solved[..., 0], 0, None)
    total = weights.sum(1, keepdims=True)
    return np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / team_indices.shape[1])
