"""Ensembles of defenses: what their members let expect, what comes of them, and how far apart these are.

The margins of a stack, all members worn at once, are predicted query by query: those of the members added up,
what they change of the undefended model each by itself. What a vote of defenses comes to is predicted from
its members' means, spreads and correlation (`fusion`), and observed in the margins themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from analysis.fusion import Moments, predicted
from analysis.outcomes import COORDINATES, Base, Levels, against, levels
from analysis.resampling import Resampling, Units
from analysis.tables import UNDEFENDED, ScoreTable
from analysis.voting import Board, fit, vote, ways

ALONE, STACK = "alone", "stack"
CHOSEN_ON, REPORTED_ON = "calibration", "test"


@dataclass(frozen=True)
class Half:
    """One split of the queries under one attack.

    Attributes:
        attack: how the queries were sent.
        split: `calibration`, where ensembles are chosen, or `test`, where they are reported.
        board: the margins of all conditions, stacks that were run among them.
        units: which queries belong together.
        seed: of the bootstrap.
    """

    attack: str
    split: str
    board: Board
    units: Units
    seed: int = 0

    @classmethod
    def of(cls, scores: ScoreTable, attack: str, split: str, seed: int = 0) -> Half:
        """Return one half from the scores of its queries."""
        base = scores.condition(attack, UNDEFENDED)
        names = tuple(name for at, name in scores.conditions if at == attack)
        margins = [scores.condition(attack, name)["margin"].to_numpy(float) for name in names]
        is_harmful = base["harmful"].to_numpy(bool)
        above = np.stack(margins, axis=1) - scores.threshold
        board = Board(names, above, above[:, names.index(UNDEFENDED)], is_harmful)
        return cls(attack, split, board, Units.by_pair(base["pair"], is_harmful), seed)

    @cached_property
    def once(self) -> Resampling:
        """The queries as they are."""
        return Resampling.once(self.units)

    @cached_property
    def draws(self) -> Resampling:
        """The bootstrap draws that all figures of this half share."""
        return Resampling.draw(self.units, seed=self.seed)

    def places(self, teams: Sequence[Sequence[str]]) -> Int[np.ndarray, "teams size"]:
        """Return the places of teams' members among the conditions."""
        at = {name: place for place, name in enumerate(self.board.names)}
        return np.array([[at[name] for name in team] for team in teams])

    def of_team(self, team: Sequence[str]) -> Float[np.ndarray, "n size"]:
        """Return the margins of a team's members."""
        return self.board.margins[:, self.places([team])[0]]

    @property
    def counts(self) -> tuple[int, int]:
        """How many queries are harmful, and how many benign."""
        harmful = int(self.board.is_harmful.sum())
        return harmful, len(self.board.is_harmful) - harmful

    def read(self, margins: Float[np.ndarray, "teams n"]) -> Levels:
        """Return what classifiers with these margins are like."""
        return levels(margins[:, self.board.is_harmful], margins[:, ~self.board.is_harmful])

    @cached_property
    def undefended(self) -> Levels:
        """What the undefended model is like."""
        return self.read(self.board.before[None])


def teams(names: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Return all teams of two up to `size` members.

    >>> teams(["a", "b", "c"], 3)
    [('a', 'b'), ('a', 'c'), ('b', 'c'), ('a', 'b', 'c')]
    """
    return [team for count in range(2, size + 1) for team in combinations(names, count)]


def singles(half: Half, names: Iterable[str]) -> pd.DataFrame:
    """Return a row for each defense alone."""
    wanted = [(name,) for name in names]
    observed = half.read(half.board.margins.T[half.places(wanted)[:, 0]])
    return _rows(half, wanted, ALONE, None, observed)


def votes(half: Half, wanted: Sequence[tuple[str, ...]], fitted_to: Half) -> pd.DataFrame:
    """Return a row for each way in which each team can vote, predicted and observed.

    Args:
        half: whose queries are voted on.
        wanted: teams.
        fitted_to: of the calibration split, to which weights are fitted.
    """
    found, board = [], half.board
    sides = board.is_harmful, ~board.is_harmful
    usual = [Moments.of_teams(board.before[side][:, None], np.array([[0]])) for side in sides]
    normal = predicted(usual[0], usual[1], "mean", None, half.counts)
    for size in sorted({len(team) for team in wanted}):
        of_size = [team for team in wanted if len(team) == size]
        places = half.places(of_size)
        weights = fit(fitted_to.board, fitted_to.places(of_size))
        harmful, benign = (Moments.of_teams(board.margins[side], places) for side in sides)
        each = board.margins.T[places].transpose(0, 2, 1)  # teams, queries, members
        for how in ways(size):
            hoped = predicted(harmful, benign, how, weights, half.counts)
            came = half.read(vote(each, how, weights[:, None, :]))
            found.append(_rows(half, of_size, how, hoped, came, normal))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def stacks(half: Half, wanted: Sequence[tuple[str, ...]]) -> pd.DataFrame:
    """Return a row for each stack, predicted, and observed where it was run."""
    found = []
    for ran in (True, False):
        of_kind = [team for team in wanted if ("+".join(team) in half.board.names) == ran]
        if of_kind:
            sums = np.stack([added(half, team) for team in of_kind])
            came = None
            if ran:
                came = half.read(
                    half.board.margins.T[half.places([("+".join(team),) for team in of_kind])[:, 0]]
                )
            found.append(_rows(half, of_kind, STACK, half.read(sums), came))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def added(half: Half, team: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Return the margins that a stack should have: what each member changes, added up."""
    return np.asarray(half.of_team(team).sum(1) - (len(team) - 1) * half.board.before)


def margins(half: Half, team: Sequence[str], how: str, fitted_to: Half) -> Float[np.ndarray, " n"]:
    """Return the observed margins of one ensemble, nats above the threshold.

    Args:
        half: on whose queries.
        team: its members.
        how: `alone`, `stack` or a vote.
        fitted_to: of the calibration split, to which weights are fitted.
    """
    if how in (ALONE, STACK):
        return half.of_team(["+".join(team)])[:, 0]
    weights = fit(fitted_to.board, fitted_to.places([team])) if how == "fitted" else None
    return vote(half.of_team(team), how, weights)


def _rows(
    half: Half,
    wanted: Sequence[tuple[str, ...]],
    how: str,
    hoped: Levels | None,
    came: Levels | None,
    normal: Base | None = None,
) -> pd.DataFrame:
    """A row for each team; what was not predicted, or not observed, is missing.

    Predicted changes are those from `normal`, the undefended model predicted likewise, where there is one.
    """
    base, none = half.undefended, np.full(len(wanted), np.nan)
    found: dict[str, Any] = {
        "attack": half.attack,
        "split": half.split,
        "members": ["+".join(team) for team in wanted],
        "how": how,
        "size": [len(team) for team in wanted],
    }
    read = {
        "predicted": None if hoped is None else against(hoped, normal or base),
        "observed": None if came is None else against(came, base),
    }
    for name in COORDINATES:
        expected, seen = (none if one is None else one[name] for one in read.values())
        found |= {
            f"predicted_{name}": expected,
            f"observed_{name}": seen,
            f"interaction_{name}": seen - expected,
        }
    return pd.DataFrame(found)
