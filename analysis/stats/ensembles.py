"""Ensembles of defenses: what their members let expect, what comes of them, and how far apart these are.

The margins of a stack, all members worn at once, are predicted query by query: those of the members added up,
what they change of the undefended model each by itself. What a vote of defenses comes to is predicted from
its members' means, spreads and correlation (`fusion`), and observed in the margins themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

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


@dataclass(frozen=True)
class SplitScores:
    """One split of the queries under one attack.

    Attributes:
        attack: how the queries were sent.
        split: `calibration`, where ensembles are chosen, or `test`, where they are reported.
        margin_table: the margins of all conditions, stacks that were run among them.
        units: which queries belong together.
        seed: of the bootstrap.
    """

    attack: str
    split: str
    margin_table: MarginTable
    units: ResamplingUnits
    seed: int = 0

    @classmethod
    def from_scores(cls, scores: ScoreTable, attack: str, split: str, seed: int = 0) -> SplitScores:
        """Return one half from the scores of its queries."""
        base = scores.select_condition(attack, UNDEFENDED)
        names = tuple(name for at, name in scores.condition_keys if at == attack)
        margins = [scores.select_condition(attack, name)["margin"].to_numpy(float) for name in names]
        is_harmful = base["harmful"].to_numpy(bool)
        above = np.stack(margins, axis=1) - scores.threshold
        board = MarginTable(names, above, above[:, names.index(UNDEFENDED)], is_harmful)
        return cls(attack, split, board, ResamplingUnits.from_pairs(base["pair"], is_harmful), seed)

    @cached_property
    def observed_weights(self) -> ResamplingWeights:
        """The queries as they are."""
        return ResamplingWeights.from_observed(self.units)

    @cached_property
    def bootstrap_weights(self) -> ResamplingWeights:
        """The bootstrap draws that all figures of this half share."""
        return ResamplingWeights.from_bootstrap(self.units, seed=self.seed)

    def find_team_indices(self, teams: Sequence[Sequence[str]]) -> Int[np.ndarray, "teams size"]:
        """Return the places of teams' members among the conditions."""
        at = {name: place for place, name in enumerate(self.margin_table.condition_names)}
        return np.array([[at[name] for name in team] for team in teams])

    def get_member_margins(self, team: Sequence[str]) -> Float[np.ndarray, "n size"]:
        """Return the margins of a team's members."""
        return self.margin_table.margins[:, self.find_team_indices([team])[0]]

    @property
    def class_sizes(self) -> tuple[int, int]:
        """How many queries are harmful, and how many benign."""
        harmful = int(self.margin_table.is_harmful.sum())
        return harmful, len(self.margin_table.is_harmful) - harmful

    def compute_metrics(self, margins: Float[np.ndarray, "teams n"]) -> ClassMetrics:
        """Return what classifiers with these margins are like."""
        return compute_class_metrics(
            margins[:, self.margin_table.is_harmful], margins[:, ~self.margin_table.is_harmful]
        )

    @cached_property
    def undefended_metrics(self) -> ClassMetrics:
        """What the undefended model is like."""
        return self.compute_metrics(self.margin_table.undefended_margins[None])


def list_teams(defenses: Sequence[str], max_size: int) -> list[tuple[str, ...]]:
    """Return all teams of two up to `size` members.

    >>> list_teams(["a", "b", "c"], 3)
    [('a', 'b'), ('a', 'c'), ('b', 'c'), ('a', 'b', 'c')]
    """
    return [team for count in range(2, max_size + 1) for team in combinations(defenses, count)]


def evaluate_single_defenses(split_scores: SplitScores, defenses: Iterable[str]) -> pd.DataFrame:
    """Return a row for each defense alone."""
    wanted = [(name,) for name in defenses]
    observed = split_scores.compute_metrics(
        split_scores.margin_table.margins.T[split_scores.find_team_indices(wanted)[:, 0]]
    )
    return _build_ensemble_rows(split_scores, wanted, ALONE, None, observed)


