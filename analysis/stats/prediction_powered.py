"""Refusal rates from a few judged responses and a readout of every query: prediction-powered inference.

Judged responses exist for a random part of the queries, readout predictions for all. The predictions make the
estimate more precise where they agree with the judge, and are ignored where they do not
(https://arxiv.org/abs/2301.09633, https://arxiv.org/abs/2311.01453).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from analysis.stats.bootstrap import NORMAL_QUANTILE, DrawVector, compute_wilson_intervals
from analysis.stats.format import Interval

# Predictions are used only if at least this many labels differ from the most frequent one; fewer cannot show
# whether the readout finds them.
MIN_RARE_LABELS = 3
MIN_LABELED_PER_STRATUM = 5  # strata with fewer labeled queries are merged
# Added to the sum of squared residuals, like the ½ of the log-linear correction: without it, a readout whose
# errors happen to be absent from the labeled queries would seem perfect.
_UNSEEN_RESIDUAL = 0.5
# Weight of the variance of all residuals in the residual variance of each stratum, in labeled queries.
_POOLED_RESIDUALS = 5
_PERCENTAGE_POINTS = 100.0

Strata = Sequence[str] | np.ndarray | pd.Series


@dataclass(frozen=True)
class PredictionPoweredRate:
    """A refusal rate with its 95 % interval.

    Attributes:
        rate: estimated refusal rate, 0 to 1.
        low: lower end of the interval.
        high: upper end of the interval.
        n_labeled: number of queries with a judged response.
        n: number of queries.
        weight: weight λ of the predictions, 0 (ignored) to N / (N − n_labeled).
        responses_saved: number of further judged responses that the predictions are worth; negative if the
            labeled queries are spread over the strata so unevenly that some of them are wasted.
    """

    rate: float
    low: float
    high: float
    n_labeled: int
    n: int
    weight: float
    responses_saved: float


@dataclass(frozen=True)
class PredictionPoweredDifference:
    """The difference of the refusal rates of two conditions on the same queries, with its 95 % interval.

    Attributes:
        difference: defended minus undefended refusal rate, −1 to 1; positive means that the defense refuses
            more.
        low: lower end of the interval.
        high: upper end of the interval.
        n_labeled: number of queries with judged responses in both conditions.
        n: number of queries.
        weight: weight λ of the predictions, 0 (ignored) to N / (N − n_labeled).
        responses_saved: number of further labeled queries that the predictions are worth, as in
            `PredictionPoweredRate`.
        contributions: contribution of each query to the estimate minus its expected value, in the order of
            the queries; their squares add up to the variance, and the products of two paired classes to the
            covariance.
    """

    difference: float
    low: float
    high: float
    n_labeled: int
    n: int
    weight: float
    responses_saved: float
    contributions: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class ClassContrasts:
    """The two contrasts of class × defense on the refusal rate, each with its 95 % interval.

    Attributes:
        shift: half the sum of the changes on harmful and on benign queries, percentage points; positive means
            that the defense refuses more.
        discrimination: change on harmful minus change on benign queries, percentage points; positive means
            that the defense separates the classes better.
        correlation: correlation of the two changes through pairs of queries, −1 to 1; 0 without pairs.
    """

    shift: Interval
    discrimination: Interval
    correlation: float


@dataclass(frozen=True)
class PredictionPoweredMeans:
    """Prediction-powered means of one design (queries, labeled part, strata) for many draws of the data.

    Attributes:
        means: estimated mean of the labels in each draw.
        effective_sizes: number of labeled queries that would give the same variance without predictions.
        weights: weight λ of the predictions in each draw.
        mean_squares: mean of the squared labels without predictions: for changes of responses, the share of
            the queries whose response changed.
    """

    means: DrawVector
    effective_sizes: DrawVector
    weights: DrawVector
    mean_squares: DrawVector


def estimate_prediction_powered_rate(
    labels: Float[np.ndarray, " n"],
    is_labeled: Bool[np.ndarray, " n"],
    predictions: Float[np.ndarray, " n"],
    strata: Strata | None = None,
) -> PredictionPoweredRate:
    """Return the refusal rate in the population of queries, with its 95 % interval.

    The interval is Wilson's at the estimate of `compute_prediction_powered_means` and its effective size. If
    every query is labeled, it is therefore the Wilson interval of the labels; the same holds for the labeled
    queries if fewer than `MIN_RARE_LABELS` of their labels are of one class.

    >>> labels, is_labeled = np.array([1.0, 0.0, 0.0, 1.0] * 50), np.arange(200) < 40
    >>> helped = estimate_prediction_powered_rate(labels, is_labeled, np.abs(labels - 0.1))
    >>> round(helped.rate, 2), round(helped.low, 2), round(helped.high, 2), round(helped.responses_saved)
    (0.5, 0.42, 0.58, 127)
    >>> alone = estimate_prediction_powered_rate(labels, is_labeled, np.full(200, 0.5))
    >>> round(alone.rate, 2), round(alone.low, 2), round(alone.high, 2), round(alone.responses_saved)
    (0.5, 0.35, 0.65, 0)

    Args:
        labels: 1 if the response refuses, 0 if not; ignored (NaN, for example) where the query
            is not labeled.
        is_labeled: whether each query has a judged response; a random part, drawn within strata if there are
            any.
        predictions: prediction of each label by the readout, 0 to 1.
        strata: stratum (kind of query) of each query; all in one if missing.

    Raises:
        ValueError: if no query is labeled, or a label or a prediction is out of range.

    Source: Angelopoulos et al. 2023, https://arxiv.org/abs/2301.09633; λ by Angelopoulos, Duchi, and Zrnic
        2023, https://arxiv.org/abs/2311.01453.
    """
    codes = _check_design(is_labeled, strata)
    observed = _check_labels(labels, is_labeled)
    _check_predictions(predictions)
    estimate = compute_prediction_powered_means(observed[None], is_labeled, predictions[None], codes)
    rate = float(np.clip(estimate.means[0], 0, 1))
    lows, highs = compute_wilson_intervals(estimate.means, estimate.effective_sizes)
    return PredictionPoweredRate(
        rate=rate,
        low=min(float(lows[0]), rate),
        high=max(float(highs[0]), rate),
        n_labeled=int(is_labeled.sum()),
        n=len(labels),
        weight=float(estimate.weights[0]),
        responses_saved=float(estimate.effective_sizes[0]) - int(is_labeled.sum()),
    )


def estimate_prediction_powered_difference(
    undefended_labels: Float[np.ndarray, " n"],
    defended_labels: Float[np.ndarray, " n"],
    is_labeled: Bool[np.ndarray, " n"],
    undefended_predictions: Float[np.ndarray, " n"],
    defended_predictions: Float[np.ndarray, " n"],
    strata: Strata | None = None,
) -> PredictionPoweredDifference:
    """Return the difference of two refusal rates on the same queries, with its 95 % interval.

    The labels are the changes D = Y_defended − Y_undefended in {−1, 0, 1}, the predictions f_defended −
    f_undefended. The interval is the adjusted Wald interval of Bonett and Price at the estimate and its
    effective size, and exactly theirs if every query is labeled.

    >>> before, after = np.array([1.0, 0.0, 0.0, 0.0] * 50), np.array([1.0, 0.0, 1.0, 0.0] * 50)
    >>> change = estimate_prediction_powered_difference(before, after, np.arange(200) < 40, before, after)
    >>> round(change.difference, 2), round(change.low, 2), round(change.high, 2), change.n_labeled
    (0.25, 0.18, 0.32, 40)

    Args:
        undefended_labels: 1 if the response of the undefended model refuses, 0 if not; ignored where the
            query is not labeled.
        defended_labels: the same for the defended model.
        is_labeled: whether each query has judged responses in both conditions; a random part, drawn within
            strata if there are any.
        undefended_predictions: predictions of the undefended labels, 0 to 1.
        defended_predictions: predictions of the defended labels, 0 to 1.
        strata: stratum of each query; all in one if missing.

    Raises:
        ValueError: if no query is labeled, or a label or a prediction is out of range.

    Source: Bonett and Price 2012, https://doi.org/10.3102/1076998611411915.
    """
    codes = _check_design(is_labeled, strata)
    changes = _check_labels(defended_labels, is_labeled) - _check_labels(undefended_labels, is_labeled)
    for predictions in (undefended_predictions, defended_predictions):
        _check_predictions(predictions)
    predicted_changes = defended_predictions - undefended_predictions
    estimate = compute_prediction_powered_means(changes[None], is_labeled, predicted_changes[None], codes)
    difference = float(np.clip(estimate.means[0], -1, 1))
    lows, highs = compute_paired_intervals(estimate.means, estimate.mean_squares, estimate.effective_sizes)
    return PredictionPoweredDifference(
        difference=difference,
        low=min(float(lows[0]), difference),
        high=max(float(highs[0]), difference),
        n_labeled=int(is_labeled.sum()),
        n=len(changes),
        weight=float(estimate.weights[0]),
        responses_saved=float(estimate.effective_sizes[0]) - int(is_labeled.sum()),
        contributions=_compute_contributions(
            changes, is_labeled, predicted_changes, codes, float(estimate.weights[0])
        ),
    )


def estimate_paired_difference(changes: Float[np.ndarray, " n"]) -> PredictionPoweredDifference:
    """Return the mean of changes, each from −1 to 1, where every query has one; Bonett and Price's interval.

    >>> change = estimate_paired_difference(np.array([0.0, 0.0, 1.0, 0.0] * 10))
    >>> round(change.difference, 2), round(change.low, 2), round(change.high, 2)
    (0.25, 0.09, 0.38)
    """
    mean, n = float(changes.mean()), len(changes)
    lows, highs = compute_paired_intervals(
        np.array([mean]), np.array([float((changes**2).mean())]), np.array([float(n)])
    )
    low, high = min(float(lows[0]), mean), max(float(highs[0]), mean)
    return PredictionPoweredDifference(mean, low, high, n, n, 0.0, 0.0, (changes - mean) / n)


def combine_class_changes(
    harmful: PredictionPoweredDifference,
    benign: PredictionPoweredDifference,
    harmful_pairs: pd.Series | None = None,
    benign_pairs: pd.Series | None = None,
) -> ClassContrasts:
    """Return shift and discrimination of the refusal rate from the changes of the two classes.

    The interval of a sum or difference combines the distances between the two estimates and their ends (the
    MOVER method), with the correlation ρ of the two estimates: the lower end of h − b is
    h − b − √((h − l_h)² + (u_b − b)² − 2ρ (h − l_h)(u_b − b)).

    A harmful query and its benign twin are one pair, so the classes are dependent. As `ResamplingUnits` keeps
    pairs whole, the covariance is the sum over pairs of the product of the contributions of their two
    queries. Without pairs, ρ = 0; if twins in truth respond alike, the interval of the shift is then too
    narrow and that of discrimination too wide.

    Args:
        harmful: change on the harmful queries.
        benign: change on the benign queries.
        harmful_pairs: name of each harmful query's pair, missing for a query without a pair, in the order of
            the queries.
        benign_pairs: the same for the benign queries.

    Raises:
        ValueError: if the pairs of only one class are given, or their number is not that of the queries.

    Source: Zou and Donner 2008, https://doi.org/10.1002/sim.3095; with correlation, Zou 2007,
        https://doi.org/10.1037/1082-989X.12.4.399.
    """
    correlation = _compute_class_correlation(harmful, benign, harmful_pairs, benign_pairs)
    h, b = harmful.difference, benign.difference
    h_down, h_up = h - harmful.low, harmful.high - h
    b_down, b_up = b - benign.low, benign.high - b
    scale = _PERCENTAGE_POINTS
    shift = Interval(
        scale * (h + b) / 2,
        scale * (h + b - _combine_distances(h_down, b_down, correlation)) / 2,
        scale * (h + b + _combine_distances(h_up, b_up, correlation)) / 2,
    )
    discrimination = Interval(
        scale * (h - b),
        scale * (h - b - _combine_distances(h_down, b_up, -correlation)),
        scale * (h - b + _combine_distances(h_up, b_down, -correlation)),
    )
    return ClassContrasts(shift, discrimination, correlation)


def compute_prediction_powered_means(
    labels: Float[np.ndarray, "draws n"],
    is_labeled: Bool[np.ndarray, " n"],
    predictions: Float[np.ndarray, "draws n"],
    stratum_codes: Int[np.ndarray, " n"],
) -> PredictionPoweredMeans:
    """Return power-tuned prediction-powered means, with the effective size of the labeled sample.

    In stratum h, n_h of N_h queries are labeled (L), and W_h = N_h / N. The estimate is

        θ = Σ_h W_h (mean_L(Y) + λ (mean_all(f) − mean_L(f))).

    The labeled queries are among all, so mean_all(f) − mean_L(f) = (1 − n/N)(mean_others(f) − mean_L(f)): the
    estimate equals that of the papers, whose unlabeled set is separate, at λ' = λ (1 − n/N). The variance
    follows from two phases of sampling. The N queries are drawn from the population: σ²_Y / N. The labeled
    ones are drawn from these without replacement, which leaves the sampling error of the mean residual
    e = Y − λf:

        Var θ = σ²_Y / N + Σ_h W_h² (1/n_h − 1/N_h) σ²_e,h.

    λ minimizes this: λ = Σ_h c_h cov_h(Y, f) / Σ_h c_h var_h(f) with c_h = W_h² (1/n_h − 1/N_h). As in the
    papers, the covariance is that of the labeled queries, the variance that of all, and λ' is clipped to the
    range from 0 to 1, so that a useless or reversed readout is ignored. The effective size σ²_Y / Var θ is

        n_eff = 1 / (1/N + Σ_h c_h s²_e,h / s²_Y),

    with s²_e,h = (SSE_h + ½ n_h/n) / (n_h − 1), drawn toward their mean over the strata as
    `_POOLED_RESIDUALS` further labeled queries would do. In a single stratum, this is
    n / (1 − (1 − r)(1 − n/N)) with the unexplained share r = (SSE + ½) / SSY. The ½ makes up for fitting λ to
    the same labels and for errors that no labeled query shows. n_eff is at least the size without
    predictions, 1 / Σ_h (W_h² / n_h), which is n if the labeled queries are spread over strata in proportion,
    and at most N. In simulations, intervals of rates cover 93 % to 98 %; they cover less, down to 91 %, if a
    large stratum with a rate near ½ has only ten labeled queries and the others have many.

    Strata are part of what is drawn from the population, so that the variance with every query labeled is
    that of the plain mean; if strata with different means have fixed sizes, intervals are slightly too wide.
    A stratum with fewer than `MIN_LABELED_PER_STRATUM` labeled queries is merged with the stratum whose
    labeled share is nearest to its own; this adds no bias if the shares or the means are equal. If fewer than
    `MIN_RARE_LABELS` labels differ from the most frequent one, λ = 0 and n_eff is the size without
    predictions.

    Args:
        labels: label of each query, in {0, 1} or {−1, 0, 1}; ignored where the query is not labeled.
        is_labeled: whether each query is labeled, at least one.
        predictions: prediction of each label.
        stratum_codes: stratum of each query, from 0.
    """
    codes = _merge_small_strata(stratum_codes, is_labeled)
    n_labeled, n = int(is_labeled.sum()), len(is_labeled)
    labeled_sizes, sizes = np.bincount(codes, is_labeled), np.bincount(codes).astype(float)
    shares = sizes / n
    costs = shares**2 * (1 / labeled_sizes - 1 / sizes)  # c_h
    labeled_membership = _make_membership(codes[is_labeled])
    membership = _make_membership(codes)
    y, f = labels[:, is_labeled], predictions[:, is_labeled]
    y_means, f_means = y @ labeled_membership / labeled_sizes, f @ labeled_membership / labeled_sizes
    all_f_means = predictions @ membership / sizes
    y_residuals, f_residuals = y - y_means @ labeled_membership.T, f - f_means @ labeled_membership.T

    covariances = (y_residuals * f_residuals) @ labeled_membership / labeled_sizes
    variances = (predictions - all_f_means @ membership.T) ** 2 @ membership / np.maximum(sizes - 1, 1)
    explained, spread = covariances @ costs, variances @ costs
    has_rare_labels = _count_rare_labels(y) >= MIN_RARE_LABELS
    is_used = has_rare_labels & (spread > 1e-12)  # predictions that float noise sets apart are constant
    max_weight = n / max(n - n_labeled, 1)
    weights = np.where(is_used, np.clip(explained / np.where(is_used, spread, 1.0), 0, max_weight), 0.0)
    means = (y_means + weights[:, None] * (all_f_means - f_means)) @ shares

    squares = (y_residuals - weights[:, None] * f_residuals) ** 2 @ labeled_membership
    squares = squares + _UNSEEN_RESIDUAL * labeled_sizes / n_labeled
    pooled_variances = squares.sum(1, keepdims=True) / max(n_labeled - len(sizes), 1)
    residual_variances = squares + _POOLED_RESIDUALS * pooled_variances
    residual_variances = residual_variances / (labeled_sizes - 1 + _POOLED_RESIDUALS)
    mean_squares = (y**2 @ labeled_membership / labeled_sizes) @ shares
    label_variances = (mean_squares - (y_means @ shares) ** 2) * n_labeled / max(n_labeled - 1, 1)
    label_variances = np.where(has_rare_labels, label_variances, 1.0)  # not used without rare labels
    effective_sizes = 1 / (1 / n + residual_variances @ costs / label_variances)
    classical_size = 1 / (shares**2 / labeled_sizes).sum()
    effective_sizes = np.where(has_rare_labels, np.clip(effective_sizes, classical_size, n), classical_size)
    return PredictionPoweredMeans(means, effective_sizes, weights, mean_squares)


def compute_paired_intervals(
    differences: DrawVector, changed_shares: DrawVector, sizes: DrawVector
) -> tuple[DrawVector, DrawVector]:
    """Return the lower and upper ends of 95 % Bonett–Price intervals of paired differences of rates.

    Two queries are added, one that changed to a refusal and one that changed from a refusal.

    >>> low, high = compute_paired_intervals(np.array([0.2]), np.array([0.4]), np.array([50.0]))
    >>> round(float(low[0]), 2), round(float(high[0]), 2)
    (0.02, 0.36)

    Args:
        differences: estimated differences, −1 to 1.
        changed_shares: shares of the queries whose response changed, 0 to 1.
        sizes: number of queries behind each difference.
    """
    differences = np.clip(differences, -1, 1)
    changed_shares = np.maximum(changed_shares, np.abs(differences))
    centers = differences * sizes / (sizes + 2)
    variances = ((changed_shares * sizes + 2) / (sizes + 2) - centers**2) / (sizes + 2)
    half_widths = NORMAL_QUANTILE * np.sqrt(variances)
    return np.clip(centers - half_widths, -1, 1), np.clip(centers + half_widths, -1, 1)


def _compute_contributions(
    labels: Float[np.ndarray, " n"],
    is_labeled: Bool[np.ndarray, " n"],
    predictions: Float[np.ndarray, " n"],
    stratum_codes: Int[np.ndarray, " n"],
    weight: float,
) -> Float[np.ndarray, " n"]:
    """Return the contribution of each query to a prediction-powered mean, minus its expected value.

    A query contributes 1/N of its prediction, and if labeled, W_h / n_h of its residual.
    """
    codes = _merge_small_strata(stratum_codes, is_labeled)
    labeled_sizes, sizes = np.bincount(codes, is_labeled), np.bincount(codes)
    residuals = np.where(is_labeled, labels - weight * predictions, 0.0)
    residual_means = np.bincount(codes, residuals) / labeled_sizes
    values = weight * predictions + residual_means[codes]  # the mean of these is the estimate
    corrections = np.where(is_labeled, residuals - residual_means[codes], 0.0)
    return (values - values.mean() + corrections * (sizes / labeled_sizes)[codes]) / len(codes)


def _compute_class_correlation(
    harmful: PredictionPoweredDifference,
    benign: PredictionPoweredDifference,
    harmful_pairs: pd.Series | None,
    benign_pairs: pd.Series | None,
) -> float:
    """Return the correlation of two changes through the pairs of their queries; 0 without pairs."""
    if harmful_pairs is None and benign_pairs is None:
        return 0.0
    if harmful_pairs is None or benign_pairs is None:
        raise ValueError("the pairs of only one class are given: give those of both classes or of neither")
    sums = []
    for name, change, pairs in (("harmful", harmful, harmful_pairs), ("benign", benign, benign_pairs)):
        if len(pairs) != change.n:
            raise ValueError(f"{len(pairs)} pairs for {change.n} {name} queries: give one name per query")
        contributions = pd.Series(change.contributions)
        sums.append(contributions.groupby(pairs.reset_index(drop=True)).sum())  # without missing names
    covariance = float(sums[0].mul(sums[1], fill_value=0).sum())
    scale = float(np.linalg.norm(harmful.contributions) * np.linalg.norm(benign.contributions))
    return float(np.clip(covariance / scale, -1, 1)) if scale > 0 else 0.0


def _combine_distances(first: float, second: float, correlation: float) -> float:
    """Return the distance of the end of a sum from its estimate; both distances are at least 0."""
    return float(np.sqrt(max(first**2 + second**2 + 2 * correlation * first * second, 0.0)))


def _merge_small_strata(
    codes: Int[np.ndarray, " n"], is_labeled: Bool[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Return strata with enough labeled queries, numbered from 0.

    The stratum with the fewest is merged with the one of the nearest labeled share until all have enough.
    """
    codes = np.unique(codes, return_inverse=True)[1].ravel()
    while codes.max() > 0:
        labeled_sizes = np.bincount(codes, is_labeled)
        smallest = int(labeled_sizes.argmin())
        if labeled_sizes[smallest] >= MIN_LABELED_PER_STRATUM:
            break
        labeled_shares = labeled_sizes / np.bincount(codes)
        distances = np.abs(labeled_shares - labeled_shares[smallest])
        distances[smallest] = np.inf
        merged = np.where(codes == smallest, distances.argmin(), codes)
        codes = np.unique(merged, return_inverse=True)[1].ravel()
    return codes


