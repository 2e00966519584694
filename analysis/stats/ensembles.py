"""Predicted and observed effects of ensembles, and the difference between them, the interaction.

Predictions use the members' scores on the calibration split only. The margins of a stack, whose members are
applied together, are predicted query by query: the undefended margin plus the sum of the members' separate
changes (`analysis.stats.predictors` compares rival predictions). A vote is predicted from its members' means,
spreads and correlations (`analysis.stats.voting`) and observed by combining the members' margins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from analysis.stats.bootstrap import ResamplingUnits, ResamplingWeights
from analysis.stats.tables import UNDEFENDED, ScoreTable
from analysis.stats.voting import (
    ENSEMBLE_COORDINATES,
    ClassMetrics,
    MarginTable,
    ReferenceMetrics,
    TeamMoments,
    combine_margins,
    compute_class_metrics,
    compute_coordinates,
    fit_vote_weights,
    list_vote_rules,
    predict_vote_metrics,
)

ALONE, STACK = "alone", "stack"
SELECTION_SPLIT, REPORT_SPLIT = "calibration", "test"
# The paper's assignment (https://arxiv.org/abs/2502.14486); it covers no other family.
MECHANISM_BY_FAMILY = {
    "reminders": "shift",
    "tuning": "shift",
    "backdoor": "shift",
    "refactoring": "discrimination",
}


@dataclass(frozen=True)
class SplitScores:
    """Margins of one split of the queries under one attack.

    Attributes:
        attack: name of the attack.
        split: `calibration`, on which ensembles are chosen, or `test`, on which they are reported.
        margin_table: margins of all conditions, including the stacks that were run.
        units: resampling units of the queries.
        seed: seed of the bootstrap.
    """

    attack: str
    split: str
    margin_table: MarginTable
    units: ResamplingUnits
    seed: int = 0

    @classmethod
    def from_scores(cls, scores: ScoreTable, attack: str, split: str, seed: int = 0) -> SplitScores:
        """Return the margins under one attack.

        Args:
            scores: scores of the split's queries.
            attack: name of the attack.
            split: name of the split.
            seed: seed of the bootstrap.
        """
        undefended = scores.select_condition(attack, UNDEFENDED)
        names = tuple(name for attack_name, name in scores.condition_keys if attack_name == attack)
        margins = [scores.select_condition(attack, name)["margin"].to_numpy(float) for name in names]
        is_harmful = undefended["harmful"].to_numpy(bool)
        centered_margins = np.stack(margins, axis=1) - scores.threshold
        undefended_margins = centered_margins[:, names.index(UNDEFENDED)]
        margin_table = MarginTable(names, centered_margins, undefended_margins, is_harmful)
        units = ResamplingUnits.from_pairs(undefended["pair"], is_harmful)
        return cls(attack, split, margin_table, units, seed)

    @cached_property
    def observed_weights(self) -> ResamplingWeights:
        """Weights of the observed data."""
        return ResamplingWeights.from_observed(self.units)

    @cached_property
    def bootstrap_weights(self) -> ResamplingWeights:
        """Bootstrap draws, shared by all estimates of this split; those of the two splits are independent."""
        return ResamplingWeights.from_bootstrap(self.units, seed=self.seed + (self.split == SELECTION_SPLIT))

    def find_team_indices(self, teams: Sequence[Sequence[str]]) -> Int[np.ndarray, "teams size"]:
        """Return the column indices of the members of teams of one size."""
        indices = {name: index for index, name in enumerate(self.margin_table.condition_names)}
        return np.array([[indices[name] for name in team] for team in teams])

    def get_member_margins(self, team: Sequence[str]) -> Float[np.ndarray, "n size"]:
        """Return the margins of a team's members, nats above the threshold."""
        return self.margin_table.margins[:, self.find_team_indices([team])[0]]

    @property
    def class_sizes(self) -> tuple[int, int]:
        """Numbers of harmful and of benign queries."""
        harmful = int(self.margin_table.is_harmful.sum())
        return harmful, len(self.margin_table.is_harmful) - harmful

    def compute_metrics(
        self, margins: Float[np.ndarray, "teams n"], class_sizes: tuple[int, int] | None = None
    ) -> ClassMetrics:
        """Return the metrics of classifiers with these margins.

        Args:
            margins: margins of each classifier on the queries of this split, nats above the threshold.
            class_sizes: numbers of queries for the log-linear correction of d′; by default those of this
                split, for a prediction those of the split that it is compared with.
        """
        return compute_class_metrics(
            margins[:, self.margin_table.is_harmful], margins[:, ~self.margin_table.is_harmful], class_sizes
        )

    def select_queries(self, is_selected: Bool[np.ndarray, " n"]) -> SplitScores:
        """Return the margins of some of the queries; pairs must be kept whole for later resampling.

        Args:
            is_selected: whether each query is kept.
        """
        table = self.margin_table
        part = MarginTable(
            table.condition_names,
            table.margins[is_selected],
            table.undefended_margins[is_selected],
            table.is_harmful[is_selected],
        )
        return replace(self, margin_table=part, units=self.units.select_queries(is_selected))

    @cached_property
    def undefended_metrics(self) -> ClassMetrics:
        """Metrics of the undefended model."""
        return self.compute_metrics(self.margin_table.undefended_margins[None])


