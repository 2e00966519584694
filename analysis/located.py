"""What layers, parts and sites do to shift and discrimination: many contrasts at once, with intervals.

Shift and discrimination are means of margins, so what holds for a margin holds for them: shares that add up
to a margin add up to its contrasts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit
from scipy.stats import spearmanr

from analysis.decompose import auroc
from analysis.resampling import DRAWS, LEVEL, Draws, Resampling, Units, estimate, interval
from analysis.tables import Decomposition, Part

CONTRASTS = ("shift", "discrimination")
_NOTHING = 1e-12  # square nats, of a profile that is nothing but float noise
Change = Float[np.ndarray, "queries columns"]
Clouds = Float[np.ndarray, "draws columns"]
Adds = Float[np.ndarray, "units columns"]


@dataclass(frozen=True)
class Asked:
    """The queries that effects are averaged over.

    Attributes:
        pairs: the name of each one's pair, missing where it has none.
        is_harmful: class of each.
        seed: of the bootstrap.
        draws: of the bootstrap.
    """

    pairs: pd.Series
    is_harmful: Bool[np.ndarray, " queries"]
    seed: int = 0
    draws: int = DRAWS

    @cached_property
    def samples(self) -> tuple[Resampling, Resampling]:
        """The data as they are, and bootstrap draws."""
        units = Units.by_pair(self.pairs, self.is_harmful)
        return Resampling.once(units), Resampling.draw(units, self.draws, self.seed)

    @property
    def counts(self) -> tuple[int, int]:
        """Harmful and benign queries."""
        return int(self.is_harmful.sum()), int((~self.is_harmful).sum())

    def clouds(self, change: Change) -> list[dict[str, Clouds]]:
        """Return shift and discrimination of every column: of the data (one row), and of each draw."""
        found = []
        for sample in self.samples:
            harmful = sample.harmful @ change[self.is_harmful] / self.counts[0]
            benign = sample.benign @ change[~self.is_harmful] / self.counts[1]
            found.append({"shift": (harmful + benign) / 2, "discrimination": harmful - benign})
        return found

    def contrasts(self, change: Change) -> pd.DataFrame:
        """Return a row per column: shift and discrimination with their intervals.

        Args:
            change: of something, by query and column.
        """
        point, cloud = self.clouds(change)
        found: dict[str, Any] = {}
        for name in CONTRASTS:
            values = point[name][0]
            ends = np.array([interval(one, min(self.counts)) for one in cloud[name].T]).reshape(-1, 2)
            found[name] = values
            found[f"{name}_low"] = np.minimum(ends[:, 0], values)
            found[f"{name}_high"] = np.maximum(ends[:, 1], values)
        return pd.DataFrame(found)

    def added(self, change: Change, units: Units) -> dict[str, Adds]:
        """Return what each unit adds to shift and to discrimination of every column.

        Args:
            change: of something, by query and column.
            units: of the queries.
        """
        share = np.where(self.is_harmful, 1 / self.counts[0], 1 / self.counts[1])
        side = np.where(self.is_harmful, 1.0, -1.0)
        found = {}
        for name, weights in (("shift", share / 2), ("discrimination", share * side)):
            found[name] = np.zeros((len(units.makeup), change.shape[1]))
            np.add.at(found[name], units.of, weights[:, None] * change)
        return found

    def separation(
        self, before: Float[np.ndarray, " queries"], after: Float[np.ndarray, " queries"]
    ) -> dict[str, float]:
        """Return how well a number by query tells the classes apart before and after, and the difference."""
        clouds: dict[str, list[Any]] = {"auroc": [], "auroc_after": [], "delta_auroc": []}
        for sample in self.samples:
            old, new = (
                auroc(values[self.is_harmful], values[~self.is_harmful], sample, which)
                for which, values in enumerate((before, after))
            )
            for name, values in zip(clouds, (old, new, new - old), strict=True):
                clouds[name].append(values)
        found: dict[str, float] = {}
        for name, (point, cloud) in clouds.items():
            found |= estimate(name, point, cloud, min(self.counts), counted=True)
        return found


def by_layer(asked: Asked, before: Change, after: Change) -> pd.DataFrame:
    """Return shift and discrimination as each layer's margin shows them.

    Args:
        asked: the queries.
        before: margins by layer, undefended.
        after: the same, defended.
    """
    found = asked.contrasts(after - before)
    found.insert(0, "layer", range(len(found)))
    for name, values in (("undefended", before), ("defended", after)):
        for side, of in (("harmful", asked.is_harmful), ("benign", ~asked.is_harmful)):
            found[f"{side}_{name}"] = values[of].mean(0)
    return found


def half_way(asked: Asked, before: Change, after: Change) -> pd.DataFrame:
    """Return the layer from which on each contrast stays beyond half of its final value.

    Where the final value's interval holds 0 there is nothing to be half of, and the layer is missing. The
    interval of a layer is that of draws whose final value has the estimate's sign.

    Args:
        asked: the queries.
        before: margins by layer, undefended.
        after: the same, defended.
    """
    point, cloud = asked.clouds(after - before)
    rows = []
    n = min(asked.counts)
    for name in CONTRASTS:
        here, many = point[name], cloud[name]
        final = estimate("final", here[:, -1], many[:, -1], n)
        half = {"half": np.nan, "half_low": np.nan, "half_high": np.nan}
        if final["final_low"] > 0 or final["final_high"] < 0:
            same = many[np.sign(many[:, -1]) == np.sign(final["final"])]
            half = estimate("half", _stays(here), _stays(same), n)
        rows.append({"contrast": name, **final, **half})
    return pd.DataFrame(rows)


def _stays(by_layer: Clouds) -> Float[np.ndarray, " draws"]:
    """The first column from which on each row is at least half of its last value."""
    there = by_layer / by_layer[:, -1:] >= 0.5
    return (by_layer.shape[1] - np.cumprod(there[:, ::-1], axis=1).sum(1)).astype(float)


def by_part(asked: Asked, before: Decomposition, after: Decomposition) -> pd.DataFrame:
    """Return what every part adds to shift and discrimination; the rows add up to both.

    What is added between blocks, and biases, are left out where they are nothing.

    Args:
        asked: the queries.
        before: their margins, undefended.
        after: the same, defended.
    """
    change = after.shares - before.shares
    found = pd.concat([named(before.parts), asked.contrasts(change)], axis=1)
    nothing = found["kind"].isin(["added", "bias"]) & (np.abs(change).max(0) < 1e-5)
    return found[~nothing].reset_index(drop=True)


def named(parts: Sequence[Part]) -> pd.DataFrame:
    """Return the columns that name parts."""
    return pd.DataFrame(
        {
            "layer": pd.array([part.layer for part in parts], dtype="Int64"),
            "kind": [part.kind for part in parts],
            "head": pd.array([part.head for part in parts], dtype="Int64"),
        }
    )


def profiles(asked: Asked, changes: Mapping[str, Change]) -> pd.DataFrame:
    """Return how alike the parts are that two defenses work by: cosines of their contrasts by part.

    Both are compared with the undefended model on the same queries, so what is chance in one is chance in the
    other, and would make any two seem alike. Dot products are therefore taken less what chance adds to them,
    as the scatter over pairs has it; intervals are the jackknife's. Where a defense does no more than chance
    would, there is nothing to compare.

    Args:
        asked: the queries.
        changes: by defense, what it does to the share of each part in each query's margin.
    """
    units = Units.by_pair(asked.pairs, asked.is_harmful)
    adds = {name: asked.added(change, units) for name, change in changes.items()}
    lengths = {
        (name, contrast): _dots(one[contrast], one[contrast], units.makeup)
        for name, one in adds.items()
        for contrast in CONTRASTS
    }
    names, rows = list(changes), []
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            for contrast in CONTRASTS:
                product = _dots(adds[one][contrast], adds[other][contrast], units.makeup)
                ends = _cosine(product, lengths[one, contrast], lengths[other, contrast], units.makeup)
                rows.append({"defense": one, "other": other, "contrast": contrast, **ends})
    columns = ["defense", "other", "contrast", "cosine", "cosine_low", "cosine_high"]
    return pd.DataFrame(rows, columns=columns)


def _dots(one: Adds, other: Adds, makeup: Int[np.ndarray, " units"]) -> Float[np.ndarray, " draws"]:
    """The dot product of two sums over units, less what chance adds; then without each unit in turn."""
    sums = one.sum(0), other.sum(0)
    whole, less = sums[0] @ sums[1], np.empty(len(makeup))
    chance = np.zeros(len(makeup) + 1)
    for kind in np.unique(makeup):
        of = np.flatnonzero(makeup == kind)
        n = len(of)
        means = one[of].mean(0), other[of].mean(0)
        scatter = ((one[of] - means[0]) * (other[of] - means[1])).sum(1)
        if n < 3:
            return np.full(len(makeup) + 1, np.nan)
        here = n / (n - 1) * scatter.sum()
        chance[0] += here
        chance[1:] += here
        scale = n / (n - 1)  # those that are left stand for all
        chance[1 + of] += scale**2 * (n - 1) / (n - 2) * (scatter.sum() - scale * scatter) - here
        left = [
            total + (scale - 1) * n * mean - scale * adds[of]
            for total, mean, adds in zip(sums, means, (one, other), strict=True)
        ]
        less[of] = (left[0] * left[1]).sum(1)
    return np.concatenate([[whole], less]) - chance


def _cosine(product: Draws, one: Draws, other: Draws, makeup: Int[np.ndarray, " units"]) -> dict[str, float]:
    """A cosine with its jackknife interval, from `_dots`; none where a length is no more than chance."""
    lengths = np.sqrt(np.where((one > _NOTHING) & (other > _NOTHING), one * other, np.nan))
    values = product / lengths
    error = 0.0
    for kind in np.unique(makeup):
        of = values[1:][makeup == kind]
        error += (len(of) - 1) / len(of) * ((of - of.mean()) ** 2).sum()
    wide = float(stdtrit(len(makeup) - 1, 0.5 + LEVEL / 2) * np.sqrt(error))
    cosine, low, high = (float(np.clip(values[0] + side * wide, -1, 1)) for side in (0, -1, 1))
    return {"cosine": cosine, "cosine_low": low, "cosine_high": high}


def overlap(profiles: pd.DataFrame, ensembles: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of defenses whose stack was run, with what their effects come to beyond the sum.

    Where a pair was stacked in both orders, the mean of the two.

    Args:
        profiles: of `profiles`, with `attack`.
        ensembles: of `analyze ensembles`, its stacks.
    """
    team = ensembles["members"].map(lambda members: "+".join(sorted(members.split("+"))))
    found = []
    for contrast in CONTRASTS:
        stacks = ensembles.assign(team=team).groupby(["attack", "team"])[f"interaction_{contrast}"].mean()
        here = profiles[profiles["contrast"] == contrast]
        names = here["attack"], here[["defense", "other"]].apply(lambda row: "+".join(sorted(row)), axis=1)
        places = pd.MultiIndex.from_arrays(names) if len(here) else stacks.index[:0]
        found.append(here.assign(interaction=stacks.reindex(places).to_numpy()))
    return pd.concat(found, ignore_index=True).dropna(subset="interaction").reset_index(drop=True)


