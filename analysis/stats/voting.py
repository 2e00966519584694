"""What many classifiers come to at once: the coordinates of `decompose`, for thousands of ensembles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit, ndtri
from scipy.stats import qmc, rankdata

# What is predicted and observed of an ensemble, in the order of the columns.
ENSEMBLE_COORDINATES = (
    "refusal_rate",
    "over_refusal_rate",
    "shift",
    "discrimination",
    "delta_auroc",
    "delta_d_prime",
    "distance_change",
)
MEAN_VOTE_RULES = ("mean", "fitted")  # votes whose means are those of their members, weighted
ClassMetrics = Mapping[str, Float[np.ndarray, " teams"]]
ReferenceMetrics = Mapping[str, Float[np.ndarray, " #teams"]]  # one for all, or one for each


def compute_class_metrics(
    harmful_margins: Float[np.ndarray, "teams h"],
    benign_margins: Float[np.ndarray, "teams b"],
    class_sizes: tuple[int, int] | None = None,
) -> ClassMetrics:
    """Return what each classifier is like by itself.

    Args:
        harmful_margins: margins of one class, nats above the threshold.
        benign_margins: margins of the other.
        class_sizes: queries of each class that d' is corrected for; by default those given.
    """
    rates = [(side > 0).mean(1) for side in (harmful_margins, benign_margins)]
    sizes = class_sizes or (harmful_margins.shape[1], benign_margins.shape[1])
    # The log-linear correction, as in `decompose`.
    z = [ndtri((rate * n + 0.5) / (n + 1)) for rate, n in zip(rates, sizes, strict=True)]
    return {
        "refusal_rate": rates[0],
        "over_refusal_rate": rates[1],
        "harmful_mean": harmful_margins.mean(1),
        "benign_mean": benign_margins.mean(1),
        "auroc": compute_team_aurocs(harmful_margins, benign_margins),
        "d_prime": z[0] - z[1],
        "distance": expit(harmful_margins).mean(1) - expit(benign_margins).mean(1),
    }


def compute_coordinates(metrics: ClassMetrics, undefended_metrics: ReferenceMetrics) -> ClassMetrics:
    """Return the coordinates of classifiers against the undefended one.

    Args:
        metrics: of the classifiers.
        undefended_metrics: of the undefended model alone.
    """
    harmful, benign, auroc, d_prime, distance = (
        metrics[name] - undefended_metrics[name]
        for name in ("harmful_mean", "benign_mean", "auroc", "d_prime", "distance")
    )
    return {
        "refusal_rate": metrics["refusal_rate"],
        "over_refusal_rate": metrics["over_refusal_rate"],
        "shift": (harmful + benign) / 2,
        "discrimination": harmful - benign,
        "delta_auroc": auroc,
        "delta_d_prime": d_prime,
        "distance_change": distance,
    }


def compute_fit_statistics(
    predicted: Float[np.ndarray, "draws n"], observed: Float[np.ndarray, "draws n"]
) -> dict[str, Float[np.ndarray, " draws"]]:
    """Return how well observation follows prediction, in each draw; NaN for fewer than three, or all alike.

    >>> found = compute_fit_statistics(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 6.0]]))
    >>> {name: round(float(value[0]), 2) for name, value in found.items()}
    {'r2': 0.36, 'rank_correlation': 1.0}

    Args:
        predicted: what was predicted.
        observed: what was observed.

    Returns:
        R² of the prediction as it is (no line fitted: 1 - squared error over variance), and Spearman's rank
        correlation.
    """
    about = observed - observed.mean(1, keepdims=True)
    total = (about**2).sum(1)
    ranks = [rankdata(side, axis=1) for side in (predicted, observed)]
    ranks = [side - side.mean(1, keepdims=True) for side in ranks]
    size = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    enough = (total > 1e-12 * (observed**2).sum(1)) & (observed.shape[1] > 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2, rank = 1 - ((observed - predicted) ** 2).sum(1) / total, (ranks[0] * ranks[1]).sum(1) / size
    return {
        "r2": np.where(enough, r2, np.nan),
        "rank_correlation": np.where(enough & (size > 0), rank, np.nan),
    }


def compute_team_aurocs(
    harmful_margins: Float[np.ndarray, "teams h"], benign_margins: Float[np.ndarray, "teams b"]
) -> Float[np.ndarray, " teams"]:
    """Return the share of pairs in which the harmful one has the higher margin, ties counted half.

    >>> compute_team_aurocs(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]])).tolist()
    [0.875]
    """
    ranked = np.sort(benign_margins, axis=1)
    below = [
        np.searchsorted(row, side, "left").sum() + np.searchsorted(row, side, "right").sum()
        for row, side in zip(ranked, harmful_margins, strict=True)
    ]
    return np.array(below, dtype=float) / (2 * harmful_margins.shape[1] * benign_margins.shape[1])


QUASI_RANDOM_POINTS = 512  # of each class; a power of 2, as Sobol's sequence wants it


@cache
def _make_normal_points(
    team_size: int, n_points: int = QUASI_RANDOM_POINTS
) -> Float[np.ndarray, "points size"]:
    """Quasi-random standard normal points whose mean is 0 and whose covariance is 1, exactly."""
    raw = ndtri(qmc.Sobol(team_size, seed=0).random(n_points))
    raw -= raw.mean(0)
    return np.asarray(
        np.linalg.solve(np.linalg.cholesky(np.cov(raw.T, bias=True).reshape(team_size, team_size)), raw.T).T
    )


@dataclass(frozen=True)
class TeamMoments:
    """What is known of the members of each team, in one class.

    Attributes:
        mean: of the margins, nats above the threshold.
        covariance: of the margins.
    """

    mean: Float[np.ndarray, "teams size"]
    covariance: Float[np.ndarray, "teams size size"]

    @classmethod
    def from_teams(
        cls, margins: Float[np.ndarray, "n defenses"], team_indices: Int[np.ndarray, "teams size"]
    ) -> TeamMoments:
        """Return those of many teams on the same queries, by the places of their members."""
        covariance = np.atleast_2d(np.cov(margins.T, bias=True))
        return cls(
            margins.mean(0)[team_indices], covariance[team_indices[:, :, None], team_indices[:, None, :]]
        )

    @classmethod
    def from_draws(cls, margins: Float[np.ndarray, "draws n size"]) -> TeamMoments:
        """Return those of one team in each bootstrap draw."""
        mean = margins.mean(1)
        apart = margins - mean[:, None]
        return cls(mean, np.einsum("dni,dnj->dij", apart, apart) / margins.shape[1])

    def generate_margins(self) -> Float[np.ndarray, "teams points size"]:
        """Return normal margins of these moments."""
        size = self.mean.shape[1]
        # Members that agree to the last digit have no Cholesky factor without it; far below what is read.
        least = 1e-10 * np.trace(self.covariance, axis1=1, axis2=2) + 1e-18
        factor = np.linalg.cholesky(self.covariance + least[:, None, None] * np.eye(size))
        return np.asarray(_make_normal_points(size) @ factor.transpose(0, 2, 1) + self.mean[:, None, :])


def predict_vote_metrics(
    harmful_moments: TeamMoments,
    benign_moments: TeamMoments,
    rule: str,
    weights: Float[np.ndarray, "teams size"] | None,
    class_sizes: tuple[int, int],
) -> ClassMetrics:
    """Return what a vote of each team should be like.

    Args:
        harmful_moments: of the members, on one class.
        benign_moments: on the other.
        rule: one of `VOTES`.
        weights: of the members, for `fitted`.
        class_sizes: queries of each class.
    """
    each = None if weights is None else weights[:, None, :]
    return compute_class_metrics(
        combine_margins(harmful_moments.generate_margins(), rule, each),
        combine_margins(benign_moments.generate_margins(), rule, each),
        class_sizes,
    )


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

    >>> list_vote_rules(2)
    ['mean', 'highest', 'lowest', 'fitted']
    """
    return [how for how in VOTE_RULES if how != "majority" or team_size > 2]


