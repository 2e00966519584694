"""How sure an ensemble's figures are, and how well what is observed follows what was predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from analysis.decompose import COUNTED, contrast
from analysis.ensembles import ALONE, STACK, Half, added, margins
from analysis.fusion import Moments, predicted
from analysis.outcomes import BY_MEAN, COORDINATES, Levels, against, follows, levels
from analysis.resampling import DRAWS, estimate, interval
from analysis.tables import UNDEFENDED
from analysis.voting import fit

_NO_GAIN = 0.01  # of AUROC
_RAISED = ["attack", "split", "members", "how", "raise"]


@dataclass(frozen=True)
class Drawn:
    """One ensemble in every bootstrap draw: each coordinate as predicted and as observed."""

    predicted: Levels
    observed: Levels


def drawn(half: Half, team: Sequence[str], how: str, fitted_to: Half) -> Drawn:
    """Return what is predicted and observed of an ensemble in draws of the queries, pairs kept whole.

    Args:
        half: on whose queries.
        team: its members.
        how: `stack` or a vote.
        fitted_to: of the calibration split; its weights stay as they are.
    """
    sides = (half.board.is_harmful, half.draws.harmful), (~half.board.is_harmful, half.draws.benign)

    def each(values: Any) -> tuple[Any, Any]:
        """The values of either class, draws first."""
        harmful, benign = (values[side][_rows_of(weights)] for side, weights in sides)
        return harmful, benign

    came, base = (levels(*each(one)) for one in (margins(half, team, how, fitted_to), half.board.before))
    if how == STACK:
        return Drawn(against(levels(*each(added(half, team))), base), against(came, base))
    weights = None
    if how == "fitted":
        weights = np.repeat(fit(fitted_to.board, fitted_to.places([team])), DRAWS, axis=0)
    harmful, benign = (Moments.of_draws(one) for one in each(half.of_team(team)))
    usual = [Moments.of_draws(one) for one in each(half.board.before[:, None])]
    normal = predicted(usual[0], usual[1], "mean", None, half.counts)
    return Drawn(against(predicted(harmful, benign, how, weights, half.counts), normal), against(came, base))


def _rows_of(weights: Float[np.ndarray, "draws n"]) -> Int[np.ndarray, "draws n"]:
    """Which queries a draw is made of, from how often each counts in it."""
    draws, n = weights.shape
    return np.repeat(np.tile(np.arange(n), draws), weights.astype(int).ravel()).reshape(draws, n)


def intervals(half: Half, row: Mapping[str, Any], fitted_to: Half, cloud: Drawn | None) -> dict[str, float]:
    """Return the 95 % intervals of what was observed of an ensemble, and of its interaction.

    Args:
        half: on whose queries.
        row: of the ensemble.
        fitted_to: of the calibration split.
        cloud: of the ensemble; None for a single defense, which has no interaction.
    """
    team, how, n = row["members"].split("+"), row["how"], min(half.counts)
    after = margins(half, team, how, fitted_to)
    same = row["members"] == UNDEFENDED
    point, many = (
        contrast(half.board.before, after, half.board.is_harmful, 0.0, sample, same)
        for sample in (half.once, half.draws)
    )
    found: dict[str, float] = {}
    for name in COORDINATES:
        ends = estimate(f"observed_{name}", point[name], many[name], n, name in COUNTED)
        del ends[f"observed_{name}"]  # it is in the row
        found |= ends
        if cloud is not None:
            found |= _beyond(cloud.observed[name] - cloud.predicted[name], name, n)
    return found


def _beyond(cloud: Any, name: str, n: int) -> dict[str, float]:
    """The interval of an interaction; none where no draw differs: nothing was refused, say, or everything."""
    low, high = interval(cloud, n) if np.ptp(cloud) > 1e-9 else (np.nan, np.nan)
    return {f"interaction_{name}_low": low, f"interaction_{name}_high": high}


def agreement(rows: pd.DataFrame, clouds: Mapping[int, Drawn]) -> pd.DataFrame:
    """Return how well observation follows prediction, by attack, split, how and kind, for each coordinate.

    Kinds are the measured ones and, with "by family" behind them, the paper's. Shift and discrimination of
    votes by mean are left out: they are right by definition.

    Args:
        rows: of `votes` and `stacks` with their kinds, and intervals where there are; those that were not
            observed are left out.
        clouds: the draws of some rows, by their index. Where all rows of a group have draws, R² and rank
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
            drawn = [clouds[index] for index in group.index if index in clouds]
            for name in COORDINATES:
                if how in BY_MEAN and name in ("shift", "discrimination"):
                    continue
                hoped, came = (group[f"{side}_{name}"].to_numpy(float) for side in ("predicted", "observed"))
                row = {**about, "coordinate": name}
                row |= {one: float(value[0]) for one, value in follows(hoped[None], came[None]).items()}
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
                    row |= _ends(row, follows(*sides))
                found.append(row)
    return pd.DataFrame(found)


