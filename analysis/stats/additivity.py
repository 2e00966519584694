"""How sure an ensemble's figures are, and how well what is observed follows what was predicted."""

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
    STACK,
    SplitScores,
    compute_ensemble_margins,
    predict_stack_margins,
)
from analysis.stats.tables import UNDEFENDED
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

_NEGLIGIBLE_GAIN = 0.01  # of AUROC
_RAISED_DISTANCE_COLUMNS = ["attack", "split", "members", "how", "raise"]


@dataclass(frozen=True)
class EnsembleDraws:
    """One ensemble in every bootstrap draw: each coordinate as predicted and as observed."""

    predicted: ClassMetrics
    observed: ClassMetrics


def draw_ensemble(
    split_scores: SplitScores, team: Sequence[str], combination: str, calibration_scores: SplitScores
) -> EnsembleDraws:
    """Return what is predicted and observed of an ensemble in draws of the queries, pairs kept whole.

    Args:
        split_scores: on whose queries.
        team: its members.
        combination: `stack` or a vote.
        calibration_scores: of the calibration split; its weights stay as they are.
    """
    sides = (
        (split_scores.margin_table.is_harmful, split_scores.bootstrap_weights.harmful_weights),
        (~split_scores.margin_table.is_harmful, split_scores.bootstrap_weights.benign_weights),
    )

    def each(values: Any) -> tuple[Any, Any]:
        """The values of either class, draws first."""
        harmful, benign = (values[side][_expand_draw_weights(weights)] for side, weights in sides)
        return harmful, benign

    came, base = (
        compute_class_metrics(*each(one))
        for one in (
            compute_ensemble_margins(split_scores, team, combination, calibration_scores),
            split_scores.margin_table.undefended_margins,
        )
    )
    if combination == STACK:
        return EnsembleDraws(
            compute_coordinates(
                compute_class_metrics(*each(predict_stack_margins(split_scores, team))), base
            ),
            compute_coordinates(came, base),
        )
    weights = None
    if combination == "fitted":
        weights = np.repeat(
            fit_vote_weights(calibration_scores.margin_table, calibration_scores.find_team_indices([team])),
            BOOTSTRAP_DRAWS,
            axis=0,
        )
    harmful, benign = (TeamMoments.from_draws(one) for one in each(split_scores.get_member_margins(team)))
    usual = [
        TeamMoments.from_draws(one) for one in each(split_scores.margin_table.undefended_margins[:, None])
    ]
    normal = predict_vote_metrics(usual[0], usual[1], "mean", None, split_scores.class_sizes)
    return EnsembleDraws(
        compute_coordinates(
            predict_vote_metrics(harmful, benign, combination, weights, split_scores.class_sizes), normal
        ),
        compute_coordinates(came, base),
    )


def _expand_draw_weights(weights: Float[np.ndarray, "draws n"]) -> Int[np.ndarray, "draws n"]:
    """Which queries a draw is made of, from how often each counts in it."""
    draws, n = weights.shape
    return np.repeat(np.tile(np.arange(n), draws), weights.astype(int).ravel()).reshape(draws, n)


def estimate_ensemble_intervals(
    split_scores: SplitScores,
    row: Mapping[str, Any],
    calibration_scores: SplitScores,
    ensemble_draws: EnsembleDraws | None,
) -> dict[str, float]:
    """Return the 95 % intervals of what was observed of an ensemble, and of its interaction.

    Args:
        split_scores: on whose queries.
        row: of the ensemble.
        calibration_scores: of the calibration split.
        ensemble_draws: of the ensemble; None for a single defense, which has no interaction.
    """
    team, how, n = row["members"].split("+"), row["how"], min(split_scores.class_sizes)
    after = compute_ensemble_margins(split_scores, team, how, calibration_scores)
    same = row["members"] == UNDEFENDED
    point, many = (
        compute_estimates(
            split_scores.margin_table.undefended_margins,
            after,
            split_scores.margin_table.is_harmful,
            0.0,
            sample,
            same,
        )
        for sample in (split_scores.observed_weights, split_scores.bootstrap_weights)
    )
    found: dict[str, float] = {}
    for name in ENSEMBLE_COORDINATES:
        ends = make_estimate_columns(
            f"observed_{name}", point[name], many[name], n, name in COUNTED_ESTIMATES
        )
        del ends[f"observed_{name}"]  # it is in the row
        found |= ends
        if ensemble_draws is not None:
            found |= _estimate_interaction_interval(
                ensemble_draws.observed[name] - ensemble_draws.predicted[name], name, n
            )
    return found