def list_teams(defenses: Sequence[str], max_size: int) -> list[tuple[str, ...]]:
    """Return all teams of two to `max_size` members.

    >>> list_teams(["a", "b", "c"], 3)
    [('a', 'b'), ('a', 'c'), ('b', 'c'), ('a', 'b', 'c')]
    """
    return [team for count in range(2, max_size + 1) for team in combinations(defenses, count)]


def split_members(members: str) -> tuple[str, ...]:
    """Return the members of an ensemble from their joined names.

    >>> split_members("a+b")
    ('a', 'b')
    """
    return tuple(members.split("+"))


def draw_team_weights(
    teams: Sequence[tuple[str, ...]], n_draws: int, seed: int = 0
) -> Float[np.ndarray, "draws teams"]:
    """Return how often each team counts in draws that resample the defenses.

    A statistic over pairs of few defenses depends on which defenses there are, because each is in many pairs.
    The defenses are therefore drawn with replacement, and a team counts as often as the product of the counts
    of its members.

    >>> weights = draw_team_weights([("a", "b"), ("a", "c")], 500)
    >>> weights.shape, sorted(set(weights.ravel().tolist()))
    ((500, 2), [0.0, 1.0, 2.0])

    Args:
        teams: members of each team.
        n_draws: number of draws.
        seed: random seed.
    """
    defenses = sorted({name for team in teams for name in team})
    rng = np.random.default_rng([seed, len(defenses)])
    counts = rng.multinomial(len(defenses), np.full(len(defenses), 1 / len(defenses)), size=n_draws)
    columns = [
        np.prod([counts[:, defenses.index(name)] for name in dict.fromkeys(team)], axis=0) for team in teams
    ]
    return np.stack(columns, axis=1).astype(float)


def evaluate_single_defenses(split_scores: SplitScores, defenses: Iterable[str]) -> pd.DataFrame:
    """Return a row for each single defense."""
    teams = [(defense,) for defense in defenses]
    return _build_ensemble_rows(split_scores, teams, ALONE, None, _observe_conditions(split_scores, teams))