def _ends(row: Mapping[str, Any], clouds: Mapping[str, Any]) -> dict[str, float]:
    """The ends of the intervals over draws; each holds its own estimate."""
    found: dict[str, float] = {}
    for name, cloud in clouds.items():
        known = cloud[np.isfinite(cloud)]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        found |= {f"{name}_low": float(min(low, row[name])), f"{name}_high": float(max(high, row[name]))}
    return found


def raised_distance(
    half: Half, rows: pd.DataFrame, shifting: Mapping[str, float], fitted_to: Half
) -> pd.DataFrame:
    """Return the pairs of two shift defenses whose distance, the paper's, exceeds that of each member.

    On the probability scale a pure shift changes the distance between the classes. So each raise is set
    beside what it does to the ranking, against the member that ranks better: `real` where the interval of the
    gain in AUROC lies above 0, `probability scale` where it lies below a hundredth, else `cannot tell`.

    Args:
        half: on whose queries.
        rows: of ensembles on this half.
        shifting: how probable it is of each defense that it works by shift; those that mainly do are paired.
        fitted_to: of the calibration split.
    """
    kept: list[dict[str, Any]] = []
    pairs = rows[(rows["size"] == 2) & rows["observed_shift"].notna()]
    for row in pairs.to_dict("records"):
        team = str(row["members"]).split("+")
        if min(shifting.get(name, 0.0) for name in team) <= 0.5:
            continue
        alone = {name: half.read(half.of_team([name]).T) for name in team}
        distance = {name: float(one["distance"][0]) for name, one in alone.items()}
        came = half.read(margins(half, team, str(row["how"]), fitted_to)[None])
        if came["distance"][0] <= max(distance.values()):
            continue
        better = max(team, key=lambda name: float(alone[name]["auroc"][0]))
        ends = gain(half, team, str(row["how"]), better, fitted_to)
        kept.append(
            {
                **{name: row[name] for name in ("attack", "split", "members", "how")},
                "distance_undefended": float(half.undefended["distance"][0]),
                "distance_first": distance[team[0]],
                "distance_second": distance[team[1]],
                "distance": float(came["distance"][0]),
                "p_shift": min(shifting[name] for name in team),
                "better_member": better,
                **ends,
                "gain_d_prime": float(
                    came["d_prime"][0] - max(float(one["d_prime"][0]) for one in alone.values())
                ),
                "raise": "real"
                if ends["gain_auroc_low"] > 0
                else "probability scale"
                if ends["gain_auroc_high"] < _NO_GAIN
                else "cannot tell",
            }
        )
    return pd.DataFrame(kept, columns=list(kept[0]) if kept else _RAISED)


def gain(half: Half, team: Sequence[str], how: str, over: str, fitted_to: Half) -> dict[str, float]:
    """Return by how much an ensemble's AUROC exceeds a single defense's, with its 95 % interval.

    Args:
        half: on whose queries.
        team: the members.
        how: `stack` or a vote.
        over: the single defense.
        fitted_to: of the calibration split.
    """
    before, after = half.of_team([over])[:, 0], margins(half, team, how, fitted_to)
    point, cloud = (
        contrast(before, after, half.board.is_harmful, 0.0, sample)["delta_auroc"]
        for sample in (half.once, half.draws)
    )
    return estimate("gain_auroc", point, cloud, min(half.counts), counted=True)
