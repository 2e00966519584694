"""Intervals of ensemble estimates, the fit of predictions to observations, and raised class distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from analysis.stats.bootstrap import BOOTSTRAP_DRAWS, bootstrap_interval, make_estimate_columns
from analysis.stats.effects import COUNTED_ESTIMATES, compute_estimates
from analysis.stats.ensembles import (
    ALONE,
    SELECTION_SPLIT,
    STACK,
    SplitScores,
    compute_ensemble_margins,
    draw_team_weights,
    predict_stack_margins,
    split_members,
)
from analysis.stats.tables import UNDEFENDED, iterate_rows
from analysis.stats.voting import (
    ENSEMBLE_COORDINATES,
    MEAN_VOTE_RULES,
    ClassMetrics,
    TeamMoments,
    compute_class_metrics,
    compute_coordinates,
    compute_fit_statistics,
    fit_vote_weights,
    predict_vote_metrics,
)

_NEGLIGIBLE_GAIN = 0.01  # difference in AUROC
_RAISED_DISTANCE_COLUMNS = ["attack", "split", "members", "how", "raise"]


@dataclass(frozen=True)
class EnsembleDraws:
    """Coordinates of one ensemble in every bootstrap draw, as predicted and as observed."""

    predicted: ClassMetrics
    observed: ClassMetrics


def draw_ensemble(
    split_scores: SplitScores,
    team: Sequence[str],
    combination: str,
    calibration_scores: SplitScores,
    prediction_scores: SplitScores | None = None,
) -> EnsembleDraws:
    """Return predicted and observed coordinates of an ensemble in draws of the queries, pairs kept whole.

    Args:
        split_scores: scores of the queries on which the ensemble is observed; they are resampled.
        team: members of the ensemble.
        combination: `stack` or a vote rule.
        calibration_scores: scores of the calibration split; vote weights are fitted to it once, not per draw.
        prediction_scores: scores of the calibration split under the attack of `split_scores`, from which the
            ensemble is predicted; they are resampled, too. By default `calibration_scores`.
    """
    prediction_scores = prediction_scores or calibration_scores
    sizes = split_scores.class_sizes
    margins = compute_ensemble_margins(split_scores, team, combination, calibration_scores)
    observed, observed_undefended = (
        compute_class_metrics(*_resample_classes(split_scores, values))
        for values in (margins, split_scores.margin_table.undefended_margins)
    )
    if combination == STACK:
        predicted, predicted_undefended = (
            compute_class_metrics(*_resample_classes(prediction_scores, values), sizes)
            for values in (
                predict_stack_margins(prediction_scores, team),
                prediction_scores.margin_table.undefended_margins,
            )
        )
    else:
        predicted, predicted_undefended = _draw_predicted_vote(
            prediction_scores, team, combination, calibration_scores, sizes
        )
    return EnsembleDraws(
        compute_coordinates(predicted, predicted_undefended),
        compute_coordinates(observed, observed_undefended),
    )


def _draw_predicted_vote(
    prediction_scores: SplitScores,
    team: Sequence[str],
    rule: str,
    calibration_scores: SplitScores,
    class_sizes: tuple[int, int],
) -> tuple[ClassMetrics, ClassMetrics]:
    """Return predicted metrics of a vote, and of the undefended model by the same method, in every draw."""
    weights = None
    if rule == "fitted":
        weights = np.repeat(
            fit_vote_weights(calibration_scores.margin_table, calibration_scores.find_team_indices([team])),
            BOOTSTRAP_DRAWS,
            axis=0,
        )
    harmful, benign = (
        TeamMoments.from_draws(values)
        for values in _resample_classes(prediction_scores, prediction_scores.get_member_margins(team))
    )
    undefended_margins = prediction_scores.margin_table.undefended_margins[:, None]
    undefended_harmful, undefended_benign = (
        TeamMoments.from_draws(values) for values in _resample_classes(prediction_scores, undefended_margins)
    )
    return (
        predict_vote_metrics(harmful, benign, rule, weights, class_sizes),
        predict_vote_metrics(undefended_harmful, undefended_benign, "mean", None, class_sizes),
    )


def _resample_classes(split_scores: SplitScores, values: Any) -> tuple[Any, Any]:
    """Return the values of harmful and of benign queries in every draw, draws first.

    Args:
        split_scores: scores of the queries that are resampled.
        values: values by query; further axes are kept.
    """
    is_harmful, draws = split_scores.margin_table.is_harmful, split_scores.bootstrap_weights
    harmful, benign = (
        values[in_class][_expand_draw_weights(weights)]
        for in_class, weights in ((is_harmful, draws.harmful_weights), (~is_harmful, draws.benign_weights))
    )
    return harmful, benign


def _expand_draw_weights(weights: Float[np.ndarray, "draws n"]) -> Int[np.ndarray, "draws n"]:
    """Return the query indices of each draw, from the number of times that each query occurs in it."""
    n_draws, n = weights.shape
    indices = np.repeat(np.tile(np.arange(n), n_draws), weights.astype(int).ravel())
    return indices.reshape(n_draws, n)


def estimate_ensemble_intervals(
    split_scores: SplitScores,
    row: Mapping[str, Any],
    calibration_scores: SplitScores,
    ensemble_draws: EnsembleDraws | None,
) -> dict[str, float]:
    """Return the 95 % intervals of an ensemble's observed coordinates and of its interactions.

    Args:
        split_scores: scores of the queries.
        row: row of the ensemble, with `members` and `how`.
        calibration_scores: scores of the calibration split.
        ensemble_draws: draws of the ensemble; None for a single defense, which has no interaction.
    """
    team, combination, n = row["members"].split("+"), row["how"], min(split_scores.class_sizes)
    margins = compute_ensemble_margins(split_scores, team, combination, calibration_scores)
    points, clouds = (
        compute_estimates(
            split_scores.margin_table.undefended_margins,
            margins,
            split_scores.margin_table.is_harmful,
            0.0,
            weights,
            is_undefended=row["members"] == UNDEFENDED,
        )
        for weights in (split_scores.observed_weights, split_scores.bootstrap_weights)
    )
    columns: dict[str, float] = {}
    for name in ENSEMBLE_COORDINATES:
        columns |= make_estimate_columns(
            f"observed_{name}", points[name], clouds[name], n, name in COUNTED_ESTIMATES
        )
        del columns[f"observed_{name}"]  # the row has it already
        if ensemble_draws is not None:
            columns |= _estimate_interaction_interval(
                ensemble_draws.observed[name] - ensemble_draws.predicted[name], name, n
            )
    return columns


def _estimate_interaction_interval(
    interaction_draws: Any, coordinate: str, min_class_size: int
) -> dict[str, float]:
    """Return the interval of an interaction; NaN if all draws are equal, as when nothing is refused."""
    low, high = (
        bootstrap_interval(interaction_draws, min_class_size)
        if np.ptp(interaction_draws) > 1e-9
        else (np.nan, np.nan)
    )
    return {f"interaction_{coordinate}_low": low, f"interaction_{coordinate}_high": high}


def summarize_prediction_fit(rows: pd.DataFrame, draws_by_row: Mapping[int, EnsembleDraws]) -> pd.DataFrame:
    """Return how well predictions fit observations, per coordinate, by attack, split, combination and kind.

    Kinds are the measured ones and, with the suffix "by family", those of the paper. On the calibration
    split, from which the predictions are made, shift and discrimination of votes by (weighted) mean are left
    out: there, they are exact by construction.

    Args:
        rows: rows of `evaluate_votes` and `evaluate_stacks` with their kinds, and with intervals if there
            are any; rows without observed values are ignored.
        draws_by_row: draws of some rows, by row index. The statistics have intervals in groups where every
            row has draws; they resample the queries of both splits and the defenses.

    Returns:
        The statistics of `compute_fit_statistics` (`mean_absolute_error` is above 0 by sampling noise alone);
        the mean interaction (`mean_interaction`); the number of rows with an interval of the interaction
        (`tested`), and of those whose interval excludes 0 (`beyond_zero`).
    """
    observed_rows = rows[(rows["how"] != ALONE) & rows["observed_shift"].notna()]
    rows_by_kind = {"all": observed_rows}
    for column, suffix in (("kind", ""), ("kind_by_family", " by family")):
        for kind in ("intra", "inter"):
            rows_by_kind[kind + suffix] = observed_rows[observed_rows[column] == kind]
    fit_rows = []
    for kind, kind_rows in rows_by_kind.items():
        for (attack, split, combination), group in kind_rows.groupby(["attack", "split", "how"], sort=False):
            labels = {"attack": attack, "split": split, "how": combination, "kind": kind, "n": len(group)}
            draws = [draws_by_row[index] for index in group.index if index in draws_by_row]
            for coordinate in ENSEMBLE_COORDINATES:
                is_exact = combination in MEAN_VOTE_RULES and split == SELECTION_SPLIT
                if is_exact and coordinate in ("shift", "discrimination"):
                    continue
                fit_rows.append(labels | _summarize_coordinate_fit(group, coordinate, draws))
    return pd.DataFrame(fit_rows)


def _summarize_coordinate_fit(
    group: pd.DataFrame, coordinate: str, draws: Sequence[EnsembleDraws]
) -> dict[str, Any]:
    """Return the fit of one coordinate's predictions in one group of ensembles."""
    predicted = group[f"predicted_{coordinate}"].to_numpy(float)
    observed = group[f"observed_{coordinate}"].to_numpy(float)
    row: dict[str, Any] = {"coordinate": coordinate}
    for name, values in compute_fit_statistics(predicted[None], observed[None]).items():
        row[name] = float(values[0])
    row["mean_interaction"] = (observed - predicted).mean()
    if f"interaction_{coordinate}_low" in group:
        low, high = (group[f"interaction_{coordinate}{suffix}"] for suffix in ("_low", "_high"))
        row["tested"] = int(low.notna().sum())
        row["beyond_zero"] = int(((low > 0) | (high < 0)).sum())
    if len(draws) == len(group) > 2:
        predicted_draws = np.stack([draw.predicted[coordinate] for draw in draws], axis=1)
        observed_draws = np.stack([draw.observed[coordinate] for draw in draws], axis=1)
        weights = draw_team_weights(list(map(split_members, group["members"])), len(predicted_draws))
        row |= compute_fit_intervals(row, compute_fit_statistics(predicted_draws, observed_draws, weights))
    return row