def relation(pairs: pd.DataFrame, seed: int = 0, flips: int = 1999) -> dict[str, float]:
    """Return the rank correlation of overlap and interaction over pairs of defenses, and its p-value.

    Pairs share members, so defenses are permuted, not pairs (Mantel's test).

    Args:
        pairs: of `overlap`, of one attack and contrast.
        seed: of the permutations.
        flips: how many.
    """
    pairs = pairs.dropna(subset=["cosine", "interaction"])
    names = sorted({*pairs["defense"], *pairs["other"]})
    places = [[names.index(name) for name in pairs[column]] for column in ("defense", "other")]
    alike = np.full((len(names), len(names)), np.nan)
    alike[places[0], places[1]] = alike[places[1], places[0]] = pairs["cosine"]
    beyond = pairs["interaction"].to_numpy(float)
    if len(pairs) < 4:
        return {"pairs": len(pairs), "rank_correlation": np.nan, "p": np.nan}
    rng, found = np.random.default_rng(seed), []
    for flip in range(flips + 1):
        order = rng.permutation(len(names)) if flip else np.arange(len(names))
        moved = alike[order][:, order][places[0], places[1]]
        known = ~np.isnan(moved)  # not every pair was stacked
        few = known.sum() < 4 or np.ptp(moved[known]) == 0 or np.ptp(beyond[known]) == 0
        found.append(np.nan if few else spearmanr(moved[known], beyond[known]).statistic)
    ranks = np.array(found)
    as_far = np.nansum(np.abs(ranks[1:]) >= abs(ranks[0]) - 1e-12)
    p = (1 + as_far) / (1 + np.isfinite(ranks[1:]).sum()) if np.isfinite(ranks[0]) else np.nan
    return {"pairs": len(pairs), "rank_correlation": float(ranks[0]), "p": float(p)}