def _estimate_interaction_interval(
    interaction_draws: Any, coordinate: str, min_class_size: int
) -> dict[str, float]:
    """The interval of an interaction; none where no draw differs: nothing was refused, say, or everything."""
    low, high = (
        bootstrap_interval(interaction_draws, min_class_size)
        if np.ptp(interaction_draws) > 1e-9
        else (np.nan, np.nan)
    )
    return {f"interaction_{coordinate}_low": low, f"interaction_{coordinate}_high": high}


def summarize_prediction_fit(rows: pd.DataFrame, draws_by_row: Mapping[int, EnsembleDraws]) -> pd.DataFrame:
    """Return how well observation follows prediction, by attack, split, how and kind, for each coordinate.

    Kinds are the measured ones and, with "by family" behind them, the paper's. Shift and discrimination of
    votes by mean are left out: they are right by definition.

    Args:
        rows: of `votes` and `stacks` with their kinds, and intervals where there are; those that were not
            observed are left out.
        draws_by_row: the draws of some rows, by their index. Where all rows of a group have draws, R² and rank
            correlation have intervals.

    Returns:
        What `outcomes.follows` returns, the interaction's mean and mean size (which sampling alone makes
        larger than 0), and of how many rows (`tested`) the interval of the interaction leaves out 0
        (`beyond_zero`).
    """
    found = []
    seen = rows[(rows["how"] != ALONE) & rows["observed_shift"].notna()]
    groups = {"all": seen}
    for column, ending in (("kind", ""), ("kind_by_family", " by family")):
        groups |= {kind + ending: seen[seen[column] == kind] for kind in ("intra", "inter")}
    for kind, of_kind in groups.items():
        for (attack, split, how), group in of_kind.groupby(["attack", "split", "how"], sort=False):
            about = {"attack": attack, "split": split, "how": how, "kind": kind, "n": len(group)}
            drawn = [draws_by_row[index] for index in group.index if index in draws_by_row]
            for name in ENSEMBLE_COORDINATES:
                if how in MEAN_VOTE_RULES and name in ("shift", "discrimination"):
                    continue
                hoped, came = (group[f"{side}_{name}"].to_numpy(float) for side in ("predicted", "observed"))
                row = {**about, "coordinate": name}
                row |= {
                    one: float(value[0])
                    for one, value in compute_fit_statistics(hoped[None], came[None]).items()
                }
                row |= {"mean_interaction": (came - hoped).mean(), "mean_size": np.abs(came - hoped).mean()}
                if f"interaction_{name}_low" in group:
                    low, high = (group[f"interaction_{name}{end}"] for end in ("_low", "_high"))
                    row |= {
                        "tested": int(low.notna().sum()),
                        "beyond_zero": int(((low > 0) | (high < 0)).sum()),
                    }
                if len(drawn) == len(group) > 2:
                    sides = [
                        np.stack([getattr(one, side)[name] for one in drawn], axis=1)
                        for side in ("predicted", "observed")
                    ]
                    row |= _compute_fit_intervals(row, compute_fit_statistics(*sides))
                found.append(row)
    return pd.DataFrame(found)


