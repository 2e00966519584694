"""Whether defenses work by the same parts of a model, and whether those that do interact."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.special import stdtrit
from scipy.stats import spearmanr

from analysis.located import CONTRASTS, UnitMatrix, ContrastEstimator, ChangeMatrix
from analysis.resampling import CONFIDENCE_LEVEL, DrawVector, ResamplingUnits

_MIN_SQUARED_LENGTH = 1e-12  # square nats, of a profile that is nothing but float noise


def estimate_profile_similarity(estimator: ContrastEstimator, changes_by_defense: Mapping[str, ChangeMatrix]) -> pd.DataFrame:
    """Return how alike the parts are that two defenses work by: cosines of their contrasts by part.

    Both are compared with the undefended model on the same queries, so what is chance in one is chance in the
    other, and would make any two seem alike. Dot products are therefore taken less what chance adds to them,
    as the scatter over pairs has it; intervals are the jackknife's. Where a defense does no more than chance
    would, there is nothing to compare.

    Args:
        estimator: the queries.
        changes_by_defense: by defense, what it does to the share of each part in each query's margin.
    """
    units = ResamplingUnits.from_pairs(estimator.pairs, estimator.is_harmful)
    adds = {name: estimator.compute_unit_contributions(change, units) for name, change in changes_by_defense.items()}
    lengths = {
        (name, contrast): _compute_debiased_dot_products(one[contrast], one[contrast], units.composition)
        for name, one in adds.items()
        for contrast in CONTRASTS
    }
    names, rows = list(changes_by_defense), []
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            for contrast in CONTRASTS:
                product = _compute_debiased_dot_products(adds[one][contrast], adds[other][contrast], units.composition)
                ends = _jackknife_cosine(product, lengths[one, contrast], lengths[other, contrast], units.composition)
                rows.append({"defense": one, "other": other, "contrast": contrast, **ends})
    columns = ["defense", "other", "contrast", "cosine", "cosine_low", "cosine_high"]
    return pd.DataFrame(rows, columns=columns)


def _compute_debiased_dot_products(contributions: UnitMatrix, other_contributions: UnitMatrix, composition: Int[np.ndarray, " units"]) -> Float[np.ndarray, " draws"]:
    """The dot product of two sums over units, less what chance adds; then without each unit in turn."""
    sums = contributions.sum(0), other_contributions.sum(0)
    whole, less = sums[0] @ sums[1], np.empty(len(composition))
    chance = np.zeros(len(composition) + 1)
    for kind in np.unique(composition):
        of = np.flatnonzero(composition == kind)
        n = len(of)
        means = contributions[of].mean(0), other_contributions[of].mean(0)
        scatter = ((contributions[of] - means[0]) * (other_contributions[of] - means[1])).sum(1)
        if n < 3:
            return np.full(len(composition) + 1, np.nan)
        here = n / (n - 1) * scatter.sum()
        chance[0] += here
        chance[1:] += here
        scale = n / (n - 1)  # those that are left stand for all
        chance[1 + of] += scale**2 * (n - 1) / (n - 2) * (scatter.sum() - scale * scatter) - here
        left = [
            total + (scale - 1) * n * mean - scale * adds[of]
            for total, mean, adds in zip(sums, means, (contributions, other_contributions), strict=True)
        ]
        less[of] = (left[0] * left[1]).sum(1)
    return np.concatenate([[whole], less]) - chance


def _jackknife_cosine(dot_products: DrawVector, squared_lengths: DrawVector, other_squared_lengths: DrawVector, composition: Int[np.ndarray, " units"]) -> dict[str, float]:
    """A cosine with its jackknife interval, from `_dots`; none where a length is no more than chance."""
    lengths = np.sqrt(np.where((squared_lengths > _MIN_SQUARED_LENGTH) & (other_squared_lengths > _MIN_SQUARED_LENGTH), squared_lengths * other_squared_lengths, np.nan))
    values = dot_products / lengths
    error = 0.0
    for kind in np.unique(composition):
        of = values[1:][composition == kind]
        error += (len(of) - 1) / len(of) * ((of - of.mean()) ** 2).sum()
    wide = float(stdtrit(len(composition) - 1, 0.5 + CONFIDENCE_LEVEL / 2) * np.sqrt(error))
    cosine, low, high = (float(np.clip(values[0] + side * wide, -1, 1)) for side in (0, -1, 1))
    return {"cosine": cosine, "cosine_low": low, "cosine_high": high}


def join_stack_interactions(similarities: pd.DataFrame, ensembles: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of defenses whose stack was run, with what their effects come to beyond the sum.

    Where a pair was stacked in both orders, the mean of the two.

    Args:
        similarities: of `profiles`, with `attack`.
        ensembles: of `analyze ensembles`, its stacks.
    """
    team = ensembles["members"].map(lambda members: "+".join(sorted(members.split("+"))))
    found = []
    for contrast in CONTRASTS:
        stacks = ensembles.assign(team=team).groupby(["attack", "team"])[f"interaction_{contrast}"].mean()
        here = similarities[similarities["contrast"] == contrast]
        names = here["attack"], here[["defense", "other"]].apply(lambda row: "+".join(sorted(row)), axis=1)
        places = pd.MultiIndex.from_arrays(names) if len(here) else stacks.index[:0]
        found.append(here.assign(interaction=stacks.reindex(places).to_numpy()))
    return pd.concat(found, ignore_index=True).dropna(subset="interaction").reset_index(drop=True)


def compute_mantel_correlation(pairs: pd.DataFrame, seed: int = 0, n_permutations: int = 1999) -> dict[str, float]:
    """Return the rank correlation of overlap and interaction over pairs of defenses, and its p-value.

    Pairs share members, so defenses are permuted, not pairs (Mantel's test).

    Args:
        pairs: of `overlap`, of one attack and contrast.
        seed: of the permutations.
        n_permutations: how many.
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
    for flip in range(n_permutations + 1):
        order = rng.permutation(len(names)) if flip else np.arange(len(names))
        moved = alike[order][:, order][places[0], places[1]]
        known = ~np.isnan(moved)  # not every pair was stacked
        few = known.sum() < 4 or np.ptp(moved[known]) == 0 or np.ptp(beyond[known]) == 0
        found.append(np.nan if few else spearmanr(moved[known], beyond[known]).statistic)
    ranks = np.array(found)
    as_far = np.nansum(np.abs(ranks[1:]) >= abs(ranks[0]) - 1e-12)
    p = (1 + as_far) / (1 + np.isfinite(ranks[1:]).sum()) if np.isfinite(ranks[0]) else np.nan
    return {"pairs": len(pairs), "rank_correlation": float(ranks[0]), "p": float(p)}