def compute_fit_intervals(row: Mapping[str, Any], draws_by_statistic: Mapping[str, Any]) -> dict[str, float]:
    """Return the 95 % percentile interval of each statistic as columns, widened to contain its estimate.

    Args:
        row: estimate of each statistic.
        draws_by_statistic: its draws; draws in which it is not defined are ignored.
    """
    columns: dict[str, float] = {}
    for name, draws in draws_by_statistic.items():
        finite_draws = draws[np.isfinite(draws)]
        low, high = np.quantile(finite_draws, [0.025, 0.975]) if len(finite_draws) else (np.nan, np.nan)
        columns[f"{name}_low"] = float(min(low, row[name]))
        columns[f"{name}_high"] = float(max(high, row[name]))
    return columns


def find_raised_distances(
    split_scores: SplitScores,
    rows: pd.DataFrame,
    shift_probabilities: Mapping[str, float],
    calibration_scores: SplitScores,
) -> pd.DataFrame:
    """Return the pairs of shift defenses whose class distance, as in the paper, exceeds that of each member.

    On the probability scale, a pure shift changes the distance between the classes. Each raised distance is
    therefore compared with the gain in AUROC over the member with the higher AUROC: `real` if the interval of
    the gain lies above 0, `probability scale` if it lies below 0.01, else `cannot tell`.

    Args:
        split_scores: scores of the queries.
        rows: rows of ensembles on this split.
        shift_probabilities: probability of each defense that its mechanism is shift; only pairs with
            probabilities above ½ are examined.
        calibration_scores: scores of the calibration split.
    """
    pairs = rows[(rows["size"] == 2) & rows["observed_shift"].notna()]
    raised = []
    for row in iterate_rows(pairs):
        team = row["members"].split("+")
        p_shift = min(shift_probabilities.get(name, 0.0) for name in team)
        if p_shift > 0.5:
            labels = {name: row[name] for name in ("attack", "split", "members", "how")}
            comparison = _compare_class_distances(split_scores, team, row["how"], p_shift, calibration_scores)
            raised += [labels | comparison] if comparison else []
    return pd.DataFrame(raised, columns=list(raised[0]) if raised else _RAISED_DISTANCE_COLUMNS)