def _compute_fit_intervals(row: Mapping[str, Any], draws_by_statistic: Mapping[str, Any]) -> dict[str, float]:
    """The ends of the intervals over draws; each holds its own estimate."""
    found: dict[str, float] = {}
    for name, cloud in draws_by_statistic.items():
        known = cloud[np.isfinite(cloud)]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        found |= {f"{name}_low": float(min(low, row[name])), f"{name}_high": float(max(high, row[name]))}
    return found


def find_raised_distances(
    split_scores: SplitScores,
    rows: pd.DataFrame,
    shift_probabilities: Mapping[str, float],
    calibration_scores: SplitScores,
) -> pd.DataFrame:
    """Return the pairs of two shift defenses whose distance, the paper's, exceeds that of each member.

    On the probability scale a pure shift changes the distance between the classes. So each raise is set
    beside what it does to the ranking, against the member that ranks better: `real` where the interval of the
    gain in AUROC lies above 0, `probability scale` where it lies below a hundredth, else `cannot tell`.

    Args:
        split_scores: on whose queries.
        rows: of ensembles on this half.
        shift_probabilities: how probable it is of each defense that it works by shift; those that mainly do are paired.
        calibration_scores: of the calibration split.
    """
    kept: list[dict[str, Any]] = []
    pairs = rows[(rows["size"] == 2) & rows["observed_shift"].notna()]
    for row in pairs.to_dict("records"):
        team = str(row["members"]).split("+")
        if min(shift_probabilities.get(name, 0.0) for name in team) <= 0.5:
            continue
        alone = {
            name: split_scores.compute_metrics(split_scores.get_member_margins([name]).T) for name in team
        }
        distance = {name: float(one["distance"][0]) for name, one in alone.items()}
        came = split_scores.compute_metrics(
            compute_ensemble_margins(split_scores, team, str(row["how"]), calibration_scores)[None]
        )
        if came["distance"][0] <= max(distance.values()):
            continue
        better = max(team, key=lambda name: float(alone[name]["auroc"][0]))
        ends = estimate_auroc_gain(split_scores, team, str(row["how"]), better, calibration_scores)
        kept.append(
            {
                **{name: row[name] for name in ("attack", "split", "members", "how")},
                "distance_undefended": float(split_scores.undefended_metrics["distance"][0]),
                "distance_first": distance[team[0]],
                "distance_second": distance[team[1]],
                "distance": float(came["distance"][0]),
                "p_shift": min(shift_probabilities[name] for name in team),
                "better_member": better,
                **ends,
                "gain_d_prime": float(
                    came["d_prime"][0] - max(float(one["d_prime"][0]) for one in alone.values())
                ),
                "raise": "real"
                if ends["gain_auroc_low"] > 0
                else "probability scale"
                if ends["gain_auroc_high"] < _NEGLIGIBLE_GAIN
                else "cannot tell",
            }
        )
    return pd.DataFrame(kept, columns=list(kept[0]) if kept else _RAISED_DISTANCE_COLUMNS)


def estimate_auroc_gain(
    split_scores: SplitScores,
    team: Sequence[str],
    combination: str,
    defense: str,
    calibration_scores: SplitScores,
) -> dict[str, float]:
    """Return by how much an ensemble's AUROC exceeds a single defense's, with its 95 % interval.

    Args:
        split_scores: on whose queries.
        team: the members.
        combination: `stack` or a vote.
        defense: the single defense.
        calibration_scores: of the calibration split.
    """
    before, after = (
        split_scores.get_member_margins([defense])[:, 0],
        compute_ensemble_margins(split_scores, team, combination, calibration_scores),
    )
    point, cloud = (
        compute_estimates(before, after, split_scores.margin_table.is_harmful, 0.0, sample)["delta_auroc"]
        for sample in (split_scores.observed_weights, split_scores.bootstrap_weights)
    )
    return make_estimate_columns("gain_auroc", point, cloud, min(split_scores.class_sizes), from_counts=True)