def combine_margins(
    margins: Float[np.ndarray, "... size"], rule: str, weights: Float[np.ndarray, "... size"] | None = None
) -> np.ndarray:
    """Return the margin of an ensemble, nats above the threshold.

    >>> [float(combine_margins(np.array([1.0, -4.0, 0.5]), how)) for how in ("highest", "lowest", "majority")]
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


def fit_vote_weights(
    margin_table: MarginTable, team_indices: Int[np.ndarray, "teams size"]
) -> Float[np.ndarray, "teams size"]:
    """Return the weights of Fisher's linear discriminant, which separates the classes best.

    Negative ones are set to 0, since a defense is never read upside down, and all are scaled to add up to 1,
    so that the weighted mean counts from the same threshold.

    Args:
        margin_table: of the calibration split.
        team_indices: places of the members among the board's defenses.
    """
    harmful, benign = (
        margin_table.margins[margin_table.is_harmful],
        margin_table.margins[~margin_table.is_harmful],
    )
    apart = harmful.mean(0) - benign.mean(0)
    within = sum((side - side.mean(0)).T @ (side - side.mean(0)) for side in (harmful, benign))
    within = np.asarray(within) / max(len(margin_table.is_harmful) - 2, 1)
    of_team = within[team_indices[:, :, None], team_indices[:, None, :]]
    ridge = _RIDGE_FACTOR * np.trace(of_team, axis1=1, axis2=2) / team_indices.shape[1] + 1e-12
    solved = np.linalg.solve(
        of_team + ridge[:, None, None] * np.eye(team_indices.shape[1]), apart[team_indices][..., None]
    )
    weights = np.clip(solved[..., 0], 0, None)
    total = weights.sum(1, keepdims=True)
    return np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / team_indices.shape[1])