def _compare_class_distances(
    split_scores: SplitScores,
    team: Sequence[str],
    combination: str,
    p_shift: float,
    calibration_scores: SplitScores,
) -> dict[str, Any]:
    """Return the distances and the gains of a pair; empty if its distance does not exceed both members'."""
    member_metrics = {
        name: split_scores.compute_metrics(split_scores.get_member_margins([name]).T) for name in team
    }
    distances = {name: float(metrics["distance"][0]) for name, metrics in member_metrics.items()}
    pair_metrics = split_scores.compute_metrics(
        compute_ensemble_margins(split_scores, team, combination, calibration_scores)[None]
    )
    if pair_metrics["distance"][0] <= max(distances.values()):
        return {}
    better_member = max(team, key=lambda name: float(member_metrics[name]["auroc"][0]))
    gain = estimate_auroc_gain(split_scores, team, combination, better_member, calibration_scores)
    best_d_prime = max(float(metrics["d_prime"][0]) for metrics in member_metrics.values())
    return {
        "distance_undefended": float(split_scores.undefended_metrics["distance"][0]),
        "distance_first": distances[team[0]],
        "distance_second": distances[team[1]],
        "distance": float(pair_metrics["distance"][0]),
        "p_shift": p_shift,
        "better_member": better_member,
        **gain,
        "gain_d_prime": float(pair_metrics["d_prime"][0] - best_d_prime),
        "raise": _classify_raise(gain),
    }


