"""Random-effects summary of one effect over several models: mean, heterogeneity and prediction interval.

The variance between models is estimated by restricted maximum likelihood (REML; Viechtbauer 2005,
https://doi.org/10.3102/10769986030003261), and the interval of the mean is that of Hartung and Knapp (2001,
https://doi.org/10.1002/sim.791), never narrower than the one with the variance factor 1. The prediction
interval is for the true effect on another model (IntHout et al. 2016,
https://doi.org/10.1136/bmjopen-2015-010247).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from analysis.stats.bootstrap import CONFIDENCE_LEVEL

MIN_PREDICTED_MODELS = 3  # from which on there is a prediction interval
_MAX_ITERATIONS = 2000
_MIN_VARIANCE = 1e-12  # of an effect that is the same in every bootstrap draw

ModelVector = Float[np.ndarray, " models"]


@dataclass(frozen=True)
class RandomEffects:
    """Summary of the effects of one defense on several models, in the unit of the effects.

    Attributes:
        mean: mean effect over models.
        mean_low: lower end of its 95 % interval.
        mean_high: upper end.
        between_sd: SD of the true effects between models.
        i_squared: share of the observed variance that is due to differences between models, 0 to 1.
        prediction_low: lower end of the 95 % prediction interval of the true effect on another model; NaN
            with fewer than three models.
        prediction_high: upper end.
    """

    mean: float
    mean_low: float
    mean_high: float
    between_sd: float
    i_squared: float
    prediction_low: float = np.nan
    prediction_high: float = np.nan


def fit_random_effects(effects: ModelVector, variances: ModelVector) -> RandomEffects:
    """Return the random-effects summary of independent estimates.

    >>> summary = fit_random_effects(np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.5, 0.5]))
    >>> round(summary.mean, 3), round(summary.between_sd**2, 3), round(summary.i_squared, 3)
    (2.0, 0.5, 0.5)

    Args:
        effects: estimated effect on each model.
        variances: squared standard error of each estimate.

    Raises:
        ValueError: if there are fewer than two models.
    """
    n = len(effects)
    if n < 2:
        raise ValueError("a summary over models needs at least two")
    variances = np.maximum(variances, _MIN_VARIANCE)
    between = estimate_between_variance(effects, variances)
    weights = 1 / (variances + between)
    mean = float(weights @ effects / weights.sum())
    factor = max(1.0, float(weights @ (effects - mean) ** 2) / (n - 1))
    variance = factor / weights.sum()
    quantile = float(stdtrit(n - 1, (1 + CONFIDENCE_LEVEL) / 2))
    reach, predicted = quantile * np.sqrt(variance), quantile * np.sqrt(variance + between)
    fixed = 1 / variances
    typical = (n - 1) * fixed.sum() / (fixed.sum() ** 2 - (fixed**2).sum())
    has_prediction = n >= MIN_PREDICTED_MODELS
    return RandomEffects(
        mean,
        mean - float(reach),
        mean + float(reach),
        float(np.sqrt(between)),
        float(between / (between + typical)),
        mean - float(predicted) if has_prediction else np.nan,
        mean + float(predicted) if has_prediction else np.nan,
    )


def estimate_between_variance(effects: ModelVector, variances: ModelVector) -> float:
    """Return the REML estimate of the variance of the true effects between models, 0 or more.

    At the estimate, Σw² (y − μ)² = Σw − Σw² / Σw with the weights w = 1 / (variance + estimate); the
    iteration solves this for the estimate.

    Args:
        effects: estimated effect on each model.
        variances: squared standard error of each estimate, positive.
    """
    between = max(float(effects.var(ddof=1) - variances.mean()), 0.0)
    for _ in range(_MAX_ITERATIONS):
        weights = 1 / (variances + between)
        deviations = (effects - weights @ effects / weights.sum()) ** 2
        square = weights**2
        updated = max(float(square @ (deviations - variances) / square.sum() + 1 / weights.sum()), 0.0)
        if abs(updated - between) <= 1e-10 * (between + _MIN_VARIANCE):
            return updated
        between = updated
    return between