def _make_membership(codes: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n strata"]:
    """Return 1 where a query belongs to a stratum, 0 elsewhere; each stratum must occur."""
    return np.eye(codes.max() + 1)[codes]


def _count_rare_labels(labels: Float[np.ndarray, "draws n"]) -> Int[np.ndarray, " draws"]:
    """Return the number of labels in {−1, 0, 1} that differ from the most frequent one."""
    counts = np.stack([(labels == value).sum(1) for value in (-1, 0, 1)])
    return labels.shape[1] - counts.max(0)


def _check_design(is_labeled: Bool[np.ndarray, " n"], strata: Strata | None) -> Int[np.ndarray, " n"]:
    """Return the stratum of each query, from 0, if the design is valid."""
    if not is_labeled.any():
        raise ValueError(f"none of the {len(is_labeled)} queries is labeled: judge the responses of some")
    if strata is None:
        return np.zeros(len(is_labeled), dtype=int)
    if len(strata) != len(is_labeled):
        raise ValueError(f"{len(strata)} strata for {len(is_labeled)} queries: give one stratum per query")
    return pd.factorize(np.asarray(strata))[0]


def _check_labels(
    labels: Float[np.ndarray, " n"], is_labeled: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Return the labels with 0 where a query is not labeled, if the others are 0 or 1."""
    is_wrong = is_labeled & ~np.isin(labels, (0, 1))
    if is_wrong.any():
        raise ValueError(f"label {labels[is_wrong][0]} of a labeled query: give 1 for a refusal, otherwise 0")
    return np.where(is_labeled, labels, 0.0)


def _check_predictions(predictions: Float[np.ndarray, " n"]) -> None:
    """Raise an error unless all predictions are probabilities."""
    is_wrong = ~((predictions >= 0) & (predictions <= 1))
    if is_wrong.any():
        raise ValueError(f"prediction {predictions[is_wrong][0]}: give a probability of refusal, 0 to 1")