def _classify_raise(gain: Mapping[str, float]) -> str:
    """Return whether a raised distance reflects a better ranking or only the probability scale."""
    if gain["gain_auroc_low"] > 0:
        return "real"
    return "probability scale" if gain["gain_auroc_high"] < _NEGLIGIBLE_GAIN else "cannot tell"


def estimate_auroc_gain(
    split_scores: SplitScores,
    team: Sequence[str],
    combination: str,
    defense: str,
    calibration_scores: SplitScores,
) -> dict[str, float]:
    """Return the difference between an ensemble's and a single defense's AUROC, with its 95 % interval.

    Args:
        split_scores: scores of the queries.
        team: members of the ensemble.
        combination: `stack` or a vote rule.
        defense: the single defense.
        calibration_scores: scores of the calibration split.
    """
    single_margins = split_scores.get_member_margins([defense])[:, 0]
    ensemble_margins = compute_ensemble_margins(split_scores, team, combination, calibration_scores)
    point, draws = (
        compute_estimates(
            single_margins, ensemble_margins, split_scores.margin_table.is_harmful, 0.0, weights
        )["delta_auroc"]
        for weights in (split_scores.observed_weights, split_scores.bootstrap_weights)
    )
    return make_estimate_columns("gain_auroc", point, draws, min(split_scores.class_sizes), from_counts=True)
