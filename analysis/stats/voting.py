"""Vote rules, their prediction from members' moments, and vectorized metrics of thousands of ensembles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit, ndtri

# Measures that are predicted and observed for every ensemble, in the order of the columns.
ENSEMBLE_COORDINATES = (
    "refusal_rate",
    "over_refusal_rate",
    "shift",
    "discrimination",
    "delta_auroc",
    "delta_d_prime",
    "distance_change",
)
MEAN_VOTE_RULES = ("mean", "fitted")  # rules under which mean margins are weighted means of the members'
VOTE_RULES: Mapping[str, str] = {
    "mean": "mean of the members' margins",
    "highest": "highest margin: refuses if any member refuses",
    "lowest": "lowest margin: refuses if all members refuse",
    "majority": "median: refuses if most members refuse; equal to the mean for two members",
    "fitted": "weighted mean, with weights fitted to the calibration split (non-negative, sum 1)",
}
_RIDGE_FACTOR = 1e-3  # of the mean variance; keeps the weights defined if members always agree
QUASI_RANDOM_POINTS = 512  # points per class; Sobol's sequence requires a power of 2
ClassMetrics = Mapping[str, Float[np.ndarray, " teams"]]
ReferenceMetrics = Mapping[str, Float[np.ndarray, " #teams"]]  # one value for all teams, or one each


@dataclass(frozen=True)
class MarginTable:
    """Margins of all conditions on the same queries, nats above the threshold.

    Attributes:
        condition_names: names of the conditions.
        margins: margins by query and condition.
        undefended_margins: margins of the undefended model by query.
        is_harmful: class of each query.
    """

    condition_names: tuple[str, ...]
    margins: Float[np.ndarray, "n defenses"]
    undefended_margins: Float[np.ndarray, " n"]
    is_harmful: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class TeamMoments:
    """Moments of the members' margins of each team, within one class.

    Attributes:
        mean: mean margin of each member, nats above the threshold.
        covariance: covariance of the members' margins, nats².
    """

    mean: Float[np.ndarray, "teams size"]
    covariance: Float[np.ndarray, "teams size size"]

    @classmethod
    def from_teams(
        cls, margins: Float[np.ndarray, "n defenses"], team_indices: Int[np.ndarray, "teams size"]
    ) -> TeamMoments:
        """Return the moments of many teams on the same queries, given the column indices of their members."""
        covariance = np.atleast_2d(np.cov(margins.T, bias=True))
        return cls(
            margins.mean(0)[team_indices], covariance[team_indices[:, :, None], team_indices[:, None, :]]
        )

    @classmethod
    def from_draws(cls, margins: Float[np.ndarray, "draws n size"]) -> TeamMoments:
        """Return the moments of one team in each bootstrap draw."""
        mean = margins.mean(1)
        deviations = margins - mean[:, None]
        return cls(mean, np.einsum("dni,dnj->dij", deviations, deviations) / margins.shape[1])

    def generate_margins(self) -> Float[np.ndarray, "teams points size"]:
        """Return normally distributed margins with these moments."""
        size = self.mean.shape[1]
        # Members that always agree have a singular covariance; the ridge is far below any reported digit.
        ridge = 1e-10 * np.trace(self.covariance, axis1=1, axis2=2) + 1e-18
        factor = np.linalg.cholesky(self.covariance + ridge[:, None, None] * np.eye(size))
        return np.asarray(_make_normal_points(size) @ factor.transpose(0, 2, 1) + self.mean[:, None, :])


def list_vote_rules(team_size: int) -> list[str]:
    """Return the vote rules that differ from each other for teams of this size.

    >>> list_vote_rules(2)
    ['mean', 'highest', 'lowest', 'fitted']
    """
    return [rule for rule in VOTE_RULES if rule != "majority" or team_size > 2]


def combine_margins(
    margins: Float[np.ndarray, "... size"], rule: str, weights: Float[np.ndarray, "... size"] | None = None
) -> np.ndarray:
    """Return the margin of an ensemble, nats above the threshold.

    >>> margins = np.array([1.0, -4.0, 0.5])
    >>> [float(combine_margins(margins, rule)) for rule in ("highest", "lowest", "majority")]
    [1.0, -4.0, 0.5]

    Args:
        margins: margins of the members, nats above the threshold.
        rule: one of `VOTE_RULES`.
        weights: weights of the members, for `fitted`.
    """
    if rule == "fitted":
        assert weights is not None, "weights come from fit_vote_weights"
        return np.asarray((margins * weights).sum(-1))
    pools: dict[str, Callable[..., Any]]
    pools = {"mean": np.mean, "highest": np.max, "lowest": np.min, "majority": np.median}
    return np.asarray(pools[rule](margins, axis=-1))


def fit_vote_weights(
    margin_table: MarginTable, team_indices: Int[np.ndarray, "teams size"]
) -> Float[np.ndarray, "teams size"]:
    """Return weights from Fisher's linear discriminant, the direction that best separates the classes.

    Negative weights are set to 0, because no defense should count in reverse; the rest are scaled to a sum of
    1, so that the weighted mean has the same threshold.

    Args:
        margin_table: margins of the calibration split.
        team_indices: column indices of the members in the margin table.
    """
    harmful = margin_table.margins[margin_table.is_harmful]
    benign = margin_table.margins[~margin_table.is_harmful]
    mean_difference = harmful.mean(0) - benign.mean(0)
    scatter = sum((values - values.mean(0)).T @ (values - values.mean(0)) for values in (harmful, benign))
    within = np.asarray(scatter) / max(len(margin_table.is_harmful) - 2, 1)
    team_within = within[team_indices[:, :, None], team_indices[:, None, :]]
    team_size = team_indices.shape[1]
    ridge = _RIDGE_FACTOR * np.trace(team_within, axis1=1, axis2=2) / team_size + 1e-12
    direction = np.linalg.solve(
        team_within + ridge[:, None, None] * np.eye(team_size), mean_difference[team_indices][..., None]
    )
    weights = np.clip(direction[..., 0], 0, None)
    total = weights.sum(1, keepdims=True)
    return np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / team_size)


def predict_vote_metrics(
    harmful_moments: TeamMoments,
    benign_moments: TeamMoments,
    rule: str,
    weights: Float[np.ndarray, "teams size"] | None,
    class_sizes: tuple[int, int],
) -> ClassMetrics:
    """Return the predicted metrics of each team's vote, if the members' margins are normal in each class.

    Args:
        harmful_moments: moments of the members on harmful queries.
        benign_moments: moments of the members on benign queries.
        rule: one of `VOTE_RULES`.
        weights: weights of the members, for `fitted`.
        class_sizes: numbers of harmful and of benign queries.
    """
    point_weights = None if weights is None else weights[:, None, :]
    return compute_class_metrics(
        combine_margins(harmful_moments.generate_margins(), rule, point_weights),
        combine_margins(benign_moments.generate_margins(), rule, point_weights),
        class_sizes,
    )


def compute_class_metrics(
    harmful_margins: Float[np.ndarray, "teams h"],
    benign_margins: Float[np.ndarray, "teams b"],
    class_sizes: tuple[int, int] | None = None,
) -> ClassMetrics:
    """Return the metrics of each classifier by itself.

    Args:
        harmful_margins: margins of the harmful queries, nats above the threshold.
        benign_margins: margins of the benign queries, nats above the threshold.
        class_sizes: numbers of queries for the log-linear correction of d′; by default those of the margins.
    """
    rates = [(margins > 0).mean(1) for margins in (harmful_margins, benign_margins)]
    sizes = class_sizes or (harmful_margins.shape[1], benign_margins.shape[1])
    # The log-linear correction, as in `analysis.stats.effects`.
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
    """Return the coordinates of classifiers relative to the undefended model.

    Args:
        metrics: metrics of the classifiers.
        undefended_metrics: metrics of the undefended model.
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
    predicted: Float[np.ndarray, "draws n"],
    observed: Float[np.ndarray, "draws n"],
    weights: Float[np.ndarray, "draws n"] | None = None,
) -> dict[str, Float[np.ndarray, " draws"]]:
    """Return how well predictions fit observations in each draw; NaN below three values, or if all are equal.

    >>> statistics = compute_fit_statistics(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 6.0]]))
    >>> {name: round(float(values[0]), 2) for name, values in statistics.items()}
    {'r2': 0.36, 'rank_correlation': 1.0, 'mean_absolute_error': 1.0}

    Args:
        predicted: predicted values.
        observed: observed values.
        weights: how often each value counts in each draw, for draws that resample defenses; by default once.

    Returns:
        R² of the predictions themselves (no fitted line: 1 − squared error / variance), Spearman's rank
        correlation, and the mean absolute error, in the unit of the values.
    """
    counts = np.ones_like(observed) if weights is None else weights
    total_weight = counts.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have no value at all
        shares = counts / total_weight
        deviations = observed - (shares * observed).sum(1, keepdims=True)
        total = (shares * deviations**2).sum(1)
        ranks, observed_ranks = (_rank_weighted(values, counts) for values in (predicted, observed))
        ranks = ranks - (shares * ranks).sum(1, keepdims=True)
        observed_ranks = observed_ranks - (shares * observed_ranks).sum(1, keepdims=True)
        scale = np.sqrt((shares * ranks**2).sum(1) * (shares * observed_ranks**2).sum(1))
        is_defined = (total > 1e-12 * (shares * observed**2).sum(1)) & ((counts > 0).sum(1) > 2)
        errors = observed - predicted
        r2 = 1 - (shares * errors**2).sum(1) / total
        rank_correlation = (shares * ranks * observed_ranks).sum(1) / scale
        mean_absolute_error = (shares * np.abs(errors)).sum(1)
    return {
        "r2": np.where(is_defined, r2, np.nan),
        "rank_correlation": np.where(is_defined & (scale > 1e-9), rank_correlation, np.nan),
        "mean_absolute_error": mean_absolute_error,
    }