def evaluate_votes(
    split_scores: SplitScores,
    teams: Sequence[tuple[str, ...]],
    calibration_scores: SplitScores,
    prediction_scores: SplitScores | None = None,
) -> pd.DataFrame:
    """Return a row for each team and vote rule, predicted and observed.

    Args:
        split_scores: scores of the queries on which the votes are observed.
        teams: teams of defenses.
        calibration_scores: scores of the calibration split, to which vote weights are fitted.
        prediction_scores: scores of the calibration split under the attack of `split_scores`, from whose
            moments the votes are predicted; by default `calibration_scores`.
    """
    tables, margin_table = [], split_scores.margin_table
    predicting_table = (prediction_scores or calibration_scores).margin_table
    classes = predicting_table.is_harmful, ~predicting_table.is_harmful
    undefended_harmful, undefended_benign = (
        TeamMoments.from_teams(predicting_table.undefended_margins[in_class][:, None], np.array([[0]]))
        for in_class in classes
    )
    predicted_undefended = predict_vote_metrics(
        undefended_harmful, undefended_benign, "mean", None, split_scores.class_sizes
    )
    for size in sorted({len(team) for team in teams}):
        sized_teams = [team for team in teams if len(team) == size]
        team_indices = split_scores.find_team_indices(sized_teams)
        weights = fit_vote_weights(
            calibration_scores.margin_table, calibration_scores.find_team_indices(sized_teams)
        )
        harmful, benign = (
            TeamMoments.from_teams(predicting_table.margins[in_class], team_indices) for in_class in classes
        )
        member_margins = margin_table.margins.T[team_indices].transpose(0, 2, 1)  # teams, queries, members
        for rule in list_vote_rules(size):
            predicted = predict_vote_metrics(harmful, benign, rule, weights, split_scores.class_sizes)
            observed = split_scores.compute_metrics(
                combine_margins(member_margins, rule, weights[:, None, :])
            )
            tables.append(
                _build_ensemble_rows(
                    split_scores, sized_teams, rule, predicted, observed, predicted_undefended
                )
            )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def evaluate_stacks(
    split_scores: SplitScores, teams: Sequence[tuple[str, ...]], prediction_scores: SplitScores
) -> pd.DataFrame:
    """Return a row for each stack, predicted, and observed if it was run; those that were run come first.

    Args:
        split_scores: scores of the queries on which the stacks are observed.
        teams: members of each stack.
        prediction_scores: scores of the calibration split under the same attack, from which the stacks are
            predicted.
    """
    condition_names, sizes = split_scores.margin_table.condition_names, split_scores.class_sizes
    undefended = prediction_scores.margin_table.undefended_margins[None]
    predicted_undefended = prediction_scores.compute_metrics(undefended, sizes)
    tables = []
    for was_run in (True, False):
        selected_teams = [team for team in teams if ("+".join(team) in condition_names) == was_run]
        if selected_teams:
            predicted_margins = np.stack(
                [predict_stack_margins(prediction_scores, team) for team in selected_teams]
            )
            predicted = prediction_scores.compute_metrics(predicted_margins, sizes)
            stacks = [("+".join(team),) for team in selected_teams]
            observed = _observe_conditions(split_scores, stacks) if was_run else None
            tables.append(
                _build_ensemble_rows(
                    split_scores, selected_teams, STACK, predicted, observed, predicted_undefended
                )
            )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _observe_conditions(split_scores: SplitScores, names: Sequence[tuple[str]]) -> ClassMetrics:
    """Return the observed metrics of conditions, each given by its name alone."""
    indices = split_scores.find_team_indices(names)[:, 0]
    return split_scores.compute_metrics(split_scores.margin_table.margins.T[indices])


