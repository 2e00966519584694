"""How sure an ensemble's figures are, and how well what is observed follows what was predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import rankdata

from analysis.decompose import COUNTED, contrast
from analysis.ensembles import ALONE, STACK, Half, added, margins
from analysis.fusion import Moments, predicted
from analysis.outcomes import COORDINATES, Levels, against, levels
from analysis.resampling import DRAWS, Resampling, interval
from analysis.tables import UNDEFENDED
from analysis.voting import fit


@dataclass(frozen=True)
class Drawn:
    """One ensemble in every bootstrap draw: each coordinate as predicted and as observed."""

    predicted: Levels
    observed: Levels


def drawn(half: Half, team: Sequence[str], how: str, fitted_to: Half, seed: int = 0) -> Drawn:
    """Return what is predicted and observed of an ensemble in draws of the queries, pairs kept whole.

    Args:
        half: on whose queries.
        team: its members.
        how: `stack` or a vote.
        fitted_to: of the calibration split; its weights stay as they are.
        seed: of the draws.
    """
    sample = Resampling.draw(half.units, DRAWS, seed)
    sides = (half.board.is_harmful, sample.harmful), (~half.board.is_harmful, sample.benign)

    def each(values: Any) -> tuple[Any, Any]:
        """The values of either class, draws first."""
        harmful, benign = (values[side][_rows_of(weights)] for side, weights in sides)
        return harmful, benign

    came, base = (levels(*each(one)) for one in (margins(half, team, how, fitted_to), half.board.before))
    if how == STACK:
        hoped = levels(*each(added(half, team)))
    else:
        weights = np.repeat(fit(fitted_to.board, fitted_to.places([team])), DRAWS, axis=0)
        harmful, benign = (Moments.of_draws(one) for one in each(half.of_team(team)))
        hoped = predicted(harmful, benign, how, weights, half.counts)
    return Drawn(against(hoped, base), against(came, base))


def _rows_of(weights: Float[np.ndarray, "draws n"]) -> Int[np.ndarray, "draws n"]:
    """Which queries a draw is made of, from how often each counts in it."""
    draws, n = weights.shape
    return np.repeat(np.tile(np.arange(n), draws), weights.astype(int).ravel()).reshape(draws, n)


def intervals(
    half: Half, row: Mapping[str, Any], fitted_to: Half, cloud: Drawn | None, seed: int = 0
) -> dict[str, float]:
    """Return the 95 % intervals of what was observed of an ensemble, and of its interaction.

    Args:
        half: on whose queries.
        row: of the ensemble.
        fitted_to: of the calibration split.
        cloud: of the ensemble; None for a single defense, which has no interaction.
        seed: of the draws.
    """
    team, how, n = row["members"].split("+"), row["how"], min(half.counts)
    samples = Resampling.once(half.units), Resampling.draw(half.units, DRAWS, seed)
    after = margins(half, team, how, fitted_to)
    same = row["members"] == UNDEFENDED
    point, many = (
        contrast(half.board.before, after, half.board.is_harmful, 0.0, sample, same) for sample in samples
    )
    found: dict[str, float] = {}
    for name in COORDINATES:
        low, high = interval(many[name], n, name in COUNTED)
        value = float(point[name][0])
        found |= {f"observed_{name}_low": min(low, value), f"observed_{name}_high": max(high, value)}
        if cloud is not None:
            low, high = interval(cloud.observed[name] - cloud.predicted[name], n)
            found |= {f"interaction_{name}_low": low, f"interaction_{name}_high": high}
    return found


def agreement(rows: pd.DataFrame, clouds: Mapping[int, Drawn]) -> pd.DataFrame:
    """Return how well observation follows prediction, by attack, split, how and kind, for each coordinate.

    Kinds are the measured ones and, with "by family" behind them, the paper's.

    Args:
        rows: of `votes` and `stacks` with their kinds; those that were not observed are left out.
        clouds: the draws of some rows, by their index. Where all rows of a group have draws, R² and rank
            correlation have intervals.

    Returns:
        R² (of the prediction as it is, no line fitted: 1 - squared error over variance), rank correlation
        (Spearman), and the interaction's mean and mean size.
    """
    found = []
    seen = rows[(rows["how"] != ALONE) & rows["observed_shift"].notna()]
    groups = {"all": seen}
    for column, ending in (("kind", ""), ("kind_by_family", " by family")):
        groups |= {kind + ending: seen[seen[column] == kind] for kind in ("intra", "inter")}
    for kind, of_kind in groups.items():
        for (attack, split, how), group in of_kind.groupby(["attack", "split", "how"], sort=False):
            about = {"attack": attack, "split": split, "how": how, "kind": kind, "n": len(group)}
            drawn = [clouds[index] for index in group.index if index in clouds]
            for name in COORDINATES:
                hoped, came = (group[f"{side}_{name}"].to_numpy(float) for side in ("predicted", "observed"))
                row = {**about, "coordinate": name, **_follows(hoped[None], came[None])}
                if len(drawn) == len(group):
                    sides = [
                        np.stack([getattr(one, side)[name] for one in drawn], axis=1)
                        for side in ("predicted", "observed")
                    ]
                    row |= _follows_between(*sides)
                found.append(row)
    return pd.DataFrame(found)


def _follows(hoped: Float[np.ndarray, "draws n"], came: Float[np.ndarray, "draws n"]) -> dict[str, Any]:
    """The measures in each draw; of one draw alone, as plain numbers."""
    error, about = came - hoped, came - came.mean(1, keepdims=True)
    total = (about**2).sum(1)
    ranks = [rankdata(side, axis=1) for side in (hoped, came)]
    ranks = [side - side.mean(1, keepdims=True) for side in ranks]
    size = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):  # fewer than two teams, or none that differ
        found = {
            "r2": np.where(total > 0, 1 - (error**2).sum(1) / total, np.nan),
            "rank_correlation": np.where(size > 0, (ranks[0] * ranks[1]).sum(1) / size, np.nan),
            "mean_interaction": error.mean(1),
            "mean_size": np.abs(error).mean(1),
        }
    return {name: float(value[0]) if len(value) == 1 else value for name, value in found.items()}


def _follows_between(hoped: Any, came: Any) -> dict[str, float]:
    """The ends of the intervals over draws."""
    found: dict[str, float] = {}
    for name, cloud in _follows(hoped, came).items():
        known = np.asarray(cloud)[np.isfinite(cloud)]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def raised_distance(
    half: Half, rows: pd.DataFrame, shifting: set[str], fitted_to: Half, seed: int = 0
) -> pd.DataFrame:
    """Return the pairs of two shift defenses whose distance, the paper's, exceeds that of each member.

    On the probability scale a pure shift changes the distance between the classes. So each raise is set
    beside what it does to the ranking, against the member that ranks better: `real` where the interval of the
    gain in AUROC lies above 0, `probability scale` where AUROC does not gain at all, else `cannot tell`.

    Args:
        half: on whose queries.
        rows: of ensembles on this half.
        shifting: defenses that work by shift.
        fitted_to: of the calibration split.
        seed: of the draws.
    """
    kept = []
    pairs = rows[(rows["size"] == 2) & rows["observed_shift"].notna()]
    for row in pairs.to_dict("records"):
        team = str(row["members"]).split("+")
        if not set(team) <= shifting:
            continue
        alone = {name: half.read(half.of_team([name]).T) for name in team}
        distance = {name: float(one["distance"][0]) for name, one in alone.items()}
        came = half.read(margins(half, team, str(row["how"]), fitted_to)[None])
        if came["distance"][0] <= max(distance.values()):
            continue
        better = max(team, key=lambda name: float(alone[name]["auroc"][0]))
        ends = gain(half, team, str(row["how"]), better, fitted_to, seed)
        kept.append(
            {
                **{name: row[name] for name in ("attack", "split", "members", "how")},
                "distance_undefended": float(half.undefended["distance"][0]),
                "distance_first": distance[team[0]],
                "distance_second": distance[team[1]],
                "distance": float(came["distance"][0]),
                "better_member": better,
                **ends,
                "gain_d_prime": float(
                    came["d_prime"][0] - max(float(one["d_prime"][0]) for one in alone.values())
                ),
                "raise": "real"
                if ends["gain_auroc_low"] > 0
                else "probability scale"
                if ends["gain_auroc"] <= 0
                else "cannot tell",
            }
        )
    return pd.DataFrame(kept)


def gain(
    half: Half, team: Sequence[str], how: str, over: str, fitted_to: Half, seed: int = 0
) -> dict[str, float]:
    """Return by how much an ensemble's AUROC exceeds a single defense's, with its 95 % interval.

    Args:
        half: on whose queries.
        team: the members.
        how: `stack` or a vote.
        over: the single defense.
        fitted_to: of the calibration split.
        seed: of the draws.
    """
    samples = Resampling.once(half.units), Resampling.draw(half.units, DRAWS, seed)
    before, after = half.of_team([over])[:, 0], margins(half, team, how, fitted_to)
    point, cloud = (
        contrast(before, after, half.board.is_harmful, 0.0, sample)["delta_auroc"] for sample in samples
    )
    low, high = interval(cloud, min(half.counts), counted=True)
    value = float(point[0])
    return {"gain_auroc": value, "gain_auroc_low": min(low, value), "gain_auroc_high": max(high, value)}
