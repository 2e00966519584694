"""Rival predictions of stacks and votes from their members on the calibration split, and how well they do.

Nothing of the test split enters a prediction. Predictions with a parameter are fitted to stacks measured on
the calibration split, for each stack only to those that share no defense with it (leave-one-defense-out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import ndtr

from analysis.stats.additivity import EnsembleDraws, compute_fit_intervals
from analysis.stats.bootstrap import adjust_p_values, bootstrap_interval
from analysis.stats.ensembles import (
    ALONE,
    REPORT_SPLIT,
    SELECTION_SPLIT,
    STACK,
    SplitScores,
    compute_ensemble_margins,
    draw_team_weights,
    predict_stack_margins,
    split_members,
)
from analysis.stats.tables import UNDEFENDED, iterate_rows
from analysis.stats.voting import compute_fit_statistics

# Outcomes that are predicted, in the order of the rows.
OUTCOMES = ("shift", "discrimination", "delta_auroc", "refusal_rate", "over_refusal_rate")
RATE_OUTCOMES = ("refusal_rate", "over_refusal_rate")
SUM_OF_MARGINS, SUM_OF_EFFECTS, SATURATING, OVERLAP = (
    "sum of margins",
    "sum of effects",
    "saturating",
    "overlap",
)
MOMENTS, SAME_ON_CALIBRATION = "moments", "measured on calibration"
MEMBER_PREDICTORS: Mapping[str, str] = {
    "lower member": "the lowest of the members' values",
    "larger effect": "the value of the member that is farthest from the undefended model",
    "best member": "the value of the member with the highest AUROC",
}
STACK_PREDICTORS: Mapping[str, str] = {
    SUM_OF_MARGINS: "the members' changes of the margin add up, query by query",
    SUM_OF_EFFECTS: "the members' changes of the outcome add up",
    **MEMBER_PREDICTORS,
    SATURATING: "a + b − ab / bound: each effect takes its share of what the other leaves; bound fitted",
    OVERLAP: "(1 − κ · overlap) (a + b): effects of the same parts of the model add up less; κ fitted",
}
MIN_MEASURED_STACKS = 3  # fewer cannot tell predictors apart, and the default is used
DEFAULT_PREDICTOR = SUM_OF_MARGINS
_USUAL_ERROR_QUANTILE = 0.9  # of the other stacks' errors, which an interaction must exceed
_SIGNIFICANCE_LEVEL = 0.05

# By outcome, draws × teams; the first draw is the observed data, the others are bootstrap draws.
OutcomeDraws = Mapping[str, Float[np.ndarray, "draws teams"]]
# Two defenses and a contrast, shift or discrimination → cosine of their attribution profiles.
OverlapTable = Mapping[tuple[frozenset[str], str], float]


@dataclass(frozen=True)
class StackPredictions:
    """Predicted outcomes of stacks by predictor.

    Attributes:
        teams: members of each stack.
        values: predictor → outcome → values, first from the data, then in each draw.
        parameters: predictor and outcome → median over the stacks of the parameter that was fitted to the
            other defenses: the bound of `saturating`, in the unit of the outcome, and κ of `overlap`.
        team_weights: how often each stack counts in each draw of the defenses; 1 in the first.
    """

    teams: tuple[tuple[str, ...], ...]
    values: Mapping[str, OutcomeDraws]
    parameters: Mapping[tuple[str, str], float]
    team_weights: Float[np.ndarray, "draws teams"]


def compute_outcome_draws(
    split_scores: SplitScores, margins: Float[np.ndarray, "n teams"], with_draws: bool = True
) -> OutcomeDraws:
    """Return the outcomes of classifiers with these margins in the data and in draws of the queries.

    Args:
        split_scores: scores of the queries.
        margins: margin of each query under each classifier, nats above the threshold.
        with_draws: whether to add the bootstrap draws of the split.
    """
    is_harmful = split_scores.margin_table.is_harmful
    resamplings = [split_scores.observed_weights, *([split_scores.bootstrap_weights] if with_draws else [])]
    harmful_weights = np.concatenate([weights.harmful_weights for weights in resamplings])
    benign_weights = np.concatenate([weights.benign_weights for weights in resamplings])
    undefended = split_scores.margin_table.undefended_margins[:, None]
    n_harmful, n_benign = split_scores.class_sizes

    def average(values: Any) -> tuple[Any, Any]:
        return (
            harmful_weights @ values[is_harmful] / n_harmful,
            benign_weights @ values[~is_harmful] / n_benign,
        )

    harmful_change, benign_change = average(margins - undefended)
    harmful_rate, benign_rate = average((margins > 0).astype(float))
    aurocs = np.stack(
        [
            _compute_weighted_auroc(column[is_harmful], column[~is_harmful], harmful_weights, benign_weights)
            for column in np.concatenate([undefended, margins], axis=1).T
        ],
        axis=1,
    )
    return {
        "shift": (harmful_change + benign_change) / 2,
        "discrimination": harmful_change - benign_change,
        "delta_auroc": aurocs[:, 1:] - aurocs[:, :1],
        "refusal_rate": harmful_rate,
        "over_refusal_rate": benign_rate,
    }


def _compute_weighted_auroc(
    harmful: Float[np.ndarray, " h"],
    benign: Float[np.ndarray, " b"],
    harmful_weights: Float[np.ndarray, "draws h"],
    benign_weights: Float[np.ndarray, "draws b"],
) -> Float[np.ndarray, " draws"]:
    """Return the AUROC in each draw, without pseudo-observations; ties count half."""
    wins = (harmful[:, None] > benign) + 0.5 * (harmful[:, None] == benign)
    return np.asarray(((harmful_weights @ wins) * benign_weights).sum(1) / wins.size)


def predict_stack_outcomes(
    calibration: SplitScores,
    teams: Sequence[tuple[str, ...]],
    overlap: OverlapTable | None = None,
    with_draws: bool = True,
) -> StackPredictions:
    """Return the outcomes of stacks that each predictor expects from the calibration split.

    The effects a, b of two members are their differences from the undefended model. `saturating` combines
    them on a bounded scale: where 1 is the most that can be reached, two independent actions that reach u and
    v together reach 1 − (1 − u)(1 − v); with a = u · bound and b = v · bound, that is a + b − ab / bound
    (Bliss independence; Bliss 1939, https://doi.org/10.1111/j.1744-7348.1939.tb06990.x). It has the one
    parameter because the bound is the only number that the rule leaves open; without a bound it is the sum.
    1 / bound is fitted by least squares to the stacks of two other defenses; no bound is smaller than the
    largest effect of a single defense. κ of `overlap`, from 0 to 1, is fitted in the same way; the overlap is
    the cosine of the members' attribution profiles, on shift for shift and the rates and on discrimination
    for discrimination and AUROC; 0 if it is negative or unknown. Without any stack of two other defenses,
    both are the sum of effects.

    Args:
        calibration: scores of the calibration split, with the stacks that were measured on it.
        teams: members of each stack.
        overlap: overlap of the attribution profiles of defenses; None leaves `overlap` out.
        with_draws: whether to add draws that resample the queries of the split and the defenses.
    """
    names = calibration.margin_table.condition_names
    outcomes = compute_outcome_draws(calibration, calibration.margin_table.margins, with_draws)
    measured = _list_measured_pairs(calibration)
    n_draws = len(outcomes["shift"])
    weights = np.ones((n_draws, len(teams) + len(measured)))
    if with_draws:
        weights[1:] = draw_team_weights([*teams, *measured], n_draws - 1, calibration.seed)
    summed_margins = np.stack([predict_stack_margins(calibration, team) for team in teams], axis=1)
    values: dict[str, dict[str, Any]] = {
        SUM_OF_MARGINS: dict(compute_outcome_draws(calibration, summed_margins, with_draws))
    }
    parameters: dict[tuple[str, str], float] = {}
    columns = [[names.index(name) for name in team] for team in teams]
    for predictor, of_outcome in _predict_from_members(outcomes, columns, names.index(UNDEFENDED)).items():
        values[predictor] = of_outcome
    is_disjoint = np.array([[not set(team) & set(pair) for pair in measured] for team in teams], dtype=float)
    is_disjoint = is_disjoint.reshape(len(teams), len(measured))
    for predictor in (SATURATING, *((OVERLAP,) if overlap is not None else ())):
        values[predictor] = {}
        for outcome in OUTCOMES:
            effects = outcomes[outcome] - outcomes[outcome][:, [names.index(UNDEFENDED)]]
            coefficients = _fit_coefficients(
                predictor, outcome, effects, names, measured, weights[:, len(teams) :], is_disjoint, overlap
            )
            effect = np.stack(
                [
                    _combine_effects(
                        predictor,
                        effects[:, team_columns],
                        coefficients[:, index],
                        _look_up_overlap(overlap, team, outcome),
                    )
                    for index, (team, team_columns) in enumerate(zip(teams, columns, strict=True))
                ],
                axis=1,
            )
            values[predictor][outcome] = _add_reference(outcome, effect, outcomes[outcome], names)
            middle = float(np.median(coefficients[0]))
            parameters[predictor, outcome] = (
                middle if predictor == OVERLAP else 1 / middle if middle else np.inf
            )
    return StackPredictions(tuple(teams), values, parameters, weights[:, : len(teams)])


def _list_measured_pairs(calibration: SplitScores) -> list[tuple[str, ...]]:
    """Return the stacks of two that were measured on the calibration split."""
    teams = map(split_members, calibration.margin_table.condition_names)
    return [team for team in teams if len(team) == 2]


def _predict_from_members(
    outcomes: OutcomeDraws, columns: Sequence[Sequence[int]], undefended_column: int
) -> dict[str, dict[str, Any]]:
    """Return the predictions that need no parameter: the sum of effects, and each choice of a member."""
    predicted: dict[str, dict[str, Any]] = {SUM_OF_EFFECTS: {}, **{name: {} for name in MEMBER_PREDICTORS}}
    for outcome in OUTCOMES:
        reference = outcomes[outcome][:, undefended_column]
        lists: dict[str, list[Any]] = {name: [] for name in predicted}
        for team_columns in columns:
            values = outcomes[outcome][:, team_columns]
            effects = values - reference[:, None]
            choices = {
                "lower member": values.argmin(1),
                "larger effect": np.abs(effects).argmax(1),
                "best member": outcomes["delta_auroc"][:, team_columns].argmax(1),
            }
            summed = reference + effects.sum(1)
            lists[SUM_OF_EFFECTS].append(np.clip(summed, 0, 1) if outcome in RATE_OUTCOMES else summed)
            for name, choice in choices.items():
                lists[name].append(np.take_along_axis(values, choice[:, None], axis=1)[:, 0])
        for name, teams_values in lists.items():
            predicted[name][outcome] = np.stack(teams_values, axis=1)
    return predicted


def _fit_coefficients(
    predictor: str,
    outcome: str,
    effects: Float[np.ndarray, "draws conditions"],
    names: Sequence[str],
    measured: Sequence[tuple[str, ...]],
    pair_weights: Float[np.ndarray, "draws pairs"],
    is_disjoint: Float[np.ndarray, "teams pairs"],
    overlap: OverlapTable | None,
) -> Float[np.ndarray, "draws teams"]:
    """Return 1 / bound or κ for each stack in each draw: least squares over the pairs of other defenses."""
    if not measured:
        return np.zeros((len(effects), len(is_disjoint)))
    first, second = (effects[:, [names.index(pair[side]) for pair in measured]] for side in (0, 1))
    observed = effects[:, [names.index("+".join(pair)) for pair in measured]]
    if predictor == SATURATING:
        removed = first * second
    else:
        cosines = np.array([_look_up_overlap(overlap, pair, outcome) for pair in measured])
        removed = cosines * (first + second)
    products = (pair_weights * removed * (first + second - observed)) @ is_disjoint.T
    squares = (pair_weights * removed**2) @ is_disjoint.T
    coefficients = np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
    if predictor == OVERLAP:
        return np.clip(coefficients, 0, 1)
    is_single = [len(split_members(name)) == 1 for name in names]
    largest = np.abs(effects[:, is_single]).max(1, keepdims=True)
    highest = np.divide(1, largest, out=np.zeros_like(largest), where=largest > 0)
    return np.clip(coefficients, -highest, highest)


def _combine_effects(
    predictor: str,
    effects: Float[np.ndarray, "draws size"],
    coefficients: Float[np.ndarray, " draws"],
    overlap: float,
) -> Float[np.ndarray, " draws"]:
    """Return the effect of a stack from those of its members."""
    if predictor == OVERLAP:
        return np.asarray((1 - coefficients * overlap) * effects.sum(1))
    combined = effects[:, 0]
    for member in effects.T[1:]:  # the rule is associative, so the order does not matter
        combined = combined + member - coefficients * combined * member
    return np.asarray(combined)


def _look_up_overlap(overlap: OverlapTable | None, team: Sequence[str], outcome: str) -> float:
    """Return the mean overlap of the pairs of a team, each at least 0; 0 if it is unknown."""
    if overlap is None:
        return 0.0
    contrast = "discrimination" if outcome in ("discrimination", "delta_auroc") else "shift"
    pairs = [frozenset((one, other)) for index, one in enumerate(team) for other in team[index + 1 :]]
    return float(np.mean([max(overlap.get((pair, contrast), 0.0), 0.0) for pair in pairs]))


def _add_reference(
    outcome: str,
    effects: Float[np.ndarray, "draws teams"],
    values: Float[np.ndarray, "draws conditions"],
    names: Sequence[str],
) -> Float[np.ndarray, "draws teams"]:
    """Return the outcome of each stack from its effect; rates stay between 0 and 1."""
    total = values[:, [names.index(UNDEFENDED)]] + effects
    return np.clip(total, 0, 1) if outcome in RATE_OUTCOMES else total


def build_overlap_table(overlap: pd.DataFrame, attack: str) -> OverlapTable:
    """Return the overlap of defenses from `overlap.csv` of `analyze mechanism --ensembles`.

    Args:
        overlap: table with `attack`, `defense`, `other`, `contrast` and `cosine`.
        attack: attack under which the profiles were measured; if the table has none of it, all its rows
            count.
    """
    rows = overlap[overlap["attack"] == attack] if "attack" in overlap else overlap
    rows = rows if len(rows) else overlap
    return {
        (frozenset((str(row["defense"]), str(row["other"]))), str(row["contrast"])): float(row["cosine"])
        for row in iterate_rows(rows.dropna(subset=["cosine"]))
    }


def choose_rate_predictor(
    calibrations: Sequence[SplitScores], overlaps: Sequence[OverlapTable | None]
) -> tuple[str, int]:
    """Return the predictor of refusal rates with the smallest error, and the number of stacks that decide.

    The error is the mean absolute error of both refusal rates, over the stacks that were measured on the
    calibration split and over attacks; fitted parameters are those of other defenses. With fewer than
    `MIN_MEASURED_STACKS` stacks, it is the default, the sum of margins.

    Args:
        calibrations: scores of the calibration split under each attack.
        overlaps: overlap of the defenses under each attack; None if it is not known.
    """
    measured = _list_measured_pairs(calibrations[0])
    if len(measured) < MIN_MEASURED_STACKS:
        return DEFAULT_PREDICTOR, len(measured)
    errors: dict[str, list[float]] = {}
    for calibration, overlap in zip(calibrations, overlaps, strict=True):
        predicted = predict_stack_outcomes(calibration, measured, overlap, with_draws=False)
        observed = _observe_stacks(calibration, measured, with_draws=False)
        for predictor, of_outcome in predicted.values.items():
            errors.setdefault(predictor, []).extend(
                float(np.abs(of_outcome[outcome] - observed[outcome]).mean()) for outcome in RATE_OUTCOMES
            )
    means = {predictor: float(np.mean(values)) for predictor, values in errors.items()}
    return min(means, key=lambda name: means[name]), len(measured)


def predict_stack_rates(
    calibration: SplitScores,
    teams: Sequence[tuple[str, ...]],
    predictor: str,
    overlap: OverlapTable | None = None,
) -> pd.DataFrame:
    """Return the predicted refusal rates of stacks: `attack`, `members` and `predicted_…` of both rates.

    Args:
        calibration: scores of the calibration split under one attack.
        teams: members of each stack.
        predictor: one of `STACK_PREDICTORS`.
        overlap: overlap of the attribution profiles, for `overlap`.
    """
    values = predict_stack_outcomes(calibration, teams, overlap, with_draws=False).values[predictor]
    columns: dict[str, Any] = {"attack": calibration.attack, "members": ["+".join(team) for team in teams]}
    return pd.DataFrame(columns | {f"predicted_{outcome}": values[outcome][0] for outcome in RATE_OUTCOMES})


def _observe_stacks(
    split_scores: SplitScores, teams: Sequence[tuple[str, ...]], with_draws: bool = True
) -> OutcomeDraws:
    """Return the measured outcomes of stacks."""
    names = ["+".join(team) for team in teams]
    return compute_outcome_draws(split_scores, split_scores.get_member_margins(names), with_draws)


def compare_stack_predictors(
    calibration: SplitScores, report: SplitScores, overlap: OverlapTable | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return how well each predictor does on the stacks that were run, and which stacks interact.

    Args:
        calibration: scores of the calibration split, on which all predictions rest.
        report: scores of the test split under the same attack.
        overlap: overlap of the attribution profiles of defenses; None leaves the predictor `overlap` out.

    Returns:
        The table of `_build_fit_rows`, and the table of `find_interacting_stacks`; both are empty if no stack
        was run.
    """
    teams = [team for team in map(split_members, report.margin_table.condition_names) if len(team) > 1]
    if not teams:
        return pd.DataFrame(), pd.DataFrame()
    predictions = predict_stack_outcomes(calibration, teams, overlap)
    observed = {
        split_scores.split: _observe_stacks(split_scores, teams) for split_scores in (calibration, report)
    }
    values = dict(predictions.values) | {SAME_ON_CALIBRATION: observed[calibration.split]}
    fit = _build_fit_rows(report.attack, STACK, values, observed, predictions.team_weights)
    fit["parameter"] = [
        predictions.parameters.get((predictor, outcome), np.nan)
        for predictor, outcome in zip(fit["predictor"], fit["outcome"], strict=True)
    ]
    return fit, find_interacting_stacks(report, teams, fit, values, observed[report.split])


def compare_vote_predictors(
    calibration: SplitScores,
    report: SplitScores,
    weight_scores: SplitScores,
    rows: pd.DataFrame,
    draws_by_row: Mapping[int, EnsembleDraws],
) -> pd.DataFrame:
    """Return how well each predictor does on the votes of each rule, all of whose rows have draws.

    Votes are predicted from the moments of their members (`moments`) or by one of the members. For
    comparison, `measured on calibration` is the vote itself on the calibration split.

    Args:
        calibration: scores of the calibration split, on which all predictions rest.
        report: scores of the test split under the same attack.
        weight_scores: scores to which the weights of the rule `fitted` are fitted.
        rows: rows of `evaluate_votes` on the test split under this attack.
        draws_by_row: draws of some rows, by row index.
    """
    outcomes = compute_outcome_draws(calibration, calibration.margin_table.margins)
    names = calibration.margin_table.condition_names
    tables = [pd.DataFrame()]
    for rule, group in rows[~rows["how"].isin((ALONE, STACK))].groupby("how", sort=False):
        draws = [draws_by_row[index] for index in group.index if index in draws_by_row]
        if len(draws) < len(group):
            continue
        teams = list(map(split_members, group["members"]))
        sides = {
            side: {
                outcome: np.concatenate(
                    [
                        group[f"{side}_{outcome}"].to_numpy(float)[None],
                        np.stack([getattr(draw, side)[outcome] for draw in draws], axis=1),
                    ]
                )
                for outcome in OUTCOMES
            }
            for side in ("predicted", "observed")
        }
        columns = [[names.index(name) for name in team] for team in teams]
        by_member = _predict_from_members(outcomes, columns, names.index(UNDEFENDED))
        margins = [compute_ensemble_margins(calibration, team, str(rule), weight_scores) for team in teams]
        measured = compute_outcome_draws(calibration, np.stack(margins, axis=1))
        values = {MOMENTS: sides["predicted"], **{name: by_member[name] for name in MEMBER_PREDICTORS}}
        weights = np.ones_like(measured["shift"])
        weights[1:] = draw_team_weights(teams, len(weights) - 1, calibration.seed)
        observed = {calibration.split: measured, report.split: sides["observed"]}
        tables.append(
            _build_fit_rows(
                report.attack, str(rule), values | {SAME_ON_CALIBRATION: measured}, observed, weights
            )
        )
    return pd.concat(tables, ignore_index=True)


def _build_fit_rows(
    attack: str,
    combination: str,
    predictions: Mapping[str, OutcomeDraws],
    observed_by_split: Mapping[str, OutcomeDraws],
    team_weights: Float[np.ndarray, "draws teams"],
) -> pd.DataFrame:
    """Return a row per split, outcome and predictor: R², rank correlation and mean absolute error.

    Their 95 % intervals resample the queries of both splits and the defenses. `is_best`: the predictor has
    the smallest mean absolute error for this outcome on the calibration split; the outcome of the same
    ensemble on the calibration split is no prediction from its members and does not compete.
    """
    rows = []
    for split, observed in observed_by_split.items():
        for outcome in OUTCOMES:
            for predictor, predicted in predictions.items():
                if predictor == SAME_ON_CALIBRATION and split == SELECTION_SPLIT:
                    continue
                row: dict[str, Any] = {
                    "attack": attack,
                    "split": split,
                    "how": combination,
                    "outcome": outcome,
                    "predictor": predictor,
                    "n": team_weights.shape[1],
                }
                statistics = compute_fit_statistics(predicted[outcome], observed[outcome], team_weights)
                row |= {name: float(values[0]) for name, values in statistics.items()}
                draws = {name: values[1:] for name, values in statistics.items()}
                rows.append(row | (compute_fit_intervals(row, draws) if row["n"] > 2 else {}))
    table = pd.DataFrame(rows)
    chosen = table[table["split"] == SELECTION_SPLIT]
    best = chosen.loc[chosen.groupby("outcome")["mean_absolute_error"].idxmin()]
    best_by_outcome = dict(zip(best["outcome"], best["predictor"], strict=True))
    return table.assign(is_best=table["outcome"].map(best_by_outcome) == table["predictor"])


def find_interacting_stacks(
    report: SplitScores,
    teams: Sequence[tuple[str, ...]],
    fit: pd.DataFrame,
    predictions: Mapping[str, OutcomeDraws],
    observed: OutcomeDraws,
) -> pd.DataFrame:
    """Return for each stack and outcome whether its members interact beyond the error of the best predictor.

    Args:
        report: scores of the test split.
        teams: members of each stack.
        fit: table of `_build_fit_rows`, which says which predictor is best for an outcome.
        predictions: predicted outcomes by predictor.
        observed: outcomes on the test split.

    Returns:
        `predictor`, `predicted`, `observed` and their difference `interaction`, with its interval; its
        two-sided `p`, from the standard deviation of its draws and a normal distribution, by Holm's method
        over the stacks; `usual_error`, which nine in ten of the other stacks stay below; and `interacts`:
        `above` or `below` the prediction if p < .05 and the difference is larger than the usual error,
        `no more than usual` if only p < .05, else `not shown`.
    """
    best = fit[fit["is_best"] & (fit["split"] == SELECTION_SPLIT)].set_index("outcome")["predictor"]
    rows = []
    for outcome in OUTCOMES:
        predicted = predictions[best[outcome]][outcome]
        errors = observed[outcome] - predicted
        point, draws = errors[0], errors[1:]
        spread = draws.std(0)
        has_spread = spread > 1e-9
        z = np.divide(np.abs(point), spread, out=np.full_like(point, np.nan), where=has_spread)
        p_values = adjust_p_values(pd.Series(2 * ndtr(-z))).to_numpy(float)
        for index, team in enumerate(teams):
            low, high = (
                bootstrap_interval(draws[:, index], min(report.class_sizes))
                if has_spread[index]
                else (np.nan, np.nan)
            )
            others = np.delete(np.abs(point), index)
            usual = float(np.quantile(others, _USUAL_ERROR_QUANTILE)) if len(others) > 1 else np.nan
            rows.append(
                {
                    "attack": report.attack,
                    "split": REPORT_SPLIT,
                    "members": "+".join(team),
                    "outcome": outcome,
                    "predictor": best[outcome],
                    "predicted": predicted[0, index],
                    "observed": observed[outcome][0, index],
                    "interaction": point[index],
                    "interaction_low": low,
                    "interaction_high": high,
                    "p": p_values[index],
                    "usual_error": usual,
                    "interacts": _classify_interaction(point[index], p_values[index], usual),
                }
            )
    return pd.DataFrame(rows)


def _classify_interaction(difference: float, p_value: float, usual_error: float) -> str:
    """Return the plain word for a difference from the prediction; NaN p-values and errors show nothing."""
    if not p_value < _SIGNIFICANCE_LEVEL or np.isnan(usual_error):
        return "not shown"
    if not abs(difference) > usual_error:
        return "no more than usual"
    return "above" if difference > 0 else "below"