def predict_stack_margins(split_scores: SplitScores, team: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Return the predicted margins of a stack: undefended margins plus the members' changes."""
    return np.asarray(
        split_scores.get_member_margins(team).sum(1)
        - (len(team) - 1) * split_scores.margin_table.undefended_margins
    )


def compute_ensemble_margins(
    split_scores: SplitScores, team: Sequence[str], combination: str, calibration_scores: SplitScores
) -> Float[np.ndarray, " n"]:
    """Return the observed margins of one ensemble, nats above the threshold.

    Args:
        split_scores: scores of the queries.
        team: members of the ensemble.
        combination: `alone`, `stack` or a vote rule.
        calibration_scores: scores of the calibration split, to which vote weights are fitted.
    """
    if combination in (ALONE, STACK):
        return split_scores.get_member_margins(["+".join(team)])[:, 0]
    weights = (
        fit_vote_weights(calibration_scores.margin_table, calibration_scores.find_team_indices([team]))
        if combination == "fitted"
        else None
    )
    return combine_margins(split_scores.get_member_margins(team), combination, weights)


def _build_ensemble_rows(
    split_scores: SplitScores,
    teams: Sequence[tuple[str, ...]],
    combination: str,
    predicted: ClassMetrics | None,
    observed: ClassMetrics | None,
    predicted_undefended: ReferenceMetrics | None = None,
) -> pd.DataFrame:
    """Return a row for each team; values that were not predicted or not observed are NaN.

    Predicted changes are relative to `predicted_undefended`, the undefended model predicted by the same
    method from the same queries.
    """
    undefended = split_scores.undefended_metrics
    predicted_coordinates = (
        None
        if predicted is None or predicted_undefended is None
        else compute_coordinates(predicted, predicted_undefended)
    )
    observed_coordinates = None if observed is None else compute_coordinates(observed, undefended)
    missing = np.full(len(teams), np.nan)
    columns: dict[str, Any] = {
        "attack": split_scores.attack,
        "split": split_scores.split,
        "members": ["+".join(team) for team in teams],
        "how": combination,
        "size": [len(team) for team in teams],
        "predicted_on": SELECTION_SPLIT,
    }
    for name in ENSEMBLE_COORDINATES:
        predicted_values = missing if predicted_coordinates is None else predicted_coordinates[name]
        observed_values = missing if observed_coordinates is None else observed_coordinates[name]
        columns |= {
            f"predicted_{name}": predicted_values,
            f"observed_{name}": observed_values,
            f"interaction_{name}": observed_values - predicted_values,
        }
    return pd.DataFrame(columns)


def classify_mechanisms(split_scores: SplitScores, families_by_defense: Mapping[str, str]) -> pd.DataFrame:
    """Classify each defense by its mechanism: shift if both classes move the same way, or discrimination.

    The mean change is shift + ½ discrimination on harmful queries and shift − ½ discrimination on benign
    ones. Both have the same sign if |shift| ≥ ½ |discrimination|.

    Args:
        split_scores: scores of the queries.
        families_by_defense: defense → family.

    Returns:
        A row per defense: both contrasts (nats), `mechanism`, `p_shift` (share of bootstrap draws in which
        the mechanism is shift) and `by_family`, the paper's assignment.
    """
    defenses = list(families_by_defense)
    moves_same_way = _draw_same_direction(split_scores, defenses)
    single_rows = evaluate_single_defenses(split_scores, defenses)
    rows = []
    for index, defense in enumerate(defenses):
        shift, discrimination = (
            float(single_rows[f"observed_{name}"][index]) for name in ("shift", "discrimination")
        )
        rows.append(
            {
                "defense": defense,
                "family": families_by_defense[defense],
                "shift": shift,
                "discrimination": discrimination,
                "mechanism": "shift" if 2 * abs(shift) >= abs(discrimination) else "discrimination",
                "p_shift": float(moves_same_way[:, index].mean()),
                "by_family": MECHANISM_BY_FAMILY.get(families_by_defense[defense], ""),
            }
        )
    return pd.DataFrame(rows)


def classify_teams(
    split_scores: SplitScores, team_names: Iterable[str], defense_mechanisms: pd.DataFrame
) -> pd.DataFrame:
    """Return for each team whether its members share one mechanism (intra) or not (inter).

    Args:
        split_scores: scores of the queries.
        team_names: teams, members joined by +.
        defense_mechanisms: table of `classify_mechanisms`.

    Returns:
        A row per team: `kind`, as measured; `p_inter`, the share of bootstrap draws in which it is inter;
        `kind_by_family`, empty if the paper assigns no mechanism to a member's family.
    """
    names = list(defense_mechanisms["defense"])
    moves_same_way = _draw_same_direction(split_scores, names)
    measured, by_family = (
        dict(zip(names, defense_mechanisms[column], strict=True)) for column in ("mechanism", "by_family")
    )
    rows = []
    for members in team_names:
        team = members.split("+")
        member_draws = moves_same_way[:, [names.index(name) for name in team]]
        family_mechanisms = {by_family[name] for name in team}
        rows.append(
            {
                "members": members,
                "kind": _classify_team({measured[name] for name in team}),
                "p_inter": float((member_draws.min(1) != member_draws.max(1)).mean()),
                "kind_by_family": "" if "" in family_mechanisms else _classify_team(family_mechanisms),
            }
        )
    return pd.DataFrame(rows, columns=["members", "kind", "p_inter", "kind_by_family"])


def _classify_team(member_mechanisms: set[str]) -> str:
    """Return inter if the members have several mechanisms, else intra."""
    return "inter" if len(member_mechanisms) > 1 else "intra"


def _draw_same_direction(split_scores: SplitScores, defenses: Sequence[str]) -> Any:
    """Return whether both classes move the same way, by draw and defense."""
    draws, is_harmful = split_scores.bootstrap_weights, split_scores.margin_table.is_harmful
    changes = (
        split_scores.get_member_margins(defenses) - split_scores.margin_table.undefended_margins[:, None]
    )
    harmful, benign = draws.harmful_weights @ changes[is_harmful], draws.benign_weights @ changes[~is_harmful]
    return harmful * benign >= 0
