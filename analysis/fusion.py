"""What a vote should come to, from its members alone: two normal classes, with the members' correlation.

Members are described by the mean of their margin in each class, its spread, and how their errors go together;
that is the binormal model of signal detection, for several observers at once. What a vote makes of such
margins has no closed form but for the mean, so it is read off quasi-random ones: the same normal points for
every team, with exactly the mean and covariance that they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtri
from scipy.stats import qmc

from analysis.outcomes import ClassMetrics, compute_class_metrics
from analysis.voting import combine_margins

QUASI_RANDOM_POINTS = 512  # of each class; a power of 2, as Sobol's sequence wants it


@cache
def _make_normal_points(team_size: int, n_points: int = QUASI_RANDOM_POINTS) -> Float[np.ndarray, "points size"]:
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
        return cls(margins.mean(0)[team_indices], covariance[team_indices[:, :, None], team_indices[:, None, :]])

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
    return compute_class_metrics(combine_margins(harmful_moments.generate_margins(), rule, each), combine_margins(benign_moments.generate_margins(), rule, each), class_sizes)
