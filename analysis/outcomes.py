"""What many classifiers come to at once: the coordinates of `decompose`, for thousands of ensembles."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from scipy.special import expit, ndtri
from scipy.stats import rankdata

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
        metrics[name] - undefended_metrics[name] for name in ("harmful_mean", "benign_mean", "auroc", "d_prime", "distance")
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

    >>> found = follows(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 6.0]]))
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

    >>> aurocs(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]])).tolist()
    [0.875]
    """
    ranked = np.sort(benign_margins, axis=1)
    below = [
        np.searchsorted(row, side, "left").sum() + np.searchsorted(row, side, "right").sum()
        for row, side in zip(ranked, harmful_margins, strict=True)
    ]
    return np.array(below, dtype=float) / (2 * harmful_margins.shape[1] * benign_margins.shape[1])