def evaluate_votes(
    split_scores: SplitScores, teams: Sequence[tuple[str, ...]], calibration_scores: SplitScores
) -> pd.DataFrame:
    """Return a row for each way in which each team can vote, predicted and observed.

    Args:
        split_scores: whose queries are voted on.
        teams: teams.
        calibration_scores: of the calibration split, to which weights are fitted.
    """
    found, board = [], split_scores.margin_table
    sides = board.is_harmful, ~board.is_harmful
    usual = [
        TeamMoments.from_teams(board.undefended_margins[side][:, None], np.array([[0]])) for side in sides
    ]
    normal = predict_vote_metrics(usual[0], usual[1], "mean", None, split_scores.class_sizes)
    for size in sorted({len(team) for team in teams}):
        of_size = [team for team in teams if len(team) == size]
        places = split_scores.find_team_indices(of_size)
        weights = fit_vote_weights(
            calibration_scores.margin_table, calibration_scores.find_team_indices(of_size)
        )
        harmful, benign = (TeamMoments.from_teams(board.margins[side], places) for side in sides)
        each = board.margins.T[places].transpose(0, 2, 1)  # teams, queries, members
        for how in list_vote_rules(size):
            hoped = predict_vote_metrics(harmful, benign, how, weights, split_scores.class_sizes)
            came = split_scores.compute_metrics(combine_margins(each, how, weights[:, None, :]))
            found.append(_build_ensemble_rows(split_scores, of_size, how, hoped, came, normal))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def evaluate_stacks(split_scores: SplitScores, teams: Sequence[tuple[str, ...]]) -> pd.DataFrame:
    """Return a row for each stack, predicted, and observed where it was run."""
    found = []
    for ran in (True, False):
        of_kind = [
            team for team in teams if ("+".join(team) in split_scores.margin_table.condition_names) == ran
        ]
        if of_kind:
            sums = np.stack([predict_stack_margins(split_scores, team) for team in of_kind])
            came = None
            if ran:
                came = split_scores.compute_metrics(
                    split_scores.margin_table.margins.T[
                        split_scores.find_team_indices([("+".join(team),) for team in of_kind])[:, 0]
                    ]
                )
            found.append(
                _build_ensemble_rows(split_scores, of_kind, STACK, split_scores.compute_metrics(sums), came)
            )
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def predict_stack_margins(split_scores: SplitScores, team: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Return the margins that a stack should have: what each member changes, added up."""
    return np.asarray(
        split_scores.get_member_margins(team).sum(1)
        - (len(team) - 1) * split_scores.margin_table.undefended_margins
    )


def compute_ensemble_margins(
    split_scores: SplitScores, team: Sequence[str], combination: str, calibration_scores: SplitScores
) -> Float[np.ndarray, " n"]:
    """Return the observed margins of one ensemble, nats above the threshold.

    Args:
        split_scores: on whose queries.
        team: its members.
        combination: `alone`, `stack` or a vote.
        calibration_scores: of the calibration split, to which weights are fitted.
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
    """A row for each team; what was not predicted, or not observed, is missing.

    Predicted changes are those from `normal`, the undefended model predicted likewise, where there is one.
    """
    base, none = split_scores.undefended_metrics, np.full(len(teams), np.nan)
    found: dict[str, Any] = {
        "attack": split_scores.attack,
        "split": split_scores.split,
        "members": ["+".join(team) for team in teams],
        "how": combination,
        "size": [len(team) for team in teams],
    }
    read = {
        "predicted": None
        if predicted is None
        else compute_coordinates(predicted, predicted_undefended or base),
        "observed": None if observed is None else compute_coordinates(observed, base),
    }
    for name in ENSEMBLE_COORDINATES:
        expected, seen = (none if one is None else one[name] for one in read.values())
        found |= {
            f"predicted_{name}": expected,
            f"observed_{name}": seen,
            f"interaction_{name}": seen - expected,
        }
    return pd.DataFrame(found)


# By family, as in the paper; it says nothing of the others.
MECHANISM_BY_FAMILY = {
    "reminders": "shift",
    "tuning": "shift",
    "backdoor": "shift",
    "refactoring": "discrimination",
}


def classify_mechanisms(split_scores: SplitScores, families_by_defense: Mapping[str, str]) -> pd.DataFrame:
    """Return what each defense mainly does: shift if both classes move the same way, else discrimination.

    Harmful queries move by shift + ½ discrimination and benign ones by shift − ½ discrimination, so they move
    the same way where the shift is larger than half the discrimination: the larger of the two has the name.

    Args:
        split_scores: on whose queries.
        families_by_defense: of the defenses, by name.

    Returns:
        A row per defense: both contrasts (nats), `mechanism`, `p_shift` (the share of bootstrap draws in
        which it is shift) and `by_family`, the paper's assignment.
    """
    names = list(families_by_defense)
    moved = _draw_same_direction(split_scores, names)
    alone = evaluate_single_defenses(split_scores, names)
    shift, discrimination = (alone[f"observed_{x}"].to_numpy(float) for x in ("shift", "discrimination"))
    same_way = 2 * abs(shift) >= abs(discrimination)
    rows = []
    for place, name in enumerate(names):
        rows.append(
            {
                "defense": name,
                "family": families_by_defense[name],
                "shift": shift[place],
                "discrimination": discrimination[place],
                "mechanism": "shift" if same_way[place] else "discrimination",
                "p_shift": float(moved[:, place].mean()),
                "by_family": MECHANISM_BY_FAMILY.get(families_by_defense[name], ""),
            }
        )
    return pd.DataFrame(rows)


def classify_teams(
    split_scores: SplitScores, team_names: Iterable[str], defense_mechanisms: pd.DataFrame
) -> pd.DataFrame:
    """Return for each team whether its members work by one mechanism (intra) or by several (inter).

    Args:
        split_scores: on whose queries.
        team_names: teams, their members joined by +.
        defense_mechanisms: what `mechanisms` returned.

    Returns:
        By team: `kind`, measured; `p_inter`, the share of bootstrap draws in which it is inter;
        `kind_by_family`, empty where the paper says nothing of a member's family.
    """
    names = list(defense_mechanisms["defense"])
    moved = _draw_same_direction(split_scores, names)
    mechanism, family = (
        dict(zip(names, defense_mechanisms[column], strict=True)) for column in ("mechanism", "by_family")
    )
    rows = []
    for members in team_names:
        team = members.split("+")
        sides = moved[:, [names.index(name) for name in team]]
        known = {family[name] for name in team}
        rows.append(
            {
                "members": members,
                "kind": _classify_team({mechanism[name] for name in team}),
                "p_inter": float((sides.min(1) != sides.max(1)).mean()),
                "kind_by_family": "" if "" in known else _classify_team(known),
            }
        )
    return pd.DataFrame(rows, columns=["members", "kind", "p_inter", "kind_by_family"])


def _classify_team(member_mechanisms: set[str]) -> str:
    return "inter" if len(member_mechanisms) > 1 else "intra"


def _draw_same_direction(split_scores: SplitScores, defenses: Sequence[str]) -> Any:
    """Whether both classes move the same way, by draw and defense."""
    draws, is_harmful = split_scores.bootstrap_weights, split_scores.margin_table.is_harmful
    change = split_scores.get_member_margins(defenses) - split_scores.margin_table.undefended_margins[:, None]
    return (draws.harmful_weights @ change[is_harmful]) * (draws.benign_weights @ change[~is_harmful]) >= 0