def _rank_weighted(
    values: Float[np.ndarray, "draws n"], counts: Float[np.ndarray, "draws n"]
) -> Float[np.ndarray, "draws n"]:
    """Return the mid-ranks in each draw, in which each value occurs `counts` times."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    above = np.cumsum(np.take_along_axis(counts, order, axis=1), axis=1)
    below = np.concatenate([np.zeros((len(values), 1)), above[:, :-1]], axis=1)
    is_new = np.concatenate([np.ones((len(values), 1), dtype=bool), np.diff(ordered, axis=1) != 0], axis=1)
    is_last = np.concatenate([is_new[:, 1:], np.ones((len(values), 1), dtype=bool)], axis=1)
    # Equal values share the middle of their range.
    start = np.maximum.accumulate(np.where(is_new, below, -np.inf), axis=1)
    end = np.minimum.accumulate(np.where(is_last, above, np.inf)[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty_like(ordered)
    np.put_along_axis(ranks, order, (start + end) / 2, axis=1)
    return ranks


def compute_team_aurocs(
    harmful_margins: Float[np.ndarray, "teams h"], benign_margins: Float[np.ndarray, "teams b"]
) -> Float[np.ndarray, " teams"]:
    """Return the AUROC of each team: P(harmful margin > benign margin), ties count half.

    >>> compute_team_aurocs(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]])).tolist()
    [0.875]
    """
    sorted_benign = np.sort(benign_margins, axis=1)
    doubled_wins = [
        np.searchsorted(benign, harmful, "left").sum() + np.searchsorted(benign, harmful, "right").sum()
        for benign, harmful in zip(sorted_benign, harmful_margins, strict=True)
    ]
    return np.array(doubled_wins, dtype=float) / (2 * harmful_margins.shape[1] * benign_margins.shape[1])


@cache
def _make_normal_points(
    team_size: int, n_points: int = QUASI_RANDOM_POINTS
) -> Float[np.ndarray, "points size"]:
    """Return quasi-random normal points whose mean is exactly 0 and whose covariance is the identity."""
    from scipy.stats import qmc  # scipy.stats takes half a second to import

    points = ndtri(qmc.Sobol(team_size, seed=0).random(n_points))
    points -= points.mean(0)
    factor = np.linalg.cholesky(np.cov(points.T, bias=True).reshape(team_size, team_size))
    return np.asarray(np.linalg.solve(factor, points.T).T)
